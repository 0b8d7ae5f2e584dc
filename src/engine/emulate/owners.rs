//! The record of owners: who owns which file, beside what the file system says.
//!
//! A file is known by device and inode number, so a record survives renames and is shared by hard links. A number
//! that was freed and given to another file is noticed: each record holds a proof, the file handle of
//! `name_to_handle_at(2)` (it holds the inode's generation) and the time of birth of `statx(2)`, whichever the file
//! system has, and a record whose proof does not fit any more is void. A file without a record is what the file system
//! says that it is: root's.
//!
//! Numbers belong to the view in which they were seen: through an overlay a file has others than in its layer. Between
//! views, and between runs, the record goes by path ([`Owners::save`], [`Owners::load`]).

use std::collections::HashMap;
use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use super::super::sys;

/// A device that a file stands for: no normal user can make a real one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Device {
    /// A block device, else a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl Device {
    /// Its type, as `st_mode` has it.
    pub(super) fn kind(self) -> u32 {
        if self.block {
            libc::S_IFBLK
        } else {
            libc::S_IFCHR
        }
    }
}

/// What is recorded of a file. Its permission bits, special ones too, are on the file itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Owner {
    /// User inside.
    pub uid: u32,
    /// Group inside.
    pub gid: u32,
    /// The regular, empty file stands for this device.
    pub device: Option<Device>,
}

/// Device and inode number.
type Key = (u64, u64);

/// What a file has that the next one of its number has not.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Proof {
    born: Option<(i64, u32)>,
    handle: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    proof: Proof,
    owner: Owner,
}

/// The record of all files.
#[derive(Debug, Default)]
pub struct Owners {
    records: HashMap<Key, Record>,
    group_directories: bool,
}

/// Longest line of a saved record, bytes: a path with every byte escaped, and the numbers.
const MAX_LINE: u64 = 4 * 4096 + 128;
/// Most records that are taken from a file.
const MAX_RECORDS: usize = 16 << 20;
/// Deepest directory that is looked into: `PATH_MAX` allows no more.
const MAX_DEPTH: usize = 2048;

impl Owners {
    /// Files with a record, among them those that are gone by now.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether everything is root's.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// What is recorded of an open file (opened for reference only is enough); `None` when it is root's.
    ///
    /// # Errors
    /// As `statx(2)`.
    pub fn get(&self, file: BorrowedFd) -> io::Result<Option<Owner>> {
        if self.is_empty() {
            return Ok(None);
        }
        let seen = Seen::look(file)?;
        if !self.may_know(&seen) {
            return Ok(None);
        }
        Ok(self.find(&seen, &sys::file_handle(file)))
    }

    /// Records the owner of an open file. Root's files need no record.
    ///
    /// # Errors
    /// As `statx(2)`.
    pub fn set(&mut self, file: BorrowedFd, owner: Owner) -> io::Result<()> {
        let seen = Seen::look(file)?;
        self.note(&seen, sys::file_handle(file), owner);
        Ok(())
    }

    /// What is recorded of a file that was looked at, with its handle.
    pub(super) fn find(&self, seen: &Seen, handle: &Option<Vec<u8>>) -> Option<Owner> {
        let record = self.records.get(&seen.key)?;
        let same = record.proof.born == seen.born && record.proof.handle == *handle;
        same.then_some(record.owner)
    }

    /// Records the owner of a file that was looked at.
    pub(super) fn note(&mut self, seen: &Seen, handle: Option<Vec<u8>>, owner: Owner) {
        if owner == Owner::default() {
            self.records.remove(&seen.key);
            return;
        }
        self.group_directories |= seen.directory && owner.gid != 0;
        let proof = Proof {
            born: seen.born,
            handle,
        };
        self.records.insert(seen.key, Record { proof, owner });
    }

    /// Whether a file that was looked at may have a record: saves asking for its handle.
    pub(super) fn may_know(&self, seen: &Seen) -> bool {
        self.records.contains_key(&seen.key)
    }

    /// Whether a directory was ever given to a group: new files in it may belong to that one.
    pub(super) fn has_group_directories(&self) -> bool {
        self.group_directories
    }

