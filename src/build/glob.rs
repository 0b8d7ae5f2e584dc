//! The sources of `%files`: patterns of the shell (`glob(7)`), and variables.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

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
                    (text[0] == '.' || name.first() != Some(&'.')) && matches(&text, &name)
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

/// Whether a name matches; stars are tried without recursion, so that no pattern takes exponential time.
fn matches(pattern: &[char], name: &[char]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match one(&pattern[p.min(pattern.len())..], name[n]) {
            _ if pattern.get(p) == Some(&'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(len) => {
                p += len;
                n += 1;
            }
            None => match &mut star {
                Some((after, from)) => {
                    *from += 1;
                    (p, n) = (*after, *from);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// How many characters of the pattern take this character; `None` when they do not.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern.first()? {
        '?' => Some(1),
        '\\' if pattern.len() > 1 => (pattern[1] == c).then_some(2),
        '[' => {
            // A bracket without an end is itself.
            let negated = matches!(pattern.get(1), Some('!' | '^'));
            let first = if negated { 2 } else { 1 };
            let Some(end) = (first + 1..pattern.len()).find(|i| pattern[*i] == ']') else {
                return (c == '[').then_some(1);
            };
            let set = &pattern[first..end];
            let mut hit = false;
            let mut i = 0;
            while i < set.len() {
                if i + 2 < set.len() && set[i + 1] == '-' {
                    hit |= (set[i]..=set[i + 2]).contains(&c);
                    i += 3;
                } else {
                    hit |= set[i] == c;
                    i += 1;
                }
            }
            (hit != negated).then_some(end + 1)
        }
        other => (*other == c).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_the_shell_does() {
        let table = [
            ("*", "abc", true),
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("?b", "ab", true),
            ("?", "", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]", "]", true),
            ("[", "[", true),
            ("a**b", "ab", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("*.txt", "x.txt", true),
        ];
        for (pattern, name, wanted) in table {
            let chars = |t: &str| t.chars().collect::<Vec<_>>();
            assert_eq!(
                matches(&chars(pattern), &chars(name)),
                wanted,
                "{pattern} {name}"
            );
        }
    }

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
