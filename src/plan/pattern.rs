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
        // A bracket without an end is itself.
        '[' => match bracket(pattern, c) {
            Some((hit, len)) => hit.then_some(len),
            None => (c == '[').then_some(1),
        },
        other => (*other == c).then_some(1),
    }
}

/// Whether the set in brackets at the start of the pattern has this character, and the set's length; `None` without an end.
fn bracket(pattern: &[char], c: char) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(1), Some('!' | '^'));
    let first = if negated { 2 } else { 1 };
    let mut hit = false;
    let mut at = first;
    loop {
        match *pattern.get(at)? {
            ']' if at > first => return Some((hit != negated, at + 1)),
            '[' if pattern.get(at + 1) == Some(&':') => {
                let len = pattern[at..].windows(2).position(|w| w == [':', ']'])?;
                let name: String = pattern[at + 2..at + len].iter().collect();
                hit |= in_class(&name, c);
                at += len + 2;
            }
            low => {
                let range = pattern.get(at + 1) == Some(&'-');
                match pattern.get(at + 2).filter(|high| range && **high != ']') {
                    Some(high) => {
                        hit |= (low..=*high).contains(&c);
                        at += 3;
                    }
                    None => {
                        hit |= low == c;
                        at += 1;
                    }
                }
            }
        }
    }
}

/// The classes of `regex(7)`, as in `[[:digit:]]`.
fn in_class(name: &str, c: char) -> bool {
    match name {
        "alnum" => c.is_alphanumeric(),
        "alpha" => c.is_alphabetic(),
        "blank" => c == ' ' || c == '\t',
        "cntrl" => c.is_control(),
        "digit" => c.is_ascii_digit(),
        "graph" => !c.is_control() && !c.is_whitespace(),
        "lower" => c.is_lowercase(),
        "print" => !c.is_control(),
        "punct" => c.is_ascii_punctuation(),
        "space" => c.is_whitespace(),
        "upper" => c.is_uppercase(),
        "xdigit" => c.is_ascii_hexdigit(),
        _ => false,
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
            ("[a", "[a", true),
            ("[a-]", "-", true),
            ("[^a]", "b", true),
            ("[[:digit:]x]", "7", true),
            ("[[:digit:]x]", "x", true),
            ("[![:digit:]]", "7", false),
            ("[[:upper:]]", "a", false),
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
