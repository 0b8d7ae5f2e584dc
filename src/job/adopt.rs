//! Putting a process into a step of a job that lives as long as the job: the batch script's where there is one, else the
//! extern step. Root's work.
//!
//! They appear right after the Prolog has ended, so this is done by a helper that the Prolog leaves behind.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::conf::Conf;
use crate::proc::{cgroups, mounts};

/// How Slurm follows the processes of a job, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// By cgroup: the extern step exists, and what is outside of it is not in the job.
    Cgroup,
    /// By parent or process group: there is nothing to enter.
    None,
}

/// By cgroup when Slurm's configuration says nothing else.
pub fn tracking(conf: &Conf) -> Tracking {
    match conf.get(&["ProctrackType"]) {
        Some(kind) if !kind.starts_with("proctrack/cgroup") => Tracking::None,
        _ => Tracking::Cgroup,
    }
}

/// The mount points of all cgroup hierarchies.
fn hierarchies() -> std::io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = mounts::table()?
        .into_iter()
        .filter(|mount| mount.kind == "cgroup" || mount.kind == "cgroup2")
        .map(|mount| mount.point)
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// The directories in a cgroup of Slurm's with names of a kind; none in one that is not there.
fn children(path: &Path, fits: &dyn Fn(&[u8]) -> bool) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ENODEV | libc::EACCES) => return Ok(vec![]),
            _ => return Err(error),
        },
    };
    let wanted = |e: &std::fs::DirEntry| {
        e.file_type().is_ok_and(|t| t.is_dir()) && fits(e.file_name().as_os_str().as_bytes())
    };
    Ok(entries.flatten().filter(wanted).map(|e| e.path()).collect())
}

/// The directory of a job's extern step.
const EXTERN: &str = "step_extern";
/// What we make in the directory of a job.
const BESIDE_STEPS: &str = "capsid";

/// A job on a node, as Slurm's cgroups have it.
#[derive(Debug, Clone, Copy)]
pub struct Cgroups<'a> {
    /// The job's number.
    pub job: u32,
    /// The user.
    pub uid: u32,
    /// Slurm's name of the node, where it is known: a machine can be several, and jobs of several nodes meet there.
    pub node: Option<&'a str>,
}

