//! Mirrors of registries, as containers' tools configure them (`containers-registries.conf(5)`): the first of
//! `$CONTAINERS_REGISTRIES_CONF`, `~/.config/containers/registries.conf`, `/etc/containers/registries.conf`.
//!
//! Read: `[[registry]]` with `prefix`, `location`, `insecure`, `blocked`, and its `[[registry.mirror]]` with `location`,
//! `insecure`, `pull-from-mirror`. Names without a registry always mean `docker.io`, as Apptainer has it.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::url::Scheme;

/// The registries that a file speaks of.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Mirrors {
    #[serde(default)]
    registry: Vec<Registry>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Registry {
    prefix: Option<String>,
    location: Option<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror: Vec<Mirror>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    pull_from_mirror: Option<String>,
}

/// Where an image may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Plain HTTP where the file calls it insecure.
    pub scheme: Scheme,
    /// `host` or `host:port`.
    pub registry: String,
    /// Within it.
    pub path: String,
}

impl Mirrors {
    /// From the first of these files that is there.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn read(files: &[PathBuf]) -> Result<Mirrors> {
        for file in files {
            let text = match fs::read_to_string(file) {
                Ok(text) => text,
                // In a user namespace the home directory may be another user's.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::NotFound | ErrorKind::PermissionDenied
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot read {}", file.display()));
                }
            };
            return toml::from_str(&text)
                .with_context(|| format!("cannot understand {}", file.display()));
        }
        Ok(Mirrors::default())
    }

    /// Whether nothing may be pulled from there.
    pub fn is_blocked(&self, registry: &str, path: &str) -> bool {
        self.entry(registry, path).is_some_and(|(e, _)| e.blocked)
    }

    /// The mirrors of a repository, then its other location if it has one.
    pub fn of(&self, registry: &str, path: &str) -> Vec<Place> {
        let Some((entry, rest)) = self.entry(registry, path) else {
            return Vec::new();
        };
        let by_tag =
            |mirror: &&Mirror| !matches!(mirror.pull_from_mirror.as_deref(), Some("digest-only"));
        let mirrors = entry
            .mirror
            .iter()
            .filter(by_tag)
            .map(|m| (m.location.as_str(), m.insecure));
        let own = entry.location.as_deref().map(|l| (l, entry.insecure));
        mirrors
            .chain(own)
            .filter_map(|(location, insecure)| place(location, rest, insecure))
            .collect()
    }

    /// The entry with the longest prefix, and what of the name lies behind that.
    fn entry<'a>(&'a self, registry: &str, path: &'a str) -> Option<(&'a Registry, &'a str)> {
        let name = format!("{registry}/{path}");
        let of = |entry: &'a Registry| {
            let prefix = entry.prefix.as_deref().or(entry.location.as_deref())?;
            let rest = match prefix.strip_prefix("*.") {
                Some(domain) => {
                    let above = registry.strip_suffix(domain)?;
                    above.ends_with('.').then_some(path)?
                }
                None => {
                    let rest = name.strip_prefix(prefix)?;
                    let bounded = rest.starts_with('/') || rest.is_empty();
                    bounded.then_some(
                        &path[path.len() - rest.trim_start_matches('/').len().min(path.len())..],
                    )?
                }
            };
            Some((prefix.len(), entry, rest))
        };
        let best = self
            .registry
            .iter()
            .filter_map(of)
            .max_by_key(|(len, ..)| *len);
        best.map(|(_, entry, rest)| (entry, rest))
    }
}

fn place(location: &str, rest: &str, insecure: bool) -> Option<Place> {
    let whole = format!("{}/{rest}", location.trim_end_matches('/'));
    let (registry, path) = whole.split_once('/')?;
    Some(Place {
        scheme: if insecure {
            Scheme::Http
        } else {
            Scheme::Https
        },
        registry: registry.to_owned(),
        path: path.trim_matches('/').to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(text: &str) -> Mirrors {
        toml::from_str(text).unwrap()
    }

    fn places(all: &Mirrors, registry: &str, path: &str) -> Vec<String> {
        let all = all.of(registry, path).into_iter();
        all.map(|p| format!("{}://{}/{}", p.scheme.name(), p.registry, p.path))
            .collect()
    }

    #[test]
    fn mirrors_come_first_and_then_the_location() {
        let all = mirrors(
            r#"
            unqualified-search-registries = ["docker.io"]
            [[registry]]
            prefix = "docker.io"
            location = "real.example.org/dockerhub"
            [[registry.mirror]]
            location = "10.0.0.1:5000"
            insecure = true
            [[registry.mirror]]
            location = "other"
            pull-from-mirror = "digest-only"
            [[registry]]
            prefix = "docker.io/team"
            location = "team.example.org"
            [[registry]]
            location = "bad.example.org"
            blocked = true
            [[registry]]
            prefix = "*.example.net"
            location = "mirror.net/all"
            "#,
        );
        assert_eq!(
            places(&all, "docker.io", "library/x"),
            [
                "http://10.0.0.1:5000/library/x",
                "https://real.example.org/dockerhub/library/x"
            ]
        );
        assert_eq!(
            places(&all, "docker.io", "team/x"),
            ["https://team.example.org/x"]
        );
        assert_eq!(
            places(&all, "docker.io", "teams/x")
                .first()
                .map(String::as_str),
            Some("http://10.0.0.1:5000/teams/x")
        );
        assert_eq!(
            places(&all, "a.example.net", "x"),
            ["https://mirror.net/all/x"]
        );
        assert!(places(&all, "example.net", "x").is_empty());
        assert!(places(&all, "docker.io.evil.org", "x").is_empty());
        assert!(all.is_blocked("bad.example.org", "x"));
        assert!(!all.is_blocked("good.example.org", "x"));
    }
}
