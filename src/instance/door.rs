//! Where an instance is found: a socket that its monitor listens on. Who asks gets the record, and descriptors of the
//! monitor, of process 1 and of its namespaces.
//!
//! The socket is abstract (unix(7)), no file: no logout, no clean-up of old files, no other `$XDG_RUNTIME_DIR`, `$TMPDIR` or
//! view of the file tree takes it away, and it ends with the monitor, so that nothing stale is ever seen. And it is the monitor
//! that tells, which cannot be wrong about its own children, whatever /proc shows (`hidepid=`, proc(5)).
//! Its name is made of the user's id, the scope of names (see [`scope_of_login`]) and the instance's name, the latter two as digests,
//! since everybody can read the names of sockets. It is seen wherever the monitor's network is.
//!
//! Anybody there can connect to it, or bind the name first, also a program in a container, which has the same user id. So each
//! side asks the kernel for the other's user namespace before it says or believes anything ([`wire::is_fellow`]). A descriptor
//! of a namespace would prove nothing: who is shown one can show it to the next.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
};
use rustix::process::{PidfdFlags, Signal, pidfd_open};

use super::{Instance, MAX_RECORD, Record};
use crate::digest::Digest;
use crate::engine::{sys, wire};
use crate::host::Host;
use crate::proc::Held;

/// How all names begin. What is behind it, and what is said, must stay as it is: monitors outlive updates of the program. A
/// message may grow at its end.
const PREFIX: &str = "capsid-instance";
/// The first byte of a request, and of an answer.
const HELLO: u8 = 1;
/// In the second byte of an answer: the descriptors of process 1 and of its namespaces come with it.
const RUNS: u8 = 1;

/// Names that are tried: somebody else may have bound the first ones.
const TRIES: u32 = 16;
/// How long a bound socket may take to listen.
const BINDING: Duration = Duration::from_millis(100);
/// After so long the monitor is woken: somebody may have stopped it.
const DOZE: Duration = Duration::from_millis(200);
/// Callers that have not said yet what they want, at most.
const CALLERS: usize = 64;

/// What shares its names inside of a Slurm job: the job on this node. Several nodes of a cluster may share one kernel.
pub fn scope_of_job(job: &str) -> String {
    format!("job-{job}.{}", node())
}

/// Whether a scope is a job's on this node.
pub fn is_job_here(scope: &str) -> bool {
    scope.starts_with("job-") && scope.ends_with(&format!(".{}", node()))
}

fn node() -> String {
    digits(super::logs::node_name().as_bytes(), 8)
}

/// What shares its names outside of jobs: each configuration directory.
pub fn scope_of_login(host: &Host) -> String {
    let Some(named) = super::logs::configured(host) else {
        return "usual".into();
    };
    let usual = host.user.home.join(".apptainer");
    let named = resolved(&named);
    // The home, whose server may not answer, is looked at only when it may be meant.
    if named.file_name() == usual.file_name() && named == resolved(&usual) {
        return "usual".into();
    }
    digits(named.as_os_str().as_encoded_bytes(), 16)
}

/// The path without links, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let mut missing = PathBuf::new();
    for ancestor in path.ancestors() {
        if let Ok(there) = std::fs::canonicalize(ancestor) {
            return crate::host::normalise(&there.join(missing));
        }
        missing = Path::new(ancestor.file_name().unwrap_or_default()).join(&missing);
    }
    path.to_owned()
}

fn digits(bytes: &[u8], count: usize) -> String {
    Digest::of(bytes).hex().chars().take(count).collect()
}

/// The first part of the names of all instances of a user.
fn stem(uid: u32) -> String {
    format!("{PREFIX}/{uid}/")
}

fn address(uid: u32, scope: &str, name: &str, nth: u32) -> String {
    format!("{}{scope}/{}/{nth}", stem(uid), digits(name.as_bytes(), 32))
}

fn packet_socket(name: &str) -> Result<(OwnedFd, UnixAddr)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
        .context("cannot create a socket")?;
    let address = UnixAddr::new_abstract(name.as_bytes()).context("the socket's address")?;
    Ok((fd, address))
}

/// Who has a name.
pub enum Name {
    /// We have it now.
    Ours(Door),
    /// Another process of this user does, which has been asked.
    Taken(Told),
}

/// The monitor's end.
pub struct Door {
    listener: OwnedFd,
    /// Who has connected, and not said yet what for.
    callers: Vec<OwnedFd>,
}

