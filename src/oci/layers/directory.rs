//! A file tree written into an empty directory. Contents come first, as numbered files in a directory of their own; when the
//! tree is known they are renamed to their places. So everything is created in directories that this module has made,
//! looked up with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS` (`openat2(2)`): no link of an image is ever followed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use crate::oci::shown;
use crate::say;
use crate::squash::{Attributes, Data, Kind, NodeId, Store, Tree};

/// A file that has just been written.
pub struct Place<'a> {
    /// The directory that it is in.
    pub directory: BorrowedFd<'a>,
    /// Its name there; `.` for the root.
    pub name: &'a OsStr,
    /// Its path from the root of the image, without a slash in front; empty for the root.
    pub path: &'a [u8],
}

/// What is done about owners. It is done before permissions and attributes are set, which a change of owner takes away.
pub enum Owners<'a> {
    /// Nothing: the files belong to whoever writes them.
    Writer,
    /// They are changed (`chown(2)`): for a process that may do that, as root of a user namespace with enough ids.
    Change,
    /// Called once for each file, with user and group.
    Record(&'a mut dyn FnMut(&Place, u32, u32) -> Result<()>),
}

/// Reads and writes at once; a whole piece of zeros becomes a hole.
const PIECE: usize = 64 << 10;

/// Keeps contents until their places are known.
pub struct Staging {
    root: OwnedFd,
    name: String,
    directory: OwnedFd,
    count: u32,
}

impl Staging {
    /// In an empty directory, which is made if it is missing.
    ///
    /// # Errors
    /// When it cannot be made, or is not empty.
    pub fn below(root: &Path) -> Result<Staging> {
        let what = || format!("cannot write into {}", root.display());
        std::fs::create_dir_all(root).with_context(what)?;
        if std::fs::read_dir(root).with_context(what)?.next().is_some() {
            bail!("{}: it is not empty", what());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty()).with_context(what)?;
        let name = format!(".contents-{}", uuid::Uuid::new_v4());
        rustix::fs::mkdirat(&root, &name, Mode::RWXU).with_context(what)?;
        let directory = rustix::fs::openat(&root, &name, flags, Mode::empty());
        Ok(Staging {
            directory: directory.with_context(what)?,
            root,
            name,
            count: 0,
        })
    }

