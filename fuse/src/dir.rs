//! Directories: list and look up names; uses the directory index.
//!
//! A listing is a sequence of runs: a header (metadata block of the inodes, base of their numbers) and up
//! to 256 entries. Names are sorted. A cookie names a place in a listing by the run's offset and the
//! entry's number in the run, so that a listing can go on anywhere without any state.

use crate::error::{Error, Result};
use crate::format::{DirEntryHead, DirHeader, DirIndexHead, InodeRef, Kind, NAME_MAX};
use crate::inode::Listing;
use crate::meta::{Cursor, Meta, MetaPos};

/// Bits of a cookie for the number in the run, 0 to 256.
const RUN_BITS: u32 = 9;

/// Entry of a directory.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// 1 to 255 bytes of any encoding, without `/` and NUL, not `.` or `..`.
    pub name: &'a [u8],
    /// Where its inode is.
    pub inode: InodeRef,
    /// Its inode number.
    pub number: u32,
    /// What it is.
    pub kind: Kind,
    /// Where to go on behind this entry.
    pub next: u64,
}

/// What listings need to know of the image.
#[derive(Clone, Copy)]
pub(crate) struct Directories<'a> {
    pub(crate) meta: &'a Meta,
    /// Position of the directory table.
    pub(crate) table: u64,
    /// No listing goes on behind this.
    pub(crate) end: u64,
    pub(crate) root: InodeRef,
}

impl Directories<'_> {
    /// Calls `f` for each entry from the place `cookie` (0: the start) until it returns false.
    pub(crate) fn list(
        self,
        this: InodeRef,
        listing: &Listing,
        cookie: u64,
        f: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let (run, skip) = (cookie >> RUN_BITS, (cookie & ((1 << RUN_BITS) - 1)) as u32);
        let mut walk = Walk::start(self, this, listing);
        if run > u64::from(listing.len) {
            return Ok(());
        }
        walk.cursor.skip(run)?;
        walk.done = run as u32;
        let mut name = [0; NAME_MAX];
        for _ in 0..skip {
            if walk.next(&mut name)?.is_none() {
                return Ok(());
            }
        }
        while let Some(entry) = walk.next(&mut name)? {
            if !f(entry) {
                break;
            }
        }
        Ok(())
    }

    /// The entry called `wanted`.
    pub(crate) fn find(
        self,
        this: InodeRef,
        listing: &Listing,
        wanted: &[u8],
    ) -> Result<Option<(InodeRef, Kind)>> {
        if wanted.is_empty() || wanted.len() > NAME_MAX {
            return Ok(None);
        }
        let mut walk = Walk::start(self, this, listing);
        let stop = self.jump(listing, wanted, &mut walk)?;
        let mut name = [0; NAME_MAX];
        while !(walk.left == 0 && walk.done >= stop) {
            let Some(entry) = walk.next(&mut name)? else {
                break;
            };
            if entry.name == wanted {
                return Ok(Some((entry.inode, entry.kind)));
            }
            // As the kernel: names are sorted, but only their first bytes are relied on.
            if entry.name[0] > wanted[0] {
                break;
            }
        }
        Ok(None)
    }

    /// Moves `walk` to the last indexed run that can hold `wanted`; returns where the next one begins.
    fn jump(self, listing: &Listing, wanted: &[u8], walk: &mut Walk<'_>) -> Result<u32> {
        let mut cursor = Cursor::new(self.meta, listing.index, self.table);
        let mut name = [0; NAME_MAX];
        let mut best = None;
        for _ in 0..listing.index_count {
            let head = DirIndexHead::decode(&cursor.array()?)?;
            let name = &mut name[..head.name_len];
            cursor.read(name)?;
            if head.listing_offset > listing.len {
                return Err(Error::Damaged("directory index"));
            }
            if &*name > wanted {
                walk.go_to(self, listing, best);
                return Ok(head.listing_offset);
            }
            best = Some((head.block, head.listing_offset));
        }
        walk.go_to(self, listing, best);
        Ok(listing.len)
    }
}

/// Goes through a listing.
struct Walk<'a> {
    cursor: Cursor<'a>,
    this: InodeRef,
    root: InodeRef,
    /// Bytes of the listing read, and in all.
    done: u32,
    len: u32,
    /// Where the run at hand began, its header, and its entries read and left.
    run: u32,
    inode_block: u32,
    number_base: u32,
    taken: u32,
    left: u32,
}

impl<'a> Walk<'a> {
    fn start(dirs: Directories<'a>, this: InodeRef, listing: &Listing) -> Walk<'a> {
        let block = dirs.table + u64::from(listing.block);
        let position = MetaPos {
            block,
            offset: usize::from(listing.offset),
        };
        Walk {
            cursor: Cursor::new(dirs.meta, position, dirs.end),
            this,
            root: dirs.root,
            done: 0,
            len: listing.len,
            run: 0,
            inode_block: 0,
            number_base: 0,
            taken: 0,
            left: 0,
        }
    }

    fn go_to(&mut self, dirs: Directories<'_>, listing: &Listing, indexed: Option<(u32, u32)>) {
        if let Some((block, listing_offset)) = indexed {
            let offset = (u64::from(listing_offset) + u64::from(listing.offset)) % 8192;
            let block = dirs.table + u64::from(block);
            self.cursor.seek(MetaPos {
                block,
                offset: offset as usize,
            });
            self.done = listing_offset;
        }
    }

    /// Accounts for bytes of the listing that are about to be read.
    fn advance(&mut self, count: usize) -> Result<()> {
        let done = self
            .done
            .checked_add(count as u32)
            .filter(|done| *done <= self.len);
        self.done = done.ok_or(Error::Damaged("directory: it is cut off"))?;
        Ok(())
    }

    fn next<'n>(&mut self, name: &'n mut [u8; NAME_MAX]) -> Result<Option<DirEntry<'n>>> {
        if self.left == 0 {
            if self.done >= self.len {
                return Ok(None);
            }
            self.run = self.done;
            self.advance(DirHeader::LEN)?;
            let header = DirHeader::decode(&self.cursor.array()?)?;
            self.inode_block = header.inode_block;
            self.number_base = header.number_base;
            (self.taken, self.left) = (0, header.count);
        }
        self.advance(DirEntryHead::LEN)?;
        let head = DirEntryHead::decode(&self.cursor.array()?)?;
        self.advance(head.name_len)?;
        let name = &mut name[..head.name_len];
        self.cursor.read(name)?;
        self.taken += 1;
        self.left -= 1;
        check_name(name)?;
        let inode = InodeRef::new(self.inode_block, head.inode_offset)?;
        let kind = Kind::decode(head.kind)?;
        // Either would be a directory in two places: a walk would not end.
        if inode == self.root || inode == self.this {
            return Err(Error::Damaged("directory entry: it leads back"));
        }
        Ok(Some(DirEntry {
            name,
            inode,
            number: self
                .number_base
                .wrapping_add_signed(i32::from(head.number_delta)),
            kind,
            next: self.cookie(),
        }))
    }

    /// The place of the next entry.
    fn cookie(&self) -> u64 {
        if self.left == 0 {
            u64::from(self.done) << RUN_BITS
        } else {
            u64::from(self.run) << RUN_BITS | u64::from(self.taken)
        }
    }
}

fn check_name(name: &[u8]) -> Result<()> {
    if name == b"." || name == b".." || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return Err(Error::Damaged("file name"));
    }
    Ok(())
}
