//! Changes a SIF in its place, as Apptainer does: a new object goes behind the others, and then header and table, which
//! lie together, are written by one call. Whoever is killed in between leaves the old image with unused bytes behind it;
//! the bytes of objects that stay are never touched, so the image may be in use.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::given;

use super::write::{Entry, partition_extra};
use super::{
    ALIGNMENT, DESCRIPTOR_LEN, DataType, Draft, EXTRA, Error, Link, NAME_LEN, PartType, Partition,
    Sif, Stamp, arch_code,
};

/// Header and table must end here: they are held in memory.
const MAX_HEAD: u64 = 4 << 20;
/// Bytes of the launch line.
const LAUNCH_LEN: usize = 32;

/// The fields that only objects of one type have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extra {
    /// None.
    None,
    /// Of a partition.
    Partition(Partition),
    /// Of a signature: number of the digest, and the fingerprint of the key.
    Signature(i32, [u8; 20]),
    /// Of a bill of materials: the number of its format.
    Sbom(i32),
    /// Of a blob: its digest, as text.
    OciBlob(String),
}

impl Extra {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Extra::None => Vec::new(),
            Extra::Partition(partition) => partition_extra(*partition),
            Extra::Signature(hash, entity) => [&hash.to_le_bytes()[..], entity].concat(),
            Extra::Sbom(format) => format.to_le_bytes().to_vec(),
            Extra::OciBlob(digest) => digest.as_bytes().to_vec(),
        }
    }
}

/// An object to be added.
#[derive(Debug)]
pub struct Addition {
    /// Kind.
    pub data_type: DataType,
    /// Free text of at most 128 bytes.
    pub name: String,
    /// Number of its group.
    pub group: Option<u32>,
    /// What it belongs to.
    pub link: Link,
    /// Its first byte is a multiple of this; `None`: 4096 for a partition, 1 for others.
    pub alignment: Option<u64>,
    /// The rest.
    pub extra: Extra,
    /// The bytes, from the start to the end.
    pub content: File,
}

/// Makes a SIF without objects; what has the name already is emptied, as the peers do.
///
/// # Errors
/// When writing fails.
pub fn create(path: &Path, stamp: Stamp) -> Result<(), Error> {
    let mut file = match given::open_to_change(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => File::options()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(path)?,
        Err(error) => return Err(error.into()),
    };
    file.set_len(0)?;
    Draft::default().write(&mut file, stamp)?;
    // It launches nothing yet.
    file.write_all_at(&[0; LAUNCH_LEN], 0)?;
    Ok(())
}

/// A SIF that is open for one change.
pub struct Editor {
    file: File,
    sif: Sif,
    /// Header, table, and what lies between them.
    head: Vec<u8>,
}

impl Editor {
    /// Opens a SIF. Nobody else can until this is dropped.
    ///
    /// # Errors
    /// As [`Sif::read`]; [`Error::Busy`].
    pub fn open(path: &Path) -> Result<Editor, Error> {
        let file = given::open_to_change(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(Error::Busy),
            // Some network file systems have no locks.
            Ok(()) | Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(Error::Io(error.into())),
        }
        let sif = Sif::read(&file)?;
        let (table, len) = sif.header.table;
        let end = table.saturating_add(len);
        let data = sif.objects.iter().map(|o| o.offset_bytes).min();
        if end > MAX_HEAD || data.is_some_and(|data| data < end) {
            return Err(Error::Damaged(
                "its table does not lie before its objects".into(),
            ));
        }
        let mut head = vec![0; end as usize];
        file.read_exact_at(&mut head, 0)?;
        Ok(Editor { file, sif, head })
    }

    /// What it holds.
    pub fn sif(&self) -> &Sif {
        &self.sif
    }

