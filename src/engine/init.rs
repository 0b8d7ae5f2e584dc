//! `appinit`: process 1 of a container with a pid namespace.
//!
//! It reaps every process that loses its parent, and hands signals on. In a foreground run it ends with the program, and
//! the kernel then kills what is left in the namespace (`pid_namespaces(7)`). In an instance it stays after its script has
//! ended, until it is asked to stop. Site tools look for the name `appinit` in process lists.

use std::convert::Infallible;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::background::{Event, Streams, tell};
use super::process::{self, Next, Program};
use super::ready::Readiness;
use super::sys::{self, Fork, STOP_SIGNAL};
use super::wait::{self, End};
use crate::exit;
use crate::plan::service::Restart;
use crate::plan::{Capabilities, Plan, Service};

/// Starts the program as a child and stays until it has ended. `mask` is the caller's signal mask.
///
/// # Errors
/// When the program cannot be started.
pub fn run(program: &Program, mask: &SigSet) -> Result<Infallible> {
    // The program may look at once.
    sys::set_name("appinit");
    match sys::fork()? {
        Fork::Child => {
            let _ = mask.thread_set_mask();
            process::exec(program)
        }
        Fork::Parent(child) => {
            let early = sys::pending_signals();
            sys::set_title("appinit");
            let status = match wait::until_exit(child, true, early)? {
                End::Exited(status) => status,
                End::Signalled(signal) => exit::signalled(signal as i32),
            };
            sys::exit_now(status)
        }
    }
}

fn watched() -> SigSet {
    let forwarded = wait::FORWARDED.iter().map(|s| *s as i32);
    sys::signal_set(forwarded.chain([libc::SIGCHLD, STOP_SIGNAL]))
}

/// Blocks what process 1 of an instance reads later, so that nothing is lost before.
///
/// # Errors
/// As `sigprocmask(2)`.
pub fn block_signals() -> Result<()> {
    watched().thread_block().context("cannot block signals")
}

/// The number that goes with [`STOP_SIGNAL`]: the signal for the service, and whether the person chose it.
pub fn stop_value(signal: Option<Signal>) -> i32 {
    match signal {
        Some(signal) => signal as i32 | CHOSEN,
        None => Signal::SIGINT as i32,
    }
}
const CHOSEN: i32 = 0x100;

/// A first restart waits so long, each further one twice as long,
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// at most so long,
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// and the count begins again when the script has run for so long.
const STEADY: Duration = Duration::from_secs(10);

/// How often a stop that is under way looks for children that nobody has told.
const STOP_LOOK: Duration = Duration::from_millis(50);

