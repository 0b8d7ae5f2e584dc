//! `capsid build`: definitions become images, as a normal user; what fails leaves nothing.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::build::Site;
use common::*;

#[test]
fn all_sections_do_what_they_say() {
    let s = Site::new();
    s.write("hello.txt", "hi\n");
    let body = "%pre\n echo pre >> log\n%setup\n echo setup >> log; touch $APPTAINER_ROOTFS/from-setup\n\
        %files\n hello.txt /opt/new/\n%post\n test -f /from-setup; cat /opt/new/hello.txt > /copied; id -u > /who\n \
        echo 'export FROM_POST=\"a b\"' >> $APPTAINER_ENVIRONMENT; echo 'Key a value' > $APPTAINER_LABELS\n\
        %environment\n export WORD=word\n%runscript\n echo \"run $WORD $FROM_POST $*\"\n%startscript\n echo start\n\
        %test\n test \"$WORD\" = word; echo tested\n%labels\n Author me\n%help\n help text\n";
    let out = s.build(body, &[]);
    assert_eq!(out.status, 0, "{out}");
    assert!(out.stdout.contains("tested"), "{out}");
    assert_eq!(
        s.env.run(["run", "x.sif", "x"]).ok().trim(),
        "run word a b x"
    );
    assert_eq!(s.exec(&["cat", "/copied", "/who"]).ok(), "hi\n0");
    let labels = s.env.run(["inspect", "x.sif"]).ok().to_owned();
    assert!(
        labels.contains("Author: me") && labels.contains("Key: a value"),
        "{labels}"
    );
    assert!(s.env.run(["run-help", "x.sif"]).ok().contains("help text"));
    assert_eq!(
        fs::read_to_string(s.env.work().join("log")).unwrap(),
        "pre\nsetup\n"
    );
    assert_ne!(s.exec(&["test", "-e", "/.build.labels"]).status, 0);
    assert_ne!(s.exec(&["test", "-e", "/.post.script"]).status, 0);
    s.assert_nothing_left();
}

#[test]
fn owners_are_true_with_and_without_subordinate_ids() {
    let s = Site::new();
    let body = "%setup\n touch \"$APPTAINER_ROOTFS/opt/s\"; chown 5:6 \"$APPTAINER_ROOTFS/opt/s\"\n%post\n echo x > /opt/f; chown 33:44 /opt/f; chmod 4755 /opt/f; mkdir /opt/d; chown 7:8 /opt/d\n stat -c %u:%g /opt/f > /seen\n";
    let later = format!(
        "Stage: one\n{body}Bootstrap: localimage\nFrom: base.sif\nStage: two\n%files from one\n /opt/f\n /opt/d\n /opt/s\n%post\n stat -c %u:%g /opt/f > /seen\n"
    );
    let listed = |body: &str, words: &[&str]| {
        let out = s.build(body, &[&["-F", "--disable-cache"], words].concat());
        assert_eq!(out.status, 0, "{out}");
        assert_eq!(s.exec(&["cat", "/seen"]).ok(), "33:44");
        let out = s.env.run(["sif", "list", "x.sif"]);
        let offset = out
            .ok()
            .lines()
            .find(|l| l.contains("Squashfs"))
            .unwrap()
            .split('|')
            .nth(3)
            .unwrap();
        let offset = offset.split('-').next().unwrap().trim().to_owned();
        let list = output(
            Command::new("unsquashfs")
                .args(["-lln", "-o", &offset])
                .arg(s.env.work().join("x.sif")),
        );
        let lines = list.ok().lines().filter(|l| l.contains("/opt/")).map(|l| {
            let words: Vec<&str> = l.split_ascii_whitespace().collect();
            format!("{} {} {}", words[0], words[1], words[5])
        });
        lines.collect::<Vec<_>>()
    };
    let mapped = listed(body, &[]);
    assert!(
        mapped.iter().any(|l| l.starts_with("-rwsr-xr-x 33/44")),
        "{mapped:?}"
    );
    assert!(
        mapped.iter().any(|l| l.starts_with("drwxr-xr-x 7/8")),
        "{mapped:?}"
    );
    assert!(
        mapped.iter().any(|l| l.starts_with("-rw-r--r-- 5/6")),
        "{mapped:?}"
    );
    assert_eq!(listed(body, &["--ignore-subuid"]), mapped);
    assert_eq!(listed(&later, &[]), mapped);
    assert_eq!(listed(&later, &["--ignore-subuid"]), mapped);
}

