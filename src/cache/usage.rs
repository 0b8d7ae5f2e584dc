//! What the cache holds, and what of it goes: by kind, by age, or to keep within a limit.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use super::{Cache, Kind};
use crate::{filesystem, say};

/// Something in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Its name there.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it takes of the disk, in bytes.
    pub size_bytes: u64,
    /// When it was made.
    pub made: SystemTime,
    /// When it was used last.
    pub used: SystemTime,
}

/// What was used within this time is not removed for room.
const RECENT: Duration = Duration::from_secs(3600);
/// The same where other machines may be running it, which cannot be seen from here.
const RECENT_SHARED: Duration = Duration::from_secs(7 * 24 * 3600);

impl Cache {
    /// What of these kinds there is, by kind and name.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn list(&self, kinds: &[Kind]) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for kind in kinds {
            let directory = self.directory(*kind);
            let read = match fs::read_dir(&directory) {
                Ok(read) => read,
                // Nothing there, or a home that this process may not enter: nothing of it can be used either.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::NotFound
                            | ErrorKind::NotADirectory
                            | ErrorKind::PermissionDenied
                    ) =>
                {
                    say::verbose(format_args!("{}: {error}", directory.display()));
                    continue;
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot read {}", directory.display()));
                }
            };
            // What goes meanwhile is not there.
            entries.extend(
                read.flatten()
                    .filter_map(|entry| describe(*kind, &entry.path())),
            );
        }
        entries.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        Ok(entries)
    }

    /// Removes an entry.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, entry: &Entry) -> Result<()> {
        let removed = match fs::symlink_metadata(&entry.path).is_ok_and(|m| m.is_dir()) {
            true => fs::remove_dir_all(&entry.path),
            false => fs::remove_file(&entry.path),
        };
        match removed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}", entry.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Removes what was not used for the longest time until no more than `limit_bytes` are left. What is open on this
    /// machine stays, and so does what was used a short time ago.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn shrink(&self, limit_bytes: u64) -> Result<()> {
        let mut entries = self.list(&Kind::ALL)?;
        let mut total: u64 = entries.iter().map(|e| e.size_bytes).sum();
        if total <= limit_bytes {
            return Ok(());
        }
        let recent = match is_shared(self.root()) {
            true => RECENT_SHARED,
            false => RECENT,
        };
        let open = open_files();
        entries.sort_by_key(|e| e.used);
        for entry in &entries {
            if total <= limit_bytes {
                return Ok(());
            }
            let age = SystemTime::now().duration_since(entry.used);
            if age.is_ok_and(|age| age > recent) && !open.contains(&entry.path) {
                say::verbose(format_args!(
                    "cache: {} goes, for room",
                    entry.path.display()
                ));
                self.remove(entry)?;
                total -= entry.size_bytes;
            }
        }
        say::verbose(format_args!(
            "the cache {} holds {} MiB, more than its limit: the rest is in use",
            self.root().display(),
            total >> 20
        ));
        Ok(())
    }
}

fn describe(kind: Kind, path: &Path) -> Option<Entry> {
    let meta = fs::symlink_metadata(path).ok()?;
    let size_bytes = match meta.is_dir() {
        true => size_of(path),
        false => meta.len(),
    };
    let used = meta.accessed().ok()?.max(meta.modified().ok()?);
    Some(Entry {
        kind,
        name: path.file_name()?.to_string_lossy().into_owned(),
        path: path.to_owned(),
        size_bytes,
        made: meta.modified().ok()?,
        used,
    })
}

/// Of a directory, without following links.
fn size_of(path: &Path) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_of(&entry.path()),
            Ok(meta) => meta.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

fn is_shared(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| filesystem::may_be_shared(s.f_type as u64))
}

/// What this user's processes have open here.
fn open_files() -> BTreeSet<PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|p| {
            p.file_name()
                .to_string_lossy()
                .bytes()
                .all(|b| b.is_ascii_digit())
        })
        .filter_map(|p| fs::read_dir(p.path().join("fd")).ok())
        .flatten()
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .collect()
}

/// A size as people write it: `50G`, `500M`, `1T`, `1024`; powers of 1024.
///
/// # Errors
/// When it is none.
pub fn parse_size(text: &str) -> Result<u64> {
    let text = text.trim();
    let bare = text
        .trim_end_matches(['b', 'B'])
        .trim_end_matches(['i', 'I']);
    let (digits, shift) = match bare.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&bare[..bare.len() - 1], 10),
        Some(b'M') => (&bare[..bare.len() - 1], 20),
        Some(b'G') => (&bare[..bare.len() - 1], 30),
        Some(b'T') => (&bare[..bare.len() - 1], 40),
        _ => (bare, 0),
    };
    let number = digits.trim().parse::<u64>().ok();
    match number.and_then(|n| n.checked_mul(1 << shift)) {
        Some(size) => Ok(size),
        None => bail!("{text:?} is no size: 500M, 50G, 1T"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aged(path: &Path, age: Duration) {
        let then = SystemTime::now() - age;
        let times = fs::FileTimes::new().set_accessed(then).set_modified(then);
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_times(times)
            .unwrap();
    }

    #[test]
    fn least_recently_used_goes_first_and_what_is_open_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let paths: Vec<PathBuf> = (0..4_u64)
            .map(|n| {
                let path = cache.put(&vec![n.to_le_bytes()[0]; 1000]).unwrap();
                aged(&path, Duration::from_secs(90 * 24 * 3600 - n * 3600));
                path
            })
            .collect();
        let fresh = cache.put(&[9; 1000]).unwrap();
        let _open = fs::File::open(&paths[1]).unwrap();
        cache.shrink(3500).unwrap();
        let there: Vec<bool> = paths.iter().map(|p| p.exists()).collect();
        assert_eq!(there, [false, true, false, true]);
        assert!(fresh.exists(), "it was used a moment ago");
        cache.shrink(0).unwrap();
        assert!(paths[1].exists() && !paths[3].exists() && fresh.exists());
    }

    #[test]
    fn sizes_are_read() {
        for (text, size) in [
            ("1024", 1024),
            ("2K", 2048),
            ("3 MiB", 3 << 20),
            ("1g", 1 << 30),
            ("2TB", 2 << 40),
        ] {
            assert_eq!(parse_size(text).unwrap(), size, "{text}");
        }
        for text in ["", "x", "-1", "1.5G", "99999999999999T", "G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
