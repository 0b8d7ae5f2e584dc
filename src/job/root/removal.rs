//! Removing a job's directory, which its user could write: by descriptors, following no link and entering no mount.
//!
//! First all mounts go, from the job's directory itself on down: a file system of the user's may never answer, and whoever
//! looks into it hangs. Then each directory becomes root's before it is looked at, so that nobody adds to it; what lies
//! deeper is moved up into the job's directory, which is the queue: there is no depth.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use super::memory::Top;
use crate::proc::mounts;

/// Rounds in which mounts are detached: one for each that lies upon another, or is made meanwhile.
const ROUNDS: usize = 2000;

/// Detaches what is mounted on a job's directory and below it. The outermost go first, and take along what is on them.
///
/// # Errors
/// When some stay, or the table of mounts cannot be read.
pub(super) fn detach(top: &Top, name: &str) -> Result<()> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", top.0.as_raw_fd()));
    let place = path.context("/run/capsid")?.join(name);
    for _ in 0..ROUNDS {
        let table = mounts::table().context("cannot read the table of mounts")?;
        let points = table.into_iter().map(|mount| mount.point);
        let points = outermost(points.filter(|p| p.starts_with(&place)).collect());
        if points.is_empty() {
            return Ok(());
        }
        for point in points {
            let below = point.strip_prefix(&place).unwrap_or(Path::new(""));
            // One that has just been moved or detached is seen by the next look at the table.
            let _ = detach_one(top, &Path::new(name).join(below));
        }
    }
    bail!("something is mounted on {} and stays", place.display())
}

/// Those that lie below no other.
fn outermost(mut points: Vec<PathBuf>) -> Vec<PathBuf> {
    // By components: each comes before what lies below it, with nothing else between.
    points.sort();
    points.dedup();
    points.dedup_by(|point, before| point.starts_with(before));
    points
}

/// Detaches the mount at a path. The way there leads through no link and no mount, name by name, for it may be longer than
/// a path can be; its end is not entered.
fn detach_one(top: &Top, path: &Path) -> rustix::io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV | ResolveFlags::BENEATH;
    let mut names: Vec<&OsStr> = path.components().map(Component::as_os_str).collect();
    let Some(last) = names.pop() else {
        return Ok(());
    };
    let mut here = top.0.try_clone().map_err(|_| Errno::MFILE)?;
    for name in names {
        here = rustix::fs::openat2(&here, name, flags, Mode::empty(), resolve)?;
    }
    let mut point = format!("/proc/self/fd/{}/", here.as_raw_fd()).into_bytes();
    point.extend(last.as_bytes());
    rustix::mount::unmount(
        OsStr::from_bytes(&point),
        rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW,
    )
}

/// Removes a job's directory with all that is in it.
///
/// # Errors
/// When something stays, by the time `end` or at all.
pub(super) fn remove(top: &Top, name: &str, end: Instant) -> Result<()> {
    let what = || format!("cannot remove {}/{name}", crate::host::JOBS);
    let flags = AtFlags::REMOVEDIR;
    loop {
        match rustix::fs::unlinkat(&top.0, name, flags) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Something has been mounted there just now.
            Err(Errno::BUSY) => detach(top, name)?,
            Err(Errno::NOTDIR) => {
                return rustix::fs::unlinkat(&top.0, name, AtFlags::empty()).with_context(what);
            }
            Err(Errno::NOTEMPTY | Errno::EXIST) => match empty(&top.0, name, end) {
                Ok(()) => {}
                Err(Errno::BUSY | Errno::XDEV) => detach(top, name)?,
                Err(error) => return Err(error).with_context(what),
            },
            Err(error) => return Err(error).with_context(what),
        }
        if Instant::now() >= end {
            bail!("{}: there is too much in it for now", what());
        }
    }
}

/// Opens a directory and makes it its caller's alone: nobody adds to it any more, whoever has it open.
fn seize(parent: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV | ResolveFlags::BENEATH;
    let fd = rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)?;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    rustix::fs::fchown(
        &fd,
        Some(Uid::from_raw(uid.as_raw())),
        Some(Gid::from_raw(gid.as_raw())),
    )?;
    rustix::fs::fchmod(&fd, Mode::RWXU)?;
    Ok(fd)
}

/// Empties a directory, as far as it can be done until `end`.
fn empty(parent: &OwnedFd, name: &str, end: Instant) -> rustix::io::Result<()> {
    let queue = seize(parent, name)?;
    let mut number = 0_u64;
    loop {
        let mut done = 0;
        each(&queue, &mut |entry| {
            match remove_entry(&queue, entry) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    move_up(&queue, entry, &mut number)?;
                    // Empty now, unless somebody with an open directory in it was quicker: then it is looked at again.
                    let _ = remove_entry(&queue, entry);
                }
                other => other?,
            }
            done += 1;
            Ok(Instant::now() < end)
        })?;
        if done == 0 || Instant::now() >= end {
            return Ok(());
        }
    }
}

