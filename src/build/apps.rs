//! SCIF applications (Scientific Filesystem): `/scif/apps/NAME` with their scripts, and what the environment says of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::deffile::{App, Stage};
use super::metadata::{tabbed, with_shebang};
use super::tree::Tree;
use super::{Settings, files};

fn root(app: &App) -> PathBuf {
    Path::new("/scif/apps").join(&app.name)
}

/// Makes the applications of a stage: directories, scripts, environment, files.
///
/// # Errors
/// Naming the file that cannot be written.
pub fn skeleton(tree: &Tree, stage: &Stage, settings: &Settings) -> Result<()> {
    let mut exports = String::new();
    for app in &stage.apps {
        make(tree, app, settings)
            .with_context(|| format!("cannot make the application {}", app.name))?;
        exports.push_str(&globals(app));
    }
    let path = Path::new("/.singularity.d/env/94-appsbase.sh");
    let mut text = tree.read(path)?.unwrap_or_default();
    text.extend_from_slice(exports.as_bytes());
    tree.write(path, &text, 0o755)
}

fn make(tree: &Tree, app: &App, settings: &Settings) -> Result<()> {
    let (root, meta) = (root(app), root(app).join("scif"));
    for directory in ["bin", "lib", "scif/env"] {
        tree.directory(&root.join(directory))?;
    }
    let data = Path::new("/scif/data").join(&app.name);
    for directory in ["input", "output"] {
        tree.directory(&data.join(directory))?;
    }
    tree.write(
        &meta.join("env/01-base.sh"),
        base(&app.name).as_bytes(),
        0o755,
    )?;
    if let Some(text) = &app.environment {
        tree.write(&meta.join("env/90-environment.sh"), text.as_bytes(), 0o755)?;
    }
    for (name, script) in [
        ("runscript", &app.run),
        ("startscript", &app.start),
        ("test", &app.test),
    ] {
        if let Some(script) = script {
            tree.write(&meta.join(name), with_shebang(script).as_bytes(), 0o755)?;
        }
    }
    if let Some(text) = &app.help {
        tree.write(&meta.join("runscript.help"), text.as_bytes(), 0o644)?;
    }
    if let Some(labels) = &app.labels {
        let mut labels: BTreeMap<String, String> = labels.iter().cloned().collect();
        labels.insert("SCIF_APP_NAME".into(), app.name.clone());
        tree.write(&meta.join("labels.json"), &tabbed(&labels)?, 0o644)?;
    }
    for (source, target) in &app.files {
        let target = match target {
            Some(target) => root.join(target.trim_start_matches('/')),
            None => root.clone(),
        };
        files::from_host(tree, source, Some(&target), settings)?;
    }
    Ok(())
}

fn base(name: &str) -> String {
    format!(
        "#!/bin/sh\n\nSCIF_APPNAME={name}\nSCIF_APPROOT=\"/scif/apps/{name}\"\nSCIF_APPMETA=\"/scif/apps/{name}/scif\"\n\
         SCIF_DATA=\"/scif/data\"\nSCIF_APPDATA=\"/scif/data/{name}\"\nSCIF_APPINPUT=\"/scif/data/{name}/input\"\n\
         SCIF_APPOUTPUT=\"/scif/data/{name}/output\"\n\
         export SCIF_APPDATA SCIF_APPNAME SCIF_APPROOT SCIF_APPMETA SCIF_APPINPUT SCIF_APPOUTPUT SCIF_DATA\n"
    )
}

/// Lines for `94-appsbase.sh`.
fn globals(app: &App) -> String {
    let name = &app.name;
    let var: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    let mut text = format!(
        "## App Global Exports For: {name}\n\nSCIF_APPDATA_{var}=/scif/data/{name}\nSCIF_APPMETA_{var}=/scif/apps/{name}/scif\n\
         SCIF_APPROOT_{var}=/scif/apps/{name}\nSCIF_APPBIN_{var}=/scif/apps/{name}/bin\nSCIF_APPLIB_{var}=/scif/apps/{name}/lib\n\n\
         export SCIF_APPDATA_{var} SCIF_APPMETA_{var} SCIF_APPROOT_{var} SCIF_APPBIN_{var} SCIF_APPLIB_{var}\n"
    );
    for (there, export, file) in [
        (app.environment.is_some(), "ENV", "env/90-environment.sh"),
        (app.labels.is_some(), "LABELS", "labels.json"),
        (app.run.is_some(), "RUN", "runscript"),
        (app.start.is_some(), "START", "startscript"),
    ] {
        if there {
            text.push_str(&format!(
                "export SCIF_APP{export}_{var}=\"/scif/apps/{name}/scif/{file}\"\n"
            ));
        }
    }
    text
}

/// What `%appinstall` sections add to the end of `%post`.
pub fn installs(stage: &Stage) -> String {
    let mut text = String::new();
    for app in stage
        .apps
        .iter()
        .filter(|app| !app.install.trim().is_empty())
    {
        let (root, body) = (root(app), &app.install);
        let root = root.display();
        text.push_str(&format!(
            "\ncd /\n. {root}/scif/env/01-base.sh\ncd {root}\n{body}\n\ncd /\n"
        ));
    }
    text
}
