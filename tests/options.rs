//! Options: one that is taken has its effect, one that cannot be met is an error that names it.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Env, Output, output, script, write};

fn peer(env: &Env) -> PathBuf {
    let peer = env.path("apptainer");
    if !peer.exists() {
        symlink(env!("CARGO_BIN_EXE_capsid"), &peer).unwrap();
    }
    peer
}

#[test]
fn keys_for_encrypted_images_harm_no_other_and_are_told_nobody() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let key = env.path("key.pem");
    write(&key, "s3cret");
    let variables = [
        ("ENCRYPTION_PASSPHRASE", "s3cret"),
        ("ENCRYPTION_PASSPHRASE", "1"),
        ("ENCRYPTION_PEM_PATH", key.to_str().unwrap()),
        ("ENCRYPTION_PEM_DATA", "s3cret"),
    ];
    for (variable, value) in variables {
        for prefix in ["APPTAINER", "SINGULARITY"] {
            let name = format!("{prefix}_{variable}");
            let run = |words: &[&str]| output(env.command(words).env(&name, value));
            assert_eq!(run(&["exec", image, "echo", "x"]).ok(), "x", "{name}");
            assert_eq!(run(&["run", image]).status, 3, "{name}");
            run(&["test", image]).ok();
            run(&["-d", "exec", image, "true"]).ok();
            let sandbox = env.path("box");
            run(&["build", "-F", "--sandbox", sandbox.to_str().unwrap(), image]).ok();
        }
    }
    // No message has the value of a variable whose name says that it is secret.
    for name in ["APPTAINERENV_TOKEN", "GITHUB_TOKEN", "DB_PASSWORD"] {
        for words in [
            &["--explain", "exec", image, "true"][..],
            &["--explain=json", "exec", image, "true"],
            &["-d", "exec", image, "true"],
            &[
                "exec",
                "--env",
                "DB_PASSWORD=s3cret,WRONG,A=b",
                image,
                "true",
            ],
        ] {
            let mut command = env.command(words);
            let out = output(
                command
                    .env(name, "s3cret")
                    .env("SINGULARITYENV_TOKEN", "s3cr3t"),
            );
            let said = format!("{}{}", out.stdout, out.stderr);
            assert!(
                !said.contains("s3cret") && !said.contains("s3cr3t"),
                "{words:?}: {out}"
            );
        }
    }
}

#[test]
fn explain_does_nothing() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let usage = |words: &[&str]| {
        let out = env.run(words);
        assert!(
            out.status == 1 && out.stderr.contains("--explain"),
            "{words:?}: {out}"
        );
    };
    for words in [
        &["instance", "stop", "-a"][..],
        &["instance", "list"],
        &["build", "new.sif", image],
        &["pull", "docker://localhost:1/x"],
        &["push", image, "oras://localhost:1/x"],
        &["cache", "clean", "--force"],
        &["sif", "del", "1", image],
        &["overlay", "create", "--size", "64", "new.img"],
        &["registry", "logout", "docker://localhost"],
        &["inspect", image],
        &["doctor"],
        &["demo"],
    ] {
        for explain in ["--explain", "--explain=json"] {
            usage(&[&[explain], words].concat());
        }
    }
    let before = fs::read(image).unwrap();
    assert_eq!(fs::read_dir(env.work()).unwrap().count(), 0);
    assert_eq!(fs::read(image).unwrap(), before);
    for image in [
        "docker://localhost:1/x",
        "oras://localhost:1/x",
        "oci-archive:x.tar",
    ] {
        env.run(["--explain", "exec", image, "true"])
            .fatal(&["--explain", image, "capsid pull"]);
        env.run(["--explain", "instance", "start", image, "i"])
            .fatal(&["--explain", image]);
    }
    // Behind the command too, and nothing that is settled around the container is left out.
    let options = [
        "--memory",
        "1G",
        "--cpus",
        "1.5",
        "--publish",
        "8080:80",
        "--pids-limit",
        "9",
    ];
    let words = [&["exec", "--explain"], &options[..], &[image, "touch", "x"]].concat();
    let out = env.run(&words);
    for line in [
        "limit    memory of 1073741824 bytes",
        "limit    time of 1.500 processors",
        "limit    processes 9",
        "network  connected by pasta or slirp4netns; ports of the host: 8080:80",
        "process  exec \"touch\" \"x\"",
    ] {
        assert!(out.ok().contains(line), "{line}: {out}");
    }
    let words = [&["exec", "--explain=json"], &options[..], &[image, "true"]].concat();
    let plan: serde_json::Value = serde_json::from_str(env.run(&words).ok()).unwrap();
    assert_eq!(plan["limits"]["memory"], 1 << 30);
    assert_eq!(plan["connection"][0], "8080:80");
    let out = env.run(["instance", "start", "--explain", image, "i"]);
    assert!(out.ok().contains("process  start"), "{out}");
    assert_eq!(
        env.run(["instance", "list", "--json"])
            .ok()
            .matches("pid")
            .count(),
        0
    );
    assert_eq!(env.servers(), [0; 0]);
    assert_eq!(fs::read_dir(env.work()).unwrap().count(), 0);
}

