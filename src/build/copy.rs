//! Copying file trees into a root file system: from the host, from another stage, from a sandbox.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::tree::{self, Tree};
use crate::engine::emulate::Owners;
use crate::progress::Progress;
use crate::{say, squash};

/// Deepest directory that is followed: links can make a tree endless.
const MAX_DEPTH: usize = 1000;

/// Bytes that are copied at once: between them is told how far it is.
const STEP_BYTES: u64 = 16 << 20;

/// What of a file is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// As `cp -fLr`: links are followed, files belong to root, the umask counts.
    FromHost {
        /// Permission bits that the copies lack.
        umask: u32,
    },
    /// As `cp -a`: links stay links, and owner, permissions, times and extended attributes are kept.
    Exact,
}

/// Copies one name of a directory, with all below it, to `target` in the tree: into it when it is a directory.
pub struct Copier<'a> {
    to: &'a Tree,
    manner: Manner,
    /// Where hard links of the source have got their first name.
    links: HashMap<(u64, u64), PathBuf>,
    /// Owners that the kernel does not know.
    record: Option<&'a mut Owners>,
    progress: Progress,
}

impl<'a> Copier<'a> {
    /// Into this tree.
    pub fn new(to: &'a Tree, manner: Manner) -> Copier<'a> {
        Copier {
            to,
            manner,
            links: HashMap::new(),
            record: None,
            progress: Progress::new("copying", 0),
        }
    }

    /// All that will be copied lies below this directory.
    pub fn all_of(self, directory: &Path) -> Copier<'a> {
        if self.progress.is_shown() {
            self.progress.set_total(squash::content_bytes(directory));
        }
        self
    }

