//! Instances are files: one record each, in the node's runtime directory, written by the instance's monitor.
//!
//! `$XDG_RUNTIME_DIR/capsid/instance.NAME`, else in `/run/user/UID/capsid` or `/tmp/capsid-UID` (see
//! [`crate::engine::runtime`]); inside a Slurm job `instance-JOBID.NAME`, so that two jobs of a user may use the same name, and
//! in `/run/capsid/job-JOBID/capsid` where the administrator's Prolog has made that.
//! A record names its processes by number and start time, and the boot: whatever happened to them, a stale record shows
//! itself, is removed by whoever sees it, and never leads to a process of somebody else.

pub mod control;
pub mod ending;
pub mod launch;
pub mod logs;
pub mod monitor;
pub mod stats;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::engine::runtime::{self, Directory};
use crate::host::Host;
use crate::plan::service::{Ready, Restart};
use crate::plan::{IdMap, Namespaces};
use crate::proc::{self, Held};

/// Bytes of a record at most.
const MAX_RECORD: u64 = 1 << 20;

/// What is known of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// The user's name.
    pub user: String,
    /// The node.
    pub host: String,
    /// The boot of the node.
    pub boot: String,
    /// The Slurm job that it belongs to.
    pub job: Option<String>,
    /// The image's absolute path.
    pub image: PathBuf,
    /// `start` or `run`.
    pub verb: String,
    /// Arguments of the script.
    pub args: Vec<String>,
    /// When it was started, seconds since 1970.
    pub created_s: i64,
    /// When it ended.
    pub ended_s: Option<i64>,
    /// The process that looks after it.
    pub monitor: proc::Id,
    /// Process 1 of its container; `None` until there is one.
    pub init: Option<proc::Id>,
    /// Its address, in a network of its own.
    pub ip: Option<String>,
    /// Where standard error goes.
    pub log_err: PathBuf,
    /// Where standard output goes.
    pub log_out: PathBuf,
    /// `--pid-file`.
    pub pid_file: Option<PathBuf>,
    /// What a process that joins has to know.
    pub container: Container,
    /// What became of the script.
    pub script: Script,
    /// When it is started again.
    pub restart: Restart,
    /// When it counts as ready.
    pub ready_when: Ready,
    /// The one who started it waits, or has waited, for that.
    pub awaited: bool,
    /// Its cgroup, when it has one of its own: a path below the mount point of the hierarchy.
    pub cgroup: Option<PathBuf>,
    /// The most memory that it was seen to use, bytes; known of instances of supervisors, when they have ended.
    #[serde(default)]
    pub peak: Option<u64>,
}

/// What a process that joins has to know of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Users and groups inside.
    pub ids: IdMap,
    /// What it does not share with the host.
    pub namespaces: Namespaces,
    /// The home directory inside.
    pub home: PathBuf,
    /// `--home` was given.
    pub home_moved: bool,
    /// `--contain`: processes start at home.
    pub contained: bool,
    /// Targets of the binds.
    pub binds: Vec<String>,
}

/// What became of the script.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Script {
    /// Where it stands.
    pub state: State,
    /// The status that it ended with.
    pub status: Option<u8>,
    /// The number of the signal that ended it.
    pub signal: Option<i32>,
    /// The kernel ended it because memory ran out.
    pub oom: bool,
    /// When it was last started, seconds since 1970.
    pub started_s: Option<i64>,
    /// When it ended.
    pub ended_s: Option<i64>,
    /// How often it was started again.
    pub restarts: u32,
    /// Whether the service has been ready.
    pub ready: bool,
}

/// Where a script stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its container is being made.
    #[default]
    Starting,
    /// It runs.
    Running,
    /// It has ended, and will be started again.
    Restarting,
    /// It has ended.
    Exited,
    /// The image has none.
    None,
}

impl Record {
    /// Holds process 1, if the instance runs: on this node, in this boot.
    pub fn hold(&self) -> Option<Held> {
        if self.boot != proc::boot_id() {
            return None;
        }
        self.init?.hold()
    }

    /// Holds the monitor.
    pub fn hold_monitor(&self) -> Option<Held> {
        if self.boot != proc::boot_id() {
            return None;
        }
        self.monitor.hold()
    }

    /// The status of the ended script as shells write it.
    pub fn exit_status(&self) -> u8 {
        match (self.script.status, self.script.signal) {
            (Some(status), _) => status,
            (None, Some(signal)) => crate::exit::signalled(signal),
            (None, None) => 0,
        }
    }
}

/// The records of a user on this node.
pub struct Registry {
    directory: Directory,
    /// The job whose instances are meant, when we are in one.
    pub job: Option<String>,
}

impl Registry {
    /// Opens it.
    ///
    /// # Errors
    /// When no place on this node is fit for it.
    pub fn open(host: &Host) -> Result<Registry> {
        let Some(directory) = runtime::open(host.uid, host.runtime_home().as_deref()) else {
            bail!(
                "there is no place for the state of instances: neither $XDG_RUNTIME_DIR nor /run/user/{0} nor /tmp/capsid-{0} is a local \
                 directory of yours with mode 0700",
                host.uid
            );
        };
        Ok(Registry {
            directory,
            job: host.job(),
        })
    }

