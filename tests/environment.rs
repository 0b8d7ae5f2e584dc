//! Where the variables inside come from, and who wins.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Env, output, script, write};

/// Value of a variable inside, with these options and host variables.
fn value(
    env: &Env,
    image: &str,
    options: &[&str],
    host: &[(&str, &str)],
    name: &str,
) -> Option<String> {
    let mut command = env.command(["exec"].iter().chain(options).chain(&[image, "env"]));
    let out = output(command.envs(host.iter().copied()));
    let prefix = format!("{name}=");
    out.ok()
        .lines()
        .find_map(|l| l.strip_prefix(&prefix))
        .map(str::to_owned)
}

#[test]
fn image_beats_host_and_options_beat_the_image() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let get = |options: &[&str], host: &[(&str, &str)], name: &str| {
        value(&env, image, options, host, name)
    };
    assert_eq!(
        get(&[], &[], "GREETING").as_deref(),
        Some("hello from environment")
    );
    assert_eq!(
        get(&[], &[("GREETING", "host")], "GREETING").as_deref(),
        Some("hello from environment")
    );
    assert_eq!(
        get(&[], &[("KEPT", "host")], "KEPT").as_deref(),
        Some("default"),
        "scripts do not see the host's"
    );
    assert_eq!(
        get(&["--cleanenv"], &[("KEPT", "host")], "KEPT").as_deref(),
        Some("default")
    );
    assert_eq!(
        get(&[], &[("OTHER", "x y")], "OTHER").as_deref(),
        Some("x y")
    );
    assert_eq!(get(&["-e"], &[("OTHER", "x")], "OTHER"), None);
    for prefix in ["APPTAINERENV_", "SINGULARITYENV_"] {
        assert_eq!(
            get(
                &[],
                &[(&format!("{prefix}GREETING"), "prefixed")],
                "GREETING"
            )
            .as_deref(),
            Some("prefixed")
        );
        assert_eq!(
            get(
                &["-e"],
                &[(&format!("{prefix}GREETING"), "prefixed")],
                "GREETING"
            )
            .as_deref(),
            Some("prefixed")
        );
    }
    assert_eq!(
        get(
            &["--env", "GREETING=option"],
            &[("APPTAINERENV_GREETING", "prefixed")],
            "GREETING"
        )
        .as_deref(),
        Some("option")
    );
    assert_eq!(
        get(&["--no-env", "OTHER"], &[("OTHER", "x")], "OTHER"),
        None
    );
    write(
        &env.path("file.env"),
        "# comment\nA=one\nexport B=\"two words\"\nC=$HOSTVAR\n",
    );
    let file = env.path("file.env");
    let file = ["--env-file", file.to_str().unwrap()];
    assert_eq!(get(&file, &[], "A").as_deref(), Some("one"));
    assert_eq!(get(&file, &[], "B").as_deref(), Some("two words"));
    assert_eq!(
        get(&file, &[("HOSTVAR", "from the host")], "C").as_deref(),
        Some("from the host")
    );
}

#[test]
fn path_is_the_containers() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let get = |options: &[&str], host: &[(&str, &str)]| {
        value(&env, image, options, host, "PATH").unwrap()
    };
    assert_eq!(get(&[], &[]), format!("/opt/bin:{default}"));
    assert_eq!(
        get(&[], &[("APPTAINERENV_APPEND_PATH", "/after")]),
        format!("/opt/bin:{default}:/after")
    );
    assert_eq!(
        get(&[], &[("APPTAINERENV_PREPEND_PATH", "/before")]),
        format!("/before:/opt/bin:{default}")
    );
    assert_eq!(
        get(&[], &[("APPTAINERENV_PATH", "/bin:/only")]),
        "/bin:/only"
    );
    assert_eq!(
        value(&env, image, &[], &[], "USER_PATH").as_deref(),
        Some(
            "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/bin:/usr/bin:/sbin:/usr/sbin:/usr/local/bin:/usr/local/sbin"
        )
    );
    assert_eq!(
        value(
            &env,
            image,
            &[],
            &[("LD_LIBRARY_PATH", "/host")],
            "LD_LIBRARY_PATH"
        )
        .as_deref(),
        Some("/.singularity.d/libs")
    );
}