    /// The record knows owners of the source, and gets those of the copies.
    pub fn with_owners(mut self, record: &'a mut Owners) -> Copier<'a> {
        self.record = Some(record);
        self
    }

    /// Copies what `source` has open or names to `target`, an absolute path of the tree.
    ///
    /// # Errors
    /// Naming both paths.
    pub fn copy(&mut self, source: &Source, target: &Path) -> Result<()> {
        self.entry(source, target, 0).with_context(|| {
            format!(
                "cannot copy {} to {} in the image",
                source.shown.display(),
                target.display()
            )
        })
    }

    fn entry(&mut self, source: &Source, target: &Path, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            bail!(
                "{}: more than {MAX_DEPTH} directories deep",
                source.shown.display()
            );
        }
        let stat = source.stat()?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.directory(source, &stat, target, depth),
            FileType::RegularFile => self.file(source, &stat, target),
            FileType::Symlink => self.symlink(source, &stat, target),
            FileType::Fifo => self.fifo(source, &stat, target),
            // The peers' tar stream leaves them out too.
            _ => {
                say::verbose(format_args!(
                    "{}: devices and sockets are left out",
                    source.shown.display()
                ));
                Ok(())
            }
        }
    }

    fn directory(
        &mut self,
        source: &Source,
        stat: &Stat,
        target: &Path,
        depth: usize,
    ) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | source.follow_flag();
        let from = rustix::fs::openat(&source.at, &source.name, flags, Mode::empty())
            .with_context(|| format!("cannot read {}", source.shown.display()))?;
        let existed = self.to.is_directory(target);
        let to = self.to.directory(target)?;
        // A directory that was there keeps its own attributes, as with cp.
        for name in tree::names(from.as_fd())
            .with_context(|| format!("cannot list {}", source.shown.display()))?
        {
            let child = Source {
                at: from.try_clone().context("cannot open one more file")?,
                shown: source.shown.join(&name),
                name: name.clone(),
                follow: source.follow && matches!(self.manner, Manner::FromHost { .. }),
            };
            self.entry(&child, &target.join(&name), depth + 1)
                .with_context(|| format!("cannot copy {}", child.shown.display()))?;
        }
        if !existed || (target == Path::new("/") && self.manner == Manner::Exact) {
            rustix::fs::fchmod(&to, self.mode(stat)).context("cannot set permissions")?;
            if self.manner == Manner::Exact {
                chown(&to, OsStr::new(""), stat)?;
                rustix::fs::fchmod(&to, self.mode(stat)).context("cannot set permissions")?;
            }
            if let (Some(parent), Some(name)) = (target.parent(), target.file_name()) {
                let parent = self.to.directory(parent)?;
                self.attributes(source, stat, &parent, name)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, source: &Source, stat: &Stat, target: &Path) -> Result<()> {
        // As cp writes: what a link of the image leads to gets the content.
        let target = self.to.resolved(target)?;
        let (parent, name) = self.to.parent(&target)?;
        let key = (stat.st_dev, stat.st_ino);
        if self.manner == Manner::Exact && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&key) {
                let (other, first) = self.to.parent(&first.clone())?;
                self.to.remove(&target);
                return rustix::fs::linkat(&other, &first, &parent, &name, AtFlags::empty())
                    .context("cannot make a hard link");
            }
            self.links.insert(key, target);
        }
        let flags = OFlags::RDONLY
            | OFlags::CLOEXEC
            | OFlags::NONBLOCK
            | OFlags::NOCTTY
            | source.follow_flag();
        let from = rustix::fs::openat(&source.at, &source.name, flags, Mode::empty())
            .with_context(|| format!("cannot read {}", source.shown.display()))?;
        let mut to = tree::create(&parent, &name, self.mode(stat).bits()).map_err(|error| {
            match error.kind() {
                std::io::ErrorKind::IsADirectory => {
                    anyhow::anyhow!("the image has a directory there")
                }
                _ => error.into(),
            }
        })?;
        copy_bytes(&mut File::from(from), &mut to, &self.progress)?;
        self.attributes(source, stat, &parent, &name)
    }

    fn symlink(&mut self, source: &Source, stat: &Stat, target: &Path) -> Result<()> {
        let (parent, name) = self.to.parent(target)?;
        let link = rustix::fs::readlinkat(&source.at, &source.name, Vec::new())
            .with_context(|| format!("cannot read {}", source.shown.display()))?;
        // A link to a directory that is there already, as /lib in a merged file system, may stay.
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error).context("the image has a directory there"),
        }
        rustix::fs::symlinkat(&link, &parent, &name).context("cannot make a symbolic link")?;
        self.attributes(source, stat, &parent, &name)
    }

    fn fifo(&mut self, source: &Source, stat: &Stat, target: &Path) -> Result<()> {
        let (parent, name) = self.to.parent(target)?;
        self.to.remove(target);
        rustix::fs::mknodat(&parent, &name, FileType::Fifo, self.mode(stat), 0)
            .context("cannot make a fifo")?;
        rustix::fs::chmodat(&parent, &name, self.mode(stat), AtFlags::empty())
            .context("cannot set permissions")?;
        self.attributes(source, stat, &parent, &name)
    }

    fn mode(&self, stat: &Stat) -> Mode {
        match self.manner {
            Manner::FromHost { umask } => Mode::from_raw_mode(stat.st_mode & 0o777 & !umask),
            Manner::Exact => Mode::from_raw_mode(stat.st_mode & 0o7777),
        }
    }

    /// Owner, extended attributes, permissions again (a change of owner takes set-id bits away), times.
    fn attributes(
        &mut self,
        source: &Source,
        stat: &Stat,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> Result<()> {
        if self.manner == Manner::Exact {
            chown(parent, name, stat)?;
            if let Some(record) = self.record.as_deref_mut() {
                note(record, source, parent, name).context("cannot note an owner")?;
            }
            if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                for (key, value) in tree::xattrs(&source.at, &source.name) {
                    tree::set_xattr(parent, name, &key, &value)
                        .context("cannot set an extended attribute")?;
                }
                rustix::fs::chmodat(parent, name, self.mode(stat), AtFlags::empty())
                    .context("cannot set permissions")?;
            }
        }
        tree::set_time(
            parent,
            name,
            stat.st_mtime,
            stat.st_mtime_nsec.try_into().unwrap_or(0),
        )
        .context("cannot set a time")
    }
}

/// Ids that do not exist in the namespace are shown as this one (`/proc/sys/kernel/overflowuid`).
const NOBODY: u32 = 65534;

fn chown(parent: &OwnedFd, name: &OsStr, stat: &Stat) -> Result<()> {
    // Nobody's are the host's: in an image they are root's.
    let known = |id: u32| if id == NOBODY { 0 } else { id };
    let (uid, gid) = (known(stat.st_uid), known(stat.st_gid));
    give(parent, name, uid, gid)
}

