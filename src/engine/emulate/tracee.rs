//! What one question is about: the memory, the paths and the credentials of the thread that asks.
//!
//! **Paths** are resolved as the thread itself would resolve them. Each thread of the supervisor has the container's root
//! as its own (`chroot(2)`), so no symbolic link and no `..` leads out; a relative path begins at the magic link
//! `/proc/PID/cwd` or `/proc/PID/fd/N` of the host's procfs. A thread of the container that changed its root, or its
//! mounts, is followed there for the length of one question. What cannot be resolved here is the kernel's to answer.
//!
//! **Races.** What is read from memory may change at once. So nothing is decided by a path twice: it is opened once for
//! reference (`O_PATH`), and everything is done to what is open. The supervisor is root of the same user namespace as the
//! container and has no right that the container has not.
//!
//! **Credentials** need a place that is inherited at the very moment of fork and clone, is kept by execve, and cannot be
//! confused when numbers of processes come back. The timer slack of a thread (`PR_SET_TIMERSLACK` in `prctl(2)`,
//! `/proc/PID/timerslack_ns`) is such a place: root has what the container began with, and the credentials with number
//! N have N nanoseconds more.

use std::ffi::CString;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use rustix::fs::{CWD, Mode, OFlags};

use super::super::sys::{self, Notification};
use super::credentials::Credentials;
use super::filter::At;
use super::supervisor::Shared;

/// One question.
pub struct Tracee<'a> {
    /// What all threads of the supervisor share.
    pub shared: &'a Shared,
    /// The question.
    pub note: Notification,
}

/// A path as this process can use it.
pub struct Place {
    /// Below the host's procfs, else absolute.
    magic: bool,
    path: CString,
    follow: bool,
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
        let count = process_vm_readv(self.pid(), &mut local, &remote).ok()?;
        bytes.truncate(count);
        Some(bytes)
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

