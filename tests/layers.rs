//! Writable and read-only layers over the image.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;

use common::{Env, output, write};

#[test]
fn throw_away_layer_takes_writes_and_forgets_them() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.run([
        "exec",
        "--writable-tmpfs",
        image,
        "sh",
        "-c",
        "echo new > /opt/hello.txt && rm /bin/ls && mkdir /made && cat /opt/hello.txt",
    ]);
    assert_eq!(out.ok(), "new");
    assert_eq!(
        env.run(["exec", "--writable-tmpfs", image, "cat", "/opt/hello.txt"])
            .ok(),
        "hello"
    );
    let out = env.run([
        "exec",
        "--writable-tmpfs",
        "--writable-tmpfs-size",
        "1M",
        image,
        "dd",
        "if=/dev/zero",
        "of=/big",
        "bs=1M",
        "count=2",
    ]);
    assert!(
        out.status == 1 && out.stderr.contains("No space left"),
        "{out}"
    );
    env.run([
        "exec",
        "--writable-tmpfs",
        image,
        "dd",
        "if=/dev/zero",
        "of=/big",
        "bs=1M",
        "count=100",
    ])
    .ok();
}

#[test]
fn overlay_directory_keeps_changes() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let dir = env.path("overlay");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    env.run([
        "exec",
        "--overlay",
        dir,
        image,
        "sh",
        "-c",
        "echo kept > /opt/kept; rm /opt/hello.txt",
    ])
    .ok();
    assert_eq!(
        env.run(["exec", "--overlay", dir, image, "ls", "/opt"])
            .ok(),
        "kept"
    );
    let read_only = format!("{dir}:ro");
    assert_eq!(
        env.run(["exec", "--overlay", &read_only, image, "ls", "/opt"])
            .ok(),
        "kept",
        "deletions hold read-only too"
    );
    let out = env.run(["exec", "--overlay", &read_only, image, "touch", "/opt/x"]);
    assert!(
        out.status == 1 && out.stderr.contains("Read-only file system"),
        "{out}"
    );
    assert_eq!(env.run(["exec", image, "ls", "/opt"]).ok(), "hello.txt");
    env.run(["exec", "--overlay", "/no/such/overlay", image, "true"])
        .fatal(&["/no/such/overlay", "no such file or directory"]);
}

#[test]
fn overlay_works_beside_binds_and_fakeroot() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    write(&env.path("data/file"), "bound\n");
    let bind = format!("{}:/new/place", env.path("data").display());
    let out = env.run([
        "exec",
        "--writable-tmpfs",
        "-B",
        &bind,
        image,
        "sh",
        "-c",
        "cat /new/place/file; touch /x",
    ]);
    assert_eq!(out.ok(), "bound");
    let out = env.run([
        "exec",
        "--fakeroot",
        "--writable-tmpfs",
        image,
        "sh",
        "-c",
        "chown 33:33 /opt/hello.txt && stat -c %u /opt/hello.txt",
    ]);
    assert_eq!(out.ok(), "33");
}

