//! `sif new|add|del|setprim` and `overlay create`: what changes a SIF or makes an overlay.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Env, Output};

fn run(env: &Env, words: &[&str], path: &Path, more: &[&str]) -> Output {
    let path = path.to_str().unwrap();
    env.run(
        words
            .iter()
            .copied()
            .chain([path])
            .chain(more.iter().copied()),
    )
}

#[track_caller]
fn usage(out: &Output, words: &[&str]) {
    assert_eq!(out.status, 1, "{out}");
    for word in words {
        assert!(out.stderr.contains(word), "{word:?} is missing: {out}");
    }
}

/// A SIF of a squashfs that runs.
fn image(env: &Env) -> PathBuf {
    image_and_root(env).0
}

/// The same, and the squashfs.
fn image_and_root(env: &Env) -> (PathBuf, String) {
    let (sif, text) = (env.path("x.sif"), env.path("text"));
    fs::write(&text, "bootstrap: scratch\n").unwrap();
    run(env, &["sif", "new"], &sif, &[]).ok();
    let text = text.to_str().unwrap();
    run(
        env,
        &["sif", "add", "--datatype", "1", "--groupid", "1"],
        &sif,
        &[text],
    )
    .ok();
    let root = env.tree("root");
    let fast = ["-comp", "zstd", "-Xcompression-level", "1"];
    let squashfs = env.squashfs(&root, "x.squashfs", &fast);
    let squashfs = squashfs.to_str().unwrap().to_owned();
    let words = [
        "sif",
        "add",
        "--datatype=4",
        "--parttype=2",
        "--partfs=1",
        "--partarch=2",
        "--groupid=1",
    ];
    run(env, &words, &sif, &[&squashfs]).ok();
    (sif, squashfs)
}

#[test]
fn a_sif_is_made_from_nothing_and_runs() {
    let env = Env::new();
    let sif = image(&env);
    let listed = run(&env, &["sif", "list"], &sif, &[]);
    assert!(
        listed
            .ok()
            .contains("1    |1       |NONE    |32176-32195               |Def.FILE"),
        "{listed}"
    );
    assert!(
        listed.stdout.contains("FS (Squashfs/*System/amd64)"),
        "{listed}"
    );
    let header = run(&env, &["sif", "header"], &sif, &[]);
    assert!(
        header.ok().contains("Primary Architecture: amd64"),
        "{header}"
    );
    assert!(
        header.stdout.contains("Descriptors Free:     46"),
        "{header}"
    );
    run(&env, &["exec"], &sif, &["true"]).ok();
}

#[test]
fn an_empty_sif_has_no_architecture() {
    let env = Env::new();
    let sif = env.path("x.sif");
    run(&env, &["sif", "new"], &sif, &[]).ok();
    let header = run(&env, &["sif", "header"], &sif, &[]);
    assert!(
        header.ok().starts_with("Version:            01\nID:"),
        "{header}"
    );
    assert!(
        header.stdout.contains("Data Size:          0 B"),
        "{header}"
    );
}

#[test]
fn objects_are_added_and_deleted_and_others_keep_their_bytes() {
    let env = Env::new();
    let sif = image(&env);
    let data = env.path("data");
    fs::write(&data, "some data").unwrap();
    let data = data.to_str().unwrap();
    for _ in 0..2 {
        run(
            &env,
            &[
                "sif",
                "add",
                "--datatype",
                "7",
                "--filename",
                "n",
                "--link",
                "2",
            ],
            &sif,
            &[data],
        )
        .ok();
    }
    let info = env.run(["sif", "info", "3", sif.to_str().unwrap()]);
    assert!(
        info.ok().contains("Linked ID:    2") && info.stdout.contains("Name:         n"),
        "{info}"
    );
    let path = sif.to_str().unwrap();
    env.run(["sif", "del", "3", path]).ok();
    assert_eq!(env.run(["sif", "dump", "4", path]).stdout, "some data");
    usage(&env.run(["sif", "info", "3", path]), &["object not found"]);
    // The slot is used again; the bytes of the others stay.
    run(&env, &["sif", "add", "--datatype", "6"], &sif, &[data]).ok();
    assert_eq!(env.run(["sif", "dump", "3", path]).stdout, "some data");
    env.run(["exec", path, "true"]).ok();
    // The last object's space is given back.
    env.run(["sif", "del", "4", path]).ok();
    env.run(["sif", "del", "3", path]).ok();
    let header = env.run(["sif", "header", path]);
    assert!(header.ok().contains("Descriptors Free:     46"), "{header}");
}