    /// Writes to its memory, if it still waits.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        let base = usize::try_from(address).ok()?;
        let len = bytes.len();
        if !self.is_pending() {
            return None;
        }
        let written = process_vm_writev(
            self.pid(),
            &[IoSlice::new(bytes)],
            &[RemoteIoVec { base, len }],
        );
        (written == Ok(len)).then_some(())
    }

    /// Where a call's file is.
    pub fn place(&self, at: &At) -> Option<Place> {
        let path = match at.path {
            Some(address) => self.read_path(address)?,
            None => Vec::new(),
        };
        if path.is_empty() && !at.empty {
            return None; // the kernel says ENOENT
        }
        self.place_of(at, &path)
    }

    /// The same with a path that has been read.
    pub fn place_of(&self, at: &At, path: &[u8]) -> Option<Place> {
        let thread = self.note.thread;
        if path.starts_with(b"/") {
            // In the container's procfs this process does not exist.
            let own = [
                (&b"/proc/self/"[..], ""),
                (b"/proc/thread-self/", ""),
                (b"/dev/fd/", "fd/"),
            ];
            let rest = own
                .iter()
                .find_map(|(prefix, to)| Some((path.strip_prefix(*prefix)?, to)));
            let (magic, path) = match rest {
                Some((rest, to)) => (true, [format!("{thread}/{to}").as_bytes(), rest].concat()),
                None => (false, path.to_vec()),
            };
            return Some(Place {
                magic,
                path: CString::new(path).ok()?,
                follow: at.follow,
            });
        }
        let mut whole = match at.dir {
            libc::AT_FDCWD => format!("{thread}/cwd"),
            fd if fd >= 0 => format!("{thread}/fd/{fd}"),
            _ => return None,
        }
        .into_bytes();
        if !path.is_empty() {
            whole.push(b'/');
            whole.extend(path);
        }
        Some(Place {
            magic: true,
            path: CString::new(whole).ok()?,
            // The magic link itself must be.
            follow: at.follow || path.is_empty(),
        })
    }

    fn base(&self, place: &Place) -> BorrowedFd<'_> {
        if place.magic {
            self.shared.proc.as_fd()
        } else {
            CWD
        }
    }

    /// `statx(2)` of the file at a place, of what the record knows it by.
    pub fn look(&self, place: &Place) -> Option<libc::statx> {
        let follow = if place.follow {
            0
        } else {
            libc::AT_SYMLINK_NOFOLLOW
        };
        let flags = follow | libc::AT_NO_AUTOMOUNT;
        sys::statx(self.base(place), &place.path, flags, libc::STATX_INO).ok()
    }

    /// Opens the file at a place for reference.
    pub fn open(&self, place: &Place) -> Option<OwnedFd> {
        let mut flags = OFlags::PATH | OFlags::CLOEXEC;
        flags.set(OFlags::NOFOLLOW, !place.follow);
        rustix::fs::openat(self.base(place), &place.path, flags, Mode::empty()).ok()
    }

    /// Opens the directory in which a new file is to be, and gives the file's name; `None` when the name is none.
    pub fn open_parent(&self, at: &At) -> Option<(OwnedFd, CString)> {
        let path = self.read_path(at.path?)?;
        let trimmed = path.iter().rposition(|b| *b != b'/').map(|i| &path[..=i])?;
        let start = trimmed
            .iter()
            .rposition(|b| *b == b'/')
            .map_or(0, |i| i + 1);
        let name = &trimmed[start..];
        if name == b"." || name == b".." {
            return None;
        }
        let parent = At {
            follow: true,
            ..*at
        };
        // The slash at its end stays: only a directory will do.
        let place = self.place_of(&parent, &path[..start])?;
        Some((self.open(&place)?, CString::new(name).ok()?))
    }

    /// Whether the path ends in a slash: then only a directory may be there.
    pub fn wants_directory(&self, at: &At) -> Option<bool> {
        Some(self.read_path(at.path?)?.ends_with(b"/"))
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

    /// The permission bits that its new files lack.
    pub fn umask(&self) -> Option<Mode> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let path = format!("{}/status", self.note.thread);
        let file = rustix::fs::openat(&self.shared.proc, path, flags, Mode::empty()).ok()?;
        // It is the second line.
        let mut text = [0; 256];
        let len = rustix::io::read(&file, &mut text).ok()?;
        let text = String::from_utf8_lossy(&text[..len]);
        let bits = text.lines().find_map(|line| line.strip_prefix("Umask:"))?;
        u32::from_str_radix(bits.trim(), 8)
            .ok()
            .map(Mode::from_raw_mode)
    }

    /// Takes its root while the answer lives, when it may have another one than the container.
    pub fn enter_root(&self) -> Option<Option<Elsewhere<'_>>> {
        if !self.shared.is_apart.load(Ordering::Acquire) {
            return Some(None);
        }
        let path = CString::new(format!("{}/root", self.note.thread)).ok()?;
        let mask = libc::STATX_INO | STATX_MNT_ID;
        let its = sys::statx(self.shared.proc.as_fd(), &path, 0, mask).ok()?;
        let ours = sys::statx(CWD, c"/", 0, mask).ok()?;
        let same = |s: &libc::statx| (s.stx_mnt_id, s.stx_ino);
        if same(&its) == same(&ours) {
            return Some(None);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.shared.proc, &path, flags, Mode::empty()).ok()?;
        let elsewhere = Elsewhere(self.shared);
        enter(&root).ok()?;
        Some(Some(elsewhere))
    }
}

/// `STATX_MNT_ID` (Linux 5.8).
const STATX_MNT_ID: u32 = 0x1000;

/// Back to the container's root when it goes.
pub struct Elsewhere<'a>(&'a Shared);

impl Drop for Elsewhere<'_> {
    fn drop(&mut self) {
        if enter(&self.0.root).is_err() {
            // No thread may go on with a root that is not the container's.
            sys::exit_now(255);
        }
    }
}

/// Makes an open directory the root and the working directory of this thread, which shares them with no other.
///
/// # Errors
/// As `chroot(2)`.
pub fn enter(root: &OwnedFd) -> rustix::io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(".")
}
