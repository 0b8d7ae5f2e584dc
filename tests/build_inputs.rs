//! What a build takes in: files, values, the caller's environment; and that a work whose process died is none.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use common::build::Site;
use common::*;

/// The same command behind words of a shell.
fn behind(inner: &Command, words: &str) -> Command {
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("{words}; exec \"$@\""), "bash"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env_clear()
        .envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
    command.current_dir(inner.get_current_dir().unwrap());
    command
}

#[test]
fn lines_of_files_mean_what_a_shell_means() {
    let s = Site::new();
    fs::create_dir_all(s.env.work().join("src/sub")).unwrap();
    for (name, text) in [
        ("src/a.txt", "a"),
        ("src/b.txt", "b"),
        ("src/.hidden", "h"),
        ("src/sub/in", "in"),
    ] {
        s.write(name, text);
    }
    let own = s.env.path("own");
    fs::create_dir(&own).unwrap();
    write(&own.join("1.txt"), "1");
    write(&own.join("2.txt"), "2");
    let own = own.display();
    s.write(
        "x.def",
        &format!(
            "Bootstrap: localimage\nFrom: base.sif\nStage: one\n%post\n mkdir -p /opt/p /opt/r /opt/t\n echo -n p > /opt/p/f; echo -n r > /opt/r/f; ln -s p /opt/lk\n\
             Bootstrap: localimage\nFrom: base.sif\nStage: two\n%setup\n cd $APPTAINER_ROOTFS/opt; ln -s tgt lf; echo old > tgt; ln -s /opt/new ld\n\
             %files from one\n /opt/*/f\n /opt/{{p,r}} /st/\n /opt/[pr]/f /one\n\
             %files\n src/a.txt\n ./src/b.txt\n {own}/?.txt\n src/*/in /opt/star/\n src/{{a,b}}.txt /opt/br/\n src/* /all\n src/*/ /dirs/\n \
             src/a.txt /opt/lf\n src/b.txt /opt/ld\n src/sub/. /inside\n"
        ),
    );
    let out = output(&mut s.command(&["--sandbox", "box", "x.def"]));
    assert_eq!(out.status, 0, "{out}");
    let root = s.env.work().join("box");
    let table = [
        ("src/a.txt", "a"),
        ("src/b.txt", "b"),
        (&format!("{own}/1.txt")[1..], "1"),
        (&format!("{own}/2.txt")[1..], "2"),
        ("opt/star/in", "in"),
        ("opt/br/a.txt", "a"),
        ("opt/br/b.txt", "b"),
        ("all/a.txt", "a"),
        ("all/sub/in", "in"),
        ("dirs/sub/in", "in"),
        ("inside/in", "in"),
        ("opt/p/f", "p"),
        ("opt/r/f", "r"),
        ("opt/lk/f", "p"),
        ("st/p/f", "p"),
        ("st/r/f", "r"),
        ("one/f", "r"),
        ("opt/tgt", "a"),
        ("opt/new", "b"),
    ];
    for (path, text) in table {
        let found = fs::read_to_string(root.join(path));
        assert_eq!(found.ok().as_deref(), Some(text), "{path} {out}");
    }
    assert!(!root.join("all/.hidden").exists());
    for (link, target) in [("opt/lf", "tgt"), ("opt/ld", "/opt/new")] {
        assert_eq!(fs::read_link(root.join(link)).unwrap(), Path::new(target));
    }
}

#[test]
fn links_of_the_image_that_circle_are_one_line() {
    let s = Site::new();
    s.write("a", "a");
    let body = "%setup\n ln -s r $APPTAINER_ROOTFS/l; ln -s l $APPTAINER_ROOTFS/r\n%files\n a /l\n";
    let out = s.build(body, &[]);
    assert_eq!(out.status, 255, "{out}");
    assert!(
        out.stderr
            .contains("/l in the image: symbolic links lead in a circle"),
        "{out}"
    );
}

