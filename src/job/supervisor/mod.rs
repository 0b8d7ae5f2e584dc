//! The supervisor: a process of the job's user on each node of a job, in the job. It starts instances for the steps of the
//! job, and the services that the job declares.
//!
//! One thread, one loop. What may take long (reading a file of the user's, starting, stopping) is a child's work.

mod requests;
mod services;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::message::{Caller, What};
use super::{List, client, list_name, socket_name, stop_all};
use crate::engine::sys;
use crate::host::Host;
use crate::instance::Registry;
use crate::plan::services::Declared;
use crate::{exit, say};

/// How long instances may take to stop when the supervisor is asked to end.
const PATIENCE: Duration = Duration::from_secs(4);
/// Connections at once.
const MAX_PEERS: usize = 256;

/// What a supervisor is started with.
pub struct Setup {
    /// The socket where requests come; without it one is made.
    pub socket: Option<OwnedFd>,
    /// Who starts us waits for a word here: we listen.
    pub announce: Option<OwnedFd>,
    /// This node, as Slurm names it.
    pub node: String,
    /// The nodes of the job, in order.
    pub nodes: Vec<String>,
    /// The file of services that the job's comment names.
    pub file: Option<PathBuf>,
    /// The comment asks for a line about each instance in the job's output.
    pub report: bool,
    /// What is wrong with the comment.
    pub misunderstood: Option<String>,
    /// The words of the option `--service`.
    pub option: Option<String>,
    /// The directory that names of images in the option are relative to.
    pub directory: PathBuf,
}

/// What a batch of services is started with.
struct Batch {
    directory: PathBuf,
    env: Vec<(OsString, OsString)>,
    caller: Caller,
    peer: Option<u64>,
}

/// A connection, with the request that waits.
struct Peer {
    socket: OwnedFd,
    waiting: Option<(What, Vec<OwnedFd>)>,
}

struct Child {
    pid: Pid,
    purpose: Purpose,
}

enum Purpose {
    /// Does what a connection asked for.
    Answer(u64),
    /// Starts a service, and says in this file why it cannot.
    Service(String, std::fs::File),
    /// Waits for a service of another node, and says in this file why in vain.
    Watch(String, std::fs::File),
}

/// A file that a child reads.
struct Reading {
    path: PathBuf,
    pipe: OwnedFd,
    bytes: Vec<u8>,
    until: Instant,
    child: Pid,
    batch: Batch,
}

/// What the reading child gives.
#[derive(Serialize, Deserialize)]
enum Parsed {
    Services(Vec<Declared>),
    Failed(String),
}

struct Supervisor<'a> {
    registry: &'a Registry,
    host: &'a Host,
    job: String,
    setup: Setup,
    /// Each monitor has the other end, and ends its instance when this one is closed.
    life: (OwnedFd, OwnedFd),
    peers: BTreeMap<u64, Peer>,
    next_peer: u64,
    children: Vec<Child>,
    reading: Vec<Reading>,
    batches: Vec<Batch>,
    list: List,
    /// Where services of other nodes stand that ours come after.
    far: BTreeMap<String, super::State>,
    /// The batch of each service.
    of_batch: Vec<usize>,
}

/// Serves until it is told to end. Gives the status to end with.
///
/// # Errors
/// When it cannot begin: there is another one, or no socket can be made.
pub fn run(registry: &Registry, host: &Host, mut setup: Setup) -> Result<u8> {
    let job = registry
        .job
        .clone()
        .context("there is no job here: SLURM_JOB_ID is not set")?;
    let signals = sys::signal_set([libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD]);
    signals.thread_block().context("cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch signals")?;
    let listener = match setup.socket.take() {
        Some(socket) => socket,
        None => claim(registry, &job)?,
    };
    sys::set_title(&format!("capsid-job: {} [{job}]", host.user.name));
    let life = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context("cannot create a pipe")?;
    let mut supervisor = Supervisor {
        registry,
        host,
        job: job.clone(),
        life,
        peers: BTreeMap::new(),
        next_peer: 0,
        children: Vec::new(),
        reading: Vec::new(),
        batches: Vec::new(),
        list: List {
            pending: setup.file.is_some() || setup.option.is_some(),
            report: setup.report,
            failure: setup.misunderstood.take(),
            ..List::default()
        },
        far: BTreeMap::new(),
        of_batch: Vec::new(),
        setup,
    };
    supervisor.save();
    if let Some(fd) = supervisor.setup.announce.take() {
        rustix::io::write(&fd, b"1\n").context("cannot tell that we listen")?;
    }
    let done = supervisor.serve(&signals, &listener);
    if let Some(directory) = registry.directory() {
        let _lock = directory.lock();
        directory.remove(&socket_name(&job));
        directory.remove(&list_name(&job));
    }
    crate::instance::ending::take(registry);
    done
}

/// Binds the socket, unless a supervisor lives.
fn claim(registry: &Registry, job: &str) -> Result<OwnedFd> {
    let directory = registry.place()?;
    let _lock = directory.lock();
    if client::find(registry).is_some() {
        bail!("job {job} has a supervisor on this node already");
    }
    directory.remove(&socket_name(job));
    let what = || format!("cannot create a socket in {}", directory.path.display());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).with_context(what)?;
    let address =
        UnixAddr::new(&directory.entry(&socket_name(job))).context("the socket's address")?;
    bind(fd.as_raw_fd(), &address).with_context(what)?;
    listen(&fd, Backlog::new(1024).unwrap_or(Backlog::MAXCONN)).with_context(what)?;
    Ok(fd)
}

