//! On-disk structures of squashfs 4.0: constants and decoders, nothing else.
//!
//! Reference: Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h of the kernel. All
//! numbers are little-endian. Limits are checked here, so the rest of the crate holds only values
//! that passed.

use std::fmt;

use crate::error::{Error, Result};

/// `hsqs`
const MAGIC: u32 = 0x7371_7368;
/// Bytes of one metadata block, decompressed.
pub(crate) const METADATA_SIZE: usize = 8192;
/// A table that the image does not have.
const NO_TABLE: u64 = u64::MAX;
/// A file without a fragment.
const NO_FRAGMENT: u32 = u32::MAX;
/// An inode without extended attributes.
const NO_XATTR: u32 = u32::MAX;
/// Bit of a data block's size word: the block is stored as it is.
const BLOCK_STORED: u32 = 1 << 24;
/// Bit of a metadata block's header: the block is stored as it is.
const METADATA_STORED: u16 = 1 << 15;
/// Entries below one directory header, at most.
pub(crate) const DIR_RUN: u32 = 256;
/// Bytes of a name, at most.
pub(crate) const NAME_MAX: usize = 255;
/// Bytes of a symlink target, at most.
pub(crate) const SYMLINK_MAX: u32 = 65535;
/// Bytes of an extended attribute's value, at most (XATTR_SIZE_MAX).
pub(crate) const XATTR_VALUE_MAX: u32 = 65536;

/// Takes little-endian numbers off the front of a structure whose length the caller fixed.
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn new(raw: &'a [u8]) -> Fields<'a> {
        Fields(raw)
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.0 = rest;
                *head
            }
            // Not reached: decoders take fixed-size arrays. Zero is refused by their checks.
            None => [0; N],
        }
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// How blocks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor {
    /// zlib streams.
    Gzip,
    /// xz streams.
    Xz,
    /// lz4 blocks.
    Lz4,
    /// zstd frames.
    Zstd,
}

impl Compressor {
    fn decode(id: u16) -> Result<Compressor> {
        match id {
            1 => Ok(Compressor::Gzip),
            2 => Err(Error::Compressor("lzma")),
            3 => Err(Error::Compressor("lzo")),
            4 => Ok(Compressor::Xz),
            5 => Ok(Compressor::Lz4),
            6 => Ok(Compressor::Zstd),
            other => Err(Error::UnknownCompressor(other)),
        }
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compressor::Gzip => "gzip",
            Compressor::Xz => "xz",
            Compressor::Lz4 => "lz4",
            Compressor::Zstd => "zstd",
        })
    }
}

/// Place of an inode in the inode table: what directory entries hold, and the identity of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeRef {
    /// Start of the metadata block, in bytes from the start of the inode table.
    block: u32,
    /// Byte in the decompressed block, below 8192.
    offset: u16,
}

impl InodeRef {
    /// Bits of [`InodeRef::pack`].
    pub(crate) const BITS: u32 = 45;

    pub(crate) fn new(block: u32, offset: u16) -> Result<InodeRef> {
        if usize::from(offset) >= METADATA_SIZE {
            return Err(Error::Damaged("inode reference"));
        }
        Ok(InodeRef { block, offset })
    }

    /// The 48-bit form of the superblock; refuses inode tables over 4 GiB, which no tool makes.
    fn decode(raw: u64) -> Result<InodeRef> {
        let block = u32::try_from(raw >> 16).map_err(|_| Error::Damaged("inode reference"))?;
        InodeRef::new(block, (raw & 0xffff) as u16)
    }

    pub(crate) fn block(self) -> u64 {
        u64::from(self.block)
    }

    pub(crate) fn offset(self) -> usize {
        usize::from(self.offset)
    }

    /// As a number of [`InodeRef::BITS`] bits.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.block) << 13 | u64::from(self.offset)
    }

    /// Inverse of [`InodeRef::pack`].
    pub(crate) fn unpack(packed: u64) -> InodeRef {
        InodeRef {
            block: (packed >> 13) as u32,
            offset: (packed & 0x1fff) as u16,
        }
    }
}

/// The superblock: the first 96 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Inodes in the image; inode numbers go from 1 to this.
    pub inode_count: u32,
    /// When the image was made, seconds since 1970.
    pub mkfs_time: u32,
    /// Bytes of a data block, 4 KiB to 1 MiB, a power of two.
    pub block_size: u32,
    /// log2 of `block_size`.
    pub block_log2: u16,
    /// How blocks are compressed.
    pub compressor: Compressor,
    /// Bytes of the image, without padding.
    pub bytes_used: u64,
    /// Fragment blocks in the image.
    pub fragment_count: u32,
    /// User and group ids in the image.
    pub id_count: u16,
    /// Compressor options follow the superblock.
    pub(crate) has_options: bool,
    pub(crate) root: InodeRef,
    pub(crate) id_table: u64,
    pub(crate) xattr_table: Option<u64>,
    pub(crate) inode_table: u64,
    pub(crate) directory_table: u64,
    pub(crate) fragment_table: Option<u64>,
}

