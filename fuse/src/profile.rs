//! Access profiles: which parts of an image a start reads, so that the next start can ask for them at once.
//!
//! On a network file system each read is a round trip, and a program that starts makes thousands, one after the other.
//! A profile lists them; read ahead in few large pieces they cost a fraction. It also names the data blocks, so that they
//! are decompressed before they are asked for. It is a hint: whatever is wrong with it, the image is read all the same.
//!
//! One file for each image, named by what the image says of itself (its superblock, which has the time of making and the
//! places of all tables) and its length, so that copies and other nodes share it. Written beside its place and renamed.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::Builder;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::cache::lock;
use crate::error::{Error, Result};
use crate::format::{BlockSize, Superblock};
use crate::source::Source;

const MAGIC: &[u8; 8] = b"capsidP2";
/// Ranges of a profile, at most: 24 bytes each in memory, 12 in the file.
const RANGES_MAX: usize = 1 << 15;
/// Bytes that are read ahead, at most.
const BYTES_MAX: u64 = 128 << 20;
/// Ranges that are closer than this are read as one.
const GAP_BYTES: u64 = 128 << 10;
/// Bytes of one read.
const STEP_BYTES: u64 = 1 << 20;
/// Reads at once.
const READERS: usize = 4;
/// Profiles in the directory, at most; the oldest go.
const FILES_MAX: usize = 256;

/// A draft of this age, in seconds, is of a server that was killed.
const DRAFT_S: i64 = 3600;

/// In the word of a range: it is a data block, and the rest is what the image says of its size.
const IS_BLOCK: u32 = 1 << 31;

/// A part of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    position: u64,
    len: u32,
    /// If it is a data block.
    block: Option<BlockSize>,
}

impl Range {
    /// In the file: the position, and the length or what [`IS_BLOCK`] says.
    const LEN: usize = 12;

    fn encode(self) -> [u8; Range::LEN] {
        let word = self.block.map_or(self.len, |size| size.word() | IS_BLOCK);
        let mut raw = [0; Range::LEN];
        raw[..8].copy_from_slice(&self.position.to_le_bytes());
        raw[8..].copy_from_slice(&word.to_le_bytes());
        raw
    }

    fn decode(raw: &[u8; Range::LEN], block_size: u32, image_len: u64) -> Option<Range> {
        let position = u64::from_le_bytes(*raw.first_chunk()?);
        let word = u32::from_le_bytes(*raw.last_chunk()?);
        let block = match word & IS_BLOCK {
            0 => None,
            _ => Some(BlockSize::decode(word & !IS_BLOCK, block_size).ok()?),
        };
        let len = block.map_or(word, |size| size.stored_len() as u32);
        let end = position.checked_add(u64::from(len))?;
        (len > 0 && end <= image_len).then_some(Range {
            position,
            len,
            block,
        })
    }
}

/// Notes what is read, in the order of first use.
pub(crate) struct Record(Mutex<Option<Vec<Range>>>);

impl Record {
    /// Notes nothing until [`Record::begin`].
    pub(crate) fn new() -> Record {
        Record(Mutex::new(None))
    }

    fn begin(&self) {
        *lock(&self.0) = Some(Vec::new());
    }

    pub(crate) fn note(&self, position: u64, len: usize, block: Option<BlockSize>) {
        let mut ranges = lock(&self.0);
        let Some(ranges) = ranges.as_mut() else {
            return;
        };
        if ranges.len() < RANGES_MAX {
            let len = len as u32;
            ranges.push(Range {
                position,
                len,
                block,
            });
        }
    }

    fn end(&self) -> Option<Vec<Range>> {
        lock(&self.0).take()
    }
}

/// What identifies an image, and where its profile is.
pub(crate) struct Profile {
    directory: OwnedFd,
    identity: [u8; Superblock::LEN + 8],
    known: Vec<Range>,
    /// Held while it is written: whoever comes meanwhile, to end the process, waits.
    saving: Mutex<()>,
}

impl Profile {
    /// Loads the profile of an image, if there is one, and begins to note what is read.
    pub(crate) fn open(
        directory: OwnedFd,
        superblock: &[u8; Superblock::LEN],
        block_size: u32,
        source: &Source,
    ) -> Profile {
        let mut identity = [0; Superblock::LEN + 8];
        identity[..Superblock::LEN].copy_from_slice(superblock);
        identity[Superblock::LEN..].copy_from_slice(&source.len().to_le_bytes());
        let known = load(directory.as_fd(), &identity, block_size, source.len());
        let known = known.unwrap_or_default();
        source.record.begin();
        Profile {
            directory,
            identity,
            known,
            saving: Mutex::default(),
        }
    }