#[test]
fn stages_give_files_to_later_ones() {
    let s = Site::new();
    s.write(
        "x.def",
        "Bootstrap: localimage\nFrom: base.sif\nStage: one\n%post\n mkdir -p /a/b; echo made > /a/b/c; ln -s c /a/b/link\n\
         Bootstrap: scratch\nStage: two\n%files from one\n /a /\n /a/b/* /glob/\n%files\n base.sif /base\n",
    );
    let out = output(&mut s.command(&["--sandbox", "box", "x.def"]));
    assert_eq!(out.status, 0, "{out}");
    let root = s.env.work().join("box");
    assert_eq!(fs::read_to_string(root.join("a/b/c")).unwrap(), "made\n");
    assert_eq!(
        fs::read_link(root.join("a/b/link")).unwrap(),
        Path::new("c")
    );
    assert!(root.join("glob/c").is_file() && root.join("base").is_file());
    s.assert_nothing_left();
}

#[test]
fn files_cannot_leave_the_image() {
    let s = Site::new();
    s.write("evil", "evil\n");
    let outside = s.env.path("outside");
    fs::create_dir(&outside).unwrap();
    let body = format!(
        "%setup\n ln -s {0} $APPTAINER_ROOTFS/link; ln -s /../../.. $APPTAINER_ROOTFS/up\n%files\n evil /link/evil\n evil /../../../x\n evil /up/y\n",
        outside.display()
    );
    let out = s.build(&body, &[]);
    assert_eq!(out.status, 0, "{out}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(s.exec(&["cat", "/x", "/y"]).ok(), "evil\nevil");
}

#[test]
fn missing_files_are_named() {
    let s = Site::new();
    for (line, wanted) in [
        ("nothing /x", "nothing"),
        ("no* /x", "nothing matches this pattern"),
    ] {
        let out = s.build(&format!("%files\n {line}\n"), &[]);
        assert_eq!(out.status, 255);
        assert!(
            out.stderr.contains("FATAL:") && out.stderr.contains(wanted),
            "{out}"
        );
    }
    s.assert_nothing_left();
}

#[test]
fn failed_sections_keep_the_old_image_and_leave_nothing() {
    let s = Site::new();
    s.write("x.sif", "old");
    for (body, wanted) in [
        (
            "%post\n mkdir /d; chown 5 /d; exit 7\n",
            "while running %post section: exit status 7",
        ),
        (
            "%setup\n false\n",
            "while running %setup section: exit status 1",
        ),
        (
            "%pre\n exit 3\n",
            "while running %pre section: exit status 3",
        ),
        (
            "%test\n exit 3\n",
            "failed to execute %test script: exit status 3",
        ),
        (
            "%post -c /no/shell\n true\n",
            "while running %post section: exit status 127",
        ),
    ] {
        let out = s.build(body, &["--force"]);
        assert_eq!(out.status, 255, "{out}");
        assert!(out.stderr.contains(wanted), "{out}");
        assert_eq!(out.stderr.matches("FATAL:").count(), 1, "{out}");
        s.assert_nothing_left();
    }
    assert_eq!(
        fs::read_to_string(s.env.work().join("x.sif")).unwrap(),
        "old"
    );
}

#[test]
fn existing_target_needs_force() {
    let s = Site::new();
    s.write("x.sif", "old");
    let out = s.build("", &[]);
    let text = "While checking build target: build target 'x.sif' already exists. Use --force if you want to overwrite it";
    assert!(out.status == 255 && out.stderr.contains(text), "{out}");
    assert_eq!(s.build("", &["--force"]).status, 0);
    fs::create_dir(s.env.work().join("precious")).unwrap();
    s.write("precious/file", "");
    for words in [
        &["-F", "precious", "x.def"][..],
        &["-F", "-s", "precious", "x.def"],
    ] {
        let out = output(&mut s.command(words));
        assert!(
            out.status == 255 && out.stderr.contains("is a directory"),
            "{out}"
        );
    }
    assert!(s.has("precious/file"));
}

#[test]
fn signals_and_kills_leave_nothing() {
    let s = Site::new();
    let sleep = format!("sleep 9471.{}", std::process::id());
    s.define(&format!(
        "%post\n mkdir /d; chown 5:6 /d\n touch /tmp/begun; {sleep} &\n {sleep}\n"
    ));
    for signal in ["INT", "TERM", "HUP", "KILL"] {
        let mut build = s.command(&["x.sif", "x.def"]).spawn().unwrap();
        let running = || processes().iter().any(|(_, line)| line == &sleep);
        wait_until("the section to run", running);
        let pid = build.id().to_string();
        output(Command::new("kill").args([&format!("-{signal}"), &pid])).ok();
        assert!(!build.wait().unwrap().success());
        wait_until("the section to end", || !running());
        wait_until("the files to go", || {
            fs::read_dir(s.env.path("tmp")).unwrap().count() == 0
        });
        wait_until("the draft to go", || {
            fs::read_dir(s.env.work()).unwrap().count() == 2
        });
    }
}

#[test]
fn processes_that_post_leaves_behind_are_ended() {
    let s = Site::new();
    let sleep = format!("sleep 9472.{}", std::process::id());
    let out = s.build(&format!("%post\n {sleep} & setsid {sleep} &\n"), &[]);
    assert_eq!(out.status, 0, "{out}");
    assert!(!processes().iter().any(|(_, line)| line == &sleep));
}

#[test]
fn kept_steps_are_used_until_something_changes() {
    let s = Site::new();
    s.write("in", "1");
    s.write("count", "");
    let body = |environment: &str, post: &str| {
        format!(
            "%files\n in /in\n%post\n {post}\n cat /proc/sys/kernel/random/uuid > /uuid\n%environment\n export E={environment}\n"
        )
    };
    let uuid = |body: &str, words: &[&str]| {
        let out = s.build(body, &[&["-F"], words].concat());
        assert_eq!(out.status, 0, "{out}");
        s.exec(&["cat", "/uuid"]).ok().to_owned()
    };
    let first = uuid(&body("1", "true"), &[]);
    assert_eq!(
        uuid(&body("2", "true"), &[]),
        first,
        "only %environment has changed"
    );
    assert_eq!(s.exec(&["sh", "-c", "echo $E"]).ok(), "2");
    assert_ne!(uuid(&body("2", "true"), &["--disable-cache"]), first);
    assert_ne!(uuid(&body("2", ":"), &[]), first, "%post has changed");
    assert_eq!(uuid(&body("2", "true"), &[]), first);
    s.write("in", "2");
    assert_ne!(uuid(&body("2", "true"), &[]), first, "a file has changed");
}

#[test]
fn reproducible_builds_have_equal_bytes() {
    let s = Site::new();
    s.define("%post\n echo x > /made; mkdir /d\n%labels\n A b\n%appinstall foo\n echo y > z\n");
    let build = |name: &str| {
        let mut command = s.command(&["--disable-cache", name, "x.def"]);
        let out = output(command.env("SOURCE_DATE_EPOCH", "1700000000"));
        assert_eq!(out.status, 0, "{out}");
        std::thread::sleep(std::time::Duration::from_millis(1100));
        fs::read(s.env.work().join(name)).unwrap()
    };
    assert!(build("a.sif") == build("b.sif"));
}

#[test]
fn sandboxes_and_images_become_each_other() {
    let s = Site::new();
    assert_eq!(
        output(&mut s.command(&["--sandbox", "box", "base.sif"])).status,
        0
    );
    let own = fs::metadata(s.env.work().join("box/bin/busybox")).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&own),
        nix::unistd::getuid().as_raw()
    );
    s.write("box/opt/added", "added\n");
    assert_eq!(output(&mut s.command(&["x.sif", "box"])).status, 0);
    assert_eq!(s.exec(&["cat", "/opt/added"]).ok(), "added");
    s.define("%post\n echo more > /more\n");
    assert_eq!(
        output(&mut s.command(&["--update", "box", "x.def"])).status,
        0
    );
    assert_eq!(
        fs::read_to_string(s.env.work().join("box/more")).unwrap(),
        "more\n"
    );
    assert_eq!(
        fs::read_to_string(s.env.work().join("box/opt/added")).unwrap(),
        "added\n"
    );
    s.assert_nothing_left();
}

