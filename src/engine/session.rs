//! What is private to one container: a small file system in memory.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use super::sources::Sources;
use super::{server, sys};

/// A file system in memory, over the host's `/`. It lies under the container's root, and goes with the host's tree; what was
/// copied from it stays.
pub struct Session {
    top: OwnedFd,
    /// How many files there are.
    count: usize,
}

impl Session {
    /// Mounts one over `/`. From then on a path of the host may lead into it: what is needed of the host has been opened.
    ///
    /// # Errors
    /// As the mounts.
    pub(super) fn over_host(_opened: &Sources) -> Result<Session> {
        let top = sys::new_filesystem("tmpfs", &[("mode", Some(c"0755"))])?;
        sys::attach_over_root(top.as_fd())?;
        Ok(Session { top, count: 0 })
    }

    /// A new directory: opened, and as a detached mount.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn directory(&mut self, mode: u32) -> Result<(OwnedFd, OwnedFd)> {
        let fd = self.make(OFlags::RDONLY)?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
        let tree = sys::clone_tree(fd.as_fd(), Path::new(""))?;
        Ok((fd, tree))
    }

    /// A new file as a detached mount, mode 0644.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn file(&mut self, content: &[u8]) -> Result<OwnedFd> {
        let name = self.next_name();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.top, &name, flags, Mode::from_raw_mode(0o644))
            .context("cannot create a private file")?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o644))?;
        std::io::Write::write_all(&mut std::fs::File::from(fd), content)
            .context("cannot write a private file")?;
        sys::clone_tree(self.top.as_fd(), Path::new(&name))
    }

    /// Attaches a detached mount out of sight: overlayfs takes, and parts can be copied from, attached mounts only.
    ///
    /// # Errors
    /// As `move_mount(2)`.
    pub fn park(&mut self, tree: &OwnedFd) -> Result<()> {
        let place = self.make(OFlags::PATH)?;
        sys::attach(tree.as_fd(), place.as_fd()).context("cannot attach an image")
    }

    /// A view of an image as a detached mount.
    ///
    /// # Errors
    /// As the mounts.
    pub fn view(&mut self, view: &server::View) -> Result<OwnedFd> {
        self.park(&view.stage)?;
        sys::clone_tree(view.stage.as_fd(), Path::new(&view.name))
    }

    fn make(&mut self, how: OFlags) -> Result<OwnedFd> {
        let name = self.next_name();
        rustix::fs::mkdirat(&self.top, &name, Mode::RWXU)
            .context("cannot create a private directory")?;
        let flags = how | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.top, &name, flags, Mode::empty())?)
    }

    fn next_name(&mut self) -> String {
        self.count += 1;
        self.count.to_string()
    }
}
