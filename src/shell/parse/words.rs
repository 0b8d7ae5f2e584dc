//! Text to words: quotes, and parameters with what is done to their values.

use super::{Parsed, Parser, Unsupported};

/// Parts that are joined without a blank.
pub(in crate::shell) type Word = Vec<Part>;

pub(in crate::shell) enum Part {
    /// As written.
    Text(Vec<u8>),
    /// Quoted: no pattern, and a field even when empty.
    Quoted(Vec<u8>),
    Parameter {
        name: Parameter,
        op: Op,
        quoted: bool,
    },
}

#[derive(PartialEq, Eq)]
pub(in crate::shell) enum Parameter {
    Variable(Vec<u8>),
    /// `${NAME[N]}`
    Element(Vec<u8>, u32),
    /// `${NAME[@]}`, each one a field of its own, or `${NAME[*]}`
    Elements {
        name: Vec<u8>,
        each: bool,
    },
    Positional(usize),
    /// `$@`
    Each,
    /// `$*`
    Joined,
    Count,
    Status,
}

pub(in crate::shell) enum Op {
    Plain,
    Length,
    /// `-`, `=` or `+`; with a colon an empty value counts as unset.
    Or {
        sign: u8,
        colon: bool,
        word: Word,
    },
    /// `#`, `##`, `%`, `%%`
    Cut {
        suffix: bool,
        longest: bool,
        pattern: Word,
    },
    /// `${x:1:2}`
    Sub {
        from: usize,
        len: Option<usize>,
    },
    /// `^`, `^^`, `,`, `,,`
    Case {
        upper: bool,
        all: bool,
    },
    /// `${x/y/z}`
    Replace {
        place: Place,
        pattern: Word,
        with: Word,
    },
}

/// Where something is replaced.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::shell) enum Place {
    First,
    All,
    Start,
    End,
}

/// Parses the inside of a double-quoted string in which a double quote is an ordinary byte.
pub(in crate::shell) fn text(text: &[u8]) -> Result<Word, Unsupported> {
    let mut parser = Parser {
        text,
        at: 0,
        line: 1,
        depth: 0,
    };
    let mut word = Word::new();
    parser.double(&mut word, None)?;
    Ok(word)
}

