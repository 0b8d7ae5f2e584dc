//! The monitor as a process of its own, and what it tells the one who starts it.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};

use super::Registry;
use super::monitor::{Spec, run};
use crate::engine::sys::{self, Fork};
use crate::engine::wire;

/// What the monitor tells the one who starts the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The script has been executed.
    Started,
    /// The service is ready.
    Ready,
    /// There is no such instance, for this reason.
    Failed(String),
}

/// Where the monitor's messages arrive.
pub struct Report(OwnedFd);

impl Report {
    /// Waits for the next message; `None` at the deadline.
    ///
    /// # Errors
    /// When the monitor has been killed.
    pub fn next(&self, deadline: Option<Instant>) -> Result<Option<Message>> {
        loop {
            let left = deadline.map_or(PollTimeout::NONE, |at| {
                let left = at.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
            });
            let mut set = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut set, left) {
                Ok(0) if deadline.is_some_and(|at| at <= Instant::now()) => return Ok(None),
                Ok(0) | Err(nix::Error::EINTR) => continue,
                _ => {}
            }
            let (bytes, _) =
                wire::receive(self.0.as_fd()).context("cannot hear from the instance's monitor")?;
            if bytes.is_empty() {
                bail!("the instance's monitor was killed");
            }
            return Ok(Some(
                serde_json::from_slice(&bytes).context("what the instance's monitor says")?,
            ));
        }
    }
}

/// Starts the monitor of an instance as a process of its own.
///
/// # Errors
/// When no process can be made. What goes wrong later is a [`Message::Failed`].
pub fn start(registry: &Registry, spec: Spec) -> Result<Report> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context("cannot create a socket")?;
    match sys::fork()? {
        Fork::Parent(_) => Ok(Report(ours)),
        Fork::Child => {
            drop(ours);
            let mut keep = vec![theirs.as_raw_fd()];
            keep.extend(registry.directory().map(|d| d.fd().as_raw_fd()));
            keep.extend(spec.life.iter().map(|fd| fd.as_raw_fd()));
            keep.sort_unstable();
            sys::close_all_but(&keep);
            let tell = |message: &Message| {
                // The one who started us may be gone; the instance stays.
                let text = serde_json::to_vec(message).unwrap_or_default();
                let _ = wire::send(theirs.as_fd(), &text, &[]);
            };
            if let Err(error) = detach().and_then(|()| run(registry, spec, &tell).map(drop)) {
                tell(&Message::Failed(format!("{error:#}")));
            }
            sys::exit_now(0)
        }
    }
}

fn detach() -> Result<()> {
    nix::unistd::setsid().context("cannot create a session")?;
    sys::ignore_signals(&[
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]);
    Ok(())
}
