//! Image files and directories, behind one small trait. What an image is, its bytes say, never its name.
//!
//! Opening is cheap: a read of the header, one of the descriptors, one of the file system's superblock. Each kind of bad
//! file gets its own sentence.

mod file;
mod sandbox;
mod sif;

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use capsid_fuse::Archive;
use serde::Serialize;

/// The file tree of an image, and where it lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Root {
    /// A directory of the host.
    Directory(PathBuf),
    /// A squashfs in a file.
    Squashfs {
        /// The file.
        file: PathBuf,
        /// Its first byte.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// An ext2, ext3 or ext4 in a file.
    Ext {
        /// The file.
        file: PathBuf,
        /// Its first byte.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
        /// What of it is taken.
        top: Top,
    },
}

/// What of an ext file system is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Top {
    /// All of it.
    Root,
    /// Its directory `upper`, if it has one: that is where layers have their files.
    Upper,
}

impl Top {
    /// The directory, for [`capsid_fuse::Server::ext`].
    pub fn directory(self) -> &'static str {
        match self {
            Top::Root => "",
            Top::Upper => "upper",
        }
    }
}

impl Root {
    /// The same as a layer over a root.
    pub fn into_layer(mut self) -> Root {
        if let Root::Ext { top, .. } = &mut self {
            *top = Top::Upper;
        }
        self
    }

    /// The file or directory of the host.
    pub fn file(&self) -> &Path {
        let (Root::Squashfs { file, .. } | Root::Ext { file, .. } | Root::Directory(file)) = self;
        file
    }
}

/// A file or a directory in a file system image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The file system.
    pub root: Root,
    /// Absolute, inside.
    pub path: PathBuf,
    /// It is a directory.
    pub directory: bool,
}

/// Whether a file in a file system image is a directory. Call it in a process of its own: reading may start threads that
/// end only some time after it has returned.
///
/// # Errors
/// When it is not there, or the image cannot be read.
pub fn is_directory(root: &Root, path: &Path) -> Result<bool> {
    use std::os::unix::ffi::OsStrExt as _;
    let what = || {
        format!(
            "cannot read {} of {}",
            path.display(),
            root.file().display()
        )
    };
    match kind(root, path.as_os_str().as_bytes()).with_context(what)? {
        Some(kind) => Ok(kind == capsid_fuse::Kind::Dir),
        None => bail!("image-src {} is not in the image", path.display()),
    }
}

fn kind(root: &Root, path: &[u8]) -> Result<Option<capsid_fuse::Kind>> {
    let options = capsid_fuse::Options {
        owner: capsid_fuse::Owner::Image,
        stage: false,
        max_threads: 1,
        cache_bytes: 1 << 20,
    };
    let server = match root {
        Root::Directory(_) => return Ok(Some(capsid_fuse::Kind::Dir)), // refused when it is mounted
        Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        } => capsid_fuse::Server::squashfs(archive(file, *offset_bytes, *len_bytes)?, options),
        Root::Ext {
            file,
            offset_bytes,
            len_bytes,
            top,
        } => {
            let file = File::open(file)?;
            let top = top.directory();
            capsid_fuse::Server::ext(file, *offset_bytes, Some(*len_bytes), top, options)?
        }
    };
    Ok(server.kind(path)?)
}

/// What planning has to know of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Go's name of the processor architecture; `None` when the image does not say.
    pub arch: Option<String>,
    /// Absolute path, under the name that was given: a link keeps its own.
    pub path: PathBuf,
    /// Last part of the path.
    pub name: String,
    /// File systems in the image that lie over its root, lowest first.
    pub overlays: Vec<Root>,
}

/// An open image.
pub trait Image {
    /// The root file system.
    fn root(&self) -> Root;

    /// What planning has to know.
    fn facts(&self) -> Facts;

    /// A small file of the root file system, links followed inside it; `None` when it is not there.
    ///
    /// # Errors
    /// When it cannot be read or is larger than [`MAX_READ`].
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>>;

    /// The names in a directory of the root file system, at most [`MAX_NAMES`] of them; none when there is no such
    /// directory.
    ///
    /// # Errors
    /// When it cannot be read.
    fn names(&self, path: &Path) -> Result<Vec<OsString>>;
}

