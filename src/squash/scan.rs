//! A directory of the file system to a [`Tree`], its contents stored on the way.
//!
//! Everything is opened relative to the directory that it was found in and no link is followed (`openat(2)`,
//! `O_NOFOLLOW`), so a tree that changes meanwhile never leads outside. In each directory what is no directory comes
//! first, by name, then the subdirectories: files that are read together lie together.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::chain::Chain;
use super::tree::{Attributes, Data, Kind, Node, NodeId, Tree};
use super::writer::Writer;
use crate::progress::Progress;
use crate::say;

/// Bytes of the names of extended attributes, and of a value, at most (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MAX_XATTR: usize = 64 << 10;
/// Names in the notice about what was left out.
const NAMED: usize = 3;

/// What is done with devices and sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Specials {
    /// They are left out, with a notice: a normal user cannot make the ones, and the others are nothing without the
    /// program that listens.
    #[default]
    LeaveOut,
    /// They come into the image.
    Keep,
}

/// How a directory is read.
#[derive(Clone, Copy)]
pub struct Scan<'a> {
    /// The owner in the image of a file with this user and group.
    pub owner: &'a dyn Fn(u32, u32) -> (u32, u32),
    /// Devices and sockets.
    pub specials: Specials,
    /// Whether an extended attribute of this full name is wanted.
    pub xattr: &'a dyn Fn(&[u8]) -> bool,
}

impl Default for Scan<'_> {
    /// Owners as they are, and the attributes that belong to a file's content.
    fn default() -> Self {
        Scan {
            owner: &|uid, gid| (uid, gid),
            specials: Specials::LeaveOut,
            xattr: &|name| name.starts_with(b"user.") || name == b"security.capability",
        }
    }
}

/// Reads the directory `root`, and stores what it holds.
///
/// # Errors
/// Naming the file that cannot be read, or when the image cannot be written.
pub fn scan(root: &Path, store: &mut Writer, scan: &Scan) -> Result<Tree> {
    let mut walk = Walk {
        scan,
        store,
        tree: Tree::new(Attributes::default()),
        links: HashMap::new(),
        left_out: Vec::new(),
        at: Chain::new(root)?,
        names: vec![0; MAX_XATTR],
        value: vec![0; MAX_XATTR],
    };
    let progress = Progress::new("packing", 0);
    if progress.is_shown() {
        progress.set_total(content_bytes(root));
    }
    walk.store.progress = Some(progress);
    let done = walk.root();
    walk.store.progress = None;
    done?;
    walk.notice();
    Ok(walk.tree)
}

/// Bytes of all files below a directory, for a line that says how much is left: what cannot be read counts nothing.
pub fn content_bytes(root: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut total: u64 = 0;
    let mut todo = vec![root.to_owned()];
    let mut seen = HashSet::new();
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                todo.push(entry.path());
            } else if meta.is_file() && (meta.nlink() == 1 || seen.insert((meta.dev(), meta.ino())))
            {
                total = total.saturating_add(meta.len());
            }
        }
    }
    total
}

struct Walk<'a> {
    scan: &'a Scan<'a>,
    store: &'a mut Writer,
    tree: Tree,
    /// Files with several names, by device and inode.
    links: HashMap<(u64, u64), NodeId>,
    left_out: Vec<PathBuf>,
    at: Chain,
    names: Vec<u8>,
    value: Vec<u8>,
}

