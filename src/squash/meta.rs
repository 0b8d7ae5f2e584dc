//! Metadata blocks: 8 KiB each, compressed, with a 16-bit length before; and lookup tables, which are such blocks with
//! a list of their positions behind them.

use anyhow::Result;

use super::compress::Encoder;

/// Bytes of a block before compression.
pub(super) const BLOCK: usize = 8192;
/// The bit of a length that says: stored as it is.
const STORED: u16 = 1 << 15;

/// A place in a table: start of the block, in bytes from the start of the table, and byte in the decompressed block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    pub(super) block: u32,
    pub(super) offset: u16,
}

impl Place {
    /// The 48-bit form.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.block) << 16 | u64::from(self.offset)
    }
}

/// A table that grows.
pub(super) struct Metadata<'a> {
    encoder: &'a mut Encoder,
    /// Whole blocks as they will lie in the image.
    done: Vec<u8>,
    /// Where each of them begins in `done`.
    starts: Vec<u64>,
    block: Vec<u8>,
    packed: Vec<u8>,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(encoder: &'a mut Encoder) -> Metadata<'a> {
        Metadata {
            encoder,
            done: Vec::new(),
            starts: Vec::new(),
            block: Vec::with_capacity(BLOCK),
            packed: Vec::new(),
        }
    }

    /// Where the next byte will lie.
    ///
    /// # Errors
    /// When the table has more than 4 GiB, which a place cannot say.
    pub(super) fn place(&self) -> Result<Place> {
        Ok(Place {
            block: u32::try_from(self.done.len())?,
            offset: self.block.len() as u16,
        })
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let len = bytes.len().min(BLOCK - self.block.len());
            let (now, rest) = bytes.split_at(len);
            self.block.extend_from_slice(now);
            bytes = rest;
            if self.block.len() == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let pays = self.encoder.compress(&self.block, &mut self.packed)?;
        let (bytes, flag) = if pays {
            (&self.packed, 0)
        } else {
            (&self.block, STORED)
        };
        self.starts.push(self.done.len() as u64);
        self.done.extend((bytes.len() as u16 | flag).to_le_bytes());
        self.done.extend(bytes);
        self.block.clear();
        Ok(())
    }

    /// The bytes of the table, and where its blocks begin in them.
    pub(super) fn finish(mut self) -> Result<(Vec<u8>, Vec<u64>)> {
        if !self.block.is_empty() {
            self.flush()?;
        }
        Ok((self.done, self.starts))
    }
}

/// A lookup table of these entries, to lie at `position`: its bytes, and where the list of its blocks begins.
pub(super) fn lookup(
    encoder: &mut Encoder,
    entries: &[u8],
    position: u64,
) -> Result<(Vec<u8>, u64)> {
    let mut table = Metadata::new(encoder);
    table.write(entries)?;
    let (mut bytes, starts) = table.finish()?;
    let list = position + bytes.len() as u64;
    for start in starts {
        bytes.extend((position + start).to_le_bytes());
    }
    Ok((bytes, list))
}