impl Parser<'_> {
    /// The next word; `None` at the end of the command.
    pub(super) fn word(&mut self) -> Parsed<Option<Word>> {
        self.blanks();
        self.rest_of_word()
    }

    /// A word that begins here: neither a blank nor a `#` is skipped.
    pub(super) fn rest_of_word(&mut self) -> Parsed<Option<Word>> {
        let mut word = Word::new();
        let mut text = Vec::new();
        let start = self.at;
        loop {
            match self.peek() {
                None | Some(b' ' | b'\t' | b'\n' | b';' | b'&' | b'|' | b'(' | b')') => break,
                Some(b'<' | b'>') => return Err(self.unsupported("a redirection")),
                Some(b'~')
                    if self.at == start
                        || self.text[self.at - 1] == b'='
                        || self.text[self.at - 1] == b':' =>
                {
                    return Err(self.unsupported("a tilde"));
                }
                Some(b'$' | b'\'' | b'"' | b'`' | b'\\') => {
                    if !text.is_empty() {
                        word.push(Part::Text(std::mem::take(&mut text)));
                    }
                    self.special(&mut word, false)?;
                }
                Some(byte) => {
                    self.next();
                    text.push(byte);
                }
            }
        }
        if !text.is_empty() {
            word.push(Part::Text(text));
        }
        Ok((self.at > start).then_some(word))
    }

    /// A quote, a backslash or a dollar outside double quotes.
    fn special(&mut self, word: &mut Word, in_braces: bool) -> Parsed<()> {
        match self.peek() {
            Some(b'\\') => {
                self.at += 1;
                match self.next() {
                    Some(b'\n') => {}
                    Some(byte) => word.push(Part::Quoted(vec![byte])),
                    None => word.push(Part::Quoted(b"\\".to_vec())),
                }
            }
            Some(b'\'') if !in_braces => {
                self.at += 1;
                let mut quoted = Vec::new();
                loop {
                    match self.next() {
                        Some(b'\'') => break,
                        Some(byte) => quoted.push(byte),
                        None => return Err(self.unsupported("a quote without its end")),
                    }
                }
                word.push(Part::Quoted(quoted));
            }
            Some(b'"') => {
                self.at += 1;
                self.deeper(|parser| parser.double(word, Some(b'"')))?;
            }
            _ => self.dollar(word, false)?,
        }
        Ok(())
    }

    /// The inside of double quotes up to `end`, which is taken; with `None`, up to the end of the text.
    fn double(&mut self, word: &mut Word, end: Option<u8>) -> Parsed<()> {
        let mut quoted = Vec::new();
        let mut any = false;
        loop {
            match self.peek() {
                None if end.is_none() => break,
                None => return Err(self.unsupported("a quote without its end")),
                Some(byte) if Some(byte) == end => {
                    self.at += 1;
                    break;
                }
                Some(b'\\') => {
                    self.at += 1;
                    match self.peek() {
                        Some(b'\n') => drop(self.next()),
                        Some(byte @ (b'$' | b'`' | b'"' | b'\\')) => {
                            self.at += 1;
                            quoted.push(byte);
                        }
                        _ => quoted.push(b'\\'),
                    }
                }
                Some(b'$' | b'`') => {
                    if !quoted.is_empty() {
                        word.push(Part::Quoted(std::mem::take(&mut quoted)));
                    }
                    any = true;
                    self.dollar(word, true)?;
                }
                Some(byte) => {
                    self.next();
                    quoted.push(byte);
                }
            }
        }
        if !quoted.is_empty() || !any {
            word.push(Part::Quoted(quoted));
        }
        Ok(())
    }

    /// `$…`
    fn dollar(&mut self, word: &mut Word, quoted: bool) -> Parsed<()> {
        if self.take(b"`") || self.ahead(b"$(") {
            return Err(self.unsupported("a command substitution"));
        }
        if self.ahead(b"$[") {
            return Err(self.unsupported("an old form of arithmetic"));
        }
        self.at += 1;
        let mut op = Op::Plain;
        let name = match self.peek() {
            Some(b'{') => {
                self.at += 1;
                let length = self.ahead(b"#") && !self.ahead(b"#}");
                if length {
                    self.at += 1;
                }
                let name = self
                    .parameter(true)?
                    .ok_or_else(|| self.unsupported("an expansion"))?;
                op = if length {
                    if matches!(name, Parameter::Each | Parameter::Joined) {
                        return Err(self.unsupported("an expansion"));
                    }
                    Op::Length
                } else {
                    self.deeper(|parser| parser.operation(quoted))?
                };
                if !self.take(b"}") {
                    return Err(self.unsupported("an expansion"));
                }
                name
            }
            _ => match self.parameter(false)? {
                Some(name) => name,
                None if matches!(self.peek(), Some(b'\'' | b'"')) && !quoted => {
                    return Err(self.unsupported("a $ quote"));
                }
                None => {
                    word.push(Part::Quoted(b"$".to_vec()));
                    return Ok(());
                }
            },
        };
        word.push(Part::Parameter { name, op, quoted });
        Ok(())
    }

    fn parameter(&mut self, braces: bool) -> Parsed<Option<Parameter>> {
        let rest = &self.text[self.at..];
        let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        let (name, len) = match rest.first() {
            Some(b'@') => (Parameter::Each, 1),
            Some(b'*') => (Parameter::Joined, 1),
            Some(b'#') => (Parameter::Count, 1),
            Some(b'?') => (Parameter::Status, 1),
            Some(b'!' | b'$' | b'-') => return Err(self.unsupported("a special parameter")),
            Some(_) if digits > 0 => {
                let len = if braces { digits } else { 1 };
                let number = std::str::from_utf8(&rest[..len])
                    .ok()
                    .and_then(|t| t.parse().ok());
                match number {
                    Some(number @ 1..) => (Parameter::Positional(number), len),
                    _ => return Err(self.unsupported("$0")),
                }
            }
            _ => {
                let len = rest
                    .iter()
                    .take_while(|b| b.is_ascii_alphanumeric() || **b == b'_')
                    .count();
                if len == 0 {
                    return Ok(None);
                }
                (Parameter::Variable(rest[..len].to_vec()), len)
            }
        };
        self.at += len;
        match name {
            Parameter::Variable(name) if braces && self.take(b"[") => self.element(name).map(Some),
            name => Ok(Some(name)),
        }
    }

    /// Behind the `[` of `${NAME[…]}`.
    fn element(&mut self, name: Vec<u8>) -> Parsed<Parameter> {
        if self.take(b"@]") {
            return Ok(Parameter::Elements { name, each: true });
        }
        if self.take(b"*]") {
            return Ok(Parameter::Elements { name, each: false });
        }
        let index = self.number().and_then(|n| u32::try_from(n).ok());
        match (index, self.take(b"]")) {
            (Some(index), true) => Ok(Parameter::Element(name, index)),
            _ => Err(self.unsupported("an index")),
        }
    }

    /// Digits, at this place.
    fn number(&mut self) -> Option<usize> {
        let rest = &self.text[self.at..];
        let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        let number = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        self.at += digits;
        Some(number)
    }

    fn operation(&mut self, quoted: bool) -> Parsed<Op> {
        let colon = self.take(b":");
        match self.peek() {
            Some(b'}') if !colon => Ok(Op::Plain),
            Some(sign @ (b'-' | b'=' | b'+')) => {
                self.at += 1;
                Ok(Op::Or {
                    sign,
                    colon,
                    word: self.braces(quoted)?,
                })
            }
            Some(sign @ (b'#' | b'%')) if !colon => {
                self.at += 1;
                let longest = self.take(&[sign]);
                Ok(Op::Cut {
                    suffix: sign == b'%',
                    longest,
                    pattern: self.braces(false)?,
                })
            }
            Some(b'/') if !colon => self.replacement(),
            Some(sign @ (b'^' | b',')) if !colon => {
                self.at += 1;
                let all = self.take(&[sign]);
                match self.peek() {
                    Some(b'}') => Ok(Op::Case {
                        upper: sign == b'^',
                        all,
                    }),
                    _ => Err(self.unsupported("capitals of a pattern")),
                }
            }
            Some(b'0'..=b'9') if colon => {
                let from = self.number();
                let len = self.take(b":").then(|| self.number());
                match (from, len) {
                    (Some(from), None) => Ok(Op::Sub { from, len: None }),
                    (Some(from), Some(Some(len))) => Ok(Op::Sub {
                        from,
                        len: Some(len),
                    }),
                    _ => Err(self.unsupported("a part of a text")),
                }
            }
            _ => Err(self.unsupported("an expansion")),
        }
    }

    /// `/PATTERN/WITH`
    fn replacement(&mut self) -> Parsed<Op> {
        self.at += 1;
        let place = match self.peek() {
            Some(b'/') => Place::All,
            Some(b'#') => Place::Start,
            Some(b'%') => Place::End,
            _ => Place::First,
        };
        self.at += usize::from(place != Place::First);
        let pattern = self.braces_to(false, b"/")?;
        let with = match self.take(b"/") {
            true => self.braces(false)?,
            false => Word::new(),
        };
        // What quotes mean here depends on the shell's age.
        if with.iter().any(|part| matches!(part, Part::Quoted(_))) {
            return Err(self.unsupported("a replacement with quotes"));
        }
        Ok(Op::Replace {
            place,
            pattern,
            with,
        })
    }

    /// The word of an expansion up to its `}`, which is left.
    fn braces(&mut self, quoted: bool) -> Parsed<Word> {
        self.braces_to(quoted, b"")
    }

    /// The same, or up to another byte.
    fn braces_to(&mut self, quoted: bool, ends: &[u8]) -> Parsed<Word> {
        let mut word = Word::new();
        let mut text = Vec::new();
        let part = |text: &mut Vec<u8>| {
            let text = std::mem::take(text);
            if quoted {
                Part::Quoted(text)
            } else {
                Part::Text(text)
            }
        };
        loop {
            match self.peek() {
                None => return Err(self.unsupported("an expansion without its end")),
                Some(b'}') => break,
                Some(byte) if ends.contains(&byte) => break,
                Some(b'~') if word.is_empty() && text.is_empty() && !quoted => {
                    return Err(self.unsupported("a tilde"));
                }
                Some(b'\\')
                    if quoted
                        && !matches!(
                            self.text.get(self.at + 1),
                            Some(b'$' | b'`' | b'"' | b'\\' | b'}' | b'\n')
                        ) =>
                {
                    self.at += 1;
                    text.push(b'\\');
                }
                Some(byte @ (b'$' | b'"' | b'`' | b'\\' | b'\'')) if byte != b'\'' || !quoted => {
                    if !text.is_empty() {
                        word.push(part(&mut text));
                    }
                    if quoted && matches!(byte, b'$' | b'`') {
                        self.dollar(&mut word, true)?
                    } else {
                        self.special(&mut word, quoted)?
                    }
                }
                Some(byte) => {
                    self.next();
                    text.push(byte);
                }
            }
        }
        if !text.is_empty() {
            word.push(part(&mut text));
        }
        Ok(word)
    }
}