impl Walk<'_> {
    fn root(&mut self) -> Result<()> {
        // Directories to be read: node, number of directories above, name.
        let mut todo: Vec<(NodeId, usize, Vec<u8>)> = Vec::new();
        let mut next = Some(Tree::ROOT);
        while let Some(node) = next.take() {
            let below = self.directory(node)?;
            let depth = self.at.depth();
            todo.extend(below.into_iter().rev().map(|(id, name)| (id, depth, name)));
            if let Some((id, depth, name)) = todo.pop() {
                self.at.leave_to(depth);
                self.at.enter(&name)?;
                next = Some(id);
            }
        }
        Ok(())
    }

    /// Reads the directory where we are. Returns its subdirectories by name.
    fn directory(&mut self, node: NodeId) -> Result<Vec<(NodeId, Vec<u8>)>> {
        let fd = self.at.here()?.try_clone_to_owned()?;
        let whole = self.at.path(b"");
        let what = || format!("cannot read {}", whole.display());
        let mut attributes = self.attributes(&rustix::fs::fstat(&fd).with_context(what)?);
        attributes.xattrs = self.xattrs(fd.as_fd()).with_context(what)?;
        self.tree.node_mut(node).attributes = attributes;
        let names = names(&fd).with_context(what)?;
        let mut below = Vec::new();
        for name in names {
            let found = self.entry(node, fd.as_fd(), &name);
            let what = || format!("cannot pack {}", self.at.path(&name).display());
            if let Some(id) = found.with_context(what)? {
                below.push((id, name));
            }
        }
        Ok(below)
    }

    /// Adds an entry of a directory; the node, if it is a directory itself.
    fn entry(&mut self, parent: NodeId, fd: BorrowedFd, name: &[u8]) -> Result<Option<NodeId>> {
        let stat = rustix::fs::statat(fd, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW)?;
        let inode = (stat.st_dev, stat.st_ino);
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory
            && stat.st_nlink > 1
            && let Some(known) = self.links.get(&inode)
        {
            self.tree.link(parent, name, *known)?;
            return Ok(None);
        }
        let device = u32::try_from(stat.st_rdev).unwrap_or(0);
        let kept = self.scan.specials == Specials::Keep;
        let mut attributes = self.attributes(&stat);
        let kind = match kind {
            FileType::Directory => {
                let empty = Kind::Directory(BTreeMap::new());
                let node = Node {
                    attributes,
                    kind: empty,
                };
                return Ok(Some(self.tree.add(parent, name, node)?));
            }
            FileType::RegularFile => {
                let (its, data) = self.file(fd, name)?;
                attributes = its;
                Kind::File(data)
            }
            FileType::Symlink => Kind::Symlink(
                rustix::fs::readlinkat(fd, OsStr::from_bytes(name), Vec::new())?.into_bytes(),
            ),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket if kept => Kind::Socket,
            FileType::CharacterDevice if kept => Kind::CharDevice(device),
            FileType::BlockDevice if kept => Kind::BlockDevice(device),
            _ => {
                self.left_out.push(self.at.path(name));
                return Ok(None);
            }
        };
        let id = self.tree.add(parent, name, Node { attributes, kind })?;
        if stat.st_nlink > 1 {
            self.links.insert(inode, id);
        }
        Ok(None)
    }

    /// Stores a regular file.
    fn file(&mut self, directory: BorrowedFd, name: &[u8]) -> Result<(Attributes, Data)> {
        // Should it have become something else meanwhile, opening must not wait.
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(directory, OsStr::from_bytes(name), flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            bail!("it changed while it was read");
        }
        let mut attributes = self.attributes(&stat);
        attributes.xattrs = self.xattrs(fd.as_fd())?;
        let data = self.store.store_file(&File::from(fd))?;
        Ok((attributes, data))
    }

    fn attributes(&self, stat: &Stat) -> Attributes {
        let (uid, gid) = (self.scan.owner)(stat.st_uid, stat.st_gid);
        Attributes {
            mode: (stat.st_mode & 0o7777) as u16,
            uid,
            gid,
            mtime_s: u32::try_from(stat.st_mtime.max(0)).unwrap_or(u32::MAX),
            xattrs: BTreeMap::new(),
        }
    }

    /// The wanted attributes of an open file.
    fn xattrs(&mut self, fd: BorrowedFd) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let mut found = BTreeMap::new();
        let len = match rustix::fs::flistxattr(fd, &mut self.names[..]) {
            Ok(len) => len,
            Err(Errno::OPNOTSUPP) => 0,
            Err(error) => return Err(error).context("its extended attributes cannot be listed"),
        };
        let names = self.names[..len].split(|b| *b == 0);
        for name in names.filter(|name| !name.is_empty() && (self.scan.xattr)(name)) {
            match rustix::fs::fgetxattr(fd, OsStr::from_bytes(name), &mut self.value[..]) {
                Ok(len) => {
                    found.insert(name.to_vec(), self.value[..len].to_vec());
                }
                // Removed meanwhile.
                Err(Errno::NODATA) => {}
                Err(error) => {
                    let name = String::from_utf8_lossy(name);
                    return Err(error).with_context(|| format!("its attribute {name:?}"));
                }
            }
        }
        Ok(found)
    }

    fn notice(&self) {
        if self.left_out.is_empty() {
            return;
        }
        let mut names: Vec<_> = self
            .left_out
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        let more = names.len().saturating_sub(NAMED);
        names.truncate(NAMED);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        say::warn(format_args!(
            "devices and sockets are left out of the image: {}{more}",
            names.join(", ")
        ));
    }
}

/// The names in a directory, sorted.
fn names(fd: &OwnedFd) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}
