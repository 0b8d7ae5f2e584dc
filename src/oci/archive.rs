//! Archives of images: OCI layouts in a tar archive (`oci-archive`), and what `docker save` and `podman save` write
//! (`docker-archive`; Docker image specification 1.2, "Combined Image JSON + Filesystem Changeset Format").
//!
//! Nothing is unpacked: the archive's headers are read once, contents are read where they lie. A compressed archive is
//! decompressed into a file without a name first.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::blob::Verified;
use super::decompress::{self, Format};
use super::layout::{Files, image_of, open_regular};
use super::tar::{Archive, Source, Type};
use super::{Blobs, Descriptor, Image, ImageConfig, MAX_DOCUMENT, Manifest, Platform, platform};
use crate::digest::Digest;

/// Members of an archive, at most: an image has some hundred.
const MAX_MEMBERS: usize = 100_000;
/// Links between members that are followed.
const MAX_LINKS: usize = 8;

/// Opens an image of an `oci-archive`. `scratch` is a directory for the content of a compressed archive.
///
/// # Errors
/// When the archive is damaged, has no such image, or none for the platform.
pub fn open_oci(
    path: &Path,
    reference: Option<&str>,
    platform: &Platform,
    scratch: &Path,
) -> Result<Image> {
    let what = || format!("cannot use the OCI archive {}", path.display());
    let members = Members::open(path, scratch).with_context(what)?;
    if !members.has("index.json") && members.has("manifest.json") {
        bail!("{}: it is of docker save: use docker-archive:", what());
    }
    image_of(Box::new(members), reference, platform).with_context(what)
}

/// Opens an image of a `docker-archive`: the one with this name, the one at a place (`@0`), else the only one.
///
/// # Errors
/// As [`open_oci`].
pub fn open_docker(
    path: &Path,
    reference: Option<&str>,
    platform: &Platform,
    scratch: &Path,
) -> Result<Image> {
    let what = || format!("cannot use the Docker archive {}", path.display());
    let members = Members::open(path, scratch).with_context(what)?;
    docker(members, reference, platform).with_context(what)
}

/// Opens an image of the Docker engine on this machine: by its socket, else by `docker save`.
///
/// # Errors
/// When neither answers, or the image cannot be used.
pub fn open_docker_daemon(name: &str, platform: &Platform, scratch: &Path) -> Result<Image> {
    let what = || format!("cannot use the image {name} of Docker");
    let file = unnamed(scratch)?;
    if !super::engine::save(name, &file).with_context(what)? {
        by_program(name, &file)?;
    }
    let members = Members::of(file).with_context(what)?;
    docker(members, None, platform).with_context(what)
}

fn by_program(name: &str, file: &File) -> Result<()> {
    let output = Command::new("docker")
        .args(["save", "--", name])
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("cannot use a temporary file")?)
        .stderr(Stdio::piped())
        .output();
    let output = match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "docker-daemon:{name}: no Docker engine answers at its socket (DOCKER_HOST), and there is no docker program on PATH: \
             write the image into a file where Docker runs (docker save -o image.tar {name}), and use docker-archive:image.tar"
        ),
        output => output.context("cannot run docker")?,
    };
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!(
            "cannot use the image {name} of Docker: docker save says {:?}",
            text.trim()
        );
    }
    Ok(())
}

/// A file without a name, for what is decompressed.
fn unnamed(scratch: &Path) -> Result<File> {
    use rustix::fs::{Mode, OFlags};
    use rustix::io::Errno;
    let what = || format!("cannot create a file in {}", scratch.display());
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(scratch, flags | OFlags::TMPFILE, mode) {
        Ok(file) => Ok(file.into()),
        // NFS has no such files: created, and its name removed.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let path = scratch.join(format!(".capsid-{}", uuid::Uuid::new_v4()));
            let create = flags | OFlags::CREATE | OFlags::EXCL;
            let file = rustix::fs::open(&path, create, mode).with_context(what)?;
            std::fs::remove_file(&path).with_context(what)?;
            Ok(file.into())
        }
        Err(error) => Err(error).with_context(what),
    }
}

