//! Two-level lookup tables: ids, fragments, xattr ids.
//!
//! A table is an array of fixed-size entries in metadata blocks, and a plain array of the positions of
//! these blocks. Nothing is read on opening: an entry costs one cached block.

use crate::error::{Error, Result};
use crate::format::METADATA_SIZE;
use crate::meta::{Cursor, Meta, MetaPos};

/// A lookup table of entries of `N` bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<const N: usize> {
    /// Position of the array of block positions.
    index: u64,
    /// Entries.
    count: u64,
}

impl<const N: usize> Table<N> {
    /// Checks that the index lies inside the image, which ends at `end`.
    pub(crate) fn open(index: u64, count: u64, end: u64) -> Result<Table<N>> {
        let blocks = count.div_ceil((METADATA_SIZE / N) as u64);
        let fits = blocks
            .checked_mul(8)
            .and_then(|len| index.checked_add(len))
            .is_some_and(|e| e <= end);
        if !fits {
            return Err(Error::Damaged("table: its index lies beyond the end"));
        }
        Ok(Table { index, count })
    }

    /// Entries.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The entry at `at`.
    pub(crate) fn entry(&self, meta: &Meta, at: u64) -> Result<[u8; N]> {
        if at >= self.count {
            return Err(Error::Damaged("index into a table"));
        }
        let per_block = (METADATA_SIZE / N) as u64;
        let mut raw = [0; 8];
        meta.read_stored(self.index + at / per_block * 8, &mut raw)?;
        let block = u64::from_le_bytes(raw);
        let offset = (at % per_block) as usize * N;
        // Blocks of a table lie before its index.
        Cursor::new(meta, MetaPos { block, offset }, self.index).array()
    }
}