#[test]
fn step_is_kept_for_what_post_sees() {
    let s = Site::new();
    let body = "%post\n echo \"v=$VERSION p=$http_proxy\" > /v; cat /proc/sys/kernel/random/uuid > /uuid\n";
    s.define(body);
    let made = |env: &[(&str, &str)], words: &[&str]| {
        let words = [words, &["-F", "x.sif", "x.def"]].concat();
        let out = output(s.command(&words).envs(env.iter().copied()));
        assert_eq!(out.status, 0, "{out}");
        let read = |file| s.exec(&["cat", file]).ok().to_owned();
        (read("/v"), read("/uuid"))
    };
    let plain = made(&[], &[]);
    assert_eq!(made(&[("UNSEEN", "x")], &[]), plain, "it is kept");
    assert_eq!(made(&[], &["--notest"]), plain, "%post is the same");
    let table: &[(&str, &str, &str)] = &[
        ("APPTAINERENV_VERSION", "1", "v=1 p="),
        ("APPTAINERENV_VERSION", "2", "v=2 p="),
        ("SINGULARITYENV_VERSION", "3", "v=3 p="),
        ("http_proxy", "http://[::1]:9", "v= p=http://[::1]:9"),
    ];
    for (name, value, wanted) in table {
        let first = made(&[(name, value)], &[]);
        assert_eq!(first.0, *wanted);
        assert_eq!(made(&[(name, value)], &[]), first, "{name} is kept");
    }
    assert_eq!(made(&[], &[]), plain);
}

#[test]
fn post_reaches_the_network_whatever_links_the_image_has() {
    let s = Site::new();
    let host = fs::read_to_string("/etc/resolv.conf").unwrap();
    let root = "$APPTAINER_ROOTFS";
    let link =
        |to: &str| format!("rm -f {root}/etc/resolv.conf; ln -s {to} {root}/etc/resolv.conf");
    let table = [
        link("/run/systemd/resolve/stub-resolv.conf"),
        link("../run/resolvconf/resolv.conf"),
        format!("{}; ln -s b/c {root}/etc/a", link("a")),
        format!("{}; ln -s nowhere {root}/run", link("/run/x")),
        format!(
            "mv {root}/etc {root}/usr/etc; ln -s usr/etc {root}/etc; {}",
            link("../run/x")
        ),
        format!("rm -f {root}/etc/resolv.conf {root}/etc/hosts; ln -s /no/hosts {root}/etc/hosts"),
    ];
    for setup in table {
        s.define(&format!(
            "%setup\n {setup}\n%post\n cat /etc/resolv.conf > /seen; test -s /etc/hosts\n"
        ));
        let out = output(&mut s.command(&["-F", "--sandbox", "box", "x.def"]));
        assert_eq!(out.status, 0, "{setup}: {out}");
        let root = s.env.work().join("box");
        let seen = fs::read_to_string(root.join("seen")).unwrap();
        assert_eq!(seen, host, "{setup}");
        // What stood in for it is gone.
        for left in [
            "run/systemd",
            "run/resolvconf",
            "run/x",
            "etc/b",
            "nowhere",
            "no",
        ] {
            assert!(
                root.join(left).symlink_metadata().is_err(),
                "{setup}: {left}"
            );
        }
    }
}

#[test]
fn sections_have_none_of_the_callers_input() {
    let s = Site::new();
    let read = "if read line; then echo \"got $line\"; exit 1; fi";
    s.define(&format!(
        "%pre\n {read}\n%setup\n {read}\n%post\n {read}\n [ $(ls /proc/self/fd | wc -l) = 4 ]\n%test\n {read}\n"
    ));
    // Inherited by what is started.
    let _open = rustix::io::dup(fs::File::open("/dev/null").unwrap()).unwrap();
    for words in [&["-F"][..], &["-F", "--ignore-subuid"]] {
        let words = [words, &["x.sif", "x.def"]].concat();
        let (input, mut write) = std::io::pipe().unwrap();
        write.write_all(b"a\nb\n").unwrap();
        drop(write);
        let out = output(s.command(&words).stdin(input.try_clone().unwrap()));
        assert_eq!(out.status, 0, "{out}");
        let mut left = String::new();
        (&input).read_to_string(&mut left).unwrap();
        assert_eq!(left, "a\nb\n", "a loop of the shell goes on");
    }
}

#[test]
fn value_of_an_argument_opens_no_section() {
    let s = Site::new();
    s.define("%labels\n A {{ V }}\n%post\n echo '{{ V }}' > /v\n");
    let value = "V=1\n%setup\n touch x\n%pre\n touch y";
    let out = output(&mut s.command(&["--build-arg", value, "x.sif", "x.def"]));
    assert_eq!(out.status, 0, "{out}");
    assert!(!s.has("x") && !s.has("y"));
    assert_eq!(s.exec(&["cat", "/v"]).ok(), &value[2..]);
}

