//! `--unsquash`: a squashfs is unpacked to a temporary directory, which is the container's root and goes with the run.
//!
//! Two processes do it one after the other, and this one waits and tidies up. It has no threads: those of the unpacking
//! would be in the way of the namespaces.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use capsid_fuse::Archive;

use crate::cache::DraftDirectory;
use crate::engine::wait::{self, End};
use crate::image::Root;
use crate::plan::Plan;
use crate::squash::{self, Unpack};
use crate::{engine, say};

/// Runs the plan upon an unpacked root in `parent`; `run` carries it out. `Ok` is the status to end with.
///
/// # Errors
/// When the image is no squashfs, or cannot be unpacked.
pub fn run(mut plan: Plan, parent: &Path, run: impl FnOnce(&Plan) -> Result<u8>) -> Result<u8> {
    let (file, offset_bytes, len_bytes) = match &plan.root {
        Root::Directory(_) => return run(&plan),
        Root::Ext { file, .. } => bail!(
            "--unsquash: the root of {} is no squashfs, and only those are unpacked",
            file.display()
        ),
        Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        } => (file.clone(), *offset_bytes, *len_bytes),
    };
    let what = || format!("cannot unpack {} (--unsquash)", file.display());
    let directory = DraftDirectory::new(parent).with_context(what)?;
    let root = directory.path().join("root");
    let made = DirBuilder::new().mode(0o700).create(&root);
    made.with_context(what)?;
    say::info(format_args!(
        "Unpacking {} to a temporary directory in {}",
        file.display(),
        parent.display()
    ));
    let end = engine::in_child(|| {
        let open = File::open(&file).with_context(what)?;
        let archive = Archive::open(open, offset_bytes, Some(len_bytes)).with_context(what)?;
        squash::unpack(&archive, &root, &Unpack::default()).with_context(what)?;
        Ok(0)
    })?;
    if end != End::Exited(0) {
        // It has said why.
        directory.remove();
        return Ok(wait::end_like(end));
    }
    plan.root = Root::Directory(root);
    let end = engine::in_child(|| run(&plan));
    directory.remove();
    Ok(wait::end_like(end?))
}