impl Superblock {
    /// Bytes of the superblock.
    pub const LEN: usize = 96;

    /// Reads and checks the first bytes of an image.
    ///
    /// # Errors
    /// When they are no superblock of squashfs 4.0, or name a compressor that is not supported.
    pub fn decode(raw: &[u8; Self::LEN]) -> Result<Superblock> {
        let mut f = Fields::new(raw);
        if f.u32() != MAGIC {
            return Err(Error::NotSquashfs);
        }
        let inode_count = f.u32();
        let mkfs_time = f.u32();
        let block_size = f.u32();
        let fragment_count = f.u32();
        let compressor_id = f.u16();
        let block_log2 = f.u16();
        let flags = f.u16();
        let id_count = f.u16();
        let (major, minor) = (f.u16(), f.u16());
        if (major, minor) != (4, 0) {
            return Err(Error::Version { major, minor });
        }
        let compressor = Compressor::decode(compressor_id)?;
        if !block_size.is_power_of_two()
            || !(4 << 10..=1 << 20).contains(&block_size)
            || block_size.ilog2() != u32::from(block_log2)
        {
            return Err(Error::Damaged("block size"));
        }
        let root = InodeRef::decode(f.u64())?;
        let superblock = Superblock {
            inode_count,
            mkfs_time,
            block_size,
            block_log2,
            compressor,
            fragment_count,
            id_count,
            has_options: flags & 0x0400 != 0,
            root,
            bytes_used: f.u64(),
            id_table: f.u64(),
            xattr_table: optional(f.u64()),
            inode_table: f.u64(),
            directory_table: f.u64(),
            fragment_table: optional(f.u64()),
        };
        superblock.check_tables()?;
        Ok(superblock)
    }

    /// Each table lies between the superblock and the end, and in the order of the format.
    fn check_tables(&self) -> Result<()> {
        let end = self.bytes_used;
        let inside = |at: u64| at >= Self::LEN as u64 && at < end;
        if end > i64::MAX as u64 || end <= Self::LEN as u64 {
            return Err(Error::Damaged("size of the image"));
        }
        if !inside(self.inode_table) || self.root.block() >= end - self.inode_table {
            return Err(Error::Damaged("inode table"));
        }
        if !inside(self.directory_table) || self.directory_table <= self.inode_table {
            return Err(Error::Damaged("directory table"));
        }
        if self.root.block() >= self.directory_table - self.inode_table {
            return Err(Error::Damaged("root inode"));
        }
        if !inside(self.id_table) || self.id_count == 0 {
            return Err(Error::Damaged("id table"));
        }
        if self.fragment_table.is_some_and(|at| !inside(at)) {
            return Err(Error::Damaged("fragment table"));
        }
        if self.xattr_table.is_some_and(|at| !inside(at)) {
            return Err(Error::Damaged("xattr table"));
        }
        Ok(())
    }
}

fn optional(table: u64) -> Option<u64> {
    (table != NO_TABLE).then_some(table)
}

/// Header of a metadata block.
#[derive(Clone, Copy)]
pub(crate) struct MetadataHeader {
    /// Bytes that follow in the image, 1 to 8192.
    pub(crate) stored_len: usize,
    pub(crate) compressed: bool,
}

impl MetadataHeader {
    pub(crate) const LEN: usize = 2;

    pub(crate) fn decode(raw: [u8; 2]) -> Result<MetadataHeader> {
        let word = u16::from_le_bytes(raw);
        let stored_len = usize::from(word & !METADATA_STORED);
        if stored_len == 0 || stored_len > METADATA_SIZE {
            return Err(Error::Damaged("metadata block length"));
        }
        Ok(MetadataHeader {
            stored_len,
            compressed: word & METADATA_STORED == 0,
        })
    }
}

/// Size word of a data block or fragment block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BlockSize(u32);

impl BlockSize {
    /// Checked against the block size of the image. 0 is a hole.
    pub(crate) fn decode(word: u32, block_size: u32) -> Result<BlockSize> {
        let size = BlockSize(word);
        if word & !(BLOCK_STORED | 0xff_ffff) != 0 || size.stored_len() > block_size as usize {
            return Err(Error::Damaged("data block length"));
        }
        Ok(size)
    }

