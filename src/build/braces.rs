//! The words that braces stand for: `{a,b}`, `{1..9}`, `{a..e..2}`, one in another (`bash(1)`, Brace Expansion).

use anyhow::{Result, bail};

/// Most words that one may become.
const MAX_WORDS: usize = 1 << 16;
/// Longest word that is looked at, in characters.
const MAX_LEN: usize = 64 << 10;
/// Deepest nesting.
const MAX_DEPTH: usize = 64;

/// The words in their order; what is no list stays as it is, and so do `${NAME}` and what follows a backslash.
///
/// # Errors
/// When there are too many.
pub fn expand(text: &str) -> Result<Vec<String>> {
    if !text.contains('{') {
        return Ok(vec![text.to_owned()]);
    }
    let chars: Vec<char> = text.chars().collect();
    if chars.len() > MAX_LEN {
        bail!("a name with braces is longer than {MAX_LEN} characters");
    }
    words(&chars, 0)
}

fn words(text: &[char], depth: usize) -> Result<Vec<String>> {
    if depth > MAX_DEPTH {
        bail!("braces are nested more than {MAX_DEPTH} deep");
    }
    let mut at = 0;
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            '$' if text.get(at + 1) == Some(&'{') => {
                let len = text[at..].iter().position(|c| *c == '}');
                at = len.map_or(text.len(), |len| at + len + 1);
            }
            '{' => match list(&text[at..]) {
                Some((parts, len)) => {
                    return product(&text[..at], &parts, &text[at + len..], depth);
                }
                None => at += 1,
            },
            _ => at += 1,
        }
    }
    Ok(vec![text.iter().collect()])
}

fn product(
    before: &[char],
    parts: &[Vec<char>],
    after: &[char],
    depth: usize,
) -> Result<Vec<String>> {
    let before: String = before.iter().collect();
    let after = words(after, depth + 1)?;
    let mut all = Vec::new();
    for part in parts {
        for middle in words(part, depth + 1)? {
            if all.len() + after.len() > MAX_WORDS {
                bail!("braces make more than {MAX_WORDS} names");
            }
            all.extend(after.iter().map(|after| format!("{before}{middle}{after}")));
        }
    }
    Ok(all)
}

/// The parts of the list or range at the start of the text, and its length with both braces.
fn list(text: &[char]) -> Option<(Vec<Vec<char>>, usize)> {
    let (mut open, mut at, mut begun) = (0, 0, 1);
    let mut parts = Vec::new();
    loop {
        match *text.get(at)? {
            '\\' => at += 1,
            '{' => open += 1,
            ',' if open == 1 => {
                parts.push(text[begun..at].to_vec());
                begun = at + 1;
            }
            '}' => {
                open -= 1;
                if open == 0 {
                    break;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if parts.is_empty() {
        let inside: String = text[1..at].iter().collect();
        return Some((range(&inside)?, at + 1));
    }
    parts.push(text[begun..at].to_vec());
    Some((parts, at + 1))
}

/// `1..9`, `01..10`, `a..e`, each with a step behind it.
fn range(text: &str) -> Option<Vec<Vec<char>>> {
    let ends: Vec<&str> = text.split("..").collect();
    let (first, last, step) = match ends.as_slice() {
        [first, last] => (*first, *last, 1),
        [first, last, step] => (*first, *last, step.parse::<i64>().ok()?.unsigned_abs()),
        _ => return None,
    };
    let letter = |text: &str| {
        let mut chars = text.chars();
        let letter = chars.next().filter(char::is_ascii_alphabetic)?;
        chars.next().is_none().then_some(letter)
    };
    let (low, high, show): (i64, i64, Box<dyn Fn(i64) -> String>) =
        match (letter(first), letter(last)) {
            (Some(low), Some(high)) => (
                i64::from(u32::from(low)),
                i64::from(u32::from(high)),
                Box::new(|n| u8::try_from(n).map_or('?', char::from).to_string()),
            ),
            _ => {
                let padded = |text: &str| text.trim_start_matches('-').starts_with('0');
                let padded = [first, last].iter().any(|t| t.len() > 1 && padded(t));
                let width = if padded {
                    first.len().max(last.len())
                } else {
                    0
                };
                (
                    first.parse().ok()?,
                    last.parse().ok()?,
                    Box::new(move |n| format!("{n:0width$}")),
                )
            }
        };
    let step = step.max(1);
    let count = high.abs_diff(low) / step;
    if count >= MAX_WORDS as u64 {
        return None;
    }
    let of = |nth: u64| {
        let away = (nth * step).cast_signed();
        let number = if low <= high { low + away } else { low - away };
        show(number).chars().collect()
    };
    Some((0..=count).map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_make_the_words_that_bash_makes() {
        let table: &[(&str, &[&str])] = &[
            ("a", &["a"]),
            ("{a,b}.txt", &["a.txt", "b.txt"]),
            ("x{a,b}{1,2}", &["xa1", "xa2", "xb1", "xb2"]),
            ("{a,b{c,d}}", &["a", "bc", "bd"]),
            ("{,x}y", &["y", "xy"]),
            ("{a}", &["{a}"]),
            ("{}", &["{}"]),
            ("{a,b", &["{a,b"]),
            ("a,b}", &["a,b}"]),
            ("\\{a,b}", &["\\{a,b}"]),
            ("{a\\,b,c}", &["a\\,b", "c"]),
            ("${A,B}/{c,d}", &["${A,B}/c", "${A,B}/d"]),
            ("{x{a,b}}", &["{xa}", "{xb}"]),
            ("f{1..3}", &["f1", "f2", "f3"]),
            ("{3..1}", &["3", "2", "1"]),
            ("{08..10}", &["08", "09", "10"]),
            ("{-1..1}", &["-1", "0", "1"]),
            ("{a..e..2}", &["a", "c", "e"]),
            ("{1..9..4}", &["1", "5", "9"]),
            ("{1..b}", &["{1..b}"]),
            ("{*,?}x", &["*x", "?x"]),
        ];
        for (text, wanted) in table {
            assert_eq!(expand(text).unwrap(), *wanted, "{text}");
        }
    }

    #[test]
    fn braces_without_end_are_an_error_and_no_long_wait() {
        assert!(expand(&"{a,b}".repeat(20)).is_err());
        assert!(expand(&format!("{}a,b{}", "{x,".repeat(200), "}".repeat(200))).is_err());
        assert!(expand(&"{".repeat(MAX_LEN + 1)).is_err());
        assert_eq!(expand("{1..99999999}").unwrap(), ["{1..99999999}"]);
        assert_eq!(
            expand("{-9223372036854775808..9223372036854775807}")
                .unwrap()
                .len(),
            1
        );
    }
}
