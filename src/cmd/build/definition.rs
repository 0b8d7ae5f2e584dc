//! The definition that a build follows: a file's, or two lines made for an image or an address.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};

use super::BuildArgs;
use crate::build::deffile::{self, Def, Unused};
use crate::host::Host;
use crate::{given, image, say};

/// Where a definition comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A file with its sections.
    Definition,
    /// An image or an address: a definition of two lines.
    Image,
}

/// Reads the source: an image and an address become a definition of two lines.
pub(super) fn definition(
    args: &BuildArgs,
    source: &OsStr,
    text: &str,
    host: &Host,
) -> Result<(Def, Origin)> {
    let what = || format!("Unable to build from {text}");
    let path = host.cwd.join(source);
    let there = std::fs::metadata(&path);
    if there.is_err()
        && let Some((agent, from)) = address(text)
    {
        return Ok((two_lines(&agent, &from)?, Origin::Image));
    }
    let meta = there
        .map_err(|error| {
            anyhow!(
                "unable to open file {text}: open {text}: {}",
                say::word(&error)
            )
        })
        .with_context(what)?;
    // Standard input and a shell's <(program) are definitions; they cannot be looked at first.
    if meta.is_dir() || meta.is_file() && looks_like_image(&path).with_context(what)? {
        image::open(&path).with_context(what)?;
        return Ok((two_lines("localimage", text)?, Origin::Image));
    }
    let bytes = given::text(&path, deffile::MAX_LEN).with_context(what)?;
    let parsed = if args.json {
        deffile::parse_json(text, &bytes)
    } else {
        let unused = if args.warn_unused_build_args {
            Unused::Warn
        } else {
            Unused::Refuse
        };
        deffile::parse(text, &bytes, &build_args(args, host)?, unused)
    };
    let def = parsed
        .context("while parsing definition")
        .with_context(what)?;
    Ok((def, Origin::Definition))
}

/// The agent and the rest of an address.
fn address(text: &str) -> Option<(String, String)> {
    let (scheme, rest) = text.split_once(':')?;
    match scheme {
        "docker" | "library" | "oras" | "shub" => {
            Some((scheme.into(), rest.strip_prefix("//")?.into()))
        }
        "http" | "https" => Some((scheme.into(), rest.strip_prefix("//")?.into())),
        "docker-daemon" | "docker-archive" | "oci" | "oci-archive" => Some((
            scheme.into(),
            rest.strip_prefix("//").unwrap_or(rest).into(),
        )),
        "instance" => Some(("localimage".into(), text.into())),
        _ => None,
    }
}

/// A definition that stands for "just this image".
fn two_lines(agent: &str, from: &str) -> Result<Def> {
    if from.contains(['\n', '\r']) {
        bail!("{from:?}: a name with a line end cannot be built from");
    }
    let mut stage = deffile::Stage {
        text: format!("bootstrap: {agent}\nfrom: {from}\n\n"),
        ..deffile::Stage::default()
    };
    stage.header.insert("bootstrap".into(), agent.into());
    stage.header.insert("from".into(), from.into());
    Ok(Def {
        stages: vec![stage],
        warnings: Vec::new(),
    })
}

/// Whether a file begins as no text does.
fn looks_like_image(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    given::open(path)?.take(512).read_to_end(&mut head)?;
    Ok(head.contains(&0)
        || head.starts_with(b"hsqs")
        || head.starts_with(b"#!/usr/bin/env run-singularity"))
}

/// Whether a file is a definition: by its name, or a text with a line that begins one. An empty file is none.
pub(super) fn is_definition(path: &Path, file: &std::fs::File) -> std::io::Result<bool> {
    let mut head = Vec::new();
    file.take(64 << 10).read_to_end(&mut head)?;
    if head.is_empty() || head.contains(&0) {
        return Ok(false);
    }
    let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let key = |line: &str| line.trim_start().starts_with("bootstrap:");
    let json = text.trim_start().starts_with(['{', '[']) && text.contains("\"bootstrap\"");
    let named = path.extension().is_some_and(|e| e == "def");
    Ok(named || json || text.lines().any(key))
}

/// Build arguments: those of files first, as those of the command line beat them.
fn build_args(args: &BuildArgs, host: &Host) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    for file in &args.build_arg_file {
        let path = host.cwd.join(file);
        let shown = file.display().to_string();
        let text = given::string(&path, deffile::MAX_LEN)
            .with_context(|| format!("cannot read {shown} (--build-arg-file)"))?;
        pairs.extend(deffile::template::pairs(&shown, &text)?);
    }
    for text in &args.build_arg {
        pairs.push(deffile::template::pair(text).context("--build-arg")?);
    }
    Ok(pairs)
}
