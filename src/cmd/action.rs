//! `exec`, `run`, `shell`, `test` and `run-help`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::fetch::{self, ImageFile, RunAccess};
use super::flags::ActionArgs;
use super::transfer::Source;
use super::{Explain, Persona, Usage, explain, unsquash};
use crate::engine::network::Network;
use crate::engine::server::Places;
use crate::host::{Host, normalise};
use crate::image::{self, Part, Root};
use crate::net::Reference;
use crate::plan::limits::{self, Limits};
use crate::plan::{
    self, Bind, Capabilities, EnvironmentRequest, IdMap, Init, Layer, Namespaces, Ownership,
    Request, Rights, SubIds, Verb, bind, identity,
};
use crate::{engine, exit, given, gpu, say};

/// Runs an action command with what was parsed.
///
/// # Errors
/// Whatever is wrong with the request, the image or the machine.
pub fn run(name: &str, args: ActionArgs, explain: Option<Explain>, persona: Persona) -> Result<u8> {
    let explain = args.explain.or(explain);
    run_on(name, args, explain, persona, Host::read()?)
}

/// The same on a host that was read already.
///
/// # Errors
/// As [`run`].
pub fn run_on(
    name: &str,
    args: ActionArgs,
    explain: Option<Explain>,
    persona: Persona,
    host: Host,
) -> Result<u8> {
    refuse(&args)?;
    if name != "run" && args.runscript_timeout.is_some() {
        bail!("--runscript-timeout is for run: it ends an image's runscript");
    }
    if let Some(instance) = instance_name(&args.image)
        && name != "run-help"
    {
        return super::instance::join::run(name, &args, &host, instance, explain, persona);
    }
    if explain.is_some() {
        if name == "run-help" {
            bail!("--explain shows what a run does, and run-help runs nothing");
        }
        refuse_fetching(&args.image, &host)?;
    }
    let file = image_path(&args.image, &host, &access(&args))?;
    let image = image::open(&file.path)?;
    if name == "run-help" {
        return run_help(image.as_ref(), args.app.as_deref());
    }
    let facts = image.facts();
    image::check_arch(facts.arch.as_deref(), host.arch)?;
    let request = request(name, &args, &host)?;
    let groups = host.groups();
    let planned = plan::plan(&request, &host, &facts, image.root(), &groups)?;
    drop(image);
    announce(&planned.warnings, &planned.infos);
    if let Some(form) = explain {
        explain::print(&whole(&args, &planned.plan, &host)?, form)?;
        return Ok(exit::OK);
    }
    tell_steps(&whole(&args, &planned.plan, &host)?);
    let scratch = std::env::temp_dir();
    let network = network(&args, || Ok(scratch.clone()))?;
    // The cgroup goes with its last process; an empty one is removed by the next run.
    engine::cgroup::apply(&limits(&args, &host)?, limits_policy(&host)?, name)?;
    let places = Places {
        unneeded: file.temporary.clone(),
        ..places(&host)
    };
    let run = |plan: &plan::Plan| engine::run(plan, &places, network.as_ref());
    if args.unsquash {
        return unsquash::run(planned.plan, &temporary(&args, &host), run);
    }
    run(&planned.plan)
}

/// What a person who wants to know more is told: everything for `--debug`, for `--verbose` what is made of the image and of
/// the host's files.
fn tell_steps(whole: &explain::Whole) {
    if say::level() < say::VERBOSE {
        return;
    }
    for line in whole.lines() {
        if line.starts_with("env ") {
            say::debug(format_args!("plan: {line}"));
        } else {
            say::verbose(format_args!("plan: {line}"));
        }
    }
}

/// Where a temporary directory of this run goes.
fn temporary(args: &ActionArgs, host: &Host) -> PathBuf {
    let asked = args.tmpdir.as_ref().map(|dir| host.cwd.join(dir));
    asked.unwrap_or_else(std::env::temp_dir)
}

