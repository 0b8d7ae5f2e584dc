//! `%files`: from the host and from other stages.

use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;

use super::copy::{Copier, Manner, Source};
use super::deffile::Stage;
use super::tree::{self, Tree};
use super::{Settings, UMASK, glob};
use crate::digest::Digest;
use crate::engine::emulate::Owners;
use crate::host::normalise;
use crate::say;

/// Gives the root file system of a stage.
pub type Stages<'a> = dyn Fn(&str) -> Option<PathBuf> + 'a;

/// Copies what `%files` sections name: those from other stages (`from` gives their trees), or those from the host.
/// `record` has the owners of all stages that the kernel does not know.
///
/// # Errors
/// Naming what cannot be copied.
pub fn copy(
    to: &Tree,
    stage: &Stage,
    from: Option<&Stages>,
    settings: &Settings,
    record: &mut Owners,
) -> Result<()> {
    for section in &stage.files {
        for (source, target) in &section.pairs {
            match (&section.from, from) {
                (Some(name), Some(stages)) => {
                    let path = stages(name).with_context(|| format!("there is no stage {name}"))?;
                    from_stage(&Tree::open(&path)?, to, source, target.as_deref(), record)?;
                }
                (None, None) => {
                    let target = target.as_deref().unwrap_or(source);
                    from_host(to, source, Path::new(target), settings)?;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Copies what a pattern names on the host.
///
/// # Errors
/// When nothing matches, or it cannot be copied.
pub fn from_host(to: &Tree, source: &str, target: &Path, settings: &Settings) -> Result<()> {
    let found = on_host(source, settings)?;
    let many = found.len() > 1;
    for path in found {
        // Without a destination the pattern itself was taken for it.
        let target = if target == Path::new(source) {
            settings.host.cwd.join(&path)
        } else {
            target.to_owned()
        };
        say::info(format_args!(
            "Copying {} to {}",
            path.display(),
            target.display()
        ));
        let place = place(to, &path, &target, many)?;
        let manner = Manner::FromHost { umask: UMASK };
        Copier::new(to, manner).copy(&Source::of_host(&settings.host.cwd.join(&path))?, &place)?;
    }
    Ok(())
}

/// The paths that a source on the host names, relative ones kept so.
fn on_host(source: &str, settings: &Settings) -> Result<Vec<PathBuf>> {
    let cwd = &settings.host.cwd;
    // A name that is there as it is written needs no reading as a pattern.
    if std::fs::symlink_metadata(cwd.join(source)).is_ok() {
        return Ok(vec![source.into()]);
    }
    let value = |name: &str| {
        settings
            .host
            .var(name)
            .map(|v| v.to_string_lossy().into_owned())
    };
    let text = glob::variables(source, &value);
    if text.is_empty() {
        bail!("%files: {source:?} is empty");
    }
    let path = PathBuf::from(&text);
    if !glob::is_pattern(&text) {
        std::fs::metadata(cwd.join(&path))
            .with_context(|| format!("%files: cannot read {}", cwd.join(&path).display()))?;
        return Ok(vec![path]);
    }
    glob::expand(&path, &|directory| {
        let entries = std::fs::read_dir(cwd.join(directory));
        entries
            .map(|e| e.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default()
    })
    .context("%files")
}

fn from_stage(
    from: &Tree,
    to: &Tree,
    source: &str,
    target: Option<&str>,
    record: &mut Owners,
) -> Result<()> {
    let pattern = normalise(&Path::new("/").join(source));
    let found = if glob::is_pattern(source) && from.stat(&pattern).is_none() {
        glob::expand(&pattern, &|directory| {
            let fd = from.open_at(directory, OFlags::RDONLY | OFlags::DIRECTORY);
            fd.and_then(|fd| tree::names(fd.as_fd()))
                .unwrap_or_default()
        })
        .context("%files")?
    } else {
        vec![pattern]
    };
    let many = found.len() > 1;
    for path in found {
        let target = target.map_or_else(|| path.clone(), PathBuf::from);
        say::info(format_args!(
            "Copying {} to {}",
            path.display(),
            target.display()
        ));
        let place = place(to, &path, &target, many)?;
        Copier::new(to, Manner::Exact)
            .with_owners(record)
            .copy(&Source::of_tree(from, &path)?, &place)?;
    }
    Ok(())
}

/// Where a source lands: in the destination when that is a directory or ends in a slash, else there. The text of a
/// destination cannot lead out of the root: `..` ends there.
fn place(to: &Tree, source: &Path, target: &Path, many: bool) -> Result<PathBuf> {
    let slash = target.as_os_str().as_bytes().ends_with(b"/");
    let target = normalise(&Path::new("/").join(target));
    if (slash || many) && !to.is_directory(&target) {
        to.directory(&target)?;
    }
    if !to.is_directory(&target) {
        return Ok(target);
    }
    // Without a destination a directory is itself, not something inside.
    let same = target == normalise(&Path::new("/").join(source)) && !slash;
    match source.file_name() {
        Some(_) if same => Ok(target),
        Some(name) => Ok(target.join(name)),
        None => Ok(target),
    }
}

/// A digest of everything that `%files` and `%appfiles` of a stage take from the host.
///
/// # Errors
/// When something cannot be read.
pub fn digest(stage: &Stage, settings: &Settings) -> Result<Digest> {
    let mut text = String::new();
    let own = stage
        .files
        .iter()
        .filter(|f| f.from.is_none())
        .flat_map(|f| &f.pairs);
    let apps = stage.apps.iter().flat_map(|a| &a.files);
    for (source, target) in own.chain(apps) {
        text.push_str(&format!("{source:?} {target:?}\n"));
        for path in on_host(source, settings)? {
            describe(&settings.host.cwd.join(&path), &path, 0, &mut text)?;
        }
    }
    Ok(Digest::of(text.as_bytes()))
}

/// Lines with names, modes and digests of contents; links are followed, as when copied.
fn describe(path: &Path, shown: &Path, depth: usize, text: &mut String) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let what = || format!("cannot read {}", path.display());
    if depth > 1000 {
        bail!("{}: more than 1000 directories deep", what());
    }
    let meta = std::fs::metadata(path).with_context(what)?;
    text.push_str(&format!(
        "{shown:?} {:o} {}.{} ",
        meta.mode(),
        meta.mtime(),
        meta.mtime_nsec()
    ));
    if meta.is_file() {
        let mut file = crate::digest::Hashing::new(std::fs::File::open(path).with_context(what)?);
        std::io::copy(&mut file, &mut std::io::sink()).with_context(what)?;
        text.push_str(&file.finish().0.hex());
    }
    text.push('\n');
    if meta.is_dir() {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .with_context(what)?
            .map(|e| e.map(|e| e.file_name()))
            .collect::<std::io::Result<_>>()
            .with_context(what)?;
        names.sort();
        for name in names {
            describe(&path.join(&name), &shown.join(&name), depth + 1, text)?;
        }
    }
    Ok(())
}
