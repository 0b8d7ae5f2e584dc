//! What is served: a file tree that answers by node number, whatever the format of the image.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::archive::Archive;
use crate::error::Result;
use crate::ext::Ext;
use crate::file::{Extent, Piece};
use crate::format::{InodeRef, Kind};
use crate::profile::Profile;

/// A file of an image: a number of at most [`Place::BITS`] bits, which means the same file in every process that
/// opens the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Place(pub(crate) u64);

impl Place {
    pub(crate) const BITS: u32 = 50;

    fn inode(self) -> InodeRef {
        const { assert!(InodeRef::BITS <= Place::BITS) };
        InodeRef::unpack(self.0)
    }
}

impl From<InodeRef> for Place {
    fn from(at: InodeRef) -> Place {
        Place(at.pack())
    }
}

/// What stat(2) shows of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stat {
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) nlink: u32,
    pub(crate) size: u64,
    /// Units of 512 bytes.
    pub(crate) blocks: u64,
    pub(crate) rdev: u32,
    pub(crate) number: u64,
}

/// A name in a directory.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) at: Place,
    pub(crate) number: u64,
    pub(crate) kind: Kind,
    /// Where to go on behind it.
    pub(crate) next: u64,
}

/// How a file is stored.
pub(crate) struct Stored {
    /// Bytes of the file.
    pub(crate) size: u64,
    /// The fragment block of its end.
    pub(crate) fragment: Option<u32>,
}

/// What statfs(2) shows.
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) files: u64,
    pub(crate) block_size: u32,
}

/// An image of either format.
pub(crate) enum Tree {
    Squashfs(Arc<Archive>),
    Ext(Ext),
}

impl Tree {
    pub(crate) fn root(&self) -> Place {
        match self {
            Tree::Squashfs(archive) => archive.root().into(),
            Tree::Ext(ext) => ext.root(),
        }
    }

    pub(crate) fn stat(&self, at: Place) -> Result<Stat> {
        let archive = match self {
            Tree::Squashfs(archive) => archive,
            Tree::Ext(ext) => return ext.stat(at),
        };
        let inode = archive.inode(at.inode())?;
        Ok(Stat {
            kind: inode.kind,
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: (i64::from(inode.mtime), 0),
            nlink: inode.nlink,
            size: inode.size,
            blocks: inode.blocks,
            rdev: inode.rdev,
            number: u64::from(inode.number),
        })
    }

    pub(crate) fn lookup(&self, dir: Place, name: &[u8]) -> Result<Option<Place>> {
        match self {
            Tree::Squashfs(archive) => Ok(archive.lookup(dir.inode(), name)?.map(Place::from)),
            Tree::Ext(ext) => ext.lookup(dir, name),
        }
    }

    /// The file at a path, links followed; nothing in an overlay's file system, which holds parts of a tree only.
    pub(crate) fn resolve(&self, path: &[u8]) -> Result<Option<Place>> {
        match self {
            Tree::Squashfs(archive) => Ok(archive.resolve(path)?.map(Place::from)),
            Tree::Ext(_) => Ok(None),
        }
    }

