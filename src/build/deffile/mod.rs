//! Definition files: text to stages, with file and line in each error. Touches nothing of the machine.
//!
//! The grammar is that of Singularity and Apptainer: a header of `Key: value` lines, then sections that begin at a line
//! whose first word is `%name`; a line that begins with `Bootstrap:` begins the next stage. `{{ name }}` is replaced before a
//! stage is read ([`template`]).

mod json;
mod sections;
pub mod template;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

pub use json::parse as parse_json;
pub use sections::words;
use template::Filler;

/// Largest definition that is read, in bytes.
pub const MAX_LEN: u64 = 16 << 20;

/// A definition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Def {
    /// In order; the last one becomes the image.
    pub stages: Vec<Stage>,
    /// What is odd and does no harm, for `WARNING:` lines.
    pub warnings: Vec<String>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stage {
    /// The header, by key in lower case.
    pub header: BTreeMap<String, String>,
    /// The stage's text with its arguments filled in.
    pub text: String,
    /// Runs on the host before anything else.
    pub pre: Script,
    /// Runs on the host when the root file system is there.
    pub setup: Script,
    /// Runs inside.
    pub post: Script,
    /// Runs inside when the image is whole; kept in it.
    pub test: Script,
    /// Shell text.
    pub environment: Script,
    /// Kept in the image.
    pub runscript: Script,
    /// Kept in the image.
    pub startscript: Script,
    /// Kept in the image.
    pub help: Script,
    /// In order.
    pub files: Vec<Files>,
    /// Names and values, in order.
    pub labels: Vec<(String, String)>,
    /// SCIF applications, in order of first mention.
    pub apps: Vec<App>,
}

/// A section's text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Script {
    /// What follows the name in the section's line.
    pub args: String,
    /// The lines, as they are.
    pub text: String,
}

impl Script {
    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.text.trim().is_empty()
    }
}

/// A `%files` section.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Files {
    /// `from NAME`: another stage; else the host.
    pub from: Option<String>,
    /// Source and, when given, destination.
    pub pairs: Vec<(String, Option<String>)>,
}

/// A SCIF application.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct App {
    /// Its name.
    pub name: String,
    /// `%appinstall`.
    pub install: String,
    /// `%appenv`.
    pub environment: Option<String>,
    /// `%apprun`.
    pub run: Option<Script>,
    /// `%appstart`.
    pub start: Option<Script>,
    /// `%apptest`.
    pub test: Option<Script>,
    /// `%apphelp`.
    pub help: Option<String>,
    /// `%applabels`.
    pub labels: Option<Vec<(String, String)>>,
    /// `%appfiles`: source and, when given, destination.
    pub files: Vec<(String, Option<String>)>,
}

impl Stage {
    /// A key of the header.
    pub fn key(&self, name: &str) -> Option<&str> {
        self.header.get(name).map(String::as_str)
    }

    /// The name that `%files from` uses.
    pub fn name(&self) -> Option<&str> {
        self.key("stage")
    }

    /// Whether there is nothing but a header.
    pub fn is_bare(&self) -> bool {
        let bare = Stage {
            header: self.header.clone(),
            text: self.text.clone(),
            ..Stage::default()
        };
        *self == bare
    }

    /// The application of this name, made when it is new.
    fn app(&mut self, name: &str) -> &mut App {
        let at = match self.apps.iter().position(|a| a.name == name) {
            Some(at) => at,
            None => {
                self.apps.push(App {
                    name: name.into(),
                    ..App::default()
                });
                self.apps.len() - 1
            }
        };
        &mut self.apps[at]
    }
}

/// Where a line stands, for messages.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The file's name as the caller gave it.
    pub file: &'a str,
    /// From 1.
    pub line: usize,
}

impl std::fmt::Display for At<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// What an unused build argument means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unused {
    /// An error.
    Refuse,
    /// A warning.
    Warn,
}