/// What lies at a name.
enum Member {
    /// Bytes of the archive: the first one, and how many.
    Bytes(u64, u64),
    /// What lies at another name.
    Link(String),
}

/// An archive's members by name.
struct Members {
    file: Arc<File>,
    members: HashMap<String, Member>,
}

/// Reads a range of a file. Several may read one file at the same time.
struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let wanted = wanted.min(buffer.len());
        let len = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Source for Section {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        match self.at.checked_add(bytes) {
            Some(at) if at <= self.end => self.at = at,
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }
}

impl Members {
    fn open(path: &Path, scratch: &Path) -> Result<Members> {
        let file = open_regular(path)?;
        let mut start = [0; 6];
        let len = file.read_at(&mut start, 0)?;
        if Format::of(&start[..len]) == Format::Plain {
            return Members::of(file);
        }
        let mut whole = unnamed(scratch)?;
        let mut plain = decompress::open(file)?;
        io::copy(&mut plain, &mut whole).context("cannot decompress it")?;
        Members::of(whole)
    }

    fn of(file: File) -> Result<Members> {
        let file = Arc::new(file);
        let section = Section {
            end: file.metadata()?.len(),
            file: Arc::clone(&file),
            at: 0,
        };
        let mut archive = Archive::new(section);
        let mut members = HashMap::new();
        while let Some(member) = archive.next()? {
            let name = clean(&member.path);
            let found = match member.kind {
                Type::File if member.len_bytes == member.stored_bytes => {
                    Member::Bytes(member.offset_bytes, member.len_bytes)
                }
                Type::File => bail!("{name:?} is a sparse file, which is not supported here"),
                // Old versions of Docker write a layer once, and links to it.
                Type::Symlink(target) => Member::Link(beside(&name, &target)),
                Type::Link(target) => Member::Link(clean(&target)),
                _ => continue,
            };
            members.insert(name, found);
            if members.len() > MAX_MEMBERS {
                bail!("it has more than {MAX_MEMBERS} members");
            }
        }
        Ok(Members { file, members })
    }

    fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    fn section(&self, name: &str) -> Result<Section> {
        let mut at = clean(name.as_bytes());
        for _ in 0..MAX_LINKS {
            match self.members.get(&at) {
                Some(Member::Bytes(start, len)) => {
                    return Ok(Section {
                        file: Arc::clone(&self.file),
                        at: *start,
                        end: start + len,
                    });
                }
                Some(Member::Link(target)) => at = target.clone(),
                None => bail!("there is no {at:?} in it"),
            }
        }
        bail!("{name:?} is a link to a link to a link")
    }

    fn document(&self, name: &str) -> Result<Vec<u8>> {
        let section = self.section(name)?;
        let len = section.end - section.at;
        if len > MAX_DOCUMENT {
            bail!("{name:?} has {len} bytes: too large for a document");
        }
        let mut section = section;
        let mut text = Vec::new();
        section.read_to_end(&mut text)?;
        Ok(text)
    }
}

impl Files for Members {
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>> {
        Ok(Box::new(self.section(path)?))
    }
}

