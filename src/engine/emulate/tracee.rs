//! What one question is about: the memory, the rights and the credentials of the thread that asks. Its files are in
//! [`super::view`].
//!
//! **Rights.** What is made for a thread is made with the capabilities that it has: fewer than the supervisor's in a
//! program that gave some up, or that left the container's user namespace. Its user and groups are the supervisor's own,
//! as there are no others.
//!
//! **Credentials** need a place that is inherited at the very moment of fork and clone, is kept by execve, and cannot be
//! confused when numbers of processes come back. The timer slack of a thread (`PR_SET_TIMERSLACK` in `prctl(2)`,
//! `/proc/PID/timerslack_ns`) is such a place: root has what the container began with, and the credentials with number
//! N have N nanoseconds more.

use std::fs::File;
use std::io::{IoSliceMut, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::super::sys::{self, Notification};
use super::credentials::Credentials;
use super::supervisor::Shared;

/// One question.
pub struct Tracee<'a> {
    /// What all threads of the supervisor share.
    pub shared: &'a Shared,
    /// The question.
    pub note: Notification,
}

/// Longest path, bytes, with its NUL (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Most paths are shorter.
const USUAL_PATH: usize = 256;
const PAGE: usize = 4096;

impl Tracee<'_> {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.note.thread.cast_signed())
    }

    /// Whether it still waits: what was learnt about its number is about it.
    pub fn is_pending(&self) -> bool {
        sys::is_pending(self.shared.listener.as_fd(), self.note.id)
    }

    /// Memory at an address: as much of `len` bytes as can be read.
    pub fn read(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        let base = usize::try_from(address).ok()?;
        // In two parts, so that an unmapped second page takes nothing of the first.
        let first = len.min(PAGE - base % PAGE);
        let mut bytes = vec![0; len];
        let remote = [
            RemoteIoVec { base, len: first },
            RemoteIoVec {
                base: base.checked_add(first)?,
                len: len - first,
            },
        ];
        let mut local = [IoSliceMut::new(&mut bytes)];
        let count = match process_vm_readv(self.pid(), &mut local, &remote) {
            Ok(count) => count,
            Err(Errno::EPERM | Errno::ENOSYS) => {
                let file = self.memory(OFlags::RDONLY)?;
                let (one, two) = bytes.split_at_mut(first);
                match file.read_at(one, address).ok()? {
                    count if count < first => count,
                    count => count + file.read_at(two, address + first as u64).unwrap_or(0),
                }
            }
            Err(_) => return None,
        };
        bytes.truncate(count);
        Some(bytes)
    }

    /// Its memory as a file: where a filter around us forbids the calls for it, as container engines have them.
    fn memory(&self, access: OFlags) -> Option<File> {
        let path = format!("{}/mem", self.note.thread);
        let flags = access | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.shared.proc, path, flags, Mode::empty()).ok()?;
        Some(File::from(file))
    }

    /// Exactly so many bytes.
    pub fn read_exact(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        self.read(address, len).filter(|bytes| bytes.len() == len)
    }

    /// A C string of at most `PATH_MAX` bytes, without its end.
    pub fn read_path(&self, address: u64) -> Option<Vec<u8>> {
        for len in [USUAL_PATH, MAX_PATH] {
            let mut bytes = self.read(address, len)?;
            if let Some(end) = bytes.iter().position(|b| *b == 0) {
                bytes.truncate(end);
                return Some(bytes);
            }
        }
        None
    }

    /// Writes to its memory, if it still waits. The memory is opened before that is asked, so that it is that of the thread,
    /// and not of another process that has its number by then.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        let memory = self.memory(OFlags::WRONLY)?;
        if !self.is_pending() {
            return None;
        }
        (memory.write_at(bytes, address).ok()? == bytes.len()).then_some(())
    }

    fn slack_file(&self) -> String {
        format!("{}/timerslack_ns", self.note.thread)
    }

    /// Its emulated credentials.
    pub fn credentials(&self) -> Arc<Credentials> {
        let shared = self.shared;
        if !shared.has_credentials.load(Ordering::Acquire) {
            return shared.credentials().get(0);
        }
        let number = self
            .slack()
            .and_then(|slack| usize::try_from(slack.checked_sub(shared.slack)?).ok());
        shared.credentials().get(number.unwrap_or(0))
    }

    fn slack(&self) -> Option<u64> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let path = self.slack_file();
        let file = rustix::fs::openat(&self.shared.proc, path, flags, Mode::empty()).ok()?;
        let mut text = [0; 32];
        let len = rustix::io::read(&file, &mut text).ok()?;
        std::str::from_utf8(&text[..len]).ok()?.trim().parse().ok()
    }

    /// Changes them. `None` when that cannot be.
    pub fn set_credentials(&self, new: Credentials) -> Option<()> {
        let shared = self.shared;
        let number = shared.credentials().number(new)?;
        if number == 0 && !shared.has_credentials.load(Ordering::Acquire) {
            return Some(());
        }
        shared.has_credentials.store(true, Ordering::Release);
        let slack = shared.slack + u64::try_from(number).ok()?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let path = self.slack_file();
        let file = rustix::fs::openat(&shared.proc, path, flags, Mode::empty()).ok()?;
        if !self.is_pending() {
            return None;
        }
        rustix::io::write(&file, slack.to_string().as_bytes()).ok()?;
        Some(())
    }

    /// What procfs tells of it.
    pub fn status(&self) -> Option<Status> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let path = format!("{}/status", self.note.thread);
        let file = rustix::fs::openat(&self.shared.proc, path, flags, Mode::empty()).ok()?;
        let mut text = Vec::with_capacity(4096);
        // It grows with the caller's groups.
        let most = std::fs::File::from(file).take(MAX_STATUS);
        { most }.read_to_end(&mut text).ok()?;
        Status::parse(&String::from_utf8_lossy(&text))
    }

    /// What it may do to files, and the mask of its new ones.
    pub fn rights(&self) -> Option<Rights<'_>> {
        let status = self.status()?;
        Some(Rights {
            shared: self.shared,
            umask: status.umask,
            effective: status.effective,
            owner: status.owner,
        })
    }
}

