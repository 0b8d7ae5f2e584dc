//! What a command and the supervisor of its job say to each other: one request and one answer over a `SOCK_SEQPACKET`
//! Unix socket.
//!
//! Words and environment may be larger than a packet: they come as a file in memory, with the request's descriptors.

use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::List;

/// Bytes of words and environment at most; the kernel takes no more for a program either.
const MAX: u64 = 8 << 20;

/// Programs of different versions do not talk to each other.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), ".1");

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// How much is said.
    pub level: i8,
    /// Permission bits that new files lack.
    pub umask: u32,
    /// The processors that may be used.
    pub cpus: Vec<usize>,
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
