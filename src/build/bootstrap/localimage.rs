//! `Bootstrap: localimage`: a SIF, a squashfs, or a directory.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Base, Kind};
use crate::build::Settings;
use crate::build::copy::{Copier, Manner, Source};
use crate::build::tree::Tree;
use crate::build::unpack::{self, Owners};
use crate::digest::Hashing;
use crate::image::{self, Root};
use crate::say;

/// Finds the image.
///
/// # Errors
/// When it is not there, is no image, or is for another machine.
pub fn prepare(from: &str, settings: &Settings) -> Result<Base> {
    let path = match from.strip_prefix("instance://") {
        Some(name) => crate::instance::Registry::open(&settings.host)
            .find(name)
            .map(|instance| instance.record.image)
            .with_context(|| format!("no instance {name} is running"))?,
        None => settings.host.cwd.join(from),
    };
    say::info(format_args!("Verifying bootstrap image {from}"));
    file(&path, settings)
}

/// The same for a file that was fetched.
///
/// # Errors
/// As [`prepare`].
pub fn file(path: &Path, settings: &Settings) -> Result<Base> {
    let image = image::open(path)?;
    let (arch, wanted) = (image.facts().arch, settings.arch);
    if wanted == settings.host.arch {
        image::check_arch(arch.as_deref(), wanted)?;
    } else if image::check_arch(arch.as_deref(), wanted).is_err() {
        bail!(
            "{} is for {}, and --arch asks for {wanted}: take a base for {wanted}, or leave --arch out",
            path.display(),
            arch.unwrap_or_default()
        );
    }
    match image.root() {
        Root::Directory(path) => Ok(Base {
            kind: Kind::Directory(path),
            key: None,
        }),
        Root::Squashfs { file, .. } => {
            let what = || format!("cannot read {}", file.display());
            let key = match &settings.steps {
                None => None,
                Some(_) => {
                    let mut hashing = Hashing::new(File::open(&file).with_context(what)?);
                    std::io::copy(&mut hashing, &mut std::io::sink()).with_context(what)?;
                    Some(hashing.finish().0.to_string())
                }
            };
            Ok(Base {
                kind: Kind::File(file),
                key,
            })
        }
        Root::Ext { file, .. } => bail!(
            "{}: an ext file system cannot be a base: use a SIF, a squashfs or a directory",
            file.display()
        ),
    }
}

/// Unpacks a file.
///
/// # Errors
/// As the unpacking.
pub fn unpack(path: &Path, root: &Path, owners: &mut Owners) -> Result<()> {
    say::info(format_args!("Extracting local image..."));
    match image::open(path)?.root() {
        Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        } => unpack::squashfs(&file, offset_bytes, len_bytes, root, owners),
        _ => bail!("{} has changed meanwhile", path.display()),
    }
}

/// Copies a directory.
///
/// # Errors
/// Naming what cannot be copied.
pub fn copy(path: &Path, root: &Path) -> Result<()> {
    say::info(format_args!("Copying {}...", path.display()));
    let to = Tree::open(root)?;
    let mut copier = Copier::new(&to, Manner::Exact).all_of(path);
    copier.copy(&Source::of_host(path)?, Path::new("/"))
}
