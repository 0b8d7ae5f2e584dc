//! Root's part, for the Prolog and the Epilog: as little as possible. It takes numbers only; it runs, reads and enters
//! nothing of the user's; what has to be done in the user's directory is done by a process that has become the user; every
//! wait is bounded.

mod adoption;
mod apart;
mod memory;
mod remains;
mod removal;
mod steps;
mod sweep;

use std::ffi::OsString;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use self::apart::{Outcome, become_user, within};
use self::memory::{Lock, Memory, Top};
pub use self::sweep::sweep;
use super::supervisor::nodes;
use super::{adopt, stop_all};
use crate::host::{self, JOBS};
use crate::instance::Registry;
use crate::proc;

/// How long a supervisor may take to stop its instances when the Epilog asks.
const STOPPING: Duration = Duration::from_secs(6);
/// How long somebody else may be at work on the same job.
const LOCKED: Duration = Duration::from_secs(8);
/// How long the user's own tidying may take.
const TIDYING: Duration = Duration::from_secs(5);
/// How long removing the directory may take.
const REMOVING: Duration = Duration::from_secs(8);
/// How long all of it may take: less than `epilog.sh` waits.
const ENDING: Duration = Duration::from_secs(15);
/// Programs that are executed, with no others.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A job on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its number.
    pub id: u32,
    /// The user.
    pub uid: u32,
    /// The user's group.
    pub gid: u32,
}

/// What the Prolog gives beside the numbers: data for the supervisor, not looked at here.
pub struct Declaration {
    /// Variables of the supervisor's environment.
    pub env: Vec<(OsString, OsString)>,
    /// Slurm's configuration, root's file.
    pub slurm_conf: Option<PathBuf>,
}

impl Declaration {
    fn var(&self, name: &str) -> Option<OsString> {
        let found = self.env.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone())
    }
}

/// Makes the job's directory with the socket of its supervisor, and leaves a helper that goes into the job and becomes that, as
/// the user.
///
/// # Errors
/// When it cannot be done. Then the job goes on without.
pub fn begin(job: Job, declaration: &Declaration) -> Result<()> {
    if job.uid == 0 {
        // Root has no services, and nobody has asked for any.
        return Ok(());
    }
    if job.gid == 0 {
        bail!("its user is in root's group: there are no services for that");
    }
    let user = host::known_user(job.uid)
        .with_context(|| format!("user {} of job {} is not known here", job.uid, job.id))?;
    let top = Top::open(true)?.context("there is no /run")?;
    let begun = begin_in(&top, job, &user, declaration);
    sweep::leave_behind(&top, job.id, top.memory(job.id).as_ref());
    begun
}

fn begin_in(top: &Top, job: Job, user: &host::User, declaration: &Declaration) -> Result<()> {
    let lock = top
        .lock(job.id, LOCKED)?
        .with_context(|| format!("job {} is still being ended here", job.id))?;
    let _lock = end_with(top, job.id, lock, ENDING)?;
    let mut memory = Memory {
        job,
        boot: proc::boot_id(),
        supervisor: None,
        since_s: crate::instance::now_s(),
        since_boot_s: Some(proc::since_boot_s()),
        node: Some(nodes(&|name| declaration.var(name)).0),
    };
    // Before there is anything: whoever sweeps at the same time sees that the job is young.
    top.remember(&memory)?;
    let name = format!("job-{}", job.id);
    rustix::fs::mkdirat(&top.0, &name, Mode::RWXU)
        .with_context(|| format!("cannot make {JOBS}/{name}"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory =
        rustix::fs::openat(&top.0, &name, flags, Mode::empty()).context("the job's directory")?;
    let socket = adoption::claim(&directory, job)?;
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(job.uid),
        rustix::fs::Gid::from_raw(job.gid),
    );
    rustix::fs::fchown(&directory, Some(uid), Some(gid)).context("the job's directory")?;
    rustix::fs::fchmod(&directory, Mode::RWXU).context("the job's directory")?;
    adoption::leave_helper(job, user, socket, declaration, |id| {
        memory.supervisor = id;
        top.remember(&memory)
    })
}

/// This program, as the job's user, with an environment of its own.
fn as_user(job: Job) -> Command {
    let setpriv = ["/usr/bin/setpriv", "/bin/setpriv"]
        .into_iter()
        .find(|p| Path::new(p).exists());
    let own = std::fs::read_link("/proc/self/exe")
        .unwrap_or_else(|_| PathBuf::from("/usr/local/bin/capsid"));
    let mut command = Command::new(setpriv.unwrap_or("/usr/bin/setpriv"));
    command
        .args([
            "--reuid",
            &job.uid.to_string(),
            "--regid",
            &job.gid.to_string(),
        ])
        // The bounding set stays: newuidmap needs it.
        .args(["--init-groups", "--inh-caps=-all", "--"])
        .arg(own)
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .current_dir("/");
    command
}

fn readable(fd: &impl AsFd, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(nix::Error::EINTR) => {}
            other => return other.is_ok_and(|n| n > 0),
        }
    }
}

