//! The sources of `%files`: patterns of the shell (`glob(7)`), and variables.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::plan::pattern;

/// Most names that one pattern may give.
const MAX_FOUND: usize = 1 << 20;

/// Replaces `~/`, `$NAME` and `${NAME}`; unset variables are empty, as in a shell.
pub fn variables(text: &str, value: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    if let Some(tail) = rest.strip_prefix("~/") {
        out.push_str(&value("HOME").unwrap_or_else(|| "~".into()));
        out.push('/');
        rest = tail;
    }
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        let (name, after) = match tail.strip_prefix('{').and_then(|t| t.split_once('}')) {
            Some(braced) => braced,
            None => {
                let end = tail
                    .find(|c: char| c != '_' && !c.is_ascii_alphanumeric())
                    .unwrap_or(tail.len());
                tail.split_at(end)
            }
        };
        if name.is_empty() {
            out.push('$');
        } else {
            out.push_str(&value(name).unwrap_or_default());
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Whether a text is a pattern.
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The paths that match a pattern, sorted. `list` gives the names in a directory (none for what is no directory).
///
/// # Errors
/// When nothing matches, or too much does.
pub fn expand(
    pattern: &Path,
    list: &dyn Fn(&Path) -> Vec<std::ffi::OsString>,
) -> Result<Vec<PathBuf>> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.components() {
        let text = part.as_os_str().to_string_lossy().into_owned();
        if !is_pattern(&text) {
            for path in &mut found {
                path.push(part);
            }
            continue;
        }
        let text: Vec<char> = text.chars().collect();
        let mut next = Vec::new();
        for path in &found {
            let mut names: Vec<_> = list(path)
                .into_iter()
                .filter(|name| {
                    let name: Vec<char> = name.to_string_lossy().chars().collect();
                    (text[0] == '.' || name.first() != Some(&'.')) && pattern::matches(&text, &name)
                })
                .collect();
            names.sort();
            next.extend(names.into_iter().map(|name| path.join(name)));
            if next.len() > MAX_FOUND {
                bail!("{} matches more than {MAX_FOUND} files", pattern.display());
            }
        }
        found = next;
    }
    if found.is_empty() {
        bail!("{}: nothing matches this pattern", pattern.display());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_files_need_a_dot_and_no_match_is_an_error() {
        let list = |path: &Path| match path.to_str() {
            Some("/d") => vec![".h".into(), "b".into(), "a".into()],
            _ => Vec::new(),
        };
        assert_eq!(
            expand(Path::new("/d/*"), &list).unwrap(),
            [Path::new("/d/a"), Path::new("/d/b")]
        );
        assert_eq!(
            expand(Path::new("/d/.*"), &list).unwrap(),
            [Path::new("/d/.h")]
        );
        assert!(expand(Path::new("/none/*"), &list).is_err());
    }

    #[test]
    fn variables_are_filled_in() {
        let value = |name: &str| (name == "HOME").then(|| "/h".to_owned());
        assert_eq!(
            variables("~/a/$HOME/${HOME}b/$NO/$", &value),
            "/h/a//h//hb//$"
        );
    }
}
