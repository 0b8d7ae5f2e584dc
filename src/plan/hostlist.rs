//! Slurm's short form of many node names: `n[1-3,7],login`.

/// Names at most: more nodes than any machine has.
const MAX: usize = 65_536;

/// All names, in order; `None` for a text that is not such a list.
pub fn expand(text: &str) -> Option<Vec<String>> {
    let mut names = Vec::new();
    let mut depth = 0usize;
    let mut begin = 0;
    for (at, c) in text.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => {
                expand_one(&text[begin..at], &mut names)?;
                begin = at + 1;
            }
            _ => {}
        }
    }
    if depth != 0 {
        return None;
    }
    expand_one(&text[begin..], &mut names)?;
    Some(names)
}

fn expand_one(text: &str, names: &mut Vec<String>) -> Option<()> {
    let Some((head, rest)) = text.split_once('[') else {
        let plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c == ']');
        names.push(plain.then(|| text.to_owned())?);
        return (names.len() <= MAX).then_some(());
    };
    let (ranges, tail) = rest.split_once(']')?;
    for range in ranges.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let number = |t: &str| {
            t.bytes()
                .all(|b| b.is_ascii_digit())
                .then(|| t.parse::<usize>().ok())?
        };
        let (from, to) = (number(low)?, number(high)?);
        if to < from || to - from > MAX {
            return None;
        }
        for n in from..=to {
            // As many digits as the lower bound has.
            expand_one(
                &format!("{head}{n:0width$}{tail}", width = low.len()),
                names,
            )?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_expanded() {
        let all = |t: &str| expand(t).map(|v| v.join(" "));
        assert_eq!(all("n1").as_deref(), Some("n1"));
        assert_eq!(all("n[1-3,7],login").as_deref(), Some("n1 n2 n3 n7 login"));
        assert_eq!(all("n[08-11]x").as_deref(), Some("n08x n09x n10x n11x"));
        assert_eq!(all("r[1-2]n[0-1]").as_deref(), Some("r1n0 r1n1 r2n0 r2n1"));
        for bad in [
            "",
            "n[",
            "n[1",
            "n1]",
            "n[2-1]",
            "n[a-b]",
            "n[1-99999999]",
            "a,,b",
            "a b",
        ] {
            assert_eq!(all(bad), None, "{bad}");
        }
    }
}