/// Notes for a copy what is noted of its source.
fn note(
    record: &mut Owners,
    source: &Source,
    parent: &OwnedFd,
    name: &OsStr,
) -> std::io::Result<()> {
    let open = |at: &OwnedFd, name: &OsStr, more: OFlags| {
        rustix::fs::openat(
            at,
            name,
            OFlags::PATH | OFlags::CLOEXEC | more,
            Mode::empty(),
        )
    };
    let from = open(&source.at, &source.name, source.follow_flag())?;
    let owner = record.get(from.as_fd())?.unwrap_or_default();
    record.set(open(parent, name, OFlags::NOFOLLOW)?.as_fd(), owner)
}

/// Gives a name to an owner; where that one does not exist in the namespace it stays root's.
///
/// # Errors
/// As `fchownat(2)`.
pub fn give(parent: &OwnedFd, name: &OsStr, uid: u32, gid: u32) -> Result<()> {
    let (owner, group) = (
        rustix::fs::Uid::from_raw(uid),
        rustix::fs::Gid::from_raw(gid),
    );
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    match rustix::fs::chownat(parent, name, Some(owner), Some(group), flags) {
        // One id is mapped: nobody else exists.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(error).with_context(|| {
            format!("cannot give a file to user {uid}, group {gid}: does the file system of the build (--tmpdir) keep owners?")
        }),
    }
}

/// Copies contents, with holes where the source has them.
///
/// # Errors
/// When reading or writing fails.
fn copy_bytes(from: &mut File, to: &mut File, progress: &Progress) -> Result<()> {
    use rustix::fs::SeekFrom;
    let len = from.metadata().context("cannot read a file")?.len();
    let mut at = 0;
    while at < len {
        let data = match rustix::fs::seek(&*from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            // A file system without holes.
            Err(_) => {
                rustix::fs::seek(&*from, SeekFrom::Start(at)).context("cannot read a file")?;
                rustix::fs::seek(&*to, SeekFrom::Start(at)).context("cannot write a file")?;
                progress.add(std::io::copy(from, to)?);
                return Ok(());
            }
        };
        let end = rustix::fs::seek(&*from, SeekFrom::Hole(data)).unwrap_or(len);
        let end = end.min(data + STEP_BYTES);
        progress.add(end - at);
        rustix::fs::seek(&*from, SeekFrom::Start(data)).context("cannot read a file")?;
        rustix::fs::seek(&*to, SeekFrom::Start(data)).context("cannot write a file")?;
        std::io::copy(&mut std::io::Read::take(&mut *from, end - data), to)?;
        at = end;
    }
    // A file of /proc says 0 and has bytes.
    if len == 0 {
        std::io::copy(from, to)?;
    } else {
        to.set_len(len)?;
    }
    Ok(())
}

/// A name in an open directory.
#[derive(Debug)]
pub struct Source {
    at: OwnedFd,
    name: OsString,
    /// For messages.
    shown: PathBuf,
    follow: bool,
}

impl Source {
    /// A path of the host; a link is followed.
    ///
    /// # Errors
    /// When its directory cannot be opened.
    pub fn of_host(path: &Path) -> Result<Source> {
        let at = rustix::fs::openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .context("cannot open /")?;
        Ok(Source {
            at,
            name: path.as_os_str().to_owned(),
            shown: path.to_owned(),
            follow: true,
        })
    }

    /// A path of another tree; a link is followed there, inside.
    ///
    /// # Errors
    /// When it is not there.
    pub fn of_tree(tree: &Tree, path: &Path) -> Result<Source> {
        let fd = tree
            .open_at(path, OFlags::PATH)
            .with_context(|| format!("{} is not in the stage", path.display()))?;
        // Reopened by its number: the path may have led through links that count inside only.
        use std::os::fd::AsRawFd as _;
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok(Source {
            at: fd,
            name: name.into(),
            shown: path.to_owned(),
            follow: true,
        })
    }

    fn follow_flag(&self) -> OFlags {
        if self.follow {
            OFlags::empty()
        } else {
            OFlags::NOFOLLOW
        }
    }

    fn stat(&self) -> Result<Stat> {
        let flags = if self.follow {
            AtFlags::empty()
        } else {
            AtFlags::SYMLINK_NOFOLLOW
        };
        rustix::fs::statat(&self.at, &self.name, flags)
            .with_context(|| format!("cannot read {}", self.shown.display()))
    }
}
