//! How blocks are compressed: the choice that a user makes, a context for each thread, and the options block that the
//! format wants for it (`squashfs_fs.h` of squashfs-tools; the kernel's `*_wrapper.c`).
//!
//! gzip goes to libdeflate, which is several times as fast as zlib at the same size; zstd, xz and lz4 to the reference
//! libraries. The same block gives the same bytes in every thread.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use liblzma::stream::{Action, Check, Filters, LzmaOptions, Status, Stream};

/// A compressor with its level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// zlib streams, which every kernel reads. Levels 1 to 12; 9 is the default of `mksquashfs`.
    Gzip {
        /// 1 (fast) to 12 (small).
        level: u32,
    },
    /// zstd frames. Levels 1 to 22; 15 is the default of `mksquashfs`.
    Zstd {
        /// 1 (fast) to 22 (small).
        level: u32,
    },
    /// xz streams with a dictionary of one block. Levels 0 to 9.
    Xz {
        /// 0 (fast) to 9 (small).
        level: u32,
    },
    /// lz4 blocks. No level: the fast kind; levels 3 to 12: the high compression kind, as slow as zstd, and as fast to
    /// read as the other.
    Lz4 {
        /// 3 to 12 (small).
        level: Option<u32>,
    },
}

impl Default for Compression {
    fn default() -> Compression {
        Compression::Gzip { level: 9 }
    }
}

impl Compression {
    /// The number in the superblock.
    pub(super) fn id(self) -> u16 {
        match self {
            Compression::Gzip { .. } => 1,
            Compression::Xz { .. } => 4,
            Compression::Lz4 { .. } => 5,
            Compression::Zstd { .. } => 6,
        }
    }

    /// What follows the superblock: only lz4 must have it, the others where a level is not the reference tool's.
    pub(super) fn options(self) -> Option<Vec<u8>> {
        match self {
            Compression::Gzip { level: 9 } | Compression::Zstd { level: 15 } => None,
            Compression::Gzip { level } => {
                // Level, window of 2^15 bytes, no strategies; the field ends at 9.
                let mut bytes = level.min(9).to_le_bytes().to_vec();
                bytes.extend([15, 0, 0, 0]);
                Some(bytes)
            }
            Compression::Zstd { level } => Some(level.to_le_bytes().to_vec()),
            // Without options the dictionary is as large as a block.
            Compression::Xz { .. } => None,
            // Version 1, and whether the kind is high compression.
            Compression::Lz4 { level } => Some(vec![1, 0, 0, 0, level.is_some().into(), 0, 0, 0]),
        }
    }

    /// Bytes that a context takes, roughly.
    pub(super) fn context_bytes(self, block_bytes: usize) -> usize {
        match self {
            Compression::Gzip { level: 10.. } => 10 << 20,
            Compression::Gzip { .. } => 1 << 20,
            Compression::Zstd { level } => {
                (1 << 20) + block_bytes * if level > 12 { 12 } else { 5 }
            }
            Compression::Xz { .. } => (1 << 20) + block_bytes * 12,
            Compression::Lz4 { .. } => 512 << 10,
        }
    }
}

impl FromStr for Compression {
    type Err = anyhow::Error;

    /// `gzip`, `zstd:3`, `xz:6`, `lz4`, `lz4:12`.
    fn from_str(text: &str) -> Result<Compression> {
        let (name, level) = match text.split_once(':') {
            Some((name, level)) => (name, Some(level)),
            None => (text, None),
        };
        let within = |default: u32, least: u32, most: u32| -> Result<u32> {
            let Some(level) = level else {
                return Ok(default);
            };
            level
                .parse()
                .ok()
                .filter(|l| (least..=most).contains(l))
                .ok_or_else(|| {
                    anyhow!("compression {text:?}: the level of {name} is {least} to {most}")
                })
        };
        Ok(match name {
            "gzip" => Compression::Gzip {
                level: within(9, 1, 12)?,
            },
            "zstd" => Compression::Zstd {
                level: within(15, 1, 22)?,
            },
            "xz" => Compression::Xz {
                level: within(6, 0, 9)?,
            },
            "lz4" => Compression::Lz4 {
                level: level.map(|_| within(12, 3, 12)).transpose()?,
            },
            _ => {
                bail!("compression {text:?}: use gzip, zstd, xz or lz4, with a level as in zstd:15")
            }
        })
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Compression::Gzip { level } => write!(f, "gzip:{level}"),
            Compression::Zstd { level } => write!(f, "zstd:{level}"),
            Compression::Xz { level } => write!(f, "xz:{level}"),
            Compression::Lz4 { level: None } => f.write_str("lz4"),
            Compression::Lz4 { level: Some(level) } => write!(f, "lz4:{level}"),
        }
    }
}

