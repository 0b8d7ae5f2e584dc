//! Names and passwords for registries, in docker's `config.json`.
//!
//! Read, in this order: `--docker-username` and `--docker-password`, `$APPTAINER_DOCKER_USERNAME` and `_PASSWORD`,
//! `$DOCKER_USERNAME` and `_PASSWORD` (all for the registry that was named only),
//! `--authfile`, or `docker-config.json` of the configuration directory, `~/.docker/config.json` and the `auth.json` of
//! containers' tools. Programs `docker-credential-NAME` are asked through their standard input and output. An entry is
//! for one host and port; secrets are in no message, no argument and no log.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value};

use crate::given;

/// Docker's own registry is known by this name in its file.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// A larger file is none.
const MAX_FILE: u64 = 4 << 20;

/// Who somebody is to a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// A name and a password.
    Password {
        /// The name.
        username: String,
        /// The password, or a token that is used as one.
        password: String,
    },
    /// A token that gives tokens (`identitytoken`).
    Identity(String),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Login(…)")
    }
}

impl Login {
    /// The value of `Authorization`, for a password.
    pub fn basic(&self) -> Option<String> {
        match self {
            Login::Password { username, password } => {
                let pair = BASE64_STANDARD.encode(format!("{username}:{password}"));
                Some(format!("Basic {pair}"))
            }
            Login::Identity(_) => None,
        }
    }
}

/// Where they are.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// For the registry that was named; before all files.
    pub given: Option<Login>,
    /// Files to look into, the first one first.
    pub files: Vec<PathBuf>,
    /// The file that `registry login` writes.
    pub store: PathBuf,
}

/// A login file as it is, with what we do not know of in it.
struct LoginFile(Map<String, Value>);

impl Credentials {
    /// For a repository of a registry.
    ///
    /// # Errors
    /// When a file cannot be understood or a helper fails.
    pub fn find(&self, registry: &str, path: &str) -> Result<Option<Login>> {
        if let Some(given) = &self.given {
            return Ok(Some(given.clone()));
        }
        for file in &self.files {
            let logins = match LoginFile::read(file) {
                Ok(Some(logins)) => logins,
                Ok(None) => continue,
                // In a user namespace the home directory may be another user's.
                Err(error) if is_denied(&error) && self.files.len() > 1 => continue,
                Err(error) => return Err(error),
            };
            let found = logins
                .find(registry, path)
                .with_context(|| format!("cannot use {}", file.display()))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Stores a login: with the helper that the file names, else in the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&self, registry: &str, login: &Login) -> Result<()> {
        let mut file = LoginFile::read(&self.store)?.unwrap_or(LoginFile(Map::new()));
        let key = store_key(registry);
        if let Some(helper) = file.helper(registry) {
            let (name, secret) = match login {
                Login::Password { username, password } => (username.as_str(), password),
                Login::Identity(token) => ("<token>", token),
            };
            let request = serde_json::json!({"ServerURL": key, "Username": name, "Secret": secret});
            return ask(&helper, "store", &request.to_string()).map(drop);
        }
        let entry = match login {
            Login::Password { username, password } => {
                serde_json::json!({"auth": BASE64_STANDARD.encode(format!("{username}:{password}"))})
            }
            Login::Identity(token) => serde_json::json!({"identitytoken": token}),
        };
        let auths = file
            .0
            .entry("auths")
            .or_insert_with(|| Value::Object(Map::new()));
        let auths = auths
            .as_object_mut()
            .ok_or_else(|| anyhow!("{} is damaged: auths is no object", self.store.display()))?;
        auths.insert(key, entry);
        file.write(&self.store)
    }

    /// Forgets a login; false when there was none.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn erase(&self, registry: &str) -> Result<bool> {
        let Some(mut file) = LoginFile::read(&self.store)? else {
            return Ok(false);
        };
        if let Some(helper) = file.helper(registry) {
            return ask(&helper, "erase", &store_key(registry)).map(|_| true);
        }
        let Some(auths) = file.0.get_mut("auths").and_then(Value::as_object_mut) else {
            return Ok(false);
        };
        let before = auths.len();
        auths.retain(|key, _| host_of(key) != canonical(registry));
        if auths.len() == before {
            return Ok(false);
        }
        file.write(&self.store)?;
        Ok(true)
    }

