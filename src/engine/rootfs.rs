//! The container's file tree: the root, layers over it, mount points, mounts, and `pivot_root(2)`.
//!
//! Everything is done by descriptor: sources are opened in the caller's view ([`super::sources`]), targets are resolved as if
//! the new root were `/` (`openat2(2)`, `RESOLVE_IN_ROOT`; [`super::targets`]), so no symbolic link of an image leads a mount
//! outside.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::marks::Marked;
use super::overlay::Writable;
use super::points::{create_beneath, resolve_in};
use super::session::Session;
use super::sources::{Sources, is_directory, is_sure};
use super::sys::{self, attr};
use super::targets::{File, Made};
use super::wire::Point;
use super::{dev, overlay, server};
use crate::image::{Part, Root};
use crate::plan::{Layer, Missing, Mount, Plan, Source, identity};
use crate::say;

/// The tree under construction.
pub struct Tree<'p> {
    pub(super) plan: &'p Plan,
    /// What becomes `/`.
    pub root: OwnedFd,
    pub(super) session: Session,
    /// Mount points that did not exist in the image.
    pub(super) absent: Vec<PathBuf>,
    /// Further images, for layers and binds: one for each use.
    images: Images,
    /// What is taken from the host.
    sources: Sources,
    /// The mounts so far.
    pub(super) made: Vec<Made>,
    /// Directories of ours that stand for one of the root.
    pub(super) covers: Vec<OwnedFd>,
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
            // What is mounted in a part of it finds its places there too.
            let below = plan.mounts.iter().filter(|m| m.target != mount.target);
            let point = |m: &Mount| {
                let rest = m.target.strip_prefix(&mount.target).ok()?;
                Some(Point {
                    path: part.path.join(rest),
                    directory: is_directory(&m.source),
                })
            };
            let points = below.filter(|_| part.directory).filter_map(point);
            Some((&part.root, points.collect()))
        }
        _ => None,
    });
    let mounted = |(root, below): (&Root, Vec<Point>)| {
        let namespace = server::Namespace::Current;
        let mut stage = server::enter(root, plan.ids, namespace, &below, client)?;
        stage.look(below.iter().map(|point| point.path.as_path()));
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
        let covered = plan.mounts[..i]
            .iter()
            .any(|m| m.target != mount.target && mount.target.starts_with(&m.target) && is_sure(m));
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

impl<'p> Tree<'p> {
    /// Stacks root and layers. `root` is the detached image, when a server gave one.
    ///
    /// # Errors
    /// As the mounts.
    pub fn stack(
        plan: &'p Plan,
        stage: Option<server::Stage>,
        points: &[Point],
        images: Images,
    ) -> Result<Tree<'p>> {
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .context("cannot make the mounts private")?;
        let mut sources = Sources::open(plan)?;
        let mut session = Session::over_host(&sources)?;
        let (root, absent) = match (stage, sources.root.take()) {
            (Some(stage), _) => {
                let made = points.iter().zip(&stage.made);
                let made = made.filter(|(_, made)| **made).map(|(p, _)| p.path.clone());
                (session.view(&stage.view)?, made.collect())
            }
            (None, Some(copy)) => (copy, Vec::new()),
            (None, None) => bail!("an image file needs an image server"),
        };
        let mut tree = Tree {
            plan,
            root,
            session,
            absent,
            images,
            sources,
            made: Vec::new(),
            covers: Vec::new(),
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
            tree.overlay(&absent)?;
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
                    self.absent.push(point.path.clone());
                }
                Err(_) => {} // told when the mount is made
            }
        }
        Ok(absent)
    }

    /// Lays an overlayfs over the root: the layers, and below all of them the mount points that are absent.
    fn overlay(&mut self, absent: &[Point]) -> Result<()> {
        let mut held: Vec<OwnedFd> = Vec::new();
        // Topmost first, as overlayfs wants them.
        let mut lower: Vec<String> = Vec::new();
        let hold = |held: &mut Vec<OwnedFd>, fd: OwnedFd| {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            held.push(fd);
            path
        };
        let mut writable = None;
        for (place, layer) in self.plan.layers.iter().enumerate().rev() {
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
                    let [upper, work] = overlay::upper_and_work(&self.sources.layer(place)?, dir)?;
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
                    let fd = self.sources.layer(place)?;
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
                create_beneath(&fd, &point.path, point.directory).with_context(|| {
                    format!("cannot create the mount point {}", point.path.display())
                })?;
            }
            lower.push(hold(&mut held, fd));
        }
        self.root = overlay::mount(&lower, writable.as_ref())?;
        Ok(())
    }

    /// Makes one mount of the plan, or leaves it out.
    ///
    /// # Errors
    /// When the mount must be there and cannot be made.
    pub fn apply(&mut self, index: usize) -> Result<()> {
        let mount = &self.plan.mounts[index];
        let done = self.try_apply(index, mount);
        self.settle(mount, done)
    }

    /// What a mount that cannot be made means.
    pub(super) fn settle(&self, mount: &Mount, done: Result<()>) -> Result<()> {
        let Err(error) = done else { return Ok(()) };
        let what = format!(
            "cannot mount {} on {} ({})",
            describe(&mount.source),
            mount.target.display(),
            mount.why
        );
        match mount.missing {
            Missing::Fail => return Err(error.context(what)),
            Missing::Warn => say::warn(format_args!(
                "Skipping mount {} [{}]: {error:#}",
                mount.target.display(),
                mount.why
            )),
            Missing::Skip | Missing::Keep => say::verbose(format_args!("{what}: {error:#}")),
        }
        Ok(())
    }

    fn try_apply(&mut self, index: usize, mount: &Mount) -> Result<()> {
        let Some(tree) = self.source(index, mount)? else {
            return Ok(());
        };
        let what = File::of(&tree)?;
        let target = self.target(mount, what.is_directory)?;
        let onto = File::of(&target.fd)?;
        if self.is_left_out(mount, &what, &target, &onto) {
            return Ok(());
        }
        // The kernel only says EINVAL.
        match (what.is_directory, onto.is_directory) {
            (true, false) => bail!("not a directory: the image has a file there"),
            (false, true) => {
                bail!("not a directory: the image has a directory there, and the source is a file")
            }
            _ => sys::attach(tree.as_fd(), target.fd.as_fd())?,
        }
        self.note(index, target, tree, &what)?;
        if let Source::Dev { mqueue, pts } = mount.source {
            let files = self.sources.devices();
            dev::populate(self, files, dev::Kinds { mqueue, pts })?;
        }
        Ok(())
    }

    /// What is done when all mounts are there.
    ///
    /// # Errors
    /// As `mount_setattr(2)`.
    pub fn finish(&mut self) -> Result<()> {
        let mut covers = self.covers.iter();
        covers.try_for_each(|cover| sys::make_top_read_only(cover.as_fd()))
    }

    /// The detached mount that goes onto the target; `None` when there is nothing to mount.
    fn source(&mut self, index: usize, mount: &Mount) -> Result<Option<OwnedFd>> {
        let (tree, attributes) = match &mount.source {
            Source::Bind(path) => (
                self.sources.mount(index)?,
                if path.starts_with("/dev") {
                    attr::NOSUID
                } else {
                    attr::NOSUID | attr::NODEV
                },
            ),
            Source::Directory(..) => (self.sources.mount(index)?, attr::NOSUID | attr::NODEV),
            Source::Private(mode) => (self.session.directory(*mode)?.1, 0),
            Source::Dev { .. } => (self.session.directory(0o755)?.1, 0),
            Source::Proc => (sys::new_filesystem("proc", &[])?, 0),
            Source::Text(text) => (self.session.file(text.as_bytes())?, 0),
            Source::Passwd(account) => {
                let text =
                    self.account_file("passwd", |text| identity::passwd_text(text, account))?;
                let Some(tree) = text else { return Ok(None) };
                (tree, 0)
            }
            Source::Group(account) => {
                let text =
                    self.account_file("group", |text| identity::group_text(text, account))?;
                let Some(tree) = text else { return Ok(None) };
                (tree, 0)
            }
            Source::Image(part) => (self.part(part)?, 0),
        };
        let attributes = attributes | if mount.writable { 0 } else { attr::RDONLY };
        if attributes != 0 {
            sys::set_mount_attributes(tree.as_fd(), attributes)?;
        }
        Ok(Some(tree))
    }

    /// A file of the image's `/etc` with the caller's lines; `None`, with a warning, when the image has none.
    fn account_file(
        &mut self,
        name: &str,
        change: impl FnOnce(&str) -> String,
    ) -> Result<Option<OwnedFd>> {
        match self.image_text(&format!("/etc/{name}"))? {
            Some(text) => self.session.file(change(&text).as_bytes()).map(Some),
            None => {
                say::warn(format_args!(
                    "{name} file doesn't exist in container, not updating"
                ));
                Ok(None)
            }
        }
    }

    /// A part of a further image.
    fn part(&mut self, Part { root, path, .. }: &Part) -> Result<OwnedFd> {
        let tree = self.image(root)?;
        if path == Path::new("/") {
            return Ok(tree);
        }
        self.session.park(&tree)?;
        let part = sys::open_in_root(tree.as_fd(), path, OFlags::PATH)
            .with_context(|| format!("image-src {} is not in the image", path.display()))?;
        sys::clone_tree(part.as_fd(), Path::new(""))
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
