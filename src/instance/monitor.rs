//! The process that looks after an instance: it starts the container, writes down what the service says, keeps the
//! record true for those who ask, and tidies up.
//!
//! It is the parent of the container's process 1, which dies with it; when process 1 ends, however, the monitor ends too.
//! It stays in the host's namespaces and holds nothing of the caller's.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use regex_lite::Regex;

use super::door::Door;
use super::ending::{self, Noted, Peak};
use super::launch::Message;
use super::logs::{self, Log};
use super::{Record, Registry, State, now_s};
use crate::engine::background::{self, Background, Event, Streams};
use crate::engine::server::Places;
use crate::engine::sys;
use crate::engine::{cgroup, init, network, wire};
use crate::plan::limits::Policy;
use crate::plan::{Plan, Service};
use crate::proc::Id;
use crate::say;

/// Bytes that a pipe of output gives at once.
const CHUNK: usize = 16 << 10;
/// How long an instance may take to stop when the job's supervisor has ended.
const ORPHANED: Duration = Duration::from_secs(2);
/// How long what an ended container said last is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is to be started.
pub struct Spec<'a> {
    /// The container.
    pub plan: &'a Plan,
    /// How the script is looked after.
    pub service: &'a Service,
    /// The record as far as it is known.
    pub record: Record,
    /// Size at which logs are turned over, bytes; 0 for never.
    pub log_limit: u64,
    /// Its network's connections to the outside.
    pub network: Option<network::Network>,
    /// Its limits.
    pub limits: cgroup::Limits,
    /// What to do with those that cannot be enforced.
    pub policy: Policy,
    /// Directories of the caller.
    pub places: Places,
    /// The start waits until the service is ready: one that never will be is not left running.
    pub awaited: bool,
    /// Hangs up when the job's supervisor has ended: the instance then ends too.
    pub life: Option<OwnedFd>,
    /// Whether its end is written down for the job.
    pub noted: Noted,
    /// The instance stays the caller's child, shows what its service says, and ends with it.
    pub foreground: bool,
}

/// Sees to it that a process 1 that speaks no more is gone.
fn container_ends(container: Option<&Background>) {
    if let Some(container) = container {
        container.held.signal(rustix::process::Signal::KILL);
        container.held.wait(LAST_WORDS);
    }
}

/// Looks after an instance until it has ended. Gives the status of its script.
///
/// # Errors
/// When it cannot be started, or its service ended before it was ready.
pub fn run(registry: &Registry, mut spec: Spec, tell: &dyn Fn(&Message)) -> Result<u8> {
    let stops = [libc::SIGTERM].into_iter().chain(
        [libc::SIGINT, libc::SIGHUP, libc::SIGQUIT]
            .into_iter()
            .filter(|_| spec.foreground),
    );
    let stops = sys::signal_set(stops);
    // That the caller ignored the ends of children is not the service's business.
    sys::watch_children();
    stops.thread_block().context("cannot block signals")?;
    let signals = SignalFd::with_flags(&stops, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch signals")?;
    spec.record.monitor = Id::own();
    sys::set_title(&format!(
        "capsid-instance: {} [{}]",
        spec.record.user, spec.record.name
    ));
    let mut monitor = Monitor {
        registry,
        door: registry.claim(&spec.record.name)?,
        service: spec.service,
        tell,
        awaited: spec.awaited,
        foreground: spec.foreground,
        container: None,
        network: spec.network.take(),
        helper: None,
        pattern: None,
        lines: [Vec::new(), Vec::new()],
        said: Vec::new(),
        news: Vec::new(),
        failure: None,
        life: spec.life.take(),
        peak: Peak::of(spec.noted),
        orphaned: None,
        started: false,
        stop_asked: false,
        ooms: 0,
        record: spec.record.clone(),
    };
    let done = monitor.live(&spec, &signals);
    monitor.tidy_up();
    done?;
    Ok(monitor.record.exit_status())
}

struct Monitor<'a> {
    registry: &'a Registry,
    /// Where others ask for the record. Its going gives the name free.
    door: Door,
    service: &'a Service,
    tell: &'a dyn Fn(&Message),
    awaited: bool,
    foreground: bool,
    record: Record,
    container: Option<Background>,
    network: Option<network::Network>,
    helper: Option<network::Helper>,
    pattern: Option<Regex>,
    /// The unfinished last line of each stream, for the pattern.
    lines: [Vec<u8>; 2],
    /// The end of what the service said to standard error.
    said: Vec<u8>,
    /// What the one who starts it is to be told.
    news: Vec<Message>,
    /// Why the instance is no good.
    failure: Option<String>,
    /// Hangs up when the job's supervisor has ended.
    life: Option<OwnedFd>,
    /// The memory that it uses, looked at now and then.
    peak: Peak,
    /// When the instance is killed, because it has.
    orphaned: Option<Instant>,
    started: bool,
    stop_asked: bool,
    /// How often the kernel had killed for memory in our cgroup when the script began.
    ooms: u64,
}

