//! Root's part, for the Prolog and the Epilog: as little as possible. It takes numbers only; it runs, reads and enters
//! nothing of the user's; what has to be done in the user's directory is done by a process that has become the user; every
//! wait is bounded.

mod adoption;
mod memory;
mod removal;
mod steps;

use std::ffi::OsString;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use self::memory::{Memory, Top};
use self::removal::{MAX_ENTRIES, is_empty, remove_tree, unmount_below};
use super::adopt;
use super::supervisor::nodes;
use crate::host::{self, JOBS};
use crate::proc::{self, Held};

/// How long a supervisor may take to stop its instances when the Epilog asks.
const STOPPING: Duration = Duration::from_secs(6);
/// How long somebody else may be at work on the same job.
const LOCKED: Duration = Duration::from_secs(8);
/// How long the user's own tidying may take.
const TIDYING: Duration = Duration::from_secs(5);
/// How long a slurmstepd may take to end after its steps.
const ENDING: Duration = Duration::from_secs(2);
/// Programs that are executed, with no others.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

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
    if job.uid == 0 || job.gid == 0 {
        bail!("job {} is root's: root has no services", job.id);
    }
    let user = host::known_user(job.uid)
        .with_context(|| format!("user {} of job {} is not known here", job.uid, job.id))?;
    let top = Top::open(true)?.context("there is no /run")?;
    sweep_others(&top, job.id);
    let _lock = top
        .lock(job.id, LOCKED)?
        .with_context(|| format!("job {} is still being ended here", job.id))?;
    end_in(&top, job.id)?;
    let mut memory = Memory {
        job,
        boot: proc::boot_id(),
        supervisor: None,
        since_s: crate::instance::now_s(),
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
    adoption::leave_helper(job, &user, socket, declaration, |id| {
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
    let lock = top
        .lock(id, LOCKED)?
        .with_context(|| format!("job {id} is still being begun or ended here"))?;
    let done = end_in(&top, id);
    top.unlock(id, lock);
    sweep_others(&top, id);
    done
}

/// Ends what is left of jobs that this node does not know any more.
///
/// # Errors
/// When the directory cannot be trusted.
pub fn sweep() -> Result<()> {
    if let Some(top) = Top::open(false)? {
        sweep_others(&top, 0);
    }
    Ok(())
}

fn sweep_others(top: &Top, own: u32) {
    let others: Vec<u32> = top.jobs().into_iter().filter(|id| *id != own).collect();
    if others.is_empty() {
        return;
    }
    let known = steps::known_jobs();
    // Time is short: what is not reached now is reached the next time.
    let end = Instant::now() + Duration::from_secs(10);
    for id in others.into_iter().filter(|id| !known.contains(id)) {
        // Who begins or ends it now needs no sweep.
        let Ok(Some(lock)) = top.lock(id, Duration::ZERO) else {
            continue;
        };
        // Between its Prolog and its extern step nothing of Slurm runs for a job.
        let young = top.memory(id).is_some_and(|m| {
            m.boot == proc::boot_id() && (0..60).contains(&(crate::instance::now_s() - m.since_s))
        });
        if young || Instant::now() > end {
            continue;
        }
        if let Err(error) = end_in(top, id) {
            trouble(&format!("job {id}, which is over: {error:#}"));
        }
        top.unlock(id, lock);
    }
}

fn end_in(top: &Top, id: u32) -> Result<()> {
    let name = format!("job-{id}");
    let there = rustix::fs::statat(&top.0, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    let memory = top.memory(id);
    if !there && memory.is_none() {
        return Ok(());
    }
    let supervisor = memory
        .as_ref()
        .filter(|m| m.boot == proc::boot_id())
        .and_then(|m| m.supervisor?.hold());
    if let Some(supervisor) = supervisor {
        supervisor.signal(Signal::TERM);
        supervisor.signal(Signal::CONT);
        if !supervisor.wait(STOPPING) {
            supervisor.signal(Signal::KILL);
            supervisor.wait(Duration::from_secs(2));
        }
    }
    let mut left = Vec::new();
    if let Some(memory) = &memory {
        end_processes(memory);
        if there && !is_empty(top, &name) {
            tidy_as_user(memory.job);
        }
        remove_cgroups(memory);
    }
    if there {
        unmount_below(top, &name);
        if rustix::fs::unlinkat(&top.0, &name, AtFlags::REMOVEDIR).is_err() {
            let mut budget = MAX_ENTRIES;
            remove_tree(&top.0, &name, None, 0, &mut budget);
        }
        if rustix::fs::statat(&top.0, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            left.push(format!("{JOBS}/{name} cannot be removed"));
        }
    }
    if !left.is_empty() {
        bail!("{}", left.join("; "));
    }
    top.forget(id);
    Ok(())
}

/// Removes what is empty of the job's cgroups: of the batch script's, Slurm leaves what we were in when it ended. With
/// `PrologFlags=RunInJob` the extern step outlives the Epilog, which is in the job, and is removed by itself.
fn remove_cgroups(memory: &Memory) {
    let (id, cgroups) = (memory.job.id, memory.cgroups());
    let in_job = adopt::is_in_job(std::process::id().cast_signed(), id);
    if in_job || cgroups.has_version_2() {
        // A slurmstepd that is still ending complains in the job's output when its directory is gone, and does not try
        // again what it could not remove.
        let is_ending = |step: &String| !in_job || step != "extern";
        let end = Instant::now() + ENDING;
        while steps::of_job(id).iter().any(is_ending) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    cgroups.remove(steps::known_jobs().contains(&id));
}

/// Kills what is left in the job's own cgroups: held first, then looked at, then killed.
fn end_processes(memory: &Memory) {
    let job = memory.job;
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        let mut found = 0;
        for directory in memory.cgroups().directories() {
            for pid in adopt::processes(&directory) {
                let Some(held) = proc::Id::of(pid).and_then(proc::Id::hold) else {
                    continue;
                };
                let user =
                    std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|m| m.uid() == job.uid);
                if user && adopt::is_in_job(pid, job.id) {
                    held.signal(Signal::KILL);
                    found += 1;
                }
            }
        }
        if found == 0 || Instant::now() >= end {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Lets the user end the instances that records name, and remove what is in the directory.
fn tidy_as_user(job: Job) {
    let mut command = as_user(job);
    command
        .args(["job", "tidy"])
        .env("SLURM_JOB_ID", job.id.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else {
        return;
    };
    let held = i32::try_from(child.id()).ok().and_then(Held::child);
    if held.is_none_or(|held| !held.wait(TIDYING)) {
        let _ = child.kill();
        trouble(&format!(
            "job {}: tidying up as the user took too long",
            job.id
        ));
    } else {
        let _ = child.wait();
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
