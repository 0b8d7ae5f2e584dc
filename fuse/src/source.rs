//! Positional reads from the byte range of a file that holds an image.
//!
//! pread(2) only: no shared file offset, and no mapping, which a truncated or lost network file would
//! turn into SIGBUS. A short read is an error, never a shorter answer.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::format::BlockSize;
use crate::profile::Record;

/// Bytes of one hint: the read-ahead of most file systems, NFS and FUSE among them (`mm/readahead.c`,
/// `force_page_cache_ra`).
const ADVICE_BYTES: u64 = 128 << 10;

/// A byte range of a file.
pub(crate) struct Source {
    file: File,
    offset: u64,
    len: u64,
    /// What was read.
    pub(crate) record: Record,
}

impl Source {
    /// The `len` bytes of `file` that begin at `offset`; without `len`, all that follow.
    pub(crate) fn open(file: File, offset: u64, len: Option<u64>) -> Result<Source> {
        let size = file_len(&file)?;
        let rest = size.saturating_sub(offset);
        Ok(Source {
            file,
            offset,
            len: len.map_or(rest, |len| len.min(rest)),
            record: Record::new(),
        })
    }

    /// Bytes in the range.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from `position` bytes after the start of the range.
    pub(crate) fn read_exact(&self, position: u64, buf: &mut [u8]) -> Result<()> {
        self.record.note(position, buf.len(), None);
        self.read_ahead(position, buf)
    }

    /// The same for what is stored of a data block.
    pub(crate) fn read_block(&self, position: u64, size: BlockSize, buf: &mut [u8]) -> Result<()> {
        self.record.note(position, buf.len(), Some(size));
        self.read_ahead(position, buf)
    }

    /// The same without leaving a trace.
    pub(crate) fn read_ahead(&self, position: u64, buf: &mut [u8]) -> Result<()> {
        let end = position
            .checked_add(buf.len() as u64)
            .ok_or(Error::Damaged("offset"))?;
        if end > self.len {
            return Err(Error::Damaged("offset: it lies beyond the end"));
        }
        self.file
            .read_exact_at(buf, self.offset + position)
            .map_err(|e| Error::os("read the image", &e))
    }

    /// Tells the kernel that these bytes will be wanted; costs nothing when it does not care.
    pub(crate) fn will_need(&self, position: u64, len: u64) {
        // Of one call the kernel takes no more than the read-ahead of the file system.
        for at in (position..position.saturating_add(len)).step_by(ADVICE_BYTES as usize) {
            // A hint only: there is nothing to do about a file system that refuses it.
            let _hint = rustix::fs::fadvise(
                &self.file,
                self.offset + at,
                std::num::NonZeroU64::new(ADVICE_BYTES.min(position + len - at)),
                rustix::fs::Advice::WillNeed,
            );
        }
    }
}

/// Length of a regular file or block device.
fn file_len(file: &File) -> Result<u64> {
    let meta = file
        .metadata()
        .map_err(|e| Error::os("examine the image", &e))?;
    if meta.is_file() {
        return Ok(meta.len());
    }
    // A block device has length 0 in stat(2); its end can be sought.
    use std::io::{Seek, SeekFrom};
    (&*file)
        .seek(SeekFrom::End(0))
        .map_err(|e| Error::os("find the end of the image", &e))
}
