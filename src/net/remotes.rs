//! Library endpoints: `remote.yaml` of the configuration directory, in the form that the peers write, mode 0600.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::credentials::write_secret;

/// The endpoint that is there without a file; it has no library.
pub const DEFAULT_NAME: &str = "DefaultRemote";
const DEFAULT_URI: &str = "cloud.apptainer.org";
/// A larger file is none.
const MAX_FILE: u64 = 1 << 20;

/// The file.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Remotes {
    /// The endpoint in use.
    #[serde(default)]
    pub active: String,
    /// All of them, by name.
    #[serde(default)]
    pub remotes: BTreeMap<String, Endpoint>,
    /// What others have written.
    #[serde(flatten)]
    other: BTreeMap<String, serde_yaml_ng::Value>,
}

/// A library endpoint.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Endpoint {
    /// `host` or `host:port`.
    #[serde(rename = "URI", default)]
    pub uri: String,
    /// The login.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
    /// From the administrator's file.
    #[serde(default)]
    pub system: bool,
    /// No other may be used.
    #[serde(default)]
    pub exclusive: bool,
    /// Reached without TLS.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
    /// What others have written.
    #[serde(flatten)]
    other: BTreeMap<String, serde_yaml_ng::Value>,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Endpoint({:?})", self.uri)
    }
}

impl Endpoint {
    /// Without a login.
    pub fn new(uri: &str, insecure: bool) -> Endpoint {
        Endpoint {
            uri: uri.to_owned(),
            insecure,
            ..Endpoint::default()
        }
    }
}

impl Remotes {
    /// The person's endpoints over the administrator's.
    ///
    /// # Errors
    /// When a file cannot be read or understood.
    pub fn read(own: &Path, site: &Path) -> Result<Remotes> {
        let site = Remotes::read_file(site)?;
        let mut all = Remotes::read_file(own)?.unwrap_or_default();
        let mut active = None;
        for (name, endpoint) in site
            .map(|site| {
                active = Some(site.active.clone());
                site.remotes
            })
            .into_iter()
            .flatten()
        {
            all.remotes.entry(name).or_insert(Endpoint {
                system: true,
                ..endpoint
            });
        }
        all.remotes
            .entry(DEFAULT_NAME.into())
            .or_insert_with(|| Endpoint {
                uri: DEFAULT_URI.into(),
                system: true,
                ..Endpoint::default()
            });
        let exclusive = all.remotes.iter().find(|(_, e)| e.system && e.exclusive);
        if let Some((name, _)) = exclusive {
            all.active = name.clone();
        } else if all.active.is_empty() {
            all.active = active
                .filter(|a| !a.is_empty())
                .unwrap_or_else(|| DEFAULT_NAME.into());
        }
        Ok(all)
    }

    fn read_file(path: &Path) -> Result<Option<Remotes>> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        if text.len() as u64 > MAX_FILE {
            bail!("{} is too large for a list of endpoints", path.display());
        }
        if text.trim().is_empty() {
            return Ok(None);
        }
        // The text may hold secrets, and the parser's message parts of it.
        match serde_yaml_ng::from_str(&text) {
            Ok(remotes) => Ok(Some(remotes)),
            Err(error) => bail!(
                "cannot understand {}: it is no list of endpoints{}",
                path.display(),
                error
                    .location()
                    .map(|l| format!(" (line {})", l.line()))
                    .unwrap_or_default()
            ),
        }
    }

    /// Writes the person's file: all but the administrator's endpoints.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, own: &Path) -> Result<()> {
        let mut text = self.clone();
        text.remotes.retain(|_, endpoint| !endpoint.system);
        write_secret(own, serde_yaml_ng::to_string(&text)?.as_bytes())
    }

    /// The endpoint of a name; the active one without a name.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: Option<&str>) -> Result<(&str, &Endpoint)> {
        let name = name.unwrap_or(&self.active);
        match self.remotes.get_key_value(name) {
            Some((name, endpoint)) => Ok((name, endpoint)),
            None => bail!("{name} is not a remote"),
        }
    }
}

/// The files: the person's and the administrator's.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// `remote.yaml` of the configuration directory.
    pub own: PathBuf,
    /// `/etc/apptainer/remote.yaml`.
    pub site: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_stays() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("remote.yaml");
        let none = dir.path().join("none");
        fs::write(
            &own,
            "Active: \"y\"\nRemotes:\n    \"y\":\n        URI: example.test\n        System: false\n        Exclusive: false\n        Keyservers:\n            - URI: k\nCredentials:\n    - URI: docker://r\n      Auth: Basic x\n",
        )
        .unwrap();
        let remotes = Remotes::read(&own, &none).unwrap();
        assert_eq!(remotes.get(None).unwrap().1.uri, "example.test");
        remotes.write(&own).unwrap();
        let text = fs::read_to_string(&own).unwrap();
        for word in ["Keyservers", "Basic x", "example.test"] {
            assert!(text.contains(word), "{text}");
        }
        assert!(!text.contains(DEFAULT_NAME), "{text}");
    }

    #[test]
    fn without_files_there_is_the_default() {
        let none = Path::new("/nonexistent");
        let remotes = Remotes::read(none, none).unwrap();
        assert_eq!(remotes.get(None).unwrap().0, DEFAULT_NAME);
        assert!(remotes.get(Some("x")).is_err());
    }
}