impl Door {
    /// Binds the name of an instance, unless one of ours has it.
    ///
    /// # Errors
    /// When no socket can be made, or other users have all names.
    pub fn claim(uid: u32, scope: &str, name: &str, patience: Duration) -> Result<Name> {
        for nth in 0..TRIES {
            let address = address(uid, scope, name, nth);
            let end = Instant::now() + BINDING;
            loop {
                let (listener, at) = packet_socket(&address)?;
                match bind(listener.as_raw_fd(), &at) {
                    Ok(()) => {
                        sys::allow_tracing(); // as in `Line::ask`
                        let backlog = Backlog::new(4095).unwrap_or(Backlog::MAXCONN);
                        listen(&listener, backlog).context("cannot listen on a socket")?;
                        let callers = Vec::new();
                        return Ok(Name::Ours(Door { listener, callers }));
                    }
                    Err(nix::Error::EADDRINUSE) => {}
                    Err(error) => return Err(error).context("cannot bind a socket"),
                }
                match Line::to(&address) {
                    Ok(line) => {
                        line.ask();
                        match line.hear(Instant::now() + patience) {
                            Told::Stranger => break,
                            told => return Ok(Name::Taken(told)),
                        }
                    }
                    // It has just ended, or begins to listen in a moment.
                    Err(Nobody::Silent) if Instant::now() < end => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(_) => break,
                }
            }
        }
        bail!(
            "somebody else on this machine has bound the sockets that instance {name} would be found at (@{}0 and so on in \
             /proc/net/unix): use another name, and tell the administrator",
            address(uid, scope, name, 0).trim_end_matches('0')
        )
    }

    /// What to wait for.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.listener)
            .chain(&self.callers)
            .map(|fd| fd.as_fd())
    }

    /// Lets callers in, and answers those that have asked. Never waits for one.
    pub fn serve(&mut self, record: &Record, inside: Option<(&Held, &[OwnedFd])>) {
        self.callers.retain(|caller| {
            match receive_now(caller) {
                Err(nix::Error::EAGAIN) => return true,
                Ok((request, _)) if request.first() == Some(&HELLO) && wire::is_fellow(caller) => {
                    // One that has gone needs no answer; what else goes wrong looks like an end.
                    let _ = answer(caller, record, inside);
                }
                _ => {}
            }
            false
        });
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        while let Ok(caller) = accept4(self.listener.as_raw_fd(), flags) {
            let caller = sys::own(caller);
            if wire::is_own_peer(&caller) {
                self.callers.push(caller);
            }
        }
        let surplus = self.callers.len().saturating_sub(CALLERS);
        self.callers.drain(..surplus);
    }
}

fn receive_now(caller: &OwnedFd) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    wire::receive(caller.as_fd())
}

fn answer(caller: &OwnedFd, record: &Record, inside: Option<(&Held, &[OwnedFd])>) -> Result<()> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let text = serde_json::to_vec(record).context("an instance's record")?;
    let mut file: std::fs::File = rustix::fs::memfd_create("instance", flags)?.into();
    file.write_all(&text)?;
    let monitor = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let mut fds = vec![file.as_raw_fd(), monitor.as_raw_fd()];
    if let Some((init, namespaces)) = inside {
        fds.push(init.as_fd().as_raw_fd());
        fds.extend(namespaces.iter().map(|fd| fd.as_raw_fd()));
    }
    let message = [HELLO, if inside.is_some() { RUNS } else { 0 }];
    wire::send(caller.as_fd(), &message, &fds).context("who asked has gone")
}

/// Why there is no line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nobody {
    /// Nobody listens.
    Silent,
    /// Somebody else does.
    Stranger,
}

/// What comes of asking.
pub enum Told {
    /// This instance.
    Instance(Box<Instance>),
    /// It ended meanwhile.
    Ended,
    /// No answer in time: it begins, or hangs.
    Nothing(Silent),
    /// A process that says something else: none of our monitors.
    Stranger,
}

/// A monitor that does not answer.
pub struct Silent {
    /// Its number here.
    pub pid: i32,
    /// The same, held.
    pub monitor: Option<Held>,
}

/// A connection to a monitor.
pub struct Line {
    socket: OwnedFd,
    /// Its number here.
    pid: i32,
}

impl Line {
    fn to(name: &str) -> Result<Line, Nobody> {
        let (socket, address) = packet_socket(name).map_err(|_| Nobody::Silent)?;
        connect(socket.as_raw_fd(), &address).map_err(|_| Nobody::Silent)?;
        let peer = nix::sys::socket::getsockopt(
            &socket.as_fd(),
            nix::sys::socket::sockopt::PeerCredentials,
        );
        match peer {
            // It looks at us as we do at it.
            Ok(peer) if wire::is_fellow(&socket) => Ok(Line {
                socket,
                pid: peer.pid(),
            }),
            _ => Err(Nobody::Stranger),
        }
    }

