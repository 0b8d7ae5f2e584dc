//! A directory tree to a SIF: squashfs by `backhand`, then the objects around it.

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::{
    FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use backhand::compression::Compressor;
use backhand::{FilesystemCompressor, FilesystemWriter, NodeHeader};

use crate::sif::{Content, DataType, Draft, FsType, PartType, Partition, Stamp};

/// Packs the tree at `root` into a SIF at `target`, all files owned by root. The SIF appears there when it is whole.
/// Hard links become files of their own, and extended attributes are left out: the writing library has neither.
///
/// # Errors
/// Naming the file that cannot be read or written.
pub fn sif(
    root: &Path,
    definition: &str,
    arch: &'static str,
    target: &Path,
    stamp: Stamp,
) -> Result<()> {
    let directory = target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let draft = Draftfile::beside(target)?;
    let squashfs = unnamed(directory)?;
    squash(root, &squashfs)?;
    let mut objects = Draft::default();
    objects.add(DataType::Definition, "", Content::Bytes(definition.into()));
    objects.add_partition(
        Partition {
            fs: FsType::Squashfs,
            part: PartType::Primary,
            arch,
        },
        Content::File(squashfs),
    );
    let mut file =
        File::create(&draft.0).with_context(|| format!("cannot create {}", draft.0.display()))?;
    objects
        .write(&mut file, stamp)
        .with_context(|| format!("cannot write {}", draft.0.display()))?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    fs::rename(&draft.0, target).with_context(|| format!("cannot create {}", target.display()))
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
        let _ = fs::remove_file(&self.0);
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

/// Writes the tree as squashfs.
fn squash(root: &Path, out: &File) -> Result<()> {
    let mut writer = FilesystemWriter::default();
    writer.set_compressor(
        FilesystemCompressor::new(Compressor::Gzip, None).map_err(|e| anyhow!("{e}"))?,
    );
    writer.set_only_root_id();
    let meta = fs::metadata(root).with_context(|| format!("cannot read {}", root.display()))?;
    writer.set_root_mode(header(&meta).permissions);
    add(&mut writer, root, Path::new("/"))?;
    writer
        .write(BufWriter::new(out))
        .map_err(|e| anyhow!("cannot pack {}: {e}", root.display()))?;
    Ok(())
}

fn header(meta: &fs::Metadata) -> NodeHeader {
    let mtime = u32::try_from(meta.mtime()).unwrap_or(0);
    NodeHeader::new(
        u16::try_from(meta.mode() & 0o7777).unwrap_or(0o755),
        0,
        0,
        mtime,
    )
}

fn add(writer: &mut FilesystemWriter, directory: &Path, inside: &Path) -> Result<()> {
    let what = || format!("cannot read {}", directory.display());
    let mut entries: Vec<_> = fs::read_dir(directory)
        .with_context(what)?
        .collect::<Result<_, _>>()
        .with_context(what)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, inside) = (entry.path(), inside.join(entry.file_name()));
        let what = || format!("cannot pack {}", path.display());
        let meta = entry.metadata().with_context(what)?;
        let kind = meta.file_type();
        let pushed = if kind.is_dir() {
            writer.push_dir(&inside, header(&meta))
        } else if kind.is_symlink() {
            writer.push_symlink(
                fs::read_link(&path).with_context(what)?,
                &inside,
                header(&meta),
            )
        } else if kind.is_file() {
            writer.push_file_from_path(&path, &inside, header(&meta))
        } else if kind.is_fifo() {
            writer.push_fifo(&inside, header(&meta))
        } else {
            bail!("{}: devices and sockets have no place in an image", what());
        };
        pushed.map_err(|e| anyhow!("{}: {e}", what()))?;
        if kind.is_dir() {
            add(writer, &path, &inside)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
