//! Messages to the person: levels, prefixes, colours; always on stderr. And results, on stdout.
//!
//! The form (`FATAL:   text`, level word padded to nine columns) is Apptainer's, because clients sort
//! on it. Text that came from outside (file names, images) may hold control bytes: they are escaped
//! here, once, so that no message can drive a terminal. Nor does one show Rust's numbers of errors.

use std::fmt::{Arguments, Write as _};
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, AtomicI8, Ordering};

use anyhow::{Context as _, Result};

/// How much is said; the numbers are Apptainer's `MESSAGELEVEL`.
static LEVEL: AtomicI8 = AtomicI8::new(INFO);
static COLOUR: AtomicBool = AtomicBool::new(true);

/// Only what ends the program.
pub const FATAL: i8 = -4;
/// Errors.
pub const ERROR: i8 = -3;
/// Warnings.
pub const WARNING: i8 = -2;
/// The default.
pub const INFO: i8 = 1;
/// `--verbose`.
pub const VERBOSE: i8 = 2;
/// `--debug`.
pub const DEBUG: i8 = 5;

/// Sets the level; a message is printed when its own level is not above this.
pub fn set_level(level: i8) {
    LEVEL.store(level, Ordering::Relaxed);
}

/// The level in force.
pub fn level() -> i8 {
    LEVEL.load(Ordering::Relaxed)
}

/// `--nocolor`.
pub fn disable_colour() {
    COLOUR.store(false, Ordering::Relaxed);
}

/// The program ends after this one.
pub fn fatal(text: Arguments) {
    say(FATAL, "FATAL:", "31", text);
}
/// Something went wrong; the program may go on.
pub fn error(text: Arguments) {
    say(ERROR, "ERROR:", "31", text);
}
/// The person should know.
pub fn warn(text: Arguments) {
    say(WARNING, "WARNING:", "33", text);
}
/// What is being done.
pub fn info(text: Arguments) {
    say(INFO, "INFO:", "34", text);
}
/// Shown with `--verbose`.
pub fn verbose(text: Arguments) {
    say(VERBOSE, "VERBOSE:", "36", text);
}
/// Shown with `--debug`.
pub fn debug(text: Arguments) {
    say(DEBUG, "DEBUG:", "36", text);
}

/// Prints a result of a command on standard output.
///
/// # Errors
/// When it is full or closed.
pub fn out(text: Arguments) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    // Nobody flushes at the end: `main` is C's.
    match stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Closed.into()),
        other => other.context("cannot write to standard output"),
    }
}

/// Whoever read standard output has seen enough.
#[derive(Debug)]
pub struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for Closed {}

fn say(level: i8, word: &str, colour: &str, text: Arguments) {
    if level > self::level() {
        return;
    }
    let text = printable(&plain(&text.to_string()));
    let stderr = std::io::stderr();
    let line = if COLOUR.load(Ordering::Relaxed) && stderr.is_terminal() && wants_colour() {
        format!("\x1b[{colour}m{word:<9}\x1b[0m{text}\n")
    } else {
        format!("{word:<9}{text}\n")
    };
    // Nobody is left to tell when stderr is gone.
    let _ = stderr.lock().write_all(line.as_bytes());
}

/// `NO_COLOR` (no-color.org) and `TERM=dumb` ask for none.
fn wants_colour() -> bool {
    let is_asked = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    !is_asked && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// `text` with control characters (but not line ends and tabs) written as escapes.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' && c != '\t' {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Without the numbers that Rust puts behind the system's words: "(os error 2)".
pub fn plain(text: &str) -> String {
    const MARK: &str = " (os error ";
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(MARK) {
        plain.push_str(before);
        match after.split_once(')') {
            Some((number, tail)) if number.bytes().all(|b| b.is_ascii_digit()) => rest = tail,
            _ => {
                plain.push_str(MARK);
                rest = after;
            }
        }
    }
    plain + rest
}

/// The system's word for an error, as Go and so the peers print it: "no such file or directory".
pub fn word(error: &std::io::Error) -> String {
    let text = plain(&error.to_string());
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_lowercase);
    first.chain(chars).collect()
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn control_bytes_are_escaped() {
        assert_eq!(super::printable("a\x1b[31mb\n"), "a\\u{1b}[31mb\n");
    }

    #[test]
    fn system_errors_are_words() {
        assert_eq!(
            plain("a: No such file (os error 2), b (os error 13)"),
            "a: No such file, b"
        );
        assert_eq!(plain("x (os error y) z"), "x (os error y) z");
        let error = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(super::word(&error), "no such file or directory");
    }
}
