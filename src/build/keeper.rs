//! The processes of a build, so that nothing outlives it.
//!
//! ```text
//!  capsid build        hands signals on, waits, tells the error
//!    └─ keeper         root of the user namespace; removes what is left, whoever dies
//!         ├─ fetcher   downloads; processes are numbered as outside, so that its claims in the cache mean something there
//!         └─ worker    process 1 of a pid namespace: bootstraps, runs the sections, packs
//! ```
//!
//! The keeper survives the worker and the caller: it can remove files of subordinate ids, which the caller cannot. With the
//! worker the kernel ends everything that sections have left running (`pid_namespaces(7)`).

use std::io::{PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::engine::sys::{self, Fork, LimitsFail};
use crate::engine::userns;
use crate::engine::wait::{self, End};
use crate::plan::IdMap;
use crate::{exit, say};

/// Longest error text that a process hands to its parent, in bytes: it must fit into a pipe.
const MAX_TEXT: usize = 32 << 10;

/// Does `before` and then `work`, each in a process of its own, as root of a user namespace with these ids. Whatever
/// happens, `leftovers` are removed afterwards.
///
/// # Errors
/// Those of the work, or when the namespace cannot be made.
pub fn run(
    ids: &IdMap,
    leftovers: &[PathBuf],
    before: impl FnOnce() -> Result<u8>,
    work: impl FnOnce() -> Result<u8>,
) -> Result<u8> {
    let removal = Leftovers {
        ids,
        paths: leftovers,
    };
    let (alive, here) = std::io::pipe().context("cannot create a pipe")?;
    let (mut told, tell) = std::io::pipe().context("cannot create a pipe")?;
    let mask = wait::block()?;
    let forked = sys::fork().inspect_err(|_| {
        let _ = mask.thread_set_mask();
    });
    let keeper = match forked? {
        Fork::Parent(keeper) => keeper,
        Fork::Child => {
            drop((here, told));
            let end = keep(ids, &mask, &alive, tell, before, work);
            remove(leftovers);
            sys::exit_now(wait::end_like(end))
        }
    };
    drop((alive, tell));
    let end = wait::until_exit(keeper, false, sys::pending_signals());
    let mut text = String::new();
    // Also waits for a worker whose keeper was killed.
    let read = told
        .by_ref()
        .take(MAX_TEXT as u64)
        .read_to_string(&mut text);
    drop(here);
    mask.thread_set_mask()
        .context("cannot restore the signal mask")?;
    read.context("cannot hear from the build")?;
    match end? {
        End::Exited(_) if !text.is_empty() => bail!("{text}"),
        End::Exited(status) => Ok(status),
        End::Signalled(Signal::SIGXFSZ) => bail!("{FILE_LIMIT}: nothing of the build is left"),
        end @ End::Signalled(signal) => {
            drop(removal); // this process may end by the same signal
            say::error(format_args!(
                "the build was ended by {signal}: nothing of it is left"
            ));
            Ok(wait::end_like(end))
        }
    }
}

/// What a build must not leave; whichever way it ends, it is removed with this value.
struct Leftovers<'a> {
    ids: &'a IdMap,
    paths: &'a [PathBuf],
}

impl Leftovers<'_> {
    fn any(&self) -> bool {
        let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
        self.paths.iter().any(is_there)
    }
}

impl Drop for Leftovers<'_> {
    fn drop(&mut self) {
        if !self.any() {
            return;
        }
        let swept = in_child(|| {
            userns::create(self.ids, CloneFlags::empty())?;
            remove(self.paths);
            Ok(())
        });
        // At the limit of processes: what is the caller's own needs no namespace.
        if let Err(error) = swept {
            remove(self.paths);
            if self.any() {
                say::warn(format_args!("cannot remove what the build left: {error:#}"));
            }
        }
    }
}

/// What a write beyond `RLIMIT_FSIZE` means.
const FILE_LIMIT: &str = "a file has reached the limit of the size of files (ulimit -f)";