#[test]
fn capabilities_are_those_that_were_asked_for() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let effective = |options: &[&str], init: &[&str]| {
        let words = ["exec"].iter().chain(options).chain(init).copied();
        let out = env.run(words.chain([image, "grep", "^CapEff", "/proc/self/status"]));
        u64::from_str_radix(out.ok().split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    for init in [&[][..], &["--pid"], &["--pid", "--no-init"]] {
        assert_eq!(effective(&[], init), 0);
        assert_eq!(
            effective(&["--add-caps", "CAP_NET_RAW,kill"], init),
            1 << 13 | 1 << 5
        );
        let both = ["--add-caps", "net_raw,kill", "--drop-caps", "CAP_KILL"];
        assert_eq!(effective(&both, init), 1 << 13);
        assert_eq!(effective(&["-f", "--drop-caps", "all"], init), 0);
        assert_eq!(effective(&["-f", "--no-privs"], init), 0);
        let all = effective(&["-f"], init);
        assert_ne!(all, 0);
        assert_eq!(
            effective(&["-f", "--drop-caps", "net_raw"], init),
            all & !(1 << 13)
        );
        assert_eq!(effective(&["-f", "--keep-privs"], init), all);
    }
    // A program of the program has no more.
    let nested = "grep ^CapEff /proc/self/status; unshare -U true 2>/dev/null; true";
    let out = env.run([
        "exec",
        "-f",
        "--drop-caps",
        "all",
        image,
        "sh",
        "-c",
        nested,
    ]);
    assert!(out.ok().contains("0000000000000000"), "{out}");
    for (options, words) in [
        (
            &["--add-caps", "CAP_BOGUS"][..],
            ["--add-caps", "CAP_BOGUS"],
        ),
        (&["--drop-caps", "net-raw"], ["--drop-caps", "net-raw"]),
        (&["--keep-privs"], ["--keep-privs", "--fakeroot"]),
        (
            &["-f", "--keep-privs", "--no-privs"],
            ["--keep-privs", "contradict"],
        ),
        (
            &["--security", "seccomp:/x"],
            ["--security seccomp", "profile"],
        ),
        (&["--security", "uid:5"], ["--security uid", "--fakeroot"]),
        (
            &["--security", "apparmor:x"],
            ["--security apparmor", "labels"],
        ),
        (&["--allow-setuid"], ["--allow-setuid", "no_new_privs"]),
    ] {
        let all = [&["exec"], options, &[image, "true"]].concat();
        env.run(all).fatal(&words);
    }
}

#[test]
fn network_of_the_container_is_the_one_that_was_named() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let interfaces = |options: &[&str]| -> Output {
        let words = ["exec"].iter().chain(options).copied();
        env.run(words.chain([image, "sh", "-c", "tail -n +3 /proc/net/dev | wc -l"]))
    };
    assert_eq!(interfaces(&["--network", "none"]).ok(), "1");
    assert_eq!(interfaces(&["--network=none", "--net"]).ok(), "1");
    let mut command = env.command([
        "exec",
        image,
        "sh",
        "-c",
        "tail -n +3 /proc/net/dev | wc -l",
    ]);
    assert_eq!(output(command.env("APPTAINER_NETWORK", "none")).ok(), "1");
    for options in [
        &["-f", "--net", "--network", "fakeroot"][..],
        &["--network", "fakeroot"],
    ] {
        let out = interfaces(options);
        assert_eq!(out.ok(), "1");
        assert!(out.stderr.contains("WARNING: --network fakeroot"), "{out}");
    }
    for name in ["foo", "bridge", "ptp", "none,none", "None"] {
        for net in [&[][..], &["--net"]] {
            let options = [net, &["--network", name]].concat();
            interfaces(&options).fatal(&["--network", name]);
        }
    }
    interfaces(&["--network", "none", "--publish", "80"]).fatal(&["--publish"]);
}

#[test]
fn image_is_unpacked_for_one_run() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let scratch = env.path("scratch");
    fs::create_dir(&scratch).unwrap();
    let left = || fs::read_dir(&scratch).unwrap().count();
    for option in ["--unsquash", "--tmp-sandbox"] {
        let run = |words: &[&str]| output(env.command(words).env("TMPDIR", &scratch));
        assert_eq!(
            run(&["exec", option, image, "cat", "/opt/hello.txt"]).ok(),
            "hello"
        );
        assert_eq!(run(&["run", option, image]).status, 3);
        assert_eq!(
            run(&["exec", option, "-p", image, "sh", "-c", "exit 9"]).status,
            9
        );
        assert_eq!(
            run(&["exec", option, image, "sh", "-c", "kill -9 $$"]).status,
            137
        );
        assert_eq!(run(&["exec", option, "-f", image, "id", "-u"]).ok(), "0");
        run(&["exec", option, image, "touch", "/opt/x"]);
        run(&["exec", option, image, "/no/such"]).fatal(&["/no/such"]);
        assert_eq!(left(), 0, "nothing is left");
    }
    assert_eq!(env.servers(), [0; 0], "no image server was started");
    let mut command = env.command([
        "exec",
        "--unsquash",
        image,
        "sh",
        "-c",
        "echo up; exec sleep 1000",
    ]);
    command
        .env("TMPDIR", &scratch)
        .stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut up = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(left(), 0, "nothing is left");
    env.run(["exec", "--unsquash", "--no-tmp-sandbox", image, "true"])
        .fatal(&["--unsquash"]);
    env.run(["instance", "start", "--unsquash", image, "i"])
        .fatal(&["--unsquash"]);
}

