//! Extended attributes: names and values.
//!
//! An inode holds an index into a lookup table; its entry points into metadata blocks that hold
//! name-value pairs. A value may be stored elsewhere, once for many files.

use crate::error::{Error, Result};
use crate::format::{Fields, METADATA_SIZE, NAME_MAX, XATTR_VALUE_MAX};
use crate::meta::{Cursor, Meta, MetaPos};
use crate::table::Table;

/// Bytes of all values of one inode that are held at once: far more than any file system stores.
const TOTAL_MAX: usize = 1 << 20;
/// Flag of a type: the value is elsewhere.
const OUT_OF_LINE: u16 = 0x0100;

/// One name and its value.
pub(crate) type Pair = (Vec<u8>, Vec<u8>);

/// The attributes of an image.
#[derive(Clone, Copy)]
pub(crate) struct Xattrs {
    /// Position of the first block of pairs.
    pairs: u64,
    /// Pairs end before this.
    end: u64,
    ids: Table<16>,
}

impl Xattrs {
    /// Reads the 16-byte header at `table`. `end` is the end of the image.
    pub(crate) fn open(meta: &Meta, table: u64, end: u64) -> Result<Xattrs> {
        let mut raw = [0; 16];
        meta.read_stored(table, &mut raw)?;
        let mut f = Fields::new(&raw);
        let (pairs, count) = (f.u64(), f.u32());
        if pairs >= table {
            return Err(Error::Damaged("xattr table"));
        }
        Ok(Xattrs {
            pairs,
            end: table,
            ids: Table::open(table + 16, u64::from(count), end)?,
        })
    }

    /// Whether no inode has attributes.
    pub(crate) fn is_empty(&self) -> bool {
        self.ids.count() == 0
    }

    /// Names and values of entry `id`.
    pub(crate) fn pairs(&self, meta: &Meta, id: u32) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        let mut total = 0;
        self.each(meta, id, |name, value| {
            let value = value.read(self, meta)?;
            total += name.len() + value.len() + 64;
            if total > TOTAL_MAX {
                return Err(Error::Damaged("xattrs: there are too many"));
            }
            pairs.push((name.to_vec(), value));
            Ok(true)
        })?;
        Ok(pairs)
    }

    /// The value of one name.
    pub(crate) fn value(&self, meta: &Meta, id: u32, wanted: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut found = None;
        self.each(meta, id, |name, value| {
            if name == wanted {
                found = Some(value.read(self, meta)?);
            }
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    /// The names, as listxattr(2) wants them: each ended by NUL.
    pub(crate) fn names(&self, meta: &Meta, id: u32) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        self.each(meta, id, |name, _| {
            names.extend_from_slice(name);
            names.push(0);
            // XATTR_LIST_MAX: the kernel would refuse more.
            if names.len() > 65536 {
                Err(Error::Damaged("xattrs: there are too many"))
            } else {
                Ok(true)
            }
        })?;
        Ok(names)
    }

    fn at(&self, reference: u64) -> Result<MetaPos> {
        let (block, offset) = (reference >> 16, (reference & 0xffff) as usize);
        if offset >= METADATA_SIZE {
            return Err(Error::Damaged("xattr reference"));
        }
        let block = self
            .pairs
            .checked_add(block)
            .ok_or(Error::Damaged("xattr reference"))?;
        Ok(MetaPos { block, offset })
    }

    /// Calls `f` with each full name and its value's place, until it returns false.
    fn each(
        &self,
        meta: &Meta,
        id: u32,
        mut f: impl FnMut(&[u8], Value) -> Result<bool>,
    ) -> Result<()> {
        let raw = self.ids.entry(meta, u64::from(id))?;
        let mut entry = Fields::new(&raw);
        let (reference, count) = (entry.u64(), entry.u32());
        let mut cursor = Cursor::new(meta, self.at(reference)?, self.end);
        for _ in 0..count {
            let head = cursor.array::<4>()?;
            let mut head = Fields::new(&head);
            let (kind, name_len) = (head.u16(), usize::from(head.u16()));
            let mut name = prefix(kind & 0xff)?.to_vec();
            if name_len == 0 || name.len() + name_len > NAME_MAX {
                return Err(Error::Damaged("xattr name"));
            }
            let start = name.len();
            name.resize(start + name_len, 0);
            cursor.read(&mut name[start..])?;
            if name[start..].contains(&0) {
                return Err(Error::Damaged("xattr name"));
            }
            let len = u32::from_le_bytes(cursor.array()?);
            let value = Value {
                at: cursor.position(),
                len,
                elsewhere: kind & OUT_OF_LINE != 0,
            };
            if !f(&name, value)? {
                break;
            }
            cursor.skip(u64::from(value.stored_len()?))?;
        }
        Ok(())
    }
}

fn prefix(kind: u16) -> Result<&'static [u8]> {
    match kind {
        0 => Ok(b"user."),
        1 => Ok(b"trusted."),
        2 => Ok(b"security."),
        _ => Err(Error::Damaged("xattr type")),
    }
}

/// Where a value is.
#[derive(Clone, Copy)]
struct Value {
    at: MetaPos,
    len: u32,
    elsewhere: bool,
}

impl Value {
    fn stored_len(self) -> Result<u32> {
        if self.len > XATTR_VALUE_MAX || (self.elsewhere && self.len != 8) {
            return Err(Error::Damaged("xattr value length"));
        }
        Ok(self.len)
    }

    fn read(self, xattrs: &Xattrs, meta: &Meta) -> Result<Vec<u8>> {
        let mut len = self.stored_len()?;
        let mut cursor = Cursor::new(meta, self.at, xattrs.end);
        if self.elsewhere {
            let reference = u64::from_le_bytes(cursor.array()?);
            cursor.seek(xattrs.at(reference)?);
            len = u32::from_le_bytes(cursor.array()?);
            if len > XATTR_VALUE_MAX {
                return Err(Error::Damaged("xattr value length"));
            }
        }
        let mut value = vec![0; len as usize];
        cursor.read(&mut value)?;
        Ok(value)
    }
}
