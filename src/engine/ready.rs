//! Whether a service is ready, seen from inside its container: a port that answers, a file, a command, `sd_notify(3)`.
//!
//! What its output says is watched by the monitor, who reads it anyway.

use std::ffi::{OsStr, OsString};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, bind, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::unistd::Pid;

use super::process::Program;
use super::sys;
use crate::plan::service::Ready;

/// The first looks follow each other so quickly; later ones twice as slowly each time,
const FIRST_LOOK: Duration = Duration::from_millis(2);
/// but never more slowly than this.
const SLOWEST_LOOK: Duration = Duration::from_millis(100);
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_millis(200);

/// What is still waited for.
pub struct Readiness {
    kind: Kind,
    look: Duration,
    next: Option<Instant>,
}

enum Kind {
    /// Nothing, or not our business.
    Done,
    Port(Vec<SocketAddr>),
    /// With what was there before: inode and change time.
    File(std::path::PathBuf, Option<(u64, i64, i64)>),
    /// With the process that looks right now.
    Command(String, Option<Pid>),
    Notify(OwnedFd, String),
}

impl Readiness {
    /// Notes what is there before the start.
    ///
    /// # Errors
    /// When a port that the service shall open answers already.
    pub fn prepare(ready: &Ready) -> Result<Readiness> {
        let kind = match ready {
            Ready::Started | Ready::Log(_) => Kind::Done,
            Ready::Port(addresses) => {
                if let Some(taken) = addresses.iter().find(|a| answers(a)) {
                    bail!(
                        "port {} is in use by another program already (--ready-port)",
                        taken.port()
                    );
                }
                Kind::Port(addresses.clone())
            }
            Ready::File(path) => Kind::File(path.clone(), identity(path)),
            Ready::Command(command) => Kind::Command(command.clone(), None),
            Ready::Notify => notify_socket()?,
        };
        let looks = matches!(kind, Kind::Port(_) | Kind::File(..) | Kind::Command(..));
        Ok(Readiness {
            kind,
            look: FIRST_LOOK,
            next: looks.then(Instant::now),
        })
    }

    /// The descriptor to keep open.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.socket().map(|fd| fd.as_raw_fd())
    }

    /// Where notifications arrive.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Notify(socket, _) => Some(socket.as_fd()),
            _ => None,
        }
    }

    /// The value of `NOTIFY_SOCKET`.
    pub fn notify_name(&self) -> Option<OsString> {
        match &self.kind {
            Kind::Notify(_, name) => Some(format!("@{name}").into()),
            _ => None,
        }
    }

    /// When to look again.
    pub fn next_look(&self) -> Option<Instant> {
        self.next
    }

    /// Looks, if it is time. True once, when the service is ready.
    pub fn is_reached(&mut self, program: Option<&Program>, null: &OwnedFd) -> bool {
        let due = self.next.is_some_and(|at| at <= Instant::now());
        let reached = match &mut self.kind {
            Kind::Done => false,
            Kind::Notify(socket, _) => says_ready(socket),
            Kind::Port(addresses) => due && addresses.iter().any(answers),
            Kind::File(path, before) => {
                due && identity(path).is_some_and(|now| Some(now) != *before)
            }
            Kind::Command(command, looking) => {
                if due && looking.is_none() {
                    let words = [OsStr::new("/bin/sh"), OsStr::new("-c"), OsStr::new(command)];
                    *looking = program
                        .map(|p| p.sibling("/bin/sh", &words))
                        .and_then(|p| super::init::spawn_quietly(&p, null));
                }
                false
            }
        };
        if reached {
            self.done();
        } else if due {
            self.next = Some(Instant::now() + self.look);
            self.look = (self.look * 2).min(SLOWEST_LOOK);
        }
        reached
    }

    fn done(&mut self) {
        self.next = None;
        // The socket stays: a service may go on talking to it.
        if !matches!(self.kind, Kind::Notify(..)) {
            self.kind = Kind::Done;
        }
    }

    /// A child has ended: perhaps the command that looks. True when that said yes.
    pub fn reaped(&mut self, pid: Pid, success: bool) -> bool {
        let Kind::Command(_, looking) = &mut self.kind else {
            return false;
        };
        if *looking != Some(pid) {
            return false;
        }
        *looking = None;
        if success {
            self.done();
        }
        success
    }
}

fn answers(address: &SocketAddr) -> bool {
    TcpStream::connect_timeout(address, CONNECT).is_ok()
}

fn identity(path: &Path) -> Option<(u64, i64, i64)> {
    let stat = rustix::fs::stat(path).ok()?;
    Some((stat.st_ino, stat.st_ctime, stat.st_ctime_nsec.cast_signed()))
}

/// A socket without a file: its name lives in the network namespace, which the service shares.
fn notify_socket() -> Result<Kind> {
    let name = format!("capsid/{}", uuid::Uuid::new_v4());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)
        .context("cannot create the notification socket")?;
    setsockopt(&fd, sockopt::PassCred, &true).context("the notification socket")?;
    let address = UnixAddr::new_abstract(name.as_bytes()).context("the notification socket")?;
    bind(fd.as_raw_fd(), &address).context("cannot bind the notification socket")?;
    Ok(Kind::Notify(fd, name))
}

/// Reads all notifications. Only those of our own container count: a process outside has no number here.
fn says_ready(socket: &OwnedFd) -> bool {
    let mut ready = false;
    loop {
        let mut bytes = [0; 4096];
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!(libc::ucred, [RawFd; 4]);
        let Ok(message) = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) else {
            return ready;
        };
        let mut inside = false;
        for control in message.cmsgs().into_iter().flatten() {
            match control {
                ControlMessageOwned::ScmCredentials(sender) => inside = sender.pid() > 0,
                // Descriptors that a service may send along (FDSTORE) are not kept.
                ControlMessageOwned::ScmRights(fds) => {
                    fds.into_iter().for_each(|fd| drop(sys::own(fd)))
                }
                _ => {}
            }
        }
        let len = message.bytes;
        ready |= inside
            && bytes[..len]
                .split(|b| *b == b'\n')
                .any(|line| line == b"READY=1");
    }
}
