//! The files that one thread can name, as it would find them itself.
//!
//! **Where a path begins** is one of these: the thread's root, its working directory, a descriptor that it has open, or
//! one of the links in `/proc/self` that stand for these. Only such a beginning is opened through the host's procfs, by a
//! name made of numbers alone, and it counts when the call still waits afterwards: the number was the thread's then.
//!
//! **The rest** is resolved from there with the thread's root as this thread's own (`chroot(2)`), so links and `..` end
//! where they end for the thread, and without magic links (`RESOLVE_NO_MAGICLINKS` in `openat2(2)`): what `/proc/self` and
//! its like mean depends on who asks, and here that would be the supervisor, who has the host's root. A path that needs
//! one is the kernel's to resolve, in the thread itself.
//!
//! Nothing is decided by a path twice. It is read once, and what it names is opened once for reference (`O_PATH`);
//! everything is done to what is open, or to a plain name in it.

use std::ffi::CString;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::super::sys;
use super::filter::At;
use super::supervisor::Shared;
use super::tracee::{Rights, Tracee};

/// One thread's files, while its call waits. This thread of the supervisor has the other's root meanwhile.
pub struct View<'a> {
    /// Who asks.
    pub tracee: &'a Tracee<'a>,
    _elsewhere: Option<Elsewhere<'a>>,
}

/// A file that a call names, its path read from memory that may change.
pub struct Named {
    dir: i32,
    path: Vec<u8>,
    follow: bool,
}

/// Where a path begins.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Start {
    /// The thread's root.
    Root,
    /// This link in the thread's directory of procfs.
    Thread(String),
    /// This link in its process's.
    Process(String),
}

/// `PROC_SUPER_MAGIC` of `statfs(2)`.
pub const PROC_MAGIC: i64 = 0x9fa0;
/// `STATX_MNT_ID` (Linux 5.8).
const STATX_MNT_ID: u32 = 0x1000;

impl Named {
    /// Whether the path ends in a slash: then only a directory may be there.
    pub fn wants_directory(&self) -> bool {
        self.path.ends_with(b"/")
    }

    /// The directory that a new file is to be in, and the file's name there; `None` when the last component is no name.
    fn split(&self) -> Option<(&[u8], CString)> {
        let end = self.path.iter().rposition(|b| *b != b'/')? + 1;
        let start = self.path[..end]
            .iter()
            .rposition(|b| *b == b'/')
            .map_or(0, |i| i + 1);
        let name = &self.path[start..end];
        let plain = name != b"." && name != b"..";
        // The slash at the directory's end stays: only a directory will do.
        plain.then_some((&self.path[..start], CString::new(name).ok()?))
    }
}

