//! What an image says about itself, written in the way of the peers: what a base image has is kept and added to.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use super::deffile::{Script, Stage};
use super::tree::Tree;
use super::{Part, Settings};
use crate::metadir::{self, Body, Contents, Existing};
use crate::say;

const DEFAULT_RUNSCRIPT: &str =
    "#!/bin/sh\necho \"There is no runscript defined for this container\"\n";
const DEFAULT_STARTSCRIPT: &str = "#!/bin/sh\n";

fn inside(name: &str) -> std::path::PathBuf {
    Path::new("/").join(metadir::DIRECTORY).join(name)
}

/// Makes the directories, mount points, scripts and links that every image has, where they are missing.
///
/// # Errors
/// Naming the file that cannot be written.
pub fn skeleton(tree: &Tree) -> Result<()> {
    for item in metadir::items(&Contents::default())? {
        let path = Path::new("/").join(&item.path);
        let own = item.path.ends_with("Singularity") || item.path.ends_with("labels.json");
        match &item.body {
            _ if own => {}
            Body::Directory if !tree.is_directory(&path) => {
                let fd = tree.directory(&path)?;
                let mode = rustix::fs::Mode::from_raw_mode(item.mode.into());
                rustix::fs::fchmod(&fd, mode)
                    .with_context(|| format!("cannot change {}", path.display()))?;
            }
            Body::Directory => {}
            Body::File(bytes) if !exists(tree, &path) => {
                tree.write(&path, bytes, item.mode.into())?
            }
            Body::File(_) => {}
            Body::Link(target) => link(tree, &path, target, item.existing)?,
        }
    }
    Ok(())
}

/// Whether the name is taken, by a link that leads nowhere too.
fn exists(tree: &Tree, path: &Path) -> bool {
    use rustix::fs::OFlags;
    tree.open_at(path, OFlags::PATH | OFlags::NOFOLLOW).is_ok()
}

/// A link that leads elsewhere is made anew; what is no link stays.
fn link(tree: &Tree, path: &Path, target: &str, _existing: Existing) -> Result<()> {
    let what = || format!("cannot create the link {} in the image", path.display());
    let (parent, name) = tree.parent(path)?;
    match rustix::fs::readlinkat(&parent, &name, Vec::new()) {
        Ok(there) if there.to_bytes() == target.as_bytes() => return Ok(()),
        Ok(_) => tree.remove(path),
        Err(rustix::io::Errno::NOENT) => {}
        Err(_) => return Ok(()),
    }
    rustix::fs::symlinkat(target, &parent, &name).with_context(what)
}

/// Writes definition, help, labels, environment and scripts of a stage.
///
/// # Errors
/// Naming the file that cannot be written.
pub fn write(tree: &Tree, stage: &Stage, whole_text: &str, settings: &Settings) -> Result<()> {
    history(tree)?;
    tree.write(&inside("Singularity"), whole_text.as_bytes(), 0o644)?;
    if !stage.help.is_empty() {
        say::info(format_args!("Adding help info"));
        tree.write(
            &inside("runscript.help"),
            format!("{}\n", stage.help.text).as_bytes(),
            0o644,
        )?;
    }
    labels(tree, stage, settings)?;
    if settings.wants(Part::Environment) {
        environment(tree, &stage.environment)?;
    }
    script(
        tree,
        "startscript",
        &stage.startscript,
        Some(DEFAULT_STARTSCRIPT),
    )?;
    script(tree, "runscript", &stage.runscript, Some(DEFAULT_RUNSCRIPT))?;
    if settings.wants(Part::Test) {
        script(tree, "test", &stage.test, None)?;
    }
    Ok(())
}

/// The definition that a base image was made from goes to `bootstrap_history`.
fn history(tree: &Tree) -> Result<()> {
    let Some(old) = tree.read(&inside("Singularity"))? else {
        return Ok(());
    };
    for number in 0.. {
        let path = inside(&format!("bootstrap_history/Apptainer{number}"));
        if !exists(tree, &path) {
            return tree.write(&path, &old, 0o644);
        }
    }
    Ok(())
}

