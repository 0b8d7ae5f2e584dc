//! The texts that people read, compared with files in `golden/`; `UPDATE_GOLDEN=1` writes these anew, for review.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::{Env, output};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text,
        expected,
        "{} differs: UPDATE_GOLDEN=1 writes it anew",
        path.display()
    );
}

#[test]
fn help_texts() {
    let env = Env::new();
    for command in [
        "build", "exec", "run", "shell", "test", "run-help", "inspect", "doctor", "demo", "cache",
        "pull", "push", "registry", "remote",
    ] {
        let out = env.run([command, "--help"]);
        assert_eq!(out.status, 0, "{out}");
        golden(&format!("help-{command}"), &out.stdout);
        assert_eq!(env.run(["help", command]).stdout, out.stdout);
    }
    for command in [
        "start", "run", "list", "stop", "stats", "logs", "wait", "inspect", "unit",
    ] {
        let out = env.run(["instance", command, "--help"]);
        assert_eq!(out.status, 0, "{out}");
        golden(&format!("help-instance-{command}"), &out.stdout);
    }
    for command in ["status", "start", "stop", "env", "services"] {
        let out = env.run(["job", command, "--help"]);
        assert_eq!(out.status, 0, "{out}");
        golden(&format!("help-job-{command}"), &out.stdout);
    }
    for words in [&["overlay", "create", "--help"][..], &["sif", "--help"]] {
        let name = words[..words.len() - 1].join("-");
        golden(&format!("help-{name}"), env.run(words).ok());
    }
    for (group, commands) in [
        ("cache", ["list", "clean", "warm"].as_slice()),
        ("registry", &["login", "logout", "list"]),
        (
            "remote",
            &["list", "use", "add", "remove", "login", "logout", "status"],
        ),
    ] {
        for command in commands {
            let out = env.run([group, command, "--help"]);
            assert_eq!(out.status, 0, "{out}");
            golden(&format!("help-{group}-{command}"), &out.stdout);
        }
    }
    golden("help-job", &env.run(["job", "--help"]).stdout);
    golden("help-instance", &env.run(["instance", "--help"]).stdout);
    golden("help", &env.run(["--help"]).stdout);
}

#[test]
fn plan_of_a_fixed_request() {
    let env = Env::new();
    let image = env.image();
    let out = env.run([
        "--explain",
        "exec",
        "--contain",
        "--no-home",
        "--pid",
        "--hostname",
        "box",
        "-B",
        "/usr:/mnt:ro",
        image.to_str().unwrap(),
        "true",
    ]);
    // What depends on the machine, the user and the place is left out.
    let text = out.ok().lines().filter(|l| {
        !l.starts_with("env ")
            && !l.starts_with("root ")
            && !l.contains("localtime")
            && !l.contains("resolv.conf")
            && !l.contains("/etc/group")
    });
    let text: Vec<String> = text
        .map(|l| {
            l.replace(common::home().to_str().unwrap(), "HOME")
                .replace(env.work().to_str().unwrap(), "WORK")
                .replace(&common::user_name(), "USER")
                .replace(&nix::unistd::getuid().to_string(), "UID")
        })
        .collect();
    golden("plan", &text.join("\n"));
}

#[test]
fn demo_shows_that_containers_work_and_cleans_up() {
    let env = Env::new();
    let scratch = env.path("scratch");
    fs::create_dir(&scratch).unwrap();
    let out = output(env.command(["demo"]).env("TMPDIR", &scratch));
    assert!(
        out.ok().contains("hello from the container") && out.stdout.contains("Everything works."),
        "{out}"
    );
    assert_eq!(names(&scratch), [""; 0], "the demo's directory is gone");
}

/// What is in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn what_is_ended_by_a_signal_leaves_nothing() {
    let env = Env::new();
    let scratch = env.path("scratch");
    fs::create_dir(&scratch).unwrap();
    let cases: [&[&str]; 2] = [
        &["demo"],
        &["overlay", "create", "--size", "1024", "new.img"],
    ];
    for words in cases {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            for delay_ms in [0, 20, 200] {
                let mut command = env.command(words);
                command.env("TMPDIR", &scratch).current_dir(&scratch);
                command.stdout(Stdio::null()).stderr(Stdio::null());
                let mut child = command.spawn().unwrap();
                let begun = || !names(&scratch).is_empty();
                common::wait_until("the first file", || {
                    begun() || child.try_wait().unwrap().is_some()
                });
                std::thread::sleep(Duration::from_millis(delay_ms));
                let _ = kill(Pid::from_raw(child.id().try_into().unwrap()), signal);
                let status = child.wait().unwrap();
                // It may have been quicker, and the overlay is there, whole: its name is the last thing that it gets.
                let _ = fs::remove_file(scratch.join("new.img"));
                if !status.success() {
                    assert_eq!(status.signal(), Some(signal as i32), "{words:?}: {status}");
                }
                assert_eq!(names(&scratch), [""; 0], "{words:?} {signal} {delay_ms} ms");
            }
        }
    }
    assert_eq!(
        env.run(["instance", "list", "--json"])
            .ok()
            .matches("demo")
            .count(),
        0
    );
}

