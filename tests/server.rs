//! The image server: one for all, never in the way, gone afterwards.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
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
    wait_until("keeper and worker", || env.servers().len() == 2);
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
    assert!(env.servers().len() <= 2, "no other one was left over");
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
fn none_of_many_that_start_together_lacks_a_mount() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    // So many since chance plays a part: without `Stage::look` about 1 round in 60 fails, from Linux 6.16 on.
    for round in 0..80 {
        let children: Vec<Child> = (0..32)
            .map(|_| {
                env.command(["exec", "--pwd", "/opt", image])
                    .args(["sh", "-c", "pwd; cat /proc/self/mountinfo"])
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        let mut counts = Vec::new();
        for child in children {
            let out = child.wait_with_output().unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stderr), "");
            let text = String::from_utf8(out.stdout).unwrap();
            assert!(text.starts_with("/opt\n"), "{text}");
            counts.push(text.lines().count());
        }
        counts.dedup();
        assert_eq!(counts.len(), 1, "round {round}: {counts:?}");
        // The next ones get a mount that the kernel knows nothing of.
        for server in env.servers() {
            let _ = kill(Pid::from_raw(server), Signal::SIGTERM);
        }
        wait_until("the end of the server", || env.servers().is_empty());
    }
}

/// Those of the environment's servers whose parent is one, too.
fn workers(env: &Env) -> Vec<i32> {
    let parent = |pid: &i32| -> i32 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap();
        fields
            .split_whitespace()
            .nth(1)
            .map_or(0, |p| p.parse().unwrap())
    };
    let servers = env.servers();
    let is_child = |pid: &i32| servers.contains(&parent(pid));
    servers.iter().copied().filter(is_child).collect()
}

#[test]
fn any_death_is_survived_and_living_users_keep_the_name() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let mut child = background(
        &env,
        &[
            "exec",
            image,
            "sh",
            "-c",
            "echo; read x; cat /opt/hello.txt; ls /usr",
        ],
    );
    let namespace = || {
        let out = env.run(["exec", image, "readlink", "/proc/self/ns/user"]);
        out.ok().to_owned()
    };
    let before = namespace();
    // Alternately the parent of the two and the child, which are keeper and worker in changing roles.
    for round in 0..5 {
        let (all, children) = (env.servers(), workers(&env));
        assert_eq!((all.len(), children.len()), (2, 1), "{round}");
        let victim = all
            .iter()
            .find(|p| children.contains(p) == (round % 2 == 1));
        kill(Pid::from_raw(*victim.unwrap()), Signal::SIGKILL).unwrap();
        wait_until("a replacement", || {
            env.servers() != all && workers(&env).len() == 1
        });
        assert_eq!(namespace(), before, "{round}");
    }
    std::thread::sleep(Duration::from_secs(4)); // longer than a server without users waits
    assert_eq!(namespace(), before);
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "hello\nbin\n");
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
    let workers = workers(&env);
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
    let go = env.path("work/go");
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Should the test fail, the daemon reads its end.
    let mut tell = fs::File::options().read(true).write(true).open(&go);
    let line = format!(
        "(read x < {1}; cat /opt/hello.txt > {0}.new; mv {0}.new {0}) > /dev/null 2>&1 &",
        out.display(),
        go.display()
    );
    env.run(["exec", image, "setsid", "sh", "-c", &line]).ok();
    std::thread::sleep(Duration::from_secs(4)); // longer than a server without users waits
    // Keeper and worker are still there for each other.
    for child in [false, true] {
        let (all, children) = (env.servers(), workers(&env));
        let victim = all.iter().find(|p| children.contains(p) == child);
        kill(Pid::from_raw(*victim.unwrap()), Signal::SIGKILL).unwrap();
        wait_until("a replacement", || {
            env.servers() != all && workers(&env).len() == 1
        });
    }
    std::io::Write::write_all(tell.as_mut().unwrap(), b"go\n").unwrap();
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