impl Supervisor<'_> {
    fn serve(&mut self, signals: &SignalFd, listener: &OwnedFd) -> Result<u8> {
        self.begin();
        loop {
            let mut set = vec![
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            let first_peer = set.len();
            let ids: Vec<u64> = self.peers.keys().copied().collect();
            set.extend(
                self.peers
                    .values()
                    .map(|p| PollFd::new(p.socket.as_fd(), PollFlags::POLLIN)),
            );
            let first_reading = set.len();
            set.extend(
                self.reading
                    .iter()
                    .map(|r| PollFd::new(r.pipe.as_fd(), PollFlags::POLLIN)),
            );
            let until = self.reading.iter().map(|r| r.until).min();
            let timeout = until.map_or(PollTimeout::NONE, |at| {
                let left = at
                    .saturating_duration_since(Instant::now())
                    .as_micros()
                    .div_ceil(1000);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut set, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for requests"),
            }
            let happened: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            if happened[0] && self.signalled(signals) {
                return Ok(exit::OK);
            }
            if happened[1] {
                self.accept(listener);
            }
            for (id, _) in ids
                .iter()
                .zip(&happened[first_peer..first_reading])
                .filter(|(_, h)| **h)
            {
                self.hear(*id);
            }
            let mut at = 0;
            for happened in &happened[first_reading..] {
                if !(*happened && self.read_on(at)
                    || self.reading[at].until <= Instant::now() && self.give_up(at))
                {
                    at += 1;
                }
            }
        }
    }

    /// What the job declares begins.
    fn begin(&mut self) {
        if let Some(text) = self.setup.option.take() {
            let parsed = match crate::plan::services::from_option(&text) {
                Ok(services) => Parsed::Services(services),
                Err(error) => Parsed::Failed(format!("{error:#}")),
            };
            self.list.pending = self.setup.file.is_some();
            // A name below the directory stands for the file that there is none of.
            let path = self.setup.directory.join("--service");
            self.parsed(&path, self.own_batch(), parsed);
        }
        if let Some(file) = self.setup.file.take() {
            self.read(file, self.own_batch());
        }
    }

    /// For what the job declares, which knows nothing of the environment of the one who submitted it.
    fn own_batch(&self) -> Batch {
        let foreign = |k: &OsStr| k.to_string_lossy().starts_with("CAPSID_JOB_");
        Batch {
            directory: PathBuf::new(),
            env: self
                .host
                .env
                .iter()
                .filter(|(k, _)| !foreign(k))
                .cloned()
                .collect(),
            caller: Caller {
                level: say::level(),
                umask: self.host.umask,
                ..Caller::default()
            },
            peer: None,
        }
    }

    /// True when we are to end.
    fn signalled(&mut self, signals: &SignalFd) -> bool {
        let mut end = false;
        while let Ok(Some(signal)) = signals.read_signal() {
            end |= i32::try_from(signal.ssi_signo) != Ok(libc::SIGCHLD);
        }
        let ended: Vec<(Pid, u8)> = self
            .children
            .iter()
            .filter_map(
                |child| match waitpid(child.pid, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::Exited(pid, status)) => {
                        Some((pid, u8::try_from(status).unwrap_or(exit::FATAL)))
                    }
                    Ok(WaitStatus::Signaled(pid, signal, _)) => {
                        Some((pid, exit::signalled(signal as i32)))
                    }
                    _ => None,
                },
            )
            .collect();
        for (pid, status) in ended {
            if let Some(at) = self.children.iter().position(|c| c.pid == pid) {
                let child = self.children.remove(at);
                self.child_ended(child, status);
            }
        }
        if end {
            // Connections see us end; monitors too, when their instances have.
            stop_all(self.registry, PATIENCE);
        }
        end
    }
}

/// The parts of a job that its environment names: this node, and all nodes in order.
pub fn nodes(var: &dyn Fn(&str) -> Option<OsString>) -> (String, Vec<String>) {
    let text = |name: &str| {
        let text = var(name)?.to_str()?.to_owned();
        (!text.is_empty()).then_some(text)
    };
    let node = text("SLURMD_NODENAME").unwrap_or_else(crate::instance::logs::node_name);
    let list = text("SLURM_JOB_NODELIST").or_else(|| text("SLURM_NODELIST"));
    let nodes = list
        .and_then(|l| crate::plan::hostlist::expand(&l))
        .unwrap_or_else(|| vec![node.clone()]);
    (node, nodes)
}

/// The file that a job's comment names, below its working directory.
pub fn declared_by(comment: Option<&OsStr>, directory: Option<&OsStr>) -> Option<PathBuf> {
    let named = crate::plan::services::named_by_comment(comment?.to_str()?)?;
    let path = directory
        .map_or_else(PathBuf::new, PathBuf::from)
        .join(named);
    path.is_absolute().then_some(path)
}
