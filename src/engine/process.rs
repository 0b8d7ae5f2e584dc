//! The last steps: leave everything that the container must not have, and become the program.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::Mode;

use super::command::{self, Dispatch, Level, Notice};
use super::environment::{self, Finished};
use super::sys;
use crate::plan::env::Environment;
use crate::plan::{Capabilities, IdMap, Process, Verb};
use crate::say;

/// What `execve(2)` gets.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
}

impl Program {
    /// Sets a variable of its environment, or takes it away.
    pub fn set(&mut self, name: &str, value: Option<OsString>) {
        self.env.retain(|(n, _)| n != name);
        self.env.extend(value.map(|value| (name.into(), value)));
    }

    /// Another program with the same environment.
    pub fn sibling(&self, path: &str, argv: &[&OsStr]) -> Program {
        Program {
            path: path.into(),
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            env: self.env.clone(),
        }
    }
}

/// What comes of looking at the image's scripts.
pub enum Next {
    /// A program to become.
    Run(Program),
    /// Nothing to run: this status.
    End(u8),
}

/// Enters the working directory: the one wanted, else home, else `/`, saying so. Gives the one entered.
///
/// # Errors
/// When `--cwd` named it and it cannot be entered, or when it lies outside the container.
pub fn enter_directory(process: &Process) -> Result<PathBuf> {
    let mut entered = process.cwd.as_path();
    if let Err(error) = rustix::process::chdir(&process.cwd) {
        if process.cwd_required {
            bail!(
                "failed to set working directory: chdir {}: {}",
                process.cwd.display(),
                say::word(&error.into())
            );
        }
        let instead = [process.home.as_path(), Path::new("/")]
            .into_iter()
            .find(|dir| rustix::process::chdir(*dir).is_ok());
        let instead =
            instead.ok_or_else(|| anyhow!("cannot enter any directory of the container"))?;
        say::warn(format_args!(
            "Error changing the container working directory. Using '{}' instead: chdir {}: {}",
            instead.display(),
            process.cwd.display(),
            say::word(&error.into())
        ));
        entered = instead;
    }
    // A directory outside the root shows itself by this prefix (getcwd(2)).
    let inside =
        rustix::process::getcwd(Vec::new()).is_ok_and(|cwd| cwd.as_bytes().starts_with(b"/"));
    if !inside {
        bail!(
            "the working directory {} is not inside the container",
            process.cwd.display()
        );
    }
    Ok(entered.to_owned())
}

/// Gives up privileges and sets what a process inherits.
///
/// # Errors
/// When the kernel refuses: then the program must not run.
pub fn restrict(ids: &IdMap, process: &Process) -> Result<()> {
    sys::new_session_keyring();
    let left = process.rights.left(ids.is_root());
    match (ids.is_root(), left) {
        (true, Capabilities::ALL) => {}
        (false, Capabilities(0)) => sys::drop_bounding_set(),
        (root, left) => sys::limit_capabilities(left, !root)?,
    }
    let _ = rustix::thread::set_no_new_privs(true);
    if !rustix::thread::no_new_privs().unwrap_or(false) {
        bail!("cannot set no_new_privs");
    }
    sys::forbid_terminal_injection()?;
    if process.close_descriptors {
        sys::close_on_exec()?;
    }
    rustix::process::umask(Mode::from_raw_mode(process.umask));
    Ok(())
}

