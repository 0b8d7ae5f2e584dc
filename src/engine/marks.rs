//! Layers that fuse-overlayfs has written: its marks for what is deleted, which the kernel's overlayfs does not know.
//!
//! Where it cannot make a device 0:0, it writes an empty file `.wh.NAME` for a name that is gone; a directory that hides the
//! one below has a file `.wh..wh..opq` or an attribute `user.fuseoverlayfs.opaque` (`fuse-overlayfs.1`; the files are
//! those of AUFS and OCI layers). A file of the same name as a mark is newer than what the mark hides: it stays, and a
//! directory hides the one below.
//!
//! * In a layer that is written, marks become the kernel's own, which fuse-overlayfs knows too.
//! * One that is only read is not touched: a layer *below* it deletes the names, and one *above* it hides the marks.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

use super::session::Session;

/// Begins the name of a mark.
const PREFIX: &[u8] = b".wh.";
/// The mark of a directory that hides the one below.
const OPAQUE_FILE: &str = ".wh..wh..opq";
/// The same as an attribute: of fuse-overlayfs, and of the kernel with `userxattr`.
const OPAQUE_FUSE: &str = "user.fuseoverlayfs.opaque";
const OPAQUE_KERNEL: &str = "user.overlay.opaque";

/// Marks in one directory.
#[derive(Debug, Default, PartialEq, Eq)]
struct Marks {
    /// Names that are gone.
    gone: Vec<OsString>,
    /// Names of files that are marks.
    files: Vec<OsString>,
    /// It hides the directory below.
    opaque: bool,
}

/// Directories of a layer that have marks, by their path in it, parents first.
pub(super) struct Marked(BTreeMap<PathBuf, Marks>);

impl Marked {
    /// Looks through a layer. Directories that may not be read are left as they are: overlayfs cannot read them either.
    pub(super) fn find(layer: BorrowedFd) -> Option<Marked> {
        let mut marked: BTreeMap<PathBuf, Marks> = BTreeMap::new();
        let mut open = vec![PathBuf::new()];
        while let Some(path) = open.pop() {
            let Ok(dir) = directory(layer, &path) else {
                continue;
            };
            let mut marks = Marks::default();
            let mut children = Vec::new();
            list(&dir, |name, kind| {
                if kind == FileType::Directory {
                    children.push(OsStr::from_bytes(name).to_owned());
                } else if name.starts_with(PREFIX) && kind == FileType::RegularFile {
                    marks.files.push(OsStr::from_bytes(name).to_owned());
                }
            });
            // Marks are empty; what has content is somebody's file.
            marks.files.retain(|name| {
                rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
                    .is_ok_and(|s| s.st_size == 0)
            });
            for name in &marks.files {
                let gone = OsStr::from_bytes(&name.as_bytes()[PREFIX.len()..]);
                match name == OPAQUE_FILE {
                    true => marks.opaque = true,
                    false if gone.is_empty() => {}
                    false => marks.gone.push(gone.to_owned()),
                }
            }
            marks.opaque |= is_marked(&dir);
            // What is there again is not gone; but what a directory lies over is.
            for name in std::mem::take(&mut marks.gone) {
                match rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => marks.gone.push(name),
                    Ok(stat) if FileType::from_raw_mode(stat.st_mode).is_dir() => {
                        marked.entry(path.join(name)).or_default().opaque = true;
                    }
                    _ => {}
                }
            }
            if marks != Marks::default() {
                let known = marked.entry(path.clone()).or_default();
                marks.opaque |= known.opaque;
                *known = marks;
            }
            open.extend(children.into_iter().map(|name| path.join(name)));
        }
        (!marked.is_empty()).then_some(Marked(marked))
    }

    /// Makes the kernel's marks of them.
    ///
    /// # Errors
    /// When the layer's file system has none, or the caller may not write there.
    pub(super) fn translate(&self, layer: BorrowedFd) -> Result<()> {
        for (path, marks) in &self.0 {
            let what = || {
                format!(
                    "cannot translate the marks of fuse-overlayfs in {}",
                    path.display()
                )
            };
            let dir = directory(layer, path).with_context(what)?;
            if marks.opaque {
                rustix::fs::fsetxattr(&dir, OPAQUE_KERNEL, b"y", XattrFlags::empty())
                    .with_context(what)?;
            }
            for name in &marks.gone {
                match whiteout(dir.as_fd(), name) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno).with_context(what),
                }
            }
            // The marks go last: what ends halfway is done again.
            for name in &marks.files {
                match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(errno) => return Err(errno).with_context(what),
                }
            }
        }
        Ok(())
    }

    /// Layers to lie directly above and below the one that has the marks.
    ///
    /// # Errors
    /// When there is no memory.
    pub(super) fn shadow(&self, layer: BorrowedFd, session: &mut Session) -> Result<[OwnedFd; 2]> {
        let (above, _) = session.directory(0o755)?;
        let (below, _) = session.directory(0o755)?;
        for (path, marks) in &self.0 {
            let what = || format!("cannot shadow the layer's {}", path.display());
            if !marks.files.is_empty() {
                let dir = make_all(above.as_fd(), path).with_context(what)?;
                for name in &marks.files {
                    whiteout(dir.as_fd(), name).with_context(what)?;
                }
            }
            // Where a directory above hides all of this, there is nothing to delete.
            let hidden = path
                .ancestors()
                .skip(1)
                .any(|up| self.0.get(up).is_some_and(|m| m.opaque));
            if hidden {
                continue;
            }
            match (marks.opaque, path.parent(), path.file_name()) {
                (true, Some(parent), Some(name)) => {
                    let dir = make_all(below.as_fd(), parent).with_context(what)?;
                    whiteout(dir.as_fd(), name).with_context(what)?;
                }
                _ if marks.gone.is_empty() => {}
                _ => {
                    let dir = make_all(below.as_fd(), path).with_context(what)?;
                    for name in &marks.gone {
                        whiteout(dir.as_fd(), name).with_context(what)?;
                    }
                }
            }
        }
        // Of a directory in several layers the topmost one's attributes are seen.
        for path in self.0.keys().rev().flat_map(|path| path.ancestors()) {
            if let Ok(to) = directory(above.as_fd(), path) {
                look_like(layer, path, &to);
            }
        }
        Ok([above, below])
    }
}

