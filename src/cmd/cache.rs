//! `cache warm`: reads into memory what the start of an image needs, from a prolog or by hand.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use capsid_fuse::Archive;

use crate::engine::profiles;
use crate::host::Host;
use crate::image::{self, Root};
use crate::{exit, say};

/// Options of `cache`.
#[derive(clap::Args, Debug)]
pub struct CacheArgs {
    /// What to do: `warm` reads what earlier starts have read, or names and attributes where none is known
    #[arg(value_parser = ["warm"])]
    action: String,
    /// Images
    #[arg(required = true)]
    images: Vec<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When an image cannot be read.
pub fn run(args: &CacheArgs) -> Result<u8> {
    let place = Host::read()?.profiles();
    for path in &args.images {
        let Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        } = image::open(path)?.root()
        else {
            bail!("{} has no squashfs to warm", path.display());
        };
        let what = || format!("cannot read image {}", path.display());
        let open = File::open(&file).with_context(what)?;
        let archive = Archive::open(open, offset_bytes, Some(len_bytes)).with_context(what)?;
        let (bytes, by_profile) = archive
            .warm(place.as_deref().and_then(profiles::directory))
            .with_context(what)?;
        let how = match by_profile {
            true => "that earlier starts have read",
            false => "of names and attributes; no start of it is known yet",
        };
        say::info(format_args!(
            "{}: {} KiB {how}",
            path.display(),
            bytes >> 10
        ));
    }
    Ok(exit::OK)
}
