//! Data and fragment blocks: decompressed once, cached by position.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::cache::{Cache, Weigh, lock};
use crate::decompress::Codec;
use crate::error::{Error, Result};
use crate::format::BlockSize;
use crate::source::Source;

/// Decompressed data kept by default. The kernel's page cache holds what was read; this holds fragments
/// (many small files in one block) and what was read ahead.
pub(crate) const DATA_CACHE_BYTES: usize = 32 << 20;
/// Locks of the cache. Few, since a block is worth a thousand locks.
const SHARDS: usize = 4;
/// Buffers kept for the next block: taking one is cheaper than page faults on fresh memory.
const SPARE_BUFFERS: usize = 4;

/// A decompressed block.
pub(crate) struct Block {
    buffer: Vec<u8>,
    len: usize,
    spares: Arc<Spares>,
}

/// Buffers that wait for their next block.
struct Spares(Mutex<Vec<Vec<u8>>>);

impl Block {
    /// The bytes in `range`, which the caller checked.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buffer[..self.len].get(range).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Weigh for Block {
    fn weight(&self) -> usize {
        self.buffer.len()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut spares = lock(&self.spares.0);
        if spares.len() < SPARE_BUFFERS {
            spares.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// Identity of a block: where it is and how it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BlockKey {
    pub(crate) position: u64,
    word: u32,
}

impl BlockKey {
    pub(crate) fn new(position: u64, size: BlockSize) -> BlockKey {
        BlockKey {
            position,
            word: size.word(),
        }
    }
}

/// Reader of data blocks.
pub(crate) struct Data {
    source: Arc<Source>,
    codec: Codec,
    block_size: usize,
    blocks: Cache<BlockKey, Block>,
    spares: Arc<Spares>,
}

impl Data {
    pub(crate) fn new(
        source: Arc<Source>,
        codec: Codec,
        block_size: u32,
        cache_bytes: usize,
    ) -> Data {
        let cache_bytes = if cache_bytes == 0 {
            DATA_CACHE_BYTES
        } else {
            cache_bytes
        };
        Data {
            source,
            codec,
            block_size: block_size as usize,
            blocks: Cache::new(cache_bytes, SHARDS),
            spares: Arc::new(Spares(Mutex::default())),
        }
    }

    /// The block at `position`. It is never empty and at most one block size long.
    pub(crate) fn block(&self, position: u64, size: BlockSize) -> Result<Arc<Block>> {
        self.blocks
            .get_or_load(BlockKey::new(position, size), || self.load(position, size))
    }

    /// Whether the block is there or under way.
    pub(crate) fn has(&self, position: u64, size: BlockSize) -> bool {
        self.blocks.contains(&BlockKey::new(position, size))
    }

    /// Bytes held now.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.bytes()
    }

    /// Forgets what is cached.
    pub(crate) fn clear(&self) {
        self.blocks.clear();
        *lock(&self.spares.0) = Vec::new();
    }

    fn load(&self, position: u64, size: BlockSize) -> Result<Block> {
        let stored_len = size.stored_len();
        if size.is_compressed() {
            let stored = Block {
                len: stored_len,
                buffer: self.buffer()?,
                spares: self.spares.clone(),
            };
            return self.load_compressed(position, stored);
        }
        let mut block = Block {
            buffer: self.buffer()?,
            len: stored_len,
            spares: self.spares.clone(),
        };
        self.source
            .read_exact(position, &mut block.buffer[..stored_len])?;
        Ok(block)
    }

    /// `stored` only lends its buffer for the compressed bytes.
    fn load_compressed(&self, position: u64, mut stored: Block) -> Result<Block> {
        let len = stored.len;
        self.source
            .read_exact(position, &mut stored.buffer[..len])?;
        let mut block = Block {
            buffer: self.buffer()?,
            len: 0,
            spares: self.spares.clone(),
        };
        block.len = self
            .codec
            .decompress(&stored.buffer[..len], &mut block.buffer)?;
        if block.len == 0 {
            return Err(Error::Damaged("data block length"));
        }
        Ok(block)
    }

    /// A buffer of one block size, with any content. Where memory is short, the cache gives its own back.
    fn buffer(&self) -> Result<Vec<u8>> {
        if let Some(buffer) = lock(&self.spares.0).pop() {
            return Ok(buffer);
        }
        let fresh = || {
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(self.block_size)?;
            buffer.resize(self.block_size, 0);
            Ok(buffer)
        };
        fresh()
            .or_else(|_: std::collections::TryReserveError| {
                self.clear();
                fresh()
            })
            .map_err(|_| Error::Os {
                what: "allocate memory for a block",
                errno: libc::ENOMEM,
            })
    }
}
