//! Text to commands.

use super::{MAX_SCRIPT_BYTES, Unsupported, is_name};

/// Nesting of commands and expansions; more is no environment script.
const MAX_DEPTH: u32 = 64;

pub(super) type List = Vec<AndOr>;

/// Commands joined by `&&` and `||`, evaluated from the left.
pub(super) struct AndOr {
    pub first: Stage,
    pub rest: Vec<(Join, Stage)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    And,
    Or,
}

/// A command and whether `!` turns its status around.
pub(super) struct Stage {
    pub negated: bool,
    pub command: Command,
}

pub(super) enum Command {
    Simple(Simple),
    Group(List),
    If {
        arms: Vec<(List, List)>,
        otherwise: List,
    },
    For {
        name: Vec<u8>,
        words: Option<Vec<Word>>,
        body: List,
        line: u32,
    },
    Case {
        word: Word,
        arms: Vec<(Vec<Word>, List)>,
        line: u32,
    },
}

pub(super) struct Simple {
    pub line: u32,
    pub assignments: Vec<(Vec<u8>, Word)>,
    pub words: Vec<Word>,
    pub output: Output,
    /// There was a redirection.
    pub redirected: bool,
}

/// Where the output of a command goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Kept,
    Dropped,
    /// To the standard error.
    Moved,
}

/// Parts that are joined without a blank.
pub(super) type Word = Vec<Part>;

pub(super) enum Part {
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
pub(super) enum Parameter {
    Variable(Vec<u8>),
    Positional(usize),
    /// `$@`
    Each,
    /// `$*`
    Joined,
    Count,
    Status,
}

pub(super) enum Op {
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

/// Parses a script.
pub(super) fn script(text: &[u8]) -> Result<List, Unsupported> {
    if text.len() > MAX_SCRIPT_BYTES || text.contains(&0) {
        return Err(Unsupported {
            line: 1,
            what: "not a script of sensible size".into(),
        });
    }
    let mut parser = Parser {
        text,
        at: 0,
        line: 1,
        depth: 0,
    };
    let list = parser.list(&[])?;
    match parser.peek() {
        None => Ok(list),
        Some(byte) => Err(parser.unsupported(&format!("{:?} is out of place", char::from(byte)))),
    }
}

/// Parses the inside of a double-quoted string in which a double quote is an ordinary byte.
pub(super) fn text(text: &[u8]) -> Result<Word, Unsupported> {
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

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    line: u32,
    depth: u32,
}

type Parsed<T> = Result<T, Unsupported>;

impl Parser<'_> {
    fn unsupported(&self, what: &str) -> Unsupported {
        Unsupported {
            line: self.line,
            what: what.into(),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn ahead(&self, text: &[u8]) -> bool {
        self.text[self.at..].starts_with(text)
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        self.line += u32::from(byte == b'\n');
        Some(byte)
    }

    /// Takes `text` if it comes next.
    fn take(&mut self, text: &[u8]) -> bool {
        let there = self.ahead(text);
        if there {
            self.at += text.len();
        }
        there
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.unsupported("nested too deeply"));
        }
        let parsed = parse(self)?;
        self.depth -= 1;
        Ok(parsed)
    }

