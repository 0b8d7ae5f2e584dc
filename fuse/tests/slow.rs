//! Starts from slow storage: what an earlier start has read is read before it is asked for. How much time that saves is
//! measured by `benches/compare storage`.
#![allow(clippy::unwrap_used)] // an error ends the test

mod common;
#[path = "common/slow_storage.rs"]
mod slow_storage;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use common::{TOOL, pack, run};

const NAME: &str = "what_an_import_storm_has_read_is_read_ahead_of_the_next_one";
/// The driver reads nothing more by itself when it has read nothing for so long.
const QUIET: Duration = Duration::from_secs(2);
/// What a program of some size imports.
const IMPORTS: &str = "import argparse, ast, asyncio, csv, ctypes, decimal, difflib, doctest, email.mime.text, \
    html.parser, http.client, http.server, imaplib, inspect, json, logging.config, mailbox, multiprocessing.pool, pdb, \
    pickletools, pydoc, sqlite3, ssl, statistics, tarfile, typing, unittest.mock, urllib.request, uuid, \
    xml.dom.minidom, xml.etree.ElementTree, xmlrpc.client, zipfile, concurrent.futures, lib2to3.pytree, wsgiref.simple_server";

#[test]
fn what_an_import_storm_has_read_is_read_ahead_of_the_next_one() {
    if let Some(image) = std::env::var_os("TEST_IMAGE") {
        return measure(image.as_ref());
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    run(Command::new("sh")
        .args(["-c", "cp -rp \"$(/usr/bin/python3 -S -c 'import os; print(os.path.dirname(os.__file__))')\" \"$0\""])
        .arg(&tree));
    make_packages(&tree);
    let image = dir.path().join("image");
    pack(&tree, &image, &["-comp", "lz4"]);
    let told = run(Command::new("unshare")
        .args(["-Urm", "timeout", "600"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env("TEST_IMAGE", image));
    println!("{told}");
}

fn measure(image: &Path) {
    let profiles = tempfile::tempdir().unwrap();
    let without = storm(image, None);
    // The first one only notes.
    storm(image, Some(profiles.path()));
    let files: Vec<_> = fs::read_dir(profiles.path()).unwrap().flatten().collect();
    assert_eq!(files.len(), 1, "one profile and no drafts");
    assert_eq!(
        files[0].metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    let with = storm(image, Some(profiles.path()));
    assert!(
        with * 10 <= without,
        "{with} reads after those ahead, {without} without a profile"
    );
    // What cannot be understood is no profile, and no error.
    fs::write(files[0].path(), b"capsidP1 and then something else").unwrap();
    storm(image, Some(profiles.path()));
}

/// Packages of which each module brings a library of its own, which lie far apart, as in numpy and scipy.
fn make_packages(tree: &Path) {
    let filler = common::noise(6 << 20, 3);
    for package in 0..20 {
        let dir = tree.join(format!("package{package}"));
        fs::create_dir(&dir).unwrap();
        let mut all = String::new();
        for module in 0..60 {
            // As the loader does with a shared library: its head, and its tables at the end.
            let code = "with open(__path__[0] + '/table.data', 'rb', 0) as f: f.read(4096); f.seek(-4096, 2); f.read()\n";
            let part = dir.join(format!("m{module}"));
            fs::create_dir(&part).unwrap();
            fs::write(part.join("__init__.py"), code).unwrap();
            let start = (package * 60 + module) * 4001;
            fs::write(part.join("table.data"), &filler[start..start + (128 << 10)]).unwrap();
            // Not in the order in which they lie.
            all += &format!("from . import m{}\n", module * 17 % 60);
        }
        fs::write(dir.join("__init__.py"), all).unwrap();
    }
    run(Command::new("/usr/bin/python3")
        .args(["-S", "-m", "compileall", "-q"])
        .args((0..20).map(|n| tree.join(format!("package{n}")))));
}

/// It must not outlive a test that fails.
struct Driver(std::process::Child);

impl Drop for Driver {
    fn drop(&mut self) {
        let _ended = self.0.kill();
    }
}

/// How often the storage is read by the imports, after what the driver reads by itself.
fn storm(image: &Path, profile: Option<&Path>) -> u64 {
    let slow = tempfile::tempdir().unwrap();
    let point = tempfile::tempdir().unwrap();
    let storage = slow_storage::serve(image, slow.path(), Duration::ZERO).unwrap();
    let mut options = "offset=0".to_string();
    if let Some(directory) = profile {
        options += &format!(",profile={}", directory.display());
    }
    // Before the driver begins: it may have mounted when we come to look.
    let before = rustix::fs::stat(point.path()).unwrap().st_dev;
    let mut driver = Driver(
        Command::new(TOOL)
            .args(["-f", "-o", &options])
            .arg(slow.path().join("image"))
            .arg(point.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    while rustix::fs::stat(point.path()).unwrap().st_dev == before {
        std::thread::sleep(Duration::from_millis(1));
        assert!(driver.0.try_wait().unwrap().is_none(), "the driver ended");
    }
    let mut ahead = (storage.reads.load(SeqCst), Instant::now());
    while ahead.1.elapsed() < QUIET {
        std::thread::sleep(QUIET / 10);
        let reads = storage.reads.load(SeqCst);
        if reads != ahead.0 {
            ahead = (reads, Instant::now());
        }
    }
    run(Command::new("/usr/bin/python3")
        .args(["-B", "-S", "-c"])
        .arg((0..20).fold(IMPORTS.to_string(), |all, n| {
            format!("{all}, package{}", n * 7 % 20)
        }))
        .env("PYTHONPATH", point.path()));
    let reads = storage.reads.load(SeqCst) - ahead.0;
    let flags = rustix::mount::UnmountFlags::DETACH;
    rustix::mount::unmount(point.path(), flags).unwrap();
    assert!(driver.0.wait().unwrap().success());
    rustix::mount::unmount(slow.path(), flags).unwrap();
    storage.join().unwrap();
    reads
}
