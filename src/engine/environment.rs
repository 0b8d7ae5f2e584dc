//! The last word on environment and program, said inside the container: what the image's scripts make of the variables, and
//! which of its programs a command means.
//!
//! Scripts are evaluated in this process ([`crate::shell`]). What that cannot do, the image's own shell does: once, as the
//! program that then becomes the payload.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use rustix::fs::Access;

use crate::plan::env::{DEFAULT_PATH, Environment, LIBS};
use crate::say;
use crate::shell::{self, End, Files, State};

const DIRECTORY: &str = "/.singularity.d/env";
/// Scripts of images from before 2017.
const OLD_SCRIPT: &str = "/environment";
/// What it does is done here.
const RUNTIME_SCRIPT: &str = "99-runtimevars.sh";
const PROMPT: &str = "Apptainer> ";
/// Asks an interactive bash to set the prompt again after its own start files.
const PROMPT_COMMAND: &str = "PS1=\"Apptainer> \"; unset PROMPT_COMMAND";
/// A single argument of execve(2) has at most 128 KiB.
const MAX_SHELL_BYTES: usize = 120 << 10;

/// What the scripts left.
#[derive(Debug)]
pub enum Finished {
    /// The environment.
    Ready(Vec<(OsString, OsString)>),
    /// This script for the image's `/bin/sh`, started with these variables, makes it and runs `"$@"`.
    Shell {
        /// For `sh -c`.
        script: OsString,
        /// For `sh` itself.
        vars: Vec<(OsString, OsString)>,
    },
    /// A script ended the run with this status.
    Ended(u8),
}

/// Lets the image's scripts have their say. `cwd` is the working directory.
///
/// # Errors
/// When a script needs a shell and the image has none.
pub fn finish(environment: &Environment, cwd: &Path) -> Result<Finished> {
    let mut state = State::default();
    for (name, value) in &environment.vars {
        state.export(name.as_bytes(), value.as_bytes());
    }
    state.export(b"PWD", cwd.as_os_str().as_bytes());
    let scripts = scripts();
    match natively(environment, &scripts, &mut state.clone()) {
        Ok(finished) => Ok(finished),
        Err(why) => {
            if rustix::fs::access("/bin/sh", Access::EXEC_OK).is_err() {
                bail!("cannot evaluate {why}, and the image has no /bin/sh that could");
            }
            say::verbose(format_args!(
                "the image's own shell evaluates its environment: {why}"
            ));
            let vars = state.vars.into_iter().filter_map(|(name, var)| {
                Some((OsString::from_vec(name), OsString::from_vec(var.value?)))
            });
            let script = for_shell(environment, &scripts);
            if script.len() > MAX_SHELL_BYTES {
                bail!(
                    "the environment is too large for the image's shell ({} of {MAX_SHELL_BYTES} bytes): use --cleanenv",
                    script.len()
                );
            }
            Ok(Finished::Shell {
                script: OsString::from_vec(script),
                vars: vars.collect(),
            })
        }
    }
}

/// The image's scripts in the order of their names.
fn scripts() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return Some(PathBuf::from(OLD_SCRIPT))
            .filter(|p| p.exists())
            .into_iter()
            .collect();
    };
    let mut scripts: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    scripts.retain(|p| p.extension().is_some_and(|e| e == "sh") && !p.ends_with(RUNTIME_SCRIPT));
    scripts.sort();
    scripts
}

fn is(script: &Path, start: &str) -> bool {
    script
        .file_name()
        .is_some_and(|n| n.as_bytes().starts_with(start.as_bytes()))
}