/// Parses a definition. `file` is its name for messages, `args` the build arguments, later ones first in rank.
///
/// # Errors
/// Naming file, line and the way out.
pub fn parse(file: &str, bytes: &[u8], args: &[(String, String)], unused: Unused) -> Result<Def> {
    if let Some(at) = bytes.iter().position(|b| *b == 0) {
        let line = 1 + bytes[..at].iter().filter(|b| **b == b'\n').count();
        bail!("{file}:{line}: a NUL byte: this is not a text file");
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        let valid = std::str::from_utf8(bytes).map_or_else(|e| e.valid_up_to(), str::len);
        let line = 1 + bytes[..valid].iter().filter(|b| **b == b'\n').count();
        bail!("{file}:{line}: not UTF-8: save the definition as UTF-8");
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = text.replace("\r\n", "\n");
    let mut def = Def::default();
    let mut used = BTreeSet::new();
    for (first_line, raw) in split_stages(&text) {
        let filler = Filler::new(file, first_line, &raw, args, &mut used)?;
        let stage = stage(file, first_line, &raw, filler, &mut def.warnings)?;
        def.stages.push(stage);
    }
    if def.stages.is_empty() {
        bail!(
            "{file}: no bootstrap specification found: a definition begins with a line like Bootstrap: docker"
        );
    }
    let known: Vec<&str> = args
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| !used.contains(*name))
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    if !known.is_empty() {
        let names = known.join(", ");
        match unused {
            Unused::Refuse => bail!(
                "unused build args: {names}. Use option --warn-unused-build-args to show a warning instead of a fatal message"
            ),
            Unused::Warn => def.warnings.push(format!("unused build args: {names}")),
        }
    }
    check_stages(file, &def)?;
    Ok(def)
}

/// Splits at lines that begin with `Bootstrap:`; what precedes the first one belongs to it. Empty without one, unless
/// there is text, which then gets its error as a stage.
fn split_stages(text: &str) -> Vec<(usize, String)> {
    let mut stages: Vec<(usize, String)> = Vec::new();
    let mut begun = false;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let begins = line
            .get(..10)
            .is_some_and(|w| w.eq_ignore_ascii_case("bootstrap:"));
        if stages.is_empty() || (begins && begun) {
            stages.push((number + 1, String::new()));
        }
        begun |= begins || is_indented_bootstrap(line);
        if let Some((_, stage)) = stages.last_mut() {
            stage.push_str(line);
        }
    }
    stages.retain(|(_, text)| !text.trim().is_empty());
    stages
}

fn is_indented_bootstrap(line: &str) -> bool {
    let word = line.trim_start().get(..10);
    word.is_some_and(|w| w.eq_ignore_ascii_case("bootstrap:"))
}

/// Keys that a header may have; `otherurl` may have a number.
const KEYS: [&str; 25] = [
    "bootstrap",
    "from",
    "includecmd",
    "mirrorurl",
    "updateurl",
    "osversion",
    "include",
    "library",
    "registry",
    "namespace",
    "stage",
    "product",
    "user",
    "regcode",
    "productpgp",
    "registerurl",
    "modules",
    "otherurl",
    "fingerprints",
    "confurl",
    "setopt",
    "target",
    "frontend",
    "filename",
    "buildargs",
];

fn is_key(key: &str) -> bool {
    let bare = key
        .strip_prefix("otherurl")
        .filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
    bare.is_some() || KEYS.contains(&key)
}

