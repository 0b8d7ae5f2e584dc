//! Block list, block index, fragments, holes -> bytes at an offset.
//!
//! The place of a data block is the sum of the sizes before it, so a large file needs an index. It is
//! built as far as it is needed, thinly enough to stay small for any file, and kept for a few files.

use std::sync::{Arc, Mutex};

use crate::cache::{Cache, Weigh, lock};
use crate::data::{Block, Data};
use crate::error::{Error, Result};
use crate::format::{BlockSize, FragmentEntry, InodeRef};
use crate::inode::Content;
use crate::meta::{Cursor, Meta, MetaPos};
use crate::table::Table;

/// Blocks that are summed up without an index: one metadata block of sizes holds 2048.
const POINT_BLOCKS: u64 = 256;
/// Points of one index, at most: 16 384 of 24 bytes are 384 KiB.
const POINTS_MAX: u64 = 16 << 10;
/// Indexes kept, by memory that they may grow to.
const INDEX_CACHE_BYTES: usize = 4 << 20;

/// A part of a file's bytes.
pub(crate) enum Piece {
    /// So many zeros.
    Zeros(usize),
    /// `len` bytes of a block.
    Block {
        /// The block.
        block: Arc<Block>,
        /// First byte.
        start: usize,
        /// Bytes.
        len: usize,
    },
    /// Bytes of their own.
    Bytes(Vec<u8>),
}

impl Piece {
    /// Bytes of it.
    pub(crate) fn len(&self) -> usize {
        match self {
            Piece::Zeros(len) | Piece::Block { len, .. } => *len,
            Piece::Bytes(bytes) => bytes.len(),
        }
    }

    /// The bytes, unless all are zero.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        match self {
            Piece::Zeros(_) => None,
            Piece::Block { block, start, len } => Some(block.bytes(*start..*start + *len)),
            Piece::Bytes(bytes) => Some(bytes),
        }
    }
}

/// A block of a file.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) position: u64,
    pub(crate) size: BlockSize,
}

/// A known place in a block list.
#[derive(Clone, Copy)]
struct Point {
    list: MetaPos,
    position: u64,
}

/// Points of one file, each `stride` blocks apart.
struct Index {
    stride: u64,
    /// Points that it may grow to.
    points_max: u64,
    points: Mutex<Vec<Point>>,
}

impl Weigh for Index {
    fn weight(&self) -> usize {
        // What it may grow to: it grows after it was weighed.
        self.points_max as usize * size_of::<Point>() + 128
    }
}

/// What reading files needs to know of the image.
pub(crate) struct Files {
    pub(crate) block_log2: u32,
    pub(crate) fragments: Option<Table<{ FragmentEntry::LEN }>>,
    /// Block lists end before this: the directory table.
    pub(crate) lists_end: u64,
    indexes: Cache<InodeRef, Index>,
}

impl Files {
    pub(crate) fn new(
        block_log2: u32,
        fragments: Option<Table<{ FragmentEntry::LEN }>>,
        lists_end: u64,
    ) -> Files {
        Files {
            block_log2,
            fragments,
            lists_end,
            indexes: Cache::new(INDEX_CACHE_BYTES, 1),
        }
    }

    /// Forgets what is cached.
    pub(crate) fn clear(&self) {
        self.indexes.clear();
    }

    fn block_size(&self) -> u64 {
        1 << self.block_log2
    }

    /// Blocks in the list of a file; the rest is in a fragment.
    pub(crate) fn block_count(&self, content: &Content) -> u64 {
        match content.fragment {
            Some(_) => content.size >> self.block_log2,
            None => content.size.div_ceil(self.block_size()),
        }
    }

    /// Appends the pieces of `len` bytes at `offset`, which lie inside the file.
    pub(crate) fn pieces(
        &self,
        (meta, data): (&Meta, &Data),
        (at, content): (InodeRef, &Content),
        (offset, len): (u64, usize),
        out: &mut Vec<Piece>,
    ) -> Result<()> {
        let count = self.block_count(content);
        let (mut offset, end) = (offset, offset + len as u64);
        let mut walk = None;
        while offset < end {
            let number = offset >> self.block_log2;
            let start = (offset & (self.block_size() - 1)) as usize;
            let block_len =
                self.block_size()
                    .min(content.size - (number << self.block_log2)) as usize;
            let take = (block_len - start).min((end - offset) as usize);
            if number < count {
                if walk.is_none() {
                    walk = Some(self.walk(meta, at, content, number)?);
                }
                let Some(walk) = walk.as_mut() else {
                    return Err(Error::Damaged("block list"));
                };
                out.push(read_extent(data, walk.next()?, block_len, start, take)?);
            } else {
                out.push(self.read_fragment((meta, data), content, block_len, start, take)?);
            }
            offset += take as u64;
        }
        Ok(())
    }