/// The plan of a container with what is settled around it.
///
/// # Errors
/// Naming the option that is wrong.
pub(super) fn whole<'a>(
    args: &ActionArgs,
    plan: &'a plan::Plan,
    host: &Host,
) -> Result<explain::Whole<'a>> {
    for text in &args.publish {
        engine::network::parse_publish(text)?;
    }
    Ok(explain::Whole {
        plan,
        limits: limits(args, host)?,
        connection: is_connected(args).then(|| args.publish.clone()),
        unpacked_in: args.unsquash.then(|| temporary(args, host)),
        time_limit_s: plan.process.time_limit.map(|limit| limit.as_secs_f64()),
    })
}

/// Refuses what cannot be met.
///
/// # Errors
/// Naming the option.
pub(super) fn refuse(args: &ActionArgs) -> Result<()> {
    if let Some(refusal) = args.refusal() {
        bail!("{} is not supported: {}", refusal.option, refusal.why);
    }
    Ok(())
}

/// For `--explain`, which does nothing: an image elsewhere would have to be fetched first.
///
/// # Errors
/// When it is elsewhere.
pub(super) fn refuse_fetching(image: &OsStr, host: &Host) -> Result<()> {
    let text = image.to_string_lossy();
    let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme);
    if (is_transport(scheme) || Reference::is_scheme(scheme))
        && std::fs::symlink_metadata(host.cwd.join(image)).is_err()
    {
        bail!(
            "--explain does nothing, and {text} would have to be fetched to know its plan: capsid pull it, and explain the file"
        );
    }
    Ok(())
}

/// The capabilities that are asked for.
///
/// # Errors
/// Naming the option that is wrong.
pub(super) fn rights(args: &ActionArgs, ids: &IdMap) -> Result<Rights> {
    let parse = |option, text: &Option<String>| {
        let text = text.as_deref().unwrap_or_default();
        Capabilities::parse(option, text)
    };
    if args.keep_privs && !ids.is_root() {
        bail!(
            "--keep-privs: a user has no privileges that could be kept: --fakeroot gives those of root in the container, --add-caps single ones"
        );
    }
    let dropped = parse("--drop-caps", &args.drop_caps)?;
    Ok(Rights {
        add: parse("--add-caps", &args.add_caps)?,
        drop: match args.no_privs {
            true => Capabilities::ALL,
            false => dropped,
        },
    })
}

