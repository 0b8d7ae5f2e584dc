//! What a process finds inside: identity, files, mounts, namespaces; and what options change.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;

use common::{Env, output, script, write};

#[test]
fn process_is_the_caller_with_nothing_extra() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let id = env.run(["exec", image, "id", "-u"]);
    assert_eq!(id.ok(), nix::unistd::getuid().to_string());
    assert_eq!(
        env.run(["exec", image, "id", "-un"]).ok(),
        common::user_name()
    );
    let status = env.run(["exec", image, "cat", "/proc/self/status"]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(
            status.ok().contains(&format!("{set}:\t0000000000000000")),
            "{set}: {status}"
        );
    }
    assert!(status.stdout.contains("NoNewPrivs:\t1"), "{status}");
    assert_eq!(
        env.run(["exec", image, "sh", "-c", "ls /proc/$$/fd; true"])
            .ok(),
        "0\n1\n2"
    );
}

#[test]
fn host_root_cannot_be_reached() {
    let env = Env::new();
    let image = env.image();
    let out = env.run([
        "exec",
        image.to_str().unwrap(),
        "sh",
        "-c",
        "cd /..; cd ..; ls -a; cat /proc/self/mountinfo",
    ]);
    let host_root = "/work"; // the checkout's place is as good as any
    assert!(out.ok().contains(".singularity.d"), "{out}");
    assert!(!out.stdout.contains(&format!(" {host_root} ")), "{out}");
    let roots = out
        .stdout
        .lines()
        .filter(|l| l.split(' ').nth(4) == Some("/"))
        .count();
    assert_eq!(roots, 1, "one mount on /: {out}");
}

#[test]
fn default_mounts_are_there_and_the_image_is_read_only() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let file = common::HomeFile::new();
    fs::write(env.work().join("in-cwd"), "").unwrap();
    let probe = format!(
        "cat {} && ls in-cwd && pwd && test -e /proc/self && test -d /sys/kernel && test -c /dev/null && test -d /dev/shm",
        file.0.display()
    );
    let out = env.run(["exec", image, "sh", "-c", &probe]);
    assert_eq!(out.ok(), format!("in-cwd\n{}", env.work().display()));
    let out = env.run(["exec", image, "touch", "/opt/x"]);
    assert_eq!(out.status, 1);
    assert!(out.stderr.contains("Read-only file system"), "{out}");
    for file in ["/etc/hosts", "/etc/resolv.conf", "/etc/localtime"] {
        if fs::metadata(file).is_ok() {
            assert_eq!(env.run(["exec", image, "cat", file]).status, 0, "{file}");
        }
    }
    let sys = env.run(["exec", image, "grep", " /sys ", "/proc/self/mountinfo"]);
    assert!(sys.ok().contains(" ro,"), "{sys}");
}

#[test]
fn passwd_and_group_get_the_callers_line() {
    let env = Env::new();
    let image = env.image();
    let out = env.run(["exec", image.to_str().unwrap(), "cat", "/etc/passwd"]);
    let line = out.ok().lines().last().unwrap().to_owned();
    assert!(
        line.starts_with(&format!(
            "{}:x:{}:",
            common::user_name(),
            nix::unistd::getuid()
        )),
        "{out}"
    );
    assert!(
        line.contains(&format!(":{}:", common::home().display())),
        "{out}"
    );
    let out = env.run(["exec", image.to_str().unwrap(), "id", "-gn"]);
    out.ok();
}

#[test]
fn exit_status_passes_through() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    for status in [0, 1, 42, 127, 255] {
        assert_eq!(
            env.run(["exec", image, "sh", "-c", &format!("exit {status}")])
                .status,
            status
        );
        assert_eq!(
            env.run([
                "exec",
                "--pid",
                image,
                "sh",
                "-c",
                &format!("exit {status}")
            ])
            .status,
            status
        );
    }
    for signal in [9, 15, 11, 2] {
        for options in [&["exec"][..], &["exec", "--pid"]] {
            let args = options
                .iter()
                .copied()
                .chain([image, "sh", "-c"])
                .map(str::to_owned);
            let out = env.run(args.chain([format!("kill -{signal} $$")]));
            assert_eq!(out.status, 128 + signal, "{options:?}: {out}");
        }
    }
}

