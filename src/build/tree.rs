//! Writing into a root file system that is being made, by descriptors below its root: no symbolic link of an image leads
//! outside (`openat2(2)`, `RESOLVE_IN_ROOT`).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use crate::engine::sys;

/// A directory that is seen as though it were `/`.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

impl Tree {
    /// Opens it.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn open(path: &Path) -> Result<Tree> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Tree {
            root,
            path: path.to_owned(),
        })
    }

    /// Its path on the host.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens what a path of the tree leads to.
    ///
    /// # Errors
    /// As `openat2(2)`.
    pub fn open_at(&self, path: &Path, flags: OFlags) -> std::io::Result<OwnedFd> {
        sys::open_in_root(self.root.as_fd(), path, flags)
    }

    /// What a path leads to, links followed inside; `None` when there is nothing.
    pub fn stat(&self, path: &Path) -> Option<Stat> {
        let fd = self.open_at(path, OFlags::PATH).ok()?;
        rustix::fs::fstat(&fd).ok()
    }

    /// Whether a path leads to a directory.
    pub fn is_directory(&self, path: &Path) -> bool {
        self.stat(path)
            .is_some_and(|s| FileType::from_raw_mode(s.st_mode).is_dir())
    }

    /// A directory of the tree, made where it is missing, mode 0755.
    ///
    /// # Errors
    /// Naming the path inside.
    pub fn directory(&self, path: &Path) -> Result<OwnedFd> {
        let what = || format!("cannot create {} in the image", path.display());
        match self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let (parent, name) = self.parent(path)?;
                match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
                    // A link that leads to nothing: what it names is made.
                    Err(Errno::EXIST) => {
                        let link = rustix::fs::readlinkat(&parent, &name, Vec::new())
                            .with_context(what)?;
                        let link = PathBuf::from(OsStr::from_bytes(link.to_bytes()));
                        let target = path.parent().unwrap_or(Path::new("/")).join(link);
                        if target == path || target.as_os_str().len() > 4096 {
                            bail!("{}: a symbolic link leads to itself", what());
                        }
                        return self.directory(&target);
                    }
                    other => other.with_context(what)?,
                }
                rustix::fs::chmodat(&parent, &name, Mode::from_raw_mode(0o755), AtFlags::empty())
                    .with_context(what)?;
                self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY)
                    .with_context(what)
            }
            other => other.with_context(what),
        }
    }

    /// The directory that a path's last name is in, made where it is missing, and that name.
    ///
    /// # Errors
    /// Naming the path inside.
    pub fn parent(&self, path: &Path) -> Result<(OwnedFd, OsString)> {
        let name = path
            .file_name()
            .ok_or_else(|| anyhow!("{} has no name in the image", path.display()))?;
        let parent = self.directory(path.parent().unwrap_or(Path::new("/")))?;
        Ok((parent, name.to_owned()))
    }

    /// Where a path leads when its last name is a link, or a chain of them; what the last one names need not be there.
    ///
    /// # Errors
    /// When the links lead in a circle.
    pub fn resolved(&self, path: &Path) -> Result<PathBuf> {
        // As many as the kernel follows (path_resolution(7)).
        const MAX_LINKS: usize = 40;
        let mut at = path.to_owned();
        for _ in 0..MAX_LINKS {
            let (Some(parent), Some(name)) = (at.parent(), at.file_name()) else {
                return Ok(at);
            };
            let Ok(directory) = self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY) else {
                return Ok(at);
            };
            let Ok(link) = rustix::fs::readlinkat(&directory, name, Vec::new()) else {
                return Ok(at);
            };
            at = parent.join(OsStr::from_bytes(link.to_bytes()));
        }
        bail!(
            "{} in the image: symbolic links lead in a circle",
            path.display()
        )
    }

    /// A small file's bytes; `None` when it is not there.
    ///
    /// # Errors
    /// When it cannot be read, is no file, or is larger than 16 MiB.
    pub fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        const MAX: u64 = 16 << 20;
        let what = || format!("cannot read {} of the image", path.display());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match self.open_at(path, flags) {
            Ok(fd) => File::from(fd),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(what),
        };
        let meta = file.metadata().with_context(what)?;
        if !meta.is_file() || meta.len() > MAX {
            bail!("{}: not a file of at most {} MiB", what(), MAX >> 20);
        }
        let mut bytes = Vec::new();
        file.take(MAX).read_to_end(&mut bytes).with_context(what)?;
        Ok(Some(bytes))
    }

    /// Writes a file with exactly this mode in place of whatever has the name (a directory is refused).
    ///
    /// # Errors
    /// Naming the path inside.
    pub fn write(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
        let what = || format!("cannot write {} of the image", path.display());
        let (parent, name) = self.parent(path)?;
        let mut file = create(&parent, &name, mode).with_context(what)?;
        file.write_all(bytes).with_context(what)
    }

    /// Removes a file, if there is one.
    pub fn remove(&self, path: &Path) {
        if let Some(name) = path.file_name()
            && let Ok(parent) = self.open_at(
                path.parent().unwrap_or(Path::new("/")),
                OFlags::PATH | OFlags::DIRECTORY,
            )
        {
            let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
        }
    }
}

/// A new file with exactly this mode; what has the name goes, unless it is a directory.
///
/// # Errors
/// As `unlinkat(2)` and `openat(2)`.
pub fn create(parent: &impl AsFd, name: &OsStr, mode: u32) -> std::io::Result<File> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    Ok(file.into())
}

/// The names in a directory, sorted, without `.` and `..`.
///
/// # Errors
/// As `readdir(3)`.
pub fn names(directory: BorrowedFd) -> std::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort();
    Ok(names)
}

/// Sets the time of last change of a name, which is not followed.
///
/// # Errors
/// As `utimensat(2)`.
pub fn set_time(
    parent: &impl AsFd,
    name: &OsStr,
    seconds: i64,
    nanoseconds: i64,
) -> std::io::Result<()> {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds as _,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        parent,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Sets an extended attribute of an open file. Those that the file system or the namespace does not take are left out.
///
/// # Errors
/// As `fsetxattr(2)`, for `user.` and `security.capability`.
pub fn set_xattr(
    parent: &impl AsFd,
    name: &OsStr,
    key: &OsStr,
    value: &[u8],
) -> std::io::Result<()> {
    // There is no lsetxattrat(2): the name is reached through the directory's descriptor.
    let path = format!("/proc/self/fd/{}", parent.as_fd().as_raw_fd());
    let path = Path::new(&path).join(name);
    match rustix::fs::lsetxattr(&path, key, value, rustix::fs::XattrFlags::empty()) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM | Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Keys and values of the extended attributes of a name, which is not followed.
pub fn xattrs(parent: &impl AsFd, name: &OsStr) -> Vec<(OsString, Vec<u8>)> {
    let path = format!("/proc/self/fd/{}", parent.as_fd().as_raw_fd());
    let path = Path::new(&path).join(name);
    let mut list = vec![0; 64 << 10];
    let Ok(len) = rustix::fs::llistxattr(&path, &mut list[..]) else {
        return Vec::new();
    };
    let keys = list[..len].split(|b| *b == 0).filter(|k| !k.is_empty());
    keys.filter_map(|key| {
        let key = OsStr::from_bytes(key);
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::lgetxattr(&path, key, &mut value[..]).ok()?;
        value.truncate(len);
        Some((key.to_owned(), value))
    })
    .collect()
}