    /// The blocks `first..first + count` of a file, as far as it has them.
    pub(crate) fn extents(
        &self,
        meta: &Meta,
        (at, content): (InodeRef, &Content),
        first: u64,
        count: u64,
    ) -> Result<Vec<Extent>> {
        let end = self.block_count(content).min(first.saturating_add(count));
        if first >= end {
            return Ok(Vec::new());
        }
        let mut walk = self.walk(meta, at, content, first)?;
        (first..end).map(|_| walk.next()).collect()
    }

    /// A fragment block; `None` behind the last one.
    pub(crate) fn fragment(&self, meta: &Meta, index: u32) -> Result<Option<Extent>> {
        let index = u64::from(index);
        let Some(table) = self.fragments.as_ref().filter(|t| index < t.count()) else {
            return Ok(None);
        };
        let entry = FragmentEntry::decode(&table.entry(meta, index)?, 1 << self.block_log2)?;
        Ok(Some(Extent {
            position: entry.start,
            size: entry.size,
        }))
    }

    fn read_fragment(
        &self,
        (meta, data): (&Meta, &Data),
        content: &Content,
        tail_len: usize,
        start: usize,
        take: usize,
    ) -> Result<Piece> {
        let (index, offset) = content.fragment.ok_or(Error::Damaged("fragment"))?;
        let extent = self.fragment(meta, index)?;
        let extent = extent.ok_or(Error::Damaged("fragment"))?;
        let block = data.block(extent.position, extent.size)?;
        let offset = offset as usize;
        if offset
            .checked_add(tail_len)
            .is_none_or(|end| end > block.len())
        {
            return Err(Error::Damaged("fragment offset"));
        }
        Ok(Piece::Block {
            block,
            start: offset + start,
            len: take,
        })
    }

    /// A walk along the block list that stands before block `number`.
    pub(crate) fn walk<'a>(
        &self,
        meta: &'a Meta,
        at: InodeRef,
        content: &Content,
        number: u64,
    ) -> Result<ListWalk<'a>> {
        let mut walk = ListWalk {
            cursor: Cursor::new(meta, content.list, self.lists_end),
            position: content.start,
            block_size: 1 << self.block_log2,
        };
        let count = self.block_count(content);
        if count <= POINT_BLOCKS {
            walk.pass(number)?;
            return Ok(walk);
        }
        let index = self.indexes.get_or_load(at, || {
            let stride = count.div_ceil(POINTS_MAX).max(POINT_BLOCKS);
            Ok(Index {
                stride,
                points_max: count / stride,
                points: Mutex::default(),
            })
        })?;
        walk.pass_with(&index, number)?;
        Ok(walk)
    }
}

/// Goes along a block list.
pub(crate) struct ListWalk<'a> {
    cursor: Cursor<'a>,
    position: u64,
    block_size: u32,
}

impl ListWalk<'_> {
    pub(crate) fn next(&mut self) -> Result<Extent> {
        let word = u32::from_le_bytes(self.cursor.array()?);
        let size = BlockSize::decode(word, self.block_size)?;
        let position = self.position;
        self.position = position
            .checked_add(size.stored_len() as u64)
            .ok_or(Error::Damaged("data block position"))?;
        Ok(Extent { position, size })
    }

    fn pass(&mut self, count: u64) -> Result<()> {
        for _ in 0..count {
            self.next()?;
        }
        Ok(())
    }

    /// Passes `number` blocks from the start by way of the nearest known point, and notes new ones.
    /// The lock is held only to look and to note, never while reading.
    fn pass_with(&mut self, index: &Index, number: u64) -> Result<()> {
        let wanted = (number / index.stride) as usize;
        let (mut at, known) = {
            let points = lock(&index.points);
            // Point 0 is the start and is not kept: points[i] stands before block (i + 1) * stride.
            let at = wanted.min(points.len());
            (at, at.checked_sub(1).map(|last| points[last]))
        };
        if let Some(point) = known {
            self.cursor.seek(point.list);
            self.position = point.position;
        }
        while at < wanted {
            self.pass(index.stride)?;
            let point = Point {
                list: self.cursor.position(),
                position: self.position,
            };
            let mut points = lock(&index.points);
            if points.len() == at {
                points.push(point);
            }
            at += 1;
        }
        self.pass(number % index.stride)
    }
}

fn read_extent(
    data: &Data,
    extent: Extent,
    block_len: usize,
    start: usize,
    take: usize,
) -> Result<Piece> {
    if extent.size.is_hole() {
        return Ok(Piece::Zeros(take));
    }
    let block = data.block(extent.position, extent.size)?;
    if block.len() != block_len {
        return Err(Error::Damaged("data block length"));
    }
    Ok(Piece::Block {
        block,
        start,
        len: take,
    })
}
