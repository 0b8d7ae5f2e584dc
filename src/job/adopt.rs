//! Putting a process into a step of a job that lives as long as the job: the batch script's where there is one, else the
//! extern step. Root's work.
//!
//! They appear right after the Prolog has ended, so this is done by a helper that the Prolog leaves behind.

use std::path::{Path, PathBuf};

/// How Slurm follows the processes of a job, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// By cgroup: the extern step exists, and what is outside of it is not in the job.
    Cgroup,
    /// By parent or process group: there is nothing to enter.
    None,
}

/// Reads it from Slurm's configuration; by cgroup when nothing else is said.
pub fn tracking(slurm_conf: Option<&Path>) -> Tracking {
    match setting(slurm_conf, &["ProctrackType"]) {
        Some(kind) if !kind.starts_with("proctrack/cgroup") => Tracking::None,
        _ => Tracking::Cgroup,
    }
}

/// The value of the first of these keys that Slurm's configuration has, in small letters.
pub fn setting(slurm_conf: Option<&Path>, keys: &[&str]) -> Option<String> {
    let path = slurm_conf.unwrap_or(Path::new("/etc/slurm/slurm.conf"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().find_map(|line| {
        let (key, value) = line.split('#').next()?.split_once('=')?;
        let wanted = keys.iter().any(|k| key.trim().eq_ignore_ascii_case(k));
        wanted.then(|| value.trim().to_ascii_lowercase())
    })
}

/// The mount points of all cgroup hierarchies.
fn hierarchies() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = text
        .lines()
        .filter(|line| line.contains(" - cgroup ") || line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from))
        .collect();
    found.sort();
    found.dedup();
    found
}

fn children(path: &Path, fits: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|e| {
            e.file_type().is_ok_and(|t| t.is_dir()) && e.file_name().to_str().is_some_and(fits)
        })
        .map(|e| e.path())
        .collect()
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
    pub fn directories(&self) -> Vec<PathBuf> {
        let (job, uid) = (self.job, self.uid);
        let is_ours = |mark: &str| self.node.is_none_or(|node| mark.is_empty() || mark == node);
        let mut found = Vec::new();
        for top in hierarchies() {
            let v1 = |name: &str| {
                let mark = name.strip_prefix("slurm");
                mark.is_some_and(|mark| is_ours(mark.strip_prefix('_').unwrap_or(mark)))
            };
            for slurm in children(&top, &v1) {
                found.push(slurm.join(format!("uid_{uid}/job_{job}")));
            }
            let v2 = |name: &str| {
                let mark = name.strip_suffix("slurmstepd.scope");
                mark.is_some_and(|mark| is_ours(mark.strip_suffix('_').unwrap_or(mark)))
            };
            for slice in [top.join("system.slice"), top.clone()] {
                for scope in children(&slice, &v2) {
                    found.push(scope.join(format!("job_{job}")));
                }
            }
        }
        found.retain(|path| path.is_dir());
        found
    }

    /// The files that take a process into a step of the job, one for each hierarchy; none before Slurm has a process there.
    pub fn doors(&self, step: Step) -> Vec<PathBuf> {
        let step = match step {
            Step::Extern => EXTERN,
            Step::Batch => "step_batch",
        };
        let lived_in = |door: &PathBuf| {
            std::fs::read_to_string(door).is_ok_and(|text| !text.trim().is_empty())
        };
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
        self.directories().into_iter().filter_map(door).collect()
    }

    /// With version 2, makes a place in the job that is part of no step. In version 1 the job's directory is one.
    pub fn doors_beside_steps(&self) -> std::io::Result<Vec<PathBuf>> {
        let directories = self.directories().into_iter();
        let place = |directory: PathBuf| {
            let place = directory.join(BESIDE_STEPS);
            match std::fs::create_dir(&place) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok(place.join("cgroup.procs")),
            }
        };
        directories.filter(|d| !self.is_v1(d)).map(place).collect()
    }

    /// Removes what is empty of the job's directories; with `keep_extern`, nothing of the extern step.
    pub fn remove(&self, keep_extern: bool) {
        for directory in self.directories() {
            if keep_extern {
                let others = children(&directory, &|name| name != EXTERN);
                others.iter().for_each(|other| remove(other));
            } else {
                remove(&directory);
            }
        }
    }

    /// Whether the job has directories of version 2.
    pub fn has_version_2(&self) -> bool {
        self.directories().iter().any(|d| !self.is_v1(d))
    }

    fn is_v1(&self, directory: &Path) -> bool {
        let parent = directory.parent();
        parent.is_some_and(|p| p.ends_with(format!("uid_{}", self.uid)))
    }

    /// Whether there is a step of another kind already: of `srun`'s, or an interactive one.
    pub fn has_other_step(&self) -> bool {
        let is_other =
            |name: &str| name.starts_with("step_") && name != EXTERN && name != "step_batch";
        self.directories()
            .iter()
            .any(|directory| !children(directory, &is_other).is_empty())
    }
}

/// Whether a process is in a cgroup of a job's already.
pub fn is_in_job(pid: i32, job: u32) -> bool {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let directory = format!("/job_{job}");
    cgroups.lines().any(|line| {
        line.contains("slurm")
            && (line.ends_with(&directory) || line.contains(&format!("{directory}/")))
    })
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

/// Processes below a directory of a job.
pub fn processes(directory: &Path) -> Vec<i32> {
    let mut pids = Vec::new();
    visit(directory, 0, &mut |path| {
        let text = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
    });
    pids
}

/// Removes what is empty below a directory of a job, and itself.
fn remove(directory: &Path) {
    visit(directory, 0, &mut |path| {
        let _ = std::fs::remove_dir(path);
    });
}

/// Children first. A user can make directories below a step; the depth is bounded.
fn visit(path: &Path, depth: usize, each: &mut dyn FnMut(&Path)) {
    if depth < 16 {
        for child in children(path, &|_| true).iter().take(1000) {
            visit(child, depth + 1, each);
        }
    }
    each(path);
}
