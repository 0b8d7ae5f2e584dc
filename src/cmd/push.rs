//! `push`: a SIF to a registry or a library.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::transfer::{self, Access, Machine};
use super::{Usage, parse_with_environment};
use crate::host::Host;
use crate::net::{self, Reference};
use crate::sif::{DataType, Sif};
use crate::{exit, given, say};

/// Options of `push`.
#[derive(clap::Args, Debug)]
pub struct PushArgs {
    /// Push an image without a signature to a library
    #[arg(short = 'U', long)]
    allow_unsigned: bool,
    /// What the library or registry says of the image
    #[arg(short = 'D', long, value_name = "TEXT")]
    description: Option<String>,
    /// Library to push to: an address
    #[arg(long, value_name = "URL")]
    library: Option<String>,
    /// An annotation of the manifest (oras): NAME=VALUE, may be given again
    #[arg(long, value_name = "NAME=VALUE")]
    annotation: Vec<String>,
    #[command(flatten)]
    access: Access,
    /// FILE and URI
    #[arg(value_name = "FILE URI", num_args = 0.., hide = true)]
    words: Vec<OsString>,
}

/// Runs the command.
///
/// # Errors
/// When the image cannot be read, or nobody takes it.
pub fn run(words: &[OsString]) -> Result<u8> {
    let host = Host::read()?;
    let args: PushArgs = parse_with_environment("push", words, &host)?;
    let [file, uri] = args.words.as_slice() else {
        return Err(Usage {
            command: "push".into(),
            text: format!("accepts 2 arg(s), received {}", args.words.len()),
        }
        .into());
    };
    let file = PathBuf::from(file);
    let uri = uri.to_string_lossy();
    let reference: Reference = match uri.split_once(':') {
        Some((scheme, _)) if Reference::is_scheme(scheme) => uri.parse()?,
        Some((scheme, _)) => bail!("Unsupported transport type: {scheme}"),
        None => bail!("{uri:?} has no transport: write oras:// or library://"),
    };
    let options = transfer::options(
        &host,
        &args.access,
        &Machine::default(),
        args.library.as_deref(),
    )?;
    match &reference {
        Reference::Oras(repository) => {
            let mut annotations = annotations(&args.annotation)?;
            const DESCRIPTION: &str = "org.opencontainers.image.description";
            if let Some(text) = &args.description
                && !annotations.iter().any(|(name, _)| name == DESCRIPTION)
            {
                annotations.push((DESCRIPTION.to_owned(), text.clone()));
            }
            let digest = net::oci::push(&file, repository, &options, &annotations)
                .context("Unable to push image to oci registry")?;
            say::info(format_args!("Upload complete: {digest}"));
        }
        Reference::Library(name) => {
            let sif = read(&file)?;
            let signed = sif
                .objects
                .iter()
                .any(|o| o.data_type == DataType::Signature);
            if !signed && !args.allow_unsigned {
                bail!(
                    "Unable to push image to library: {} is not signed: sign it, or push it with --allow-unsigned",
                    file.display()
                );
            }
            let description = args.description.as_deref().unwrap_or("No description");
            let hash = net::library::push(&file, name, sif.arch, description, &options)
                .context("Unable to push image to library")?;
            say::info(format_args!("Upload complete: {hash}"));
        }
        Reference::Docker(_) => bail!(
            "a SIF cannot be pushed as a Docker image: push it as oras://{}",
            uri.trim_start_matches("docker:").trim_start_matches("//")
        ),
        Reference::Http(_) => bail!(
            "push to {} is not supported: oras:// and library:// are",
            uri
        ),
    }
    Ok(exit::OK)
}

fn read(path: &Path) -> Result<Sif> {
    let what = || format!("cannot read {}", path.display());
    let file = given::open(path).with_context(what)?;
    Sif::read(&file)
        .with_context(|| format!("{} is no SIF: only SIFs can be pushed", path.display()))
}

fn annotations(texts: &[String]) -> Result<Vec<(String, String)>> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => bail!("--annotation {text:?}: write it as NAME=VALUE"),
    };
    texts.iter().map(pair).collect()
}
