//! What will happen, as a plain value.
//!
//! [`plan`] decides from the request, the host and the image; it touches no file, no environment, no
//! clock and no kernel, so it can be printed (`--explain`, `--debug`), compared and tested by value.
//! [`crate::engine`] carries it out and decides nothing that could have been decided here.

pub mod bind;
pub mod env;
pub mod hostlist;
pub mod identity;
pub mod limits;
pub mod lossless;
pub mod mounts;
pub mod pattern;
pub mod process;
pub mod rights;
pub mod service;
pub mod services;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::image::{Facts, Part, Root};
use crate::proc;
pub use bind::Bind;
pub use identity::{IdMap, Ownership, SubIds};
pub use process::{Init, Process, Verb};
pub use rights::{Capabilities, Rights};
pub use service::Service;

/// What the caller asked for, settled from options: no text is left to be parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command.
    pub verb: Verb,
    /// The command and its arguments, or the arguments of the image's script.
    pub args: Vec<OsString>,
    /// `--app`.
    pub app: Option<String>,
    /// The name of the instance that is started.
    pub instance: Option<String>,
    /// `--shell`.
    pub shell: Option<String>,
    /// `--bind` and `--mount`, in order.
    pub binds: Vec<Bind>,
    /// `--home`: source on the host and place inside.
    pub home: Option<(PathBuf, PathBuf)>,
    /// `--no-home`.
    pub no_home: bool,
    /// `--no-mount`.
    pub no_mount: Vec<String>,
    /// `--workdir`, absolute.
    pub workdir: Option<PathBuf>,
    /// `--scratch`.
    pub scratch: Vec<PathBuf>,
    /// `--overlay` and `--writable-tmpfs`, lowest first.
    pub layers: Vec<Layer>,
    /// `--writable`.
    pub writable: bool,
    /// Private /dev, /tmp, home.
    pub contain: bool,
    /// `--containall`: nothing that the caller left open is handed on.
    pub close_descriptors: bool,
    /// New namespaces beside user and mount.
    pub namespaces: Namespaces,
    /// `--fakeroot`, with the subordinate ids found for the user.
    pub fakeroot: Option<Option<SubIds>>,
    /// Who keeps owners that the id map has not. `Emulated` comes with a pid namespace.
    pub ownership: Ownership,
    /// `--sharens`.
    pub share_users: bool,
    /// Who is process 1 of a new pid namespace.
    pub init: Init,
    /// `--add-caps`, `--drop-caps` and `--no-privs`.
    pub rights: Rights,
    /// `--runscript-timeout`.
    pub time_limit: Option<std::time::Duration>,
    /// `--hostname`.
    pub hostname: Option<String>,
    /// `--dns`.
    pub dns: Vec<String>,
    /// `--cwd`.
    pub cwd: Option<PathBuf>,
    /// `--no-umask`.
    pub no_umask: bool,
    /// Environment options.
    pub environment: EnvironmentRequest,
    /// Host paths to bind for `--nv` and `--rocm`, with their places inside.
    pub gpu: Vec<(PathBuf, PathBuf)>,
}

/// The environment's part of a [`Request`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EnvironmentRequest {
    /// `--cleanenv`.
    pub clean: bool,
    /// `--no-env`.
    pub no_env: Vec<String>,
    /// `--env`.
    pub env: Vec<(String, OsString)>,
    /// `--env-file`, with the contents.
    pub env_files: Vec<(PathBuf, Vec<u8>)>,
    /// `--no-eval`.
    pub no_eval: bool,
}

/// Namespaces to create beside the user and the mount namespace, which there always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Namespaces {
    /// Processes.
    pub pid: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Network: empty but for the loopback interface.
    pub net: bool,
    /// Host name.
    pub uts: bool,
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// New namespaces.
    pub namespaces: Namespaces,
    /// Users and groups inside.
    pub ids: IdMap,
    /// A directory's containers share their user namespace, as those of an image file always do.
    pub share_users: bool,
    /// Who keeps owners that the map has not.
    pub ownership: Ownership,
    /// Host name inside a new UTS namespace.
    pub hostname: Option<String>,
    /// What becomes `/`.
    pub root: Root,
    /// Laid over it, lowest first; at most the last one is writable.
    pub layers: Vec<Layer>,
    /// The root itself may be written (a sandbox with `--writable`).
    pub writable_root: bool,
    /// Applied in this order, exactly: one for each place, and what lies above before what lies below.
    pub mounts: Vec<Mount>,
    /// The environment before the image's scripts have their say.
    pub environment: env::Environment,
    /// What runs.
    pub process: Process,
}

impl Plan {
    /// The program that is started in the root, by path or name, where no script of the image decides.
    pub fn program(&self) -> Option<&Path> {
        match self.process.verb {
            Verb::Exec => self.process.args.first().map(Path::new),
            _ => None,
        }
    }
}

/// Stepping into a container that runs already: it has no root and no mounts to get wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Join {
    /// Its process 1.
    pub target: proc::Id,
    /// What it does not share with the host, beside users, mounts and processes.
    pub namespaces: Namespaces,
    /// Users and groups inside.
    pub ids: IdMap,
    /// The environment before the image's scripts have their say.
    pub environment: env::Environment,
    /// What runs.
    pub process: Process,
}

