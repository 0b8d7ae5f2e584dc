//! `exec`, `run`, `shell` and `test` in a running instance.

use anyhow::{Context, Result, bail};

use crate::cmd::flags::ActionArgs;
use crate::cmd::{action, explain};
use crate::engine;
use crate::host::Host;
use crate::instance::{Record, Registry};
use crate::plan::{Init, Join, Process, env};
use crate::say;

/// Options that say what a container is made of: it is too late for them.
const OF_THE_CONTAINER: [&str; 31] = [
    "bind",
    "mount",
    "home",
    "no_home",
    "no_mount",
    "workdir",
    "scratch",
    "overlay",
    "writable",
    "writable_tmpfs",
    "writable_tmpfs_size",
    "contain",
    "containall",
    "compat",
    "no_pid",
    "no_init",
    "ipc",
    "net",
    "network",
    "publish",
    "uts",
    "hostname",
    "dns",
    "nv",
    "rocm",
    "memory",
    "memory_swap",
    "cpus",
    "cpuset_cpus",
    "pids_limit",
    "apply_cgroups",
];

/// Runs `verb` in the instance that `args.image` names.
///
/// # Errors
/// When there is no such instance, or the options are about the container.
pub fn run(verb: &str, args: &ActionArgs, host: &Host, name: &str) -> Result<u8> {
    let registry = Registry::open(host)?;
    if registry.job.is_some() {
        crate::job::await_ready(&registry, name)?;
    }
    let Some((record, held)) = registry.find(name) else {
        bail!("no instance found with name {name}");
    };
    refuse(args, &record)?;
    let verb = action::verb(verb);
    if verb == crate::plan::Verb::Shell && !args.rest.is_empty() {
        say::warn(format_args!("Parameters to shell command are ignored"));
    }
    let container = &record.container;
    let app = args.app.clone().filter(|a| !a.is_empty());
    let image_name = record.image.file_name().unwrap_or_default();
    let (environment, warnings, infos) = env::plan(&env::Request {
        host: &host.env,
        cleanenv: args.cleanenv,
        no_env: &args.no_env,
        env: &action::env(&args.env)?,
        env_files: &action::env_files(&args.env_file, host)?,
        no_eval: args.no_eval,
        app: app.as_deref(),
        instance: Some(name),
        shell: args.shell.as_deref(),
        home: &container.home,
        command: verb.name(),
        image: &record.image,
        name: &image_name.to_string_lossy(),
        binds: &container.binds,
        args: &args.rest,
    })?;
    action::announce(&warnings, &infos);
    let join = Join {
        target: record.init.context("the instance has just ended")?,
        namespaces: container.namespaces,
        ids: container.ids,
        environment,
        process: Process {
            verb,
            args: action::payload(verb, args),
            app,
            shell: args.shell.clone(),
            cwd: crate::plan::process::working_directory(
                args.cwd.as_deref(),
                container.contained,
                container.home_moved,
                host,
                &container.home,
            ),
            cwd_required: args.cwd.is_some(),
            home: container.home.clone(),
            umask: if args.no_umask { 0o022 } else { host.umask },
            init: Init::Payload,
            close_descriptors: false,
        },
    };
    if say::level() >= say::DEBUG {
        for line in explain::join_lines(&join) {
            say::debug(format_args!("plan: {line}"));
        }
    }
    drop(held);
    engine::join::run(&join)
}

fn refuse(args: &ActionArgs, record: &Record) -> Result<()> {
    let typed = |id: &str| args.typed.iter().any(|t| t == id);
    if let Some(id) = OF_THE_CONTAINER.iter().find(|id| typed(id)) {
        bail!(
            "--{} cannot be given for a running instance, whose container is made already: stop instance {} and start it with this option",
            id.replace('_', "-"),
            record.name
        );
    }
    if typed("fakeroot") && !record.container.ids.is_root() {
        bail!(
            "--fakeroot cannot be given for instance {0}, which was started without it: stop it and start it with --fakeroot",
            record.name
        );
    }
    Ok(())
}
