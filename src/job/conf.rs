//! Slurm's configuration, read as Slurm reads it: bytes, with the files that it includes, the last word counting.
//!
//! Source: `slurm.conf(5)`; `_parse_next_key`, `_strip_comments` and `_parse_include_file` of Slurm's `parse_config.c`.
//! `scontrol show config` would know as well, but each asks the controller, which thousands of Prolog at once must not:
//! it is asked where there is no file that can be read.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::proc::Held;

/// Where the file is when nobody says so; the second is of nodes that fetch it from the controller.
const USUAL: [&str; 2] = ["/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf"];
/// Files within files at most.
const MAX_DEPTH: usize = 16;
/// How long `scontrol` may take.
const ASKING: Duration = Duration::from_secs(4);

/// Slurm's configuration: keys in small letters, and their values, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Conf(Vec<(String, Vec<u8>)>);

impl Conf {
    /// Reads it from the file that is named, else from where it usually is, else from the controller.
    ///
    /// # Errors
    /// When none of these can be read.
    pub fn read(slurm_conf: Option<&Path>) -> Result<Conf> {
        let usual = USUAL.iter().map(Path::new);
        let mut first = None;
        for path in slurm_conf.into_iter().chain(usual) {
            let mut conf = Conf::default();
            match conf.add_file(path, path.parent().unwrap_or(Path::new("/")), 0) {
                Ok(()) => return Ok(conf),
                Err(error) => first = first.or(Some(error)),
            }
        }
        let mut conf = Conf::default();
        match ask() {
            Ok(text) => conf.add(&text, Path::new("/"), MAX_DEPTH)?,
            Err(error) => {
                let first = first.map_or(String::new(), |error| format!("{error:#}; "));
                bail!("{first}{error:#}")
            }
        }
        Ok(conf)
    }

    /// What a text says that includes nothing.
    #[cfg(test)]
    pub(super) fn of(text: &[u8]) -> Result<Conf> {
        let mut conf = Conf::default();
        conf.add(text, Path::new("/nowhere"), 0).map(|()| conf)
    }

    /// The last value of the first of these keys that there is, in small letters; `None` for what `scontrol` calls `(null)`.
    pub fn get(&self, keys: &[&str]) -> Option<String> {
        let value = keys.iter().find_map(|key| {
            let mut found = self.0.iter().rev();
            found.find(|(k, _)| k.eq_ignore_ascii_case(key))
        });
        let value = String::from_utf8_lossy(&value?.1).to_ascii_lowercase();
        (!value.is_empty() && value != "(null)").then_some(value)
    }

    fn add_file(&mut self, path: &Path, directory: &Path, depth: usize) -> Result<()> {
        let what = || format!("cannot read {}", path.display());
        let text = std::fs::read(path).with_context(what)?;
        self.add(&text, directory, depth)
    }

    /// Included files are named from the directory of the first one.
    fn add(&mut self, text: &[u8], directory: &Path, depth: usize) -> Result<()> {
        for line in lines(text) {
            match included(&line) {
                Some(_) if depth >= MAX_DEPTH => {
                    bail!("files of Slurm's configuration include each other")
                }
                Some(name) => {
                    let file = directory.join(self.named(name));
                    self.add_file(&file, directory, depth + 1)?;
                }
                None => self.0.extend(pairs(&line)),
            }
        }
        Ok(())
    }

    /// The name of an included file, where `%c` stands for the cluster's.
    fn named(&self, name: &[u8]) -> PathBuf {
        let cluster = self.get(&["ClusterName"]).unwrap_or_default();
        let mut out = Vec::new();
        let mut rest = name;
        while let Some((byte, behind)) = rest.split_first() {
            if let Some(after) = rest.strip_prefix(b"%c") {
                out.extend(cluster.as_bytes());
                rest = after;
            } else {
                out.push(*byte);
                rest = behind;
            }
        }
        OsStr::from_bytes(&out).into()
    }
}

/// Lines without comments; one that ends with a backslash goes on in the next.
fn lines(text: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut line = Vec::new();
    for part in text.split(|b| *b == b'\n') {
        let part = part.strip_suffix(b"\r").unwrap_or(part);
        if let Some(part) = part.strip_suffix(b"\\") {
            line.extend(part);
            continue;
        }
        line.extend(part);
        all.push(uncommented(&std::mem::take(&mut line)));
    }
    all.push(uncommented(&line));
    all
}

/// What stands before the first `#` that no backslash is in front of.
fn uncommented(line: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut escaped = false;
    for byte in line {
        match byte {
            b'#' if !escaped => break,
            b'#' => {
                out.pop();
            }
            _ => {}
        }
        escaped = *byte == b'\\' && !escaped;
        out.push(*byte);
    }
    out
}

/// The file that a line includes.
fn included(line: &[u8]) -> Option<&[u8]> {
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|w| !w.is_empty());
    let is_include = words.next()?.eq_ignore_ascii_case(b"include");
    words.next().filter(|_| is_include)
}

