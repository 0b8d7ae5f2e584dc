//! Images of registries: the layers of Docker and OCI images, and SIFs kept as artifacts (ORAS), downloaded into the
//! cache and uploaded from files.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, bail};

use super::download::{self, CONNECTIONS, Expected};
use super::http::{Body, Method, Request};
use super::reference::Repository;
use super::registry::{Access, Remote};
use super::url::Url;
use super::{Options, has_len, is_sif};
use crate::cache::{Cache, Draft, Kind, Obtained};
use crate::digest::{Digest, Hashing};
use crate::oci::blob::Verified;
use crate::oci::platform::Chosen;
use crate::oci::{self, Blobs, Descriptor, Image, ImageConfig, Manifest};
use crate::progress::Progress;
use crate::{given, image, say, threads};

/// Configuration of a SIF artifact.
const SIF_CONFIG: &str = "application/vnd.sylabs.sif.config.v1+json";
/// A SIF as a layer.
const SIF_LAYER: &str = "application/vnd.sylabs.sif.layer.v1.sif";
/// What old releases wrote, misspelt.
const SIF_LAYER_OLD: &str = "appliciation/vnd.sylabs.sif.layer.tar";
/// A manifest of OCI.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Addresses of one layer that are tried, at most.
const MAX_URLS: usize = 4;
/// Layers of more than this number are an attack.
const MAX_LAYERS: usize = 1024;
/// A file that is longer goes in pieces, each of which can be sent again.
const PIECE: u64 = 256 << 20;

/// Downloads an image's layers into the cache.
///
/// # Errors
/// When it is not there, not for this machine, or damaged.
pub fn image(repository: &Repository, options: &Options, cache: &Cache) -> Result<Image> {
    let resolved = resolve(repository, options)?;
    image_of(&resolved, repository, options, cache)
}

/// Reads the manifest of an image for a machine.
///
/// # Errors
/// When it is not there or not an image.
pub fn resolve(repository: &Repository, options: &Options) -> Result<Chosen> {
    options.first_working(repository, &|remote| {
        remote.manifest_for(&repository.version(), &options.platform)
    })
}

/// Downloads the layers of an image whose manifest is at hand.
///
/// # Errors
/// When it is no image that can run, for another machine, or damaged.
pub fn image_of(
    chosen: &Chosen,
    repository: &Repository,
    options: &Options,
    cache: &Cache,
) -> Result<Image> {
    let Chosen {
        manifest, received, ..
    } = chosen;
    if manifest.config.media_type == SIF_CONFIG {
        bail!(
            "unsupported image-specific operation on artifact with type {SIF_CONFIG:?}: it is a SIF, use oras://"
        );
    }
    oci::layers::check_types(manifest)?;
    if manifest.layers.len() > MAX_LAYERS {
        bail!("the image has {} layers: too many", manifest.layers.len());
    }
    if manifest.config.size > oci::MAX_DOCUMENT {
        bail!(
            "the configuration has {} bytes: too large",
            manifest.config.size
        );
    }
    cache.put(&received.text)?;
    options.first_working(repository, &|remote| fetch_all(remote, manifest, cache))?;
    let blobs = Cached(cache.clone());
    let config: ImageConfig = oci::document(&blobs, &manifest.config)?;
    if !chosen.is_told {
        oci::platform::check(&config, &options.platform).with_context(|| repository.to_string())?;
    }
    Ok(Image {
        digest: received.digest,
        manifest: manifest.clone(),
        config,
        blobs: Box::new(blobs),
    })
}

/// Downloads what the cache lacks, several at once.
fn fetch_all(remote: &Remote, manifest: &Manifest, cache: &Cache) -> Result<()> {
    let mut wanted: Vec<&Descriptor> = vec![&manifest.config];
    for layer in &manifest.layers {
        if !wanted.iter().any(|d| d.digest == layer.digest) {
            wanted.push(layer);
        }
    }
    let total = wanted.iter().map(|d| d.size).fold(0, u64::saturating_add);
    let progress = Progress::new("downloading layers", total);
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        while let Some(blob) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            if progress.is_stopped() {
                bail!("given up");
            }
            let done = fetch(remote, blob, cache, &progress);
            if done.is_err() {
                progress.stop();
            }
            done?;
        }
        Ok(())
    };
    let count = CONNECTIONS.min(wanted.len());
    download::first_error(threads::all("download", count, worker).into_iter())
}

/// Whether a file holds a blob: what a disk that was full, or somebody's editor, has left of it is none.
fn is_whole(path: &Path, blob: &Descriptor) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    let is_long = file.metadata().is_ok_and(|m| m.len() == blob.size);
    let mut hash = Hashing::new(io::sink());
    is_long && io::copy(&mut &file, &mut hash).is_ok() && hash.finish().0 == blob.digest
}

