//! An open image: reads names, attributes and contents without mounting anything.
//!
//! Opening reads the superblock and nothing else; everything is read and decompressed when it is asked for.
//! All methods may be called from many threads at once.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::Builder;

use crate::cache::lock;
use crate::data::Data;
use crate::decompress::{Codec, OPTIONS_END};
use crate::dir::{DirEntry, Directories};
use crate::error::{Error, Result};
use crate::file::{Extent, Files, Piece};
use crate::format::{InodeRef, Superblock};
use crate::inode::{self, Body, Inode};
use crate::meta::{Cursor, Meta};
use crate::path::{Step, follow};
use crate::profile::Profile;
use crate::source::Source;
use crate::table::Table;
use crate::xattr::Xattrs;

/// An extended attribute: its full name and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A squashfs image.
pub struct Archive {
    superblock: Superblock,
    superblock_raw: [u8; Superblock::LEN],
    source: Arc<Source>,
    codec: Codec,
    meta: Meta,
    data: Data,
    files: Files,
    ids: Table<4>,
    /// A bad table fails what asks for attributes, and nothing else.
    xattrs: Result<Option<Xattrs>>,
}

impl Archive {
    /// Opens the image that lies `offset` bytes into `file`, and is at most `len` bytes long.
    ///
    /// # Errors
    /// When there is no squashfs 4.0 image, it is cut off, or its compressor is not supported.
    pub fn open(file: File, offset: u64, len: Option<u64>) -> Result<Archive> {
        let source = Arc::new(Source::open(file, offset, len)?);
        let mut start = vec![0; source.len().min(OPTIONS_END as u64) as usize];
        source.read_exact(0, &mut start)?;
        let Some(raw) = start.first_chunk::<{ Superblock::LEN }>() else {
            return Err(Error::NotSquashfs);
        };
        let superblock = Superblock::decode(raw)?;
        let end = superblock.bytes_used;
        if end > source.len() {
            return Err(Error::Truncated {
                need: end,
                have: source.len(),
            });
        }
        let codec = Codec::new(&superblock, &start)?;
        let meta = Meta::new(source.clone(), codec, end);
        let fragments = match superblock.fragment_table {
            Some(at) if superblock.fragment_count > 0 => {
                Some(Table::open(at, u64::from(superblock.fragment_count), end)?)
            }
            _ => None,
        };
        let xattrs = superblock
            .xattr_table
            .map(|at| Xattrs::open(&meta, at, end))
            .transpose()
            .map(|table| table.filter(|table| !table.is_empty()));
        Ok(Archive {
            data: Data::new(source.clone(), codec, superblock.block_size, 0),
            files: Files::new(
                u32::from(superblock.block_log2),
                fragments,
                superblock.directory_table,
            ),
            ids: Table::open(superblock.id_table, u64::from(superblock.id_count), end)?,
            superblock_raw: *raw,
            superblock,
            source,
            codec,
            meta,
            xattrs,
        })
    }

    /// Sets how much decompressed data is kept, and half as much of names and attributes; 0 means the default, 32 MiB.
    pub(crate) fn set_cache_bytes(&mut self, bytes: usize) {
        let block_size = self.superblock.block_size;
        self.data = Data::new(self.source.clone(), self.codec, block_size, bytes);
        if bytes > 0 {
            self.meta.set_cache_bytes(bytes / 2);
        }
    }

    /// What the image says of itself.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The root directory.
    pub fn root(&self) -> InodeRef {
        self.superblock.root
    }

    /// Attributes of an inode.
    ///
    /// # Errors
    /// When the image is damaged there.
    pub fn inode(&self, at: InodeRef) -> Result<Inode> {
        let mut inode = self.inode_without_owner(at)?;
        let (uid, gid) = inode.owners;
        inode.uid = u32::from_le_bytes(self.ids.entry(&self.meta, u64::from(uid))?);
        inode.gid = u32::from_le_bytes(self.ids.entry(&self.meta, u64::from(gid))?);
        Ok(inode)
    }

