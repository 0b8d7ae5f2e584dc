//! `inspect`: what an image says about itself. Its files are read, nothing of it is run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use super::fetch::RunAccess;
use crate::host::Host;
use crate::image::{self, Image};
use crate::{exit, say};

/// Options of `inspect`.
#[derive(clap::Args, Debug, Default)]
pub struct InspectArgs {
    /// The image: a SIF or squashfs file, or a directory
    pub image: PathBuf,
    /// Labels (shown when nothing else is asked for)
    #[arg(short = 'l', long)]
    pub labels: bool,
    /// The definition file
    #[arg(short = 'd', long)]
    pub deffile: bool,
    /// The runscript
    #[arg(short = 'r', long)]
    pub runscript: bool,
    /// The startscript
    #[arg(short = 's', long)]
    pub startscript: bool,
    /// The test script
    #[arg(short = 't', long)]
    pub test: bool,
    /// The environment scripts
    #[arg(short = 'e', long)]
    pub environment: bool,
    /// The help text
    #[arg(short = 'H', long)]
    pub helpfile: bool,
    /// As JSON
    #[arg(short = 'j', long)]
    pub json: bool,
    /// All of it, as JSON
    #[arg(long)]
    pub all: bool,
    /// Names of the applications (SCIF)
    #[arg(long)]
    pub list_apps: bool,
    /// Of this application (SCIF)
    #[arg(long, value_name = "NAME")]
    pub app: Option<String>,
}

/// What was found, in the form that clients of the peers read: empty parts are left out.
#[derive(Serialize, Default)]
struct Attributes {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    apps: BTreeMap<String, Parts>,
    #[serde(flatten)]
    own: Parts,
}

/// What clients expect around it.
#[derive(Serialize)]
struct Whole {
    data: Data,
    #[serde(rename = "type")]
    kind: &'static str,
}

#[derive(Serialize)]
struct Data {
    attributes: Attributes,
}

/// The parts of an image or of an application.
#[derive(Serialize, Default)]
struct Parts {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    environment: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    runscript: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    test: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    helpfile: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    deffile: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    startscript: String,
}

const APPS: &str = "/scif/apps";

/// Shows what an image says about itself.
///
/// # Errors
/// When the image cannot be read.
pub fn run(mut args: InspectArgs) -> Result<u8> {
    if args.all {
        (args.json, args.labels, args.deffile, args.runscript) = (true, true, true, true);
        (args.startscript, args.test, args.environment, args.helpfile) = (true, true, true, true);
    }
    let asked = [
        args.deffile,
        args.runscript,
        args.startscript,
        args.test,
        args.environment,
        args.helpfile,
        args.list_apps,
    ];
    args.labels |= !asked.contains(&true);
    let words = args.image.as_os_str().to_owned();
    let host = Host::read()?;
    let fetched = match super::action::is_elsewhere(&words, &host) {
        true => Some(super::action::image_path(
            &words,
            &host,
            &RunAccess::default(),
        )?),
        false => None,
    };
    if let Some(file) = &fetched {
        args.image.clone_from(&file.path);
    }
    let image = image::open(&args.image)
        .with_context(|| format!("Failed to open image {}", args.image.display()))?;
    let image = image.as_ref();
    let mut found = Attributes::default();
    match &args.app {
        Some(app) => {
            found.apps.insert(app.clone(), of_app(image, app, &args)?);
        }
        None => {
            found.own = of_image(image, &args)?;
            if args.list_apps || args.all {
                for app in names(image, APPS)? {
                    let parts = match (args.all, args.json) {
                        (true, _) => of_app(image, &app, &args)?,
                        (false, true) => of_app(image, &app, &everything())?,
                        (false, false) => Parts::default(),
                    };
                    found.apps.insert(app, parts);
                }
            }
        }
    }
    if args.json {
        super::print_json(&Whole {
            data: Data { attributes: found },
            kind: "container",
        })?;
        return Ok(exit::OK);
    }
    if args.list_apps {
        for app in found.apps.keys() {
            print(app)?;
        }
    }
    print_parts(&found.own)?;
    if args.app.is_some() {
        found.apps.values().try_for_each(print_parts)?;
    }
    Ok(exit::OK)
}

