//! The cgroups of a job that is over: what is not root's in them is killed, and they are removed.
//!
//! The user can have made cgroups below a step (version 1), as many, as deep and under what names he likes: they are walked
//! by descriptors, and nothing is kept of the way but names.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::process::Signal;

use super::memory::Memory;
use super::steps;
use crate::proc::{self, Held, cgroups};

/// How long killing may take.
const KILLING: Duration = Duration::from_secs(3);
/// How long a slurmstepd may take to end after its steps.
const ENDING: Duration = Duration::from_secs(5);

/// Kills what is not root's in the job's cgroups, until there is nothing left of it. Root's are Slurm's own and, with
/// `PrologFlags=RunInJob`, this process.
pub(super) fn kill(memory: &Memory) -> std::io::Result<()> {
    let end = Instant::now() + KILLING;
    loop {
        let mut found = 0;
        for directory in memory.cgroups().directories()? {
            walk(&directory, Empty::Stay, &mut |cgroup, below| {
                let here = kill_in(cgroup, below)?;
                found += here.killed;
                Ok(here.roots)
            })?;
        }
        if found == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(std::io::Error::other("some of its processes do not end"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What was found in a cgroup.
struct Found {
    /// Processes that are not root's.
    killed: usize,
    /// There are some of root's.
    roots: bool,
}

/// Kills what is not root's in one cgroup. Where root has nothing, here and below, the kernel is told to let none be born
/// meanwhile.
fn kill_in(cgroup: &OwnedFd, roots_below: bool) -> std::io::Result<Found> {
    let (mut found, first) = (
        Found {
            killed: 0,
            roots: false,
        },
        cgroups::members(cgroup)?,
    );
    let mut ours = Vec::new();
    for pid in &first {
        let Some(held) = Held::child(*pid) else {
            continue;
        };
        match proc::real_uid(*pid) {
            Ok(0) => found.roots = true,
            Ok(_) if held.is_alive() => ours.push((*pid, held)),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if ours.is_empty() {
        return Ok(found);
    }
    let alone = !found.roots && !roots_below;
    let frozen = alone && write(cgroup, "freezer.state", "FROZEN");
    if alone {
        write(cgroup, "cgroup.kill", "1");
    }
    // The number of one that has ended can be another's by now: one that is here still, and lives, is the one that is held.
    let again = cgroups::members(cgroup)?;
    for (pid, held) in ours {
        if again.contains(&pid) && held.is_alive() {
            held.signal(Signal::KILL);
        }
        found.killed += 1;
    }
    if alone {
        for pid in again.difference(&first) {
            // Born since: nobody but the user has anything here.
            let held = Held::child(*pid);
            if held.is_some_and(|held| is_users(*pid) && held.signal(Signal::KILL)) {
                found.killed += 1;
            }
        }
    }
    if frozen {
        write(cgroup, "freezer.state", "THAWED");
    }
    Ok(found)
}

fn is_users(pid: i32) -> bool {
    proc::real_uid(pid).is_ok_and(|uid| uid != 0)
}

fn write(cgroup: &OwnedFd, name: &str, word: &str) -> bool {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(cgroup, name, flags, Mode::empty())
        .and_then(|fd| rustix::io::write(&fd, word.as_bytes()))
        .is_ok()
}

/// Removes what is empty of the job's cgroups: of the batch script's, Slurm leaves what we were in when it ended. With
/// `PrologFlags=RunInJob` the extern step outlives the Epilog, which is in the job, and is removed by itself. False when
/// Slurm is still at it: a slurmstepd complains in the job's output when its directory is gone, and does not try again what
/// it could not remove.
pub(super) fn remove_cgroups(memory: &Memory, in_job: bool) -> std::io::Result<bool> {
    let (id, cgroups) = (memory.job.id, memory.cgroups());
    if cgroups.directories()?.is_empty() {
        return Ok(true);
    }
    let is_ending = |step: &String| !in_job || step != "extern";
    let end = Instant::now() + ENDING;
    while steps::of_job(id)?.iter().any(is_ending) {
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let keep_extern = !steps::of_job(id)?.is_empty();
    for directory in cgroups.to_be_removed(keep_extern)? {
        walk(&directory, Empty::Go, &mut |_, _| Ok(false))?;
        let _ = std::fs::remove_dir(directory);
    }
    Ok(true)
}

/// A cgroup on the way to the one that is looked at.
struct Level {
    /// Those in it that have not been looked at.
    rest: Vec<CString>,
    /// What `each` gave for any of those that have.
    below: bool,
    /// Its name in the one above.
    name: CString,
}

/// What becomes of the cgroups below that are empty when they have been looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Empty {
    Stay,
    Go,
}

/// Looks at a cgroup and all below it, the lowest first. `each` is told whether it has given true for any below. However
/// deep it goes: `..` leads back, where nothing can be moved to another parent.
fn walk(
    top: &Path,
    empty: Empty,
    each: &mut dyn FnMut(&OwnedFd, bool) -> std::io::Result<bool>,
) -> std::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut here = match rustix::fs::open(top, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut levels = vec![Level {
        rest: names(&here)?,
        below: false,
        name: CString::default(),
    }];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.rest.pop() {
            match rustix::fs::openat(&here, &name, flags, Mode::empty()) {
                Ok(fd) => here = fd,
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => continue,
                Err(error) => return Err(error.into()),
            }
            levels.push(Level {
                rest: names(&here)?,
                below: false,
                name,
            });
            continue;
        }
        let given = each(&here, level.below)? || level.below;
        let name = std::mem::take(&mut level.name);
        levels.pop();
        if let Some(above) = levels.last_mut() {
            above.below |= given;
            here = rustix::fs::openat(&here, "..", flags, Mode::empty())?;
            if empty == Empty::Go {
                let _ = rustix::fs::unlinkat(&here, &name, AtFlags::REMOVEDIR);
            }
        }
    }
    Ok(())
}

/// The directories in a directory.
fn names(directory: &OwnedFd) -> std::io::Result<Vec<CString>> {
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = match entry {
            Ok(entry) => entry,
            // It is just being removed.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => break,
            Err(error) => return Err(error.into()),
        };
        let name = entry.file_name();
        let is_directory = entry.file_type() == FileType::Directory;
        if is_directory && name != c"." && name != c".." {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn every_cgroup_is_seen_whatever_its_name_and_depth() {
        let top = tempfile::tempdir().unwrap();
        for name in [&b"a"[..], b"\xff", b"m\xc3", b" ", b"a\tb"] {
            let directory = top.path().join(OsStr::from_bytes(name));
            std::fs::create_dir(&directory).unwrap();
            std::fs::create_dir(directory.join("b")).unwrap();
        }
        // Deeper than a path can be long, and than there may be descriptors.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut here = rustix::fs::open(top.path(), flags, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&here, "deep", Mode::RWXU).unwrap();
            here = rustix::fs::openat(&here, "deep", flags, Mode::empty()).unwrap();
        }
        let mut seen = 0;
        let mut told = 0;
        walk(top.path(), Empty::Stay, &mut |_, _| Ok(false)).unwrap();
        assert_eq!(std::fs::read_dir(top.path()).unwrap().count(), 6);
        walk(top.path(), Empty::Go, &mut |_, below| {
            seen += 1;
            told += usize::from(below);
            // As if root had something in the very lowest.
            Ok(seen == 1)
        })
        .unwrap();
        assert_eq!(seen, 1 + 5 * 2 + 3000);
        assert!(told >= 2, "what is below is told all the way up: {told}");
        let left = std::fs::read_dir(top.path()).unwrap().count();
        assert_eq!(left, 0, "what is empty is removed");
    }
}
