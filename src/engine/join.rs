//! Stepping into the container of a running instance.
//!
//! The namespaces are joined directly, by the instance's process 1: no process of ours runs the program for the caller.
//! The program is a child of the waiting caller, in the caller's session and cgroup; what it leaves behind is adopted by
//! process 1 of the container and stays.

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use super::process::{self, Next};
use super::sys::{self, Fork};
use super::wait;
use crate::plan::{Join, Namespaces};
use crate::proc::Held;

/// Runs the program in the container and waits for it. `Ok` is the status to end with.
///
/// # Errors
/// When the instance has ended, or the program cannot be started.
pub fn run(join: &Join) -> Result<u8> {
    let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
    enter(join)?;
    let mask = wait::block()?;
    match sys::fork()? {
        Fork::Parent(child) => {
            let early = sys::pending_signals();
            Ok(wait::end_like(wait::until_exit(child, false, early)?))
        }
        Fork::Child => {
            sys::die_with(own.as_ref());
            let cwd = process::enter_directory(&join.process)?;
            match process::resolve(&join.process, &join.environment, &cwd)? {
                Next::End(status) => Ok(status),
                Next::Run(program) => {
                    process::restrict(&join.ids, &join.process, join.process.close_descriptors)?;
                    mask.thread_set_mask()
                        .context("cannot restore the signal mask")?;
                    super::never(process::exec(&program))
                }
            }
        }
    }
}

fn enter(join: &Join) -> Result<()> {
    let target = join
        .target
        .hold()
        .ok_or_else(|| anyhow!("the instance has just ended"))?;
    let Namespaces { ipc, net, uts, .. } = join.namespaces;
    let mut flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    flags.set(CloneFlags::CLONE_NEWIPC, ipc);
    flags.set(CloneFlags::CLONE_NEWNET, net);
    flags.set(CloneFlags::CLONE_NEWUTS, uts);
    sys::forbid_tracing();
    setns(&target, flags).context("cannot join the instance's namespaces (setns)")
}
