//! What a command and the supervisor of its job say to each other: one request and one answer over a `SOCK_SEQPACKET`
//! Unix socket.
//!
//! Words and environment may be larger than a packet: they come as a file in memory, with the request's descriptors.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};

use super::List;
use crate::host::Host;

/// Bytes of words and environment at most; the kernel takes no more for a program either.
const MAX: u64 = 8 << 20;

/// Programs of different versions do not talk to each other.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), ".2");

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: String,
    /// What.
    pub what: What,
}

/// The kinds of requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// Start an instance: with the descriptors of the words, the working directory, standard output and error.
    Start(Caller),
    /// Start the services of a file, the only word; descriptors as above.
    Services(Caller),
    /// The list of services, once it is read.
    List,
    /// Stop all instances, which may take so many milliseconds.
    Stop(u64),
}

/// What a program inherits beside its environment and descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Caller {
    /// How much is said.
    pub level: i8,
    /// Permission bits that new files lack.
    pub umask: u32,
    /// The processors that may be used; if none is named, those of the supervisor.
    pub cpus: Vec<usize>,
    /// The limits of resources, soft and hard, in the order of [`LIMITS`]; those that are not named are the supervisor's.
    pub limits: Vec<(Option<u64>, Option<u64>)>,
    /// How far it stands back behind others (`nice(2)`).
    pub nice: i32,
    /// Device and inode of `/` and `/tmp`, as it sees them.
    pub places: Vec<(u64, u64)>,
}

/// The resources whose limits are handed on: all that there are (`getrlimit(2)`).
const LIMITS: [Resource; 16] = [
    Resource::As,
    Resource::Core,
    Resource::Cpu,
    Resource::Data,
    Resource::Fsize,
    Resource::Locks,
    Resource::Memlock,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Nofile,
    Resource::Nproc,
    Resource::Rss,
    Resource::Rtprio,
    Resource::Rttime,
    Resource::Sigpending,
    Resource::Stack,
];

/// Where programs look for files that differ between the mount namespaces of a node.
pub fn places() -> Vec<(u64, u64)> {
    let place = |path| rustix::fs::stat(path).map_or((0, 0), |s| (s.st_dev, s.st_ino));
    vec![place("/"), place("/tmp")]
}

impl Caller {
    /// This process.
    pub fn own(host: &Host) -> Caller {
        let set = rustix::thread::sched_getaffinity(None);
        let cpus = set.map(|set| (0..CpuSet::MAX_CPU).filter(|n| set.is_set(*n)).collect());
        let limit = |resource| {
            let limit = rustix::process::getrlimit(resource);
            (limit.current, limit.maximum)
        };
        Caller {
            level: crate::say::level(),
            umask: host.umask,
            cpus: cpus.unwrap_or_default(),
            limits: LIMITS.into_iter().map(limit).collect(),
            nice: rustix::process::getpriority_process(None).unwrap_or_default(),
            places: places(),
        }
    }

    /// Makes this process like the caller, as far as it may: a limit that the supervisor cannot exceed stays.
    pub fn assume(&self) {
        let mut cpus = CpuSet::new();
        for cpu in self.cpus.iter().filter(|n| **n < CpuSet::MAX_CPU) {
            cpus.set(*cpu);
        }
        if !self.cpus.is_empty() {
            // The job may have others by now.
            let _ = rustix::thread::sched_setaffinity(None, &cpus);
        }
        rustix::process::umask(rustix::fs::Mode::from_bits_truncate(self.umask & 0o777));
        let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        for (resource, (soft, hard)) in LIMITS.into_iter().zip(&self.limits) {
            let own = rustix::process::getrlimit(resource);
            let maximum = least(*hard, own.maximum);
            let current = least(*soft, maximum);
            let _ = rustix::process::setrlimit(resource, Rlimit { current, maximum });
        }
        let _ = rustix::process::setpriority_process(None, self.nice);
    }
}

/// The answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done, with this status; what there was to say has been said.
    Done(u8),
    /// It cannot be done.
    Failed(String),
    /// The services.
    List(Box<List>),
}

/// Words and environment as a file in memory.
///
/// # Errors
/// When they are too large, or memory is short.
pub fn pack(words: &[OsString], env: &[(OsString, OsString)]) -> Result<OwnedFd> {
    let mut bytes = format!("{}\0", words.len()).into_bytes();
    for word in words {
        bytes.extend(word.as_bytes());
        bytes.push(0);
    }
    for (key, value) in env {
        bytes.extend(key.as_bytes());
        bytes.push(b'=');
        bytes.extend(value.as_bytes());
        bytes.push(0);
    }
    if bytes.len() as u64 > MAX {
        bail!(
            "the words and the environment of the command are too large ({} bytes)",
            bytes.len()
        );
    }
    let fd = rustix::fs::memfd_create("capsid", rustix::fs::MemfdFlags::CLOEXEC)
        .context("cannot create a file in memory")?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&bytes)
        .context("cannot write a file in memory")?;
    Ok(file.into())
}

/// Words, and the environment.
pub type Words = (Vec<OsString>, Vec<(OsString, OsString)>);

/// The inverse.
///
/// # Errors
/// For what no command of ours sends.
pub fn unpack(fd: OwnedFd) -> Result<Words> {
    let mut file = std::fs::File::from(fd);
    file.rewind().context("words")?;
    let mut bytes = Vec::new();
    file.take(MAX).read_to_end(&mut bytes).context("words")?;
    let mut parts = bytes
        .strip_suffix(b"\0")
        .context("words")?
        .split(|b| *b == 0);
    let count = parts
        .next()
        .and_then(|p| std::str::from_utf8(p).ok()?.parse::<usize>().ok());
    let count = count.context("the number of words")?;
    let words: Vec<OsString> = parts
        .by_ref()
        .take(count)
        .map(|w| OsString::from_vec(w.to_vec()))
        .collect();
    if words.len() != count {
        bail!("too few words");
    }
    let pair = |part: &[u8]| {
        let at = part.iter().position(|b| *b == b'=')?;
        Some((
            OsStr::from_bytes(&part[..at]).to_owned(),
            OsStr::from_bytes(&part[at + 1..]).to_owned(),
        ))
    };
    Ok((words, parts.filter_map(pair).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back() {
        let words = vec![
            "a b".into(),
            OsString::new(),
            OsString::from_vec(vec![0xff]),
        ];
        let env = vec![("K".into(), "v=1\n".into()), ("E".into(), OsString::new())];
        assert_eq!(unpack(pack(&words, &env).unwrap()).unwrap(), (words, env));
        assert_eq!(unpack(pack(&[], &[]).unwrap()).unwrap(), (vec![], vec![]));
    }
}
