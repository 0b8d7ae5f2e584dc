//! Views: the image with mount points that it lacks.
//!
//! A mount needs a file to be mounted on. A view adds the missing ones, as empty files and directories, and changes
//! nothing else. A view never changes once it is made, so the kernel may keep what it was told for ever.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::tree::{Place, Tree};
use crate::error::{Error, Result};
use crate::format::Kind;
use crate::path::{Step, follow};

/// Views of one server, at most: distinct sets of mount points of the containers that share it.
const VIEWS_MAX: usize = 4096;
/// Mount points in one view, at most.
const ENTRIES_MAX: usize = 4096;
/// Files that one view adds, at most: mount points and their parents.
const MADE_MAX: usize = 1 << 16;

/// A mount point that a view has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ViewEntry {
    /// Absolute, as seen from the image's root, without `..`.
    pub path: Vec<u8>,
    /// What is made there if nothing is.
    pub kind: ViewKind,
}

/// What can be mounted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ViewKind {
    /// A directory, mode 0755.
    Directory,
    /// An empty regular file, mode 0644.
    File,
}

/// Number of a view, and its name in the root of a server in stage mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ViewId(pub u32);

/// A place in a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Spot {
    /// A file of the image.
    Image(Place),
    /// A file that the view adds, by its index.
    Made(u32),
}

/// A file that a view adds.
pub(crate) struct Made {
    pub(crate) kind: Kind,
    pub(crate) parent: Spot,
}

/// See the module.
#[derive(Default)]
pub(crate) struct View {
    made: Vec<Made>,
    /// What is added to a directory, in the order of making.
    added: HashMap<Spot, Vec<(Vec<u8>, u32)>>,
}

impl View {
    fn new(tree: &Tree, entries: &[ViewEntry]) -> Result<View> {
        let mut view = View::default();
        if entries.len() > ENTRIES_MAX {
            return Err(Error::TooManyViews);
        }
        for entry in entries {
            view.make(tree, entry)?;
        }
        Ok(view)
    }

    fn make(&mut self, tree: &Tree, entry: &ViewEntry) -> Result<()> {
        let path = || String::from_utf8_lossy(&entry.path).into_owned();
        let climbs = entry.path.split(|b| *b == b'/').any(|name| name == b"..");
        if entry.path.first() != Some(&b'/') || climbs || entry.path.contains(&0) {
            return Err(Error::BadPath(path()));
        }
        let root = Spot::Image(tree.root());
        let made = follow(root, &entry.path, |here, name, last| {
            match step(tree, self, here, name)? {
                Step::Missing => {}
                known => return Ok(known),
            }
            let kind = match entry.kind {
                ViewKind::File if last => Kind::File,
                _ => Kind::Dir,
            };
            self.add(here, name, kind).map(Step::To)
        });
        match made {
            // Whoever mounts there finds that out, and knows whether it matters. (A path that is bad is a name that is too long.)
            Err(Error::NotDirectory | Error::Loop | Error::BadPath(_)) => Ok(()),
            made => made.map(drop),
        }
    }

    fn add(&mut self, parent: Spot, name: &[u8], kind: Kind) -> Result<Spot> {
        if name.len() > crate::format::NAME_MAX {
            return Err(Error::BadPath(String::from_utf8_lossy(name).into_owned()));
        }
        if self.made.len() >= MADE_MAX {
            return Err(Error::TooManyViews);
        }
        let index = self.made.len() as u32;
        self.made.push(Made { kind, parent });
        let names = self.added.entry(parent).or_default();
        names.push((name.to_vec(), index));
        Ok(Spot::Made(index))
    }

    /// A file that the view adds.
    pub(crate) fn made(&self, index: u32) -> Option<&Made> {
        self.made.get(index as usize)
    }

    /// Names that the view adds to a directory.
    pub(crate) fn added(&self, dir: Spot) -> &[(Vec<u8>, u32)] {
        self.added.get(&dir).map_or(&[], Vec::as_slice)
    }

    /// The file `name` in `dir`.
    pub(crate) fn lookup(&self, tree: &Tree, dir: Spot, name: &[u8]) -> Result<Option<Spot>> {
        if let Spot::Made(index) = dir
            && self.made(index).is_none_or(|made| made.kind != Kind::Dir)
        {
            return Err(Error::NotDirectory);
        }
        if let Some((_, index)) = self.added(dir).iter().find(|(added, _)| added == name) {
            return Ok(Some(Spot::Made(*index)));
        }
        match dir {
            Spot::Image(dir) => Ok(tree.lookup(dir, name)?.map(Spot::Image)),
            Spot::Made(_) => Ok(None),
        }
    }
}

fn step(tree: &Tree, view: &View, here: Spot, name: &[u8]) -> Result<Step<Spot>> {
    Ok(match view.lookup(tree, here, name)? {
        None => Step::Missing,
        Some(Spot::Image(at)) if tree.stat(at)?.kind == Kind::Symlink => {
            Step::Link(tree.read_link(at)?)
        }
        Some(spot) => Step::To(spot),
    })
}

/// The views of a server.
#[derive(Default)]
pub(crate) struct Views(RwLock<Known>);

#[derive(Default)]
struct Known {
    views: Vec<Arc<View>>,
    ids: HashMap<Vec<ViewEntry>, ViewId>,
}

impl Views {
    /// The view with these mount points; made if there is none yet.
    pub(crate) fn add(&self, tree: &Tree, entries: &[ViewEntry]) -> Result<ViewId> {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = known.ids.get(entries) {
            return Ok(*id);
        }
        if known.views.len() >= VIEWS_MAX {
            return Err(Error::TooManyViews);
        }
        let view = View::new(tree, entries)?;
        let id = ViewId(known.views.len() as u32);
        known.views.push(Arc::new(view));
        known.ids.insert(entries.to_vec(), id);
        Ok(id)
    }

    pub(crate) fn find(&self, id: ViewId) -> Option<Arc<View>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.views.get(id.0 as usize).cloned()
    }

    pub(crate) fn count(&self) -> u32 {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.views.len() as u32
    }
}

/// What the image itself has at `path`, links followed.
pub(crate) fn kind(tree: &Tree, path: &[u8]) -> Result<Option<Kind>> {
    let view = View::default();
    let root = Spot::Image(tree.root());
    match follow(root, path, |here, name, _| step(tree, &view, here, name)) {
        Ok(Some(Spot::Image(at))) => Ok(Some(tree.stat(at)?.kind)),
        Ok(_) | Err(Error::NotDirectory) => Ok(None),
        Err(error) => Err(error),
    }
}