    /// Bytes in the image.
    pub(crate) fn stored_len(self) -> usize {
        (self.0 & 0xff_ffff) as usize
    }

    pub(crate) fn is_compressed(self) -> bool {
        self.0 & BLOCK_STORED == 0
    }

    /// No bytes in the image: all zero.
    pub(crate) fn is_hole(self) -> bool {
        self.stored_len() == 0
    }

    pub(crate) fn word(self) -> u32 {
        self.0
    }
}

/// Entry of the fragment table.
pub(crate) struct FragmentEntry {
    pub(crate) start: u64,
    pub(crate) size: BlockSize,
}

impl FragmentEntry {
    pub(crate) const LEN: usize = 16;

    pub(crate) fn decode(raw: &[u8; Self::LEN], block_size: u32) -> Result<FragmentEntry> {
        let mut f = Fields::new(raw);
        let start = f.u64();
        let size = BlockSize::decode(f.u32(), block_size)?;
        if size.is_hole() {
            return Err(Error::Damaged("fragment length"));
        }
        Ok(FragmentEntry { start, size })
    }
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Directory.
    Dir,
    /// Regular file.
    File,
    /// Symbolic link.
    Symlink,
    /// Block device.
    BlockDevice,
    /// Character device.
    CharDevice,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
}

impl Kind {
    /// Of a basic type number, 1 to 7: what directory entries hold.
    pub(crate) fn decode(basic: u16) -> Result<Kind> {
        Ok(match basic {
            1 => Kind::Dir,
            2 => Kind::File,
            3 => Kind::Symlink,
            4 => Kind::BlockDevice,
            5 => Kind::CharDevice,
            6 => Kind::Fifo,
            7 => Kind::Socket,
            _ => return Err(Error::Damaged("file type")),
        })
    }

    /// The `S_IF...` bits of inode(7).
    pub fn mode_bits(self) -> u32 {
        match self {
            Kind::Dir => libc::S_IFDIR,
            Kind::File => libc::S_IFREG,
            Kind::Symlink => libc::S_IFLNK,
            Kind::BlockDevice => libc::S_IFBLK,
            Kind::CharDevice => libc::S_IFCHR,
            Kind::Fifo => libc::S_IFIFO,
            Kind::Socket => libc::S_IFSOCK,
        }
    }
}

/// The first 16 bytes of every inode.
pub(crate) struct InodeHeader {
    pub(crate) kind: Kind,
    pub(crate) extended: bool,
    pub(crate) mode: u16,
    pub(crate) uid_index: u16,
    pub(crate) gid_index: u16,
    pub(crate) mtime: u32,
    pub(crate) number: u32,
}

impl InodeHeader {
    pub(crate) const LEN: usize = 16;

    pub(crate) fn decode(raw: &[u8; Self::LEN]) -> Result<InodeHeader> {
        let mut f = Fields::new(raw);
        let kind = f.u16();
        let extended = (8..=14).contains(&kind);
        let header = InodeHeader {
            kind: Kind::decode(if extended { kind - 7 } else { kind })?,
            extended,
            mode: f.u16() & 0o7777,
            uid_index: f.u16(),
            gid_index: f.u16(),
            mtime: f.u32(),
            number: f.u32(),
        };
        if header.number == 0 {
            return Err(Error::Damaged("inode number"));
        }
        Ok(header)
    }
}

/// What follows the header of a directory inode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirTail {
    /// Metadata block of the listing, bytes from the start of the directory table.
    pub(crate) block: u32,
    /// Byte in that block.
    pub(crate) offset: u16,
    /// As stat shows it: bytes of the listing plus 3.
    pub(crate) size: u32,
    pub(crate) nlink: u32,
    pub(crate) parent: u32,
    pub(crate) index_count: u16,
    pub(crate) xattr: Option<u32>,
}

impl DirTail {
    pub(crate) const BASIC: usize = 16;
    pub(crate) const EXTENDED: usize = 24;

    pub(crate) fn decode_basic(raw: &[u8; Self::BASIC]) -> Result<DirTail> {
        let mut f = Fields::new(raw);
        let (block, nlink) = (f.u32(), f.u32());
        let (size, offset, parent) = (u32::from(f.u16()), f.u16(), f.u32());
        DirTail {
            block,
            offset,
            size,
            nlink,
            parent,
            index_count: 0,
            xattr: None,
        }
        .checked()
    }

    pub(crate) fn decode_extended(raw: &[u8; Self::EXTENDED]) -> Result<DirTail> {
        let mut f = Fields::new(raw);
        let (nlink, size, block, parent) = (f.u32(), f.u32(), f.u32(), f.u32());
        let (index_count, offset, xattr) = (f.u16(), f.u16(), xattr_id(f.u32()));
        DirTail {
            block,
            offset,
            size,
            nlink,
            parent,
            index_count,
            xattr,
        }
        .checked()
    }