/// Finds out what to run: the image's scripts settle the environment, the verb and the image the program.
///
/// # Errors
/// When there is nothing to run, in the peers' words.
pub fn resolve(process: &Process, environment: &Environment, cwd: &Path) -> Result<Next> {
    let argv = match command::dispatch(
        process.verb.name(),
        process.app.as_deref(),
        process.shell.as_deref(),
        &process.args,
    ) {
        Dispatch::Exec(argv, notice) => {
            match notice {
                None => {}
                Some(Notice::Info(text)) => say::info(format_args!("{text}")),
                Some(Notice::Warning(text)) => say::warn(format_args!("{text}")),
            }
            argv
        }
        Dispatch::Message {
            level,
            text,
            status,
        } => {
            match level {
                Level::Info => say::info(format_args!("{text}")),
                Level::Error => say::error(format_args!("{text}")),
                Level::Fatal => bail!("{text}"),
                Level::Plain => say::out(format_args!("{text}\n"))?,
            }
            return Ok(Next::End(status));
        }
    };
    match environment::finish(environment, cwd)? {
        Finished::Ready(mut env) => {
            if process.verb == Verb::Shell {
                env.retain(|(name, _)| name != "SHELL");
                env.push(("SHELL".into(), argv.first().cloned().unwrap_or_default()));
            }
            program(argv, env).map(Next::Run)
        }
        Finished::Ended(status) => Ok(Next::End(status)),
        Finished::Shell {
            shell,
            script,
            vars,
        } => {
            let mut words: Vec<OsString> = shell.iter().map(Into::into).collect();
            // Other users can read the words of a command, but not its environment, and the script holds the caller's.
            words.extend(["-c", "eval \"$CAPSID_SCRIPT\"", "capsid"].map(Into::into));
            words.extend(argv);
            let mut vars = vars;
            vars.push(("CAPSID_SCRIPT".into(), script));
            Ok(Next::Run(Program {
                path: shell[0].into(),
                argv: words,
                env: vars,
            }))
        }
    }
}

fn program(argv: Vec<OsString>, env: Vec<(OsString, OsString)>) -> Result<Program> {
    let name = argv.first().ok_or_else(|| anyhow!("no command to run"))?;
    let path = env
        .iter()
        .find(|(k, _)| k == "PATH")
        .map_or(OsStr::new(""), |(_, v)| v.as_os_str());
    let path = command::find_program(name, path)?;
    Ok(Program { path, argv, env })
}

/// Becomes the program.
///
/// # Errors
/// Only when that failed.
pub fn exec(program: &Program) -> Result<Infallible> {
    let text = |s: &OsStr| CString::new(s.as_bytes()).context("a word holds a NUL byte");
    let env: Vec<CString> = program
        .env
        .iter()
        .map(|(k, v)| {
            let mut line = k.clone();
            line.push("=");
            line.push(v);
            text(&line)
        })
        .collect::<Result<_>>()?;
    let path = text(program.path.as_os_str())?;
    let argv: Vec<CString> = program
        .argv
        .iter()
        .map(|a| text(a))
        .collect::<Result<_>>()?;
    let shown = program.path.display();
    sys::restore_signals();
    match nix::unistd::execve(&path, &argv, &env) {
        // A script without an interpreter line is the shell's.
        Err(nix::Error::ENOEXEC) if is_text(&program.path) => {
            let mut words = vec![c"/bin/sh".to_owned(), path];
            words.extend(argv.into_iter().skip(1));
            nix::unistd::execve(c"/bin/sh", &words, &env)
                .with_context(|| format!("exec {shown} failed: cannot run /bin/sh for it"))
        }
        Err(nix::Error::ENOEXEC) => {
            bail!("exec {shown} failed: not a program for this machine (exec format error)")
        }
        Err(nix::Error::ENOENT) => match interpreter(&program.path) {
            Some(interpreter) => bail!(
                "exec {shown} failed: {interpreter}, which it names as its interpreter, is not in the container"
            ),
            None => bail!(
                "exec {shown} failed: the loader of shared libraries that it needs is not in the container (is it a program of another system?)"
            ),
        },
        Err(nix::Error::E2BIG) => {
            bail!("exec {shown} failed: arguments and environment are too long")
        }
        Err(nix::Error::EACCES) => bail!("exec {shown} failed: permission denied"),
        Err(error) => bail!("exec {shown} failed: {error}"),
        Ok(never) => match never {},
    }
}

/// The program in the first line of a script (`execve(2)`).
fn interpreter(path: &Path) -> Option<String> {
    let mut head = [0; 256];
    let mut file = std::fs::File::open(path).ok()?;
    let len = std::io::Read::read(&mut file, &mut head).ok()?;
    let line = head[..len]
        .strip_prefix(b"#!")?
        .split(|b| *b == b'\n')
        .next()?;
    let line = String::from_utf8_lossy(line);
    line.split_ascii_whitespace().next().map(str::to_owned)
}

/// Neither ELF nor another binary: the first line holds no NUL byte.
fn is_text(path: &Path) -> bool {
    let mut head = [0; 128];
    let Ok(mut file) = std::fs::File::open(path) else {
        return false;
    };
    let Ok(len) = std::io::Read::read(&mut file, &mut head) else {
        return false;
    };
    !head[..len].contains(&0)
}
