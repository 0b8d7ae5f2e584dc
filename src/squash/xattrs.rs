//! Extended attributes: sets of them, each stored once, and the table in which inodes find theirs.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Result, bail};

use super::compress::Encoder;
use super::meta::{self, Metadata};

/// The prefixes that squashfs knows, by their number.
const PREFIXES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// Bytes of a value, at most (`XATTR_SIZE_MAX`).
const MAX_VALUE: usize = 65536;

/// The sets of an image.
#[derive(Default)]
pub(super) struct Sets {
    /// Index by the set's bytes.
    known: HashMap<Vec<u8>, u32>,
    /// In order: bytes and number of attributes.
    sets: Vec<(Vec<u8>, u32)>,
    /// Attributes that the format cannot hold.
    pub(super) left_out: u64,
}

impl Sets {
    /// The index of a set; `None` for the empty one.
    pub(super) fn index(&mut self, set: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Option<u32>> {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for (name, value) in set {
            let known = PREFIXES.iter().zip(0u16..);
            let Some((rest, number)) = known
                .filter_map(|(prefix, number)| Some((name.strip_prefix(*prefix)?, number)))
                .find(|(rest, _)| !rest.is_empty())
            else {
                self.left_out += 1;
                continue;
            };
            if rest.len() > 255 || value.len() > MAX_VALUE {
                bail!(
                    "extended attribute {:?} of {} bytes is longer than Linux allows",
                    String::from_utf8_lossy(name),
                    value.len()
                );
            }
            bytes.extend(number.to_le_bytes());
            bytes.extend((rest.len() as u16).to_le_bytes());
            bytes.extend(rest);
            bytes.extend((value.len() as u32).to_le_bytes());
            bytes.extend(value);
            count += 1;
        }
        if count == 0 {
            return Ok(None);
        }
        if let Some(index) = self.known.get(&bytes) {
            return Ok(Some(*index));
        }
        let index = u32::try_from(self.sets.len())?;
        self.sets.push((bytes.clone(), count));
        self.known.insert(bytes, index);
        Ok(Some(index))
    }

    /// The table, to lie at `position`: its bytes, and where its head begins. `None` when there are no attributes.
    pub(super) fn table(
        &self,
        encoder: &mut Encoder,
        position: u64,
    ) -> Result<Option<(Vec<u8>, u64)>> {
        if self.sets.is_empty() {
            return Ok(None);
        }
        let mut pairs = Metadata::new(encoder);
        let mut ids = Vec::new();
        for (bytes, count) in &self.sets {
            ids.extend(pairs.place()?.pack().to_le_bytes());
            ids.extend(count.to_le_bytes());
            ids.extend((bytes.len() as u32).to_le_bytes());
            pairs.write(bytes)?;
        }
        let (mut table, _) = pairs.finish()?;
        let (lookup, list) = meta::lookup(encoder, &ids, position + table.len() as u64)?;
        // The head lies between the blocks of the lookup table and their list.
        let head = (list - position) as usize;
        table.extend(lookup);
        let mut fields = position.to_le_bytes().to_vec();
        fields.extend((self.sets.len() as u32).to_le_bytes());
        fields.extend([0; 4]);
        table.splice(head..head, fields);
        Ok(Some((table, list)))
    }
}