#[test]
fn arguments_and_applications_are_built_in() {
    let s = Site::new();
    let body = "%arguments\n NAME=foo\n%appinstall {{ NAME }}\n echo tool > bin/tool\n%appenv {{ NAME }}\n export V=v\n\
        %apprun {{ NAME }}\n echo \"app $V $SCIF_APPNAME $*\"\n%applabels {{ NAME }}\n L l\n";
    let out = s.build(body, &["--build-arg", "NAME=bar"]);
    assert_eq!(out.status, 0, "{out}");
    assert_eq!(
        s.env.run(["run", "--app", "bar", "x.sif", "y"]).ok(),
        "app v bar y"
    );
    assert_eq!(s.exec(&["cat", "/scif/apps/bar/bin/tool"]).ok(), "tool");
    let out = s.build(body, &["-F", "--build-arg", "NOPE=1"]);
    assert!(
        out.status == 255 && out.stderr.contains("unused build args: NOPE"),
        "{out}"
    );
}

#[test]
fn sections_can_be_chosen_and_tests_left_out() {
    let s = Site::new();
    let body = "%setup\n touch \"$APPTAINER_ROOTFS/opt/s\"; chown 5:6 \"$APPTAINER_ROOTFS/opt/s\"\n%post\n echo x > /made\n%test\n false\n%environment\n export E=e\n";
    assert_eq!(s.build(body, &["--notest"]).status, 0);
    let kept = s.env.run(["inspect", "--test", "x.sif"]);
    assert!(kept.ok().contains("false"), "kept, and not run: {kept}");
    assert_eq!(s.build(body, &["-F", "--section", "environment"]).status, 0);
    assert_ne!(s.exec(&["test", "-e", "/made"]).status, 0);
    assert_eq!(s.exec(&["sh", "-c", "echo $E"]).ok(), "e");
    let out = s.build(body, &["-F", "--section", "nope"]);
    assert!(
        out.status == 255 && out.stderr.contains("--section \"nope\""),
        "{out}"
    );
}

