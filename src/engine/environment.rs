//! The last word on the environment, said inside the container: what the image's scripts make of the variables.
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
use crate::shell::{self, End, Files, State, Var};

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

/// Shells of images, the best first: the peers' evaluator takes what bash does.
const SHELLS: [&[&str]; 2] = [&["/bin/bash", "--norc", "--noprofile"], &["/bin/sh"]];

/// What becomes of a script that is not known well enough.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// All of them are given to a shell.
    Given,
    /// It is told, and what it has set is forgotten: there is no shell.
    Skipped,
}

/// What the scripts left.
#[derive(Debug)]
pub enum Finished {
    /// The environment.
    Ready(Vec<(OsString, OsString)>),
    /// This script for the image's shell, started with these variables, makes it and runs `"$@"`.
    Shell {
        /// The shell with its options.
        shell: &'static [&'static str],
        /// For `eval`.
        script: OsString,
        /// For the shell itself.
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
    let state = start(environment, cwd);
    let scripts = scripts();
    match natively(environment, &scripts, &mut state.clone(), Unknown::Given) {
        Ok(finished) => Ok(finished),
        Err(why) => {
            let there = |shell: &&&[&str]| rustix::fs::access(shell[0], Access::EXEC_OK).is_ok();
            let Some(shell) = SHELLS.iter().find(there) else {
                return natively(environment, &scripts, &mut state.clone(), Unknown::Skipped)
                    .map_err(|why| {
                        why.context("the image has no shell that could evaluate its environment")
                    });
            };
            say::verbose(format_args!(
                "the image's own shell evaluates its environment: {why}"
            ));
            let vars = exported(state);
            let script = for_shell(environment, &scripts);
            if script.len() > MAX_SHELL_BYTES {
                bail!(
                    "the environment is too large for the image's shell ({} of {MAX_SHELL_BYTES} bytes): use --cleanenv",
                    script.len()
                );
            }
            Ok(Finished::Shell {
                shell,
                script: OsString::from_vec(script),
                vars,
            })
        }
    }
}

/// What the scripts begin with.
fn start(environment: &Environment, cwd: &Path) -> State {
    let mut state = State::default();
    for (name, value) in &environment.vars {
        state.export(name.as_bytes(), value.as_bytes());
    }
    state.export(b"PWD", cwd.as_os_str().as_bytes());
    for (name, id) in ids() {
        let var = Var {
            value: Some(id.to_string().into_bytes()),
            ..Var::default()
        };
        state.vars.insert(name.into(), var);
    }
    state
}