#[test]
fn commands_that_cannot_run_say_why() {
    let env = Env::new();
    let tree = env.tree("tree");
    write(&tree.join("opt/data"), "x");
    script(&tree.join("opt/no-interpreter"), "#!/no/such/interpreter\n");
    script(&tree.join("opt/no-line"), "echo from a plain script $1\n");
    let image = env.sif(&tree, "image.sif");
    let image = image.to_str().unwrap();
    env.run(["exec", image, "no-such-command"])
        .fatal(&["\"no-such-command\"", "executable file not found in $PATH"]);
    env.run(["exec", image, "/no/such/path"])
        .fatal(&["/no/such/path: no such file or directory"]);
    env.run(["exec", image, "/opt/data"])
        .fatal(&["permission denied"]);
    env.run(["exec", image, "/opt"]).fatal(&["is a directory"]);
    env.run(["exec", image, "/opt/no-interpreter"]).fatal(&[
        "/opt/no-interpreter",
        "as its interpreter, is not in the container",
    ]);
    assert_eq!(
        env.run(["exec", image, "/opt/no-line", "word"]).ok(),
        "from a plain script word"
    );
}

#[test]
fn arguments_arrive_as_given() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let env = Env::new();
    let image = env.image();
    let odd: [&[u8]; 6] = [
        b"",
        b"two words",
        b"$HOME `id`",
        b"new\nline",
        b"\xff\xfe",
        b"--pid",
    ];
    let mut command = env.command(["exec", image.to_str().unwrap(), "printf", "[%s]"]);
    let out = command.args(odd.map(OsStr::from_bytes)).output().unwrap();
    assert_eq!(
        out.stdout,
        b"[][two words][$HOME `id`][new\nline][\xff\xfe][--pid]"
    );
}

#[test]
fn binds_appear_where_they_were_asked_for() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let data = env.path("data");
    write(&data.join("file"), "bound\n");
    let data = data.to_str().unwrap();
    let cat = |bind: &str, path: &str| env.run(["exec", "--bind", bind, image, "cat", path]);
    assert_eq!(cat(data, &format!("{data}/file")).ok(), "bound");
    assert_eq!(cat(&format!("{data}:/mnt"), "/mnt/file").ok(), "bound");
    assert_eq!(
        cat(
            &format!("{data}:/not/in/the/image"),
            "/not/in/the/image/file"
        )
        .ok(),
        "bound"
    );
    assert_eq!(
        cat(&format!("{data}/file:/opt/hello.txt"), "/opt/hello.txt").ok(),
        "bound"
    );
    assert_eq!(
        cat(&format!("{data}/file:/opt/new.txt"), "/opt/new.txt").ok(),
        "bound"
    );
    assert_eq!(
        cat(&format!("{data}:/a,{data}:/b"), "/b/file").ok(),
        "bound"
    );
    let mount = format!("type=bind,src={data},dst=/x y/z,ro");
    assert_eq!(
        env.run(["exec", "--mount", &mount, image, "cat", "/x y/z/file"])
            .ok(),
        "bound"
    );
    let out = env.run([
        "exec",
        "-B",
        &format!("{data}:/mnt:ro"),
        image,
        "touch",
        "/mnt/file",
    ]);
    assert!(
        out.status == 1 && out.stderr.contains("Read-only file system"),
        "{out}"
    );
    env.run([
        "exec",
        "-B",
        &format!("{data}:/mnt"),
        image,
        "touch",
        "/mnt/new",
    ])
    .ok();
    assert!(env.path("data/new").exists());
    let listing = env.run([
        "exec",
        "-B",
        &format!("{data}:/opt/added"),
        image,
        "ls",
        "/opt",
    ]);
    assert_eq!(
        listing.ok(),
        "added\nhello.txt",
        "the image's own entries stay"
    );
}