impl<'a> View<'a> {
    /// Takes the thread's root. `None` when it cannot be had, or when the thread lives in a user namespace below the
    /// container's, whose ids are not those of the record.
    pub fn enter(tracee: &'a Tracee<'a>) -> Option<View<'a>> {
        let shared = tracee.shared;
        let mut elsewhere = None;
        if shared.is_apart.load(Ordering::Acquire) {
            let thread = tracee.note.thread;
            if sys::namespace(shared.proc.as_fd(), thread, "user").ok()? != shared.userns {
                return None;
            }
            elsewhere = tracee.enter_root()?;
        }
        Some(View {
            tracee,
            _elsewhere: elsewhere,
        })
    }

    /// Reads a call's path. `None`: the kernel knows what is wrong with it.
    pub fn named(&self, at: &At) -> Option<Named> {
        let path = match at.path {
            Some(address) => self.tracee.read_path(address)?,
            None => Vec::new(),
        };
        (!path.is_empty() || at.empty).then_some(Named {
            dir: at.dir,
            path,
            follow: at.follow,
        })
    }

    /// Opens a file for reference only, while its call waits.
    pub fn open(&self, file: &Named) -> Option<OwnedFd> {
        self.resolve(file.dir, &file.path, file.follow, None)
    }

    /// Opens the directory in which a new file is to be, with these rights, and gives the file's name.
    pub fn open_parent(&self, file: &Named, rights: &Rights) -> Option<(OwnedFd, CString)> {
        let (directory, name) = file.split()?;
        Some((self.resolve(file.dir, directory, true, Some(rights))?, name))
    }

    fn resolve(
        &self,
        dir: i32,
        path: &[u8],
        follow: bool,
        rights: Option<&Rights>,
    ) -> Option<OwnedFd> {
        let (start, rest) = begin(dir, path)?;
        if path.starts_with(DEV_FD) && !is_own_descriptors(DEV_FD) {
            return None;
        }
        let base = match &start {
            Start::Root => None,
            link => Some(self.open_link(link)?),
        };
        // The thread's links are opened by the supervisor's right to look at it.
        let taken = match rights {
            Some(rights) => Some(rights.take()?),
            None => None,
        };
        let file = match base {
            None => open_below(CWD, rest, follow)?,
            Some(base) if rest.is_empty() => {
                // A link that is not followed is a file of procfs.
                if !follow && !path.is_empty() {
                    return None;
                }
                base
            }
            Some(base) => open_below(base.as_fd(), rest, follow)?,
        };
        drop(taken);
        // Only now is it sure that the number, and its root, are those of who asks.
        self.tracee.is_pending().then_some(file)
    }

    /// Opens what a link in the thread's own directory of procfs stands for.
    fn open_link(&self, start: &Start) -> Option<OwnedFd> {
        let path = match start {
            Start::Root => return None,
            Start::Thread(link) => format!("{}/{link}", self.tracee.note.thread),
            Start::Process(link) => {
                // By an absolute path: does it lead to procfs in this root?
                let own = open_below(CWD, b"/proc", true)?;
                let kind = rustix::fs::fstatfs(&own).ok()?.f_type;
                if kind as i64 != PROC_MAGIC {
                    return None;
                }
                format!("{}/{link}", self.tracee.status()?.process)
            }
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat(&self.tracee.shared.proc, path, flags, Mode::empty()).ok()
    }
}

/// Where a path begins, and what is left of it from there.
fn begin(dir: i32, path: &[u8]) -> Option<(Start, &[u8])> {
    if path.starts_with(b"/") {
        return Some(own_link(path).unwrap_or((Start::Root, path)));
    }
    let link = match dir {
        libc::AT_FDCWD => "cwd".to_owned(),
        fd if fd >= 0 => format!("fd/{fd}"),
        _ => return None,
    };
    Some((Start::Thread(link), path))
}

/// Another name of `/proc/self/fd`, where it is a link to that.
const DEV_FD: &[u8] = b"/dev/fd/";

fn is_own_descriptors(link: &[u8]) -> bool {
    let link = link.strip_suffix(b"/").unwrap_or(link);
    rustix::fs::readlink(link, Vec::new()).is_ok_and(|to| to.as_bytes() == b"/proc/self/fd")
}

/// The links that programs name themselves by.
fn own_link(path: &[u8]) -> Option<(Start, &[u8])> {
    let (thread, link) = if path.starts_with(DEV_FD) {
        (false, path.strip_prefix(b"/dev/")?)
    } else if let Some(rest) = path.strip_prefix(b"/proc/self/") {
        (false, rest)
    } else {
        (true, path.strip_prefix(b"/proc/thread-self/")?)
    };
    let mut parts = link.splitn(2, |b| *b == b'/');
    let (first, mut rest) = (parts.next()?, parts.next());
    let name = match first {
        b"cwd" | b"root" => String::from_utf8(first.to_vec()).ok()?,
        b"fd" => {
            let mut parts = rest?.splitn(2, |b| *b == b'/');
            let number: u32 = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
            rest = parts.next();
            format!("fd/{number}")
        }
        _ => return None,
    };
    let rest = match rest {
        None => &[][..],
        Some(rest) => {
            let start = rest.iter().position(|b| *b != b'/');
            // Nothing but slashes: what is there must be a directory.
            start.map_or(&b"."[..], |start| &rest[start..])
        }
    };
    let start = if thread {
        Start::Thread(name)
    } else {
        Start::Process(name)
    };
    Some((start, rest))
}

fn open_below(base: BorrowedFd, path: &[u8], follow: bool) -> Option<OwnedFd> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    flags.set(OFlags::NOFOLLOW, !follow);
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let resolve = ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(base, path, flags, Mode::empty(), resolve).ok()
}

