//! OCI images to SIF and to sandbox directories, straight from their layers.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::pack::{self, Parts};
use crate::metadir::{self, Body, Contents, Existing, Item};
use crate::oci::config::{self, Origin};
use crate::oci::layers::{self, Owners};
use crate::oci::{Image, document};
use crate::sif::{self, Content, DataType, Stamp};
use crate::squash::walk::Missing;
use crate::squash::{Attributes, Kind, Node, Options, Store, Summary, Tree};

/// Makes a SIF of an image: its files with their owners, and a `/.singularity.d` that tells how it is run.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// # use capsid::{build::convert, oci, sif::Stamp, squash::Options};
/// # use std::path::Path;
/// let platform = oci::Platform { architecture: "amd64".into(), os: "linux".into(), variant: None };
/// let image = oci::Place::DockerArchive.open("a.tar:some/name", Path::new("/here"), &platform, Path::new("/tmp"))?;
/// let origin = oci::config::Origin { bootstrap: "docker-archive".into(), from: "a.tar:some/name".into() };
/// let stamp = Stamp { time_s: 1_800_000_000, identity: [0; 16] };
/// convert::to_sif(&image, Path::new("a.sif"), &origin, stamp, Options::default())?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// When the image cannot be read or is damaged, or the target cannot be written; it is not touched then.
pub fn to_sif(
    image: &Image,
    target: &Path,
    origin: &Origin,
    stamp: Stamp,
    options: Options,
) -> Result<Summary> {
    let contents = config::metadata(image, origin, stamp.time_s);
    let parts = Parts {
        objects: objects(image, &contents)?,
        options,
        ..Parts::new(
            &contents.definition,
            sif::arch(&image.config.architecture),
            stamp,
        )
    };
    pack::image(target, parts, |writer| {
        let mut tree = layers::merge(image, writer)?;
        insert(&mut tree, writer, &metadir::items(&contents)?, stamp.time_s)?;
        Ok(tree)
    })
}

/// Writes an image into a directory, which must be empty or missing, with its `/.singularity.d`.
///
/// # Errors
/// As [`to_sif`]; what was written by then stays.
pub fn to_directory(
    image: &Image,
    root: &Path,
    origin: &Origin,
    time_s: i64,
    owners: &mut Owners,
) -> Result<()> {
    let contents = config::metadata(image, origin, time_s);
    let items = metadir::items(&contents)?;
    layers::unpack(image, root, owners, |tree, store| {
        insert(tree, store, &items, time_s)
    })
}

/// The objects that a SIF of the image has beside the definition.
///
/// # Errors
/// When the image's configuration cannot be read.
pub fn objects(image: &Image, contents: &Contents) -> Result<Vec<(DataType, String, Content)>> {
    let whole: serde_json::Value = document(&*image.blobs, &image.manifest.config)?;
    let config = serde_json::to_vec(&whole["config"]).context("cannot write the configuration")?;
    let json = |name: &str, bytes| {
        (
            DataType::GenericJson,
            name.to_owned(),
            Content::Bytes(bytes),
        )
    };
    Ok(vec![
        json("inspect-metadata.json", metadir::summary(contents)?),
        json("oci-config.json", config),
    ])
}

/// Puts files into a tree; links of the tree lead within it.
///
/// # Errors
/// When something in a path is no directory, or content cannot be stored.
pub fn insert(tree: &mut Tree, store: &mut dyn Store, items: &[Item], time_s: i64) -> Result<()> {
    let mtime_s = time_s.clamp(0, u32::MAX.into()) as u32;
    for item in items {
        put(tree, store, item, mtime_s)
            .with_context(|| format!("cannot put /{} into the image", item.path))?;
    }
    Ok(())
}

fn put(tree: &mut Tree, store: &mut dyn Store, item: &Item, mtime_s: u32) -> Result<()> {
    let attributes = |mode: u16| Attributes {
        mode,
        mtime_s,
        ..Attributes::default()
    };
    let path = item.path.as_str();
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let way = tree.directory(parent.as_bytes(), Missing::Create(&attributes(0o755)))?;
    let parent = way.and_then(|way| way.last().copied());
    let parent = parent.context("its directory is missing")?;
    if let Some(there) = tree.child(parent, name.as_bytes()) {
        if item.existing == Existing::Keep {
            return Ok(());
        }
        if tree.names(there).is_some() {
            bail!("there is a directory of that name");
        }
    }
    let kind = match &item.body {
        Body::Directory => Kind::Directory(BTreeMap::new()),
        Body::File(bytes) => Kind::File(store.store(&mut bytes.as_slice())?),
        Body::Link(target) => Kind::Symlink(target.as_bytes().to_vec()),
    };
    let attributes = attributes(item.mode);
    tree.add(parent, name.as_bytes(), Node { attributes, kind })?;
    Ok(())
}
