//! A SIF: the primary partition is the root, overlay partitions lie over it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

use super::{Facts, Image, Root, file, name, names_in_squashfs, read_squashfs};
use crate::sif::{DataType, Descriptor, FsType, PartType, Partition, Sif};

/// See the module.
pub struct SifImage {
    path: PathBuf,
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
    pub fn open(path: PathBuf, file: File) -> Result<SifImage> {
        let sif = Sif::read(&file)?;
        if sif
            .objects
            .iter()
            .any(|o| o.data_type == DataType::OciRootIndex)
        {
            bail!(
                "an OCI-SIF (of SingularityCE's --oci mode) is not supported: build or pull it without --oci"
            );
        }
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
            primary,
            arch: partition.arch,
            sif,
        })
    }

    fn file_system(&self, object: &Descriptor, partition: Partition) -> Result<Root> {
        let (file, offset_bytes, len_bytes) =
            (self.path.clone(), object.offset_bytes, object.len_bytes);
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
            }),
            FsType::Encrypted => bail!("object {} is encrypted, which is not supported", object.id),
            FsType::Other(kind) => {
                bail!("object {} holds an unknown file system ({kind})", object.id)
            }
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
            .filter_map(|(o, p)| self.file_system(o, p).ok())
            .collect();
        Facts {
            arch: Some(self.arch.into()),
            name: name(&self.path),
            path: self.path.clone(),
            overlays,
        }
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        read_squashfs(&self.path, self.primary.0, self.primary.1, path)
    }

    fn names(&self, path: &Path) -> Result<Vec<OsString>> {
        names_in_squashfs(&self.path, self.primary.0, self.primary.1, path)
    }

    fn data(&self, id: Option<u32>) -> Result<Root> {
        let objects = &self.sif.objects;
        let wanted = match id {
            Some(id) => {
                let object = objects
                    .iter()
                    .find(|o| o.id == id)
                    .ok_or_else(|| anyhow!("there is no object {id} in the SIF"))?;
                object
                    .partition
                    .map(|p| (object, p))
                    .ok_or_else(|| anyhow!("object {id} of the SIF is not a file system"))?
            }
            None => match self.sif.partitions(PartType::Data).next() {
                Some(data) => data,
                None => return Ok(self.root()),
            },
        };
        self.file_system(wanted.0, wanted.1)
    }
}
