//! The instances of a Slurm job: one supervisor per job and node starts them, so that they live in the job and not in the
//! step that asked for them.
//!
//! ```text
//!  slurmd ── Prolog (root) ── capsid job begin ── mkdir /run/capsid/job-ID (0700, the user's), with a socket
//!                                └── helper (root)   goes into the job's extern step, and becomes there
//!                                      supervisor    as the user
//!  step 3 ── capsid instance start ──(socket: words, environment, descriptors)──► supervisor ── monitor ── instance
//!  step 4 ── capsid exec instance://db   joins directly; stays in its step
//!         ── Epilog (root) ── capsid job end: what is left goes, and the directory
//! ```
//!
//! The supervisor holds one end of a pipe that every monitor listens to: when it ends, however, they do. The extern step
//! is killed with the job at the latest; where Slurm does not use cgroups the Epilog ends the supervisor.

pub mod adopt;
pub mod client;
mod conf;
pub mod message;
pub mod root;
pub mod supervisor;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::instance::{Registry, control};
use crate::plan::services::Declared;

/// How much longer a service may take whose image is fetched.
const FETCHING: Duration = Duration::from_secs(1800);
/// Bytes of the list of services at most.
const MAX_LIST: u64 = 4 << 20;

/// A declared service, and what has become of it on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// As declared.
    pub declared: Declared,
    /// The node where it runs; this one, if it runs on all.
    pub node: String,
    /// It runs on this node.
    pub here: bool,
    /// Where it stands.
    pub state: State,
}

/// Where a declared service stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Others come first.
    Waiting,
    /// It has been started, and is not ready yet.
    Starting,
    /// It is, or has been, ready.
    Ready,
    /// It has been ready, and has ended since; the supervisor does not say so, who looks sees it.
    Ended,
    /// It could not be started, for this reason.
    Failed(String),
    /// Another node's.
    Elsewhere,
}

/// What the supervisor has made of the declarations, as a file in its directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct List {
    /// The declarations are being read.
    pub pending: bool,
    /// What is wrong with them.
    pub failure: Option<String>,
    /// The services of the job.
    pub services: Vec<Service>,
    /// The comment asks for a line about each instance in the job's output.
    #[serde(default)]
    pub report: bool,
}

/// The name of the socket of a job's supervisor.
fn socket_name(job: &str) -> String {
    format!("supervisor-{job}")
}

fn list_name(job: &str) -> String {
    format!("services-{job}")
}

/// The services of our job, if it has declared any.
pub fn services(registry: &Registry) -> Option<List> {
    let job = registry.job.as_ref()?;
    let mut list: List = match registry.directory()?.read(&list_name(job), MAX_LIST) {
        Some(text) => serde_json::from_slice(&text).ok(),
        // It is written when the supervisor begins, which is a moment after the Prolog.
        None => client::find(registry)?.list().ok(),
    }?;
    for service in &mut list.services {
        if service.state == State::Ready && registry.find_any(&service.declared.name).is_none() {
            service.state = State::Ended;
        }
    }
    Some(list)
}

/// Waits until a declared service of our job is ready; at once when there is none of the name.
///
/// # Errors
/// When it runs elsewhere, cannot be started, or is not ready in time.
pub fn await_ready(registry: &Registry, name: &str) -> Result<()> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        let Some(list) = services(registry) else {
            return Ok(());
        };
        // An instance of the name that somebody started by hand is as good.
        let service = list.services.iter().find(|s| s.declared.name == name);
        let limit = match (&service, list.pending) {
            (None, true) => Duration::from_secs(30),
            (None, false) => match &list.failure {
                Some(failure) if registry.find_any(name).is_none() => bail!(
                    "no instance found with name {name}, and the services of job {} could not be read: {failure}",
                    registry.job.as_deref().unwrap_or_default()
                ),
                _ => return Ok(()),
            },
            // Others may have to be ready first.
            (Some(_), _) => {
                let seconds: u32 = list
                    .services
                    .iter()
                    .map(|s| s.declared.timeout_s)
                    .fold(0, u32::saturating_add);
                let fetched = list.services.iter().any(|s| s.declared.is_fetched());
                Duration::from_secs(u64::from(seconds) + 15)
                    + if fetched { FETCHING } else { Duration::ZERO }
            }
        };
        if let Some(service) = service {
            match &service.state {
                State::Ready => return Ok(()),
                State::Ended => bail!(
                    "service {name} of this job has ended: see capsid instance logs {name}, and start it again by capsid job start"
                ),
                State::Failed(why) if registry.find_any(name).is_none() => {
                    bail!("service {name} of this job could not be started: {why}")
                }
                State::Failed(_) => return Ok(()),
                State::Elsewhere if registry.find_any(name).is_none() => bail!(
                    "service {name} of this job runs on node {0}, not here: use srun -w {0}, or reach it at ${1}_HOST",
                    service.node,
                    format_args!("CAPSID_SERVICE_{}", service.declared.variable())
                ),
                State::Elsewhere => return Ok(()),
                State::Waiting | State::Starting => {}
            }
        }
        if begun.elapsed() > limit {
            bail!(
                "service {name} of this job was not ready after {} s: see capsid job status, or give it a longer timeout in the services file",
                limit.as_secs()
            );
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// What the tasks of a job find in their environment of its services, in the form that both Slurm's TaskProlog and a shell
/// understand.
pub fn exports(list: &List) -> String {
    let mut text = String::new();
    let failed = |s: &&Service| matches!(s.state, State::Failed(_));
    for service in list.services.iter().filter(|s| !failed(s)) {
        let name = service.declared.variable();
        text.push_str(&format!(
            "export CAPSID_SERVICE_{name}_HOST={}\n",
            service.node
        ));
        if let Some(port) = service.declared.port {
            text.push_str(&format!("export CAPSID_SERVICE_{name}_PORT={port}\n"));
        }
    }
    text
}

/// A line for the job's output about each service that could not be started here.
pub fn failures(list: &List) -> String {
    let mut text = String::new();
    for service in &list.services {
        if let State::Failed(why) = &service.state {
            let name = &service.declared.name;
            text.push_str(&format!(
                "{FAILURE}{name} could not be started: {}\n",
                one_line(why)
            ));
        }
    }
    text
}

/// How such a line begins.
pub const FAILURE: &str = "CAPSID: service ";

/// Text for one line of a job's output.
pub fn one_line(text: &str) -> String {
    crate::say::plain(text).replace('\n', " ")
}

/// Stops all instances of our job on this node; gives how many there were.
pub fn stop_all(registry: &Registry, patience: Duration) -> usize {
    let stop = control::Stop {
        signal: None,
        patience,
        force: patience.is_zero(),
    };
    let mut records = registry.list();
    records.retain(|r| r.job == registry.job);
    let endings: Vec<_> = records
        .into_iter()
        .map(|r| control::begin(r, &stop))
        .collect();
    let end = Instant::now() + patience;
    let count = endings.len();
    for ending in endings {
        // What hangs in the kernel is named by whoever looks next.
        let _ = control::finish(&ending, end.saturating_duration_since(Instant::now()));
    }
    count
}