/// The time that a run may take at most.
///
/// # Errors
/// When it is none, as `time.ParseDuration` of Go reads it; a number alone is seconds.
fn time_limit(text: &str) -> Result<Duration> {
    let wrong =
        || format!("--runscript-timeout {text:?}: use a time such as 90s, 5m or 1h30m, above 0");
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, behind) = rest.split_at(end.unwrap_or(rest.len()));
        let end = behind.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, behind) = behind.split_at(end.unwrap_or(behind.len()));
        let unit = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            "" if number == text => 1.0,
            _ => bail!(wrong()),
        };
        seconds += number.parse::<f64>().with_context(wrong)? * unit;
        rest = behind;
    }
    // A hundred years, so that a deadline can be added to now.
    if !(1e-9..=3.2e9).contains(&seconds) {
        bail!(wrong());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Where servers of images and their profiles are.
pub fn places(host: &Host) -> Places {
    Places {
        runtime: host.runtime_home(),
        profiles: host.profiles(),
        unneeded: None,
    }
}

/// The connection to the outside: asked for by `--publish`, or by `--net` without `--network none`.
///
/// # Errors
/// When it contradicts other options, or no program can connect a network here.
pub(super) fn network(
    args: &ActionArgs,
    scratch: impl FnOnce() -> Result<PathBuf>,
) -> Result<Option<Network>> {
    match args.network.as_deref() {
        None => {}
        Some("none") if args.publish.is_empty() => {}
        Some("none") => bail!(
            "--publish needs a network with a connection to the outside: leave out --network none"
        ),
        Some("fakeroot") if args.publish.is_empty() => say::warn(format_args!(
            "--network fakeroot takes a program with root's rights, which this is not: the container has no network but its own loopback; leave the option out for one that is connected by pasta or slirp4netns"
        )),
        Some(other) => bail!(
            "--network {other} is not supported: leave it out for a network that is connected by pasta or slirp4netns (--net), or use none"
        ),
    }
    if !is_connected(args) {
        return Ok(None);
    }
    let publish: Vec<_> = args
        .publish
        .iter()
        .map(|text| engine::network::parse_publish(text))
        .collect::<Result<_>>()?;
    Network::find(publish, &scratch()?).map(Some)
}

/// Whether the container gets a network of its own that is connected to the outside.
fn is_connected(args: &ActionArgs) -> bool {
    (args.net || !args.publish.is_empty()) && args.network.is_none()
}

/// Tells the person what planning noticed.
pub(super) fn announce(warnings: &[String], infos: &[String]) {
    for warning in warnings {
        say::warn(format_args!("{warning}"));
    }
    for info in infos {
        say::info(format_args!("{info}"));
    }
}

/// The name in `instance://NAME`.
fn instance_name(image: &OsStr) -> Option<&str> {
    image.to_str()?.strip_prefix("instance://")
}

/// The limits that are asked for.
///
/// # Errors
/// Naming the option that is wrong.
pub(super) fn limits(args: &ActionArgs, host: &Host) -> Result<Limits> {
    let texts = limits::Texts {
        memory: args.memory.as_deref(),
        memory_swap: args.memory_swap.as_deref(),
        memory_reservation: args.memory_reservation.as_deref(),
        cpus: args.cpus.as_deref(),
        cpuset_cpus: args.cpuset_cpus.as_deref(),
        cpuset_mems: args.cpuset_mems.as_deref(),
        cpu_shares: args.cpu_shares.as_deref(),
        pids_limit: args.pids_limit.as_deref(),
        blkio_weight: args.blkio_weight.as_deref(),
    };
    let limits = Limits::parse(&texts)?;
    let Some(path) = &args.apply_cgroups else {
        return Ok(limits);
    };
    if !limits.is_empty() {
        bail!(
            "--apply-cgroups cannot be combined with --memory, --cpus and the like: use one of them"
        );
    }
    let path = host.cwd.join(path);
    let what = || {
        format!(
            "cannot read the limits in {} (--apply-cgroups)",
            path.display()
        )
    };
    let text = given::string(&path, 1 << 20).with_context(what)?;
    Limits::from_toml(&text).with_context(what)
}

/// `CAPSID_LIMITS`.
///
/// # Errors
/// When it is set to something else.
pub(super) fn limits_policy(host: &Host) -> Result<limits::Policy> {
    match host
        .var("CAPSID_LIMITS")
        .map(OsStr::to_string_lossy)
        .as_deref()
    {
        None | Some("" | "require") => Ok(limits::Policy::Require),
        Some("best-effort") => Ok(limits::Policy::BestEffort),
        Some("off") => Ok(limits::Policy::Off),
        Some(other) => bail!("CAPSID_LIMITS={other:?}: use require, best-effort or off"),
    }
}

/// The verb of a command.
pub(super) fn verb(name: &str) -> Verb {
    match name {
        "exec" => Verb::Exec,
        "shell" => Verb::Shell,
        "test" => Verb::Test,
        "start" => Verb::Start,
        _ => Verb::Run,
    }
}

/// What of the words is for the program.
pub(super) fn payload(verb: Verb, args: &ActionArgs) -> Vec<OsString> {
    match verb {
        Verb::Shell => Vec::new(),
        _ => args.rest.clone(),
    }
}

/// How a run gets an image that is elsewhere.
pub(super) fn access(args: &ActionArgs) -> RunAccess<'_> {
    RunAccess {
        no_https: args.no_https,
        docker_login: args.docker_login,
        docker_username: args.docker_username.as_deref(),
        docker_password: args.docker_password.as_deref(),
        authfile: args.authfile.as_deref(),
        disable_cache: args.disable_cache,
    }
}