#[test]
fn image_gets_the_callers_mask() {
    let s = Site::new();
    s.define("%post\n touch /made\n");
    for (mask, mode) in [("077", 0o700), ("027", 0o750), ("022", 0o755)] {
        for source in ["base.sif", "x.def"] {
            let inner = s.command(&["-F", "x.sif", source]);
            let out = output(&mut behind(&inner, &format!("umask {mask}")));
            assert_eq!(out.status, 0, "{out}");
            let made = fs::metadata(s.env.work().join("x.sif")).unwrap();
            assert_eq!(made.permissions().mode() & 0o777, mode, "{source} {mask}");
        }
    }
    assert!(
        s.exec(&["ls", "-l", "/made"])
            .ok()
            .starts_with("-rw-r--r--")
    );
}

#[test]
fn definition_is_not_replaced_by_an_image() {
    let s = Site::new();
    s.define("%post\n true\n");
    let text = fs::read(s.env.work().join("x.def")).unwrap();
    s.write("noname", "# mine\n bootstrap: scratch\n");
    s.write("json", "{\"header\": {\"bootstrap\": \"scratch\"}}");
    symlink("x.def", s.env.work().join("link")).unwrap();
    for target in ["x.def", "noname", "json", "link"] {
        for words in [&["-F"][..], &["-F", "--sandbox"]] {
            let words = [words, &[target, "base.sif"]].concat();
            output(&mut s.command(&words)).fatal(&[target, "it is a definition"]);
        }
    }
    assert_eq!(fs::read(s.env.work().join("x.def")).unwrap(), text);
    s.write("empty", "");
    assert_eq!(
        output(&mut s.command(&["-F", "empty", "base.sif"])).status,
        0
    );
}

#[test]
fn tails_of_files_can_be_blocks_of_their_own() {
    let s = Site::new();
    let out = output(&mut s.command(&["--mksquashfs-args", "-no-fragments", "x.sif", "base.sif"]));
    assert_eq!(out.status, 0, "{out}");
    let text = fs::read_to_string(s.env.path("tree").join("opt/hello.txt")).unwrap();
    assert_eq!(s.exec(&["cat", "/opt/hello.txt"]).ok(), text.trim_end());
    let list = s.env.run(["sif", "list", "x.sif"]);
    let line = list.ok().lines().find(|l| l.contains("Squashfs")).unwrap();
    let offset = line.split('|').nth(3).unwrap().split('-').next().unwrap();
    let listed = output(
        Command::new("unsquashfs")
            .args(["-s", "-o", offset.trim()])
            .arg(s.env.work().join("x.sif")),
    );
    assert!(listed.ok().contains("Number of fragments 0"), "{listed}");
}

#[test]
fn limits_of_files_are_an_error_at_each_phase() {
    let s = Site::new();
    let old = "the old image\n";
    // In blocks of 1 KiB: below what is unpacked, copied, kept, packed.
    for limit in [1, 290, 900] {
        for (target, words) in [
            ("x.sif", &["base.sif"][..]),
            ("x.sif", &["x.def"]),
            ("box", &["--sandbox", "base.sif"]),
        ] {
            s.define("%post\n dd if=/dev/urandom of=/big bs=1k count=1k\n");
            s.write("x.sif", old);
            let (options, source) = words.split_at(words.len() - 1);
            let words = [options, &["-F", target], source].concat();
            let out = output(&mut behind(
                &s.command(&words),
                &format!("ulimit -f {limit}"),
            ));
            assert_ne!(out.status, 0, "{limit} {words:?} {out}");
            assert_eq!(out.stderr.matches("FATAL:").count(), 1, "{out}");
            assert!(!s.has("box"), "{limit} {words:?}");
            assert_eq!(fs::read_to_string(s.env.work().join("x.sif")).unwrap(), old);
            s.assert_nothing_left();
        }
    }
}

/// The processes below one, with their depth below it.
fn below(top: u32) -> Vec<(usize, u32)> {
    let mut found = vec![(0, top)];
    let mut at = 0;
    while let Some((depth, pid)) = found.get(at).copied() {
        at += 1;
        let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        for child in list.unwrap_or_default().split_ascii_whitespace() {
            found.push((depth + 1, child.parse().unwrap()));
        }
    }
    found
}