    /// Skips blanks, continued lines and a comment.
    fn blanks(&mut self) {
        loop {
            match self.peek() {
                Some(b' ' | b'\t') => self.at += 1,
                Some(b'\\') if self.ahead(b"\\\n") => {
                    self.at += 2;
                    self.line += 1;
                }
                Some(b'#') => {
                    while self.peek().is_some_and(|b| b != b'\n') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    /// Skips blanks and ends of lines.
    fn lines(&mut self) {
        self.blanks();
        while self.peek() == Some(b'\n') {
            self.next();
            self.blanks();
        }
    }

    /// The reserved word that comes next, if it stands alone.
    fn reserved(&self) -> &[u8] {
        let rest = &self.text[self.at..];
        let end = rest.iter().position(|b| {
            matches!(
                b,
                b' ' | b'\t' | b'\n' | b';' | b'&' | b'|' | b'(' | b')' | b'<' | b'>'
            )
        });
        &rest[..end.unwrap_or(rest.len())]
    }

    fn expect(&mut self, word: &str) -> Parsed<()> {
        self.lines();
        if self.reserved() == word.as_bytes() {
            self.at += word.len();
            return Ok(());
        }
        Err(self.unsupported(&format!("{word:?} is missing")))
    }

    /// Commands up to one of the reserved words, `)`, `;;` or the end; these are left.
    fn list(&mut self, stops: &[&str]) -> Parsed<List> {
        let mut list = List::new();
        loop {
            self.lines();
            if self.stopped(stops) {
                return Ok(list);
            }
            list.push(self.and_or()?);
            self.blanks();
            match self.peek() {
                Some(b'\n') => {}
                Some(b';') if !self.ahead(b";;") => self.at += 1,
                Some(b'&') => return Err(self.unsupported("a command in the background")),
                Some(b'|') => return Err(self.unsupported("a pipe")),
                _ if self.stopped(stops) => {}
                _ => return Err(self.unsupported("a word behind a command")),
            }
        }
    }

    fn stopped(&self, stops: &[&str]) -> bool {
        let word = self.reserved();
        matches!(self.peek(), None | Some(b')'))
            || self.ahead(b";;")
            || stops.iter().any(|s| s.as_bytes() == word)
    }

    /// A list where there must be one.
    fn body(&mut self, stops: &[&str]) -> Parsed<List> {
        let list = self.list(stops)?;
        if list.is_empty() {
            return Err(self.unsupported("a command is missing"));
        }
        Ok(list)
    }

    fn and_or(&mut self) -> Parsed<AndOr> {
        let first = self.stage()?;
        let mut rest = Vec::new();
        loop {
            self.blanks();
            let join = if self.take(b"&&") {
                Join::And
            } else if self.take(b"||") {
                Join::Or
            } else {
                return Ok(AndOr { first, rest });
            };
            self.lines();
            rest.push((join, self.stage()?));
        }
    }

    fn stage(&mut self) -> Parsed<Stage> {
        self.blanks();
        let mut negated = false;
        while self.reserved() == b"!" {
            self.at += 1;
            self.blanks();
            negated = !negated;
        }
        let command = self.deeper(Self::command)?;
        Ok(Stage { negated, command })
    }

    fn command(&mut self) -> Parsed<Command> {
        match self.reserved() {
            b"if" => self.conditional(),
            b"for" => self.loop_over(),
            b"case" => self.case(),
            b"{" => {
                self.at += 1;
                let body = self.body(&["}"])?;
                self.expect("}")?;
                Ok(Command::Group(body))
            }
            b"while" | b"until" | b"function" | b"[[" | b"select" | b"time" => {
                let what = String::from_utf8_lossy(self.reserved()).into_owned();
                Err(self.unsupported(&what))
            }
            _ => self.simple().map(Command::Simple),
        }
    }

    fn conditional(&mut self) -> Parsed<Command> {
        self.at += 2;
        let mut arms = Vec::new();
        loop {
            let condition = self.body(&["then"])?;
            self.expect("then")?;
            let body = self.body(&["elif", "else", "fi"])?;
            arms.push((condition, body));
            if self.reserved() == b"elif" {
                self.at += 4;
                continue;
            }
            let mut otherwise = List::new();
            if self.reserved() == b"else" {
                self.at += 4;
                otherwise = self.body(&["fi"])?;
            }
            self.expect("fi")?;
            return Ok(Command::If { arms, otherwise });
        }
    }

    fn loop_over(&mut self) -> Parsed<Command> {
        let line = self.line;
        self.at += 3;
        self.blanks();
        let name = self.reserved().to_vec();
        if !is_name(&name) {
            return Err(self.unsupported("the name of a loop's variable"));
        }
        self.at += name.len();
        self.lines();
        let words = if self.reserved() == b"in" {
            self.at += 2;
            let mut words = Vec::new();
            while let Some(word) = self.word()? {
                words.push(word);
            }
            Some(words)
        } else {
            None
        };
        self.blanks();
        self.take(b";");
        self.expect("do")?;
        let body = self.body(&["done"])?;
        self.expect("done")?;
        Ok(Command::For {
            name,
            words,
            body,
            line,
        })
    }

    fn case(&mut self) -> Parsed<Command> {
        let line = self.line;
        self.at += 4;
        let word = self
            .word()?
            .ok_or_else(|| self.unsupported("case without a word"))?;
        self.expect("in")?;
        let mut arms = Vec::new();
        loop {
            self.lines();
            if self.reserved() == b"esac" {
                self.at += 4;
                return Ok(Command::Case { word, arms, line });
            }
            self.take(b"(");
            let mut patterns = Vec::new();
            loop {
                patterns.push(
                    self.word()?
                        .ok_or_else(|| self.unsupported("case without a pattern"))?,
                );
                self.blanks();
                if self.take(b")") {
                    break;
                }
                if !self.take(b"|") {
                    return Err(self.unsupported("case without \")\""));
                }
            }
            let body = self.list(&["esac"])?;
            if !self.take(b";;") && self.reserved() != b"esac" {
                return Err(self.unsupported("case without \";;\""));
            }
            arms.push((patterns, body));
        }
    }

    fn simple(&mut self) -> Parsed<Simple> {
        let mut simple = Simple {
            line: self.line,
            assignments: Vec::new(),
            words: Vec::new(),
            output: Output::Kept,
            redirected: false,
        };
        loop {
            self.blanks();
            if self.redirection(&mut simple)? {
                continue;
            }
            if simple.words.is_empty()
                && let Some(name) = self.assigned_name()
            {
                let value = self.word_after_name()?;
                simple.assignments.push((name, value));
                continue;
            }
            match self.word()? {
                Some(word) => simple.words.push(word),
                None => break,
            }
        }
        if self.peek() == Some(b'(') {
            return Err(self.unsupported("a function or a subshell"));
        }
        if simple.words.is_empty() && simple.assignments.is_empty() {
            return Err(self.unsupported("a command is missing"));
        }
        Ok(simple)
    }

    /// `NAME=` at this place: the name, with the sign taken.
    fn assigned_name(&mut self) -> Option<Vec<u8>> {
        let rest = &self.text[self.at..];
        let sign = rest
            .iter()
            .position(|b| !(b.is_ascii_alphanumeric() || *b == b'_'))?;
        if rest[sign] != b'=' || !is_name(&rest[..sign]) {
            return None;
        }
        self.at += sign + 1;
        Some(rest[..sign].to_vec())
    }

    fn word_after_name(&mut self) -> Parsed<Word> {
        if self.peek() == Some(b'(') {
            return Err(self.unsupported("an array"));
        }
        Ok(self.rest_of_word()?.unwrap_or_default())
    }

    /// Output to the null device or a standard descriptor; nothing else is known.
    fn redirection(&mut self, simple: &mut Simple) -> Parsed<bool> {
        for (form, output) in [
            (&b">/dev/null"[..], Output::Dropped),
            (b"> /dev/null", Output::Dropped),
            (b"1>/dev/null", Output::Dropped),
            (b"&>/dev/null", Output::Dropped),
            (b">&2", Output::Moved),
            (b"1>&2", Output::Moved),
            (b"2>/dev/null", Output::Kept),
            (b"2> /dev/null", Output::Kept),
            (b"2>&1", Output::Kept),
        ] {
            if self.take(form) {
                if self
                    .peek()
                    .is_some_and(|b| !matches!(b, b' ' | b'\t' | b'\n' | b';' | b'&' | b'|' | b')'))
                {
                    return Err(self.unsupported("a redirection"));
                }
                // With another one, the order would tell.
                let alone = !std::mem::replace(&mut simple.redirected, true);
                if !alone && (output == Output::Moved || simple.output == Output::Moved) {
                    return Err(self.unsupported("a redirection"));
                }
                if output != Output::Kept {
                    simple.output = output;
                }
                return Ok(true);
            }
        }
        let rest = &self.text[self.at..];
        let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        if matches!(rest.get(digits), Some(b'<' | b'>')) {
            return Err(self.unsupported("a redirection"));
        }
        Ok(false)
    }

    /// The next word; `None` at the end of the command.
    fn word(&mut self) -> Parsed<Option<Word>> {
        self.blanks();
        self.rest_of_word()
    }

    /// A word that begins here: neither a blank nor a `#` is skipped.
    fn rest_of_word(&mut self) -> Parsed<Option<Word>> {
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