/// Whether an image is named by where it is elsewhere: a path that exists beats that reading.
pub(super) fn is_elsewhere(image: &OsStr, host: &Host) -> bool {
    let text = image.to_string_lossy();
    text.split_once("://").is_some_and(|(scheme, _)| {
        Reference::is_scheme(scheme) && std::fs::symlink_metadata(host.reach(image)).is_err()
    })
}

/// The image's path: a path that exists beats the reading of a colon as a URI. What is elsewhere is brought into the
/// cache first.
pub(super) fn image_path(image: &OsString, host: &Host, access: &RunAccess) -> Result<ImageFile> {
    if image.is_empty() {
        bail!("the name of the image is empty");
    }
    let path = host.reach(image);
    let text = image.to_string_lossy();
    if let Some((scheme, _)) = text
        .split_once("://")
        .or_else(|| text.split_once(':').filter(|(s, _)| is_transport(s)))
        && std::fs::symlink_metadata(&path).is_err()
    {
        match scheme {
            "instance" => bail!(
                "{text:?} is not an image: a running instance is named instance://NAME, for exec, run, shell and test"
            ),
            scheme if Source::is_scheme(scheme) => {
                return fetch::fetch_for_run(image, access);
            }
            other => bail!("Unsupported transport type: {other}"),
        }
    }
    Ok(ImageFile {
        path,
        temporary: None,
    })
}

fn is_transport(scheme: &str) -> bool {
    const KNOWN: [&str; 11] = [
        "docker",
        "docker-daemon",
        "docker-archive",
        "oci",
        "oci-archive",
        "library",
        "oras",
        "shub",
        "http",
        "https",
        "instance",
    ];
    KNOWN.contains(&scheme)
}

fn run_help(image: &dyn image::Image, app: Option<&str>) -> Result<u8> {
    let path = match app {
        Some(app) => format!("/scif/apps/{app}/scif/runscript.help"),
        None => "/.singularity.d/runscript.help".into(),
    };
    match image.read(Path::new(&path))? {
        // Builders end the text with a line break more than it has.
        Some(text) => say::out(format_args!(
            "{}\n",
            String::from_utf8_lossy(&text).trim_end_matches('\n')
        ))?,
        None => say::out(format_args!(
            "No help sections were defined for this image\n"
        ))?,
    }
    Ok(exit::OK)
}

/// Settles the options into a request: what can contradict itself in text is resolved here.
///
/// # Errors
/// Naming the option that is wrong.
pub(super) fn request(name: &str, args: &ActionArgs, host: &Host) -> Result<Request> {
    let verb = verb(name);
    if !host.has_cwd {
        say::warn(format_args!(
            "the working directory does not exist any more: the container starts at home"
        ));
    }
    if verb == Verb::Shell && !args.rest.is_empty() {
        say::warn(format_args!("Parameters to shell command are ignored"));
    }
    let all = args.containall || args.compat;
    let uts = args.uts || args.hostname.is_some();
    let time_limit = args
        .runscript_timeout
        .as_deref()
        .map(time_limit)
        .transpose()?;
    if time_limit.is_some() && args.no_pid {
        bail!(
            "--runscript-timeout needs a process namespace, to end all of the run: leave out --no-pid"
        );
    }
    let pid = (args.pid || all || time_limit.is_some()) && !args.no_pid;
    let fakeroot = args.fakeroot.then(|| {
        if args.ignore_subuid {
            None
        } else {
            usable_subordinate_ids(host)
        }
    });
    let rights = rights(args, &identity::choose(host, fakeroot.as_ref()))?;
    let ownership = ownership(args, host, fakeroot.as_ref());
    let pid = pid || ownership == Ownership::Emulated;
    Ok(Request {
        verb,
        args: payload(verb, args),
        instance: None,
        app: args.app.clone().filter(|a| !a.is_empty()),
        shell: args.shell.clone(),
        binds: binds(args, host)?,
        home: home(args, host)?,
        no_home: args.no_home,
        no_mount: no_mount(&args.no_mount),
        workdir: args.workdir.as_ref().map(|w| host.cwd.join(w)),
        scratch: scratch(args)?,
        layers: layers(args, host)?,
        writable: args.writable,
        contain: args.contain || all,
        close_descriptors: all,
        share_users: args.sharens,
        namespaces: Namespaces {
            pid,
            ipc: args.ipc || all,
            net: args.net || !args.publish.is_empty() || args.network.is_some(),
            uts,
        },
        fakeroot,
        ownership,
        init: if args.no_init || args.compat {
            Init::Payload
        } else {
            Init::Appinit
        },
        rights,
        time_limit,
        hostname: args.hostname.clone(),
        dns: if args.dns.is_empty() && is_connected(args) {
            vec![engine::network::NAME_SERVER.into()]
        } else {
            dns(&args.dns)?
        },
        cwd: args.cwd.clone(),
        no_umask: args.no_umask || args.compat,
        environment: EnvironmentRequest {
            clean: args.cleanenv || all,
            no_env: args.no_env.clone(),
            env: env(&args.env)?,
            env_files: env_files(&args.env_file, host)?,
            no_eval: args.no_eval || args.compat,
        },
        gpu: gpu::find(args.nv && !args.no_nv, args.rocm && !args.no_rocm),
    })
}