impl Cgroups<'_> {
    /// The job's directories in every hierarchy: `slurm*/uid_U/job_J` (v1) and `*slurmstepd.scope/job_J` (v2).
    ///
    /// # Errors
    /// When the table of mounts cannot be read: then nobody knows.
    pub fn directories(&self) -> std::io::Result<Vec<PathBuf>> {
        let (job, uid) = (self.job, self.uid);
        let is_ours = |mark: &[u8]| {
            let mut node = self.node.map(str::as_bytes).into_iter();
            mark.is_empty() || node.all(|node| mark == node)
        };
        let mut found = Vec::new();
        for top in hierarchies()? {
            let v1 = |name: &[u8]| {
                let mark = name.strip_prefix(b"slurm");
                mark.is_some_and(|mark| is_ours(mark.strip_prefix(b"_").unwrap_or(mark)))
            };
            for slurm in children(&top, &v1)? {
                found.push(slurm.join(format!("uid_{uid}/job_{job}")));
            }
            let v2 = |name: &[u8]| {
                let mark = name.strip_suffix(b"slurmstepd.scope");
                mark.is_some_and(|mark| is_ours(mark.strip_suffix(b"_").unwrap_or(mark)))
            };
            for slice in [top.join("system.slice"), top.clone()] {
                for scope in children(&slice, &v2)? {
                    found.push(scope.join(format!("job_{job}")));
                }
            }
        }
        found.retain(|path| path.is_dir());
        Ok(found)
    }

    /// The files that take a process into a step of the job, one for each hierarchy; none before Slurm has a process there.
    ///
    /// # Errors
    /// As [`Cgroups::directories`].
    pub fn doors(&self, step: Step) -> std::io::Result<Vec<PathBuf>> {
        let step = match step {
            Step::Extern => EXTERN,
            Step::Batch => "step_batch",
        };
        let lived_in =
            |door: &PathBuf| std::fs::read(door).is_ok_and(|text| !text.trim_ascii().is_empty());
        let door = |directory: PathBuf| {
            let is_v1 = self.is_v1(&directory);
            let directory = directory.join(step);
            // In version 1 the step's directory is the user's, who may make others below it: nothing but the step itself is
            // entered. Version 2 allows processes in leaves only: of the step's task, or, without a plugin that follows
            // tasks, of what has no task.
            let places: &[&str] = if is_v1 {
                &["cgroup.procs"]
            } else {
                &["user/task_0/cgroup.procs", "user/task_special/cgroup.procs"]
            };
            let mut doors = places.iter().map(|place| directory.join(place));
            doors.find(lived_in)
        };
        Ok(self.directories()?.into_iter().filter_map(door).collect())
    }

    /// With version 2, makes a place in the job that is part of no step. In version 1 the job's directory is one.
    ///
    /// # Errors
    /// As [`Cgroups::directories`] and `mkdir(2)`.
    pub fn doors_beside_steps(&self) -> std::io::Result<Vec<PathBuf>> {
        let directories = self.directories()?.into_iter();
        let place = |directory: PathBuf| {
            let place = directory.join(BESIDE_STEPS);
            match std::fs::create_dir(&place) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok(place.join("cgroup.procs")),
            }
        };
        directories.filter(|d| !self.is_v1(d)).map(place).collect()
    }

    /// With `keep_extern`, all directories in the job's but the extern step's; else the job's own.
    ///
    /// # Errors
    /// As [`Cgroups::directories`].
    pub fn to_be_removed(&self, keep_extern: bool) -> std::io::Result<Vec<PathBuf>> {
        let directories = self.directories()?;
        if !keep_extern {
            return Ok(directories);
        }
        let mut others = Vec::new();
        for directory in &directories {
            others.extend(children(directory, &|name| name != EXTERN.as_bytes())?);
        }
        Ok(others)
    }

    fn is_v1(&self, directory: &Path) -> bool {
        let parent = directory.parent();
        parent.is_some_and(|p| p.ends_with(format!("uid_{}", self.uid)))
    }

    /// Whether there is a step of another kind already: of `srun`'s, or an interactive one.
    ///
    /// # Errors
    /// As [`Cgroups::directories`].
    pub fn has_other_step(&self) -> std::io::Result<bool> {
        let is_other = |name: &[u8]| {
            name.starts_with(b"step_") && name != EXTERN.as_bytes() && name != b"step_batch"
        };
        for directory in self.directories()? {
            if !children(&directory, &is_other)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes this process out of the job, to the top of each hierarchy.
    ///
    /// # Errors
    /// As [`Cgroups::directories`], and when a cgroup does not take it.
    pub fn leave(&self) -> std::io::Result<()> {
        let tops = hierarchies()?;
        for directory in self.directories()? {
            let above = tops.iter().filter(|top| directory.starts_with(top));
            if let Some(top) = above.max_by_key(|top| top.as_os_str().len()) {
                std::fs::write(top.join("cgroup.procs"), std::process::id().to_string())?;
            }
        }
        Ok(())
    }
}

/// Whether this process is in a cgroup of a job's already.
///
/// # Errors
/// When its cgroups cannot be read.
pub fn are_in_job(job: u32) -> std::io::Result<bool> {
    let is_of_job = |path: &Path| {
        let in_slurm = path.as_os_str().as_bytes();
        let in_slurm = in_slurm.windows(5).any(|part| part == b"slurm");
        let directory = format!("job_{job}");
        in_slurm && path.iter().any(|name| name == OsStr::new(&directory))
    };
    Ok(cgroups::own()?.iter().any(|cgroup| is_of_job(&cgroup.path)))
}

/// A step that belongs to the job rather than to a command of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Lives as long as the job, on every node. Slurm ends it at once when the job is to end.
    Extern,
    /// The batch script's, on the first node of batch jobs. Slurm ends it when the script and the TaskEpilog have ended, or
    /// after `KillWait`.
    Batch,
}