#[test]
fn bind_of_the_wrong_kind_says_so() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    env.run(["exec", "-B", "/etc/passwd:/opt", image, "true"])
        .fatal(&["/opt", "--bind", "the image has a directory there"]);
    env.run(["exec", "-B", "/etc:/opt/hello.txt", image, "true"])
        .fatal(&["/opt/hello.txt", "the image has a file there"]);
}

#[test]
fn bind_of_a_missing_source_names_source_and_option() {
    let env = Env::new();
    let image = env.image();
    env.run([
        "exec",
        "-B",
        "/no/such/dir:/mnt",
        image.to_str().unwrap(),
        "true",
    ])
    .fatal(&["/no/such/dir", "--bind", "doesn't exist"]);
    assert!(env.servers().is_empty(), "nothing was started");
}

#[test]
fn links_in_the_image_do_not_lead_binds_out_of_it() {
    let env = Env::new();
    let tree = env.tree("tree");
    std::os::unix::fs::symlink(env.path("outside"), tree.join("mnt/link")).unwrap();
    std::os::unix::fs::symlink("../../../../etc", tree.join("mnt/up")).unwrap();
    fs::create_dir(env.path("outside")).unwrap();
    write(&env.path("data/file"), "bound\n");
    let image = env.sif(&tree, "image.sif");
    let bind = format!("{}:/mnt/up/deep", env.path("data").display());
    let out = env.run([
        "exec",
        "-B",
        &bind,
        image.to_str().unwrap(),
        "cat",
        "/etc/deep/file",
    ]);
    assert_eq!(out.ok(), "bound");
    let bind = format!("{}:/mnt/link/x", env.path("data").display());
    let out = env.run([
        "exec",
        "--no-home",
        "-B",
        &bind,
        image.to_str().unwrap(),
        "true",
    ]);
    assert!(
        fs::read_dir(env.path("outside")).unwrap().next().is_none(),
        "nothing was made on the host: {out}"
    );
}

#[test]
fn contain_hides_home_and_tmp() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let secret = common::HomeFile::new();
    let home = common::home();
    let home = home.to_str().unwrap();
    let out = env.run([
        "exec",
        "--contain",
        image,
        "sh",
        "-c",
        "ls -A $HOME /tmp; touch $HOME/x /tmp/x && pwd; ls /dev | tr '\\n' ' '",
    ]);
    assert!(!out.ok().contains(&secret.name()), "{out}");
    assert!(
        !out.stdout.contains("kmsg") && out.stdout.contains("null"),
        "{out}"
    );
    assert!(!common::home().join("x").exists());
    let out = env.run(["exec", "-C", image, "sh", "-c", "echo $$; ps | wc -l"]);
    assert!(
        out.ok().lines().next().unwrap().parse::<u32>().unwrap() < 10,
        "a pid namespace: {out}"
    );
    let out = env.run(["exec", "--no-home", image, "ls", "-A", home]);
    assert!(!out.stdout.contains(&secret.name()), "{out}");
}

#[test]
fn workdir_keeps_tmp_home_and_scratch() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let work = env.path("wd");
    fs::create_dir(&work).unwrap();
    let out = env.run([
        "exec",
        "-c",
        "-W",
        work.to_str().unwrap(),
        "-S",
        "/scratch",
        image,
        "sh",
        "-c",
        "touch /tmp/t /var/tmp/v ~/h /scratch/s",
    ]);
    out.ok();
    for file in ["tmp/t", "var_tmp/v", "home/h", "scratch/scratch/s"] {
        assert!(
            work.join(file).exists(),
            "{file}: {:?}",
            common::output(Command::new("find").arg(&work)).stdout
        );
    }
}

#[test]
fn home_can_be_moved() {
    let env = Env::new();
    let image = env.image();
    let source = env.path("other");
    write(&source.join("file"), "moved\n");
    let out = env.run([
        "exec",
        "--home",
        &format!("{}:/myhome", source.display()),
        image.to_str().unwrap(),
        "sh",
        "-c",
        "cat ~/file; echo $HOME; grep -c myhome /etc/passwd",
    ]);
    assert_eq!(out.ok(), "moved\n/myhome\n1");
    env.run([
        "exec",
        "--home",
        "relative",
        image.to_str().unwrap(),
        "true",
    ])
    .fatal(&["relative", "not an absolute path"]);
}

