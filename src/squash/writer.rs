//! The writer: takes contents one after the other, then the tree.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use anyhow::{Context, Result, bail};
use rustix::fs::SeekFrom;

use super::compress::{Decoder, Encoder};
use super::inodes::{self, Tables};
use super::pipeline::{MAX_CANDIDATES, Output, Pipeline, STORED, Slot};
use super::tree::{Data, Tree};
use super::{Options, Store, Summary, meta};
use crate::progress::Progress;

/// Bytes of the superblock.
const SUPERBLOCK: usize = 96;
/// A table that the image does not have.
const NO_TABLE: u64 = u64::MAX;
/// Images end at multiples of this.
const PADDING: u64 = 4096;
/// Blocks of a file, at most: 8 TiB in blocks of 128 KiB, and 256 MiB for their list.
const MAX_BLOCKS: u64 = 1 << 26;
/// Fragment blocks that are kept for comparing, in bytes.
const RECENT_BYTES: usize = 16 << 20;

/// Where a content is.
pub(super) struct Content {
    pub(super) len_bytes: u64,
    /// Bytes in holes.
    pub(super) sparse_bytes: u64,
    /// Number of the run that holds the blocks.
    pub(super) run: Option<u32>,
    /// Index of the fragment block, and the tail's first byte in it.
    pub(super) fragment: Option<(u32, u32)>,
}

impl Content {
    pub(super) const EMPTY: Content = Content {
        len_bytes: 0,
        sparse_bytes: 0,
        run: None,
        fragment: None,
    };
}

/// Writes an image into a file.
pub struct Writer {
    options: Options,
    block_bytes: usize,
    pipeline: Pipeline,
    contents: Vec<Content>,
    runs: u32,
    /// The fragment block that is being filled, and its index.
    fragment: Vec<u8>,
    fragment_index: u32,
    /// Tails by length, checksum, and a number for those that are alike in both.
    tails: HashMap<(u32, u32, u8), (u32, u32)>,
    /// Fragment blocks as they were before compression, by index.
    recent: VecDeque<(u32, Vec<u8>)>,
    decoder: Decoder,
    saved_bytes: u64,
    /// Told of each byte that is stored.
    pub(super) progress: Option<Progress>,
}

/// The file that is being stored.
#[derive(Default)]
struct Stored {
    len_bytes: u64,
    blocks: u32,
    sparse_bytes: u64,
}

impl Writer {
    /// Starts an image in an empty file that can be read and written. Starts threads: not to be called where a fork
    /// follows.
    ///
    /// # Errors
    /// When an option is out of its range, or threads cannot be started.
    pub fn new(out: File, options: &Options) -> Result<Writer> {
        options.check()?;
        let block_bytes = options.block_bytes as usize;
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let mut position = SUPERBLOCK as u64;
        if let Some(block) = options.compression.options() {
            let mut bytes = (block.len() as u16 | 1 << 15).to_le_bytes().to_vec();
            bytes.extend(block);
            out.write_all_at(&bytes, position)
                .context("cannot write the image")?;
            position += bytes.len() as u64;
        }
        Ok(Writer {
            options: *options,
            block_bytes,
            pipeline: Pipeline::start(out, position, options.compression, block_bytes, threads)?,
            contents: Vec::new(),
            runs: 0,
            fragment: Vec::with_capacity(block_bytes),
            fragment_index: 0,
            tails: HashMap::new(),
            recent: VecDeque::new(),
            decoder: Decoder::new(options.compression, block_bytes)?,
            saved_bytes: 0,
            progress: None,
        })
    }

    /// Stores an open file from its start to its end. Its holes stay holes, and cost no reading.
    ///
    /// # Errors
    /// When reading or writing fails.
    pub fn store_file(&mut self, file: &File) -> Result<Data> {
        let meta = file.metadata()?;
        let has_holes = meta.blocks().saturating_mul(512) < meta.len();
        if !has_holes || meta.len() <= self.block_bytes as u64 {
            return self.store(&mut &*file);
        }
        self.store_sparse(file, meta.len())
    }

