//! Work in a process of its own, with a time limit: what hangs in the kernel then hangs alone.

use std::io::{Read as _, Seek as _, Write as _};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::wait::waitpid;
use rustix::process::Signal;

use super::Job;
use crate::engine::sys::{self, Fork};
use crate::proc::Held;

/// How work in a process of its own ended.
pub(super) enum Outcome {
    /// It did, well or not.
    Ended(Result<()>),
    /// It took too long, was told to die, and was not waited for.
    Stuck,
}

/// Does some work in a child, which has so long for it.
pub(super) fn within(limit: Duration, work: impl FnOnce() -> Result<()>) -> Result<Outcome> {
    let said = rustix::fs::memfd_create("capsid", rustix::fs::MemfdFlags::CLOEXEC)
        .context("cannot create a file in memory")?;
    let mut said = std::fs::File::from(said);
    let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
    let pid = match sys::fork()? {
        Fork::Parent(pid) => pid,
        Fork::Child => {
            sys::die_with(own.as_ref());
            let status = match work() {
                Ok(()) => 0,
                Err(error) => {
                    let _ = write!(said, "{error:#}");
                    1
                }
            };
            sys::exit_now(status)
        }
    };
    let held = Held::child(pid.as_raw()).context("cannot hold a child")?;
    if !held.wait(limit) {
        held.signal(Signal::KILL);
        return Ok(Outcome::Stuck);
    }
    let ended = waitpid(pid, None).context("cannot wait for a child")?;
    if ended == nix::sys::wait::WaitStatus::Exited(pid, 0) {
        return Ok(Outcome::Ended(Ok(())));
    }
    let mut text = String::new();
    let read = said
        .rewind()
        .and_then(|()| said.take(64 << 10).read_to_string(&mut text));
    if read.is_err() || text.is_empty() {
        text = format!("a process that did it ended: {ended:?}");
    }
    Ok(Outcome::Ended(Err(anyhow!("{text}"))))
}

/// Makes this process the user's, for good. It executes nothing from then on, so no other process of the user may trace
/// it: it is in no job, and under no limits.
pub(super) fn become_user(job: Job) -> Result<()> {
    let (uid, gid) = (job.uid.into(), job.gid.into());
    nix::unistd::setgroups(&[]).context("cannot leave root's groups")?;
    nix::unistd::setresgid(gid, gid, gid).context("cannot leave root's group")?;
    nix::unistd::setresuid(uid, uid, uid).context("cannot become the job's user")?;
    sys::forbid_tracing();
    Ok(())
}