/// A directory as fuse-overlayfs leaves it: a deleted file and directory, a replaced one, a file that is there again, a
/// directory that hides the one below in each way that it is marked, and what only looks like a mark.
fn layer_of_fuse_overlayfs(env: &Env, name: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = env.path(name);
    let upper = dir.join("upper");
    for (path, text) in [
        ("opt/.wh.gone", ""),
        ("opt/.wh.tree", ""),
        ("opt/.wh.again", ""),
        ("opt/again", "upper"),
        ("opt/.wh.replaced", ""),
        ("opt/replaced/mine", ""),
        ("opt/by-file/.wh..wh..opq", ""),
        ("opt/by-file/mine", ""),
        ("opt/by-file/deep/.wh.nothing", ""),
        ("opt/by-attribute/mine", ""),
        ("opt/.wh.somebody", "somebody's file"),
        ("opt/a b/\u{e9}/.wh.c\nd", ""),
    ] {
        write(&upper.join(path), text);
    }
    fs::create_dir_all(dir.join("work")).unwrap();
    fs::set_permissions(upper.join("opt"), fs::Permissions::from_mode(0o750)).unwrap();
    rustix::fs::setxattr(
        upper.join("opt/by-attribute"),
        "user.fuseoverlayfs.opaque",
        b"y",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    dir
}

#[test]
fn what_fuse_overlayfs_has_deleted_stays_deleted() {
    let env = Env::new();
    let tree = env.tree("tree");
    for path in [
        "gone",
        "tree/a/b",
        "again",
        "kept",
        "replaced/theirs",
        "by-file/theirs",
        "by-file/deep/theirs",
        "by-attribute/theirs",
        "somebody",
        "a b/\u{e9}/c\nd",
        "a b/\u{e9}/kept",
    ] {
        write(&tree.join("opt").join(path), "image");
    }
    let image = env.sif(&tree, "image.sif");
    let image = image.to_str().unwrap();
    // What is empty after it has been taken away again is not listed.
    let expected = "./.wh.somebody
./a b/\u{e9}/kept
./again
./by-attribute/mine
./by-file/mine
./hello.txt
./kept
./replaced/mine
./somebody
upper
750";
    let script = "cd /opt; find . ! -type d | sort; cat again; echo; stat -c %a .";
    let dir = layer_of_fuse_overlayfs(&env, "layer");
    let list = |overlay: &str, root: &str, more: &[&str]| {
        let words = [
            &["exec"],
            more,
            &["--overlay", overlay, root, "sh", "-c", script],
        ]
        .concat();
        env.run(words).ok().to_owned()
    };
    let read_only = format!("{}:ro", dir.display());
    let sandbox = tree.to_str().unwrap();
    for root in [image, sandbox] {
        assert_eq!(list(&read_only, root, &[]), expected);
        assert_eq!(list(&read_only, root, &["--writable-tmpfs"]), expected);
        assert_eq!(list(&read_only, root, &["--fakeroot"]), expected);
    }
    let marks = || {
        output(
            Command::new("find")
                .arg(dir.join("upper"))
                .args(["-name", ".wh.*", "-size", "0", "-printf", "x\n"]),
        )
        .ok()
        .lines()
        .count()
    };
    assert_eq!(marks(), 7, "the layer is as it was");
    // Below another layer, which deletes more.
    let second = env.path("second");
    write(&second.join("upper/opt/.wh.kept"), "");
    let out = env.run([
        "exec",
        "--overlay",
        &read_only,
        "--overlay",
        &format!("{}:ro", second.display()),
        image,
        "sh",
        "-c",
        "cd /opt; ls -A",
    ]);
    let names: Vec<&str> = out.ok().lines().collect();
    assert!(
        !names.contains(&"kept") && !names.contains(&"gone") && names.contains(&"again"),
        "{out}"
    );
    assert_eq!(
        names.iter().filter(|n| n.starts_with(".wh.")).count(),
        1,
        "{out}"
    );
    // Written, it gets the marks of the kernel.
    let writable = dir.to_str().unwrap();
    assert_eq!(list(writable, image, &[]), expected);
    assert_eq!(marks(), 0);
    assert_eq!(
        fs::read_to_string(dir.join("upper/opt/.wh.somebody")).unwrap(),
        "somebody's file"
    );
    assert_eq!(list(writable, image, &[]), expected, "and once more");
    assert_eq!(list(&read_only, image, &[]), expected);
    let out = env.run([
        "exec",
        "--overlay",
        writable,
        image,
        "sh",
        "-c",
        "cd /opt; echo new > gone; mkdir tree; ls tree; cat gone",
    ]);
    assert_eq!(out.ok(), "new");
}

/// An ext3 file system with an upper layer in which a file is new, one is deleted in each of the two styles, and a
/// directory hides the one below.
fn ext3(env: &Env) -> std::path::PathBuf {
    let dir = env.path("ext");
    write(&dir.join("upper/opt/note"), "from the overlay\n");
    write(&dir.join("upper/opt/.wh.hello.txt"), "");
    write(&dir.join("upper/srv/.wh..wh..opq"), "");
    write(&dir.join("upper/srv/mine"), "");
    fs::create_dir_all(dir.join("work")).unwrap();
    let image = env.path("overlay.img");
    output(
        Command::new("mkfs.ext3")
            .args(["-q", "-F", "-d"])
            .arg(&dir)
            .arg(&image)
            .arg("8M"),
    )
    .ok();
    image
}

#[test]
fn ext3_overlay_is_read_with_its_whiteouts() {
    let env = Env::new();
    let tree = env.tree("tree");
    write(&tree.join("srv/hidden"), "");
    let image = env.sif(&tree, "image.sif");
    let overlay = ext3(&env);
    let option = format!("{}:ro", overlay.display());
    let out = env.run([
        "exec",
        "--overlay",
        &option,
        image.to_str().unwrap(),
        "sh",
        "-c",
        "cat /opt/note; ls -A /opt; ls -A /srv",
    ]);
    assert_eq!(out.ok(), "from the overlay\nnote\nmine");
    // Embedded in the SIF it needs no option.
    let squashfs = env.squashfs(&tree, "again.squashfs", &[]);
    let embedded = env.path("embedded.sif");
    common::wrap(&squashfs, &embedded, &[&overlay]);
    let out = env.run([
        "exec",
        embedded.to_str().unwrap(),
        "sh",
        "-c",
        "cat /opt/note; ls -A /opt; ls -A /srv",
    ]);
    assert_eq!(out.ok(), "from the overlay\nnote\nmine");
    env.assert_nothing_left();
}

#[test]
fn writing_where_nothing_can_be_written_is_told() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    env.run(["exec", "--writable", image, "true"])
        .fatal(&["image.sif", "--writable"]);
    let squashfs = env.squashfs(&env.path("tree"), "layer.squashfs", &[]);
    let overlay = squashfs.to_str().unwrap();
    let out = env.run(["exec", "--overlay", overlay, image, "touch", "/x"]);
    assert_eq!(out.status, 1, "{out}");
    for words in [
        "WARNING:",
        "layer.squashfs",
        "read-only",
        "Read-only file system",
    ] {
        assert!(out.stderr.contains(words), "{words}: {out}");
    }
}

