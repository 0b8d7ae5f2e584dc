//! Trees, images and requests for the tests. Images are made by the reference tools; a test dies when they are missing.
#![allow(dead_code)] // each test file uses a part of it

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use capsid_fuse::{Archive, InodeRef, Kind};

pub const TOOL: &str = env!("CARGO_BIN_EXE_capsid-fuse");

/// Bytes that do not compress to nothing and repeat only after a while.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        let word = step();
        // Half of it is text, so that compressors find something.
        if word & 1 == 0 {
            bytes.extend_from_slice(&word.to_le_bytes());
        } else {
            bytes.extend_from_slice(format!("line {} of the text\n", word % 1000).as_bytes());
        }
    }
    bytes.truncate(len);
    bytes
}

/// A tree with one of everything.
pub fn make_tree(root: &Path) {
    let write = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    fs::create_dir_all(root.join("deep/er/and/deeper")).unwrap();
    fs::create_dir(root.join("void")).unwrap();
    write("empty", b"");
    write("small", b"a small file\n");
    write("deep/er/and/deeper/tail", &noise(5000, 3));
    write("large", &noise(2_500_003, 7));
    write("exact", &noise(1 << 20, 9));
    write("zeros", &vec![0; 300_000]);
    write("random", &noise(70_001, 11));
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"middle", 1_500_000).unwrap();
    sparse.set_len(4_000_001).unwrap();
    fs::hard_link(root.join("small"), root.join("hard link")).unwrap();
    fs::write(root.join("n".repeat(255)), "long name").unwrap();
    fs::write(
        root.join(std::ffi::OsStr::from_bytes(b"\xff\xfe not utf-8")),
        "bytes",
    )
    .unwrap();
    symlink("small", root.join("link")).unwrap();
    symlink(
        "/absolute/".to_string() + &"x".repeat(3000),
        root.join("long link"),
    )
    .unwrap();
    symlink("deep", root.join("deep link")).unwrap();
    let many = root.join("many");
    fs::create_dir(&many).unwrap();
    for number in 0..3200 {
        let mut file =
            File::create(many.join(format!("entry-{number:05}-{}", "y".repeat(number % 40))))
                .unwrap();
        write!(file, "{number}").unwrap();
    }
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), fifo, 0o640.into(), 0).unwrap();
    fs::set_permissions(root.join("random"), fs::Permissions::from_mode(0o4750)).unwrap();
    fs::set_permissions(root.join("deep"), fs::Permissions::from_mode(0o1777)).unwrap();
    set_xattr(&root.join("small"), "user.short", b"value");
    set_xattr(&root.join("small"), "user.empty", b"");
    set_xattr(&root.join("large"), "user.large", &noise(3000, 5));
    set_xattr(&root.join("random"), "user.large", &noise(3000, 5));
    set_xattr(&root.join("deep"), "user.directory", b"\0binary\xff");
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty())
        .expect("the temporary directory needs a file system with user xattrs");
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?} is needed: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Packs a tree with the reference tool.
pub fn pack(tree: &Path, image: &Path, options: &[&str]) {
    let mut command = Command::new("mksquashfs");
    command
        .arg(tree)
        .arg(image)
        .args(["-noappend", "-quiet", "-no-progress"]);
    run(command.args(options));
}

/// A tree, and the image packed from it.
pub fn image(options: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree);
    let image = dir.path().join("image");
    pack(&tree, &image, options);
    (dir, image)
}

pub fn open(image: &Path) -> Archive {
    Archive::open(File::open(image).unwrap(), 0, None).unwrap()
}

/// Names and inodes of a directory.
pub fn names(
    archive: &Archive,
    dir: InodeRef,
) -> Result<Vec<(Vec<u8>, InodeRef, Kind)>, capsid_fuse::Error> {
    let mut names = Vec::new();
    archive.read_dir(dir, 0, &mut |entry| {
        names.push((entry.name.to_vec(), entry.inode, entry.kind));
        true
    })?;
    Ok(names)
}

/// The whole content of a file, read in odd steps.
pub fn content(archive: &Archive, at: InodeRef) -> Result<Vec<u8>, capsid_fuse::Error> {
    let mut all = Vec::new();
    let mut part = vec![0; 99_991];
    loop {
        match archive.read(at, all.len() as u64, &mut part)? {
            0 => return Ok(all),
            count => all.extend_from_slice(&part[..count]),
        }
    }
}

/// A script that describes the tree in the current directory.
pub const MANIFEST: &str = r#"{
find . -type f -printf 'f %p %m %s %n %Ts\n'
find . ! -type f -printf '%y %p %m %Ts %l\n'
find . -type f -print0 | xargs -0 sha256sum
} | LC_ALL=C sort"#;

/// Runs a script as root of a new user namespace, in which the tool `mount IMAGE [OPTIONS]` mounts on `$M`.
pub fn with_mount(image: &Path, offset: u64, script: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "set -e\n\"$TOOL\" -o offset={offset} \"$IMAGE\" \"$M\"\ncd \"$M\"\n{script}\ncd /\numount \"$M\"\n"
    );
    run(Command::new("unshare")
        .args(["-Urm", "timeout", "300", "sh", "-c", &script])
        .env("TOOL", TOOL)
        .env("IMAGE", image)
        .env("M", dir.path()))
}
