//! Instances: services in containers, each with a monitor that looks after it, keeps its record, and tells that to the user's
//! commands (see [`door`]). Nothing of a running instance is a file that could go or be stale; how one ended is kept with its
//! logs.

pub mod control;
mod door;
pub mod ending;
pub mod launch;
pub mod logs;
pub mod monitor;
mod older;
mod registry;
pub mod stats;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use registry::{Instance, Registry};

use crate::plan::service::{Ready, Restart};
use crate::plan::{IdMap, Namespaces, lossless};
use crate::proc;

/// Bytes of a record at most.
const MAX_RECORD: u64 = 1 << 20;

/// What is known of an instance. Monitors of other versions tell it too: a new field has a default.
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
    #[serde(with = "lossless")]
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
    #[serde(with = "lossless")]
    pub log_err: PathBuf,
    /// Where standard output goes.
    #[serde(with = "lossless")]
    pub log_out: PathBuf,
    /// `--pid-file`.
    #[serde(default, with = "lossless::option")]
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
    #[serde(default, with = "lossless::option")]
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
    /// The number of its pid namespace (`namespaces(7)`); 0 before it is known.
    #[serde(default)]
    pub processes: u64,
    /// The home directory inside.
    #[serde(with = "lossless")]
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
    /// The status of the ended script as shells write it.
    pub fn exit_status(&self) -> u8 {
        match (self.script.status, self.script.signal) {
            (Some(status), _) => status,
            (None, Some(signal)) => crate::exit::signalled(signal),
            (None, None) => 0,
        }
    }
}

/// Seconds since 1970.
pub fn now_s() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}
