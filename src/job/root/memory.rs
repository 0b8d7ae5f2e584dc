//! `/run/capsid`: the directory that only root can write, and what root remembers of a job in it, beside the user's.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock};
use serde::{Deserialize, Serialize};

use super::Job;
use crate::host::JOBS;
use crate::job::adopt::Cgroups;
use crate::proc;

/// What root remembers of a job: in a file that only root can write, beside the user's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) job: Job,
    pub(super) boot: String,
    pub(super) supervisor: Option<proc::Id>,
    pub(super) since_s: i64,
    /// When it began, by a clock that nobody sets: seconds since the machine started. Older versions did not write it.
    #[serde(default)]
    pub(super) since_boot_s: Option<u64>,
    /// Slurm's name of this node.
    #[serde(default)]
    pub(super) node: Option<String>,
}

/// Between its Prolog and its extern step nothing of Slurm runs for a job, for so long at most; seconds.
const YOUNG_S: u64 = 60;

impl Memory {
    /// Whether Slurm may not have had the time to run anything for the job.
    pub(super) fn is_young(&self) -> bool {
        let age = match self.since_boot_s {
            Some(since) => Some(proc::since_boot_s().saturating_sub(since)),
            None => u64::try_from(crate::instance::now_s() - self.since_s).ok(),
        };
        self.boot == proc::boot_id() && age.is_none_or(|age| age < YOUNG_S)
    }

    pub(super) fn cgroups(&self) -> Cgroups<'_> {
        Cgroups {
            job: self.job.id,
            uid: self.job.uid,
            node: self.node.as_deref(),
        }
    }
}

/// `/run/capsid`, checked and open.
pub(super) struct Top(pub(super) OwnedFd);

/// The right to change what there is of a job.
pub(super) struct Lock(#[allow(dead_code)] OwnedFd);

impl Top {
    pub(super) fn open(make: bool) -> Result<Option<Top>> {
        if make {
            match rustix::fs::mkdir(JOBS, Mode::from_bits_truncate(0o755)) {
                Ok(()) => {
                    rustix::fs::chmod(JOBS, Mode::from_bits_truncate(0o755)).context("chmod")?
                }
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot make {JOBS}")),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(JOBS, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            other => other.with_context(|| format!("cannot open {JOBS}"))?,
        };
        let stat = rustix::fs::fstat(&fd).context("stat")?;
        if stat.st_uid != 0 || stat.st_mode & 0o022 != 0 {
            bail!("{JOBS} can be changed by others than root: remove it");
        }
        Ok(Some(Top(fd)))
    }

    pub(super) fn remember(&self, memory: &Memory) -> Result<()> {
        let (name, draft) = (
            format!("job-{}.root", memory.job.id),
            format!("job-{}.new", memory.job.id),
        );
        self.unlink(&draft);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let text = serde_json::to_vec(memory).context("a job's memory")?;
        // Its user finds his jobs by it.
        let mode = Mode::from_bits_truncate(0o644);
        let write = || -> std::io::Result<()> {
            let fd = rustix::fs::openat(&self.0, &draft, flags, mode)?;
            rustix::fs::fchmod(&fd, mode)?;
            std::fs::File::from(fd).write_all(&text)?;
            Ok(rustix::fs::renameat(&self.0, &draft, &self.0, &name)?)
        };
        write()
            .inspect_err(|_| self.unlink(&draft))
            .with_context(|| format!("cannot write {JOBS}/{name}"))
    }

    fn unlink(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.0, name, AtFlags::empty());
    }

    pub(super) fn memory(&self, id: u32) -> Option<Memory> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(&self.0, format!("job-{id}.root"), flags, Mode::empty()).ok()?;
        let file = std::fs::File::from(fd);
        let meta = file.metadata().ok()?;
        (meta.is_file() && meta.uid() == 0 && meta.mode() & 0o022 == 0 && meta.len() < 1 << 16)
            .then(|| serde_json::from_reader(file).ok())?
    }

    /// Keeps others from beginning, ending or sweeping this job; `None` when somebody else does so for longer than `patience`.
    /// For Slurm runs Prologs and Epilogs of different jobs at once, and each of them sweeps.
    pub(super) fn lock(&self, id: u32, patience: Duration) -> Result<Option<Lock>> {
        let name = format!("job-{id}.lock");
        let end = Instant::now() + patience;
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(&self.0, &name, flags, Mode::RUSR | Mode::WUSR)
                .with_context(|| format!("cannot lock job {id}"))?;
            let got = flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok();
            let own = rustix::fs::fstat(&fd).map(|s| s.st_ino);
            let named = rustix::fs::statat(&self.0, &name, AtFlags::SYMLINK_NOFOLLOW);
            // The one before us may have removed it.
            if got && own == named.map(|s| s.st_ino) {
                return Ok(Some(Lock(fd)));
            }
            if !got && Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Gives a job free whose lock nobody needs any more.
    pub(super) fn unlock(&self, id: u32, lock: Lock) {
        self.unlink(&format!("job-{id}.lock"));
        drop(lock);
    }

    pub(super) fn forget(&self, id: u32) {
        self.unlink(&format!("job-{id}.root"));
        self.unlink(&format!("job-{id}.new"));
    }

    /// The jobs that there is something of: by names that only root can write, none of which is looked at.
    pub(super) fn jobs(&self) -> std::io::Result<Vec<u32>> {
        let mut ids = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.0)? {
            ids.extend(job_of(entry?.file_name().to_bytes()));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

/// The job that a name in [`JOBS`] belongs to.
fn job_of(name: &[u8]) -> Option<u32> {
    let name = std::str::from_utf8(name).ok()?.strip_prefix("job-")?;
    let kinds = [".root", ".lock", ".new"];
    let number = kinds.iter().find_map(|kind| name.strip_suffix(kind));
    number.unwrap_or(name).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_jobs() {
        for (name, id) in [
            (&b"job-7"[..], Some(7)),
            (b"job-7.root", Some(7)),
            (b"job-7.lock", Some(7)),
            (b"job-7.new", Some(7)),
            (b"job-7.x", None),
            (b"job-", None),
            (b"job-\xff", None),
            (b"job-7.root.new", None),
            (b"trouble", None),
        ] {
            assert_eq!(job_of(name), id, "{name:?}");
        }
    }

    #[test]
    fn youth_is_measured_by_a_clock_that_nobody_sets() {
        let memory = |since_boot_s, since_s, boot: &str| Memory {
            job: Job {
                id: 1,
                uid: 2,
                gid: 2,
            },
            boot: boot.to_owned(),
            supervisor: None,
            since_s,
            since_boot_s,
            node: None,
        };
        let (boot, up, now) = (
            proc::boot_id(),
            proc::since_boot_s(),
            crate::instance::now_s(),
        );
        // The clock has been set back, or forth, by a year.
        for wall in [now - 31_536_000, now, now + 31_536_000] {
            assert!(memory(Some(up), wall, &boot).is_young());
            let long_ago = up.checked_sub(YOUNG_S);
            assert!(long_ago.is_none_or(|since| !memory(Some(since), wall, &boot).is_young()));
            assert!(!memory(Some(up), wall, "another").is_young());
        }
        // What an older version wrote.
        assert!(memory(None, now, &boot).is_young() && memory(None, now + 9, &boot).is_young());
        assert!(!memory(None, now - 61, &boot).is_young());
    }
}
