//! Reads tar archives from first to last member: ustar, pax (POSIX.1-2001 `pax`), GNU's long names and sparse files (GNU tar
//! manual, "Basic Tar Format" and "Storing Sparse Files"). The only user of the tar library.
//!
//! The library decodes headers. Walking from header to header is ours: the library reads extension headers of any length
//! into memory, breaks extended attributes at line ends (file capabilities hold such bytes), and knows no sparse files of the
//! pax kind. All lengths are bounded here before anything is allocated for them.

use std::collections::BTreeMap;
use std::io::{self, Read};

use anyhow::{Context, Result, bail};

use super::pax::{self, MAX_PIECES};

const BLOCK: u64 = 512;

/// Longest extension header, in bytes: Linux lets a file have 64 KiB of each extended attribute.
pub const MAX_EXTENSION: u64 = 1 << 20;

/// Largest sparse file, in bytes: a few bytes in an archive must not ask for days of zeros.
pub const MAX_SPARSE: u64 = 1 << 40;

/// Where an archive is read from.
pub trait Source: Read {
    /// Passes over bytes.
    ///
    /// # Errors
    /// When there are not that many, or reading fails.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Type {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this path.
    Symlink(Vec<u8>),
    /// A further name of the member with this path.
    Link(Vec<u8>),
    /// A device.
    Device,
    /// A named pipe.
    Fifo,
}

/// A member of an archive, without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// As the archive has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Type,
    /// Permissions: 0 to 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, within 32 bits.
    pub mtime_s: u32,
    /// Extended attributes by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// First byte of its content in the archive.
    pub offset_bytes: u64,
    /// Length of its content with the holes.
    pub len_bytes: u64,
    /// Length of its content in the archive.
    pub stored_bytes: u64,
}

/// An archive that is being read.
pub struct Archive<R> {
    source: R,
    position: u64,
    /// What is left of the member's content in the archive, and its padding.
    left: u64,
    padding: u64,
    /// The pieces of data of the member's content, the next one last: offset and length.
    pieces: Vec<(u64, u64)>,
    at: u64,
    len: u64,
}

/// Describes the next member.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: pax::Records,
}

impl<R: Source> Archive<R> {
    /// From its first byte.
    pub fn new(source: R) -> Archive<R> {
        Archive {
            source,
            position: 0,
            left: 0,
            padding: 0,
            pieces: Vec::new(),
            at: 0,
            len: 0,
        }
    }

    /// The next member; `None` at the end.
    ///
    /// # Errors
    /// For what is no tar archive, ends early, or has fields out of their ranges.
    pub fn next(&mut self) -> Result<Option<Member>> {
        let mut extension = Extension::default();
        loop {
            self.pass()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = header
                .entry_size()
                .context("a header's size is no number")?;
            match header.entry_type().as_byte() {
                b'x' => extension.pax.add(&self.extension(size)?)?,
                b'L' => extension.path = Some(text(self.extension(size)?)),
                b'K' => extension.link = Some(text(self.extension(size)?)),
                // Records for the whole archive (git's are comments), and volume labels.
                b'g' | b'V' => self.content_is(size)?,
                kind => return self.member(&header, kind, size, extension).map(Some),
            }
        }
    }

