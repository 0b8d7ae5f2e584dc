//! Applies the entries of layers to a tree, lowest layer first, as `umoci unpack` applies them to a directory: parents are
//! looked up through links within the image, a last component is never followed; a directory keeps what it has when a layer
//! names it again, everything else is replaced; a whiteout takes away what lower layers have, not what its own layer has,
//! whatever comes first in the archive.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, bail};

use super::entry::{Entry, What, split};
use crate::oci::shown;
use crate::squash::walk::Missing;
use crate::squash::{Attributes, Data, Kind, Node, NodeId, Tree};

/// The tree of all layers.
pub struct Resolved {
    /// The tree.
    pub tree: Tree,
    /// Files whose content was not stored, by layer and by their place among its entries.
    pub missing: BTreeMap<(usize, usize), NodeId>,
}

/// Applies layers, the lowest first.
///
/// # Errors
/// For entries that have no place, and hard links to nothing.
pub fn resolve(layers: Vec<Vec<Entry>>) -> Result<Resolved> {
    let mut building = Building {
        tree: Tree::new(implied(0)),
        missing: HashMap::new(),
        marks: None,
        parent: None,
    };
    for (layer, entries) in layers.into_iter().enumerate() {
        let has_whiteouts = entries
            .iter()
            .any(|e| matches!(e.what, What::Whiteout | What::Opaque));
        building.marks = has_whiteouts.then(Marks::default);
        building.parent = None;
        for (ordinal, entry) in entries.into_iter().enumerate() {
            let path = entry.path.clone();
            building
                .apply(entry, (layer, ordinal))
                .with_context(|| format!("layer {}: {}", layer + 1, shown(&path)))?;
        }
    }
    building.finish()
}

/// A directory that no layer names, but has something in.
fn implied(mtime_s: u32) -> Attributes {
    Attributes {
        mode: 0o755,
        mtime_s,
        ..Attributes::default()
    }
}

/// What the layer that is being applied has put into the tree.
#[derive(Default)]
struct Marks {
    directories: HashSet<NodeId>,
    names: HashSet<(NodeId, Box<[u8]>)>,
}

struct Building {
    tree: Tree,
    missing: HashMap<NodeId, (usize, usize)>,
    /// Kept for layers with whiteouts only.
    marks: Option<Marks>,
    /// The parent of the last entry: most often that of the next, too.
    parent: Option<(Box<[u8]>, NodeId)>,
}

impl Building {
    fn apply(&mut self, entry: Entry, place: (usize, usize)) -> Result<()> {
        let Entry {
            path,
            what,
            attributes,
        } = entry;
        match what {
            What::Opaque => {
                if let Some(directory) = self.existing(&path) {
                    self.clear(directory);
                }
                return Ok(());
            }
            What::Whiteout => {
                let (parent, name) = split(&path);
                if let Some(parent) = self.existing(parent) {
                    self.purge(parent, name);
                }
                return Ok(());
            }
            _ => {}
        }
        if path.is_empty() {
            self.tree.node_mut(Tree::ROOT).attributes = attributes;
            return Ok(());
        }
        let (parent, name) = split(&path);
        let parent = self.parent(parent, attributes.mtime_s)?;
        let kind = match what {
            What::Directory => return self.directory(parent, name, attributes),
            What::Link(target) => return self.link(parent, name, &target),
            What::File(data) => {
                let is_missing = data.is_none();
                let data = data.unwrap_or_else(Data::default);
                let id = self.add(parent, name, attributes, Kind::File(data))?;
                if is_missing {
                    self.missing.insert(id, place);
                }
                return Ok(());
            }
            What::Symlink(target) => Kind::Symlink(target.into()),
            What::Fifo => Kind::Fifo,
            What::Device | What::Whiteout | What::Opaque => Kind::CharDevice(0),
        };
        self.add(parent, name, attributes, kind).map(|_| ())
    }