    fn store_sparse(&mut self, file: &File, len: u64) -> Result<Data> {
        let block = self.block_bytes as u64;
        let mut stored = Stored::default();
        let mut data_end = 0;
        loop {
            let at = stored.len_bytes;
            if at >= data_end {
                let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                    Ok(data) => data.min(len),
                    Err(rustix::io::Errno::NXIO) => len,
                    // No such calls on this file system: all is data.
                    Err(_) => at,
                };
                data_end = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(len);
                let holes = data.max(at) / block - at / block;
                self.hole(&mut stored, holes, block)?;
            }
            let at = stored.len_bytes;
            let want = len.saturating_sub(at).min(block) as usize;
            let mut slot = self.pipeline.slot()?;
            let got = fill(&mut slot.raw, want, |part, done| {
                file.read_at(part, at + done as u64)
            })?;
            if got < self.block_bytes {
                // Also when the file has become shorter.
                return self.end(stored, slot, got);
            }
            self.block(&mut stored, slot)?;
        }
    }

    fn hole(&mut self, stored: &mut Stored, blocks: u64, each: u64) -> Result<()> {
        self.tell(blocks * self.block_bytes as u64);
        let all = u64::from(stored.blocks) + blocks;
        if all > MAX_BLOCKS {
            bail!(
                "the file is larger than {} bytes; take larger blocks",
                MAX_BLOCKS * each
            );
        }
        stored.blocks = all as u32;
        stored.len_bytes += blocks * self.block_bytes as u64;
        stored.sparse_bytes += blocks * self.block_bytes as u64;
        Ok(())
    }

    /// A full block.
    fn block(&mut self, stored: &mut Stored, slot: Slot) -> Result<()> {
        if is_zero(&slot.raw) || u64::from(stored.blocks) == MAX_BLOCKS {
            self.pipeline.give_back(slot);
            return self.hole(stored, 1, self.block_bytes as u64);
        }
        self.pipeline.block(stored.blocks, slot)?;
        self.tell(self.block_bytes as u64);
        stored.blocks += 1;
        stored.len_bytes += self.block_bytes as u64;
        Ok(())
    }

    fn tell(&self, bytes: u64) {
        if let Some(progress) = &self.progress {
            progress.add(bytes);
        }
    }

    /// What is left behind the full blocks: the first `len` bytes of the slot.
    fn end(&mut self, mut stored: Stored, mut slot: Slot, len: usize) -> Result<Data> {
        self.tell(len as u64);
        slot.raw.truncate(len);
        let hole = is_zero(&slot.raw);
        let is_tail = len > 0 && !hole && self.options.fragments;
        let mut slot = Some(slot);
        if hole {
            // A last block that is short.
            stored.blocks += 1;
            stored.sparse_bytes += len as u64;
        } else if len > 0
            && !is_tail
            && let Some(slot) = slot.take()
        {
            self.pipeline.block(stored.blocks, slot)?;
            stored.blocks += 1;
        }
        let run = if stored.blocks > 0 {
            self.pipeline.end(stored.blocks)?;
            self.runs += 1;
            Some(self.runs - 1)
        } else {
            None
        };
        // A fragment block may be written now: the file's own blocks are complete.
        let fragment = match &slot {
            Some(slot) if is_tail => Some(self.tail(&slot.raw)?),
            _ => None,
        };
        if let Some(slot) = slot {
            self.pipeline.give_back(slot);
        }
        stored.len_bytes += len as u64;
        if stored.len_bytes == 0 {
            return Ok(Data::default());
        }
        let number = u32::try_from(self.contents.len()).context("the image has too many files")?;
        self.contents.push(Content {
            len_bytes: stored.len_bytes,
            sparse_bytes: stored.sparse_bytes,
            run,
            fragment,
        });
        Ok(Data {
            len_bytes: stored.len_bytes,
            number: Some(number),
        })
    }
}

impl Writer {
    /// Puts a tail into a fragment block, or finds it in one.
    fn tail(&mut self, bytes: &[u8]) -> Result<(u32, u32)> {
        let len = bytes.len() as u32;
        let sum = libdeflater::crc32(bytes);
        let mut new = None;
        for nth in 0..MAX_CANDIDATES {
            let Some(place) = self.tails.get(&(len, sum, nth)).copied() else {
                new = Some((len, sum, nth));
                break;
            };
            if self.holds(place, bytes)? {
                self.saved_bytes += u64::from(len);
                return Ok(place);
            }
        }
        if self.fragment.len() + bytes.len() > self.block_bytes {
            self.flush()?;
        }
        let place = (self.fragment_index, self.fragment.len() as u32);
        self.fragment.extend_from_slice(bytes);
        if let Some(key) = new {
            self.tails.insert(key, place);
        }
        Ok(place)
    }

    /// Whether these bytes lie there.
    fn holds(&mut self, place: (u32, u32), bytes: &[u8]) -> Result<bool> {
        let (index, offset) = (place.0, place.1 as usize);
        let range = offset..offset + bytes.len();
        if index == self.fragment_index {
            return Ok(self.fragment.get(range) == Some(bytes));
        }
        if let Some((_, block)) = self.recent.iter().rev().find(|(i, _)| *i == index) {
            return Ok(block.get(range) == Some(bytes));
        }
        let (start, word) = self.pipeline.written(index)?;
        let mut stored = vec![0; (word & (STORED - 1)) as usize];
        self.pipeline.read(&mut stored, start)?;
        let block = if word & STORED == 0 {
            self.decoder.decompress(&stored, self.block_bytes)?
        } else {
            stored
        };
        let holds = block.get(range) == Some(bytes);
        self.remember(index, block);
        Ok(holds)
    }

    fn remember(&mut self, index: u32, block: Vec<u8>) {
        if self.recent.len() * self.block_bytes >= RECENT_BYTES {
            self.recent.pop_front();
        }
        self.recent.push_back((index, block));
    }

