//! Many readers, little memory, and blocks that are damaged: through the kernel.
#![allow(clippy::unwrap_used)] // an error ends the test

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use common::{TOOL, image, noise, pack, run};

/// Runs a script in a mount; `$P` is the driver's process, which `limit` (a prefix of the command) holds down.
fn served(image: &Path, limit: &str, script: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "set -e\n{limit} \"$TOOL\" -f \"$IMAGE\" \"$M\" & P=$!; trap 'kill $P' EXIT\n\
         for i in $(seq 500); do mountpoint -q \"$M\" && break; sleep 0.02; done\n\
         cd \"$M\"\n{script}\ncd /\numount \"$M\"\ntrap - EXIT; wait $P\n"
    );
    run(Command::new("unshare")
        .args(["-Urm", "timeout", "120", "sh", "-c", &script])
        .env("TOOL", TOOL)
        .env("IMAGE", image)
        .env("M", dir.path()))
}

/// About 100 MiB in files of all sizes.
fn large_image(options: &[&str]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let bytes = noise(8 << 20, 5);
    for number in 0..400 {
        let len = 1000 + number * 1290;
        let start = number * 17_389 % (bytes.len() - len);
        fs::write(tree.join(format!("{number}")), &bytes[start..start + len]).unwrap();
    }
    let image = dir.path().join("image");
    pack(&tree, &image, options);
    (dir, image)
}

const SUMS: &str = "find . -type f | sort | xargs sha256sum | sha256sum";

fn expected(dir: &Path) -> String {
    run(Command::new("sh")
        .args(["-c", SUMS])
        .current_dir(dir.join("tree")))
}

#[test]
fn eight_readers_at_once_read_what_is_there() {
    let (dir, image) = image(&["-comp", "zstd", "-b", "16K", "-all-root"]);
    let sums = "find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let wanted = run(Command::new("sh")
        .args(["-c", sums])
        .current_dir(dir.path().join("tree")));
    let script = format!("for i in 1 2 3 4 5 6 7 8; do ({sums}) & R=\"$R $!\"; done; wait $R");
    let told = served(&image, "", &script);
    for line in wanted.lines() {
        assert_eq!(told.matches(line).count(), 8, "{line}");
    }
    assert_eq!(told.lines().count(), 8 * wanted.lines().count());
}

#[test]
fn memory_is_bounded_under_load_and_given_back_when_idle() {
    for block in ["128K", "1M"] {
        let (_dir, image) = large_image(&["-comp", "lz4", "-b", block]);
        let script = "find . -type f -print0 | xargs -0 -n 20 -P 8 cat >/dev/null
            sed -n 's/^VmHWM: *//p' /proc/$P/status
            for i in $(seq 30); do sleep 0.5
                kb=$(sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/$P/status)
                [ $kb -gt 8192 ] || break
            done; echo $kb; cat 1 | wc -c";
        let told = served(&image, "", script);
        let numbers: Vec<u64> = told
            .lines()
            .map(|line| line.trim().trim_end_matches(" kB").trim().parse().unwrap())
            .collect();
        let [most, idle, read] = numbers[..] else {
            panic!("{told}")
        };
        assert!(most <= 64 << 10, "{block}: {most} KiB at most");
        assert!(idle <= 8 << 10, "{block}: {idle} KiB when idle");
        assert_eq!(read, 2290, "it serves again afterwards");
    }
}

#[test]
fn little_address_space_makes_it_slower_and_not_wrong() {
    let (dir, image) = large_image(&["-comp", "zstd", "-b", "1M"]);
    // Stacks and the heap's reservations count too.
    let told = served(&image, "prlimit --as=90000000", &format!("{SUMS}; {SUMS}"));
    assert_eq!(told, expected(dir.path()).repeat(2));
}

#[test]
fn a_damaged_block_fails_at_once_however_often_it_is_asked_for() {
    for compressor in ["gzip", "zstd", "lz4", "xz"] {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("large"), noise(3 << 20, 3)).unwrap();
        let image = dir.path().join("image");
        pack(&tree, &image, &["-comp", compressor, "-b", "1M"]);
        // A whole block is gone: the first one.
        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[0x5a; 20_000], 96 + 500).unwrap();
        let script = "begin=$(date +%s%N)
            for i in $(seq 50); do ! head -c 1000 large >/dev/null 2>&1; done
            echo $(( ($(date +%s%N) - begin) / 50000000 )); tail -c 1000 large | wc -c";
        let told = served(&image, "", script);
        let mut lines = told.lines();
        let each_ms: u64 = lines.next().unwrap().parse().unwrap();
        assert!(each_ms < 1000, "{compressor}: {each_ms} ms each");
        assert_eq!(lines.next(), Some("1000"), "what is not damaged is read");
    }
}
