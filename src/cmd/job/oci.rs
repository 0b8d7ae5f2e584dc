//! `job oci-run BUNDLE`: a container of Slurm's own `--container`, for `RunTimeRun` of `oci.conf(5)`.
//!
//! Slurm writes the words and the environment of the task into the bundle's `config.json`; up to 22.05 that is the only place
//! that has them (`%@` is empty there). The process becomes `capsid exec` with the bundle's root, binds, program, environment
//! and directory. `/proc`, `/dev` and the like are `exec`'s own; what else the bundle asks for is named in a warning.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::given;
use serde::Deserialize;

use crate::say;

/// Bytes of a `config.json` at most.
const MAX: u64 = 4 << 20;

/// The bundle that Slurm has made.
#[derive(clap::Args, Debug)]
pub struct OciRunArgs {
    /// The bundle's directory (%b)
    pub bundle: PathBuf,
}

#[derive(Deserialize)]
struct Config {
    root: Root,
    process: Process,
    #[serde(default)]
    mounts: Vec<Mount>,
}

#[derive(Deserialize)]
struct Mount {
    destination: PathBuf,
    #[serde(default)]
    source: Option<PathBuf>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    options: Vec<String>,
}

/// Where `exec` makes mounts of its own.
const OWN: [&str; 5] = ["/proc", "/sys", "/dev", "/tmp", "/run"];

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Deserialize)]
struct Process {
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    cwd: Option<String>,
}

/// Becomes the program of a bundle in a container of its root.
///
/// # Errors
/// When the bundle cannot be read, or names no program.
pub fn run(args: &OciRunArgs) -> Result<u8> {
    let path = args.bundle.join("config.json");
    let config = read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if config.process.args.is_empty() {
        bail!("{} names no program (process.args)", path.display());
    }
    let (words, left_out) = words(&args.bundle, &config);
    for what in left_out {
        say::warn(format_args!(
            "{}: {what} is left out: only binds are made",
            path.display()
        ));
    }
    let error = Command::new("/proc/self/exe")
        .arg0("capsid")
        .args(words)
        .env_clear()
        .envs(environment(&config.process.env))
        .exec();
    Err(error).context("cannot execute ourselves")
}

fn read(path: &Path) -> Result<Config> {
    Ok(serde_json::from_str(&given::string(path, MAX)?)?)
}

/// The program's environment, as `exec` is told: a bundle has the last word, also on what an image sets and on what `exec`
/// takes from no caller (`PATH`, `LD_LIBRARY_PATH`).
fn environment(env: &[String]) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (key, value) in env.iter().filter_map(|e| e.split_once('=')) {
        all.push((key.to_owned(), value.to_owned()));
        let is_name =
            !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if is_name
            && key != "HOME"
            && !key.starts_with("APPTAINER")
            && !key.starts_with("SINGULARITY")
        {
            all.push((format!("APPTAINERENV_{key}"), value.to_owned()));
        }
    }
    all
}

/// The words of `exec`, and the mounts that it does not make.
fn words(bundle: &Path, config: &Config) -> (Vec<OsString>, Vec<String>) {
    let mut words = vec![OsString::from("exec")];
    let mut left_out = Vec::new();
    for mount in &config.mounts {
        match bind(bundle, mount) {
            Some(option) => words.extend(["--mount".into(), option]),
            None if OWN.iter().any(|own| mount.destination.starts_with(own)) => {}
            None => left_out.push(format!(
                "the mount of {} ({})",
                mount.destination.display(),
                mount.kind.as_deref().unwrap_or("of no type")
            )),
        }
    }
    if let Some(cwd) = &config.process.cwd {
        words.extend(["--pwd".into(), cwd.into()]);
    }
    words.push(bundle.join(&config.root.path).into());
    words.extend(config.process.args.iter().map(OsString::from));
    (words, left_out)
}

/// A bind as the option `--mount` has it, whose fields are those of a line of CSV.
fn bind(bundle: &Path, mount: &Mount) -> Option<OsString> {
    let has = |option: &str| mount.options.iter().any(|o| o == option);
    let is_bind = mount.kind.as_deref() == Some("bind") || has("bind") || has("rbind");
    let source = mount.source.as_ref().filter(|_| is_bind)?;
    let quoted = |key: &str, path: &Path| {
        let mut field = OsString::from(format!("\"{key}="));
        field.push(OsString::from_vec(
            path.as_os_str()
                .as_bytes()
                .iter()
                .flat_map(|b| match b {
                    b'"' => vec![b'"', b'"'],
                    other => vec![*other],
                })
                .collect(),
        ));
        field.push("\"");
        field
    };
    let mut option = OsString::from("type=bind,");
    option.push(quoted("source", &bundle.join(source)));
    option.push(",");
    option.push(quoted("destination", &mount.destination));
    if has("ro") {
        option.push(",ro");
    }
    Some(option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_becomes_an_exec() {
        let text = r#"{"root":{"path":"rootfs"},"process":{"args":["a","-b c"],"cwd":"/x"}}"#;
        let config = serde_json::from_str(text).unwrap();
        let expected = ["exec", "--pwd", "/x", "/b/rootfs", "a", "-b c"];
        let (words, left_out) = words(Path::new("/b"), &config);
        assert_eq!(words, expected.map(OsString::from));
        assert!(left_out.is_empty());
    }

    #[test]
    fn binds_are_made_and_the_rest_is_named() {
        let text = r#"{"root":{"path":"r"},"process":{"args":["a"]},"mounts":[
            {"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"/dev/shm","type":"tmpfs","source":"shm"},
            {"destination":"/data","type":"bind","source":"/d,a \"b","options":["rbind","ro"]},
            {"destination":"/s","type":"none","source":"s","options":["bind","rw"]},
            {"destination":"/scratch","type":"tmpfs","source":"tmpfs"},
            {"destination":"/odd"}]}"#;
        let (words, left_out) = words(Path::new("/b"), &serde_json::from_str(text).unwrap());
        let expected = [
            "exec",
            "--mount",
            "type=bind,\"source=/d,a \"\"b\",\"destination=/data\",ro",
            "--mount",
            "type=bind,\"source=/b/s\",\"destination=/s\"",
            "/b/r",
            "a",
        ];
        assert_eq!(words, expected.map(OsString::from));
        let named = [
            "the mount of /scratch (tmpfs)",
            "the mount of /odd (of no type)",
        ];
        assert_eq!(left_out, named);
    }

    #[test]
    fn environment_is_the_bundles() {
        let env = ["PATH=/b", "LD_LIBRARY_PATH=/l", "HOME=/h", "a.b=c", "X=y=z"].map(String::from);
        let pairs: Vec<String> = environment(&env)
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let expected = [
            "PATH=/b",
            "APPTAINERENV_PATH=/b",
            "LD_LIBRARY_PATH=/l",
            "APPTAINERENV_LD_LIBRARY_PATH=/l",
            "HOME=/h",
            "a.b=c",
            "X=y=z",
            "APPTAINERENV_X=y=z",
        ];
        assert_eq!(pairs, expected);
    }
}