impl Monitor<'_> {
    fn live(&mut self, spec: &Spec, signals: &SignalFd) -> Result<()> {
        let mut logs = self.open_logs(spec.log_limit)?;
        if let crate::plan::service::Ready::Log(pattern) = &spec.service.ready {
            self.pattern = Some(Regex::new(pattern).map_err(|e| anyhow!("--ready-log: {e}"))?);
        }
        self.record.cgroup = cgroup::apply(&spec.limits, spec.policy, &self.record.name)?;
        let pipe = || {
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .context("cannot create a pipe")
        };
        let ((out, out_end), (err, err_end)) = (pipe()?, pipe()?);
        let streams = Streams {
            out: out_end,
            err: err_end,
        };
        let container = background::start(spec.plan, spec.service, streams, &spec.places)?;
        self.record.init = Some(Id::seen(container.pid));
        self.container = Some(container);
        if !self.foreground {
            sys::detach_standard_descriptors();
        }
        self.write_pid_file()?;
        let watched = self.watch(&[out, err], &mut logs, signals);
        match self.failure.take() {
            Some(failure) => bail!("{failure}"),
            None => watched,
        }
    }

    fn open_logs(&mut self, limit: u64) -> Result<[Log; 2]> {
        let directory = self
            .record
            .log_err
            .parent()
            .unwrap_or(Path::new("/"))
            .to_owned();
        let open = |record: &Record| -> std::io::Result<[Log; 2]> {
            logs::create(record.log_err.parent().unwrap_or(Path::new("/")))?;
            Ok([
                Log::open(record.log_out.clone(), limit)?,
                Log::open(record.log_err.clone(), limit)?,
            ])
        };
        let error = match open(&self.record) {
            Ok(logs) => return Ok(logs),
            Err(error) => error,
        };
        let Some(directory_here) = self.registry.directory() else {
            return Err(error)
                .with_context(|| format!("cannot write logs in {}", directory.display()));
        };
        let instead = directory_here.path.join("logs");
        say::warn(format_args!(
            "cannot write logs in {} ({}): they are in {} instead, which ends with {}",
            directory.display(),
            say::plain(&error.to_string()),
            instead.display(),
            match self.record.job {
                Some(_) => "the job",
                None => "this login or reboot",
            }
        ));
        for path in [&mut self.record.log_out, &mut self.record.log_err] {
            *path = instead.join(path.file_name().unwrap_or_default());
        }
        open(&self.record)
            .with_context(|| format!("cannot write logs in {} either", instead.display()))
    }

    /// Waits for whatever happens until process 1 has ended.
    fn watch(
        &mut self,
        pipes: &[OwnedFd; 2],
        logs: &mut [Log; 2],
        signals: &SignalFd,
    ) -> Result<()> {
        let mut open = [true, true];
        let mut deadline = None;
        while open != [false, false] || deadline.is_none() {
            let Some(container) = &self.container else {
                return Ok(());
            };
            let timeout = deadline.or(self.orphaned).or(self.peak.due()).map_or(
                PollTimeout::NONE,
                |at: Instant| {
                    let left = at.saturating_duration_since(Instant::now());
                    PollTimeout::try_from(left.as_micros().div_ceil(1000))
                        .unwrap_or(PollTimeout::MAX)
                },
            );
            let mut set = vec![
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(container.held.as_fd(), PollFlags::POLLIN),
                PollFd::new(container.control.as_fd(), PollFlags::POLLIN),
            ];
            if deadline.is_some() {
                set.truncate(0);
            }
            let fixed = set.len();
            let readable = [0, 1].into_iter().filter(|n| open[*n]);
            set.extend(readable.map(|n| PollFd::new(pipes[n].as_fd(), PollFlags::POLLIN)));
            let lives = set.len();
            if deadline.is_none() {
                let life = container.lives.iter();
                set.extend(life.map(|fd| PollFd::new(fd.as_fd(), PollFlags::empty())));
            }
            let ours = set.len();
            if deadline.is_none() && self.orphaned.is_none() {
                // A pipe that is closed, or a process that has ended.
                let life = self.life.iter();
                set.extend(life.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
            }
            let doors = set.len();
            if deadline.is_none() {
                let door = self.door.descriptors();
                set.extend(door.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            }
            match poll(&mut set, timeout) {
                Ok(0) if deadline.is_some() => return Ok(()),
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for the instance"),
            }
            if deadline.is_none() {
                self.peak.look(&self.record);
            }
            let happened: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            let streams: Vec<usize> = [0, 1].into_iter().filter(|n| open[*n]).collect();
            for (stream, ready) in streams.into_iter().zip(&happened[fixed..lives]) {
                if *ready {
                    open[stream] = self.log(&pipes[stream], stream, &mut logs[stream]);
                }
            }
            if deadline.is_some() {
                continue;
            }
            if happened[2] && !self.heard() && !happened[1] {
                // It is ending: its end of the socket is closed before it can be waited for.
                container_ends(self.container.as_ref());
            }
            if happened[lives..ours].contains(&true) {
                self.fail("the image server was killed");
            }
            if happened[ours..doors].contains(&true) {
                self.orphaned = Some(Instant::now() + ORPHANED);
                self.ask_to_stop();
            } else if self.orphaned.is_some_and(|at| at <= Instant::now()) {
                self.fail("the supervisor of the job has ended");
            }
            if happened[0] {
                while let Ok(Some(_)) = signals.read_signal() {}
                self.ask_to_stop();
            }
            if happened[1] {
                while self.heard() {}
                // Nobody writes any more; what is in the pipes is read to its end. Who asks sees the end, which is near.
                deadline = Some(Instant::now() + LAST_WORDS);
            } else if happened[doors..].contains(&true) {
                self.serve_door();
            }
        }
        Ok(())
    }

    /// Copies what a service said to its log. False at the end.
    fn log(&mut self, pipe: &OwnedFd, stream: usize, log: &mut Log) -> bool {
        let mut bytes = vec![0; CHUNK];
        let len = match rustix::io::read(pipe, &mut bytes) {
            Ok(0) => return false,
            Ok(len) => len,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return true,
            Err(_) => return false,
        };
        let bytes = &bytes[..len];
        log.write(bytes);
        if self.foreground {
            // Nobody is left to tell when nobody listens.
            let _ = match stream {
                0 => std::io::stdout()
                    .write_all(bytes)
                    .and_then(|()| std::io::stdout().flush()),
                _ => std::io::stderr().write_all(bytes),
            };
        }
        if stream == 1 && !self.record.script.ready {
            self.said.extend_from_slice(bytes);
            let surplus = self.said.len().saturating_sub(2000);
            self.said.drain(..surplus);
        }
        self.look_for_pattern(bytes, stream);
        true
    }

    fn look_for_pattern(&mut self, bytes: &[u8], stream: usize) {
        let Some(pattern) = &self.pattern else { return };
        let line = &mut self.lines[stream];
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            line.extend_from_slice(part);
            let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
            if pattern.is_match(&text) {
                self.pattern = None;
                self.lines = [Vec::new(), Vec::new()];
                self.service_is_ready();
                return self.publish();
            }
            if part.ends_with(b"\n") || line.len() > CHUNK {
                line.clear();
            }
        }
    }

    /// Takes one event from process 1. False when there is none.
    fn heard(&mut self) -> bool {
        let Some(container) = &mut self.container else {
            return false;
        };
        let Some((event, fds)) = background::hear(&container.control) else {
            return false;
        };
        match event {
            Event::Born(_) => {}
            Event::Namespaces => {
                let processes = fds.get(1).and_then(|fd| sys::identity(fd.as_fd()).ok());
                self.record.container.processes = processes.map_or(0, |(_, inode)| inode);
                container.namespaces = fds;
            }
            Event::Unconnected => self.connect(),
            Event::Running => {
                self.ooms = cgroup::oom_kills();
                let script = &mut self.record.script;
                if script.state == State::Restarting {
                    script.restarts += 1;
                }
                script.state = State::Running;
                script.started_s = Some(now_s());
                self.has_started();
            }
            Event::Idle => {
                self.record.script.state = State::None;
                self.has_started();
            }
            Event::Failed(text) => self.failure = Some(text),
            Event::Exited {
                status,
                signal,
                again,
            } => self.script_ended(status, signal, again),
            Event::Ready => self.service_is_ready(),
        }
        self.publish();
        true
    }

    /// Lets others see the record. There is nothing to join before the namespaces are known.
    fn serve_door(&mut self) {
        let inside = self.container.as_ref().filter(|c| !c.namespaces.is_empty());
        let inside = inside.map(|c| (&c.held, c.namespaces.as_slice()));
        self.door.serve(&self.record, inside);
    }

    /// Tells what there is to tell: who asks then finds it in the record.
    fn publish(&mut self) {
        // A line of the log may be seen before it is heard that the script runs.
        if self.started {
            for message in std::mem::take(&mut self.news) {
                (self.tell)(&message);
            }
        }
    }

    fn has_started(&mut self) {
        if !self.service.ready.is_declared() {
            self.record.script.ready = true;
        }
        if !self.started {
            self.started = true;
            self.news.insert(0, Message::Started);
        }
    }

    fn service_is_ready(&mut self) {
        if !self.record.script.ready {
            self.record.script.ready = true;
            self.news.push(Message::Ready);
        }
    }

    fn script_ended(&mut self, status: Option<u8>, signal: Option<i32>, again: bool) {
        let script = &mut self.record.script;
        script.state = if again {
            State::Restarting
        } else {
            State::Exited
        };
        (script.status, script.signal) = (status, signal);
        script.ended_s = Some(now_s());
        script.oom = signal == Some(libc::SIGKILL) && cgroup::oom_kills() > self.ooms;
        let ended_well = status == Some(0);
        // A daemon may stay behind when its script has ended well.
        if self.awaited && !script.ready && !again && !ended_well && !self.stop_asked {
            let how = match (status, signal) {
                (Some(status), _) => format!("status {status}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => "an unknown status".into(),
            };
            let said = String::from_utf8_lossy(&self.said)
                .trim()
                .replace('\n', " | ");
            let said = if said.is_empty() {
                format!("see capsid instance logs {}", self.record.name)
            } else {
                format!("it said: {said}")
            };
            self.fail(&format!(
                "the script of instance {} ended with {how} before the service was ready; {said}",
                self.record.name
            ));
        }
    }

    /// Connects the container's network to the outside, and lets it go on.
    fn connect(&mut self) {
        let connected = match (&self.network, &self.container) {
            (Some(network), Some(container)) => {
                let connected = network::connect(network, container.pid);
                if connected.is_ok() {
                    // Process 1 waits for any word; when it has ended, that is noticed otherwise.
                    let _ = wire::send(container.control.as_fd(), b"go", &[]);
                }
                connected
            }
            _ => Err(anyhow!("process 1 of the container is out of order")),
        };
        match connected {
            Ok(helper) => {
                self.record.ip = Some(network::ADDRESS.into());
                self.helper = Some(helper);
            }
            Err(error) => self.fail(&format!("{error:#}")),
        }
    }

    fn ask_to_stop(&mut self) {
        self.stop_asked = true;
        if let Some(container) = &self.container {
            let value = init::stop_value(Some(Signal::SIGTERM));
            // It may be ending just now.
            let _ = sys::queue_signal(&container.held, sys::STOP_SIGNAL, value);
        }
    }

    /// The instance is no good: it goes at once.
    fn fail(&mut self, why: &str) {
        if self.failure.is_none() {
            self.failure = Some(why.to_owned());
        }
        if let Some(container) = &self.container {
            container.held.signal(rustix::process::Signal::KILL);
        }
    }

    fn write_pid_file(&mut self) -> Result<()> {
        let (Some(path), Some(init)) = (&self.record.pid_file, self.record.init) else {
            return Ok(());
        };
        let write = || -> Result<()> {
            let there = std::fs::symlink_metadata(path);
            if there.is_ok_and(|m| !m.is_file() && !m.is_symlink()) {
                bail!("it is there, and no regular file");
            }
            // Beside it under a name that nobody can guess, then into its place: no link is followed.
            let draft = path.with_added_extension(uuid::Uuid::new_v4().simple().to_string());
            let mut file = std::fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&draft)?;
            writeln!(file, "{}", init.pid)?;
            std::fs::rename(&draft, path).inspect_err(|_| {
                let _ = std::fs::remove_file(&draft);
            })?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {} (--pid-file)", path.display()))
    }

    /// Ends what is left, keeps the record of the end with the logs, and gives the name free.
    fn tidy_up(&mut self) {
        self.helper = None;
        if let Some(container) = self.container.take() {
            container.held.signal(rustix::process::Signal::KILL);
            while nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(container.pid), None)
                == Err(nix::Error::EINTR)
            {}
        }
        if let (Some(path), Some(init)) = (&self.record.pid_file, self.record.init)
            && names_process(path, init.pid)
        {
            let _ = std::fs::remove_file(path);
        }
        self.record.ended_s = Some(now_s());
        if self.started {
            if matches!(self.record.script.state, State::Running | State::Restarting) {
                self.record.script.state = State::Exited;
                self.record.script.signal = self.record.script.signal.or(Some(libc::SIGKILL));
                self.record.script.ended_s = self.record.ended_s;
            }
            self.record.peak = self.peak.so_far();
            logs::keep_end(&self.record);
            if self.peak.is_wanted() {
                ending::note(self.registry, &self.record);
            }
        }
        cgroup::remove(self.record.cgroup.as_deref());
    }
}

/// Whether a file that may be anybody's by now is a `--pid-file` with this number.
fn names_process(path: &Path, pid: i32) -> bool {
    use rustix::fs::OFlags;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(path, flags, rustix::fs::Mode::empty()) else {
        return false;
    };
    let file = std::fs::File::from(file);
    let wanted = format!("{pid}\n");
    let same_len = |m: std::fs::Metadata| m.is_file() && m.len() == wanted.len() as u64;
    let mut text = String::new();
    file.metadata().is_ok_and(same_len)
        && std::io::Read::read_to_string(&mut &file, &mut text).is_ok()
        && text == wanted
}