fn natively(environment: &Environment, scripts: &[PathBuf], state: &mut State) -> Result<Finished> {
    let mut overridden = false;
    for script in scripts {
        if is(script, "90-") && state.get(b"PATH").is_none_or(<[u8]>::is_empty) {
            state.export(b"PATH", DEFAULT_PATH.as_bytes());
        }
        let text = Container
            .read(script.as_os_str().as_bytes())
            .ok_or_else(|| anyhow!("{}: it cannot be read", script.display()))?;
        let end = shell::run(&text, state, &Container)
            .map_err(|error| anyhow!("{}: {error}", script.display()))?;
        if let End::Exit(status) = end {
            print(&state.out);
            return Ok(Finished::Ended(status));
        }
        if is(script, "10-docker") {
            let path = with_defaults(state.get(b"PATH").unwrap_or_default());
            state.export(b"PATH", &path);
        }
        if is(script, "99-base.sh") {
            apply(environment, state)?;
            overridden = true;
        }
    }
    if !overridden {
        apply(environment, state)?;
    }
    set_path(environment, state)?;
    for (name, value) in &environment.host {
        match state.get(name.as_bytes()) {
            None => state.export(name.as_bytes(), value.as_bytes()),
            Some([]) => drop(state.vars.remove(name.as_bytes())),
            Some(_) => {}
        }
    }
    for (name, value) in [
        ("LD_LIBRARY_PATH", LIBS),
        ("PS1", PROMPT),
        ("PROMPT_COMMAND", PROMPT_COMMAND),
    ] {
        if state.get(name.as_bytes()).is_none() || name == "PROMPT_COMMAND" {
            state.export(name.as_bytes(), value.as_bytes());
        }
    }
    print(&state.out);
    let exported = std::mem::take(&mut state.vars)
        .into_iter()
        .filter(|(_, var)| var.exported);
    Ok(Finished::Ready(
        exported
            .filter_map(|(name, var)| {
                Some((OsString::from_vec(name), OsString::from_vec(var.value?)))
            })
            .collect(),
    ))
}

/// What a script says is the payload's output, as it would be with a real shell.
fn print(out: &[u8]) {
    use std::io::Write as _;
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(out).and_then(|()| stdout.flush());
}

fn evaluated(environment: &Environment, value: &OsStr, state: &mut State) -> Result<Vec<u8>> {
    if environment.no_eval {
        return Ok(value.as_bytes().to_vec());
    }
    shell::expand(value.as_bytes(), state)
        .map_err(|error| anyhow!("{}: {}", value.display(), error.what))
}

fn apply(environment: &Environment, state: &mut State) -> Result<()> {
    for (name, value) in &environment.overrides {
        let value = evaluated(environment, value, state)?;
        state.export(name.as_bytes(), &value);
    }
    Ok(())
}

fn set_path(environment: &Environment, state: &mut State) -> Result<()> {
    let mut path = state.get(b"PATH").unwrap_or_default().to_vec();
    if let Some(more) = &environment.prepend_path {
        path = [evaluated(environment, more, state)?, path].join(&b':');
    }
    if let Some(more) = &environment.append_path {
        path = [path, evaluated(environment, more, state)?].join(&b':');
    }
    if let Some(all) = &environment.path {
        path = evaluated(environment, all, state)?;
    }
    state.export(b"PATH", &path);
    Ok(())
}

/// A search path of an OCI image, with the usual directories behind it where it lacks them.
fn with_defaults(path: &[u8]) -> Vec<u8> {
    let mut path = path.to_vec();
    for directory in DEFAULT_PATH.split(':').map(str::as_bytes) {
        if !path.split(|b| *b == b':').any(|p| p == directory) {
            if !path.is_empty() {
                path.push(b':');
            }
            path.extend(directory);
        }
    }
    path
}

/// The same steps as [`natively`], for a real shell.
fn for_shell(environment: &Environment, scripts: &[PathBuf]) -> Vec<u8> {
    let mut text = Vec::new();
    let mut overridden = false;
    for script in scripts {
        if is(script, "90-") {
            text.extend(format!("[ -n \"$PATH\" ] || export PATH={DEFAULT_PATH}\n").bytes());
        }
        text.extend(b". ");
        text.extend(quoted(script.as_os_str().as_bytes()));
        text.push(b'\n');
        if is(script, "10-docker") {
            for directory in DEFAULT_PATH.split(':') {
                text.extend(format!("case \":$PATH:\" in *:{directory}:*) ;; *) PATH=\"${{PATH:+$PATH:}}{directory}\" ;; esac\n").bytes());
            }
        }
        if is(script, "99-base.sh") {
            overrides_for_shell(environment, &mut text);
            overridden = true;
        }
    }
    if !overridden {
        overrides_for_shell(environment, &mut text);
    }
    for (value, line) in [
        (
            &environment.prepend_path,
            &b"PATH=\"$CAPSID_PATH:$PATH\"\n"[..],
        ),
        (&environment.append_path, b"PATH=\"$PATH:$CAPSID_PATH\"\n"),
        (&environment.path, b"PATH=\"$CAPSID_PATH\"\n"),
    ] {
        if let Some(value) = value {
            text.extend(b"CAPSID_PATH=");
            text.extend(value_for_shell(environment, value));
            text.push(b'\n');
            text.extend(line);
        }
    }
    for (name, value) in &environment.host {
        let name = name.to_string_lossy();
        text.extend(format!("if [ -z \"${{{name}+x}}\" ]; then export {name}=").bytes());
        text.extend(quoted(value.as_bytes()));
        text.extend(format!("; elif [ -z \"${name}\" ]; then unset {name}; fi\n").bytes());
    }
    text.extend(format!("unset CAPSID_PATH\nexport PATH LD_LIBRARY_PATH=\"${{LD_LIBRARY_PATH-{LIBS}}}\" PS1=\"${{PS1:-{PROMPT}}}\" PROMPT_COMMAND=").bytes());
    text.extend(quoted(PROMPT_COMMAND.as_bytes()));
    text.extend(b"\ncommand -v \"$1\" >/dev/null 2>&1 || { echo \"FATAL:   \\\"$1\\\": executable file not found in \\$PATH\" >&2; exit 255; }\nexec \"$@\"\n");
    text
}

