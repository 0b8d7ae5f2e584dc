//! What a container must not do through the supervisor of emulated owners (`engine::emulate`), who has the host's files:
//! whatever path a call names, it reaches what the program itself could reach, and nothing of the host.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Env, Output, output, write};

/// A statically linked program of the tests, in a directory of its own.
fn compile(t: &Env, text: &str) -> PathBuf {
    let directory = t.path("programs");
    fs::create_dir_all(&directory).unwrap();
    let source = t.path("program.c");
    write(&source, text);
    let program = directory.join("p");
    output(
        Command::new("gcc")
            .args(["-O1", "-Wall", "-static", "-pthread", "-o"])
            .arg(&program)
            .arg(&source),
    )
    .ok();
    program
}

/// A directory of the host, with a program that changes when its owner does.
fn outside(t: &Env) -> PathBuf {
    let directory = t.path("outside");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("suid"), "x").unwrap();
    fs::set_permissions(directory.join("suid"), fs::Permissions::from_mode(0o4755)).unwrap();
    directory
}

/// All that a change would show in.
fn state(directory: &Path) -> Vec<(String, u32, u32, i64, i64)> {
    let mut all: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .chain([directory.to_owned()])
        .map(|path| {
            let s = fs::symlink_metadata(&path).unwrap();
            let name = path.display().to_string();
            (name, s.mode(), s.gid(), s.ctime(), s.ctime_nsec())
        })
        .collect();
    all.sort();
    all
}

/// Ways to the host's directory `host`, by all that could mean the supervisor to the supervisor.
fn ways(host: &Path) -> Vec<String> {
    let h = host.display();
    let up = "../".repeat(20);
    let mut ways: Vec<String> = [
        // Where the supervisor's own names would stand in the host's procfs; PID is filled in by the shell.
        "/proc/self/../self/root",
        "/proc/self/../self/cwd",
        "/proc/self/../thread-self/root",
        "/proc/self/../PID/root",
        "/proc/self/../1/root",
        "/proc/self/../../proc/self/root",
        "/proc/self/./../self/root",
        "/proc/self//..//self/root",
        "/proc/self/root/../self/root",
        "/proc/self/root/proc/self/root",
        "/proc/self/root/proc/self/../self/root",
        "/proc/self/cwd/../proc/self/root",
        "/proc/self/fd/../../self/root",
        "/proc/self/fd/../../PID/root",
        "/proc/self/task/../../self/root",
        "/proc/self/task/../../PID/root",
        "/proc/self/ns/../../self/root",
        "/proc/thread-self/../../../self/root",
        "/proc/thread-self/../../../PID/root",
        "/proc/thread-self/root/proc/self/root",
        "/dev/fd/../self/root",
        "/dev/fd/../../self/root",
        "/dev/fd/../../PID/root",
        "/dev/fd/0/../../self/root",
        "/proc/1/root",
        "/proc/PID/root",
        "/proc/PID/cwd",
        "//proc/self/root",
        "/../proc/self/root",
        "self/root",
        "../self/root",
        "../PID/root",
        "../../self/root",
        "PID/root",
        "root",
        "cwd",
        "../root",
        "..",
        "",
        "/tmp/link",
        "/tmp/chain",
        "/tmp/pid",
        "/tmp/deep/link",
        "/mnt/planted",
        "/mnt/planted-pid",
    ]
    .map(|way| format!("{way}{h}"))
    .to_vec();
    for start in [
        "",
        "/proc/self/cwd/",
        "/proc/self/root/",
        "/proc/self/",
        "/dev/fd/",
    ] {
        ways.push(format!(
            "{start}{up}{}",
            h.to_string().trim_start_matches('/')
        ));
    }
    ways.push("/tmp/whole".into());
    ways
}

/// Links of the container that lead there.
fn links(host: &Path) -> String {
    let h = host.display();
    format!(
        "ln -s /proc/self/../self/root /tmp/link; ln -s link /tmp/chain; ln -s /proc/self/../$PID/root /tmp/pid
         mkdir -p /tmp/deep; ln -s ../../proc/self/fd/../../self/root /tmp/deep/link
         ln -s /proc/self/../self/root{h} /tmp/whole"
    )
}

