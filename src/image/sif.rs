//! A SIF: the primary partition is the root, overlay partitions lie over it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

use super::{Facts, Given, Image, Root, Top, file, names_in_squashfs, read_squashfs};
use crate::sif::{DataType, Descriptor, FsType, PartType, Partition, Sif};

/// See the module.
pub struct SifImage {
    path: PathBuf,
    given: Given,
    sif: Sif,
    /// Offset and length of the primary partition.
    primary: (u64, u64),
    arch: &'static str,
}

/// Whether a SIF is there in full, whatever it holds.
///
/// # Errors
/// Naming what is wrong with it.
pub fn check(file: &File) -> Result<()> {
    let sif = Sif::read(file)?;
    match sif.primary() {
        Some((object, partition)) if partition.fs == FsType::Squashfs => {
            file::check_squashfs(file, object.offset_bytes, object.len_bytes)
        }
        _ => Ok(()),
    }
}

impl SifImage {
    /// Reads the descriptors and checks the primary partition's superblock.
    pub(super) fn open(path: PathBuf, given: Given, file: File) -> Result<SifImage> {
        let sif = read(&file)?;
        let Some((object, partition)) = sif.primary() else {
            bail!("the SIF has no primary partition, so there is nothing to run");
        };
        match partition.fs {
            FsType::Squashfs => file::check_squashfs(&file, object.offset_bytes, object.len_bytes)?,
            FsType::Encrypted => {
                bail!("the image is encrypted: encrypted images are not supported")
            }
            FsType::Ext3 | FsType::Other(_) => {
                bail!("the primary partition is not a squashfs; build the image anew")
            }
        }
        let primary = (object.offset_bytes, object.len_bytes);
        Ok(SifImage {
            path,
            given,
            primary,
            arch: partition.arch,
            sif,
        })
    }
}

fn read(file: &File) -> Result<Sif> {
    let sif = Sif::read(file)?;
    let is_oci = |object: &Descriptor| object.data_type == DataType::OciRootIndex;
    if sif.objects.iter().any(is_oci) {
        bail!(
            "an OCI-SIF (of SingularityCE's --oci mode) is not supported: build or pull it without --oci"
        );
    }
    Ok(sif)
}

/// The file system that a bind takes: object `id`, or the first one meant for data, else the root.
pub(super) fn data(path: PathBuf, file: &File, id: Option<u32>) -> Result<Root> {
    let sif = read(file)?;
    let wanted = match id {
        Some(id) => {
            let object = sif.objects.iter().find(|o| o.id == id);
            let object = object.ok_or_else(|| anyhow!("there is no object {id} in the SIF"))?;
            let partition = object.partition;
            partition
                .map(|p| (object, p))
                .ok_or_else(|| anyhow!("object {id} of the SIF is not a file system"))?
        }
        None => sif
            .partitions(PartType::Data)
            .next()
            .or_else(|| sif.primary())
            .ok_or_else(|| anyhow!("the SIF holds no file system"))?,
    };
    let root = file_system(&path, wanted.0, wanted.1)?;
    if let Root::Squashfs { .. } = root {
        file::check_squashfs(file, wanted.0.offset_bytes, wanted.0.len_bytes)?;
    }
    Ok(root)
}

fn file_system(path: &Path, object: &Descriptor, partition: Partition) -> Result<Root> {
    let (file, offset_bytes, len_bytes) = (path.to_owned(), object.offset_bytes, object.len_bytes);
    match partition.fs {
        FsType::Squashfs => Ok(Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        }),
        FsType::Ext3 => Ok(Root::Ext {
            file,
            offset_bytes,
            len_bytes,
            top: Top::Root,
        }),
        FsType::Encrypted => bail!("object {} is encrypted, which is not supported", object.id),
        FsType::Other(kind) => {
            bail!("object {} holds an unknown file system ({kind})", object.id)
        }
    }
}

impl Image for SifImage {
    fn root(&self) -> Root {
        let (offset_bytes, len_bytes) = self.primary;
        Root::Squashfs {
            file: self.path.clone(),
            offset_bytes,
            len_bytes,
        }
    }

    fn facts(&self) -> Facts {
        let overlays = self
            .sif
            .partitions(PartType::Overlay)
            .filter_map(|(o, p)| file_system(&self.path, o, p).ok())
            .map(Root::into_layer)
            .collect();
        self.given.facts(Some(self.arch), overlays)
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        read_squashfs(&self.path, self.primary.0, self.primary.1, path)
    }

    fn names(&self, path: &Path) -> Result<Vec<OsString>> {
        names_in_squashfs(&self.path, self.primary.0, self.primary.1, path)
    }
}
