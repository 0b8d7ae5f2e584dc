//! Names of images elsewhere: `docker://`, `oras://`, `library://`, `http(s)://`. Pure: text in, values out.
//!
//! A reference keeps what was typed, so that printing is the inverse of parsing; what is left out is filled in by the
//! methods (Docker's defaults `docker.io`, `library/`, `latest`). The grammar is that of `distribution/reference`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::url::{Url, split_authority};
use crate::digest::Digest;

/// An image elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A Docker or OCI image in a registry.
    Docker(Repository),
    /// A SIF in a registry.
    Oras(Repository),
    /// A SIF in a library.
    Library(LibraryName),
    /// A file.
    Http(Url),
}

/// A name within a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// `host` or `host:port`, if typed.
    registry: Option<String>,
    /// As typed.
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A name within a library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryName {
    /// `host` or `host:port`, if typed.
    pub host: Option<String>,
    /// As typed: one to three parts.
    parts: Vec<String>,
    /// As typed.
    tags: Vec<String>,
}

/// The tag that is meant where none is given.
const LATEST: &str = "latest";
/// Docker's own registry, as it is typed.
const DOCKER: &str = "docker.io";

impl Reference {
    /// Whether `text` begins like a reference that this module reads.
    pub fn is_scheme(scheme: &str) -> bool {
        matches!(scheme, "docker" | "oras" | "library" | "http" | "https")
    }

    /// The file that `pull` makes when no name is given: `NAME_TAG.sif`, or the last part of a web address.
    pub fn file_name(&self) -> String {
        let name = match self {
            Reference::Docker(repository) | Reference::Oras(repository) => repository.file_name(),
            Reference::Library(name) => {
                let last = name.parts.last().map_or("image", String::as_str);
                format!("{last}_{}.sif", name.tag())
            }
            Reference::Http(url) => {
                let last = url.path().rsplit('/').next().unwrap_or_default();
                if last.is_empty() { "image.sif" } else { last }.to_owned()
            }
        };
        // A web address may end in anything.
        match name.as_str() {
            "." | ".." => "image.sif".into(),
            _ => name,
        }
    }
}

impl Repository {
    /// `host` or `host:port`.
    pub fn registry(&self) -> &str {
        match self.registry.as_deref() {
            None | Some("index.docker.io" | "registry-1.docker.io") => DOCKER,
            Some(registry) => registry,
        }
    }

    /// The path as the registry knows it.
    pub fn path(&self) -> String {
        match self.registry() == DOCKER && !self.path.contains('/') {
            true => format!("library/{}", self.path),
            false => self.path.clone(),
        }
    }

    /// What identifies the image: the digest if there is one, else the tag.
    pub fn version(&self) -> String {
        match &self.digest {
            Some(digest) => digest.to_string(),
            None => self.tag().to_owned(),
        }
    }

    /// The tag, `latest` if none was typed.
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or(LATEST)
    }

    /// The digest, if one was typed.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    fn file_name(&self) -> String {
        let last = self.path.rsplit('/').next().unwrap_or("image");
        match (&self.tag, &self.digest) {
            (None, Some(digest)) => format!("{last}@sha256_{}.sif", digest.hex()),
            _ => format!("{last}_{}.sif", self.tag()),
        }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(registry) = &self.registry {
            write!(f, "{registry}/")?;
        }
        f.write_str(&self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Repository {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Repository> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        // What looks like a host is one: Docker's own rule.
        let (registry, rest) = match name.split_once('/') {
            Some((first, rest))
                if first.contains(['.', ':'])
                    || first == "localhost"
                    || first.bytes().any(|b| b.is_ascii_uppercase()) =>
            {
                split_authority(first).context("invalid reference format")?;
                (Some(first.to_owned()), rest)
            }
            _ => (None, name),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            bail!("invalid reference format: {tag:?} is not a tag");
        }
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            bail!("invalid reference format: repository name must be lowercase");
        }
        if path.len() > 255 || !path.split('/').all(is_path_part) {
            bail!("invalid reference format");
        }
        Ok(Repository {
            registry,
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

/// `[\w][\w.-]{0,127}`
fn is_tag(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// Letters and digits, with single separators between: `.`, `_`, `__`, or dashes.
fn is_path_part(part: &str) -> bool {
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let good = |s: &str| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    !part.is_empty()
        && !part.starts_with(['.', '_', '-'])
        && !part.ends_with(['.', '_', '-'])
        && separators.into_iter().all(good)
}

impl LibraryName {
    /// `entity/collection/container`, what was left out filled in.
    pub fn path(&self) -> [&str; 3] {
        match self.parts.as_slice() {
            [entity, collection, container] => [entity, collection, container],
            [entity, container] => [entity, "default", container],
            [container] => ["library", "default", container],
            _ => ["library", "default", "image"],
        }
    }

    /// The first tag, `latest` if none was typed.
    pub fn tag(&self) -> &str {
        self.tags.first().map_or(LATEST, String::as_str)
    }

    /// All tags, `latest` if none was typed.
    pub fn tags(&self) -> Vec<&str> {
        match self.tags.is_empty() {
            true => vec![LATEST],
            false => self.tags.iter().map(String::as_str).collect(),
        }
    }

    /// Whether the first part stands for a collection of its own, as `push` needs it.
    pub fn is_complete(&self) -> bool {
        self.parts.len() == 3
    }
}

impl fmt::Display for LibraryName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(host) = &self.host {
            write!(f, "{host}/")?;
        }
        f.write_str(&self.parts.join("/"))?;
        match self.tags.is_empty() {
            true => Ok(()),
            false => write!(f, ":{}", self.tags.join(",")),
        }
    }
}

impl FromStr for LibraryName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<LibraryName> {
        let text = text.trim_start_matches('/');
        let (host, rest) = match text.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                split_authority(first)?;
                (Some(first.to_owned()), rest)
            }
            _ => (None, text),
        };
        let (path, tags) = match rest.split_once(':') {
            Some((path, tags)) => (path, tags.split(',').map(str::to_owned).collect()),
            None => (rest, Vec::new()),
        };
        let parts: Vec<String> = path.split('/').map(str::to_owned).collect();
        let is_part = |part: &String| {
            (1..=128).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
                && part.bytes().any(|b| b.is_ascii_alphanumeric())
        };
        if parts.len() > 3 || !parts.iter().all(is_part) {
            bail!("invalid image path {path:?}: ENTITY/COLLECTION/CONTAINER");
        }
        if let Some(tag) = tags.iter().find(|tag: &&String| !is_tag(tag)) {
            bail!("invalid tag {tag:?}");
        }
        Ok(LibraryName { host, parts, tags })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Reference::Docker(repository) => write!(f, "docker://{repository}"),
            Reference::Oras(repository) => write!(f, "oras://{repository}"),
            Reference::Library(name) => write!(f, "library://{name}"),
            Reference::Http(url) => write!(f, "{url}"),
        }
    }
}

