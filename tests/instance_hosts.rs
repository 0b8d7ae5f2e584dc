//! Instances on other hosts: what /proc hides, what a logout takes, and what other users have made before.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Env, Output, output, processes, script, wait_until};

/// An environment with a service whose instances end with it.
struct Host {
    env: Env,
    image: PathBuf,
}

const CAPSID: &str = env!("CARGO_BIN_EXE_capsid");

impl Host {
    fn new() -> Host {
        let env = Env::new();
        let tree = env.tree("tree");
        script(
            &tree.join(".singularity.d/startscript"),
            "#!/bin/sh\nexec sleep 1000\n",
        );
        let image = env.sif(&tree, "service.sif");
        Host { env, image }
    }

    fn command(&self, words: &[&str]) -> Command {
        let image = self.image.to_str().unwrap();
        let words = words.iter().map(|w| if *w == "IMAGE" { image } else { w });
        let mut command = self.env.command(words);
        command.env("APPTAINER_CONFIGDIR", self.env.path("config"));
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        output(&mut self.command(words))
    }

    /// As a login does whose environment differs.
    fn run_with(&self, words: &[&str], variables: &[(&str, Option<&Path>)]) -> Output {
        let mut command = self.command(words);
        for (name, value) in variables {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        output(&mut command)
    }

    fn pid(&self, name: &str) -> i64 {
        let out = self.run(&["instance", "inspect", "--json", name]);
        let record: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
        record["init"]["pid"].as_i64().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // One that a failed test left.
        let _ = self.command(&["instance", "stop", "-F", "--all"]).output();
    }
}

/// What every login can do with the instance `i`, and then stops it.
fn assert_found_and_stopped(host: &Host, variables: &[(&str, Option<&Path>)]) {
    let run = |words: &[&str]| host.run_with(words, variables);
    let list = run(&["instance", "list"]);
    assert!(list.ok().lines().any(|l| l.starts_with("i ")), "{list}");
    assert_eq!(run(&["exec", "instance://i", "echo", "in"]).ok(), "in");
    run(&["instance", "start", "IMAGE", "i"]).fatal(&["instance i already exists"]);
    let stop = run(&["instance", "stop", "i"]);
    stop.ok();
    assert!(!stop.stderr.contains("Timeout"), "{stop}");
    assert_eq!(run(&["instance", "list"]).ok().lines().count(), 1);
    run(&["exec", "instance://i", "true"]).fatal(&["no instance found with name i"]);
}

#[test]
fn instance_is_found_and_stopped_whatever_proc_hides() {
    for options in [
        "hidepid=1",
        "hidepid=2",
        "hidepid=4",
        "hidepid=2,subset=pid",
    ] {
        let host = Host::new();
        let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
        // The first shell owns the namespace that /proc is mounted in; the second is a user without rights in it.
        let inner = format!(
            "set -e; i() {{ {CAPSID} instance \"$@\"; }}
             ! cat /proc/1/environ
             i start --pid-file pid {image} i; test \"$(cat pid)\" -gt 1
             i list | grep '^i '; {CAPSID} exec instance://i echo joined
             ! i start {image} i; i stats --no-stream i | grep '^i '
             i stop i; ! i list | grep '^i '; test ! -e pid; echo done",
            image = host.image.display()
        );
        let outer = format!(
            "mount -t proc -o {options} proc /proc && exec unshare -U --map-user={uid} --map-group={gid} sh -c '{}'",
            inner.replace('\'', "'\\''")
        );
        let mut command = host.env.command_as(
            Path::new("unshare"),
            ["-U", "-r", "-m", "-p", "-f", "sh", "-c", &outer],
        );
        command.env("APPTAINER_CONFIGDIR", host.env.path("config"));
        let out = output(&mut command);
        assert!(out.ok().ends_with("done"), "{options}: {out}");
        assert!(!out.stderr.contains("Timeout"), "{options}: {out}");
    }
}

#[test]
fn covered_proc_is_named_with_the_way_out() {
    let host = Host::new();
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    for (words, status) in [
        ("instance start IMAGE i", 255),
        ("exec --pid IMAGE true", 255),
        ("exec --containall IMAGE true", 255),
        ("exec IMAGE true", 0),
    ] {
        let words = words.replace("IMAGE", host.image.to_str().unwrap());
        let outer = format!(
            "mount --bind /dev/null /proc/version && exec unshare -U --map-user={uid} --map-group={gid} {CAPSID} {words}"
        );
        let outer = [
            "-U",
            "-r",
            "-m",
            "-p",
            "-f",
            "--mount-proc",
            "sh",
            "-c",
            &outer,
        ];
        let mut command = host.env.command_as(Path::new("unshare"), outer);
        let out = output(command.env("APPTAINER_CONFIGDIR", host.env.path("config")));
        match status {
            0 => drop(out.ok()),
            _ => out.fatal(&["/proc", "mounted over", "systempaths=unconfined"]),
        }
    }
}

#[test]
fn instance_is_found_by_every_login() {
    let host = Host::new();
    let other = host.env.path("other");
    fs::create_dir(&other).unwrap();
    let missing = host.env.path("missing");
    for variables in [
        &[("XDG_RUNTIME_DIR", None)][..],
        &[("XDG_RUNTIME_DIR", Some(other.as_path()))],
        &[("XDG_RUNTIME_DIR", Some(missing.as_path()))],
        &[("TMPDIR", Some(other.as_path())), ("HOME", None)],
        &[
            ("USER", None),
            ("HOME", Some(missing.as_path())),
            ("LANG", None),
        ],
    ] {
        host.run(&["instance", "start", "IMAGE", "i"]).ok();
        assert_found_and_stopped(&host, variables);
        host.run_with(&["instance", "start", "IMAGE", "i"], variables)
            .ok();
        assert_found_and_stopped(&host, &[]);
    }
}

#[test]
fn instance_is_found_when_its_login_has_ended() {
    let host = Host::new();
    for again in [true, false] {
        host.run(&["instance", "start", "IMAGE", "i"]).ok();
        // As the end of the last session does, and the next login.
        fs::remove_dir_all(host.env.path("run")).unwrap();
        if again {
            use std::os::unix::fs::PermissionsExt as _;
            fs::create_dir(host.env.path("run")).unwrap();
            let private = fs::Permissions::from_mode(0o700);
            fs::set_permissions(host.env.path("run"), private).unwrap();
        }
        assert_found_and_stopped(&host, &[]);
    }
}

#[test]
fn instance_of_an_older_version_is_found_in_any_runtime_directory() {
    use std::os::unix::fs::PermissionsExt as _;
    let host = Host::new();
    for directory in ["run", "other"] {
        host.run(&["instance", "start", "IMAGE", "new"]).ok();
        // Those left a record in a file, and let nobody ask.
        let out = host.run(&["instance", "inspect", "--json", "new"]);
        let file = host.env.path(directory).join("capsid/instance.old");
        common::write(&file, &out.ok().replace("\"new\"", "\"old\""));
        for (path, mode) in [(file.as_path(), 0o600), (file.parent().unwrap(), 0o700)] {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let home = host.env.path(directory);
        let run = |words: &[&str]| host.run_with(words, &[("XDG_RUNTIME_DIR", Some(&home))]);
        let list = run(&["instance", "list"]);
        assert!(list.ok().lines().any(|l| l.starts_with("old ")), "{list}");
        run(&["instance", "start", "IMAGE", "old"]).fatal(&["instance old already exists"]);
        run(&["instance", "stop", "old"]).ok();
        assert_eq!(run(&["instance", "list"]).ok().lines().count(), 1);
        assert!(!file.exists());
    }
}

#[test]
fn each_configuration_directory_has_names_of_its_own() {
    let host = Host::new();
    let (a, b) = (host.env.path("a"), host.env.path("b"));
    fs::create_dir(&a).unwrap();
    std::os::unix::fs::symlink("a", host.env.path("link")).unwrap();
    let with = |directory: &Path, words: &[&str]| {
        host.run_with(words, &[("APPTAINER_CONFIGDIR", Some(directory))])
    };
    with(&a, &["instance", "start", "IMAGE", "i"]).ok();
    with(&b, &["instance", "start", "IMAGE", "i"]).ok();
    // However it is written.
    for same in ["a/", "./a", "link", "b/../a"] {
        let same = host.env.path(same);
        with(&same, &["instance", "start", "IMAGE", "i"]).fatal(&["already exists"]);
    }
    let relative = Path::new("../a");
    with(relative, &["instance", "stop", "i"]).ok();
    let list = with(&b, &["instance", "list"]);
    assert!(list.ok().contains("i "), "{list}");
    assert_eq!(with(&a, &["instance", "list"]).ok().lines().count(), 1);
    with(&b, &["instance", "stop", "--all"]).ok();
}

/// The socket of a monitor as everybody sees it.
fn sockets(config: &Path) -> Vec<String> {
    let scope = capsid::digest::Digest::of(config.as_os_str().as_encoded_bytes()).hex();
    let text = fs::read("/proc/net/unix").unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    let names = text
        .lines()
        .filter_map(|l| l.split_once(" @"))
        .map(|(_, name)| name.to_owned());
    names.filter(|name| name.contains(&scope[..16])).collect()
}

#[test]
fn program_in_a_container_is_neither_answered_nor_believed() {
    use std::io::Read as _;
    let host = Host::new();
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    let config = fs::canonicalize(host.env.path("config")).unwrap();
    let names = sockets(&config);
    assert_eq!(names.len(), 1, "{names:?}");
    // In a user namespace of its own, with the same id: nothing is found, and nothing can be stopped.
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let (user, group) = (format!("--map-user={uid}"), format!("--map-group={gid}"));
    let elsewhere = |words: &[&str]| {
        let all = ["-U", &user, &group, CAPSID]
            .into_iter()
            .chain(words.iter().copied());
        let mut command = host.env.command_as(Path::new("unshare"), all);
        output(command.env("APPTAINER_CONFIGDIR", &config))
    };
    assert_eq!(elsewhere(&["instance", "list"]).ok().lines().count(), 1);
    assert_eq!(elsewhere(&["instance", "stop", "i"]).status, 1);
    host.run(&["exec", "instance://i", "true"]).ok();
    host.run(&["instance", "stop", "i"]).ok();
    // Nor is one believed that has bound the name, and shows the namespace that it was shown, or its own.
    let program = format!("import socket, os
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind('\\0{}'); s.listen(9)
print('bound', flush=True)
users = os.open('/proc/self/ns/user', os.O_RDONLY); record = os.memfd_create('r'); os.write(record, b'{{}}')
while True:
    c, _ = s.accept(); said, shown, _, _ = socket.recv_fds(c, 100, 9)
    if said or shown: print('leak', said, shown, flush=True)
    for fds in ([], shown, [users]):
        try: socket.send_fds(c, [b'\\1\\0'], fds + [record, os.pidfd_open(os.getpid())])
        except OSError: pass
    try: c.close()
    except OSError: pass
", names[0]);
    let words = ["-U", &user, &group, "python3", "-c", &program];
    let mut squatter = host.env.command_as(Path::new("unshare"), words);
    let mut squatter = squatter
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 5];
    squatter
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(host.run(&["instance", "list"]).ok().lines().count(), 1);
    host.run(&["exec", "instance://i", "true"])
        .fatal(&["no instance found"]);
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    assert_found_and_stopped(&host, &[]);
    squatter.kill().unwrap();
    squatter.wait().unwrap();
}

#[test]
fn stopped_monitor_is_woken_to_answer() {
    use nix::sys::signal::{Signal, kill};
    let host = Host::new();
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    let out = host.run(&["instance", "inspect", "--json", "i"]);
    let record: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
    let monitor = i32::try_from(record["monitor"]["pid"].as_i64().unwrap()).unwrap();
    kill(nix::unistd::Pid::from_raw(monitor), Signal::SIGSTOP).unwrap();
    assert_found_and_stopped(&host, &[]);
}

#[test]
fn monitor_that_hangs_can_be_stopped_by_name() {
    use std::io::Read as _;
    let host = Host::new();
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    let config = fs::canonicalize(host.env.path("config")).unwrap();
    let names = sockets(&config);
    host.run(&["instance", "stop", "i"]).ok();
    // As one whose file system does not answer: it listens, and that is all.
    let program = format!(
        "import socket, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind('\\0{}'); s.listen(9)
print('bound', flush=True)
signal.pause()
",
        names[0]
    );
    let mut monitor = host.env.command_as(Path::new("python3"), ["-c", &program]);
    let mut monitor = monitor
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    monitor
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut [0; 5])
        .unwrap();
    let stop = host.run(&["instance", "stop", "--timeout", "0", "i"]);
    stop.ok();
    assert!(stop.stderr.contains("does not answer"), "{stop}");
    use std::os::unix::process::ExitStatusExt as _;
    assert_eq!(monitor.wait().unwrap().signal(), Some(9));
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    assert_found_and_stopped(&host, &[]);
}

#[test]
fn home_may_have_any_bytes() {
    let host = Host::new();
    let odd = PathBuf::from(std::ffi::OsString::from_vec(
        [
            host.env.path("").into_os_string().into_vec(),
            b"h\xff\xfe".to_vec(),
        ]
        .concat(),
    ));
    fs::create_dir(&odd).unwrap();
    let config = odd.join("config");
    let image = odd.join("i.sif");
    fs::copy(&host.image, &image).unwrap();
    let run = |words: &[&str]| {
        let words = words.iter().map(|w| match *w {
            "IMAGE" => image.clone().into_os_string(),
            other => other.into(),
        });
        let mut command = host.env.command(words);
        output(
            command
                .env("APPTAINER_CONFIGDIR", &config)
                .current_dir(&odd),
        )
    };
    run(&["instance", "start", "--pid-file", "pid", "IMAGE", "i"]).ok();
    assert!(odd.join("pid").exists());
    for words in [
        &["instance", "list", "--json"][..],
        &["instance", "list", "--logs"],
        &["instance", "inspect", "--json", "i"],
        &["instance", "inspect", "i"],
        &["exec", "instance://i", "true"],
        &["instance", "logs", "i"],
        &["instance", "stop", "i"],
        &["instance", "inspect", "--json", "i"],
    ] {
        run(words).ok();
    }
    assert!(!odd.join("pid").exists());
    assert!(config.join("instances/logs").exists());
}

#[test]
fn first_process_keeps_its_secrets_and_its_socket() {
    let host = Host::new();
    let mut command = host.command(&[
        "instance",
        "start",
        "--containall",
        "--cleanenv",
        "IMAGE",
        "i",
    ]);
    output(command.env("SECRET", "s3cret-of-the-caller")).ok();
    for words in [
        &["cat", "/proc/1/mem"][..],
        &["cat", "/proc/1/environ"],
        &["ls", "/proc/1/fd"],
        &["ls", "-l", "/proc/1/root/"],
        &["cat", "/proc/1/maps"],
    ] {
        let all: Vec<&str> = ["exec", "instance://i"]
            .iter()
            .chain(words)
            .copied()
            .collect();
        let out = host.run(&all);
        assert!(
            out.status != 0 && out.stderr.contains("Permission denied"),
            "{words:?}: {out}"
        );
    }
    // From outside neither, though it is the same user.
    let pid = host.pid("i");
    assert!(fs::read_dir(format!("/proc/{pid}/fd")).is_err());
    // Other processes of the container are ordinary ones.
    host.run(&[
        "exec",
        "instance://i",
        "sh",
        "-c",
        "ls /proc/self/fd /proc/2/fd",
    ])
    .ok();
}

#[test]
fn whole_outer_group_is_told_to_stop() {
    let host = Host::new();
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    let daemon = "(trap : INT TERM; sleep 300 & wait; wait) </dev/null >/dev/null 2>&1 &";
    host.run(&[
        "exec",
        "instance://i",
        "sh",
        "-c",
        &format!("trap \"\" HUP; {daemon}"),
    ])
    .ok();
    host.run(&["exec", "instance://i", "sh", "-c", daemon]).ok();
    let stop = host.run(&["instance", "stop", "i"]);
    stop.ok();
    assert!(!stop.stderr.contains("Killing"), "{stop}");
}

#[test]
fn options_of_instance_commands_come_from_the_environment_too() {
    let host = Host::new();
    let with = |words: &[&str], name: &str| output(host.command(words).env(name, "1"));
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    assert!(
        with(&["instance", "list"], "APPTAINER_JSON")
            .ok()
            .starts_with('{')
    );
    assert!(
        with(&["instance", "list"], "APPTAINER_LOGS")
            .ok()
            .contains("LOGS")
    );
    with(&["instance", "stop"], "SINGULARITY_ALL").ok();
    assert_eq!(host.run(&["instance", "list"]).ok().lines().count(), 1);
    with(&["exec", "IMAGE", "true"], "APPTAINER_FUSESPEC").fatal(&["--fusemount"]);
}

#[test]
fn unit_calls_the_program_by_the_name_it_was_called() {
    let host = Host::new();
    let link = host.env.path("bin/apptainer");
    fs::create_dir(host.env.path("bin")).unwrap();
    std::os::unix::fs::symlink(CAPSID, &link).unwrap();
    let image = host.image.to_str().unwrap();
    let words = ["instance", "unit", image, "web"];
    let path = format!("{}:/usr/bin:/bin", host.env.path("bin").display());
    let by_path = output(host.env.command_as(&link, words).env("PATH", &path));
    let mut shell = host
        .env
        .command_as(Path::new("/bin/sh"), ["-c", "exec apptainer \"$@\"", "sh"]);
    let by_name = output(shell.args(words).env("PATH", &path));
    let mut shell = host.env.command_as(
        Path::new("/bin/sh"),
        ["-c", "cd ../bin && exec ./apptainer \"$@\"", "sh"],
    );
    let relative = output(shell.args(words));
    for out in [by_path, by_name, relative] {
        let wanted = format!("ExecStart={} instance start", link.display());
        assert!(
            out.ok().lines().any(|l| l.starts_with(&wanted)),
            "{wanted}: {out}"
        );
    }
}

#[test]
fn nothing_is_left_of_a_killed_instance() {
    use nix::sys::signal::{Signal, kill};
    let host = Host::new();
    host.run(&["instance", "start", "IMAGE", "i"]).ok();
    let config = fs::canonicalize(host.env.path("config")).unwrap();
    let pid = i32::try_from(host.pid("i")).unwrap();
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_until("its socket to go", || sockets(&config).is_empty());
    assert!(processes().iter().all(|(p, _)| *p != pid));
    host.env.assert_nothing_left();
}
