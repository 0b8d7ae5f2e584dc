//! Patterns of the shell: `*`, `?`, `[a-z]`, `[!a-z]` and `\` (`glob(7)`). The only matcher of the program.

/// Whether a pattern matches a whole name.
pub fn fits(pattern: &str, name: &str) -> bool {
    let chars = |text: &str| text.chars().collect::<Vec<_>>();
    matches(&chars(pattern), &chars(name))
}

/// Whether a name matches; stars are tried without recursion, so that no pattern takes exponential time.
pub fn matches(pattern: &[char], name: &[char]) -> bool {
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
            assert_eq!(fits(pattern, name), wanted, "{pattern} {name}");
        }
    }

    #[test]
    fn many_stars_take_no_longer_than_their_product() {
        let name = "a".repeat(250);
        // Without backtracking into every star this would take years.
        assert!(!fits(&("*a".repeat(100) + "b"), &name));
        assert!(fits(&"*a".repeat(100), &name));
        assert!(!fits(&("*[".repeat(5_000) + "b"), &name));
    }
}
