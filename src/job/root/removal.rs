//! Removing a job's directory, which its user could write: by descriptors, following no link and entering no mount.

use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};

use super::memory::Top;
use crate::host::JOBS;

/// Entries that are removed from a job's directory at most.
pub(super) const MAX_ENTRIES: usize = 10_000;

pub(super) fn is_empty(top: &Top, name: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::openat(&top.0, name, flags, Mode::empty()) else {
        return true;
    };
    rustix::fs::Dir::read_from(&fd).is_ok_and(|entries| {
        entries
            .flatten()
            .all(|e| matches!(e.file_name().to_bytes(), b"." | b".."))
    })
}

/// Detaches what is mounted below a job's directory. No symbolic link is followed.
pub(super) fn unmount_below(top: &Top, name: &str) {
    let prefix = format!("{JOBS}/{name}/");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts
        .lines()
        .rev()
        .filter_map(|l| l.split(' ').nth(4)?.strip_prefix(&prefix));
    for point in points {
        // Blanks and the like are written in octal.
        let path = format!("{name}/{}", unescape(point));
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
        if let Ok(fd) = rustix::fs::openat2(&top.0, path, flags, Mode::empty(), resolve) {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

pub(super) fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Removes a tree by descriptors: no link is followed, no mount entered, no more than so many entries.
pub(super) fn remove_tree(
    parent: &OwnedFd,
    name: &str,
    device: Option<u64>,
    depth: usize,
    budget: &mut usize,
) {
    let flags =
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::openat(parent, name, flags, Mode::empty()) else {
        return;
    };
    let Ok(stat) = rustix::fs::fstat(&fd) else {
        return;
    };
    if device.is_some_and(|d| d != stat.st_dev) || depth > 32 {
        return;
    }
    let entries = rustix::fs::Dir::read_from(&fd)
        .into_iter()
        .flatten()
        .flatten();
    for entry in entries {
        let Ok(name) = entry.file_name().to_str() else {
            let _ = rustix::fs::unlinkat(&fd, entry.file_name(), AtFlags::empty());
            continue;
        };
        if name == "." || name == ".." {
            continue;
        }
        if *budget == 0 {
            return;
        }
        *budget -= 1;
        let kind = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)
            .map(|s| FileType::from_raw_mode(s.st_mode));
        if kind == Ok(FileType::Directory) {
            remove_tree(&fd, name, Some(stat.st_dev), depth + 1, budget);
        } else {
            let _ = rustix::fs::unlinkat(&fd, name, AtFlags::empty());
        }
    }
    let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
}