#[test]
fn doctor_finds_a_usable_machine() {
    let env = Env::new();
    let out = env.run(["doctor", "--json"]);
    let checks: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
    let state = |name: &str| {
        checks
            .as_array()
            .unwrap()
            .iter()
            .find(|c| c["check"] == name)
            .unwrap()["state"]
            .clone()
    };
    for check in ["user namespaces", "FUSE", "overlayfs", "subordinate ids"] {
        assert_eq!(state(check), "ok", "{check}: {out}");
    }
    assert!(env.run(["doctor"]).ok().contains("user namespaces"));
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let program = env!("CARGO_BIN_EXE_capsid");
    for words in [
        "--version",
        "version",
        "help",
        "exec --help",
        "doctor",
        &format!("--explain exec {image} true"),
        &format!("run-help {image}"),
    ] {
        let run = |line: &str| {
            common::output(&mut env.command_as(std::path::Path::new("bash"), ["-c", line]))
        };
        run(&format!("exec {program} {words} >/dev/full"))
            .fatal(&["cannot write to standard output: No space left on device"]);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let line = format!("trap '' PIPE; exec {program} {words}");
        let mut closed = env.command_as(Path::new("bash"), ["-c", &line]);
        let closed = closed.stdout(writer).stderr(Stdio::piped()).output();
        let closed = closed.unwrap();
        assert_eq!(closed.status.code(), Some(141), "{words}: {closed:?}");
        assert_eq!(closed.stderr, b"", "{words}");
    }
}

#[test]
fn usage_shows_the_name_that_was_called() {
    let env = Env::new();
    let apptainer = env.path("apptainer");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_capsid"), &apptainer).unwrap();
    for words in [["exec", "--help"].as_slice(), &["exec"]] {
        let out = common::output(&mut env.command_as(&apptainer, words));
        assert!(
            out.stdout.contains("apptainer [global options...] exec"),
            "{out}"
        );
        assert!(
            !out.stdout.contains("capsid [") && !out.stdout.contains("'capsid"),
            "{out}"
        );
    }
}

#[test]
fn wrong_words_are_named_and_the_right_ones_too() {
    let env = Env::new();
    for (words, missing) in [
        ("inspect", "<IMAGE>"),
        ("overlay create", "<IMAGE>"),
        ("registry login", "<URI>"),
        ("registry logout", "<URI>"),
        ("remote add", "<NAME>"),
        ("instance logs", "<NAME>"),
        ("instance wait", "<NAME>"),
        ("cache warm", "<IMAGES>..."),
        ("job start", "--file <FILE>"),
        ("inspect --frobnicate x", "--frobnicate"),
        ("instance list --jsn", "did you mean --json"),
        ("exec --explain=xml x y", "text, json"),
        ("exce", "did you mean \"exec\""),
        ("instance strat", "did you mean \"start\""),
        ("cache clena", "did you mean \"clean\""),
        ("sif lsit x", "did you mean \"list\""),
        ("help exce", "did you mean \"exec\""),
        ("help bogus", "unknown command \"bogus\""),
        ("help instance bogus", "unknown command \"bogus\""),
        ("version extra", "\"extra\""),
    ] {
        let out = env.run(words.split(' '));
        assert!(
            out.status == 1 && out.stderr.contains(missing),
            "{words}: {out}"
        );
        assert_eq!(out.stderr.lines().count(), 1, "{words}: {out}");
    }
    for command in [
        "sign",
        "verify",
        "key",
        "keys",
        "buildcfg",
        "completion",
        "tag",
        "capability",
        "oci",
        "plugin",
        "search",
        "delete",
        "config",
        "keyserver",
        "checkpoint",
    ] {
        for words in [&[command][..], &["help", command], &[command, "--help"]] {
            env.run(words).fatal(&[command, "not supported", ": "]);
        }
    }
    let out = env.run(["sif"]);
    assert!(out.status == 1 && out.stderr.is_empty(), "{out}");
}

#[test]
fn help_is_that_of_what_was_named() {
    let env = Env::new();
    for (words, same) in [
        ("help exec", "exec --help"),
        ("help instance start", "instance start --help"),
        ("--help instance start", "instance start --help"),
        ("help sif list", "sif list --help"),
        ("help version", "version --help"),
        ("help cache clean", "cache clean --help"),
        ("help remote add", "remote add -h"),
        ("help job", "job --help"),
        ("help help", "help"),
        ("help overlay create", "overlay create --help"),
        ("help sif add", "sif add x --help"),
    ] {
        let (one, other) = (env.run(words.split(' ')), env.run(same.split(' ')));
        assert_eq!(one.ok(), other.ok(), "{words}");
        assert!(one.stdout.contains("Usage:"), "{words}: {one}");
    }
    assert!(env.run(["help", "sif", "list"]).ok().contains("sif list"));
    assert!(!env.run(["help", "sif", "list"]).ok().contains("sif del"));
}
