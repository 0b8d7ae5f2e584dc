//! Processes by number and start time, so that a number that was given to another process since is not mistaken.
//!
//! Source: `proc_pid_stat(5)` field 22, `pidfd_open(2)`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process of this boot of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id {
    /// Its number.
    pub pid: i32,
    /// When it began, in clock ticks since the machine started; 0 when that could not be seen.
    pub start: u64,
}

/// A process that is held on to: signals reach it or nobody.
#[derive(Debug)]
pub struct Held(OwnedFd);

impl Id {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<Id> {
        Some(Id {
            pid,
            start: stat_field(pid, 22)?,
        })
    }

    /// The process that has this number now; with no known start where /proc hides it (`hidepid=`, proc(5)).
    pub fn seen(pid: i32) -> Id {
        Id::of(pid).unwrap_or(Id { pid, start: 0 })
    }

    /// This process.
    pub fn own() -> Id {
        Id::seen(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Holds the process; `None` when it has ended.
    pub fn hold(self) -> Option<Held> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Read after it is held: if the time is right now, it is the process that is held.
        let held = Held(fd);
        (stat_field(self.pid, 22)? == self.start && held.is_alive()).then_some(held)
    }
}

impl Held {
    /// A child of this process, or this process itself: its number cannot have been given away.
    pub fn child(pid: i32) -> Option<Held> {
        Some(Held(
            pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?,
        ))
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        !self.wait(Duration::ZERO)
    }

    /// Waits until it has ended; false when it has not within `limit`.
    pub fn wait(&self, limit: Duration) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let end = std::time::Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let left =
                PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
            let mut set = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut set, left) {
                Ok(0) if std::time::Instant::now() >= end => return false,
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Sends a signal; false when it has ended or belongs to somebody else.
    pub fn signal(&self, signal: Signal) -> bool {
        self.try_signal(signal).is_ok()
    }

    /// The same, with the cause of a refusal.
    ///
    /// # Errors
    /// `ESRCH` when it has ended, `EPERM` when it is somebody else's, `ENOSYS` where a filter hides the call and the number
    /// cannot be told either.
    pub fn try_signal(&self, signal: Signal) -> std::io::Result<()> {
        use rustix::io::Errno;
        match pidfd_send_signal(&self.0, signal) {
            // A filter around us may know of no pidfds (`seccomp(2)`; those of older container runtimes do not).
            Err(Errno::NOSYS) => {
                let pid = self.number().and_then(Pid::from_raw).ok_or(Errno::NOSYS)?;
                Ok(rustix::process::kill_process(pid, signal)?)
            }
            other => Ok(other?),
        }
    }

    /// Its number, while it has not ended: until its parent has collected it nobody else can have that. `None` where
    /// `/proc/self/fdinfo` cannot be read.
    pub fn number(&self) -> Option<i32> {
        use std::os::fd::AsRawFd as _;
        let path = format!("/proc/self/fdinfo/{}", self.0.as_raw_fd());
        let text = std::fs::read_to_string(path).ok()?;
        let pid = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
        pid.trim()
            .parse()
            .ok()
            .filter(|pid| *pid > 0 && self.is_alive())
    }
}

impl From<OwnedFd> for Held {
    /// Of a process descriptor that somebody has handed over.
    fn from(pidfd: OwnedFd) -> Held {
        Held(pidfd)
    }
}

impl From<Held> for OwnedFd {
    fn from(held: Held) -> OwnedFd {
        held.0
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A number of `/proc/PID/stat`, by its number in `proc_pid_stat(5)` (from 4 on).
pub fn stat_field(pid: i32, field: usize) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(field.checked_sub(3)?)?
        .parse()
        .ok()
}

/// What differs after each start of the machine.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_known_by_its_start() {
        let own = Id::own();
        assert!(own.hold().is_some());
        let other = Id {
            start: own.start + 1,
            ..own
        };
        assert!(other.hold().is_none());
    }

    #[test]
    fn held_process_has_its_number_until_it_ends() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let held = Held::child(pid).unwrap();
        assert_eq!(held.number(), Some(pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(held.number(), None);
        assert!(!held.signal(Signal::TERM));
    }
}
