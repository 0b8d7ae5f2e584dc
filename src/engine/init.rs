//! `appinit`: process 1 of a container with a pid namespace.
//!
//! It reaps every process that loses its parent, hands signals on, and ends with the program; the kernel then kills
//! what is left in the namespace (`pid_namespaces(7)`). Site tools look for the name `appinit` in process lists.

use std::convert::Infallible;

use anyhow::Result;
use nix::sys::signal::SigSet;

use super::sys::{self, Fork};
use super::{process, wait};
use crate::exit;

/// Starts the program as a child and stays until it has ended. `mask` is the caller's signal mask.
///
/// # Errors
/// When the program cannot be started.
pub fn run(program: &process::Program, mask: &SigSet) -> Result<Infallible> {
    match sys::fork()? {
        Fork::Child => {
            let _ = mask.thread_set_mask();
            process::exec(program)
        }
        Fork::Parent(child) => {
            sys::set_title("appinit");
            let status = match wait::until_exit(child, true)? {
                wait::End::Exited(status) => status,
                wait::End::Signalled(signal) => exit::signalled(signal as i32),
            };
            sys::exit_now(status)
        }
    }
}
