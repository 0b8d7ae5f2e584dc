//! Mount points: where a path leads inside a root, and what is made there.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{Mode, OFlags};

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

/// Creates a directory of the host with its parents (`--workdir`), and sets its mode when it is new.
pub(super) fn create_all(path: &Path, mode: u32) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path)
        .with_context(|| format!("cannot create {} (--workdir)", path.display()))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// Creates a mount point and the directories above it in an empty tree of ours.
pub(super) fn make_point(tree: &OwnedFd, path: &Path, directory: bool) -> Result<()> {
    let what = || format!("cannot create the mount point {}", path.display());
    let mut at = rustix::io::dup(tree)?;
    let mut names = path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name),
        _ => None,
    });
    let mut next = names.next();
    while let Some(name) = next {
        next = names.next();
        match create_at(&at, name, directory || next.is_some()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(what);
            }
            _ => {}
        }
        if next.is_some() {
            at = rustix::fs::openat(
                &at,
                name,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .with_context(what)?;
        }
    }
    Ok(())
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