    /// Adds an object in the first free slot. Returns its number.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::HasPrimary`], [`Error::LongName`], or when reading or writing fails: the file is then as it was.
    pub fn add(mut self, addition: Addition, time_s: i64) -> Result<u32, Error> {
        let partition = match addition.extra {
            Extra::Partition(partition) => Some(partition),
            _ => None,
        };
        let primary = partition.filter(|p| p.part == PartType::Primary);
        if primary.is_some() && self.sif.primary().is_some() {
            return Err(Error::HasPrimary);
        }
        let slots = 0..self.sif.header.slots.1 as usize;
        let slot = slots.into_iter().find(|slot| self.slot(*slot)[4] == 0);
        let slot = slot.ok_or(Error::Full)?;
        if addition.name.len() > NAME_LEN {
            return Err(Error::LongName(addition.name.len()));
        }
        let end = self.end();
        let default = if partition.is_some() { ALIGNMENT } else { 1 };
        let alignment = addition.alignment.unwrap_or(default).max(1);
        let before = self.file.metadata()?.len();
        let written = (|| {
            let start = end
                .checked_next_multiple_of(alignment)
                .filter(|start| i64::try_from(*start).is_ok())
                .ok_or_else(|| Error::Damaged(format!("an alignment of {alignment} bytes")))?;
            let mut content = addition.content;
            content.seek(SeekFrom::Start(0))?;
            let claimed = content.metadata()?.len();
            (&self.file).seek(SeekFrom::Start(start))?;
            let len = std::io::copy(&mut content.take(claimed), &mut &self.file)?;
            // What a deleted object left may reach further.
            self.file.set_len(start + len)?;
            self.file.sync_data()?;
            Ok((start, len))
        })();
        let (start, len) = match written {
            Ok(written) => written,
            Err(error) => {
                let _ = self.file.set_len(before.min(end));
                return Err(error);
            }
        };
        let id = slot as u32 + 1;
        let entry = Entry {
            id,
            data_type: addition.data_type,
            group: addition.group,
            link: addition.link,
            place: (start, len, start + len - end),
            time_s,
            name: &addition.name,
            extra: &addition.extra.bytes(),
        };
        let bytes = entry.encode()?;
        self.slot_mut(slot).copy_from_slice(&bytes);
        if let Some(primary) = primary {
            self.set_arch(primary.arch);
        }
        self.publish(start + len, time_s)?;
        Ok(id)
    }

    /// Takes an object out. Its bytes stay where they are, unless they are the last.
    ///
    /// # Errors
    /// [`Error::NoObject`], or when writing fails.
    pub fn delete(mut self, id: u32, time_s: i64) -> Result<(), Error> {
        let slot = self.find(id)?;
        let primary = self
            .sif
            .primary()
            .is_some_and(|(object, _)| object.id == id);
        self.slot_mut(slot).fill(0);
        self.sif.objects.retain(|object| object.id != id);
        if primary {
            self.set_arch("unknown");
        }
        let end = self.end();
        self.publish(end, time_s)
    }

    /// Makes a partition the image's root; what was it becomes an ordinary one.
    ///
    /// # Errors
    /// [`Error::NoObject`], [`Error::NotPartition`], or when writing fails.
    pub fn set_primary(mut self, id: u32, time_s: i64) -> Result<(), Error> {
        let slot = self.find(id)?;
        let object = self.sif.objects.iter().find(|object| object.id == id);
        let Some(partition) = object.and_then(|object| object.partition) else {
            return Err(Error::NotPartition(id));
        };
        let old = self.sif.primary().map(|(object, _)| object.id);
        if let Some(old) = old.filter(|old| *old != id) {
            let slot = self.find(old)?;
            self.set_part(slot, PartType::Other(1), time_s);
        }
        self.set_part(slot, PartType::Primary, time_s);
        self.set_arch(partition.arch);
        let end = self.end();
        self.publish(end, time_s)
    }

    /// Behind the last object.
    fn end(&self) -> u64 {
        let ends = self
            .sif
            .objects
            .iter()
            .map(|o| o.offset_bytes + o.len_bytes);
        ends.max()
            .unwrap_or(0)
            .max(self.sif.header.data.0)
            .max(self.head.len() as u64)
    }

    fn find(&self, id: u32) -> Result<usize, Error> {
        let slots = 0..self.sif.header.slots.1 as usize;
        slots
            .into_iter()
            .find(|slot| {
                let slot = self.slot(*slot);
                slot[4] != 0 && slot[5..9] == id.to_le_bytes()
            })
            .ok_or(Error::NoObject(id))
    }

    fn range(&self, slot: usize) -> std::ops::Range<usize> {
        let start = self.sif.header.table.0 as usize + slot * DESCRIPTOR_LEN;
        start..start + DESCRIPTOR_LEN
    }

    fn slot(&self, slot: usize) -> &[u8] {
        &self.head[self.range(slot)]
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        let range = self.range(slot);
        &mut self.head[range]
    }

    fn set_part(&mut self, slot: usize, part: PartType, time_s: i64) {
        let slot = self.slot_mut(slot);
        slot[49..57].copy_from_slice(&time_s.to_le_bytes());
        slot[EXTRA + 4..EXTRA + 8].copy_from_slice(&part.code().to_le_bytes());
    }

    fn set_arch(&mut self, arch: &str) {
        self.head[45..48].copy_from_slice(&arch_code(arch));
    }

    /// Writes header and table.
    fn publish(&mut self, end: u64, time_s: i64) -> Result<(), Error> {
        let total = self.sif.header.slots.1;
        let used = (0..total as usize).filter(|slot| self.slot(*slot)[4] != 0);
        let free = total - used.count() as u64;
        let data = self.sif.header.data.0.max(self.head.len() as u64);
        for (at, number) in [
            (72, time_s.cast_unsigned()),
            (80, free),
            (112, data),
            (120, end.saturating_sub(data)),
        ] {
            self.head[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        self.file.write_all_at(&self.head, 0)?;
        self.file.sync_data()?;
        Ok(())
    }
}
