//! What a service says: two files for each instance, of bounded size.
//!
//! `~/.apptainer/instances/logs/HOST/USER/NAME.out` and `.err` (`$APPTAINER_CONFIGDIR` instead of `~/.apptainer`), where
//! clients of Apptainer look for them; in a Slurm job one directory deeper, `job-ID`. They stay after the end, and a later
//! instance of the name goes on in them. A file that has reached its size becomes `NAME.out.1`, which replaces the one
//! before. Beside them `NAME.json` keeps the record of the last end.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Record;
use crate::host::Host;

/// Size at which a log is turned over when nothing else is asked for, bytes.
pub const DEFAULT_SIZE: u64 = 10 << 20;

/// The directory for logs of this user on this node.
pub fn directory(host: &Host, job: Option<&str>) -> PathBuf {
    let top = configured(host).unwrap_or_else(|| host.user.home.join(".apptainer"));
    let mut path = top
        .join("instances/logs")
        .join(node_name())
        .join(&host.user.name);
    if let Some(job) = job {
        path.push(format!("job-{job}"));
    }
    path
}

/// The configuration directory that the environment names.
pub fn configured(host: &Host) -> Option<PathBuf> {
    let set = |name| host.var(name).filter(|v| !v.is_empty());
    let directory = set("APPTAINER_CONFIGDIR").or_else(|| set("SINGULARITY_CONFIGDIR"))?;
    Some(host.cwd.join(directory))
}

/// The node's name.
pub fn node_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// Makes the directory, for its owner alone.
///
/// # Errors
/// As `mkdir(2)`, or when it cannot be written to.
pub fn create(directory: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    Ok(rustix::fs::access(
        directory,
        rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
    )?)
}

/// A log that is written to. What cannot be written is dropped: the service never waits for a disk that is full.
pub struct Log {
    path: PathBuf,
    file: Option<File>,
    len: u64,
    /// 0 for no limit.
    limit: u64,
    /// Bytes that were dropped since the last one that was written.
    dropped: u64,
}

impl Log {
    /// Opens it for appending.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn open(path: PathBuf, limit: u64) -> std::io::Result<Log> {
        let file = append(&path)?;
        let len = file.metadata()?.len();
        Ok(Log {
            path,
            file: Some(file),
            len,
            limit,
            dropped: 0,
        })
    }

    /// Writes what a service said.
    pub fn write(&mut self, bytes: &[u8]) {
        // Somebody may have removed the file, or moved it away: then a new one is begun.
        let there = self.file.as_ref().is_some_and(|file| {
            let open = file.metadata().map(|m| (m.dev(), m.ino()));
            let named = std::fs::symlink_metadata(&self.path).map(|m| (m.dev(), m.ino()));
            matches!((open, named), (Ok(open), Ok(named)) if open == named)
        });
        if there && self.limit > 0 && self.len > 0 && self.len + bytes.len() as u64 > self.limit {
            // A file that cannot be turned over is cut instead: its size is bounded whatever happens.
            let old = self.path.with_added_extension("1");
            if std::fs::rename(&self.path, old).is_err()
                && let Some(file) = &self.file
            {
                let _ = file.set_len(0);
            }
            self.file = None;
        }
        if !there || self.file.is_none() {
            self.file = append(&self.path).ok();
            self.len = self
                .file
                .as_ref()
                .and_then(|f| f.metadata().ok())
                .map_or(0, |m| m.len());
        }
        let Some(file) = &mut self.file else {
            self.dropped += bytes.len() as u64;
            return;
        };
        if self.dropped > 0 {
            let note = format!(
                "\n[capsid: {} bytes could not be written here]\n",
                self.dropped
            );
            if file.write_all(note.as_bytes()).is_ok() {
                self.len += note.len() as u64;
                self.dropped = 0;
            }
        }
        match file.write_all(bytes) {
            Ok(()) => self.len += bytes.len() as u64,
            Err(_) => self.dropped += bytes.len() as u64,
        }
    }
}

