//! Owners that only a record knows (`engine::emulate`): how they come into a tree that is packed.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use crate::engine::emulate::{Owner, Owners};
use crate::squash::{NodeId, Tree};

/// Gives the nodes of a tree that was read from `root` the owners of the record.
///
/// # Errors
/// When a file of the tree cannot be opened.
pub fn amend(tree: &mut Tree, root: &Path, owners: &Owners) -> Result<()> {
    if owners.is_empty() {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty())
        .with_context(|| format!("cannot open {}", root.display()))?;
    apply(tree, Tree::ROOT, &fd, owners)?;
    below(tree, Tree::ROOT, &fd, owners)
}

fn apply(tree: &mut Tree, id: NodeId, fd: &OwnedFd, owners: &Owners) -> Result<()> {
    if let Some(Owner { uid, gid, .. }) = owners
        .get(fd.as_fd())
        .context("cannot tell a file's owner")?
    {
        let attributes = &mut tree.node_mut(id).attributes;
        (attributes.uid, attributes.gid) = (uid, gid);
    }
    Ok(())
}

fn below(tree: &mut Tree, directory: NodeId, at: &OwnedFd, owners: &Owners) -> Result<()> {
    let Some(names) = tree.names(directory) else {
        return Ok(());
    };
    let names: Vec<(Vec<u8>, NodeId)> =
        names.iter().map(|(name, id)| (name.clone(), *id)).collect();
    for (name, id) in names {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = OsStr::from_bytes(&name);
        let fd = rustix::fs::openat(at, name, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", name.display()))?;
        let device = owners
            .get(fd.as_fd())
            .context("cannot tell a file's owner")?
            .is_some_and(|o| o.device.is_some());
        if device {
            // A placeholder: containers get their devices from the host.
            tree.remove(directory, name.as_bytes());
            continue;
        }
        apply(tree, id, &fd, owners)?;
        if tree.names(id).is_some() {
            below(tree, id, &fd, owners)?;
        }
    }
    Ok(())
}
