//! The helper that the Prolog leaves behind: it goes into the job as soon as Slurm has made a place for it, and becomes the
//! job's supervisor there. Before that nothing of the user's runs.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};

use super::{Declaration, Job, as_user, readable, steps, trouble};
use crate::engine::sys::{self, Fork};
use crate::host::User;
use crate::job::adopt::{self, Cgroups, Step, Tracking};
use crate::job::conf::Conf;
use crate::job::socket_name;
use crate::job::supervisor::nodes;
use crate::proc;

/// How long the helper waits for the extern step.
const ADOPTION: Duration = Duration::from_secs(10);
/// How long it then waits for the batch script, where one can be: Slurm sends it when the Prologs of all nodes have ended.
const BATCH: Duration = Duration::from_secs(30);
/// Between two looks, at first.
const PAUSE: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Makes the socket of a job's supervisor in the job's directory, which nobody but root can enter yet. Requests queue there
/// until the supervisor begins.
pub(super) fn claim(directory: &OwnedFd, job: Job) -> Result<OwnedFd> {
    let what = "cannot create the supervisor's socket";
    let (uid, gid) = (Uid::from_raw(job.uid), Gid::from_raw(job.gid));
    rustix::fs::mkdirat(directory, "capsid", Mode::RWXU).context(what)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = rustix::fs::openat(directory, "capsid", flags, Mode::empty()).context(what)?;
    rustix::fs::fchmod(&inner, Mode::RWXU).context(what)?;
    let name = socket_name(&job.id.to_string());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).context(what)?;
    let path = format!("/proc/self/fd/{}/{name}", inner.as_raw_fd());
    let address = UnixAddr::new(path.as_str()).context(what)?;
    bind(fd.as_raw_fd(), &address).context(what)?;
    rustix::fs::chownat(
        &inner,
        &name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .context(what)?;
    rustix::fs::fchown(&inner, Some(uid), Some(gid)).context(what)?;
    // Who connects sees the user who listens (SO_PEERCRED), and talks to its own only.
    nix::unistd::seteuid(job.uid.into()).context(what)?;
    let listens = listen(&fd, Backlog::new(1024).unwrap_or(Backlog::MAXCONN));
    nix::unistd::seteuid(0.into()).context("cannot become root again")?;
    listens.context(what)?;
    Ok(fd)
}

/// Leaves a process behind that goes into the job and becomes its supervisor, which serves the socket. Gives who it is, to
/// `known` as soon as there is somebody.
pub(super) fn leave_helper(
    job: Job,
    user: &User,
    socket: OwnedFd,
    declaration: &Declaration,
    known: impl FnOnce(Option<proc::Id>) -> Result<()>,
) -> Result<()> {
    let (alive, sign) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context("cannot create a pipe")?;
    match sys::fork()? {
        Fork::Parent(pid) => {
            drop((sign, socket));
            let known = known(proc::Id::of(pid.as_raw()));
            // Before it has a session of its own, the end of the Prolog would kill it.
            if known.is_ok() && readable(&alive, Duration::from_secs(2)) {
                return Ok(());
            }
            // One that nobody knows of would never be ended.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            known?;
            bail!("the helper of job {} does not start", job.id)
        }
        Fork::Child => {
            let become_supervisor = || -> Result<std::convert::Infallible> {
                let mut keep = [socket.as_raw_fd(), sign.as_raw_fd()];
                keep.sort_unstable();
                sys::close_all_but(&keep);
                detach()?;
                sys::set_title(&format!("capsid-adopt: {}", job.id));
                drop(sign);
                let conf = Conf::read(declaration.slurm_conf.as_deref()).unwrap_or_else(|error| {
                    trouble(&format!(
                        "Slurm's configuration is not read, and taken for the usual: {error:#}"
                    ));
                    Conf::default()
                });
                // Outside of the job it would have no limits.
                if adopt::tracking(&conf) == Tracking::Cgroup {
                    let (node, nodes) = nodes(&|name| declaration.var(name));
                    let cgroups = Cgroups {
                        job: job.id,
                        uid: job.uid,
                        node: Some(&node),
                    };
                    enter(&cgroups, nodes.first() == Some(&node))?;
                }
                steps::enter_mounts(job.id, &conf)?;
                try_setpriv(job)?;
                sys::inherit(&socket)?;
                let mut command = as_user(job);
                command
                    .args(["job", "supervise", "--socket"])
                    .arg(socket.as_raw_fd().to_string())
                    .envs(declaration.env.iter().map(|(k, v)| (k, v)))
                    .env("SLURM_JOB_ID", job.id.to_string())
                    .env("HOME", &user.home)
                    .env("USER", &user.name)
                    .env("LOGNAME", &user.name)
                    .env("SHELL", &user.shell);
                Err(command.exec()).context("cannot execute setpriv")
            };
            let Err(error) = become_supervisor();
            trouble(&format!("job {}: it has no supervisor: {error:#}", job.id));
            sys::exit_now(1)
        }
    }
}

