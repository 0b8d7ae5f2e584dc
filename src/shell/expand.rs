//! Words to fields.

use super::eval::Machine;
use super::parse::{Op, Parameter, Part, Place, Word};
use super::{MAX_NAMES, Unsupported};

/// Bytes of one value; more is no environment.
const MAX_VALUE_BYTES: usize = 1 << 20;
/// Bytes of all values that a script makes, and with them of all that it keeps or prints.
const MAX_MADE_BYTES: usize = 64 << 20;
/// Bytes of a value that patterns are cut from: that takes the square of it.
const MAX_CUT_BYTES: usize = 16 << 10;
/// Bytes of a value in which something is replaced: that takes the cube of it.
const MAX_REPLACED_BYTES: usize = 512;
/// Variables that shells make themselves, each its own way.
const OF_SHELLS: [&[u8]; 9] = [
    b"EUID", b"GID", b"IFS", b"LINENO", b"OPTIND", b"PPID", b"RANDOM", b"SECONDS", b"UID",
];

/// A piece of a word after expansion.
struct Piece {
    bytes: Vec<u8>,
    quoted: bool,
    /// A new field begins before it (`"$@"`).
    breaks: bool,
}

impl Machine<'_> {
    /// The fields of command words.
    pub(super) fn fields(
        &mut self,
        words: &[Word],
        line: u32,
    ) -> Result<Vec<Vec<u8>>, Unsupported> {
        let mut fields = Vec::new();
        for word in words {
            self.split(word, line, &mut fields)?;
        }
        Ok(fields)
    }

    /// One field, as in an assignment: no splitting, no file names.
    pub(super) fn joined(&mut self, word: &Word, line: u32) -> Result<Vec<u8>, Unsupported> {
        let mut value = Vec::new();
        for piece in self.pieces(word, line)? {
            if piece.breaks {
                value.push(b' ');
            }
            value.extend(piece.bytes);
        }
        Ok(value)
    }

    /// A pattern: quoted bytes stand for themselves.
    pub(super) fn pattern(&mut self, word: &Word, line: u32) -> Result<Vec<Glob>, Unsupported> {
        let mut pattern = Vec::new();
        for piece in self.pieces(word, line)? {
            for byte in piece.bytes {
                pattern.push(match byte {
                    b'*' if !piece.quoted => Glob::Any,
                    b'?' if !piece.quoted => Glob::One,
                    b'[' | b'\\' if !piece.quoted => {
                        return Err(unsupported(line, "a bracket pattern"));
                    }
                    byte => Glob::Byte(byte),
                });
            }
        }
        Ok(pattern)
    }

    fn split(
        &mut self,
        word: &Word,
        line: u32,
        fields: &mut Vec<Vec<u8>>,
    ) -> Result<(), Unsupported> {
        if has_braces(word) {
            return Err(unsupported(line, "a list in braces"));
        }
        let mut field: Option<Field> = None;
        for piece in self.pieces(word, line)? {
            if piece.breaks {
                self.close(&mut field, line, fields)?;
            }
            if piece.quoted {
                let field: &mut Field = field.get_or_insert_default();
                field
                    .pattern
                    .extend(piece.bytes.iter().map(|b| Glob::Byte(*b)));
                field.bytes.extend(piece.bytes);
                continue;
            }
            for byte in piece.bytes {
                if matches!(byte, b' ' | b'\t' | b'\n') {
                    self.close(&mut field, line, fields)?;
                } else {
                    field.get_or_insert_default().push(byte);
                }
            }
        }
        self.close(&mut field, line, fields)
    }

    /// Ends a field: itself, or the files that it names as a pattern, if there are any.
    fn close(
        &mut self,
        field: &mut Option<Field>,
        line: u32,
        fields: &mut Vec<Vec<u8>>,
    ) -> Result<(), Unsupported> {
        let Some(field) = field.take() else {
            return Ok(());
        };
        if field.bracketed || (field.wild && field.escaped) {
            return Err(unsupported(line, "a bracket pattern"));
        }
        let before = fields.len();
        if field.wild {
            fields.extend(self.files_like(&field.pattern, line)?);
        }
        if fields.len() == before {
            fields.push(field.bytes);
        }
        Ok(())
    }

    fn files_like(&mut self, pattern: &[Glob], line: u32) -> Result<Vec<Vec<u8>>, Unsupported> {
        let unknown = || unsupported(line, "a pattern of file names");
        let mut paths = vec![Vec::new()];
        for (depth, part) in pattern.split(|g| *g == Glob::Byte(b'/')).enumerate() {
            let wild = part.iter().any(|g| matches!(g, Glob::Any | Glob::One));
            let mut found = Vec::new();
            for mut path in paths {
                if depth > 0 {
                    path.push(b'/');
                }
                if !wild {
                    path.extend(part.iter().filter_map(|g| match g {
                        Glob::Byte(byte) => Some(*byte),
                        _ => None,
                    }));
                    found.push(path);
                    continue;
                }
                // Some shells find the directory itself and the one above it, some do not.
                let dotted = part.first() == Some(&Glob::Byte(b'.'));
                if dotted && (fits(part, b".", line)? || fits(part, b"..", line)?) {
                    return Err(unknown());
                }
                self.step(line)?;
                let directory: &[u8] = if path.is_empty() { b"." } else { &path };
                let mut names = self.files.names(directory).ok_or_else(unknown)?;
                if names.len() > MAX_NAMES {
                    return Err(unknown());
                }
                names.sort();
                for name in names {
                    // A hidden file must be asked for.
                    let hidden = name.starts_with(b".") && part.first() != Some(&Glob::Byte(b'.'));
                    if !hidden && fits(part, &name, line)? {
                        found.push([path.as_slice(), &name].concat());
                    }
                }
                if found.len() > MAX_NAMES {
                    return Err(unknown());
                }
            }
            paths = found;
        }
        let mut there = Vec::new();
        for path in paths {
            let is = |test| self.files.test(test, &path).ok_or_else(unknown);
            if is(b'e')? || is(b'L')? {
                there.push(path);
            }
        }
        Ok(there)
    }

    fn pieces(&mut self, word: &Word, line: u32) -> Result<Vec<Piece>, Unsupported> {
        let mut pieces = Vec::new();
        for part in word {
            match part {
                Part::Text(bytes) => pieces.push(Piece {
                    bytes: bytes.clone(),
                    quoted: false,
                    breaks: false,
                }),
                Part::Quoted(bytes) => pieces.push(Piece {
                    bytes: bytes.clone(),
                    quoted: true,
                    breaks: false,
                }),
                Part::Parameter {
                    name: name @ (Parameter::Each | Parameter::Elements { each: true, .. }),
                    op: Op::Plain,
                    quoted,
                } => {
                    let params = self.each(name);
                    let params = params.iter().enumerate();
                    pieces.extend(params.map(|(i, p)| Piece {
                        bytes: p.clone(),
                        quoted: *quoted,
                        breaks: i > 0,
                    }));
                }
                Part::Parameter { name, op, quoted } => {
                    self.parameter(name, op, *quoted, line, &mut pieces)?
                }
            }
            if pieces.iter().map(|p| p.bytes.len()).sum::<usize>() > MAX_VALUE_BYTES {
                return Err(unsupported(line, "a value of more than 1 MiB"));
            }
        }
        self.made += pieces.iter().map(|p| p.bytes.len()).sum::<usize>();
        if self.made > MAX_MADE_BYTES {
            return Err(unsupported(line, "a script that makes more than 64 MiB"));
        }
        Ok(pieces)
    }

    fn parameter(
        &mut self,
        name: &Parameter,
        op: &Op,
        quoted: bool,
        line: u32,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Unsupported> {
        let many = matches!(name, Parameter::Elements { .. });
        if many && !matches!(op, Op::Plain | Op::Length) {
            return Err(unsupported(line, "an expansion of an array"));
        }
        let value = self.value(name, line)?;
        let bytes = match op {
            Op::Plain => value.unwrap_or_default(),
            Op::Length if many => self.each(name).len().to_string().into_bytes(),
            Op::Sub { from, len } => part_of(&value.unwrap_or_default(), *from, *len, line)?,
            Op::Case { upper, all } => in_capitals(value.unwrap_or_default(), *upper, *all, line)?,
            Op::Replace {
                place,
                pattern,
                with,
            } => {
                let pattern = self.pattern(pattern, line)?;
                let with = self.joined(with, line)?;
                let value = value.unwrap_or_default();
                replaced(&value, *place, &pattern, &with, line)?
            }
            Op::Length => {
                let value = value.unwrap_or_default();
                // Some shells count bytes, some characters.
                if !value.is_ascii() {
                    return Err(unsupported(line, "the length of a text that is not ASCII"));
                }
                value.len().to_string().into_bytes()
            }
            Op::Or { sign, colon, word } => {
                let present = value.as_ref().is_some_and(|v| !colon || !v.is_empty());
                match (sign, present) {
                    (b'+', true) | (b'-', false) => {
                        // The word keeps its own quotes; within quotes even an empty one makes a field.
                        let more = self.pieces(word, line)?;
                        if quoted && more.is_empty() {
                            pieces.push(Piece {
                                bytes: Vec::new(),
                                quoted,
                                breaks: false,
                            });
                        }
                        pieces.extend(more.into_iter().map(|p| Piece {
                            quoted: p.quoted || quoted,
                            ..p
                        }));
                        return Ok(());
                    }
                    (b'=', false) => {
                        let new = self.joined(word, line)?;
                        let Parameter::Variable(name) = name else {
                            return Err(unsupported(line, "an expansion"));
                        };
                        self.assign(name, new.clone(), line)?;
                        new
                    }
                    (b'+', false) => Vec::new(),
                    _ => value.unwrap_or_default(),
                }
            }
            Op::Cut {
                suffix,
                longest,
                pattern,
            } => {
                let pattern = self.pattern(pattern, line)?;
                cut(
                    &value.unwrap_or_default(),
                    &pattern,
                    *suffix,
                    *longest,
                    line,
                )?
            }
        };
        pieces.push(Piece {
            bytes,
            quoted,
            breaks: false,
        });
        Ok(())
    }

    /// The single values of `$@` or `${NAME[@]}`.
    fn each(&self, name: &Parameter) -> Vec<Vec<u8>> {
        match name {
            Parameter::Elements { name, .. } => {
                let var = self.state.vars.get(name);
                var.map_or_else(Vec::new, |var| var.elements().cloned().collect())
            }
            _ => self.state.params.clone(),
        }
    }

    fn value(&self, name: &Parameter, line: u32) -> Result<Option<Vec<u8>>, Unsupported> {
        Ok(match name {
            Parameter::Variable(name) => {
                let value = self.state.get(name);
                if value.is_none() && OF_SHELLS.contains(&name.as_slice()) {
                    return Err(unsupported(line, &String::from_utf8_lossy(name)));
                }
                value.map(<[u8]>::to_vec)
            }
            Parameter::Element(name, index) => {
                let var = self.state.vars.get(name);
                match index {
                    0 => var.and_then(|v| v.value.clone()),
                    n => var.and_then(|v| v.more.as_ref()?.get(n).cloned()),
                }
            }
            Parameter::Elements { .. } => Some(self.each(name).join(&b' ')),
            Parameter::Positional(number) => self.state.params.get(number - 1).cloned(),
            Parameter::Each | Parameter::Joined => Some(self.state.params.join(&b' ')),
            Parameter::Count => Some(self.state.params.len().to_string().into_bytes()),
            Parameter::Status => Some(self.state.status.to_string().into_bytes()),
        })
    }
}