#[test]
fn working_directory_follows_the_rules() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let pwd = |options: &[&str], dir: &str| {
        let mut command = env.command(["exec"].iter().chain(options).chain(&[image, "pwd"]));
        output(command.current_dir(dir))
    };
    assert_eq!(pwd(&[], "/opt").ok(), "/opt", "the image's own directory");
    assert_eq!(
        pwd(&[], "/usr/share").ok(),
        "/usr/share",
        "the host's, bound"
    );
    assert_eq!(pwd(&["--pwd", "/bin"], "/").ok(), "/bin");
    assert_eq!(pwd(&["--cwd", "/bin"], "/").ok(), "/bin");
    pwd(&["--pwd", "/does/not/exist"], "/").fatal(&[
        "failed to set working directory",
        "/does/not/exist",
        "no such file or directory",
    ]);
    let out = pwd(&["--no-mount", "cwd"], "/usr/share");
    assert_eq!(out.ok(), common::home().to_str().unwrap());
    assert!(out.stderr.starts_with("WARNING:"), "{out}");
}

#[test]
fn namespaces_are_new_only_when_asked_for() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let links = |options: &[&str]| {
        let probe = "for n in pid ipc net uts cgroup user mnt; do readlink /proc/self/ns/$n; done";
        let out = env.run(
            ["exec"]
                .iter()
                .chain(options)
                .chain(&[image, "sh", "-c", probe]),
        );
        out.ok().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let host: Vec<String> = ["pid", "ipc", "net", "uts", "cgroup", "user", "mnt"]
        .iter()
        .map(|n| {
            fs::read_link(format!("/proc/self/ns/{n}"))
                .unwrap()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let differing = |options: &[&str]| {
        links(options)
            .iter()
            .zip(&host)
            .filter(|(a, b)| a != b)
            .map(|(a, _)| a.split(':').next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(differing(&[]), ["user", "mnt"]);
    assert_eq!(differing(&["--pid"]), ["pid", "user", "mnt"]);
    assert_eq!(differing(&["--ipc"]), ["ipc", "user", "mnt"]);
    assert_eq!(differing(&["--uts"]), ["uts", "user", "mnt"]);
    assert_eq!(
        differing(&["--net", "--network", "none"]),
        ["net", "user", "mnt"]
    );
    assert_eq!(
        env.run(["exec", "--hostname", "box", image, "hostname"])
            .ok(),
        "box"
    );
    let net = env.run(["exec", "--net", "--network", "none", image, "ifconfig"]);
    assert!(
        net.ok().contains("lo ")
            && net.stdout.contains("UP LOOPBACK RUNNING")
            && !net.stdout.contains("eth"),
        "{net}"
    );
    let net = env.run(["exec", "--net", image, "ifconfig"]);
    assert!(net.ok().contains("10.0.2.100"), "{net}");
    env.run(["exec", "--net", "--network", "bridge", image, "true"])
        .fatal(&["--network bridge", "or use none"]);
}

#[test]
fn process_one_reaps_and_ends_with_its_child() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.run([
        "exec",
        "--pid",
        image,
        "sh",
        "-c",
        "echo $$; cat /proc/1/comm; (sleep 0.1 &) ; sleep 0.5; ps -o stat | grep -c Z",
    ]);
    assert!(out.stdout.starts_with("2\nappinit\n0"), "{out}");
    let out = env.run(["exec", "--pid", "--no-init", image, "sh", "-c", "echo $$"]);
    assert_eq!(out.ok(), "1");
    let start = std::time::Instant::now();
    env.run(["exec", "--pid", image, "sh", "-c", "sleep 100 & exit 0"])
        .ok();
    assert!(
        start.elapsed().as_secs() < 10,
        "what it leaves behind dies with the namespace"
    );
}

#[test]
fn processes_of_one_image_share_a_user_namespace() {
    let env = Env::new();
    let image = env.image();
    let probe = [
        "exec",
        image.to_str().unwrap(),
        "readlink",
        "/proc/self/ns/user",
    ];
    assert_eq!(env.run(probe).ok(), env.run(probe).ok());
}

#[test]
fn umask_is_the_callers_or_the_usual_one() {
    let env = Env::new();
    let image = env.image();
    let program = env!("CARGO_BIN_EXE_capsid");
    let run = |options: &str| {
        let line = format!(
            "umask 0027; exec {program} exec {options} {} sh -c umask",
            image.display()
        );
        output(&mut env.command_as("/bin/sh".as_ref(), ["-c", &line]))
    };
    assert_eq!(run("").ok(), "0027");
    assert_eq!(run("--no-umask").ok(), "0022");
}

#[test]
fn fakeroot_is_root_with_the_callers_subordinate_ids() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.run(["exec", "--fakeroot", image, "sh", "-c", "id -u; echo ~; touch ~/f && chown 33:33 ~/f && stat -c %u:%g ~/f; cat /proc/self/uid_map | wc -l"]);
    assert_eq!(out.ok(), "0\n/root\n33:33\n2");
    env.run([
        "exec",
        "--fakeroot",
        image,
        "sh",
        "-c",
        "chown 0:0 ~/f && rm ~/f",
    ])
    .ok();
    let out = env.run([
        "exec",
        "--fakeroot",
        "--ignore-subuid",
        image,
        "sh",
        "-c",
        "id -u; wc -l < /proc/self/uid_map",
    ]);
    assert_eq!(out.ok(), "0\n1");
    assert!(out.stderr.contains("INFO:    no subordinate ids"), "{out}");
    let out = env.run([
        "exec",
        "--fakeroot",
        image,
        "grep",
        "CapEff",
        "/proc/self/status",
    ]);
    assert!(!out.ok().ends_with("0000000000000000"), "{out}");
}

#[test]
fn shell_test_run_and_help_use_what_the_image_holds() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let run = env.run(["run", image, "a", "b c"]);
    assert_eq!(
        (run.status, run.stdout.as_str()),
        (3, "runscript args: a b c\ncount: 2\n"),
        "{run}"
    );
    assert_eq!(env.run(["test", image, "x"]).ok(), "tested x");
    assert_eq!(env.run(["run-help", image]).ok(), "This is the help.");
    assert_eq!(
        env.run(["run-help", "--app", "foo", image]).ok(),
        "Help of foo."
    );
    let mut shell = env.command(["shell", image]);
    let mut child = shell
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"echo in $0; exit 9\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(9));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "in /bin/sh\n");
}

#[test]
fn applications_have_their_own_script_and_environment() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.run(["run", "--app", "foo", image, "x"]);
    assert_eq!(
        (out.status, out.stdout.as_str()),
        (7, "foo foo x\nthe tool of foo\n"),
        "{out}"
    );
    assert_eq!(
        env.run(["exec", "--app", "foo", image, "foo-tool"]).ok(),
        "the tool of foo"
    );
    let out = env.run(["run", "--app", "nosuch", image]);
    assert_eq!(
        (out.status, out.stdout.trim_end()),
        (1, "Could not locate the container application: nosuch"),
        "{out}"
    );
}

