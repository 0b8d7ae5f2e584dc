//! A small shell: enough of POSIX `sh` for the environment scripts that builders write, evaluated
//! inside this process, so that a container starts without starting a shell and an image without any
//! shell starts at all.
//!
//! It promises three things. It is pure: what a script asks about files goes through [`Files`], what it
//! prints is collected in [`State`], no process is started. It ends: steps, work, depth and memory are
//! bounded. And it does not guess: whatever it does not know exactly is [`Unsupported`], and then the
//! state is as it was before, so that the caller can hand the script to a real shell instead.
//!
//! Known: assignments, quoting (`'…'`, `"…"`, `\`, `$'…'`), parameter expansion with
//! `:- - := = :+ + # ## % %%` and `${#x}`, `$((…))`, lists, `if`, `case`, `for`, `while`, `until`,
//! functions, `[[ … ]]` without `=~`, redirection to `/dev/null` and between 1 and 2, file name
//! patterns, sourcing, and the builtins of `builtin.rs`. Command substitution works as long as
//! what is in it does. Not known: other commands, pipes, `&`, here-documents, arrays, traps.
//!
//! Reference: POSIX.1-2024, Shell Command Language; where shells differ, what dash(1) and bash(1) share.

mod arith;
mod builtin;
mod eval;
mod expand;
mod parse;
mod pattern;
mod syntax;
mod test;
#[cfg(test)]
mod tests;
mod word;

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use syntax::Command;

/// Scripts above this many bytes are left to a real shell; the longest env script seen has 4 KiB.
pub const MAX_SCRIPT_BYTES: usize = 1 << 20;

/// What the interpreter has no answer for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    /// Line in the script, from 1.
    pub line: u32,
    /// The thing, as a person would name it.
    pub what: String,
    /// The words of the command, when a program would have to be started.
    pub command: Option<String>,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for Unsupported {}

/// How a script ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// At its end, or by `return`.
    Done,
    /// By `exit`, with this status.
    Exit(u8),
    /// By `exec` with these words; only where [`State::exec`] allows it.
    Exec(Vec<Vec<u8>>),
}

/// A variable.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Var {
    /// `None` after `export X` of an unset X.
    pub value: Option<Vec<u8>>,
    /// Handed to programs.
    pub exported: bool,
    /// May not change.
    pub readonly: bool,
}

/// What a script works on.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Variables by name.
    pub vars: BTreeMap<Vec<u8>, Var>,
    /// `$1`, `$2`, …
    pub params: Vec<Vec<u8>>,
    /// `$0`.
    pub name: Vec<u8>,
    /// `$?`.
    pub status: u8,
    /// Written to descriptor 1.
    pub out: Vec<u8>,
    /// Written to descriptor 2.
    pub err: Vec<u8>,
    /// Set by `umask`.
    pub umask: Option<u32>,
    /// `exec WORDS` ends the script with [`End::Exec`]; otherwise it is not supported.
    pub exec: bool,
    /// `set -a`: each variable that is set is exported.
    pub allexport: bool,
    /// `set -f`.
    noglob: bool,
    functions: BTreeMap<Vec<u8>, Rc<Command>>,
}

impl State {
    /// The value of a variable that is set.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.vars.get(name).and_then(|v| v.value.as_deref())
    }

    /// Whether a variable is set and not empty.
    pub fn has(&self, name: &[u8]) -> bool {
        self.get(name).is_some_and(|v| !v.is_empty())
    }

    /// Sets and exports a variable.
    pub fn export(&mut self, name: &[u8], value: Vec<u8>) {
        self.vars.insert(name.to_vec(), Var { value: Some(value), exported: true, readonly: false });
    }

    /// Sets a variable that is not exported.
    pub fn set(&mut self, name: &[u8], value: Vec<u8>) {
        self.vars.insert(name.to_vec(), Var { value: Some(value), exported: false, readonly: false });
    }
}

/// A question of `test` about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileTest {
    /// `-e`
    Exists,
    /// `-f`
    File,
    /// `-d`
    Directory,
    /// `-x`
    Executable,
    /// `-r`
    Readable,
    /// `-w`
    Writable,
    /// `-s`: has a size above 0.
    Filled,
    /// `-h`, `-L`
    Link,
}

/// The files that a script may ask about. `None` is "no answer here" and makes the script unsupported,
/// except for [`Files::read`] and [`Files::list`], where it is "cannot be read".
pub trait Files {
    /// Answers a test.
    fn test(&self, test: FileTest, path: &[u8]) -> Option<bool>;
    /// Names in a directory, in any order, without `.` and `..`.
    fn list(&self, directory: &[u8]) -> Option<Vec<Vec<u8>>>;
    /// The bytes of a file; at most a little over [`MAX_SCRIPT_BYTES`] are wanted.
    fn read(&self, path: &[u8]) -> Option<Vec<u8>>;
}

/// No files at all: each question makes the script unsupported.
#[derive(Debug, Clone, Copy)]
pub struct NoFiles;

impl Files for NoFiles {
    fn test(&self, _: FileTest, _: &[u8]) -> Option<bool> {
        None
    }
    fn list(&self, _: &[u8]) -> Option<Vec<Vec<u8>>> {
        None
    }
    fn read(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

/// Runs `script` as `.` would: in `state`, which keeps what it sets.
///
/// # Errors
/// [`Unsupported`], and then `state` is as it was.
pub fn run(script: &[u8], state: &mut State, files: &dyn Files) -> Result<End, Unsupported> {
    let list = parse::script(script)?;
    let mut draft = state.clone();
    let end = eval::Machine::new(&mut draft, files).script(&list)?;
    *state = draft;
    Ok(end)
}

/// [`run`] for a caller that throws `state` away after an error: nothing is copied.
///
/// # Errors
/// [`Unsupported`], and then `state` is in the middle of the script.
pub fn run_once(script: &[u8], state: &mut State, files: &dyn Files) -> Result<End, Unsupported> {
    let list = parse::script(script)?;
    eval::Machine::new(state, files).script(&list)
}

/// Evaluates the `$…`, backquotes and backslashes of `text` as within double quotes, where a double quote
/// itself is an ordinary byte (POSIX has this rule for here-documents).
///
/// # Errors
/// [`Unsupported`]; `state` may have changed.
pub fn expand(text: &[u8], state: &mut State, files: &dyn Files) -> Result<Vec<u8>, Unsupported> {
    if !text.iter().any(|b| matches!(b, b'$' | b'`' | b'\\')) {
        return Ok(text.to_vec());
    }
    let word = parse::here_text(text)?;
    eval::Machine::new(state, files).text(&word)
}

/// Whether [`expand`] can read `text` at all, whatever it takes to evaluate it.
pub fn is_well_formed(text: &[u8]) -> bool {
    parse::here_text(text).is_ok()
}

/// Whether `name` can be a variable's name.
pub fn is_name(name: &[u8]) -> bool {
    name.first().is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
        && name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_')
}