#[test]
fn container_is_told_about_itself() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let get = |name: &str| value(&env, image, &[], &[], name);
    assert_eq!(get("APPTAINER_CONTAINER").as_deref(), Some(image));
    assert_eq!(get("SINGULARITY_CONTAINER").as_deref(), Some(image));
    assert_eq!(get("APPTAINER_NAME").as_deref(), Some("image.sif"));
    assert_eq!(get("APPTAINER_COMMAND").as_deref(), Some("exec"));
    assert_eq!(get("HOME").as_deref(), common::home().to_str());
    assert_eq!(get("PS1").as_deref(), Some("Apptainer> "));
}

#[test]
fn scripts_that_need_a_shell_are_run_by_the_images_own() {
    let env = Env::new();
    let tree = env.tree("tree");
    let lines = [
        "export COUNTED=$(echo a b c | wc -w)",
        "case \"$(uname -s)\" in Linux) export SYSTEM=linux;; esac",
        "f() { export FROM_FUNCTION=\"$1\"; }; f yes",
        "export LAST=${GREETING%% *}",
    ];
    script(
        &tree.join(".singularity.d/env/91-environment.sh"),
        &format!("#!/bin/sh\n{}\n", lines.join("\n")),
    );
    let image = env.sif(&tree, "image.sif");
    let image = image.to_str().unwrap();
    let get = |name: &str, options: &[&str]| value(&env, image, options, &[], name);
    assert_eq!(get("COUNTED", &[]).as_deref().map(str::trim), Some("3"));
    assert_eq!(get("SYSTEM", &[]).as_deref(), Some("linux"));
    assert_eq!(get("FROM_FUNCTION", &[]).as_deref(), Some("yes"));
    assert_eq!(get("LAST", &[]).as_deref(), Some("hello"));
    assert_eq!(
        get("LAST", &["--env", "LAST=it's \"$HOME\""]).as_deref(),
        Some(&*format!("it's \"{}\"", common::home().display()))
    );
    assert_eq!(
        get("LAST", &["--no-eval", "--env", "LAST=it's \"$HOME\""]).as_deref(),
        Some("it's \"$HOME\"")
    );
}

