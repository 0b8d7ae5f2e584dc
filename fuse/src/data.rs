//! Data and fragment blocks: decompressed once, cached by position.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// How long blocks that are made ready may wait for a reader before no more are.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks whether there was one.
const PAUSE: Duration = Duration::from_millis(1);

/// A decompressed block.
pub(crate) struct Block {
    buffer: Vec<u8>,
    len: usize,
    /// It was made ready, and nobody has asked for it yet.
    is_unread: AtomicBool,
    shared: Arc<Shared>,
}

/// What all blocks share.
#[derive(Default)]
struct Shared {
    /// Buffers that wait for their next block.
    spares: Mutex<Vec<Vec<u8>>>,
    /// Bytes of the blocks that are unread.
    unread: AtomicUsize,
}

impl Block {
    /// The bytes in `range`, which the caller checked.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.buffer[..self.len].get(range).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn set_unread(self) -> Block {
        self.is_unread.store(true, Relaxed);
        self.shared.unread.fetch_add(self.buffer.len(), Relaxed);
        self
    }

    fn set_read(&self) {
        // Only looked at, mostly: threads do not take the cache line from each other.
        if self.is_unread.load(Relaxed) && self.is_unread.swap(false, Relaxed) {
            self.shared.unread.fetch_sub(self.buffer.len(), Relaxed);
        }
    }
}

impl Weigh for Block {
    fn weight(&self) -> usize {
        self.buffer.len()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.set_read();
        let mut spares = lock(&self.shared.spares);
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
    /// Bytes that are made ready for readers who have not come yet.
    unread_max: usize,
    shared: Arc<Shared>,
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
            unread_max: cache_bytes / 2,
            shared: Arc::default(),
        }
    }

    /// The block at `position`. It is never empty and at most one block size long.
    pub(crate) fn block(&self, position: u64, size: BlockSize) -> Result<Arc<Block>> {
        let key = BlockKey::new(position, size);
        let block = self.blocks.get_or_load(key, || self.load(position, size))?;
        block.set_read();
        Ok(block)
    }

    /// Makes a block ready for a reader who will come soon. Waits while many have not been asked for; false when nobody
    /// asks any more, or the block is bad.
    pub(crate) fn prepare(&self, position: u64, size: BlockSize) -> bool {
        let key = BlockKey::new(position, size);
        if self.blocks.contains(&key) {
            return true;
        }
        let (mut since, mut least) = (Instant::now(), usize::MAX);
        loop {
            let unread = self.shared.unread.load(Relaxed);
            if unread + self.block_size <= self.unread_max {
                break;
            }
            if unread < least {
                (since, least) = (Instant::now(), unread);
            } else if since.elapsed() >= PATIENCE {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
        let load = || self.load(position, size).map(Block::set_unread);
        let is_good = self.blocks.get_or_load(key, load).is_ok();
        // What has been read already gives way before it.
        self.blocks.touch(&key);
        is_good
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
        *lock(&self.shared.spares) = Vec::new();
    }

    fn load(&self, position: u64, size: BlockSize) -> Result<Block> {
        let stored_len = size.stored_len();
        if size.is_compressed() {
            let stored = self.fresh_block(stored_len)?;
            return self.load_compressed(position, size, stored);
        }
        let mut block = self.fresh_block(stored_len)?;
        self.source
            .read_block(position, size, &mut block.buffer[..stored_len])?;
        Ok(block)
    }

    /// `stored` only lends its buffer for the compressed bytes.
    fn load_compressed(&self, position: u64, size: BlockSize, mut stored: Block) -> Result<Block> {
        let len = stored.len;
        self.source
            .read_block(position, size, &mut stored.buffer[..len])?;
        let mut block = self.fresh_block(0)?;
        let stored = &stored.buffer[..len];
        let mut decompress = || self.codec.decompress(stored, &mut block.buffer);
        block.len = match decompress() {
            Err(Error::NO_MEMORY) => {
                self.clear();
                decompress()?
            }
            outcome => outcome?,
        };
        if block.len == 0 {
            return Err(Error::Damaged("data block length"));
        }
        Ok(block)
    }

    /// A block of so many bytes, with any content.
    fn fresh_block(&self, len: usize) -> Result<Block> {
        Ok(Block {
            buffer: self.buffer()?,
            len,
            is_unread: AtomicBool::new(false),
            shared: self.shared.clone(),
        })
    }

    /// A buffer of one block size, with any content. Where memory is short, the cache gives its own back.
    fn buffer(&self) -> Result<Vec<u8>> {
        if let Some(buffer) = lock(&self.shared.spares).pop() {
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
            .map_err(|_| Error::NO_MEMORY)
    }
}
