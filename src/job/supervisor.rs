//! The supervisor: a process of the job's user on each node of a job. It starts instances for the steps of the job, and
//! the services that the job declares; it runs nothing of the user before it is adopted by the job.
//!
//! One thread, one loop. What may take long (reading a file of the user's, starting, stopping) is a child's work.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::message::{self, Answer, Caller, Request, What};
use super::{List, Service, State, client, list_name, socket_name, stop_all};
use crate::engine::sys::{self, Fork};
use crate::engine::wire;
use crate::host::Host;
use crate::instance::Registry;
use crate::plan::services::{self, Declared, Nodes};
use crate::proc::Held;
use crate::{exit, say};

/// How long a file of declarations may take to be read: a home directory may hang.
const READING: Duration = Duration::from_secs(30);
/// Bytes of such a file at most.
const MAX_FILE: u64 = 1 << 20;
/// How long instances may take to stop when the supervisor is asked to end.
const PATIENCE: Duration = Duration::from_secs(4);
/// Connections at once.
const MAX_PEERS: usize = 256;

/// What a supervisor is started with.
pub struct Setup {
    /// A byte comes here when the job has adopted us; without it we are in the job already.
    pub adopted: Option<OwnedFd>,
    /// Who starts us waits for a byte here: we listen.
    pub listening: Option<OwnedFd>,
    /// This node, as Slurm names it.
    pub node: String,
    /// The nodes of the job, in order.
    pub nodes: Vec<String>,
    /// The file of services that the job's comment names.
    pub file: Option<PathBuf>,
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
    /// The batch of each service.
    of_batch: Vec<usize>,
}

/// Serves until it is told to end, or nobody adopts it. Gives the status to end with.
///
/// # Errors
/// When it cannot begin: there is another one, or no socket can be made.
pub fn run(registry: &Registry, host: &Host, setup: Setup) -> Result<u8> {
    let job = registry
        .job
        .clone()
        .context("there is no job here: SLURM_JOB_ID is not set")?;
    let signals = sys::signal_set([libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD]);
    signals.thread_block().context("cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch signals")?;
    let listener = claim(registry, &job)?;
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
            ..List::default()
        },
        of_batch: Vec::new(),
        setup,
    };
    supervisor.save();
    if let Some(fd) = supervisor.setup.listening.take() {
        rustix::io::write(&fd, b"1\n").context("cannot tell that we listen")?;
    }
    let done = supervisor.serve(&signals, &listener);
    let _lock = registry.directory().lock();
    registry.directory().remove(&socket_name(&job));
    registry.directory().remove(&list_name(&job));
    done
}

