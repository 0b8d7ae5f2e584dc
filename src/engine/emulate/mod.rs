//! Owners for a namespace in which only root exists: without subordinate ids, `apt-get install` works all the same.
//!
//! One id is mapped, so the kernel knows only root and refuses every other owner. Here a *supervisor*, a few threads of
//! the process that waits for the container, is asked by the kernel about the calls that matter (`seccomp_unotify(2)`):
//! `chown` and its kin are recorded, `stat` and its kin report what was recorded, `mknod` of a device leaves a
//! placeholder, `setuid` and its kin change credentials that `getuid` and its kin report and that own new files.
//!
//! ```text
//!  capsid (user namespace of the container, mounts and processes of the host)
//!    ├─ main thread       waits for process 1, hands signals on
//!    ├─ owners ×1…64      answer, with the container's root as their own
//!    ├─ owners-watch      starts more of them when they do not suffice
//!    └─ appinit           process 1 of a pid namespace; installed the filter and sent its descriptor
//!         └─ payload      and all that it starts: the filter is inherited
//! ```
//!
//! It lives outside of the pid namespace, where nobody inside can see or end it. When it dies, process 1 dies by
//! `PR_SET_PDEATHSIG` and the kernel ends the rest. So emulation always comes with a pid namespace.
//!
//! # What a container can make it do
//!
//! The supervisor is root of the container's user namespace, but it sees the host's files and processes. So it acts in the
//! view of who asks and with the rights of who asks, or not at all:
//!
//! - a path is opened once, where the thread that asks would find it ([`view::View`], the only door to files), and what
//!   was opened is changed, or a plain name in it is made;
//! - no link of procfs that means the one who follows it is followed: those paths are left to the kernel;
//! - what is made is made with the thread's capabilities ([`tracee::Rights`]), and not for a thread in a
//!   Landlock domain or in a user namespace further inside;
//! - what was learnt by a thread's number counts when its call still waits afterwards;
//! - the kernel has the word on everything else, and files that exist are opened by the kernel alone.
//!
//! With `--containall`, and in `%post`, a program therefore can do to Capsid and to its user's files this much:
//!
//! | to | it can | because |
//! |---|---|---|
//! | supervisor, image server, connector | nothing: they have no number inside | the pid namespace; `/proc` of its own (`plan::mounts`) |
//! | all of its process group outside | signals by `kill(0, ...)`, as any program of a terminal's job | the group is the caller's, so that Ctrl-C works |
//! | process 1 (`appinit`) | see its name; not trace it, nor open its memory, descriptors, program | `sys::forbid_tracing` before the fork |
//! | sockets of ours | nothing: names in directories that are not mounted, never abstract ones | `engine::server::place`; those made for the container are passed closed (`sys::close_on_exec`) |
//! | descriptors of ours | nothing: all are close-on-exec | `engine::sys` |
//! | the record of owners | what `chown` of its own files does | [`owners`] knows files by what was opened |
//! | the host's files | what was bound, as the caller may | `pivot_root` in `engine::rootfs`, and the rules above |
//!
//! # For builders
//!
//! [`super::run_emulated`] runs a plan whose [`crate::plan::Ownership`] is `Emulated` with a record, and gives the record
//! back: [`Owners::set`] before it for a tree that was unpacked with owners, [`Owners::get`] after it for every file that
//! is packed, `save` and `load` between runs.
//!
//! In a build with subordinate ids the kernel keeps the owners, and only `mknod` of a device is asked about
//! ([`Extent::Devices`]): what it leaves is a whiteout (a character device without a number, which everybody may make) or,
//! for a block device, an empty file.
//!
//! # What is not emulated
//!
//! Permissions, access control lists among them: a process that is emulated as somebody else still can do to files what root in the container can. Programs
//! of another architecture (32-bit) see only root. `/proc/PID/status`, `SO_PEERCRED` and `kill(2)` know only root. Files
//! made through `O_TMPFILE`, by `bind(2)` of a Unix socket, or through a dangling symbolic link are root's until they
//! are given away. A program that joins an instance (`exec instance://NAME`) sees what the kernel knows. A signal whose handler was installed without `SA_RESTART` can end one of the calls above with `EINTR`
//! in the moment before the supervisor takes the question (before Linux 5.19 also later): the kernel lets it. Set-user-id programs give nobody rights (`no_new_privs`). io_uring is refused.

