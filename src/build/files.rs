//! `%files`: from the host and from other stages.

use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;

use super::copy::{Copier, Manner, Source};
use super::deffile::Stage;
use super::glob::Look;
use super::tree::{self, Tree};
use super::{Settings, UMASK, braces, glob};
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
                    from_host(to, source, target.as_deref().map(Path::new), settings)?;
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
pub fn from_host(
    to: &Tree,
    source: &str,
    target: Option<&Path>,
    settings: &Settings,
) -> Result<()> {
    let found = on_host(source, settings)?;
    for path in &found {
        let place = place(to, path, target, found.len())?;
        say::info(format_args!(
            "Copying {} to {}",
            path.display(),
            place.display()
        ));
        let manner = Manner::FromHost { umask: UMASK };
        let source = Source::of_host(&settings.host.cwd.join(path))?;
        Copier::new(to, manner).copy(&source, &place)?;
    }
    Ok(())
}

/// Names on the host, relative ones below the current directory.
struct OnHost<'a>(&'a Path);

impl Look for OnHost<'_> {
    fn names(&self, directory: &Path) -> Vec<OsString> {
        let entries = std::fs::read_dir(self.0.join(directory));
        entries
            .map(|e| e.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default()
    }
    fn is_there(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(self.0.join(path)).is_ok()
    }
    fn is_directory(&self, path: &Path) -> bool {
        self.0.join(path).is_dir()
    }
}

/// Names in another stage.
struct InStage<'a>(&'a Tree);

impl Look for InStage<'_> {
    fn names(&self, directory: &Path) -> Vec<OsString> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = self.0.open_at(directory, flags);
        fd.and_then(|fd| tree::names(fd.as_fd()))
            .unwrap_or_default()
    }
    fn is_there(&self, path: &Path) -> bool {
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        self.0.open_at(path, flags).is_ok()
    }
    fn is_directory(&self, path: &Path) -> bool {
        self.0.is_directory(path)
    }
}

/// The paths that a source on the host names, relative ones kept so.
fn on_host(source: &str, settings: &Settings) -> Result<Vec<PathBuf>> {
    let look = OnHost(&settings.host.cwd);
    // A name that is there as it is written needs no reading as a pattern.
    if look.is_there(Path::new(source)) {
        return Ok(vec![source.into()]);
    }
    let value = |name: &str| {
        settings
            .host
            .var(name)
            .map(|v| v.to_string_lossy().into_owned())
    };
    let mut all = Vec::new();
    for word in braces::expand(source).context("%files")? {
        let text = glob::variables(&word, &value);
        if text.is_empty() {
            bail!("%files: {source:?} is empty");
        }
        let path = PathBuf::from(&text);
        if glob::is_pattern(&text) && !look.is_there(&path) {
            all.extend(glob::expand(&path, &look).context("%files")?);
            continue;
        }
        std::fs::metadata(look.0.join(&path))
            .with_context(|| format!("%files: cannot read {}", look.0.join(&path).display()))?;
        all.push(path);
    }
    Ok(all)
}

/// The paths that a source in another stage names, from its root.
fn in_stage(source: &str, from: &Tree) -> Result<Vec<PathBuf>> {
    let look = InStage(from);
    let root = Path::new("/");
    if look.is_there(&root.join(source)) {
        return Ok(vec![root.join(source)]);
    }
    let mut all = Vec::new();
    for word in braces::expand(source).context("%files")? {
        let path = root.join(&word);
        if glob::is_pattern(&word) && !look.is_there(&path) {
            all.extend(glob::expand(&path, &look).context("%files")?);
        } else {
            all.push(path);
        }
    }
    Ok(all)
}

fn from_stage(
    from: &Tree,
    to: &Tree,
    source: &str,
    target: Option<&str>,
    record: &mut Owners,
) -> Result<()> {
    let found = in_stage(source, from)?;
    for path in &found {
        let place = place(to, path, target.map(Path::new), found.len())?;
        say::info(format_args!(
            "Copying {} to {}",
            path.display(),
            place.display()
        ));
        Copier::new(to, Manner::Exact)
            .with_owners(record)
            .copy(&Source::of_tree(from, path)?, &place)?;
    }
    Ok(())
}

/// Where one of `count` sources lands. Without a destination that is its own path below the root. Else it is the
/// destination, or a name in it when that is a directory, ends in a slash, or has to take several sources: none lands in
/// another one. The text of a destination cannot lead out of the root: `..` ends there.
fn place(to: &Tree, source: &Path, target: Option<&Path>, count: usize) -> Result<PathBuf> {
    let root = Path::new("/");
    let own = normalise(&root.join(source));
    let Some(target) = target else {
        return Ok(own);
    };
    let slash = target.as_os_str().as_bytes().ends_with(b"/");
    let target = normalise(&root.join(target));
    if (slash || count > 1) && !to.is_directory(&target) {
        to.directory(&target)?;
    }
    // A directory's own path is itself, not something inside.
    if !to.is_directory(&target) || (target == own && !slash && count == 1) {
        return Ok(target);
    }
    // `dir/.` stands for what is in it.
    let bytes = source.as_os_str().as_bytes();
    let last = bytes.rsplit(|b| *b == b'/').find(|part| !part.is_empty());
    match source.file_name() {
        Some(name) if last != Some(b".") => Ok(target.join(name)),
        _ => Ok(target),
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
