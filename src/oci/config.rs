//! How an OCI image is run, told in the language of Singularity images, as Singularity and Apptainer convert it: ENV becomes
//! `10-docker2singularity.sh`, ENTRYPOINT and CMD the runscript, labels stay labels. WORKDIR, USER, EXPOSE, VOLUME and
//! HEALTHCHECK have no part in it: a container runs as its caller, in the caller's directory.
//!
//! Three things are done better than there: values with quotes, `$` and backslashes arrive as they are (Apptainer escapes them
//! twice); an image without ENTRYPOINT and CMD starts a shell, or the caller's words (Apptainer prints the shell's variables);
//! and a first word that begins with `-` is no option of the shell's `set`.

use std::collections::BTreeMap;

use super::{Image, RunConfig};
use crate::metadir::{Contents, labels};

/// What the image that is made is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `docker`, `oci-archive`, …
    pub bootstrap: String,
    /// What was named: `alpine:3.20`, a path.
    pub from: String,
}

impl Origin {
    /// The definition that stands for "just this image".
    pub fn definition(&self) -> String {
        // Line ends in a file's name would begin other lines.
        let from = self.from.replace(['\n', '\r'], " ");
        format!("bootstrap: {}\nfrom: {from}\n\n", self.bootstrap)
    }
}

/// What the converted image says about itself; `time_s` is that of the conversion, in seconds since 1970.
pub fn metadata(image: &Image, origin: &Origin, time_s: i64) -> Contents {
    let none = RunConfig::default();
    let config = image.config.config.as_ref().unwrap_or(&none);
    Contents {
        definition: origin.definition(),
        oci_environment: environment(config),
        runscript: Some(runscript(config)),
        labels: all_labels(image, config, origin, time_s),
        ..Contents::default()
    }
}

/// The image's own labels, then ours: these describe the image that is being made.
fn all_labels(
    image: &Image,
    config: &RunConfig,
    origin: &Origin,
    time_s: i64,
) -> Vec<(String, String)> {
    let mut all: BTreeMap<String, String> = config.labels.clone().unwrap_or_default();
    let headers = [
        ("bootstrap", origin.bootstrap.as_str()),
        ("from", origin.from.as_str()),
    ];
    all.extend(labels::of_build(
        &image.config.architecture,
        time_s,
        &headers,
    ));
    let base = |name: &str| format!("org.opencontainers.image.base.{name}");
    all.insert(base("name"), origin.from.clone());
    all.insert(base("digest"), image.digest.to_string());
    all.into_iter().collect()
}

