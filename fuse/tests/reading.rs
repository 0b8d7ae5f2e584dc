//! Images of the reference tool, compared with the trees they were made from.
#![allow(clippy::unwrap_used)] // an error ends the test

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use capsid_fuse::{Archive, Error, InodeRef, Kind};
use common::{content, image, make_tree, names, open, pack, run, with_mount};

const COMPRESSORS: [&str; 4] = ["gzip", "xz", "zstd", "lz4"];
const BLOCK_SIZES: [&str; 3] = ["4K", "128K", "1M"];
const STYLES: [&[&str]; 3] = [&[], &["-no-fragments"], &["-noI", "-noD", "-noF"]];

#[test]
fn archive_shows_what_was_packed() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree);
    for compressor in COMPRESSORS {
        for block_size in BLOCK_SIZES {
            for style in STYLES {
                let image = dir.path().join("image");
                pack(
                    &tree,
                    &image,
                    &[&["-comp", compressor, "-b", block_size], style].concat(),
                );
                let archive = open(&image);
                let seen = compare(&archive, archive.root(), &tree);
                assert!(
                    seen > 3210,
                    "{compressor} {block_size} {style:?}: only {seen} files"
                );
            }
        }
    }
}

/// Compares a directory with all that is in it; returns how many files there are.
fn compare(archive: &Archive, at: InodeRef, path: &Path) -> usize {
    let shown = fs::symlink_metadata(path).unwrap();
    let inode = archive.inode(at).unwrap();
    assert_eq!(
        inode.kind.mode_bits() | inode.mode,
        shown.mode(),
        "{path:?}"
    );
    assert_eq!(i64::from(inode.mtime), shown.mtime(), "{path:?}");
    assert_eq!(
        (inode.uid, inode.gid),
        (shown.uid(), shown.gid()),
        "{path:?}"
    );
    compare_xattrs(archive, at, path);
    match inode.kind {
        Kind::Dir => {
            let listed = names(archive, at).unwrap();
            let wanted: BTreeSet<_> = fs::read_dir(path)
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            let got: BTreeSet<_> = listed
                .iter()
                .map(|(name, ..)| std::ffi::OsStr::from_bytes(name).to_owned())
                .collect();
            assert_eq!(got, wanted);
            assert_eq!(archive.lookup(at, b"no such name").unwrap(), None);
            let inside = |(name, inode, _): &(Vec<u8>, InodeRef, Kind)| {
                assert_eq!(archive.lookup(at, name).unwrap(), Some(*inode));
                compare(
                    archive,
                    *inode,
                    &path.join(std::ffi::OsStr::from_bytes(name)),
                )
            };
            1 + listed.iter().map(inside).sum::<usize>()
        }
        Kind::File => {
            assert_eq!(inode.size, shown.len());
            assert_eq!(u64::from(inode.nlink), shown.nlink());
            assert!(
                content(archive, at).unwrap() == fs::read(path).unwrap(),
                "{path:?} has other bytes"
            );
            1
        }
        Kind::Symlink => {
            let target = fs::read_link(path).unwrap();
            assert_eq!(
                archive.read_link(at).unwrap(),
                target.as_os_str().as_bytes()
            );
            1
        }
        _ => 1,
    }
}

fn compare_xattrs(archive: &Archive, at: InodeRef, path: &Path) {
    for (name, value) in archive.xattrs(at).unwrap() {
        let name = String::from_utf8(name).unwrap();
        let mut wanted = vec![0; value.len() + 1];
        let len = rustix::fs::lgetxattr(path, &name, &mut wanted).unwrap();
        assert_eq!(value, &wanted[..len], "{path:?} {name}");
    }
    if path.file_name().is_some_and(|name| name == "small") {
        assert_eq!(archive.xattrs(at).unwrap().len(), 2);
    }
}

/// All files are root's: in a user namespace without other ids nobody could read those of others.
#[test]
fn mount_shows_what_was_packed() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree);
    let script = format!("LC_ALL=C\n{}", common::MANIFEST);
    let wanted = run(Command::new("sh").args(["-c", &script]).current_dir(&tree));
    assert!(wanted.lines().count() > 6400);
    for compressor in COMPRESSORS {
        for options in [
            &["-b", "128K"][..],
            &["-b", "4K", "-no-fragments"],
            &["-b", "1M"],
        ] {
            let image = dir.path().join("image");
            pack(
                &tree,
                &image,
                &[&["-comp", compressor, "-all-root"], options].concat(),
            );
            let got = with_mount(&image, 0, &script);
            assert!(
                got == wanted,
                "{compressor} {options:?}: {}",
                difference(&got, &wanted)
            );
        }
    }
}

fn difference(got: &str, wanted: &str) -> String {
    let different = got.lines().zip(wanted.lines()).find(|(a, b)| a != b);
    format!("{different:?}")
}

#[test]
fn many_readers_of_a_mount_get_the_same_bytes() {
    let (dir, image) = image(&["-comp", "zstd"]);
    let wanted = run(Command::new("sha256sum").arg(dir.path().join("tree/large")));
    let wanted = wanted.split(' ').next().unwrap().to_string();
    let script = "for i in 1 2 3 4 5 6 7 8; do sha256sum large & done; wait";
    let got = with_mount(&image, 0, script);
    assert_eq!(
        got.lines().filter(|line| line.starts_with(&wanted)).count(),
        8,
        "{got}"
    );
}

#[test]
fn mount_finds_an_image_inside_a_larger_file() {
    let (dir, image) = image(&[]);
    let outer = dir.path().join("outer");
    let mut file = fs::File::create(&outer).unwrap();
    file.write_all(&vec![7; 36_864]).unwrap();
    file.write_all(&fs::read(&image).unwrap()).unwrap();
    file.write_all(&vec![9; 10_000]).unwrap();
    assert_eq!(
        with_mount(&outer, 36_864, "cat small; cat link"),
        "a small file\na small file\n"
    );
}

#[test]
fn paths_are_resolved_inside_the_image() {
    let (_dir, image) = image(&[]);
    let archive = open(&image);
    let small = archive.resolve(b"/small").unwrap();
    assert!(small.is_some());
    for same in [
        "link",
        "/../../small",
        "/hard link",
        "//./deep/../small",
        "/deep link/er/../../small",
    ] {
        assert_eq!(archive.resolve(same.as_bytes()).unwrap(), small, "{same}");
    }
    assert_eq!(archive.resolve(b"/small/x").unwrap(), None);
    assert_eq!(archive.resolve(b"/nothing").unwrap(), None);
    assert_eq!(
        archive.read_file(b"/link", 100).unwrap().unwrap(),
        b"a small file\n"
    );
    assert_eq!(archive.read_file(b"/nothing", 100).unwrap(), None);
    assert_eq!(
        archive.read_file(b"/large", 100),
        Err(Error::TooLarge {
            size: 2_500_003,
            max: 100
        })
    );
}

#[test]
fn unsupported_compressors_are_named() {
    let (dir, image) = image(&[]);
    let mut bytes = fs::read(&image).unwrap();
    for (id, word) in [(3, "lzo"), (2, "lzma"), (77, "77")] {
        bytes[20] = id;
        let other = dir.path().join("other");
        fs::write(&other, &bytes).unwrap();
        let error = Archive::open(fs::File::open(&other).unwrap(), 0, None)
            .err()
            .unwrap();
        assert!(error.to_string().contains(word), "{error}");
    }
    let output = Command::new(common::TOOL)
        .args(["/dev/null", "/"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no squashfs image"));
    assert!(!output.status.success());
}
