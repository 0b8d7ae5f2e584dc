//! The Singularity Image Format: a header, a table of descriptors, and the objects that these describe.
//!
//! ```text
//!   0  launch script    32 bytes: what the kernel runs for `./image.sif`
//!  32  magic            "SIF_MAGIC\0"
//!  42  version          "01\0"
//!  45  architecture     two digits and NUL
//!  48  identity         UUID, 16 bytes
//!  64  created, modified; free and total descriptors; offset and size of table and data: eight 64-bit numbers
//! 128
//!   …  descriptor table, from byte 4096: slots of 585 bytes
//!   …  objects; partitions begin at multiples of 4096
//! ```
//!
//! All numbers are little-endian, nothing is padded. This module knows nothing of containers.

mod edit;
mod read;
mod write;

pub use edit::{Addition, Editor, Extra, create};
pub use read::Sif;
pub use write::{Content, Draft, Stamp};

use std::fmt;

/// What the kernel and `run-singularity` make of an executable image.
const LAUNCH: &[u8] = b"#!/usr/bin/env run-singularity\n";
const MAGIC: &[u8; 10] = b"SIF_MAGIC\0";
const VERSION: &[u8; 3] = b"01\0";
/// Bytes of the header.
const HEADER_LEN: usize = 128;
/// Bytes of a descriptor.
const DESCRIPTOR_LEN: usize = 585;
/// Bytes of an object's name in its descriptor.
const NAME_LEN: usize = 128;
/// Byte of a descriptor at which the fields of its type begin.
const EXTRA: usize = 201;
/// Where writers put the table.
const TABLE_OFFSET: u64 = 4096;
/// Slots that writers make.
const SLOTS: u64 = 48;
/// Slots that are read at most: real images have 48, and the table of these is 2.4 MiB.
const MAX_SLOTS: u64 = 4096;
/// Partitions begin at multiples of this, so that a file system's blocks are the page cache's.
const ALIGNMENT: u64 = 4096;
/// The top bits of a group's number.
const GROUP: u32 = 0xf000_0000;

/// Go's names of the architectures, by SIF's codes.
const ARCHITECTURES: [&str; 14] = [
    "unknown", "386", "amd64", "arm", "arm64", "ppc64", "ppc64le", "mips", "mipsle", "mips64",
    "mips64le", "s390x", "riscv64", "loong64",
];

/// Why a file cannot be read or written as a SIF.
#[derive(Debug)]
pub enum Error {
    /// The operating system's word.
    Io(std::io::Error),
    /// The magic bytes are not there.
    NotSif,
    /// Another version of the format.
    Version(String),
    /// The file ends too early: bytes that are there, and that would have to be there.
    Truncated {
        /// What is cut.
        what: String,
        /// Bytes.
        have: u64,
        /// Bytes.
        need: u64,
    },
    /// A field holds what it cannot hold.
    Damaged(String),
    /// More objects than a new image has slots for.
    Full,
    /// There is no object of this number.
    NoObject(u32),
    /// The object of this number is no partition.
    NotPartition(u32),
    /// A second root file system.
    HasPrimary,
    /// A name of so many bytes.
    LongName(usize),
    /// Another program is changing the file.
    Busy,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Error::Io(error) => write!(f, "{error}"),
            Error::NotSif => f.write_str("not a SIF: the magic bytes are missing"),
            Error::Version(version) => {
                write!(f, "SIF version {version:?} is not supported, only \"01\"")
            }
            Error::Truncated { what, have, need } => {
                let missing = need - have;
                let s = if missing == 1 { "" } else { "s" };
                write!(
                    f,
                    "the SIF is truncated: {what} needs {missing} more byte{s} (the file has {have} of {need}); copy or pull it again"
                )
            }
            Error::Damaged(what) => write!(f, "the SIF is damaged: {what}"),
            Error::NoObject(_) => f.write_str("object not found"),
            Error::NotPartition(_) => f.write_str("data object not a partition"),
            Error::HasPrimary => f.write_str("image already contains a primary partition"),
            Error::LongName(len) => write!(
                f,
                "the name of an object has {len} bytes, and may have {NAME_LEN}"
            ),
            Error::Busy => {
                f.write_str("another program is changing the SIF; try again when it is done")
            }
            Error::Full => write!(f, "a SIF holds at most {SLOTS} objects"),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Error {
        Error::Io(error)
    }
}

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataType {
    /// The definition that the image was built from.
    Definition,
    /// A file system.
    Partition,
    /// A signature over other objects.
    Signature,
    /// JSON of any kind.
    GenericJson,
    /// The root index of an OCI layout: an OCI-SIF.
    OciRootIndex,
    /// Any other, by its number.
    Other(i32),
}

