//! Library endpoints: `remote.yaml` of the configuration directory, in the form that the peers write, mode 0600.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_yaml_ng::{Mapping, Value};

use super::credentials::write_secret;

/// The endpoint that is there without a file; it has no library.
pub const DEFAULT_NAME: &str = "DefaultRemote";
const DEFAULT_URI: &str = "cloud.apptainer.org";
/// Where the peers list logins.
const CREDENTIALS: &str = "Credentials";
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
    other: BTreeMap<String, Value>,
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
    other: BTreeMap<String, Value>,
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
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(None);
            }
            // A home that this process may not enter; a file that it may not read is another matter.
            Err(error)
                if error.kind() == ErrorKind::PermissionDenied
                    && fs::symlink_metadata(path).is_err() =>
            {
                return Ok(None);
            }
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

    /// The registries that somebody has logged in to, by address, and whether they are reached without TLS: the peers' list
    /// `Credentials`, whose secrets (of old versions) are nobody's business.
    pub fn registries(&self) -> Vec<(String, bool)> {
        let list = self.other.get(CREDENTIALS).and_then(Value::as_sequence);
        let entry = |entry: &Value| {
            let uri = entry.get("URI")?.as_str()?.to_owned();
            let insecure = entry.get("Insecure").and_then(Value::as_bool);
            Some((uri, insecure.unwrap_or(false)))
        };
        list.into_iter().flatten().filter_map(entry).collect()
    }

    /// Notes a login.
    pub fn note_registry(&mut self, uri: &str, insecure: bool) {
        self.retain_registries(|old| old != uri);
        let mut entry = Mapping::new();
        entry.insert("URI".into(), uri.into());
        entry.insert("Insecure".into(), insecure.into());
        let list = self
            .other
            .entry(CREDENTIALS.into())
            .or_insert_with(|| Value::Sequence(Vec::new()));
        if list.is_null() {
            *list = Value::Sequence(Vec::new());
        }
        if let Some(list) = list.as_sequence_mut() {
            list.push(Value::Mapping(entry));
        }
    }

    /// A registry's host is not logged in to any more.
    pub fn forget_registry(&mut self, host: &str) {
        self.retain_registries(|uri| uri.split("://").nth(1) != Some(host));
    }

    fn retain_registries(&mut self, keep: impl Fn(&str) -> bool) {
        let list = self.other.get_mut(CREDENTIALS);
        if let Some(list) = list.and_then(Value::as_sequence_mut) {
            list.retain(|entry| entry.get("URI").and_then(Value::as_str).is_none_or(&keep));
        }
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
    fn logins_of_registries_are_noted_among_what_others_wrote() {
        let mut remotes = Remotes::default();
        assert!(remotes.registries().is_empty());
        remotes.note_registry("oras://a.test", false);
        remotes.note_registry("docker://b.test:1", true);
        remotes.note_registry("docker://b.test:1", false);
        let all = [("oras://a.test", false), ("docker://b.test:1", false)];
        assert_eq!(remotes.registries(), all.map(|(u, i)| (u.to_owned(), i)));
        remotes.forget_registry("a.test");
        assert_eq!(remotes.registries().len(), 1);
        let text = "Credentials:\n- URI: docker://r\n  Auth: Basic x\n- null\n";
        let mut remotes: Remotes = serde_yaml_ng::from_str(text).unwrap();
        remotes.note_registry("docker://s", false);
        let text = serde_yaml_ng::to_string(&remotes).unwrap();
        assert!(
            text.contains("Basic x") && text.contains("docker://s"),
            "{text}"
        );
    }

    #[test]
    fn without_files_there_is_the_default() {
        let none = Path::new("/nonexistent/remote.yaml");
        let remotes = Remotes::read(none, none).unwrap();
        assert_eq!(remotes.get(None).unwrap().0, DEFAULT_NAME);
        assert!(remotes.get(Some("x")).is_err());
    }
}
