//! A squashfs to a directory, with what this build does about owners.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use capsid_fuse::{Archive, InodeRef, Kind};
use rustix::fs::{Mode, OFlags};

use super::keeper;
use crate::engine::emulate;
use crate::squash::{self, Unpack};

/// Whom the files belong to.
#[derive(Debug)]
pub enum Owners<'a> {
    /// As in the image.
    Image,
    /// Whoever unpacks, and those of the image are noted.
    Record(&'a mut emulate::Owners),
    /// Whoever unpacks.
    Caller,
}

/// Unpacks a squashfs that lies in a file into an empty directory.
///
/// # Errors
/// Naming the file of the image that cannot be read or written.
pub fn squashfs(
    file: &Path,
    offset_bytes: u64,
    len_bytes: u64,
    to: &Path,
    owners: &mut Owners,
) -> Result<()> {
    let what = || format!("cannot unpack {}", file.display());
    let open = || -> Result<Archive> {
        let open = File::open(file)?;
        Ok(Archive::open(open, offset_bytes, Some(len_bytes))?)
    };
    let as_in_image = matches!(owners, Owners::Image);
    // It starts threads, and this process has to fork later.
    keeper::in_child(|| {
        let owner = |uid, gid| as_in_image.then_some((uid, gid));
        squash::unpack(&open()?, to, &Unpack { owner: &owner })
    })
    .with_context(what)?;
    if let Owners::Record(record) = owners {
        let archive = open().with_context(what)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let at = rustix::fs::open(to, flags, Mode::empty()).with_context(what)?;
        note(&archive, archive.root(), &at, OsStr::new("."), record).with_context(what)?;
    }
    Ok(())
}

/// Notes the owners of a file and of all below it, where they are not root's.
fn note(
    archive: &Archive,
    at: InodeRef,
    directory: &OwnedFd,
    name: &OsStr,
    record: &mut emulate::Owners,
) -> Result<()> {
    let inode = archive.inode(at)?;
    let is_directory = inode.kind == Kind::Dir;
    if !is_directory && (inode.uid, inode.gid) == (0, 0) {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        // A device that was left out.
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if (inode.uid, inode.gid) != (0, 0) {
        let owner = emulate::Owner {
            uid: inode.uid,
            gid: inode.gid,
            device: None,
        };
        record
            .set(fd.as_fd(), owner)
            .context("cannot note an owner")?;
    }
    if is_directory {
        let mut entries: Vec<(OsString, InodeRef)> = Vec::new();
        archive.read_dir(at, 0, &mut |entry| {
            entries.push((OsString::from_vec(entry.name.to_vec()), entry.inode));
            true
        })?;
        for (name, child) in entries {
            note(archive, child, &fd, &name, record)?;
        }
    }
    Ok(())
}
