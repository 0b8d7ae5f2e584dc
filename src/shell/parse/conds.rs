//! `[[ … ]]` of bash.

use super::{Command, Parsed, Parser, Part, Word};

/// What is asked.
pub(in crate::shell) enum Cond {
    Not(Box<Cond>),
    And(Box<Cond>, Box<Cond>),
    Or(Box<Cond>, Box<Cond>),
    /// A word that is not empty.
    Word(Word),
    /// `-n WORD` and the like.
    Unary(Vec<u8>, Word),
    /// The right side of `=`, `==` and `!=` is a pattern.
    Binary(Word, Vec<u8>, Word),
}

impl Parser<'_> {
    pub(super) fn conditions(&mut self) -> Parsed<Command> {
        let line = self.line;
        self.at += 2;
        let cond = self.either()?;
        self.expect("]]")?;
        Ok(Command::Test { cond, line })
    }

    fn either(&mut self) -> Parsed<Cond> {
        let mut cond = self.both()?;
        loop {
            self.lines();
            if !self.take(b"||") {
                return Ok(cond);
            }
            cond = Cond::Or(Box::new(cond), Box::new(self.both()?));
        }
    }

    fn both(&mut self) -> Parsed<Cond> {
        let mut cond = self.deeper(Self::single)?;
        loop {
            self.lines();
            if !self.take(b"&&") {
                return Ok(cond);
            }
            cond = Cond::And(Box::new(cond), Box::new(self.deeper(Self::single)?));
        }
    }

    fn single(&mut self) -> Parsed<Cond> {
        self.lines();
        if self.reserved() == b"!" {
            self.at += 1;
            return Ok(Cond::Not(Box::new(self.deeper(Self::single)?)));
        }
        if self.take(b"(") {
            let cond = self.either()?;
            self.lines();
            return match self.take(b")") {
                true => Ok(cond),
                false => Err(self.unsupported("\"[[\" without \")\"")),
            };
        }
        let first = self.operand()?;
        if let Some(op) = plain(&first)
            && op.len() == 2
            && op[0] == b'-'
            && !self.over()
        {
            let op = op.to_vec();
            return Ok(Cond::Unary(op, self.operand()?));
        }
        if self.over() {
            return Ok(Cond::Word(first));
        }
        let op = self.operand()?;
        match plain(&op) {
            Some(b"=" | b"==" | b"!=" | b"-eq" | b"-ne" | b"-lt" | b"-le" | b"-gt" | b"-ge") => {
                let op = plain(&op).unwrap_or_default().to_vec();
                Ok(Cond::Binary(first, op, self.operand()?))
            }
            _ => Err(self.unsupported("a comparison in \"[[\"")),
        }
    }

    /// Whether no word follows.
    fn over(&mut self) -> bool {
        self.blanks();
        self.reserved() == b"]]" || matches!(self.peek(), None | Some(b'\n' | b')' | b'&' | b'|'))
    }

    fn operand(&mut self) -> Parsed<Word> {
        self.blanks();
        let word = match self.reserved() {
            b"]]" => None,
            _ => self.word()?,
        };
        word.ok_or_else(|| self.unsupported("a word in \"[[\" is missing"))
    }
}

/// The text of a word without quotes or parameters.
fn plain(word: &Word) -> Option<&[u8]> {
    match word.as_slice() {
        [Part::Text(text)] => Some(text),
        _ => None,
    }
}
