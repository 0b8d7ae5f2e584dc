//! The container's file tree: the root, layers over it, mount points, mounts, and `pivot_root(2)`.
//!
//! Everything is done by descriptor: sources are opened in the caller's view, targets are resolved as if the new root
//! were `/` (`openat2(2)`, `RESOLVE_IN_ROOT`), so no symbolic link of an image leads a mount outside.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::marks::Marked;
use super::overlay::Writable;
use super::points::{create_all, create_at, make_point, resolve_in};
use super::session::Session;
use super::sys::{self, attr};
use super::wire::Point;
use super::{dev, overlay, server};
use crate::image::{Part, Root};
use crate::plan::{Layer, Missing, Mount, Plan, Source, identity};
use crate::say;

/// The tree under construction.
pub struct Tree {
    /// What becomes `/`.
    pub root: OwnedFd,
    session: Session,
    /// Mount points that did not exist in the image.
    made: Vec<PathBuf>,
    /// Further images, for layers and binds: one for each use.
    images: Images,
    /// Copies of the host's whole tree, for binds of it: one for each use.
    hosts: Vec<(PathBuf, OwnedFd)>,
}

/// Further images.
pub type Images = Vec<(Root, server::View)>;

/// What hangs up when an image server is gone.
pub type Lives = Vec<OwnedFd>;

/// Gets the images that the plan needs beside its root, before the mounts are changed: a server that has to be started
/// must neither see them nor live in the container's pid namespace.
///
/// # Errors
/// When one cannot be mounted.
pub fn images(plan: &Plan, client: &server::Client, lives: &mut Lives) -> Result<Images> {
    let layers = plan.layers.iter().filter_map(|layer| match layer {
        Layer::Image(root) => Some((root, Vec::new())),
        _ => None,
    });
    let binds = plan.mounts.iter().filter_map(|mount| match &mount.source {
        Source::Image(part) => {
            let targets = plan.mounts.iter().map(|m| &m.target);
            let below = targets.filter_map(|target| target.strip_prefix(&mount.target).ok());
            Some((&part.root, below.map(|rest| part.path.join(rest)).collect()))
        }
        _ => None,
    });
    let mounted = |(root, below): (&Root, Vec<PathBuf>)| {
        let mut stage = server::enter(root, plan.ids, server::Namespace::Current, &[], client)?;
        stage.look(below.iter().map(PathBuf::as_path));
        lives.push(stage.life);
        Ok((root.clone(), stage.view))
    };
    layers.chain(binds).map(mounted).collect()
}

/// The mount points that the image must show: those that no earlier mount covers.
pub fn points(plan: &Plan) -> Vec<Point> {
    let mut points: Vec<Point> = Vec::new();
    if plan.writable_root {
        return points;
    }
    for (i, mount) in plan.mounts.iter().enumerate() {
        let covered = plan.mounts[..i].iter().any(|m| {
            m.target != mount.target
                && mount.target.starts_with(&m.target)
                && is_directory(&m.source)
        });
        // Account files are only changed where the image has them.
        if covered
            || matches!(mount.source, Source::Passwd(_) | Source::Group(_))
            || points.iter().any(|p| p.path == mount.target)
        {
            continue;
        }
        points.push(Point {
            path: mount.target.clone(),
            directory: is_directory(&mount.source),
        });
    }
    points
}

fn is_directory(source: &Source) -> bool {
    match source {
        Source::Bind(path) => !rustix::fs::stat(path)
            .is_ok_and(|s| !rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir()),
        Source::Text(_) | Source::Passwd(_) | Source::Group(_) => false,
        Source::Image(part) => part.directory,
        _ => true,
    }
}

/// What the caller asked for and the host does not have: found before anything is started.
///
/// # Errors
/// Naming the mount.
pub fn check_sources(plan: &Plan) -> Result<()> {
    for mount in plan.mounts.iter().filter(|m| m.missing == Missing::Fail) {
        if let Source::Bind(path) = &mount.source
            && let Err(error) = rustix::fs::stat(path)
        {
            let cause = if error == Errno::NOENT {
                "doesn't exist".into()
            } else {
                error.to_string()
            };
            bail!(
                "cannot bind {} on {} ({}): mount source {} {cause}",
                path.display(),
                mount.target.display(),
                mount.why,
                path.display()
            );
        }
    }
    for layer in &plan.layers {
        let (Layer::ReadOnlyDirectory(path) | Layer::Directory(path)) = layer else {
            continue;
        };
        rustix::fs::stat(path).with_context(|| {
            format!(
                "while loading overlay images: failed to open overlay image {}",
                path.display()
            )
        })?;
    }
    Ok(())
}