/// Empties a directory of the queue: what is not empty in it becomes an entry of the queue itself.
fn move_up(queue: &OwnedFd, name: &CStr, number: &mut u64) -> rustix::io::Result<()> {
    let directory = seize(queue, name)?;
    each(&directory, &mut |entry| {
        match remove_entry(&directory, entry) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => loop {
                *number += 1;
                let free = format!("{number}");
                let flags = RenameFlags::NOREPLACE;
                match rustix::fs::renameat_with(&directory, entry, queue, free, flags) {
                    Err(Errno::EXIST) => {}
                    other => break other?,
                }
            },
            other => other?,
        }
        Ok(true)
    })
}

/// Removes a file, whatever it is, or an empty directory.
fn remove_entry(directory: &OwnedFd, name: &CStr) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(Errno::NOENT) => return Ok(()),
        other => return other,
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Goes through the entries of a directory, as long as `each` gives true.
fn each(
    directory: &OwnedFd,
    each: &mut dyn FnMut(&CStr) -> rustix::io::Result<bool>,
) -> rustix::io::Result<()> {
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." && !each(name)? {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn top() -> (tempfile::TempDir, Top) {
        let directory = tempfile::tempdir().unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(directory.path(), flags, Mode::empty()).unwrap();
        (directory, Top(fd))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(100)
    }

    #[test]
    fn whatever_is_in_it_goes() {
        let (directory, top) = top();
        let job = directory.path().join("job-1");
        let canary = directory.path().join("canary");
        std::fs::create_dir(&canary).unwrap();
        std::fs::write(canary.join("alive"), "").unwrap();
        std::fs::create_dir(&job).unwrap();
        for name in [
            &b"\xff"[..],
            b"m\xc3",
            b" ",
            b"-rf",
            b"a\nb",
            b"1",
            b"2",
            b"\\040",
        ] {
            let place = job.join(OsStr::from_bytes(name));
            std::fs::create_dir(&place).unwrap();
            std::fs::create_dir(place.join("1")).unwrap();
            std::fs::write(place.join("1").join(OsStr::from_bytes(name)), "").unwrap();
            std::os::unix::fs::symlink(&canary, place.join("link")).unwrap();
            nix::unistd::mkfifo(&place.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        std::os::unix::fs::symlink(&canary, job.join("link")).unwrap();
        for number in 0..3000 {
            std::fs::write(job.join(format!("file-{number}")), "").unwrap();
        }
        remove(&top, "job-1", soon()).unwrap();
        assert!(!job.exists() && canary.join("alive").exists());
        // Again, and what is no directory.
        remove(&top, "job-1", soon()).unwrap();
        std::os::unix::fs::symlink(&canary, &job).unwrap();
        remove(&top, "job-1", soon()).unwrap();
        assert!(job.symlink_metadata().is_err() && canary.join("alive").exists());
    }

    #[test]
    fn there_is_no_depth() {
        let (directory, top) = top();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        std::fs::create_dir(directory.path().join("job-1")).unwrap();
        let mut here = rustix::fs::openat(&top.0, "job-1", flags, Mode::empty()).unwrap();
        for level in 0..3000 {
            for name in ["deep", "beside"] {
                rustix::fs::mkdirat(&here, name, Mode::RWXU).unwrap();
            }
            let file = format!("{level}");
            let create = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            drop(rustix::fs::openat(&here, file, create, Mode::RUSR).unwrap());
            here = rustix::fs::openat(&here, "deep", flags, Mode::empty()).unwrap();
        }
        remove(&top, "job-1", soon()).unwrap();
        assert!(!directory.path().join("job-1").exists());
    }

    #[test]
    fn what_time_does_not_suffice_for_is_an_error() {
        let (directory, top) = top();
        std::fs::create_dir_all(directory.path().join("job-1/a/b")).unwrap();
        let error = remove(&top, "job-1", Instant::now()).unwrap_err();
        assert!(format!("{error:#}").contains("too much"), "{error:#}");
        remove(&top, "job-1", soon()).unwrap();
    }

    #[test]
    fn outermost_mounts_come_first() {
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect::<Vec<_>>();
        let found = outermost(paths(&[
            "/j/b/c", "/j/a b", "/j/a", "/j/a/x", "/j/b/c", "/j/a/x/y",
        ]));
        assert_eq!(found, paths(&["/j/a", "/j/a b", "/j/b/c"]));
        assert_eq!(outermost(paths(&["/j/x", "/j", "/j/y"])), paths(&["/j"]));
    }
}