#[test]
fn image_without_a_shell_runs_programs() {
    let env = Env::new();
    let tree = env.path("bare");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/echo")).unwrap();
    let image = env.sif(&tree, "bare.sif");
    let image = image.to_str().unwrap();
    let out = env.run(["exec", image, "echo", "a", "b"]);
    assert_eq!(out.ok(), "a b");
    assert!(
        out.stderr
            .contains("WARNING: passwd file doesn't exist in container, not updating"),
        "{out}"
    );
    env.run(["run", image]).fatal(&["/bin/sh"]);
    let out = env.run(["shell", image]);
    assert_eq!(out.status, 1);
    assert!(
        out.stderr
            .contains("ERROR:   /bin/sh does not exist in container"),
        "{out}"
    );
}

#[test]
fn sandbox_squashfs_and_executable_sif_run_alike() {
    let env = Env::new();
    let tree = env.tree("tree");
    let squashfs = env.squashfs(&tree, "plain.squashfs", &["-comp", "gzip"]);
    let sif = env.sif(&tree, "image.sif");
    for image in [&tree, &squashfs, &sif] {
        let out = env.run([
            "exec".as_ref(),
            image.as_os_str(),
            "cat".as_ref(),
            "/opt/hello.txt".as_ref(),
        ]);
        assert_eq!(out.ok(), "hello", "{}", image.display());
    }
    let bin = env.path("bin");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_capsid"), bin.join("run-singularity")).unwrap();
    let mut command = env.command_as(&sif, ["x", "y"]);
    let out = output(command.env("PATH", format!("{}:/usr/bin:/bin", bin.display())));
    assert_eq!(
        (out.status, out.stdout.lines().next()),
        (3, Some("runscript args: x y")),
        "{out}"
    );
}

