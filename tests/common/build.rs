//! A place where images are built.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::*;

/// A place with a base image, a cache and a directory for temporary files of its own.
pub struct Site {
    /// Its directories.
    pub env: Env,
}

impl Site {
    /// With `base.sif` in the working directory.
    pub fn new() -> Site {
        let env = Env::new();
        let tree = env.tree("tree");
        let base = env.sif(&tree, "base.sif");
        fs::create_dir_all(env.path("tmp")).unwrap();
        fs::copy(base, env.work().join("base.sif")).unwrap();
        Site { env }
    }

    /// `build` with these words.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.env.command(["build"].iter().chain(words));
        command
            .env("APPTAINER_CACHEDIR", self.env.path("cache"))
            .env("APPTAINER_TMPDIR", self.env.path("tmp"));
        command
    }

    /// Writes `x.def` behind the usual header, and builds it.
    pub fn build(&self, body: &str, words: &[&str]) -> Output {
        self.define(body);
        let words: Vec<&str> = words.iter().copied().chain(["x.sif", "x.def"]).collect();
        output(&mut self.command(&words))
    }

    /// Writes `x.def` behind the usual header.
    pub fn define(&self, body: &str) {
        self.write(
            "x.def",
            &format!("Bootstrap: localimage\nFrom: base.sif\n{body}"),
        );
    }

    /// Writes a file of the working directory.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.env.work().join(name);
        write(&path, text);
        path
    }

    /// Runs words in `x.sif`.
    pub fn exec(&self, words: &[&str]) -> Output {
        let words = ["exec", "x.sif"].iter().chain(words);
        self.env.run(words)
    }

    /// Whether the working directory has the name.
    pub fn has(&self, name: &str) -> bool {
        self.env.work().join(name).symlink_metadata().is_ok()
    }

    /// No temporary directory, and no hidden file beside the target.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let names = |path: PathBuf| -> Vec<String> {
            fs::read_dir(path)
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        assert_eq!(names(self.env.path("tmp")), [""; 0]);
        let hidden: Vec<String> = names(self.env.work())
            .into_iter()
            .filter(|n| n.starts_with('.'))
            .collect();
        assert_eq!(hidden, [""; 0]);
    }
}
