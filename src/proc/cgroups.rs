//! The cgroups of processes, and the processes of cgroups (`cgroups(7)`).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

/// A cgroup that a process is in: one in each hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// The controllers of the hierarchy; none for version 2.
    pub controllers: String,
    /// Its path in the hierarchy.
    pub path: PathBuf,
}

/// Those of a process.
///
/// # Errors
/// As `read(2)`; also when a path is longer than the kernel writes (`ENAMETOOLONG`).
pub fn of(pid: i32) -> std::io::Result<Vec<Cgroup>> {
    Ok(parse(&std::fs::read(format!("/proc/{pid}/cgroup"))?))
}

/// Those of this process.
///
/// # Errors
/// As [`of`].
pub fn own() -> std::io::Result<Vec<Cgroup>> {
    Ok(parse(&std::fs::read("/proc/self/cgroup")?))
}

/// Lines of `NUMBER:CONTROLLERS:PATH`. A path may hold anything but a line's end, which the kernel forbids.
fn parse(text: &[u8]) -> Vec<Cgroup> {
    let cgroup = |line: &[u8]| {
        let mut parts = line.splitn(3, |b| *b == b':');
        let controllers = parts.nth(1)?;
        Some(Cgroup {
            controllers: String::from_utf8_lossy(controllers).into_owned(),
            path: PathBuf::from(OsString::from_vec(parts.next()?.to_vec())),
        })
    };
    text.split(|b| *b == b'\n').filter_map(cgroup).collect()
}

/// The processes in a cgroup itself. Those of other pid namespaces have no number here. A cgroup that is just being
/// removed has none; nor has one of threads, whose processes its parent names.
///
/// # Errors
/// As `open(2)` and `read(2)`.
pub fn members(directory: &OwnedFd) -> std::io::Result<BTreeSet<i32>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut text = Vec::new();
    let read = rustix::fs::openat(directory, "cgroup.procs", flags, Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|fd| std::fs::File::from(fd).read_to_end(&mut text));
    match read.map_err(|error| (error.raw_os_error(), error)) {
        Ok(_) => {}
        Err((Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP), _)) => {}
        Err((_, error)) => return Err(error),
    }
    let numbers = text.split(|b| !b.is_ascii_digit());
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse().ok();
    Ok(numbers.filter_map(number).filter(|pid| *pid > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn paths_are_bytes() {
        let found = parse(b"4:memory,cpu:/slurm/uid_1/job_2/step_0/\xff:x\n0::/\xc3\n");
        assert_eq!(found[0].controllers, "memory,cpu");
        let path = found[0].path.as_os_str().as_bytes();
        assert_eq!(path, b"/slurm/uid_1/job_2/step_0/\xff:x");
        assert_eq!(found[1].controllers, "");
        assert_eq!(found[1].path.as_os_str().as_bytes(), b"/\xc3");
        assert_eq!(found.len(), 2);
        assert!(!own().unwrap().is_empty());
    }

    #[test]
    fn members_are_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let open = || rustix::fs::open(directory.path(), OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(members(&open()).unwrap(), BTreeSet::new());
        std::fs::write(directory.path().join("cgroup.procs"), "31\n0\n7\n7\n").unwrap();
        assert_eq!(members(&open()).unwrap(), BTreeSet::from([7, 31]));
    }
}