fn fetch(remote: &Remote, blob: &Descriptor, cache: &Cache, progress: &Progress) -> Result<()> {
    let key = blob.digest.hex();
    let claim = match cache.obtain(Kind::Blob, &key, &|path| is_whole(path, blob))? {
        Obtained::Ready(_) => {
            progress.add(blob.size);
            return Ok(());
        }
        Obtained::Claimed(claim) => claim,
    };
    let what = format!("blob {} of {}", blob.digest, remote.name());
    let place = cache.place(Kind::Blob, &key)?;
    let mut draft = cache.draft()?;
    let open = |part| remote.blob(blob, part);
    let mut fetched = download::to_draft(&what, &open, expected(blob), &draft, progress);
    if oci::layers::is_foreign(blob) {
        for url in blob.urls.iter().take(MAX_URLS) {
            let Err(error) = &fetched else { break };
            say::verbose(format_args!("{error:#}: trying {url}"));
            draft = cache.draft()?;
            fetched = from_elsewhere(remote, blob, url, &draft, progress)
                .with_context(|| format!("{error:#}"));
        }
    }
    fetched?;
    draft.publish(&place)?;
    drop(claim);
    Ok(())
}

fn expected(blob: &Descriptor) -> Expected {
    Expected {
        len_bytes: Some(blob.size),
        digest: Some(blob.digest),
    }
}

/// A layer from an address in its manifest, which gets no login.
fn from_elsewhere(
    remote: &Remote,
    blob: &Descriptor,
    url: &str,
    draft: &Draft,
    progress: &Progress,
) -> Result<(Digest, u64)> {
    let url: Url = url.parse()?;
    let open = |part| super::web::get(remote.client(), &url, part);
    download::to_draft(&url.redacted(), &open, expected(blob), draft, progress)
}

/// Blobs of the cache, checked again while they are read.
struct Cached(Cache);

impl Blobs for Cached {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>> {
        let path = self
            .0
            .blob(&blob.digest)
            .ok_or_else(|| anyhow!("{} is not in the cache any more", blob.digest))?;
        let file = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let verified = Verified::new(file, blob.digest, Some(blob.size));
        Ok(Box::new(verified))
    }
}

/// Downloads a SIF that is kept as an artifact.
///
/// # Errors
/// When it is not there or no SIF.
pub fn sif(repository: &Repository, options: &Options, cache: &Cache) -> Result<PathBuf> {
    options.first_working(repository, &|remote| {
        let Chosen {
            manifest, received, ..
        } = remote.manifest_for(&repository.version(), &options.platform)?;
        let layer = sif_layer(&manifest, &received.media_type)?;
        let key = format!("sha256.{}", layer.digest.hex());
        let is_good = |path: &Path| has_len(path, layer.size) && image::check(path).is_ok();
        let claim = match cache.obtain(Kind::Oras, &key, &is_good)? {
            Obtained::Ready(path) => {
                say::info(format_args!("Using cached SIF image"));
                return Ok(path);
            }
            Obtained::Claimed(claim) => claim,
        };
        let draft = cache.draft()?;
        say::info(format_args!("Downloading oras image"));
        let progress = Progress::new("downloading", layer.size);
        let what = format!("blob {} of {}", layer.digest, remote.name());
        download::to_draft(
            &what,
            &|part| remote.blob(layer, part),
            expected(layer),
            &draft,
            &progress,
        )?;
        drop(progress);
        if !is_sif(&draft.file) {
            bail!("{repository} holds no SIF: what it calls one is another kind of file");
        }
        let path = draft.publish(&cache.place(Kind::Oras, &key)?)?;
        drop(claim);
        Ok(path)
    })
}

/// The words are those that clients tell the cases by.
fn sif_layer<'a>(manifest: &'a Manifest, media_type: &str) -> Result<&'a Descriptor> {
    let is_sif = |d: &Descriptor| [SIF_LAYER, SIF_LAYER_OLD].contains(&d.media_type.as_str());
    const SINGLE: &str = "ORAS SIF image should have a single layer";
    match manifest.layers.as_slice() {
        [layer] if is_sif(layer) => Ok(layer),
        _ if media_type.starts_with("application/vnd.docker.distribution.manifest") => bail!(
            "it is no SIF: received mediaType: {media_type} (a Docker or OCI image is pulled by docker://)"
        ),
        [layer] => bail!(
            "{SINGLE} of type {SIF_LAYER}, and it is of type {:?}: received mediaType: {media_type} (a Docker or OCI image is pulled by docker://)",
            layer.media_type
        ),
        layers => bail!(
            "{SINGLE}, found {}: received mediaType: {media_type} (a Docker or OCI image is pulled by docker://)",
            layers.len()
        ),
    }
}