    /// Removes the directory, and what is left in it: contents that have no place, or all after an error.
    fn remove(&self) {
        let directory = || rustix::fs::unlinkat(&self.root, &self.name, AtFlags::REMOVEDIR);
        if matches!(directory(), Err(Errno::NOTEMPTY | Errno::EXIST)) {
            for number in 0..self.count {
                let _ = rustix::fs::unlinkat(&self.directory, number.to_string(), AtFlags::empty());
            }
            let _ = directory();
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Store for Staging {
    fn store(&mut self, content: &mut dyn Read) -> Result<Data> {
        let number = self.count;
        self.count += 1;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(&self.directory, number.to_string(), flags, mode);
        let mut file = File::from(file.context("cannot create a file")?);
        let len_bytes = copy(content, &mut file)?;
        Ok(Data {
            len_bytes,
            number: Some(number),
        })
    }
}

/// Copies to the end; gives the length.
fn copy(content: &mut dyn Read, file: &mut File) -> Result<u64> {
    let mut buffer = vec![0; PIECE];
    let mut len = 0;
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match content.read(&mut buffer[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        let piece = &buffer[..filled];
        let is_hole = filled == PIECE && piece.iter().all(|b| *b == 0);
        if is_hole {
            file.seek(SeekFrom::Current(filled as i64))?;
        } else {
            file.write_all(piece)?;
        }
        len += filled as u64;
        if filled < PIECE {
            break;
        }
    }
    // A hole at the end has no byte that would give the file its length.
    file.set_len(len)?;
    Ok(len)
}

/// Writes the tree, with the contents that the staging area holds, beside them.
///
/// # Errors
/// Naming the file that cannot be written.
pub fn write(tree: &Tree, staging: &Staging, owners: &mut Owners) -> Result<()> {
    let mut writing = Writing {
        tree,
        staging,
        owners,
        first: HashMap::new(),
        xattrs_left: 0,
    };
    let mut directories = vec![(Tree::ROOT, Vec::new())];
    let mut at = 0;
    // Parents come before children in the list, and get their attributes after them.
    while let Some((id, path)) = directories.get(at).cloned() {
        writing.fill(id, &path, &mut directories)?;
        at += 1;
    }
    // It would change the root's time later.
    staging.remove();
    for (id, path) in directories.iter().rev() {
        let opened = writing.open(path)?;
        let place = Place {
            directory: opened.as_fd(),
            name: OsStr::new("."),
            path,
        };
        writing
            .attributes(&place, &tree.node(*id).attributes, FileType::Directory)
            .with_context(|| shown(path))?;
    }
    if writing.xattrs_left > 0 {
        say::warn(format_args!(
            "{} extended attributes could not be set (file capabilities, or the file system has none)",
            writing.xattrs_left
        ));
    }
    Ok(())
}

struct Writing<'a, 'b> {
    tree: &'a Tree,
    staging: &'a Staging,
    owners: &'a mut Owners<'b>,
    /// The first path of files, for hard links.
    first: HashMap<NodeId, Vec<u8>>,
    xattrs_left: u64,
}

impl Writing<'_, '_> {
    /// A directory of those that were written.
    fn open(&self, path: &[u8]) -> Result<OwnedFd> {
        let name = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&self.staging.root, name, flags, Mode::empty(), resolve)
            .with_context(|| format!("cannot open {}", shown(path)))
    }

    /// Writes what is in a directory; its directories are appended to the list.
    fn fill(
        &mut self,
        id: NodeId,
        path: &[u8],
        directories: &mut Vec<(NodeId, Vec<u8>)>,
    ) -> Result<()> {
        let opened = self.open(path)?;
        for (name, id) in self.tree.names(id).into_iter().flatten() {
            let path = match path {
                b"" => name.clone(),
                _ => [path, b"/", name].concat(),
            };
            let place = Place {
                directory: opened.as_fd(),
                name: OsStr::from_bytes(name),
                path: &path,
            };
            self.file(&place, *id)
                .with_context(|| format!("cannot create {}", shown(&path)))?;
            if self.tree.names(*id).is_some() {
                directories.push((*id, path));
            }
        }
        Ok(())
    }

    /// Writes a file of any kind; a directory without its attributes.
    fn file(&mut self, place: &Place, id: NodeId) -> Result<()> {
        let (at, name) = (place.directory, place.name);
        let node = self.tree.node(id);
        if let Some(first) = self.first.get(&id) {
            let first = OsStr::from_bytes(first);
            rustix::fs::linkat(&self.staging.root, first, at, name, AtFlags::empty())?;
            return Ok(());
        }
        let private = Mode::RUSR | Mode::WUSR;
        let kind = match &node.kind {
            Kind::Directory(_) => {
                rustix::fs::mkdirat(at, name, Mode::RWXU)?;
                return Ok(());
            }
            Kind::File(data) => {
                match data.number {
                    Some(number) => {
                        let from = &self.staging.directory;
                        rustix::fs::renameat(from, number.to_string(), at, name)?;
                    }
                    None => {
                        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                        rustix::fs::openat(at, name, flags | OFlags::CLOEXEC, private)?;
                    }
                }
                FileType::RegularFile
            }
            Kind::Symlink(target) => {
                rustix::fs::symlinkat(OsStr::from_bytes(target), at, name)?;
                FileType::Symlink
            }
            Kind::Fifo => {
                rustix::fs::mknodat(at, name, FileType::Fifo, private, 0)?;
                FileType::Fifo
            }
            Kind::CharDevice(_) | Kind::BlockDevice(_) | Kind::Socket => return Ok(()),
        };
        self.first.insert(id, place.path.to_vec());
        self.attributes(place, &node.attributes, kind)
    }

    fn attributes(&mut self, place: &Place, attributes: &Attributes, kind: FileType) -> Result<()> {
        let (at, name) = (place.directory, place.name);
        self.owner(place, attributes)?;
        if kind != FileType::Symlink {
            // It was made here a moment ago, and is no link.
            let mode = Mode::from_raw_mode(attributes.mode.into());
            // Attributes can be set where the file can be written.
            if !attributes.xattrs.is_empty() {
                let open = mode | Mode::RUSR | Mode::WUSR;
                rustix::fs::chmodat(at, name, open, AtFlags::empty())?;
                self.xattrs(place, attributes, kind)?;
            }
            rustix::fs::chmodat(at, name, mode, AtFlags::empty()).context("cannot set its mode")?;
        }
        let time = Timespec {
            tv_sec: attributes.mtime_s.into(),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(at, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .context("cannot set its time")
    }

    fn owner(&mut self, place: &Place, attributes: &Attributes) -> Result<()> {
        let (uid, gid) = (attributes.uid, attributes.gid);
        match self.owners {
            Owners::Writer => Ok(()),
            Owners::Record(record) => record(place, uid, gid),
            Owners::Change => {
                let (user, group) = (
                    rustix::fs::Uid::from_raw(uid),
                    rustix::fs::Gid::from_raw(gid),
                );
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                let (at, name) = (place.directory, place.name);
                match rustix::fs::chownat(at, name, Some(user), Some(group), flags) {
                    Err(Errno::INVAL) => bail!(
                        "it belongs to {uid}:{gid}, which this user has no subordinate id for (/etc/subuid, /etc/subgid)"
                    ),
                    other => other.with_context(|| format!("cannot give it to {uid}:{gid}")),
                }
            }
        }
    }

    fn xattrs(&mut self, place: &Place, attributes: &Attributes, kind: FileType) -> Result<()> {
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            self.xattrs_left += attributes.xattrs.len() as u64;
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(place.directory, place.name, flags, Mode::empty())?;
        for (name, value) in &attributes.xattrs {
            let name = OsStr::from_bytes(name);
            match rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty()) {
                Ok(()) => {}
                Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSPC | Errno::RANGE) => {
                    self.xattrs_left += 1;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot set {}", name.display()));
                }
            }
        }
        Ok(())
    }
}
