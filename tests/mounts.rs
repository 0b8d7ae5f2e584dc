//! What is mounted is what was asked for: sources of the host as the host has them, targets that are made where they are
//! missing, an order in which nothing is hidden.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use common::{Env, Output, output, write};

/// A directory of the host with a file `name` that holds its own name.
fn marked(env: &Env, name: &str) -> PathBuf {
    let directory = env.path(name);
    write(&directory.join(name), &format!("{name}\n"));
    directory
}

/// Runs a command in an image with options.
fn exec(env: &Env, image: &Path, options: &[&str], command: &[&str]) -> Output {
    let words = ["exec"].iter().chain(options).map(|w| (*w).to_owned());
    let words = words.chain([image.to_str().unwrap().to_owned()]);
    env.run(words.chain(command.iter().map(|w| (*w).to_owned())))
}

/// All orders of some things.
fn orders<T: Clone>(things: &[T]) -> Vec<Vec<T>> {
    if things.is_empty() {
        return vec![Vec::new()];
    }
    let with_first = |i: usize| {
        let mut rest = things.to_vec();
        let first = rest.remove(i);
        let put = move |mut order: Vec<T>| {
            order.insert(0, first.clone());
            order
        };
        orders(&rest).into_iter().map(put)
    };
    (0..things.len()).flat_map(with_first).collect()
}

/// A path of the host that climbs to `/` and comes back to `path`.
fn climbing(path: &Path) -> PathBuf {
    let up = "../".repeat(30);
    Path::new(&up).join(path.strip_prefix("/").unwrap())
}

#[test]
fn sources_are_the_hosts_through_any_links() {
    let env = Env::new();
    let data = marked(&env, "data");
    // What a link of the host would find if it was resolved in the image.
    let tree = env.tree("tree");
    write(
        &tree.join(data.strip_prefix("/").unwrap()).join("data"),
        "of the image\n",
    );
    let image = env.sif(&tree, "image.sif");
    let links = env.path("links");
    fs::create_dir_all(links.join("deep")).unwrap();
    symlink(&data, links.join("absolute")).unwrap();
    symlink(climbing(&data), links.join("climbs")).unwrap();
    symlink("climbs", links.join("chain")).unwrap();
    symlink(climbing(&data.join("data")), links.join("file")).unwrap();
    symlink("../".repeat(30), links.join("top")).unwrap();
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let directories = [
        text(data.clone()),
        text(links.join("absolute")),
        text(links.join("climbs")),
        text(links.join("chain")),
        format!("{}/", links.join("chain").display()),
        text(links.join("deep/../chain/.")),
        text(links.join("deep").join(climbing(&data))),
        format!("{}{}", links.join("top").display(), data.display()),
        format!("../links/climbs/../{}", "data"),
        format!("/proc/self/root{}", links.join("climbs").display()),
    ];
    for root in [&image, &tree] {
        for options in ["", "--contain --no-mount tmp", "--pid", "--fakeroot"] {
            let options: Vec<&str> = options.split_whitespace().collect();
            for source in &directories {
                let bind = format!("{source}:/x y/z");
                let with = [options.as_slice(), &["-B", bind.as_str()]].concat();
                let out = exec(&env, root, &with, &["cat", "/x y/z/data"]);
                assert_eq!(out.ok(), "data", "{source} {options:?}");
            }
            let bind = format!("{}:/f", links.join("file").display());
            let with = [options.as_slice(), &["-B", bind.as_str()]].concat();
            assert_eq!(exec(&env, root, &with, &["cat", "/f"]).ok(), "data");
        }
    }
    // Whatever else names a directory of the host.
    let link = text(links.join("climbs"));
    let contained = ["--contain", "--no-mount", "tmp"];
    for (options, seen) in [
        (vec!["--home".to_owned(), format!("{link}:/h")], "/h/data"),
        (vec!["--overlay".to_owned(), format!("{link}:ro")], "/data"),
    ] {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let with = [&contained, options.as_slice()].concat();
        assert_eq!(exec(&env, &image, &with, &["cat", seen]).ok(), "data");
    }
    let with = ["-c", "-W", &link, "-S", "/scratch", "--overlay", &link];
    exec(
        &env,
        &image,
        &with,
        &["touch", "/tmp/t", "/scratch/s", "/o"],
    )
    .ok();
    for made in ["tmp/t", "scratch/scratch/s", "upper/o"] {
        assert!(data.join(made).exists(), "{made}");
    }
}

#[test]
fn hosts_own_files_are_links_on_many_hosts() {
    let env = Env::new();
    let image = env.image();
    // As systemd has them: out of /etc and back.
    let etc = env.path("etc");
    for name in ["passwd", "group", "hosts"] {
        write(
            &etc.join(name),
            &fs::read_to_string(Path::new("/etc").join(name)).unwrap(),
        );
    }
    write(&env.path("zone"), "a zone\n");
    write(&env.path("stub"), "nameserver 192.0.2.7\n");
    let up = |path: PathBuf| Path::new("..").join(path.strip_prefix("/").unwrap());
    symlink(up(env.path("zone")), etc.join("localtime")).unwrap();
    symlink(up(env.path("stub")), etc.join("resolv.conf")).unwrap();
    let line = format!(
        "mount --rbind {} /etc && exec {} exec {} cat /etc/localtime /etc/resolv.conf",
        etc.display(),
        env!("CARGO_BIN_EXE_capsid"),
        image.display()
    );
    let out = output(&mut env.command_as(Path::new("unshare"), ["-Urm", "sh", "-c", &line]));
    assert_eq!(out.ok(), "a zone\nnameserver 192.0.2.7");
    assert!(!out.stderr.contains("WARNING"), "{out}");
}

