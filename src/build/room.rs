//! Where a build works: a private directory below the temporary one, and one beside the target, from which the result is
//! moved to its place in one step.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::StatVfsMountFlags;

use crate::{durable, say};

/// The directories of a build. They are not removed by this value: the keeper of the build does that.
#[derive(Debug, Clone)]
pub struct Room {
    /// Below the temporary directory.
    pub temporary: PathBuf,
    /// Beside the target.
    pub beside: PathBuf,
}

impl Room {
    /// Makes them.
    ///
    /// # Errors
    /// When programs cannot be run from the temporary directory, or one of the places cannot be written.
    pub fn create(temporary: &Path, target: &Path) -> Result<Room> {
        check_mount(temporary)?;
        let id = uuid::Uuid::new_v4();
        let parent = target.parent().filter(|p| !p.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let name = target
            .file_name()
            .ok_or_else(|| anyhow!("{} cannot be the name of an image", target.display()))?;
        // A long name leaves no room for more.
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(std::ffi::OsStr::from_bytes(
            &name.as_bytes()[..name.len().min(100)],
        ));
        hidden.push(format!(".{id}"));
        let room = Room {
            temporary: temporary.join(format!("capsid-build.{id}")),
            beside: parent.join(hidden),
        };
        make(&room.temporary).with_context(|| {
            format!(
                "{} is the directory for temporary files (--tmpdir, APPTAINER_TMPDIR)",
                temporary.display()
            )
        })?;
        if let Err(error) = make(&room.beside) {
            let _ = fs::remove_dir(&room.temporary);
            return Err(error.context(format!(
                "the image cannot be written to {}",
                parent.display()
            )));
        }
        Ok(room)
    }

    /// Removes them, when nothing was built yet.
    pub fn remove(&self) {
        for path in self.leftovers() {
            let _ = fs::remove_dir_all(path);
        }
    }

    /// What has to be removed at the end.
    pub fn leftovers(&self) -> [PathBuf; 2] {
        [self.temporary.clone(), self.beside.clone()]
    }
}

fn make(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// Programs of the root file system must run from there.
fn check_mount(directory: &Path) -> Result<()> {
    let stat = rustix::fs::statvfs(directory).with_context(|| {
        format!(
            "cannot use {} for temporary files (--tmpdir, APPTAINER_TMPDIR)",
            directory.display()
        )
    })?;
    if stat.f_flag.contains(StatVfsMountFlags::NOEXEC) {
        bail!(
            "'noexec' mount option set on {}, temporary root filesystem won't be usable at this location: choose another with --tmpdir",
            directory.display()
        );
    }
    if stat.f_flag.contains(StatVfsMountFlags::NODEV) {
        say::verbose(format_args!(
            "'nodev' mount option set on {}, it could be a source of failure during build process",
            directory.display()
        ));
    }
    Ok(())
}

/// Puts a finished file or directory in the place of `target`, durably. A directory that was there is then at `made`.
///
/// # Errors
/// As `fsync(2)` and `renameat2(2)`.
pub fn publish(made: &Path, target: &Path) -> Result<()> {
    let what = || format!("cannot create {}", target.display());
    let content = File::open(made).with_context(what)?;
    durable::publish(&content, target, || rename(made, target)).with_context(what)
}

fn rename(made: &Path, target: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    let Ok(there) = fs::symlink_metadata(target) else {
        return fs::rename(made, target);
    };
    if !there.is_dir() && !fs::symlink_metadata(made)?.is_dir() {
        return fs::rename(made, target);
    }
    match renameat_with(CWD, made, CWD, target, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        // File systems without an exchange, as NFS: the old one goes aside for an instant.
        Err(Errno::INVAL | Errno::NOSYS) => {
            let old = made.with_extension("old");
            fs::rename(target, &old)?;
            fs::rename(made, target).inspect_err(|_| drop(fs::rename(&old, target)))
        }
        Err(error) => Err(error.into()),
    }
}
