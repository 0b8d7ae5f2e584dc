//! A tree to a SIF: the squashfs in a file without a name, then the objects around it.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use crate::durable;
use crate::engine::sys::LimitsFail;
use crate::sif::{Content, DataType, Draft, FsType, PartType, Partition, Stamp};
use crate::squash::{self, Options, Scan, Summary, Tree, Writer};

/// What a SIF is made of, beside its file system.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The definition that the image was built from.
    pub definition: &'a str,
    /// Further objects: type, name and content.
    pub objects: Vec<(DataType, String, Content)>,
    /// Go's name of the architecture.
    pub arch: &'static str,
    /// When the image was made, and its identity.
    pub stamp: Stamp,
    /// How its file system is written. A time that is not set becomes that of the stamp.
    pub options: Options,
}

impl<'a> Parts<'a> {
    /// Nothing but a definition, in the usual form.
    pub fn new(definition: &'a str, arch: &'static str, stamp: Stamp) -> Parts<'a> {
        Parts {
            definition,
            objects: Vec::new(),
            arch,
            stamp,
            options: Options::default(),
        }
    }
}

/// Makes a SIF at `target`: `fill` stores contents and gives the tree that they belong to. The SIF appears when it is
/// whole, in the place of what was there; after an error that stays, and nothing else is left.
///
/// # Errors
/// Those of `fill`, or naming the target when it cannot be written.
pub fn image(
    target: &Path,
    parts: Parts,
    fill: impl FnOnce(&mut Writer) -> Result<Tree>,
) -> Result<Summary> {
    let _limits = LimitsFail::begin();
    let what = || format!("cannot write {}", target.display());
    let directory = target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let draft = Draftfile::beside(target)?;
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(&draft.0)
        .with_context(|| format!("cannot create {}", target.display()))?;
    let squashfs = unnamed(directory)?;
    let mut options = parts.options;
    options.time_s = options
        .time_s
        .or(u32::try_from(parts.stamp.time_s.max(0)).ok());
    let mut writer = Writer::new(squashfs.try_clone().with_context(what)?, &options)?;
    let tree = fill(&mut writer).with_context(what)?;
    let summary = writer.finish(&tree).with_context(what)?;
    drop(tree);
    let mut objects = Draft::default();
    objects.add(
        DataType::Definition,
        "",
        Content::Bytes(parts.definition.into()),
    );
    for (data_type, name, content) in parts.objects {
        objects.add(data_type, &name, content);
    }
    objects.add_partition(
        Partition {
            fs: FsType::Squashfs,
            part: PartType::Primary,
            arch: parts.arch,
        },
        Content::File(squashfs),
    );
    objects.write(&mut file, parts.stamp).with_context(what)?;
    let rename = || std::fs::rename(&draft.0, target);
    durable::publish(&file, target, rename).with_context(what)?;
    Ok(summary)
}

/// Packs the directory `root` into a SIF at `target`, all files owned by root.
///
/// # Errors
/// Naming the file that cannot be read or written.
pub fn sif(
    root: &Path,
    definition: &str,
    arch: &'static str,
    target: &Path,
    stamp: Stamp,
) -> Result<Summary> {
    image(target, Parts::new(definition, arch, stamp), |writer| {
        let scan = Scan {
            owner: &|_, _| (0, 0),
            ..Scan::default()
        };
        squash::scan(root, writer, &scan)
    })
}

/// A file that is removed unless it has been renamed.
struct Draftfile(PathBuf);

impl Draftfile {
    fn beside(target: &Path) -> Result<Draftfile> {
        let name = target
            .file_name()
            .ok_or_else(|| anyhow!("{} cannot be a file", target.display()))?;
        let name = format!(".{}.{}", name.to_string_lossy(), uuid::Uuid::new_v4());
        Ok(Draftfile(target.with_file_name(name)))
    }
}

impl Drop for Draftfile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A file without a name in `directory`.
fn unnamed(directory: &Path) -> Result<File> {
    use rustix::fs::{Mode, OFlags};
    use rustix::io::Errno;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o600);
    match rustix::fs::openat(rustix::fs::CWD, directory, flags, mode) {
        Ok(file) => Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => renounced(directory),
        Err(error) => {
            Err(error).with_context(|| format!("cannot create a file in {}", directory.display()))
        }
    }
}

/// The same where the file system has no `O_TMPFILE`, as NFS has none: created, and its name removed.
fn renounced(directory: &Path) -> Result<File> {
    let name = Draftfile::beside(&directory.join("squashfs"))?;
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&name.0)
        .with_context(|| format!("cannot create {}", name.0.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::image;

    const STAMP: Stamp = Stamp {
        time_s: 1_700_000_000,
        identity: [7; 16],
    };

    #[test]
    fn what_was_packed_is_read_back_as_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/text"), "some text\n".repeat(50_000)).unwrap();
        std::os::unix::fs::symlink("/etc/text", root.join("link")).unwrap();
        let target = dir.path().join("image.sif");
        sif(&root, "bootstrap: scratch\n", "amd64", &target, STAMP).unwrap();
        let image = image::open(&target).unwrap();
        assert_eq!(image.facts().arch.as_deref(), Some("amd64"));
        let text = image.read(Path::new("/link")).unwrap();
        assert_eq!(text, Some("some text\n".repeat(50_000).into_bytes()));
        assert_eq!(image.read(Path::new("/none")).unwrap(), None);
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["image.sif", "tree"], "no draft stays");
    }

    #[test]
    fn same_tree_and_stamp_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        fs::create_dir(&root).unwrap();
        for name in ["b", "a", "c"] {
            fs::write(root.join(name), name).unwrap();
        }
        let pack = |name: &str| {
            let target = dir.path().join(name);
            sif(&root, "", "amd64", &target, STAMP).unwrap();
            fs::read(target).unwrap()
        };
        assert!(pack("one.sif") == pack("two.sif"));
    }

    #[test]
    fn file_without_a_name_needs_no_help_of_the_file_system() {
        use std::os::unix::fs::FileExt as _;
        let dir = tempfile::tempdir().unwrap();
        let file = renounced(dir.path()).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, *b"x");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
