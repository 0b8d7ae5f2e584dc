//! Processes by number and start time, so that a number that was given to another process since is not mistaken; and what
//! the kernel says of processes, mounts and cgroups.
//!
//! Users have a part in much of that: names of processes, of cgroups, of mount points. So it is bytes, here and everywhere;
//! and what cannot be read is an error, not an empty table.
//!
//! Source: `proc_pid_stat(5)` field 22, `pidfd_open(2)`, `proc_pid_status(5)`.

pub mod cgroups;
pub mod mounts;

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
    field_of(&std::fs::read(format!("/proc/{pid}/stat")).ok()?, field)
}

/// The name in front of the fields ends at the last parenthesis: it may hold blanks, parentheses, and half a letter.
fn field_of(stat: &[u8], field: usize) -> Option<u64> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let fields = std::str::from_utf8(&stat[end + 1..]).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    fields.nth(field.checked_sub(3)?)?.parse().ok()
}

/// The name of a process (`proc_pid_comm(5)`), which it may have given itself.
///
/// # Errors
/// As `read(2)`; `NotFound` when it has ended.
pub fn comm(pid: i32) -> std::io::Result<Vec<u8>> {
    let mut name = std::fs::read(format!("/proc/{pid}/comm")).map_err(ended)?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    Ok(name)
}

/// The user who started a process: its real id, which programs with the setuid bit keep, and which only root's processes
/// have as 0.
///
/// # Errors
/// As `read(2)`; `NotFound` when it has ended.
pub fn real_uid(pid: i32) -> std::io::Result<u32> {
    real_uid_in(&std::fs::read(format!("/proc/{pid}/status")).map_err(ended)?)
        .ok_or_else(|| std::io::Error::other(format!("/proc/{pid}/status names no user")))
}

fn real_uid_in(status: &[u8]) -> Option<u32> {
    let mut lines = status.split(|b| *b == b'\n');
    let ids = lines.find_map(|line| line.strip_prefix(b"Uid:"))?;
    let ids = std::str::from_utf8(ids).ok()?;
    ids.split_ascii_whitespace().next()?.parse().ok()
}

/// A process that ends while its files are read is one that is not there.
fn ended(error: std::io::Error) -> std::io::Error {
    match error.raw_os_error() {
        Some(libc::ESRCH) => std::io::ErrorKind::NotFound.into(),
        _ => error,
    }
}

/// Seconds since the machine started, sleep included: nobody sets this clock (`sysinfo(2)`).
pub fn since_boot_s() -> u64 {
    u64::try_from(rustix::system::sysinfo().uptime).unwrap_or(0)
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

    #[test]
    fn names_of_processes_are_bytes() {
        for name in [
            &b"sh"[..],
            b"a b",
            b") 4 5 (",
            b"x) Z 1 (y",
            b"\xff",
            b"m\xc3",
            b"a\nb",
            b"",
        ] {
            let stat = [b"7 (", name, b") S 1 2 3"].concat();
            assert_eq!(field_of(&stat, 4), Some(1), "{name:?}");
            assert_eq!(field_of(&stat, 6), Some(3), "{name:?}");
            let status = [b"Name:\t", name, b"\nUid:\t5\t0\t0\t0\nGid:\t6\n"].concat();
            assert_eq!(real_uid_in(&status), Some(5), "{name:?}");
        }
        assert_eq!(field_of(b"", 22), None);
        assert_eq!(real_uid_in(b"Name:\tUid:\n"), None);
    }
}
