//! The services that a job declares: reading their files, starting them in order, and telling those who wait.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::{Batch, Child, Parsed, Purpose, Reading, Supervisor};
use crate::engine::sys::{self, Fork};
use crate::job::message::{self, Answer, Caller, What};
use crate::job::{Service, State, list_name};
use crate::plan::services::{self, Declared, Nodes};
use crate::proc::Held;
use crate::{exit, say};

/// How long a file of declarations may take to be read: a home directory may hang.
const READING: Duration = Duration::from_secs(30);
/// Bytes of such a file at most.
const MAX_FILE: u64 = 1 << 20;

impl Supervisor<'_> {
    pub(super) fn read_for(&mut self, id: u64, caller: Caller, fds: Vec<OwnedFd>) -> Result<()> {
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
    pub(super) fn read(&mut self, path: PathBuf, batch: Batch) {
        let begin = || -> Result<(Pid, OwnedFd)> {
            let (pipe, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .context("cannot create a pipe")?;
            match sys::fork()? {
                Fork::Parent(pid) => Ok((pid, pipe)),
                Fork::Child => {
                    let parsed = read_services(&path, self.setup.nodes.len());
                    let text = serde_json::to_vec(&parsed).unwrap_or_default();
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
    pub(super) fn read_on(&mut self, at: usize) -> bool {
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

    pub(super) fn give_up(&mut self, at: usize) -> bool {
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

    pub(super) fn parsed(&mut self, path: &Path, mut batch: Batch, parsed: Parsed) {
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
        self.forget_ended(&declared);
        if let Some(text) = self.refused(&declared) {
            let text = format!("{}: {text}", path.display());
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

    /// Services that have failed, or have ended since, may be declared again.
    fn forget_ended(&mut self, declared: &[Declared]) {
        let mut at = 0;
        while let Some(service) = self.list.services.get(at) {
            let name = &service.declared.name;
            let ended = match service.state {
                State::Failed(_) => true,
                State::Ready => self.registry.find_any(name).is_none(),
                _ => false,
            };
            if ended && declared.iter().any(|d| d.name == *name) {
                self.far.remove(name);
                self.list.services.remove(at);
                self.of_batch.remove(at);
            } else {
                at += 1;
            }
        }
    }

    /// Why some of these cannot be services of this job.
    fn refused(&self, declared: &[Declared]) -> Option<String> {
        let others = || self.list.services.iter();
        declared.iter().find_map(|d| {
            let known = others().any(|s| s.declared.name == d.name && s.state != State::Elsewhere);
            if known {
                return Some(format!("this job has a service {} already", d.name));
            }
            let others = others().map(|s| &s.declared).filter(|s| s.name != d.name);
            let alike = services::alike(others, d);
            alike.err().map(|error| format!("{error:#}"))
        })
    }

    /// The image as its start is told: as written when it is to be fetched, else a path, from the file that names it.
    fn image_of(&self, declared: &Declared, directory: &Path) -> PathBuf {
        if declared.is_fetched() {
            return PathBuf::from(&declared.image);
        }
        match declared.image.strip_prefix("~/") {
            Some(below) => self.host.user.home.join(below),
            None => directory.join(&declared.image),
        }
    }

    /// Starts what can be started, tells those who wait, and writes it down.
    pub(super) fn changed(&mut self) {
        self.watch_others();
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
                .map(|s| {
                    let name = &s.declared.name;
                    let state = self.far.get(name).unwrap_or(&s.state);
                    (name.clone(), state.clone())
                })
                .collect();
            let failed = states.iter().find_map(|(name, state)| match state {
                State::Failed(_) if !self.far.contains_key(name) => {
                    Some(format!("it comes after {name}, which could not be started"))
                }
                State::Failed(why) => Some(format!("it comes after {name}, which {why}")),
                _ => None,
            });
            if let Some(why) = failed {
                self.list.services[at].state = State::Failed(why);
            } else if states.iter().all(|(_, s)| *s == State::Ready) {
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

    /// Begins to ask for the services of other nodes that one of ours waits for.
    fn watch_others(&mut self) {
        let services = &self.list.services;
        let limits = services::limits_s(services.iter().map(|s| &s.declared));
        let awaited = |name: &String| {
            let mut waiting = services.iter().filter(|s| s.state == State::Waiting);
            waiting.any(|s| s.declared.after.contains(name))
        };
        for service in services.iter().filter(|s| s.state == State::Elsewhere) {
            let name = &service.declared.name;
            let Some(port) = service.declared.port else {
                continue;
            };
            if self.far.contains_key(name) || !awaited(name) {
                continue;
            }
            let limit_s = limits.get(name.as_str()).copied().unwrap_or(0);
            // Its own node may have begun later.
            let limit = Duration::from_secs(u64::from(limit_s) + 10);
            let state = match watch(&service.node, port, limit) {
                Ok((pid, said)) => {
                    let purpose = Purpose::Watch(name.clone(), said);
                    self.children.push(Child { pid, purpose });
                    State::Starting
                }
                Err(error) => State::Failed(format!("cannot be asked for: {error:#}")),
            };
            self.far.insert(name.clone(), state);
        }
    }

    pub(super) fn start_service(&mut self, at: usize) -> Result<()> {
        let declared = &self.list.services[at].declared;
        let batch = &self.batches[self.of_batch[at]];
        let image = self.image_of(declared, &batch.directory);
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

    pub(super) fn child_ended(&mut self, child: Child, status: u8) {
        match child.purpose {
            Purpose::Answer(id) => self.answer(id, &Answer::Done(status)),
            Purpose::Watch(name, said) => {
                let state = match status {
                    0 => State::Ready,
                    _ => State::Failed(last_words(said, status)),
                };
                self.far.insert(name, state);
                self.changed();
            }
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

    pub(super) fn save(&self) {
        let text = serde_json::to_vec(&self.list).unwrap_or_default();
        let Some(directory) = self.registry.directory() else {
            return; // what claimed the job's name has it
        };
        if let Err(error) = directory.replace(&list_name(&self.job), &text) {
            say::warn(format_args!(
                "cannot write in {}: {error}",
                directory.path.display()
            ));
        }
    }
}

/// Leaves a process that tries to reach a port of another node, and ends with 0 when it does, or else with words in the file.
fn watch(node: &str, port: u16, limit: Duration) -> Result<(Pid, std::fs::File)> {
    let said = rustix::fs::memfd_create("capsid", rustix::fs::MemfdFlags::CLOEXEC)
        .context("cannot create a file in memory")?;
    let mut said = std::fs::File::from(said);
    let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
    match sys::fork()? {
        Fork::Parent(pid) => Ok((pid, said)),
        Fork::Child => {
            sys::die_with(own.as_ref());
            let Err(why) = reach(node, port, limit) else {
                sys::exit_now(0)
            };
            let limit_s = limit.as_secs();
            let _ = writeln!(
                said,
                "did not answer at {node}:{port} within {limit_s} s: {why}"
            );
            sys::exit_now(exit::FATAL)
        }
    }
}

/// Tries to reach a port until somebody answers.
fn reach(node: &str, port: u16, limit: Duration) -> std::io::Result<()> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(50);
    let attempt = || {
        let mut last = std::io::Error::other("no address of this name");
        for address in (node, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    loop {
        match attempt() {
            Err(_) if Instant::now() < end => {}
            done => return done,
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

fn read_services(path: &Path, nodes: usize) -> Parsed {
    let read = || -> Result<Vec<Declared>> {
        let what = || format!("cannot read the services in {}", path.display());
        let file = crate::given::open(path).with_context(what)?;
        let meta = file.metadata().with_context(what)?;
        if !meta.is_file() || meta.len() > MAX_FILE {
            bail!("{}: not a file of at most 1 MiB", what());
        }
        let mut text = String::new();
        file.take(MAX_FILE)
            .read_to_string(&mut text)
            .with_context(what)?;
        services::parse(&text, nodes).with_context(|| path.display().to_string())
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
