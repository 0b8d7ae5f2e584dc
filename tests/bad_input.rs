//! Bad images and impossible requests: one clear line, status 255, nothing left behind.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use common::{Env, Output, write};

fn exec(env: &Env, image: &str) -> Output {
    env.run(["exec", image, "true"])
}

#[test]
fn files_that_are_no_images_are_told_apart() {
    let env = Env::new();
    let at = |name: &str| env.path(name).to_str().unwrap().to_owned();
    exec(&env, &at("missing.sif")).fatal(&["missing.sif", "no such file or directory"]);
    write(&env.path("empty.sif"), "");
    exec(&env, &at("empty.sif")).fatal(&["empty.sif", "empty"]);
    write(&env.path("text.sif"), "just some text\n");
    exec(&env, &at("text.sif")).fatal(&["text.sif", "image format not recognized"]);
    write(&env.path("secret.sif"), "x");
    fs::set_permissions(env.path("secret.sif"), fs::Permissions::from_mode(0o000)).unwrap();
    exec(&env, &at("secret.sif")).fatal(&["secret.sif", "ermission"]);
    exec(&env, "bogus://image").fatal(&["bogus"]);
    exec(&env, "docker://127.0.0.1:9/alpine").fatal(&["docker://127.0.0.1:9/alpine"]);
    exec(&env, "/dev/null").fatal(&["/dev/null"]);
    assert!(env.servers().is_empty());
}

#[test]
fn cut_images_say_how_much_is_missing() {
    let env = Env::new();
    let image = env.image();
    let whole = fs::read(&image).unwrap();
    for (keep, words) in [
        (40, "truncated"),
        (4096, "truncated"),
        (whole.len() / 2, "more bytes"),
        (whole.len() - 1, "1 more byte"),
    ] {
        let path = env.path("cut.sif");
        fs::write(&path, &whole[..keep]).unwrap();
        let out = exec(&env, path.to_str().unwrap());
        out.fatal(&["cut.sif"]);
        assert!(out.stderr.contains(words) || keep < 5000, "{keep}: {out}");
    }
    env.assert_nothing_left();
}

#[test]
fn compressor_that_is_not_supported_is_named() {
    let env = Env::new();
    let tree = env.path("small");
    write(&tree.join("file"), &"text ".repeat(5000));
    for compressor in ["lzo", "lzma"] {
        let image = env.squashfs(
            &tree,
            &format!("{compressor}.squashfs"),
            &["-comp", compressor],
        );
        exec(&env, image.to_str().unwrap()).fatal(&[compressor, "gzip"]);
    }
}

#[test]
fn other_architecture_is_an_error_that_names_both() {
    let env = Env::new();
    let image = env.image();
    let mut bytes = fs::read(&image).unwrap();
    // The architecture of the partition stands in its descriptor's `extra` field, as in the header at byte 45.
    let arm64 = b"04\0";
    let host = bytes[45..48].to_vec();
    assert_ne!(host, arm64);
    bytes[45..48].copy_from_slice(arm64);
    for i in 0..bytes.len().min(32768).saturating_sub(3) {
        if i > 4096 && bytes[i..i + 3] == host[..] {
            bytes[i..i + 3].copy_from_slice(arm64);
        }
    }
    let path = env.path("arm64.sif");
    fs::write(&path, bytes).unwrap();
    exec(&env, path.to_str().unwrap()).fatal(&["arm64", "amd64"]);
}

#[test]
fn usage_errors_end_with_one() {
    let env = Env::new();
    let out = env.run(["exec", "only-image.sif"]);
    assert_eq!(out.status, 1);
    assert!(
        out.stderr
            .contains("Error for command \"exec\": requires at least 2 arg(s), only received 1"),
        "{out}"
    );
    let out = env.run(["exec", "--no-such-flag", "x", "y"]);
    assert!(
        out.status == 1 && out.stderr.contains("unknown flag: --no-such-flag"),
        "{out}"
    );
    let out = env.run(["nosuch"]);
    assert!(
        out.status == 1 && out.stderr.contains("unknown command \"nosuch\""),
        "{out}"
    );
    let none: [&str; 0] = [];
    assert_eq!(env.run(none).status, 1);
}

#[test]
fn control_bytes_of_names_do_not_reach_the_terminal() {
    let env = Env::new();
    let out = exec(&env, "\x1b[31mred\n.sif");
    out.fatal(&["red"]);
    assert!(!out.stderr.contains('\x1b'), "{out}");
}