#[test]
fn descriptors_of_the_caller_are_sources_where_they_have_a_name() {
    let env = Env::new();
    let image = env.image();
    let data = marked(&env, "data");
    for source in ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"] {
        let bind = format!("{source}:/x");
        let mut command = env.command(["exec", "-B", &bind, image.to_str().unwrap(), "cat", "/x"]);
        command.stdin(fs::File::open(data.join("data")).unwrap());
        assert_eq!(output(&mut command).ok(), "data", "{source}");
    }
    let (reader, _writer) = std::io::pipe().unwrap();
    let bind = [
        "exec",
        "-B",
        "/dev/stdin:/x",
        image.to_str().unwrap(),
        "true",
    ];
    let mut command = env.command(bind);
    command.stdin(reader);
    output(&mut command).fatal(&["/dev/stdin", "a pipe"]);
}

#[test]
fn mounts_below_others_are_there_in_any_order() {
    let env = Env::new();
    let image = env.image();
    let tree = env.path("tree");
    let names = ["a", "b", "c", "d"];
    let targets = ["/a", "/a/b", "/a/b/c", "/a/b/d"];
    // With the mount points and without.
    for exist in [true, false] {
        let sources: Vec<PathBuf> = names
            .iter()
            .map(|n| marked(&env, &format!("{exist}-{n}")))
            .collect();
        if exist {
            fs::create_dir(sources[0].join("b")).unwrap();
            fs::create_dir(sources[1].join("c")).unwrap();
            write(&sources[1].join("d"), "");
        }
        let binds: Vec<String> = sources
            .iter()
            .zip(targets)
            .map(|(source, target)| {
                let file = if target.ends_with('d') { "true-d" } else { "" };
                let file = if file.is_empty() || exist {
                    file
                } else {
                    "false-d"
                };
                format!(
                    "{}:{target}",
                    source
                        .join(file)
                        .display()
                        .to_string()
                        .trim_end_matches('/')
                )
            })
            .collect();
        for order in orders(&binds) {
            for root in [&image, &tree] {
                let options: Vec<&str> = order.iter().flat_map(|bind| ["-B", bind]).collect();
                let files = targets.iter().zip(names).map(|(target, name)| {
                    if name == "d" {
                        (*target).to_owned()
                    } else {
                        format!("{target}/{exist}-{name}")
                    }
                });
                let files: Vec<String> = files.collect();
                let command: Vec<&str> = ["cat"]
                    .into_iter()
                    .chain(files.iter().map(String::as_str))
                    .collect();
                let wanted: Vec<String> = names.iter().map(|n| format!("{exist}-{n}")).collect();
                let out = exec(&env, root, &options, &command);
                assert_eq!(out.ok(), wanted.join("\n"), "{order:?}");
            }
        }
        let owner = nix::unistd::getuid().as_raw();
        assert_eq!(sources[0].join("b").metadata().unwrap().uid(), owner);
        let file = sources[1].join("d").metadata().unwrap();
        assert!(file.is_file() && file.len() == 0, "an empty file was made");
    }
}

#[test]
fn missing_mount_points_are_made_in_directories_of_the_host() {
    let env = Env::new();
    let image = env.image();
    let data = marked(&env, "data");
    let file = data.join("data");
    let odd = std::os::unix::ffi::OsStrExt::from_bytes(b"q\xff q");
    let odd: &std::ffi::OsStr = odd;
    for (i, options) in [
        "",
        "--fakeroot",
        "--fakeroot --ignore-subuid",
        "-C",
        "--pid",
        "--compat",
    ]
    .iter()
    .enumerate()
    {
        let below = env.path(&format!("below{i}"));
        fs::create_dir(&below).unwrap();
        let binds = [
            format!("{}:/a", below.display()),
            format!("{}:/a/new/deep dir", data.display()),
            format!("{}:/a/file.txt", file.display()),
        ];
        let scratch = ["-S", "/a/scratch/s"];
        let binds = binds.iter().flat_map(|bind| ["-B", bind]);
        let all: Vec<&str> = options
            .split_whitespace()
            .chain(binds)
            .chain(scratch)
            .collect();
        let command = "cat '/a/new/deep dir/data' /a/file.txt && touch /a/scratch/s/x /a/kept";
        let out = exec(&env, &image, &all, &["sh", "-c", command]);
        assert_eq!(out.ok(), "data\ndata", "{options}");
        let owner = nix::unistd::getuid().as_raw();
        for made in ["new", "new/deep dir", "file.txt", "scratch/s", "kept"] {
            let meta = fs::symlink_metadata(below.join(made)).unwrap();
            assert_eq!(meta.uid(), owner, "{made} {options}");
        }
        assert!(!below.join("scratch/s/x").exists() && !below.join("new/deep dir/data").exists());
        assert_eq!(fs::read(below.join("file.txt")).unwrap(), b"");
    }
    // Below default mounts, below --home, and with a name that is no text.
    let home = common::home().join(format!("capsid-test-{}", uuid::Uuid::new_v4()));
    let bind = format!("{}:{}/x", data.display(), home.display());
    let seen = format!("{}/x/data", home.display());
    let out = exec(&env, &image, &["-B", &bind], &["cat", &seen]);
    let made = fs::remove_dir(home.join("x")).and_then(|()| fs::remove_dir(&home));
    assert_eq!(out.ok(), "data");
    made.unwrap();
    let stage = env.path("stage");
    fs::create_dir(&stage).unwrap();
    let mut mount = std::ffi::OsString::from(format!(
        "--mount=type=bind,source={},target=/x/",
        file.display()
    ));
    mount.push(odd);
    let home = format!("--home={}:/x", stage.display());
    let words = [
        "exec".into(),
        home.into(),
        mount,
        image.clone().into(),
        "sh".into(),
        "-c".into(),
        "cat /x/q*".into(),
    ];
    assert_eq!(env.run(words).ok(), "data");
    assert!(stage.join(odd).exists());
}

