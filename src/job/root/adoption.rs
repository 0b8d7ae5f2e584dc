//! The helper that the Prolog leaves behind: it puts the supervisor into the job as soon as Slurm has made a place for it.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::{Job, detach, readable, trouble};
use crate::engine::sys::{self, Fork};
use crate::job::adopt::{self, Tracking};
use crate::proc::Held;

/// How long the helper waits for the extern step.
const ADOPTION: Duration = Duration::from_secs(10);

/// Leaves a process behind that puts the supervisor into the job's extern step, and then tells it so.
pub(super) fn leave_helper(
    job: Job,
    supervisor: &Held,
    pid: i32,
    adopt: OwnedFd,
    tracking: Tracking,
) -> Result<()> {
    let (alive, sign) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context("cannot create a pipe")?;
    match sys::fork()? {
        Fork::Parent(_) => {
            drop((sign, adopt));
            // Before it has a session of its own, the end of the Prolog would kill it.
            if !readable(&alive, Duration::from_secs(2)) {
                bail!("the helper of job {} does not start", job.id);
            }
            Ok(())
        }
        Fork::Child => {
            let mut keep = [
                adopt.as_raw_fd(),
                sign.as_raw_fd(),
                supervisor.as_fd().as_raw_fd(),
            ];
            keep.sort_unstable();
            sys::close_all_but(&keep);
            let done = detach().and_then(|()| {
                sys::set_title(&format!("capsid-adopt: {}", job.id));
                drop(sign);
                match tracking {
                    Tracking::None => Ok(()),
                    Tracking::Cgroup => enter(job, supervisor, pid),
                }
            });
            match done {
                Ok(()) => drop(rustix::io::write(&adopt, b"1")),
                Err(error) => {
                    // Outside of the job it would have no limits.
                    supervisor.signal(Signal::KILL);
                    trouble(&format!("job {}: {error:#}", job.id));
                }
            }
            sys::exit_now(0)
        }
    }
}

pub(super) fn enter(job: Job, supervisor: &Held, pid: i32) -> Result<()> {
    let end = Instant::now() + ADOPTION;
    loop {
        let doors = adopt::doors(job.id, job.uid);
        for door in &doors {
            // It is held: its number is its own as long as it lives.
            if !supervisor.is_alive() {
                return Ok(());
            }
            std::fs::write(door, pid.to_string())
                .with_context(|| format!("cannot adopt its supervisor: {}", door.display()))?;
        }
        if !doors.is_empty() {
            return Ok(());
        }
        // The job may be over already.
        if !supervisor.is_alive() {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!(
                "no extern step within {} s, so its services cannot be part of it: is PrologFlags=Contain set?",
                ADOPTION.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