#[test]
fn damaged_blocks_give_an_error_to_the_reader_and_nothing_else() {
    let env = Env::new();
    let tree = env.tree("tree");
    let numbers: String = (0..60_000u64)
        .map(|i| format!("{}\n", i.wrapping_mul(6_364_136_223_846_793_005) >> 40))
        .collect();
    write(&tree.join("opt/big"), &numbers);
    let image = env.sif_with(&tree, "image.sif", &["-comp", "gzip", "-no-fragments"]);
    let mut bytes = fs::read(&image).unwrap();
    let start = bytes.windows(4).position(|w| w == b"hsqs").unwrap();
    // Byte 64 of the superblock: where the inode table begins, behind all data. The last large file lies just before.
    let inodes = start
        + usize::try_from(u64::from_le_bytes(
            bytes[start + 64..start + 72].try_into().unwrap(),
        ))
        .unwrap();
    for byte in &mut bytes[inodes - 20_000..inodes - 19_000] {
        *byte = !*byte;
    }
    let path = env.path("damaged.sif");
    fs::write(&path, &bytes).unwrap();
    for _ in 0..3 {
        let out = env.run(["exec", path.to_str().unwrap(), "cat", "/opt/big"]);
        assert_eq!(out.status, 1, "{}", out.stderr);
        assert!(
            out.stderr.contains("Input/output error") || out.stderr.contains("I/O error"),
            "{}",
            out.stderr
        );
        assert!(numbers.starts_with(&out.stdout), "no wrong bytes");
        assert_eq!(
            env.run(["exec", path.to_str().unwrap(), "cat", "/opt/hello.txt"])
                .ok(),
            "hello"
        );
    }
    env.assert_nothing_left();
}

/// Runs the program on a machine that was spoilt: as root of a throw-away namespace for `spoil`, then as oneself.
fn spoilt(env: &Env, spoil: &str, args: &[&str]) -> Output {
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let script = format!("{spoil} && exec unshare -U --map-user={uid} --map-group={gid} -- \"$@\"");
    let words = [
        "-Urm",
        "sh",
        "-c",
        &script,
        "sh",
        env!("CARGO_BIN_EXE_capsid"),
    ];
    let mut command = env.command_as("/usr/bin/unshare".as_ref(), words.iter().chain(args));
    common::output(&mut command)
}

#[test]
fn machine_that_lacks_something_gets_the_remedy() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let exec = ["exec", image, "true"];
    spoilt(&env, "mount --bind /dev/null /dev/fuse", &exec).fatal(&["/dev/fuse", "mknod"]);
    spoilt(&env, "mount -t tmpfs none /dev", &exec)
        .fatal(&["no /dev/fuse", "load the kernel module fuse"]);
    // Without the right to mount, which makes up for it.
    let limit = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set -sys_admin \"$@\"";
    let words = [
        "-Ur",
        "sh",
        "-c",
        limit,
        "sh",
        env!("CARGO_BIN_EXE_capsid"),
        "exec",
        image,
        "true",
    ];
    let out = common::output(&mut env.command_as("/usr/bin/unshare".as_ref(), words));
    out.fatal(&[
        "user namespace",
        "user.max_user_namespaces=65536 >/etc/sysctl.d",
    ]);
    // Without the helpers, or without a range, others are emulated, or root is alone inside; and it is told so.
    let fakeroot = ["exec", "--fakeroot", image, "id", "-u"];
    for lack in [
        "mount --bind /dev/null /usr/bin/newuidmap",
        "mount --bind /dev/null /etc/subuid",
    ] {
        let out = spoilt(&env, lack, &fakeroot);
        assert_eq!(out.ok(), "0", "{lack}");
        assert!(out.stderr.contains("INFO:    no subordinate ids"), "{out}");
        let alone = [
            "exec",
            "--fakeroot",
            "--ignore-fakeroot-command",
            image,
            "id",
            "-u",
        ];
        let out = spoilt(&env, lack, &alone);
        assert_eq!(out.ok(), "0", "{lack}");
        assert!(out.stderr.contains("WARNING: no subordinate ids"), "{out}");
    }
    env.assert_nothing_left();
}

#[test]
fn read_only_and_missing_homes_are_no_obstacle() {
    let env = Env::new();
    let image = env.image();
    let spoil = "mount --bind \"$HOME\" \"$HOME\" && mount -o remount,bind,ro \"$HOME\"";
    spoilt(&env, spoil, &["exec", image.to_str().unwrap(), "true"]).ok();
    spoilt(
        &env,
        "mount -t tmpfs none /home",
        &["exec", image.to_str().unwrap(), "true"],
    )
    .ok();
}

