//! OCI image layouts (OCI image specification, `image-layout.md`): `index.json`, and contents under `blobs/sha256`, in a
//! directory or in an archive of one.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::blob::Verified;
use super::platform::{Chosen, Documents, Received};
use super::{Blobs, Descriptor, Image, ImageConfig, Index, MAX_DOCUMENT, Platform};
use super::{document, platform};
use crate::digest::Digest;
use crate::given;

/// Where an index names the images that it holds.
const REFERENCE: &str = "org.opencontainers.image.ref.name";
/// The same, as containerd and Docker write it.
const CONTAINERD: &str = "io.containerd.image.name";

/// The files of a layout.
pub trait Files {
    /// Opens a file by its path from the layout's root.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>>;
}

struct Directory(PathBuf);

impl Files for Directory {
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>> {
        let path = self.0.join(path);
        let file = open_regular(&path)?;
        Ok(Box::new(file))
    }
}

/// Opens a file that is no pipe or device: those would make us wait for ever.
pub(super) fn open_regular(path: &Path) -> Result<File> {
    let what = || format!("cannot open {}", path.display());
    given::open(path).with_context(what)
}

struct Layout(Box<dyn Files + Send + Sync>);

impl Blobs for Layout {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>> {
        let path = format!("blobs/sha256/{}", blob.digest.hex());
        let file = self.0.open(&path)?;
        Ok(Box::new(Verified::new(file, blob.digest, Some(blob.size))))
    }
}

/// Opens an image of a layout directory: the one with this name (or digest), else the only one.
///
/// # Errors
/// When the layout is damaged, has no such image, or none for the platform.
pub fn open(path: &Path, reference: Option<&str>, platform: &Platform) -> Result<Image> {
    if !path.is_dir() {
        bail!(
            "{} is no directory with an OCI image layout",
            path.display()
        );
    }
    image_of(Box::new(Directory(path.into())), reference, platform)
        .with_context(|| format!("cannot use the OCI image in {}", path.display()))
}

/// The same for the files of a layout, wherever they are.
pub(super) fn image_of(
    files: Box<dyn Files + Send + Sync>,
    reference: Option<&str>,
    wanted: &Platform,
) -> Result<Image> {
    if let Ok(file) = files.open("oci-layout") {
        let version: serde_json::Value = json(file, "oci-layout")?;
        let version = version["imageLayoutVersion"].as_str().unwrap_or("1");
        if !version.starts_with("1.") && version != "1" {
            bail!("its layout is of version {version:?}: 1.0.0 is supported");
        }
    }
    let index = files
        .open("index.json")
        .context("it has no index.json, so it is no OCI image layout")?;
    let index: Index = json(index, "index.json")?;
    let named = named(&index, reference)?;
    let layout = Layout(files);
    let chosen = platform::choose_of(&named, &layout, wanted)?;
    described(Box::new(layout), chosen, wanted)
}

/// Reads a document whose digest nobody knows.
fn json<T: for<'de> serde::Deserialize<'de>>(file: impl Read, name: &str) -> Result<T> {
    let mut text = Vec::new();
    file.take(MAX_DOCUMENT + 1)
        .read_to_end(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    if text.len() as u64 > MAX_DOCUMENT {
        bail!("{name} is larger than {MAX_DOCUMENT} bytes");
    }
    super::parse(&text).with_context(|| format!("cannot understand {name}"))
}

/// How an index calls an image.
fn names(image: &Descriptor) -> impl Iterator<Item = &str> {
    [REFERENCE, CONTAINERD]
        .into_iter()
        .filter_map(|key| image.annotations.get(key).map(String::as_str))
}

/// The images of an index that a reference names: one, or several for several machines.
fn named(index: &Index, reference: Option<&str>) -> Result<Index> {
    let fits = |d: &&Descriptor| match reference {
        None => true,
        Some(reference) => {
            let digest = reference.trim_start_matches('@').parse::<Digest>();
            names(d).any(|name| {
                name == reference
                    || name
                        .rsplit_once(':')
                        .is_some_and(|(_, tag)| tag == reference)
            }) || digest.is_ok_and(|digest| digest == d.digest)
        }
    };
    let found: Vec<&Descriptor> = index.manifests.iter().filter(fits).collect();
    let mut all: Vec<&str> = index.manifests.iter().flat_map(names).collect();
    all.sort_unstable();
    all.dedup();
    let list = all.iter().take(20).copied().collect::<Vec<_>>().join(", ");
    match (found.as_slice(), reference) {
        ([], Some(reference)) if all.is_empty() => {
            bail!("it has no image {reference:?}: its images have no names")
        }
        ([], Some(reference)) => bail!("it has no image {reference:?}, but {list}"),
        ([], None) => bail!("its index.json names no image"),
        // The same image for several machines.
        (several, _) if several.len() == 1 || several.iter().any(|d| d.platform.is_some()) => {
            Ok(Index {
                manifests: several.iter().map(|d| (*d).clone()).collect(),
                ..index.clone()
            })
        }
        _ => bail!("it holds several images: name one of them ({list}), as PATH:NAME"),
    }
}

impl Documents for Layout {
    fn manifest(&self, named: &Descriptor) -> Result<Received> {
        Ok(Received {
            text: super::text(self, named)?,
            media_type: named.media_type.clone(),
            digest: named.digest,
        })
    }

    fn config(&self, named: &Descriptor) -> Result<ImageConfig> {
        document(self, named)
    }
}

/// With its configuration.
fn described(
    blobs: Box<dyn Blobs + Send + Sync>,
    chosen: Chosen,
    wanted: &Platform,
) -> Result<Image> {
    let Chosen {
        manifest,
        received: Received { digest, .. },
        is_told,
    } = chosen;
    super::layers::check_types(&manifest).with_context(|| digest.to_string())?;
    let config: ImageConfig = document(&*blobs, &manifest.config)?;
    if !is_told {
        platform::check(&config, wanted)?;
    }
    Ok(Image {
        digest,
        manifest,
        config,
        blobs,
    })
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
