//! The names and attributes of an image that is being made. Hard links are several names of one node.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// A node of a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

/// What every kind of file has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permissions with set-id and sticky bits: 0 to 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970; squashfs holds 32 bits without a sign.
    pub mtime_s: u32,
    /// Extended attributes by full name (`user.x`, `security.capability`), in the order of their names.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A content that a [`super::Store`] holds. It is known where it lies in the image when that is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Data {
    /// Length of the content in bytes.
    pub len_bytes: u64,
    /// The number that the store gave it; none for an empty content.
    pub number: Option<u32>,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Names in byte order, as squashfs wants them.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// A regular file.
    File(Data),
    /// A symbolic link to this path.
    Symlink(Vec<u8>),
    /// A character device, by `makedev(3)` number.
    CharDevice(u32),
    /// A block device.
    BlockDevice(u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A file of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What every kind has.
    pub attributes: Attributes,
    /// The rest.
    pub kind: Kind,
}

/// A file tree. What is removed from it stays in memory, and out of the image.
#[derive(Debug, Clone)]
pub struct Tree {
    nodes: Vec<Node>,
}

/// Longest name, in bytes.
pub const MAX_NAME: usize = 255;

impl NodeId {
    /// Below [`Tree::len`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl Tree {
    /// The root of every tree.
    pub const ROOT: NodeId = NodeId(0);

    /// An empty root directory.
    pub fn new(root: Attributes) -> Tree {
        Tree {
            nodes: vec![Node {
                attributes: root,
                kind: Kind::Directory(BTreeMap::new()),
            }],
        }
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// A node, to be changed.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// The names in a directory; `None` for other kinds.
    pub fn names(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.node(id).kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        }
    }

    /// What a directory has under a name.
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.names(directory)?.get(name).copied()
    }

    /// The node at a path of names, from the root; links are not followed, `.` and empty parts are skipped.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        path.split(|b| *b == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
            .try_fold(Tree::ROOT, |at, part| self.child(at, part))
    }

    /// Puts a new node under a name; what had the name before loses it.
    ///
    /// # Errors
    /// When the name cannot be one, or `directory` is none.
    pub fn add(&mut self, directory: NodeId, name: &[u8], node: Node) -> Result<NodeId> {
        let id = NodeId(u32::try_from(self.nodes.len())?);
        self.insert(directory, name, id)?;
        self.nodes.push(node);
        Ok(id)
    }

    /// Gives a node a further name.
    ///
    /// # Errors
    /// As [`Tree::add`]; a directory has one name only.
    pub fn link(&mut self, directory: NodeId, name: &[u8], id: NodeId) -> Result<()> {
        if matches!(self.node(id).kind, Kind::Directory(_)) {
            bail!(
                "{:?} is to be a further name of a directory",
                String::from_utf8_lossy(name)
            );
        }
        self.insert(directory, name, id)
    }

    fn insert(&mut self, directory: NodeId, name: &[u8], id: NodeId) -> Result<()> {
        if matches!(name, b"" | b"." | b"..")
            || name.len() > MAX_NAME
            || name.iter().any(|b| matches!(b, b'/' | 0))
        {
            bail!(
                "{:?} cannot be a file's name",
                String::from_utf8_lossy(name)
            );
        }
        let Kind::Directory(names) = &mut self.node_mut(directory).kind else {
            bail!(
                "{:?} is to lie in something that is no directory",
                String::from_utf8_lossy(name)
            );
        };
        names.insert(name.to_vec(), id);
        Ok(())
    }

    /// Takes a name away.
    pub fn remove(&mut self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        match &mut self.node_mut(directory).kind {
            Kind::Directory(names) => names.remove(name),
            _ => None,
        }
    }

    /// Number of nodes ever added, the removed ones among them: an upper bound.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing was ever added.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 1
    }
}
