//! Damaged and hostile images: an error or an answer, in bounded time and memory, and never a panic.
#![allow(clippy::unwrap_used)] // an error ends the test

mod common;

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use capsid_fuse::{Archive, Error, InodeRef, Kind};
use common::{image, names, noise, open, pack, with_mount};

/// What a walk over a whole image met.
#[derive(Default)]
struct Walk {
    files: usize,
    bytes: u64,
    errors: usize,
}

/// Bytes and files after which a walk ends: a damaged image may claim any size.
const BYTES_MAX: u64 = 64 << 20;
const FILES_MAX: usize = 20_000;

fn walk(archive: &Archive) -> Walk {
    let mut walk = Walk::default();
    let mut open = vec![archive.root()];
    let mut seen = HashSet::new();
    while let Some(at) = open.pop() {
        if !seen.insert(at) || walk.files > FILES_MAX {
            continue;
        }
        walk.files += 1;
        walk.errors += usize::from(archive.inode(at).is_err());
        walk.errors += usize::from(archive.xattrs(at).is_err());
        match archive.inode(at).map(|inode| inode.kind) {
            Ok(Kind::Dir) => match names(archive, at) {
                Ok(names) => {
                    for (name, inode, _) in names {
                        walk.errors += usize::from(archive.lookup(at, &name).is_err());
                        open.push(inode);
                    }
                }
                Err(_) => walk.errors += 1,
            },
            Ok(Kind::File) => read_all(archive, at, &mut walk),
            Ok(Kind::Symlink) => walk.errors += usize::from(archive.read_link(at).is_err()),
            _ => {}
        }
    }
    walk
}

fn read_all(archive: &Archive, at: InodeRef, walk: &mut Walk) {
    let mut part = vec![0; 1 << 20];
    let mut offset = 0;
    while walk.bytes < BYTES_MAX {
        match archive.read(at, offset, &mut part) {
            Ok(0) => return,
            Ok(count) => (offset, walk.bytes) = (offset + count as u64, walk.bytes + count as u64),
            Err(_) => {
                walk.errors += 1;
                return;
            }
        }
    }
}

/// A small image that has all structures.
fn small_image(options: &[&str]) -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub/dir")).unwrap();
    fs::write(tree.join("blocks"), noise(40_000, 3)).unwrap();
    fs::write(tree.join("tail"), noise(500, 5)).unwrap();
    std::os::unix::fs::symlink("tail", tree.join("link")).unwrap();
    for number in 0..600 {
        fs::write(
            tree.join("sub/dir")
                .join(format!("a-rather-long-name-{number}")),
            "x",
        )
        .unwrap();
    }
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(tree.join("tail"), "user.name", b"value", flags).unwrap();
    let image = dir.path().join("image");
    pack(&tree, &image, &[&["-b", "4K"], options].concat());
    let bytes = fs::read(&image).unwrap();
    (dir, bytes)
}

fn try_variant(path: &Path, bytes: &[u8]) -> Result<Walk, Error> {
    fs::write(path, bytes).unwrap();
    let start = Instant::now();
    let walk = Archive::open(File::open(path).unwrap(), 0, None).map(|archive| walk(&archive));
    let took = start.elapsed();
    assert!(
        took < Duration::from_secs(20),
        "one damaged image took {took:?}"
    );
    walk
}

#[test]
fn no_damage_makes_it_panic_or_hang() {
    for options in [
        &["-comp", "gzip"][..],
        &["-comp", "xz"],
        &["-comp", "zstd"],
        &["-comp", "lz4"],
        // Nothing compressed: damage reaches the structures instead of a decompressor.
        &["-noI", "-noD", "-noF", "-noX"],
    ] {
        let (dir, good) = small_image(options);
        let path = dir.path().join("variant");
        let whole = try_variant(&path, &good).unwrap();
        assert_eq!((whole.errors, whole.files), (0, 606));
        let mut noticed = 0;
        for round in 0..300_usize {
            let mut bytes = good.clone();
            let at = bytes.len() * round / 300;
            // Most structures are at the end, where a step is smaller.
            let at = if round % 2 == 0 {
                at
            } else {
                bytes.len() - 1 - at / 16
            };
            let end = (at + 1 + round % 9).min(bytes.len());
            match round % 3 {
                0 => bytes[at..end].fill(0),
                1 => bytes[at..end].fill(0xff),
                _ => bytes[at..end]
                    .iter_mut()
                    .for_each(|byte| *byte ^= 1 << (round % 8)),
            }
            let is_noticed = try_variant(&path, &bytes).map_or(true, |walk| walk.errors > 0);
            noticed += usize::from(is_noticed);
        }
        assert!(
            noticed > 30,
            "{options:?}: only {noticed} of 300 were noticed"
        );
    }
}

