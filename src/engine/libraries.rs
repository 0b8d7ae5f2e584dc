//! Where the dynamic loader of the image looks for libraries, in its order. Libraries of the host are to come behind those:
//! the loader itself asks `LD_LIBRARY_PATH` before anything else.
//!
//! Source: `ld.so(8)`, `ldconfig(8)`. Of glibc only: other C libraries have other files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The loaders of glibc, by which it is known.
const LOADERS: [&str; 7] = [
    "lib64/ld-linux-x86-64.so.2",
    "lib/ld-linux-aarch64.so.1",
    "lib64/ld64.so.2",
    "lib/ld64.so.1",
    "lib/ld-linux-riscv64-lp64d.so.1",
    "lib/ld-linux-armhf.so.3",
    "lib/ld-linux.so.2",
];
/// Looked into without being named.
const TRUSTED: [&str; 4] = ["lib64", "usr/lib64", "lib", "usr/lib"];
const CONFIGURATION: &str = "etc/ld.so.conf";
/// Files that are read, at most, and bytes of each.
const MAX_FILES: usize = 256;
const MAX_BYTES: u64 = 64 << 10;

/// The directories, absolute within `root`; none where the C library is not glibc.
pub fn directories(root: &Path) -> Vec<PathBuf> {
    if !LOADERS.iter().any(|loader| root.join(loader).exists()) {
        return Vec::new();
    }
    let mut found = Found {
        root,
        directories: Vec::new(),
        seen: Vec::new(),
        files: Vec::new(),
    };
    found.read(Path::new(CONFIGURATION));
    let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
    for directory in ["lib", "usr/lib"] {
        found.add(&Path::new(directory).join(&triplet));
    }
    for directory in TRUSTED {
        found.add(Path::new(directory));
    }
    found.directories
}

struct Found<'a> {
    root: &'a Path,
    directories: Vec<PathBuf>,
    /// Device and inode of each.
    seen: Vec<(u64, u64)>,
    /// The same of the files that were read.
    files: Vec<(u64, u64)>,
}

impl Found<'_> {
    /// A directory, if it is there and was not found by another name. A colon would end it in the list.
    fn add(&mut self, path: &Path) {
        let Ok(meta) = fs::metadata(self.root.join(path)) else {
            return;
        };
        let id = (meta.dev(), meta.ino());
        if meta.is_dir() && !self.seen.contains(&id) && !path.to_string_lossy().contains(':') {
            self.seen.push(id);
            self.directories.push(Path::new("/").join(path));
        }
    }

    fn read(&mut self, file: &Path) {
        let path = self.root.join(file);
        let Ok(meta) = fs::metadata(&path) else {
            return;
        };
        let id = (meta.dev(), meta.ino());
        let known = self.files.contains(&id) || self.files.len() >= MAX_FILES;
        if known || !meta.is_file() || meta.len() > MAX_BYTES {
            return;
        }
        self.files.push(id);
        let text = fs::read(&path).unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                None | Some("hwcap") => {}
                Some("include") => words.for_each(|pattern| self.include(file, pattern)),
                Some(_) => {
                    let directory = line.split('=').next().unwrap_or_default().trim();
                    self.add(Path::new(directory.trim_start_matches('/')));
                }
            }
        }
    }

    /// The files that fit, in the order of their names; wildcards are known in the last part only.
    fn include(&mut self, from: &Path, pattern: &str) {
        let beside = from.parent().unwrap_or(Path::new(""));
        let pattern = match pattern.strip_prefix('/') {
            Some(absolute) => PathBuf::from(absolute),
            None => beside.join(pattern),
        };
        let directory = pattern.parent().unwrap_or(Path::new("")).to_owned();
        let Some(name) = pattern.file_name().and_then(|n| n.to_str()) else {
            return;
        };
        if !name.contains('*') {
            return self.read(&pattern);
        }
        let entries = fs::read_dir(self.root.join(&directory));
        let entries = entries.into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|n| fits(name, n)).take(MAX_FILES).collect();
        names.sort();
        for name in names {
            self.read(&directory.join(name));
        }
    }
}

/// Whether a name fits a pattern with `*`: the parts between the stars, in their order.
fn fits(pattern: &str, name: &str) -> bool {
    let (first, rest) = pattern.split_once('*').unwrap_or((pattern, ""));
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    let inner = name.strip_prefix(first).and_then(|n| n.strip_suffix(last));
    let Some(mut inner) = inner.filter(|_| !name.starts_with('.')) else {
        return false;
    };
    middle.split('*').all(|part| {
        let at = inner.find(part);
        at.map(|at| inner = &inner[at + part.len()..]).is_some()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_the_configuration_come_first() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for directory in ["opt/a", "opt/b", "usr/lib64", "usr/lib", "usr/local/lib"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        write(
            "etc/ld.so.conf",
            "include ld.so.conf.d/*.conf # all\n/opt/b\n",
        );
        write(
            "etc/ld.so.conf.d/2.conf",
            "/usr/local/lib\n/no/such\nhwcap 0 x\n",
        );
        write(
            "etc/ld.so.conf.d/1.conf",
            "/opt/a=libc6\ninclude /etc/ld.so.conf\n",
        );
        write("etc/ld.so.conf.d/readme", "/opt/never\n");
        assert!(directories(root).is_empty(), "no glibc");
        std::os::unix::fs::symlink("usr/lib64", root.join("lib64")).unwrap();
        write("usr/lib64/ld-linux-x86-64.so.2", "");
        let expected = ["/opt/a", "/usr/local/lib", "/opt/b", "/lib64", "/usr/lib"];
        assert_eq!(directories(root), expected.map(PathBuf::from));
    }

    #[test]
    fn names_fit_patterns() {
        for (pattern, name, does) in [
            ("*.conf", "a.conf", true),
            ("*.conf", ".conf", false),
            ("*.conf", "a.conf.d", false),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c", false),
            ("ab*ba", "aba", false),
            ("*", "x", true),
        ] {
            assert_eq!(fits(pattern, name), does, "{pattern} {name}");
        }
    }
}