/// A file tree over the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Layer {
    /// Throw-away, in memory; bytes, `None` for half of the memory.
    Tmpfs(Option<u64>),
    /// `upper` and `work` in this directory, created when missing.
    Directory(PathBuf),
    /// A directory below the writable layer: its `upper` if there is one.
    ReadOnlyDirectory(PathBuf),
    /// A file system image, read through our own driver.
    Image(Root),
}

impl Layer {
    /// Whether writes go to this layer.
    pub fn is_writable(&self) -> bool {
        matches!(self, Layer::Tmpfs(_) | Layer::Directory(_))
    }
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// What.
    pub source: Source,
    /// Where: absolute, inside the container.
    pub target: PathBuf,
    /// Read-only otherwise.
    pub writable: bool,
    /// What to do when source or target cannot be had.
    pub missing: Missing,
    /// Who wanted it; shown by `--debug` and in errors.
    pub why: Why,
}

impl Mount {
    /// Whether the user named it. No other mount takes its place, and its mount point is made in a directory of the host
    /// that is bound there.
    pub fn is_named(&self) -> bool {
        matches!(self.why, Why::HomeOption | Why::Bind | Why::Scratch)
    }
}

/// Where the content of a mount comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Source {
    /// A path of the host with everything mounted below it.
    Bind(PathBuf),
    /// The same, created first with this mode when it is not there (`--workdir`).
    Directory(PathBuf, u32),
    /// An empty directory in memory with this mode, gone with the container.
    Private(u32),
    /// procfs of the new pid namespace.
    Proc,
    /// A private /dev with the harmless devices.
    Dev {
        /// POSIX message queues (with a new IPC namespace).
        mqueue: bool,
        /// Pseudo terminals of its own.
        pts: bool,
    },
    /// A small file with this text.
    Text(String),
    /// The image's passwd(5), with this line for the caller.
    Passwd(identity::Account),
    /// The image's group(5), with these groups of the caller.
    Group(identity::Account),
    /// A file system image, or a part of it.
    Image(Part),
}

/// What to do when a mount cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Missing {
    /// The run ends.
    Fail,
    /// A warning, and on.
    Warn,
    /// Nothing is said.
    Skip,
    /// As `Skip`, and what is there already, or one of the system's directories in the image, is left alone (the working
    /// directory).
    Keep,
}

/// Who wanted a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Why {
    /// Always there.
    Default,
    /// The home directory.
    Home,
    /// `--home`.
    HomeOption,
    /// The working directory.
    Cwd,
    /// `--bind` or `--mount`.
    Bind,
    /// `--scratch`.
    Scratch,
    /// `--nv` or `--rocm`.
    Gpu,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Why::Default => "default",
            Why::Home => "home",
            Why::HomeOption => "--home",
            Why::Cwd => "cwd",
            Why::Bind => "--bind",
            Why::Scratch => "--scratch",
            Why::Gpu => "gpu",
        })
    }
}

/// A plan, and what the person should be told about it.
#[derive(Debug)]
pub struct Planned {
    /// The decision.
    pub plan: Plan,
    /// For `WARNING:` lines.
    pub warnings: Vec<String>,
    /// For `INFO:` lines.
    pub infos: Vec<String>,
}

/// Decides everything.
///
/// # Errors
/// When options contradict each other or the image cannot do what was asked.
pub fn plan(
    request: &Request,
    host: &Host,
    facts: &Facts,
    root: Root,
    groups: &[(String, u32)],
) -> Result<Planned> {
    let ids = identity::choose(host, request.fakeroot.as_ref());
    let home = mounts::home(request, host, &ids);
    let (layers, writable_root) = mounts::layers(request, facts, &root)?;
    let mut warnings = Vec::new();
    let context = mounts::Context {
        request,
        host,
        ids: &ids,
        home: &home,
        groups,
        writable_root,
    };
    let mounts = mounts::all(&context, &mut warnings);
    let binds: Vec<String> = request
        .binds
        .iter()
        .filter(|b| b.nested)
        .map(|b| b.target.to_string_lossy().into_owned())
        .collect();
    let (environment, more, mut infos) = env::plan(&env::Request {
        host: &host.env,
        cleanenv: request.environment.clean,
        no_env: &request.environment.no_env,
        env: &request.environment.env,
        env_files: &request.environment.env_files,
        no_eval: request.environment.no_eval,
        app: request.app.as_deref(),
        instance: request.instance.as_deref(),
        shell: request.shell.as_deref(),
        home: &home.target,
        command: request.verb.name(),
        image: &facts.path,
        name: &facts.name,
        binds: &binds,
        args: &request.args,
    })?;
    warnings.extend(more);
    if matches!(ids, IdMap::Root { .. }) && request.ownership == Ownership::Kernel {
        warnings.push(
            "no subordinate ids are used: only root exists inside (see capsid doctor)".into(),
        );
    }
    if request.ownership == Ownership::Emulated {
        infos.push(
            "no subordinate ids are used: owners other than root are emulated, and forgotten at the end"
                .into(),
        );
    }
    let plan = Plan {
        namespaces: request.namespaces,
        process: process::decide(request, host, &home.target),
        ids,
        share_users: request.share_users,
        ownership: request.ownership,
        hostname: request.hostname.clone(),
        root,
        layers,
        writable_root,
        mounts,
        environment,
    };
    Ok(Planned {
        plan,
        warnings,
        infos,
    })
}

/// Whether `path` is `top` or lies below it, by components.
pub fn is_below(path: &Path, top: &Path) -> bool {
    path.starts_with(top)
}