#[test]
fn run_ends_when_its_time_is_over() {
    let env = Env::new();
    let tree = env.tree("tree");
    let text = "#!/bin/sh\necho begun\nsleep 1000 &\nsleep 1000\n";
    script(&tree.join(".singularity.d/runscript"), text);
    let image = env.sif(&tree, "image.sif");
    let image = image.to_str().unwrap();
    let start = Instant::now();
    // All of it ends: else a process that holds our output would keep us here.
    let out = env.run(["run", "--runscript-timeout", "500ms", image]);
    out.fatal(&["--runscript-timeout", "500ms"]);
    assert!(out.stdout.contains("begun"), "{out}");
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(500) && took < Duration::from_secs(500),
        "{took:?}"
    );
    let other = Env::new();
    let image_of_other = other.image();
    let quick = [
        "run",
        "--runscript-timeout=1h",
        image_of_other.to_str().unwrap(),
    ];
    let quick = other.run(quick);
    assert_eq!(quick.status, 3, "{quick}");
    for words in [
        &["run", "--runscript-timeout", "soon", image][..],
        &["run", "--runscript-timeout", "1s", "--no-pid", image],
        &["exec", "--runscript-timeout", "1s", image, "true"],
        &["instance", "run", "--runscript-timeout", "1s", image, "i"],
    ] {
        env.run(words).fatal(&["--runscript-timeout"]);
    }
}

#[test]
fn what_the_caller_prefers_is_no_condition() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    // A shell that only the caller has.
    for (options, variable) in [
        (&["-s", "/bin/zsh"][..], None),
        (&[], Some(("APPTAINER_SHELL", "/bin/zsh"))),
        (&[], Some(("SINGULARITY_SHELL", "/usr/bin/fish"))),
    ] {
        let mut command = env.command(["shell"].iter().chain(options).chain(&[image]));
        command.envs(variable);
        let input = env.path("input");
        write(&input, "echo in $0\n");
        let out = output(command.stdin(fs::File::open(&input).unwrap()));
        assert_eq!(out.ok(), "in /bin/sh");
        assert!(
            out.stderr.contains("WARNING: /") && out.stderr.contains("using /bin/sh"),
            "{out}"
        );
    }
    // A squashfs cannot be written, and is read without `:ro`.
    let tree = env.path("layer");
    write(&tree.join("opt/layer.txt"), "of the layer\n");
    let layer = env.squashfs(&tree, "layer.sqfs", &[]);
    for suffix in ["", ":rw", ":ro"] {
        let overlay = format!("{}{suffix}", layer.display());
        let out = env.run([
            "exec",
            "--overlay",
            &overlay,
            image,
            "cat",
            "/opt/layer.txt",
        ]);
        assert_eq!(out.ok(), "of the layer");
        assert_eq!(out.stderr.contains("WARNING: "), suffix != ":ro", "{out}");
    }
    // An application without tests has not passed them.
    let out = env.run(["test", "--app", "foo", image]);
    assert!(
        out.status == 1
            && out
                .stderr
                .contains("ERROR:   No tests for the application foo"),
        "{out}"
    );
}

#[test]
fn options_of_peers_are_taken_or_refused_by_name() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let peer = peer(&env);
    let run = |option: &[&str]| {
        let words = [&["exec"], option, &[image, "true"]].concat();
        output(&mut env.command_as(&peer, words))
    };
    for taken in [
        "--no-tmp-sandbox",
        "--sif-fuse",
        "--no-compat",
        "--no-setgroups",
        "--no-oci",
    ] {
        run(&[taken]).ok();
    }
    for refused in [
        &["--cdi-dirs", "x"][..],
        &["--compat32"],
        &["--data", "x"],
        &["--keep-layers"],
        &["--proot", "/x"],
        &["--passphrase"],
        &["--pem-path", "x"],
    ] {
        run(refused).fatal(&[refused[0], "not supported"]);
    }
    env.run(["--build-config", "exec", image, "true"])
        .fatal(&["--build-config", "not supported"]);
    let create = |tmpdir: &str| {
        let words = [
            "overlay", "create", "--size", "64", "--sparse", "--tmpdir", tmpdir, "o.img",
        ];
        env.run(words)
    };
    create("/no/such").fatal(&["/no/such"]);
    create(env.work().to_str().unwrap()).ok();
    let out = run(&["--fakerot"]);
    assert!(
        out.status == 1 && out.stderr.contains("did you mean --fakeroot"),
        "{out}"
    );
}
