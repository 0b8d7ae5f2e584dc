//! The inode table and the directory table.
//!
//! Inodes lie directory by directory: first what is no directory, so that a listing and its inodes share blocks, then
//! the subdirectories with all that is below them, then the directory itself, since it holds where its listing lies,
//! and the listing holds where its inodes lie. The number of an inode is its place in this order, from 1.

use std::collections::{HashMap, btree_map};

use anyhow::{Context, Result, bail};

use super::compress::Encoder;
use super::meta::{Metadata, Place};
use super::pipeline::Run;
use super::tree::{Attributes, Data, Kind, NodeId, Tree};
use super::writer::Content;
use super::xattrs::Sets;

/// Entries below one header of a listing, at most.
const MAX_RUN: usize = 256;
/// Entries of a directory's index, at most: a 16-bit number says how many there are.
const MAX_INDEX: usize = u16::MAX as usize;
/// Bytes of a link's target, at most: what the kernel reads.
const MAX_TARGET: usize = 4095;
const NONE: u32 = u32::MAX;

/// What the tables become.
pub(super) struct Tables {
    pub(super) inodes: Vec<u8>,
    pub(super) directories: Vec<u8>,
    /// Where the inode of each number lies, from number 1.
    pub(super) places: Vec<u64>,
    pub(super) root: u64,
    /// The user and group ids of the image.
    pub(super) ids: Vec<u32>,
    pub(super) xattrs: Sets,
    /// The latest time of a file.
    pub(super) latest_s: u32,
}

/// The order of the inodes, and what follows from it.
struct Order {
    nodes: Vec<NodeId>,
    /// By node: its number; 0 for one that has no name.
    numbers: Vec<u32>,
    /// By node: names that it has.
    links: Vec<u32>,
    /// By node: the directory that it lies in.
    parents: Vec<NodeId>,
}

impl Order {
    fn of(tree: &Tree) -> Result<Order> {
        let mut order = Order {
            nodes: Vec::new(),
            numbers: vec![0; tree.len()],
            links: vec![0; tree.len()],
            parents: vec![Tree::ROOT; tree.len()],
        };
        // Trees may be deeper than a stack.
        let mut open: Vec<(NodeId, btree_map::Values<Vec<u8>, NodeId>)> = Vec::new();
        let mut next = Some(Tree::ROOT);
        loop {
            if let Some(directory) = next.take() {
                if std::mem::replace(&mut order.links[directory.index()], 1) != 0 {
                    bail!("a directory of the image has two names");
                }
                let names = tree.names(directory).context("the root is no directory")?;
                for id in names.values() {
                    if tree.names(*id).is_none() {
                        order.links[id.index()] += 1;
                        if order.links[id.index()] == 1 {
                            order.append(*id)?;
                        }
                    }
                }
                open.push((directory, names.values()));
            }
            let Some((directory, rest)) = open.last_mut() else {
                return Ok(order);
            };
            next = rest.by_ref().find(|id| tree.names(**id).is_some()).copied();
            match next {
                Some(id) => order.parents[id.index()] = *directory,
                None => {
                    let done = *directory;
                    open.pop();
                    order.append(done)?;
                }
            }
        }
    }

    fn append(&mut self, id: NodeId) -> Result<()> {
        self.nodes.push(id);
        self.numbers[id.index()] =
            u32::try_from(self.nodes.len()).context("the image has too many files")?;
        Ok(())
    }
}

/// Index of an owner in the table of ids.
#[derive(Default)]
struct Ids {
    known: HashMap<u32, u16>,
    ids: Vec<u32>,
}

impl Ids {
    fn index(&mut self, id: u32) -> Result<u16> {
        if let Some(index) = self.known.get(&id) {
            return Ok(*index);
        }
        // The count is a 16-bit number, too.
        if self.ids.len() == usize::from(u16::MAX) {
            bail!(
                "the image has more than 65535 different owners and groups, and squashfs can hold no more"
            );
        }
        let index = self.ids.len() as u16;
        self.ids.push(id);
        self.known.insert(id, index);
        Ok(index)
    }
}

/// Writes both tables. Each table has a compressor of its own.
pub(super) fn tables(
    tree: &Tree,
    contents: &[Content],
    runs: &[Run],
    clamp_s: Option<u32>,
    encoders: &mut [Encoder; 2],
) -> Result<Tables> {
    let order = Order::of(tree)?;
    let [first, second] = encoders;
    let mut writer = Writer {
        tree,
        contents,
        runs,
        clamp_s,
        inodes: Metadata::new(first),
        directories: Metadata::new(second),
        places: Vec::with_capacity(order.nodes.len()),
        order: &order,
        ids: Ids::default(),
        xattrs: Sets::default(),
        latest_s: 0,
    };
    for id in &order.nodes {
        writer.node(*id)?;
    }
    let Writer {
        inodes,
        directories,
        places,
        ids,
        xattrs,
        latest_s,
        ..
    } = writer;
    let root = places.last().context("the image has no root")?.pack();
    Ok(Tables {
        inodes: inodes.finish()?.0,
        directories: directories.finish()?.0,
        places: places.into_iter().map(Place::pack).collect(),
        root,
        ids: ids.ids,
        xattrs,
        latest_s,
    })
}