#[test]
fn squashfs_is_a_layer_too() {
    let env = Env::new();
    let image = env.image();
    write(&env.path("layer/opt/more"), "more\n");
    let layer = env.squashfs(&env.path("layer"), "layer.squashfs", &[]);
    let option = format!("{}:ro", layer.display());
    let out = env.run([
        "exec",
        "--overlay",
        &option,
        image.to_str().unwrap(),
        "ls",
        "/opt",
    ]);
    assert_eq!(out.ok(), "hello.txt\nmore");
}

#[test]
fn part_of_an_image_can_be_bound() {
    let env = Env::new();
    let image = env.image();
    write(&env.path("layer/data/file"), "from an image\n");
    let layer = env.squashfs(&env.path("layer"), "data.squashfs", &[]);
    let bind = format!("{}:/mnt:image-src=/data", layer.display());
    let out = env.run([
        "exec",
        "-B",
        &bind,
        image.to_str().unwrap(),
        "cat",
        "/mnt/file",
    ]);
    assert_eq!(out.ok(), "from an image");
}

#[test]
fn links_in_a_layer_do_not_lead_to_the_host() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    write(&env.path("secret/leaked"), "");
    let link = |dir: &str, name: &str| {
        fs::create_dir_all(env.path(dir)).unwrap();
        std::os::unix::fs::symlink(env.path("secret"), env.path(dir).join(name)).unwrap();
    };
    link("evil", "upper");
    let squashfs = env.squashfs(&env.path("evil"), "evil.squashfs", &[]);
    let ext = env.path("evil.img");
    output(
        Command::new("mkfs.ext3")
            .args(["-q", "-F", "-d"])
            .args([&env.path("evil"), &ext])
            .arg("8M"),
    )
    .ok();
    link("work-link", "work");
    let layers = [
        format!("{}:ro", squashfs.display()),
        format!("{}:ro", ext.display()),
        format!("{}:ro", env.path("evil").display()),
        env.path("evil").display().to_string(),
        env.path("work-link").display().to_string(),
    ];
    for layer in layers {
        env.run(["exec", "--overlay", &layer, image, "ls", "/"])
            .fatal(&["symbolic link", layer.trim_end_matches(":ro")]);
    }
    assert_eq!(fs::read_dir(env.path("secret")).unwrap().count(), 1);
}

#[test]
fn part_of_an_image_is_what_it_is_whatever_its_name() {
    let env = Env::new();
    let image = env.image();
    write(&env.path("layer/plain"), "plain\n");
    write(&env.path("layer/site.d/file"), "dotted\n");
    let layer = env.squashfs(&env.path("layer"), "data.squashfs", &[]);
    let bind = |part: &str, target: &str| format!("{}:{target}:image-src={part}", layer.display());
    let out = env.run([
        "exec",
        "-B",
        &bind("/plain", "/new/plain"),
        "-B",
        &bind("/site.d", "/new/site.d"),
        image.to_str().unwrap(),
        "cat",
        "/new/plain",
        "/new/site.d/file",
    ]);
    assert_eq!(out.ok(), "plain\ndotted");
    let bind = bind("/no/such", "/new/place");
    env.run(["exec", "-B", &bind, image.to_str().unwrap(), "true"])
        .fatal(&["/no/such", "is not in the image", "data.squashfs"]);
}
