//! The calls about files: who owns one, and new ones.
//!
//! A change of owner is tried for real first, as far as there are ids: the kernel then refuses what it must (a read-only
//! file system, a file of another user), copies a file up in an overlay, and takes away what a change of owner takes away
//! (set-user-id bits, capabilities of the file). Then it is recorded. Looking at a file that has no record is the
//! kernel's; one system call finds that out.
//!
//! A new file belongs to who makes it. For root that is so already. For everybody else, and in a directory whose group new
//! files inherit, the file is made here, with the mask of the program that asked, and recorded.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::super::sys::{self, Answer, Raw};
use super::Extent;
use super::credentials::{Credentials, KEEP};
use super::filter::{At, Call};
use super::owners::{self, Device, Owner};
use super::view::View;

/// What is to be made, beside a file that is opened.
enum New {
    Directory(Mode),
    /// A node that is no device.
    Node(FileType, Mode),
    Device(Device, Mode),
    Link(Vec<u8>),
}

fn failed(error: Errno) -> Answer {
    Answer::Error(error.raw_os_error())
}

impl View<'_> {
    /// `None`: the kernel carries it out as it is.
    pub fn file(&self, call: Call) -> Option<Answer> {
        match call {
            Call::Stat(at, buffer) => {
                let (file, owner) = self.recorded(&at)?;
                let mut stat = sys::fstat(file.as_fd()).ok()?;
                (stat.st_uid, stat.st_gid) = (owner.uid, owner.gid);
                if let Some(device) = owner.device {
                    stat.st_mode = device.kind() | (stat.st_mode & 0o7777);
                    stat.st_rdev = libc::makedev(device.major, device.minor);
                }
                self.tracee.write(buffer, stat.raw())?;
                Some(Answer::Value(0))
            }
            Call::Statx(at, flags, mask, buffer) => self.statx(&at, flags, mask, buffer),
            Call::Chown(at, uid, gid) => self.chown(&at, uid, gid),
            Call::Open(at, flags, mode) => self.open_new(&at, flags, mode),
            Call::OpenHow(at, how, size) => self.open_how(&at, how, size),
            Call::MakeDirectory(at, mode) => {
                self.make(&at, &New::Directory(Mode::from_raw_mode(mode & 0o7777)))
            }
            Call::MakeNode(at, mode, device) => self.make_node(&at, mode, device),
            Call::MakeLink(at, target) => {
                let target = self.tracee.read_path(target)?;
                self.make(&at, &New::Link(target))
            }
            Call::SetAttribute(at, name, value, size, flags) => {
                self.set_acl(&at, name, value, size, flags)
            }
            Call::Attribute(at, name, buffer, size) => self.acl(&at, name, buffer, size),
            Call::RemoveAttribute(at, name) => self.remove_acl(&at, name),
            _ => None,
        }
    }

    /// The file and its record; `None` without one.
    fn recorded(&self, at: &At) -> Option<(OwnedFd, Owner)> {
        let file = self.open(&self.named(at)?)?;
        let owner = self.owner(&file)?;
        Some((file, owner))
    }

    /// What is recorded of an open file. The record is not held while its file system, which may be the container's own,
    /// is asked.
    pub(super) fn owner(&self, file: &OwnedFd) -> Option<Owner> {
        let seen = owners::Seen::look(file.as_fd()).ok()?;
        if !self.tracee.shared.owners().may_know(&seen) {
            return None;
        }
        let handle = sys::file_handle(file.as_fd());
        self.tracee.shared.owners().find(&seen, &handle)
    }

    fn statx(&self, at: &At, flags: i32, mask: u32, buffer: u64) -> Option<Answer> {
        let (file, owner) = self.recorded(at)?;
        const SYNC: i32 = libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC;
        let flags = libc::AT_EMPTY_PATH | (flags & (SYNC | libc::AT_NO_AUTOMOUNT));
        let mut stat = sys::statx(file.as_fd(), c"", flags, mask).ok()?;
        (stat.stx_uid, stat.stx_gid) = (owner.uid, owner.gid);
        if let Some(device) = owner.device {
            stat.stx_mode = (device.kind() as u16) | (stat.stx_mode & 0o7777);
            (stat.stx_rdev_major, stat.stx_rdev_minor) = (device.major, device.minor);
        }
        self.tracee.write(buffer, stat.raw())?;
        Some(Answer::Value(0))
    }

    fn chown(&self, at: &At, uid: u32, gid: u32) -> Option<Answer> {
        let is_root = |id: u32| id == 0 || id == KEEP;
        let caller = self.tracee.credentials();
        let to_root = is_root(uid) && is_root(gid) && caller.is_privileged();
        let has_owners = self.tracee.shared.has_owners.load(Ordering::Acquire);
        if (to_root && !has_owners) || (uid, gid) == (KEEP, KEEP) {
            return None;
        }
        let file = self.open(&self.named(at)?)?;
        let before = self.owner(&file);
        // The files of procfs are what they are for who asks: the kernel's.
        if (to_root && before.is_none()) || is_in_procfs(&file)? {
            return None;
        }
        let before = before.unwrap_or_default();
        let keeps = uid == KEEP || uid == before.uid;
        let own = before.uid == caller.uid.fs && (gid == KEEP || caller.is_in(gid));
        if !(caller.is_privileged() || keeps && own) {
            return Some(Answer::Error(libc::EPERM));
        }
        // A group of the host that the file may have stays, unless root's is asked for.
        let group = (gid == 0).then_some(Gid::ROOT);
        if let Err(error) =
            rustix::fs::chownat(&file, "", Some(Uid::ROOT), group, AtFlags::EMPTY_PATH)
        {
            return Some(failed(error));
        }
        let after = Owner {
            uid: if uid == KEEP { before.uid } else { uid },
            gid: if gid == KEEP { before.gid } else { gid },
            device: before.device,
        };
        self.record(&file, after)?;
        Some(Answer::Value(0))
    }

    fn record(&self, file: &OwnedFd, owner: Owner) -> Option<()> {
        let shared = self.tracee.shared;
        if owner != Owner::default() {
            // Before the record: who looks from now on asks for the lock.
            shared.has_owners.store(true, Ordering::Release);
        }
        let seen = owners::Seen::look(file.as_fd()).ok()?;
        let handle = sys::file_handle(file.as_fd());
        shared.owners().note(&seen, handle, owner);
        Some(())
    }

    /// Whether a file that the thread makes now may belong to somebody else than root, and may be made here.
    fn makes_for_others(&self, caller: &Credentials) -> bool {
        let other = (caller.uid.fs, caller.gid.fs) != (0, 0);
        let grouped = || self.tracee.shared.owners().has_group_directories();
        // Landlock would have its say in the thread, and has none here.
        !(caller.confined || self.tracee.shared.is_confined.load(Ordering::Acquire))
            && (other || grouped())
    }

    /// User and group of what the thread makes in this directory.
    fn owner_in(&self, parent: &OwnedFd, caller: &Credentials) -> Option<(u32, u32)> {
        let own = (caller.uid.fs, caller.gid.fs);
        let mode = rustix::fs::fstat(parent).ok()?.st_mode;
        if !Mode::from_raw_mode(mode).contains(Mode::SGID) {
            return Some(own);
        }
        Some((own.0, self.owner(parent).map_or(0, |owner| owner.gid)))
    }

    /// Opens a file that may be new.
    fn open_new(&self, at: &At, flags: i32, mode: u32) -> Option<Answer> {
        let caller = self.tracee.credentials();
        if !self.makes_for_others(&caller) || flags & libc::O_DIRECTORY != 0 {
            return None;
        }
        let wanted = self.named(at)?;
        if wanted.wants_directory() {
            return None;
        }
        let rights = self.tracee.rights()?;
        let (parent, name) = self.open_parent(&wanted, &rights)?;
        let (uid, gid) = self.owner_in(&parent, &caller)?;
        let _taken = rights.take()?;
        // What exists is only opened; a symbolic link may lead to a new file, which is then root's.
        let there = rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW);
        if !matches!(there, Err(Errno::NOENT)) || (uid, gid) == (0, 0) {
            return None;
        }
        let open = OFlags::from_bits_retain(flags.cast_unsigned())
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        // Somebody else was first, or it cannot be made: the kernel tells.
        let file = rustix::fs::openat(&parent, &name, open, mode).ok()?;
        let owner = Owner {
            uid,
            gid,
            device: None,
        };
        self.record(&file, owner)?;
        let note = self.tracee.note;
        let listener = self.tracee.shared.listener.as_fd();
        let close = flags & libc::O_CLOEXEC;
        match sys::give_descriptor(listener, note.id, file.as_fd(), close) {
            Ok(fd) => Some(Answer::Value(fd.into())),
            Err(error) => {
                let _ = rustix::fs::unlinkat(&parent, &name, AtFlags::empty());
                Some(Answer::Error(error.raw_os_error().unwrap_or(libc::EMFILE)))
            }
        }
    }

    /// `openat2(2)`: with a rule for the resolution it is the kernel's, and a new file is root's.
    fn open_how(&self, at: &At, how: u64, size: u64) -> Option<Answer> {
        if !(24..=4096).contains(&size) {
            return None;
        }
        let bytes = self.tracee.read_exact(how, 24)?;
        let mut words = bytes
            .chunks_exact(8)
            .map(|b| b.try_into().map_or(0, u64::from_ne_bytes));
        let (flags, mode, resolve) = (words.next()?, words.next()?, words.next()?);
        let flags = i32::try_from(flags).ok()?;
        if resolve != 0 || flags & libc::O_CREAT == 0 {
            return None;
        }
        self.open_new(at, flags, u32::try_from(mode).ok()?)
    }

    fn make_node(&self, at: &At, mode: u32, device: u32) -> Option<Answer> {
        let kind = match mode & libc::S_IFMT {
            0 => FileType::RegularFile,
            other => FileType::from_raw_mode(other),
        };
        let bits = Mode::from_raw_mode(mode & 0o7777);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket
                if self.tracee.shared.extent == Extent::Devices =>
            {
                None
            }
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {
                self.make(at, &New::Node(kind, bits))
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                if !self.tracee.credentials().is_privileged() {
                    return Some(Answer::Error(libc::EPERM));
                }
                let device = Device {
                    block: kind == FileType::BlockDevice,
                    major: (device >> 8) & 0xfff,
                    minor: (device & 0xff) | ((device >> 12) & 0xf_ff00),
                };
                if device == Device::default() {
                    return None; // a whiteout, which everybody may make
                }
                if self.tracee.shared.extent == Extent::Devices {
                    return self.make_device(at, device, bits);
                }
                self.make(at, &New::Device(device, bits))
            }
            _ => None,
        }
    }

    /// Makes what stands for a device where the kernel knows the owners: for who could make it on a machine of its own.
    fn make_device(&self, at: &At, device: Device, mode: Mode) -> Option<Answer> {
        let rights = self.tracee.rights()?;
        let confined = self.tracee.shared.is_confined.load(Ordering::Acquire);
        if confined || !rights.has(rustix::thread::CapabilitySet::MKNOD) {
            return None;
        }
        let wanted = self.named(at)?;
        if wanted.wants_directory() {
            return None;
        }
        let (parent, name) = self.open_parent(&wanted, &rights)?;
        let _taken = rights.take()?;
        let node = |kind| rustix::fs::mknodat(&parent, &name, kind, mode, 0);
        let kind = if device.block {
            FileType::RegularFile
        } else {
            FileType::CharacterDevice
        };
        // Before Linux 5.8 only the machine's root may make a whiteout.
        let made = match node(kind) {
            Err(Errno::PERM) => node(FileType::RegularFile),
            other => other,
        };
        if let Err(error) = made {
            return Some(failed(error));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if let Ok(file) = rustix::fs::openat(&parent, &name, flags, Mode::empty()) {
            let (uid, gid) = rights.owner;
            // A directory may have given it a group of its own.
            let user = (uid != 0).then(|| Uid::from_raw(uid));
            let group = (gid != 0).then(|| Gid::from_raw(gid));
            let _ = rustix::fs::chownat(&file, "", user, group, AtFlags::EMPTY_PATH);
            let device = Some(device);
            let _ = self.record(&file, Owner { uid, gid, device });
        }
        Some(Answer::Value(0))
    }

    /// Makes what is wanted, when its owner is not simply root.
    fn make(&self, at: &At, new: &New) -> Option<Answer> {
        let device = match new {
            New::Device(device, _) => Some(*device),
            _ => None,
        };
        let caller = self.tracee.credentials();
        if device.is_none() && !self.makes_for_others(&caller) {
            return None;
        }
        let wanted = self.named(at)?;
        if !matches!(new, New::Directory(_)) && wanted.wants_directory() {
            return None;
        }
        let rights = self.tracee.rights()?;
        let (parent, name) = self.open_parent(&wanted, &rights)?;
        let (uid, gid) = self.owner_in(&parent, &caller)?;
        if device.is_none() && (uid, gid) == (0, 0) {
            return None;
        }
        let _taken = rights.take()?;
        if let Err(error) = make_in(&parent, &name, new) {
            return Some(failed(error));
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&parent, &name, flags, Mode::empty()).ok();
        // It may have been renamed by now; then it stays root's.
        if let Some(file) = file {
            let _ = self.record(&file, Owner { uid, gid, device });
        }
        Some(Answer::Value(0))
    }
}

fn is_in_procfs(file: &OwnedFd) -> Option<bool> {
    Some(rustix::fs::fstatfs(file).ok()?.f_type as i64 == super::view::PROC_MAGIC)
}

fn make_in(parent: &OwnedFd, name: &CStr, new: &New) -> rustix::io::Result<()> {
    let node = |kind, mode| rustix::fs::mknodat(parent, name, kind, mode, 0);
    match new {
        New::Directory(mode) => rustix::fs::mkdirat(parent, name, *mode),
        New::Node(kind, mode) => node(*kind, *mode),
        New::Device(_, mode) => node(FileType::RegularFile, *mode),
        New::Link(target) => rustix::fs::symlinkat(target.as_slice(), parent, name),
    }
}
