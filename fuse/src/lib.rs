//! Lazy squashfs reader and FUSE server.
//!
//! [`Archive`] reads an image without mounting it. [`Server`] serves one through FUSE, from one process and without
//! helper programs: squashfs, or the ext2/3/4 overlay of a SIF file, read-only. [`mount::fuse`] makes the mount.
//!
//! Images are not trusted: whatever bytes they hold, reading them ends in an error or in an answer, in bounded memory.

mod archive;
mod cache;
mod data;
mod decompress;
mod dir;
mod error;
mod ext;
mod file;
mod format;
mod inode;
mod meta;
pub mod mount;
mod path;
mod profile;
mod server;
mod source;
mod sys;
mod table;
mod xattr;

pub use archive::{Archive, Xattr};
pub use dir::DirEntry;
pub use error::Error;
pub use format::{Compressor, InodeRef, Kind, Superblock};
pub use inode::Inode;
pub use mount::clone_device;
pub use server::{Options, Owner, Server, ViewEntry, ViewId, ViewKind};
