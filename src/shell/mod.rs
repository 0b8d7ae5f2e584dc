//! A small shell: enough of POSIX `sh` for the environment scripts that builders write, evaluated inside this process, so
//! that a container starts without starting a shell, and an image without any shell starts at all.
//!
//! It promises three things. It is pure: what a script asks about files goes through [`Files`], what it prints is collected,
//! no process is started. It ends: steps, depth and memory are bounded. And it does not guess: whatever it does not know
//! exactly is [`Unsupported`], and the caller hands the script to a real shell instead.
//!
//! Known: assignments, quoting, parameter expansion with `:- - := = :+ +`, `# ## % %%` and `${#x}`, lists with `&&` and
//! `||`, `if`, `case`, `for`, `!`, `{ }`, `*` and `?` in file names, output to `/dev/null` and to the standard error, and
//! the builtins `: . [ echo exit export false return source test true unset`. Of bash, where other shells find an error:
//! arrays with numbers, `+=`, `[[ ]]`, `${x/y/z}`, `${x:1:2}`, `${x^^}` and `${x,,}`. Not known: everything else.
//!
//! Reference: POSIX.1-2024, Shell Command Language; bash(1).

mod cond;
mod eval;
mod expand;
mod parse;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

/// Scripts above this many bytes are left to a real shell; the longest one seen has 4 KiB.
pub const MAX_SCRIPT_BYTES: usize = 1 << 20;
/// Patterns in directories with more names than this, or with more files, are left to a real shell.
pub const MAX_NAMES: usize = 4096;

/// What the interpreter has no answer for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    /// Line in the script, from 1.
    pub line: u32,
    /// The thing, as a person would name it.
    pub what: String,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for Unsupported {}

/// How a script ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// At its end, or by `return`.
    Done,
    /// By `exit`, with this status.
    Exit(u8),
}

/// A variable.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Var {
    /// `None` after `export X` of an unset X.
    pub value: Option<Vec<u8>>,
    /// Handed to programs.
    pub exported: bool,
    /// A script has set it.
    pub assigned: bool,
    /// It is an array, which is not handed to programs: its elements from number 1 on.
    pub more: Option<BTreeMap<u32, Vec<u8>>>,
    /// It was exported before it was unset: to some shells it still is.
    pub unset: bool,
}

impl Var {
    /// All elements of an array, or the one value.
    fn elements(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.value
            .iter()
            .chain(self.more.iter().flat_map(BTreeMap::values))
    }
}

/// What a script works on.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Variables by name.
    pub vars: BTreeMap<Vec<u8>, Var>,
    /// `$1`, `$2`, …
    pub params: Vec<Vec<u8>>,
    /// `$?`.
    pub status: u8,
    /// What was printed.
    pub out: Vec<u8>,
    /// What was printed to the standard error.
    pub err: Vec<u8>,
}

impl State {
    /// The value of a variable that is set.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.vars.get(name).and_then(|v| v.value.as_deref())
    }

    /// Sets and exports a variable, as the environment at the start.
    pub fn export(&mut self, name: &[u8], value: &[u8]) {
        let var = Var {
            value: Some(value.to_vec()),
            exported: true,
            ..Var::default()
        };
        self.vars.insert(name.to_vec(), var);
    }

    /// What programs get.
    pub fn handed_on(self) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
        let vars = self.vars.into_iter();
        let vars = vars.filter(|(_, var)| var.exported && var.more.is_none());
        vars.filter_map(|(name, var)| Some((name, var.value?)))
    }
}

/// The files that a script may ask about.
pub trait Files {
    /// Answers a test of `test(1)`, named by its letter; `None` when that cannot be known here.
    fn test(&self, test: u8, path: &[u8]) -> Option<bool>;
    /// The bytes of a file to be sourced; `None` when there is none.
    fn read(&self, path: &[u8]) -> Option<Vec<u8>>;
    /// The names in a directory, none where there is no such directory; `None` when that cannot be known here.
    fn names(&self, directory: &[u8]) -> Option<Vec<Vec<u8>>>;
}

/// No files at all: each question makes the script unsupported.
#[derive(Debug, Clone, Copy)]
pub struct NoFiles;

impl Files for NoFiles {
    fn test(&self, _: u8, _: &[u8]) -> Option<bool> {
        None
    }
    fn read(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
    fn names(&self, _: &[u8]) -> Option<Vec<Vec<u8>>> {
        None
    }
}

/// Runs `script` as `.` would: in `state`, which keeps what it sets.
///
/// # Errors
/// [`Unsupported`], and then `state` is in the middle of the script.
pub fn run(script: &[u8], state: &mut State, files: &dyn Files) -> Result<End, Unsupported> {
    let list = parse::script(script)?;
    eval::Machine::new(state, files).script(&list)
}

/// Evaluates the `$…` and backslashes of `text` as within double quotes, where a double quote itself is an ordinary byte.
///
/// # Errors
/// [`Unsupported`].
pub fn expand(text: &[u8], state: &mut State) -> Result<Vec<u8>, Unsupported> {
    if !text.iter().any(|b| matches!(b, b'$' | b'`' | b'\\')) {
        return Ok(text.to_vec());
    }
    let word = parse::text(text)?;
    eval::Machine::new(state, &NoFiles).joined(&word, 1)
}

/// Whether `name` can be a variable's name.
pub fn is_name(name: &[u8]) -> bool {
    name.first()
        .is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
        && name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
}