pub(super) fn unsupported(line: u32, what: &str) -> Unsupported {
    Unsupported {
        line,
        what: what.into(),
    }
}

/// Whether some shells would make several words of this one: `{a,b}`, `{1..3}`.
pub(super) fn has_braces(word: &Word) -> bool {
    let has = |text: &[u8]| {
        word.iter()
            .any(|p| matches!(p, Part::Text(t) if t.windows(text.len()).any(|w| w == text)))
    };
    has(b"{") && has(b"}") && (has(b",") || has(b".."))
}

/// A field of a command, while it is put together.
#[derive(Default)]
struct Field {
    bytes: Vec<u8>,
    pattern: Vec<Glob>,
    /// There is a `*` or a `?` in it.
    wild: bool,
    /// There is a backslash from an expansion in it.
    escaped: bool,
    /// A `[` alone is the command of that name; with a `]` it is a pattern.
    bracket: bool,
    bracketed: bool,
}

impl Field {
    fn push(&mut self, byte: u8) {
        self.wild |= matches!(byte, b'*' | b'?');
        self.escaped |= byte == b'\\';
        self.bracketed |= byte == b']' && self.bracket;
        self.bracket |= byte == b'[';
        self.bytes.push(byte);
        self.pattern.push(match byte {
            b'*' => Glob::Any,
            b'?' => Glob::One,
            byte => Glob::Byte(byte),
        });
    }
}