    /// The registries that the file holds a login for.
    ///
    /// # Errors
    /// When the file cannot be understood.
    pub fn list(&self) -> Result<Vec<String>> {
        let Some(file) = LoginFile::read(&self.store)? else {
            return Ok(Vec::new());
        };
        let auths = file.0.get("auths").and_then(Value::as_object);
        let helpers = file.0.get("credHelpers").and_then(Value::as_object);
        let keys = auths.into_iter().chain(helpers).flat_map(Map::keys);
        let mut hosts: Vec<String> = keys.map(|key| host_of(key)).collect();
        hosts.sort();
        hosts.dedup();
        Ok(hosts)
    }
}

impl LoginFile {
    /// `None` when there is none.
    fn read(path: &Path) -> Result<Option<LoginFile>> {
        let text = match given::string(path, MAX_FILE) {
            Ok(text) => text,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            // A home that this process may not enter; a file that it may not read is another matter.
            Err(e)
                if e.kind() == std::io::ErrorKind::PermissionDenied
                    && fs::symlink_metadata(path).is_err() =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        if text.trim().is_empty() {
            return Ok(Some(LoginFile(Map::new())));
        }
        // The parser's message tells of a place only; the text holds secrets.
        match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => Ok(Some(LoginFile(map))),
            Ok(_) => bail!(
                "{} is no login file: it holds no JSON object",
                path.display()
            ),
            Err(e) => bail!(
                "{} is no login file: line {} is not JSON",
                path.display(),
                e.line()
            ),
        }
    }

    /// Written beside and renamed, readable by its owner alone.
    fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.0)?;
        write_secret(path, &text)
    }

    /// The helper in charge of a registry.
    fn helper(&self, registry: &str) -> Option<String> {
        let own = self.0.get("credHelpers").and_then(Value::as_object);
        let own = own.and_then(|all| {
            all.iter()
                .find(|(key, _)| host_of(key) == canonical(registry))
                .and_then(|(_, name)| name.as_str())
        });
        let any = || self.0.get("credsStore").and_then(Value::as_str);
        own.or_else(any)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
    }

    fn find(&self, registry: &str, path: &str) -> Result<Option<Login>> {
        if let Some(helper) = self.helper(registry)
            && let Some(login) = from_helper(&helper, registry)?
        {
            return Ok(Some(login));
        }
        let Some(auths) = self.0.get("auths").and_then(Value::as_object) else {
            return Ok(None);
        };
        // The most specific name wins, as with containers' tools.
        let named: BTreeMap<String, &Value> = auths
            .iter()
            .map(|(key, entry)| (name_of(key), entry))
            .collect();
        let mut name = format!("{}/{path}", canonical(registry));
        loop {
            if let Some(login) = named.get(&name).and_then(|entry| login_of(entry)) {
                return Ok(Some(login));
            }
            match name.rfind('/') {
                Some(end) => name.truncate(end),
                None => return Ok(None),
            }
        }
    }
}

/// Writes a file that holds a secret: beside, then renamed, mode 0600.
///
/// # Errors
/// When it cannot be written.
pub fn write_secret(path: &Path, text: &[u8]) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    // A link is the user's: what it leads to is written.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(what)?;
    let draft = directory.join(format!(".{}", uuid::Uuid::new_v4()));
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut file| file.write_all(text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        // What cannot be written may not be there.
        let _ = fs::remove_file(&draft);
    }
    written.with_context(what)
}

fn is_denied(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
}

/// A registry's name without its other names.
fn canonical(registry: &str) -> String {
    match registry {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "docker.io".into(),
        other => other.to_ascii_lowercase(),
    }
}

/// The name that a login is stored under.
fn store_key(registry: &str) -> String {
    match canonical(registry).as_str() {
        "docker.io" => DOCKER_KEY.into(),
        other => other.to_owned(),
    }
}

/// A key of a login file as `host[:port][/path]`.
fn name_of(key: &str) -> String {
    let bare = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key)
        .trim_end_matches('/');
    let bare = bare
        .strip_suffix("/v1")
        .or_else(|| bare.strip_suffix("/v2"))
        .unwrap_or(bare);
    match bare.split_once('/') {
        Some((host, path)) => format!("{}/{path}", canonical(host)),
        None => canonical(bare),
    }
}

fn host_of(key: &str) -> String {
    let name = name_of(key);
    name.split('/').next().unwrap_or_default().to_owned()
}