/// `KEY=VALUE`, several in a line, with blanks around the sign; a value with blanks is in quotes. `+=` and the like add to
/// a value; of those that matter here there is only one.
fn pairs(line: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(at) = rest.iter().position(|b| *b == b'=') {
        let (before, behind) = (&rest[..at], rest[at + 1..].trim_ascii_start());
        let before = before.trim_ascii_end();
        let before = before
            .strip_suffix(b"+")
            .or_else(|| before.strip_suffix(b"-"))
            .unwrap_or(before);
        let key = before.trim_ascii_end();
        let key = key
            .rsplit(|b| !(b.is_ascii_alphanumeric() || *b == b'_' || *b == b'.'))
            .next();
        let (value, after) = match behind.strip_prefix(b"\"") {
            Some(quoted) => split_at(quoted, |b| *b == b'"'),
            None => split_at(behind, u8::is_ascii_whitespace),
        };
        if let Some(key) = key.filter(|key| !key.is_empty()) {
            let key = String::from_utf8_lossy(key).to_ascii_lowercase();
            found.push((key, value.to_vec()));
        }
        rest = after;
    }
    found
}

/// What comes before the first byte of a kind, and what comes behind it.
fn split_at(text: &[u8], at: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    match text.iter().position(at) {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &[]),
    }
}

/// What the controller says.
fn ask() -> Result<Vec<u8>> {
    use std::io::Read as _;
    let (pipe, theirs) = std::io::pipe().context("cannot create a pipe")?;
    let mut command = Command::new("scontrol");
    command
        .args(["show", "config"])
        .env("PATH", super::root::PATH)
        .stdin(Stdio::null())
        .stdout(theirs)
        .stderr(Stdio::null());
    let mut child = command.spawn().context("cannot start scontrol")?;
    drop(command);
    let held = i32::try_from(child.id()).ok().and_then(Held::child);
    // It says less than a pipe holds.
    if held.is_none_or(|held| !held.wait(ASKING)) {
        let _ = child.kill();
        bail!("scontrol show config does not answer");
    }
    let status = child.wait().context("scontrol")?;
    if !status.success() {
        bail!("scontrol show config ended with {status}");
    }
    let mut text = Vec::new();
    let mut pipe = pipe;
    pipe.read_to_end(&mut text).context("scontrol's output")?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &[u8]) -> Conf {
        Conf::of(text).unwrap()
    }

    #[test]
    fn values_are_read_as_slurm_reads_them() {
        for (text, value) in [
            (&b"ProctrackType=proctrack/pgid"[..], Some("proctrack/pgid")),
            (
                b"proctracktype = Proctrack/PGID\r\n",
                Some("proctrack/pgid"),
            ),
            (
                b"  ProctrackType  =\tproctrack/pgid  # a word",
                Some("proctrack/pgid"),
            ),
            (
                b"# caf\xe9\nProctrackType=proctrack/pgid",
                Some("proctrack/pgid"),
            ),
            (
                b"ClusterName=\xff ProctrackType=proctrack/pgid X=1",
                Some("proctrack/pgid"),
            ),
            (b"ProctrackType=a\nProctrackType=b", Some("b")),
            (b"ProctrackType=\\\nproctrack/pgid", Some("proctrack/pgid")),
            (
                b"Comment=\"ProctrackType=a b\" ProctrackType=\"c\"",
                Some("c"),
            ),
            (
                b"#ProctrackType=a\nXProctrackType=b\nProctrackTypeX=c",
                None,
            ),
            (b"ProctrackType=", None),
            (b"ProctrackType           = (null)\n", None),
            (b"Key=a\\#b ProctrackType=c#d", Some("c")),
            (b"", None),
        ] {
            let text_shown = String::from_utf8_lossy(text);
            let found = conf(text).get(&["ProctrackType"]);
            assert_eq!(found.as_deref(), value, "{text_shown}");
        }
        assert_eq!(conf(b"Key=a\\#b").get(&["Key"]).as_deref(), Some("a#b"));
        assert_eq!(conf(b"B=2").get(&["A", "B"]).as_deref(), Some("2"));
    }

    #[test]
    fn included_files_are_followed() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let deep = format!("include {}/b.conf # \u{e9}", directory.path().display());
        write(
            "slurm.conf",
            b"ClusterName=One\nProctrackType=a\n INCLUDE  sub/%c.conf\nLast=1",
        );
        write("sub/one.conf", deep.as_bytes());
        write("b.conf", b"include sub/c.conf");
        write("sub/c.conf", b"ProctrackType=c\xff\n");
        let read = |name: &str| {
            let mut conf = Conf::default();
            conf.add_file(&directory.path().join(name), directory.path(), 0)
                .map(|()| conf)
        };
        let found = read("slurm.conf").unwrap();
        assert_eq!(found.get(&["ProctrackType"]).as_deref(), Some("c\u{fffd}"));
        assert_eq!(found.get(&["Last"]).as_deref(), Some("1"));
        write("round.conf", b"Include round.conf");
        assert!(read("round.conf").is_err());
        write("gone.conf", b"Include none.conf\nProctrackType=a");
        assert!(read("gone.conf").is_err());
    }
}
