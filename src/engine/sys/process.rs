//! Processes: how they begin, what they are called, with whom they end.

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::unistd::{ForkResult, Pid};

use crate::proc::Held;
use crate::threads;

/// Which side of a fork we are.
pub enum Fork {
    /// The caller, with the child's id.
    Parent(Pid),
    /// The new process.
    Child,
}

/// `fork(2)` of a process with one thread.
///
/// # Errors
/// `EAGAIN` at a process limit.
pub fn fork() -> Result<Fork> {
    // SAFETY: the process has one thread here (threads start only in the image server's worker, after its
    // last fork), so no lock can be held for ever in the child.
    match unsafe { nix::unistd::fork() }
        .map_err(|e| threads::refused("cannot create a process (fork)", &e.into()))?
    {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// Whether this process has one thread, as the calls for user namespaces ask (`setns(2)`); `true` where nobody can tell. A
/// thread that has ended counts for a while. See [`crate::engine::aside`].
pub fn has_one_thread() -> bool {
    std::fs::read_dir("/proc/self/task").map_or(true, |threads| threads.count() == 1)
}

/// `fork(2)` of a process with threads, of which the child has only the calling one.
///
/// # Errors
/// `EAGAIN` at a process limit.
pub fn fork_beside_threads() -> Result<Fork> {
    // SAFETY: the C library keeps its own locks (memory, threads) usable in the child. Of ours, the caller's child
    // touches none that another thread may have held: the image server's new keeper opens everything anew.
    match unsafe { nix::unistd::fork() }
        .map_err(|e| threads::refused("cannot create a process (fork)", &e.into()))?
    {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// Whose child a new process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// Its creator's.
    Own,
    /// Its creator's parent's (`CLONE_PARENT`).
    Sibling,
}

/// `fork` whose child is process 1 of a new pid namespace (`clone(2)`, `pid_namespaces(7)`).
///
/// # Errors
/// `ENOSPC` or `EPERM` where pid namespaces are limited.
pub fn fork_into_pid_namespace(parent: Parent) -> Result<Fork> {
    let flags = match parent {
        Parent::Own => libc::CLONE_NEWPID | libc::SIGCHLD,
        Parent::Sibling => libc::CLONE_NEWPID | libc::CLONE_PARENT,
    };
    // SAFETY: as for fork: one thread, no stack is passed, so the child goes on with a copy of this one.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags as libc::c_ulong, 0, 0, 0, 0) };
    match pid {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent(Pid::from_raw(
            i32::try_from(pid).context("a process id")?,
        ))),
        _ => Err(threads::refused(
            "cannot create a process in a new pid namespace (clone)",
            &io::Error::last_os_error(),
        )),
    }
}

/// This process dies by `SIGKILL` when its parent ends (`PR_SET_PDEATHSIG`), also when that has happened already.
pub fn die_with(parent: Option<&Held>) {
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    if parent.is_some_and(|parent| !parent.is_alive()) {
        exit_now(255);
    }
}

/// A helper program dies by `SIGTERM` when this thread ends, and begins with ordinary signals.
pub fn end_with_us(command: &mut Command) {
    // SAFETY: between fork and execve only system calls are made, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
                .map_err(Into::into)
        });
    }
}

/// Ends the process at once, running nothing of the parent's.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: _exit never returns and runs no code of ours.
    unsafe { libc::_exit(status.into()) }
}

/// The words of the command line, from `main`'s own parameters.
#[allow(clippy::not_unsafe_ptr_arg_deref)] // only `main` has such pointers to give
pub fn arguments(argc: i32, argv: *const *const libc::c_char) -> Vec<OsString> {
    (0..usize::try_from(argc).unwrap_or(0))
        // SAFETY: argv holds argc pointers to C strings for the life of the process (execve(2)).
        .map(|i| OsString::from_vec(unsafe { CStr::from_ptr(*argv.add(i)) }.to_bytes().to_vec()))
        .collect()
}

/// Overwrites the command line that `ps` shows: a server must not look like the program of the user that
/// happened to start it, or `pkill -f` of that program would hit the server. The environment goes too: it may hold
/// secrets of a program that ended long ago. Best effort.
pub fn set_title(title: &str) {
    // The areas lie between fields 48 and 49, 50 and 51 of /proc/self/stat (proc(5)): arg_start, arg_end, env_start,
    // env_end.
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return;
    };
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    let number = |field: usize| fields.get(field - 3).and_then(|f| f.parse::<usize>().ok());
    let (Some(start), Some(end)) = (number(48), number(49)) else {
        return;
    };
    if start == 0 || end <= start || end - start > 4 << 20 {
        return;
    }
    let len = end - start;
    let text = &title.as_bytes()[..title.len().min(len - 1)];
    // SAFETY: the kernel put the arguments there, the area is writable stack of this process, and nobody reads
    // it any more: the words were copied at the start.
    unsafe {
        let area = std::ptr::with_exposed_provenance_mut::<u8>(start);
        std::ptr::write_bytes(area, 0, len);
        std::ptr::copy_nonoverlapping(text.as_ptr(), area, text.len());
    }
    if let (Some(start), Some(end)) = (number(50), number(51))
        && start != 0
        && start < end
    {
        // SAFETY: as above; the C library's pointers into this area lead to empty strings from now on.
        unsafe {
            let area = std::ptr::with_exposed_provenance_mut::<u8>(start);
            std::ptr::write_bytes(area, 0, end - start);
        }
    }
    set_name(title.split(' ').next().unwrap_or("capsid"));
}

/// Sets the short name of this process (`/proc/PID/comm`), of which the kernel keeps 15 bytes.
pub fn set_name(name: &str) {
    let _ = rustix::thread::set_name(&CString::new(name).unwrap_or_default());
}

/// A new anonymous session keyring, so that the caller's keys are out of reach. Where the user has as many keys as may be
/// (`keyrings(7)`: 200), the caller's stays.
pub fn new_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is passed. Kernels without keys say ENOSYS.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
}