    fn inode_without_owner(&self, at: InodeRef) -> Result<Inode> {
        let place = inode::place(self.superblock.inode_table, at);
        Inode::read(&mut Cursor::new(
            &self.meta,
            place,
            self.superblock.directory_table,
        ))
    }

    fn directories(&self) -> Directories<'_> {
        Directories {
            meta: &self.meta,
            table: self.superblock.directory_table,
            end: self.superblock.bytes_used,
            root: self.superblock.root,
        }
    }

    /// The entry `name` of a directory.
    ///
    /// # Errors
    /// When `dir` is no directory or the image is damaged there.
    pub fn lookup(&self, dir: InodeRef, name: &[u8]) -> Result<Option<InodeRef>> {
        let inode = self.inode_without_owner(dir)?;
        let found = self.directories().find(dir, inode.listing()?, name)?;
        Ok(found.map(|(at, _)| at))
    }

    /// Calls `f` for each entry of a directory, without `.` and `..`, until it returns false. `from` is 0, or
    /// [`DirEntry::next`] of the entry behind which to go on.
    ///
    /// # Errors
    /// When `dir` is no directory or the image is damaged there.
    pub fn read_dir(
        &self,
        dir: InodeRef,
        from: u64,
        f: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let inode = self.inode_without_owner(dir)?;
        self.directories().list(dir, inode.listing()?, from, f)
    }

    /// Reads a file from `offset`; fewer bytes than asked for only at its end.
    ///
    /// # Errors
    /// When `at` is no regular file or the image is damaged there.
    pub fn read(&self, at: InodeRef, offset: u64, out: &mut [u8]) -> Result<usize> {
        let mut pieces = Vec::new();
        self.pieces(at, offset, out.len(), &mut pieces)?;
        let mut done = 0;
        for piece in &pieces {
            let target = &mut out[done..done + piece.len()];
            match piece.bytes() {
                Some(bytes) => target.copy_from_slice(bytes),
                None => target.fill(0),
            }
            done += piece.len();
        }
        Ok(done)
    }

    /// What [`Archive::read`] reads, piece by piece and without a copy: calls `f` with the length of each, and with its
    /// bytes where it is no hole. Returns how many bytes there were.
    ///
    /// # Errors
    /// As [`Archive::read`].
    pub fn visit(
        &self,
        at: InodeRef,
        offset: u64,
        len: usize,
        f: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> Result<usize> {
        let mut pieces = Vec::new();
        self.pieces(at, offset, len, &mut pieces)?;
        for piece in &pieces {
            f(piece.len(), piece.bytes());
        }
        Ok(pieces.iter().map(Piece::len).sum())
    }

    /// What [`Archive::read`] reads, in the blocks of the cache. Returns the inode.
    pub(crate) fn pieces(
        &self,
        at: InodeRef,
        offset: u64,
        len: usize,
        out: &mut Vec<Piece>,
    ) -> Result<Inode> {
        let inode = self.inode_without_owner(at)?;
        let content = inode.content()?;
        let rest = content.size.saturating_sub(offset);
        let len = usize::try_from(rest).map_or(len, |rest| rest.min(len));
        let place = (offset, len);
        self.files
            .pieces((&self.meta, &self.data), (at, content), place, out)?;
        Ok(inode)
    }

    /// Tells the kernel that blocks of a file will be wanted, and gives those that are not at hand.
    pub(crate) fn announce(&self, at: InodeRef, first: u64, count: u64) -> Result<Vec<Extent>> {
        let inode = self.inode_without_owner(at)?;
        let mut extents = self
            .files
            .extents(&self.meta, (at, inode.content()?), first, count)?;
        let stored: u64 = extents.iter().map(|e| e.size.stored_len() as u64).sum();
        if let Some(start) = extents.first() {
            self.source.will_need(start.position, stored);
        }
        extents.retain(|e| !e.size.is_hole() && !self.data.has(e.position, e.size));
        Ok(extents)
    }

    /// A fragment block that is not at hand, if there is one of this number.
    pub(crate) fn missing_fragment(&self, index: u32) -> Result<Option<Extent>> {
        let extent = self.files.fragment(&self.meta, index)?;
        Ok(extent.filter(|e| !self.data.has(e.position, e.size)))
    }

    /// Decompresses a block into the cache.
    pub(crate) fn make_ready(&self, extent: Extent) -> Result<()> {
        self.data.block(extent.position, extent.size).map(drop)
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// When `at` is none or the image is damaged there.
    pub fn read_link(&self, at: InodeRef) -> Result<Vec<u8>> {
        let Body::Symlink { at, len } = self.inode_without_owner(at)?.body else {
            return Err(Error::WrongKind);
        };
        let mut target = vec![0; len];
        Cursor::new(&self.meta, at, self.superblock.directory_table).read(&mut target)?;
        Ok(target)
    }

    /// Whether any inode may have extended attributes.
    pub(crate) fn has_xattrs(&self) -> bool {
        !matches!(self.xattrs, Ok(None))
    }

    fn xattr_table(&self, at: InodeRef) -> Result<Option<(&Xattrs, u32)>> {
        let Some(table) = self.xattrs.as_ref().map_err(Clone::clone)? else {
            return Ok(None);
        };
        let id = self.inode_without_owner(at)?.xattr;
        Ok(id.map(|id| (table, id)))
    }

    /// Extended attributes of an inode.
    ///
    /// # Errors
    /// When the image is damaged there.
    pub fn xattrs(&self, at: InodeRef) -> Result<Vec<Xattr>> {
        match self.xattr_table(at)? {
            Some((table, id)) => table.pairs(&self.meta, id),
            None => Ok(Vec::new()),
        }
    }

    /// One extended attribute.
    pub(crate) fn xattr(&self, at: InodeRef, name: &[u8]) -> Result<Option<Vec<u8>>> {
        match self.xattr_table(at)? {
            Some((table, id)) => table.value(&self.meta, id, name),
            None => Ok(None),
        }
    }

    /// Names of the extended attributes, each ended by NUL.
    pub(crate) fn xattr_names(&self, at: InodeRef) -> Result<Vec<u8>> {
        match self.xattr_table(at)? {
            Some((table, id)) => table.names(&self.meta, id),
            None => Ok(Vec::new()),
        }
    }

    /// The inode at a path, as a process would find it that has the image's root as its own: symbolic links
    /// are followed, also the last one, and never lead outside. `None`: there is no such file.
    ///
    /// # Errors
    /// When there are too many links or the image is damaged on the way.
    pub fn resolve(&self, path: &[u8]) -> Result<Option<InodeRef>> {
        let found = follow(self.root(), path, |here, name, _| {
            let Some(next) = self.lookup(here, name)? else {
                return Ok(Step::Missing);
            };
            Ok(match self.inode_without_owner(next)?.body {
                Body::Symlink { .. } => Step::Link(self.read_link(next)?),
                _ => Step::To(next),
            })
        });
        match found {
            Err(Error::NotDirectory) => Ok(None),
            found => found,
        }
    }

    /// The content of the file at a path (see [`Archive::resolve`]), if there is one.
    ///
    /// # Errors
    /// When it has more than `max` bytes, is no regular file, or the image is damaged there.
    pub fn read_file(&self, path: &[u8], max: u64) -> Result<Option<Vec<u8>>> {
        let Some(at) = self.resolve(path)? else {
            return Ok(None);
        };
        let size = self.inode_without_owner(at)?.content()?.size;
        if size > max {
            return Err(Error::TooLarge { size, max });
        }
        // The size is a claim: memory grows with what is really there.
        let mut content = Vec::new();
        loop {
            let mut pieces = Vec::new();
            self.pieces(at, content.len() as u64, READ_STEP, &mut pieces)?;
            if pieces.is_empty() {
                return Ok(Some(content));
            }
            for piece in &pieces {
                match piece.bytes() {
                    Some(bytes) => content.extend_from_slice(bytes),
                    None => content.resize(content.len() + piece.len(), 0),
                }
            }
        }
    }

    /// The profile of this image in a directory (see [`crate::Server::keep_profile`]).
    pub(crate) fn profile(&self, directory: OwnedFd) -> Profile {
        let block_size = self.superblock.block_size;
        Profile::open(directory, &self.superblock_raw, block_size, &self.source)
    }

    /// Reads what the profile names into the system's cache, and decompresses it on so many threads, as far before its
    /// readers as there is room.
    pub(crate) fn prefetch_profile(&self, profile: &Profile, threads: usize) {
        let blocks: Mutex<_> = Mutex::new(profile.blocks());
        let next = || lock(&blocks).next();
        let prepare = || {
            while let Some((position, size)) = next() {
                if !self.data.prepare(position, size) {
                    break;
                }
                // Who was woken by an answer meanwhile comes first, also where there is no processor to spare.
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let thread = Builder::new().name("prepare".into());
                // Without it, it is decompressed when it is asked for.
                let _slower = thread.spawn_scoped(scope, prepare);
            }
            profile.prefetch(&self.source);
        });
    }

    /// Writes what was read since the profile was opened.
    pub(crate) fn save_profile(&self, profile: &Profile) {
        profile.save(&self.source);
    }

    /// Reads into the system's cache what earlier starts have read, by the profile in `directory`, or where there is
    /// none, names and attributes. Returns how many bytes, and whether there was a profile.
    ///
    /// # Errors
    /// When the image cannot be read.
    pub fn warm(&self, directory: Option<OwnedFd>) -> Result<(u64, bool)> {
        if let Some(directory) = directory {
            let bytes = self.profile(directory).prefetch(&self.source);
            if bytes > 0 {
                return Ok((bytes, true));
            }
        }
        // Inodes, names and tables lie behind the data.
        let start = self.superblock.inode_table;
        let mut part = vec![0; WARM_STEP];
        let mut at = start;
        while at < self.superblock.bytes_used {
            let len = (self.superblock.bytes_used - at).min(WARM_STEP as u64);
            self.source.read_ahead(at, &mut part[..len as usize])?;
            at += len;
        }
        Ok((at - start, false))
    }

    /// Bytes that are cached.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.meta.bytes() + self.data.bytes()
    }

    /// Forgets what is cached.
    pub(crate) fn shrink(&self) {
        self.meta.clear();
        self.data.clear();
        self.files.clear();
    }
}

