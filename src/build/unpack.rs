//! A squashfs to a directory, with owners, times, hard links and extended attributes. The image is read without a mount.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use capsid_fuse::{Archive, Inode, InodeRef, Kind};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::copy::give;
use super::tree::{self, Tree};
use crate::say;

/// Deepest directory: an image's tree has no links, but a damaged one may be deep.
const MAX_DEPTH: usize = 4000;

/// Whom the files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// As in the image, as far as they exist here.
    Image,
    /// Whoever unpacks.
    Caller,
}

/// Unpacks a squashfs that lies in a file into an existing directory.
///
/// # Errors
/// Naming the file of the image that cannot be read or written.
pub fn squashfs(file: &Path, offset_bytes: u64, len_bytes: u64, to: &Path, owners: Owners) -> Result<()> {
    let what = || format!("cannot unpack {}", file.display());
    let archive = File::open(file)
        .map_err(anyhow::Error::from)
        .and_then(|open| Ok(Archive::open(open, offset_bytes, Some(len_bytes))?))
        .with_context(what)?;
    let mut unpacking = Unpacking {
        archive: &archive,
        to: Tree::open(to)?,
        owners,
        links: HashMap::new(),
        buffer: vec![0; 1 << 20],
    };
    let root = archive.root();
    let inode = archive.inode(root).with_context(what)?;
    unpacking.directory(root, &inode, Path::new("/"), 0).with_context(what)
}

struct Unpacking<'a> {
    archive: &'a Archive,
    to: Tree,
    owners: Owners,
    /// First names of files with several.
    links: HashMap<InodeRef, PathBuf>,
    buffer: Vec<u8>,
}

impl Unpacking<'_> {
    fn directory(&mut self, at: InodeRef, inode: &Inode, path: &Path, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            bail!("more than {MAX_DEPTH} directories deep");
        }
        let mut entries: Vec<(OsString, InodeRef)> = Vec::new();
        self.archive
            .read_dir(at, 0, &mut |entry| {
                entries.push((OsString::from_vec(entry.name.to_vec()), entry.inode));
                true
            })
            .with_context(|| format!("{}: cannot be listed", path.display()))?;
        let to = self
            .to
            .open_at(path, OFlags::RDONLY | OFlags::DIRECTORY)
            .with_context(|| format!("cannot open {}", path.display()))?;
        for (name, child) in entries {
            let child_path = path.join(&name);
            self.entry(child, &to, &name, &child_path, depth)
                .with_context(|| child_path.display().to_string())?;
        }
        if path == Path::new("/") {
            self.owner(&to, OsStr::new(""), inode)?;
            rustix::fs::fchmod(&to, Mode::from_raw_mode(inode.mode))?;
            return Ok(());
        }
        let (parent, name) = self.to.parent(path)?;
        self.attributes(at, inode, &parent, &name)
    }

    fn entry(&mut self, at: InodeRef, to: &OwnedFd, name: &OsStr, path: &Path, depth: usize) -> Result<()> {
        let inode = self.archive.inode(at)?;
        match inode.kind {
            Kind::Dir => {
                match rustix::fs::mkdirat(to, name, Mode::RWXU) {
                    Err(rustix::io::Errno::EXIST) | Ok(()) => {}
                    Err(error) => return Err(error.into()),
                }
                return self.directory(at, &inode, path, depth + 1);
            }
            Kind::File => {
                if inode.nlink > 1 {
                    if let Some(first) = self.links.get(&at) {
                        let (parent, first) = self.to.parent(&first.clone())?;
                        return rustix::fs::linkat(&parent, &first, to, name, AtFlags::empty())
                            .context("cannot make a hard link");
                    }
                    self.links.insert(at, path.to_owned());
                }
                self.file(at, &inode, to, name)?;
            }
            Kind::Symlink => {
                let target = self.archive.read_link(at)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), to, name)?;
            }
            Kind::Fifo => rustix::fs::mknodat(to, name, FileType::Fifo, Mode::RWXU, 0)?,
            // /dev is mounted where it is needed, and devices cannot be made without root.
            _ => {
                say::verbose(format_args!("{}: devices and sockets are left out", path.display()));
                return Ok(());
            }
        }
        self.attributes(at, &inode, to, name)
    }

    fn file(&mut self, at: InodeRef, inode: &Inode, to: &OwnedFd, name: &OsStr) -> Result<()> {
        use std::io::{Seek as _, SeekFrom};
        let mut file = tree::create(to, name, 0o600)?;
        let mut done = 0;
        while done < inode.size {
            let len = self.archive.read(at, done, &mut self.buffer)?;
            if len == 0 {
                return Err(anyhow!("shorter than its {} bytes", inode.size));
            }
            let part = &self.buffer[..len];
            if part.iter().all(|b| *b == 0) {
                file.seek(SeekFrom::Current(i64::try_from(len)?))?;
            } else {
                file.write_all(part)?;
            }
            done += len as u64;
        }
        Ok(file.set_len(inode.size)?)
    }

    fn owner(&self, parent: &OwnedFd, name: &OsStr, inode: &Inode) -> Result<()> {
        match self.owners {
            Owners::Image => give(parent, name, inode.uid, inode.gid),
            Owners::Caller => Ok(()),
        }
    }

    fn attributes(&self, at: InodeRef, inode: &Inode, parent: &OwnedFd, name: &OsStr) -> Result<()> {
        self.owner(parent, name, inode)?;
        if inode.kind != Kind::Symlink {
            for (key, value) in self.archive.xattrs(at)? {
                tree::set_xattr(parent, name, OsStr::from_bytes(&key), &value).context("an extended attribute")?;
            }
            rustix::fs::chmodat(parent, name, Mode::from_raw_mode(inode.mode), AtFlags::empty())?;
        }
        Ok(tree::set_time(parent, name, inode.mtime.into(), 0)?)
    }
}
