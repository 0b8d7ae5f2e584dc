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
    /// Slurm's name of this node.
    #[serde(default)]
    pub(super) node: Option<String>,
}

impl Memory {
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
        let _ = rustix::fs::unlinkat(&self.0, &draft, AtFlags::empty());
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.0, &draft, flags, Mode::RUSR | Mode::WUSR)
            .context("cannot write a job's memory")?;
        let text = serde_json::to_vec(memory).context("a job's memory")?;
        std::fs::File::from(fd)
            .write_all(&text)
            .context("cannot write a job's memory")?;
        rustix::fs::renameat(&self.0, &draft, &self.0, &name).context("cannot write a job's memory")
    }

    pub(super) fn memory(&self, id: u32) -> Option<Memory> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(&self.0, format!("job-{id}.root"), flags, Mode::empty()).ok()?;
        let file = std::fs::File::from(fd);
        let meta = file.metadata().ok()?;
        (meta.is_file() && meta.uid() == 0 && meta.len() < 1 << 16)
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
        let _ = rustix::fs::unlinkat(&self.0, format!("job-{id}.lock"), AtFlags::empty());
        drop(lock);
    }

    pub(super) fn forget(&self, id: u32) {
        let _ = rustix::fs::unlinkat(&self.0, format!("job-{id}.root"), AtFlags::empty());
    }

    /// The jobs that there is something of.
    pub(super) fn jobs(&self) -> Vec<u32> {
        let entries = rustix::fs::Dir::read_from(&self.0)
            .into_iter()
            .flatten()
            .flatten();
        let mut ids: Vec<u32> = entries
            .filter_map(|e| {
                let name = e
                    .file_name()
                    .to_str()
                    .ok()?
                    .strip_prefix("job-")?
                    .to_owned();
                let number = name
                    .strip_suffix(".root")
                    .or_else(|| name.strip_suffix(".lock"));
                number.unwrap_or(&name).parse().ok()
            })
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}
