//! Reads header and descriptors, in two reads; every number is checked against the file before it is used.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::{
    DESCRIPTOR_LEN, DataType, Descriptor, Error, FsType, GROUP, HEADER_LEN, LAUNCH, Link, MAGIC,
    MAX_SLOTS, PartType, Partition, Signature, VERSION, arch_name,
};

/// What a SIF holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sif {
    /// Go's name of the header's architecture.
    pub arch: &'static str,
    /// The objects, in the order of their slots.
    pub objects: Vec<Descriptor>,
    /// The rest of the header.
    pub header: Header,
}

/// What the header says beside that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// `./image.sif` can be run.
    pub launches: bool,
    /// UUID.
    pub identity: [u8; 16],
    /// When it was made, and last changed, seconds since 1970.
    pub times_s: (i64, i64),
    /// Slots without an object, and all of them.
    pub slots: (u64, u64),
    /// First byte and length of the table.
    pub table: (u64, u64),
    /// First byte and length of the objects.
    pub data: (u64, u64),
}

impl Sif {
    /// Whether a file that begins with these bytes is a SIF.
    pub fn is_sif(head: &[u8]) -> bool {
        head.get(32..42) == Some(MAGIC)
    }

    /// Reads header and descriptors.
    ///
    /// # Errors
    /// [`Error::NotSif`], [`Error::Truncated`] when the table or an object ends behind the file, [`Error::Damaged`].
    pub fn read(file: &File) -> Result<Sif, Error> {
        let have = file.metadata()?.len();
        let mut head = [0; HEADER_LEN];
        require("the header", have, HEADER_LEN as u64)?;
        file.read_exact_at(&mut head, 0)?;
        if !Sif::is_sif(&head) {
            return Err(Error::NotSif);
        }
        let mut fields = Fields(&head[42..]);
        let version = fields.bytes::<3>();
        if version != *VERSION {
            return Err(Error::Version(
                String::from_utf8_lossy(&version[..2]).into_owned(),
            ));
        }
        let arch = arch_name(fields.bytes());
        let identity = fields.bytes::<16>();
        let times_s = (fields.u64().cast_signed(), fields.u64().cast_signed());
        let [free, total, table, table_len, data, data_len] = [(); 6].map(|()| fields.u64());
        if total > MAX_SLOTS {
            return Err(Error::Damaged(format!(
                "{total} descriptors; at most {MAX_SLOTS} are allowed"
            )));
        }
        let len = total * DESCRIPTOR_LEN as u64;
        if table_len != len {
            return Err(Error::Damaged(format!(
                "a table of {table_len} bytes for {total} descriptors"
            )));
        }
        require("the table of descriptors", have, end(table, len)?)?;
        let mut raw = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut raw, table)?;
        let slots = raw.chunks_exact(DESCRIPTOR_LEN).filter(|slot| slot[4] != 0);
        let objects = slots
            .map(|slot| decode(slot, have))
            .collect::<Result<Vec<_>, _>>()?;
        check_places(&objects, table..table + len)?;
        let header = Header {
            launches: head.starts_with(LAUNCH),
            identity,
            times_s,
            slots: (free, total),
            table: (table, table_len),
            data: (data, data_len),
        };
        Ok(Sif {
            arch,
            objects,
            header,
        })
    }

    /// The partition that is the image's root.
    pub fn primary(&self) -> Option<(&Descriptor, Partition)> {
        self.partitions(PartType::Primary).next()
    }

    /// The partitions of a use, in order.
    pub fn partitions(&self, part: PartType) -> impl Iterator<Item = (&Descriptor, Partition)> {
        self.objects
            .iter()
            .filter_map(move |d| Some((d, d.partition.filter(|p| p.part == part)?)))
    }
}

/// No byte belongs to two things, no number to two objects, and there is one root at most: which of two is meant, each
/// reader would decide for itself.
fn check_places(objects: &[Descriptor], table: Range<u64>) -> Result<(), Error> {
    let mut places = vec![
        (0..HEADER_LEN as u64, "the header".to_owned()),
        (table, "the table of descriptors".to_owned()),
    ];
    for object in objects {
        let end = object.offset_bytes + object.len_bytes;
        places.push((object.offset_bytes..end, format!("object {}", object.id)));
    }
    places.retain(|(place, _)| !place.is_empty());
    places.sort_by_key(|(place, _)| place.start);
    for pair in places.windows(2) {
        if let [(a, first), (b, second)] = pair
            && b.start < a.end
        {
            return Err(Error::Damaged(format!("{first} and {second} overlap")));
        }
    }
    let mut ids: Vec<u32> = objects.iter().map(|o| o.id).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::Damaged(format!(
            "two objects have the number {}",
            pair[0]
        )));
    }
    let is_primary = |o: &&Descriptor| o.partition.is_some_and(|p| p.part == PartType::Primary);
    match objects.iter().filter(is_primary).count() {
        0 | 1 => Ok(()),
        several => Err(Error::Damaged(format!(
            "it has {several} primary partitions"
        ))),
    }
}

fn decode(slot: &[u8], have: u64) -> Result<Descriptor, Error> {
    let mut fields = Fields(slot);
    let data_type = DataType::from_code(fields.i32());
    fields.bytes::<1>(); // used
    let id = fields.u32();
    let group = fields.u32();
    let link = fields.u32();
    let (offset_bytes, len_bytes) = (fields.u64(), fields.u64());
    let [_stored, created, modified, _uid, _gid] = [(); 5].map(|()| fields.u64());
    let name = fields.bytes::<128>();
    if id == 0 {
        return Err(Error::Damaged("an object has the number 0".into()));
    }
    require(&format!("object {id}"), have, end(offset_bytes, len_bytes)?)?;
    let partition = (data_type == DataType::Partition).then(|| Partition {
        fs: FsType::from_code(fields.i32()),
        part: PartType::from_code(fields.i32()),
        arch: arch_name(fields.bytes()),
    });
    let signature = (data_type == DataType::Signature).then(|| Signature {
        hash: fields.i32(),
        entity: fields.bytes(),
    });
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    Ok(Descriptor {
        id,
        data_type,
        group: (group & !GROUP != 0).then_some(group & !GROUP),
        offset_bytes,
        len_bytes,
        name: String::from_utf8_lossy(name).into_owned(),
        partition,
        link: match (link & GROUP == GROUP, link & !GROUP) {
            (_, 0) => Link::None,
            (true, group) => Link::Group(group),
            (false, object) => Link::Object(object),
        },
        times_s: (created.cast_signed(), modified.cast_signed()),
        signature,
    })
}

fn end(offset: u64, len: u64) -> Result<u64, Error> {
    // The numbers are signed in the format.
    let end = offset
        .checked_add(len)
        .filter(|end| i64::try_from(*end).is_ok());
    end.ok_or_else(|| Error::Damaged(format!("a part of {len} bytes at byte {offset}")))
}

fn require(what: &str, have: u64, need: u64) -> Result<(), Error> {
    if have >= need {
        Ok(())
    } else {
        Err(Error::Truncated {
            what: what.into(),
            have,
            need,
        })
    }
}

/// Takes fields off the front. Callers hand in enough bytes; what lies behind the end reads as zeros.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (front, rest) = self.0.split_at(N.min(self.0.len()));
        field[..front.len()].copy_from_slice(front);
        self.0 = rest;
        field
    }

    fn i32(&mut self) -> i32 {
        i32::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}
