//! Inode reference -> inode, with what stat(2) shows.

use crate::error::{Error, Result};
use crate::format::{DirTail, FileTail, InodeHeader, InodeRef, Kind, SYMLINK_MAX, xattr_id};
use crate::meta::{Cursor, MetaPos};

/// An inode as it is in the image. Sizes and link counts are those that the kernel's squashfs shows.
#[derive(Debug, Clone, Copy)]
pub struct Inode {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970; the format has no fractions and no negative times.
    pub mtime: u32,
    /// Inode number, `st_ino`; hard links share it.
    pub number: u32,
    /// Hard links; of a directory, 2 and its subdirectories.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// `st_blocks`: units of 512 bytes.
    pub blocks: u64,
    /// Device number in the kernel's 32-bit encoding; 0 if this is no device.
    pub rdev: u32,
    /// Inode number of the parent of a directory, else 0.
    pub parent: u32,
    pub(crate) owners: (u16, u16),
    pub(crate) xattr: Option<u32>,
    pub(crate) body: Body,
}

/// Where the content of an inode is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Body {
    Dir(Listing),
    File(Content),
    Symlink { at: MetaPos, len: usize },
    Nothing,
}

/// Where the names in a directory are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listing {
    /// Metadata block, bytes from the start of the directory table.
    pub(crate) block: u32,
    pub(crate) offset: u16,
    /// Bytes of the listing.
    pub(crate) len: u32,
    pub(crate) index_count: u16,
    /// Where the index begins.
    pub(crate) index: MetaPos,
}

/// Where the bytes of a file are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content {
    /// Position of the first data block in the image.
    pub(crate) start: u64,
    pub(crate) size: u64,
    /// Index in the fragment table and byte in the fragment block.
    pub(crate) fragment: Option<(u32, u32)>,
    /// Where the list of block sizes begins.
    pub(crate) list: MetaPos,
}

impl Inode {
    /// `(major, minor)` of a device.
    pub fn device(&self) -> (u32, u32) {
        (
            (self.rdev >> 8) & 0xfff,
            (self.rdev & 0xff) | ((self.rdev >> 12) & 0xfff00),
        )
    }

    /// Reads the inode at the cursor. `uid` and `gid` are left 0: they are indexes into a table.
    pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<Inode> {
        let header = InodeHeader::decode(&cursor.array()?)?;
        let mut inode = Inode {
            kind: header.kind,
            mode: u32::from(header.mode),
            uid: 0,
            gid: 0,
            mtime: header.mtime,
            number: header.number,
            nlink: 1,
            size: 0,
            blocks: 0,
            rdev: 0,
            parent: 0,
            owners: (header.uid_index, header.gid_index),
            xattr: None,
            body: Body::Nothing,
        };
        match header.kind {
            Kind::Dir => inode.read_dir(cursor, header.extended)?,
            Kind::File => inode.read_file(cursor, header.extended)?,
            Kind::Symlink => inode.read_symlink(cursor, header.extended)?,
            Kind::BlockDevice | Kind::CharDevice => {
                inode.nlink = u32::from_le_bytes(cursor.array()?);
                inode.rdev = u32::from_le_bytes(cursor.array()?);
                inode.read_xattr(cursor, header.extended)?;
            }
            Kind::Fifo | Kind::Socket => {
                inode.nlink = u32::from_le_bytes(cursor.array()?);
                inode.read_xattr(cursor, header.extended)?;
            }
        }
        Ok(inode)
    }

    fn read_dir(&mut self, cursor: &mut Cursor<'_>, extended: bool) -> Result<()> {
        let tail = if extended {
            DirTail::decode_extended(&cursor.array()?)?
        } else {
            DirTail::decode_basic(&cursor.array()?)?
        };
        self.nlink = tail.nlink;
        self.size = u64::from(tail.size);
        self.parent = tail.parent;
        self.xattr = tail.xattr;
        self.body = Body::Dir(Listing {
            block: tail.block,
            offset: tail.offset,
            // The size counts 3 bytes for "." and "..", which are not stored.
            len: tail.size.saturating_sub(3),
            index_count: tail.index_count,
            index: cursor.position(),
        });
        Ok(())
    }

    fn read_file(&mut self, cursor: &mut Cursor<'_>, extended: bool) -> Result<()> {
        let tail = if extended {
            FileTail::decode_extended(&cursor.array()?)?
        } else {
            FileTail::decode_basic(&cursor.array()?)
        };
        self.nlink = tail.nlink;
        self.size = tail.size;
        self.blocks = if extended {
            tail.size.saturating_sub(tail.sparse).div_ceil(512)
        } else {
            tail.size.div_ceil(512)
        };
        self.xattr = tail.xattr;
        self.body = Body::File(Content {
            start: tail.start,
            size: tail.size,
            fragment: tail.fragment,
            list: cursor.position(),
        });
        Ok(())
    }

    fn read_symlink(&mut self, cursor: &mut Cursor<'_>, extended: bool) -> Result<()> {
        self.nlink = u32::from_le_bytes(cursor.array()?);
        let len = u32::from_le_bytes(cursor.array()?);
        if len > SYMLINK_MAX {
            return Err(Error::Damaged("symlink length"));
        }
        self.size = u64::from(len);
        self.body = Body::Symlink {
            at: cursor.position(),
            len: len as usize,
        };
        if extended {
            cursor.skip(u64::from(len))?;
            self.read_xattr(cursor, true)?;
        }
        Ok(())
    }

    fn read_xattr(&mut self, cursor: &mut Cursor<'_>, extended: bool) -> Result<()> {
        if extended {
            self.xattr = xattr_id(u32::from_le_bytes(cursor.array()?));
        }
        Ok(())
    }

    pub(crate) fn listing(&self) -> Result<&Listing> {
        match &self.body {
            Body::Dir(listing) => Ok(listing),
            _ => Err(Error::NotDirectory),
        }
    }

    pub(crate) fn content(&self) -> Result<&Content> {
        match &self.body {
            Body::File(content) => Ok(content),
            Body::Dir(_) => Err(Error::IsDirectory),
            _ => Err(Error::WrongKind),
        }
    }
}

/// Where an inode is, in a table that begins at `table`.
pub(crate) fn place(table: u64, at: InodeRef) -> MetaPos {
    MetaPos {
        block: table + at.block(),
        offset: at.offset(),
    }
}
