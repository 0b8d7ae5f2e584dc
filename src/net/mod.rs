//! Images elsewhere: registries, libraries, web servers.
//!
//! [`layers`] downloads the layers of a `docker://` image into the cache, [`file`] the file that any other reference
//! names. All that is decided by environment and options is in [`Options`], made once.

pub mod credentials;
mod download;
pub mod http;
pub mod library;
pub mod mirrors;
pub mod oci;
mod pace;
mod proxy;
pub mod reference;
pub mod registry;
pub mod remotes;
pub mod url;
mod web;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};

pub use credentials::{Credentials, Login};
pub use http::{Client, Settings};
pub use reference::Reference;

use crate::cache::Cache;
use crate::oci::{Image, Platform};
use crate::{image, say};
use mirrors::Mirrors;
use reference::Repository;
use registry::{Access, Remote};
use url::Scheme;

/// How to get there.
#[derive(Clone)]
pub struct Options {
    /// `Http` with `--no-https`.
    pub scheme: Scheme,
    /// The machine that the image is for.
    pub platform: Platform,
    /// Logins for registries.
    pub credentials: Credentials,
    /// Where else registries' images are.
    pub mirrors: Mirrors,
    /// How a library is found.
    pub library: library::Choice,
    /// The connections.
    pub client: Arc<Client>,
}

impl Options {
    /// A repository at the registry itself.
    ///
    /// # Errors
    /// When the login file cannot be read.
    pub fn remote(&self, repository: &Repository, access: Access) -> Result<Remote<'_>> {
        let login = self
            .credentials
            .find(repository.registry(), &repository.path())?;
        let is_insecure = self
            .mirrors
            .is_insecure(repository.registry(), &repository.path());
        let scheme = match is_insecure {
            true => Scheme::Http,
            false => self.scheme,
        };
        Remote::new(&self.client, scheme, repository, login, access)
    }

    /// Does something with a repository at its mirrors in turn, at last at the registry itself, or at what takes its place.
    ///
    /// # Errors
    /// The last one's, and after it those of the mirrors before it.
    fn first_working<T>(
        &self,
        repository: &Repository,
        work: &dyn Fn(&Remote) -> Result<T>,
    ) -> Result<T> {
        let (registry, path) = (repository.registry(), repository.path());
        if self.mirrors.is_blocked(registry, &path) {
            bail!("registry {registry} is blocked in registries.conf");
        }
        let by_digest = repository.digest().is_some();
        let mut places = self.mirrors.of(registry, &path, by_digest);
        let last = places.pop();
        let mut failed = Vec::new();
        for place in &places {
            match self.mirror(place).and_then(|remote| work(&remote)) {
                Ok(done) => return Ok(done),
                Err(error) => {
                    say::verbose(format_args!("mirror {}: {error:#}", place.registry));
                    failed.push(format!("mirror {}: {error:#}", place.registry));
                }
            }
        }
        let last = match last.filter(|p| (p.registry.as_str(), &p.path) != (registry, &path)) {
            Some(place) => self.mirror(&place),
            None => self.remote(repository, Access::Pull),
        };
        match last.and_then(|remote| work(&remote)) {
            Err(error) if !failed.is_empty() => {
                bail!("{error:#}; before that, {}", failed.join("; "))
            }
            done => done,
        }
    }

    fn mirror(&self, place: &mirrors::Place) -> Result<Remote<'_>> {
        // What was given for one registry is not for another.
        let logins = Credentials {
            given: None,
            ..self.credentials.clone()
        };
        let login = logins.find(&place.registry, &place.path)?;
        let scheme = match place.scheme {
            Scheme::Http => Scheme::Http,
            Scheme::Https => self.scheme,
        };
        Remote::at(
            &self.client,
            scheme,
            &place.registry,
            &place.path,
            login,
            Access::Pull,
        )
    }
}

/// Downloads the layers of an image into the cache.
///
/// # Errors
/// When it is not there, damaged, or not a `docker://` reference.
pub fn layers(reference: &Reference, options: &Options, cache: &Cache) -> Result<Image> {
    match reference {
        Reference::Docker(repository) => oci::image(repository, options, cache),
        other => bail!("{other} is a file, not an image of layers"),
    }
}

/// Downloads a file into the cache.
///
/// # Errors
/// When it is not there or damaged, or is a `docker://` reference.
pub fn file(reference: &Reference, options: &Options, cache: &Cache) -> Result<PathBuf> {
    match reference {
        Reference::Oras(repository) => oci::sif(repository, options, cache),
        Reference::Library(name) => library::pull(name, options, cache),
        Reference::Http(url) => web::pull(url, options, cache, &image::check),
        Reference::Docker(_) => bail!("{reference} is an image of layers, not a file"),
    }
}

/// Downloads a file that need be no image.
///
/// # Errors
/// When it is not there, empty or damaged, or not at a web address.
pub fn plain_file(reference: &Reference, options: &Options, cache: &Cache) -> Result<PathBuf> {
    let is_something = |path: &Path| match std::fs::metadata(path)?.len() {
        0 => bail!("the file is empty"),
        _ => Ok(()),
    };
    match reference {
        Reference::Http(url) => web::pull(url, options, cache, &is_something),
        other => file(other, options, cache),
    }
}

/// Whether a file has a length.
fn has_len(path: &Path, len_bytes: u64) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.len() == len_bytes)
}

/// Whether a file begins as a SIF does.
fn is_sif(file: &File) -> bool {
    let mut head = [0; 10];
    file.read_exact_at(&mut head, 32).is_ok() && head.starts_with(b"SIF_MAGIC")
}
