//! Instances: services that one can rely on. Real processes, as a normal user.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Env, Output, add_programs, free_port, output, processes, script, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// An environment with an image whose startscript is `text`, and whose instances all end with it.
struct Services {
    env: Env,
    image: String,
}

const FOREVER: &str = "echo started \"$@\"\necho to stderr >&2\nexec sleep 1000";

impl Services {
    fn new(startscript: &str) -> Services {
        let env = Env::new();
        let tree = env.tree("tree");
        script(
            &tree.join(".singularity.d/startscript"),
            &format!("#!/bin/sh\n{startscript}\n"),
        );
        script(
            &tree.join(".singularity.d/runscript"),
            "#!/bin/sh\nexec \"$@\"\n",
        );
        let image = env.sif(&tree, "service.sif").display().to_string();
        Services { env, image }
    }

    fn command(&self, words: &[&str]) -> Command {
        let words = words
            .iter()
            .map(|w| if *w == "IMAGE" { &self.image } else { *w });
        let mut command = self.env.command(words);
        command.env("APPTAINER_CONFIGDIR", self.env.path("config"));
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        output(&mut self.command(words))
    }

    fn inspect(&self, name: &str) -> serde_json::Value {
        let out = self.run(&["instance", "inspect", "--json", name]);
        serde_json::from_str(out.ok()).unwrap()
    }

    fn pid(&self, name: &str, whose: &str) -> Pid {
        let pid = self.inspect(name)[whose]["pid"].as_i64().unwrap();
        Pid::from_raw(i32::try_from(pid).unwrap())
    }