#[test]
fn what_workflow_engines_send_works() {
    let env = Env::new();
    let image = env.image();
    let out = env.path("out");
    let tmp = env.path("tmp");
    for dir in [&out, &tmp] {
        fs::create_dir(dir).unwrap();
    }
    let inputs = marked(&env, "inputs");
    let file = inputs.join("inputs");
    // cwltool: everything staged, InitialWorkDirRequirement included.
    let mount = |source: &Path, target: &str, more: &str| {
        format!(
            "--mount=type=bind,source={},target={target}{more}",
            source.display()
        )
    };
    let home = format!("{}:/NIubmC", out.display());
    let words = [
        "--quiet".to_owned(),
        "run".into(),
        "--contain".into(),
        "--ipc".into(),
        "--cleanenv".into(),
        "--no-eval".into(),
        "--userns".into(),
        "--home".into(),
        home,
        mount(&tmp, "/tmp", ""),
        mount(&file, "/var/lib/cwl/stg1/in.txt", ",readonly"),
        mount(&inputs, "/NIubmC/dir", ",readonly"),
        mount(&file, "/NIubmC/staged.txt", ",readonly"),
        mount(&inputs, "/NIubmC/a/b/c", ""),
        mount(&file, "/NIubmC/a/b/c/again.txt", ",readonly"),
        "--pwd".into(),
        "/NIubmC".into(),
        "--net".into(),
        "--network".into(),
        "none".into(),
        image.to_str().unwrap().to_owned(),
    ];
    // The runscript of the image says its arguments and ends with 3.
    let ran = env.run(&words);
    assert_eq!(
        (ran.status, ran.stdout.contains("runscript args")),
        (3, true),
        "{ran}"
    );
    let words = words.iter().map(|w| if w == "run" { "exec" } else { w });
    let command = "cat /var/lib/cwl/stg1/in.txt dir/inputs staged.txt a/b/c/inputs a/b/c/again.txt; touch result /tmp/t";
    let ran = env.run(words.chain(["sh", "-c", command]));
    assert_eq!(ran.ok(), ["inputs"; 5].join("\n"));
    assert!(out.join("result").exists() && tmp.join("t").exists());
    // A readonly parent is not written to, and the message says so.
    let parent = mount(&tmp, "/p", ",readonly");
    let child = mount(&file, "/p/new.txt", "");
    exec(&env, &image, &[&child, &parent], &["true"]).fatal(&["/p/new.txt", "read-only"]);
    assert!(!tmp.join("new.txt").exists());
    write(&tmp.join("new.txt"), "");
    let ran = exec(&env, &image, &[&child, &parent], &["cat", "/p/new.txt"]);
    assert_eq!(ran.ok(), "inputs");
}

#[test]
fn nothing_is_made_through_links_that_lead_out() {
    let env = Env::new();
    let image = env.image();
    let data = marked(&env, "data");
    let (shared, other) = (env.path("shared"), env.path("other"));
    fs::create_dir(&other).unwrap();
    fs::create_dir_all(shared.join("inner")).unwrap();
    symlink("/etc", shared.join("etc")).unwrap();
    symlink("../other", shared.join("beside")).unwrap();
    symlink("/other", shared.join("absolute")).unwrap();
    symlink("/nowhere", shared.join("dangling")).unwrap();
    symlink(&other, shared.join("hosts")).unwrap();
    symlink("inner", shared.join("within")).unwrap();
    let binds = [
        format!("{}:/shared", shared.display()),
        format!("{}:/other", other.display()),
    ];
    for link in ["etc", "beside", "absolute", "dangling", "hosts"] {
        for tail in ["/new", "/new/deep"] {
            let bind = format!("{}:/shared/{link}{tail}", data.display());
            let options = ["--contain", "-B", &bind, "-B", &binds[0], "-B", &binds[1]];
            exec(&env, &image, &options, &["true"]).fatal(&["doesn't exist in container", link]);
        }
    }
    assert_eq!(
        fs::read_dir(&other).unwrap().count(),
        0,
        "nothing was made there"
    );
    assert!(!Path::new("/etc/new").exists());
    // A link that stays in the directory is one of its ways.
    let bind = format!("{}:/shared/within/new", data.display());
    let out = exec(
        &env,
        &image,
        &["-B", &bind, "-B", &binds[0]],
        &["cat", "/shared/inner/new/data"],
    );
    assert_eq!(out.ok(), "data");
    assert!(shared.join("inner/new").is_dir());
}