struct Writer<'a> {
    tree: &'a Tree,
    contents: &'a [Content],
    runs: &'a [Run],
    clamp_s: Option<u32>,
    order: &'a Order,
    inodes: Metadata<'a>,
    directories: Metadata<'a>,
    places: Vec<Place>,
    ids: Ids,
    xattrs: Sets,
    latest_s: u32,
}

/// The basic number of an inode's kind.
fn basic(kind: &Kind) -> u16 {
    match kind {
        Kind::Directory(_) => 1,
        Kind::File(_) => 2,
        Kind::Symlink(_) => 3,
        Kind::BlockDevice(_) => 4,
        Kind::CharDevice(_) => 5,
        Kind::Fifo => 6,
        Kind::Socket => 7,
    }
}

/// Between the basic number of a kind and its extended one.
const EXTENDED: u16 = 7;

impl Writer<'_> {
    fn node(&mut self, id: NodeId) -> Result<()> {
        let node = self.tree.node(id);
        let xattr = self.xattrs.index(&node.attributes.xattrs)?;
        let links = self.order.links[id.index()];
        let (extended, body) = match &node.kind {
            Kind::Directory(_) => self.directory(id, xattr)?,
            Kind::File(data) => self.file(*data, links, xattr)?,
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_TARGET {
                    bail!(
                        "a symbolic link to {} bytes: 1 to {MAX_TARGET} are possible",
                        target.len()
                    );
                }
                let mut body = links.to_le_bytes().to_vec();
                body.extend((target.len() as u32).to_le_bytes());
                body.extend(target);
                (with_xattr(&mut body, xattr), body)
            }
            Kind::BlockDevice(device) | Kind::CharDevice(device) => {
                let mut body = links.to_le_bytes().to_vec();
                body.extend(device.to_le_bytes());
                (with_xattr(&mut body, xattr), body)
            }
            Kind::Fifo | Kind::Socket => {
                let mut body = links.to_le_bytes().to_vec();
                (with_xattr(&mut body, xattr), body)
            }
        };
        let number = basic(&node.kind) + if extended { EXTENDED } else { 0 };
        self.places.push(self.inodes.place()?);
        let head = self.head(number, &node.attributes)?;
        self.inodes.write(&head)?;
        self.inodes.write(&body)
    }

    fn head(&mut self, kind: u16, attributes: &Attributes) -> Result<Vec<u8>> {
        let mtime_s = attributes
            .mtime_s
            .min(self.clamp_s.unwrap_or(attributes.mtime_s));
        self.latest_s = self.latest_s.max(mtime_s);
        let mut head = Vec::with_capacity(16);
        for number in [
            kind,
            attributes.mode & 0o7777,
            self.ids.index(attributes.uid)?,
            self.ids.index(attributes.gid)?,
        ] {
            head.extend(number.to_le_bytes());
        }
        head.extend(mtime_s.to_le_bytes());
        head.extend((self.places.len() as u32).to_le_bytes());
        Ok(head)
    }

    /// Whether the inode is extended, and what follows its head.
    fn file(&self, data: Data, links: u32, xattr: Option<u32>) -> Result<(bool, Vec<u8>)> {
        let content = match data.number {
            Some(number) => self
                .contents
                .get(number as usize)
                .filter(|content| content.len_bytes == data.len_bytes)
                .context("the image has a file whose content is elsewhere")?,
            None => &Content::EMPTY,
        };
        let nothing = Run::default();
        let run = match content.run {
            Some(run) => self
                .runs
                .get(run as usize)
                .context("the image lacks a file's blocks")?,
            None => &nothing,
        };
        let (fragment, offset) = content.fragment.unwrap_or((NONE, 0));
        let small = u32::try_from(run.start)
            .ok()
            .zip(u32::try_from(data.len_bytes).ok())
            .filter(|_| links == 1 && xattr.is_none() && content.sparse_bytes == 0);
        let mut body = Vec::with_capacity(40 + 4 * run.words.len());
        match small {
            Some((start, len)) => {
                for number in [start, fragment, offset, len] {
                    body.extend(number.to_le_bytes());
                }
            }
            None => {
                for number in [run.start, data.len_bytes, content.sparse_bytes] {
                    body.extend(number.to_le_bytes());
                }
                for number in [links, fragment, offset, xattr.unwrap_or(NONE)] {
                    body.extend(number.to_le_bytes());
                }
            }
        }
        for word in run.words.iter() {
            body.extend(word.to_le_bytes());
        }
        Ok((small.is_none(), body))
    }

    fn directory(&mut self, id: NodeId, xattr: Option<u32>) -> Result<(bool, Vec<u8>)> {
        let names = self.tree.names(id).context("no directory")?;
        let subdirectories = names
            .values()
            .filter(|child| self.tree.names(**child).is_some())
            .count();
        let links = u32::try_from(subdirectories + 2)?;
        let parent = if id == Tree::ROOT {
            self.order.nodes.len() as u32 + 1
        } else {
            self.order.numbers[self.order.parents[id.index()].index()]
        };
        let place = self.directories.place()?;
        let listing = self.listing(id)?;
        // As stat shows it; the three bytes are . and .. of an older format.
        let size = u32::try_from(listing.len_bytes + 3).context("a directory is too large")?;
        let mut body = Vec::new();
        let small = u16::try_from(size)
            .ok()
            .filter(|_| listing.index_count == 0 && xattr.is_none());
        match small {
            Some(size) => {
                body.extend(place.block.to_le_bytes());
                body.extend(links.to_le_bytes());
                body.extend(size.to_le_bytes());
                body.extend(place.offset.to_le_bytes());
                body.extend(parent.to_le_bytes());
            }
            None => {
                for number in [links, size, place.block, parent] {
                    body.extend(number.to_le_bytes());
                }
                body.extend(listing.index_count.to_le_bytes());
                body.extend(place.offset.to_le_bytes());
                body.extend(xattr.unwrap_or(NONE).to_le_bytes());
                body.extend(listing.index);
            }
        }
        Ok((small.is_none(), body))
    }

    /// Writes the listing of a directory: runs of entries whose inodes lie in one block, a header before each.
    fn listing(&mut self, id: NodeId) -> Result<Listing> {
        let names = self.tree.names(id).context("no directory")?;
        let mut listing = Listing::default();
        let mut block = self.directories.place()?.block;
        let mut rest = names.iter().peekable();
        let mut run: Vec<u8> = Vec::new();
        while let Some((first, child)) = rest.peek() {
            let (number, inode) = self.inode(**child);
            let at = self.directories.place()?;
            if at.block != block {
                block = at.block;
                listing.add_index(block, first);
            }
            // A run ends at the end of its metadata block, so that the next block begins with a header soon.
            let room = super::meta::BLOCK - usize::from(at.offset);
            run.clear();
            let mut count = 0;
            while let Some((name, child)) = rest.peek() {
                let (its, place) = self.inode(**child);
                let delta = i16::try_from(i64::from(its) - i64::from(number));
                let Ok(delta) = delta else { break };
                if count == MAX_RUN
                    || place.block != inode.block
                    || (count > 0 && 12 + run.len() >= room)
                {
                    break;
                }
                run.extend(place.offset.to_le_bytes());
                run.extend(delta.to_le_bytes());
                run.extend(basic(&self.tree.node(**child).kind).to_le_bytes());
                run.extend((name.len() as u16 - 1).to_le_bytes());
                run.extend(*name);
                count += 1;
                rest.next();
            }
            let mut head = (count as u32 - 1).to_le_bytes().to_vec();
            head.extend(inode.block.to_le_bytes());
            head.extend(number.to_le_bytes());
            self.directories.write(&head)?;
            self.directories.write(&run)?;
            listing.len_bytes += head.len() + run.len();
        }
        Ok(listing)
    }

    /// Number and place of an inode that has been written.
    fn inode(&self, id: NodeId) -> (u32, Place) {
        let number = self.order.numbers[id.index()];
        (number, self.places[number as usize - 1])
    }
}

#[derive(Default)]
struct Listing {
    len_bytes: usize,
    index: Vec<u8>,
    index_count: u16,
}

impl Listing {
    /// The next header is the first that begins in `block`, and this is the first name behind it.
    fn add_index(&mut self, block: u32, name: &[u8]) {
        if usize::from(self.index_count) == MAX_INDEX {
            return;
        }
        self.index.extend((self.len_bytes as u32).to_le_bytes());
        self.index.extend(block.to_le_bytes());
        self.index.extend((name.len() as u32 - 1).to_le_bytes());
        self.index.extend(name);
        self.index_count += 1;
    }
}

/// Appends the index of the attributes; whether there are any.
fn with_xattr(body: &mut Vec<u8>, xattr: Option<u32>) -> bool {
    body.extend(xattr.iter().flat_map(|index| index.to_le_bytes()));
    xattr.is_some()
}