    /// Writes the record of every file below `root`, by path: a line each of uid, gid, device and path.
    ///
    /// # Errors
    /// When a directory cannot be read or the record not be written.
    pub fn save(&self, root: &Path, to: &mut dyn Write) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = rustix::fs::open(root, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", root.display()))?;
        self.save_one(top.as_fd(), b".", to)?;
        self.save_below(top, &mut Vec::new(), 0, to)
            .with_context(|| format!("cannot record the owners below {}", root.display()))
    }

    fn save_one(&self, file: BorrowedFd, path: &[u8], to: &mut dyn Write) -> Result<()> {
        if let Some(owner) = self.get(file)? {
            let device = match owner.device {
                Some(d) => format!("{}{}:{}", if d.block { 'b' } else { 'c' }, d.major, d.minor),
                None => "-".into(),
            };
            let (uid, gid) = (owner.uid, owner.gid);
            writeln!(to, "{uid} {gid} {device} {}", escape(path))?;
        }
        Ok(())
    }

    fn save_below(
        &self,
        directory: OwnedFd,
        path: &mut Vec<u8>,
        depth: usize,
        to: &mut dyn Write,
    ) -> Result<()> {
        if depth > MAX_DEPTH {
            bail!("directories lie more than {MAX_DEPTH} deep");
        }
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = match rustix::fs::openat(&directory, name, flags, Mode::empty()) {
                Err(rustix::io::Errno::NOENT) => continue,
                other => other?,
            };
            let before = path.len();
            if before > 0 {
                path.push(b'/');
            }
            path.extend(name.to_bytes());
            self.save_one(file.as_fd(), path, to)?;
            let stat = rustix::fs::fstat(&file)?;
            if FileType::from_raw_mode(stat.st_mode).is_dir() {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let below = rustix::fs::openat(&directory, name, flags, Mode::empty())
                    .with_context(|| format!("directory {}", escape(path)))?;
                self.save_below(below, path, depth + 1, to)?;
            }
            path.truncate(before);
        }
        Ok(())
    }

    /// Reads what [`Owners::save`] wrote, for the files that are below `root` now. Files that are missing are passed
    /// over; no symbolic link is followed.
    ///
    /// # Errors
    /// Naming the line that is not a record.
    pub fn load(root: &Path, from: &mut dyn BufRead) -> Result<Owners> {
        let mut owners = Owners::default();
        let top = sys::open_path(root)?;
        for number in 1.. {
            let mut line = Vec::new();
            let len = Read::take(&mut *from, MAX_LINE).read_until(b'\n', &mut line)?;
            if len == 0 {
                break;
            }
            let (owner, path) = line
                .strip_suffix(b"\n")
                .and_then(parse)
                .with_context(|| format!("line {number} of the owners' record is damaged"))?;
            if number > MAX_RECORDS {
                bail!("the owners' record has more than {MAX_RECORDS} lines");
            }
            let opened = rustix::fs::openat2(
                &top,
                Path::new(std::ffi::OsStr::from_bytes(&path)),
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
            );
            match opened {
                Ok(file) => owners.set(file.as_fd(), owner)?,
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot open {}", escape(&path)));
                }
            }
        }
        Ok(owners)
    }

    /// For another process of this boot: the records by number.
    pub(in super::super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let all: Vec<_> = self.records.iter().collect();
        Ok(serde_json::to_vec(&(self.group_directories, all))?)
    }

    /// The inverse.
    pub(in super::super) fn from_bytes(bytes: &[u8]) -> Result<Owners> {
        let (group_directories, all): (bool, Vec<(Key, Record)>) = serde_json::from_slice(bytes)
            .map_err(|error| anyhow!("the owners' record did not arrive: {error}"))?;
        Ok(Owners {
            records: all.into_iter().collect(),
            group_directories,
        })
    }
}

/// What an open file is known by, but for its handle.
pub(super) struct Seen {
    key: Key,
    born: Option<(i64, u32)>,
    directory: bool,
}

/// What tells a file from all others, also later ones.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Mark(Key, Proof);

impl Seen {
    /// With its handle.
    pub(super) fn mark(self, handle: Option<Vec<u8>>) -> Mark {
        let born = self.born;
        Mark(self.key, Proof { born, handle })
    }

    /// Asks its file system.
    ///
    /// # Errors
    /// As `statx(2)`.
    pub(super) fn look(file: BorrowedFd) -> io::Result<Seen> {
        let flags = libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT;
        let mask = libc::STATX_INO | libc::STATX_TYPE | libc::STATX_BTIME;
        let stat = sys::statx(file, c"", flags, mask)?;
        let born = (stat.stx_mask & libc::STATX_BTIME != 0)
            .then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec));
        let device = u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor);
        Ok(Seen {
            key: (device, stat.stx_ino),
            born,
            directory: FileType::from_raw_mode(stat.stx_mode.into()).is_dir(),
        })
    }
}