/// Bytes that [`Image::read`] gives at most.
pub const MAX_READ: u64 = 4 << 20;

/// Names that [`Image::names`] gives at most.
pub const MAX_NAMES: usize = 65_536;

/// Opens an image: a SIF, a bare squashfs, the older form with a `#!` line before the squashfs, an ext file system, or
/// a directory.
///
/// # Errors
/// Naming the image and what is wrong with it.
pub fn open(path: &Path) -> Result<Box<dyn Image>> {
    let what = || format!("could not open image {}", path.display());
    let real = real_path(path).with_context(what)?;
    let given = Given::new(path, &real);
    open_at(real, given).with_context(what)
}

/// The file system that a bind takes from an image file: object `id` of a SIF, or the first one meant for data, else its
/// root.
///
/// # Errors
/// When there is none.
pub fn data(path: &Path, id: Option<u32>) -> Result<Root> {
    let real = real_path(path)?;
    if real.is_dir() {
        bail!(
            "{} is a directory: bind it without image-src or id",
            path.display()
        );
    }
    let (file, head) = start_of(&real)?;
    if is_sif(&head) {
        return sif::data(real, &file, id);
    }
    if let Some(id) = id {
        bail!(
            "id={id} needs a SIF; {} is a bare file system",
            path.display()
        );
    }
    let given = Given::new(path, &real);
    Ok(file::detect(real, given, &file, &head)?.root())
}

fn real_path(path: &Path) -> Result<PathBuf> {
    let real = std::fs::canonicalize(path).or_else(|error| match error.raw_os_error() {
        // Deeper than a path can say: it is found from here all the same.
        Some(libc::ENAMETOOLONG) if path.is_relative() => Ok(path.to_owned()),
        _ => Err(error),
    });
    real.map_err(|e| anyhow!(crate::say::word(&e)))
}

/// How an image was named.
#[derive(Debug, Clone)]
struct Given {
    /// Absolute.
    path: PathBuf,
    name: String,
}

impl Given {
    fn new(path: &Path, real: &Path) -> Given {
        // The name may be a link; the directory that it is in is the one that it leads to.
        let named = || {
            let name = path.file_name()?;
            let directory = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            let directory = std::fs::canonicalize(directory.unwrap_or(Path::new("."))).ok()?;
            Some(directory.join(name))
        };
        let is_plain = path.is_absolute()
            && path
                .components()
                .all(|part| part != std::path::Component::ParentDir);
        let path = match is_plain {
            true => path.components().collect(),
            false => named().unwrap_or_else(|| real.to_owned()),
        };
        let name = path.file_name().unwrap_or_default();
        Given {
            name: name.to_string_lossy().into_owned(),
            path,
        }
    }

    fn facts(&self, arch: Option<&str>, overlays: Vec<Root>) -> Facts {
        Facts {
            arch: arch.map(str::to_owned),
            path: self.path.clone(),
            name: self.name.clone(),
            overlays,
        }
    }
}

fn open_at(path: PathBuf, given: Given) -> Result<Box<dyn Image>> {
    if std::fs::metadata(&path)?.is_dir() {
        return Ok(Box::new(sandbox::Sandbox::new(path, given)));
    }
    let (file, head) = start_of(&path)?;
    if is_sif(&head) {
        return Ok(Box::new(sif::SifImage::open(path, given, file)?));
    }
    file::detect(path, given, &file, &head)
}

fn is_sif(head: &[u8]) -> bool {
    crate::sif::Sif::is_sif(head) || head.starts_with(b"#!/usr/bin/env run-singularity\n\0SIF")
}

/// Opens a file, and reads its first bytes.
fn start_of(path: &Path) -> Result<(File, Vec<u8>)> {
    let kind = std::fs::metadata(path)?.file_type();
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() {
        bail!("neither a regular file nor a directory");
    }
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            anyhow!("not readable by the current user, check permissions")
        }
        _ => anyhow!(crate::say::word(&e)),
    })?;
    let mut head = vec![0; 2048];
    let len = read_start(&file, &mut head)?;
    head.truncate(len);
    if head.is_empty() {
        bail!("the file is empty");
    }
    Ok((file, head))
}