    /// Calls `f` for each entry from the place `from` (0: the start) until it returns false.
    pub(crate) fn list(
        &self,
        dir: Place,
        from: u64,
        f: &mut dyn FnMut(Entry<'_>) -> bool,
    ) -> Result<()> {
        match self {
            Tree::Squashfs(archive) => archive.read_dir(dir.inode(), from, &mut |entry| {
                f(Entry {
                    name: entry.name,
                    at: entry.inode.into(),
                    number: u64::from(entry.number),
                    kind: entry.kind,
                    next: entry.next,
                })
            }),
            Tree::Ext(ext) => ext.list(dir, from, f),
        }
    }

    pub(crate) fn read_link(&self, at: Place) -> Result<Vec<u8>> {
        match self {
            Tree::Squashfs(archive) => archive.read_link(at.inode()),
            Tree::Ext(ext) => ext.read_link(at),
        }
    }

    /// Appends the pieces of at most `len` bytes at `offset`, fewer only at the end of the file.
    pub(crate) fn pieces(
        &self,
        at: Place,
        offset: u64,
        len: usize,
        out: &mut Vec<Piece>,
    ) -> Result<Stored> {
        match self {
            Tree::Squashfs(archive) => {
                let inode = archive.pieces(at.inode(), offset, len, out)?;
                let fragment = inode.content()?.fragment.map(|(index, _)| index);
                Ok(Stored {
                    size: inode.size,
                    fragment,
                })
            }
            Tree::Ext(ext) => {
                let (size, bytes) = ext.read(at, offset, len)?;
                if !bytes.is_empty() {
                    out.push(Piece::Bytes(bytes));
                }
                Ok(Stored {
                    size,
                    fragment: None,
                })
            }
        }
    }

    /// Whether any file may have extended attributes.
    pub(crate) fn has_xattrs(&self) -> bool {
        match self {
            Tree::Squashfs(archive) => archive.has_xattrs(),
            Tree::Ext(_) => true,
        }
    }

    pub(crate) fn xattr(&self, at: Place, name: &[u8]) -> Result<Option<Vec<u8>>> {
        match self {
            Tree::Squashfs(archive) => archive.xattr(at.inode(), name),
            Tree::Ext(ext) => ext.xattr(at, name),
        }
    }

    /// The names, each ended by NUL.
    pub(crate) fn xattr_names(&self, at: Place) -> Result<Vec<u8>> {
        match self {
            Tree::Squashfs(archive) => archive.xattr_names(at.inode()),
            Tree::Ext(ext) => ext.xattr_names(at),
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        match self {
            Tree::Squashfs(archive) => Usage {
                bytes: archive.superblock().bytes_used,
                files: u64::from(archive.superblock().inode_count),
                block_size: archive.superblock().block_size,
            },
            Tree::Ext(ext) => Usage {
                bytes: ext.len(),
                files: 0,
                block_size: 4096,
            },
        }
    }

    /// Whether the image has brought its reader to a standstill: only another process can go on.
    pub(crate) fn is_stuck(&self) -> bool {
        match self {
            Tree::Squashfs(_) => false,
            Tree::Ext(ext) => ext.is_stuck(),
        }
    }

    /// The profile of the image in a directory.
    pub(crate) fn profile(&self, directory: OwnedFd) -> Option<Profile> {
        match self {
            Tree::Squashfs(archive) => Some(archive.profile(directory)),
            Tree::Ext(_) => None,
        }
    }

    /// Reads what the profile names into the system's cache, and decompresses it on so many threads.
    pub(crate) fn prefetch_profile(&self, profile: &Profile, threads: usize) {
        if let Tree::Squashfs(archive) = self {
            archive.prefetch_profile(profile, threads);
        }
    }

    /// Writes what was read since the profile was opened.
    pub(crate) fn save_profile(&self, profile: &Profile) {
        if let Tree::Squashfs(archive) = self {
            archive.save_profile(profile);
        }
    }

    /// Bytes that are cached.
    pub(crate) fn cached_bytes(&self) -> usize {
        match self {
            Tree::Squashfs(archive) => archive.cached_bytes(),
            Tree::Ext(_) => 0,
        }
    }

    /// Forgets what is cached.
    pub(crate) fn shrink(&self) {
        if let Tree::Squashfs(archive) = self {
            archive.shrink();
        }
    }

    /// Tells the kernel that blocks of a file will be wanted, and gives those that are not at hand.
    pub(crate) fn announce(&self, at: Place, first: u64, count: u64) -> Result<Vec<Extent>> {
        match self {
            Tree::Squashfs(archive) => archive.announce(at.inode(), first, count),
            Tree::Ext(_) => Ok(Vec::new()),
        }
    }

    /// A fragment block that is not at hand, if there is one of this number.
    pub(crate) fn missing_fragment(&self, index: u32) -> Result<Option<Extent>> {
        match self {
            Tree::Squashfs(archive) => archive.missing_fragment(index),
            Tree::Ext(_) => Ok(None),
        }
    }

    /// Decompresses a block in advance.
    pub(crate) fn make_ready(&self, extent: Extent) -> Result<()> {
        match self {
            Tree::Squashfs(archive) => archive.make_ready(extent),
            Tree::Ext(_) => Ok(()),
        }
    }
}
