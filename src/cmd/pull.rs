//! `pull`: an image from elsewhere to a file.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use capsid_fuse::Archive;

use super::transfer::{self, Access, Machine, Source, Store};
use super::{Usage, parse_with_environment};
use crate::build::convert;
use crate::cache::{self, Cache, Draft, DraftDirectory};
use crate::host::Host;
use crate::image::{self, Root};
use crate::net::{self, Options, Reference};
use crate::oci::config::Origin;
use crate::oci::layers::Owners;
use crate::squash::{self, Unpack};
use crate::{durable, exit, say};

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
    let source: Source = match uri.split_once(':') {
        Some((scheme, _)) if !Source::is_scheme(scheme) => {
            bail!("Unsupported transport type: {scheme}")
        }
        None => bail!("{uri:?} has no transport: write docker://, oras://, library://, https://"),
        _ => uri.parse().with_context(what)?,
    };
    let target = place(&args, target, &source, &host);
    check_target(&args, &target)?;
    transfer::guard_drafts()?;
    if args.no_cleanup {
        cache::keep_drafts();
    }
    let options = transfer::options(&host, &args.access, &args.machine, args.library.as_deref())?;
    let store = match args.sandbox {
        true => sandbox(&source, &options, &target, &args, &host).with_context(what)?,
        false => {
            let work = |cache: &Cache| transfer::fetch(&source, &options, cache, &host);
            let (path, store) = Store::with(&host, args.disable_cache, &work).with_context(what)?;
            publish(&path, &target, host.umask)?;
            store
        }
    };
    store.close();
    Ok(exit::OK)
}

/// In the words that clients sort on.
fn context(uri: &str) -> String {
    match uri.split(':').next().unwrap_or_default() {
        "docker" | "docker-daemon" | "docker-archive" | "oci" | "oci-archive" => {
            "While making image from oci registry: error fetching image to cache".into()
        }
        "oras" => "While pulling image from oci registry: error fetching image to cache".into(),
        "library" => "While pulling library image: error fetching image".into(),
        _ => format!(
            "While pulling from {}",
            uri.split('?').next().unwrap_or_default()
        ),
    }
}

fn place(args: &PullArgs, target: Option<PathBuf>, source: &Source, host: &Host) -> PathBuf {
    let name = target
        .or_else(|| args.name.clone())
        .unwrap_or_else(|| source.file_name().into());
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
    source: &Source,
    options: &Options,
    target: &Path,
    args: &PullArgs,
    host: &Host,
) -> Result<Store> {
    let draft = DraftDirectory::new(directory_of(target))?;
    let root = draft.path().join("root");
    let (image, origin, store) = match source {
        Source::Remote(reference @ Reference::Docker(repository)) => {
            let work = |cache: &Cache| net::layers(reference, options, cache);
            let (image, store) = Store::with(host, args.disable_cache, &work)?;
            (image, ("docker", repository.to_string()), store)
        }
        Source::Local(place, text) => {
            let store = Store::open(host, args.disable_cache)?;
            let image = place.open(text, &host.cwd, &options.platform, draft.path())?;
            (image, (place.name(), text.clone()), store)
        }
        Source::Remote(reference) => {
            let work = |cache: &Cache| net::file(reference, options, cache);
            let (file, store) = Store::with(host, args.disable_cache, &work)?;
            say::info(format_args!("Creating sandbox directory..."));
            unpack(&file, &root)?;
            replace(&root, target, draft, args.force)?;
            return Ok(store);
        }
    };
    let origin = Origin {
        bootstrap: origin.0.into(),
        from: origin.1,
    };
    let time_s = transfer::stamp(&image, None).time_s;
    say::info(format_args!("Creating sandbox directory..."));
    convert::to_directory(&image, &root, &origin, time_s, &mut Owners::Writer)?;
    replace(&root, target, draft, args.force)?;
    Ok(store)
}

/// A file image's root file system, as whoever unpacks it.
fn unpack(file: &Path, root: &Path) -> Result<()> {
    let what = || format!("cannot unpack {}", file.display());
    let Root::Squashfs {
        file,
        offset_bytes,
        len_bytes,
    } = image::open(file)?.root()
    else {
        bail!("{}: its root is no squashfs", what());
    };
    let open = File::open(&file).with_context(what)?;
    let archive = Archive::open(open, offset_bytes, Some(len_bytes)).with_context(what)?;
    fs::DirBuilder::new().mode(0o755).create(root)?;
    let owner = |_, _| None;
    squash::unpack(&archive, root, &Unpack { owner: &owner }).with_context(what)
}

/// Gives a whole directory its place.
fn replace(root: &Path, target: &Path, draft: DraftDirectory, force: bool) -> Result<()> {
    let what = || format!("cannot create {}", target.display());
    // The new one is safe on the disk before the old one goes.
    let content = fs::File::open(root).with_context(what)?;
    let rename = || {
        cache::uninterrupted(|| {
            if force && target.exists() {
                fs::rename(target, draft.path().join("old"))?;
            }
            fs::rename(root, target)
        })
    };
    durable::publish(&content, target, rename).with_context(what)?;
    draft.remove();
    Ok(())
}
