//! Bootstrap agents: where the root file system of a stage comes from.
//!
//! First the base is found ([`prepare`]): that tells its identity, by which the step cache knows it. Then it is unpacked.

mod busybox;
pub mod localimage;
mod oci;
mod remote;
mod tools;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::deffile::Stage;
use super::unpack::Owners;
use super::{Settings, ids::Ids};
use crate::engine::emulate;
use crate::oci::Image;

/// A base that was found.
pub struct Base {
    /// What it is.
    pub kind: Kind,
    /// What tells it from all others; `None` when nothing does.
    pub key: Option<String>,
}

/// What a base is.
pub enum Kind {
    /// Nothing.
    Scratch,
    /// A SIF or a squashfs.
    File(PathBuf),
    /// A root file system.
    Directory(PathBuf),
    /// Layers, with the agent that brought them and what was named.
    Layers(Box<Image>, crate::oci::config::Origin),
    /// A program.
    Busybox(PathBuf),
    /// What a tool of a distribution makes.
    Tool(tools::Tool),
}

impl Kind {
    /// Whether making it anew costs so much that the step cache keeps it by itself.
    pub fn is_costly(&self) -> bool {
        matches!(self, Kind::Tool(_))
    }
}

/// Finds a stage's base.
///
/// # Errors
/// Naming the header line that is missing or wrong, or what cannot be fetched.
pub fn prepare(stage: &Stage, room: &Path, settings: &Settings) -> Result<Base> {
    let agent = agent(stage);
    match agent.as_str() {
        "scratch" => Ok(Base {
            kind: Kind::Scratch,
            key: Some("scratch".into()),
        }),
        "localimage" => localimage::prepare(from(stage, &agent)?, settings),
        "docker" | "oci" | "oci-archive" | "docker-archive" | "docker-daemon" => {
            oci::prepare(&agent, from(stage, &agent)?, stage, room, settings)
        }
        "library" | "oras" | "http" | "https" => {
            remote::prepare(&agent, from(stage, &agent)?, stage, settings)
        }
        "busybox" => busybox::prepare(stage, settings),
        "debootstrap" | "yum" | "dnf" | "zypper" | "arch" => {
            tools::prepare(&agent, stage, settings)
        }
        "shub" => {
            bail!("Bootstrap: shub: the service has ended: use a docker, library or oras image")
        }
        "buildkit" | "dockerfile" => bail!(
            "Bootstrap: {agent} is not supported: build the image with podman or buildah, save it, and use Bootstrap: oci-archive"
        ),
        other => bail!(
            "invalid build source {other}: known ones are docker, docker-archive, docker-daemon, oci, oci-archive, library, oras, \
             http, https, localimage, scratch, busybox, debootstrap, yum, dnf, zypper and arch"
        ),
    }
}

/// Downloads a stage's base into the cache, when it comes from elsewhere.
///
/// # Errors
/// As [`prepare`].
pub fn fetch(stage: &Stage, settings: &Settings) -> Result<()> {
    if stage.key("fingerprints").is_some() {
        bail!(
            "the header key Fingerprints is not supported: signatures cannot be verified by this version; without the key {} is \
             used as it is",
            stage.key("from").unwrap_or("the base")
        );
    }
    let agent = agent(stage);
    match agent.as_str() {
        "docker" => oci::fetch(from(stage, &agent)?, stage, settings),
        "library" | "oras" | "http" | "https" => {
            remote::fetch(&agent, from(stage, &agent)?, stage, settings).map(drop)
        }
        "busybox" => busybox::prepare(stage, settings).map(drop),
        _ => Ok(()),
    }
}

/// Whether a stage's base is an image of layers, which need not be unpacked to make an image of it.
pub fn has_layers(stage: &Stage) -> bool {
    let agent = agent(stage);
    agent == "docker" || crate::oci::Place::of(&agent).is_some()
}

fn agent(stage: &Stage) -> String {
    stage
        .key("bootstrap")
        .unwrap_or_default()
        .to_ascii_lowercase()
}

fn from<'a>(stage: &'a Stage, agent: &str) -> Result<&'a str> {
    match stage.key("from") {
        Some(from) => Ok(from),
        None => bail!("Bootstrap: {agent} needs a line From: in the header"),
    }
}

/// Unpacks a base into an empty directory.
///
/// # Errors
/// Naming what cannot be read or written.
pub fn unpack(
    base: Base,
    root: &Path,
    room: &Path,
    settings: &Settings,
    record: &mut emulate::Owners,
) -> Result<()> {
    match base.kind {
        Kind::Scratch => Ok(()),
        Kind::File(path) => localimage::unpack(&path, root, &mut owners(settings.ids, record)),
        Kind::Directory(path) => localimage::copy(&path, root),
        Kind::Layers(image, origin) => oci::unpack(&image, &origin, root, settings, record),
        Kind::Busybox(program) => busybox::unpack(&program, root),
        Kind::Tool(tool) => tools::run(&tool, root, room, settings),
    }
}

/// What unpacking does about owners, with these ids.
pub fn owners(ids: Ids, record: &mut emulate::Owners) -> Owners<'_> {
    match ids {
        Ids::All | Ids::Mapped(_) => Owners::Image,
        Ids::Emulated => Owners::Record(record),
        Ids::Single => Owners::Caller,
    }
}