/// Whether a file is a whole image of any kind, also of one that cannot be run here: encrypted, of another machine.
///
/// # Errors
/// Naming what is wrong with it.
pub fn check(path: &Path) -> Result<()> {
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() {
        bail!("it is no regular file");
    }
    let (file, head) = start_of(path)?;
    if crate::sif::Sif::is_sif(&head) {
        return sif::check(&file);
    }
    let given = Given::new(path, path);
    file::detect(path.to_owned(), given, &file, &head).map(drop)
}

/// Says whether an image can run on this machine.
///
/// # Errors
/// When it is for another architecture, naming both.
pub fn check_arch(image: Option<&str>, host: &str) -> Result<()> {
    let runs = |image: &str| {
        image == host
            || image == "unknown"
            || matches!((host, image), ("amd64", "386") | ("arm64", "arm"))
    };
    match image.filter(|image| !runs(image)) {
        Some(image) => {
            bail!("the image is for {image}, this machine is {host}: use an image for {host}")
        }
        None => Ok(()),
    }
}

/// Reads from the start until the buffer is full or the file ends.
fn read_start(file: &File, buffer: &mut [u8]) -> Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(len)
}

/// The reader of a squashfs in `file`.
fn archive(file: &Path, offset_bytes: u64, len_bytes: u64) -> Result<Archive> {
    Ok(Archive::open(
        File::open(file)?,
        offset_bytes,
        Some(len_bytes),
    )?)
}

fn read_squashfs(
    file: &Path,
    offset_bytes: u64,
    len_bytes: u64,
    path: &Path,
) -> Result<Option<Vec<u8>>> {
    use std::os::unix::ffi::OsStrExt as _;
    let archive = archive(file, offset_bytes, len_bytes)?;
    let what = || format!("cannot read {} of {}", path.display(), file.display());
    archive
        .read_file(path.as_os_str().as_bytes(), MAX_READ)
        .with_context(what)
}

fn names_in_squashfs(
    file: &Path,
    offset_bytes: u64,
    len_bytes: u64,
    path: &Path,
) -> Result<Vec<OsString>> {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let archive = archive(file, offset_bytes, len_bytes)?;
    let what = || format!("cannot list {} of {}", path.display(), file.display());
    let mut names = Vec::new();
    if let Some(directory) = archive
        .resolve(path.as_os_str().as_bytes())
        .with_context(what)?
    {
        archive
            .read_dir(directory, 0, &mut |entry| {
                names.push(OsString::from_vec(entry.name.to_vec()));
                names.len() < MAX_NAMES
            })
            .with_context(what)?;
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, bytes).unwrap();
        match open(&path) {
            Ok(_) => "opened".into(),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn each_bad_file_has_its_sentence() {
        assert!(error_of(b"").ends_with("the file is empty"));
        assert!(error_of(b"text").contains("image format not recognized"));
        assert!(error_of(&[0; 4096]).contains("image format not recognized"));
        assert!(error_of(b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0").contains("truncated"));
        assert!(
            error_of(b"hsqs").contains("image format not recognized")
                || error_of(b"hsqs").contains("truncated")
        );
        let missing = open(Path::new("/no/such/image"))
            .err()
            .map(|e| format!("{e:#}"));
        assert_eq!(
            missing.as_deref(),
            Some("could not open image /no/such/image: no such file or directory")
        );
    }

    #[test]
    fn file_that_is_shorter_than_its_own_start_is_refused() {
        // What a file of /proc looks like: bytes are there, and the length is 0.
        let file = tempfile::tempfile().unwrap();
        let head = b"#!/usr/bin/env run-singularity\nhsqs";
        let path = Path::new("/proc/1/cmdline");
        let error = file::detect(path.into(), Given::new(path, path), &file, head).err();
        assert!(error.unwrap().to_string().contains("truncated"));
    }

    #[test]
    fn architectures_that_run_here_are_let_through() {
        assert!(check_arch(Some("amd64"), "amd64").is_ok());
        assert!(check_arch(Some("386"), "amd64").is_ok());
        assert!(check_arch(None, "amd64").is_ok());
        let error = check_arch(Some("arm64"), "amd64").unwrap_err().to_string();
        assert_eq!(
            error,
            "the image is for arm64, this machine is amd64: use an image for amd64"
        );
    }
}
