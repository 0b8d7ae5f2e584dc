//! OCI and Docker images: manifests, configurations, layers (OCI image specification 1.1; Docker's manifest schema 2).
//!
//! This module knows what the documents say, not where they come from: a registry ([`crate::net`]), a directory or an
//! archive gives the bytes as [`Blobs`].

pub mod archive;
pub mod blob;
pub mod config;
pub mod decompress;
mod engine;
pub mod layers;
pub mod layout;
mod pax;
pub mod platform;
mod tar;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::Digest;

/// Largest manifest, index or configuration that is read, in bytes.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// Names content: OCI `descriptor.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Set in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Free text, `org.opencontainers.image.title` and `…ref.name` among it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Where else it is, for layers that a registry need not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

impl Descriptor {
    /// Names content, and says nothing else of it.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Descriptor {
        Descriptor {
            media_type: media_type.into(),
            digest,
            size,
            platform: None,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
        }
    }
}

/// The machine that an image is for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name of the processor.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `v7`, `v8`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// An image for one machine: OCI `manifest.md`; Docker's differs in media types only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2; also where nothing is said.
    #[serde(default = "schema_version")]
    pub schema_version: u32,
    /// What it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// For artifacts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default)]
    pub layers: Vec<Descriptor>,
    /// Free text.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Several manifests: OCI `image-index.md`, Docker's manifest list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2; also where nothing is said.
    #[serde(default = "schema_version")]
    pub schema_version: u32,
    /// What it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The manifests.
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
}

/// How an image is to be run, and how its layers were made: OCI `config.md`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// RFC 3339.
    #[serde(default)]
    pub created: Option<String>,
    /// Go's name of the processor.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `v7`, `v8`, …
    #[serde(default)]
    pub variant: Option<String>,
    /// The run's settings.
    #[serde(default)]
    pub config: Option<RunConfig>,
    /// Digests of the layers without compression, lowest first.
    #[serde(default)]
    pub rootfs: RootFs,
}

/// Settings of a run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// `NAME=VALUE`.
    #[serde(default)]
    pub env: Option<Vec<String>>,
    /// The program, to which arguments are appended.
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments, or the program where there is no entry point.
    #[serde(default)]
    pub cmd: Option<Vec<String>>,
    /// Where it runs.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Who runs it.
    #[serde(default)]
    pub user: Option<String>,
    /// Labels.
    #[serde(default)]
    pub labels: Option<BTreeMap<String, String>>,
}

/// The layers of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RootFs {
    /// Of the tar archives, lowest first.
    #[serde(default)]
    pub diff_ids: Vec<Digest>,
}

/// A source of content by digest.
pub trait Blobs {
    /// Opens content. Whoever reads it to the end has its digest checked by then: a mismatch is an error of the last read.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>>;
}

/// An image whose content is at hand.
pub struct Image {
    /// Digest of the manifest.
    pub digest: Digest,
    /// What it consists of.
    pub manifest: Manifest,
    /// How it is to be run.
    pub config: ImageConfig,
    /// Where the layers are.
    pub blobs: Box<dyn Blobs + Send + Sync>,
}

/// Where an image is kept outside of registries, by the names that the peers give to these places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// `oci`: a layout directory.
    Layout,
    /// `oci-archive`: the archive of a layout.
    OciArchive,
    /// `docker-archive`: what `docker save` writes.
    DockerArchive,
    /// `docker-daemon`: the Docker engine of this machine.
    DockerDaemon,
}

impl Place {
    /// By its name.
    pub fn of(name: &str) -> Option<Place> {
        Some(match name {
            "oci" => Place::Layout,
            "oci-archive" => Place::OciArchive,
            "docker-archive" => Place::DockerArchive,
            "docker-daemon" => Place::DockerDaemon,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Place::Layout => "oci",
            Place::OciArchive => "oci-archive",
            Place::DockerArchive => "docker-archive",
            Place::DockerDaemon => "docker-daemon",
        }
    }

    /// Opens `PATH` or `PATH:NAME` (for the engine `NAME`) of a place, a relative path from `cwd` on. `scratch` is a
    /// directory for what has to be decompressed.
    ///
    /// # Errors
    /// When there is no such image, or it is damaged or for another machine.
    pub fn open(
        self,
        text: &str,
        cwd: &Path,
        platform: &Platform,
        scratch: &Path,
    ) -> Result<Image> {
        if self == Place::DockerDaemon {
            return archive::open_docker_daemon(text.trim_start_matches('/'), platform, scratch);
        }
        let (path, reference) = split(text, &|path| cwd.join(path).exists());
        let path = &cwd.join(path);
        match self {
            Place::Layout => layout::open(path, reference, platform),
            Place::OciArchive => archive::open_oci(path, reference, platform, scratch),
            _ => archive::open_docker(path, reference, platform, scratch),
        }
    }
}

/// `PATH` or `PATH:NAME`, where both may have colons: all of it is the path where that is there, else what is before the
/// first colon with a path before it that is there, else what is before the first colon, as for the peers.
pub fn split<'a>(text: &'a str, is_there: &dyn Fn(&str) -> bool) -> (&'a str, Option<&'a str>) {
    if is_there(text) {
        return (text, None);
    }
    let mut colons = text.match_indices(':').map(|(at, _)| at);
    let found = colons.clone().find(|at| is_there(&text[..*at]));
    match found.or_else(|| colons.next()) {
        Some(at) => (&text[..at], Some(&text[at + 1..]).filter(|n| !n.is_empty())),
        None => (text, None),
    }
}

fn schema_version() -> u32 {
    2
}

/// Reads a document. What is null in it is not there: writers in Go print an empty list, map or pointer so. The only way
/// from text to the types of this module.
///
/// # Errors
/// When it is no JSON, or lacks what it must have.
pub fn parse<T: for<'de> Deserialize<'de>>(text: &[u8]) -> Result<T, serde_json::Error> {
    let mut value: Value = serde_json::from_slice(text)?;
    drop_nulls(&mut value);
    serde_json::from_value(value)
}

/// The depth is bounded by the parser.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Reads a small document whole.
///
/// # Errors
/// When it is larger than [`MAX_DOCUMENT`], cannot be read, or is not what its media type says.
pub fn document<T: for<'de> Deserialize<'de>>(blobs: &dyn Blobs, blob: &Descriptor) -> Result<T> {
    let text = text(blobs, blob)?;
    parse(&text).with_context(|| format!("cannot understand {}", blob.digest))
}

/// The same as it is written.
///
/// # Errors
/// When it is larger than [`MAX_DOCUMENT`], or cannot be read.
pub(crate) fn text(blobs: &dyn Blobs, blob: &Descriptor) -> Result<Vec<u8>> {
    if blob.size > MAX_DOCUMENT {
        bail!(
            "{} has {} bytes: too large for a document",
            blob.digest,
            blob.size
        );
    }
    let mut text = Vec::new();
    let read = blobs.open(blob)?.take(MAX_DOCUMENT).read_to_end(&mut text);
    read.with_context(|| format!("cannot read {}", blob.digest))?;
    Ok(text)
}

/// Bytes of foreign origin for a message: quoted, escaped, and not too long.
pub(crate) fn shown(bytes: &[u8]) -> String {
    const MAX: usize = 200;
    let text = String::from_utf8_lossy(bytes.get(..MAX).unwrap_or(bytes));
    let more = if bytes.len() > MAX { "…" } else { "" };
    format!("{text:?}{more}")
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