/// Printable ASCII stands for itself; other bytes and the backslash are `\ooo`.
fn escape(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for &byte in path {
        match byte {
            b'\\' | 0..=b' ' | 0x7f.. => out.push_str(&format!("\\{byte:03o}")),
            _ => out.push(char::from(byte)),
        }
    }
    out
}

fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let (digits, after) = rest.split_first_chunk::<3>()?;
        let digits = std::str::from_utf8(digits).ok()?;
        out.push(u8::from_str_radix(digits, 8).ok()?);
        rest = after;
    }
    Some(out)
}

fn parse(line: &[u8]) -> Option<(Owner, Vec<u8>)> {
    let mut fields = line.splitn(4, |b| *b == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (uid, gid) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let device = match text()? {
        "-" => None,
        other => {
            let (block, numbers) = match other.split_at_checked(1)? {
                ("b", numbers) => (true, numbers),
                ("c", numbers) => (false, numbers),
                _ => return None,
            };
            let (major, minor) = numbers.split_once(':')?;
            Some(Device {
                block,
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        }
    };
    let path = unescape(fields.next()?)?;
    (!path.is_empty()).then_some((Owner { uid, gid, device }, path))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd as _;
    use std::path::Path;

    use super::*;

    fn owner(uid: u32, gid: u32) -> Owner {
        Owner {
            uid,
            gid,
            device: None,
        }
    }

    fn file(path: &Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    }

    #[test]
    fn record_is_kept_through_rename_and_lost_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "").unwrap();
        let mut owners = Owners::default();
        owners.set(file(&a).as_fd(), owner(33, 7)).unwrap();
        fs::rename(&a, &b).unwrap();
        assert_eq!(owners.get(file(&b).as_fd()).unwrap(), Some(owner(33, 7)));
        // Numbers are given away again at once on common file systems.
        for _ in 0..200 {
            fs::remove_file(&b).unwrap();
            fs::write(&b, "").unwrap();
            assert_eq!(owners.get(file(&b).as_fd()).unwrap(), None);
        }
    }

    #[test]
    fn record_by_path_comes_back_in_a_copy_of_the_tree() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut owners = Owners::default();
        let device = Device {
            block: false,
            major: 1,
            minor: 3,
        };
        for (dir, record) in [(&from, true), (&to, false)] {
            let sub = dir.path().join("sub dir\\");
            fs::create_dir(&sub).unwrap();
            fs::write(sub.join("new\nline"), "").unwrap();
            std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
            if record {
                owners.set(file(dir.path()).as_fd(), owner(1, 1)).unwrap();
                owners.set(file(&sub).as_fd(), owner(0, 50)).unwrap();
                let null = Owner {
                    uid: 5,
                    gid: 6,
                    device: Some(device),
                };
                owners
                    .set(file(&sub.join("new\nline")).as_fd(), null)
                    .unwrap();
                let link = file(&dir.path().join("link"));
                owners.set(link.as_fd(), owner(9, 9)).unwrap();
            }
        }
        let mut text = Vec::new();
        owners.save(from.path(), &mut text).unwrap();
        let copy = Owners::load(to.path(), &mut text.as_slice()).unwrap();
        let mut again = Vec::new();
        copy.save(to.path(), &mut again).unwrap();
        let lines = |text: &[u8]| {
            let text = String::from_utf8(text.to_vec()).unwrap();
            let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(lines(&text), lines(&again));
        assert_eq!(lines(&text).len(), 4);
        let sent = Owners::from_bytes(&copy.to_bytes().unwrap()).unwrap();
        assert_eq!(
            sent.get(file(&to.path().join("link")).as_fd()).unwrap(),
            Some(owner(9, 9))
        );
    }

    #[test]
    fn damaged_record_names_the_line() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["x\n", "1 2 - \n", "1 2 q1:2 a\n", "1 2 - \\9\n", "1 2 - a"] {
            let text = format!("1 2 - gone\n{bad}");
            let error = Owners::load(dir.path(), &mut text.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("line 2"), "{bad:?}: {error:#}");
        }
    }
}
