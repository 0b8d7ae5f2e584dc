//! The one error type of the crate and its one mapping to errno.
//!
//! Errors are plain values (no boxed causes), so that every reader that waits for the same block can
//! be given the same error.

use std::fmt;

/// Why something could not be read, mounted or served.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused `what`.
    Os {
        /// What was attempted, as "cannot ..." would continue.
        what: &'static str,
        /// errno of the failed call.
        errno: i32,
    },
    /// FUSE cannot be used here; says what an administrator has to do.
    Fuse(&'static str),
    /// The kernel refused a mount.
    Mount {
        /// errno of the failed call.
        errno: i32,
        /// Its words.
        text: String,
    },
    /// The first bytes are not a squashfs superblock.
    NotSquashfs,
    /// A squashfs of another format version.
    Version {
        /// Major version found.
        major: u16,
        /// Minor version found.
        minor: u16,
    },
    /// A compressor that this driver does not have.
    Compressor(&'static str),
    /// A compressor id outside the format.
    UnknownCompressor(u16),
    /// The image is shorter than its superblock says.
    Truncated {
        /// Bytes that the image says it has.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// The image contradicts the format; names the part.
    Damaged(&'static str),
    /// The path or reference is not a directory.
    NotDirectory,
    /// The path or reference is a directory.
    IsDirectory,
    /// The reference has no content to read or is no symlink.
    WrongKind,
    /// Too many symlinks on the way.
    Loop,
    /// A file is larger than the caller allows.
    TooLarge {
        /// Bytes of the file.
        size: u64,
        /// Bytes that the caller allows.
        max: u64,
    },
    /// A view entry that cannot be a path of this server.
    BadPath(String),
    /// No further view can be added.
    TooManyViews,
    /// The ext2/3/4 reader refused; its own words.
    Ext(String),
    /// A thread that was reading the same block panicked.
    Panicked,
}

impl Error {
    /// The error of the last system call that returned `error`.
    pub(crate) fn os(what: &'static str, error: &std::io::Error) -> Error {
        Error::Os {
            what,
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// Memory for a block, or to decompress it, is not to be had.
    pub(crate) const NO_MEMORY: Error = Error::Os {
        what: "allocate memory for a block",
        errno: libc::ENOMEM,
    };

    /// The error of a rustix call.
    pub(crate) fn sys(what: &'static str, errno: rustix::io::Errno) -> Error {
        Error::Os {
            what,
            errno: errno.raw_os_error(),
        }
    }

    /// What a program that meets this error through the mount is told.
    ///
    /// `ENOENT` is not in the table: it means only "no such name", which is not an error here.
    pub fn errno(&self) -> i32 {
        match self {
            Error::NotDirectory => libc::ENOTDIR,
            Error::IsDirectory => libc::EISDIR,
            Error::WrongKind | Error::BadPath(_) => libc::EINVAL,
            Error::Loop => libc::ELOOP,
            Error::TooLarge { .. } => libc::EFBIG,
            Error::TooManyViews => libc::ENOSPC,
            Error::Mount { errno, .. } => *errno,
            Error::Fuse(_) => libc::ENODEV,
            Error::Os { .. }
            | Error::NotSquashfs
            | Error::Version { .. }
            | Error::Compressor(_)
            | Error::UnknownCompressor(_)
            | Error::Truncated { .. }
            | Error::Damaged(_)
            | Error::Ext(_)
            | Error::Panicked => libc::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Os { what, errno } => {
                write!(
                    f,
                    "cannot {what}: {}",
                    std::io::Error::from_raw_os_error(*errno)
                )
            }
            Error::Fuse(text) => f.write_str(text),
            Error::Mount { text, .. } => write!(f, "cannot mount through FUSE: {text}"),
            Error::NotSquashfs => f.write_str("no squashfs image: the superblock is missing"),
            Error::Version { major, minor } => {
                write!(
                    f,
                    "squashfs version {major}.{minor} is not supported, only 4.0 is"
                )
            }
            Error::Compressor(name) => write!(
                f,
                "the image is compressed with {name}, which is not supported; \
                 gzip, xz, lz4 and zstd are"
            ),
            Error::UnknownCompressor(id) => write!(f, "the image uses the unknown compressor {id}"),
            Error::Truncated { need, have } => write!(
                f,
                "the image is truncated: it needs {} more bytes ({have} of {need} are there)",
                need.saturating_sub(*have)
            ),
            Error::Damaged(part) => write!(f, "the image is damaged: bad {part}"),
            Error::NotDirectory => f.write_str("not a directory"),
            Error::IsDirectory => f.write_str("is a directory"),
            Error::WrongKind => f.write_str("not possible on a file of this kind"),
            Error::Loop => f.write_str("too many levels of symbolic links"),
            Error::TooLarge { size, max } => {
                write!(f, "the file has {size} bytes, at most {max} are read")
            }
            Error::BadPath(path) => write!(f, "{path:?} is not an absolute path without \"..\""),
            Error::TooManyViews => f.write_str("too many different sets of mount points"),
            Error::Ext(text) => write!(f, "cannot read the ext image: {text}"),
            Error::Panicked => f.write_str("internal error while reading the image"),
        }
    }
}

impl std::error::Error for Error {}

/// Shorthand of the crate.
pub(crate) type Result<T> = std::result::Result<T, Error>;