/// A part of a pattern.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Glob {
    /// `*`
    Any,
    /// `?`
    One,
    Byte(u8),
}

/// Whether a pattern matches all of `text`, if all shells agree on that.
pub(super) fn fits(pattern: &[Glob], text: &[u8], line: u32) -> Result<bool, Unsupported> {
    // To some, `?` is a byte, to some a character.
    if pattern.contains(&Glob::One) && !text.is_ascii() {
        return Err(unsupported(line, "a pattern for a text that is not ASCII"));
    }
    Ok(matches(pattern, text))
}

fn matches(pattern: &[Glob], text: &[u8]) -> bool {
    // Where to go on when a `*` has to take one byte more.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(Glob::Any) => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            Some(Glob::One) => {}
            Some(Glob::Byte(byte)) if *byte == text[t] => {}
            _ => {
                let Some((at, taken)) = star else {
                    return false;
                };
                (p, t) = (at + 1, taken + 1);
                star = Some((at, t));
                continue;
            }
        }
        p += 1;
        t += 1;
    }
    pattern[p..].iter().all(|g| *g == Glob::Any)
}

/// `${x:FROM:LEN}`, in characters.
fn part_of(
    value: &[u8],
    from: usize,
    len: Option<usize>,
    line: u32,
) -> Result<Vec<u8>, Unsupported> {
    if !value.is_ascii() {
        return Err(unsupported(line, "a part of a text that is not ASCII"));
    }
    let rest = value.get(from..).unwrap_or_default();
    Ok(rest[..len.unwrap_or(rest.len()).min(rest.len())].to_vec())
}

