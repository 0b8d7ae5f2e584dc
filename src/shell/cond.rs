//! `[[ … ]]`: neither fields nor file names are made of its words.

use super::Unsupported;
use super::eval::{Machine, binary};
use super::expand::{fits, unsupported};
use super::parse::Cond;

impl Machine<'_> {
    pub(super) fn holds(&mut self, cond: &Cond, line: u32) -> Result<bool, Unsupported> {
        self.step(line)?;
        Ok(match cond {
            Cond::Not(cond) => !self.holds(cond, line)?,
            Cond::And(one, other) => self.holds(one, line)? && self.holds(other, line)?,
            Cond::Or(one, other) => self.holds(one, line)? || self.holds(other, line)?,
            Cond::Word(word) => !self.joined(word, line)?.is_empty(),
            Cond::Unary(op, word) => {
                let word = self.joined(word, line)?;
                match op.as_slice() {
                    b"-v" if super::is_name(&word) => self.state.get(&word).is_some(),
                    op => self.unary(op, &word, line)?,
                }
            }
            Cond::Binary(left, op, right) => {
                let left = self.joined(left, line)?;
                match op.as_slice() {
                    b"=" | b"==" => fits(&self.pattern(right, line)?, &left, line)?,
                    b"!=" => !fits(&self.pattern(right, line)?, &left, line)?,
                    // What is no number would be the name of a variable.
                    op if !left.iter().all(|b| b.is_ascii_digit() || *b == b'-') => {
                        let op = String::from_utf8_lossy(op);
                        return Err(unsupported(line, &format!("{op} of a name")));
                    }
                    op => binary(&left, op, &self.joined(right, line)?, line)?,
                }
            }
        })
    }
}