/// A compressor at work.
pub(super) enum Encoder {
    Gzip(libdeflater::Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
    Xz { level: u32, dictionary_bytes: u32 },
    Lz4 { level: Option<u32> },
}

impl Encoder {
    pub(super) fn new(compression: Compression, block_bytes: usize) -> Result<Encoder> {
        Ok(match compression {
            Compression::Gzip { level } => {
                let level = i32::try_from(level).unwrap_or(9);
                let level = libdeflater::CompressionLvl::new(level)
                    .map_err(|e| anyhow!("gzip level {level}: {e:?}"))?;
                Encoder::Gzip(libdeflater::Compressor::new(level))
            }
            Compression::Zstd { level } => Encoder::Zstd(
                zstd::bulk::Compressor::new(i32::try_from(level).unwrap_or(15))
                    .context("cannot set up zstd")?,
            ),
            Compression::Xz { level } => Encoder::Xz {
                level,
                dictionary_bytes: u32::try_from(block_bytes.max(8192))?,
            },
            Compression::Lz4 { level } => Encoder::Lz4 { level },
        })
    }

    /// Compresses `raw` into `packed`, which it resizes. False when that does not pay: `raw` is stored as it is.
    pub(super) fn compress(&mut self, raw: &[u8], packed: &mut Vec<u8>) -> Result<bool> {
        // Room for what pays and not more, where a compressor can stop at a full buffer.
        let room = match self {
            Encoder::Gzip(_) | Encoder::Xz { .. } => raw.len().saturating_sub(1),
            Encoder::Zstd(_) => zstd::zstd_safe::compress_bound(raw.len()),
            Encoder::Lz4 { .. } => lz4::block::compress_bound(raw.len())?,
        };
        packed.resize(room, 0);
        let len = match self {
            Encoder::Gzip(gzip) => gzip.zlib_compress(raw, packed).ok(),
            Encoder::Zstd(zstd) => Some(
                zstd.compress_to_buffer(raw, packed.as_mut_slice())
                    .context("cannot compress with zstd")?,
            ),
            Encoder::Xz {
                level,
                dictionary_bytes,
            } => xz(*level, *dictionary_bytes, raw, packed).context("cannot compress with xz")?,
            Encoder::Lz4 { level } => {
                use lz4::block::CompressionMode::{DEFAULT, HIGHCOMPRESSION};
                let mode = level.map_or(DEFAULT, |level| HIGHCOMPRESSION(level.cast_signed()));
                let len = lz4::block::compress_to_buffer(raw, Some(mode), false, packed);
                Some(len.context("cannot compress with lz4")?)
            }
        };
        let len = len.filter(|len| *len < raw.len());
        packed.truncate(len.unwrap_or(0));
        Ok(len.is_some())
    }
}

/// The length in `packed`; `None`: it does not fit.
fn xz(level: u32, dictionary_bytes: u32, raw: &[u8], packed: &mut [u8]) -> Result<Option<usize>> {
    let mut options = LzmaOptions::new_preset(level)?;
    options.dict_size(dictionary_bytes);
    let mut filters = Filters::new();
    filters.lzma2(&options);
    // CRC-32 is the one check that every kernel has.
    let mut stream = Stream::new_stream_encoder(&filters, Check::Crc32)?;
    let status = stream.process(raw, packed, Action::Finish)?;
    Ok(match status {
        Status::StreamEnd => Some(usize::try_from(stream.total_out())?),
        _ => None,
    })
}

/// A decompressor, for what was written a moment ago.
pub(super) enum Decoder {
    Gzip(libdeflater::Decompressor),
    Zstd(zstd::bulk::Decompressor<'static>),
    Xz { memory_bytes: u64 },
    Lz4,
}

impl Decoder {
    pub(super) fn new(compression: Compression, block_bytes: usize) -> Result<Decoder> {
        Ok(match compression {
            Compression::Gzip { .. } => Decoder::Gzip(libdeflater::Decompressor::new()),
            Compression::Zstd { .. } => Decoder::Zstd(zstd::bulk::Decompressor::new()?),
            Compression::Xz { .. } => Decoder::Xz {
                memory_bytes: (block_bytes + (1 << 20)) as u64,
            },
            Compression::Lz4 { .. } => Decoder::Lz4,
        })
    }

    /// What was compressed, at most `room` bytes of it.
    pub(super) fn decompress(&mut self, packed: &[u8], room: usize) -> Result<Vec<u8>> {
        let mut raw = vec![0; room];
        let len = match self {
            Decoder::Gzip(gzip) => gzip
                .zlib_decompress(packed, &mut raw)
                .map_err(|e| anyhow!("cannot read back what was compressed: {e}"))?,
            Decoder::Zstd(zstd) => zstd.decompress_to_buffer(packed, &mut raw)?,
            Decoder::Xz { memory_bytes } => {
                let mut stream = Stream::new_stream_decoder(*memory_bytes, 0)?;
                stream.process(packed, &mut raw, Action::Finish)?;
                usize::try_from(stream.total_out())?
            }
            Decoder::Lz4 => {
                let room = i32::try_from(room)?;
                lz4::block::decompress_to_buffer(packed, Some(room), &mut raw)?
            }
        };
        raw.truncate(len);
        Ok(raw)
    }
}
