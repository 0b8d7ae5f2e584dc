//! Compressor id -> decompress into a caller's buffer.
//!
//! gzip goes to libdeflate, which is about twice as fast as zlib; zstd and lz4 to the reference libraries, zstd
//! with one context per thread; xz to liblzma with a memory limit, since a hostile stream may ask for a
//! dictionary of 4 GiB; the compressor options to `backhand`. The output never grows: a block that does not
//! fit is damaged.

use std::cell::RefCell;
use std::io::Cursor;

use backhand::Squashfs;
use backhand::compression::CompressionOptions;
use backhand::kind::{Kind, LE_V4_0};
use liblzma::stream::{Action, Status, Stream};

use crate::error::{Error, Result};
use crate::format::{Compressor, METADATA_SIZE, MetadataHeader, Superblock};

/// Bytes that liblzma needs besides the dictionary, generously.
const XZ_OVERHEAD_BYTES: u64 = 1 << 20;

/// Bytes from the start of an image that can hold compressor options.
pub(crate) const OPTIONS_END: usize = Superblock::LEN + MetadataHeader::LEN + METADATA_SIZE;

/// A compressor with the limits that this image sets.
#[derive(Clone, Copy)]
pub(crate) struct Codec {
    compressor: Compressor,
    xz_memory_bytes: u64,
}

/// What is worth keeping between two blocks.
#[derive(Default)]
struct Contexts {
    deflate: Option<libdeflater::Decompressor>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> = RefCell::default();
}

impl Codec {
    /// From the superblock and the first [`OPTIONS_END`] bytes of the image (or all, if it has fewer).
    pub(crate) fn new(superblock: &Superblock, start: &[u8]) -> Result<Codec> {
        let mut dictionary = superblock.block_size.max(METADATA_SIZE as u32);
        if superblock.has_options {
            match options(start)? {
                Some(CompressionOptions::Xz(xz)) => dictionary = dictionary.max(xz.dictionary_size),
                // 1 is the block format; another version would be another format.
                Some(CompressionOptions::Lz4(lz4)) if lz4.version != 1 => {
                    return Err(Error::Damaged("lz4 version"));
                }
                _ => {}
            }
        }
        // The writer's own limit is the block size; the kernel has the same bound.
        let dictionary = u64::from(dictionary.min(1 << 21));
        Ok(Codec {
            compressor: superblock.compressor,
            xz_memory_bytes: dictionary + XZ_OVERHEAD_BYTES,
        })
    }

    /// Fills the front of `out` and returns how many bytes.
    pub(crate) fn decompress(self, input: &[u8], out: &mut [u8]) -> Result<usize> {
        CONTEXTS.with_borrow_mut(|contexts| match self.compressor {
            Compressor::Gzip => gzip(contexts, input, out),
            Compressor::Zstd => zstd(contexts, input, out),
            Compressor::Xz => xz(self.xz_memory_bytes, input, out),
            Compressor::Lz4 => lz4(input, out),
        })
    }
}

fn options(start: &[u8]) -> Result<Option<CompressionOptions>> {
    let kind = Kind::from_const(LE_V4_0).map_err(|_| Error::Damaged("compressor options"))?;
    // The kernel takes options only from a stored block.
    let stored = start
        .get(Superblock::LEN + 1)
        .is_some_and(|high| high & 0x80 != 0);
    if !stored {
        return Err(Error::Damaged("compressor options"));
    }
    Squashfs::superblock_and_compression_options(&mut Cursor::new(start), &kind)
        .map(|(_, options)| options)
        .map_err(|_| Error::Damaged("compressor options"))
}

fn gzip(contexts: &mut Contexts, input: &[u8], out: &mut [u8]) -> Result<usize> {
    contexts
        .deflate
        .get_or_insert_with(libdeflater::Decompressor::new)
        .zlib_decompress(input, out)
        .map_err(|_| Error::Damaged("gzip data"))
}

fn zstd(contexts: &mut Contexts, input: &[u8], out: &mut [u8]) -> Result<usize> {
    if contexts.zstd.is_none() {
        let context = zstd::bulk::Decompressor::new().map_err(|e| Error::os("set up zstd", &e))?;
        contexts.zstd = Some(context);
    }
    let context = contexts.zstd.as_mut().ok_or(Error::Damaged("zstd data"))?;
    context
        .decompress_to_buffer(input, out)
        .map_err(|_| Error::Damaged("zstd data"))
}

fn xz(memory_bytes: u64, input: &[u8], out: &mut [u8]) -> Result<usize> {
    let failed = |e| match e {
        // Of the machine; what a stream wants beyond its limit is `MemLimit`.
        liblzma::stream::Error::Mem => Error::NO_MEMORY,
        _ => Error::Damaged("xz data"),
    };
    let mut stream = Stream::new_stream_decoder(memory_bytes, 0).map_err(failed)?;
    let status = stream.process(input, out, Action::Finish).map_err(failed)?;
    match status {
        Status::StreamEnd => {
            usize::try_from(stream.total_out()).map_err(|_| Error::Damaged("xz data"))
        }
        _ => Err(Error::Damaged("xz data")),
    }
}

fn lz4(input: &[u8], out: &mut [u8]) -> Result<usize> {
    let room = i32::try_from(out.len()).map_err(|_| Error::Damaged("lz4 data"))?;
    lz4::block::decompress_to_buffer(input, Some(room), out).map_err(|_| Error::Damaged("lz4 data"))
}