#[test]
fn links_of_the_image_hide_no_mount() {
    let env = Env::new();
    let (one, two, tree) = (marked(&env, "one"), marked(&env, "two"), env.tree("tree"));
    fs::create_dir_all(tree.join("run")).unwrap();
    symlink("../run", tree.join("var/run")).unwrap();
    symlink("/var/run", tree.join("r")).unwrap();
    let image = env.sif(&tree, "image.sif");
    for root in [&image, &tree] {
        for exist in [false, true] {
            if exist {
                fs::create_dir_all(one.join("x")).unwrap();
            } else {
                let _ = fs::remove_dir(one.join("x"));
            }
            for (above, below) in [
                ("/run", "/var/run/x"),
                ("/var/run", "/run/x"),
                ("/r", "/var/run/x"),
                ("/r", "/run/x"),
                ("/var/run", "/r/x"),
            ] {
                let binds = [
                    format!("{}:{above}", one.display()),
                    format!("{}:{below}", two.display()),
                ];
                for order in orders(&binds) {
                    let options: Vec<&str> = order.iter().flat_map(|bind| ["-B", bind]).collect();
                    let out = exec(&env, root, &options, &["cat", "/run/one", "/run/x/two"]);
                    assert_eq!(out.ok(), "one\ntwo", "{order:?} {exist}");
                }
            }
        }
        // Two names of one place: the first that is mounted stays.
        let binds = [
            format!("{}:/run", one.display()),
            format!("{}:/var/run", two.display()),
        ];
        let out = exec(
            &env,
            root,
            &["-B", &binds[0], "-B", &binds[1]],
            &["cat", "/var/run/one"],
        );
        assert_eq!(out.ok(), "one");
        assert!(
            out.stderr
                .contains("WARNING: destination /var/run is already"),
            "{out}"
        );
    }
}

#[test]
fn temporary_directories_that_are_one_in_the_image_are_the_hosts_tmp() {
    let env = Env::new();
    let mark = tempfile::Builder::new()
        .prefix("capsid-mark.")
        .tempfile_in("/tmp")
        .unwrap();
    let mark = mark.path().to_str().unwrap();
    for (i, (link, to)) in [
        ("var/tmp", "/tmp"),
        ("var/tmp", "../tmp"),
        ("tmp", "var/tmp"),
    ]
    .iter()
    .enumerate()
    {
        let tree = env.tree(&format!("tree{i}"));
        fs::remove_dir(tree.join(link)).unwrap();
        symlink(to, tree.join(link)).unwrap();
        for root in [env.sif(&tree, &format!("image{i}.sif")), tree] {
            let out = exec(&env, &root, &[], &["ls", mark, &format!("/var{mark}")]);
            assert_eq!(out.ok().lines().count(), 2, "{link} -> {to}");
            // What the user wants there comes first.
            let data = marked(&env, "data");
            for target in ["/tmp", "/var/tmp"] {
                let bind = format!("{}:{target}", data.display());
                let out = exec(
                    &env,
                    &root,
                    &["-B", &bind],
                    &["cat", "/tmp/data", "/var/tmp/data"],
                );
                assert_eq!(out.ok(), "data\ndata", "{link} -> {to}, {target}");
            }
        }
    }
}

#[test]
fn first_of_two_for_one_place_counts() {
    let env = Env::new();
    let image = env.image();
    let (one, two) = (marked(&env, "one"), marked(&env, "two"));
    let (one, two) = (one.display(), two.display());
    let cases = [
        (
            vec![
                "-B".to_owned(),
                format!("{one}:/a"),
                "-B".into(),
                format!("{two}:/a"),
            ],
            "/a/one",
        ),
        (
            vec!["-B".to_owned(), format!("{two}:/a,{one}:/a/")],
            "/a/two",
        ),
        (
            vec![
                "--mount".to_owned(),
                format!("type=bind,src={two},dst=/a"),
                "-B".into(),
                format!("{one}:/a/../a"),
            ],
            "/a/one",
        ),
        (
            vec![
                "--home".to_owned(),
                format!("{one}:/a"),
                "-B".into(),
                format!("{two}:/a"),
            ],
            "/a/one",
        ),
        (
            vec![
                "-S".to_owned(),
                "/a".into(),
                "-B".into(),
                format!("{two}:/a"),
            ],
            "/a/two",
        ),
    ];
    for (options, seen) in cases {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let out = exec(&env, &image, &options, &["cat", seen]);
        out.ok();
        let warnings = out
            .stderr
            .lines()
            .filter(|l| l.contains("destination /a is already"))
            .count();
        assert_eq!(warnings, 1, "{options:?} {out}");
    }
}