    /// The content of the member that was read last.
    pub fn content(&mut self) -> Content<'_, R> {
        Content(self)
    }

    /// Passes over what is left of the last member.
    fn pass(&mut self) -> Result<()> {
        let rest = self.left + self.padding;
        if rest > 0 {
            self.source.skip(rest).context("the archive ends early")?;
            self.position += rest;
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    fn header(&mut self) -> Result<Option<tar::Header>> {
        let mut header = tar::Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.source.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => bail!("the archive ends early"),
                len => filled += len,
            }
        }
        self.position += BLOCK;
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: u32 = block[..148]
            .iter()
            .chain(&block[156..])
            .map(|b| u32::from(*b))
            .sum();
        if header.cksum().ok() != Some(sum + 8 * u32::from(b' ')) {
            bail!(
                "what lies at byte {} is no tar header",
                self.position - BLOCK
            );
        }
        Ok(Some(header))
    }

    /// The next `size` bytes are content.
    fn content_is(&mut self, size: u64) -> Result<()> {
        let padded = size.checked_next_multiple_of(BLOCK);
        let padding = padded.context("a header's size is out of range")? - size;
        (self.left, self.padding) = (size, padding);
        (self.at, self.len) = (0, size);
        self.pieces = vec![(0, size)];
        Ok(())
    }

    /// The content of an extension header.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            bail!("a header extension of {size} bytes: more than {MAX_EXTENSION}");
        }
        self.content_is(size)?;
        let mut bytes = Vec::new();
        self.content().read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn member(
        &mut self,
        header: &tar::Header,
        kind: u8,
        size: u64,
        extension: Extension,
    ) -> Result<Member> {
        let Extension { path, link, pax } = extension;
        let is_gnu_sparse = kind == b'S';
        let path = pax
            .sparse_name
            .clone()
            .or_else(|| pax.path.clone())
            .or(path);
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let name = || crate::oci::shown(&path);
        let link = pax.link.clone().or(link);
        let link = link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let link = || {
            let link = link.clone().filter(|l| !l.is_empty());
            link.with_context(|| format!("{} is a link to nothing", name()))
        };
        let (kind, has_content) = match kind {
            0 | b'0' if path.last() == Some(&b'/') => (Type::Directory, false),
            0 | b'0' | b'7' | b'S' => (Type::File, true),
            b'1' => (Type::Link(link()?), false),
            b'2' => (Type::Symlink(link()?), false),
            b'3' | b'4' => (Type::Device, false),
            b'5' => (Type::Directory, false),
            b'6' => (Type::Fifo, false),
            other => bail!("{} is of the unknown type {:?}", name(), char::from(other)),
        };
        // Sizes of what has no content are noise of old writers.
        self.content_is(if has_content {
            pax.size.unwrap_or(size)
        } else {
            0
        })?;
        let (offset_bytes, stored_bytes) = (self.position, self.left);
        if is_gnu_sparse {
            self.gnu_sparse(header).with_context(name)?;
        } else if has_content {
            self.pax_sparse(&pax).with_context(name)?;
        }
        let mode = number(&header.as_old().mode, header.mode().map(u64::from));
        let owner = |pax: Option<u64>, field: &[u8], value: io::Result<u64>, what: &str| {
            let id = pax
                .map_or_else(|| number(field, value), Ok)
                .with_context(name)?;
            // The highest number means "none" to chown(2).
            let id = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
            id.with_context(|| format!("{}: its {what} is out of range", name()))
        };
        let old = header.as_old();
        let mtime = match pax.mtime_s {
            Some(mtime) => mtime,
            // Times before 1970 are written in two's complement.
            None => number(&old.mtime, header.mtime()).with_context(name)? as i64,
        };
        Ok(Member {
            mode: (mode.with_context(name)? & 0o7777) as u16,
            uid: owner(pax.uid, &old.uid, header.uid(), "owner")?,
            gid: owner(pax.gid, &old.gid, header.gid(), "group")?,
            mtime_s: mtime.clamp(0, u32::MAX.into()) as u32,
            xattrs: pax.xattrs,
            offset_bytes,
            len_bytes: self.len,
            stored_bytes,
            kind,
            path,
        })
    }

    /// The pieces of GNU's own sparse format: in the header, and in blocks behind it.
    fn gnu_sparse(&mut self, header: &tar::Header) -> Result<()> {
        let gnu = header
            .as_gnu()
            .context("a sparse file without GNU's header")?;
        let real = gnu.real_size().context("its length is no number")?;
        let mut pieces = Vec::new();
        let mut add = |piece: &tar::GnuSparseHeader| -> Result<()> {
            if !piece.is_empty() {
                pieces.push((piece.offset()?, piece.length()?));
            }
            if pieces.len() > MAX_PIECES {
                bail!("more than {MAX_PIECES} pieces");
            }
            Ok(())
        };
        gnu.sparse.iter().try_for_each(&mut add)?;
        let mut is_extended = gnu.is_extended();
        while is_extended {
            let mut block = tar::GnuExtSparseHeader::new();
            self.source
                .read_exact(block.as_mut_bytes())
                .context("the archive ends early")?;
            self.position += BLOCK;
            block.sparse().iter().try_for_each(&mut add)?;
            is_extended = block.is_extended();
        }
        self.set_pieces(pieces, real)
    }

    /// The pieces of a sparse file of the pax kind: in its records, or in front of its content.
    fn pax_sparse(&mut self, pax: &pax::Records) -> Result<()> {
        let Some(real) = pax.sparse_len else {
            return Ok(());
        };
        if !pax.sparse_map_is_content {
            return self.set_pieces(pax.sparse_pieces.clone(), real);
        }
        let count = usize::try_from(self.decimal()?)?;
        if count > MAX_PIECES {
            bail!("more than {MAX_PIECES} pieces");
        }
        let mut pieces = Vec::new();
        for _ in 0..count {
            pieces.push((self.decimal()?, self.decimal()?));
        }
        // The map fills whole blocks.
        let rest = self.at.next_multiple_of(BLOCK) - self.at;
        io::copy(&mut self.content().take(rest), &mut io::sink())?;
        self.set_pieces(pieces, real)
    }

    /// A line that holds a number.
    fn decimal(&mut self) -> Result<u64> {
        let mut value: u64 = 0;
        let mut byte = [0];
        loop {
            self.content().read_exact(&mut byte)?;
            value = match byte[0] {
                b'\n' => return Ok(value),
                digit @ b'0'..=b'9' => value
                    .checked_mul(10)
                    .and_then(|v| v.checked_add(u64::from(digit - b'0')))
                    .context("its map is out of range")?,
                _ => bail!("its map is damaged"),
            };
        }
    }

    fn set_pieces(&mut self, mut pieces: Vec<(u64, u64)>, real: u64) -> Result<()> {
        let mut end = 0;
        let mut stored = 0;
        for (offset, len) in &pieces {
            let next = offset.checked_add(*len);
            match next {
                Some(next) if *offset >= end && next <= real => end = next,
                _ => bail!("its map is damaged"),
            }
            stored += len;
        }
        if stored != self.left {
            bail!("its map does not fit its content");
        }
        if real > MAX_SPARSE {
            bail!("a sparse file of {real} bytes: more than {MAX_SPARSE}");
        }
        pieces.reverse();
        self.pieces = pieces;
        (self.at, self.len) = (0, real);
        Ok(())
    }
}