    fn names(&self) -> Vec<String> {
        let out = self.run(&["instance", "list", "--json"]);
        let list: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
        let all = list["instances"].as_array().unwrap();
        all.iter()
            .map(|i| i["instance"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Processes of ours that look after instances of this environment.
    fn monitors(&self) -> usize {
        let dir = self.env.path("run").display().to_string();
        processes()
            .iter()
            .filter(|(_, line)| line.starts_with("capsid-instance"))
            .filter(|(pid, _)| {
                let env = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                String::from_utf8_lossy(&env).contains(&dir)
            })
            .count()
    }

    fn log(&self, name: &str) -> PathBuf {
        PathBuf::from(self.inspect(name)["log_out"].as_str().unwrap())
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        // One that a failed test left.
        let _ = self.command(&["instance", "stop", "-F", "--all"]).output();
    }
}

#[test]
fn instances_start_answer_and_stop() {
    let s = Services::new(FOREVER);
    let out = s.run(&["instance", "start", "IMAGE", "web1", "a b", "c"]);
    out.ok();
    assert!(
        out.stderr
            .contains("INFO:    instance started successfully"),
        "{out}"
    );
    s.run(&["instance", "start", "IMAGE", "web2"]).ok();
    assert_eq!(s.names(), ["web1", "web2"]);
    let list = s.run(&["instance", "list", "*2"]);
    let lines: Vec<&str> = list.ok().lines().collect();
    assert!(lines[0].starts_with("INSTANCE NAME    PID"), "{list}");
    assert!(lines.len() == 2 && lines[1].starts_with("web2 "), "{list}");
    let ps = s.run(&["exec", "instance://web1", "ps", "-o", "pid,ppid,args"]);
    let ps: Vec<String> = ps
        .ok()
        .lines()
        .map(|l| l.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(ps[1], "1 0 appinit");
    assert_eq!(ps[2], "2 1 sleep 1000");
    assert_eq!(ps.len(), 4, "nothing of the host is seen: {ps:?}");
    let env = s.run(&[
        "exec",
        "instance://web1",
        "sh",
        "-c",
        "echo $APPTAINER_INSTANCE $SINGULARITY_NAME $GREETING",
    ]);
    assert_eq!(env.ok(), "web1 service.sif hello from environment");
    assert_eq!(
        s.run(&["exec", "instance://web1", "sh", "-c", "exit 42"])
            .status,
        42
    );
    assert_eq!(
        s.run(&["run", "instance://web2", "echo", "ran"]).ok(),
        "ran"
    );
    assert_eq!(s.run(&["test", "instance://web2", "x"]).ok(), "tested x");
    assert_eq!(
        s.run(&["exec", "--pwd", "/opt", "instance://web2", "pwd"])
            .ok(),
        "/opt"
    );
    let logs = s.run(&["instance", "logs", "web1"]);
    assert_eq!(logs.ok(), "started a b c\nto stderr");
    s.run(&["instance", "stop", "web1"]).ok();
    assert_eq!(s.names(), ["web2"]);
    assert_eq!(
        s.run(&["instance", "logs", "--out", "web1"]).ok(),
        "started a b c"
    );
    s.run(&["instance", "stop", "*"]).ok();
    for all in ["--all", "-a", "--a"] {
        let out = s.run(&["instance", "stop", all]);
        assert!(
            out.status == 1 && out.stderr.contains("no instance found"),
            "{out}"
        );
    }
    s.env.assert_nothing_left();
    assert_eq!(s.monitors(), 0);
}

#[test]
fn older_spelling_and_json_are_kept_for_clients() {
    let s = Services::new(FOREVER);
    s.run(&["instance.start", "IMAGE", "old"]).ok();
    let pid = s.pid("old", "init");
    let log = s.log("old");
    let err = log.with_extension("err");
    assert!(log.starts_with(s.env.path("config/instances/logs")));
    let wanted = format!(
        "{{\n\t\"instances\": [\n\t\t{{\n\t\t\t\"instance\": \"old\",\n\t\t\t\"pid\": {pid},\n\t\t\t\"img\": \"{}\",\n\t\t\t\"ip\": \"\",\n\t\t\t\"logErrPath\": \"{}\",\n\t\t\t\"logOutPath\": \"{}\"\n\t\t}}\n\t]\n}}",
        s.image,
        err.display(),
        log.display()
    );
    assert_eq!(s.run(&["instance.list", "--json"]).ok(), wanted);
    let logs = s.run(&["instance", "list", "--logs"]);
    assert!(logs.ok().contains(&err.display().to_string()), "{logs}");
    s.run(&["instance.stop", "--all"]).ok();
    assert_eq!(
        s.run(&["instance", "list", "--json"]).ok(),
        "{\n\t\"instances\": []\n}"
    );
}

#[test]
fn names_are_checked_and_unique() {
    let s = Services::new(FOREVER);
    for bad in [".", "..", "a/b", "a b", "-x", "", &"x".repeat(241)] {
        s.run(&["instance", "start", "IMAGE", bad])
            .fatal(&["not a valid instance name"]);
    }
    for good in ["x".repeat(65), "a.b-_9".repeat(40)] {
        s.run(&["instance", "start", "IMAGE", &good]).ok();
        wait_until("its log", || {
            s.run(&["instance", "logs", "--out", &good]).ok() == "started"
        });
        s.run(&["instance", "stop", &good]).ok();
        s.run(&["instance", "inspect", &good]).ok();
    }
    s.run(&["instance", "start", "IMAGE", "db"]).ok();
    s.run(&["instance", "start", "IMAGE", "db"])
        .fatal(&["instance db already exists"]);
    s.run(&["exec", "instance://nosuch", "true"])
        .fatal(&["no instance found with name nosuch"]);
}

#[test]
fn one_of_two_starts_at_once_wins() {
    let s = Services::new(FOREVER);
    for _ in 0..25 {
        let mut starts: Vec<_> = (0..2)
            .map(|_| {
                let mut command = s.command(&["instance", "start", "IMAGE", "n"]);
                command.stderr(Stdio::null()).spawn().unwrap()
            })
            .collect();
        let mut statuses: Vec<_> = starts
            .iter_mut()
            .map(|c| c.wait().unwrap().code())
            .collect();
        statuses.sort();
        assert_eq!(statuses, [Some(0), Some(255)]);
        s.run(&["instance", "stop", "n"]).ok();
    }
}

#[test]
fn cycles_leave_nothing_behind() {
    let s = Services::new(FOREVER);
    let files = || fs::read_dir(s.env.path("run/capsid")).unwrap().count();
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    s.run(&["instance", "stop", "n"]).ok();
    let before = files();
    for _ in 0..60 {
        s.run(&["instance", "start", "IMAGE", "n"]).ok();
        s.run(&["instance", "stop", "n"]).ok();
    }
    assert_eq!(files(), before);
    assert_eq!(s.monitors(), 0);
    s.env.assert_nothing_left();
}

#[test]
fn script_that_cannot_be_executed_is_an_error_at_once() {
    let s = Services::new(FOREVER);
    let tree = s.env.path("tree");
    script(
        &tree.join(".singularity.d/startscript"),
        "#!/no/such/interpreter\n",
    );
    s.run(&["instance", "start", tree.to_str().unwrap(), "n"])
        .fatal(&["startscript", "as its interpreter, is not in the container"]);
    s.run(&["instance", "start", "-B", "/no/such:/mnt", "IMAGE", "n"])
        .fatal(&["/no/such", "doesn't exist"]);
    assert!(s.names().is_empty());
    s.env.assert_nothing_left();
}

#[test]
fn instance_outlives_its_script() {
    let s = Services::new("exit 3");
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    let wait = s.run(&["instance", "wait", "n"]);
    assert_eq!((wait.status, wait.stdout.as_str()), (3, "3\n"));
    assert_eq!(s.names(), ["n"]);
    assert_eq!(
        s.run(&["exec", "instance://n", "echo", "there"]).ok(),
        "there"
    );
    s.run(&["instance", "stop", "n"]).ok();
    let end = s.inspect("n");
    assert_eq!(end["script"]["status"], 3);
    assert_eq!(end["running"], false);
}

#[test]
fn image_without_startscript_makes_an_idle_instance() {
    let env = Env::new();
    let image = env.image();
    let run = |words: &[&str]| {
        let mut command = env.command(words);
        output(command.env("APPTAINER_CONFIGDIR", env.path("config")))
    };
    run(&["instance", "start", image.to_str().unwrap(), "idle"]).ok();
    assert_eq!(run(&["exec", "instance://idle", "echo", "x"]).ok(), "x");
    run(&["instance", "stop", "idle"]).ok();
}

#[test]
fn daemon_of_an_exec_outlives_it() {
    let s = Services::new(FOREVER);
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    let program = env!("CARGO_BIN_EXE_capsid");
    let shell = format!(
        "x=$({program} exec instance://n sh -c 'setsid sleep 77 </dev/null >/dev/null 2>&1 & echo said'); echo got $x"
    );
    let mut command = s.env.command_as(Path::new("/bin/sh"), ["-c", &shell]);
    command.env("APPTAINER_CONFIGDIR", s.env.path("config"));
    assert_eq!(output(&mut command).ok(), "got said");
    wait_until("the daemon", || {
        let ps = s.run(&["exec", "instance://n", "ps", "-o", "ppid,args"]);
        ps.ok().contains("1 sleep 77")
    });
    s.run(&["instance", "stop", "n"]).ok();
}

#[test]
fn killed_exec_takes_its_program_along() {
    let s = Services::new(FOREVER);
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    for (signal, status) in [
        (Signal::SIGTERM, Signal::SIGTERM),
        (Signal::SIGKILL, Signal::SIGKILL),
    ] {
        use std::os::unix::process::ExitStatusExt as _;
        let mut child = s
            .command(&["exec", "instance://n", "sleep", "55"])
            .spawn()
            .unwrap();
        let there = || {
            s.run(&["exec", "instance://n", "ps", "-o", "args"])
                .stdout
                .contains("sleep 55")
        };
        wait_until("the program", there);
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(status as i32));
        wait_until("its end", || !there());
    }
}

#[test]
fn options_of_the_container_are_refused_when_it_runs() {
    let s = Services::new(FOREVER);
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    for option in [
        &["--bind", "/tmp:/x"][..],
        &["--contain"],
        &["--fakeroot"],
        &["--memory", "1G"],
    ] {
        let words: Vec<&str> = ["exec"]
            .iter()
            .chain(option)
            .chain(&["instance://n", "true"])
            .copied()
            .collect();
        s.run(&words).fatal(&[option[0], "instance n"]);
    }
    // What holds nowhere is refused here, too, with its reason, and limits count as isolation does.
    for option in [
        &["--security", "seccomp:/x"][..],
        &["--keep-privs"],
        &["--fusemount", "x"],
        &["--device", "x"],
        &["--oci"],
        &["--nvccli"],
        &["--network-args", "x"],
        &["--oom-kill-disable"],
        &["--memory-reservation", "1M"],
        &["--cpu-shares", "2"],
        &["--cpuset-mems", "0"],
        &["--blkio-weight", "10"],
        &["--net"],
        &["--hostname", "x"],
        &["--add-caps", "CAP_BOGUS"],
    ] {
        let mut words: Vec<&str> = [&["exec"], option].concat();
        words.extend(["instance://n", "true"]);
        s.run(&words).fatal(&[option[0]]);
    }
    let status = [
        "exec",
        "--add-caps",
        "net_raw",
        "instance://n",
        "cat",
        "/proc/self/status",
    ];
    assert!(s.run(&status).ok().contains("CapEff:\t0000000000002000"));
    // Under a peer's name one warning says what comes too late and harms nobody.
    let peer = s.env.path("singularity");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_capsid"), &peer).unwrap();
    let late = |words: &[&str]| {
        let words = ["exec"]
            .iter()
            .chain(words)
            .chain(&["instance://n", "true"]);
        let mut command = s.env.command_as(&peer, words);
        output(command.env("APPTAINER_CONFIGDIR", s.env.path("config")))
    };
    let out = late(&[
        "--nv", "-B", "/tmp:/x", "-c", "-H", "/tmp:/h", "--pid", "-e",
    ]);
    out.ok();
    let warnings: Vec<&str> = out
        .stderr
        .lines()
        .filter(|l| l.starts_with("WARNING"))
        .collect();
    assert_eq!(warnings.len(), 1, "{out}");
    for name in ["--nv", "--bind", "--contain", "--home", "instance n"] {
        assert!(warnings[0].contains(name), "{out}");
    }
    assert!(
        !warnings[0].contains("--pid") && !warnings[0].contains("--cleanenv"),
        "{out}"
    );
    late(&["--memory", "1G"]).fatal(&["--memory", "instance n"]);
    late(&["--net"]).fatal(&["--net", "instance n"]);
    let mut limited = s.command(&["exec", "instance://n", "true"]);
    let out = output(limited.env("APPTAINER_MEMORY", "1G"));
    out.ok();
    assert!(
        out.stderr.contains("WARNING: no effect") && out.stderr.contains("--memory"),
        "{out}"
    );
    // A site's defaults in the environment are for containers that are made.
    let mut command = s.command(&["exec", "instance://n", "true"]);
    output(command.env("SINGULARITY_BINDPATH", "/etc,/mnt")).ok();
}

#[test]
fn containers_are_made_with_the_options_of_exec() {
    let s = Services::new("echo $FOO; exec sleep 1000");
    let work = s.env.path("work");
    fs::create_dir(work.join("out")).unwrap();
    s.run(&[
        "instance",
        "start",
        "--bind",
        "out:/output",
        "--writable-tmpfs",
        "--env",
        "FOO=bar",
        "--hostname",
        "box",
        "--net",
        "--network",
        "none",
        "IMAGE",
        "n",
    ])
    .ok();
    s.run(&[
        "exec",
        "instance://n",
        "sh",
        "-c",
        "echo x >/output/f && echo y >/new && cat /new && hostname",
    ])
    .ok();
    assert_eq!(fs::read_to_string(work.join("out/f")).unwrap(), "x\n");
    wait_until("the log", || {
        s.run(&["instance", "logs", "n"]).stdout == "bar\n"
    });
    s.run(&["instance", "start", "--fakeroot", "IMAGE", "root"])
        .ok();
    let id = s.run(&["exec", "instance://root", "sh", "-c", "id -u; echo $HOME"]);
    assert_eq!(id.ok(), "0\n/root");
    s.run(&["instance", "start", "--contain", "IMAGE", "shut"])
        .ok();
    let pwd = s.run(&["exec", "instance://shut", "pwd"]);
    assert_eq!(pwd.ok(), common::home().to_str().unwrap());
}

#[test]
fn killed_processes_of_ours_end_the_instance() {
    let s = Services::new(FOREVER);
    for whose in ["init", "monitor"] {
        s.run(&["instance", "start", "IMAGE", "n"]).ok();
        let init = s.pid("n", "init");
        kill(s.pid("n", whose), Signal::SIGKILL).unwrap();
        wait_until("the end", || {
            s.names().is_empty() && kill(init, None).is_err()
        });
        // The name is free.
        s.run(&["instance", "start", "IMAGE", "n"]).ok();
        s.run(&["instance", "stop", "n"]).ok();
    }
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    let init = s.pid("n", "init");
    let servers = s.env.servers();
    assert_eq!(servers.len(), 2);
    // One that sees the other end would replace it.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in &servers {
            kill(Pid::from_raw(*pid), signal).unwrap();
        }
    }
    wait_until("the end", || {
        s.names().is_empty() && kill(init, None).is_err()
    });
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    s.run(&["instance", "stop", "n"]).ok();
    s.env.assert_nothing_left();
}

#[test]
fn stale_record_of_an_older_version_neither_shows_nor_blocks() {
    let s = Services::new(FOREVER);
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    let mut record = s.inspect("n");
    s.run(&["instance", "stop", "n"]).ok();
    let file = s.env.path("run/capsid/instance.n");
    let own = std::process::id();
    // As after a reboot, and with a number that belongs to somebody else now: to us.
    record["init"]["pid"] = own.into();
    record["monitor"]["pid"] = own.into();
    for boot in [record["boot"].clone(), "another".into()] {
        record["boot"] = boot;
        use std::os::unix::fs::PermissionsExt as _;
        fs::write(&file, record.to_string()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let out = s.run(&["instance", "stop", "n"]);
        assert_eq!(out.status, 1, "we are not signalled: {out}");
        assert!(s.names().is_empty() && !file.exists());
        s.run(&["instance", "start", "IMAGE", "n"]).ok();
        s.run(&["instance", "stop", "n"]).ok();
    }
    fs::write(&file, "{").unwrap();
    assert!(s.names().is_empty());
    // A draft of somebody who was killed, and one of somebody who is writing.
    let drafts = [i32::MAX, i32::try_from(own).unwrap()]
        .map(|pid| s.env.path(&format!("run/capsid/new.{pid}.instance.n")));
    drafts
        .iter()
        .for_each(|draft| fs::write(draft, "{").unwrap());
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    assert_eq!(drafts.map(|draft| draft.exists()), [false, true]);
}

#[test]
fn stop_is_orderly_and_ends_everything() {
    // The service ends well on its signal; what it left behind, which ignores that as a shell's background jobs do, is told
    // in the other way.
    let s = Services::new(
        "trap 'echo bye; exit 0' INT\n(trap 'echo child bye; exit 0' TERM; echo up; while :; do sleep 0.05; done) &\nwhile :; do sleep 0.05; done",
    );
    s.run(&[
        "instance",
        "start",
        "--ready-log",
        "^up$",
        "--wait",
        "IMAGE",
        "n",
    ])
    .ok();
    s.run(&["instance", "stop", "n"]).ok();
    let logs = s.run(&["instance", "logs", "n"]).stdout;
    assert!(
        logs.contains("\nbye") && logs.contains("child bye"),
        "{logs}"
    );
    assert_eq!(s.inspect("n")["script"]["status"], 0);
}

#[test]
fn process_group_that_the_script_left_is_told_as_a_terminal_tells_it() {
    // Like npm: the parent waits for its child, and leaves it to the sender to tell the child.
    let child = "trap 'echo child told; exit 0' TERM; echo up; while :; do sleep 0.05; done";
    let s = Services::new(&format!(
        "sh -c \"trap 'wait; echo parent told' TERM; sh -c \\\"{child}\\\" & wait\" &"
    ));
    let words = ["instance", "start", "--ready-log", "up", "--wait"];
    s.run(&[&words[..], &["IMAGE", "n"]].concat()).ok();
    let stopped = s.run(&["instance", "stop", "n"]);
    assert!(!stopped.stderr.contains("Killing"), "{stopped}");
    let logs = s.run(&["instance", "logs", "n"]).stdout;
    assert!(
        logs.contains("child told") && logs.contains("parent told"),
        "{logs}"
    );
}

#[test]
fn stop_ends_what_does_not_listen() {
    let s = Services::new("trap '' INT TERM\necho up\nwhile :; do sleep 1; done");
    let start = || {
        s.run(&[
            "instance",
            "start",
            "--ready-log",
            "up",
            "--wait",
            "IMAGE",
            "n",
        ])
        .ok()
        .len()
    };
    start();
    let before = Instant::now();
    s.run(&["instance", "stop", "-t", "1", "n"]).ok();
    assert!(before.elapsed() >= Duration::from_secs(1));
    assert!(s.names().is_empty());
    start();
    s.run(&["instance", "stop", "-s", "KILL", "n"]).ok();
    start();
    s.run(&["instance", "stop", "-F", "n"]).ok();
    start();
    kill(s.pid("n", "init"), Signal::SIGSTOP).unwrap();
    kill(s.pid("n", "monitor"), Signal::SIGSTOP).unwrap();
    s.run(&["instance", "stop", "-t", "1", "n"]).ok();
    assert!(s.names().is_empty());
    s.run(&["instance", "stop", "-s", "NOSUCH", "n"])
        .fatal(&["NOSUCH"]);
}

#[test]
fn stopped_service_is_woken_to_stop() {
    let s = Services::new(FOREVER);
    s.run(&["instance", "start", "IMAGE", "n"]).ok();
    s.run(&["exec", "instance://n", "kill", "-STOP", "2"]).ok();
    let before = Instant::now();
    s.run(&["instance", "stop", "n"]).ok();
    assert!(before.elapsed() < Duration::from_secs(5));
}

#[test]
fn readiness_is_waited_for() {
    let s = Services::new(
        "sleep 0.3; [ -z \"$2\" ] || while [ ! -e \"$2\" ]; do sleep 0.05; done; echo now ready; touch \"$1\"; exec sleep 1000",
    );
    let file = s.env.work().join("ready");
    let file = file.to_str().unwrap();
    let command = format!("test -f {file}");
    for ready in [
        ["--ready-file", file],
        ["--ready-log", "now r.ady$"],
        ["--ready-cmd", &command],
    ] {
        let _ = fs::remove_file(file);
        s.run(&[
            "instance",
            "start",
            ready[0],
            ready[1],
            "--wait=10",
            "IMAGE",
            "n",
            file,
        ])
        .ok();
        assert!(s.log("n").exists() && s.inspect("n")["script"]["ready"] == true);
        s.run(&["instance", "stop", "n"]).ok();
    }
    // Without --wait somebody else can wait for it. The file is there still, from before.
    let go = s.env.work().join("go");
    s.run(&[
        "instance",
        "start",
        "--ready-file",
        file,
        "IMAGE",
        "n",
        file,
        go.to_str().unwrap(),
    ])
    .ok();
    assert_eq!(s.inspect("n")["script"]["ready"], false);
    fs::write(&go, "").unwrap();
    s.run(&["instance", "wait", "n"]).ok();
    assert_eq!(s.inspect("n")["script"]["ready"], true);
    s.run(&["instance", "stop", "n"]).ok();
    s.run(&[
        "instance",
        "start",
        "--ready-file",
        "/no/such",
        "--wait=0.3",
        "IMAGE",
        "n",
        file,
    ])
    .fatal(&["not ready after 0.3 s", "instance logs n"]);
    assert!(s.names().is_empty());
}

#[test]
fn readiness_by_port_and_by_notification() {
    let s = Services::new("exec \"$@\"");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string();
    let words = [
        "instance",
        "start",
        "--ready-port",
        &port,
        "--wait",
        "IMAGE",
        "n",
    ];
    let serve = [
        "sh",
        "-c",
        &format!("sleep 0.2; while :; do nc -l -p {port} -e echo hello; done"),
    ];
    s.run(&[&words[..], &serve].concat()).ok();
    s.run(&["instance", "stop", "n"]).ok();
    let listener = std::net::TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
    s.run(&[&words[..], &serve].concat())
        .fatal(&[&port, "in use"]);
    drop(listener);
    let notify = "import os, socket, time\nt = os.environ['NOTIFY_SOCKET']\n\
                  socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'STATUS=x\\nREADY=1', '\\0' + t[1:])\ntime.sleep(1000)";
    s.run(&[
        "instance",
        "start",
        "-B",
        "/usr,/lib,/lib64",
        "--ready-notify",
        "--wait=10",
        "IMAGE",
        "n",
        "/usr/bin/python3",
        "-c",
        notify,
    ])
    .ok();
}

#[test]
fn service_that_ends_before_it_is_ready_is_an_error() {
    let s = Services::new("echo no configuration >&2; exit 4");
    s.run(&[
        "instance",
        "start",
        "--ready-port",
        "1",
        "--wait",
        "IMAGE",
        "n",
    ])
    .fatal(&["status 4", "no configuration"]);
    assert!(s.names().is_empty());
}

#[test]
fn script_is_started_again() {
    let s = Services::new("echo one more; exit 3");
    s.run(&[
        "instance",
        "start",
        "--restart",
        "on-failure:2",
        "IMAGE",
        "n",
    ])
    .ok();
    assert_eq!(s.run(&["instance", "wait", "n"]).status, 3);
    assert_eq!(s.inspect("n")["script"]["restarts"], 2);
    assert_eq!(
        s.run(&["instance", "logs", "--out", "n"]).ok(),
        "one more\none more\none more"
    );
    s.run(&["instance", "stop", "n"]).ok();
    let s = Services::new("echo one more; exit 0");
    s.run(&["instance", "start", "--restart", "always", "IMAGE", "n"])
        .ok();
    wait_until("a restart", || {
        s.inspect("n")["script"]["restarts"].as_u64() >= Some(1)
    });
    s.run(&["instance", "stop", "n"]).ok();
    s.run(&["instance", "start", "--restart", "sometimes", "IMAGE", "n"])
        .fatal(&["--restart"]);
}

#[test]
fn logs_are_bounded_and_never_stop_the_service() {
    let s = Services::new(
        "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo end; exec sleep 1000",
    );
    s.run(&[
        "instance",
        "start",
        "--log-size",
        "4K",
        "--ready-log",
        "^end$",
        "--wait=20",
        "IMAGE",
        "n",
    ])
    .ok();
    let log = s.log("n");
    let old = log.with_extension("out.1");
    assert!(fs::metadata(&log).unwrap().len() <= 20 << 10);
    assert!(fs::metadata(&old).unwrap().len() <= 20 << 10);
    assert_eq!(
        s.run(&["instance", "logs", "--out", "--tail", "2", "n"])
            .ok(),
        "line 1999\nend"
    );
    s.run(&["instance", "stop", "n"]).ok();
    // Removed while it runs.
    let s = Services::new("while :; do read x </output/go && echo said $x; done");
    let fifo = s.env.work().join("go");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let bind = format!("{}:/output", s.env.work().display());
    s.run(&["instance", "start", "-B", &bind, "IMAGE", "n"])
        .ok();
    let log = s.log("n");
    fs::write(&fifo, "1\n").unwrap();
    wait_until("the log", || {
        fs::read_to_string(&log).is_ok_and(|t| t == "said 1\n")
    });
    fs::remove_file(&log).unwrap();
    fs::write(&fifo, "2\n").unwrap();
    wait_until("a new log", || {
        fs::read_to_string(&log).is_ok_and(|t| t == "said 2\n")
    });
    // Followed to the end of the instance.
    let follow = s
        .command(&["instance", "logs", "-f", "--out", "n"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(200));
    fs::write(&fifo, "3\n").unwrap();
    wait_until("the log", || {
        fs::read_to_string(&log).is_ok_and(|t| t.ends_with("said 3\n"))
    });
    s.run(&["instance", "stop", "n"]).ok();
    let out = follow.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "said 2\nsaid 3\n");
}

#[test]
fn place_for_state_and_logs_is_found_or_named() {
    let s = Services::new(FOREVER);
    // A name of its own: the user's other instances are not this test's.
    let config = format!("/proc/nowhere/{}", std::process::id());
    let elsewhere = |words: &[&str]| output(s.command(words).env("APPTAINER_CONFIGDIR", &config));
    let out = elsewhere(&["instance", "start", "IMAGE", "n"]);
    out.ok();
    assert!(
        out.stderr
            .contains("WARNING: cannot write logs in /proc/nowhere"),
        "{out}"
    );
    let inspected = elsewhere(&["instance", "inspect", "--json", "n"]);
    let inspected: serde_json::Value = serde_json::from_str(inspected.ok()).unwrap();
    let log = Path::new(inspected["log_out"].as_str().unwrap());
    assert!(log.starts_with(s.env.path("run/capsid/logs")));
    elsewhere(&["instance", "stop", "n"]).ok();
    fs::remove_dir_all(s.env.path("run/capsid/logs")).unwrap();
}

#[test]
fn pid_file_is_written_and_removed() {
    let s = Services::new(FOREVER);
    let target = s.env.work().join("target");
    fs::write(&target, "precious").unwrap();
    std::os::unix::fs::symlink(&target, s.env.work().join("pid")).unwrap();
    s.run(&["instance", "start", "--pid-file", "pid", "IMAGE", "n"])
        .ok();
    let pid = fs::read_to_string(s.env.work().join("pid")).unwrap();
    assert_eq!(pid, format!("{}\n", s.pid("n", "init")));
    s.run(&["instance", "stop", "n"]).ok();
    assert!(!s.env.work().join("pid").exists());
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
    s.run(&[
        "instance",
        "start",
        "--pid-file",
        "/no/such/pid",
        "IMAGE",
        "n",
    ])
    .fatal(&["/no/such/pid", "--pid-file"]);
    // What is no file of ours is neither replaced nor read: some devices have no end.
    nix::unistd::mkfifo(&s.env.work().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for other in ["/dev/full", "/dev/zero", "fifo", "."] {
        s.run(&["instance", "start", "--pid-file", other, "IMAGE", "n"])
            .fatal(&["--pid-file", "no regular file"]);
    }
    assert!(s.names().is_empty());
}

#[test]
fn statistics_need_no_cgroup() {
    let s = Services::new("while :; do :; done");
    s.run(&["instance", "start", "IMAGE", "busy"]).ok();
    let out = s.run(&["instance", "stats", "--no-stream"]);
    let lines: Vec<&str> = out.ok().lines().collect();
    assert!(
        lines[0].starts_with("INSTANCE NAME    CPU USAGE    MEM USAGE / LIMIT"),
        "{out}"
    );
    let cpu: f64 = lines[1]
        .split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .trim_end_matches('%')
        .parse()
        .unwrap();
    assert!(cpu > 5.0, "{out}");
    let out = s.run(&["instance", "stats", "--json", "busy"]);
    let stats: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
    assert!(
        stats["cpu_stats"]["cpu_usage"]["total_usage"].as_u64() > Some(0),
        "{out}"
    );
    assert!(
        stats["memory_stats"]["usage"]["usage"].as_u64() > Some(0),
        "{out}"
    );
    assert_eq!(stats["pids_stats"]["current"], 2, "{out}");
    let out = s.run(&["instance", "stats", "nosuch"]);
    assert!(
        out.status == 1 && out.stderr.contains("no instance found"),
        "{out}"
    );
}

#[test]
fn limits_are_enforced_or_refused() {
    let s = Services::new("exec sleep 1000");
    let delegated = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let out = s.run(&["instance", "start", "--memory", "64M", "IMAGE", "n"]);
    if !delegated {
        out.fatal(&["--memory", "CAPSID_LIMITS"]);
        let out = s.run(&["exec", "--cpus", "0.5", "IMAGE", "true"]);
        out.fatal(&["--cpus"]);
        // As many processors as there are anyway: nothing to enforce.
        s.run(&["exec", "--cpus", "65536", "IMAGE", "true"]).ok();
    }
    for bad in [
        ["--memory", "much"],
        ["--cpus", "none"],
        ["--pids-limit", "x"],
        ["--apply-cgroups", "/no/such"],
    ] {
        s.run(&["exec", bad[0], bad[1], "IMAGE", "true"])
            .fatal(&[bad[0]]);
    }
    let mut command = s.command(&[
        "exec",
        "--memory",
        "100m",
        "--cpus",
        "1",
        "IMAGE",
        "sh",
        "-c",
        "ulimit -d; nproc",
    ]);
    command.env("CAPSID_LIMITS", "best-effort");
    let out = output(&mut command);
    assert_eq!(out.ok(), "102400\n1");
    assert!(out.stderr.contains("approximated"), "{out}");
    let mut command = s.command(&["exec", "--memory", "100m", "IMAGE", "sh", "-c", "ulimit -d"]);
    assert_eq!(
        output(command.env("CAPSID_LIMITS", "off")).ok(),
        "unlimited"
    );
    let mut command = s.command(&["exec", "--memory", "100m", "IMAGE", "true"]);
    output(command.env("CAPSID_LIMITS", "maybe")).fatal(&["CAPSID_LIMITS"]);
}

#[test]
fn foreground_instance_ends_with_its_script() {
    let s = Services::new("echo out; echo err >&2; echo $NOTIFY_SOCKET; exit 5");
    let socket = s.env.path("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    manager
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut command = s.command(&["instance", "start", "--foreground", "IMAGE", "n"]);
    let out = output(command.env("NOTIFY_SOCKET", &socket));
    assert_eq!(out.status, 5, "{out}");
    assert_eq!(
        out.stdout, "out\n\n",
        "the manager's socket is not the service's"
    );
    assert!(out.stderr.ends_with("err\n"), "{out}");
    let mut bytes = [0; 100];
    let len = manager.recv(&mut bytes).unwrap();
    assert!(bytes[..len].starts_with(b"READY=1\nMAINPID="));
    let s = Services::new("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done");
    let child = s
        .command(&["instance", "start", "--foreground", "IMAGE", "n"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the instance", || {
        s.names() == ["n"] && s.run(&["instance", "logs", "n"]).stdout == "up\n"
    });
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    assert_eq!(String::from_utf8_lossy(&out.stdout), "up\nbye\n");
    s.env.assert_nothing_left();
}

#[test]
fn unit_repeats_the_command_line() {
    let s = Services::new(FOREVER);
    let out = s.run(&[
        "instance",
        "unit",
        "--env",
        "A=b c%",
        "--restart",
        "always",
        "IMAGE",
        "web",
        "$x",
    ]);
    let program = env!("CARGO_BIN_EXE_capsid");
    for line in [
        format!(
            "ExecStart={program} instance start --foreground --env \"A=b c%%\" --restart always {} web $$x",
            s.image
        ),
        format!("ExecStop={program} instance stop web"),
        "Type=notify".into(),
        "WantedBy=default.target".into(),
    ] {
        assert!(out.ok().lines().any(|l| l == line), "{line}: {out}");
    }
    let out = s.run(&["instance", "unit", "--system", "IMAGE", "web"]);
    assert!(
        out.ok().contains(&format!("User={}", common::user_name())),
        "{out}"
    );
}

/// A web server of Debian's, in a SIF, that listens on `$PORT`.
fn nginx(env: &Env) -> String {
    let tree = env.tree("nginx");
    add_programs(&tree, &["/usr/sbin/nginx"]);
    for dir in ["var/log/nginx", "var/lib/nginx", "run", "srv"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    common::write(&tree.join("srv/index.html"), "hello from nginx\n");
    common::write(
        &tree.join("nginx.conf"),
        "daemon off;\nuser root;\nerror_log stderr notice;\npid /run/nginx.pid;\nevents {}\n\
         http { access_log /dev/stdout; client_body_temp_path /run/b; proxy_temp_path /run/p; fastcgi_temp_path /run/f;\n\
         uwsgi_temp_path /run/u; scgi_temp_path /run/s; server { listen PORT; root /srv; } }\n",
    );
    script(
        &tree.join(".singularity.d/startscript"),
        "#!/bin/sh\nsed \"s/PORT/${PORT:-80}/\" /nginx.conf >/run/nginx.conf\nexec nginx -c /run/nginx.conf\n",
    );
    env.sif(&tree, "nginx.sif").display().to_string()
}

fn page(port: u16) -> String {
    let url = format!("http://127.0.0.1:{port}/");
    output(Command::new("curl").args(["-s", "-S", "-m", "5", &url]))
        .ok()
        .to_owned()
}

#[test]
fn web_server_answers_the_moment_its_start_returns() {
    let env = Env::new();
    let image = nginx(&env);
    let s = Services { env, image };
    let port = free_port();
    let text = port.to_string();
    let set = format!("PORT={port}");
    s.run(&[
        "instance",
        "start",
        "--writable-tmpfs",
        "--env",
        &set,
        "--ready-port",
        &text,
        "--wait",
        "IMAGE",
        "web",
    ])
    .ok();
    assert_eq!(page(port), "hello from nginx");
    wait_until("the log", || {
        s.run(&["instance", "logs", "web"])
            .stdout
            .contains("GET / HTTP/1.1")
    });
    s.run(&["instance", "stop", "web"]).ok();
    let end = s.inspect("web");
    assert_eq!(end["script"]["status"], 0, "orderly: {end}");
    // Port 80 is not for users, and somebody who looks is told.
    s.run(&["instance", "start", "--writable-tmpfs", "IMAGE", "web"])
        .ok();
    s.run(&["instance", "wait", "web"]);
    let out = s.run(&["instance", "inspect", "web"]);
    assert!(out.ok().contains("--publish"), "{out}");
    s.run(&["instance", "stop", "web"]).ok();
    let publish = format!("{port}:80");
    for fakeroot in [&["--fakeroot"][..], &[]] {
        let words = [
            &["instance", "start"][..],
            fakeroot,
            &[
                "--net",
                "--publish",
                &publish,
                "--writable-tmpfs",
                "--ready-port",
                "80",
                "--wait",
                "IMAGE",
                "web",
            ],
        ]
        .concat();
        s.run(&words).ok();
        assert_eq!(page(port), "hello from nginx");
        let list = s.run(&["instance", "list"]);
        assert!(list.ok().contains("10.0.2.100"), "{list}");
        s.run(&["instance", "stop", "web"]).ok();
    }
    s.env.assert_nothing_left();
}

#[test]
fn program_in_the_foreground_is_reached_too() {
    let s = Services::new(FOREVER);
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:80");
    for pid in [&[][..], &["--pid"]] {
        let words = [
            &["exec", "--publish", &publish][..],
            pid,
            &["IMAGE", "httpd", "-f", "-p", "80", "-h", "/opt"],
        ]
        .concat();
        let mut child = s.command(&words).spawn().unwrap();
        let url = format!("http://127.0.0.1:{port}/hello.txt");
        let get = || output(Command::new("curl").args(["-s", "-m", "5", &url]));
        wait_until("the page", || get().stdout == "hello\n");
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("the port to be free", || {
            std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
        });
    }
    s.run(&[
        "exec",
        "--publish",
        "80",
        "--network",
        "none",
        "IMAGE",
        "true",
    ])
    .fatal(&["--publish"]);
    let taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    s.run(&["exec", "--publish", &publish, "IMAGE", "true"])
        .fatal(&["cannot connect the container's network"]);
    drop(taken);
}

#[test]
fn database_keeps_its_data_over_instances() {
    let env = Env::new();
    let tree = env.tree("redis");
    add_programs(&tree, &["/usr/bin/redis-server", "/usr/bin/redis-cli"]);
    script(
        &tree.join(".singularity.d/startscript"),
        "#!/bin/sh\nexec redis-server --port $PORT --bind 127.0.0.1 --dir /data --appendonly yes\n",
    );
    let image = env.sif(&tree, "redis.sif").display().to_string();
    let s = Services { env, image };
    fs::create_dir(s.env.work().join("data")).unwrap();
    let port = free_port().to_string();
    let set = format!("PORT={port}");
    let start = || {
        s.run(&[
            "instance",
            "start",
            "--bind",
            "data:/data",
            "--env",
            &set,
            "--ready-port",
            &port,
            "--wait",
            "IMAGE",
            "db",
        ])
        .ok()
        .len()
    };
    let cli = |words: &[&str]| {
        s.run(
            &[
                &["exec", "instance://db", "redis-cli", "-p", &port][..],
                words,
            ]
            .concat(),
        )
        .ok()
        .to_owned()
    };
    start();
    assert_eq!(cli(&["set", "k", "kept"]), "OK");
    s.run(&["instance", "stop", "db"]).ok();
    assert_eq!(s.inspect("db")["script"]["status"], 0);
    start();
    assert_eq!(cli(&["get", "k"]), "kept");
    s.run(&["instance", "stop", "db"]).ok();
}
