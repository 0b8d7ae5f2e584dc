//! Stepping into the container of a running instance.
//!
//! The namespaces are joined directly: no process of ours runs the program for the caller. Their descriptors come from the
//! instance's monitor, since process 1 lets nobody open them.
//! The program is a child of the waiting caller, in the caller's session and cgroup; what it leaves behind is adopted by
//! process 1 of the container and stays.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use super::process::{self, Next};
use super::sys::{self, Fork};
use super::{userns, wait};
use crate::plan::{Join, Namespaces};
use crate::proc::Held;

/// What leads into a container.
#[derive(Debug)]
pub enum Way {
    /// Descriptors of its namespaces, that of users first.
    Namespaces(Vec<OwnedFd>),
    /// Its process 1, which lets its namespaces be opened: an instance of an older version.
    Process(Held),
}

/// Runs the program in the container and waits for it. `Ok` is the status to end with.
///
/// # Errors
/// When the instance has ended, or the program cannot be started.
pub fn run(join: &Join, way: Way) -> Result<u8> {
    let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
    enter(join, way)?;
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
                    process::restrict(&join.ids, &join.process)?;
                    mask.thread_set_mask()
                        .context("cannot restore the signal mask")?;
                    super::never(process::exec(&program))
                }
            }
        }
    }
}

fn enter(join: &Join, way: Way) -> Result<()> {
    const WHAT: &str = "cannot join the instance's namespaces (setns)";
    sys::forbid_tracing();
    let target = match way {
        Way::Namespaces(namespaces) => {
            let mut namespaces = namespaces.iter();
            if let Some(users) = namespaces.next() {
                userns::join(users).context(WHAT)?;
            }
            for namespace in namespaces {
                setns(namespace, CloneFlags::empty()).context(WHAT)?;
            }
            return Ok(());
        }
        Way::Process(target) => target,
    };
    let Namespaces { ipc, net, uts, .. } = join.namespaces;
    let mut flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    flags.set(CloneFlags::CLONE_NEWIPC, ipc);
    flags.set(CloneFlags::CLONE_NEWNET, net);
    flags.set(CloneFlags::CLONE_NEWUTS, uts);
    setns(&target, flags).context(WHAT)
}
