//! Words to fields.

use super::Unsupported;
use super::eval::Machine;
use super::parse::{Op, Parameter, Part, Word};

/// Bytes of one value; more is no environment.
const MAX_VALUE_BYTES: usize = 1 << 20;

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
        let mut field: Option<Vec<u8>> = None;
        let mut bracket = false; // a `[` alone is the command of that name
        for piece in self.pieces(word, line)? {
            if piece.breaks {
                fields.extend(field.take());
            }
            if piece.quoted {
                field.get_or_insert_default().extend(piece.bytes);
                continue;
            }
            for byte in piece.bytes {
                match byte {
                    b' ' | b'\t' | b'\n' => fields.extend(field.take()),
                    b'*' | b'?' => return Err(unsupported(line, "a pattern of file names")),
                    b']' if bracket => return Err(unsupported(line, "a pattern of file names")),
                    byte => {
                        bracket |= byte == b'[';
                        field.get_or_insert_default().push(byte);
                    }
                }
            }
        }
        fields.extend(field);
        Ok(())
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
                    name: Parameter::Each,
                    op: Op::Plain,
                    quoted,
                } => {
                    let params = self.state.params.iter().enumerate();
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
        let value = self.value(name);
        let bytes = match op {
            Op::Plain => value.unwrap_or_default(),
            Op::Length => value.unwrap_or_default().len().to_string().into_bytes(),
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
                cut(&value.unwrap_or_default(), &pattern, *suffix, *longest)
            }
        };
        pieces.push(Piece {
            bytes,
            quoted,
            breaks: false,
        });
        Ok(())
    }

    fn value(&self, name: &Parameter) -> Option<Vec<u8>> {
        match name {
            Parameter::Variable(name) => self.state.get(name).map(<[u8]>::to_vec),
            Parameter::Positional(number) => self.state.params.get(number - 1).cloned(),
            Parameter::Each | Parameter::Joined => Some(self.state.params.join(&b' ')),
            Parameter::Count => Some(self.state.params.len().to_string().into_bytes()),
            Parameter::Status => Some(self.state.status.to_string().into_bytes()),
        }
    }
}

pub(super) fn unsupported(line: u32, what: &str) -> Unsupported {
    Unsupported {
        line,
        what: what.into(),
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

/// Whether a pattern matches all of `text`.
pub(super) fn matches(pattern: &[Glob], text: &[u8]) -> bool {
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

/// Without the shortest or longest start or end that matches.
fn cut(value: &[u8], pattern: &[Glob], suffix: bool, longest: bool) -> Vec<u8> {
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
        if matches(pattern, part) {
            return rest.to_vec();
        }
    }
    value.to_vec()
}
