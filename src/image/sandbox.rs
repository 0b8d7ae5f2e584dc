//! A directory as an image.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::{Facts, Given, Image, MAX_READ, Root};

/// See the module.
pub struct Sandbox {
    path: PathBuf,
    given: Given,
}

impl Sandbox {
    /// A directory that exists.
    pub(super) fn new(path: PathBuf, given: Given) -> Sandbox {
        Sandbox { path, given }
    }
}

impl Image for Sandbox {
    fn root(&self) -> Root {
        Root::Directory(self.path.clone())
    }

    fn facts(&self) -> Facts {
        self.given.facts(None, Vec::new())
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        let what = || format!("cannot read {} of {}", path.display(), self.path.display());
        let root = File::open(&self.path).with_context(what)?;
        let inside = path.strip_prefix("/").unwrap_or(path);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file =
            match rustix::fs::openat2(&root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                Ok(fd) => File::from(fd),
                Err(rustix::io::Errno::NOENT) => return Ok(None),
                Err(error) => return Err(error).with_context(what),
            };
        if !file.metadata().with_context(what)?.is_file() {
            bail!("{}: not a regular file", what());
        }
        let mut bytes = Vec::new();
        file.take(MAX_READ + 1)
            .read_to_end(&mut bytes)
            .with_context(what)?;
        if bytes.len() as u64 > MAX_READ {
            bail!("{}: larger than {MAX_READ} bytes", what());
        }
        Ok(Some(bytes))
    }

    fn names(&self, path: &Path) -> Result<Vec<OsString>> {
        let what = || format!("cannot list {} of {}", path.display(), self.path.display());
        let root = File::open(&self.path).with_context(what)?;
        let inside = path.strip_prefix("/").unwrap_or(path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            match rustix::fs::openat2(&root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                Ok(fd) => rustix::fs::Dir::new(fd).with_context(what)?,
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(Vec::new()),
                Err(error) => return Err(error).with_context(what),
            };
        let names = directory
            .flatten()
            .map(|e| OsStr::from_bytes(e.file_name().to_bytes()).to_owned());
        Ok(names
            .filter(|n| n != "." && n != "..")
            .take(super::MAX_NAMES)
            .collect())
    }
}
