//! Who may use whom. The arrows here are the architecture; a new one is a decision, made in this list.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

/// Each module of the program, and the modules that it may use.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "cmd",
        &[
            "build", "cache", "digest", "durable", "engine", "exit", "given", "gpu", "host",
            "image", "instance", "job", "metadir", "net", "oci", "plan", "proc", "say", "sif",
            "squash", "threads",
        ],
    ),
    (
        "build",
        &[
            "cache", "digest", "durable", "engine", "exit", "given", "host", "image", "instance",
            "metadir", "net", "oci", "plan", "proc", "progress", "say", "sif", "squash", "threads",
        ],
    ),
    (
        "oci",
        &[
            "digest", "given", "metadir", "progress", "say", "squash", "threads",
        ],
    ),
    // Images of registries are OCI images; the file that a cache's claim names is a process's.
    // What it brings, and what the cache has of it, must be an image.
    (
        "net",
        &[
            "cache", "digest", "given", "image", "oci", "progress", "say", "threads",
        ],
    ),
    (
        "cache",
        &["digest", "durable", "filesystem", "proc", "say", "threads"],
    ),
    ("squash", &["progress", "say", "threads"]),
    ("digest", &[]),
    ("durable", &[]),
    ("given", &[]),
    ("threads", &[]),
    ("plan", &["host", "image", "metadir", "proc", "shell"]),
    (
        "engine",
        &[
            "exit",
            "filesystem",
            "image",
            "metadir",
            "plan",
            "proc",
            "say",
            "shell",
            "threads",
        ],
    ),
    // An instance's monitor starts its container.
    (
        "instance",
        &["digest", "engine", "exit", "host", "plan", "proc", "say"],
    ),
    // The supervisor of a job starts processes that become `capsid instance start`; it looks into no image.
    (
        "job",
        &[
            "engine", "exit", "given", "host", "instance", "plan", "proc", "say",
        ],
    ),
    ("image", &["given", "metadir", "say", "sif"]),
    ("filesystem", &[]),
    ("gpu", &[]),
    ("host", &[]),
    ("metadir", &[]),
    ("proc", &[]),
    ("progress", &["say"]),
    ("say", &[]),
    ("shell", &[]),
    ("sif", &["given"]),
    ("exit", &[]),
];

/// Where nothing may touch the machine.
const PURE: &[&str] = &["plan", "shell"];
/// The same for parts of modules.
const PURE_PARTS: &[&str] = &["/build/deffile/"];
const EFFECTS: &[&str] = &[
    "std::fs",
    "std::env",
    "std::process",
    // A length of time is a number; asking what time it is is not.
    "Instant",
    "SystemTime",
    " nix::",
    " libc::",
    " rustix::",
];

fn sources(path: &Path, found: &mut Vec<(String, String)>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("src").flatten() {
            sources(&entry.path(), found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        let text = fs::read_to_string(path).expect("a source file");
        // Tests may use what they like, and documentation may speak of everything.
        let code = text
            .split(
                "#[cfg(test)]
mod tests {",
            )
            .next()
            .unwrap_or_default();
        let lines = code.lines().filter(|l| !l.trim_start().starts_with("//"));
        let code: String = lines
            .flat_map(|l| {
                [
                    l, "
",
                ]
            })
            .collect();
        found.push((path.display().to_string(), code));
    }
}

fn each(check: &mut dyn FnMut(&str, &str, &str)) {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (module, _) in ARROWS {
        let mut found = Vec::new();
        let directory = src.join(module);
        sources(
            &if directory.is_dir() {
                directory
            } else {
                src.join(format!("{module}.rs"))
            },
            &mut found,
        );
        assert!(!found.is_empty(), "no module {module}");
        for (path, code) in found
            .iter()
            .filter(|(path, _)| !path.ends_with("/tests.rs"))
        {
            check(module, path, code);
        }
    }
}

#[test]
fn modules_use_only_what_they_may() {
    each(&mut |module, path, code| {
        let allowed = ARROWS.iter().find(|(m, _)| *m == module).expect("listed").1;
        for (at, _) in code.match_indices("crate::") {
            let name: String = code[at + 7..]
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            let known = ARROWS.iter().any(|(m, _)| *m == name);
            assert!(
                !known || name == module || allowed.contains(&name.as_str()),
                "{path} uses crate::{name}"
            );
        }
    });
}

#[test]
fn planning_touches_nothing() {
    each(&mut |module, path, code| {
        if PURE.contains(&module) || PURE_PARTS.iter().any(|part| path.contains(part)) {
            for effect in EFFECTS {
                assert!(!code.contains(effect), "{path} uses {effect}");
            }
        }
    });
}

#[test]
fn unsafe_code_is_in_one_place() {
    each(&mut |_, path, code| {
        let excused = path.contains("/engine/sys/");
        assert!(
            excused || !code.contains("unsafe {"),
            "{path} has unsafe code"
        );
    });
}

#[test]
fn results_are_printed_in_one_place() {
    each(&mut |_, file, code| {
        for word in code.split_whitespace() {
            let bare = word.contains("print!(") || word.contains("println!(");
            let stderr = word.contains("eprint");
            assert!(
                !bare || stderr,
                "{file}: {word}: use say::out, which tells of a full disk"
            );
        }
    });
}

/// The parts of the engine that make a container's file tree.
const CONTAINER: [&str; 6] = ["dev", "overlay", "points", "rootfs", "session", "targets"];

#[test]
fn host_is_opened_before_anything_lies_over_it() {
    each(&mut |_, path, code| {
        if CONTAINER
            .iter()
            .any(|part| path.ends_with(&format!("engine/{part}.rs")))
        {
            for word in [
                "CWD",
                "open_path(",
                "File::open(",
                "fs::stat(",
                "fs::metadata(",
                "fs::read(",
                "fs::read_dir(",
                "fs::create_dir",
                "canonicalize(",
            ] {
                assert!(
                    !code.contains(word),
                    "{path} uses {word}: paths of the host belong to sources.rs"
                );
            }
        }
    });
}