/// Numbers that scripts may ask for; they are not handed on to programs.
fn ids() -> [(&'static str, u32); 3] {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    [("UID", uid), ("EUID", uid), ("GID", gid)]
}

/// What programs get of the variables.
fn exported(state: State) -> Vec<(OsString, OsString)> {
    let text = OsString::from_vec;
    state.handed_on().map(|(n, v)| (text(n), text(v))).collect()
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
    scripts.retain(|p| {
        p.extension().is_some_and(|e| e == "sh")
            && !is(p, ".")
            && !p.ends_with(RUNTIME_SCRIPT)
            && p.is_file()
    });
    scripts.sort();
    scripts
}

fn is(script: &Path, start: &str) -> bool {
    script
        .file_name()
        .is_some_and(|n| n.as_bytes().starts_with(start.as_bytes()))
}

fn natively(
    environment: &Environment,
    scripts: &[PathBuf],
    state: &mut State,
    unknown: Unknown,
) -> Result<Finished> {
    let mut overridden = false;
    for script in scripts {
        if is(script, "90-") && state.get(b"PATH").is_none_or(<[u8]>::is_empty) {
            state.export(b"PATH", DEFAULT_PATH.as_bytes());
        }
        let before = (unknown == Unknown::Skipped).then(|| state.clone());
        let end = match (evaluate(script, state), before) {
            (Err(why), Some(before)) => {
                say::warn(format_args!(
                    "the image has no shell that could evaluate its script {why:#}: what it sets is missing"
                ));
                *state = before;
                End::Done
            }
            (end, _) => end?,
        };
        if let End::Exit(status) = end {
            print(state);
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
    let libs = state.get(b"LD_LIBRARY_PATH");
    let libs = libs.unwrap_or(LIBS.as_bytes()).to_vec();
    let prompt = state.get(b"PS1").filter(|prompt| !prompt.is_empty());
    let prompt = prompt.unwrap_or(PROMPT.as_bytes()).to_vec();
    state.export(b"LD_LIBRARY_PATH", &libs);
    state.export(b"PS1", &prompt);
    state.export(b"PROMPT_COMMAND", PROMPT_COMMAND.as_bytes());
    print(state);
    Ok(Finished::Ready(exported(std::mem::take(state))))
}

fn evaluate(script: &Path, state: &mut State) -> Result<End> {
    let text = Container
        .read(script.as_os_str().as_bytes())
        .ok_or_else(|| anyhow!("{}: it cannot be read", script.display()))?;
    shell::run(&text, state, &Container).map_err(|error| anyhow!("{}: {error}", script.display()))
}

/// What a script says is the payload's output, as it would be with a real shell.
fn print(state: &State) {
    use std::io::Write as _;
    let mut stdout = std::io::stdout().lock();
    // Nobody is left to tell when the caller does not listen.
    let _ = stdout.write_all(&state.out).and_then(|()| stdout.flush());
    let _ = std::io::stderr().lock().write_all(&state.err);
}

fn evaluated(
    environment: &Environment,
    name: &OsStr,
    value: &OsStr,
    state: &mut State,
) -> Result<Vec<u8>> {
    if environment.no_eval {
        return Ok(value.as_bytes().to_vec());
    }
    shell::expand(value.as_bytes(), state)
        .map_err(|error| anyhow!("the value for {}: {}", name.display(), error.what))
}

fn apply(environment: &Environment, state: &mut State) -> Result<()> {
    for (name, value) in &environment.overrides {
        let value = evaluated(environment, name, value, state)?;
        state.export(name.as_bytes(), &value);
    }
    let mut libs = match state.get(b"LD_LIBRARY_PATH") {
        // Whoever wants none gets none.
        Some([]) => return Ok(()),
        libs => libs.unwrap_or(LIBS.as_bytes()).to_vec(),
    };
    if libs == LIBS.as_bytes()
        && let Some(own) = own_libraries(environment)
    {
        libs = own;
        state.export(b"LD_LIBRARY_PATH", &libs);
    }
    if let Some(more) = &environment.prepend_libs {
        let more = evaluated(
            environment,
            OsStr::new("PREPEND_LD_LIBRARY_PATH"),
            more,
            state,
        )?;
        libs = [more, libs].join(&b':');
        state.export(b"LD_LIBRARY_PATH", &libs);
    }
    if let Some(more) = &environment.append_libs {
        let more = evaluated(
            environment,
            OsStr::new("APPEND_LD_LIBRARY_PATH"),
            more,
            state,
        )?;
        libs = [libs, more].join(&b':');
        state.export(b"LD_LIBRARY_PATH", &libs);
    }
    Ok(())
}

/// The search path where there are libraries of the host or of the caller: those of the image's own loader come before
/// them, or they would take the place of the image's.
fn own_libraries(environment: &Environment) -> Option<Vec<u8>> {
    let asked = environment.prepend_libs.is_some() || environment.append_libs.is_some();
    let bound = || std::fs::read_dir(LIBS).is_ok_and(|mut entries| entries.next().is_some());
    if !asked && !bound() {
        return None;
    }
    let own = super::libraries::directories(Path::new("/"));
    let all = own.into_iter().chain([PathBuf::from(LIBS)]);
    let all: Vec<Vec<u8>> = all.map(|dir| dir.into_os_string().into_vec()).collect();
    Some(all.join(&b':'))
}

fn set_path(environment: &Environment, state: &mut State) -> Result<()> {
    let mut path = state.get(b"PATH").unwrap_or_default().to_vec();
    if let Some(more) = &environment.prepend_path {
        let more = evaluated(environment, OsStr::new("PREPEND_PATH"), more, state)?;
        path = [more, path].join(&b':');
    }
    if let Some(more) = &environment.append_path {
        let more = evaluated(environment, OsStr::new("APPEND_PATH"), more, state)?;
        path = [path, more].join(&b':');
    }
    if let Some(all) = &environment.path {
        path = evaluated(environment, OsStr::new("PATH"), all, state)?;
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
    // Shells have prompts of their own, which the image's scripts would keep.
    let mut text = b"unset CAPSID_SCRIPT\nPS1=\n".to_vec();
    for (name, id) in ids() {
        // Some shells know these and let nobody set them.
        text.extend(format!(": \"${{{name}:={id}}}\"\n").bytes());
    }
    let mut overridden = false;
    for script in scripts {
        if is(script, "90-") {
            text.extend(format!("[ -n \"$PATH\" ] || export PATH={DEFAULT_PATH}\n").bytes());
        }
        // With `command`, an error in it does not end the shell.
        text.extend(b"command . ");
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
    for (value, around) in [
        (&environment.prepend_path, ["", ":\"$PATH\""]),
        (&environment.append_path, ["\"$PATH\":", ""]),
        (&environment.path, ["", ""]),
    ] {
        set_for_shell(environment, "PATH", value.as_ref(), around, &mut text);
    }
    let is_name = |name: &OsString| shell::is_name(name.as_bytes());
    for (name, value) in environment.host.iter().filter(|(name, _)| is_name(name)) {
        let name = name.to_string_lossy();
        text.extend(format!("if [ -z \"${{{name}+x}}\" ]; then export {name}=").bytes());
        text.extend(quoted(value.as_bytes()));
        text.extend(format!("; elif [ -z \"${name}\" ]; then unset {name}; fi\n").bytes());
    }
    text.extend(format!("export PATH LD_LIBRARY_PATH=\"${{LD_LIBRARY_PATH-{LIBS}}}\" PS1=\"${{PS1:-{PROMPT}}}\" PROMPT_COMMAND=").bytes());
    text.extend(quoted(PROMPT_COMMAND.as_bytes()));
    text.extend(b"\ncommand -v \"$1\" >/dev/null 2>&1 || { echo \"FATAL:   \\\"$1\\\": executable file not found in \\$PATH\" >&2; exit 255; }\n");
    let functions = environment.host.iter().filter(|(name, _)| !is_name(name));
    let functions: Vec<&(OsString, OsString)> = functions.collect();
    if !functions.is_empty() {
        // Functions of bash: shells that do not know them hand them on to nobody.
        text.extend(b"command -v env >/dev/null 2>&1 && exec env");
        for (name, value) in functions {
            text.push(b' ');
            text.extend(quoted(&[name.as_bytes(), b"=", value.as_bytes()].concat()));
        }
        text.extend(b" \"$@\"\n");
    }
    text.extend(b"exec \"$@\"\n");
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
    if let Some(own) = own_libraries(environment) {
        let test = format!("[ \"${{LD_LIBRARY_PATH-{LIBS}}}\" != {LIBS} ] || LD_LIBRARY_PATH=");
        text.extend(test.bytes());
        text.extend(quoted(&own));
        text.push(b'\n');
    }
    let libs = format!("\"${{LD_LIBRARY_PATH-{LIBS}}}\"");
    for (value, [before, behind]) in [
        (&environment.prepend_libs, ["", &format!(":{libs}")]),
        (&environment.append_libs, [&format!("{libs}:"), ""]),
    ] {
        let around = [before, behind];
        if value.is_some() {
            text.extend(b"[ -z \"${LD_LIBRARY_PATH-x}\" ] || ");
        }
        set_for_shell(environment, "LD_LIBRARY_PATH", value.as_ref(), around, text);
    }
}

/// An assignment of the value with text around it, if there is one.
fn set_for_shell(
    environment: &Environment,
    name: &str,
    value: Option<&OsString>,
    [before, behind]: [&str; 2],
    text: &mut Vec<u8>,
) {
    if let Some(value) = value {
        text.extend(format!("{name}={before}").bytes());
        text.extend(value_for_shell(environment, value));
        text.extend(format!("{behind}\n").bytes());
    }
}

fn value_for_shell(environment: &Environment, value: &OsStr) -> Vec<u8> {
    let value = value.as_bytes();
    if environment.no_eval {
        return quoted(value);
    }
    // A substitution has quotes of its own.
    let (mut parentheses, mut dollar) = (0_usize, false);
    let mut text = vec![b'"'];
    let mut bytes = value.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' if parentheses == 0 => text.push(b'\\'),
            b'(' if parentheses > 0 || dollar => parentheses += 1,
            b')' => parentheses = parentheses.saturating_sub(1),
            // What is escaped stays so, and the last one does not escape our quote.
            b'\\' => {
                text.push(byte);
                text.push(bytes.next().unwrap_or(byte));
                dollar = false;
                continue;
            }
            _ => {}
        }
        dollar = byte == b'$';
        text.push(byte);
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

    fn names(&self, directory: &[u8]) -> Option<Vec<Vec<u8>>> {
        let entries = std::fs::read_dir(OsStr::from_bytes(directory));
        let entries = entries.into_iter().flatten().flatten();
        let names = entries.map(|e| e.file_name().into_vec());
        Some(names.take(shell::MAX_NAMES + 1).collect())
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

#[cfg(test)]
mod tests {
    use super::*;

    type Vars = std::collections::BTreeMap<OsString, OsString>;

    /// An environment that uses everything, and images' scripts.
    fn example(scripts: &[(&str, &str)]) -> (Environment, tempfile::TempDir, Vec<PathBuf>) {
        let vars = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(n, v)| (n.into(), v.into()));
            pairs.collect::<Vec<(OsString, OsString)>>()
        };
        let environment = Environment {
            vars: vars(&[
                ("HOME", "/home/x"),
                ("PATH", DEFAULT_PATH),
                ("TOLD", "it's"),
            ]),
            host: vars(&[
                ("HOST", "a 'b'\nc $HOME"),
                ("IMAGE", "host"),
                ("BLANK", "host"),
                ("TAKEN", "host"),
            ]),
            overrides: vars(&[
                ("TAKEN", "option"),
                ("EVALUATED", "$HOME \"q\" 'r' ${NO:-d} $IMAGE"),
                (
                    "ESCAPED",
                    "\\$HOME say \\\"hi\\\" \\$(no \"q\") \\\\ \\n end\\",
                ),
                ("STAR", "a  *  b"),
            ]),
            prepend_path: Some("$HOME/bin".into()),
            append_path: Some("/a b".into()),
            prepend_libs: Some("/lib first".into()),
            append_libs: Some("$HOME/lib".into()),
            ..Environment::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (name, text) in scripts {
            paths.push(dir.path().join(name));
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        (environment, dir, paths)
    }

    fn started(environment: &Environment) -> State {
        start(environment, Path::new("/"))
    }

    fn here(environment: &Environment, scripts: &[PathBuf]) -> Vars {
        match natively(
            environment,
            scripts,
            &mut started(environment),
            Unknown::Given,
        )
        .unwrap()
        {
            Finished::Ready(vars) => comparable(vars),
            other => panic!("{other:?}"),
        }
    }

    fn there(shell: &str, environment: &Environment, scripts: &[PathBuf]) -> Vars {
        let script = OsString::from_vec(for_shell(environment, scripts));
        let out = std::process::Command::new(shell)
            .arg("-c")
            .arg(script)
            .args(["capsid", "/usr/bin/env", "-0"])
            .env_clear()
            .envs(exported(started(environment)))
            .output()
            .unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        let lines = out.stdout.split(|b| *b == 0).filter(|l| !l.is_empty());
        let vars = lines.map(|line| {
            let sign = line.iter().position(|b| *b == b'=').unwrap();
            let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
            (text(&line[..sign]), text(&line[sign + 1..]))
        });
        comparable(vars.collect())
    }

    /// Without what shells add.
    fn comparable(vars: Vec<(OsString, OsString)>) -> Vars {
        let added = ["PWD", "OLDPWD", "SHLVL", "_"];
        vars.into_iter()
            .filter(|(name, _)| !added.iter().any(|a| name == *a))
            .collect()
    }

    #[test]
    fn a_real_shell_is_told_to_do_the_same() {
        let (mut environment, _dir, scripts) = example(&[
            ("10-docker2singularity.sh", "export PATH=/opt/bin:/bin\n"),
            (
                "90-environment.sh",
                "export IMAGE=image BLANK= CACHE=/tmp/$UID\n",
            ),
            (
                "99-base.sh",
                "LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/libs\n\
                 [ -n \"${PS1:-}\" ] || PS1='Prompt> '\nexport LD_LIBRARY_PATH PS1\n",
            ),
        ]);
        for no_eval in [false, true] {
            environment.no_eval = no_eval;
            if no_eval {
                environment.overrides.push(("PS1".into(), "".into()));
            }
            let vars = here(&environment, &scripts);
            for shell in ["/bin/sh", "/bin/bash"] {
                assert_eq!(vars, there(shell, &environment, &scripts), "{shell}");
            }
            let get = |name: &str| vars.get(OsStr::new(name)).and_then(|v| v.to_str());
            assert_eq!(get("IMAGE"), Some("image"), "the image's before the host's");
            assert_eq!(get("TAKEN"), Some("option"), "the option's before all");
            assert_eq!(get("BLANK"), None, "what is left empty is unset");
            assert_eq!(get("HOST"), Some("a 'b'\nc $HOME"), "the host's as it is");
            assert_eq!(
                get("PS1"),
                Some(if no_eval { PROMPT } else { "Prompt> " }),
                "no shell's own prompt"
            );
            let uid = rustix::process::geteuid().as_raw();
            assert_eq!(get("CACHE"), Some(&*format!("/tmp/{uid}")));
            assert_eq!(get("UID"), None, "not handed on");
            if no_eval {
                assert_eq!(get("EVALUATED"), Some("$HOME \"q\" 'r' ${NO:-d} $IMAGE"));
            } else {
                assert_eq!(get("EVALUATED"), Some("/home/x \"q\" 'r' d image"));
                assert_eq!(
                    get("ESCAPED"),
                    Some("$HOME say \"hi\" $(no \"q\") \\ \\n end\\")
                );
                assert_eq!(get("LD_LIBRARY_PATH"), Some("/lib first:/libs:/home/x/lib"));
                let path = get("PATH").unwrap();
                assert!(path.starts_with("/home/x/bin:/opt/bin:/bin:"), "{path}");
                assert!(path.ends_with(":/a b"), "{path}");
            }
        }
    }

    #[test]
    fn value_with_a_substitution_keeps_its_quotes() {
        let environment = Environment {
            overrides: vec![("A".into(), "say \"$(echo \"x  y\")\" `echo \"z\"`".into())],
            ..Environment::default()
        };
        assert!(natively(&environment, &[], &mut State::default(), Unknown::Given).is_err());
        let vars = there("/bin/sh", &environment, &[]);
        assert_eq!(vars.get(OsStr::new("A")), Some(&"say \"x  y\" z".into()));
    }

    #[test]
    fn script_that_ends_the_run_gives_its_status() {
        let (environment, _dir, scripts) = example(&[("95-apps.sh", "exit 7\n")]);
        let end = natively(
            &environment,
            &scripts,
            &mut started(&environment),
            Unknown::Given,
        )
        .unwrap();
        assert!(matches!(end, Finished::Ended(7)), "{end:?}");
    }

    #[test]
    fn scripts_find_files_by_patterns_and_may_complain() {
        let (environment, dir, scripts) = example(&[("90-environment.sh", "")]);
        for name in ["b.sh", "a.sh", ".hidden.sh", "other"] {
            let line = format!("R=\"$R {name}\"\n");
            std::fs::write(dir.path().join(name), line).unwrap();
        }
        let text = format!(
            "for f in {0}/.h*.sh {0}/?.sh {0}/*en.sh {0}/no*such; do [ -f \"$f\" ] && . \"$f\"; done\n\
             export R\necho loud >&2\necho plain\n",
            dir.path().display()
        );
        std::fs::write(&scripts[0], text).unwrap();
        let mut state = started(&environment);
        let text = std::fs::read(&scripts[0]).unwrap();
        shell::run(&text, &mut state, &Container).unwrap();
        assert_eq!(state.get(b"R"), Some(&b" .hidden.sh a.sh b.sh"[..]));
        assert_eq!(
            (&*state.err, &*state.out),
            (&b"loud\n"[..], &b"plain\n"[..])
        );
    }

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
}
