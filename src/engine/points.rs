//! Mount points: where a path leads inside a root, and what is made there.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::sys;

/// Creates a file or a directory.
///
/// # Errors
/// As `openat(2)` and `mkdirat(2)`; `EEXIST` when something is there.
pub(super) fn create_at(parent: &OwnedFd, name: &OsStr, directory: bool) -> io::Result<()> {
    if directory {
        return Ok(rustix::fs::mkdirat(
            parent,
            name,
            Mode::from_raw_mode(0o755),
        )?);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)?)
}

/// Opens a place below an open directory, through no link, and creates what is missing of it.
///
/// # Errors
/// As `openat2(2)` and those of [`create_at`]; `ELOOP` for a link.
pub(super) fn create_beneath(top: &OwnedFd, rest: &Path, directory: bool) -> io::Result<OwnedFd> {
    let open = |at: &OwnedFd, name: &OsStr| {
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat2(at, name, flags, Mode::empty(), resolve)
    };
    let mut at = rustix::io::dup(top)?;
    let mut names = rest
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .peekable();
    while let Some(name) = names.next() {
        let directory = directory || names.peek().is_some();
        at = match open(&at, name) {
            Err(Errno::NOENT) => {
                match create_at(&at, name, directory) {
                    // Somebody else was faster.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    other => other?,
                }
                open(&at, name)?
            }
            other => other?,
        };
    }
    Ok(at)
}

/// Where `path` leads inside `root`, with links followed as `chroot(2)` would, the last parts of which need not exist.
pub(super) fn resolve_in(root: &OwnedFd, path: &Path) -> Result<PathBuf> {
    let mut todo: Vec<PathBuf> = path
        .components()
        .rev()
        .map(|c| PathBuf::from(c.as_os_str()))
        .collect();
    let mut done = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = todo.pop() {
        match part.as_os_str().as_bytes() {
            b"/" => done = PathBuf::from("/"),
            b"." => {}
            b".." => {
                done.pop();
            }
            _ => {
                done.push(&part);
                let Ok(fd) =
                    sys::open_in_root(root.as_fd(), &done, OFlags::PATH | OFlags::NOFOLLOW)
                else {
                    continue;
                };
                let Ok(link) = rustix::fs::readlinkat(&fd, "", Vec::new()) else {
                    continue;
                };
                links += 1;
                if links > 40 {
                    bail!("too many symbolic links in {}", path.display());
                }
                done.pop();
                let link = PathBuf::from(OsStr::from_bytes(link.to_bytes()));
                todo.extend(
                    link.components()
                        .rev()
                        .map(|c| PathBuf::from(c.as_os_str())),
                );
            }
        }
    }
    Ok(done)
}
