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
