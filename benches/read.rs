//! Reading a squashfs without the kernel in between: what the driver itself costs.
#![allow(missing_docs)]

use std::fs::File;
use std::path::Path;
use std::process::Command;

use capsid_fuse::Archive;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// 32 MiB of text in one file and 4 000 small files.
fn tree(root: &Path) -> u64 {
    std::fs::create_dir_all(root.join("small")).expect("mkdir");
    let text: String = (0..4_000_000u32)
        .map(|i| format!("{:07x} ", i.wrapping_mul(2_654_435_761) >> 8))
        .collect();
    std::fs::write(root.join("big"), &text).expect("big");
    for i in 0..4000 {
        std::fs::write(
            root.join(format!("small/{i}")),
            &text[i * 100..i * 100 + 2000],
        )
        .expect("small");
    }
    text.len() as u64
}

fn read(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let root = dir.path().join("tree");
    let bytes = tree(&root);
    for compressor in ["gzip", "zstd", "lz4", "xz"] {
        let image = dir.path().join(compressor);
        let made = Command::new("mksquashfs")
            .arg(&root)
            .arg(&image)
            .args(["-quiet", "-no-progress", "-comp", compressor])
            .status();
        assert!(made.expect("mksquashfs is installed").success());
        let open = || Archive::open(File::open(&image).expect("image"), 0, None).expect("squashfs");
        let mut group = c.benchmark_group("read");
        group.sample_size(10);
        group.bench_function(BenchmarkId::new("open", compressor), |b| b.iter(open));
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new("sequential/cold", compressor), |b| {
            b.iter(|| {
                open()
                    .read_file(b"/big", u64::MAX)
                    .expect("readable")
                    .expect("big")
                    .len()
            });
        });
        group.throughput(Throughput::Elements(4000));
        group.bench_function(BenchmarkId::new("small/cold", compressor), |b| {
            b.iter(|| {
                let archive = open();
                (0..4000)
                    .map(|i| {
                        archive
                            .read_file(format!("/small/{i}").as_bytes(), 4096)
                            .expect("readable")
                            .expect("small")
                            .len()
                    })
                    .sum::<usize>()
            });
        });
        group.finish();
    }
}

criterion_group!(benches, read);
criterion_main!(benches);