impl FromStr for Reference {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Reference> {
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        // `docker:name` is what definition files of old write.
        let name = rest.strip_prefix("//").unwrap_or(rest);
        let what = || format!("unable to parse image name {text}");
        Ok(match scheme {
            "docker" => Reference::Docker(name.parse().with_context(what)?),
            "oras" => Reference::Oras(name.parse().with_context(what)?),
            "library" => Reference::Library(name.parse().with_context(what)?),
            "http" | "https" => Reference::Http(text.parse().with_context(what)?),
            other => bail!("Unsupported transport type: {other}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(text: &str) -> Repository {
        match text.parse::<Reference>().unwrap() {
            Reference::Docker(r) | Reference::Oras(r) => r,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn parsing_and_printing_are_inverse() {
        let digest = Digest::of(b"");
        for text in [
            "docker://alpine".to_owned(),
            "docker://alpine:3.20".into(),
            "docker://ghcr.io/a/b:c".into(),
            "docker://localhost:5000/a/b".into(),
            format!("docker://[::1]:5000/a/b@{digest}"),
            format!("oras://a.b/c:d@{digest}"),
            "library://alpine:latest".into(),
            "library://a/b/c:d,e".into(),
            "library://lib.example.org:8080/a/b/c".into(),
            "https://example.org/a%20b.sif?x=y".into(),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_left_out_is_what_docker_means() {
        let r = repository("docker://alpine");
        assert_eq!(
            (r.registry(), r.path().as_str(), r.tag()),
            ("docker.io", "library/alpine", "latest")
        );
        let r = repository("docker://docker.io/alpine");
        assert_eq!(r.path(), "library/alpine");
        let r = repository("docker://user/app:1");
        assert_eq!((r.registry(), r.path().as_str()), ("docker.io", "user/app"));
        let r = repository("docker://localhost/app");
        assert_eq!((r.registry(), r.path().as_str()), ("localhost", "app"));
        let r = repository("docker://host:5000/app");
        assert_eq!((r.registry(), r.tag()), ("host:5000", "latest"));
        let name: LibraryName = "alpine".parse().unwrap();
        assert_eq!(name.path(), ["library", "default", "alpine"]);
        let name: LibraryName = "me/app:1".parse().unwrap();
        assert_eq!((name.path(), name.tag()), (["me", "default", "app"], "1"));
    }

    #[test]
    fn files_are_named_after_images() {
        let name = |text: &str| text.parse::<Reference>().unwrap().file_name();
        assert_eq!(name("docker://a/busy:v1"), "busy_v1.sif");
        assert_eq!(name("oras://h.x/busy"), "busy_latest.sif");
        assert_eq!(name("library://a/b/c:d,e"), "c_d.sif");
        assert_eq!(name("https://x/y/z.sif?a=/b"), "z.sif");
        assert_eq!(name("https://x/"), "image.sif");
        assert_eq!(name("https://x/.."), "image.sif");
    }

    #[test]
    fn bad_names_are_refused() {
        for text in [
            "docker://",
            "docker://UPPER",
            "docker://x/UPPER",
            "docker://a//b",
            "docker://a:b:c",
            "docker://a:",
            "docker://../etc/passwd",
            "docker://a/../b",
            "docker://a@sha256:12",
            "docker://a:.x",
            "docker://host:x/a",
            "docker://a b",
            "docker://a?b",
            "library://",
            "library://a/b/c/d",
            "library://a/../b",
            "library://a:",
            "http://",
            "foo://x",
            "x",
            "",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }
}