    fn checked(self) -> Result<DirTail> {
        if usize::from(self.offset) >= METADATA_SIZE {
            return Err(Error::Damaged("directory offset"));
        }
        Ok(self)
    }
}

/// What follows the header of a file inode; the block list follows that.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileTail {
    /// Position of the first data block in the image.
    pub(crate) start: u64,
    pub(crate) size: u64,
    /// Bytes in holes, as the kernel subtracts them from st_blocks.
    pub(crate) sparse: u64,
    pub(crate) nlink: u32,
    /// Index in the fragment table and byte in the fragment block.
    pub(crate) fragment: Option<(u32, u32)>,
    pub(crate) xattr: Option<u32>,
}

impl FileTail {
    pub(crate) const BASIC: usize = 16;
    pub(crate) const EXTENDED: usize = 40;

    pub(crate) fn decode_basic(raw: &[u8; Self::BASIC]) -> FileTail {
        let mut f = Fields::new(raw);
        let (start, fragment, offset, size) = (f.u32(), f.u32(), f.u32(), f.u32());
        FileTail {
            start: u64::from(start),
            size: u64::from(size),
            sparse: 0,
            nlink: 1,
            fragment: (fragment != NO_FRAGMENT).then_some((fragment, offset)),
            xattr: None,
        }
    }

    pub(crate) fn decode_extended(raw: &[u8; Self::EXTENDED]) -> Result<FileTail> {
        let mut f = Fields::new(raw);
        let (start, size, sparse, nlink) = (f.u64(), f.u64(), f.u64(), f.u32());
        let (fragment, offset, xattr) = (f.u32(), f.u32(), f.u32());
        if size > i64::MAX as u64 {
            return Err(Error::Damaged("file size"));
        }
        Ok(FileTail {
            start,
            size,
            sparse,
            nlink,
            fragment: (fragment != NO_FRAGMENT).then_some((fragment, offset)),
            xattr: xattr_id(xattr),
        })
    }
}

pub(crate) fn xattr_id(raw: u32) -> Option<u32> {
    (raw != NO_XATTR).then_some(raw)
}

/// Header of a run of directory entries.
pub(crate) struct DirHeader {
    /// Entries that follow, 1 to 256.
    pub(crate) count: u32,
    /// Metadata block of their inodes.
    pub(crate) inode_block: u32,
    /// Their inode numbers are relative to this.
    pub(crate) number_base: u32,
}

impl DirHeader {
    pub(crate) const LEN: usize = 12;

    pub(crate) fn decode(raw: &[u8; Self::LEN]) -> Result<DirHeader> {
        let mut f = Fields::new(raw);
        let count = f.u32();
        if count >= DIR_RUN {
            return Err(Error::Damaged("directory header"));
        }
        Ok(DirHeader {
            count: count + 1,
            inode_block: f.u32(),
            number_base: f.u32(),
        })
    }
}

/// Directory entry without its name.
pub(crate) struct DirEntryHead {
    pub(crate) inode_offset: u16,
    pub(crate) number_delta: i16,
    pub(crate) kind: u16,
    pub(crate) name_len: usize,
}

impl DirEntryHead {
    pub(crate) const LEN: usize = 8;

    pub(crate) fn decode(raw: &[u8; Self::LEN]) -> Result<DirEntryHead> {
        let mut f = Fields::new(raw);
        let head = DirEntryHead {
            inode_offset: f.u16(),
            number_delta: f.u16() as i16,
            kind: f.u16(),
            name_len: usize::from(f.u16()) + 1,
        };
        if head.name_len > NAME_MAX {
            return Err(Error::Damaged("name length"));
        }
        Ok(head)
    }
}

/// Entry of a directory index without its name.
pub(crate) struct DirIndexHead {
    /// Bytes of the listing before the entry.
    pub(crate) listing_offset: u32,
    /// Metadata block of the entry, bytes from the start of the directory table.
    pub(crate) block: u32,
    pub(crate) name_len: usize,
}

impl DirIndexHead {
    pub(crate) const LEN: usize = 12;

    pub(crate) fn decode(raw: &[u8; Self::LEN]) -> Result<DirIndexHead> {
        let mut f = Fields::new(raw);
        let (listing_offset, block, len) = (f.u32(), f.u32(), f.u32());
        if len as usize >= NAME_MAX {
            return Err(Error::Damaged("name length in a directory index"));
        }
        Ok(DirIndexHead {
            listing_offset,
            block,
            name_len: len as usize + 1,
        })
    }
}
