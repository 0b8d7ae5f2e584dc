//! What an image says about itself, and what a SIF holds.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Env, write};

#[test]
fn parts_are_shown_one_by_one() {
    let env = Env::new();
    let tree = env.tree("tree");
    write(
        &tree.join(".singularity.d/labels.json"),
        "{\"Version\": \"1\", \"Author\": \"ada\"}",
    );
    let sif = env.sif(&tree, "x.sif");
    for image in [&sif, &tree] {
        let image = image.to_str().unwrap();
        let show = |options: &[&str]| {
            env.run([&["inspect"], options, &[image]].concat())
                .ok()
                .to_owned()
        };
        assert_eq!(show(&[]), "Author: ada\nVersion: 1");
        assert_eq!(show(&["--labels"]), show(&[]));
        assert_eq!(
            show(&["-r"]),
            "#!/bin/sh\necho \"runscript args: $*\"\necho \"count: $#\"\nexit 3"
        );
        assert_eq!(show(&["--helpfile"]), "This is the help.");
        assert_eq!(show(&["--list-apps"]), "foo");
        assert_eq!(show(&["--app", "foo", "-H"]), "Help of foo.");
        let environment = show(&["-e"]);
        assert!(
            environment.starts_with("=== /.singularity.d/env/90-environment.sh ===\n#!/bin/sh")
        );
        assert!(environment.contains("export GREETING=\"hello from environment\""));
        let all: serde_json::Value = serde_json::from_str(&show(&["--all"])).unwrap();
        assert_eq!(all["type"], "container");
        let attributes = &all["data"]["attributes"];
        assert_eq!(attributes["labels"]["Author"], "ada");
        assert_eq!(attributes["apps"]["foo"]["helpfile"], "Help of foo.");
        assert_eq!(attributes["startscript"], serde_json::Value::Null);
    }
    env.run(["inspect", "/no/such.sif"])
        .fatal(&["Failed to open image /no/such.sif", "no such file"]);
    write(&tree.join(".singularity.d/labels.json"), "{");
    env.run(["inspect", tree.to_str().unwrap()])
        .fatal(&["labels.json", "damaged"]);
}

#[test]
fn objects_of_a_sif_are_listed_and_dumped() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    let list = env.run(["sif", "list", image]);
    let lines: Vec<&str> = list.ok().lines().collect();
    assert_eq!(
        lines[1],
        "ID   |GROUP   |LINK    |SIF POSITION (start-end)  |TYPE"
    );
    assert!(
        lines[3].starts_with("1    |1       |NONE    |32176-"),
        "{list}"
    );
    assert!(lines[3].ends_with("|Def.FILE"), "{list}");
    let arch = capsid::host::go_arch(std::env::consts::ARCH);
    assert!(
        lines[4].ends_with(&format!("|FS (Squashfs/*System/{arch})")),
        "{list}"
    );
    let json: serde_json::Value =
        serde_json::from_str(env.run(["sif", "list", "--json", image]).ok()).unwrap();
    assert_eq!(json[0]["kind"], "Def.FILE");
    assert_eq!(
        env.run(["sif", "dump", "1", image]).ok(),
        "bootstrap: scratch"
    );
    let header = env.run(["sif", "header", image]);
    assert!(
        header
            .ok()
            .contains("Created At:           2023-11-14 22:13:20 +0000 UTC"),
        "{header}"
    );
    let info = env.run(["sif", "info", "2", image]);
    assert!(info.ok().contains("  Partition Type:   *System"), "{info}");
    for (words, text) in [
        (&["info", "7", image][..], "object not found"),
        (&["list", "/etc/passwd"], "not a SIF"),
        (&["list", "/no/such"], "/no/such: No such file or directory"),
        (&["list"], "accepts 1 arg(s), received 0"),
    ] {
        let out = env.run([&["sif"], words].concat());
        assert!(out.status == 1 && out.stderr.contains(text), "{out}");
    }
}