#[test]
fn sandbox_is_written_only_when_asked() {
    let env = Env::new();
    let tree = env.tree("tree");
    let image = tree.to_str().unwrap();
    let out = env.run(["exec", image, "touch", "/opt/x"]);
    assert!(
        out.status == 1 && out.stderr.contains("Read-only file system"),
        "{out}"
    );
    env.run(["exec", "--writable", image, "touch", "/opt/x"])
        .ok();
    assert!(tree.join("opt/x").exists());
    let before = fs::read_dir(&tree).unwrap().count();
    env.run(["exec", "-B", "/etc:/new/place", image, "true"])
        .ok();
    assert_eq!(
        fs::read_dir(&tree).unwrap().count(),
        before,
        "a bind changes nothing in the sandbox"
    );
}

#[test]
fn names_of_the_peers_make_a_drop_in() {
    let env = Env::new();
    let image = env.image();
    for name in ["apptainer", "singularity"] {
        let link = env.path(name);
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_capsid"), &link).unwrap();
        let version = output(&mut env.command_as(&link, ["--version"]));
        assert!(
            version.ok().starts_with("apptainer version 1.5."),
            "{version}"
        );
        let out = output(&mut env.command_as(
            &link,
            [
                "exec".as_ref(),
                image.as_os_str(),
                "cat".as_ref(),
                "/opt/hello.txt".as_ref(),
            ],
        ));
        assert_eq!(out.ok(), "hello");
    }
}

#[test]
fn options_come_from_the_environment_too() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    write(&env.path("data/file"), "bound\n");
    for prefix in ["APPTAINER", "SINGULARITY"] {
        let mut command = env.command(["exec", image, "cat", "/mnt/file"]);
        let out = output(command.env(
            format!("{prefix}_BIND"),
            format!("{}:/mnt", env.path("data").display()),
        ));
        assert_eq!(out.ok(), "bound", "{prefix}");
    }
    let mut command = env.command(["exec", image, "true"]);
    output(command.env("APPTAINER_CONTAIN", "bogus")).fatal(&["contain", "bogus", "not a boolean"]);
}

#[test]
fn what_is_not_supported_is_an_error_never_ignored() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    for options in [
        &["--security", "uid:0"][..],
        &["--allow-setuid"],
        &["--fusemount", "x"],
        &["--oom-kill-disable"],
    ] {
        let out = env.run(["exec"].iter().chain(options).chain(&[image, "true"]));
        out.fatal(&[options[0], "not supported"]);
    }
}

#[test]
fn explain_prints_the_plan_and_runs_nothing() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let out = env.run([
        "--explain",
        "exec",
        "-B",
        "/usr:/mnt:ro",
        image,
        "touch",
        "x",
    ]);
    assert!(
        out.ok().contains("bind /usr -> /mnt  ro  (--bind)"),
        "{out}"
    );
    assert!(!env.work().join("x").exists() && env.servers().is_empty());
    let out = env.run(["--explain=json", "exec", image, "true"]);
    let plan: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
    assert!(
        plan["mounts"].as_array().is_some_and(|m| m.len() > 5),
        "{out}"
    );
}

