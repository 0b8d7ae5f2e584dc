//! The layers of an image as one file tree (OCI image specification, `layer.md`), without unpacking them one over the other.
//!
//! ```text
//!  thread: blob ─► digest ─► decompress ─► diff_id ─► chunks ─┐
//!  here:   tar members, top layer first ◄────────────────────┘
//!            ├─► contents that no higher layer hides ─► Store (an image, or files in a directory)
//!            └─► names and attributes ─► after the lowest layer: applied bottom-up ─► Tree
//! ```
//!
//! Names are applied as `umoci unpack` does it ([`resolve`]), in memory and exactly. Which contents to keep while the higher
//! layers are known and the lower ones are not is a guess by names alone ([`hidden`]); the rare file that it misses (its name
//! is hidden, but it lives on as a hard link or behind a symbolic link) is fetched in a second reading of its layer. So each
//! layer is decompressed once, nothing is written that does not stay, and no path of a layer ever meets a file system.
//! Memory: about 250 bytes for each name, whatever the size of the files.

mod directory;
mod entry;
mod hidden;
mod resolve;
mod stream;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

use self::entry::{Entry, What};
use self::hidden::Hidden;
use self::stream::Stream;
use super::Image;
use super::tar::Archive;
use crate::say;
use crate::squash::{Kind, NodeId, Store, Tree};

pub use self::directory::{Owners, Place};
pub use self::stream::{check_types, is_foreign};

/// Memory for names, links and attributes of all layers, in bytes: some five million files. Compressed, that many names can
/// come in a small file, and a login node is shared.
const MAX_NAMES: usize = 1 << 30;

/// Puts the contents of an image's files into the store, and gives the tree that they hang in. Devices are left out, with a
/// notice. The order of the contents is that of the layers, the highest first.
///
/// # Errors
/// When a layer cannot be read, is not what its digests say, or holds what cannot be a part of a file tree.
pub fn merge(image: &Image, store: &mut dyn Store) -> Result<Tree> {
    stream::check(image)?;
    let order: Vec<usize> = (0..image.manifest.layers.len()).rev().collect();
    let layers = stream::with(image, &order, |stream| gather(image, stream, store))?;
    let resolve::Resolved { mut tree, missing } = resolve::resolve(layers)?;
    fetch(image, &mut tree, &missing, store)?;
    let devices = drop_devices(&mut tree);
    if devices > 0 {
        say::info(format_args!(
            "{devices} device files are left out: containers get theirs from the host"
        ));
    }
    Ok(tree)
}

/// Writes an image's files into a directory, which is made if it is missing, and must be empty. `amend` may add to the tree
/// before it is written. Owners are the business of `owners`: a process that may change them does so, others keep a record.
///
/// # Errors
/// As [`merge`], and when files cannot be written.
pub fn unpack(
    image: &Image,
    root: &Path,
    owners: &mut Owners,
    amend: impl FnOnce(&mut Tree, &mut dyn Store) -> Result<()>,
) -> Result<()> {
    let mut staging = directory::Staging::below(root)?;
    let mut tree = merge(image, &mut staging)?;
    amend(&mut tree, &mut staging)?;
    directory::write(&tree, &staging, owners)
        .with_context(|| format!("cannot write into {}", root.display()))
}

/// Reads all layers from the highest to the lowest; gives their entries lowest layer first.
fn gather(image: &Image, stream: &mut Stream, store: &mut dyn Store) -> Result<Vec<Vec<Entry>>> {
    let count = image.manifest.layers.len();
    let mut hidden = Hidden::default();
    let mut layers = Vec::with_capacity(count);
    let mut memory = 0;
    for index in (0..count).rev() {
        let entries = layer(stream, &hidden, store, &mut memory)
            .with_context(|| stream::name(image, index))?;
        if index > 0 {
            entries.iter().for_each(|entry| hidden.add(entry));
        }
        layers.push(entries);
    }
    layers.reverse();
    Ok(layers)
}

/// Reads one layer.
fn layer(
    stream: &mut Stream,
    hidden: &Hidden,
    store: &mut dyn Store,
    memory: &mut usize,
) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut archive = Archive::new(&mut *stream);
    while let Some(member) = archive.next()? {
        let is_empty = member.len_bytes == 0;
        let Some(mut entry) = Entry::of(member)? else {
            continue;
        };
        if let What::File(data) = &mut entry.what
            && (is_empty || hidden.keeps(&entry.path))
        {
            let stored = store.store(&mut archive.content());
            *data = Some(stored.with_context(|| super::shown(&entry.path))?);
        }
        *memory += entry.memory();
        if *memory > MAX_NAMES {
            bail!(
                "the names and attributes of its files need more than {MAX_NAMES} bytes of memory"
            );
        }
        entries.push(entry);
    }
    stream.finish()?;
    Ok(entries)
}

/// Reads layers again for contents that were taken for hidden.
fn fetch(
    image: &Image,
    tree: &mut Tree,
    missing: &BTreeMap<(usize, usize), NodeId>,
    store: &mut dyn Store,
) -> Result<()> {
    let mut order: Vec<usize> = missing.keys().map(|(layer, _)| *layer).collect();
    order.dedup();
    if order.is_empty() {
        return Ok(());
    }
    stream::with(image, &order, |stream| {
        for layer in &order {
            again(tree, missing, *layer, stream, store)
                .with_context(|| stream::name(image, *layer))?;
        }
        Ok(())
    })
}

fn again(
    tree: &mut Tree,
    missing: &BTreeMap<(usize, usize), NodeId>,
    layer: usize,
    stream: &mut Stream,
    store: &mut dyn Store,
) -> Result<()> {
    let mut archive = Archive::new(&mut *stream);
    let mut ordinal = 0;
    while let Some(member) = archive.next()? {
        if Entry::of(member)?.is_none() {
            continue;
        }
        if let Some(node) = missing.get(&(layer, ordinal)) {
            tree.node_mut(*node).kind = Kind::File(store.store(&mut archive.content())?);
        }
        ordinal += 1;
    }
    stream.finish()
}

/// Takes the devices out of the tree, and counts them.
fn drop_devices(tree: &mut Tree) -> usize {
    let mut devices = 0;
    let mut todo = vec![Tree::ROOT];
    while let Some(directory) = todo.pop() {
        let names = tree.names(directory).cloned().unwrap_or_default();
        for (name, id) in names {
            match tree.node(id).kind {
                Kind::CharDevice(_) => {
                    tree.remove(directory, &name);
                    devices += 1;
                }
                Kind::Directory(_) => todo.push(id),
                _ => {}
            }
        }
    }
    devices
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