/// Shell text is added behind what a base image has.
fn environment(tree: &Tree, script: &Script) -> Result<()> {
    if script.is_empty() {
        return Ok(());
    }
    say::info(format_args!("Adding environment to container"));
    let path = inside("env/90-environment.sh");
    let mut text = tree.read(&path)?.unwrap_or_else(|| b"#!/bin/sh\n".to_vec());
    text.extend_from_slice(format!("\n{}\n", script.text).as_bytes());
    tree.write(&path, &text, 0o755)
}

fn script(tree: &Tree, name: &str, script: &Script, default: Option<&str>) -> Result<()> {
    let path = inside(name);
    if script.is_empty() {
        return match default {
            Some(text) if !exists(tree, &path) => tree.write(&path, text.as_bytes(), 0o755),
            _ => Ok(()),
        };
    }
    say::info(format_args!(
        "Adding {}",
        if name == "test" { "testscript" } else { name }
    ));
    tree.write(&path, with_shebang(script).as_bytes(), 0o755)
}

/// The script with its interpreter: its own, or `/bin/sh`; the section's arguments follow it.
pub fn with_shebang(script: &Script) -> String {
    let (mut shebang, text) = match script.text.trim_start().strip_prefix("#!") {
        Some(own) => {
            let (first, rest) = own.split_once('\n').unwrap_or((own, ""));
            (format!("#!{}", first.trim()), rest)
        }
        None => ("#!/bin/sh".to_owned(), script.text.as_str()),
    };
    let args = script.args.split('#').next().unwrap_or_default().trim();
    if !args.is_empty() {
        shebang = format!("{shebang} {args}");
    }
    format!("{shebang}\n\n{text}\n")
}

/// Labels of the base image, of the build, of the definition, and of what `%post` wrote to `$APPTAINER_LABELS`.
fn labels(tree: &Tree, stage: &Stage, settings: &Settings) -> Result<()> {
    let path = inside("labels.json");
    let old = tree.read(&path)?.unwrap_or_default();
    // A base image's labels may be anything; what is no text is not kept.
    let old: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&old).unwrap_or_default();
    let mut labels: BTreeMap<String, String> = old
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())))
        .collect();
    let prefix = "org.label-schema";
    labels.retain(|key, _| !key.starts_with("org.label-schema.usage.singularity.deffile."));
    let mut set = |key: String, value: &str| drop(labels.insert(key, value.to_owned()));
    for (key, value) in metadir::labels::of_build(settings.arch, settings.time_s, &[]) {
        set(key, &value);
    }
    if !stage.help.is_empty() {
        for name in ["usage", "usage.apptainer.runscript.help"] {
            set(format!("{prefix}.{name}"), "/.singularity.d/runscript.help");
        }
    }
    for (key, value) in &stage.header {
        set(format!("{prefix}.usage.singularity.deffile.{key}"), value);
    }
    let written = tree
        .read(Path::new(super::sections::LABELS))?
        .unwrap_or_default();
    tree.remove(Path::new(super::sections::LABELS));
    let written = String::from_utf8_lossy(&written).into_owned();
    let mut new: Vec<(String, String)> = Vec::new();
    if settings.wants(Part::Labels) {
        if !stage.labels.is_empty() {
            say::info(format_args!("Adding labels"));
        }
        new.extend(stage.labels.iter().cloned());
    }
    new.extend(written.lines().filter_map(|line| {
        let line = line.trim();
        let (key, value) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        (!key.is_empty() && !key.starts_with('#'))
            .then(|| (key.to_owned(), value.trim().to_owned()))
    }));
    let before = labels.clone();
    for (key, value) in new {
        if before.contains_key(&key) && !settings.force {
            say::warn(format_args!(
                "Label: {key} already exists and force option is false, not overwriting"
            ));
        } else {
            labels.insert(key, value);
        }
    }
    tree.write(&path, &tabbed(&labels)?, 0o644)
}

/// JSON indented by tabs, as the peers write it.
pub fn tabbed(labels: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let form = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, form);
    serde::Serialize::serialize(labels, &mut serializer).context("cannot write labels as JSON")?;
    Ok(text)
}