/// Opens a directory of the layer, or the layer itself.
fn directory(layer: BorrowedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    loop {
        match rustix::fs::openat2(layer, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            opened => return opened,
        }
    }
}

/// Calls `f` for each name in a directory but `.` and `..`, with what it is.
fn list(dir: &OwnedFd, mut f: impl FnMut(&[u8], FileType)) {
    let mut room = Vec::with_capacity(64 << 10);
    let mut entries = rustix::fs::RawDir::new(dir, room.spare_capacity_mut());
    while let Some(Ok(entry)) = entries.next() {
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            // Some file systems leave it out.
            FileType::Unknown => {
                rustix::fs::statat(dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                    .map_or(FileType::Unknown, |stat| {
                        FileType::from_raw_mode(stat.st_mode)
                    })
            }
            kind => kind,
        };
        f(name, kind);
    }
}

fn is_marked(dir: &OwnedFd) -> bool {
    let mut value = [0_u8; 1];
    matches!(rustix::fs::fgetxattr(dir, OPAQUE_FUSE, &mut value), Ok(1) if value == *b"y")
}

/// Makes the kernel's mark for a name that is gone.
fn whiteout(dir: BorrowedFd, name: &OsStr) -> rustix::io::Result<()> {
    rustix::fs::mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0)
}

/// A directory of our own tree, made with its parents.
fn make_all(tree: BorrowedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let mut so_far = PathBuf::new();
    for part in path {
        so_far.push(part);
        match rustix::fs::mkdirat(tree, &so_far, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    directory(tree, path)
}

/// Gives a directory mode, owner and time of that in the layer. Ids that do not exist here cannot be given.
fn look_like(layer: BorrowedFd, path: &Path, to: &OwnedFd) {
    let Ok(from) = directory(layer, path) else {
        return;
    };
    let Ok(stat) = rustix::fs::fstat(&from) else {
        return;
    };
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(stat.st_uid),
        rustix::fs::Gid::from_raw(stat.st_gid),
    );
    let _other = rustix::fs::fchown(to, Some(uid), Some(gid));
    let _same = rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777));
    let time = rustix::fs::Timespec {
        tv_sec: stat.st_mtime,
        tv_nsec: stat.st_mtime_nsec as _,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    let _same = rustix::fs::futimens(to, &times);
}