/// Uploads a SIF as an artifact, and gives the digest of its manifest.
///
/// # Errors
/// When the registry refuses, or the file cannot be read.
pub fn push(
    path: &Path,
    repository: &Repository,
    options: &Options,
    annotations: &[(String, String)],
) -> Result<Digest> {
    let what = || format!("cannot read {}", path.display());
    let file = given::open(path).with_context(what)?;
    if !is_sif(&file) {
        bail!("{} is no SIF: only SIFs can be pushed", path.display());
    }
    if repository.digest().is_some() {
        bail!("{repository} has a digest: an image is pushed to a tag");
    }
    let mut hash = Hashing::new(io::sink());
    io::copy(&mut &file, &mut hash).with_context(what)?;
    let (digest, size, _) = hash.finish();
    let remote = options.remote(repository, Access::Push)?;
    let title = path.file_name().map(|n| n.to_string_lossy().into_owned());
    let mut layer = Descriptor::new(SIF_LAYER, digest, size);
    let title = title.map(|t| ("org.opencontainers.image.title".to_owned(), t));
    layer.annotations.extend(title);
    let config = Descriptor::new(SIF_CONFIG, Digest::of(b"{}"), 2);
    let manifest = Manifest {
        schema_version: 2,
        media_type: MANIFEST.into(),
        artifact_type: None,
        config,
        layers: vec![layer],
        annotations: annotations.iter().cloned().collect(),
    };
    let progress = Progress::new("uploading", size);
    upload(&remote, &manifest.config, Content::Bytes(b"{}"), &progress)?;
    upload(
        &remote,
        &manifest.layers[0],
        Content::File(&file),
        &progress,
    )?;
    let text = serde_json::to_vec(&manifest)?;
    let url = remote.url(&format!("manifests/{}", repository.tag()));
    let mut request = Request::new(Method::Put, url).header("Content-Type", MANIFEST);
    request.body = Body::Bytes(&text);
    let response = remote.send(request)?;
    if !response.is_success() {
        return Err(remote.refusal(response, format!("cannot push manifest to {repository}")));
    }
    Ok(Digest::of(&text))
}

/// What is uploaded.
#[derive(Clone, Copy)]
enum Content<'a> {
    Bytes(&'a [u8]),
    File(&'a File),
}

/// Uploads a blob unless the registry has it.
fn upload(remote: &Remote, blob: &Descriptor, content: Content, progress: &Progress) -> Result<()> {
    let what = || format!("cannot push blob {} to {}", blob.digest, remote.name());
    let url = remote.url(&format!("blobs/{}", blob.digest));
    let there = remote.send(Request::new(Method::Head, url))?;
    if there.status == 200 && there.len_bytes().is_none_or(|len| len == blob.size) {
        say::debug(format_args!("{} is there already", blob.digest));
        return Ok(());
    }
    let begin = remote.send(Request::new(Method::Post, remote.url("blobs/uploads/")))?;
    if begin.status != 202 {
        return Err(remote.refusal(begin, what()));
    }
    let mut place = location(&begin).with_context(what)?;
    let sent = |bytes| progress.add(bytes);
    let mut done = 0;
    if let Content::File(file) = content {
        while blob.size - done > PIECE {
            place = piece(remote, &place, file, done, &sent).with_context(what)?;
            done += PIECE;
        }
    }
    let url = place.with_query("digest", &blob.digest.to_string());
    let mut request =
        Request::new(Method::Put, url).header("Content-Type", "application/octet-stream");
    request.body = match content {
        Content::Bytes(bytes) => Body::Bytes(bytes),
        Content::File(file) => Body::File {
            file,
            offset_bytes: done,
            len_bytes: blob.size - done,
            sent: &sent,
        },
    };
    if done > 0 {
        request = request.header("Content-Range", format!("{done}-{}", blob.size - 1));
    }
    let response = remote.send(request)?;
    match response.status {
        201 | 204 => Ok(()),
        _ => Err(remote.refusal(response, what())),
    }
}

/// Sends a piece of a long file, and gives where the next one goes.
fn piece(
    remote: &Remote,
    place: &Url,
    file: &File,
    done: u64,
    sent: &(dyn Fn(u64) + Sync),
) -> Result<Url> {
    let mut request = Request::new(Method::Patch, place.clone())
        .header("Content-Type", "application/octet-stream")
        .header("Content-Range", format!("{done}-{}", done + PIECE - 1));
    request.body = Body::File {
        file,
        offset_bytes: done,
        len_bytes: PIECE,
        sent,
    };
    let response = remote.send(request)?;
    match response.status {
        202 => location(&response),
        _ => Err(remote.refusal(response, format!("byte {done} and after"))),
    }
}

fn location(response: &super::http::Response) -> Result<Url> {
    let location = response
        .header("Location")
        .ok_or_else(|| anyhow!("the registry does not say where to"))?;
    response.url.join(location)
}

/// Copies a file that is in the cache to where somebody wants it, by a draft beside it.
///
/// # Errors
/// When the disk is full or the place cannot be written.
pub fn copy_out(from: &Path, draft: &crate::cache::Draft) -> Result<()> {
    let what = || {
        format!(
            "cannot copy {} to {}",
            from.display(),
            draft.path().display()
        )
    };
    let mut source = File::open(from).with_context(what)?;
    // The kernel copies, and shares the blocks where the file system can.
    io::copy(&mut source, &mut &draft.file).with_context(what)?;
    (&draft.file).flush().with_context(what)
}