/// A member's name in its shortest form. Names that lead out of the archive lead to its root: nothing else is there.
fn clean(path: &[u8]) -> String {
    let path = String::from_utf8_lossy(path);
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// The name that a symbolic link leads to.
fn beside(name: &str, target: &[u8]) -> String {
    let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
    let target = String::from_utf8_lossy(target);
    if target.starts_with('/') {
        return clean(target.as_bytes());
    }
    clean(format!("{parent}/{target}").as_bytes())
}

/// An entry of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// Contents of a `docker save` archive: layers are named by the digests that they have without compression.
struct Docker {
    members: Members,
    config: Vec<u8>,
    config_digest: Digest,
    layers: HashMap<Digest, String>,
}

impl Blobs for Docker {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>> {
        if blob.digest == self.config_digest {
            return Ok(Box::new(Cursor::new(self.config.clone())));
        }
        let name = self.layers.get(&blob.digest);
        let name = name.with_context(|| format!("there is no {}", blob.digest))?;
        let plain = decompress::open(self.members.section(name)?)?;
        Ok(Box::new(Verified::new(plain, blob.digest, None)))
    }
}

fn docker(members: Members, reference: Option<&str>, wanted: &Platform) -> Result<Image> {
    if !members.has("manifest.json") {
        if members.has("index.json") {
            bail!("it is an OCI archive: use oci-archive:");
        }
        bail!(
            "it has no manifest.json, so docker save has not written it (before Docker 1.10 it had none)"
        );
    }
    let saved: Vec<Saved> = super::parse(&members.document("manifest.json")?)
        .context("cannot understand manifest.json")?;
    let Saved {
        config: name,
        layers: names,
        ..
    } = saved_image(saved, reference)?;
    let text = members.document(&name)?;
    let config: ImageConfig =
        super::parse(&text).with_context(|| format!("cannot understand {name:?}"))?;
    platform::check(&config, wanted)?;
    let diff_ids = &config.rootfs.diff_ids;
    if names.len() != diff_ids.len() {
        bail!(
            "it has {} layers, and its configuration has digests of {}",
            names.len(),
            diff_ids.len()
        );
    }
    let config_digest = Digest::of(&text);
    let mut layers = Vec::new();
    for (name, diff_id) in names.iter().zip(diff_ids) {
        let section = members.section(name)?;
        let kind = "application/vnd.docker.image.rootfs.diff.tar";
        layers.push(Descriptor::new(kind, *diff_id, section.end - section.at));
    }
    let kind = "application/vnd.docker.container.image.v1+json";
    Ok(Image {
        // `docker images` calls it that, too.
        digest: config_digest,
        manifest: Manifest {
            schema_version: 2,
            media_type: "application/vnd.docker.distribution.manifest.v2+json".into(),
            artifact_type: None,
            config: Descriptor::new(kind, config_digest, text.len() as u64),
            layers,
            annotations: std::collections::BTreeMap::new(),
        },
        blobs: Box::new(Docker {
            layers: diff_ids.iter().copied().zip(names).collect(),
            members,
            config: text,
            config_digest,
        }),
        config,
    })
}

/// The image that is meant.
fn saved_image(saved: Vec<Saved>, reference: Option<&str>) -> Result<Saved> {
    let tags: Vec<String> = saved
        .iter()
        .flat_map(|s| s.repo_tags.iter().flatten().cloned())
        .collect();
    let list = tags[..tags.len().min(20)].join(", ");
    let count = saved.len();
    let Some(reference) = reference else {
        let mut saved = saved;
        return match (saved.pop(), count) {
            (Some(only), 1) => Ok(only),
            (None, _) => bail!("its manifest.json names no image"),
            _ => bail!(
                "it holds {count} images: name one of them ({list}), as PATH:NAME, or its place, as PATH:@0"
            ),
        };
    };
    if let Some(place) = reference.strip_prefix('@') {
        let place: usize = place
            .parse()
            .with_context(|| format!("{reference:?} is no place of an image"))?;
        return saved
            .into_iter()
            .nth(place)
            .with_context(|| format!("it has no image {reference}, but {count} images"));
    }
    let wanted = full(reference);
    let is_exact = tags.iter().any(|tag| tag == reference);
    let is_meant = |tag: &String| match is_exact {
        true => tag == reference,
        false => full(tag) == wanted,
    };
    saved
        .into_iter()
        .find(|s| s.repo_tags.iter().flatten().any(is_meant))
        .with_context(|| format!("it has no image {reference:?}, but {list}"))
}

/// A name as Docker completes it.
fn full(name: &str) -> String {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let name = name.strip_prefix("library/").unwrap_or(name);
    // podman's own name for what has none.
    let name = name.strip_prefix("localhost/").unwrap_or(name);
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains(':') {
        name.into()
    } else {
        format!("{name}:latest")
    }
}

#[cfg(test)]
#[path = "archive_tests.rs"]
mod tests;