/// Binds the socket, unless a supervisor lives.
fn claim(registry: &Registry, job: &str) -> Result<OwnedFd> {
    let directory = registry.directory();
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
        if self.setup.adopted.is_none() {
            self.begin();
        }
        loop {
            let mut set = vec![
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            let adopting = self.setup.adopted.iter();
            set.extend(adopting.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
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
            if self.setup.adopted.is_some() && happened[2] {
                let mut byte = [0];
                let adopted = self
                    .setup
                    .adopted
                    .take()
                    .map(|fd| rustix::io::read(fd, &mut byte));
                if !matches!(adopted, Some(Ok(1))) {
                    bail!("job {} has not adopted this supervisor", self.job);
                }
                self.begin();
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

    /// We are in the job: what waited begins.
    fn begin(&mut self) {
        if let Some(text) = self.setup.option.take() {
            let parsed = match services::from_option(&text) {
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
        for id in self.peers.keys().copied().collect::<Vec<_>>() {
            if let Some((what, fds)) = self.peers.get_mut(&id).and_then(|p| p.waiting.take()) {
                self.serve_request(id, what, fds);
            }
        }
    }

    /// For what the job declares, who knows nothing of the environment of the one who submitted it.
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
                cpus: Vec::new(),
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
        let mut ended = Vec::new();
        self.children.retain(
            |child| match waitpid(child.pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => {
                    ended.push((pid, u8::try_from(status).unwrap_or(exit::FATAL)));
                    true
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    ended.push((pid, exit::signalled(signal as i32)));
                    true
                }
                _ => true,
            },
        );
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

    fn accept(&mut self, listener: &OwnedFd) {
        while let Ok(fd) = accept4(
            listener.as_raw_fd(),
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        ) {
            let socket = sys::own(fd);
            if wire::is_own_peer(&socket) && self.peers.len() < MAX_PEERS {
                self.peers.insert(
                    self.next_peer,
                    Peer {
                        socket,
                        waiting: None,
                    },
                );
                self.next_peer += 1;
            }
        }
    }

    fn hear(&mut self, id: u64) {
        let Some(peer) = self.peers.get(&id) else {
            return;
        };
        let heard = wire::receive(peer.socket.as_fd());
        match heard {
            Ok((bytes, fds)) if !bytes.is_empty() => match serde_json::from_slice::<Request>(&bytes) {
                Ok(request) if request.version == message::VERSION => {
                    let waits = match request.what {
                        What::List => self.list.pending,
                        _ => self.setup.adopted.is_some(),
                    };
                    if waits {
                        if let Some(peer) = self.peers.get_mut(&id) {
                            peer.waiting = Some((request.what, fds));
                        }
                    } else {
                        self.serve_request(id, request.what, fds);
                    }
                }
                _ => self.answer(
                    id,
                    &Answer::Failed(format!(
                        "the supervisor of job {} is of another version of capsid: use the one that the administrator installed",
                        self.job
                    )),
                ),
            },
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
            _ => {
                self.peers.remove(&id);
                // Nobody waits for it any more.
                for child in self.children.iter().filter(|c| matches!(c.purpose, Purpose::Answer(of) if of == id)) {
                    let _ = nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGTERM);
                }
            }
        }
    }

    fn answer(&mut self, id: u64, answer: &Answer) {
        if let Some(peer) = self.peers.remove(&id) {
            let text = serde_json::to_vec(answer).unwrap_or_default();
            let _ = wire::send(peer.socket.as_fd(), &text, &[]);
        }
    }

    fn serve_request(&mut self, id: u64, what: What, fds: Vec<OwnedFd>) {
        let done = match what {
            What::List => {
                self.answer(id, &Answer::List(Box::new(self.list.clone())));
                Ok(())
            }
            What::Start(caller) => self.start(id, &caller, fds),
            What::Services(caller) => self.read_for(id, caller, fds),
            What::Stop(ms) => self.stop(id, Duration::from_millis(ms)),
        };
        if let Err(error) = done {
            self.answer(id, &Answer::Failed(format!("{error:#}")));
        }
    }

    fn start(&mut self, id: u64, caller: &Caller, fds: Vec<OwnedFd>) -> Result<()> {
        let [words, cwd, out, err] = <[OwnedFd; 4]>::try_from(fds)
            .ok()
            .context("descriptors are missing")?;
        let (words, env) = message::unpack(words)?;
        let pid = self.spawn(
            &words,
            &env,
            caller,
            &|| Ok(nix::unistd::fchdir(&cwd)?),
            out,
            err,
        )?;
        self.children.push(Child {
            pid,
            purpose: Purpose::Answer(id),
        });
        Ok(())
    }

    fn stop(&mut self, id: u64, patience: Duration) -> Result<()> {
        match sys::fork()? {
            Fork::Parent(pid) => self.children.push(Child {
                pid,
                purpose: Purpose::Answer(id),
            }),
            Fork::Child => {
                stop_all(self.registry, patience);
                sys::exit_now(0)
            }
        }
        Ok(())
    }

    /// A process that becomes `capsid instance WORDS…`, and whose instance ends with us.
    fn spawn(
        &self,
        words: &[OsString],
        env: &[(OsString, OsString)],
        caller: &Caller,
        enter: &dyn Fn() -> Result<()>,
        out: OwnedFd,
        err: OwnedFd,
    ) -> Result<Pid> {
        let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
        match sys::fork()? {
            Fork::Parent(pid) => Ok(pid),
            Fork::Child => {
                sys::die_with(own.as_ref());
                let begin = || -> Result<std::convert::Infallible> {
                    enter().context("cannot enter the working directory")?;
                    let mut cpus = rustix::thread::CpuSet::new();
                    for cpu in caller
                        .cpus
                        .iter()
                        .filter(|n| **n < rustix::thread::CpuSet::MAX_CPU)
                    {
                        cpus.set(*cpu);
                    }
                    if !caller.cpus.is_empty() {
                        // The job may have others by now.
                        let _ = rustix::thread::sched_setaffinity(None, &cpus);
                    }
                    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(
                        caller.umask & 0o777,
                    ));
                    sys::inherit(&self.life.0)?;
                    SigSet::empty()
                        .thread_set_mask()
                        .context("cannot unblock signals")?;
                    let error = Command::new("/proc/self/exe")
                        .arg0("capsid")
                        .args([
                            "job",
                            "spawn",
                            &self.life.0.as_raw_fd().to_string(),
                            &caller.level.to_string(),
                        ])
                        .args(words)
                        .env_clear()
                        .envs(env.iter().map(|(k, v)| (k, v)))
                        .stdin(Stdio::null())
                        .stdout(out)
                        .stderr(err)
                        .exec();
                    Err(error).context("cannot execute ourselves")
                };
                let Err(error) = begin();
                say::fatal(format_args!("{error:#}"));
                sys::exit_now(exit::FATAL)
            }
        }
    }

    fn read_for(&mut self, id: u64, caller: Caller, fds: Vec<OwnedFd>) -> Result<()> {
        let [words, cwd, ..] = <[OwnedFd; 4]>::try_from(fds)
            .ok()
            .context("descriptors are missing")?;
        let (words, env) = message::unpack(words)?;
        let file = words.into_iter().next().context("the file is not named")?;
        let cwd = std::fs::read_link(format!("/proc/self/fd/{}", cwd.as_raw_fd()))
            .context("the working directory")?;
        let batch = Batch {
            directory: PathBuf::new(),
            env,
            caller,
            peer: Some(id),
        };
        self.read(cwd.join(file), batch);
        Ok(())
    }

    /// Lets a child read a file of services.
    fn read(&mut self, path: PathBuf, batch: Batch) {
        let begin = || -> Result<(Pid, OwnedFd)> {
            let (pipe, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .context("cannot create a pipe")?;
            match sys::fork()? {
                Fork::Parent(pid) => Ok((pid, pipe)),
                Fork::Child => {
                    let text = serde_json::to_vec(&read_services(&path)).unwrap_or_default();
                    let _ = std::fs::File::from(theirs).write_all(&text);
                    sys::exit_now(0)
                }
            }
        };
        match begin() {
            Ok((child, pipe)) => self.reading.push(Reading {
                path,
                pipe,
                bytes: Vec::new(),
                until: Instant::now() + READING,
                child,
                batch,
            }),
            Err(error) => self.parsed(&path, batch, Parsed::Failed(format!("{error:#}"))),
        }
    }

    /// True when the file is read to its end, and gone from the list.
    fn read_on(&mut self, at: usize) -> bool {
        let mut bytes = vec![0; 64 << 10];
        let reading = &mut self.reading[at];
        match rustix::io::read(&reading.pipe, &mut bytes) {
            Ok(len) if len > 0 => {
                reading.bytes.extend_from_slice(&bytes[..len]);
                return false;
            }
            Err(rustix::io::Errno::INTR) => return false,
            _ => {}
        }
        let reading = self.reading.remove(at);
        let _ = waitpid(reading.child, None);
        let parsed = serde_json::from_slice(&reading.bytes).unwrap_or_else(|_| {
            Parsed::Failed(format!("{} could not be read", reading.path.display()))
        });
        self.parsed(&reading.path, reading.batch, parsed);
        true
    }

    fn give_up(&mut self, at: usize) -> bool {
        let reading = self.reading.remove(at);
        // It may hang in the kernel: it is not waited for.
        let _ = nix::sys::signal::kill(reading.child, nix::sys::signal::Signal::SIGKILL);
        let text = format!(
            "{} could not be read within {} s: its file system does not answer",
            reading.path.display(),
            READING.as_secs()
        );
        self.parsed(&reading.path, reading.batch, Parsed::Failed(text));
        true
    }

    fn parsed(&mut self, path: &Path, mut batch: Batch, parsed: Parsed) {
        if batch.peer.is_none() && self.setup.file.is_none() {
            self.list.pending = false;
        }
        let declared = match parsed {
            Parsed::Services(declared) => declared,
            Parsed::Failed(text) => {
                match batch.peer {
                    Some(peer) => self.answer(peer, &Answer::Failed(text)),
                    None => self.list.failure = Some(text),
                }
                return self.changed();
            }
        };
        if let Some(known) = declared.iter().find(|d| {
            self.list
                .services
                .iter()
                .any(|s| s.declared.name == d.name && s.state != State::Elsewhere)
        }) {
            let text = format!(
                "{}: this job has a service {} already",
                path.display(),
                known.name
            );
            match batch.peer {
                Some(peer) => self.answer(peer, &Answer::Failed(text)),
                None => self.list.failure = Some(text),
            }
            return self.changed();
        }
        batch.directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let own = self
            .setup
            .nodes
            .iter()
            .position(|n| *n == self.setup.node)
            .unwrap_or(0);
        for declared in declared {
            let here = declared.is_on(own);
            let node = match declared.nodes {
                Nodes::All => Some(self.setup.node.clone()),
                Nodes::Index(index) => self.setup.nodes.get(index).cloned(),
            };
            let state = match (&node, here) {
                (None, _) => State::Failed(format!(
                    "the job has {} nodes, and none with the number that nodes names",
                    self.setup.nodes.len()
                )),
                (_, true) => State::Waiting,
                (_, false) => State::Elsewhere,
            };
            self.of_batch.push(self.batches.len());
            self.list.services.push(Service {
                declared,
                node: node.unwrap_or_default(),
                here,
                state,
            });
        }
        self.batches.push(batch);
        self.changed();
    }

    /// Starts what can be started, tells those who wait, and writes it down.
    fn changed(&mut self) {
        for at in 0..self.list.services.len() {
            if self.list.services[at].state != State::Waiting {
                continue;
            }
            let after = self.list.services[at].declared.after.clone();
            let others = self
                .list
                .services
                .iter()
                .filter(|s| after.contains(&s.declared.name));
            let states: Vec<(String, State)> = others
                .map(|s| (s.declared.name.clone(), s.state.clone()))
                .collect();
            if let Some((name, _)) = states.iter().find(|(_, s)| matches!(s, State::Failed(_))) {
                self.list.services[at].state =
                    State::Failed(format!("it comes after {name}, which could not be started"));
            } else if states
                .iter()
                .all(|(_, s)| matches!(s, State::Ready | State::Elsewhere))
            {
                self.list.services[at].state = match self.start_service(at) {
                    Ok(()) => State::Starting,
                    Err(error) => State::Failed(format!("{error:#}")),
                };
            }
        }
        self.save();
        for batch in 0..self.batches.len() {
            let own = self
                .list
                .services
                .iter()
                .zip(&self.of_batch)
                .filter(|(_, b)| **b == batch);
            let states: Vec<&Service> = own.map(|(s, _)| s).collect();
            let failure = states.iter().find_map(|s| match &s.state {
                State::Failed(why) => Some(format!("service {}: {why}", s.declared.name)),
                _ => None,
            });
            let over = states
                .iter()
                .all(|s| !matches!(s.state, State::Waiting | State::Starting));
            if let Some(peer) = self.batches[batch].peer.filter(|_| over) {
                self.batches[batch].peer = None;
                self.answer(
                    peer,
                    &failure.map_or(Answer::Done(exit::OK), Answer::Failed),
                );
            }
        }
        if !self.list.pending {
            for id in self.peers.keys().copied().collect::<Vec<_>>() {
                let waiting = self
                    .peers
                    .get_mut(&id)
                    .and_then(|p| p.waiting.take_if(|(what, _)| *what == What::List));
                if let Some((what, fds)) = waiting {
                    self.serve_request(id, what, fds);
                }
            }
        }
    }

    fn start_service(&mut self, at: usize) -> Result<()> {
        let declared = &self.list.services[at].declared;
        let batch = &self.batches[self.of_batch[at]];
        let image = batch.directory.join(&declared.image);
        let mut words: Vec<OsString> = vec![if declared.run { "run" } else { "start" }.into()];
        words.extend(
            declared
                .words(image.to_str().context("the image's name is not UTF-8")?)
                .into_iter()
                .map(OsString::from),
        );
        let said = rustix::fs::memfd_create("capsid", rustix::fs::MemfdFlags::CLOEXEC)
            .context("cannot create a file in memory")?;
        let copy = || said.try_clone().context("cannot duplicate a descriptor");
        let directory = batch.directory.clone();
        let enter = move || Ok(nix::unistd::chdir(&directory)?);
        let name = declared.name.clone();
        let pid = self.spawn(&words, &batch.env, &batch.caller, &enter, copy()?, copy()?)?;
        self.children.push(Child {
            pid,
            purpose: Purpose::Service(name, said.into()),
        });
        Ok(())
    }

    fn child_ended(&mut self, child: Child, status: u8) {
        match child.purpose {
            Purpose::Answer(id) => self.answer(id, &Answer::Done(status)),
            Purpose::Service(name, said) => {
                let state = if status == 0 {
                    State::Ready
                } else {
                    State::Failed(last_words(said, status))
                };
                if let Some(service) = self
                    .list
                    .services
                    .iter_mut()
                    .find(|s| s.declared.name == name)
                {
                    service.state = state;
                }
                self.changed();
            }
        }
    }

    fn save(&self) {
        let text = serde_json::to_vec(&self.list).unwrap_or_default();
        let directory = self.registry.directory();
        if !self.list.pending && self.list.services.is_empty() && self.list.failure.is_none() {
            return;
        }
        if let Err(error) = directory.replace(&list_name(&self.job), &text) {
            say::warn(format_args!(
                "cannot write in {}: {error}",
                directory.path.display()
            ));
        }
    }
}

fn read_services(path: &Path) -> Parsed {
    let read = || -> Result<Vec<Declared>> {
        let what = || format!("cannot read the services in {}", path.display());
        let file = std::fs::File::open(path).with_context(what)?;
        let meta = file.metadata().with_context(what)?;
        if !meta.is_file() || meta.len() > MAX_FILE {
            bail!("{}: not a file of at most 1 MiB", what());
        }
        let mut text = String::new();
        file.take(MAX_FILE)
            .read_to_string(&mut text)
            .with_context(what)?;
        services::parse(&text).with_context(|| path.display().to_string())
    };
    match read() {
        Ok(services) => Parsed::Services(services),
        Err(error) => Parsed::Failed(format!("{error:#}")),
    }
}

/// The last line that a start said, without its prefix.
fn last_words(mut said: std::fs::File, status: u8) -> String {
    use std::io::Seek as _;
    let mut bytes = Vec::new();
    let _ = said.rewind();
    let _ = said.take(64 << 10).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let line = text
        .lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or_default();
    let line = line.trim_start_matches("FATAL:").trim();
    if line.is_empty() {
        format!("its start ended with status {status}")
    } else {
        line.to_owned()
    }
}

/// The parts of a job that its environment names: this node, and all nodes in order.
pub fn nodes(var: &dyn Fn(&str) -> Option<OsString>) -> (String, Vec<String>) {
    let text = |name: &str| var(name).and_then(|v| v.to_str().map(str::to_owned));
    let node = text("SLURMD_NODENAME").unwrap_or_else(crate::instance::logs::node_name);
    let list = text("SLURM_JOB_NODELIST").or_else(|| text("SLURM_NODELIST"));
    let nodes = list
        .and_then(|l| crate::plan::hostlist::expand(&l))
        .unwrap_or_else(|| vec![node.clone()]);
    (node, nodes)
}

/// The file that a job's comment names, below its working directory.
pub fn declared_by(comment: Option<&OsStr>, directory: Option<&OsStr>) -> Option<PathBuf> {
    let named = services::named_by_comment(comment?.to_str()?)?;
    let path = directory
        .map_or_else(PathBuf::new, PathBuf::from)
        .join(named);
    path.is_absolute().then_some(path)
}
