//! A private `/dev` (`--contain`): the harmless devices of the host, a pts of its own, links, shared memory.

use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::OFlags;

use super::rootfs::Tree;
use super::sys;
use crate::plan::{Missing, Mount, Source, Why};

const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Fills `/dev`, which is an empty directory of ours by now.
///
/// # Errors
/// As the mounts.
pub fn populate(tree: &mut Tree, mqueue: bool) -> Result<()> {
    let dev = sys::open_in_root(
        tree.root.as_fd(),
        Path::new("/dev"),
        OFlags::RDONLY | OFlags::DIRECTORY,
    )
    .context("cannot open /dev")?;
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, &dev, name)
            .with_context(|| format!("cannot create /dev/{name}"))?;
    }
    for name in NODES {
        bind(
            tree,
            PathBuf::from("/dev").join(name),
            &format!("/dev/{name}"),
            Missing::Skip,
        )?;
    }
    tree.apply(&mount(Source::Private(0o1777), "/dev/shm", Missing::Fail))?;
    let pts = sys::new_filesystem(
        "devpts",
        &[
            ("newinstance", None),
            ("ptmxmode", Some(c"0666")),
            ("mode", Some(c"0620")),
        ],
    )?;
    place(&dev, "pts", &pts)?;
    if mqueue {
        let queues = sys::new_filesystem("mqueue", &[])?;
        place(&dev, "mqueue", &queues)?;
    }
    if std::io::stdin().is_terminal()
        && let Ok(tty) = rustix::termios::ttyname(std::io::stdin(), Vec::new())
    {
        bind(
            tree,
            PathBuf::from(tty.to_string_lossy().into_owned()),
            "/dev/console",
            Missing::Skip,
        )?;
    }
    Ok(())
}

fn mount(source: Source, target: &str, missing: Missing) -> Mount {
    Mount {
        source,
        target: target.into(),
        writable: true,
        missing,
        why: Why::Default,
    }
}

fn bind(tree: &mut Tree, from: PathBuf, target: &str, missing: Missing) -> Result<()> {
    tree.apply(&mount(Source::Bind(from), target, missing))
}

fn place(dev: &OwnedFd, name: &str, filesystem: &OwnedFd) -> Result<()> {
    let what = || format!("cannot mount /dev/{name}");
    rustix::fs::mkdirat(dev, name, rustix::fs::Mode::from_raw_mode(0o755)).with_context(what)?;
    let target = rustix::fs::openat(
        dev,
        name,
        OFlags::PATH | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .with_context(what)?;
    sys::attach(filesystem.as_fd(), target.as_fd()).with_context(what)
}