impl Tree {
    /// Stacks root and layers. `root` is the detached image, when a server gave one.
    ///
    /// # Errors
    /// As the mounts.
    pub fn stack(
        plan: &Plan,
        stage: Option<server::Stage>,
        points: &[Point],
        images: Images,
    ) -> Result<Tree> {
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .context("cannot make the mounts private")?;
        let copy = match &plan.root {
            Root::Directory(path) => Some(sys::clone_tree(CWD, path)?),
            _ => None,
        };
        let hosts = hosts(&plan.mounts)?;
        let mut session = Session::new()?;
        let (root, made) = match (stage, copy) {
            (Some(stage), _) => {
                let made = points.iter().zip(&stage.made);
                let made = made.filter(|(_, made)| **made).map(|(p, _)| p.path.clone());
                (session.view(&stage.view)?, made.collect())
            }
            (None, Some(copy)) => (copy, Vec::new()),
            (None, None) => bail!("an image file needs an image server"),
        };
        let mut tree = Tree {
            root,
            session,
            made,
            images,
            hosts,
        };
        let sandbox = matches!(plan.root, Root::Directory(_));
        if sandbox {
            let read_only = if plan.writable_root { 0 } else { attr::RDONLY };
            sys::set_mount_attributes(tree.root.as_fd(), attr::NOSUID | attr::NODEV | read_only)?;
        }
        let absent = if sandbox && !plan.writable_root {
            tree.absent(points)?
        } else {
            Vec::new()
        };
        if !plan.layers.is_empty() || !absent.is_empty() {
            tree.overlay(plan, &absent)?;
        }
        // Last, so that nothing is mounted over it: `/home/..` would lead there.
        sys::attach_over_root(tree.root.as_fd())?;
        Ok(tree)
    }