pub mod acl;
pub mod credentials;
pub mod files;
pub mod filter;
pub mod owners;
pub mod supervisor;
pub mod tracee;
pub mod view;

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::fs::{CWD, Mode, OFlags};

use super::{sys, wire};
use crate::say;
pub use owners::{Device, Owner, Owners};
use supervisor::Shared;

/// Whether this machine can emulate owners.
///
/// # Errors
/// Saying what is missing.
pub fn check() -> Result<()> {
    if filter::program().is_none() {
        bail!("owners cannot be emulated on this architecture");
    }
    if !sys::has_notifications() {
        bail!("the kernel cannot ask a supervisor about system calls (CONFIG_SECCOMP_FILTER)");
    }
    Ok(())
}

/// The way between the process that becomes the container and the one that supervises it.
#[derive(Debug)]
pub struct Link {
    supervisor: OwnedFd,
    container: OwnedFd,
    extent: Extent,
    host: supervisor::Host,
}

/// What the supervisor is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All that this module says.
    Owners,
    /// `mknod` of devices by root, where the kernel knows the other owners. Nothing else costs anything.
    Devices,
}

/// A supervisor at work.
#[derive(Debug)]
pub enum Supervisor {
    /// It answers.
    Works(Arc<Shared>),
    /// Nobody asks it; the record as it was.
    Idles(Owners),
}

impl Link {
    /// Before the fork, while the host's `/proc` is in sight.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn new(extent: Extent) -> Result<Link> {
        let (supervisor, container) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .context("cannot create a socket")?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc =
            rustix::fs::openat(CWD, "/proc", flags, Mode::empty()).context("cannot open /proc")?;
        let slack = std::fs::read_to_string("/proc/self/timerslack_ns")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .context("cannot read /proc/self/timerslack_ns")?;
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let userns = sys::namespace(proc.as_fd(), own.cast_unsigned(), "user")
            .context("cannot look at /proc/self/ns/user")?;
        let capabilities = rustix::thread::capabilities(None).context("capget")?;
        let host = supervisor::Host {
            proc,
            slack,
            userns,
            capabilities,
        };
        Ok(Link {
            supervisor,
            container,
            extent,
            host,
        })
    }

    /// What it has open: for a process that closes all else.
    pub fn descriptors(&self) -> [std::os::fd::RawFd; 3] {
        let (supervisor, container) = (&self.supervisor, &self.container);
        [supervisor, container, &self.host.proc].map(|fd| fd.as_raw_fd())
    }

    /// In the container, when its root is entered and the filter that must not be asked about is installed: from now on
    /// the supervisor is asked.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn submit(self) -> Result<()> {
        drop(self.supervisor);
        let program = match self.extent {
            Extent::Owners => filter::program(),
            Extent::Devices => filter::devices(),
        };
        let program = program.context("no filter for this architecture")?;
        let root = sys::open_path(std::path::Path::new("/"))?;
        let listener = match sys::install_listener(&program) {
            Ok(listener) => listener,
            // One process has one supervisor: that of the container around us does it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                say::verbose(format_args!(
                    "owners are emulated by the container around this one"
                ));
                return Ok(());
            }
            Err(error) => return Err(error).context("cannot install the filter (seccomp)"),
        };
        let fds = [listener.as_raw_fd(), root.as_raw_fd()];
        wire::send(self.container.as_fd(), b"owners", &fds)
            .context("the supervisor of owners is gone")
    }

    /// In the parent: waits for the container, and answers from then on.
    ///
    /// # Errors
    /// When it cannot.
    pub fn supervise(self, owners: Owners) -> Result<Supervisor> {
        drop(self.container);
        let (_, fds) = wire::receive(self.supervisor.as_fd())
            .context("cannot hear from the container (recvmsg)")?;
        // Nothing comes when the container could not be made, which it tells itself.
        let Ok([listener, root]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Ok(Supervisor::Idles(owners));
        };
        let shared = Arc::new(Shared::new(owners, self.extent, self.host, listener, root));
        supervisor::start(&shared).context("cannot emulate owners")?;
        Ok(Supervisor::Works(shared))
    }
}

impl Supervisor {
    /// The record, when all processes have ended.
    pub fn finish(self) -> Owners {
        match self {
            Supervisor::Works(shared) => std::mem::take(&mut *shared.owners()),
            Supervisor::Idles(owners) => owners,
        }
    }
}
