//! What a container takes from the host: opened, all of it, before anything lies over the host's `/`.
//!
//! A path that climbs to `/`, by `..` in it or in one of its links, goes on in what is mounted there
//! (`path_resolution(7)`). So a path of the host is resolved here and nowhere else while a container is made: what lies
//! over `/` later ([`super::session::Session`]) asks for these sources, and all that follows works on descriptors.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{dev, sys};
use crate::image::Root;
use crate::plan::{Layer, Missing, Mount, Plan, Source, Why};

/// See the module. Mounts and layers by their place in the plan; each is taken once.
pub(super) struct Sources {
    /// A copy of the directory that is the root, if it is one.
    pub(super) root: Option<OwnedFd>,
    /// Directories that are layers.
    layers: Vec<Option<OwnedFd>>,
    /// Copies of what is mounted. What cannot be had is told when the mount is made, if it matters then.
    mounts: Vec<Option<Result<OwnedFd>>>,
    /// Copies of what a private `/dev` has of the host's, by their names in it.
    devices: Vec<(&'static str, OwnedFd)>,
}

impl Sources {
    /// Opens what the plan names.
    ///
    /// # Errors
    /// When the root or a layer cannot be opened.
    pub(super) fn open(plan: &Plan) -> Result<Sources> {
        let root = match &plan.root {
            Root::Directory(path) => Some(sys::clone_tree(CWD, path)?),
            _ => None,
        };
        let layers = plan.layers.iter().map(|layer| match layer {
            Layer::Directory(path) | Layer::ReadOnlyDirectory(path) => {
                sys::open_path(path).map(Some)
            }
            Layer::Tmpfs(_) | Layer::Image(_) => Ok(None),
        });
        let layers = layers.collect::<Result<_>>()?;
        let mounts = plan.mounts.iter().map(|mount| match &mount.source {
            Source::Bind(path) => Some(copy(path)),
            Source::Directory(path, mode) => {
                Some(create_all(path, *mode).and_then(|()| copy(path)))
            }
            _ => None,
        });
        let mounts = mounts.collect();
        let private = |source: &Source| matches!(source, Source::Dev { .. });
        let devices = if plan.mounts.iter().any(|mount| private(&mount.source)) {
            let paths = dev::host_files();
            let there = paths
                .into_iter()
                .filter_map(|(name, path)| Some((name, copy(&path).ok()?)));
            there.collect()
        } else {
            Vec::new()
        };
        Ok(Sources {
            root,
            layers,
            mounts,
            devices,
        })
    }

    /// The directory that is a layer.
    ///
    /// # Errors
    /// When the plan has none at this place.
    pub(super) fn layer(&mut self, place: usize) -> Result<OwnedFd> {
        let layer = self.layers.get_mut(place).and_then(Option::take);
        layer.context("a layer that was not opened")
    }

    /// The copy of what a mount of the host's files shows, detached.
    ///
    /// # Errors
    /// When it could not be had.
    pub(super) fn mount(&mut self, place: usize) -> Result<OwnedFd> {
        let mount = self.mounts.get_mut(place).and_then(Option::take);
        mount.unwrap_or_else(|| Err(anyhow!("a source that was not opened")))
    }

    /// What the host has of a private `/dev`.
    pub(super) fn devices(&mut self) -> Vec<(&'static str, OwnedFd)> {
        std::mem::take(&mut self.devices)
    }
}

/// Room for the descriptors of a file tree, one for each mount of the plan. The caller's limit stands again afterwards.
pub(super) struct Room(Option<Rlimit>);

impl Room {
    /// Descriptors that a file tree takes beside those of its mounts, with those that the caller has open.
    const MORE: u64 = 128;
    /// With fewer beside those of its mounts none can be made.
    const LEAST: u64 = 16;

    /// Raises the limit, if it might be too low.
    ///
    /// # Errors
    /// When it cannot be raised as far as is needed.
    pub(super) fn for_mounts(plan: &Plan) -> Result<Room> {
        let count = (plan.mounts.len() + plan.layers.len()) as u64;
        if count < 64 {
            return Ok(Room(None));
        }
        let before = getrlimit(Resource::Nofile);
        if let Some(most) = before.maximum.filter(|most| *most < count + Room::LEAST) {
            bail!(
                "{count} mounts take as many open files, and the limit is {most}: raise it (ulimit -Hn), or mount fewer"
            );
        }
        let wanted = before.current.map(|now| now.max(2 * count + Room::MORE));
        let current = match (wanted, before.maximum) {
            (Some(wanted), Some(most)) => Some(wanted.min(most)),
            (wanted, _) => wanted,
        };
        let raised = Rlimit {
            current,
            maximum: before.maximum,
        };
        let is_raised = setrlimit(Resource::Nofile, raised).is_ok();
        Ok(Room(is_raised.then_some(before)))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(before) = self.0.take() {
            let _ = setrlimit(Resource::Nofile, before);
        }
    }
}

/// Whether a directory is mounted; what is not there counts as one.
pub(super) fn is_directory(source: &Source) -> bool {
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
pub(super) fn check(plan: &Plan) -> Result<()> {
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

/// Whether a mount is made for certain, as a directory: the root then need not have what lies below it.
pub(super) fn is_sure(mount: &Mount) -> bool {
    let is_there = match &mount.source {
        Source::Bind(path) => rustix::fs::stat(path).is_ok(),
        _ => true,
    };
    mount.why != Why::Cwd && is_there && is_directory(&mount.source)
}

/// A detached copy of the host's files at `path`, with all that is mounted below.
fn copy(path: &Path) -> Result<OwnedFd> {
    match sys::clone_tree(CWD, path) {
        // Through a descriptor (`/dev/stdin`, `/proc/self/fd/3`) the kernel finds the file in the mounts of whoever opened
        // it, which are not ours any more. By its name it is in ours.
        Err(error) if error.downcast_ref() == Some(&Errno::INVAL) => {
            let named = std::fs::canonicalize(path)
                .ok()
                .filter(|named| named != path);
            let named = named.with_context(|| {
                format!(
                    "{} is no file of the host that has a name: a pipe or a deleted file cannot be bound",
                    path.display()
                )
            })?;
            sys::clone_tree(CWD, &named)
        }
        other => other,
    }
}

/// Creates a directory of the host with its parents (`--workdir`), and sets its mode when it is new.
fn create_all(path: &Path, mode: u32) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path)
        .with_context(|| format!("cannot create {} (--workdir)", path.display()))?;
    rustix::fs::chmod(path, Mode::from_raw_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// The path of the terminal that is standard input.
pub(super) fn terminal() -> Option<PathBuf> {
    use std::io::IsTerminal as _;
    use std::os::unix::ffi::OsStringExt as _;
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return None;
    }
    let name = rustix::termios::ttyname(stdin, Vec::new()).ok()?;
    Some(std::ffi::OsString::from_vec(name.into_bytes()).into())
}