    /// The points that a directory image lacks, with the place that each path leads to.
    fn absent(&mut self, points: &[Point]) -> Result<Vec<Point>> {
        let mut absent = Vec::new();
        for point in points {
            match sys::open_in_root(self.root.as_fd(), &point.path, OFlags::PATH) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    absent.push(Point {
                        path: resolve_in(&self.root, &point.path)?,
                        directory: point.directory,
                    });
                    self.made.push(point.path.clone());
                }
                Err(_) => {} // told when the mount is made
            }
        }
        Ok(absent)
    }

    /// Lays an overlayfs over the root: the layers, and below all of them the mount points that are absent.
    fn overlay(&mut self, plan: &Plan, absent: &[Point]) -> Result<()> {
        let mut held: Vec<OwnedFd> = Vec::new();
        // Topmost first, as overlayfs wants them.
        let mut lower: Vec<String> = Vec::new();
        let hold = |held: &mut Vec<OwnedFd>, fd: OwnedFd| {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            held.push(fd);
            path
        };
        let mut writable = None;
        for layer in plan.layers.iter().rev() {
            match layer {
                Layer::Tmpfs(size) => {
                    let fd = overlay::throw_away(*size)?;
                    self.session.park(&fd)?;
                    let path = hold(&mut held, fd);
                    writable = Some(Writable {
                        upper: format!("{path}/upper"),
                        work: format!("{path}/work"),
                        directory: None,
                    });
                }
                Layer::Directory(dir) => {
                    let [upper, work] = overlay::upper_and_work(dir)?;
                    if let Some(marked) = Marked::find(upper.as_fd()) {
                        let what =
                            || format!("cannot use the overlay {} for writing", dir.display());
                        marked.translate(upper.as_fd()).with_context(what)?;
                    }
                    writable = Some(Writable {
                        upper: hold(&mut held, upper),
                        work: hold(&mut held, work),
                        directory: Some(dir.clone()),
                    });
                }
                Layer::ReadOnlyDirectory(dir) => {
                    let fd = sys::open_path(dir)?;
                    let layer = overlay::upper_of(&fd, dir)?.unwrap_or(fd);
                    let shadow = Marked::find(layer.as_fd())
                        .map(|marked| marked.shadow(layer.as_fd(), &mut self.session))
                        .transpose()?;
                    match shadow {
                        Some([above, below]) => {
                            lower.extend([above, layer, below].map(|fd| hold(&mut held, fd)));
                        }
                        None => lower.push(hold(&mut held, layer)),
                    }
                }
                Layer::Image(root) => {
                    let fd = self.image(root)?;
                    self.session.park(&fd)?;
                    // A squashfs layer may hold its tree in `upper`, as a directory of layers does.
                    let upper = overlay::upper_of(&fd, root.file())?;
                    lower.push(hold(&mut held, upper.unwrap_or(fd)));
                }
            }
        }
        self.session.park(&self.root.try_clone()?)?;
        lower.push(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        if !absent.is_empty() {
            let (fd, _) = self.session.directory(0o755)?;
            for point in absent {
                make_point(&fd, &point.path, point.directory)?;
            }
            lower.push(hold(&mut held, fd));
        }
        self.root = overlay::mount(&lower, writable.as_ref())?;
        Ok(())
    }

    /// Makes one mount. `Ok(false)` when it was left out.
    ///
    /// # Errors
    /// When the mount must be there and cannot be made.
    pub fn apply(&mut self, mount: &Mount) -> Result<()> {
        match self.try_apply(mount) {
            Ok(()) => Ok(()),
            Err(error) => {
                let what = format!(
                    "cannot mount {} on {} ({})",
                    describe(&mount.source),
                    mount.target.display(),
                    mount.why
                );
                match mount.missing {
                    Missing::Fail => Err(error.context(what)),
                    Missing::Warn => {
                        say::warn(format_args!(
                            "Skipping mount {} [{}]: {error:#}",
                            mount.target.display(),
                            mount.why
                        ));
                        Ok(())
                    }
                    Missing::Skip | Missing::Keep => {
                        say::verbose(format_args!("{what}: {error:#}"));
                        Ok(())
                    }
                }
            }
        }
    }

    fn try_apply(&mut self, mount: &Mount) -> Result<()> {
        if mount.missing == Missing::Keep
            && !self.made.contains(&mount.target)
            && self.target(mount, false).is_ok()
        {
            return Ok(()); // the image's own directory stands
        }
        let Some(tree) = self.source(mount)? else {
            return Ok(());
        };
        let directory = rustix::fs::fstat(&tree)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir());
        let target = self.target(mount, directory)?;
        // The kernel only says EINVAL.
        let onto = rustix::fs::fstat(&target)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir());
        match (directory, onto) {
            (true, false) => bail!("not a directory: the image has a file there"),
            (false, true) => {
                bail!("not a directory: the image has a directory there, and the source is a file")
            }
            _ => sys::attach(tree.as_fd(), target.as_fd())?,
        }
        if let Source::Dev { mqueue } = mount.source {
            dev::populate(self, mqueue)?;
        }
        Ok(())
    }

    /// Opens the place of a mount, creating it where that is ours to do.
    fn target(&mut self, mount: &Mount, directory: bool) -> Result<OwnedFd> {
        match sys::open_in_root(self.root.as_fd(), &mount.target, OFlags::PATH) {
            Ok(fd) => Ok(fd),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create_in_session(&mount.target, directory)?;
                sys::open_in_root(self.root.as_fd(), &mount.target, OFlags::PATH)
                    .map_err(Into::into)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Creates a mount point below a directory that is private to this container.
    fn create_in_session(&self, path: &Path, directory: bool) -> Result<()> {
        let missing = || anyhow!("{} doesn't exist in container", path.display());
        let parent = path.parent().ok_or_else(missing)?;
        let name = path.file_name().ok_or_else(missing)?;
        let fd =
            match sys::open_in_root(self.root.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(fd) => fd,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.create_in_session(parent, true)?;
                    sys::open_in_root(self.root.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY)?
                }
                Err(error) => return Err(error.into()),
            };
        if !self.session.holds(&fd)? {
            return Err(missing());
        }
        create_at(&fd, name, directory).with_context(|| format!("cannot create {}", path.display()))
    }

    /// The detached mount that goes onto the target; `None` when there is nothing to mount.
    fn source(&mut self, mount: &Mount) -> Result<Option<OwnedFd>> {
        let below_dev = |path: &Path| path.starts_with("/dev");
        let (tree, attributes) = match &mount.source {
            Source::Bind(path) => (
                self.host_tree(path)?,
                if below_dev(path) {
                    attr::NOSUID
                } else {
                    attr::NOSUID | attr::NODEV
                },
            ),
            Source::Directory(path, mode) => {
                create_all(path, *mode)?;
                (self.host_tree(path)?, attr::NOSUID | attr::NODEV)
            }
            Source::Private(mode) => (self.session.directory(*mode)?.1, 0),
            Source::Dev { .. } => (self.session.directory(0o755)?.1, 0),
            Source::Proc => (sys::new_filesystem("proc", &[])?, 0),
            Source::Text(text) => (self.session.file(text.as_bytes())?, 0),
            Source::Passwd(account) => match self.image_text("/etc/passwd")? {
                Some(text) => (
                    self.session
                        .file(identity::passwd_text(&text, account).as_bytes())?,
                    0,
                ),
                None => {
                    say::warn(format_args!(
                        "passwd file doesn't exist in container, not updating"
                    ));
                    return Ok(None);
                }
            },
            Source::Group(account) => match self.image_text("/etc/group")? {
                Some(text) => (
                    self.session
                        .file(identity::group_text(&text, account).as_bytes())?,
                    0,
                ),
                None => {
                    say::warn(format_args!(
                        "group file doesn't exist in container, not updating"
                    ));
                    return Ok(None);
                }
            },
            Source::Image(Part { root, path, .. }) => {
                let tree = self.image(root)?;
                if path == Path::new("/") {
                    (tree, 0)
                } else {
                    self.session.park(&tree)?;
                    let part =
                        sys::open_in_root(tree.as_fd(), path, OFlags::PATH).with_context(|| {
                            format!("image-src {} is not in the image", path.display())
                        })?;
                    (sys::clone_tree(part.as_fd(), Path::new(""))?, 0)
                }
            }
        };
        let attributes = attributes | if mount.writable { 0 } else { attr::RDONLY };
        if attributes != 0 {
            sys::set_mount_attributes(tree.as_fd(), attributes)?;
        }
        Ok(Some(tree))
    }

    /// A copy of the host's files at `path`.
    fn host_tree(&mut self, path: &Path) -> Result<OwnedFd> {
        match self.hosts.iter().position(|(p, _)| p == path) {
            Some(place) => Ok(self.hosts.swap_remove(place).1),
            None => sys::clone_tree(CWD, path),
        }
    }

    fn image(&mut self, root: &Root) -> Result<OwnedFd> {
        let place = self
            .images
            .iter()
            .position(|(r, _)| r == root)
            .context("an image that was not asked for")?;
        let (_, view) = self.images.swap_remove(place);
        self.session.view(&view)
    }

    /// A small text file of the image: regular, at most 1 MiB, and `None` when it is not there.
    fn image_text(&self, path: &str) -> Result<Option<String>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = match sys::open_in_root(self.root.as_fd(), Path::new(path), flags) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {path} of the image"));
            }
        };
        let stat = rustix::fs::fstat(&fd)?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() || stat.st_size > 1 << 20 {
            bail!("{path} of the image is not a regular file of at most 1 MiB");
        }
        let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size)? + 1);
        io::Read::read_to_end(
            &mut io::Read::take(std::fs::File::from(fd), 1 << 20),
            &mut bytes,
        )
        .with_context(|| format!("cannot read {path} of the image"))?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

