//! The sources of `%files`: patterns of the shell (`glob(7)`), and variables.

use std::ffi::OsString;
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

/// Whether a text is a pattern. A backslash takes the next character's meaning away.
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '[', '\\'])
}

/// Where a pattern looks.
pub trait Look {
    /// The names in a directory; none for what is no directory.
    fn names(&self, directory: &Path) -> Vec<OsString>;
    /// Whether the name is there; a link counts, wherever it leads.
    fn is_there(&self, path: &Path) -> bool;
    /// Whether it leads to a directory.
    fn is_directory(&self, path: &Path) -> bool;
}

/// The paths that match a pattern, sorted.
///
/// # Errors
/// When nothing matches, or too much does.
pub fn expand(pattern: &Path, look: &dyn Look) -> Result<Vec<PathBuf>> {
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
            let mut names: Vec<_> = look
                .names(path)
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
    // What follows the last wildcard has to be there too, and a slash at the end wants a directory.
    let slash = pattern.as_os_str().as_encoded_bytes().ends_with(b"/");
    found.retain(|path| look.is_there(path) && (!slash || look.is_directory(path)));
    if found.is_empty() {
        bail!("{}: nothing matches this pattern", pattern.display());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Paths that are there; those with a slash at the end are directories.
    struct Listed(&'static [&'static str]);

    impl Look for Listed {
        fn names(&self, directory: &Path) -> Vec<OsString> {
            let under = format!("{}/", directory.display());
            let all = self.0.iter().filter_map(|path| path.strip_prefix(&under));
            let names = all.map(|rest| rest.trim_end_matches('/'));
            names
                .filter(|name| !name.is_empty() && !name.contains('/'))
                .map(OsString::from)
                .collect()
        }
        fn is_there(&self, path: &Path) -> bool {
            let path = path.to_str().unwrap();
            self.0.iter().any(|p| p.trim_end_matches('/') == path)
        }
        fn is_directory(&self, path: &Path) -> bool {
            self.0.contains(&format!("{}/", path.display()).as_str())
        }
    }

    #[test]
    fn patterns_find_what_a_shell_finds() {
        let look = Listed(&[
            "/d/",
            "/d/.h",
            "/d/b",
            "/d/a",
            "/d/s/",
            "/d/s/in",
            "/d/s/deep/",
            "/d/s/deep/in",
            "/d/t/",
            "/d/t/in",
        ]);
        let table: &[(&str, &[&str])] = &[
            ("/d/?", &["/d/a", "/d/b", "/d/s", "/d/t"]),
            ("/d/.*", &["/d/.h"]),
            ("/d/?/", &["/d/s", "/d/t"]),
            ("/d/*/in", &["/d/s/in", "/d/t/in"]),
            ("/d/*/*/in", &["/d/s/deep/in"]),
            ("/d/[st]/in", &["/d/s/in", "/d/t/in"]),
            ("/d/[[:alpha:]]", &["/d/a", "/d/b", "/d/s", "/d/t"]),
            ("/d/\\a", &["/d/a"]),
            ("/none/*", &[]),
            ("/d/*/nothing", &[]),
            ("/d/a*/", &[]),
        ];
        for (pattern, wanted) in table {
            let found = expand(Path::new(pattern), &look).unwrap_or_default();
            let found: Vec<&str> = found.iter().map(|p| p.to_str().unwrap()).collect();
            assert_eq!(found, *wanted, "{pattern}");
        }
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
