//! Which of the image's programs a command means, said inside the container.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use rustix::fs::Access;

use crate::say;

/// What a command means in this container.
#[derive(Debug)]
pub enum Dispatch {
    /// Run this; the text is a notice for the person.
    Exec(Vec<OsString>, Option<Notice>),
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

/// What the person is told before a program runs.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    /// `INFO:`
    Info(String),
    /// `WARNING:`
    Warning(String),
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
            // A shell of the caller's habits is none of the image's.
            Some(shell) if executable("/bin/sh") => Dispatch::Exec(
                vec!["/bin/sh".into()],
                Some(Notice::Warning(format!(
                    "{shell} does not exist in container: using /bin/sh"
                ))),
            ),
            Some(shell) => message(
                Level::Error,
                format!("{shell} does not exist in container, and /bin/sh neither"),
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
        "test" if app.is_some() => message(
            Level::Error,
            format!("No tests for the application {}", app.unwrap_or_default()),
            1,
        ),
        "test" => message(
            Level::Info,
            "No test script found in container, exiting".into(),
            0,
        ),
        "start" if executable(&own("startscript")) => {
            Dispatch::Exec(with_args(&own("startscript")), None)
        }
        "start" => message(
            Level::Info,
            "No startscript found in container: the instance runs nothing until something is executed in it".into(),
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
            Some(Notice::Info("No runscript found in container, executing /bin/sh".into())),
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
        let meta = std::fs::metadata(name)
            .map_err(|error| anyhow!("stat {shown}: {}", say::word(&error)))?;
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
    fn commands_mean_programs() {
        let args = [OsString::from("a")];
        let said = |verb, app, shell| match dispatch(verb, app, shell, &args) {
            Dispatch::Message {
                level,
                text,
                status,
            } => (level, text, status),
            Dispatch::Exec(argv, _) => panic!("{argv:?}"),
        };
        if Path::new("/.singularity.d").exists() {
            return; // these tests run in a container, whose own scripts would be found
        }
        let argv = |verb, shell| match dispatch(verb, None, shell, &args) {
            Dispatch::Exec(argv, notice) => (argv, notice),
            other => panic!("{other:?}"),
        };
        assert_eq!(argv("exec", None), (vec!["a".into()], None));
        assert_eq!(
            argv("shell", Some("/bin/sh")),
            (vec!["/bin/sh".into()], None)
        );
        assert_eq!(
            argv("run", None),
            (
                vec!["/bin/sh".into(), "a".into()],
                Some(Notice::Info(
                    "No runscript found in container, executing /bin/sh".into()
                ))
            )
        );
        let (instead, notice) = argv("shell", Some("/no/sh"));
        assert_eq!(instead, ["/bin/sh"]);
        assert!(matches!(notice, Some(Notice::Warning(text)) if text.contains("/no/sh")));
        assert_eq!(
            said("test", None, None),
            (
                Level::Info,
                "No test script found in container, exiting".into(),
                0
            )
        );
        assert_eq!(
            said("run", Some("nosuch"), None),
            (
                Level::Plain,
                "Could not locate the container application: nosuch".into(),
                1
            )
        );
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