#[test]
fn hostile_files_in_the_image_stay_inside() {
    let env = Env::new();
    let tree = env.tree("tree");
    let canary = env.path("canary");
    write(&canary, "untouched");
    fs::remove_file(tree.join("etc/passwd")).unwrap();
    std::os::unix::fs::symlink(&canary, tree.join("etc/passwd")).unwrap();
    fs::remove_file(tree.join("etc/group")).unwrap();
    nix::unistd::mkfifo(
        &tree.join("etc/group"),
        nix::sys::stat::Mode::from_bits_truncate(0o644),
    )
    .unwrap();
    fs::remove_file(tree.join("etc/hosts")).unwrap();
    fs::create_dir(tree.join("etc/hosts")).unwrap();
    fs::remove_dir(tree.join("tmp")).unwrap();
    std::os::unix::fs::symlink("/../../../../opt", tree.join("tmp")).unwrap();
    let image = env.sif(&tree, "image.sif");
    let start = std::time::Instant::now();
    let out = env.run(["exec", image.to_str().unwrap(), "true"]);
    assert!(out.status == 0 || out.status == 255, "{out}");
    assert!(
        start.elapsed().as_secs() < 10,
        "it does not wait for the fifo"
    );
    assert_eq!(fs::read_to_string(&canary).unwrap(), "untouched");
}

#[test]
fn names_that_are_none_are_refused() {
    let env = Env::new();
    env.image();
    // A working directory that could be run.
    let tree = env.path("tree");
    let out = common::output(env.command(["exec", "", "true"]).current_dir(tree));
    out.fatal(&["the name of the image is empty"]);
    for name in ["instance:x", "instance:", "instance://x", "instance://"] {
        let out = env.run(["exec", name, "true"]);
        assert!(!out.stderr.contains("bug"), "{name}: {out}");
        assert_eq!(out.status, 255, "{name}: {out}");
    }
}

#[test]
fn what_would_hide_the_image_or_itself_is_refused() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    env.run(["exec", "-B", "/etc:/", image, "true"])
        .fatal(&["bound on /"]);
    env.run(["exec", "-B", "/etc:/opt/..", image, "true"])
        .fatal(&["bound on /"]);
    env.run(["exec", "--scratch", "/", image, "true"])
        .fatal(&["--scratch", "mounted on /"]);
    let layer = env.squashfs(&env.path("tree"), "layer.squashfs", &[]);
    let layer = format!("{}:ro", layer.display());
    let words = [
        "exec",
        "--overlay",
        &layer,
        "--overlay",
        &layer,
        image,
        "true",
    ];
    env.run(words).fatal(&["layer.squashfs", "given twice"]);
}

/// Limits of the caller's shell under which a program cannot even begin, or write.
#[test]
fn limits_that_are_too_small_are_told() {
    let env = Env::new();
    let image = env.image();
    let limited = |limit: &str, words: &str| {
        let script = format!("ulimit {limit}; exec \"$0\" {words}");
        let mut command = env.command_as("/bin/sh".as_ref(), ["-c", &script]);
        common::output(command.args([env!("CARGO_BIN_EXE_capsid"), image.to_str().unwrap()]))
    };
    for limit in ["-s 16", "-s 64", "-S -s 100"] {
        for words in ["exec \"$1\" true", "inspect \"$1\"", "--version"] {
            limited(limit, words).fatal(&["stack", "ulimit -s"]);
        }
    }
    limited("-s 1024", "exec \"$1\" true").ok();
    limited("-f 0", "exec -f --ignore-subuid \"$1\" true").fatal(&["too large", "ulimit -f"]);
    // The payload has what the caller had: it is ended.
    let out = limited(
        "-f 100",
        "-q exec --contain \"$1\" dd if=/dev/zero of=/tmp/x bs=4096 count=1000",
    );
    assert_eq!(out.status, 128 + 25, "{out}");
}

/// A site may let its users run the program and not read it: then its own files in procfs are root's.
#[test]
fn program_that_may_not_be_read_runs() {
    let env = Env::new();
    let image = env.image();
    let program = env.path("capsid");
    fs::copy(env!("CARGO_BIN_EXE_capsid"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o111)).unwrap();
    for options in [
        &["exec"][..],
        &["exec", "--fakeroot"],
        &["exec", "--fakeroot", "--ignore-subuid"],
    ] {
        let mut command = env.command_as(&program, options);
        let out = common::output(command.arg(&image).args(["echo", "runs"]));
        assert_eq!(out.ok(), "runs", "{options:?}");
    }
}