#[test]
fn no_default_takes_the_place_of_what_was_named() {
    let env = Env::new();
    let image = env.image();
    let data = marked(&env, "data");
    write(&data.join("tmp/own"), "");
    write(&data.join("hosts"), "");
    let data = data.to_str().unwrap();
    let home = common::home();
    let home = home.to_str().unwrap();
    // The working directory is the home directory: its default must not come over what was named for it.
    let run = |options: &[String], command: &[&str]| {
        let words = ["exec".to_owned()]
            .into_iter()
            .chain(options.iter().cloned());
        let words = words.chain([image.to_str().unwrap().to_owned()]);
        let words = words.chain(command.iter().map(|w| (*w).to_owned()));
        output(env.command(words).current_dir(home))
    };
    let seen = format!("{home}/data");
    for options in [
        ["--home".to_owned(), format!("{data}:{home}")],
        ["-B".to_owned(), format!("{data}:{home}")],
    ] {
        let out = run(&options, &["cat", &seen, "data"]);
        assert_eq!(out.ok(), "data\ndata", "{options:?}");
    }
    let out = run(&["-S".to_owned(), home.into()], &["ls", home]);
    assert_eq!(out.ok(), "");
    for target in ["/tmp", "/var/tmp", "/etc/hosts", "/etc"] {
        let source = if target == "/etc/hosts" {
            format!("{data}/data")
        } else {
            data.into()
        };
        let options = ["-B".to_owned(), format!("{source}:{target}")];
        let file = if target == "/etc/hosts" {
            target.to_owned()
        } else {
            format!("{target}/data")
        };
        assert_eq!(run(&options, &["cat", &file]).ok(), "data", "{target}");
    }
    // Nor over a part of it, and nothing is made there.
    let options = [
        "-B".to_owned(),
        format!("{data}:/var"),
        "-B".into(),
        format!("{data}:/etc"),
    ];
    let out = run(
        &options,
        &["sh", "-c", "ls /var/tmp; cat /etc/hosts; ls /etc"],
    );
    assert_eq!(out.ok(), "own\ndata\nhosts\ntmp");
    // An empty directory has no parts: what belongs below it is there.
    let out = run(
        &["-S".to_owned(), "/var".into()],
        &["sh", "-c", "touch /var/x && test -d /var/tmp && ls /var"],
    );
    assert_eq!(out.ok(), "tmp\nx");
    // --home below a default mount.
    let place = format!("/tmp/capsid-test-{}", uuid::Uuid::new_v4());
    let out = run(
        &["--home".to_owned(), format!("{data}:{place}")],
        &["cat", &format!("{place}/data")],
    );
    let made = fs::remove_dir(&place);
    assert_eq!(out.ok(), "data");
    made.unwrap();
}

#[test]
fn working_directory_is_the_callers() {
    let env = Env::new();
    let work = env.work();
    write(&work.join("mine"), "");
    write(&work.join("share/mine"), "");
    let tree = env.tree("tree");
    // The image has the same path, and other files there.
    let inside = tree.join(work.strip_prefix("/").unwrap());
    write(&inside.join("of-the-image"), "");
    write(&tree.join("usr/share/of-the-image"), "");
    let image = env.sif(&tree, "image.sif");
    for root in [&image, &tree] {
        for options in [&["--no-mount", "tmp"][..], &[]] {
            let out = exec(&env, root, options, &["sh", "-c", "ls; pwd"]);
            assert_eq!(
                out.ok(),
                format!("mine\nshare\n{}", work.display()),
                "{options:?}"
            );
        }
        // A system directory of the image stays.
        let words = ["exec", root.to_str().unwrap(), "ls"];
        let out = output(env.command(words).current_dir("/usr/share"));
        assert_eq!(out.ok(), "of-the-image");
        assert!(
            out.stderr
                .contains("WARNING: the image has /usr/share of its own"),
            "{out}"
        );
    }
}

#[test]
fn working_directory_does_not_hide_the_image_through_a_link() {
    let env = Env::new();
    let tree = env.tree("tree");
    let place = env.path("place");
    fs::create_dir(&place).unwrap();
    write(&place.join("mine"), "");
    let inside = tree.join(place.strip_prefix("/").unwrap());
    fs::create_dir_all(inside.parent().unwrap()).unwrap();
    symlink("/bin", &inside).unwrap();
    let image = env.sif(&tree, "image.sif");
    for root in [&image, &tree] {
        let words = [
            "exec",
            "--no-mount",
            "tmp",
            root.to_str().unwrap(),
            "/bin/ls",
            "/bin/busybox",
        ];
        let out = output(env.command(words).current_dir(&place));
        assert_eq!(out.ok(), "/bin/busybox");
    }
}

#[test]
fn written_root_gets_home_and_is_not_touched() {
    let env = Env::new();
    let tree = env.tree("tree");
    write(&tree.join("home/notes"), "of the image\n");
    symlink("notes", tree.join("home/link")).unwrap();
    fs::create_dir(tree.join("home/other")).unwrap();
    let secret = common::HomeFile::new();
    let home = common::home();
    let words = [
        "exec",
        "--writable",
        tree.to_str().unwrap(),
        "sh",
        "-c",
        "pwd; ls; cat /home/link; touch /home/other/kept /opt/written; touch /home/lost",
    ];
    let out = output(env.command(words).current_dir(&home));
    assert!(
        out.stdout.starts_with(&format!("{}\n", home.display())),
        "{out}"
    );
    assert!(
        out.stdout.contains(&secret.name()) && out.stdout.contains("of the image"),
        "{out}"
    );
    assert!(
        out.stderr.contains("Read-only file system"),
        "no write is lost silently: {out}"
    );
    let names = fs::read_dir(tree.join("home"))
        .unwrap()
        .flatten()
        .map(|e| e.file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["link", "notes", "other"], "the image is as it was");
    assert!(tree.join("home/other/kept").exists() && tree.join("opt/written").exists());
    let data = marked(&env, "data");
    for (option, target) in [
        ("--home", "/absent"),
        ("-B", "/absent"),
        ("-B", "/opt/absent"),
    ] {
        let value = format!("{}:{target}", data.display());
        exec(&env, &tree, &["--writable", option, &value], &["true"])
            .fatal(&[target, "--writable"]);
    }
    let value = format!("{}:/opt/home", data.display());
    let out = exec(
        &env,
        &tree,
        &["--writable", "--home", &value],
        &["cat", "/opt/home/data", "/opt/hello.txt"],
    );
    assert_eq!(out.ok(), "data\nhello");
}

