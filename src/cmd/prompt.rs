//! Questions to the person at the terminal.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Read as _, Write as _};

use anyhow::{Context, Result, bail};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// What to do without a terminal, for passwords.
pub const PASSWORD_STDIN: &str = "--password-stdin reads a password from a file or pipe";

fn terminal(hint: &str) -> Result<File> {
    let opened = File::options().read(true).write(true).open("/dev/tty");
    opened.with_context(|| format!("there is no terminal to ask on ({hint})"))
}

/// Asks for a line. `hint` is what to do where there is no terminal.
///
/// # Errors
/// When there is no terminal.
pub fn line(question: &str, hint: &str) -> Result<String> {
    let mut terminal = terminal(hint)?;
    write!(terminal, "{question}")?;
    read_line(&terminal)
}

/// Asks for a line that is not shown. `hint` is what to do where there is no terminal.
///
/// # Errors
/// When there is no terminal.
pub fn secret(question: &str, hint: &str) -> Result<String> {
    let mut terminal = terminal(hint)?;
    write!(terminal, "{question}")?;
    let before = tcgetattr(&terminal)?;
    let mut silent = before.clone();
    silent.local_modes -= LocalModes::ECHO;
    tcsetattr(&terminal, OptionalActions::Flush, &silent)?;
    let answer = read_line(&terminal);
    tcsetattr(&terminal, OptionalActions::Now, &before)?;
    writeln!(terminal)?;
    answer
}

fn read_line(terminal: &File) -> Result<String> {
    let mut text = String::new();
    BufReader::new(terminal)
        .take(MAX_ANSWER)
        .read_line(&mut text)?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// `--password-stdin`.
///
/// # Errors
/// When nothing comes.
pub fn from_stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .take(MAX_ANSWER)
        .read_to_string(&mut text)
        .context("cannot read the password from standard input")?;
    let secret = text.trim_end_matches(['\r', '\n']).to_owned();
    if secret.is_empty() {
        bail!("standard input brought no password");
    }
    Ok(secret)
}

/// Asks whether to go on, where somebody can answer.
///
/// # Errors
/// When standard input cannot be read.
pub fn confirm(question: &str) -> Result<bool> {
    let mut stderr = std::io::stderr();
    // Where nobody sees the question, nobody answers.
    let _ = write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush());
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(MAX_ANSWER)
        .read_line(&mut text)?;
    if !std::io::stdin().is_terminal() {
        let _ = writeln!(stderr);
    }
    Ok(matches!(text.trim(), "y" | "Y" | "yes"))
}
