//! The steps of jobs on this node, by root's own processes `slurmstepd: [JOB.STEP]`.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};

use super::trouble;
use crate::engine::sys;
use crate::proc;

/// How long the helper looks for the mount namespace of a job's steps: they enter it when they begin.
const ENTERED: Duration = Duration::from_secs(2);

/// The daemons of steps, with what they call themselves: `12.extern`, `12.0`.
fn daemons() -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let daemon = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
        // Nothing is read of other users' processes.
        if entry.metadata().ok()?.uid() != 0 {
            return None;
        }
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let title = line.strip_prefix("slurmstepd: [")?.split(']').next()?;
        is_roots(pid).then(|| (pid, title.to_owned()))
    };
    entries.filter_map(daemon).collect()
}

/// Whether a process is root's in every respect: not one that a user has started with a setuid program.
fn is_roots(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|l| l.strip_prefix("Uid:"));
    ids.is_some_and(|ids| ids.split_whitespace().eq(["0"; 4]))
}

/// The jobs that Slurm has a step of on this node.
pub(super) fn known_jobs() -> Vec<u32> {
    let job = |(_, title): (i32, String)| title.split('.').next()?.parse().ok();
    daemons().into_iter().filter_map(job).collect()
}

/// Whether Slurm's configuration gives the steps of a job a `/tmp` of their own (`JobContainerType=job_container/tmpfs`, in
/// later releases `NamespaceType`).
fn has_private_mounts(slurm_conf: Option<&Path>) -> bool {
    let kind = super::adopt::setting(slurm_conf, &["JobContainerType", "NamespaceType"]);
    kind.is_some_and(|kind| !kind.ends_with("/none") && !kind.ends_with("/cncu"))
}

/// Enters the mount namespace of a job's steps, so that its services see the files that its steps see; does nothing where
/// they have none of their own.
///
/// # Errors
/// As `setns(2)`.
pub(super) fn enter_mounts(job: u32, slurm_conf: Option<&Path>) -> Result<()> {
    if !has_private_mounts(slurm_conf) {
        return Ok(());
    }
    let end = Instant::now() + ENTERED;
    loop {
        if let Some(namespace) = mounts_of(job) {
            return setns(namespace, CloneFlags::CLONE_NEWNS)
                .context("cannot enter the mount namespace of the job's steps (setns)");
        }
        if Instant::now() >= end {
            trouble(&format!(
                "job {job}: its steps have no mount namespace of their own after {} s: its services see the node's /tmp",
                ENTERED.as_secs()
            ));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The mount namespace of the extern step, whose processes are root's, when it is another one than ours.
fn mounts_of(job: u32) -> Option<OwnedFd> {
    let title = format!("{job}.extern");
    let mut daemons = daemons();
    daemons.retain(|(_, name)| *name == title);
    let own = sys::identity(namespace(0, "mnt")?.as_fd()).ok()?;
    let is_ours = |fd: &OwnedFd| sys::identity(fd.as_fd()).is_ok_and(|id| id == own);
    if daemons.len() > 1 {
        // Nodes of several clusters on one machine.
        daemons.retain(|(pid, _)| namespace(*pid, "mnt").is_some_and(|fd| is_ours(&fd)));
    }
    let tree = daemons.into_iter().flat_map(|(pid, _)| {
        let path = format!("/proc/{pid}/task/{pid}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        let children: Vec<i32> = children
            .split_whitespace()
            .filter_map(|c| c.parse().ok())
            .collect();
        std::iter::once(pid).chain(children)
    });
    tree.filter_map(|pid| {
        // Held, so that its number stays its own while it is looked at.
        let held = proc::Id::of(pid)?.hold()?;
        let found = namespace(pid, "mnt").filter(|fd| is_roots(pid) && !is_ours(fd))?;
        // One that a user has made could have anything in the place of the programs that root executes.
        let owner = sys::owner_of_namespace(found.as_fd()).ok()?;
        let ours = namespace(0, "user")?;
        let roots = sys::identity(owner.as_fd()).ok() == sys::identity(ours.as_fd()).ok();
        (roots && held.is_alive()).then_some(found)
    })
    .next()
}

/// A namespace of a process; of this one for 0.
fn namespace(pid: i32, kind: &str) -> Option<OwnedFd> {
    let path = match pid {
        0 => format!("/proc/self/ns/{kind}"),
        pid => format!("/proc/{pid}/ns/{kind}"),
    };
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}