#[test]
fn scripts_in_error_are_told_and_the_run_goes_on() {
    let env = Env::new();
    let tree = env.tree("tree");
    let image = |name: &str, line: &str| {
        let text = format!("#!/bin/sh\nexport FIRST=1\n{line}\nexport LAST=1\n");
        script(&tree.join(".singularity.d/env/91-environment.sh"), &text);
        env.sif(&tree, name)
    };
    let run = |image: &std::path::Path, options: &[&str]| {
        let words = ["exec"].iter().chain(options).copied();
        env.run(words.chain([image.to_str().unwrap(), "/bin/env"]))
    };
    // What only bash knows is known here, with no bash in the image.
    for (n, line) in [
        "LIST=(a 'b c'); export X=${LIST[1]}",
        "X=b; X+=' c'; export X",
        "[[ -n $HOME && $HOME == /* ]] && export X='b c'",
        "Y='a c'; export X=${Y/a/b}",
    ]
    .iter()
    .enumerate()
    {
        let out = run(&image(&format!("bash{n}.sif"), line), &[]);
        assert!(
            out.ok().contains("X=b c\n") && out.stdout.contains("LAST=1"),
            "{line}: {out}"
        );
        assert_eq!(out.stderr, "", "{line}");
    }
    // What is wrong to all shells, and what busybox does not know.
    for (n, line) in [
        "if then fi",
        "export 1x=2",
        "A=([k]=v",
        "readonly HOME; HOME=x",
    ]
    .iter()
    .enumerate()
    {
        let image = image(&format!("bad{n}.sif"), line);
        for options in [&[][..], &["-p"], &["--env", "GREETING=mine"]] {
            let out = run(&image, options);
            assert!(out.ok().contains("FIRST=1\n"), "{line}: {out}");
            assert_ne!(out.stderr, "", "{line}: it is told");
            if !options.is_empty() && options[0] == "--env" {
                assert!(out.stdout.contains("GREETING=mine\n"), "{line}: {out}");
            }
        }
    }
    // Without any shell, a script that needs one is left out, and that is told.
    let bare = env.path("bare");
    std::fs::create_dir_all(bare.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", bare.join("bin/env")).unwrap();
    let env_d = bare.join(".singularity.d/env");
    script(&env_d.join("10-one.sh"), "export ONE=1\n");
    script(
        &env_d.join("20-two.sh"),
        "export TWO=1\nexport NOW=$(date)\n",
    );
    script(&env_d.join("30-three.sh"), "export THREE=1\n");
    let out = run(&env.sif(&bare, "bare.sif"), &[]);
    let has = |line: &str| out.stdout.lines().any(|l| l == line);
    out.ok();
    assert!(has("ONE=1") && has("THREE=1") && !has("TWO=1"), "{out}");
    assert!(
        out.stderr.contains("WARNING: ") && out.stderr.contains("20-two.sh"),
        "{out}"
    );
    // A file of the caller's may have what bash has.
    write(
        &env.path("a.env"),
        "LIST=(a b)\nexport B=${LIST[1]}\nC+=c\n",
    );
    let file = env.path("a.env");
    let out = run(
        &env.path("bare.sif"),
        &["--env-file", file.to_str().unwrap()],
    );
    assert!(
        out.ok().contains("B=b\n") && out.stdout.contains("C=c\n"),
        "{out}"
    );
}

#[test]
fn variables_of_the_caller_are_in_no_command_line() {
    let env = Env::new();
    let tree = env.tree("tree");
    let text = "#!/bin/sh\nexport SEEN=\"$(tr '\\0' ' ' </proc/$$/cmdline)\"\n";
    script(&tree.join(".singularity.d/env/91-environment.sh"), text);
    let image = env.sif(&tree, "image.sif");
    let mut command = env.command(["exec", image.to_str().unwrap(), "env"]);
    let out = output(
        command
            .env("GITHUB_TOKEN", "s3cret")
            .env("APPTAINERENV_KEY", "s3cr3t"),
    );
    let seen = out.ok().lines().find(|l| l.starts_with("SEEN=")).unwrap();
    assert!(seen.contains("CAPSID_SCRIPT"), "{out}");
    assert!(
        !seen.contains("s3cret") && !seen.contains("s3cr3t"),
        "{out}"
    );
    assert!(out.stdout.contains("GITHUB_TOKEN=s3cret\n"), "{out}");
    assert!(!out.stdout.contains("\nCAPSID_SCRIPT="), "{out}");
}

#[test]
fn exported_functions_come_along() {
    let env = Env::new();
    let tree = env.tree("tree");
    common::add_programs(&tree, &["/bin/bash"]);
    let image = env.sif(&tree, "image.sif");
    script(
        &tree.join(".singularity.d/env/91-environment.sh"),
        "#!/bin/sh\nexport NOW=$(date)\n",
    );
    let other = env.sif(&tree, "other.sif");
    for image in [image, other] {
        let run = |options: &[&str]| {
            let words = ["exec"].iter().chain(options).copied();
            let image = image.to_str().unwrap();
            let words = words.chain([image, "/bin/bash", "-c", "f 'a b'; echo $?"]);
            output(
                env.command(words)
                    .env("BASH_FUNC_f%%", "() {  echo \"fn $1\"\n}"),
            )
        };
        assert_eq!(run(&[]).ok(), "fn a b\n0", "{}", image.display());
        assert_eq!(run(&["--cleanenv"]).ok(), "127");
        assert_eq!(run(&["--no-env", "BASH_FUNC_f%%"]).ok(), "127");
    }
}

#[test]
fn libraries_of_the_image_come_before_those_of_the_host() {
    let env = Env::new();
    let tree = env.tree("tree");
    let libs = |image: &std::path::Path, options: &[&str], host: &[(&str, &str)]| {
        let image = image.to_str().unwrap();
        value(&env, image, options, host, "LD_LIBRARY_PATH").unwrap_or_default()
    };
    let plain = env.sif(&tree, "plain.sif");
    for (path, text) in [
        ("lib64/ld-linux-x86-64.so.2", ""),
        ("usr/lib64/libx.so", ""),
        ("etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n"),
        ("etc/ld.so.conf.d/local.conf", "/usr/local/lib\n"),
        ("usr/local/lib/liby.so", ""),
    ] {
        write(&tree.join(path), text);
    }
    let glibc = env.sif(&tree, "glibc.sif");
    script(
        &tree.join(".singularity.d/env/91-environment.sh"),
        "#!/bin/sh\nexport NOW=$(date)\n",
    );
    let shell = env.sif(&tree, "shell.sif");
    let host = env.path("host");
    write(&host.join("libcuda.so.1"), "");
    let bind = format!("{}:/.singularity.d/libs", host.display());
    let bind = ["-B", &*bind];
    let own = "/usr/local/lib:/lib64:/usr/lib64:/.singularity.d/libs";
    for image in [&glibc, &shell] {
        assert_eq!(
            libs(image, &[], &[]),
            "/.singularity.d/libs",
            "nothing of the host"
        );
        assert_eq!(libs(image, &bind, &[]), own);
        let pre = ("APPTAINERENV_PREPEND_LD_LIBRARY_PATH", "/pre");
        let app = ("APPTAINERENV_APPEND_LD_LIBRARY_PATH", "/app");
        assert_eq!(libs(image, &[], &[pre, app]), format!("/pre:{own}:/app"));
        let all = ("APPTAINERENV_LD_LIBRARY_PATH", "/mine");
        assert_eq!(libs(image, &bind, &[all]), "/mine:/.singularity.d/libs");
        let none = ("APPTAINERENV_LD_LIBRARY_PATH", "");
        assert_eq!(libs(image, &bind, &[none]), "");
        assert_eq!(libs(image, &[], &[none, pre]), "");
    }
    assert_eq!(
        libs(&plain, &bind, &[]),
        "/.singularity.d/libs",
        "another C library"
    );
}

#[test]
fn exported_functions_and_odd_names_of_the_host_do_no_harm() {
    let env = Env::new();
    let image = env.image();
    let mut command = env.command(["exec", image.to_str().unwrap(), "env"]);
    let out = output(
        command
            .env("BASH_FUNC_module%%", "() {  eval `x`\n}")
            .env("a.b", "dotted"),
    );
    assert!(
        out.ok().contains("GREETING=hello from environment"),
        "{out}"
    );
}

#[test]
fn environment_file_that_is_missing_or_broken_is_named() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    env.run(["exec", "--env-file", "/no/such.env", image, "true"])
        .fatal(&["/no/such.env", "--env-file"]);
    write(&env.path("bad.env"), "A='unfinished\n");
    env.run([
        "exec",
        "--env-file",
        env.path("bad.env").to_str().unwrap(),
        image,
        "true",
    ])
    .fatal(&["bad.env"]);
}

#[test]
fn switch_that_is_denied_beats_the_environment() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let run = |options: &[&str]| {
        let words = ["--explain", "exec"].iter().chain(options).copied();
        let mut command = env.command(words.chain([image, "true"]));
        let out = common::output(command.env("APPTAINER_PID", "1"));
        out.ok().contains("enter    user, mount, pid")
    };
    assert!(run(&[]));
    assert!(!run(&["--pid=false"]));
    assert!(!run(&["-p", "--pid", "--pid=0"]), "the last one counts");
    assert!(run(&["--pid=false", "--pid"]), "the last one counts");
}