/// Reads one stage whose first line is `first_line` of the file: its structure as it is written, and only then the values
/// of arguments, so that none of them can be more than text.
fn stage(
    file: &str,
    first_line: usize,
    text: &str,
    mut filler: Filler,
    warnings: &mut Vec<String>,
) -> Result<Stage> {
    let mut stage = Stage::default();
    let lines: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(n, line)| (first_line + n, line))
        .collect();
    let body = lines
        .iter()
        .position(|(_, line)| sections::begins(line).is_some());
    let (head, body) = lines.split_at(body.unwrap_or(lines.len()));
    header(file, head, &mut filler, &mut stage.header)?;
    if !stage.header.contains_key("bootstrap") {
        bail!(
            "{file}:{first_line}: no bootstrap specification found: the definition must begin with a line like Bootstrap: docker"
        );
    }
    let body = sections::fill(file, body, &mut filler)?;
    sections::read(file, &body, &mut stage, warnings)?;
    for (number, line) in head {
        let line = match line.trim_start().starts_with('#') {
            true => (*line).to_owned(),
            false => filler.fill(
                At {
                    file,
                    line: *number,
                },
                line,
            )?,
        };
        stage.text.extend([&line, "\n"]);
    }
    let body = body.iter().flat_map(|line| [line.text.as_str(), "\n"]);
    stage.text.extend(body);
    if !text.ends_with('\n') {
        stage.text.pop();
    }
    Ok(stage)
}

fn header(
    file: &str,
    lines: &[(usize, &str)],
    filler: &mut Filler,
    header: &mut BTreeMap<String, String>,
) -> Result<()> {
    let mut lines = lines.iter().copied();
    while let Some((number, line)) = lines.next() {
        let at = At { file, line: number };
        if line.trim_start().starts_with('#') {
            continue;
        }
        let mut text = without_comment(line).trim().to_owned();
        // A backslash at the end goes on in the next line; `\n\` is a line break in the value.
        while let Some(kept) = text.strip_suffix('\\') {
            let (kept, joint) = match kept.strip_suffix("\\n") {
                Some(kept) => (kept, "\n"),
                None => (kept, " "),
            };
            let Some((_, more)) = lines.next() else {
                text = kept.trim_end().to_owned();
                break;
            };
            text = format!("{}{joint}{}", kept.trim_end(), without_comment(more).trim());
        }
        if text.is_empty() {
            continue;
        }
        // The first colon that is written divides; without one a value may bring the whole line.
        let filled = |filler: &mut Filler, text: &str| filler.fill(at, text);
        let (key, value) = match text.split_once(':') {
            Some((key, value)) => (filled(filler, key)?, filled(filler, value)?),
            None => {
                let text = filled(filler, &text)?;
                match text.split_once(':') {
                    Some((key, value)) => (key.to_owned(), value.to_owned()),
                    None => bail!(
                        "{at}: {text:?} is neither a header line (Key: value) nor the begin of a section (%name)"
                    ),
                }
            }
        };
        let key = key.trim().to_ascii_lowercase();
        let value = value.trim();
        if !is_key(&key) {
            bail!(
                "{at}: invalid header keyword found: {key}: known ones are {}",
                KEYS.join(", ")
            );
        }
        // A line without a value is as though it were not there, as the peers have it; it takes an earlier one back.
        if value.is_empty() {
            header.remove(&key);
        } else {
            header.insert(key, value.to_owned());
        }
    }
    Ok(())
}

/// A comment begins at `#` at the line's start or behind a blank.
fn without_comment(line: &str) -> &str {
    let begins = |(at, _): &(usize, &str)| *at == 0 || line[..*at].ends_with([' ', '\t']);
    match line.match_indices('#').find(begins) {
        Some((at, _)) => &line[..at],
        None => line,
    }
}

/// Stages that `%files from` names must come before.
fn check_stages(file: &str, def: &Def) -> Result<()> {
    for (number, stage) in def.stages.iter().enumerate() {
        let before: Vec<&str> = def.stages[..number]
            .iter()
            .filter_map(Stage::name)
            .collect();
        if let Some(name) = stage.name().filter(|name| before.contains(name)) {
            bail!("{file}: two stages have the name {name:?}: give each one its own");
        }
        for from in stage.files.iter().filter_map(|f| f.from.as_deref()) {
            if !before.contains(&from) {
                let known = if before.is_empty() {
                    "no stage before it has a name (Stage: NAME)".to_owned()
                } else {
                    format!("stages before it: {}", before.join(", "))
                };
                bail!("{file}: %files from {from}: there is no such stage; {known}");
            }
        }
    }
    Ok(())
}
