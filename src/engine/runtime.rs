//! The runtime directory of a user on this node: where the sockets of the image servers are.
//!
//! `$XDG_RUNTIME_DIR/capsid`, else `/run/user/UID/capsid` (batch jobs often lack the variable), else `capsid-UID` in
//! `/tmp`, `/dev/shm` or `/var/tmp`, where others may have made it before. It must be ours, of mode 0700 and on a file system
//! of this node; a directory that is not so is refused and not repaired, and without one every run simply has an image server
//! of its own. It may go at any time: what has to be found again by another login is not kept there.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

use crate::filesystem;

/// How the name of a file begins that is still being written; the writer's number follows.
pub const DRAFT: &str = "new.";

/// The directory, open.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    /// For messages.
    pub path: PathBuf,
}

/// Opens the directory, making it when it is not there. `None` when no place is fit.
pub fn open(uid: u32, xdg: Option<&OsStr>) -> Option<Directory> {
    let xdg = xdg.map(PathBuf::from).filter(|p| p.is_absolute());
    let homes = xdg
        .into_iter()
        .chain([PathBuf::from(format!("/run/user/{uid}"))]);
    for home in homes {
        // The parent must be ours alone, or somebody else could swap what is below it.
        if is_private(&home, uid)
            && let Some(found) = open_below(&home.join("capsid"), uid)
        {
            return Some(found);
        }
    }
    PUBLIC
        .iter()
        .find_map(|place| open_below(&Path::new(place).join(format!("capsid-{uid}")), uid))
}

/// Directories that all users write to, in the order in which they are tried.
const PUBLIC: [&str; 3] = ["/tmp", "/dev/shm", "/var/tmp"];

/// All directories of the user that there are, below these homes and in the usual places.
pub fn present(uid: u32, homes: impl IntoIterator<Item = PathBuf>) -> Vec<Directory> {
    let usual = [PathBuf::from(format!("/run/user/{uid}"))];
    let private = homes
        .into_iter()
        .chain(usual)
        .filter(|home| home.is_absolute() && is_private(home, uid))
        .map(|home| home.join("capsid"));
    let public = PUBLIC
        .iter()
        .map(|place| Path::new(place).join(format!("capsid-{uid}")));
    let paths: std::collections::BTreeSet<PathBuf> = private.chain(public).collect();
    paths
        .iter()
        .filter_map(|path| open_present(path, uid))
        .collect()
}

fn is_private(path: &Path, uid: u32) -> bool {
    rustix::fs::stat(path).is_ok_and(|s| s.st_uid == uid && s.st_mode & 0o022 == 0)
}

fn open_below(path: &Path, uid: u32) -> Option<Directory> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) => rustix::fs::chmod(path, Mode::RWXU).unwrap_or_default(),
        Err(rustix::io::Errno::EXIST) => {}
        Err(_) => return None,
    }
    open_present(path, uid)
}

fn open_present(path: &Path, uid: u32) -> Option<Directory> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&fd).ok()?;
    let local = rustix::fs::fstatfs(&fd).is_ok_and(|s| !filesystem::is_network(s.f_type as u64));
    (stat.st_uid == uid && stat.st_mode & 0o777 == 0o700 && local).then(|| Directory {
        fd,
        path: path.to_owned(),
    })
}

/// Exclusive use of the directory, until dropped.
pub struct Lock<'a>(&'a Directory);

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.0.fd, FlockOperation::Unlock);
    }
}

impl Directory {
    /// Waits for the lock. It is held for a few system calls only.
    pub fn lock(&self) -> Option<Lock<'_>> {
        rustix::fs::flock(&self.fd, FlockOperation::LockExclusive)
            .ok()
            .map(|()| Lock(self))
    }

    /// A path to `name` that fits a socket address however deep the directory is, and that cannot be swapped.
    pub fn entry(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// Removes an entry.
    pub fn remove(&self, name: &str) {
        let _ = rustix::fs::unlinkat(self.fd.as_fd(), name, AtFlags::empty());
    }

    /// The names in it.
    pub fn entries(&self) -> Vec<String> {
        let Ok(entries) = rustix::fs::Dir::read_from(&self.fd) else {
            return Vec::new();
        };
        let names = entries.flatten().map(|e| e.file_name().to_owned());
        names.filter_map(|name| name.into_string().ok()).collect()
    }

    /// Reads a regular file of ours, of at most so many bytes; `None` when there is none.
    pub fn read(&self, name: &str, max_bytes: u64) -> Option<Vec<u8>> {
        use std::io::Read as _;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&fd).ok()?;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        let own = stat.st_uid == rustix::process::getuid().as_raw() && stat.st_mode & 0o077 == 0;
        if !regular || !own || u64::try_from(stat.st_size).ok()? > max_bytes {
            return None;
        }
        let mut bytes = Vec::new();
        std::fs::File::from(fd)
            .take(max_bytes)
            .read_to_end(&mut bytes)
            .ok()?;
        Some(bytes)
    }

    /// Writes a file of mode 0600 beside the old one and puts it into its place.
    ///
    /// # Errors
    /// As the system calls; the old file then stands.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        use std::io::Write as _;
        let draft = format!(
            "{DRAFT}{}.{name}",
            rustix::process::getpid().as_raw_nonzero()
        );
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, &draft, flags, Mode::RUSR | Mode::WUSR)?;
        let written = std::fs::File::from(fd).write_all(bytes);
        let done = written.and_then(|()| {
            rustix::fs::renameat(&self.fd, &draft, &self.fd, name).map_err(Into::into)
        });
        if done.is_err() {
            self.remove(&draft);
        }
        done
    }

    /// Removes drafts of processes that were killed while they wrote.
    pub fn sweep(&self) {
        let _lock = self.lock();
        for file in self.entries() {
            let writer = file.strip_prefix(DRAFT).and_then(|rest| {
                let (pid, _) = rest.split_once('.')?;
                rustix::process::Pid::from_raw(pid.parse().ok()?)
            });
            let is_gone =
                |pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH);
            if writer.is_some_and(is_gone) {
                self.remove(&file);
            }
        }
    }

    /// A descriptor of its own, for a process that outlives this one. The lock belongs to the open file, so
    /// the copy is opened anew.
    pub fn reopen(&self) -> Option<Directory> {
        let fd = rustix::fs::openat(
            &self.fd,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
        Some(Directory {
            fd,
            path: self.path.clone(),
        })
    }

    /// The descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}
