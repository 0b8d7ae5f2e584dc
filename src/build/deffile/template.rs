//! `{{ name }}` in definitions: replaced by build arguments, else by what `%arguments` gives as defaults.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, anyhow, bail};

use super::{At, sections};

/// Longest stage after filling in, in bytes: defaults that hold each other grow fast.
const MAX_LEN: usize = 64 << 20;
/// Deepest nesting of defaults.
const MAX_DEPTH: usize = 32;

/// What fills in a stage's arguments.
pub struct Filler<'a> {
    /// Of the command line: text, whatever is in it.
    given: BTreeMap<&'a str, &'a str>,
    /// Of the definition: they may name others.
    defaults: BTreeMap<String, String>,
    /// Names that were used.
    used: &'a mut BTreeSet<String>,
    /// Bytes that it has given so far.
    len: usize,
}

impl<'a> Filler<'a> {
    /// For a stage with this text, `first_line` of the file.
    ///
    /// # Errors
    /// When a line of `%arguments` is no argument.
    pub fn new(
        file: &str,
        first_line: usize,
        text: &str,
        args: &'a [(String, String)],
        used: &'a mut BTreeSet<String>,
    ) -> Result<Filler<'a>> {
        let given = args.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        Ok(Filler {
            given: given.collect(),
            defaults: defaults(file, first_line, text)?,
            used,
            len: 0,
        })
    }

    /// A text with the values in it. They are text: what begins with `%` in them opens no section.
    ///
    /// # Errors
    /// When an argument is not defined, is defined by itself, or the stage grows without end.
    pub fn fill(&mut self, at: At, text: &str) -> Result<String> {
        let mut out = String::new();
        self.expand(text, &mut Vec::new(), &mut out)
            .map_err(|error| anyhow!("{at}: {error}"))?;
        self.len += out.len();
        Ok(out)
    }

    fn expand(&mut self, text: &str, open: &mut Vec<String>, out: &mut String) -> Result<()> {
        let mut rest = text;
        while let Some(start) = rest.find("{{") {
            let (before, from) = rest.split_at(start);
            out.push_str(before);
            let Some((name, len)) = placeholder(from) else {
                out.push_str("{{");
                rest = &from[2..];
                continue;
            };
            rest = &from[len..];
            self.value(name, open, out)?;
            if self.len + out.len() > MAX_LEN {
                bail!(
                    "the definition grows beyond {} MiB by its arguments",
                    MAX_LEN >> 20
                );
            }
        }
        out.push_str(rest);
        Ok(())
    }

    fn value(&mut self, name: &str, open: &mut Vec<String>, out: &mut String) -> Result<()> {
        if let Some(given) = self.given.get(name) {
            out.push_str(given);
            self.used.insert(name.to_owned());
            return Ok(());
        }
        let Some(default) = self.defaults.get(name).cloned() else {
            bail!(
                "build var {name} is not defined through either --build-arg (--build-arg-file) or 'arguments' section"
            );
        };
        if open.iter().any(|open| open == name) || open.len() >= MAX_DEPTH {
            bail!(
                "build var {name} is defined by itself: {} -> {name}",
                open.join(" -> ")
            );
        }
        self.used.insert(name.to_owned());
        open.push(name.to_owned());
        self.expand(&default, open, out)?;
        open.pop();
        Ok(())
    }
}

/// `name=value` lines of all `%arguments` sections.
fn defaults(file: &str, first_line: usize, text: &str) -> Result<BTreeMap<String, String>> {
    let mut values = BTreeMap::new();
    let mut inside = false;
    for (number, line) in text.lines().enumerate() {
        if let Some((name, _)) = sections::begins(line) {
            inside = name == "arguments";
            continue;
        }
        let line = line.trim();
        if !inside || line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = At {
            file,
            line: first_line + number,
        };
        let (name, value) = pair(line).map_err(|error| anyhow!("{at}: %arguments: {error}"))?;
        values.insert(name, value);
    }
    Ok(values)
}

/// One `name=value`.
///
/// # Errors
/// When it is something else.
pub fn pair(text: &str) -> Result<(String, String)> {
    let Some((name, value)) = text.split_once('=') else {
        bail!("{text:?} is not NAME=VALUE");
    };
    let name = name.trim();
    if name.is_empty() || !name.chars().all(is_word) {
        bail!("{name:?} cannot be an argument's name: use letters, digits and _");
    }
    Ok((name.to_owned(), value.trim().to_owned()))
}

/// The lines of a `--build-arg-file`.
///
/// # Errors
/// Naming file and line.
pub fn pairs(file: &str, text: &str) -> Result<Vec<(String, String)>> {
    let lines = text
        .lines()
        .enumerate()
        .map(|(n, line)| (n + 1, line.trim()));
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(line, text)| pair(text).map_err(|error| anyhow!("{}: {error}", At { file, line })))
        .collect()
}

fn is_word(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// Name and length of a `{{ name }}` at the start of the text.
fn placeholder(text: &str) -> Option<(&str, usize)> {
    let inside = text.strip_prefix("{{")?;
    let name = inside.trim_start_matches([' ', '\t']);
    let end = name.find(|c| !is_word(c)).filter(|end| *end > 0)?;
    let (name, tail) = name.split_at(end);
    let tail = tail.trim_start_matches([' ', '\t']).strip_prefix("}}")?;
    Some((name, text.len() - tail.len()))
}
