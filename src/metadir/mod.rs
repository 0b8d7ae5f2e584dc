//! `/.singularity.d`: what an image says about itself, as definition files of Singularity and Apptainer lay it out.
//!
//! Runtimes of any age must find their way in an image: new ones read `env/*.sh` and the scripts by name, old ones start the
//! scripts in `actions`, and links at the root lead to what the first versions looked for.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::{Context, Result};

/// The directory, from the image's root.
pub const DIRECTORY: &str = ".singularity.d";

/// What differs between images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The definition's text.
    pub definition: String,
    /// Shell text for the environment, without a `#!` line.
    pub environment: String,
    /// Runs for `run`, with its `#!` line.
    pub runscript: Option<String>,
    /// Runs for `instance start`, with its `#!` line.
    pub startscript: Option<String>,
    /// Runs for `test`, with its `#!` line.
    pub test: Option<String>,
    /// Shown by `run-help`.
    pub help: Option<String>,
    /// Names and values.
    pub labels: Vec<(String, String)>,
}

const ENVIRONMENT: [(&str, &str); 4] = [
    ("01-base.sh", include_str!("base.sh")),
    ("95-apps.sh", include_str!("apps.sh")),
    ("99-base.sh", include_str!("libs.sh")),
    ("99-runtimevars.sh", include_str!("runtimevars.sh")),
];

/// The scripts that old runtimes start, with what they do after the environment is set.
const ACTIONS: [(&str, &str); 5] = [
    ("exec", "exec \"$@\""),
    ("run", "exec /.singularity.d/runscript \"$@\""),
    ("shell", "exec \"${SINGULARITY_SHELL:-/bin/sh}\" \"$@\""),
    ("start", "exec /.singularity.d/startscript \"$@\""),
    ("test", "exec /.singularity.d/test \"$@\""),
];

const LINKS: [(&str, &str); 6] = [
    ("singularity", ".singularity.d/runscript"),
    ("environment", ".singularity.d/env/90-environment.sh"),
    (".exec", ".singularity.d/actions/exec"),
    (".run", ".singularity.d/actions/run"),
    (".shell", ".singularity.d/actions/shell"),
    (".test", ".singularity.d/actions/test"),
];

/// Directories that an image must have.
const ROOT: [&str; 9] = [
    "dev",
    "etc",
    "home",
    "proc",
    "root",
    "sys",
    "tmp",
    "var/tmp",
    ".singularity.d/libs",
];

/// Writes the directory, the links and the mount points into the tree of a new image. What is there stays.
///
/// # Errors
/// Naming the file that cannot be written.
pub fn write(root: &Path, contents: &Contents) -> Result<()> {
    for directory in ROOT {
        let path = root.join(directory);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    for file in ["etc/hosts", "etc/resolv.conf"] {
        if fs::symlink_metadata(root.join(file)).is_err() {
            put(root, file, "", 0o644)?;
        }
    }
    for (name, text) in ENVIRONMENT {
        put(root, &format!("{DIRECTORY}/env/{name}"), text, 0o755)?;
    }
    let environment = format!(
        "{}\n{}\n",
        include_str!("environment.sh"),
        contents.environment
    );
    put(
        root,
        &format!("{DIRECTORY}/env/90-environment.sh"),
        &environment,
        0o755,
    )?;
    for (name, action) in ACTIONS {
        let text = include_str!("action.sh").replace("\n@ACTION@", &format!("\n{action}"));
        put(root, &format!("{DIRECTORY}/actions/{name}"), &text, 0o755)?;
    }
    put(
        root,
        &format!("{DIRECTORY}/Singularity"),
        &contents.definition,
        0o644,
    )?;
    let labels: serde_json::Map<_, _> = contents
        .labels
        .iter()
        .map(|(k, v)| (k.clone(), v.clone().into()))
        .collect();
    put(
        root,
        &format!("{DIRECTORY}/labels.json"),
        &serde_json::to_string_pretty(&labels)?,
        0o644,
    )?;
    for (name, text, mode) in [
        ("runscript", &contents.runscript, 0o755),
        ("startscript", &contents.startscript, 0o755),
        ("test", &contents.test, 0o755),
        ("runscript.help", &contents.help, 0o644),
    ] {
        if let Some(text) = text {
            put(root, &format!("{DIRECTORY}/{name}"), text, mode)?;
        }
    }
    for (name, target) in LINKS {
        let path = root.join(name);
        if fs::symlink_metadata(&path).is_err() {
            symlink(target, &path)
                .with_context(|| format!("cannot create the link {}", path.display()))?;
        }
    }
    Ok(())
}

fn put(root: &Path, name: &str, text: &str, mode: u32) -> Result<()> {
    let path = root.join(name);
    let write = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