    /// The directory for an entry, made if it is missing.
    fn parent(&mut self, path: &[u8], mtime_s: u32) -> Result<NodeId> {
        if let Some((last, id)) = &self.parent
            && **last == *path
        {
            return Ok(*id);
        }
        let attributes = implied(mtime_s);
        let way = self.tree.directory(path, Missing::Create(&attributes))?;
        let way = way.context("its directory is missing")?;
        let id = *way.last().context("a path without a root")?;
        if let Some(marks) = &mut self.marks {
            marks.directories.extend(way);
        }
        self.parent = Some((path.into(), id));
        Ok(id)
    }

    /// A directory that is there.
    fn existing(&mut self, path: &[u8]) -> Option<NodeId> {
        let way = self.tree.directory(path, Missing::Fail).ok().flatten()?;
        way.last().copied()
    }

    fn directory(&mut self, parent: NodeId, name: &[u8], attributes: Attributes) -> Result<()> {
        let id = match self.tree.child(parent, name) {
            Some(id) if self.tree.names(id).is_some() => {
                self.tree.node_mut(id).attributes = attributes;
                id
            }
            _ => self.add(parent, name, attributes, Kind::Directory(BTreeMap::new()))?,
        };
        if let Some(marks) = &mut self.marks {
            marks.directories.insert(id);
        }
        Ok(())
    }

    fn link(&mut self, parent: NodeId, name: &[u8], target: &[u8]) -> Result<()> {
        let (directory, last) = split(target);
        let id = self
            .existing(directory)
            .and_then(|d| self.tree.child(d, last))
            .with_context(|| format!("a hard link to {}, which is not there", shown(target)))?;
        if self.tree.names(id).is_some() {
            bail!("a hard link to {}, which is a directory", shown(target));
        }
        // An archiver that meets a file twice writes a link to itself.
        if self.tree.child(parent, name) != Some(id) {
            self.forget(parent, name);
            self.tree.link(parent, name, id)?;
        }
        self.mark(parent, name);
        Ok(())
    }

    fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        attributes: Attributes,
        kind: Kind,
    ) -> Result<NodeId> {
        self.forget(parent, name);
        let id = self.tree.add(parent, name, Node { attributes, kind })?;
        self.mark(parent, name);
        Ok(id)
    }

    /// Something may be replaced that the last parent's path led through.
    fn forget(&mut self, parent: NodeId, name: &[u8]) {
        if self.tree.child(parent, name).is_some() {
            self.parent = None;
        }
    }

    fn mark(&mut self, parent: NodeId, name: &[u8]) {
        if let Some(marks) = &mut self.marks {
            marks.names.insert((parent, name.into()));
        }
    }

    /// Takes away what lower layers have under a name.
    fn purge(&mut self, parent: NodeId, name: &[u8]) {
        let Some(id) = self.tree.child(parent, name) else {
            return;
        };
        let is_directory = self.tree.names(id).is_some();
        let is_own = self.marks.as_ref().is_some_and(|marks| {
            if is_directory {
                marks.directories.contains(&id)
            } else {
                marks.names.contains(&(parent, name.into()))
            }
        });
        if !is_own {
            self.tree.remove(parent, name);
            self.parent = None;
        } else if is_directory {
            self.clear(id);
        }
    }

    /// Takes away what lower layers have in a directory.
    fn clear(&mut self, directory: NodeId) {
        let names: Vec<Vec<u8>> = match self.tree.names(directory) {
            Some(names) => names.keys().cloned().collect(),
            None => return,
        };
        for name in names {
            self.purge(directory, &name);
        }
    }

    /// Of the missing contents, those that the tree still has.
    fn finish(self) -> Result<Resolved> {
        let mut missing = BTreeMap::new();
        if !self.missing.is_empty() {
            let mut todo = vec![Tree::ROOT];
            while let Some(directory) = todo.pop() {
                for id in self
                    .tree
                    .names(directory)
                    .into_iter()
                    .flat_map(BTreeMap::values)
                {
                    if let Some(place) = self.missing.get(id) {
                        missing.insert(*place, *id);
                    }
                    todo.extend(self.tree.names(*id).map(|_| *id));
                }
            }
        }
        Ok(Resolved {
            tree: self.tree,
            missing,
        })
    }
}