/// The text of `10-docker2singularity.sh`; `None` when nothing is set.
pub fn environment(config: &RunConfig) -> Option<String> {
    let mut text = String::from("#!/bin/sh\n");
    let mut is_empty = true;
    for (name, value) in config
        .env
        .iter()
        .flatten()
        .filter_map(|e| e.split_once('='))
    {
        if !is_name(name) {
            continue;
        }
        is_empty = false;
        text += &match (name, is_plain(value)) {
            ("PATH", true) => format!("export PATH=\"{value}\"\n"),
            ("PATH", false) => format!("export PATH={}\n", double(value)),
            (_, true) => format!("export {name}=\"${{{name}:-\"{value}\"}}\"\n"),
            // Quotes within `${…}` mean different things to different shells, and `'\''` is not understood by Apptainer's.
            (_, false) => format!(
                "if [ -z \"${{{name}:-}}\" ]; then {name}={}; fi\nexport {name}\n",
                double(value)
            ),
        };
    }
    (!is_empty).then_some(text)
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Nothing in it means anything to a shell within double quotes.
fn is_plain(value: &str) -> bool {
    !value.contains(['"', '\'', '\\', '$', '`', '}', '\n', '\r', '\0'])
}

/// In single quotes.
fn single(value: &str) -> String {
    format!("'{}'", value.replace('\0', "").replace('\'', r"'\''"))
}

/// In double quotes.
fn double(value: &str) -> String {
    let mut text = String::from("\"");
    for c in value.chars().filter(|c| *c != '\0') {
        if matches!(c, '"' | '\\' | '$' | '`') {
            text.push('\\');
        }
        text.push(c);
    }
    text + "\""
}

/// The text of the runscript.
pub fn runscript(config: &RunConfig) -> String {
    let none = Vec::new();
    let entrypoint = config.entrypoint.as_ref().unwrap_or(&none);
    let command = config.cmd.as_ref().unwrap_or(&none);
    let joined = |words: &[String], quote: fn(&str) -> String| {
        let quoted: Vec<String> = words.iter().map(|w| quote(w)).collect();
        quoted.join(" ")
    };
    let later = |words: &[String]| single(&joined(words, double));
    let text = include_str!("runscript.sh");
    let replacements = [
        ("@ENTRYPOINT@", later(entrypoint)),
        ("@CMD@", later(command)),
        ("@ENTRYPOINT_WORDS@", joined(entrypoint, single)),
        ("@CMD_WORDS@", joined(command, single)),
    ];
    // Words may look like the marks: each mark is looked for in the template only.
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('@') {
        out += &rest[..at];
        rest = &rest[at..];
        match replacements.iter().find(|(mark, _)| rest.starts_with(mark)) {
            Some((mark, with)) => {
                out += with;
                rest = &rest[mark.len()..];
            }
            None => {
                out.push('@');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn words(words: &[&str]) -> Option<Vec<String>> {
        Some(words.iter().map(|w| (*w).to_owned()).collect())
    }

    const VALUES: [&str; 7] = [
        "plain value",
        "it's \"q\" $HOME",
        "back\\slash `cmd` $(cmd)",
        "a}b{c}",
        "two\nlines",
        "  blanks  ",
        "ünï * ? [x]",
    ];

    #[test]
    fn values_arrive_as_they_are_in_each_shell() {
        let env = VALUES.iter().enumerate().map(|(i, v)| format!("V{i}={v}"));
        let config = RunConfig {
            env: Some(
                env.chain(["bad-name=x".into(), "PATH=/a b/$c:/bin".into()])
                    .collect(),
            ),
            ..RunConfig::default()
        };
        let text = environment(&config).unwrap();
        assert!(!text.contains("bad-name"));
        for shell in ["/bin/sh", "/bin/bash"] {
            let print: String = (0..VALUES.len())
                .map(|i| format!("printf '%s\\0' \"$V{i}\"\n"))
                .collect();
            let script = format!("{text}\n{print}\nprintf '%s\\0' \"$PATH\"");
            let output = Command::new(shell)
                .arg("-c")
                .arg(&script)
                .env("V0", "")
                .output();
            let output = String::from_utf8(output.unwrap().stdout).unwrap();
            let found: Vec<&str> = output.split_terminator('\0').collect();
            assert_eq!(found[..VALUES.len()], VALUES, "{shell}");
            assert_eq!(found[VALUES.len()], "/a b/$c:/bin");
            let script = format!("{text}\nprintf %s \"$V0$V1\"");
            let output = Command::new(shell)
                .arg("-c")
                .arg(&script)
                .envs([("V0", "mine"), ("V1", "too")])
                .output();
            assert_eq!(
                output.unwrap().stdout,
                b"minetoo",
                "what is set stays: {shell}"
            );
        }
    }

    /// What the runscript executes, with `printf '[%s]'` as the program.
    fn run(entrypoint: &[&str], command: &[&str], args: &[&str], no_eval: &str) -> String {
        let config = RunConfig {
            entrypoint: words(entrypoint),
            cmd: words(command),
            ..RunConfig::default()
        };
        let output = Command::new("/bin/sh")
            .arg("-c")
            .arg(runscript(&config))
            .arg("runscript")
            .args(args)
            .env("SINGULARITY_NO_EVAL", no_eval)
            .env("WORD", "word")
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    const PRINT: [&str; 2] = ["printf", "[%s]"];

    #[test]
    fn words_of_the_image_are_never_evaluated() {
        for no_eval in ["", "1"] {
            for word in VALUES.iter().chain(&["@CMD@", "-x", ""]) {
                assert_eq!(run(&PRINT, &[word], &[], no_eval), format!("[{word}]"));
                let all = [PRINT[0], PRINT[1], word];
                assert_eq!(run(&[], &all, &[], no_eval), format!("[{word}]"));
                assert_eq!(run(&all, &[], &[], no_eval), format!("[{word}]"));
            }
        }
    }

    #[test]
    fn arguments_take_the_place_of_the_command() {
        for no_eval in ["", "1"] {
            assert_eq!(run(&PRINT, &["cmd"], &["a b", "c"], no_eval), "[a b][c]");
            assert_eq!(run(&[], &["false"], &["echo", "x"], no_eval), "x\n");
            assert_eq!(run(&[], &[], &["echo", "x"], no_eval), "x\n");
        }
        assert_eq!(run(&PRINT, &[], &["$WORD"], ""), "[word]");
        assert_eq!(run(&PRINT, &[], &["$WORD"], "1"), "[$WORD]");
    }

    #[test]
    fn definition_stays_two_lines() {
        let origin = Origin {
            bootstrap: "docker".into(),
            from: "alpine:3.20\n%post\n    evil".into(),
        };
        assert_eq!(
            origin.definition(),
            "bootstrap: docker\nfrom: alpine:3.20 %post     evil\n\n"
        );
    }
}
