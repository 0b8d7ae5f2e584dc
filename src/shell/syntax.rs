//! What a script looks like once read.

use std::rc::Rc;

/// Commands separated by `;` or line ends.
pub(super) type List = Vec<AndOr>;

/// Commands joined by `&&` and `||`, evaluated from the left.
#[derive(Debug)]
pub(super) struct AndOr {
    pub(super) first: Stage,
    pub(super) rest: Vec<(Join, Stage)>,
}

/// What joins two commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    And,
    Or,
}

/// A command and whether `!` turns its status around.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) negated: bool,
    pub(super) command: Command,
}

/// One command.
#[derive(Debug)]
pub(super) enum Command {
    Simple(Simple),
    /// `{ … }`, and what wraps another command with redirections.
    Group(List, Vec<Redirect>),
    /// `( … )`
    Subshell(List, Vec<Redirect>),
    If { arms: Vec<(List, List)>, otherwise: List },
    For { name: Vec<u8>, words: Option<Vec<Word>>, body: List },
    While { until: bool, condition: List, body: List },
    Case { word: Word, arms: Vec<(Vec<Word>, List)> },
    Function { name: Vec<u8>, body: Rc<Command> },
    Condition(Condition),
}

/// Assignments, words and redirections.
#[derive(Debug)]
pub(super) struct Simple {
    pub(super) line: u32,
    pub(super) assignments: Vec<Assignment>,
    pub(super) words: Vec<Word>,
    pub(super) redirects: Vec<Redirect>,
}

/// `name=value`, or `name+=value`.
#[derive(Debug)]
pub(super) struct Assignment {
    pub(super) name: Vec<u8>,
    pub(super) append: bool,
    pub(super) value: Word,
}

/// A redirection of output.
#[derive(Debug)]
pub(super) enum Redirect {
    /// Descriptor 1 or 2, or both (0), to the null device.
    Null(u8),
    /// Descriptor `.0` to where `.1` goes now.
    Copy(u8, u8),
    /// Standard input from the null device.
    Input,
}

/// `[[ … ]]`
#[derive(Debug)]
pub(super) enum Condition {
    Not(Box<Condition>),
    And(Box<Condition>, Box<Condition>),
    Or(Box<Condition>, Box<Condition>),
    /// One word: is it not empty?
    Filled(Word),
    Unary(u8, Word),
    /// `=`, `==` (with a pattern), `!=`, `-eq` and the like.
    Binary(Vec<u8>, Word, Word),
}

/// Parts that are joined without a blank.
pub(super) type Word = Vec<Part>;

/// A part of a word.
#[derive(Debug)]
pub(super) enum Part {
    /// As written.
    Text(Vec<u8>),
    /// After a backslash or within single quotes.
    Quoted(Vec<u8>),
    /// Within double quotes.
    Double(Word),
    /// `$x`, `${…}`
    Parameter(Parameter, Op),
    /// `$(…)`, backquotes
    Command(List),
    /// `$((…))`
    Arithmetic(Word),
    /// `~`
    Home,
}

/// What `$` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Parameter {
    Variable(Vec<u8>),
    Positional(usize),
    /// `$@`
    Each,
    /// `$*`
    Joined,
    Count,
    Status,
    Name,
}

/// What is done with its value.
#[derive(Debug)]
pub(super) enum Op {
    Plain,
    Length,
    /// `-`, `=`, `+` or `?`; with a colon an empty value counts as unset.
    Or { sign: u8, colon: bool, word: Word },
    /// `#`, `##`, `%`, `%%`
    Cut { suffix: bool, longest: bool, pattern: Word },
}
