//! Asking the supervisor of our job.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use rustix::fs::{Mode, OFlags};

use super::message::{self, Answer, Caller, Request, What};
use super::{List, socket_name};
use crate::engine::wire;
use crate::host::Host;
use crate::instance::Registry;
use crate::proc::{self, Held};

/// The supervisor of our job on this node, connected.
pub struct Supervisor {
    socket: OwnedFd,
    job: String,
}

/// Finds the supervisor of our job; `None` outside of jobs, and in jobs that have none.
pub fn find(registry: &Registry) -> Option<Supervisor> {
    let job = registry.job.clone()?;
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .ok()?;
    let address = UnixAddr::new(&registry.directory()?.entry(&socket_name(&job))).ok()?;
    connect(socket.as_raw_fd(), &address).ok()?;
    // Only our own user is listened to, whoever made the socket.
    wire::is_own_peer(&socket).then_some(Supervisor { socket, job })
}

impl Supervisor {
    /// Lets it start an instance (`start` or `run` and the words behind), and gives the status of that.
    ///
    /// # Errors
    /// When it cannot be heard, or refuses.
    pub fn start(&self, host: &Host, words: &[OsString]) -> Result<u8> {
        self.status(
            What::Start(Caller::own(host)),
            &self.descriptors(host, words)?,
        )
    }

    /// Lets it start the services of a file.
    ///
    /// # Errors
    /// As [`Supervisor::start`].
    pub fn services(&self, host: &Host, file: OsString) -> Result<u8> {
        self.status(
            What::Services(Caller::own(host)),
            &self.descriptors(host, &[file])?,
        )
    }

    /// Lets it stop all instances.
    ///
    /// # Errors
    /// As [`Supervisor::start`].
    pub fn stop(&self, patience: std::time::Duration) -> Result<u8> {
        let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self.status(What::Stop(ms), &[])
    }

    /// The services of the job, once they are read.
    ///
    /// # Errors
    /// As [`Supervisor::start`].
    pub fn list(&self) -> Result<List> {
        match self.ask(What::List, &[])? {
            Answer::List(list) => Ok(*list),
            Answer::Failed(text) => bail!("{text}"),
            Answer::Done(_) => bail!("the supervisor of job {} speaks in riddles", self.job),
        }
    }

    fn descriptors(&self, host: &Host, words: &[OsString]) -> Result<Vec<OwnedFd>> {
        let cwd = rustix::fs::open(
            ".",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context("cannot open the working directory")?;
        let copy = |fd: std::os::fd::BorrowedFd| {
            fd.try_clone_to_owned()
                .context("cannot duplicate a descriptor")
        };
        let out = copy(std::io::stdout().as_fd())?;
        let err = copy(std::io::stderr().as_fd())?;
        Ok(vec![message::pack(words, &host.env)?, cwd, out, err])
    }

    fn status(&self, what: What, fds: &[OwnedFd]) -> Result<u8> {
        match self.ask(what, fds)? {
            Answer::Done(status) => Ok(status),
            Answer::Failed(text) => bail!("{text}"),
            Answer::List(_) => bail!("the supervisor of job {} speaks in riddles", self.job),
        }
    }

    fn ask(&self, what: What, fds: &[OwnedFd]) -> Result<Answer> {
        let request = Request {
            version: message::VERSION.into(),
            what,
        };
        let gone = || {
            anyhow!(
                "the supervisor of job {} on this node ended before it answered: is the job ending?",
                self.job
            )
        };
        let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let text = serde_json::to_vec(&request).context("a request")?;
        wire::send(self.socket.as_fd(), &text, &numbers).map_err(|_| gone())?;
        loop {
            match wire::receive(self.socket.as_fd()) {
                Ok((bytes, _)) if bytes.is_empty() => return Err(gone()),
                Ok((bytes, _)) => {
                    return serde_json::from_slice(&bytes).context("what the supervisor says");
                }
                Err(nix::Error::EINTR) => {}
                Err(_) => return Err(gone()),
            }
        }
    }
}

/// The process of Slurm that this one is a descendant of, held: what is started here without a supervisor ends with it,
/// where Slurm would not see to that.
pub fn step_daemon() -> Option<Held> {
    let mut pid = rustix::process::getpid().as_raw_nonzero().get();
    for _ in 0..64 {
        pid = i32::try_from(proc::stat_field(pid, 4)?)
            .ok()
            .filter(|p| *p > 1)?;
        let process = proc::Id::of(pid)?;
        if proc::comm(pid).ok()? == b"slurmstepd" && proc::real_uid(pid).ok()? == 0 {
            return process.hold();
        }
    }
    None
}
