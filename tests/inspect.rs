//! What an image says about itself.
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
