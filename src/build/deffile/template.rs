//! `{{ name }}` in definitions: replaced by build arguments, else by what `%arguments` gives as defaults.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, anyhow, bail};

use super::{At, sections};

/// Longest stage after filling in, in bytes: defaults that hold each other grow fast.
const MAX_LEN: usize = 64 << 20;
/// Deepest nesting of defaults.
const MAX_DEPTH: usize = 32;

/// Fills the arguments into a stage. Names that were used are added to `used`.
///
/// # Errors
/// When an argument is not defined, is defined by itself, or the text grows without end.
pub fn fill(
    file: &str,
    first_line: usize,
    text: &str,
    args: &[(String, String)],
    used: &mut BTreeSet<String>,
) -> Result<String> {
    let mut values = defaults(file, first_line, text)?;
    values.extend(args.iter().cloned());
    let mut filled = String::with_capacity(text.len());
    let mut in_arguments = false;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if let Some((name, _)) = sections::begins(line.trim_end_matches('\n')) {
            in_arguments = name == "arguments";
        }
        // A default may name what nobody uses.
        if in_arguments || line.trim_start().starts_with('#') {
            filled.push_str(line);
            continue;
        }
        let at = At {
            file,
            line: first_line + number,
        };
        expand(line, &values, used, &mut Vec::new(), &mut filled)
            .map_err(|error| anyhow!("{at}: {error}"))?;
        if filled.len() > MAX_LEN {
            bail!(
                "{at}: the definition grows beyond {} MiB by its arguments",
                MAX_LEN >> 20
            );
        }
    }
    Ok(filled)
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

fn expand<'a>(
    text: &str,
    values: &'a BTreeMap<String, String>,
    used: &mut BTreeSet<String>,
    open: &mut Vec<&'a str>,
    out: &mut String,
) -> Result<()> {
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
        let Some((name, value)) = values.get_key_value(name) else {
            bail!(
                "build var {name} is not defined through either --build-arg (--build-arg-file) or 'arguments' section"
            );
        };
        if open.contains(&name.as_str()) || open.len() >= MAX_DEPTH {
            bail!(
                "build var {name} is defined by itself: {} -> {name}",
                open.join(" -> ")
            );
        }
        used.insert(name.clone());
        open.push(name);
        expand(value, values, used, open, out)?;
        open.pop();
        if out.len() > MAX_LEN {
            bail!(
                "the definition grows beyond {} MiB by its arguments",
                MAX_LEN >> 20
            );
        }
    }
    out.push_str(rest);
    Ok(())
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
