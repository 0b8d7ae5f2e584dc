//! Where mounts go: the place that a path of the container leads to, made where it is missing and may be.
//!
//! What lies where is told by the numbers of mounts (`STATX_MNT_ID` of `statx(2)`, Linux 5.8), so links that lead two
//! paths to one place are seen. Where the kernel tells no number, such places count as different.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::points::{create_at, create_beneath, resolve_in};
use super::rootfs::Tree;
use super::sys;
use crate::plan::{Missing, Mount, Source, Why, mounts};
use crate::say;

/// A mount that was made.
pub(super) struct Made {
    /// Its place in the plan.
    index: usize,
    /// As it was named, and others that links have led there.
    targets: Vec<PathBuf>,
    /// Where it lies, links resolved.
    place: PathBuf,
    tree: OwnedFd,
    /// The number of the mount.
    id: Option<u64>,
    ground: Ground,
    named: bool,
}

/// Whether mount points can be made in a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ground {
    /// Always: it is this container's.
    Own,
    /// A directory of the host, of which the user named what is mounted below.
    Host,
    /// It was asked for to be read only.
    ReadOnly,
    /// Never.
    Foreign,
}

impl Ground {
    fn of(mount: &Mount) -> Ground {
        // Shared memory is a directory like others.
        let kernels = |path: &Path| {
            let is_in = |top: &&str| path.starts_with(top);
            ["/dev", "/proc", "/sys"].iter().any(is_in) && !is_in(&"/dev/shm")
        };
        match &mount.source {
            Source::Private(_) | Source::Dev { .. } => Ground::Own,
            Source::Bind(path) if kernels(path) => Ground::Foreign,
            Source::Bind(_) | Source::Directory(..) if mount.writable => Ground::Host,
            Source::Bind(_) | Source::Directory(..) => Ground::ReadOnly,
            _ => Ground::Foreign,
        }
    }
}

/// What the kernel says of an open file.
pub(super) struct File {
    pub(super) is_directory: bool,
    /// Device and inode.
    identity: (u32, u32, u64),
    /// The number of the mount that it is in.
    mount: Option<u64>,
    /// It is the top of that mount.
    is_top: bool,
}

impl File {
    /// # Errors
    /// As `statx(2)`.
    pub(super) fn of(fd: &OwnedFd) -> Result<File> {
        let mask = libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID;
        let stat = sys::statx(fd.as_fd(), c"", libc::AT_EMPTY_PATH, mask)
            .context("cannot read the attributes of a mount (statx)")?;
        let top = libc::STATX_ATTR_MOUNT_ROOT as u64;
        Ok(File {
            is_directory: FileType::from_raw_mode(stat.stx_mode.into()).is_dir(),
            identity: (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino),
            mount: (stat.stx_mask & libc::STATX_MNT_ID != 0).then_some(stat.stx_mnt_id),
            is_top: stat.stx_attributes & top != 0,
        })
    }
}

/// Where a mount goes.
pub(super) struct Target {
    pub(super) fd: OwnedFd,
    /// The path, links resolved.
    pub(super) place: PathBuf,
}

