//! `Bootstrap: docker`, `oci`, `oci-archive`, `docker-archive`, `docker-daemon`: layers.

use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use super::{Base, Kind};
use crate::build::deffile::Stage;
use crate::build::{Settings, ids::Ids};
use crate::engine::emulate;
use crate::oci::config::Origin;
use crate::oci::layers::{Owners, Place};
use crate::oci::{self, Image};
use crate::{metadir, net, say};

/// Finds the image and reads its documents.
///
/// # Errors
/// When it cannot be fetched or understood.
pub fn prepare(
    agent: &str,
    from: &str,
    stage: &Stage,
    room: &Path,
    settings: &Settings,
) -> Result<Base> {
    if agent != "docker" {
        say::info(format_args!("Fetching OCI image..."));
    }
    let image = open(agent, from, stage, room, settings)?;
    let key = Some(image.digest.to_string());
    let origin = Origin {
        bootstrap: agent.to_owned(),
        from: from.to_owned(),
    };
    Ok(Base {
        kind: Kind::Layers(Box::new(image), origin),
        key,
    })
}

fn open(agent: &str, from: &str, stage: &Stage, room: &Path, settings: &Settings) -> Result<Image> {
    match oci::Place::of(agent) {
        Some(place) => place.open(from, &settings.host.cwd, &settings.platform, room),
        None => registry(from, stage, settings),
    }
}

/// Downloads an image of a registry into the cache.
///
/// # Errors
/// When it cannot be fetched.
pub fn fetch(from: &str, stage: &Stage, settings: &Settings) -> Result<()> {
    say::info(format_args!("Fetching OCI image..."));
    registry(from, stage, settings).map(drop)
}

/// An image of a registry: `From`, with `Namespace` and `Registry` before it.
fn registry(from: &str, stage: &Stage, settings: &Settings) -> Result<Image> {
    let parts = [stage.key("registry"), stage.key("namespace"), Some(from)];
    let parts: Vec<&str> = parts
        .into_iter()
        .flatten()
        .map(|part| part.trim_matches('/'))
        .collect();
    let address = format!("docker://{}", parts.join("/"));
    let what = || format!("cannot fetch {address}");
    let reference: net::Reference = address.parse().with_context(what)?;
    let net = settings.net()?;
    net.fetch(|options, cache| net::layers(&reference, options, cache))
        .with_context(what)
}

/// Unpacks the layers, with what the image's configuration says.
///
/// # Errors
/// When a layer cannot be read, or a file not be written.
pub fn unpack(
    image: &Image,
    origin: &Origin,
    root: &Path,
    settings: &Settings,
    record: &mut emulate::Owners,
) -> Result<()> {
    say::info(format_args!("Extracting OCI image..."));
    let mut note = |place: &Place, uid: u32, gid: u32| -> Result<()> {
        if (uid, gid) != (0, 0) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(place.directory, place.name, flags, Mode::empty())?;
            let owner = emulate::Owner {
                uid,
                gid,
                device: None,
            };
            record
                .set(fd.as_fd(), owner)
                .context("cannot note an owner")?;
        }
        Ok(())
    };
    let mut owners = match settings.ids {
        Ids::All | Ids::Mapped(_) => Owners::Change,
        Ids::Emulated => Owners::Record(&mut note),
        Ids::Single => Owners::Writer,
    };
    oci::layers::unpack(image, root, &mut owners, |_, _| Ok(()))?;
    say::info(format_args!("Inserting Apptainer configuration..."));
    metadir::write(root, &oci::config::metadata(image, origin, settings.time_s))?;
    // The stage's own definition is written later, and a registry's image was made from none.
    let definition = root.join(metadir::DIRECTORY).join("Singularity");
    std::fs::remove_file(&definition)
        .with_context(|| format!("cannot remove {}", definition.display()))
}