/// Longest answer of `/proc/PID/status`, bytes: a line holds a number for each of 65 536 groups.
const MAX_STATUS: u64 = 1 << 20;

/// What `/proc/PID/status` says of a thread.
#[derive(Debug, PartialEq, Eq)]
pub struct Status {
    /// The permission bits that its new files lack.
    pub umask: Mode,
    /// The number of its process.
    pub process: u32,
    /// The capabilities that count now.
    pub effective: CapabilitySet,
    /// User and group of its new files.
    pub owner: (u32, u32),
}

impl Status {
    fn parse(text: &str) -> Option<Status> {
        let field = |name: &str| {
            let mut lines = text.lines();
            let value = lines.find_map(|line| line.strip_prefix(name))?;
            Some(value.trim())
        };
        let umask = u32::from_str_radix(field("Umask:")?, 8).ok()?;
        let effective = u64::from_str_radix(field("CapEff:")?, 16).ok()?;
        // Real, effective, saved, and that for files.
        let fourth = |name| field(name)?.split_ascii_whitespace().nth(3)?.parse().ok();
        Some(Status {
            umask: Mode::from_raw_mode(umask),
            process: field("Tgid:")?.parse().ok()?,
            effective: CapabilitySet::from_bits_retain(effective),
            owner: (fourth("Uid:")?, fourth("Gid:")?),
        })
    }
}

/// What a thread may do to files.
pub struct Rights<'a> {
    shared: &'a Shared,
    umask: Mode,
    effective: CapabilitySet,
    /// Who owns what it makes, as the kernel knows it.
    pub owner: (u32, u32),
}

impl<'a> Rights<'a> {
    /// Whether they hold this capability.
    pub fn has(&self, capability: CapabilitySet) -> bool {
        self.effective.contains(capability)
    }

    /// This thread of the supervisor has no more rights than the other, until the answer goes.
    pub fn take(&self) -> Option<Taken<'a>> {
        rustix::process::umask(self.umask);
        let own = self.shared.capabilities;
        let effective = own.effective & self.effective;
        if effective == own.effective {
            return Some(Taken(None));
        }
        let taken = Taken(Some(self.shared));
        set_capabilities(None, CapabilitySets { effective, ..own }).ok()?;
        Some(taken)
    }
}

/// Gives the supervisor's own rights back when it goes.
pub struct Taken<'a>(Option<&'a Shared>);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0
            && set_capabilities(None, shared.capabilities).is_err()
        {
            // What is permitted can be taken again; else this thread would answer wrongly from now on.
            sys::exit_now(255);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read_whatever_stands_between() {
        let groups = "7 ".repeat(300);
        let text = format!(
            "Name:\tx Umask:\nUmask:\t0027\nState:\tR\nTgid:\t12\nPid:\t13\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t{groups}\nCapPrm:\tff\nCapEff:\t0000000000000003\n"
        );
        let status = Status::parse(&text).unwrap();
        assert_eq!(status.umask, Mode::from_raw_mode(0o027));
        assert_eq!((status.process, status.effective.bits()), (12, 3));
        assert_eq!(status.owner, (4, 8));
        assert_eq!(Status::parse("Umask:\t0022\nTgid:\t1\n"), None);
    }
}