/// Subordinate ids, if the helpers can map them here: not everywhere can they have their rights.
fn usable_subordinate_ids(host: &Host) -> Option<SubIds> {
    let sub = engine::userns::subordinate_ids(&host.user.name, host.uid)?;
    if host.uid != 0
        && let Err(error) = engine::userns::check_helpers(&sub)
    {
        say::warn(format_args!(
            "the subordinate ids of {} cannot be used: {error:#}",
            host.user.name
        ));
        return None;
    }
    Some(sub)
}

/// Who keeps the owners of files in a container with `--fakeroot`: emulation takes a process namespace and a kernel that
/// can ask us.
fn ownership(args: &ActionArgs, host: &Host, fakeroot: Option<&Option<SubIds>>) -> Ownership {
    let ids = identity::choose(host, fakeroot);
    if identity::ownership(&ids, true) == Ownership::Kernel {
        return Ownership::Kernel;
    }
    let reason = if args.ignore_fakeroot_command {
        Some("--ignore-fakeroot-command is given".to_owned())
    } else if args.no_pid {
        Some("--no-pid is given".to_owned())
    } else {
        engine::emulate::check().err().map(|e| format!("{e:#}"))
    };
    if let Some(reason) = &reason {
        say::verbose(format_args!("owners are not emulated: {reason}"));
    }
    identity::ownership(&ids, reason.is_none())
}

fn binds(args: &ActionArgs, host: &Host) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    for text in &args.bind {
        binds.extend(bind::parse_binds(text).context("While setting bind mount configuration")?);
    }
    for text in &args.mount {
        binds.push(bind::parse_mount(text).context("While setting bind mount configuration")?);
    }
    for bind in binds
        .iter_mut()
        .filter(|b| b.image_src.is_some() || b.id.is_some())
    {
        let path = host.cwd.join(&bind.source);
        let part = bind.image_src.clone().unwrap_or_else(|| "/".into());
        bind.image = Some(
            part_of(&path, bind.id, part)
                .with_context(|| format!("cannot bind the image {}", path.display()))?,
        );
        if !bind.read_only
            && matches!(
                bind.image,
                Some(Part {
                    root: Root::Ext { .. },
                    ..
                })
            )
        {
            say::warn(format_args!(
                "the image {} is bound read-only: this version does not write ext3",
                path.display()
            ));
        }
    }
    Ok(binds)
}

/// A part of a file system image. Nothing is looked for when all of it is wanted.
fn part_of(path: &Path, id: Option<u32>, part: PathBuf) -> Result<Part> {
    let root = image::data(path, id)?;
    let is_directory =
        part == Path::new("/") || engine::aside(|| image::is_directory(&root, &part))?;
    Ok(Part {
        root,
        path: part,
        directory: is_directory,
    })
}