#[test]
fn another_partition_becomes_the_root() {
    let env = Env::new();
    let (sif, squashfs) = image_and_root(&env);
    let path = sif.to_str().unwrap();
    let words = [
        "sif",
        "add",
        "--datatype=4",
        "--parttype=1",
        "--partfs=1",
        "--partarch=4",
    ];
    run(&env, &words, &sif, &[&squashfs]).ok();
    env.run(["sif", "setprim", "3", path]).ok();
    let listed = env.run(["sif", "list", path]);
    assert!(
        listed.ok().contains("FS (Squashfs/System/amd64)"),
        "{listed}"
    );
    assert!(
        listed.stdout.contains("FS (Squashfs/*System/arm64)"),
        "{listed}"
    );
    let header = env.run(["sif", "header", path]);
    assert!(
        header.ok().contains("Primary Architecture: arm64"),
        "{header}"
    );
    usage(
        &env.run(["sif", "setprim", "1", path]),
        &["data object not a partition"],
    );
}

#[test]
fn what_a_sif_refuses() {
    let env = Env::new();
    let sif = image(&env);
    let path = sif.to_str().unwrap();
    let before = fs::read(&sif).unwrap();
    let text = env.path("text");
    let text = text.to_str().unwrap();
    usage(
        &env.run(["sif", "add", path, text]),
        &["-datatype flag is required with a valid range"],
    );
    usage(
        &env.run(["sif", "add", "--datatype", "12", path, text]),
        &["valid range"],
    );
    usage(
        &env.run(["sif", "add", "--datatype", "4", path, text]),
        &["--partfs, --parttype and --partarch"],
    );
    let primary = [
        "sif",
        "add",
        "--datatype=4",
        "--parttype=2",
        "--partfs=1",
        "--partarch=2",
        path,
        text,
    ];
    usage(
        &env.run(primary),
        &["image already contains a primary partition"],
    );
    usage(
        &env.run(["sif", "add", "--datatype=5", "--signhash=1", path, text]),
        &["--signentity"],
    );
    usage(
        &env.run(["sif", "add", "--datatype=9", path, text]),
        &["--sbomformat"],
    );
    usage(
        &env.run(["sif", "add", "--wrong", "1", path, text]),
        &["unknown flag: --wrong"],
    );
    usage(&env.run(["sif", "del", "9", path]), &["object not found"]);
    usage(&env.run(["sif", "del", "x", path]), &["number"]);
    usage(&env.run(["sif", "del", "1", text]), &["truncated"]);
    usage(
        &env.run(["sif", "del", "1"]),
        &["accepts 2 arg(s), received 1"],
    );
    assert!(fs::read(&sif).unwrap() == before, "nothing was changed");
    let full = env.path("full.sif");
    run(&env, &["sif", "new"], &full, &[]).ok();
    for _ in 0..48 {
        run(&env, &["sif", "add", "--datatype=7"], &full, &[text]).ok();
    }
    usage(
        &run(&env, &["sif", "add", "--datatype=7"], &full, &[text]),
        &["48 objects"],
    );
}