/// Bytes read at once by [`Archive::warm`].
const WARM_STEP: usize = 1 << 20;
/// Bytes read at once by [`Archive::read_file`].
const READ_STEP: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_made_ready_only_as_far_as_somebody_reads_them() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        std::fs::create_dir(&tree).expect("a directory");
        let text: String = (0..800_000).map(|n| format!("{n}\n")).collect();
        std::fs::write(tree.join("file"), text).expect("a file");
        let packed = std::process::Command::new("mksquashfs")
            .args([&tree, &image])
            .args(["-quiet", "-no-progress"])
            .output();
        assert!(packed.expect("mksquashfs").status.success());
        let file = File::open(&image).expect("the image");
        let mut archive = Archive::open(file, 0, None).expect("an archive");
        // Room for 64 blocks, half of them unread.
        archive.set_cache_bytes(64 * (128 << 10));
        let at = archive.resolve(b"/file").expect("a tree").expect("a file");
        let blocks = archive.announce(at, 0, 99).expect("blocks");
        assert!(blocks.len() > 34, "{}", blocks.len());
        let prepare = |n: usize| archive.data.prepare(blocks[n].position, blocks[n].size);
        assert!((0..32).all(prepare));
        assert!(!prepare(32), "nobody has read the first ones");
        archive.make_ready(blocks[0]).expect("the first block");
        assert!(prepare(32) && !prepare(33));
        // What is forgotten is not waited for.
        archive.shrink();
        assert!(prepare(33));
    }
}