#[test]
fn mounts_in_parts_of_images_find_their_places() {
    let env = Env::new();
    let image = env.image();
    let inner = env.path("inner");
    write(&inner.join("part/file"), "of the part\n");
    let squashfs = env.squashfs(&inner, "inner.squashfs", &[]);
    let data = marked(&env, "data");
    let part = format!("{}:/p:image-src=/part", squashfs.display());
    let below = format!("{}:/p/new/deep", data.display());
    for order in orders(&[part.as_str(), below.as_str()]) {
        let options: Vec<&str> = order.iter().flat_map(|bind| ["-B", bind]).collect();
        let out = exec(
            &env,
            &image,
            &options,
            &["cat", "/p/file", "/p/new/deep/data"],
        );
        assert_eq!(out.ok(), "of the part\ndata");
    }
}

#[test]
fn private_pseudo_terminals_can_be_left_out() {
    let env = Env::new();
    let image = env.image();
    let look = ["sh", "-c", "ls -d /dev/pts /dev/ptmx /dev/null 2>/dev/null"];
    let out = exec(&env, &image, &["--contain", "--no-mount", "devpts"], &look);
    assert_eq!(out.stdout, "/dev/null\n", "{out}");
    let out = exec(&env, &image, &["--contain"], &look);
    assert_eq!(out.ok().lines().count(), 3);
}

/// The mke2fs image of a tree.
fn ext3(env: &Env, tree: &Path, name: &str) -> PathBuf {
    let path = env.path(name);
    let made = output(
        std::process::Command::new("mkfs.ext3")
            .args([
                "-q",
                "-d",
                tree.to_str().unwrap(),
                path.to_str().unwrap(),
                "2m",
            ])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"),
    );
    made.ok();
    path
}

/// A SIF that holds nothing but a file system for data.
fn data_sif(env: &Env, squashfs: &Path) -> PathBuf {
    use capsid::sif::{Content, Draft, FsType, PartType, Partition, Stamp};
    let mut draft = Draft::default();
    let partition = Partition {
        fs: FsType::Squashfs,
        part: PartType::Data,
        arch: capsid::host::go_arch(std::env::consts::ARCH),
    };
    draft.add_partition(partition, Content::File(fs::File::open(squashfs).unwrap()));
    let path = env.path("data.sif");
    let stamp = Stamp {
        time_s: 1_700_000_000,
        identity: [2; 16],
    };
    draft
        .write(&mut fs::File::create(&path).unwrap(), stamp)
        .unwrap();
    path
}

#[test]
fn parts_of_images_are_bound_as_they_are() {
    let env = Env::new();
    let image = env.image();
    let inner = env.path("inner");
    write(&inner.join("upper/in-upper"), "upper\n");
    write(&inner.join("file"), "top\n");
    let squashfs = env.squashfs(&inner, "inner.squashfs", &[]);
    let ext = ext3(&env, &inner, "inner.img");
    for file in [&squashfs, &ext, &data_sif(&env, &squashfs)] {
        let file = file.display();
        for (part, seen, wanted) in [
            ("/", "/d/file", "top"),
            ("/", "/d/upper/in-upper", "upper"),
            ("/upper", "/d/in-upper", "upper"),
            ("/file", "/d", "top"),
        ] {
            let bind = format!("{file}:/d:image-src={part}");
            let out = exec(&env, &image, &["-B", &bind], &["cat", seen]);
            assert_eq!(out.ok(), wanted, "{bind}");
        }
        let bind = format!("{file}:/d:image-src=/nothing");
        exec(&env, &image, &["-B", &bind], &["true"])
            .fatal(&["image-src /nothing is not in the image"]);
    }
    let bind = format!("{}:/d:image-src=/", ext.display());
    let out = exec(&env, &image, &["-B", &bind], &["touch", "/d/x"]);
    assert!(
        out.stderr.contains("WARNING: the image") && out.status == 1,
        "{out}"
    );
    let words = [
        "--explain",
        "exec",
        "-B",
        &bind,
        image.to_str().unwrap(),
        "true",
    ];
    let plan = env.run(words);
    assert!(plan.ok().lines().any(|l| l.contains("-> /d  ro")), "{plan}");
    // As a layer, the directory `upper` of the same file is what counts.
    let layer = format!("{}:ro", ext.display());
    let out = exec(
        &env,
        &image,
        &["-o", &layer, "-B", &bind],
        &["cat", "/in-upper", "/d/file"],
    );
    assert_eq!(out.ok(), "upper\ntop");
    // A SIF without a root is still no image to run.
    exec(&env, &env.path("data.sif"), &[], &["true"]).fatal(&["no primary partition"]);
}

#[test]
fn paths_round_in_links_are_a_warning_or_an_error_of_their_own() {
    let env = Env::new();
    let tree = env.tree("tree");
    let _ = fs::remove_file(tree.join("etc/resolv.conf"));
    symlink("resolv.conf", tree.join("etc/resolv.conf")).unwrap();
    symlink("hello.txt/x", tree.join("opt/through")).unwrap();
    let image = env.sif(&tree, "image.sif");
    let data = marked(&env, "data");
    for root in [&image, &tree] {
        let out = exec(&env, root, &[], &["cat", "/opt/hello.txt"]);
        assert_eq!(out.ok(), "hello");
        assert!(
            out.stderr
                .contains("WARNING: Skipping mount /etc/resolv.conf"),
            "{out}"
        );
        for target in ["/etc/resolv.conf/x", "/opt/hello.txt/x", "/opt/through/x"] {
            let bind = format!("{}:{target}", data.display());
            exec(&env, root, &["-B", &bind], &["true"]).fatal(&[target]);
        }
    }
}

