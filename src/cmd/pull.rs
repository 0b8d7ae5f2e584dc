//! `pull`: an image from elsewhere to a file.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::transfer::{self, Access, Machine, Store};
use super::{Usage, parse_with_environment};
use crate::build::convert;
use crate::cache::{self, Draft, DraftDirectory};
use crate::host::Host;
use crate::net::{self, Options, Reference};
use crate::oci::config::Origin;
use crate::oci::layers::Owners;
use crate::{exit, say};

/// Options of `pull`.
#[derive(clap::Args, Debug)]
pub struct PullArgs {
    /// Overwrite a file that exists
    #[arg(short = 'F', long)]
    force: bool,
    /// Directory for the image
    #[arg(long, value_name = "DIRECTORY")]
    dir: Option<PathBuf>,
    /// Name of the file
    #[arg(long, hide = true, value_name = "FILE")]
    name: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
    /// Library to pull from: an address
    #[arg(long, value_name = "URL")]
    library: Option<String>,
    /// Neither use nor fill the cache
    #[arg(long)]
    disable_cache: bool,
    /// Keep half-made files when something fails
    #[arg(long)]
    no_cleanup: bool,
    #[command(flatten)]
    access: Access,
    /// Into a directory instead of a file
    #[arg(short = 's', long)]
    sandbox: bool,
    /// The same image gives the same bytes (always the case here; for scripts that ask)
    #[arg(long, hide = true)]
    reproducible: bool,
    /// Of old: signatures are checked by verify
    #[arg(short = 'U', long, alias = "allow-unauthenticated", hide = true)]
    allow_unsigned: bool,
    /// [FILE] and URI
    #[arg(value_name = "[FILE] URI", num_args = 0.., hide = true)]
    words: Vec<OsString>,
}

/// Runs the command.
///
/// # Errors
/// When the image cannot be had or the file not be written.
pub fn run(words: &[OsString]) -> Result<u8> {
    let host = Host::read()?;
    let args: PullArgs = parse_with_environment("pull", words, &host)?;
    let (target, uri) = match args.words.as_slice() {
        [uri] => (None, uri),
        [target, uri] => (Some(PathBuf::from(target)), uri),
        other => {
            return Err(Usage {
                command: "pull".into(),
                text: format!("accepts between 1 and 2 arg(s), received {}", other.len()),
            }
            .into());
        }
    };
    let uri = uri.to_string_lossy();
    let what = || context(&uri);
    let reference: Reference = match uri.split_once(':') {
        Some((scheme, _)) if !Reference::is_scheme(scheme) => {
            bail!("Unsupported transport type: {scheme}")
        }
        None => bail!("{uri:?} has no transport: write docker://, oras://, library://, https://"),
        _ => uri.parse().with_context(what)?,
    };
    let target = place(&args, target, &reference, &host);
    check_target(&args, &target)?;
    transfer::guard_drafts()?;
    if args.no_cleanup {
        cache::keep_drafts();
    }
    let options = transfer::options(&host, &args.access, &args.machine, args.library.as_deref())?;
    let store = match args.disable_cache {
        true => Store::temporary(&host)?,
        false => Store::open(&host)?,
    };
    match args.sandbox {
        true => sandbox(&reference, &options, &store, &target, &args).with_context(what)?,
        false => {
            let path =
                transfer::fetch(&reference, &options, &store.cache, &host).with_context(what)?;
            publish(&path, &target, host.umask)?;
        }
    }
    store.close();
    Ok(exit::OK)
}

/// In the words that clients sort on.
fn context(uri: &str) -> String {
    match uri.split(':').next().unwrap_or_default() {
        "docker" => "While making image from oci registry: error fetching image to cache".into(),
        "oras" => "While pulling image from oci registry: error fetching image to cache".into(),
        "library" => "While pulling library image: error fetching image".into(),
        _ => format!(
            "While pulling from {}",
            uri.split('?').next().unwrap_or_default()
        ),
    }
}

fn place(args: &PullArgs, target: Option<PathBuf>, reference: &Reference, host: &Host) -> PathBuf {
    let name = target
        .or_else(|| args.name.clone())
        .unwrap_or_else(|| reference.file_name().into());
    match &args.dir {
        Some(dir) => host.cwd.join(dir).join(name),
        None => name,
    }
}

fn check_target(args: &PullArgs, target: &Path) -> Result<()> {
    if let Ok(meta) = fs::symlink_metadata(target) {
        if !args.force {
            bail!(
                "Image file already exists: {:?} - will not overwrite",
                target.display().to_string()
            );
        }
        if meta.is_dir() != args.sandbox {
            bail!(
                "{} is {}: --force does not replace it",
                target.display(),
                if meta.is_dir() {
                    "a directory"
                } else {
                    "a file"
                }
            );
        }
    }
    let directory = directory_of(target);
    if !directory.is_dir() {
        bail!("{}: no such directory", directory.display());
    }
    if rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_err() {
        bail!("directory {} cannot be written", directory.display());
    }
    Ok(())
}

fn directory_of(target: &Path) -> &Path {
    let parent = target.parent().filter(|p| !p.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// Copies a file of the cache to where it is wanted; it appears there when it is whole.
fn publish(from: &Path, target: &Path, umask: u32) -> Result<()> {
    let draft = Draft::new(directory_of(target))?;
    net::oci::copy_out(from, &draft)?;
    let mode = fs::Permissions::from_mode(0o777 & !umask);
    draft
        .file
        .set_permissions(mode)
        .with_context(|| format!("cannot write {}", target.display()))?;
    draft.publish(target)?;
    Ok(())
}

/// Into a directory.
fn sandbox(
    reference: &Reference,
    options: &Options,
    store: &Store,
    target: &Path,
    args: &PullArgs,
) -> Result<()> {
    let Reference::Docker(repository) = reference else {
        bail!(
            "--sandbox: {reference} is a SIF: pull it, then capsid build --sandbox DIRECTORY FILE"
        );
    };
    let image = net::image(reference, options, &store.cache)?;
    let draft = DraftDirectory::new(directory_of(target))?;
    let root = draft.path().join("root");
    let origin = Origin {
        bootstrap: "docker".into(),
        from: repository.to_string(),
    };
    let time_s = transfer::stamp(&image, None).time_s;
    say::info(format_args!("Creating sandbox directory..."));
    convert::to_directory(&image, &root, &origin, time_s, &mut Owners::Writer)?;
    let what = || format!("cannot create {}", target.display());
    cache::uninterrupted(|| {
        if args.force && target.exists() {
            fs::rename(target, draft.path().join("old"))?;
        }
        fs::rename(&root, target)
    })
    .with_context(what)?;
    draft.remove();
    Ok(())
}