/// The keeper.
fn keep(
    ids: &IdMap,
    mask: &SigSet,
    alive: &PipeReader,
    tell: PipeWriter,
    before: impl FnOnce() -> Result<u8>,
    work: impl FnOnce() -> Result<u8>,
) -> End {
    let failed = End::Exited(exit::FATAL);
    let note = |error: anyhow::Error| {
        let _ = (&tell).write_all(format!("{error:#}").as_bytes());
        failed
    };
    if let Err(error) = userns::create(ids, CloneFlags::CLONE_NEWNS) {
        return note(error);
    }
    let start = |fork: Result<Fork>, work: &mut dyn FnMut() -> Result<u8>| match fork {
        Ok(Fork::Parent(child)) => watch(child, alive),
        Ok(Fork::Child) => {
            sys::die_with(None);
            let _ = mask.thread_set_mask();
            match tell.try_clone() {
                Ok(tell) => end(tell, work),
                Err(_) => sys::exit_now(exit::FATAL),
            }
        }
        Err(error) => note(error),
    };
    let (mut before, mut work) = (Some(before), Some(work));
    let fetched = start(sys::fork(), &mut || {
        before.take().map_or(Ok(0), |before| before())
    });
    if fetched != End::Exited(exit::OK) {
        return fetched;
    }
    start(sys::fork_into_pid_namespace(sys::Parent::Own), &mut || {
        prepare_worker()?;
        work.take().map_or(Ok(0), |work| work())
    })
}

/// Waits for a child, and ends it when a signal says so or the caller is gone.
fn watch(worker: Pid, alive: &PipeReader) -> End {
    let mut set = SigSet::empty();
    let ending = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ];
    for signal in ending.into_iter().chain([Signal::SIGCHLD]) {
        set.add(signal);
    }
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok();
    let mut killed_by = None;
    loop {
        match waitpid(worker, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, status)) => {
                let own = End::Exited(status.to_le_bytes()[0]);
                return killed_by.map_or(own, End::Signalled);
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                return End::Signalled(killed_by.unwrap_or(signal));
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return End::Exited(exit::FATAL),
        }
        let mut fds = vec![PollFd::new(alive.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            signals
                .as_ref()
                .map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)),
        );
        let _ = poll(&mut fds, PollTimeout::from(1000u16));
        let orphaned = fds[0].any().unwrap_or(false);
        let read = signals
            .as_ref()
            .and_then(|s| s.read_signal().ok().flatten());
        let read = read.and_then(|info| Signal::try_from(info.ssi_signo.cast_signed()).ok());
        let wanted = read.filter(|signal| ending.contains(signal));
        let wanted = wanted.or(orphaned.then_some(Signal::SIGKILL));
        if let Some(signal) = wanted {
            killed_by.get_or_insert(signal);
            let _ = kill(worker, Signal::SIGKILL);
            if orphaned {
                let _ = waitpid(worker, None);
                return End::Signalled(Signal::SIGKILL);
            }
        }
    }
}

/// The worker's own mounts, and a procfs that shows its own processes.
fn prepare_worker() -> Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context("cannot make the mounts private")?;
    // Inside another container there may be none to be had. The caller's then stays, which shows this process as well;
    // sections, to which it would show all the others, get none and say why.
    match sys::new_filesystem("proc", &[]) {
        Ok(proc) => {
            let place = sys::open_path(Path::new("/proc"))?;
            sys::attach(proc.as_fd(), place.as_fd()).context("cannot mount /proc")?;
        }
        Err(error) => say::verbose(format_args!(
            "the build keeps the caller's /proc: {error:#}"
        )),
    }
    // Nor with what the caller has open, which no key of a kept step knows.
    sys::close_on_exec()?;
    // Sections have no business with the caller's input: a loop of the shell that reads lines builds for each of them.
    let null = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(null).context("cannot set standard input")
}

/// Ends this process with what `work` gives; its error goes to whoever listens.
fn end(mut tell: PipeWriter, work: impl FnOnce() -> Result<u8>) -> ! {
    let done = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(anyhow!("this is a bug in capsid")));
    let status = done.unwrap_or_else(|error| {
        let text = format!("{error:#}");
        let end = text.floor_char_boundary(MAX_TEXT);
        let _ = tell.write_all(&text.as_bytes()[..end]);
        exit::FATAL
    });
    sys::exit_now(status)
}

