//! The steps of jobs on this node, by root's own processes `slurmstepd: [JOB.STEP]`.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use rustix::fs::{Mode, OFlags};

use super::trouble;
use crate::engine::sys;
use crate::job::conf::Conf;
use crate::proc;
use crate::proc::mounts::{self, Mount};

/// How long the helper looks for the mount namespace of a job's steps: slurmd makes it when the Prolog has ended.
const ENTERED: Duration = Duration::from_secs(2);

/// The jobs that Slurm has a step of on this node.
///
/// # Errors
/// When the processes cannot be read: then nobody knows.
pub(super) fn known_jobs() -> std::io::Result<Vec<u32>> {
    Ok(known()?.into_iter().map(|(job, _)| job).collect())
}

/// The steps that Slurm has of a job on this node: numbers, `batch`, `extern`, `interactive`.
///
/// # Errors
/// As [`known_jobs`].
pub(super) fn of_job(job: u32) -> std::io::Result<Vec<String>> {
    let steps = known()?.into_iter().filter(|(of, _)| *of == job);
    Ok(steps.map(|(_, step)| step).collect())
}

fn known() -> std::io::Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        match step_of(pid) {
            Ok(step) => found.extend(step),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The step of a slurmstepd. It has a user's rights now and then, but root started it. Of users' processes nothing is read
/// that they could make hang: the name does not.
fn step_of(pid: i32) -> std::io::Result<Option<(u32, String)>> {
    if proc::comm(pid)? != b"slurmstepd" || proc::real_uid(pid)? != 0 {
        return Ok(None);
    }
    let line = match std::fs::read(format!("/proc/{pid}/cmdline")) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        line => line?,
    };
    Ok(step_in(&line))
}

/// What the title `slurmstepd: [JOB.STEP]` says.
fn step_in(line: &[u8]) -> Option<(u32, String)> {
    let title = line.strip_prefix(b"slurmstepd: [")?;
    let title = std::str::from_utf8(title.split(|b| *b == b']').next()?).ok()?;
    let (job, step) = title.split_once('.').unwrap_or((title, ""));
    Some((job.parse().ok()?, step.to_owned()))
}

/// Whether Slurm's configuration gives the steps of a job a `/tmp` of their own (`JobContainerType=job_container/tmpfs`, in
/// later releases `NamespaceType`).
fn has_private_mounts(conf: &Conf) -> bool {
    let kind = conf.get(&["JobContainerType", "NamespaceType"]);
    kind.is_some_and(|kind| !kind.ends_with("/none") && !kind.ends_with("/cncu"))
}

/// Enters the mount namespace of a job's steps, so that its services see the files that its steps see; does nothing where
/// they have none of their own.
///
/// # Errors
/// As `setns(2)`.
pub(super) fn enter_mounts(job: u32, conf: &Conf) -> Result<()> {
    if !has_private_mounts(conf) {
        return Ok(());
    }
    let end = Instant::now() + ENTERED;
    loop {
        if let Some(namespace) = mounts_of(job).context("the table of mounts")? {
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
fn mounts_of(job: u32) -> std::io::Result<Option<OwnedFd>> {
    let end = format!("{job}/.ns");
    // Only root can mount a namespace there.
    let kept = mounts::table()?
        .into_iter()
        .filter(|mount| mount.kind == "nsfs" && mount.point.ends_with(&end));
    let (own, users) = (
        identity("/proc/self/ns/mnt")?,
        identity("/proc/self/ns/user")?,
    );
    let fits = |mount: Mount| {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::open(&mount.point, flags, Mode::empty()).ok()?;
        // One that a user has made could have anything in the place of the programs that root executes.
        let owner = sys::owner_of_namespace(found.as_fd()).ok()?;
        let roots = sys::identity(owner.as_fd()).ok()? == users;
        (roots && sys::identity(found.as_fd()).ok()? != own).then_some(found)
    };
    Ok(kept.filter_map(fits).next())
}

/// Device and inode of one of our namespaces.
fn identity(path: &str) -> std::io::Result<(u64, u64)> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    sys::identity(fd.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_name_steps() {
        for (line, step) in [
            (&b"slurmstepd: [7.batch]\0"[..], Some((7, "batch"))),
            (b"slurmstepd: [7.extern]", Some((7, "extern"))),
            (b"slurmstepd: [7.0] \xff", Some((7, "0"))),
            (b"slurmstepd: [7]", Some((7, ""))),
            (b"slurmstepd: [x.0]", None),
            (b"slurmstepd: [\xff.0]", None),
            (b"/usr/sbin/slurmstepd", None),
            (b"", None),
        ] {
            let expected = step.map(|(job, step)| (job, step.to_owned()));
            assert_eq!(step_in(line), expected);
        }
        // Reading all of /proc works for everybody.
        known().unwrap();
    }

    #[test]
    fn private_mounts_are_configured() {
        let configured = |line: &str| has_private_mounts(&Conf::of(line.as_bytes()).unwrap());
        assert!(configured("JobContainerType=job_container/tmpfs"));
        assert!(configured("NamespaceType = namespace/tmpfs"));
        for without in [
            "",
            "JobContainerType=(null)",
            "JobContainerType=job_container/none",
            "JobContainerType=job_container/cncu",
        ] {
            assert!(!configured(without), "{without}");
        }
    }
}