#[test]
fn removed_working_directory_is_a_warning() {
    let env = Env::new();
    let image = env.image();
    let gone = env.path("gone");
    fs::create_dir(&gone).unwrap();
    let home = common::home();
    for (options, wanted) in [
        ("", home.to_str().unwrap()),
        ("--pwd /tmp", "/tmp"),
        ("-c", home.to_str().unwrap()),
    ] {
        let line = format!(
            "cd {gone} && rmdir {gone} && mkdir -p {gone}.new; {} exec {options} {} pwd; status=$?; mv {gone}.new {gone}; exit $status",
            env!("CARGO_BIN_EXE_capsid"),
            image.display(),
            gone = gone.display(),
        );
        let out = output(&mut env.command_as(Path::new("sh"), ["-c", &line]));
        assert_eq!(out.ok(), wanted, "{options}");
        assert!(
            out.stderr
                .contains("WARNING: the working directory does not exist"),
            "{out}"
        );
    }
}

#[test]
fn relative_paths_of_a_removed_directory_lead_nowhere() {
    let env = Env::new();
    let image = env.image();
    let gone = env.path("gone");
    for options in [
        "-B .:/a",
        "-B ./x:/a",
        "-B tmp:/a",
        "-B ../:/a/b",
        "-H .:/h",
        "--overlay .",
        "--mount type=bind,source=etc,target=/a",
    ] {
        fs::create_dir(&gone).unwrap();
        let line = format!(
            "cd {gone} && rmdir {gone} && exec {} exec {options} {} ls /a",
            env!("CARGO_BIN_EXE_capsid"),
            image.display(),
            gone = gone.display(),
        );
        let out = output(&mut env.command_as(Path::new("sh"), ["-c", &line]));
        out.fatal(&["gone"]);
    }
}

#[test]
fn root_of_a_writable_layer_is_open_to_all_whatever_the_umask() {
    let env = Env::new();
    let image = env.image();
    fs::create_dir(env.work().join("ov")).unwrap();
    for layer in ["--writable-tmpfs", "--overlay ov", "--overlay ov"] {
        for umask in ["077", "777", "022"] {
            let line = format!(
                "umask {umask}; exec {} exec {layer} {} stat -c %a /",
                env!("CARGO_BIN_EXE_capsid"),
                image.display()
            );
            let out = output(&mut env.command_as(Path::new("sh"), ["-c", &line]));
            assert_eq!(out.ok(), "755", "{layer} {umask}");
        }
    }
}

#[test]
fn mount_points_are_made_in_shared_memory_too() {
    let env = Env::new();
    let image = env.image();
    let memory = tempfile::Builder::new()
        .prefix("capsid-test.")
        .tempdir_in("/dev/shm")
        .unwrap();
    let file = marked(&env, "one").join("one");
    let home = format!("{}:/h", memory.path().display());
    let bind = format!("{}:/h/made/in.txt", file.display());
    let out = exec(
        &env,
        &image,
        &["--home", &home, "-B", &bind],
        &["cat", "/h/made/in.txt"],
    );
    assert_eq!(out.ok(), "one");
    assert!(memory.path().join("made/in.txt").exists());
}

#[test]
fn options_of_mounts_are_read_as_the_peers_read_them() {
    let env = Env::new();
    let image = env.image();
    let (one, two) = (marked(&env, "one"), marked(&env, "two"));
    let image = image.to_str().unwrap();
    let with_variable = |value: &std::ffi::OsStr, words: &[&str]| {
        let words = ["exec"].iter().chain(words);
        output(env.command(words).env("APPTAINER_BIND", value))
    };
    // The typed ones come first.
    let bind = format!("{}:/a", one.display());
    let typed = format!("{}:/b", two.display());
    let out = with_variable(
        bind.as_ref(),
        &["-B", &typed, image, "sh", "-c", "echo $APPTAINER_BIND"],
    );
    assert_eq!(out.ok(), "/b,/a");
    let typed = format!("{}:/a", two.display());
    let out = with_variable(bind.as_ref(), &["-B", &typed, image, "cat", "/a/two"]);
    assert_eq!(out.ok(), "two");
    let both = format!(" {}:/a , {} : /q:ro ", one.display(), two.display());
    let out = with_variable(both.as_ref(), &[image, "cat", "/a/one", "/q/two"]);
    assert_eq!(out.ok(), "one\ntwo");
    let bytes: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"odd\xff");
    let odd = env.path("x").with_file_name(bytes);
    write(&odd.join("file"), "odd\n");
    let mut bind = odd.clone().into_os_string();
    bind.push(":/a");
    assert_eq!(with_variable(&bind, &[image, "cat", "/a/file"]).ok(), "odd");
    let words: [&std::ffi::OsStr; 7] = [
        "exec".as_ref(),
        "-B".as_ref(),
        &bind,
        "--env".as_ref(),
        "V=x".as_ref(),
        image.as_ref(),
        "cat".as_ref(),
    ];
    let words = words
        .iter()
        .map(|w| (*w).to_owned())
        .chain(["/a/file".into()]);
    assert_eq!(env.run(words).ok(), "odd");
    let mut value = std::ffi::OsString::from("--env=V=");
    value.push(bytes);
    let words: [&std::ffi::OsStr; 6] = [
        "exec".as_ref(),
        &value,
        image.as_ref(),
        "sh".as_ref(),
        "-c".as_ref(),
        "printf %s $V | wc -c".as_ref(),
    ];
    assert_eq!(env.run(words).ok(), "4");
    env.run(["exec", "-B", ":/data", image, "true"])
        .fatal(&["names no source"]);
    for servers in ["bad", "1.1.1.1,bad", "1.1.1", "host.example"] {
        env.run(["exec", "--dns", servers, image, "true"])
            .fatal(&["--dns", "not the address"]);
    }
    let out = env.run([
        "exec",
        "--dns",
        "192.0.2.1, 2001:db8::1,fe80::1%eth0",
        image,
        "cat",
        "/etc/resolv.conf",
    ]);
    assert_eq!(
        out.ok(),
        "nameserver 192.0.2.1\nnameserver 2001:db8::1\nnameserver fe80::1%eth0"
    );
    let mount = format!("source={},destination=/a", one.display());
    assert_eq!(
        env.run(["exec", "--mount", &mount, image, "cat", "/a/one"])
            .ok(),
        "one"
    );
}

