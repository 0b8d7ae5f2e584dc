//! Reading a squashfs: the driver alone without the kernel in between, then mounted, beside squashfuse_ll and, for root, the
//! kernel's own.
#![allow(missing_docs)]

mod sidebyside;

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use capsid_fuse::{Archive, InodeRef, Kind};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const FILES: u32 = 4000;
const KINDS: [(&str, &str); 8] = [
    ("gzip", "128K"),
    ("zstd", "128K"),
    ("lz4", "128K"),
    ("xz", "128K"),
    ("gzip", "1M"),
    ("zstd", "1M"),
    ("lz4", "1M"),
    ("xz", "1M"),
];

/// 16 MiB of text in one file and 4 000 small files.
fn tree(root: &Path) -> u64 {
    std::fs::create_dir_all(root.join("small")).expect("mkdir");
    let text: String = (0..2_000_000u32)
        .map(|i| format!("{:07x} ", i.wrapping_mul(2_654_435_761) >> 8))
        .collect();
    std::fs::write(root.join("big"), &text).expect("big");
    for i in 0..FILES as usize {
        let part = &text[i * 100..i * 100 + 2000];
        std::fs::write(root.join(format!("small/{i}")), part).expect("small");
    }
    text.len() as u64
}

/// Names, and the attributes of each.
fn walk(archive: &Archive, dir: InodeRef) -> usize {
    let mut found = 0;
    let mut below = Vec::new();
    let mut meet = |entry: capsid_fuse::DirEntry<'_>| {
        found += usize::from(archive.inode(entry.inode).is_ok());
        if entry.kind == Kind::Dir {
            below.push(entry.inode);
        }
        true
    };
    archive.read_dir(dir, 0, &mut meet).expect("readable");
    found
        + below
            .into_iter()
            .map(|dir| walk(archive, dir))
            .sum::<usize>()
}

/// All small files, each by one of the readers.
fn read_small(archive: &Archive, readers: u32) {
    let read = |first: u32| {
        for i in (first..FILES).step_by(readers as usize) {
            let path = format!("/small/{i}");
            let bytes = archive.read_file(path.as_bytes(), 4096).expect("readable");
            assert_eq!(bytes.expect("it is there").len(), 2000);
        }
    };
    std::thread::scope(|scope| {
        for first in 0..readers {
            scope.spawn(move || read(first));
        }
    });
}

fn archive(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let root = dir.path().join("tree");
    let bytes = tree(&root);
    for (compressor, block) in KINDS {
        let image = dir.path().join(format!("{compressor}-{block}"));
        let made = Command::new("mksquashfs")
            .arg(&root)
            .arg(&image)
            .args(["-quiet", "-no-progress", "-comp", compressor, "-b", block])
            .status();
        assert!(made.expect("mksquashfs is installed").success());
        let open = || Archive::open(File::open(&image).expect("image"), 0, None).expect("squashfs");
        let mut group = c.benchmark_group(format!("archive {compressor}/{block}"));
        group.sample_size(10);
        group.warm_up_time(Duration::from_millis(200));
        group.measurement_time(Duration::from_secs(1));
        group.bench_function("open", |b| b.iter(open));
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function("sequential, cold", |b| {
            b.iter(|| open().read_file(b"/big", u64::MAX).expect("readable"));
        });
        group.throughput(Throughput::Elements(FILES.into()));
        group.bench_function("names + stat, cold", |b| {
            b.iter(|| {
                let archive = open();
                assert_eq!(walk(&archive, archive.root()), FILES as usize + 2);
            });
        });
        for readers in [1, 2, 4, 8] {
            group.bench_function(format!("read all, cold, {readers} readers"), |b| {
                b.iter(|| read_small(&open(), readers));
            });
        }
        group.finish();
    }
}

fn mounted(c: &mut Criterion) {
    sidebyside::measure(c, "read");
}

criterion_group!(benches, archive, mounted);
criterion_main!(benches);