/// Ends what is left of a job, and removes its directory. Can be repeated.
///
/// # Errors
/// When something of it stays.
pub fn end(id: u32) -> Result<()> {
    let Some(top) = Top::open(false)? else {
        return Ok(());
    };
    let memory = top.memory(id);
    let done = top
        .lock(id, LOCKED)
        .and_then(|lock| {
            lock.with_context(|| format!("job {id} is still being begun or ended here"))
        })
        .and_then(|lock| end_with(&top, id, lock, ENDING))
        .map(|lock| top.unlock(id, lock));
    sweep::leave_behind(&top, id, memory.as_ref());
    done
}

/// Ends what is left of a job, in a process of its own: one that hangs keeps the job's lock, so that there are no two.
fn end_with(top: &Top, id: u32, lock: Lock, limit: Duration) -> Result<Lock> {
    match within(limit, || end_in(top, id))? {
        Outcome::Ended(Ok(())) => Ok(lock),
        Outcome::Ended(Err(error)) => {
            top.unlock(id, lock);
            Err(error)
        }
        Outcome::Stuck => bail!(
            "ending what is left of it takes more than {} s: something of it hangs in the kernel",
            limit.as_secs()
        ),
    }
}

/// What fails of it does not keep the rest from being done.
fn end_in(top: &Top, id: u32) -> Result<()> {
    let name = format!("job-{id}");
    let mut failures = Vec::new();
    let mut note = |done: Result<()>| failures.extend(done.err().map(|error| format!("{error:#}")));
    let memory = top.memory(id);
    // First of all: whoever looks into a file system that does not answer hangs.
    note(removal::detach(top, &name));
    if let Some(memory) = &memory {
        stop_supervisor(memory);
        note(remains::kill(memory).context("cannot kill what is left in its cgroups"));
        note(tidy_as_user(memory.job));
        // One of the user's can have mounted something meanwhile.
        note(removal::detach(top, &name));
    }
    note(removal::remove(top, &name, Instant::now() + REMOVING));
    let mut is_over = true;
    if let Some(memory) = &memory {
        match adopt::are_in_job(id).and_then(|inside| remains::remove_cgroups(memory, inside)) {
            Ok(removed) => is_over = removed,
            Err(error) => note(Err(error).context("cannot remove its cgroups")),
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    if is_over {
        top.forget(id);
    }
    Ok(())
}

fn stop_supervisor(memory: &Memory) {
    let supervisor = memory
        .supervisor
        .filter(|_| memory.boot == proc::boot_id())
        .and_then(proc::Id::hold);
    if let Some(supervisor) = supervisor {
        supervisor.signal(Signal::TERM);
        supervisor.signal(Signal::CONT);
        if !supervisor.wait(STOPPING) {
            supervisor.signal(Signal::KILL);
            supervisor.wait(Duration::from_secs(2));
        }
    }
}

/// Ends, as the user, the instances that records in the job's directory name: where Slurm has no cgroups nothing else does.
fn tidy_as_user(job: Job) -> Result<()> {
    let tidy = || {
        become_user(job)?;
        if let Some(registry) = Registry::of_job(job.uid, job.id) {
            stop_all(&registry, Duration::ZERO);
        }
        Ok(())
    };
    match within(TIDYING, tidy)? {
        Outcome::Ended(done) => done,
        Outcome::Stuck => bail!("ending its instances as the user took too long"),
    }
}

/// What went wrong, for the administrator: to the system's log, and as the last lines of `/run/capsid/trouble`.
pub fn trouble(text: &str) {
    let text = crate::say::plain(text).replace('\n', " ");
    if let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() {
        let _ = socket.set_nonblocking(true);
        // Facility daemon, severity warning.
        let _ = socket.send_to(format!("<28>capsid: {text}").as_bytes(), "/dev/log");
    }
    let Ok(Some(top)) = Top::open(false) else {
        return;
    };
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if let Ok(fd) = rustix::fs::openat(&top.0, "trouble", flags, Mode::from_bits_truncate(0o644)) {
        let mut file = std::fs::File::from(fd);
        if file.metadata().is_ok_and(|m| m.len() > 64 << 10) {
            let _ = file.set_len(0);
        }
        let _ = writeln!(file, "{} {text}", crate::instance::now_s());
    }
}
