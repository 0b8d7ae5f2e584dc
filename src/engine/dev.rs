//! A private `/dev` (`--contain`): the harmless devices of the host, a pts of its own, links, shared memory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use super::points::create_at;
use super::{rootfs::Tree, sources, sys};

const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// What it has of the host's, by name: the devices, and the terminal of standard input as the console.
pub(super) fn host_files() -> Vec<(&'static str, PathBuf)> {
    let nodes = NODES.map(|name| (name, Path::new("/dev").join(name)));
    let console = sources::terminal().map(|path| ("console", path));
    nodes.into_iter().chain(console).collect()
}

/// What it has beside those.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kinds {
    /// POSIX message queues.
    pub(super) mqueue: bool,
    /// Pseudo terminals of its own.
    pub(super) pts: bool,
}

/// Fills `/dev`, which is an empty directory of ours by now, with these files of the host.
///
/// # Errors
/// As the mounts.
pub(super) fn populate(
    tree: &mut Tree,
    files: Vec<(&'static str, OwnedFd)>,
    kinds: Kinds,
) -> Result<()> {
    let dev = sys::open_in_root(
        tree.root.as_fd(),
        Path::new("/dev"),
        OFlags::RDONLY | OFlags::DIRECTORY,
    )
    .context("cannot open /dev")?;
    let link = |name: &str, target: &str| {
        rustix::fs::symlinkat(target, &dev, name)
            .with_context(|| format!("cannot create /dev/{name}"))
    };
    for (name, target) in LINKS {
        link(name, target)?;
    }
    for (name, file) in files {
        sys::set_mount_attributes(file.as_fd(), sys::attr::NOSUID)?;
        place(&dev, name, &file, false)?;
    }
    let (_, memory) = tree.session.directory(0o1777)?;
    place(&dev, "shm", &memory, true)?;
    if kinds.pts {
        let pts = sys::new_filesystem(
            "devpts",
            &[
                ("newinstance", None),
                ("ptmxmode", Some(c"0666")),
                ("mode", Some(c"0620")),
            ],
        )?;
        place(&dev, "pts", &pts, true)?;
        link("ptmx", "pts/ptmx")?;
    }
    if kinds.mqueue {
        let queues = sys::new_filesystem("mqueue", &[])?;
        place(&dev, "mqueue", &queues, true)?;
    }
    Ok(())
}

fn place(dev: &OwnedFd, name: &str, mount: &OwnedFd, directory: bool) -> Result<()> {
    let what = || format!("cannot mount /dev/{name}");
    create_at(dev, name.as_ref(), directory).with_context(what)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let target = rustix::fs::openat(dev, name, flags, Mode::empty()).with_context(what)?;
    sys::attach(mount.as_fd(), target.as_fd()).with_context(what)
}
