//! The parent that waits, where a pid namespace needs one: signals go in, the status comes out.

use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::sys;
use crate::exit;

/// Signals that are handed on. The terminal's stop signals are not among them: they stop us and the program alike.
pub const FORWARDED: [Signal; 14] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGWINCH,
    Signal::SIGURG,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGXCPU,
];

/// The signals to block before the fork, so that none is lost; and the mask to give back to the program.
pub fn block() -> Result<SigSet> {
    let mut set = SigSet::empty();
    for signal in FORWARDED {
        set.add(signal);
    }
    set.add(Signal::SIGCHLD);
    set.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)
        .context("cannot block signals")
}

/// The signals by which people and batch systems end a program, without those that the caller ignores (`nohup(1)`).
pub fn ending() -> SigSet {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok())
        .unwrap_or(0);
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let heeded = |signal: &Signal| ignored & 1 << (*signal as i32 - 1) == 0;
    signals.into_iter().filter(heeded).collect()
}

/// Those signals, held back until a program of short steps has tidied up: with this value it ends by the one that came.
/// Its children inherit the mask: see [`sys::end_with_us`].
pub struct Deferred {
    mask: SigSet,
    signals: SignalFd,
    came: Option<Signal>,
}

impl Deferred {
    /// From here on.
    ///
    /// # Errors
    /// As `signalfd(2)`.
    pub fn new() -> Result<Deferred> {
        let set = ending();
        let mask = set
            .thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)
            .context("cannot block signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&set, flags).context("cannot watch signals")?;
        Ok(Deferred {
            mask,
            signals,
            came: None,
        })
    }

    /// The first that came.
    pub fn came(&mut self) -> Option<Signal> {
        if self.came.is_none()
            && let Ok(Some(info)) = self.signals.read_signal()
        {
            self.came = i32::try_from(info.ssi_signo)
                .ok()
                .and_then(|number| Signal::try_from(number).ok());
        }
        self.came
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        let came = self.came();
        let _ = self.mask.thread_set_mask();
        if let Some(signal) = came {
            let _ = raise(signal);
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With a status.
    Exited(u8),
    /// By a signal.
    Signalled(Signal),
}

/// Waits for `child`, handing on every signal that somebody sent us. What the terminal sends reaches the whole
/// foreground group without our help, but `early`, what had come right after the fork ([`sys::pending_signals`]), may have
/// come before `child` was there. `reap` also collects other children (process 1 has everybody's).
///
/// # Errors
/// As `signalfd(2)`.
pub fn until_exit(child: Pid, reap: bool, early: SigSet) -> Result<End> {
    let end = until(child, reap, early, None)?;
    end.context("the program has not ended")
}

/// The same, until a moment; `None` when that is past and the child still runs.
///
/// # Errors
/// As [`until_exit`].
pub fn until(
    child: Pid,
    reap: bool,
    mut early: SigSet,
    deadline: Option<Instant>,
) -> Result<Option<End>> {
    let mut set = SigSet::empty();
    for signal in FORWARDED {
        set.add(signal);
    }
    set.add(Signal::SIGCHLD);
    let signals =
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("cannot watch signals")?;
    loop {
        let any = if reap { Pid::from_raw(-1) } else { child };
        loop {
            match waitpid(any, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) if pid == child => {
                    return Ok(Some(End::Exited(status.to_le_bytes()[0])));
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                    return Ok(Some(End::Signalled(signal)));
                }
                Ok(WaitStatus::StillAlive) | Err(nix::Error::EINTR) => break,
                // It has ended, and somebody else was told how.
                Err(error) => bail!("cannot tell how the program ended (wait): {error}"),
                Ok(_) => {}
            }
        }
        if let Some(deadline) = deadline {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Ok(None);
            };
            // Rounded up, so that it is not asked again and again in the last millisecond.
            let ms = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            let mut watched = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX);
            if !matches!(poll(&mut watched, timeout), Ok(1..)) {
                continue;
            }
        }
        let Ok(Some(info)) = signals.read_signal() else {
            continue;
        };
        let number = i32::try_from(info.ssi_signo).unwrap_or(0);
        // SI_KERNEL: typed at the terminal, or its end; the group has it already.
        let from_terminal = info.ssi_code == libc::SI_KERNEL;
        if number != libc::SIGCHLD
            && let Ok(signal) = Signal::try_from(number)
            && (early.contains(signal) || !from_terminal)
        {
            early.remove(signal);
            let _ = kill(child, signal);
        }
    }
}

/// Ends this process as the program ended: a signal is raised again, so that a shell says `Killed`.
pub fn end_like(end: End) -> u8 {
    match end {
        End::Exited(status) => status,
        End::Signalled(signal) => {
            if !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP) {
                sys::default_signal(signal);
            }
            // No second core file for one crash.
            let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
            let mut set = SigSet::empty();
            set.add(signal);
            let _ = raise(signal);
            let _ = set.thread_unblock();
            exit::signalled(signal as i32)
        }
    }
}
