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
        Ok(Some(name))
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
            _ => Err(self.unsupported("an expansion")),
        }
    }

    /// The word of an expansion up to its `}`, which is left.
    fn braces(&mut self, quoted: bool) -> Parsed<Word> {
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
