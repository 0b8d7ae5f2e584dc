//! The directory where a walk is, and those above it: opened one from the other, so that no link is followed and
//! nothing that is renamed meanwhile leads outside (`openat(2)`, `O_NOFOLLOW`). Trees may be deeper than a process may
//! have files open: directories far above are closed, and opened again on the way back.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};

/// Directories that are open at once.
const MAX_OPEN: usize = 128;

struct Level {
    name: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// The way from the root to where we are.
pub(super) struct Chain {
    levels: Vec<Level>,
}

impl Chain {
    /// At the root, which may be reached through links.
    pub(super) fn new(root: &Path) -> Result<Chain> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(rustix::fs::CWD, root, flags, Mode::empty())
            .with_context(|| format!("cannot read {}", root.display()))?;
        Ok(Chain {
            levels: vec![Level {
                name: root.as_os_str().as_bytes().to_vec(),
                fd: Some(fd),
            }],
        })
    }

    /// Number of directories on the way, the root among them.
    pub(super) fn depth(&self) -> usize {
        self.levels.len()
    }

    /// Goes up again; the root is at depth 1.
    pub(super) fn leave_to(&mut self, depth: usize) {
        self.levels.truncate(depth.max(1));
    }

    /// Goes into a directory of the one where we are.
    pub(super) fn enter(&mut self, name: &[u8]) -> Result<()> {
        let what = || format!("cannot open {}", self.path(name).display());
        let message = what();
        let fd = open_directory(self.here()?, name).with_context(|| message)?;
        self.levels.push(Level {
            name: name.to_vec(),
            fd: Some(fd),
        });
        // The root stays open.
        if let Some(far) = self.levels.len().checked_sub(MAX_OPEN).filter(|at| *at > 0) {
            self.levels[far].fd = None;
        }
        Ok(())
    }

    /// The directory where we are.
    pub(super) fn here(&mut self) -> Result<BorrowedFd<'_>> {
        let last = self.levels.len() - 1;
        if self.levels[last].fd.is_none() {
            let names: Vec<&[u8]> = self.levels[1..].iter().map(|l| &l.name[..]).collect();
            let fd = descend(self.root()?, &names)?;
            self.levels[last].fd = Some(fd);
        }
        match &self.levels[last].fd {
            Some(fd) => Ok(fd.as_fd()),
            None => bail!("no directory is open"),
        }
    }

    /// The root.
    pub(super) fn root(&self) -> Result<BorrowedFd<'_>> {
        let root = self.levels.first().and_then(|level| level.fd.as_ref());
        Ok(root.context("no directory is open")?.as_fd())
    }

    /// The names from below the root to where we are.
    pub(super) fn names(&self) -> Vec<Vec<u8>> {
        self.levels[1..].iter().map(|l| l.name.clone()).collect()
    }

    /// The path of something in the directory where we are, and without a name its own, for messages.
    pub(super) fn path(&self, name: &[u8]) -> PathBuf {
        let names = self.levels.iter().map(|level| level.name.as_slice());
        names
            .chain(Some(name).filter(|name| !name.is_empty()))
            .map(OsStr::from_bytes)
            .collect()
    }
}

/// The directory at a path of names.
pub(super) fn descend(root: BorrowedFd, names: &[impl AsRef<[u8]>]) -> Result<OwnedFd> {
    let mut at = root.try_clone_to_owned()?;
    for name in names {
        let name = name.as_ref();
        at = open_directory(at.as_fd(), name)
            .with_context(|| format!("cannot open {:?} again", String::from_utf8_lossy(name)))?;
    }
    Ok(at)
}

fn open_directory(parent: BorrowedFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, OsStr::from_bytes(name), flags, Mode::empty())
}