impl Tracee<'_> {
    /// Takes its root while the answer lives, when that is another one than the container's.
    fn enter_root(&self) -> Option<Option<Elsewhere<'_>>> {
        let path = CString::new(format!("{}/root", self.note.thread)).ok()?;
        let mask = libc::STATX_INO | STATX_MNT_ID;
        let its = sys::statx(self.shared.proc.as_fd(), &path, 0, mask).ok()?;
        let ours = sys::statx(CWD, c"/", 0, mask).ok()?;
        let same = |s: &libc::statx| (s.stx_mnt_id, s.stx_ino);
        if same(&its) == same(&ours) {
            return Some(None);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.shared.proc, &path, flags, Mode::empty()).ok()?;
        let elsewhere = Elsewhere(self.shared);
        enter(&root).ok()?;
        // Else the number may be another process's by now, and so may its root.
        self.is_pending().then_some(Some(elsewhere))
    }
}

/// Back to the container's root when it goes.
struct Elsewhere<'a>(&'a Shared);

impl Drop for Elsewhere<'_> {
    fn drop(&mut self) {
        if enter(&self.0.root).is_err() {
            // No thread may go on with a root that is not the container's.
            sys::exit_now(255);
        }
    }
}

/// Makes an open directory the root and the working directory of this thread, which shares them with no other.
///
/// # Errors
/// As `chroot(2)`.
pub fn enter(root: &OwnedFd) -> rustix::io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(path: &str) -> (Start, &[u8]) {
        begin(libc::AT_FDCWD, path.as_bytes()).unwrap()
    }

    #[test]
    fn path_begins_where_the_thread_stands() {
        let cwd = || Start::Thread("cwd".into());
        assert_eq!(start("a/../b"), (cwd(), &b"a/../b"[..]));
        assert_eq!(start(""), (cwd(), &b""[..]));
        assert_eq!(start("/a"), (Start::Root, &b"/a"[..]));
        assert_eq!(
            begin(7, b"x"),
            Some((Start::Thread("fd/7".into()), &b"x"[..]))
        );
        assert_eq!(begin(-1, b"x"), None);
    }

    #[test]
    fn only_whole_links_of_ones_own_are_known() {
        let process = |link: &str| Start::Process(link.into());
        for (path, link, rest) in [
            ("/proc/self/cwd", "cwd", ""),
            ("/proc/self/cwd/", "cwd", "."),
            ("/proc/self/cwd//a/../b", "cwd", "a/../b"),
            ("/proc/self/root/etc", "root", "etc"),
            ("/proc/self/fd/3", "fd/3", ""),
            ("/proc/self/fd/3/../x", "fd/3", "../x"),
            ("/dev/fd/3", "fd/3", ""),
            ("/dev/fd/3/x", "fd/3", "x"),
        ] {
            assert_eq!(start(path), (process(link), rest.as_bytes()), "{path}");
        }
        let thread = Start::Thread("fd/0".into());
        assert_eq!(start("/proc/thread-self/fd/0"), (thread, &b""[..]));
        for path in [
            "/proc/self/../self/root/etc",
            "/proc/self/exe",
            "/dev/fd/../self/root",
            "/dev/fd",
            "/dev/cwd",
            "/proc/self/fd",
            "/proc/self/fd/../cwd",
            "/proc/self/fd/-1",
            "/proc/self/fd/3x",
            "/proc/self/rootx",
            "/proc/self/task/1/root",
            "/proc/self",
            "/proc/1/root",
            "/proc//self/cwd",
        ] {
            assert_eq!(start(path), (Start::Root, path.as_bytes()), "{path}");
        }
    }

    #[test]
    fn name_of_a_new_file_is_one_component() {
        let split = |path: &str| {
            let file = Named {
                dir: 0,
                path: path.into(),
                follow: false,
            };
            let (directory, name) = file.split()?;
            Some((
                String::from_utf8(directory.to_vec()).ok()?,
                name.into_string().ok()?,
            ))
        };
        let some = |directory: &str, name: &str| Some((directory.to_owned(), name.to_owned()));
        assert_eq!(split("a"), some("", "a"));
        assert_eq!(split("/a"), some("/", "a"));
        assert_eq!(split("d/../a//"), some("d/../", "a"));
        for path in ["", "/", "//", ".", "d/..", "d/../", "../."] {
            assert_eq!(split(path), None, "{path}");
        }
    }
}