/// Copies of the host's tree for the sources that lead to its `/`: taken before anything is mounted over it, or the
/// copies would hold that too.
fn hosts(mounts: &[Mount]) -> Result<Vec<(PathBuf, OwnedFd)>> {
    let place = |path: &Path| rustix::fs::stat(path).map(|s| (s.st_dev, s.st_ino)).ok();
    let root = place(Path::new("/"));
    let mut hosts = Vec::new();
    for mount in mounts {
        if let Source::Bind(path) | Source::Directory(path, _) = &mount.source
            && place(path) == root
        {
            hosts.push((path.clone(), sys::clone_tree(CWD, path)?));
        }
    }
    Ok(hosts)
}

/// Makes `root`, which is mounted over `/`, the root of this process, and drops the host's tree, over which `covers`
/// further mounts lie.
///
/// # Errors
/// As `pivot_root(2)`.
pub fn pivot(root: &OwnedFd, covers: usize) -> Result<()> {
    rustix::process::fchdir(root).context("cannot enter the new root")?;
    // The old root lands on top of the new one and is taken off at once: no directory for it is needed.
    rustix::process::pivot_root(".", ".").context("cannot make the image the root (pivot_root)")?;
    for _ in 0..=covers {
        unmount(".", UnmountFlags::DETACH).context("cannot detach the host's files")?;
    }
    rustix::process::chdir("/").context("cannot enter /")
}

fn describe(source: &Source) -> String {
    match source {
        Source::Bind(path) | Source::Directory(path, _) => path.display().to_string(),
        Source::Private(_) => "a private directory".into(),
        Source::Proc => "proc".into(),
        Source::Dev { .. } => "a private /dev".into(),
        Source::Text(_) | Source::Passwd(_) | Source::Group(_) => "a generated file".into(),
        Source::Image(part) => part.root.file().display().to_string(),
    }
}