/// Sees that a program can become the user here: what goes wrong later nobody hears.
fn try_setpriv(job: Job) -> Result<()> {
    let tried = as_user(job)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("cannot execute setpriv")?;
    if !tried.status.success() {
        let said = String::from_utf8_lossy(&tried.stderr);
        bail!(
            "setpriv, which executes capsid as the user, ends with {}: {}",
            tried.status,
            said.trim()
        );
    }
    Ok(())
}

/// Leaves the Prolog, and what slurmd has for itself only.
pub(super) fn detach() -> Result<()> {
    nix::unistd::setsid().context("cannot create a session")?;
    SigSet::empty()
        .thread_set_mask()
        .context("cannot unblock signals")?;
    sys::default_signals();
    // Slurm reads our output to its end.
    sys::detach_standard_descriptors();
    rustix::process::umask(Mode::from_bits_truncate(0o077));
    // slurmd may be kept from being killed for memory, or come before others: a user's processes are not.
    let score =
        std::fs::read_to_string("/proc/self/oom_score_adj").context("/proc/self/oom_score_adj")?;
    if score.starts_with('-') {
        std::fs::write("/proc/self/oom_score_adj", "0").context("/proc/self/oom_score_adj")?;
    }
    if rustix::process::getpriority_process(None).is_ok_and(|nice| nice < 0) {
        rustix::process::setpriority_process(None, 0).context("setpriority")?;
    }
    rustix::process::chdir("/").context("cannot enter /")
}

/// Goes into the extern step, and on into the batch script's where that is about to begin: Slurm ends the first at once at
/// `scancel` and the time limit, the other only when services had time to stop.
///
/// With `PrologFlags=RunInJob` it is where the extern step's `slurmstepd` is: in the job and its limits. Where there is no batch
/// script it stays there or, with cgroup version 2, where that is a part of the extern step, goes beside the steps: what is in
/// no step Slurm leaves alone, so that the Epilog can let services stop in order.
///
/// The batch script runs on the first node of a job.
fn enter(cgroups: &Cgroups<'_>, is_first_node: bool) -> Result<()> {
    let begins_in_job = adopt::are_in_job(cgroups.job).context("our cgroups cannot be read")?;
    if !begins_in_job {
        let doors = look(ADOPTION, || match cgroups.doors(Step::Extern) {
            Ok(doors) if doors.is_empty() => None,
            doors => Some(doors),
        });
        let doors = doors.transpose().context("its cgroups cannot be read")?;
        let Some(doors) = doors else {
            bail!(
                "no extern step within {} s, so its services cannot be part of it: is PrologFlags=Contain set?",
                ADOPTION.as_secs()
            );
        };
        go_in(&doors)?;
    }
    let is_in_batch = is_first_node && enter_batch(cgroups);
    if begins_in_job && !is_in_batch {
        let doors = cgroups.doors_beside_steps();
        go_in(&doors.context("cannot make a cgroup in the job")?)?;
    }
    Ok(())
}

/// Gives whether it has. Another step shows that there is no batch script, or that it has begun.
fn enter_batch(cgroups: &Cgroups<'_>) -> bool {
    let mut trouble_so_far = None;
    let entered = look(BATCH, || {
        let enter = || -> Result<Option<bool>> {
            let others = cgroups.has_other_step()?;
            let doors = cgroups.doors(Step::Batch)?;
            go_in(&doors)?;
            Ok((others || !doors.is_empty()).then_some(!doors.is_empty()))
        };
        match enter() {
            Ok(entered) => entered,
            // With cgroup version 2 Slurm moves the script from one to another at first, and removes the former.
            Err(error) => {
                trouble_so_far = Some(error);
                None
            }
        }
    });
    if let (None, Some(error)) = (entered, &trouble_so_far) {
        trouble(&format!(
            "job {}: {error:#}; it stays where it is in the job",
            cgroups.job
        ));
    }
    entered == Some(true)
}

/// Looks for something, more and more rarely, for as long as `limit`.
fn look<T>(limit: Duration, mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let begin = Instant::now();
    loop {
        if let Some(found) = found() {
            return Some(found);
        }
        let waited = begin.elapsed();
        if waited >= limit {
            return None;
        }
        std::thread::sleep((waited / 16).clamp(PAUSE, PAUSE_MAX));
    }
}

fn go_in(doors: &[PathBuf]) -> Result<()> {
    for door in doors {
        std::fs::write(door, std::process::id().to_string())
            .with_context(|| format!("it cannot be adopted: {}", door.display()))?;
    }
    Ok(())
}
