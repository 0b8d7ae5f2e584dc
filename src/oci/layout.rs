//! OCI image layouts (OCI image specification, `image-layout.md`): `index.json`, and contents under `blobs/sha256`, in a
//! directory or in an archive of one.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::blob::Verified;
use super::{Blobs, Descriptor, Image, ImageConfig, Index, MAX_DOCUMENT, Manifest, Platform};
use super::{document, platform};
use crate::digest::Digest;

/// Where an index names the images that it holds.
const REFERENCE: &str = "org.opencontainers.image.ref.name";
/// The same, as containerd and Docker write it.
const CONTAINERD: &str = "io.containerd.image.name";
/// Indexes within indexes, at most.
const MAX_DEPTH: usize = 8;

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
    let is_file = std::fs::metadata(path).with_context(what)?.is_file();
    if !is_file {
        bail!("{}: it is no regular file", what());
    }
    File::open(path).with_context(what)
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
    let chosen = named(&index, reference, wanted)?.clone();
    image(Box::new(Layout(files)), &chosen, wanted)
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
    serde_json::from_slice(&text).with_context(|| format!("cannot understand {name}"))
}

/// How an index calls an image.
fn names(image: &Descriptor) -> impl Iterator<Item = &str> {
    [REFERENCE, CONTAINERD]
        .into_iter()
        .filter_map(|key| image.annotations.get(key).map(String::as_str))
}

/// The image of an index that a reference names.
fn named<'a>(
    index: &'a Index,
    reference: Option<&str>,
    wanted: &Platform,
) -> Result<&'a Descriptor> {
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
        ([only], _) => Ok(only),
        // The same image for several machines.
        (several, _) if several.iter().all(|d| d.platform.is_some()) => {
            platform::choose(several, wanted)
        }
        _ => bail!("it holds several images: name one of them ({list}), as PATH:NAME"),
    }
}

/// Follows a descriptor through indexes to the image for a machine, and reads what describes it.
///
/// # Errors
/// When a document is missing, damaged or of a kind that is no image, and when there is none for the platform.
pub fn image(
    blobs: Box<dyn Blobs + Send + Sync>,
    start: &Descriptor,
    wanted: &Platform,
) -> Result<Image> {
    let mut at = start.clone();
    for _ in 0..MAX_DEPTH {
        let value: serde_json::Value = document(&*blobs, &at)?;
        let declared = value["mediaType"]
            .as_str()
            .unwrap_or(&at.media_type)
            .to_owned();
        let damaged = || format!("cannot understand {}", at.digest);
        if value["schemaVersion"] != 2 {
            bail!(
                "{}: its schema version is {}: only 2 is supported (skopeo copy converts it)",
                at.digest,
                value["schemaVersion"]
            );
        }
        if value.get("manifests").is_some() {
            let index: Index = serde_json::from_value(value).with_context(damaged)?;
            let all: Vec<&Descriptor> = index.manifests.iter().collect();
            at = platform::choose(&all, wanted)?.clone();
            continue;
        }
        if value.get("layers").is_none() {
            bail!("{} is no image manifest, but {declared:?}", at.digest);
        }
        let manifest: Manifest = serde_json::from_value(value).with_context(damaged)?;
        return described(blobs, at.digest, manifest, wanted);
    }
    bail!(
        "{}: indexes within indexes, more than {MAX_DEPTH}",
        start.digest
    )
}

/// With its configuration.
fn described(
    blobs: Box<dyn Blobs + Send + Sync>,
    digest: Digest,
    manifest: Manifest,
    wanted: &Platform,
) -> Result<Image> {
    let kind = manifest.config.media_type.as_str();
    let is_image = matches!(
        kind,
        "" | "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
            | "application/octet-stream"
    );
    if !is_image {
        bail!("{digest} is no container image, but an artifact of type {kind:?}");
    }
    let config: ImageConfig = document(&*blobs, &manifest.config)?;
    for_platform(&config, wanted)?;
    Ok(Image {
        digest,
        manifest,
        config,
        blobs,
    })
}

/// Whether the only image that there is can be meant.
pub(super) fn for_platform(config: &ImageConfig, wanted: &Platform) -> Result<()> {
    let is_other = |found: &str, wanted: &str| !found.is_empty() && found != wanted;
    if is_other(&config.os, "linux") {
        return Err(anyhow!("it is for {:?}, not for linux", config.os));
    }
    if is_other(&config.architecture, &wanted.architecture) && !wanted.architecture.is_empty() {
        return Err(anyhow!(
            "it is for {}, not for {}: --arch {} takes it",
            config.architecture,
            wanted.architecture,
            config.architecture
        ));
    }
    Ok(())
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
