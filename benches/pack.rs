//! Packing a directory into a squashfs, and unpacking it.
//!
//! `cargo bench --bench pack` measures with criterion. For a comparison of whole processes, `tree DIRECTORY IMAGE
//! [COMPRESSION] [THREADS] [BLOCK]` packs once: run it beside `mksquashfs`.
#![allow(missing_docs)]

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result};
use capsid::squash::{Options, Scan, Specials, Unpack, Writer, scan, unpack};
use capsid_fuse::Archive;
use criterion::{BenchmarkId, Criterion, Throughput};

fn pack(root: &Path, image: &Path, options: &Options) -> Result<()> {
    let out = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(image)?;
    let mut writer = Writer::new(out, options)?;
    // All that mksquashfs takes, too.
    let all = Scan {
        specials: Specials::Keep,
        xattr: &|_| true,
        ..Scan::default()
    };
    let tree = scan(root, &mut writer, &all)?;
    writer.finish(&tree)?;
    Ok(())
}

/// 32 MiB of text in one file and 4 000 small files.
fn tree(root: &Path) -> Result<u64> {
    std::fs::create_dir_all(root.join("small"))?;
    let text: String = (0..4_000_000u32)
        .map(|i| format!("{:07x} ", i.wrapping_mul(2_654_435_761) >> 8))
        .collect();
    std::fs::write(root.join("big"), &text)?;
    for i in 0..4000 {
        let part = &text[i * 100..i * 100 + 2000];
        std::fs::write(root.join(format!("small/{i}")), part)?;
    }
    Ok(text.len() as u64 + 4000 * 2000)
}

fn measure(c: &mut Criterion) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("tree");
    let bytes = tree(&root)?;
    let mut group = c.benchmark_group("pack");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(bytes));
    for compression in ["gzip", "zstd:3", "zstd:15", "xz", "lz4"] {
        let options = Options {
            compression: compression.parse()?,
            ..Options::default()
        };
        let image = dir.path().join("image");
        group.bench_function(BenchmarkId::new("pack", compression), |b| {
            b.iter(|| pack(&root, &image, &options).expect("packed"));
        });
        let archive = Archive::open(File::open(&image)?, 0, None)?;
        let mut number = 0;
        group.bench_function(BenchmarkId::new("unpack", compression), |b| {
            b.iter(|| {
                number += 1;
                let to = dir.path().join(number.to_string());
                std::fs::create_dir(&to).expect("mkdir");
                unpack(&archive, &to, &Unpack::default()).expect("unpacked");
                std::fs::remove_dir_all(&to).expect("rm");
            });
        });
    }
    group.finish();
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["tree", root, image, rest @ ..] = &words[..] {
        let number = |at: usize, default: u32| match rest.get(at) {
            Some(word) => word.parse().context("a number is wanted"),
            None => Ok(default),
        };
        let options = Options {
            compression: rest.first().unwrap_or(&"gzip").parse()?,
            threads: number(1, 0)? as usize,
            block_bytes: number(2, 128 << 10)?,
            ..Options::default()
        };
        return pack(Path::new(root), Path::new(image), &options);
    }
    if let ["unpack", image, root] = &words[..] {
        let archive = Archive::open(File::open(image)?, 0, None)?;
        std::fs::create_dir(root)?;
        return unpack(&archive, Path::new(root), &Unpack::default());
    }
    let mut criterion = Criterion::default().configure_from_args();
    measure(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