#[test]
fn wrong_sources_and_options_are_one_line() {
    let s = Site::new();
    s.write("binary", "\u{0}\u{0}");
    s.write("bad.def", "Bootstrap: nope\n");
    s.write("sec.def", "Bootstrap: scratch\n%nope\n");
    s.write(
        "signed.def",
        "Bootstrap: localimage\nFrom: base.sif\nFingerprints: 0123\n",
    );
    s.write("image.def", "Bootstrap: localimage\nFrom: none.sif\n");
    let cases: &[(&[&str], &str)] = &[
        (
            &["y.sif", "none.def"],
            "Unable to build from none.def: unable to open file none.def: open none.def: no such file or directory",
        ),
        (
            &["y.sif", "binary"],
            "Unable to build from binary: could not open image",
        ),
        (&["y.sif", "bad.def"], "invalid build source nope"),
        (&["y.sif", "signed.def"], "Fingerprints is not supported"),
        (
            &["y.sif", "sec.def"],
            "Unable to build from sec.def: while parsing definition: sec.def:2: invalid section(s) specified: nope",
        ),
        (
            &["y.sif", "image.def"],
            "none.sif: no such file or directory",
        ),
        (
            &["--encrypt", "y.sif", "bad.def"],
            "--encrypt is not supported",
        ),
        (
            &["--mksquashfs-args", "-no-compression", "y.sif", "base.sif"],
            "-no-compression is not supported",
        ),
        (
            &["--compat32", "y.sif", "base.sif"],
            "--compat32 is not supported: it adds 32-bit libraries of a GPU",
        ),
        (
            &["--arch", "arm64", "y.sif", "base.sif"],
            "base.sif is for amd64, and --arch asks for arm64",
        ),
        (
            &["--compression", "zip", "y.sif", "base.sif"],
            "--compression",
        ),
        (
            &["--block-size", "3K", "y.sif", "base.sif"],
            "a power of two",
        ),
        (
            &["/proc/y.sif", "base.sif"],
            "the image cannot be written to /proc",
        ),
    ];
    for (words, wanted) in cases {
        let out = output(&mut s.command(words));
        assert_eq!(out.status, 255, "{words:?} {out}");
        assert!(out.stderr.contains(wanted), "{words:?} {out}");
        assert_eq!(out.stderr.matches("FATAL:").count(), 1, "{out}");
        assert!(!s.has("y.sif"));
    }
    s.assert_nothing_left();
}

#[test]
fn disk_that_is_full_keeps_the_old_image() {
    let s = Site::new();
    s.write("x.sif", "old");
    s.define("%post\n dd if=/dev/urandom of=/big bs=1M count=3\n");
    let words = "ulimit -f 2048; exec \"$@\"";
    let mut command = Command::new("bash");
    let inner = s.command(&["-F", "x.sif", "x.def"]);
    command
        .args(["-c", words, "bash"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env_clear()
        .current_dir(s.env.work());
    command.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let out = output(&mut command);
    assert_ne!(out.status, 0, "{out}");
    assert_eq!(
        fs::read_to_string(s.env.work().join("x.sif")).unwrap(),
        "old"
    );
    s.assert_nothing_left();
}
