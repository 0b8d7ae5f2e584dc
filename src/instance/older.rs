//! Instances of earlier versions that still run: each has its record in a file `instance.NAME`, or
//! `instance-JOBID.NAME` inside a Slurm job, in a runtime directory of its user.
//!
//! A record names its processes by number and start time, and the boot: whatever happened to them, a stale record shows
//! itself, is removed by whoever sees it, and never leads to a process of somebody else.

use std::path::PathBuf;

use super::{Instance, MAX_RECORD, Record};
use crate::engine::runtime::{self, Directory};
use crate::host::{Host, JOBS};
use crate::proc::{self, Held, Id};

/// Where such records can be: directories that are opened when they are needed.
pub struct Older {
    uid: u32,
    homes: Vec<PathBuf>,
}

impl Older {
    /// The directories that the environment names, and those of jobs.
    pub fn of(host: &Host) -> Older {
        let own = host.runtime_home().map(PathBuf::from);
        let variable = host.var("XDG_RUNTIME_DIR").map(PathBuf::from);
        let jobs = std::fs::read_dir(JOBS).into_iter().flatten().flatten();
        let jobs = jobs
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"job-"))
            .map(|entry| entry.path());
        let homes = own.into_iter().chain(variable).chain(jobs);
        Older {
            uid: host.uid,
            homes: homes.collect(),
        }
    }

    /// Those that run. Files of others go.
    pub fn list(&self) -> Vec<Instance> {
        let directories = runtime::present(self.uid, self.homes.clone());
        directories.iter().flat_map(in_directory).collect()
    }
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
