//! `job oci-run BUNDLE`: a container of Slurm's own `--container`, for `RunTimeRun` of `oci.conf(5)`.
//!
//! Slurm writes the words and the environment of the task into the bundle's `config.json`; up to 22.05 that is the only place
//! that has them (`%@` is empty there). The process becomes `capsid exec`; nothing else of the bundle is used.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::given;
use serde::Deserialize;

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
}

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
    let error = Command::new("/proc/self/exe")
        .arg0("capsid")
        .args(words(&args.bundle, &config))
        .env_clear()
        .envs(config.process.env.iter().filter_map(|e| e.split_once('=')))
        .exec();
    Err(error).context("cannot execute ourselves")
}

fn read(path: &Path) -> Result<Config> {
    Ok(serde_json::from_str(&given::string(path, MAX)?)?)
}

fn words(bundle: &Path, config: &Config) -> Vec<OsString> {
    let mut words = vec![OsString::from("exec")];
    if let Some(cwd) = &config.process.cwd {
        words.extend(["--pwd".into(), cwd.into()]);
    }
    words.push(bundle.join(&config.root.path).into());
    words.extend(config.process.args.iter().map(OsString::from));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_becomes_an_exec() {
        let text = r#"{"root":{"path":"rootfs"},"process":{"args":["a","-b c"],"cwd":"/x"}}"#;
        let config = serde_json::from_str(text).unwrap();
        let expected = ["exec", "--pwd", "/x", "/b/rootfs", "a", "-b c"];
        assert_eq!(
            words(Path::new("/b"), &config),
            expected.map(OsString::from)
        );
    }
}