fn append(path: &Path) -> std::io::Result<File> {
    File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Bytes at a log's end that are searched for its last lines.
const TAIL: u64 = 16 << 20;

/// A log that is read, also while it grows.
pub struct Reader {
    path: PathBuf,
    file: Option<File>,
    /// What lies before has been there at the start, what lies behind has been added since.
    at: u64,
}

impl Reader {
    /// Opens a log as it is now.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(path: &Path) -> Result<Reader> {
        let what = || format!("cannot read the log {}", path.display());
        let file = File::open(path).with_context(what)?;
        Ok(Reader {
            path: path.to_owned(),
            at: file.metadata().with_context(what)?.len(),
            file: Some(file),
        })
    }

    /// Copies what has been there, with the older part: all of it, or the last lines.
    ///
    /// # Errors
    /// As reading and writing.
    pub fn copy(&self, lines: Option<usize>, out: &mut dyn Write) -> Result<()> {
        let what = || format!("cannot read the log {}", self.path.display());
        let old = File::open(self.path.with_added_extension("1")).ok();
        let old_len = |old: &File| old.metadata().map_or(0, |m| m.len());
        let Some(wanted) = lines else {
            for (file, len) in [
                old.as_ref().map(|f| (f, old_len(f))),
                self.file.as_ref().map(|f| (f, self.at)),
            ]
            .into_iter()
            .flatten()
            {
                let mut file = file.try_clone().with_context(what)?;
                file.seek(SeekFrom::Start(0)).with_context(what)?;
                std::io::copy(&mut file.take(len), out).with_context(what)?;
            }
            return Ok(());
        };
        let end = |file: &File, len: u64| -> std::io::Result<Vec<u8>> {
            let wanted = len.min(TAIL);
            let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
            file.read_exact_at(&mut bytes, len - wanted)?;
            Ok(bytes)
        };
        let mut text = match &self.file {
            Some(file) => end(file, self.at).with_context(what)?,
            None => Vec::new(),
        };
        if text.iter().filter(|b| **b == b'\n').count() < wanted
            && let Some(old) = old
            && let Ok(mut before) = end(&old, old_len(&old))
        {
            before.append(&mut text);
            text = before;
        }
        let body = text.strip_suffix(b"\n").unwrap_or(&text);
        let mut ends = body.iter().enumerate().rev().filter(|(_, b)| **b == b'\n');
        let start = match wanted {
            0 => text.len(),
            wanted => ends.nth(wanted - 1).map_or(0, |(at, _)| at + 1),
        };
        out.write_all(&text[start..])
            .context("cannot write to standard output")
    }

    /// What was added since, also when the file was turned over meanwhile.
    pub fn more(&mut self) -> Vec<u8> {
        let mut bytes = self.rest();
        let same = self.file.as_ref().is_some_and(|file| {
            matches!((file.metadata(), std::fs::metadata(&self.path)), (Ok(a), Ok(b)) if a.ino() == b.ino() && b.len() >= self.at)
        });
        if !same && let Ok(file) = File::open(&self.path) {
            (self.file, self.at) = (Some(file), 0);
            bytes.extend(self.rest());
        }
        bytes
    }

    fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let Some(file) = &self.file else {
            return bytes;
        };
        let mut part = [0; 8192];
        while let Ok(len @ 1..) = file.read_at(&mut part, self.at) {
            bytes.extend_from_slice(&part[..len]);
            self.at += len as u64;
        }
        bytes
    }
}

/// Where the record of the last end is kept.
pub fn end_file(log_err: &Path) -> PathBuf {
    log_err.with_extension("json")
}

/// Keeps the record of an end, beside the logs. Best effort: the disk may be full.
pub fn keep_end(record: &Record) {
    let path = end_file(&record.log_err);
    let draft = path.with_added_extension("new");
    let written = serde_json::to_vec_pretty(record)
        .map_err(Into::into)
        .and_then(|text| {
            let _ = std::fs::remove_file(&draft);
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&draft)?;
            file.write_all(&text)?;
            std::fs::rename(&draft, &path)
        });
    if written.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
}

/// The record of the last end of a name.
pub fn last_end(directory: &Path, name: &str) -> Option<Record> {
    let mut text = Vec::new();
    File::open(directory.join(format!("{name}.json")))
        .ok()?
        .take(super::MAX_RECORD)
        .read_to_end(&mut text)
        .ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_is_turned_over_at_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.out");
        let tail = |path: &Path, lines| {
            let mut out = Vec::new();
            Reader::open(path).unwrap().copy(lines, &mut out).unwrap();
            out
        };
        let mut log = Log::open(path.clone(), 10).unwrap();
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            log.write(line.as_bytes());
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"four\n");
        assert_eq!(tail(&path, None), b"three\nfour\n");
        assert_eq!(tail(&path, Some(1)), b"four\n");
        assert_eq!(tail(&path, Some(0)), b"");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn removed_log_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.out");
        let mut log = Log::open(path.clone(), 0).unwrap();
        log.write(b"one\n");
        let mut follow = Reader::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        log.write(b"two\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"two\n");
        assert_eq!(follow.more(), b"two\n");
        assert_eq!(follow.more(), b"");
    }

    #[test]
    fn what_a_full_disk_swallowed_is_counted() {
        let mut log = Log {
            path: "/dev/full".into(),
            file: File::options().write(true).open("/dev/full").ok(),
            len: 0,
            limit: 0,
            dropped: 0,
        };
        log.write(b"lost\n");
        log.write(b"lost\n");
        assert_eq!(log.dropped, 10);
    }
}