/// Does `work` in a child process, which may start threads or change its namespaces. What it makes is whole only when
/// this gives `Ok`: the child did everything and ended by itself.
///
/// # Errors
/// Those of the work; saying what ended the child when it was not the work itself.
pub fn in_child(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let end = child(|| {
        let _limits = LimitsFail::begin();
        work().map(|()| exit::OK)
    })?;
    match end {
        End::Exited(exit::OK) => Ok(()),
        End::Exited(status) => bail!("the process that did it ended with status {status}"),
        End::Signalled(Signal::SIGXFSZ) => bail!("{FILE_LIMIT}"),
        End::Signalled(Signal::SIGKILL) => bail!(
            "the process that did it was killed (SIGKILL): was there too little memory? (dmesg; the limit of the job)"
        ),
        End::Signalled(signal) => bail!("the process that did it was ended by {signal}"),
    }
}

/// Runs `work` in a child process, which becomes a program, and gives the program's status.
///
/// # Errors
/// Those of the work, when no program was run.
pub fn status_of(work: impl FnOnce() -> Result<u8>) -> Result<u8> {
    Ok(match child(work)? {
        End::Exited(status) => status,
        End::Signalled(signal) => exit::signalled(signal as i32),
    })
}

/// How a child process ended that said nothing.
fn child(work: impl FnOnce() -> Result<u8>) -> Result<End> {
    let (mut told, tell) = std::io::pipe().context("cannot create a pipe")?;
    let child = match sys::fork()? {
        Fork::Child => {
            drop(told);
            end(tell, work)
        }
        Fork::Parent(child) => child,
    };
    drop(tell);
    let mut text = Vec::new();
    let read = told
        .by_ref()
        .take(MAX_TEXT as u64)
        .read_to_end(&mut text)
        .context("cannot hear from a child process");
    let end = loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, status)) => break End::Exited(status.to_le_bytes()[0]),
            Ok(WaitStatus::Signaled(_, signal, _)) => break End::Signalled(signal),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for a child process"),
        }
    };
    read?;
    match text.is_empty() {
        true => Ok(end),
        false => bail!("{}", String::from_utf8_lossy(&text)),
    }
}

/// Removes files and directories, whatever their permissions.
fn remove(paths: &[PathBuf]) {
    for path in paths {
        let removed = match path.symlink_metadata() {
            Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
            Ok(_) => std::fs::remove_file(path),
            Err(_) => continue,
        };
        if let Err(error) = removed {
            say::warn(format_args!("cannot remove {}: {error}", path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_gives_its_status_or_an_error() {
        assert_eq!(status_of(|| Ok(7)).unwrap(), 7);
        let killed = status_of(|| kill_self(Signal::SIGTERM).map(|()| 0));
        assert_eq!(killed.unwrap(), 143);
        let error = status_of(|| bail!("cannot do it")).unwrap_err();
        assert_eq!(error.to_string(), "cannot do it");
    }

    #[test]
    fn work_is_done_only_when_its_child_says_so() {
        in_child(|| Ok(())).unwrap();
        let error = in_child(|| bail!("cannot do it")).unwrap_err();
        assert_eq!(error.to_string(), "cannot do it");
        let table = [
            (Signal::SIGKILL, "was killed (SIGKILL)"),
            (Signal::SIGTERM, "was ended by SIGTERM"),
            (Signal::SIGHUP, "was ended by SIGHUP"),
        ];
        for (signal, wanted) in table {
            let error = in_child(|| kill_self(signal)).unwrap_err().to_string();
            assert!(error.contains(wanted), "{signal}: {error}");
        }
        let left = in_child(|| sys::exit_now(3)).unwrap_err();
        assert!(left.to_string().contains("status 3"), "{left}");
    }

    fn kill_self(signal: Signal) -> Result<()> {
        nix::sys::signal::raise(signal)?;
        bail!("it goes on")
    }
}