/// Each byte of the superblock and of the last tables takes some telling values.
#[test]
fn no_value_of_a_structure_makes_it_panic_or_hang() {
    let (dir, good) = small_image(&["-noI", "-noD", "-noF", "-noX"]);
    let path = dir.path().join("variant");
    let used = u64::from_le_bytes(good[40..48].try_into().unwrap()) as usize;
    let places = (0..96).chain((used - 200..used).step_by(3));
    for at in places {
        for value in [0x00, 0x7f, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let _any = try_variant(&path, &bytes);
        }
    }
}

#[test]
fn a_truncated_image_is_refused() {
    let (dir, good) = small_image(&[]);
    let used = u64::from_le_bytes(good[40..48].try_into().unwrap()) as usize;
    let path = dir.path().join("variant");
    for len in [0, 1, 50, 95, 96, 97, 200, used / 2, used - 1] {
        let error = try_variant(&path, &good[..len]).err();
        let is_told = match len {
            0..96 => error == Some(Error::NotSquashfs),
            _ => matches!(error, Some(Error::Truncated { .. })),
        };
        assert!(is_told, "{len}: {error:?}");
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read_gives_errors() {
    let (dir, good) = small_image(&[]);
    let path = dir.path().join("variant");
    fs::write(&path, &good).unwrap();
    let archive = open(&path);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(96)
        .unwrap();
    assert!(walk(&archive).errors > 0);
}

/// Damages the first data blocks, of which the first file in the order of packing is made.
#[test]
fn a_mount_of_a_damaged_image_fails_only_where_it_is_damaged() {
    let (dir, image_path) = image(&["-comp", "gzip", "-no-fragments"]);
    let sort = dir.path().join("sort");
    fs::write(&sort, "large 100\n").unwrap();
    pack(
        &dir.path().join("tree"),
        &image_path,
        &[
            "-comp",
            "gzip",
            "-no-fragments",
            "-sort",
            sort.to_str().unwrap(),
        ],
    );
    let file = File::options().write(true).open(&image_path).unwrap();
    file.write_all_at(&[0xa5; 4000], 96 + 1000).unwrap();
    let script = "for i in 1 2 3; do
        if cat large >/dev/null 2>/tmp/err.$$; then echo read; else cat /tmp/err.$$; fi
        cat small; sha256sum exact >/dev/null; tail -c 1000000 large | wc -c
    done; rm -f /tmp/err.$$";
    let told = with_mount(&image_path, 0, script);
    assert_eq!(told.matches("Input/output error").count(), 3, "{told}");
    assert_eq!(told.matches("a small file").count(), 3, "{told}");
    assert_eq!(told.matches("1000000").count(), 3, "{told}");
}

/// Changes single fields of uncompressed metadata to the worst they can be.
#[test]
fn hostile_lengths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    std::os::unix::fs::symlink("the-target-of-the-link", tree.join("link")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    fs::write(tree.join("file"), "content").unwrap();
    rustix::fs::setxattr(tree.join("file"), "user.attribute", b"the-value", flags).unwrap();
    let path = dir.path().join("image");
    pack(&tree, &path, &["-noI", "-noX"]);
    let good = fs::read(&path).unwrap();
    let find = |bytes: &[u8]| good.windows(bytes.len()).position(|w| w == bytes).unwrap();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        fs::write(&path, bytes).unwrap();
        open(&path)
    };
    let worst = u32::MAX.to_le_bytes();

    let archive = with(find(b"the-target-of-the-link") - 4, &worst);
    assert_eq!(
        archive.resolve(b"/link"),
        Err(Error::Damaged("symlink length"))
    );
    assert!(archive.resolve(b"/file").unwrap().is_some());

    let archive = with(find(b"the-value") - 4, &worst);
    let file = archive.resolve(b"/file").unwrap().unwrap();
    assert_eq!(
        archive.xattrs(file),
        Err(Error::Damaged("xattr value length"))
    );
    assert_eq!(
        archive.read_file(b"/file", 10).unwrap().unwrap(),
        b"content"
    );

    // The listing: a header of 12 bytes, then entries of 8 bytes with names; "file" comes first.
    let first = find(b"file") - 8;
    let archive = with(first - 12, &worst);
    assert_eq!(
        archive.resolve(b"/file"),
        Err(Error::Damaged("directory header"))
    );
    let archive = with(first + 6, &u16::MAX.to_le_bytes());
    assert_eq!(
        archive.resolve(b"/file"),
        Err(Error::Damaged("name length"))
    );
    let archive = with(first + 8, b"a/..");
    assert_eq!(archive.resolve(b"/link"), Err(Error::Damaged("file name")));
}
