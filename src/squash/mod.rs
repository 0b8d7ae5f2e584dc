//! Writes squashfs 4.0 (the kernel's `Documentation/filesystems/squashfs.rst`; layout in `fs/squashfs/squashfs_fs.h`).
//!
//! A [`Tree`] holds names and attributes, the image file holds the contents: a source of files (a directory, layers of an
//! OCI image, another squashfs) stores each content as it comes by and hangs the [`Data`] that it gets for it into the
//! tree. So nothing is unpacked that can be streamed, and memory is bounded by the number of names, not by their bytes.

pub mod tree;
pub mod walk;

pub use tree::{Attributes, Data, Kind, Node, NodeId, Tree};

use std::io::Read;

use anyhow::Result;

/// Takes the contents of files in the order in which they shall lie in the image.
pub trait Store {
    /// Stores what `content` gives until its end.
    ///
    /// # Errors
    /// When reading or writing fails.
    fn store(&mut self, content: &mut dyn Read) -> Result<Data>;
}
