//! The helper that the Prolog leaves behind: it puts the supervisor into the job as soon as Slurm has made a place for it.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::{Job, detach, readable, trouble};
use crate::engine::sys::{self, Fork};
use crate::job::adopt::{self, Step, Tracking};
use crate::proc::Held;

/// How long the helper waits for the extern step.
const ADOPTION: Duration = Duration::from_secs(10);
/// How long it then waits for the batch script; services that the job declares start after that.
const BATCH: Duration = Duration::from_secs(1);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Leaves a process behind that puts the supervisor into the job, and then tells it so.
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

/// Puts the supervisor into the extern step, and on into the batch script's when that is about to begin: Slurm ends the
/// first at once at `scancel` and the time limit, the other only when services had time to stop.
///
/// With `PrologFlags=RunInJob` it is where the extern step's `slurmstepd` is: in the job and its limits, and not in what
/// Slurm kills before the Epilog. There it stays, so that the Epilog can let services stop in order.
fn enter(job: Job, supervisor: &Held, pid: i32) -> Result<()> {
    if adopt::is_in_job(pid, job.id) {
        enter_batch(job, supervisor, pid);
        return Ok(());
    }
    let end = Instant::now() + ADOPTION;
    // The job may be over already.
    while supervisor.is_alive() {
        let doors = adopt::doors(job.id, job.uid, Step::Extern);
        if !doors.is_empty() {
            go_in(&doors, supervisor, pid)?;
            enter_batch(job, supervisor, pid);
            return Ok(());
        }
        if Instant::now() >= end {
            bail!(
                "no extern step within {} s, so its services cannot be part of it: is PrologFlags=Contain set?",
                ADOPTION.as_secs()
            );
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// A step of `srun`'s shows that there is no batch script on this node, or that it has begun.
fn enter_batch(job: Job, supervisor: &Held, pid: i32) {
    let end = Instant::now() + BATCH;
    while supervisor.is_alive() && Instant::now() < end {
        let others = adopt::has_numbered_step(job.id, job.uid);
        let doors = adopt::doors(job.id, job.uid, Step::Batch);
        if !doors.is_empty() {
            if let Err(error) = go_in(&doors, supervisor, pid) {
                trouble(&format!(
                    "job {}: {error:#}; it stays where it is in the job",
                    job.id
                ));
            }
            return;
        }
        if others {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

fn go_in(doors: &[PathBuf], supervisor: &Held, pid: i32) -> Result<()> {
    for door in doors {
        // It is held: its number is its own as long as it lives.
        if supervisor.is_alive() {
            std::fs::write(door, pid.to_string())
                .with_context(|| format!("cannot adopt its supervisor: {}", door.display()))?;
        }
    }
    Ok(())
}