#[test]
fn home_is_a_directory_that_exists() {
    let env = Env::new();
    let image = env.image();
    let data = marked(&env, "work/data");
    let _ = &data;
    let out = exec(
        &env,
        &image,
        &["-H", "data:/srv/h"],
        &["sh", "-c", "ls ~; echo $HOME"],
    );
    assert_eq!(out.ok(), "work\n/srv/h");
    exec(&env, &image, &["-H", "data"], &["true"]).fatal(&["data", "not an absolute path"]);
    exec(&env, &image, &["--home", "/nope"], &["true"]).fatal(&[
        "/nope",
        "--home",
        "doesn't exist",
    ]);
    exec(&env, &image, &["--home", "/etc/passwd:/h"], &["true"])
        .fatal(&["/etc/passwd", "not a directory"]);
}

#[test]
fn image_is_named_as_it_was_given() {
    let env = Env::new();
    let image = env.image();
    let tree = env.path("tree");
    fs::create_dir(env.path("other")).unwrap();
    symlink("../image.sif", env.path("other/lnk.sif")).unwrap();
    symlink(&tree, env.path("other/box")).unwrap();
    symlink("other", env.path("way")).unwrap();
    let names = |given: &str| {
        let words = [
            "exec",
            given,
            "sh",
            "-c",
            "echo $APPTAINER_NAME $SINGULARITY_CONTAINER",
        ];
        env.run(words).ok().to_owned()
    };
    let path = |name: &str| env.path(name).display().to_string();
    for (given, name, wanted) in [
        (path("other/lnk.sif"), "lnk.sif", path("other/lnk.sif")),
        (path("way/lnk.sif"), "lnk.sif", path("way/lnk.sif")),
        ("../other/lnk.sif".into(), "lnk.sif", path("other/lnk.sif")),
        (path("other/box/"), "box", path("other/box")),
        (path("way/../image.sif"), "image.sif", path("image.sif")),
        (path("image.sif"), "image.sif", path("image.sif")),
    ] {
        assert_eq!(names(&given), format!("{name} {wanted}"), "{given}");
    }
    let _ = image;
}

#[test]
fn working_directory_is_found_through_links_out_of_home() {
    let env = Env::new();
    let image = env.image();
    let tree = env.path("tree");
    let place = env.path("place/w");
    write(&place.join("mine"), "");
    let link = common::home().join(format!("capsid-test-{}", uuid::Uuid::new_v4()));
    symlink(env.path("place"), &link).unwrap();
    let cwd = link.join("w");
    let outputs: Vec<Output> = [&image, &tree]
        .iter()
        .flat_map(|root| [(root, "--no-mount=tmp"), (root, "--pid")])
        .map(|(root, option)| {
            let words = [
                "exec",
                option,
                root.to_str().unwrap(),
                "sh",
                "-c",
                "ls; touch made",
            ];
            output(env.command(words).current_dir(&cwd).env("PWD", &cwd))
        })
        .collect();
    fs::remove_file(&link).unwrap();
    for out in outputs {
        assert!(out.ok().starts_with("made") || out.ok() == "mine", "{out}");
        assert_eq!(out.stderr, "");
    }
    assert!(place.join("made").exists());
}

#[test]
fn many_mounts_need_no_higher_limit_of_open_files() {
    let env = Env::new();
    let image = env.image();
    let data = marked(&env, "data");
    let binds: String = (0..300)
        .map(|i| format!(" -B {}/data:/in/{i}/file.txt", data.display()))
        .collect();
    let line = |limit: &str| {
        format!(
            "ulimit {limit}; exec {} exec {} {} sh -c 'cat /in/*/file.txt | wc -l; ulimit -Sn'",
            env!("CARGO_BIN_EXE_capsid"),
            binds,
            image.display()
        )
    };
    let out = output(&mut env.command_as(Path::new("sh"), ["-c", &line("-Sn 128")]));
    assert_eq!(out.ok(), "300\n128", "the program has the caller's limit");
    let out = output(&mut env.command_as(Path::new("sh"), ["-c", &line("-n 200")]));
    out.fatal(&["the limit is 200", "ulimit"]);
}