/// What a server holds of the host only root can see: `tests/hosts` looks.
#[test]
fn containers_root_has_no_way_into_the_server() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    // What says nothing is refused; the container sees the processes of the host.
    let look =
        "for p in /proc/[0-9]*; do case $(cat $p/comm 2>/dev/null) in capsid-image*) seen=yes
            ls $p/fd 2>/dev/null; ls -d $p/root/. $p/cwd/. 2>/dev/null; readlink $p/exe
            { dd if=$p/mem bs=1 count=0 && echo memory; } 2>/dev/null; grep . $p/maps 2>/dev/null
        esac; done; echo $seen";
    for options in [
        &["-c"][..],
        &["-c", "--fakeroot"],
        &["-c", "--fakeroot", "--sharens"],
        &["-c", "--fakeroot", "--net", "--network", "none"],
        &["-c", "--fakeroot", "--writable-tmpfs"],
        &["-C", "--no-pid", "--fakeroot"],
        &["-c", "--add-caps", "CAP_SYS_PTRACE"],
        &["--fakeroot", "--no-home", "--no-mount", "tmp,cwd"],
    ] {
        let words = ["exec"].iter().chain(options);
        let out = env.run(words.chain(&[image, "sh", "-c", look]));
        assert_eq!(out.ok(), "yes", "{options:?}: {out}");
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
fn any_number_of_different_mount_points_is_served() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let mut child = background(
        &env,
        &[
            "exec",
            image,
            "sh",
            "-c",
            "echo; read x; cat /opt/hello.txt",
        ],
    );
    // Few long paths, so that it is soon too much for one server.
    let long = format!("{0}/{0}/{0}/{0}/{0}/{0}/{0}/{0}/{0}/{0}", "x".repeat(250));
    for n in 0..30 {
        let binds: Vec<String> = (0..20).map(|m| format!("/etc:/{n}/{m}/{long}")).collect();
        let binds = binds.join(",");
        env.run(["exec", "-B", &binds, image, "true"]).ok();
    }
    assert_eq!(env.servers().len(), 4, "the first one, and its successor");
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"go\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "hello\n");
    env.assert_nothing_left();
}

#[test]
fn runtime_directory_that_cannot_be_written_is_no_obstacle() {
    let env = Env::new();
    let image = env.image();
    fs::create_dir(env.runtime()).unwrap();
    fs::set_permissions(env.runtime(), fs::Permissions::from_mode(0o700)).unwrap();
    // Read-only for this run, in namespaces of its own.
    let line = format!(
        "mount --bind {0} {0} && mount -o remount,ro,bind {0} && exec {1} exec {2} cat /opt/hello.txt",
        env.path("run").display(),
        env!("CARGO_BIN_EXE_capsid"),
        image.display()
    );
    let words = ["-rm", "sh", "-c", &line];
    let out = common::output(&mut env.command_as(std::path::Path::new("unshare"), words));
    assert_eq!(out.ok(), "hello");
    assert_eq!(fs::read_dir(env.runtime()).unwrap().count(), 0);
}

#[test]
fn failed_start_leaves_nothing() {
    let env = Env::new();
    let image = env.image();
    let dead = env.runtime().join("image-0123456789abcdef");
    env.run(["exec", image.to_str().unwrap(), "true"]).ok();
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    // Only what has been there for a while is looked at.
    let mut touch = std::process::Command::new("touch");
    common::output(touch.args(["-d", "1 minute ago"]).arg(&dead)).ok();
    wait_until("image servers to end", || env.servers().is_empty());
    let program = env!("CARGO_BIN_EXE_capsid");
    let words = [
        "--nproc=1",
        program,
        "exec",
        image.to_str().unwrap(),
        "true",
    ];
    let out = common::output(&mut env.command_as(std::path::Path::new("prlimit"), words));
    out.fatal(&["cannot create a process"]);
    env.assert_nothing_left();
}

#[test]
fn server_keeps_neither_environment_nor_capabilities_of_its_starter() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let users = ["--no-home", "--fakeroot"].map(|options| {
        let mut command = env.command(["exec", options, image, "true"]);
        common::output(command.env("TOKEN", "secret")).ok();
        // It stays as long as it is used.
        background(&env, &["exec", options, image, "sh", "-c", "echo; read x"])
    });
    let servers = env.servers();
    assert_eq!(servers.len(), 4);
    for pid in servers {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        assert!(environment.iter().all(|b| *b == 0));
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for line in [
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000200000",
            "CapBnd:\t0000000000000000",
        ] {
            assert!(status.contains(line), "{line}: {status}");
        }
        // Threads that read the image have none at all.
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let none = "CapPrm:\t0000000000000000";
            assert!(
                !status.contains("Name:\tserve") || status.contains(none),
                "{status}"
            );
        }
    }
    for mut user in users {
        drop(user.stdin.take());
        user.wait().unwrap();
    }
}

