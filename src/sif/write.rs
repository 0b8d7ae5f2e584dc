//! Writes a new SIF.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

use super::{
    ALIGNMENT, DESCRIPTOR_LEN, DataType, EXTRA, Error, GROUP, HEADER_LEN, LAUNCH, Link, MAGIC,
    NAME_LEN, PartType, Partition, SLOTS, TABLE_OFFSET, VERSION, arch_code,
};

/// When an image was made, and its identity: given by the caller, so that two builds can be alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Seconds since 1970.
    pub time_s: i64,
    /// UUID; zeros in a reproducible image.
    pub identity: [u8; 16],
}

/// An object's bytes.
#[derive(Debug)]
pub enum Content {
    /// Small ones.
    Bytes(Vec<u8>),
    /// A file from its start to its end.
    File(File),
}

/// A SIF to be written: objects in order.
#[derive(Debug, Default)]
pub struct Draft {
    objects: Vec<(DataType, Option<Partition>, String, Content)>,
}

impl Draft {
    /// Adds an object of the first group.
    pub fn add(&mut self, data_type: DataType, name: &str, content: Content) -> &mut Draft {
        self.objects.push((data_type, None, name.into(), content));
        self
    }

    /// Adds a partition. A primary one sets the image's architecture.
    pub fn add_partition(&mut self, partition: Partition, content: Content) -> &mut Draft {
        self.objects
            .push((DataType::Partition, Some(partition), String::new(), content));
        self
    }

    /// Writes the image into an empty file.
    ///
    /// # Errors
    /// [`Error::Full`], or when reading or writing fails.
    pub fn write(self, out: &mut File, stamp: Stamp) -> Result<(), Error> {
        let used = self.objects.len() as u64;
        if used > SLOTS {
            return Err(Error::Full);
        }
        let primary = self
            .objects
            .iter()
            .filter_map(|o| o.1)
            .find(|p| p.part == PartType::Primary);
        let data = TABLE_OFFSET + SLOTS * DESCRIPTOR_LEN as u64;
        let mut table = Vec::new();
        let mut at = data;
        for (index, (data_type, partition, name, content)) in self.objects.into_iter().enumerate() {
            let start = if partition.is_some() {
                at.next_multiple_of(ALIGNMENT)
            } else {
                at
            };
            out.seek(SeekFrom::Start(start))?;
            let len = copy(content, out)?;
            let entry = Entry {
                id: index as u32 + 1,
                data_type,
                group: Some(1),
                link: Link::None,
                place: (start, len, start + len - at),
                time_s: stamp.time_s,
                name: &name,
                extra: &partition.map(partition_extra).unwrap_or_default(),
            };
            table.extend(entry.encode()?);
            at = start + len;
        }
        // An image that ends in a hole would be shorter than its header says.
        out.set_len(at)?;
        out.seek(SeekFrom::Start(TABLE_OFFSET))?;
        out.write_all(&table)?;
        out.seek(SeekFrom::Start(0))?;
        out.write_all(&header(
            primary.map_or("unknown", |p| p.arch),
            used,
            data,
            at - data,
            stamp,
        ))?;
        Ok(())
    }
}

fn copy(content: Content, out: &mut File) -> Result<u64, Error> {
    match content {
        Content::Bytes(bytes) => {
            out.write_all(&bytes)?;
            Ok(bytes.len() as u64)
        }
        Content::File(mut file) => {
            file.seek(SeekFrom::Start(0))?;
            let len = file.metadata()?.len();
            let copied = std::io::copy(&mut file.take(len), out)?;
            if copied == len {
                Ok(len)
            } else {
                Err(Error::Truncated {
                    what: "an object".into(),
                    have: copied,
                    need: len,
                })
            }
        }
    }
}

fn header(arch: &str, used: u64, data: u64, data_len: u64, stamp: Stamp) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_LEN);
    header.extend(LAUNCH);
    header.resize(32, 0);
    header.extend(MAGIC);
    header.extend(VERSION);
    header.extend(arch_code(arch));
    header.extend(stamp.identity);
    header.extend(stamp.time_s.to_le_bytes());
    header.extend(stamp.time_s.to_le_bytes());
    for number in [
        SLOTS - used,
        SLOTS,
        TABLE_OFFSET,
        SLOTS * DESCRIPTOR_LEN as u64,
        data,
        data_len,
    ] {
        header.extend(number.to_le_bytes());
    }
    header
}

/// What a descriptor says.
pub(super) struct Entry<'a> {
    pub(super) id: u32,
    pub(super) data_type: DataType,
    pub(super) group: Option<u32>,
    pub(super) link: Link,
    /// Offset, length, and length with the padding before it.
    pub(super) place: (u64, u64, u64),
    pub(super) time_s: i64,
    pub(super) name: &'a str,
    /// The fields of the type.
    pub(super) extra: &'a [u8],
}

impl Entry<'_> {
    /// # Errors
    /// [`Error::LongName`].
    pub(super) fn encode(&self) -> Result<Vec<u8>, Error> {
        if self.name.len() > NAME_LEN {
            return Err(Error::LongName(self.name.len()));
        }
        let mut slot = Vec::with_capacity(DESCRIPTOR_LEN);
        slot.extend(self.data_type.code().to_le_bytes());
        slot.push(1);
        slot.extend(self.id.to_le_bytes());
        slot.extend((GROUP | self.group.unwrap_or(0)).to_le_bytes());
        let link = match self.link {
            Link::None => 0,
            Link::Object(id) => id,
            Link::Group(group) => GROUP | group,
        };
        slot.extend(link.to_le_bytes());
        for number in [self.place.0, self.place.1, self.place.2] {
            slot.extend(number.to_le_bytes());
        }
        slot.extend(self.time_s.to_le_bytes());
        slot.extend(self.time_s.to_le_bytes());
        slot.resize(73, 0);
        slot.extend(self.name.bytes());
        slot.resize(EXTRA, 0);
        slot.extend(self.extra);
        slot.resize(DESCRIPTOR_LEN, 0);
        Ok(slot)
    }
}

/// The fields of a partition.
pub(super) fn partition_extra(partition: Partition) -> Vec<u8> {
    let mut extra = partition.fs.code().to_le_bytes().to_vec();
    extra.extend(partition.part.code().to_le_bytes());
    extra.extend(arch_code(partition.arch));
    extra
}
