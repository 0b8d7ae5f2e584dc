//! Mirrors of registries, as containers' tools configure them (`containers-registries.conf(5)`,
//! `containers-registries.conf.d(5)`): the first of `$CONTAINERS_REGISTRIES_CONF`, `~/.config/containers/registries.conf`,
//! `/etc/containers/registries.conf` and `/usr/share/containers/registries.conf`; and over it `*.conf` of
//! `registries.conf.d` in `/usr/share/containers`, `/etc/containers` and `~/.config/containers`, in this order and by name.
//! A later entry takes the place of an earlier one with the same prefix.
//!
//! Read: `[[registry]]` with `prefix`, `location`, `insecure`, `blocked`, `mirror-by-digest-only`, and its
//! `[[registry.mirror]]` with `location`, `insecure`, `pull-from-mirror`. Names without a registry always mean `docker.io`, as Apptainer has it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::url::Scheme;
use crate::given;

/// Largest file of settings, bytes.
const MAX_FILE: u64 = 4 << 20;

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
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<Mirror>,
}

impl Registry {
    fn prefix(&self) -> Option<&str> {
        let named = self.prefix.as_deref().filter(|p| !p.is_empty());
        named.or(self.location.as_deref())
    }
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
    /// From the first of these files that is there, and all files of these directories.
    ///
    /// # Errors
    /// When one cannot be read or understood.
    pub fn read(files: &[PathBuf], directories: &[PathBuf]) -> Result<Mirrors> {
        let mut all = Mirrors::default();
        for file in files {
            if let Some(found) = Mirrors::read_file(file)? {
                all = found;
                break;
            }
        }
        for directory in directories {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let mut files: Vec<PathBuf> = entries
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|e| e == "conf"))
                .collect();
            files.sort();
            for file in files {
                let found = Mirrors::read_file(&file)?.unwrap_or_default();
                for entry in found.registry {
                    all.registry.retain(|old| old.prefix() != entry.prefix());
                    all.registry.push(entry);
                }
            }
        }
        Ok(all)
    }

    /// `None` when there is none.
    fn read_file(file: &Path) -> Result<Option<Mirrors>> {
        let text = match given::string(file, MAX_FILE) {
            Ok(text) => text,
            // In a user namespace the home directory may be another user's.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", file.display()));
            }
        };
        let mirrors: Mirrors = toml::from_str(&text)
            .with_context(|| format!("cannot understand {}", file.display()))?;
        Ok(Some(mirrors))
    }

    /// Whether nothing may be pulled from there.
    pub fn is_blocked(&self, registry: &str, path: &str) -> bool {
        self.entry(registry, path).is_some_and(|(e, _)| e.blocked)
    }

    /// Whether a registry is reached without TLS.
    pub fn is_insecure(&self, registry: &str, path: &str) -> bool {
        self.entry(registry, path).is_some_and(|(e, _)| e.insecure)
    }

    /// Where a repository is, for an image named by its digest or by a tag: its mirrors, then its location, which takes the
    /// place of the registry, or else the registry. Nothing when the files do not speak of it.
    pub fn of(&self, registry: &str, path: &str, by_digest: bool) -> Vec<Place> {
        let Some((entry, rest)) = self.entry(registry, path) else {
            return Vec::new();
        };
        let is_asked = |mirror: &&Mirror| match mirror.pull_from_mirror.as_deref() {
            Some("digest-only") => by_digest,
            Some("tag-only") => !by_digest,
            _ => by_digest || !entry.mirror_by_digest_only,
        };
        let mirrors = entry.mirror.iter().filter(is_asked);
        let mirrors = mirrors.filter_map(|m| place(&m.location, rest, m.insecure));
        let own = match entry.location.as_deref().filter(|l| !l.is_empty()) {
            Some(location) => place(location, rest, entry.insecure),
            None => place(registry, path, entry.insecure),
        };
        mirrors.chain(own).collect()
    }

    /// The entry with the longest prefix, and what of the name lies behind that.
    fn entry<'a>(&'a self, registry: &str, path: &'a str) -> Option<(&'a Registry, &'a str)> {
        let name = format!("{registry}/{path}");
        let of = |entry: &'a Registry| {
            let prefix = entry.prefix()?;
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
        let all = all.of(registry, path, false).into_iter();
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
        let own = mirrors("[[registry]]\nlocation = 'r.test:5000'\ninsecure = true\n");
        assert_eq!(places(&own, "r.test:5000", "x"), ["http://r.test:5000/x"]);
        assert!(own.is_insecure("r.test:5000", "x") && !own.is_insecure("r.test", "x"));
        assert!(all.is_blocked("bad.example.org", "x"));
        assert!(!all.is_blocked("good.example.org", "x"));
    }

    #[test]
    fn tags_and_digests_may_have_other_mirrors() {
        let mirror = |kind: &str| match kind {
            "" => "[[registry.mirror]]\nlocation = \"any\"\n".to_owned(),
            kind => format!(
                "[[registry.mirror]]\nlocation = \"{kind}\"\npull-from-mirror = \"{kind}\"\n"
            ),
        };
        let all = ["", "all", "digest-only", "tag-only"].map(mirror).concat();
        for (more, by_digest, expected) in [
            ("", false, &["any", "all", "tag-only"][..]),
            ("", true, &["any", "all", "digest-only"]),
            ("mirror-by-digest-only = true\n", false, &["tag-only"]),
            (
                "mirror-by-digest-only = true\n",
                true,
                &["any", "all", "digest-only"],
            ),
        ] {
            let found = mirrors(&format!("[[registry]]\nprefix = \"r.test\"\n{more}{all}"));
            let places = found.of("r.test", "x", by_digest);
            let names: Vec<&str> = places.iter().map(|p| p.registry.as_str()).collect();
            assert_eq!(
                names,
                [expected, &["r.test"]].concat(),
                "{more} {by_digest}"
            );
        }
    }

    #[test]
    fn one_file_counts_and_all_of_the_directories() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, prefix: &str, mirror: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = format!(
                "[[registry]]\nprefix = \"{prefix}\"\n[[registry.mirror]]\nlocation = \"{mirror}\"\n"
            );
            fs::write(&path, text).unwrap();
            path
        };
        let files = [
            dir.path().join("none.conf"),
            file("own.conf", "a.test", "own"),
            file("etc.conf", "b.test", "never"),
        ];
        file("etc.d/50-site.conf", "a.test", "site");
        file("etc.d/10-first.conf", "c.test", "first");
        file("etc.d/60-last.conf", "c.test", "last");
        file("etc.d/70-other.txt", "c.test", "never");
        file("home.d/00.conf", "d.test", "home");
        let directories = ["none.d", "etc.d", "home.d"].map(|d| dir.path().join(d));
        let all = Mirrors::read(&files, &directories).unwrap();
        for (registry, mirror) in [
            ("a.test", Some("site")),
            ("b.test", None),
            ("c.test", Some("last")),
            ("d.test", Some("home")),
        ] {
            let own = mirror.map(|_| registry);
            let expected: Vec<String> = [mirror, own]
                .iter()
                .flatten()
                .map(|host| format!("https://{host}/x"))
                .collect();
            assert_eq!(places(&all, registry, "x"), expected, "{registry}");
        }
        fs::write(dir.path().join("etc.d/55-bad.conf"), "registry = 1").unwrap();
        let error = Mirrors::read(&files, &directories).unwrap_err();
        assert!(format!("{error:#}").contains("55-bad.conf"));
    }
}
