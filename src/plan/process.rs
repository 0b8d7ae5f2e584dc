//! What runs, where, and with what left of the caller's settings.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::{Request, Rights};
use crate::host::Host;

/// The action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Verb {
    /// A command of the caller's.
    Exec,
    /// The image's runscript.
    Run,
    /// A shell.
    Shell,
    /// The image's test script.
    Test,
    /// The image's startscript.
    Start,
}

impl Verb {
    /// As typed, and as `APPTAINER_COMMAND` has it.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Exec => "exec",
            Verb::Run => "run",
            Verb::Shell => "shell",
            Verb::Test => "test",
            Verb::Start => "start",
        }
    }
}

/// Who is process 1 of a new pid namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Init {
    /// Our appinit: reaps and forwards.
    Appinit,
    /// The program itself (`--no-init`).
    Payload,
}

/// The process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Which of the image's scripts, or none.
    pub verb: Verb,
    /// The command, or the arguments for the script.
    #[serde(serialize_with = "lossy")]
    pub args: Vec<OsString>,
    /// SCIF application.
    pub app: Option<String>,
    /// The shell that was asked for.
    pub shell: Option<String>,
    /// Where it starts.
    pub cwd: PathBuf,
    /// `--cwd`: no fallback.
    pub cwd_required: bool,
    /// Where to fall back to, before `/`.
    pub home: PathBuf,
    /// Permission bits that new files lack.
    pub umask: u32,
    /// Process 1, with a pid namespace.
    pub init: Init,
    /// Nothing that the caller left open is handed on (`--containall`).
    pub close_descriptors: bool,
    /// Capabilities beyond or below those of the user inside.
    pub rights: Rights,
    /// The run is ended after this time; comes with a pid namespace.
    pub time_limit: Option<Duration>,
}

/// Words as text, for printing only.
fn lossy<S: serde::Serializer>(words: &[OsString], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(words.iter().map(|w| w.to_string_lossy()))
}

/// Where a process starts: where it was asked to, in a contained container at home, else where the caller is.
pub fn working_directory(
    asked: Option<&Path>,
    contained: bool,
    home_moved: bool,
    host: &Host,
    home: &Path,
) -> PathBuf {
    match asked {
        Some(cwd) => Path::new("/").join(cwd),
        None if contained || !host.has_cwd => home.to_owned(),
        // A home mounted elsewhere moves the working directory with it.
        None if host.cwd == host.user.home && home_moved => home.to_owned(),
        None => host.cwd.clone(),
    }
}

/// Decides it.
pub fn decide(request: &Request, host: &Host, home: &Path) -> Process {
    let cwd = working_directory(
        request.cwd.as_deref(),
        request.contain,
        request.home.is_some(),
        host,
        home,
    );
    Process {
        verb: request.verb,
        args: request.args.clone(),
        app: request.app.clone(),
        shell: request.shell.clone(),
        cwd,
        cwd_required: request.cwd.is_some(),
        home: home.to_owned(),
        umask: if request.no_umask { 0o022 } else { host.umask },
        init: request.init,
        close_descriptors: request.close_descriptors,
        rights: request.rights,
        time_limit: request.time_limit,
    }
}