fn overrides_for_shell(environment: &Environment, text: &mut Vec<u8>) {
    for (name, value) in &environment.overrides {
        text.extend(b"export ");
        text.extend(name.as_bytes());
        text.push(b'=');
        text.extend(value_for_shell(environment, value));
        text.push(b'\n');
    }
}

fn value_for_shell(environment: &Environment, value: &OsStr) -> Vec<u8> {
    let value = value.as_bytes();
    if environment.no_eval {
        return quoted(value);
    }
    // A substitution has quotes of its own.
    let substitutes = value.windows(2).any(|w| w == b"$(") || value.contains(&b'`');
    let mut text = vec![b'"'];
    for byte in value {
        if *byte == b'"' && !substitutes {
            text.push(b'\\');
        }
        text.push(*byte);
    }
    text.push(b'"');
    text
}

/// One word of a shell, whatever it holds.
fn quoted(text: &[u8]) -> Vec<u8> {
    let mut word = vec![b'\''];
    for byte in text {
        if *byte == b'\'' {
            word.extend(b"'\\''");
        } else {
            word.push(*byte);
        }
    }
    word.push(b'\'');
    word
}

/// The container's own files: this process is inside.
struct Container;

impl Files for Container {
    fn test(&self, test: u8, path: &[u8]) -> Option<bool> {
        let path = Path::new(OsStr::from_bytes(path));
        let meta = || std::fs::metadata(path).ok();
        let may = |access| rustix::fs::access(path, access).is_ok();
        Some(match test {
            b'e' => meta().is_some(),
            b'f' => meta().is_some_and(|m| m.is_file()),
            b'd' => meta().is_some_and(|m| m.is_dir()),
            b's' => meta().is_some_and(|m| m.len() > 0),
            b'h' | b'L' => std::fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()),
            b'r' => may(Access::READ_OK),
            b'w' => may(Access::WRITE_OK),
            b'x' => may(Access::EXEC_OK),
            _ => return None,
        })
    }

    fn read(&self, path: &[u8]) -> Option<Vec<u8>> {
        use std::io::Read as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = std::fs::OpenOptions::new();
        // A fifo of that name must not make us wait.
        let file = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(OsStr::from_bytes(path))
            .ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut text = Vec::new();
        file.take(shell::MAX_SCRIPT_BYTES as u64 + 1)
            .read_to_end(&mut text)
            .ok()?;
        Some(text)
    }
}

/// What a command means in this container.
#[derive(Debug)]
pub enum Dispatch {
    /// Run this; the text is a notice for the person.
    Exec(Vec<OsString>, Option<&'static str>),
    /// There is nothing to run: say so.
    Message {
        /// How it is said.
        level: Level,
        /// The words.
        text: String,
        /// The status to end with.
        status: u8,
    },
}

/// How a message is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// `INFO:`
    Info,
    /// `ERROR:`
    Error,
    /// `FATAL:`
    Fatal,
    /// On standard output.
    Plain,
}