    /// Whether no start of the image is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The data blocks, in the order of first use.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, BlockSize)> {
        let known = self.known.iter();
        known.filter_map(|range| Some((range.position, range.block?)))
    }

    /// Reads what the profile names into the system's cache. Returns how many bytes.
    pub(crate) fn prefetch(&self, source: &Source) -> u64 {
        let mut left = BYTES_MAX;
        let steps: Vec<(u64, u64)> = coalesce(&self.known)
            .into_iter()
            .flat_map(steps)
            .take_while(|(_, len)| {
                left = left.saturating_sub(*len);
                left > 0
            })
            .collect();
        let next = AtomicUsize::new(0);
        let read = || {
            let (mut done, mut buffer) = (0, vec![0; STEP_BYTES as usize]);
            while let Some((position, len)) = steps.get(next.fetch_add(1, Relaxed)) {
                source.will_need(*position, *len);
                // Who needs a part that cannot be read is told then.
                match source.read_ahead(*position, &mut buffer[..*len as usize]) {
                    Ok(()) => done += len,
                    Err(_) => break,
                }
            }
            done
        };
        // One step is a few round trips, whatever the system makes of the hint; these overlap.
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS.min(steps.len()))
                .filter_map(|_| {
                    Builder::new()
                        .name("prefetch".into())
                        .spawn_scoped(scope, read)
                        .ok()
                })
                .collect();
            readers
                .into_iter()
                .filter_map(|reader| reader.join().ok())
                .sum()
        })
    }

    /// Writes what was read since [`Profile::open`], if it is new; once.
    pub(crate) fn save(&self, source: &Source) {
        let _saving = lock(&self.saving);
        let Some(fresh) = source.record.end() else {
            return;
        };
        let covered = coalesce(&self.known);
        let is_known = |range: &Range| {
            let end = range.position + u64::from(range.len);
            covered
                .iter()
                .any(|(start, stop)| *start <= range.position && end <= *stop)
        };
        let unknown: Vec<Range> = fresh.iter().filter(|r| !is_known(r)).copied().collect();
        // A little always differs.
        if unknown.len() * 20 <= fresh.len() {
            return;
        }
        let mut all = self.known.clone();
        all.extend(unknown);
        all.truncate(RANGES_MAX);
        // It is a hint: there is nothing to do about a full or read-only disk.
        let _lost = self.write(&all);
        let _full = self.prune();
    }

    fn write(&self, ranges: &[Range]) -> rustix::io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.identity);
        for range in ranges {
            bytes.extend(range.encode());
        }
        let name = name(&self.identity);
        let draft = format!("{name}.{}", rustix::process::getpid().as_raw_nonzero());
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, &draft, flags, Mode::RUSR | Mode::WUSR)?;
        let written = File::from(file).write_all(&bytes).map_err(|_| Errno::IO);
        let published = written
            .and_then(|()| rustix::fs::renameat(&self.directory, &draft, &self.directory, &name));
        if published.is_err() {
            let _gone = rustix::fs::unlinkat(&self.directory, &draft, AtFlags::empty());
        }
        published
    }

    fn prune(&self) -> rustix::io::Result<()> {
        let mut files = Vec::new();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now_s = now.map_or(0, |now| now.as_secs().cast_signed());
        for entry in rustix::fs::Dir::read_from(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name().to_owned();
            let is_whole = name.to_bytes().ends_with(b".profile");
            if !is_whole && !name.to_string_lossy().contains(".profile.") {
                continue;
            }
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            // Another server may have renamed or removed it.
            let Ok(stat) = rustix::fs::statat(&self.directory, &name, flags) else {
                continue;
            };
            if is_whole {
                files.push((stat.st_mtime, name));
            } else if now_s - stat.st_mtime > DRAFT_S {
                let _gone = rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty());
            }
        }
        files.sort_unstable();
        let surplus = files.len().saturating_sub(FILES_MAX);
        for (_, name) in &files[..surplus] {
            let _gone = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
        }
        Ok(())
    }
}

/// FNV-1a: the same everywhere and for ever. Equal names with other identities are told apart by the content.
fn name(identity: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    let hash = identity.iter().fold(0xcbf2_9ce4_8422_2325, step);
    format!("{hash:016x}.profile")
}

fn load(
    directory: BorrowedFd<'_>,
    identity: &[u8],
    block_size: u32,
    image_len: u64,
) -> Result<Vec<Range>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name(identity), flags, Mode::empty())
        .map_err(|errno| Error::sys("open the profile", errno))?;
    let most = MAGIC.len() + identity.len() + RANGES_MAX * Range::LEN;
    let mut bytes = Vec::new();
    File::from(file)
        .take(most as u64)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::os("read the profile", &e))?;
    let ranges = bytes
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.strip_prefix(identity))
        .ok_or(Error::Damaged("profile"))?;
    let (ranges, _cut_off) = ranges.as_chunks();
    let decode = |raw| Range::decode(raw, block_size, image_len);
    Ok(ranges.iter().filter_map(decode).collect())
}

/// Start and end of the ranges, neighbours joined, in the order of first use.
fn coalesce(ranges: &[Range]) -> Vec<(u64, u64)> {
    let mut sorted: Vec<(usize, u64, u64)> = ranges
        .iter()
        .enumerate()
        .map(|(index, r)| (index, r.position, r.position + u64::from(r.len)))
        .collect();
    sorted.sort_unstable_by_key(|(_, start, _)| *start);
    let mut joined: Vec<(usize, u64, u64)> = Vec::new();
    for (index, start, end) in sorted {
        match joined.last_mut() {
            Some((first, _, stop)) if start <= stop.saturating_add(GAP_BYTES) => {
                *first = index.min(*first);
                *stop = end.max(*stop);
            }
            _ => joined.push((index, start, end)),
        }
    }
    joined.sort_unstable();
    joined
        .iter()
        .map(|(_, start, end)| (*start, *end))
        .collect()
}

/// A range in parts of one read.
fn steps((start, end): (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
    (start..end)
        .step_by(STEP_BYTES as usize)
        .map(move |at| (at, STEP_BYTES.min(end - at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_as_one_in_the_order_of_first_use() {
        let range = |position, len| Range {
            position,
            len,
            block: None,
        };
        let far = 100 << 20;
        let ranges = [
            range(far, 10),
            range(5000, 100),
            range(0, 100),
            range(far + 10, 10),
        ];
        assert_eq!(coalesce(&ranges), [(far, far + 20), (0, 5100)]);
        let parts: Vec<_> = steps((7, 7 + STEP_BYTES + 5)).collect();
        assert_eq!(parts, [(7, STEP_BYTES), (7 + STEP_BYTES, 5)]);
    }
}