    /// The records of the user's jobs on this node, each in its job's directory.
    pub fn of_jobs(host: &Host) -> Vec<Registry> {
        let entries = std::fs::read_dir(crate::host::JOBS)
            .into_iter()
            .flatten()
            .flatten();
        let open = |entry: std::fs::DirEntry| {
            let job = entry.file_name().to_str()?.strip_prefix("job-")?.to_owned();
            let number = !job.is_empty() && job.bytes().all(|b| b.is_ascii_digit());
            let directory = runtime::open(host.uid, Some(entry.path().as_os_str()))?;
            (number && directory.path.starts_with(entry.path())).then_some(Registry {
                directory,
                job: Some(job),
            })
        };
        entries.filter_map(open).collect()
    }

    /// For messages, and for what else belongs there.
    pub fn path(&self) -> &Path {
        &self.directory.path
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    fn file_name(&self, name: &str) -> String {
        match &self.job {
            Some(job) => format!("instance-{job}.{name}"),
            None => format!("instance.{name}"),
        }
    }

    /// Writes the first record of a name, if nobody has it.
    ///
    /// # Errors
    /// When an instance of the name runs or is being started.
    pub fn claim(&self, record: &Record) -> Result<()> {
        self.sweep();
        loop {
            let lock = self.directory.lock();
            let Some(other) = self.read(&self.file_name(&record.name)) else {
                return self.save(record);
            };
            let going = match (other.hold_monitor(), other.hold()) {
                (None, None) => {
                    self.directory.remove(&self.file_name(&record.name));
                    continue;
                }
                // It has ended, and its monitor is tidying up.
                (Some(monitor), None) if other.init.is_some() => monitor,
                _ => bail!(
                    "instance {} already exists: stop it first (instance stop {0}), or use another name",
                    record.name
                ),
            };
            drop(lock);
            if !going.wait(std::time::Duration::from_secs(5)) {
                bail!(
                    "instance {} already exists: its monitor (process {}) does not end",
                    record.name,
                    other.monitor.pid
                );
            }
        }
    }

    /// Writes a record beside the old one and puts it into its place.
    ///
    /// # Errors
    /// As the system calls.
    pub fn save(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec(record).context("an instance's record")?;
        self.directory
            .replace(&self.file_name(&record.name), &text)
            .with_context(|| {
                format!(
                    "cannot write the record of instance {} in {}",
                    record.name,
                    self.directory.path.display()
                )
            })
    }

    /// Takes a record away, unless another monitor has the name by now.
    pub fn remove(&self, record: &Record) {
        let _lock = self.directory.lock();
        let file = self.file_name(&record.name);
        if self
            .read(&file)
            .is_some_and(|other| other.monitor == record.monitor)
        {
            self.directory.remove(&file);
        }
    }

    /// The instance of a name, if it runs.
    pub fn find(&self, name: &str) -> Option<(Record, Held)> {
        let record = self.read(&self.file_name(name))?;
        let held = record.hold()?;
        Some((record, held))
    }

    /// The record of a name whose monitor lives, whatever its container does.
    pub fn find_any(&self, name: &str) -> Option<Record> {
        let record = self.read(&self.file_name(name))?;
        (record.hold_monitor().is_some() || record.hold().is_some()).then_some(record)
    }

    /// All running instances, by name: those of our job, or all of them outside of jobs. Stale records go.
    pub fn list(&self) -> Vec<Record> {
        let mut found = Vec::new();
        for file in self.directory.entries() {
            let Some((prefix, _)) = file.split_once('.') else {
                continue;
            };
            let wanted = match &self.job {
                Some(job) => prefix == format!("instance-{job}"),
                None => prefix == "instance" || prefix.starts_with("instance-"),
            };
            if !wanted {
                continue;
            }
            match self.read(&file) {
                Some(record) if record.hold().is_some() => found.push(record),
                Some(record) if record.hold_monitor().is_none() => self.remove(&record),
                _ => {}
            }
        }
        found.sort_by(|a, b| (&a.job, &a.name).cmp(&(&b.job, &b.name)));
        found
    }

    /// Removes drafts of processes that were killed while they wrote.
    fn sweep(&self) {
        let _lock = self.directory.lock();
        for file in self.directory.entries() {
            let writer = file.strip_prefix(runtime::DRAFT).and_then(|rest| {
                let (pid, _) = rest.split_once('.')?;
                pid.parse().ok()
            });
            if writer.is_some_and(|pid| proc::Id::of(pid).is_none()) {
                self.directory.remove(&file);
            }
        }
    }

    fn read(&self, file: &str) -> Option<Record> {
        let text = self.directory.read(file, MAX_RECORD)?;
        serde_json::from_slice(&text).ok()
    }
}

/// Seconds since 1970.
pub fn now_s() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}
