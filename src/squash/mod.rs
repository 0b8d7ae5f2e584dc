//! Writes squashfs 4.0 (the kernel's `Documentation/filesystems/squashfs.rst`; layout in `fs/squashfs/squashfs_fs.h`).
//!
//! A [`Tree`] holds names and attributes, the image file holds the contents: a source of files (a directory, layers of an
//! OCI image, another squashfs) stores each content as it comes by and hangs the [`Data`] that it gets for it into the
//! tree. So nothing is unpacked that can be streamed, and memory is bounded by the number of names, not by their bytes.
//!
//! ```text
//!  superblock │ compressor options │ blocks and fragment blocks │ inodes │ directories │ fragment table │
//!  export table │ owners │ extended attributes │ zeros up to 4 KiB
//! ```
//!
//! What the writer does with contents, and what `mksquashfs` does when nothing is asked for:
//!
//! * Whatever is left of a file behind its whole blocks goes into a fragment block, as small files do (`mksquashfs
//!   -always-use-fragments`; its default is small files only). A block of 128 KiB that holds the ends of twenty
//!   libraries compresses better than twenty short blocks.
//! * Equal runs of blocks and equal tails are stored once, each by itself, after their bytes have been compared.
//! * Blocks of zeros are holes.
//! * The same input gives the same bytes, whatever the number of threads.

mod archive;
mod chain;
mod compress;
mod inodes;
mod meta;
mod pipeline;
mod scan;
pub mod tree;
mod unpack;
pub mod walk;
mod writer;
mod xattrs;

pub use archive::copy;
pub use compress::Compression;
pub use scan::{Scan, Specials, content_bytes, scan};
pub use tree::{Attributes, Data, Kind, Node, NodeId, Tree};
pub use unpack::{Unpack, unpack};
pub use writer::Writer;

use std::io::Read;

use anyhow::{Result, bail};

/// Takes the contents of files in the order in which they shall lie in the image.
pub trait Store {
    /// Stores what `content` gives until its end.
    ///
    /// # Errors
    /// When reading or writing fails.
    fn store(&mut self, content: &mut dyn Read) -> Result<Data>;
}

/// How an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The compressor of everything.
    pub compression: Compression,
    /// Bytes of a data block: 4 KiB to 1 MiB, a power of two.
    pub block_bytes: u32,
    /// Ends of files that fill no block lie together in blocks of their own; else each is a block.
    pub fragments: bool,
    /// Threads that compress; 0 means one for each processor that this process may use. Memory bounds them, too.
    pub threads: usize,
    /// When the image was made, seconds since 1970. `None`: the latest time in the tree, so equal trees give equal bytes.
    pub time_s: Option<u32>,
    /// Later times of files become this one (`SOURCE_DATE_EPOCH`).
    pub clamp_s: Option<u32>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            compression: Compression::default(),
            block_bytes: 128 << 10,
            fragments: true,
            threads: 0,
            time_s: None,
            clamp_s: None,
        }
    }
}

impl Options {
    fn check(&self) -> Result<()> {
        let bytes = self.block_bytes;
        if !bytes.is_power_of_two() || !(4 << 10..=1 << 20).contains(&bytes) {
            bail!("a block of {bytes} bytes: 4096 to 1048576 are possible, and only powers of two");
        }
        Ok(())
    }
}

/// What an image has become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the image, without padding.
    pub len_bytes: u64,
    /// Files of all kinds; hard links count once.
    pub inodes: u32,
    /// Bytes that were not stored a second time, as they lie in the image.
    pub saved_bytes: u64,
    /// Extended attributes that squashfs cannot hold: POSIX access lists, names outside `user.`, `trusted.`, `security.`.
    pub xattrs_left_out: u64,
}

#[cfg(test)]
mod tests;