    /// Ends the fragment block.
    fn flush(&mut self) -> Result<()> {
        if self.fragment.is_empty() {
            return Ok(());
        }
        let mut slot = self.pipeline.slot()?;
        self.remember(self.fragment_index, self.fragment.clone());
        std::mem::swap(&mut slot.raw, &mut self.fragment);
        self.fragment.clear();
        self.pipeline.fragment(slot)?;
        self.fragment_index += 1;
        Ok(())
    }

    /// Writes names and attributes; the image is complete then.
    ///
    /// # Errors
    /// When writing fails, or the tree holds what squashfs cannot.
    pub fn finish(mut self, tree: &Tree) -> Result<Summary> {
        self.flush()?;
        let Writer {
            options,
            pipeline,
            contents,
            saved_bytes,
            ..
        } = self;
        let output = pipeline.finish()?;
        let encoder = || Encoder::new(options.compression, meta::BLOCK);
        let mut encoders = [encoder()?, encoder()?];
        let tables = inodes::tables(
            tree,
            &contents,
            &output.runs,
            options.clamp_s,
            &mut encoders,
        )?;
        let [mut encoder, _] = encoders;
        let len_bytes = complete(&output, &tables, &options, &mut encoder)?;
        Ok(Summary {
            len_bytes,
            inodes: tables.places.len() as u32,
            saved_bytes: saved_bytes + output.saved_bytes,
            xattrs_left_out: tables.xattrs.left_out,
        })
    }
}

impl Store for Writer {
    fn store(&mut self, content: &mut dyn Read) -> Result<Data> {
        let mut stored = Stored::default();
        loop {
            let mut slot = self.pipeline.slot()?;
            let got = fill(&mut slot.raw, self.block_bytes, |part, _| {
                content.read(part)
            })?;
            if got < self.block_bytes {
                return self.end(stored, slot, got);
            }
            self.block(&mut stored, slot)?;
        }
    }
}

/// Writes the tables behind the data, and the superblock. Returns the length of the image.
fn complete(
    output: &Output,
    tables: &Tables,
    options: &Options,
    encoder: &mut Encoder,
) -> Result<u64> {
    let mut position = output.position;
    let mut put = |bytes: &[u8]| -> Result<u64> {
        let at = position;
        output
            .file
            .write_all_at(bytes, at)
            .context("cannot write the image")?;
        position += bytes.len() as u64;
        Ok(at)
    };
    let inode_table = put(&tables.inodes)?;
    let directory_table = put(&tables.directories)?;
    let mut fragments = Vec::with_capacity(16 * output.fragments.len());
    for (start, word) in &output.fragments {
        fragments.extend(start.to_le_bytes());
        fragments.extend(word.to_le_bytes());
        fragments.extend([0; 4]);
    }
    let places: Vec<u8> = tables.places.iter().flat_map(|p| p.to_le_bytes()).collect();
    let ids: Vec<u8> = tables.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut lists = [0; 3];
    for (list, entries) in lists.iter_mut().zip([fragments, places, ids]) {
        let at = put(&[])?;
        let (bytes, its) = meta::lookup(encoder, &entries, at)?;
        put(&bytes)?;
        *list = its;
    }
    let [fragment_table, export_table, id_table] = lists;
    let at = put(&[])?;
    let xattr_table = match tables.xattrs.table(encoder, at)? {
        Some((bytes, head)) => {
            put(&bytes)?;
            head
        }
        None => NO_TABLE,
    };
    let end = put(&[])?;
    let mut head = Vec::with_capacity(SUPERBLOCK);
    head.extend(b"hsqs");
    for number in [
        tables.places.len() as u32,
        options.time_s.unwrap_or(tables.latest_s),
        options.block_bytes,
        output.fragments.len() as u32,
    ] {
        head.extend(number.to_le_bytes());
    }
    // Tails are in fragments or nowhere, duplicates stored once, inodes found by number.
    let tails = if options.fragments { 0x20 } else { 0x10 };
    let flags = tails | 0x40 | 0x80 | u16::from(options.compression.options().is_some()) << 10;
    for number in [
        options.compression.id(),
        options.block_bytes.ilog2() as u16,
        flags,
        tables.ids.len() as u16,
        4,
        0,
    ] {
        head.extend(number.to_le_bytes());
    }
    for number in [
        tables.root,
        end,
        id_table,
        xattr_table,
        inode_table,
        directory_table,
        fragment_table,
        export_table,
    ] {
        head.extend(number.to_le_bytes());
    }
    output
        .file
        .write_all_at(&head, 0)
        .context("cannot write the image")?;
    // What was overwritten may have reached further.
    let padded = end.next_multiple_of(PADDING);
    output
        .file
        .set_len(end)
        .and_then(|()| output.file.set_len(padded))
        .context("cannot write the image")?;
    Ok(end)
}

/// Reads until `want` bytes are there or the end is. Returns how many.
fn fill(
    buffer: &mut Vec<u8>,
    want: usize,
    mut read: impl FnMut(&mut [u8], usize) -> std::io::Result<usize>,
) -> Result<usize> {
    buffer.resize(want, 0);
    let mut done = 0;
    while done < want {
        match read(&mut buffer[done..], done) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}
