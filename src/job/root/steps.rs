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

/// How long the helper looks for the mount namespace of a job's steps: slurmd makes it when the Prolog has ended.
const ENTERED: Duration = Duration::from_secs(2);

/// Whether a process is root's in every respect: not one that a user has started with a setuid program.
fn is_roots(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|l| l.strip_prefix("Uid:"));
    ids.is_some_and(|ids| ids.split_whitespace().eq(["0"; 4]))
}

/// The jobs that Slurm has a step of on this node.
pub(super) fn known_jobs() -> Vec<u32> {
    known().into_iter().map(|(job, _)| job).collect()
}

/// The steps that Slurm has of a job on this node: numbers, `batch`, `extern`, `interactive`.
pub(super) fn of_job(job: u32) -> Vec<String> {
    let steps = known().into_iter().filter(|(of, _)| *of == job);
    steps.map(|(_, step)| step).collect()
}

fn known() -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let step = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
        // Nothing is read of other users' processes.
        if entry.metadata().ok()?.uid() != 0 {
            return None;
        }
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let title = line.strip_prefix("slurmstepd: [")?;
        let title = title.split(']').next()?;
        let (job, step) = title.split_once('.').unwrap_or((title, ""));
        let job = job.parse().ok()?;
        is_roots(pid).then(|| (job, step.to_owned()))
    };
    entries.filter_map(step).collect()
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

/// The mount namespace that Slurm has made for a job: it keeps it as a mount, `BASEPATH/JOB/.ns`, in slurmd's own.
fn mounts_of(job: u32) -> Option<OwnedFd> {
    let end = format!("/{job}/.ns");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let kept = mounts.lines().filter_map(|line| {
        let (place, source) = line.split_once(" - ")?;
        let path = place.split(' ').nth(4)?;
        // Only root can mount a namespace there.
        (source.starts_with("nsfs ") && path.ends_with(&end)).then_some(path)
    });
    let own = identity("/proc/self/ns/mnt")?;
    let users = identity("/proc/self/ns/user")?;
    let fits = |path: &str| {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::open(path, flags, Mode::empty()).ok()?;
        // One that a user has made could have anything in the place of the programs that root executes.
        let owner = sys::owner_of_namespace(found.as_fd()).ok()?;
        let roots = sys::identity(owner.as_fd()).ok()? == users;
        (roots && sys::identity(found.as_fd()).ok()? != own).then_some(found)
    };
    kept.filter_map(fits).next()
}

/// Device and inode of one of our namespaces.
fn identity(path: &str) -> Option<(u64, u64)> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    sys::identity(fd.as_fd()).ok()
}
