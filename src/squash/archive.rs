//! The tree of another squashfs, read without unpacking it. The image may be hostile: what it says is bounded.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};

use anyhow::{Context, Result, bail};
use capsid_fuse::{Archive, Inode, InodeRef, Kind as Found};

use super::Store;
use super::tree::{Attributes, Data, Kind, Node, NodeId, Tree};

/// Names in an image, at most.
const MAX_NAMES: usize = 1 << 24;

/// Copies an image: its tree, and its contents into `store`. Contents are compressed anew.
///
/// # Errors
/// When the image is damaged, or storing fails.
pub fn copy(archive: &Archive, store: &mut dyn Store) -> Result<Tree> {
    tree(archive, &mut |at, inode| {
        let mut content = Content {
            archive,
            at,
            offset: 0,
        };
        let data = store.store(&mut content)?;
        if data.len_bytes != inode.size {
            bail!("the image is damaged: a file is shorter than it says");
        }
        Ok(data)
    })
}

/// A file's content, from its start.
struct Content<'a> {
    archive: &'a Archive,
    at: InodeRef,
    offset: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self
            .archive
            .read(self.at, self.offset, buffer)
            .map_err(io::Error::other)?;
        self.offset += len as u64;
        Ok(len)
    }
}

/// The tree of an image; `content` gives what stands for a file's content.
pub(super) fn tree(
    archive: &Archive,
    content: &mut dyn FnMut(InodeRef, &Inode) -> Result<Data>,
) -> Result<Tree> {
    let root = archive.root();
    let mut reader = Reader {
        archive,
        content,
        known: HashMap::new(),
        tree: Tree::new(attributes(archive, root, &archive.inode(root)?)?),
        names: 0,
    };
    reader.known.insert(root, Tree::ROOT);
    let mut todo = vec![(root, Tree::ROOT)];
    while let Some((at, node)) = todo.pop() {
        let first = todo.len();
        reader.directory(at, node, &mut todo)?;
        // The first subdirectory is the next.
        todo[first..].reverse();
    }
    Ok(reader.tree)
}

struct Reader<'a> {
    archive: &'a Archive,
    content: &'a mut dyn FnMut(InodeRef, &Inode) -> Result<Data>,
    /// What was seen: an inode has as many names as there are entries for it.
    known: HashMap<InodeRef, NodeId>,
    tree: Tree,
    names: usize,
}

impl Reader<'_> {
    fn directory(
        &mut self,
        at: InodeRef,
        node: NodeId,
        todo: &mut Vec<(InodeRef, NodeId)>,
    ) -> Result<()> {
        let mut entries: Vec<(Vec<u8>, InodeRef)> = Vec::new();
        let room = MAX_NAMES - self.names;
        self.archive.read_dir(at, 0, &mut |entry| {
            entries.push((entry.name.to_vec(), entry.inode));
            entries.len() <= room
        })?;
        if entries.len() > room {
            bail!("the image has more than {MAX_NAMES} names");
        }
        self.names += entries.len();
        for (name, at) in entries {
            let what = || format!("cannot read {:?}", String::from_utf8_lossy(&name));
            self.entry(node, &name, at, todo).with_context(what)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        parent: NodeId,
        name: &[u8],
        at: InodeRef,
        todo: &mut Vec<(InodeRef, NodeId)>,
    ) -> Result<()> {
        if self.tree.child(parent, name).is_some() {
            bail!("the image is damaged: a directory has this name twice");
        }
        if let Some(known) = self.known.get(&at) {
            // Refused for a directory: a tree has no circles.
            return self.tree.link(parent, name, *known);
        }
        let inode = self.archive.inode(at)?;
        let kind = match inode.kind {
            Found::Dir => Kind::Directory(BTreeMap::new()),
            Found::File => Kind::File((self.content)(at, &inode)?),
            Found::Symlink => Kind::Symlink(self.archive.read_link(at)?),
            Found::BlockDevice => Kind::BlockDevice(inode.rdev),
            Found::CharDevice => Kind::CharDevice(inode.rdev),
            Found::Fifo => Kind::Fifo,
            Found::Socket => Kind::Socket,
        };
        let node = Node {
            attributes: attributes(self.archive, at, &inode)?,
            kind,
        };
        let id = self.tree.add(parent, name, node)?;
        self.known.insert(at, id);
        if inode.kind == Found::Dir {
            todo.push((at, id));
        }
        Ok(())
    }
}

fn attributes(archive: &Archive, at: InodeRef, inode: &Inode) -> Result<Attributes> {
    Ok(Attributes {
        mode: (inode.mode & 0o7777) as u16,
        uid: inode.uid,
        gid: inode.gid,
        mtime_s: inode.mtime,
        xattrs: archive.xattrs(at)?.into_iter().collect(),
    })
}