/// Process 1 of an instance: makes the container by `inside`, runs the script, and stays.
///
/// # Errors
/// When the container cannot be made or the script not be executed the first time.
pub fn serve(
    plan: &Plan,
    service: &Service,
    streams: Streams,
    control: &OwnedFd,
    inside: impl FnOnce(&Plan) -> Result<Next>,
) -> Result<Infallible> {
    if service.connected {
        await_connection(control)?;
    }
    tell_namespaces(plan, control)?;
    // Of the host: who knows what the image has there.
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?;
    let next = inside(plan)?;
    let readiness = Readiness::prepare(&service.ready)?;
    let signals = SignalFd::with_flags(&watched(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch signals")?;
    let own = [
        null.as_raw_fd(),
        streams.out.as_raw_fd(),
        streams.err.as_raw_fd(),
        control.as_raw_fd(),
        signals.as_raw_fd(),
    ];
    let mut keep: Vec<i32> = own.into_iter().chain(readiness.descriptor()).collect();
    keep.sort_unstable();
    sys::close_all_but(&keep);
    if plan.process.rights.left(plan.ids.is_root()) == Capabilities(0) {
        sys::drop_capabilities();
    }
    sys::set_title("appinit");
    let program = match next {
        Next::Run(mut program) => {
            // The one of the caller's service manager is not for this service.
            program.set("NOTIFY_SOCKET", readiness.notify_name());
            Some(program)
        }
        Next::End(0) => None,
        Next::End(status) => bail!("the image's scripts ended with status {status}"),
    };
    let mut init = Init {
        service,
        streams,
        null: null.into(),
        control,
        program,
        readiness,
        main: None,
        began: Instant::now(),
        restarts: 0,
        pause: FIRST_PAUSE,
        again: None,
        stop: None,
    };
    let event = if init.program.is_some() {
        init.launch()?;
        Event::Running
    } else {
        Event::Idle
    };
    redirect(&init.null, &init.null, &init.null)?;
    tell(control, &event, &[])?;
    init.stay(&signals)
}

/// Waits until the monitor has connected our network namespace. Its program must be able to look at us for that; nobody is
/// in the container yet who could, too.
fn await_connection(control: &OwnedFd) -> Result<()> {
    sys::allow_tracing();
    tell(control, &Event::Unconnected, &[])?;
    let answer = super::wire::receive(control.as_fd());
    sys::forbid_tracing();
    match answer {
        Ok((go, _)) if !go.is_empty() => Ok(()),
        _ => bail!("the instance's monitor is gone"),
    }
}

/// Hands out the namespaces. This process is never again open to others of its user: its memory has held the caller's
/// environment, and it has the monitor's socket. Without that nobody else could open them (`namespaces(7)`).
fn tell_namespaces(plan: &Plan, control: &OwnedFd) -> Result<()> {
    let names = plan.namespaces;
    let kinds = [
        ("user", true),
        ("pid", true),
        ("ipc", names.ipc),
        ("net", names.net),
        ("uts", names.uts),
        ("mnt", true),
    ];
    let open = |(kind, _): (&str, bool)| {
        let path = format!("/proc/self/ns/{kind}");
        std::fs::File::open(&path).with_context(|| format!("cannot open {path}"))
    };
    let own = kinds.into_iter().filter(|(_, own)| *own).map(open);
    let files = own.collect::<Result<Vec<_>>>()?;
    let fds: Vec<i32> = files.iter().map(|file| file.as_raw_fd()).collect();
    tell(control, &Event::Namespaces, &fds)
}

pub(super) fn redirect(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> Result<()> {
    nix::unistd::dup2_stdin(stdin)
        .and_then(|()| nix::unistd::dup2_stdout(stdout))
        .and_then(|()| nix::unistd::dup2_stderr(stderr))
        .context("cannot redirect the standard descriptors")
}

/// A stop that is under way.
struct Stop {
    signal: Signal,
    chosen: bool,
    /// Who has been told what; process groups are negative numbers.
    told: Vec<(i32, Signal)>,
}

struct Init<'a> {
    service: &'a Service,
    streams: Streams,
    null: OwnedFd,
    control: &'a OwnedFd,
    program: Option<Program>,
    readiness: Readiness,
    /// The script's process.
    main: Option<Pid>,
    began: Instant,
    restarts: u32,
    pause: Duration,
    /// When the script is started again.
    again: Option<Instant>,
    stop: Option<Stop>,
}

impl Init<'_> {
    /// Starts the script, and knows when this returns whether it could be executed.
    fn launch(&mut self) -> Result<()> {
        let Some(program) = &self.program else {
            return Ok(());
        };
        self.began = Instant::now();
        self.main = Some(spawn(program, &self.null, &self.streams)?);
        Ok(())
    }

    fn stay(&mut self, signals: &SignalFd) -> Result<Infallible> {
        loop {
            let children = self.reap()?;
            if self.stop.is_some() {
                if !children {
                    sys::exit_now(0);
                }
                self.tell_children_to_stop();
            }
            if self.again.is_some_and(|at| at <= Instant::now()) {
                self.again = None;
                let event = match self.launch() {
                    Ok(()) => Event::Running,
                    Err(error) => Event::Failed(format!("{error:#}")),
                };
                tell(self.control, &event, &[])?;
            }
            if self.main.is_some() || children {
                let program = self.program.as_ref();
                if self.readiness.is_reached(program, &self.null) {
                    tell(self.control, &Event::Ready, &[])?;
                }
            }
            // The kernel's list of children may miss one while another ends: a stop looks again.
            let look = self.stop.is_some().then(|| Instant::now() + STOP_LOOK);
            let next = [self.again, self.readiness.next_look(), look];
            let timeout = next
                .into_iter()
                .flatten()
                .min()
                .map_or(PollTimeout::NONE, |at| {
                    let left = at.saturating_duration_since(Instant::now());
                    PollTimeout::try_from(left.as_micros().div_ceil(1000))
                        .unwrap_or(PollTimeout::MAX)
                });
            let mut set = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            let notify = self.readiness.socket();
            set.extend(notify.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match poll(&mut set, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for signals"),
            }
            while let Ok(Some(info)) = signals.read_signal() {
                let number = i32::try_from(info.ssi_signo).unwrap_or(0);
                if number == STOP_SIGNAL {
                    self.begin_stop(info.ssi_int);
                } else if number != libc::SIGCHLD
                    && let (Some(main), Ok(signal)) = (self.main, Signal::try_from(number))
                {
                    // It leads a group of its own.
                    let _ = kill(Pid::from_raw(-main.as_raw()), signal);
                }
            }
        }
    }

    /// Collects what has ended. Whether children are left.
    fn reap(&mut self) -> Result<bool> {
        loop {
            let (pid, status, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid, Some(status.to_le_bytes()[0]), None),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, None, Some(signal as i32)),
                Ok(WaitStatus::StillAlive) => return Ok(true),
                Err(nix::Error::ECHILD) => return Ok(false),
                Ok(_) | Err(_) => continue,
            };
            if Some(pid) == self.main {
                self.main = None;
                self.script_ended(status, signal)?;
            } else if self.readiness.reaped(pid, status == Some(0)) {
                tell(self.control, &Event::Ready, &[])?;
            }
        }
    }

    fn script_ended(&mut self, status: Option<u8>, signal: Option<i32>) -> Result<()> {
        let failed = status != Some(0);
        if self.began.elapsed() >= STEADY {
            (self.restarts, self.pause) = (0, FIRST_PAUSE);
        }
        let again = self.stop.is_none()
            && match self.service.restart {
                Restart::No => false,
                Restart::Always => true,
                Restart::OnFailure(None) => failed,
                Restart::OnFailure(Some(most)) => failed && self.restarts < most,
            };
        tell(
            self.control,
            &Event::Exited {
                status,
                signal,
                again,
            },
            &[],
        )?;
        if again {
            self.restarts += 1;
            self.again = Some(Instant::now() + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        } else if self.service.ends && self.stop.is_none() {
            // The rest of the instance goes in order too.
            self.begin_stop(Signal::SIGTERM as i32 | CHOSEN);
        }
        Ok(())
    }

    fn begin_stop(&mut self, value: i32) {
        let signal = Signal::try_from(value & !CHOSEN).unwrap_or(Signal::SIGINT);
        self.again = None;
        self.stop = Some(Stop {
            signal,
            chosen: value & CHOSEN != 0,
            told: Vec::new(),
        });
    }

    /// The service's own processes first; what they leave behind becomes our child and is told then. A whole process group
    /// at a time, as a terminal tells it: programs like npm leave it to the terminal to tell their children.
    fn tell_children_to_stop(&mut self) {
        let Some(stop) = &mut self.stop else { return };
        let main = self.main.map(Pid::as_raw);
        let ours = nix::unistd::getpgrp().as_raw();
        for pid in main.into_iter().chain(children(main)) {
            match group(pid) {
                // What somebody has executed here leads no group that has a number here: its members are told one by one.
                0 => members_of_outer_groups()
                    .into_iter()
                    .for_each(|pid| stop.tell(pid, pid)),
                own if own == ours => stop.tell(pid, pid),
                group => stop.tell(-group, pid),
            }
        }
    }
}

impl Stop {
    /// Tells a process, or a group by its negative number, once what fits `pid` of it.
    fn tell(&mut self, to: i32, pid: i32) {
        let told = (to, self.signal_for(pid));
        if !self.told.contains(&told) {
            self.told.push(told);
            send(to, told.1);
        }
    }

    /// A process that ignores the default signal, as background jobs of scripts do, gets `SIGTERM` instead.
    fn signal_for(&self, pid: i32) -> Signal {
        if self.chosen || !ignores(pid, self.signal) {
            self.signal
        } else {
            Signal::SIGTERM
        }
    }
}

fn send(to: i32, signal: Signal) {
    let to = Pid::from_raw(to);
    // It may have ended by now. What is stopped must run to see the signal.
    let _ = kill(to, signal);
    let _ = kill(to, Signal::SIGCONT);
}

/// The group that a process is in; 0 when its leader is outside of our pid namespace (`pid_namespaces(7)`), the process
/// itself when that cannot be told.
fn group(pid: i32) -> i32 {
    nix::unistd::getpgid(Some(Pid::from_raw(pid))).map_or(pid, Pid::as_raw)
}

/// The processes of our namespace whose group is led from outside.
fn members_of_outer_groups() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != 1 && group(*pid) == 0).collect()
}