fn scratch(args: &ActionArgs) -> Result<Vec<PathBuf>> {
    let root = |path: &&PathBuf| normalise(&Path::new("/").join(path)) == Path::new("/");
    match args.scratch.iter().find(root) {
        Some(path) => bail!("--scratch {path:?}: nothing can be mounted on /: the image is there"),
        None => Ok(args.scratch.clone()),
    }
}

/// `--home`: a source alone is its own place; one before a place is taken from the working directory.
fn home(args: &ActionArgs, host: &Host) -> Result<Option<(PathBuf, PathBuf)>> {
    let Some(text) = &args.home else {
        return Ok(None);
    };
    let mut parts = text.as_bytes().splitn(2, |b| *b == b':');
    let source = Path::new(OsStr::from_bytes(parts.next().unwrap_or_default()));
    let target = parts.next().map(|t| Path::new(OsStr::from_bytes(t)));
    let target = target.unwrap_or(source);
    if source.as_os_str().is_empty() || !target.is_absolute() {
        bail!("--home {text:?}: path {target:?} is not an absolute path");
    }
    let source = host.cwd.join(source);
    if std::fs::metadata(&source).is_ok_and(|meta| !meta.is_dir()) {
        bail!("--home {text:?}: {} is not a directory", source.display());
    }
    Ok(Some((source, normalise(target))))
}

/// `--dns`: addresses, as resolv.conf(5) takes them.
fn dns(servers: &[String]) -> Result<Vec<String>> {
    let servers = servers.iter().map(|server| {
        let server = server.trim();
        // A link-local address may name an interface.
        let address = server.split('%').next().unwrap_or_default();
        if address.parse::<std::net::IpAddr>().is_err() {
            bail!("--dns {server:?} is not the address of a name server");
        }
        Ok(server.to_owned())
    });
    servers.collect()
}

fn no_mount(names: &[String]) -> Vec<String> {
    const KNOWN: [&str; 9] = [
        "proc",
        "sys",
        "dev",
        "devpts",
        "home",
        "tmp",
        "hostfs",
        "cwd",
        "bind-paths",
    ];
    for name in names
        .iter()
        .filter(|n| !n.is_empty() && !n.starts_with('/') && !KNOWN.contains(&n.as_str()))
    {
        say::warn(format_args!(
            "Ignoring unknown mount type '{name}' (--no-mount)"
        ));
    }
    names.to_vec()
}

/// `--overlay` in the order given, then the throw-away layer.
fn layers(args: &ActionArgs, host: &Host) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    let mut seen: Vec<PathBuf> = Vec::new();
    for text in &args.overlay {
        let text = text.as_bytes();
        let (text, read_only) = match text.strip_suffix(b":ro") {
            Some(text) => (text, true),
            None => (text.strip_suffix(b":rw").unwrap_or(text), false),
        };
        let path = host.cwd.join(OsStr::from_bytes(text));
        if !path.exists() {
            bail!(
                "while loading overlay images: failed to open overlay image {}: no such file or directory",
                path.display()
            );
        }
        // The kernel would say ELOOP.
        let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if seen.contains(&real) {
            bail!("the overlay {} is given twice", path.display());
        }
        seen.push(real);
        if path.is_dir() {
            layers.push(if read_only {
                Layer::ReadOnlyDirectory(path)
            } else {
                Layer::Directory(path)
            });
            continue;
        }
        let file = image::open(&path)
            .with_context(|| format!("while loading overlay image {}", path.display()))?;
        let facts = file.facts();
        let roots = if facts.overlays.is_empty() {
            vec![file.root().into_layer()]
        } else {
            facts.overlays
        };
        let squashfs = |r: &Root| matches!(r, Root::Squashfs { .. });
        let only = !read_only && roots.iter().all(squashfs);
        if only {
            say::warn(format_args!(
                "the overlay image {} is squashfs, which cannot be written: it is laid over the root read-only",
                path.display()
            ));
        }
        let read_only = read_only || only;
        if !read_only && roots.iter().any(|r| matches!(r, Root::Ext { .. })) {
            bail!(
                "the overlay image {} cannot be written by this version: add :ro to read it, or use a directory as the overlay",
                path.display()
            );
        }
        layers.extend(roots.into_iter().map(Layer::Image));
    }
    if args.writable_tmpfs || args.compat {
        layers.push(Layer::Tmpfs(
            args.writable_tmpfs_size
                .as_deref()
                .map(limits::size)
                .transpose()?,
        ));
    } else if args.writable_tmpfs_size.is_some() {
        bail!("--writable-tmpfs-size needs --writable-tmpfs");
    }
    Ok(layers)
}

