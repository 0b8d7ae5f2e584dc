//! Ending what is left of jobs that this node does not know any more: of those whose Epilog did not run, or could not end
//! everything. It is nobody's way: a process of its own does it, behind the Prolog and the Epilog of other jobs, and each
//! job in another.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use super::memory::{Memory, Top};
use super::{adoption, end_with, steps, trouble};
use crate::engine::sys::{self, Fork};
use crate::job::adopt;

/// How long ending one job may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Ends what is left of jobs that this node does not know any more.
///
/// # Errors
/// When the directory cannot be trusted or read, or nobody knows which jobs run.
pub fn sweep() -> Result<()> {
    match Top::open(false)? {
        Some(top) => sweep_others(&top, 0),
        None => Ok(()),
    }
}

/// Leaves a process behind that does so, if there is anything to do: from the Prolog or the Epilog of a job, which `memory`
/// tells of as long as anything does.
pub(super) fn leave_behind(top: &Top, own: u32, memory: Option<&Memory>) {
    match over(top, own) {
        Ok(over) if over.is_empty() => return,
        Ok(_) => {}
        Err(error) => return trouble(&format!("jobs that are over cannot be ended: {error:#}")),
    }
    match sys::fork() {
        Ok(Fork::Parent(_)) => {}
        Ok(Fork::Child) => {
            let swept = adoption::detach()
                .and_then(|()| leave(own, memory).context("cannot leave the job's cgroup"))
                .and_then(|out| if out { sweep_others(top, own) } else { Ok(()) });
            if let Err(error) = swept {
                trouble(&format!("jobs that are over cannot be ended: {error:#}"));
            }
            sys::exit_now(0)
        }
        Err(error) => trouble(&format!("jobs that are over cannot be ended: {error:#}")),
    }
}

/// With `PrologFlags=RunInJob` we are in a job that is to end, or to be limited. True outside of it; where nobody
/// remembers it any more, the one who forgot it has swept.
fn leave(own: u32, memory: Option<&Memory>) -> std::io::Result<bool> {
    if !adopt::are_in_job(own)? {
        return Ok(true);
    }
    match memory {
        Some(memory) => memory.cgroups().leave().map(|()| true),
        None => Ok(false),
    }
}

/// The jobs that there is something of, and that are over.
fn over(top: &Top, own: u32) -> Result<Vec<u32>> {
    let mut ids = top.jobs().context("cannot read /run/capsid")?;
    ids.retain(|id| *id != own);
    if ids.is_empty() {
        return Ok(ids);
    }
    // Who does not know which jobs run must not end any.
    let known = steps::known_jobs().context("cannot tell which jobs run here")?;
    ids.retain(|id| !known.contains(id) && top.memory(*id).is_none_or(|m| !m.is_young()));
    Ok(ids)
}

fn sweep_others(top: &Top, own: u32) -> Result<()> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let alone = rustix::fs::openat(&top.0, "sweep.lock", flags, Mode::RUSR | Mode::WUSR)
        .context("cannot make /run/capsid/sweep.lock")?;
    if flock(&alone, FlockOperation::NonBlockingLockExclusive).is_err() {
        // Somebody is at it.
        return Ok(());
    }
    for id in over(top, own)? {
        // Who begins or ends it now needs no sweep.
        let Ok(Some(lock)) = top.lock(id, Duration::ZERO) else {
            continue;
        };
        // It may have begun since.
        if !over(top, own)?.contains(&id) {
            continue;
        }
        match end_with(top, id, lock, LIMIT) {
            Ok(lock) => top.unlock(id, lock),
            Err(error) => trouble(&format!("job {id}, which is over: {error:#}")),
        }
    }
    Ok(())
}