fn login_of(entry: &Value) -> Option<Login> {
    let text = |name: &str| entry.get(name)?.as_str().filter(|t| !t.is_empty());
    if let Some(token) = text("identitytoken") {
        return Some(Login::Identity(token.to_owned()));
    }
    if let (Some(username), Some(password)) = (text("username"), text("password")) {
        return Some(Login::Password {
            username: username.to_owned(),
            password: password.to_owned(),
        });
    }
    let pair = BASE64_STANDARD.decode(text("auth")?.trim()).ok()?;
    let pair = String::from_utf8(pair).ok()?;
    let (username, password) = pair.trim_end_matches('\0').split_once(':')?;
    Some(Login::Password {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

fn from_helper(helper: &str, registry: &str) -> Result<Option<Login>> {
    let Ok(answer) = ask(helper, "get", &store_key(registry)) else {
        // It has none, or is not there; another entry may help.
        return Ok(None);
    };
    let answer: Value = serde_json::from_str(&answer)
        .map_err(|_| anyhow!("docker-credential-{helper} does not answer with JSON"))?;
    let text = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default();
    let (username, secret) = (text("Username"), text("Secret").to_owned());
    Ok(match (username, secret.is_empty()) {
        (_, true) => None,
        ("<token>", _) => Some(Login::Identity(secret)),
        (name, _) => Some(Login::Password {
            username: name.to_owned(),
            password: secret,
        }),
    })
}

/// Asks `docker-credential-NAME`.
fn ask(helper: &str, verb: &str, input: &str) -> Result<String> {
    let good = helper
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !good || helper.is_empty() {
        bail!("{helper:?} is not the name of a credential helper");
    }
    let program = format!("docker-credential-{helper}");
    let what = || format!("cannot run {program}");
    let mut child = Command::new(&program)
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(what)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read fails by its status.
        let _ = stdin.write_all(input.as_bytes());
    }
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout
            .take(1 << 20)
            .read_to_string(&mut answer)
            .with_context(what)?;
    }
    let status = child.wait().with_context(what)?;
    if !status.success() {
        bail!("{program} {verb} has failed: {status}");
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn credentials(text: &str) -> (tempfile::TempDir, Credentials) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        fs::write(&file, text).unwrap();
        let all = Credentials {
            given: None,
            files: vec![file.clone()],
            store: file,
        };
        (dir, all)
    }

    fn password(username: &str, password: &str) -> Option<Login> {
        Some(Login::Password {
            username: username.into(),
            password: password.into(),
        })
    }

    #[test]
    fn an_entry_is_for_one_host_and_port() {
        let (_dir, all) = credentials(
            r#"{"auths": {"a.org:5000": {"auth": "dTpw"}, "https://index.docker.io/v1/": {"auth": "ZDpk"},
                "q.org/team": {"username": "t", "password": "s"}, "q.org": {"auth": "cTpx"}}}"#,
        );
        let find = |registry: &str, path: &str| all.find(registry, path).unwrap();
        assert_eq!(find("a.org:5000", "x"), password("u", "p"));
        for other in ["a.org", "a.org:5001", "b.a.org:5000", "org:5000"] {
            assert_eq!(find(other, "x"), None, "{other}");
        }
        assert_eq!(find("docker.io", "library/x"), password("d", "d"));
        assert_eq!(find("q.org", "team/x"), password("t", "s"));
        assert_eq!(find("q.org", "teams/x"), password("q", "q"));
    }

    #[test]
    fn what_is_stored_is_found_and_erased_and_the_rest_stays() {
        let (_dir, all) = credentials(r#"{"HttpHeaders": {"a": "b"}, "auths": {}}"#);
        let login = password("me", "pa:ss").unwrap();
        all.store("r.org:1", &login).unwrap();
        assert_eq!(all.find("r.org:1", "x").unwrap(), Some(login));
        assert_eq!(all.list().unwrap(), ["r.org:1"]);
        let mode = fs::metadata(&all.store).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(all.erase("r.org:1").unwrap());
        assert!(!all.erase("r.org:1").unwrap());
        assert!(
            fs::read_to_string(&all.store)
                .unwrap()
                .contains("HttpHeaders")
        );
    }

    #[test]
    fn messages_hold_no_secret() {
        let (_dir, all) = credentials(r#"{"auths": {"a": {"auth": "c2VjcmV0"#);
        let error = format!("{:#}", all.find("a", "x").unwrap_err());
        assert!(!error.contains("c2VjcmV0"), "{error}");
        assert_eq!(format!("{:?}", password("u", "secret")), "Some(Login(…))");
    }
}