impl DataType {
    fn code(self) -> i32 {
        match self {
            DataType::Definition => 0x4001,
            DataType::Partition => 0x4004,
            DataType::Signature => 0x4005,
            DataType::GenericJson => 0x4006,
            DataType::OciRootIndex => 0x400a,
            DataType::Other(code) => code,
        }
    }

    /// Of a number in a descriptor.
    pub fn from_code(code: i32) -> DataType {
        match code {
            0x4001 => DataType::Definition,
            0x4004 => DataType::Partition,
            0x4005 => DataType::Signature,
            0x4006 => DataType::GenericJson,
            0x400a => DataType::OciRootIndex,
            other => DataType::Other(other),
        }
    }
}

/// The file system of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// squashfs.
    Squashfs,
    /// ext3.
    Ext3,
    /// squashfs within LUKS or gocryptfs.
    Encrypted,
    /// Any other, by its number.
    Other(i32),
}

impl FsType {
    fn code(self) -> i32 {
        match self {
            FsType::Squashfs => 1,
            FsType::Ext3 => 2,
            FsType::Encrypted => 5,
            FsType::Other(code) => code,
        }
    }

    /// Of a number in a descriptor.
    pub fn from_code(code: i32) -> FsType {
        match code {
            1 => FsType::Squashfs,
            2 => FsType::Ext3,
            5 | 6 => FsType::Encrypted,
            other => FsType::Other(other),
        }
    }
}

/// What a partition is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartType {
    /// The image's root file system.
    Primary,
    /// For `--bind` with `image-src` or `id`.
    Data,
    /// Laid over the root.
    Overlay,
    /// Any other, by its number.
    Other(i32),
}

impl PartType {
    fn code(self) -> i32 {
        match self {
            PartType::Primary => 2,
            PartType::Data => 3,
            PartType::Overlay => 4,
            PartType::Other(code) => code,
        }
    }

    /// Of a number in a descriptor.
    pub fn from_code(code: i32) -> PartType {
        match code {
            2 => PartType::Primary,
            3 => PartType::Data,
            4 => PartType::Overlay,
            other => PartType::Other(other),
        }
    }
}

/// A partition's own fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// File system.
    pub fs: FsType,
    /// Use.
    pub part: PartType,
    /// Go's name of the architecture.
    pub arch: &'static str,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// From 1.
    pub id: u32,
    /// Kind.
    pub data_type: DataType,
    /// Number of its group; `None` for none.
    pub group: Option<u32>,
    /// First byte in the file.
    pub offset_bytes: u64,
    /// Length; the reader has made sure that the file is that long.
    pub len_bytes: u64,
    /// Free text.
    pub name: String,
    /// Only of a partition.
    pub partition: Option<Partition>,
    /// What it belongs to.
    pub link: Link,
    /// When it was added, and last changed, seconds since 1970.
    pub times_s: (i64, i64),
    /// Only of a signature.
    pub signature: Option<Signature>,
}

/// What an object belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Nothing.
    None,
    /// The object of this number.
    Object(u32),
    /// The group of this number.
    Group(u32),
}

/// A signature's own fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Number of the digest that is signed: 1 SHA-256, 2 SHA-384, 3 SHA-512, 4 BLAKE2s, 5 BLAKE2b.
    pub hash: i32,
    /// Who has signed: the fingerprint of a PGP key, zeros otherwise.
    pub entity: [u8; 20],
}

/// Go's name of the architecture of a code, from 1.
pub fn architecture(code: u32) -> Option<&'static str> {
    let name = ARCHITECTURES.get(code as usize)?;
    Some(*name).filter(|name| *name != ARCHITECTURES[0])
}

fn arch_name(code: [u8; 3]) -> &'static str {
    let digit = |b: u8| b.is_ascii_digit().then(|| usize::from(b - b'0'));
    let number = digit(code[0])
        .zip(digit(code[1]))
        .map(|(tens, ones)| tens * 10 + ones);
    number
        .and_then(|n| ARCHITECTURES.get(n))
        .copied()
        .unwrap_or("unknown")
}

/// An architecture that SIF knows, by Go's name of it; `unknown` for others.
pub fn arch(name: &str) -> &'static str {
    let found = ARCHITECTURES.iter().find(|a| **a == name);
    found.copied().unwrap_or("unknown")
}

fn arch_code(name: &str) -> [u8; 3] {
    let number = ARCHITECTURES.iter().position(|a| *a == name).unwrap_or(0);
    let digit = |n: usize| b'0' + u8::try_from(n % 10).unwrap_or(0);
    [digit(number / 10), digit(number), 0]
}

#[cfg(test)]
mod tests;
