//! Text to commands; their words are in `words`.

mod words;

mod conds;

pub(super) use conds::Cond;
pub(super) use words::{Op, Parameter, Part, Place, Word, text};

use std::borrow::Cow;

use super::{MAX_SCRIPT_BYTES, Unsupported, is_name};

/// Nesting of commands and expansions; more is no environment script.
const MAX_DEPTH: u32 = 64;

/// Numbers of elements are below this.
const MAX_INDEX: u32 = 1 << 20;

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
    /// `[[ … ]]`
    Test {
        cond: Cond,
        line: u32,
    },
}

/// `NAME=…`, or as bash has it `NAME[N]=…`, `NAME+=…` and `NAME=(…)`.
pub(super) struct Assignment {
    pub name: Vec<u8>,
    pub index: Option<u32>,
    pub append: bool,
    pub value: Value,
}

pub(super) enum Value {
    One(Word),
    List(Vec<Word>),
}

pub(super) struct Simple {
    pub line: u32,
    pub assignments: Vec<Assignment>,
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

/// Parses a script.
pub(super) fn script(text: &[u8]) -> Result<List, Unsupported> {
    if text.len() > MAX_SCRIPT_BYTES || text.contains(&0) {
        return Err(Unsupported {
            line: 1,
            what: "not a script of sensible size".into(),
        });
    }
    let whole = joined_lines(text);
    let mut parser = Parser {
        text: &whole,
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

/// The text with its continued lines joined: a backslash at the end of a line and the end itself go, wherever they stand
/// but in single quotes and comments.
fn joined_lines(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.windows(2).any(|w| w == b"\\\n") {
        return Cow::Borrowed(text);
    }
    let mut joined = Vec::with_capacity(text.len());
    let (mut single, mut double, mut comment) = (false, false, false);
    let mut rest = text;
    while let Some((byte, behind)) = rest.split_first() {
        let last = joined.last().copied().unwrap_or(b'\n');
        rest = behind;
        match byte {
            b'\n' if comment => comment = false,
            _ if comment => {}
            b'\'' if !double => single = !single,
            _ if single => {}
            b'\\' if behind.first() == Some(&b'\n') => {
                rest = &behind[1..];
                continue;
            }
            b'\\' => {
                joined.push(*byte);
                let Some((escaped, behind)) = behind.split_first() else {
                    continue;
                };
                joined.push(*escaped);
                rest = behind;
                continue;
            }
            b'"' => double = !double,
            b'#' if !double && matches!(last, b' ' | b'\t' | b'\n' | b';' | b'&' | b'|' | b'(') => {
                comment = true;
            }
            _ => {}
        }
        joined.push(*byte);
    }
    Cow::Owned(joined)
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
            b"[[" => self.conditions(),
            b"while" | b"until" | b"function" | b"select" | b"time" | b"coproc" | b"then"
            | b"else" | b"elif" | b"fi" | b"do" | b"done" | b"esac" | b"}" | b"]]" => {
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
                && let Some(assignment) = self.assignment()?
            {
                simple.assignments.push(assignment);
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

    /// An assignment at this place.
    fn assignment(&mut self) -> Parsed<Option<Assignment>> {
        let rest = &self.text[self.at..];
        let is_part = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
        let end = rest.iter().take_while(|b| is_part(b)).count();
        let (name, mut behind) = rest.split_at(end);
        if !is_name(name) {
            return Ok(None);
        }
        let mut index = None;
        if let Some(inner) = behind.strip_prefix(b"[")
            && let Some(close) = inner.iter().position(|b| *b == b']')
        {
            index = Some(&inner[..close]);
            behind = &inner[close + 1..];
        }
        let append = behind.starts_with(b"+=");
        if !append && !behind.starts_with(b"=") {
            return Ok(None);
        }
        let index = match index.map(|digits| (std::str::from_utf8(digits), digits)) {
            None => None,
            Some((Ok(text), digits)) if digits.iter().all(u8::is_ascii_digit) => {
                let number = text.parse().ok().filter(|n| *n < MAX_INDEX);
                Some(number.ok_or_else(|| self.unsupported("an index"))?)
            }
            Some(_) => return Err(self.unsupported("an index")),
        };
        let name = name.to_vec();
        self.at = self.text.len() - behind.len() + 1 + usize::from(append);
        let value = match self.peek() {
            Some(b'(') if index.is_none() => Value::List(self.elements()?),
            Some(b'(') => return Err(self.unsupported("an array")),
            _ => Value::One(self.rest_of_word()?.unwrap_or_default()),
        };
        Ok(Some(Assignment {
            name,
            index,
            append,
            value,
        }))
    }

    /// `(…)` of an array.
    fn elements(&mut self) -> Parsed<Vec<Word>> {
        self.at += 1;
        let mut words = Vec::new();
        loop {
            self.lines();
            if self.take(b")") {
                return Ok(words);
            }
            let word = self.word()?;
            let word = word.ok_or_else(|| self.unsupported("an array without its end"))?;
            if matches!(word.first(), Some(Part::Text(text)) if text.starts_with(b"[")) {
                return Err(self.unsupported("an array with numbers"));
            }
            words.push(word);
        }
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
}