/// `--env`: one `K=V` may hold commas; several in one option are CSV fields.
///
/// # Errors
/// When one has no sign.
pub(super) fn env(options: &[OsString]) -> Result<Vec<(String, OsString)>> {
    let mut env = Vec::new();
    for option in options {
        let bytes = option.as_bytes();
        let fields = match bytes.iter().filter(|b| **b == b'=').count() {
            1 => vec![unquoted(bytes).to_owned()],
            _ => bind::csv_fields(bytes)?,
        };
        for field in fields {
            let Some(sign) = field.iter().position(|b| *b == b'=') else {
                // Only the part that is wrong: the others may hold secrets.
                let field = OsStr::from_bytes(&field);
                let text = format!(
                    "invalid argument {field:?} for \"--env\" flag: {} must be formatted as key=value",
                    field.display()
                );
                return Err(Usage {
                    command: "exec".into(),
                    text,
                }
                .into());
            };
            let key = String::from_utf8_lossy(&field[..sign]).into_owned();
            env.push((key, OsString::from_vec(field[sign + 1..].to_vec())));
        }
    }
    Ok(env)
}

/// Without the quotes around the whole.
fn unquoted(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\"")
        .and_then(|t| t.strip_suffix(b"\""))
        .unwrap_or(text)
}

/// The environment files with their contents.
///
/// # Errors
/// Naming the one that cannot be read.
pub(super) fn env_files(paths: &[PathBuf], host: &Host) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    /// An environment file is a few kilobytes; a device or a log is a mistake.
    const MAX: u64 = 16 << 20;
    let mut files = Vec::new();
    for path in paths {
        let path = host.cwd.join(path);
        let what = || {
            format!(
                "cannot read the environment file {} (--env-file)",
                path.display()
            )
        };
        let text = given::text(&path, MAX).with_context(what)?;
        files.push((path, text));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_does() {
        let seconds = |text| time_limit(text).map(|d| d.as_secs_f64()).ok();
        for (text, s) in [
            ("1s", 1.0),
            ("90", 90.0),
            ("1h30m", 5400.0),
            ("1.5s", 1.5),
            ("250ms", 0.25),
            ("1m0.5s", 60.5),
        ] {
            assert_eq!(seconds(text), Some(s), "{text}");
        }
        for text in [
            "", "0", "0s", "-1s", "s", "1x", "1s2", "1..s", "9999999h", "soon", "1 s",
        ] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    #[test]
    fn env_of_one_equals_sign_keeps_its_commas() {
        let get = |o: &str| {
            env(&[o.into()]).map(|e| {
                e.into_iter()
                    .map(|(k, v)| format!("{k}={}", v.display()))
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(get("A=1,2").ok(), Some(vec!["A=1,2".to_owned()]));
        assert_eq!(
            get("A=1,B=2").ok(),
            Some(vec!["A=1".to_owned(), "B=2".to_owned()])
        );
        assert_eq!(
            get("\"A=1,2\",B=3").ok(),
            Some(vec!["A=1,2".to_owned(), "B=3".to_owned()])
        );
        assert!(get("A").is_err());
    }
}
