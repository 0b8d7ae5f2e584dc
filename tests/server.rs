//! The image server: one for all, never in the way, gone afterwards.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::{Env, processes, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Starts a program in the container and waits until it runs there.
fn background(env: &Env, args: &[&str]) -> Child {
    let mut command = env.command(args);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
    child
}

#[test]
fn nothing_is_left_a_few_seconds_after_the_last_run() {
    let env = Env::new();
    let image = env.image();
    env.run(["exec", image.to_str().unwrap(), "true"]).ok();
    assert_eq!(env.servers().len(), 2, "keeper and worker");
    env.assert_nothing_left();
}

#[test]
fn runs_at_the_same_time_make_one_server() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let mut children: Vec<Child> = (0..30)
        .map(|_| {
            env.command([
                "exec",
                image,
                "sh",
                "-c",
                "sleep 1; readlink /proc/self/ns/user",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
        })
        .collect();
    wait_until("the first server", || !env.servers().is_empty());
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(env.servers().len(), 2);
    let mut namespaces: Vec<String> = children
        .drain(..)
        .map(|c| {
            let out = c.wait_with_output().unwrap();
            assert!(out.status.success());
            String::from_utf8(out.stdout).unwrap()
        })
        .collect();
    namespaces.dedup();
    assert_eq!(namespaces.len(), 1, "{namespaces:?}");
    env.assert_nothing_left();
}

#[test]
fn two_hundred_at_once_work() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let children: Vec<Child> = (0..200)
        .map(|_| {
            env.command(["exec", image, "cat", "/opt/hello.txt"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "hello\n",
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
    env.assert_nothing_left();
}

#[test]
fn killed_worker_is_replaced_and_containers_carry_on() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let mut child = background(
        &env,
        &[
            "exec",
            "-B",
            "/etc:/made/up",
            image,
            "sh",
            "-c",
            "echo; read x; cat /opt/hello.txt; ls -d /made/up; ls /usr",
        ],
    );
    let workers: Vec<i32> = env
        .servers()
        .into_iter()
        .filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let parent: i32 = stat
                .rsplit(')')
                .next()
                .unwrap()
                .split_whitespace()
                .nth(1)
                .unwrap()
                .parse()
                .unwrap();
            env.servers().contains(&parent)
        })
        .collect();
    assert_eq!(workers.len(), 1);
    kill(Pid::from_raw(workers[0]), Signal::SIGKILL).unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "hello\n/made/up\nbin\n"
    );
    assert_eq!(
        env.run(["exec", image, "cat", "/opt/hello.txt"]).ok(),
        "hello",
        "and new ones start"
    );
    env.assert_nothing_left();
}

#[test]
fn daemon_left_behind_keeps_its_root() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.path("work/out");
    let line = format!(
        "(sleep 6; cat /opt/hello.txt > {0}.new; mv {0}.new {0}) > /dev/null 2>&1 &",
        out.display()
    );
    env.run(["exec", image, "setsid", "sh", "-c", &line]).ok();
    std::thread::sleep(Duration::from_secs(5)); // longer than a server without users waits
    wait_until("the daemon's file", || out.exists());
    assert_eq!(fs::read_to_string(&out).unwrap(), "hello\n");
    env.assert_nothing_left();
}

#[test]
fn command_line_of_the_server_does_not_match_the_users_program() {
    let env = Env::new();
    let image = env.image();
    env.run([
        "exec",
        image.to_str().unwrap(),
        "sh",
        "-c",
        "true my-own-program",
    ])
    .ok();
    assert!(!env.servers().is_empty());
    let shown: Vec<_> = processes()
        .into_iter()
        .filter(|(_, line)| line.contains("my-own-program"))
        .collect();
    assert!(shown.is_empty(), "{shown:?}");
}

#[test]
fn works_without_a_runtime_directory_and_with_a_foreign_one() {
    let env = Env::new();
    let image = env.image();
    let run = |runtime: &str| {
        let mut command = env.command(["exec", image.to_str().unwrap(), "cat", "/opt/hello.txt"]);
        common::output(command.env("XDG_RUNTIME_DIR", runtime))
    };
    assert_eq!(run("").ok(), "hello");
    assert_eq!(run("/no/such").ok(), "hello");
    assert_eq!(
        run("/").ok(),
        "hello",
        "a directory of somebody else is not used"
    );
    wait_until("image servers to end", || env.servers().is_empty());
}

#[test]
fn server_holds_no_mount_and_no_directory_of_the_host() {
    let env = Env::new();
    let image = env.image();
    env.run(["exec", image.to_str().unwrap(), "true"]).ok();
    for pid in env.servers() {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        assert!(mounts.lines().count() <= 2, "{mounts}");
        assert_eq!(
            fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(),
            Some("/")
        );
    }
}

#[test]
fn image_may_be_replaced_while_it_is_in_use() {
    let env = Env::new();
    let tree = env.tree("tree");
    let image = env.sif(&tree, "image.sif");
    let mut child = background(
        &env,
        &[
            "exec",
            image.to_str().unwrap(),
            "sh",
            "-c",
            "echo; read x; cat /opt/hello.txt",
        ],
    );
    common::write(&tree.join("opt/hello.txt"), "replaced\n");
    let newer = env.sif(&tree, "newer.sif");
    fs::rename(newer, &image).unwrap();
    assert_eq!(
        env.run(["exec", image.to_str().unwrap(), "cat", "/opt/hello.txt"])
            .ok(),
        "replaced"
    );
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
    assert_eq!(
        String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout),
        "hello\n"
    );
}

#[test]
fn an_image_is_warmed_by_hand() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.run(["cache", "warm", image]);
    assert_eq!(out.status, 0, "{out}");
    assert!(out.stderr.contains("of names and attributes"), "{out}");
    let out = env.run(["cache", "warm", "/nothing"]);
    assert!(out.stderr.contains("/nothing"), "{out}");
    assert_ne!(out.status, 0);
}
