//! Trees that are packed and read back: by `unsquashfs`, by our own reader and unpacker, and through a FUSE mount. What
//! stat(2) shows and every extended attribute must be equal.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use capsid::squash::{self, Options, Scan, Store as _, Unpack, Writer};
use capsid_fuse::Archive;
use common::Env;

/// The set-id bits, which unsquashfs leaves out when root does not run it.
const SET_ID: u32 = 0o6000;

/// What must survive, but for these bits of the mode.
fn describe(path: &Path, left_out: u32) -> String {
    let meta = fs::symlink_metadata(path).unwrap();
    let content = if meta.is_symlink() {
        format!("{:?}", fs::read_link(path).unwrap())
    } else if meta.is_file() && meta.len() < 1 << 30 {
        format!("{:?}", capsid::digest::Digest::of(&fs::read(path).unwrap()))
    } else {
        String::new()
    };
    let size = if meta.is_dir() { 0 } else { meta.len() };
    format!(
        "{:o} {} {} {} {} {size} {} {content} {:?}",
        meta.mode() & !left_out,
        meta.uid(),
        meta.gid(),
        meta.mtime(),
        meta.nlink(),
        meta.rdev(),
        xattrs(path)
    )
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut list = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    list[..len]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = String::from_utf8(name.to_vec()).unwrap();
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..]).unwrap();
            (name, value[..len].to_vec())
        })
        .collect()
}

fn names(root: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        all.push(path.strip_prefix(root).unwrap().to_owned());
    }
    all
}

fn describe_all(root: &Path, left_out: u32) -> BTreeMap<PathBuf, String> {
    let described = |name: PathBuf| {
        let what = describe(&root.join(&name), left_out);
        (name, what)
    };
    names(root).into_iter().map(described).collect()
}

/// Sets of names of one file.
fn links(root: &Path) -> BTreeSet<BTreeSet<PathBuf>> {
    let mut sets: BTreeMap<u64, BTreeSet<PathBuf>> = BTreeMap::new();
    for name in names(root) {
        let meta = fs::symlink_metadata(root.join(&name)).unwrap();
        if !meta.is_dir() {
            sets.entry(meta.ino()).or_default().insert(name);
        }
    }
    sets.into_values().filter(|set| set.len() > 1).collect()
}

#[track_caller]
fn assert_equal(one: &Path, other: &Path, left_out: u32) {
    let (left, right) = (describe_all(one, left_out), describe_all(other, left_out));
    for (name, what) in &left {
        assert_eq!(Some(what), right.get(name), "{}", name.display());
    }
    assert_eq!(left.len(), right.len());
    assert_eq!(links(one), links(other));
}

/// Numbers that look random, different for each seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