#[test]
fn child_that_is_killed_has_unpacked_nothing() {
    let s = Site::new();
    let old = "the old image\n";
    s.write("x.sif", old);
    // A device that cannot be made: of that the child tells at its end, and has to wait until it is heard.
    let tree = s.env.path("tree");
    s.env
        .squashfs(&tree, "dev.squashfs", &["-p", "opt/null c 666 0 0 1 3"]);
    let source = s.env.path("dev.squashfs");
    let (hear, tell) = std::io::pipe().unwrap();
    let mut pipe = File::from(std::os::fd::OwnedFd::from(tell));
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&pipe, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    while pipe.write(b"full\n").is_ok() {}
    nix::fcntl::fcntl(
        &pipe,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
    )
    .unwrap();
    let mut command = s.command(&["-F", "x.sif", source.to_str().unwrap()]);
    command.env("APPTAINER_MESSAGELEVEL", "-2");
    let mut build = command.stderr(pipe).spawn().unwrap();
    drop(command);
    // The build, its keeper, the worker, and the child that unpacks.
    wait_until("the unpacking", || {
        let rooms = fs::read_dir(s.env.path("tmp")).unwrap().flatten();
        rooms
            .map(|room| room.path().join("rootfs0/opt/hello.txt"))
            .any(|path| path.exists())
    });
    let child = below(build.id()).into_iter().find(|(depth, _)| *depth == 3);
    let pid = child.unwrap().1.to_string();
    output(Command::new("kill").args(["-KILL", &pid])).ok();
    let mut said = String::new();
    { hear }.read_to_string(&mut said).unwrap();
    assert_eq!(build.wait().unwrap().code(), Some(255), "{said}");
    let said = said.replace("full\n", "");
    assert!(
        said.contains("FATAL:") && said.contains("SIGKILL"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(s.env.work().join("x.sif")).unwrap(), old);
    s.assert_nothing_left();
}

#[test]
fn few_processes_are_enough_or_named() {
    let s = Site::new();
    let (mut done, mut refused) = (0, 0);
    for limit in 2..14 {
        let inner = s.command(&["-F", "x.sif", "base.sif"]);
        let mut command = behind(&inner, &format!("ulimit -Su {limit}"));
        // A user namespace counts its own processes, so those of other tests are not among them.
        let mut alone = Command::new("unshare");
        alone
            .args(["--user", "--map-current-user"])
            .arg(command.get_program())
            .args(command.get_args())
            .env_clear()
            .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))))
            .current_dir(s.env.work());
        command = alone;
        let out = output(&mut command);
        if out.status == 0 {
            done += 1;
            assert_eq!(s.exec(&["cat", "/opt/hello.txt"]).ok(), "hello");
        } else {
            refused += 1;
            assert_eq!(out.status, 255, "{limit}: {out}");
            assert_eq!(out.stderr.matches("FATAL:").count(), 1, "{out}");
            let words = "the limit of processes and threads is reached (ulimit -u:";
            assert!(out.stderr.contains(words), "{limit}: {out}");
        }
        s.assert_nothing_left();
    }
    assert!(done > 2 && refused > 2, "{done} done, {refused} refused");
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let s = Site::new();
    let fifo = s.env.work().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    s.define("");
    let table: &[&[&str]] = &[
        &["build", "o.sif", "fifo"],
        &["build", "--json", "o.sif", "fifo"],
        &["build", "--build-arg-file", "fifo", "o.sif", "x.def"],
        &["build", "-F", "fifo", "base.sif"],
        &["build", "o.sif", "docker-archive:fifo"],
        &["exec", "--env-file", "fifo", "base.sif", "true"],
        &["exec", "--apply-cgroups", "fifo", "base.sif", "true"],
        &["overlay", "create", "fifo"],
        &["push", "fifo", "oras://127.0.0.1:1/x:y"],
        &["push", "fifo", "library://a/b/c:d"],
        &["remote", "login", "--tokenfile", "fifo"],
        &["sif", "new", "fifo"],
        &["sif", "add", "--datatype", "7", "base.sif", "fifo"],
        &["sif", "list", "fifo"],
        &["sif", "header", "fifo"],
        &["sif", "info", "1", "fifo"],
        &["sif", "dump", "1", "fifo"],
        &["sif", "del", "1", "fifo"],
    ];
    for words in table {
        let out = s.env.run(*words);
        assert!(
            out.status != 0 && out.stderr.contains("not a regular file: it is a FIFO"),
            "{words:?} {out}"
        );
    }
    assert!(!s.has("o.sif"));
    // What a shell gives as a file name, and ends by itself, is read.
    let words = "exec --env-file <(echo A=given) base.sif sh -c 'echo $A'";
    let program = env!("CARGO_BIN_EXE_capsid");
    let inner = s.command(&[]);
    let mut shell = behind(&inner, &format!("{program} {words}; exit"));
    assert_eq!(output(&mut shell).ok(), "given");
}
