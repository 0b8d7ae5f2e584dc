//! Time from typing to `true` having run: the figure that a script with many short runs feels.
//!
//! Whole processes, side by side with `bwrap` on the unpacked tree. Run as a normal user.
#![allow(missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};

use criterion::{Criterion, criterion_group, criterion_main};

fn quiet(command: &mut Command) {
    let status = command
        .stdin(Stdio::null())
        .status()
        .expect("the program starts");
    assert!(status.success(), "{command:?}");
}

fn tool(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(name);
    command.args(args);
    command
}

/// A tree with busybox, as a directory, a squashfs and (by the demo's own packer) nothing else.
fn tree(root: &Path) {
    for dir in [
        "bin", "dev", "etc", "home", "proc", "sys", "tmp", "usr", "var/tmp",
    ] {
        std::fs::create_dir_all(root.join(dir)).expect("mkdir");
    }
    std::fs::copy("/bin/busybox", root.join("bin/true")).expect("busybox-static is installed");
    std::fs::write(root.join("etc/passwd"), "").expect("passwd");
    std::fs::write(root.join("etc/group"), "").expect("group");
}

type Group<'a> = criterion::BenchmarkGroup<'a, criterion::measurement::WallTime>;

/// Starting and stopping an idle instance, and stepping into one.
fn instances(group: &mut Group, capsid: &str, squashfs: &str) {
    let instance = |words: &[&str]| {
        let words = [&["-s", "instance"], words].concat();
        quiet(tool(capsid, &words).stderr(Stdio::null()));
    };
    instance(&["start", squashfs, "bench"]);
    group.bench_function("capsid/instance/join", |b| {
        b.iter(|| {
            quiet(&mut tool(
                capsid,
                &["-q", "exec", "instance://bench", "/bin/true"],
            ))
        })
    });
    let mut count = 0;
    let mut name = || {
        count += 1;
        format!("bench{count}")
    };
    group.bench_function("capsid/instance/start", |b| {
        let mut last = String::new();
        b.iter_batched(
            || {
                if !last.is_empty() {
                    instance(&["stop", &last]);
                }
                last = name();
                last.clone()
            },
            |name| instance(&["start", squashfs, &name]),
            criterion::BatchSize::PerIteration,
        );
        instance(&["stop", &last]);
    });
    group.bench_function("capsid/instance/stop", |b| {
        b.iter_batched(
            || {
                let name = name();
                instance(&["start", squashfs, &name]);
                name
            },
            |name| instance(&["stop", &name]),
            criterion::BatchSize::PerIteration,
        );
    });
    instance(&["stop", "bench"]);
}

/// Many starts at once, as the ranks of a job.
fn at_once(group: &mut Group, name: &str, program: &str, args: &[&str]) {
    group.sample_size(10);
    for count in [2, 8, 32, 64] {
        group.bench_function(format!("{name}/at-once/{count}"), |b| {
            b.iter(|| {
                let spawn = |_| {
                    let mut command = tool(program, args);
                    command.stdin(Stdio::null()).spawn().expect("it starts")
                };
                let children: Vec<_> = (0..count).map(spawn).collect();
                for mut child in children {
                    assert!(child.wait().expect("it ends").success());
                }
            })
        });
    }
}

fn start(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let root = dir.path().join("tree");
    tree(&root);
    let squashfs = dir.path().join("image.squashfs");
    let (root, squashfs) = (
        root.to_str().expect("UTF-8"),
        squashfs.to_str().expect("UTF-8"),
    );
    quiet(&mut tool(
        "mksquashfs",
        &[root, squashfs, "-quiet", "-no-progress", "-all-root"],
    ));
    let capsid = env!("CARGO_BIN_EXE_capsid");
    let mut group = c.benchmark_group("start");
    group.bench_function("bwrap/directory", |b| {
        b.iter(|| {
            quiet(black_box(&mut tool(
                "bwrap",
                &[
                    "--unshare-user",
                    "--bind",
                    root,
                    "/",
                    "--proc",
                    "/proc",
                    "--dev",
                    "/dev",
                    "/bin/true",
                ],
            )))
        });
    });
    group.bench_function("capsid/directory", |b| {
        b.iter(|| quiet(&mut tool(capsid, &["-q", "exec", root, "/bin/true"])))
    });
    quiet(&mut tool(capsid, &["-q", "exec", squashfs, "/bin/true"]));
    group.bench_function("capsid/squashfs/warm", |b| {
        b.iter(|| quiet(&mut tool(capsid, &["-q", "exec", squashfs, "/bin/true"])))
    });
    let mut count = 0;
    group.bench_function("capsid/squashfs/cold", |b| {
        b.iter_batched(
            || {
                // A copy is another image: it has no server yet.
                count += 1;
                let copy = dir.path().join(format!("copy{count}.squashfs"));
                std::fs::copy(squashfs, &copy).expect("copy");
                copy
            },
            |copy| {
                quiet(&mut tool(
                    capsid,
                    &["-q", "exec", copy.to_str().expect("UTF-8"), "/bin/true"],
                ))
            },
            criterion::BatchSize::PerIteration,
        );
    });
    instances(&mut group, capsid, squashfs);
    let exec = ["-q", "exec", squashfs, "/bin/true"];
    at_once(&mut group, "capsid/squashfs", capsid, &exec);
    let bwrap = [
        "--unshare-user",
        "--bind",
        root,
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "/bin/true",
    ];
    at_once(&mut group, "bwrap/directory", "bwrap", &bwrap);
    group.bench_function("capsid/version", |b| {
        b.iter(|| quiet(tool(capsid, &["--version"]).stdout(Stdio::null())))
    });
    group.finish();
}

criterion_group!(benches, start);
criterion_main!(benches);
