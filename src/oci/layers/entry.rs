//! A member of a layer, with a path that lies in the image and with its meaning as a whiteout.

use anyhow::{Result, bail};

use crate::oci::shown;
use crate::oci::tar::{Member, Type};
use crate::squash::tree::MAX_NAME;
use crate::squash::walk::MAX_PATH;
use crate::squash::{Attributes, Data};

/// In front of the name that a layer takes away (`layer.md`, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Takes away what lower layers have in this directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Files of the AUFS file system itself.
const AUFS: &[u8] = b".wh..wh.";

/// What an entry does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A regular file, and its content if that was stored.
    File(Option<Data>),
    /// A directory.
    Directory,
    /// A symbolic link to this path.
    Symlink(Box<[u8]>),
    /// A further name of the file at this path from the root.
    Link(Box<[u8]>),
    /// A device.
    Device,
    /// A named pipe.
    Fifo,
    /// Takes away what lower layers have at the path.
    Whiteout,
    /// Takes away what lower layers have below the path.
    Opaque,
}

/// An entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// From the root, without `.`, `..` and slashes at its ends; empty for the root itself.
    pub path: Box<[u8]>,
    /// What it does.
    pub what: What,
    /// Owners, permissions, times.
    pub attributes: Attributes,
}

impl Entry {
    /// What a member of a layer means. `None` for what is no part of an image.
    ///
    /// # Errors
    /// For paths that lead out of the image, and those that no file can have.
    pub fn of(member: Member) -> Result<Option<Entry>> {
        let path = clean(&member.path)?;
        if path
            .split(|b| *b == b'/')
            .any(|part| part.starts_with(AUFS) && part != OPAQUE)
        {
            return Ok(None);
        }
        let (parent, name) = split(&path);
        let (path, what) = match name.strip_prefix(WHITEOUT) {
            _ if name == OPAQUE => (parent.to_vec(), What::Opaque),
            Some(b"" | b"." | b"..") => bail!("{} names no file to take away", shown(&path)),
            Some(name) => (join(parent, name), What::Whiteout),
            None => {
                let what = what(&member, &path)?;
                (path, what)
            }
        };
        let xattrs = member.xattrs.into_iter().filter(|(name, _)| is_kept(name));
        Ok(Some(Entry {
            path: path.into(),
            what,
            attributes: Attributes {
                mode: member.mode,
                uid: member.uid,
                gid: member.gid,
                mtime_s: member.mtime_s,
                xattrs: xattrs.collect(),
            },
        }))
    }

    /// About the bytes of memory that it takes, here and in the tree.
    pub fn memory(&self) -> usize {
        let link = match &self.what {
            What::Symlink(target) | What::Link(target) => target.len(),
            _ => 0,
        };
        let xattrs = self.attributes.xattrs.iter();
        let xattrs: usize = xattrs
            .map(|(name, value)| name.len() + value.len() + 64)
            .sum();
        200 + self.path.len() + link + xattrs
    }
}

fn what(member: &Member, path: &[u8]) -> Result<What> {
    if path.is_empty() && member.kind != Type::Directory {
        bail!("the root of the image is no directory");
    }
    Ok(match &member.kind {
        Type::File => What::File(None),
        Type::Directory => What::Directory,
        Type::Symlink(target) if target.len() > MAX_PATH || target.contains(&0) => {
            bail!("{}: a link to a path that cannot be", shown(path))
        }
        Type::Symlink(target) => What::Symlink(target.clone().into()),
        Type::Link(target) => {
            let target = clean(target)?;
            if target.is_empty() {
                bail!("{}: a hard link to the root of the image", shown(path));
            }
            What::Link(target.into())
        }
        Type::Device => What::Device,
        Type::Fifo => What::Fifo,
    })
}

/// Attributes that mean the same in every container. `user.overlay.` would speak to overlay file systems of the host, labels
/// of a security module are the host's business.
fn is_kept(name: &[u8]) -> bool {
    name == b"security.capability"
        || name.starts_with(b"user.") && !name.starts_with(b"user.overlay.")
}

/// A path from the image's root in its shortest form.
fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if parts.pop().is_none() {
                    bail!("{} leads out of the image", shown(path));
                }
            }
            _ if part.len() > MAX_NAME + WHITEOUT.len() => {
                bail!("{} has a name longer than {MAX_NAME} bytes", shown(path))
            }
            _ if part.contains(&0) => bail!("{} has a NUL byte in its name", shown(path)),
            _ => parts.push(part),
        }
    }
    let clean = parts.join(&b'/');
    if clean.len() > MAX_PATH {
        bail!("{} is longer than {MAX_PATH} bytes", shown(path));
    }
    Ok(clean)
}

/// The directory and the name in it.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() {
        return name.to_vec();
    }
    [parent, b"/", name].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_take_their_shortest_form() {
        for (path, expected) in [
            ("./", ""),
            ("/", ""),
            ("/etc//passwd", "etc/passwd"),
            ("./a/../b/./c/", "b/c"),
        ] {
            assert_eq!(clean(path.as_bytes()).unwrap(), expected.as_bytes());
        }
        for path in ["..", "../etc/passwd", "a/../../b", "a\0b"] {
            assert!(clean(path.as_bytes()).is_err(), "{path}");
        }
        assert!(clean(&[b'n'; 300]).is_err());
        assert!(clean(&b"n/".repeat(3000)).is_err());
    }

    #[test]
    fn only_attributes_that_mean_the_same_everywhere_are_kept() {
        assert!(is_kept(b"user.comment") && is_kept(b"security.capability"));
        for name in [
            "user.overlay.opaque",
            "security.selinux",
            "trusted.overlay.opaque",
        ] {
            assert!(!is_kept(name.as_bytes()), "{name}");
        }
    }
}