/// Our children. Where /proc is not mounted, only the one that we know.
fn children(main: Option<i32>) -> Vec<i32> {
    match std::fs::read_to_string("/proc/1/task/1/children") {
        Ok(text) => text
            .split_ascii_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect(),
        Err(_) => main.into_iter().collect(),
    }
}

/// Whether a process ignores a signal (`SigIgn`, `proc_pid_status(5)`).
fn ignores(pid: i32, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}

/// Starts a program in a session of its own, with its output to the streams. Returns when it has been executed.
///
/// # Errors
/// When it cannot be.
fn spawn(program: &Program, stdin: &OwnedFd, streams: &Streams) -> Result<Pid> {
    use std::io::{Read as _, Write as _};
    // Closed by a successful execve: nothing to read means that the program runs.
    let (mut answer, mut reply) = std::io::pipe().context("cannot create a pipe")?;
    match sys::fork()? {
        Fork::Child => {
            drop(answer);
            let ready = || {
                nix::unistd::setsid().context("cannot create a session")?;
                redirect(stdin, &streams.out, &streams.err)?;
                sys::default_signals();
                SigSet::empty()
                    .thread_set_mask()
                    .context("cannot restore the signal mask")
            };
            let Err(error) = ready().and_then(|()| process::exec(program));
            let _ = reply.write_all(format!("{error:#}").as_bytes());
            sys::exit_now(255)
        }
        Fork::Parent(child) => {
            drop(reply);
            let mut error = String::new();
            answer
                .read_to_string(&mut error)
                .context("cannot hear from the new process")?;
            if error.is_empty() {
                return Ok(child);
            }
            let _ = waitpid(child, None);
            bail!("{error}")
        }
    }
}

/// Starts a command whose output nobody wants.
pub(super) fn spawn_quietly(program: &Program, null: &OwnedFd) -> Option<Pid> {
    let streams = Streams {
        out: null.try_clone().ok()?,
        err: null.try_clone().ok()?,
    };
    spawn(program, null, &streams).ok()
}