fn set_time(path: &Path, seconds: i64) {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// A tree with one of everything that a normal user can make.
fn tree(root: &Path) {
    fs::create_dir_all(root.join("d/e")).unwrap();
    for (n, len) in [0, 1, 4095, 4096, 131_071, 131_072, 131_073, 1_000_000]
        .iter()
        .enumerate()
    {
        fs::write(root.join(format!("noise{n}")), noise(n as u64, *len)).unwrap();
        fs::write(root.join(format!("text{n}")), b"text ".repeat(*len / 5)).unwrap();
    }
    fs::write(root.join("d/copy"), noise(7, 1_000_000)).unwrap();
    fs::write(root.join("setid"), "x").unwrap();
    fs::hard_link(root.join("setid"), root.join("d/hard")).unwrap();
    fs::hard_link(root.join("setid"), root.join("d/e/hard")).unwrap();
    let mode = |path: &str, mode| {
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("setid", 0o6755);
    mode("d/e", 0o3777);
    mode("noise1", 0o400);
    symlink("d/copy", root.join("link")).unwrap();
    symlink("x/".repeat(2000), root.join("long-link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, root.join("fifo"), 0o640.into()).unwrap();
    fs::write(root.join("n".repeat(255)), "long name").unwrap();
    // Beyond 4 GiB, and hardly anything in it.
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(5 << 30).unwrap();
    sparse.write_all_at(b"middle", 3 << 30).unwrap();
    sparse.write_all_at(b"end", (5 << 30) - 3).unwrap();
    let hole = File::create(root.join("hole")).unwrap();
    hole.set_len(300_001).unwrap();
    set_xattr(&root.join("text3"), "user.empty", b"");
    set_xattr(&root.join("text3"), "user.text", b"value");
    set_xattr(&root.join("text4"), "user.long", &[7; 3000]);
    set_xattr(&root.join("d"), "user.dir", b"d");
    set_xattr(&root.join("setid"), "user.linked", b"1");
    let mut deep = root.to_owned();
    for _ in 0..180 {
        deep.push("deep-directory");
        fs::create_dir(&deep).unwrap();
    }
    fs::write(deep.join("bottom"), "down here").unwrap();
    for (n, name) in ["link", "fifo", "setid", "text5"].iter().enumerate() {
        set_time(&root.join(name), 1_000_000_000 + n as i64);
    }
    set_time(&root.join("d"), 0);
    set_time(&root.join("noise0"), 4_294_967_295);
}

fn pack(root: &Path, image: &Path, options: &Options) -> anyhow::Result<squash::Summary> {
    let out = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(image)?;
    let mut writer = Writer::new(out, options)?;
    let tree = squash::scan(root, &mut writer, &Scan::default())?;
    writer.finish(&tree)
}

fn options(compression: &str) -> Options {
    Options {
        compression: compression.parse().unwrap(),
        ..Options::default()
    }
}

fn archive(image: &Path) -> Archive {
    Archive::open(File::open(image).unwrap(), 0, None).unwrap()
}

fn unsquashfs(image: &Path, to: &Path) {
    let out = Command::new("unsquashfs")
        .args(["-q", "-n", "-d"])
        .arg(to)
        .arg(image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{text}");
}

#[test]
fn unsquashfs_reads_back_every_attribute() {
    let env = Env::new();
    let root = env.path("tree");
    tree(&root);
    for compression in ["gzip", "zstd:3", "xz:1", "lz4"] {
        let (image, to) = (env.path("image"), env.path(compression));
        pack(&root, &image, &options(compression)).unwrap();
        unsquashfs(&image, &to);
        assert_equal(&root, &to, SET_ID);
        let listed = Command::new("unsquashfs")
            .arg("-lls")
            .arg(&image)
            .output()
            .unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(
            listed.contains("-rwsr-sr-x") && listed.contains("drwxrwsrwt"),
            "{listed}"
        );
        fs::remove_dir_all(&to).unwrap();
    }
}

#[test]
fn our_unpacker_gives_the_same_tree_and_keeps_holes() {
    let env = Env::new();
    let (root, image, to) = (env.path("tree"), env.path("image"), env.path("to"));
    tree(&root);
    pack(&root, &image, &Options::default()).unwrap();
    fs::create_dir(&to).unwrap();
    squash::unpack(&archive(&image), &to, &Unpack::default()).unwrap();
    assert_equal(&root, &to, 0);
    let sparse = File::open(to.join("sparse")).unwrap();
    assert!(sparse.metadata().unwrap().blocks() < 2048, "holes are kept");
    let mut bytes = [0; 6];
    sparse.read_exact_at(&mut bytes, 3 << 30).unwrap();
    assert_eq!(&bytes, b"middle");
}

#[test]
fn a_copied_image_holds_the_same() {
    let env = Env::new();
    let (root, first, second, to) = (
        env.path("tree"),
        env.path("1"),
        env.path("2"),
        env.path("to"),
    );
    tree(&root);
    // Reading gigabytes of zeros is not what this is about.
    fs::remove_file(root.join("sparse")).unwrap();
    pack(&root, &first, &options("lz4")).unwrap();
    let out = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&second)
        .unwrap();
    let mut writer = Writer::new(out, &options("gzip")).unwrap();
    let tree = squash::copy(&archive(&first), &mut writer).unwrap();
    writer.finish(&tree).unwrap();
    unsquashfs(&second, &to);
    assert_equal(&root, &to, SET_ID);
}

#[test]
fn a_mount_shows_the_same() {
    let env = Env::new();
    let root = env.path("tree");
    tree(&root);
    // Modes and names suffice here; owners are shown through an id map.
    fs::create_dir(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let image = env.path("image.squashfs");
    pack(&root, &image, &Options::default()).unwrap();
    let script = "cd $1; find . -path ./proc -prune -o -path ./sys -prune -o -path ./dev -prune -o \
                  -type f -size -4096 -exec /bin/busybox md5sum {} + | sort; find d noise* text* fifo setid hole sparse deep-directory \
                  -exec /bin/busybox stat -c '%n %f %h %s %Y' {} + | sort | sed 's/ [0-9]* \\([0-9]*\\)$/ \\1/'";
    let inside = env.run([
        "exec",
        "--containall",
        image.to_str().unwrap(),
        "/bin/busybox",
        "sh",
        "-c",
        &format!("{script}; true"),
        "x",
        "/",
    ]);
    let outside = Command::new("/bin/busybox")
        .args(["sh", "-c", script, "x", root.to_str().unwrap()])
        .output()
        .unwrap();
    let sort = |text: &str| -> BTreeSet<String> {
        let there =
            |line: &&str| line.contains("noise") || line.contains("text") || line.contains("deep");
        text.lines().filter(there).map(str::to_owned).collect()
    };
    let (inside, outside) = (
        sort(inside.ok()),
        sort(&String::from_utf8_lossy(&outside.stdout)),
    );
    assert!(outside.len() > 200);
    let differ: Vec<_> = inside.symmetric_difference(&outside).collect();
    assert!(differ.is_empty(), "{differ:?}");
}

#[test]
fn seventy_thousand_names_in_one_directory() {
    let env = Env::new();
    let (root, image, to) = (env.path("tree"), env.path("image"), env.path("to"));
    fs::create_dir_all(root.join("many")).unwrap();
    for n in 0..70_000 {
        let content = if n % 100 == 0 {
            format!("{n}")
        } else {
            String::new()
        };
        fs::write(
            root.join(format!("many/a-name-of-some-length-{n:05}")),
            content,
        )
        .unwrap();
    }
    let summary = pack(&root, &image, &Options::default()).unwrap();
    assert_eq!(summary.inodes, 70_002);
    unsquashfs(&image, &to);
    assert_equal(&root, &to, 0);
    // By the directory's index.
    let archive = archive(&image);
    for n in [0, 1, 34_567, 69_999] {
        let path = format!("/many/a-name-of-some-length-{n:05}");
        assert!(
            archive.resolve(path.as_bytes()).unwrap().is_some(),
            "{path}"
        );
    }
    assert!(
        archive
            .resolve(b"/many/a-name-of-some-length-70000")
            .unwrap()
            .is_none()
    );
}

#[test]
fn the_same_tree_gives_the_same_bytes_with_one_thread_and_with_four() {
    let env = Env::new();
    let root = env.path("tree");
    tree(&root);
    let pack = |name: &str, threads| {
        let image = env.path(name);
        let options = Options {
            threads,
            ..Options::default()
        };
        pack(&root, &image, &options).unwrap();
        fs::read(image).unwrap()
    };
    let one = pack("one", 1);
    assert!(one == pack("four", 4));
    assert!(one == pack("again", 4));
    assert_eq!(one.len() % 4096, 0, "padded");
}

#[test]
fn later_times_are_clamped() {
    let env = Env::new();
    let (root, image) = (env.path("tree"), env.path("image"));
    fs::create_dir(&root).unwrap();
    for (name, time) in [("early", 1000), ("late", 3000)] {
        fs::write(root.join(name), name).unwrap();
        set_time(&root.join(name), time);
    }
    let options = Options {
        clamp_s: Some(2000),
        ..Options::default()
    };
    pack(&root, &image, &options).unwrap();
    let archive = archive(&image);
    let mtime = |name: &[u8]| {
        let at = archive.lookup(archive.root(), name).unwrap().unwrap();
        archive.inode(at).unwrap().mtime
    };
    assert_eq!((mtime(b"early"), mtime(b"late")), (1000, 2000));
    assert_eq!(archive.superblock().mkfs_time, 2000);
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let env = Env::new();
    let root = env.path("tree");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/secret"), "x").unwrap();
    fs::set_permissions(root.join("sub/secret"), fs::Permissions::from_mode(0o0)).unwrap();
    let error = pack(&root, &env.path("image"), &Options::default()).unwrap_err();
    let text = format!("{error:#}");
    assert!(
        text.contains("tree/sub/secret") && text.contains("Permission denied"),
        "{text}"
    );
}

#[test]
fn sockets_are_left_out_unless_wanted() {
    let env = Env::new();
    let (root, image) = (env.path("tree"), env.path("image"));
    fs::create_dir(&root).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    for (specials, there) in [
        (squash::Specials::LeaveOut, false),
        (squash::Specials::Keep, true),
    ] {
        let out = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&image)
            .unwrap();
        let mut writer = Writer::new(out, &Options::default()).unwrap();
        let scan = Scan {
            specials,
            ..Scan::default()
        };
        let tree = squash::scan(&root, &mut writer, &scan).unwrap();
        writer.finish(&tree).unwrap();
        assert_eq!(
            archive(&image).resolve(b"/socket").unwrap().is_some(),
            there
        );
    }
}

#[test]
fn a_write_beyond_the_limit_of_file_size_is_an_error_and_the_target_stays() {
    // A process of its own, since the limit is the process's: this test starts itself again.
    const CHILD: &str = "CAPSID_PACK_WITH_LIMIT";
    if let Some(dir) = std::env::var_os(CHILD) {
        let dir = PathBuf::from(dir);
        rustix::process::setrlimit(
            rustix::process::Resource::Fsize,
            rustix::process::Rlimit {
                current: Some(200_000),
                maximum: Some(200_000),
            },
        )
        .unwrap();
        let stamp = capsid::sif::Stamp {
            time_s: 0,
            identity: [0; 16],
        };
        let result =
            capsid::build::pack::sif(&dir.join("tree"), "", "amd64", &dir.join("x.sif"), stamp);
        println!("result: {:#}", result.unwrap_err());
        return;
    }
    let env = Env::new();
    let root = env.path("tree");
    fs::create_dir(&root).unwrap();
    for n in 0..20 {
        fs::write(root.join(n.to_string()), noise(n, 100_000)).unwrap();
    }
    let target = env.path("x.sif");
    fs::write(&target, "old").unwrap();
    let before: BTreeSet<_> = fs::read_dir(target.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    let out = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_write_beyond_the_limit_of_file_size_is_an_error_and_the_target_stays",
            "--nocapture",
        ])
        .env(CHILD, target.parent().unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text}");
    let line = text
        .lines()
        .find(|l| l.contains("result: "))
        .unwrap_or_default();
    assert!(
        line.contains("cannot write") && line.contains("x.sif") && line.contains("File too large"),
        "{text}"
    );
    assert_eq!(fs::read(&target).unwrap(), b"old");
    let after: BTreeSet<_> = fs::read_dir(target.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(before, after, "no draft stays");
}

#[test]
fn different_contents_of_one_checksum_are_both_kept() {
    // CRC-32 is linear: two changes that cancel out in it.
    let env = Env::new();
    let image = env.path("image");
    let (one, other) = collision();
    assert_ne!(one, other);
    assert_eq!(libdeflater::crc32(&one), libdeflater::crc32(&other));
    let out = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&image)
        .unwrap();
    let mut writer = Writer::new(out, &Options::default()).unwrap();
    let mut tree = squash::Tree::new(squash::Attributes::default());
    for (name, content) in [("one", &one), ("other", &other)] {
        let data = writer.store(&mut &content[..]).unwrap();
        let node = squash::Node {
            attributes: squash::Attributes::default(),
            kind: squash::Kind::File(data),
        };
        tree.add(squash::Tree::ROOT, name.as_bytes(), node).unwrap();
    }
    writer.finish(&tree).unwrap();
    let archive = archive(&image);
    assert_eq!(archive.read_file(b"/one", 1 << 20).unwrap().unwrap(), one);
    assert_eq!(
        archive.read_file(b"/other", 1 << 20).unwrap().unwrap(),
        other
    );
}

/// Two contents of one length and one CRC-32: the polynomial itself, as bits, changes nothing in the remainder.
fn collision() -> (Vec<u8>, Vec<u8>) {
    let one = vec![b'a'; 100];
    let mut other = one.clone();
    // x^32 + x^26 + … + 1, in the order in which the checksum takes bits: lowest bit of each byte first.
    let polynomial: u64 = 0x1_04c1_1db7;
    for bit in 0..33 {
        if polynomial >> (32 - bit) & 1 == 1 {
            other[50 + bit / 8] ^= 1 << (bit % 8);
        }
    }
    (one, other)
}

#[test]
fn hostile_names_do_not_leave_the_directory() {
    let env = Env::new();
    // The writer refuses to make them; so the bytes of a good image are changed.
    let (root, image) = (env.path("tree"), env.path("image"));
    fs::create_dir_all(root.join("aa")).unwrap();
    fs::write(root.join("aa/bb"), "x").unwrap();
    let stored = Options {
        compression: "lz4".parse().unwrap(),
        ..Options::default()
    };
    pack(&root, &image, &stored).unwrap();
    let mut bytes = fs::read(&image).unwrap();
    let mut changed = 0;
    for at in 0..bytes.len() - 1 {
        if &bytes[at..at + 2] == b"bb" {
            bytes[at..at + 2].copy_from_slice(b"..");
            changed += 1;
        }
    }
    assert!(changed > 0, "the listing is stored as it is");
    File::create(&image).unwrap().write_all(&bytes).unwrap();
    let to = env.path("to");
    fs::create_dir(&to).unwrap();
    let result = squash::unpack(&archive(&image), &to, &Unpack::default());
    assert!(result.is_err());
}