impl Tree<'_> {
    /// Opens the place of a mount, and makes it where that is ours or the user's to do.
    pub(super) fn target(&mut self, mount: &Mount, is_directory: bool) -> Result<Target> {
        let (root, path) = (self.root.as_fd(), mount.target.as_path());
        let opened = match sys::open_in_root_directly(root, path, OFlags::PATH) {
            Ok(fd) => {
                return Ok(Target {
                    fd,
                    place: path.to_owned(),
                });
            }
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                sys::open_in_root(root, path, OFlags::PATH)
            }
            Err(error) => Err(error),
        };
        let place = match &opened {
            Err(error) if error.kind() != io::ErrorKind::NotFound => PathBuf::new(),
            _ => resolve_in(&self.root, path)?,
        };
        let fd = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create(mount, &place, is_directory)?
            }
            other => other?,
        };
        Ok(Target { fd, place })
    }

    /// Makes a mount point that is missing. What the user names is made in the directories of the host that are bound there,
    /// as the user; never through a link that leads out of the one that it was named in.
    fn create(&mut self, mount: &Mount, place: &Path, is_directory: bool) -> Result<OwnedFd> {
        let path = mount.target.display();
        let depth = |path: &Path| path.components().count();
        let by_name = self.made.iter().filter_map(|made| {
            let targets = made.targets.iter();
            let above = targets.filter(|target| mount.target.starts_with(target));
            Some((above.map(|target| depth(target)).max()?, made))
        });
        let by_name = by_name
            .max_by_key(|(depth, _)| *depth)
            .map(|(_, made)| made);
        let above = self
            .made
            .iter()
            .filter(|made| place.starts_with(&made.place));
        let above = above.max_by_key(|made| depth(&made.place));
        // Links lead from what was named to nothing else; those of the image to nothing that was not named.
        let is_meant = |above: &&Made| match by_name {
            Some(named) => named.index == above.index,
            None => above.named || above.ground == Ground::Own,
        };
        let above = match above {
            None if by_name.is_none() => return self.create_in_root(mount, place, is_directory),
            above => above.filter(is_meant).with_context(|| {
                format!(
                    "{path} doesn't exist in container, and a link on the way leads elsewhere: nothing is made there"
                )
            })?,
        };
        match above.ground {
            Ground::Own => {}
            Ground::Host if mount.is_named() => {}
            Ground::ReadOnly if mount.is_named() => bail!(
                "{path} doesn't exist in container, and {} is bound read-only: make it on the host first, or bind {} writable",
                above.place.display(),
                above.place.display(),
            ),
            _ => bail!("{path} doesn't exist in container"),
        }
        let rest = place.strip_prefix(&above.place).unwrap_or(place);
        create_beneath(&above.tree, rest, is_directory).with_context(|| {
            format!("cannot make the mount point {path}: make it on the host first")
        })
    }

    /// Makes a mount point that the root lacks: no other than the user's home in one that is written, and none of the
    /// image's own files changes for it.
    fn create_in_root(
        &mut self,
        mount: &Mount,
        place: &Path,
        is_directory: bool,
    ) -> Result<OwnedFd> {
        let path = mount.target.display();
        if !self.plan.writable_root {
            bail!("{path} doesn't exist in container");
        }
        if !matches!(mount.why, Why::Home | Why::HomeOption) || !is_directory {
            bail!(
                "{path} doesn't exist in container, and with --writable nothing is made there: make it in the image first"
            );
        }
        let mut above = place.ancestors().skip(1);
        let there = above.find_map(|dir| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let fd = sys::open_in_root_directly(self.root.as_fd(), dir, flags).ok()?;
            (dir != Path::new("/")).then(|| (dir.to_owned(), fd))
        });
        let Some((dir, fd)) = there else {
            bail!(
                "{path} doesn't exist in container, and with --writable nothing is made there: make it in the image first"
            );
        };
        let top = self.cover(mount, &dir, &fd)?;
        let rest = place.strip_prefix(&dir).unwrap_or(place);
        Ok(create_beneath(&top, rest, true)?)
    }

    /// Lays a directory of our own over one of the root, with all that this one holds. It becomes read-only at the end:
    /// what is written there would be lost.
    fn cover(&mut self, mount: &Mount, place: &Path, over: &OwnedFd) -> Result<OwnedFd> {
        /// More files are not mounted one by one.
        const MOST: usize = 1000;
        let what = || format!("cannot cover {} of the image", place.display());
        let (top, tree) = self.session.directory(0o755)?;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(over).with_context(what)? {
            let entry = entry.with_context(what)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        if names.len() > MOST {
            bail!("{}: it holds more than {MOST} files", what());
        }
        sys::attach(tree.as_fd(), over.as_fd()).with_context(what)?;
        for name in names {
            use std::os::unix::ffi::OsStrExt as _;
            let stat =
                rustix::fs::statat(over, &name, AtFlags::SYMLINK_NOFOLLOW).with_context(what)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind.is_symlink() {
                let to = rustix::fs::readlinkat(over, &name, Vec::new()).with_context(what)?;
                rustix::fs::symlinkat(to, &tree, &name).with_context(what)?;
                continue;
            }
            let path = std::ffi::OsStr::from_bytes(name.to_bytes());
            create_at(&top, path, kind.is_dir()).with_context(what)?;
            let copy = sys::clone_tree(over.as_fd(), Path::new(path))?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let point =
                rustix::fs::openat(&tree, &name, flags, Mode::empty()).with_context(what)?;
            sys::attach(copy.as_fd(), point.as_fd()).with_context(what)?;
        }
        self.covers.push(tree.try_clone().with_context(what)?);
        let id = File::of(&tree)?.mount;
        let top = tree.try_clone().with_context(what)?;
        self.made.push(Made {
            index: usize::MAX,
            targets: vec![place.to_owned()],
            place: place.to_owned(),
            tree,
            id,
            ground: Ground::Own,
            named: mount.is_named(),
        });
        Ok(top)
    }

    /// Whether a mount is left out although it could be made: links have led it to where another one lies, or the image
    /// keeps its own directory.
    pub(super) fn is_left_out(
        &mut self,
        mount: &Mount,
        what: &File,
        target: &Target,
        onto: &File,
    ) -> bool {
        let path = mount.target.display();
        let lies = |made: &&mut Made| made.id.is_some() && made.id == onto.mount;
        let under = self.made.iter_mut().find(lies);
        let is_in_root = under.is_none();
        if let Some(under) = under {
            let named = under.named && (under.ground != Ground::Own || onto.is_top);
            let is_left_out = if mount.is_named() {
                onto.is_top && under.named
            } else {
                // No default displaces what lies there already, nor a part of what the user named.
                onto.is_top || named && !matches!(mount.source, Source::Text(_))
            };
            if is_left_out && mount.is_named() {
                say::warn(format_args!(
                    "destination {path} is already in the mount point list: the first one counts"
                ));
            } else if is_left_out {
                say::verbose(format_args!(
                    "not mounting {path}: {} lies there",
                    under.place.display()
                ));
            }
            if is_left_out {
                if onto.is_top {
                    under.targets.push(mount.target.clone());
                }
                return true;
            }
        }
        if mount.missing != Missing::Keep {
            return false;
        }
        if what.identity == onto.identity {
            return true; // it is there already
        }
        let keeps = is_in_root
            && !self.absent.contains(&mount.target)
            && mounts::is_of_the_system(&target.place);
        if keeps {
            say::warn(format_args!(
                "the image has {} of its own: the working directory is not mounted over it",
                target.place.display()
            ));
        }
        keeps
    }

    /// Notes a mount that was made. Those that it hides are put on top of it: below a place that was named through a link,
    /// there may be some.
    pub(super) fn note(
        &mut self,
        index: usize,
        target: Target,
        tree: OwnedFd,
        what: &File,
    ) -> Result<()> {
        let mount = &self.plan.mounts[index];
        let is_hidden =
            |made: &Made| made.place != target.place && made.place.starts_with(&target.place);
        let hidden: Vec<Made> = self.made.extract_if(.., |made| is_hidden(made)).collect();
        self.made.push(Made {
            index,
            targets: vec![mount.target.clone()],
            place: target.place,
            tree,
            id: what.mount,
            ground: Ground::of(mount),
            named: mount.is_named(),
        });
        for made in hidden {
            let Some(mount) = self.plan.mounts.get(made.index) else {
                continue; // a cover: what it was for is there
            };
            let moved = self.lift(mount, &made);
            self.settle(mount, moved)?;
            self.made.push(made);
        }
        Ok(())
    }

    /// Moves a mount that is hidden to its place in what hides it.
    fn lift(&mut self, mount: &Mount, made: &Made) -> Result<()> {
        let is_directory = File::of(&made.tree)?.is_directory;
        let target = match sys::open_in_root(self.root.as_fd(), &made.place, OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create(mount, &made.place, is_directory)?
            }
            other => other?,
        };
        if File::of(&target)?.is_directory != is_directory {
            return Err(anyhow!(
                "not a directory: {} is no such file there",
                made.place.display()
            ));
        }
        Ok(sys::attach(made.tree.as_fd(), target.as_fd())?)
    }
}