#[test]
fn host_root_can_be_bound() {
    let env = Env::new();
    let image = env.image();
    let link = env.path("link");
    std::os::unix::fs::symlink("/tmp/..", &link).unwrap();
    common::write(&env.path("work/note"), "of the host\n");
    let note = env.path("work/note");
    for (option, source) in [("-B", "/"), ("-B", link.to_str().unwrap()), ("--home", "/")] {
        let out = env.run([
            "exec",
            "--contain",
            option,
            &format!("{source}:/host"),
            "-B",
            "/:/again",
            image.to_str().unwrap(),
            "cat",
            &format!("/host{}", note.display()),
            &format!("/again{}", note.display()),
        ]);
        assert_eq!(out.ok(), "of the host\nof the host", "{option} {source}");
    }
}

#[test]
fn directories_of_the_caller_do_not_come_along_without_proc() {
    let env = Env::new();
    let image = env.image();
    let tree = env.path("tree");
    fs::remove_dir(tree.join("proc")).unwrap();
    std::os::unix::fs::symlink("/opt", tree.join("proc")).unwrap();
    let linked = env.sif(&tree, "linked.sif");
    let program = env!("CARGO_BIN_EXE_capsid");
    for (image, options) in [
        (&image, "--no-mount proc"),
        (&image, "-C --no-mount proc"),
        (&linked, ""),
        (&linked, "-C"),
    ] {
        let line = format!(
            "exec 7</; exec 8</etc/passwd; exec {program} exec {options} {} sh -c \
             '(: <&7) && echo 7; (: <&8) && echo 8'",
            image.display()
        );
        let out = output(&mut env.command_as(std::path::Path::new("sh"), ["-c", &line]));
        let files = if options.contains("-C") { "" } else { "8\n" };
        assert_eq!(out.stdout, files, "{options}: {out}");
    }
}

#[test]
fn caller_may_ignore_the_death_of_children() {
    let env = Env::new();
    let image = env.image();
    let program = env!("CARGO_BIN_EXE_capsid");
    for options in ["", "--pid", "--compat", "--fakeroot", "--pid --no-init"] {
        let words = ["20", "env", "--ignore-signal=CHLD", program, "exec"];
        let words = words.into_iter().chain(options.split_whitespace()).chain([
            image.to_str().unwrap(),
            "grep",
            "SigIgn",
            "/proc/self/status",
        ]);
        let out = output(&mut env.command_as(std::path::Path::new("timeout"), words));
        assert_eq!(out.status, 0, "{options}: {out}");
        let bit = out.stdout.trim().chars().rev().nth(4);
        assert_eq!(bit, Some('1'), "as the caller had it: {options}: {out}");
    }
}

#[test]
fn root_of_a_namespace_needs_no_further_one() {
    let env = Env::new();
    let image = env.image();
    let tree = env.path("tree");
    let inside = |setting: &str, words: &str| {
        let line = format!(
            "echo 0 >/proc/sys/user/{setting}; exec {} exec {words}",
            env!("CARGO_BIN_EXE_capsid")
        );
        let words = ["-Ur", "sh", "-c", &line];
        output(&mut env.command_as(std::path::Path::new("unshare"), words))
    };
    for image in [&image, &tree] {
        for options in ["", "--writable-tmpfs", "--pid", "--fakeroot"] {
            let words = format!("{options} {} cat /opt/hello.txt", image.display());
            assert_eq!(inside("max_user_namespaces", &words).ok(), "hello");
        }
        let words = format!("{} true", image.display());
        inside("max_mnt_namespaces", &words).fatal(&["user.max_mnt_namespaces"]);
    }
    env.assert_nothing_left();
}

#[test]
fn containall_hides_what_the_machine_tells_of_itself() {
    let env = Env::new();
    let image = env.image();
    let look = "cat /proc/keys; ls -A /sys/firmware; ls -A /proc/acpi /proc/scsi 2>/dev/null | grep -v :; true";
    let out = env.run([
        "exec",
        "--containall",
        image.to_str().unwrap(),
        "sh",
        "-c",
        look,
    ]);
    assert_eq!(out.ok().trim(), "");
    let plain = env.run([
        "exec",
        "--contain",
        "--pid",
        image.to_str().unwrap(),
        "sh",
        "-c",
        look,
    ]);
    assert!(
        !plain.ok().trim().is_empty(),
        "the test sees nothing to hide"
    );
}
