//! A squashfs without files: what a server shows whose user namespace alone is wanted.

use std::fs::File;
use std::io::Write as _;

use anyhow::{Context as _, Result};

/// Bytes of it.
pub(super) const LEN: usize = 144;

/// The image: its superblock, and one metadata block, not compressed, for each of the inode of `/` (mode 0755, owner 0),
/// the directories (none) and the ids (0).
const IMAGE: [u64; LEN / 8] = [
    u64::from_le_bytes(*b"hsqs\x01\0\0\0"), // magic, one inode
    0x0002_0000_0000_0000,                  // time 0, blocks of 128 KiB
    0x0011_0001_0000_0000,                  // no fragments, gzip, 2^17
    0x0000_0004_0001_034b,                  // nothing compressed or exported, one id, version 4.0
    0,                                      // the root's inode
    LEN as u64,
    0x88, // ids
    u64::MAX,
    0x60, // inodes
    0x82, // directories
    0x82,
    u64::MAX,
    0x0000_01ed_0001_8020, // a block of 32 bytes: a directory, 0755, owner 0
    0x0001_0000_0000_0000,
    0x0002_0000_0000_0000,
    0x0002_0000_0003_0000, // nothing but . and ..
    0x0000_0000_8004_0000, // a block of 4 bytes: id 0
    0x82,
];

/// An open file that holds it.
pub(super) fn image() -> Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("empty", flags).context("cannot get memory")?;
    let mut file = File::from(file);
    let bytes: Vec<u8> = IMAGE.iter().flat_map(|word| word.to_le_bytes()).collect();
    file.write_all(&bytes).context("no memory for an image")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_an_empty_directory() {
        let archive = capsid_fuse::Archive::open(image().unwrap(), 0, None).unwrap();
        let root = archive.inode(archive.root()).unwrap();
        assert_eq!(
            (root.mode, root.uid, root.kind),
            (0o755, 0, capsid_fuse::Kind::Dir)
        );
        let mut names = 0;
        archive
            .read_dir(archive.root(), 0, &mut |_| {
                names += 1;
                true
            })
            .unwrap();
        assert_eq!(names, 0);
    }
}
