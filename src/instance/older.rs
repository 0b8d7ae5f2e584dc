//! Instances of earlier versions that still run: each has its record in a file `instance.NAME`, or
//! `instance-JOBID.NAME` inside a Slurm job, in a runtime directory of its user.
//!
//! A record names its processes by number and start time, and the boot: whatever happened to them, a stale record shows
//! itself, is removed by whoever sees it, and never leads to a process of somebody else.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Instance, MAX_RECORD, Record};
use crate::engine::runtime::{self, Directory};
use crate::host::{Host, JOBS};
use crate::proc::{self, Held, Id};

/// Where such records can be: directories that are opened when they are needed.
pub struct Older {
    uid: u32,
    homes: Vec<PathBuf>,
    /// Those of all jobs of the user too.
    jobs: bool,
}

impl Older {
    /// The directories that the environment names, and those of jobs.
    pub fn of(host: &Host) -> Older {
        let own = host.runtime_home().map(PathBuf::from);
        let variable = host.var("XDG_RUNTIME_DIR").map(PathBuf::from);
        Older {
            uid: host.uid,
            homes: own.into_iter().chain(variable).collect(),
            jobs: true,
        }
    }

    /// That of one job.
    pub fn of_job(uid: u32, home: PathBuf) -> Older {
        Older {
            uid,
            homes: vec![home],
            jobs: false,
        }
    }

    /// Those that run. Files of others go.
    pub fn list(&self) -> Vec<Instance> {
        let jobs = if self.jobs {
            jobs_of(self.uid)
        } else {
            Vec::new()
        };
        let homes = self.homes.iter().cloned().chain(jobs);
        let directories = runtime::present(self.uid, homes);
        directories.iter().flat_map(in_directory).collect()
    }
}

/// What root has written down of a job, as far as it matters here.
#[derive(Deserialize)]
struct Memory {
    job: Owner,
}

#[derive(Deserialize)]
struct Owner {
    uid: u32,
}

/// The directories of the user's jobs, by root's word. No directory of another's job is touched: a file system may be
/// mounted there that does not answer.
fn jobs_of(uid: u32) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(JOBS).into_iter().flatten().flatten();
    let mut mounts = None;
    let is_users = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let number = name.strip_prefix("job-")?;
        if !number.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let path = entry.path();
        let users = match std::fs::read(path.with_added_extension("root")) {
            Ok(text) => serde_json::from_slice::<Memory>(&text).is_ok_and(|m| m.job.uid == uid),
            // An older version's, which only root can read: then the directory tells, unless it is covered.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let table = mounts.get_or_insert_with(|| proc::mounts::table().ok());
                let is_free = |t: &Vec<proc::mounts::Mount>| t.iter().all(|m| m.point != path);
                table.as_ref().is_some_and(is_free)
                    && rustix::fs::lstat(&path).is_ok_and(|s| s.st_uid == uid)
            }
            Err(_) => false,
        };
        users.then_some(path)
    };
    entries.filter_map(is_users).collect()
}

fn in_directory(directory: &Directory) -> Vec<Instance> {
    let mut found = Vec::new();
    for file in directory.entries() {
        let is_record = file.starts_with("instance.") || file.starts_with("instance-");
        if !is_record {
            continue;
        }
        let Some(record) = read(directory, &file) else {
            continue;
        };
        if let Some(instance) = running(&record) {
            found.push(instance);
        } else if is_over(&record) {
            let _lock = directory.lock();
            // Another start may have taken the name meanwhile.
            if read(directory, &file).is_some_and(|now| now.monitor == record.monitor) {
                directory.remove(&file);
            }
        }
    }
    found
}

fn read(directory: &Directory, file: &str) -> Option<Record> {
    serde_json::from_slice(&directory.read(file, MAX_RECORD)?).ok()
}

fn running(record: &Record) -> Option<Instance> {
    if record.boot != proc::boot_id() {
        return None;
    }
    let (monitor, init) = (record.monitor.hold(), record.init.and_then(Id::hold));
    (monitor.is_some() || init.is_some()).then(|| Instance {
        record: record.clone(),
        monitor,
        init,
        namespaces: Vec::new(),
    })
}

/// Nothing of it is left for certain: a process that /proc hides is not taken for an ended one.
fn is_over(record: &Record) -> bool {
    let gone = |id: Id| {
        let ended = Held::child(id.pid).is_none_or(|held| !held.is_alive());
        ended || Id::of(id.pid).is_some_and(|now| now.start != id.start)
    };
    record.boot != proc::boot_id() || gone(record.monitor) && record.init.is_none_or(gone)
}
