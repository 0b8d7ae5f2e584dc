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

/// Files of all sizes: 400 are about 100 MiB, 250 are 40 MiB, which is more than the cache.
fn large_image(files: usize, options: &[&str]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let bytes = noise(8 << 20, 5);
    for number in 0..files {
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
        let (_dir, image) = large_image(400, &["-comp", "lz4", "-b", block]);
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
    let (dir, image) = large_image(400, &["-comp", "zstd", "-b", "1M"]);
    // Stacks and the heap's reservations count too.
    let told = served(&image, "prlimit --as=90000000", &format!("{SUMS}; {SUMS}"));
    assert_eq!(told, expected(dir.path()).repeat(2));
}

/// Eight readers at once: a line for each error of the damaged file, for each right reading of the other, and at the end of each
/// reader for what is not damaged, and whether its rounds took less than a second each, with all that they did.
const EIGHT_READERS: &str = r#"
for r in 1 2 3 4 5 6 7 8; do (
    begin=$(date +%s)
    for i in $(seq 20); do
        if told=$(LC_ALL=C head -c 1000 large 2>&1 >/dev/null); then echo "damage was read"; continue; fi
        case $told in *"Input/output error"*) echo failed ;; *) echo "$told" ;; esac
        [ "$(sha256sum <good)" = "$SUM" ] && echo good
    done
    [ $(($(date +%s) - begin)) -lt 20 ] && echo soon
    [ "$(tail -c 1000 large | sha256sum)" = "$TAIL" ] && echo rest
) & R="$R $!"; done; wait $R"#;

#[test]
fn a_damaged_block_fails_at_once_however_often_eight_readers_ask_for_it() {
    for (compressor, limit) in [
        ("gzip", ""),
        ("zstd", ""),
        ("lz4", ""),
        ("xz", ""),
        ("zstd", "prlimit --as=128000000"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("large"), noise(3 << 20, 3)).unwrap();
        fs::write(tree.join("good"), noise(300_000, 7)).unwrap();
        let (image, sort) = (dir.path().join("image"), dir.path().join("sort"));
        fs::write(&sort, "large 100\n").unwrap();
        let first = ["-sort", sort.to_str().unwrap()];
        pack(
            &tree,
            &image,
            &[&["-comp", compressor, "-b", "1M"], &first[..]].concat(),
        );
        // The first block's head is gone, without which no compressor can go on (what lies in the middle may be stored bytes,
        // and squashfs has no checksums). An image with lz4 begins with the compressor's options.
        let start = if compressor == "lz4" { 96 + 10 } else { 96 };
        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[0x5a; 20_000], start).unwrap();
        let sum = |command: &str| {
            let told = run(Command::new("sh").args(["-c", command]).current_dir(&tree));
            told.trim_end().to_string()
        };
        let script = format!(
            "SUM='{}' TAIL='{}'\n{EIGHT_READERS}",
            sum("sha256sum <good"),
            sum("tail -c 1000 large | sha256sum")
        );
        let told = served(&image, limit, &script);
        let count = |line: &str| told.lines().filter(|l| *l == line).count();
        let counts = ["failed", "good", "soon", "rest"].map(count);
        assert_eq!(counts, [160, 160, 8, 8], "{compressor} {limit}: {told}");
        assert_eq!(told.lines().count(), 336, "{compressor} {limit}: {told}");
    }
}

#[test]
fn eight_readers_are_served_rightly_with_little_memory() {
    for (compressor, block) in [
        ("gzip", "128K"),
        ("zstd", "1M"),
        ("lz4", "1M"),
        ("xz", "128K"),
    ] {
        let (dir, image) = large_image(250, &["-comp", compressor, "-b", block]);
        let wanted = expected(dir.path());
        let script = format!("for i in 1 2 3 4 5 6 7 8; do ({SUMS}) & R=\"$R $!\"; done; wait $R");
        let told = served(&image, "prlimit --as=128000000 --data=70000000", &script);
        assert_eq!(told, wanted.repeat(8), "{compressor}");
    }
}

#[test]
fn an_image_that_is_replaced_or_cut_off_while_it_is_mounted() {
    let (dir, image) = large_image(400, &["-comp", "zstd", "-b", "128K"]);
    let wanted = expected(dir.path());
    // Replaced by rename: the old one is served to the end.
    let replaced = format!("cp /bin/sh \"$IMAGE.new\"; mv \"$IMAGE.new\" \"$IMAGE\"; {SUMS}");
    let copy = dir.path().join("copy");
    fs::copy(&image, &copy).unwrap();
    assert_eq!(served(&copy, "", &replaced), wanted);
    // Cut off in place: errors at once for what is gone, the right bytes for what is not, and a server that lives.
    let script = "ls >/dev/null; sum=$(sha256sum <0); truncate -s 100000 \"$IMAGE\"; begin=$(date +%s%N)
        for r in 1 2 3 4 5 6 7 8; do (for f in 399 398 397; do LC_ALL=C cat $f 2>&1 >/dev/null | grep -o 'Input/output error'; done) & R=\"$R $!\"; done
        wait $R; [ $(( ($(date +%s%N) - begin) / 1000000 )) -lt 24000 ] && echo soon
        [ \"$(sha256sum <0)\" = \"$sum\" ] && echo same; kill -0 $P && echo alive";
    let told = served(&image, "", script);
    assert_eq!(told.matches("Input/output error").count(), 24, "{told}");
    for word in ["soon", "same", "alive"] {
        assert!(told.contains(word), "{word}: {told}");
    }
}
