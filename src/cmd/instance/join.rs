//! `exec`, `run`, `shell` and `test` in a running instance.

use anyhow::{Context, Result, bail};

use crate::cmd::flags::{ActionArgs, Given, Late};
use crate::cmd::{Explain, Persona, action, explain};
use crate::engine;
use crate::host::Host;
use crate::instance::{Record, Registry};
use crate::plan::{Init, Join, Process, env};
use crate::{exit, say};

/// Runs `verb` in the instance that `args.image` names.
///
/// # Errors
/// When there is no such instance, or the options are about the container.
pub fn run(
    verb: &str,
    args: &ActionArgs,
    host: &Host,
    name: &str,
    explain: Option<Explain>,
    persona: Persona,
) -> Result<u8> {
    let registry = Registry::open(host);
    if registry.job.is_some() {
        crate::job::await_ready(&registry, name)?;
    }
    let Some(instance) = registry.find(name) else {
        if let Some(nodes) = crate::cmd::job::elsewhere(host) {
            bail!(
                "no instance found with name {name}: this machine is none of the nodes of the job ({nodes}); use srun capsid exec instance://{name}"
            );
        }
        bail!("no instance found with name {name}");
    };
    let record = instance.record.clone();
    let target = record.init.with_context(|| {
        format!("cannot see process 1 of instance {name}, which an older version started: stop it, and start it again")
    })?;
    check_options(args, &record, persona)?;
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
        target,
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
            rights: action::rights(args, &container.ids)?,
            time_limit: None,
        },
    };
    if let Some(form) = explain {
        explain::print_join(&join, form)?;
        return Ok(exit::OK);
    }
    if say::level() >= say::DEBUG {
        for line in explain::join_lines(&join) {
            say::debug(format_args!("plan: {line}"));
        }
    }
    let way = instance.way().context("the instance has just ended")?;
    engine::join::run(&join, way)
}

/// What cannot have its effect any more is an error where somebody relies on it. A peer takes the rest without a word, so
/// under its name that is a warning.
fn check_options(args: &ActionArgs, record: &Record, persona: Persona) -> Result<()> {
    let late = |given: &&Given| match is_met(given, record) {
        true => Late::Works,
        false => given.late(),
    };
    let (typed, ambient): (Vec<&Given>, Vec<&Given>) = args.given.iter().partition(|g| g.typed);
    let peer = persona == Persona::Apptainer;
    let refused = |given: &&&Given| match late(given) {
        Late::Works => false,
        Late::Idle => !peer,
        Late::Harmful => true,
    };
    if let Some(given) = typed.iter().find(refused) {
        bail!(
            "--{} cannot be given for a running instance, whose container is made already: stop instance {} and start it with this option",
            given.long,
            record.name
        );
    }
    let idle = typed.iter().filter(|g| late(g) == Late::Idle);
    // An option of the environment is for all runs, also for those that make a container.
    let idle = idle.chain(ambient.iter().filter(|g| late(g) == Late::Harmful));
    let names: Vec<String> = idle.map(|given| format!("--{}", given.long)).collect();
    if !names.is_empty() {
        say::warn(format_args!(
            "no effect on the running instance {}, whose container is made already: {}",
            record.name,
            names.join(", ")
        ));
    }
    Ok(())
}

/// Whether the container is already as the option wants it.
fn is_met(given: &Given, record: &Record) -> bool {
    let container = &record.container;
    match given.id.as_str() {
        "fakeroot" => container.ids.is_root(),
        "ipc" => container.namespaces.ipc,
        "net" => container.namespaces.net,
        "uts" => container.namespaces.uts,
        "contain" => container.contained,
        _ => false,
    }
}
