//! Metadata blocks: 8 KiB of inodes, directory entries, ids ... in a compressed stream of their own.
//!
//! Compressed bytes are read in windows, because on a network file system each read is a round trip and
//! neighbouring blocks are wanted next. Decompressed blocks are cached by their position.

use std::sync::Arc;

use crate::cache::{Cache, Weigh};
use crate::decompress::Codec;
use crate::error::{Error, Result};
use crate::format::{METADATA_SIZE, MetadataHeader};
use crate::source::Source;

/// Decompressed metadata kept: the inodes and names of about 150 000 files.
const BLOCK_CACHE_BYTES: usize = 16 << 20;
/// Bytes of one read ahead in the tables.
const WINDOW_BYTES: u64 = 128 << 10;
/// Windows kept: one walk touches inodes, directories and a few tables at a time.
const WINDOW_CACHE_BYTES: usize = 1 << 20;
/// Locks of the block cache: as many as worker threads.
const SHARDS: usize = 8;

/// Place in the metadata of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MetaPos {
    /// Position of the block in the image.
    pub(crate) block: u64,
    /// Byte in the decompressed block.
    pub(crate) offset: usize,
}

/// A decompressed block.
pub(crate) struct MetaBlock {
    data: Box<[u8]>,
    /// Position of the block behind it.
    next: u64,
}

impl Weigh for MetaBlock {
    fn weight(&self) -> usize {
        self.data.len() + 128
    }
}

/// Bytes of the image as they are stored.
struct Window(Vec<u8>);

impl Weigh for Window {
    fn weight(&self) -> usize {
        self.0.len()
    }
}

/// Reader of metadata blocks.
pub(crate) struct Meta {
    source: Arc<Source>,
    codec: Codec,
    /// Bytes of the image.
    end: u64,
    blocks: Cache<u64, MetaBlock>,
    windows: Cache<u64, Window>,
}

impl Meta {
    pub(crate) fn new(source: Arc<Source>, codec: Codec, end: u64) -> Meta {
        Meta {
            source,
            codec,
            end,
            blocks: Cache::new(BLOCK_CACHE_BYTES, SHARDS),
            windows: Cache::new(WINDOW_CACHE_BYTES, 1),
        }
    }

    /// Sets how many bytes of decompressed blocks are kept.
    pub(crate) fn set_cache_bytes(&mut self, bytes: usize) {
        self.blocks = Cache::new(bytes, SHARDS);
    }

    /// Bytes held now.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.bytes() + self.windows.bytes()
    }

    /// Forgets what is cached.
    pub(crate) fn clear(&self) {
        self.blocks.clear();
        self.windows.clear();
    }

    /// Stored bytes of the tables, through the windows.
    pub(crate) fn read_stored(&self, position: u64, out: &mut [u8]) -> Result<()> {
        let end = position
            .checked_add(out.len() as u64)
            .filter(|end| *end <= self.end);
        if end.is_none() {
            return Err(Error::Damaged("table: it lies beyond the end"));
        }
        let mut done = 0;
        while done < out.len() {
            let at = position + done as u64;
            let (start, skip) = (
                at / WINDOW_BYTES * WINDOW_BYTES,
                (at % WINDOW_BYTES) as usize,
            );
            let Ok(window) = self.windows.get_or_load(start, || self.load_window(start)) else {
                // A bad sector elsewhere in the window must not fail what lies beside it.
                return self.source.read_exact(at, &mut out[done..]);
            };
            let there = window.0.get(skip..).unwrap_or_default();
            let count = there.len().min(out.len() - done);
            if count == 0 {
                return Err(Error::Damaged("table: it lies beyond the end"));
            }
            out[done..done + count].copy_from_slice(&there[..count]);
            done += count;
        }
        Ok(())
    }

    fn load_window(&self, start: u64) -> Result<Window> {
        let len = WINDOW_BYTES.min(self.end - start) as usize;
        let mut bytes = vec![0; len];
        self.source.read_exact(start, &mut bytes)?;
        Ok(Window(bytes))
    }

    fn block(&self, position: u64) -> Result<Arc<MetaBlock>> {
        self.blocks
            .get_or_load(position, || self.load_block(position))
    }

    fn load_block(&self, position: u64) -> Result<MetaBlock> {
        let mut head = [0; MetadataHeader::LEN];
        self.read_stored(position, &mut head)?;
        let head = MetadataHeader::decode(head)?;
        let body = position + MetadataHeader::LEN as u64;
        let mut stored = vec![0; head.stored_len];
        self.read_stored(body, &mut stored)?;
        let data = if head.compressed {
            let mut out = vec![0; METADATA_SIZE];
            let len = self.codec.decompress(&stored, &mut out)?;
            out.truncate(len);
            out
        } else {
            stored
        };
        if data.is_empty() {
            return Err(Error::Damaged("metadata block length"));
        }
        Ok(MetaBlock {
            data: data.into_boxed_slice(),
            next: body + head.stored_len as u64,
        })
    }
}

/// Reads on through metadata blocks; keeps the block it stands in.
pub(crate) struct Cursor<'a> {
    meta: &'a Meta,
    /// The block at `position`, once it was needed.
    block: Option<(u64, Arc<MetaBlock>)>,
    position: MetaPos,
    /// No block begins here or behind.
    limit: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(meta: &'a Meta, position: MetaPos, limit: u64) -> Cursor<'a> {
        Cursor {
            meta,
            block: None,
            position,
            limit,
        }
    }

    /// Goes elsewhere; the block at hand is kept if it is the same.
    pub(crate) fn seek(&mut self, position: MetaPos) {
        self.position = position;
    }

    /// Where the next byte is.
    pub(crate) fn position(&self) -> MetaPos {
        self.position
    }

    /// Bytes from here to the end of the block; at least one.
    fn rest(&mut self) -> Result<&[u8]> {
        loop {
            let at = self.position.block;
            if self
                .block
                .as_ref()
                .is_none_or(|(position, _)| *position != at)
            {
                if at >= self.limit {
                    return Err(Error::Damaged("metadata: it goes on beyond its table"));
                }
                self.block = Some((at, self.meta.block(at)?));
            }
            let Some((_, block)) = &self.block else {
                return Err(Error::Damaged("metadata"));
            };
            if self.position.offset < block.data.len() {
                break;
            }
            // Only a place at the very end of a block continues in the next one.
            if self.position.offset > block.data.len() {
                return Err(Error::Damaged("metadata offset"));
            }
            self.position = MetaPos {
                block: block.next,
                offset: 0,
            };
        }
        let offset = self.position.offset;
        Ok(self
            .block
            .as_ref()
            .map_or(&[], |(_, block)| &block.data[offset..]))
    }

    /// Fills `out` and moves on.
    pub(crate) fn read(&mut self, mut out: &mut [u8]) -> Result<()> {
        while !out.is_empty() {
            let rest = self.rest()?;
            let count = rest.len().min(out.len());
            let (head, tail) = out.split_at_mut(count);
            head.copy_from_slice(&rest[..count]);
            self.position.offset += count;
            out = tail;
        }
        Ok(())
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut raw = [0; N];
        self.read(&mut raw)?;
        Ok(raw)
    }

    /// Moves on without looking.
    pub(crate) fn skip(&mut self, mut count: u64) -> Result<()> {
        while count > 0 {
            let step = (self.rest()?.len() as u64).min(count);
            self.position.offset += step as usize;
            count -= step;
        }
        Ok(())
    }
}