fn inside(image: &Path, directory: &str) -> String {
    let out = Command::new("/usr/sbin/debugfs")
        .args(["-R", &format!("ls -l {directory}")])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn an_overlay_is_made_and_can_be_laid_over() {
    let env = Env::new();
    let (overlay, sif) = (env.path("o.img"), image(&env));
    let out = run(
        &env,
        &["overlay", "create", "--create-dir", "/opt/made,data"],
        &overlay,
        &[],
    );
    assert_eq!(out.ok(), "");
    let meta = fs::metadata(&overlay).unwrap();
    assert_eq!(meta.len(), 64 << 20);
    let user = format!("{}", nix::unistd::getuid());
    assert!(inside(&overlay, "/upper/opt").contains("made"));
    assert!(
        inside(&overlay, "/").contains(&user),
        "{}",
        inside(&overlay, "/")
    );
    let over = format!("{}:ro", overlay.display());
    env.run([
        "exec",
        "--overlay",
        &over,
        sif.to_str().unwrap(),
        "test",
        "-d",
        "/opt/made",
    ])
    .ok();
    run(&env, &["overlay", "create"], &overlay, &[]).fatal(&["o.img", "already exists"]);
}

#[test]
fn a_sparse_overlay_takes_no_space_and_others_do() {
    use std::os::unix::fs::MetadataExt as _;
    let env = Env::new();
    let (sparse, full) = (env.path("sparse.img"), env.path("full.img"));
    run(
        &env,
        &["overlay", "create", "--sparse", "--size", "100"],
        &sparse,
        &[],
    )
    .ok();
    run(&env, &["overlay", "create", "--size=100"], &full, &[]).ok();
    let by_environment = env.path("environment.img");
    let words = ["overlay", "create", "--size=100"].map(std::ffi::OsString::from);
    let words = words.into_iter().chain([by_environment.clone().into()]);
    common::output(env.command(words).env("APPTAINER_SPARSE", "1")).ok();
    let taken = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(taken(&sparse) < 50 << 20);
    assert!(taken(&by_environment) < 50 << 20);
    assert!(taken(&full) >= 100 << 20);
}

#[test]
fn with_fakeroot_the_overlay_belongs_to_root() {
    let env = Env::new();
    let overlay = env.path("o.img");
    run(
        &env,
        &["overlay", "create", "--fakeroot", "--create-dir", "a b/c"],
        &overlay,
        &[],
    )
    .ok();
    for directory in ["/", "/upper", "\"/upper/a b\""] {
        let listed = inside(&overlay, directory);
        let user = format!(" {} ", nix::unistd::getuid());
        assert!(
            !listed.contains(&user) && listed.contains(" 0 "),
            "{listed}"
        );
    }
}

#[test]
fn a_sif_gets_one_overlay() {
    let env = Env::new();
    let sif = image(&env);
    run(
        &env,
        &["overlay", "create", "--create-dir", "/made"],
        &sif,
        &[],
    )
    .ok();
    let listed = run(&env, &["sif", "list"], &sif, &[]);
    assert!(listed.ok().contains("3    |1       |NONE"), "{listed}");
    assert!(
        listed.stdout.contains("FS (Ext3/Overlay/amd64)"),
        "{listed}"
    );
    run(&env, &["exec"], &sif, &["test", "-d", "/made"]).ok();
    run(&env, &["overlay", "create"], &sif, &[]).fatal(&["already exists", "ID: 3", "sif del 3"]);
}

#[test]
fn what_an_overlay_cannot_be() {
    let env = Env::new();
    let sif = image(&env);
    run(
        &env,
        &["overlay", "create", "--size", "63"],
        &env.path("o.img"),
        &[],
    )
    .fatal(&["equal or greater than 64 MiB"]);
    run(
        &env,
        &["overlay", "create", "--create-dir", "../x"],
        &env.path("o.img"),
        &[],
    )
    .fatal(&["../x", "lead out"]);
    run(&env, &["overlay", "create", "--sparse"], &sif, &[]).fatal(&["--sparse"]);
    run(
        &env,
        &["overlay", "create"],
        Path::new("/nonexistent/o.img"),
        &[],
    )
    .fatal(&["/nonexistent/o.img", "No such file"]);
    let text = env.path("text");
    let text = text.to_str().unwrap();
    let signature = [
        "sif",
        "add",
        "--datatype=5",
        "--signhash=1",
        "--signentity",
        "433FE984155206BD962725E20E8713472A879943",
    ];
    run(&env, &signature, &sif, &[text]).ok();
    run(&env, &["overlay", "create"], &sif, &[])
        .fatal(&["is signed: could not add writable overlay"]);
    env.run(["overlay", "seal"])
        .fatal(&["overlay seal is not supported"]);
}

#[test]
fn nothing_is_left_when_the_limit_of_file_size_is_met() {
    let env = Env::new();
    let overlay = env.path("o.img");
    // The limit holds for one file.
    let script = format!(
        "ulimit -f 1000; exec {} overlay create {}",
        env!("CARGO_BIN_EXE_capsid"),
        overlay.display()
    );
    let out = common::output(Command::new("bash").args(["-c", &script]));
    out.fatal(&["cannot write", "o.img", "File too large"]);
    let left: Vec<_> = fs::read_dir(overlay.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|name| name.to_string_lossy().contains("overlay"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