/// Finds the script or shell that a command stands for.
pub fn dispatch(verb: &str, app: Option<&str>, shell: Option<&str>, args: &[OsString]) -> Dispatch {
    let executable = |path: &str| rustix::fs::access(path, Access::EXEC_OK).is_ok();
    let message = |level, text: String, status| Dispatch::Message {
        level,
        text,
        status,
    };
    let with_args = |program: &str| {
        let mut argv = vec![OsString::from(program)];
        argv.extend_from_slice(args);
        argv
    };
    if let Some(app) = app
        && !Path::new("/scif/apps").join(app).is_dir()
    {
        return message(
            Level::Plain,
            format!("Could not locate the container application: {app}"),
            1,
        );
    }
    let own = |name: &str| match app {
        Some(app) => format!("/scif/apps/{app}/scif/{name}"),
        None => format!("/.singularity.d/{name}"),
    };
    match verb {
        "exec" => Dispatch::Exec(args.to_vec(), None),
        "shell" => match shell {
            Some(shell) if executable(shell) => Dispatch::Exec(vec![shell.into()], None),
            Some(shell) => message(
                Level::Error,
                format!("{shell} does not exist in container"),
                1,
            ),
            None if executable("/bin/bash") => {
                Dispatch::Exec(vec!["/bin/bash".into(), "--norc".into()], None)
            }
            None if executable("/bin/sh") => Dispatch::Exec(vec!["/bin/sh".into()], None),
            None => message(
                Level::Error,
                "/bin/sh does not exist in container".into(),
                1,
            ),
        },
        "test" if executable(&own("test")) => Dispatch::Exec(with_args(&own("test")), None),
        "test" => message(
            Level::Info,
            "No test script found in container, exiting".into(),
            0,
        ),
        _ if executable(&own("runscript")) => Dispatch::Exec(with_args(&own("runscript")), None),
        _ if app.is_some() => message(
            Level::Error,
            format!(
                "No runscript for the application {}",
                app.unwrap_or_default()
            ),
            1,
        ),
        _ if executable("/singularity") => Dispatch::Exec(with_args("/singularity"), None),
        _ if executable("/bin/sh") => Dispatch::Exec(
            with_args("/bin/sh"),
            Some("No runscript found in container, executing /bin/sh"),
        ),
        _ => message(
            Level::Fatal,
            "the image has neither a runscript nor /bin/sh: use exec with a program that it has"
                .into(),
            255,
        ),
    }
}

/// Finds a program as `execvp(3)` does, relative names from the working directory.
///
/// # Errors
/// In the peers' words, since clients look for them.
pub fn find_program(name: &OsStr, path: &OsStr) -> Result<PathBuf> {
    let shown = name.display();
    if name.as_bytes().contains(&b'/') {
        let meta = std::fs::metadata(name).map_err(|error| {
            let text = error.to_string().to_lowercase();
            anyhow!(
                "stat {shown}: {}",
                text.split(" (os error").next().unwrap_or_default()
            )
        })?;
        if meta.is_dir() {
            bail!("{shown}: is a directory");
        }
        if rustix::fs::access(name, Access::EXEC_OK).is_err() {
            bail!("{shown}: permission denied");
        }
        return Ok(name.into());
    }
    let directories = path.as_bytes().split(|b| *b == b':');
    for directory in directories {
        // An empty part means the working directory.
        let directory = if directory.is_empty() {
            Path::new(".")
        } else {
            Path::new(OsStr::from_bytes(directory))
        };
        let candidate = directory.join(name);
        if rustix::fs::access(&candidate, Access::EXEC_OK).is_ok() && candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("{name:?}: executable file not found in $PATH")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_one_word() {
        assert_eq!(quoted(b"it's $x"), b"'it'\\''s $x'");
    }

    #[test]
    fn usual_directories_are_added_behind() {
        assert_eq!(
            with_defaults(b"/opt/bin:/bin"),
            b"/opt/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin"
        );
        assert_eq!(with_defaults(b""), DEFAULT_PATH.as_bytes());
    }

    #[test]
    fn programs_are_found_as_a_shell_would() {
        let find = |name: &str| {
            find_program(OsStr::new(name), OsStr::new("/nowhere:/bin")).map_err(|e| e.to_string())
        };
        assert_eq!(find("sh"), Ok("/bin/sh".into()));
        assert_eq!(
            find("no-such"),
            Err("\"no-such\": executable file not found in $PATH".into())
        );
        assert_eq!(find("/etc"), Err("/etc: is a directory".into()));
        assert_eq!(
            find("/no/such"),
            Err("stat /no/such: no such file or directory".into())
        );
        assert_eq!(
            find("/etc/passwd"),
            Err("/etc/passwd: permission denied".into())
        );
    }
}