/// Reads a member's content, zeros for its holes.
pub struct Content<'a, R>(&'a mut Archive<R>);

impl<R: Source> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let archive = &mut *self.0;
        while archive
            .pieces
            .last()
            .is_some_and(|(offset, len)| archive.at >= offset + len)
        {
            archive.pieces.pop();
        }
        let (is_data, end) = match archive.pieces.last() {
            Some((offset, _)) if archive.at < *offset => (false, *offset),
            Some((offset, len)) => (true, offset + len),
            None => (false, archive.len),
        };
        let wanted = usize::try_from(end - archive.at).unwrap_or(usize::MAX);
        let wanted = wanted.min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let len = if is_data {
            let len = archive.source.read(&mut buffer[..wanted])?;
            if len == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the archive ends early",
                ));
            }
            archive.left -= len as u64;
            archive.position += len as u64;
            len
        } else {
            buffer[..wanted].fill(0);
            wanted
        };
        archive.at += len as u64;
        Ok(len)
    }
}

/// Names end at a NUL.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// A number of a header; an empty field is 0.
fn number(field: &[u8], value: io::Result<u64>) -> Result<u64> {
    if field.iter().all(|b| matches!(b, 0 | b' ')) {
        return Ok(0);
    }
    value.context("a field of its header is no number")
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