    /// Those whose socket has a name of this instance.
    pub fn to_instance(uid: u32, scope: &str, name: &str) -> impl Iterator<Item = Line> + use<> {
        let first = address(uid, scope, name, 0);
        let stem = first.trim_end_matches('0').to_owned();
        (0..TRIES).filter_map(move |nth| Line::to(&format!("{stem}{nth}")).ok())
    }

    /// Those of all instances of a user whose scope is wanted.
    ///
    /// # Errors
    /// When the names of sockets cannot be read.
    pub fn to_all(uid: u32, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Line>> {
        let path = "/proc/self/net/unix";
        let text = std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
        let stem = stem(uid);
        let names: BTreeSet<String> = String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| listening(line)?.strip_prefix(&stem).map(str::to_owned))
            .collect();
        let names = names.iter().filter(|name| {
            let (scope, _) = name.split_once('/').unwrap_or_default();
            wanted(scope)
        });
        Ok(names
            .filter_map(|name| Line::to(&format!("{stem}{name}")).ok())
            .collect())
    }

    /// Says what we want to know.
    pub fn ask(&self) {
        // When the monitor has just gone, the answer is an end.
        sys::allow_tracing(); // by which it sees our namespace, also where the program may not be read
        let _ = wire::send(self.socket.as_fd(), &[HELLO], &[]);
    }

    /// Waits for the answer.
    pub fn hear(self, deadline: Instant) -> Told {
        if !self.is_ready(deadline.min(Instant::now() + DOZE)) {
            let held = Held::child(self.pid);
            // It has the number as long as it has not hung up.
            let monitor = held.filter(|_| !self.is_ready(Instant::now()));
            if let Some(monitor) = &monitor {
                monitor.signal(Signal::CONT);
            }
            if !self.is_ready(deadline) {
                let pid = self.pid;
                return Told::Nothing(Silent { pid, monitor });
            }
        }
        match wire::receive(self.socket.as_fd()) {
            Ok((said, fds)) if said.first() == Some(&HELLO) => {
                match instance(said.get(1).copied().unwrap_or(0), fds) {
                    Some(instance) => Told::Instance(Box::new(instance)),
                    None => Told::Stranger,
                }
            }
            Ok((said, _)) if !said.is_empty() => Told::Stranger,
            _ => Told::Ended,
        }
    }

    fn is_ready(&self, deadline: Instant) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left =
                PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
            let mut set = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut set, left) {
                Ok(0) if Instant::now() >= deadline => return false,
                Ok(0) | Err(nix::Error::EINTR) => {}
                _ => return true,
            }
        }
    }
}

/// What an answer brings: the record, the monitor, and process 1 with its namespaces.
fn instance(flags: u8, fds: Vec<OwnedFd>) -> Option<Instance> {
    let mut fds = fds.into_iter();
    let file = std::fs::File::from(fds.next()?);
    let len = file.metadata().ok()?.len();
    if len > MAX_RECORD {
        return None;
    }
    let mut text = vec![0; usize::try_from(len).ok()?];
    file.read_exact_at(&mut text, 0).ok()?;
    let record = serde_json::from_slice(&text).ok()?;
    let monitor = Some(Held::from(fds.next()?));
    let init = if flags & RUNS != 0 {
        Some(Held::from(fds.next()?))
    } else {
        None
    };
    Some(Instance {
        record,
        monitor,
        init,
        namespaces: fds.collect(),
    })
}

/// The abstract name in a line of `/proc/net/unix`, of a socket that is listened on (`__SO_ACCEPTCON` in the fourth field).
fn listening(line: &str) -> Option<&str> {
    let mut fields = line.split_ascii_whitespace();
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    let name = fields.nth(3)?.strip_prefix('@')?;
    (flags & 0x1_0000 != 0).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_told_from_others() {
        let line = |flags: &str, name: &str| {
            format!("0000000000000000: 00000002 00000000 {flags} 0005 01 12345 {name}")
        };
        let name = "capsid-instance/1000/usual/abc/0";
        assert_eq!(
            listening(&line("00010000", &format!("@{name}"))),
            Some(name)
        );
        assert_eq!(listening(&line("00000000", &format!("@{name}"))), None);
        assert_eq!(listening(&line("00010000", "/run/x")), None);
        assert_eq!(listening(&line("00010000", "")), None);
        assert_eq!(
            listening("Num       RefCount Protocol Flags    Type St Inode Path"),
            None
        );
    }

    #[test]
    fn names_of_sockets_fit_whatever_the_instance_is_called() {
        let scope = scope_of_job(&"9".repeat(20));
        let longest = address(u32::MAX, &scope, &"x".repeat(255), TRIES - 1);
        assert!(UnixAddr::new_abstract(longest.as_bytes()).is_ok());
    }
}