#[test]
fn lack_of_descriptors_is_named_and_spoils_nothing() {
    let env = Env::new();
    let first = env.image();
    let program = env!("CARGO_BIN_EXE_capsid");
    for limit in 5..40 {
        // Once as the one that starts the server, and once as a later one.
        let image = env.path(&format!("{limit}.sif"));
        fs::copy(&first, &image).unwrap();
        let image = image.to_str().unwrap();
        let limit = format!("--nofile={limit}:{limit}");
        let words = [&limit, program, "exec", image, "cat", "/opt/hello.txt"];
        let few = || {
            let mut command = env.command_as(std::path::Path::new("prlimit"), words);
            let out = common::output(&mut command);
            if out.status != 127 && out.stdout != "hello\n" {
                out.fatal(&["oo many open files"]);
            }
        };
        few();
        assert_eq!(
            env.run(["exec", image, "cat", "/opt/hello.txt"]).ok(),
            "hello",
            "{limit}"
        );
        few();
    }
    env.assert_nothing_left();
}

#[test]
fn many_that_start_together_may_have_few_descriptors() {
    let env = Env::new();
    let image = env.image();
    let capsid = env!("CARGO_BIN_EXE_capsid");
    let words = [
        // The lower limit: servers raise theirs to the upper one.
        "--nofile=32:",
        capsid,
        "exec",
        image.to_str().unwrap(),
        "true",
    ];
    let start = |_| {
        let mut command = env.command_as("prlimit".as_ref(), words);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..150).map(start).collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{out:?}");
    }
    env.assert_nothing_left();
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

/// Ranks of one node read each other's memory (MPI's cross-memory attach), which takes one user namespace.
#[test]
fn ranks_read_each_others_memory() {
    let env = Env::new();
    let tree = env.tree("tree");
    let source = env.path("rank.c");
    common::write(
        &source,
        r#"#define _GNU_SOURCE
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/uio.h>
        #include <unistd.h>
        char secret[16] = "nothing";
        int main(int argc, char **argv) {
            if (argc < 3) {
                sprintf(secret, "%s", "a rank's memory");
                printf("%d %p\n", getpid(), (void *) secret);
                fflush(stdout);
                return getchar() != EOF;
            }
            struct iovec here = {secret, 16}, there = {(void *) strtoul(argv[2], 0, 16), 16};
            if (process_vm_readv(atoi(argv[1]), &here, 1, &there, 1, 0) != 16) perror("process_vm_readv");
            puts(secret);
        }"#,
    );
    let mut gcc = std::process::Command::new("gcc");
    gcc.args(["-static", "-o"])
        .arg(tree.join("bin/rank"))
        .arg(&source);
    common::output(&mut gcc).ok();
    let image = env.sif(&tree, "image.sif");
    let directory = [tree.to_str().unwrap(), "--sharens"];
    let option = "--sharens";
    for root in [image.to_str().unwrap(), directory[0]] {
        let mut first = env.command(["exec", option, root, "rank"]);
        let mut first = first
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = std::io::BufReader::new(first.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut said, &mut line).unwrap();
        let [pid, address] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let out = env.run(["exec", option, root, "rank", pid, address]);
        assert_eq!(out.ok(), "a rank's memory", "{root}");
        drop(first.stdin.take());
        assert!(first.wait().unwrap().success());
    }
    // The directory's containers are otherwise as without the option, and leave as little.
    write_and_list(&env, directory);
    env.assert_nothing_left();
}

fn write_and_list(env: &Env, [root, option]: [&str; 2]) {
    let script = "touch /made 2>/dev/null && echo made; ls /opt; id -u; stat -c %u /opt";
    for more in [
        &[][..],
        &["--fakeroot"],
        &["--writable-tmpfs"],
        &["--pid", "--ipc"],
    ] {
        let with = env.run([&["exec"], more, &[option, root, "sh", "-c", script]].concat());
        let without = env.run([&["exec"], more, &[root, "sh", "-c", script]].concat());
        assert_eq!(with.ok(), without.ok(), "{more:?}");
    }
}