/// `${x^^}` and the like.
fn in_capitals(
    mut value: Vec<u8>,
    upper: bool,
    all: bool,
    line: u32,
) -> Result<Vec<u8>, Unsupported> {
    if !value.is_ascii() {
        return Err(unsupported(line, "capitals of a text that is not ASCII"));
    }
    let len = if all { value.len() } else { value.len().min(1) };
    match upper {
        true => value[..len].make_ascii_uppercase(),
        false => value[..len].make_ascii_lowercase(),
    }
    Ok(value)
}

/// `${x/PATTERN/WITH}`: the longest match from the first place on.
fn replaced(
    value: &[u8],
    place: Place,
    pattern: &[Glob],
    with: &[u8],
    line: u32,
) -> Result<Vec<u8>, Unsupported> {
    // Newer shells put the match in the place of these.
    if pattern.is_empty() || with.contains(&b'&') || with.contains(&b'\\') {
        return Err(unsupported(line, "such a replacement"));
    }
    if value.len() > MAX_REPLACED_BYTES {
        return Err(unsupported(line, "a replacement in a long text"));
    }
    let mut made = Vec::new();
    let (mut at, mut done) = (0, false);
    while at < value.len() {
        let rest = &value[at..];
        let tried = !done && (place != Place::Start || at == 0);
        let mut found = None;
        for len in (1..=rest.len()).rev().filter(|_| tried) {
            let ends = place != Place::End || len == rest.len();
            if ends && fits(pattern, &rest[..len], line)? {
                found = Some(len);
                break;
            }
        }
        match found {
            Some(len) => {
                made.extend(with);
                at += len;
                done = place != Place::All;
            }
            None => {
                made.push(rest[0]);
                at += 1;
            }
        }
    }
    Ok(made)
}

/// Without the shortest or longest start or end that matches.
fn cut(
    value: &[u8],
    pattern: &[Glob],
    suffix: bool,
    longest: bool,
    line: u32,
) -> Result<Vec<u8>, Unsupported> {
    if value.len() > MAX_CUT_BYTES {
        return Err(unsupported(line, "a pattern for a long text"));
    }
    let lengths: Box<dyn Iterator<Item = usize>> = if longest {
        Box::new((0..=value.len()).rev())
    } else {
        Box::new(0..=value.len())
    };
    for len in lengths {
        let (part, rest) = if suffix {
            let (rest, part) = value.split_at(value.len() - len);
            (part, rest)
        } else {
            value.split_at(len)
        };
        if fits(pattern, part, line)? {
            return Ok(rest.to_vec());
        }
    }
    Ok(value.to_vec())
}