/// Runs a script with the program at `/mnt/p`, as one that is given nothing of the host but a directory.
fn contained(t: &Env, image: &Path, program: &Path, options: &[&str], script: &str) -> Output {
    let directory = program.parent().unwrap();
    let bind = format!("{}:/mnt", directory.display());
    let words = [
        "-q",
        "exec",
        "--containall",
        "--fakeroot",
        "--ignore-subuid",
        "-B",
        &bind,
    ];
    // The shell becomes the supervisor, so that its number is known.
    let mut command = t.command_as(
        Path::new("/bin/sh"),
        [
            "-c",
            "export PID=$$; exec \"$@\" --env PID=$PID \"$I\" sh -ec \"$S\"",
            "sh",
        ],
    );
    command.arg(env!("CARGO_BIN_EXE_capsid"));
    command.args(words).args(options);
    command.env("I", image).env("S", script);
    output(&mut command)
}

#[test]
fn no_call_by_any_path_changes_the_host() {
    let t = Env::new();
    let (image, host) = (t.image(), outside(&t));
    let program = compile(&t, include_str!("escape.c"));
    let planted = program.parent().unwrap();
    symlink("/proc/self/../self/root", planted.join("planted")).unwrap();
    symlink("/proc/1/root", planted.join("planted-pid")).unwrap();
    let before = state(&host);
    let all = ways(&host);
    let mut script = links(&host);
    script.push_str("\nset --");
    for way in &all {
        script.push_str(&format!(" \"{}\"", way.replace("PID", "$PID")));
    }
    script.push_str("\n/mnt/p \"$@\"; mkdir -p /tmp/c; chroot /tmp/c /mnt/p / 2>/dev/null || :");
    let out = contained(&t, &image, &program, &[], &script);
    assert_eq!(out.ok(), format!("tried {}", all.len()));
    assert_eq!(state(&host), before);
}

/// The same with the machine's own procfs, which the caller gave: there the supervisor has a name of its own.
#[test]
fn no_call_reaches_the_supervisors_files_through_a_procfs_that_knows_it() {
    let t = Env::new();
    let (image, host) = (t.image(), outside(&t));
    let program = compile(&t, include_str!("escape.c"));
    let before = state(&host);
    let h = host.display();
    let script = format!(
        "for p in self thread-self; do set -- \"$@\" /opt/$p/root{h} /opt/$p/cwd{h} /opt/x/../$p/root{h}; done
         /mnt/p \"$@\" | sed s/6/all/"
    );
    let options = ["-B", "/proc:/opt"];
    assert_eq!(
        contained(&t, &image, &program, &options, &script).ok(),
        "tried all"
    );
    assert_eq!(state(&host), before);
}

/// A program of the container that is given owners by every name of its own file.
#[test]
fn own_files_are_had_by_the_names_that_procfs_gives_them() {
    let t = Env::new();
    let (image, program) = (t.image(), compile(&t, include_str!("escape.c")));
    let script = "cd /tmp; echo > a; mkdir d
         chown 5:6 /proc/self/cwd/a; stat -c %u:%g /proc/self/cwd/a /proc/self/root/tmp/a d/../a
         exec 3<a 4<d; chown 7 /proc/self/fd/3; stat -L -c %u /proc/self/fd/3 /dev/fd/3; stat -c %u a
         chown 8 /dev/fd/3; stat -c %u a; echo > d/x; chown 9 /proc/self/fd/4/x; chown 10 /proc/self/fd/4/../a
         stat -c %u d/x a; chown 11 /proc/thread-self/cwd/a; stat -c %u a";
    let out = contained(&t, &image, &program, &[], script);
    assert_eq!(out.ok(), "5:6\n5:6\n5:6\n7\n7\n7\n8\n9\n10\n11");
}

/// The supervisor has all capabilities of the container, and is in no Landlock domain.
#[test]
fn what_a_program_gave_up_is_not_had_through_the_supervisor() {
    let t = Env::new();
    let (image, program) = (t.image(), compile(&t, include_str!("escape.c")));
    let script =
        "cd /tmp; mkdir a b c; chmod 555 a; /mnt/p --capabilities a; /mnt/p --capabilities b
         /mnt/p --landlock c; stat -c %u b/*; ls a c";
    let out = contained(&t, &image, &program, &[], script);
    let expected =
        "mkdir: Permission denied\nmkdir: Success\nmkdir: Permission denied\n1000\na:\n\nc:";
    assert_eq!(out.ok(), expected);
}