/// What `inspect --all --json` says of an image, for the SIF's own object `inspect-metadata.json`.
///
/// # Errors
/// When the image cannot be read.
pub fn describe(path: &Path) -> Result<Vec<u8>> {
    let image = image::open(path)?;
    let image = image.as_ref();
    let args = everything();
    let mut found = Attributes {
        own: of_image(image, &args)?,
        ..Attributes::default()
    };
    for app in names(image, APPS)? {
        let parts = of_app(image, &app, &args)?;
        found.apps.insert(app, parts);
    }
    let whole = Whole {
        data: Data { attributes: found },
        kind: "container",
    };
    serde_json::to_vec(&whole).context("cannot write what the image says about itself")
}

/// The options that ask for all parts.
fn everything() -> InspectArgs {
    InspectArgs {
        labels: true,
        deffile: true,
        runscript: true,
        startscript: true,
        test: true,
        environment: true,
        helpfile: true,
        ..InspectArgs::default()
    }
}

fn print_parts(parts: &Parts) -> Result<()> {
    for (name, value) in &parts.labels {
        print(&format!("{name}: {value}"))?;
    }
    for text in [
        &parts.deffile,
        &parts.runscript,
        &parts.startscript,
        &parts.test,
        &parts.helpfile,
    ] {
        if !text.is_empty() {
            print(text)?;
        }
    }
    for (path, text) in &parts.environment {
        print(&format!("=== {path} ===\n{text}\n"))?;
    }
    Ok(())
}

/// Text of an image drives no terminal.
fn print(text: &str) -> Result<()> {
    say::out(format_args!("{}\n", say::printable(text)))
}

fn of_image(image: &dyn Image, args: &InspectArgs) -> Result<Parts> {
    let mut parts = of_directory(image, "/.singularity.d", args)?;
    if args.deffile {
        parts.deffile = text(image, "/.singularity.d/Singularity")?;
    }
    Ok(parts)
}

fn of_app(image: &dyn Image, app: &str, args: &InspectArgs) -> Result<Parts> {
    of_directory(image, &format!("{APPS}/{app}/scif"), args)
}

fn of_directory(image: &dyn Image, directory: &str, args: &InspectArgs) -> Result<Parts> {
    let read = |wanted: bool, name: &str| match wanted {
        true => text(image, &format!("{directory}/{name}")),
        false => Ok(String::new()),
    };
    let mut parts = Parts {
        runscript: read(args.runscript, "runscript")?,
        startscript: read(args.startscript, "startscript")?,
        test: read(args.test, "test")?,
        helpfile: read(args.helpfile, "runscript.help")?,
        ..Parts::default()
    };
    let labels = read(args.labels, "labels.json")?;
    if !labels.is_empty() {
        parts.labels = serde_json::from_str(&labels)
            .with_context(|| format!("{directory}/labels.json of the image is damaged"))?;
    }
    if args.environment {
        let directory = format!("{directory}/env");
        for name in names(image, &directory)? {
            // What an image sets itself; the other scripts are the same in all images.
            let own = name.starts_with("10-docker")
                || name.starts_with('9') && name.ends_with("-environment.sh");
            let path = format!("{directory}/{name}");
            if own {
                let script = text(image, &path)?;
                if !script.is_empty() {
                    parts.environment.insert(path, script);
                }
            }
        }
    }
    Ok(parts)
}

/// A file's text without the line ends at its end; empty when it is not there.
fn text(image: &dyn Image, path: &str) -> Result<String> {
    let bytes = image.read(Path::new(path))?.unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.trim_end_matches('\n').to_owned())
}

fn names(image: &dyn Image, directory: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> = image
        .names(Path::new(directory))?
        .into_iter()
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}
