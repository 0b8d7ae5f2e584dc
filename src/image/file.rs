//! A file system in a file: a bare squashfs, one behind a `#!` line (Singularity 2), or an ext file system.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use capsid_fuse::Superblock;

use super::{Facts, Given, Image, Root, Top, names_in_squashfs, read_squashfs};

/// What Singularity 2 put before a squashfs, so that it could be executed.
const LAUNCH: &[u8] = b"#!/usr/bin/env run-singularity\n";

/// See the module.
struct FileImage {
    root: Root,
    given: Given,
}

/// Tells by its first bytes what a file is.
pub(super) fn detect(
    path: PathBuf,
    given: Given,
    file: &File,
    head: &[u8],
) -> Result<Box<dyn Image>> {
    let len = file.metadata()?.len();
    let magic = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    let offset = if magic(0, b"hsqs") {
        Some(0)
    } else if head.starts_with(LAUNCH) && magic(LAUNCH.len(), b"hsqs") {
        Some(LAUNCH.len() as u64)
    } else {
        None
    };
    let root = match offset {
        Some(offset_bytes) => {
            // Files of /proc and devices hold bytes, and their length is 0.
            let len_bytes = len.saturating_sub(offset_bytes);
            check_squashfs(file, offset_bytes, len_bytes)?;
            Root::Squashfs {
                file: path.clone(),
                offset_bytes,
                len_bytes,
            }
        }
        // The superblock of ext2, ext3 and ext4 lies at byte 1024, its magic number 56 bytes into it.
        None if magic(1080, &[0x53, 0xef]) => Root::Ext {
            file: path,
            offset_bytes: 0,
            len_bytes: len,
            top: Top::Root,
        },
        None => bail!(
            "image format not recognized: neither a SIF, nor a squashfs, nor an ext3 file system, nor a directory"
        ),
    };
    Ok(Box::new(FileImage { root, given }))
}

/// Checks that a squashfs that this program can read is there in full: a bad one is refused before anything is started.
pub fn check_squashfs(file: &File, offset: u64, len: u64) -> Result<()> {
    let mut raw = [0; Superblock::LEN];
    if len < raw.len() as u64 || file.read_exact_at(&mut raw, offset).is_err() {
        bail!("truncated: there is no room for a squashfs superblock at byte {offset}");
    }
    let superblock = Superblock::decode(&raw)?;
    if superblock.bytes_used > len {
        return Err(capsid_fuse::Error::Truncated {
            need: superblock.bytes_used,
            have: len,
        }
        .into());
    }
    Ok(())
}

impl Image for FileImage {
    fn root(&self) -> Root {
        self.root.clone()
    }

    fn facts(&self) -> Facts {
        self.given.facts(None, Vec::new())
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        match &self.root {
            Root::Squashfs {
                file,
                offset_bytes,
                len_bytes,
            } => read_squashfs(file, *offset_bytes, *len_bytes, path),
            _ => bail!("reading single files of an ext3 image is not supported: run it with exec"),
        }
    }

    fn names(&self, path: &Path) -> Result<Vec<OsString>> {
        match &self.root {
            Root::Squashfs {
                file,
                offset_bytes,
                len_bytes,
            } => names_in_squashfs(file, *offset_bytes, *len_bytes, path),
            _ => {
                bail!("listing directories of an ext3 image is not supported: run it with exec")
            }
        }
    }
}
