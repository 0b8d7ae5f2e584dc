//! `instance start` and `instance run`.

use std::ffi::OsString;
use std::net::ToSocketAddrs as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cmd::flags::{ActionArgs, StartArgs};
use crate::cmd::{Explain, Usage, action, explain};
use crate::host::{Host, normalise};
use crate::instance::ending::Noted;
use crate::instance::launch::{self, Message, Report};
use crate::instance::monitor::{self, Spec};
use crate::instance::{Container, Record, Registry, Script, control, logs, now_s};
use crate::job::client;
use crate::plan::service::{LONGEST_NAME, Ready, is_name, parse_port, parse_restart};
use crate::plan::{self, Service, limits};
use crate::proc;
use crate::{exit, image, say};

/// Starts an instance; `verb` is `start` or `run`.
///
/// # Errors
/// When it cannot be started, or is not ready in time.
pub fn run(verb: &str, words: &[OsString], explain: Option<Explain>) -> Result<u8> {
    let host = Host::read()?;
    let command = format!("instance {verb}");
    let (args, name) = parse(&command, words, &host)?;
    if let Some(form) = args.action.explain.or(explain) {
        refuse(&name, &args)?;
        return show(verb, &name, &args, &host, form);
    }
    if args.foreground {
        return start(verb, &name, args, host, None, Noted::No);
    }
    let mut life = None;
    if host.in_job() {
        let registry = Registry::open(&host);
        if let Some(supervisor) = client::find(&registry) {
            let mut all = vec![OsString::from(verb)];
            all.extend_from_slice(words);
            return supervisor.start(&host, &all);
        }
        if host.in_numbered_step() {
            say::warn(format_args!(
                "instance {name} ends with this step: start it in the batch script itself, without srun, or run capsid job services there first"
            ));
        }
        // Where Slurm does not end what a step leaves behind, the instance does it by itself.
        life = client::step_daemon().map(OwnedFd::from);
    }
    start(verb, &name, args, host, life, Noted::No)
}

/// The same in a process that the supervisor of a job has made: the instance ends when `life` hangs up.
///
/// # Errors
/// As [`run`].
pub fn spawned(verb: &str, words: &[OsString], life: OwnedFd) -> Result<u8> {
    let host = Host::read()?;
    let (args, name) = parse(&format!("instance {verb}"), words, &host)?;
    start(verb, &name, args, host, Some(life), Noted::ForTheJob)
}

fn parse(command: &str, words: &[OsString], host: &Host) -> Result<(StartArgs, String)> {
    let parsed = crate::cmd::parse_with_image::<StartArgs>(command, words, host, 2)?;
    let (mut args, mut words) = (parsed.args, parsed.words.into_iter());
    args.action.image = words.next().unwrap_or_default();
    let name = words.next().unwrap_or_default();
    args.action.rest = words.collect();
    Ok((args, name.to_string_lossy().into_owned()))
}

fn start(
    verb: &str,
    name: &str,
    args: StartArgs,
    host: Host,
    life: Option<OwnedFd>,
    noted: Noted,
) -> Result<u8> {
    refuse(name, &args)?;
    let patience = args.wait.as_deref().map(seconds).transpose()?;
    let action = &args.action;
    // What is for this command only goes when it ends: the container runs by then, or has ended.
    let file = action::image_path(&action.image, &host, &action::access(action))?;
    let image = image::open(&file.path)?;
    let facts = image.facts();
    image::check_arch(facts.arch.as_deref(), host.arch)?;
    let registry = Registry::open(&host);
    let network = action::network(action, || Ok(registry.place()?.path.clone()))?;
    tell_root_of_ports(&host, action.net || network.is_some());
    let service = service(&args, network.is_some())?;
    let request = request(verb, name, action, &host)?;
    let groups = host.groups();
    let planned = plan::plan(&request, &host, &facts, image.root(), &groups)?;
    drop(image);
    action::announce(&planned.warnings, &planned.infos);
    let record = record(
        verb,
        name,
        &args,
        &host,
        &registry,
        &planned.plan,
        &service,
        &facts.path,
    );
    let spec = Spec {
        plan: &planned.plan,
        service: &service,
        record,
        log_limit: match args.log_size.as_deref() {
            None => logs::DEFAULT_SIZE,
            Some("0") => 0,
            Some(text) => limits::size(text).context("--log-size")?,
        },
        network,
        limits: action::limits(action, &host)?,
        policy: action::limits_policy(&host)?,
        places: action::places(&host),
        life,
        noted,
        awaited: patience.is_some() && service.ready.is_declared(),
        foreground: args.foreground,
    };
    if args.foreground {
        return in_foreground(&registry, spec, &host);
    }
    let report = launch::start(&registry, spec)?;
    await_start(name, &report, &registry, &service, patience)
}

/// Prints the plan of an instance.
fn show(verb: &str, name: &str, args: &StartArgs, host: &Host, form: Explain) -> Result<u8> {
    let action = &args.action;
    action::refuse_fetching(&action.image, host)?;
    let file = action::image_path(&action.image, host, &action::access(action))?;
    let image = image::open(&file.path)?;
    let facts = image.facts();
    image::check_arch(facts.arch.as_deref(), host.arch)?;
    let request = request(verb, name, action, host)?;
    let planned = plan::plan(&request, host, &facts, image.root(), &host.groups())?;
    action::announce(&planned.warnings, &planned.infos);
    explain::print(&action::whole(action, &planned.plan, host)?, form)?;
    Ok(exit::OK)
}

fn request(verb: &str, name: &str, action: &ActionArgs, host: &Host) -> Result<plan::Request> {
    let mut request = action::request(if verb == "run" { "run" } else { "start" }, action, host)?;
    request.instance = Some(name.to_owned());
    request.namespaces.pid = true;
    request.close_descriptors = true;
    Ok(request)
}

/// A service that runs as root expects to open any port. Root of a container is none over the machine's own network.
fn tell_root_of_ports(host: &Host, own_network: bool) {
    let setting = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
    let first = std::fs::read_to_string(setting).unwrap_or_default();
    let first: u16 = first.trim().parse().unwrap_or(1024);
    if host.uid == 0 && !own_network && first > 1 {
        say::warn(format_args!(
            "root of a container cannot open ports below {first} of this machine's network: use a higher port, --net --publish \
             80:80, or sysctl -w net.ipv4.ip_unprivileged_port_start=80"
        ));
    }
}

fn refuse(name: &str, args: &StartArgs) -> Result<()> {
    if !is_name(name) {
        bail!(
            "{name:?} is not a valid instance name: use 1 to {LONGEST_NAME} of A-Z a-z 0-9 _ . - (not . or .., and no dash in front)"
        );
    }
    if args.boot {
        bail!(
            "Could not configure --boot: --boot requires root privileges, and starts an init system, which is not supported"
        );
    }
    for (used, option) in [
        (args.dmtcp_launch.is_some(), "--dmtcp-launch"),
        (args.dmtcp_restart.is_some(), "--dmtcp-restart"),
    ] {
        if used {
            bail!("{option} is not supported: checkpoints are not");
        }
    }
    for (used, option) in [
        (args.action.unsquash, "--unsquash"),
        (
            args.action.runscript_timeout.is_some(),
            "--runscript-timeout",
        ),
    ] {
        if used {
            bail!("{option} is not supported for instances: it is for run, exec, shell and test");
        }
    }
    action::refuse(&args.action)
}

fn seconds(text: &str) -> Result<Duration> {
    match text.trim_end_matches('s').parse::<f64>() {
        Ok(seconds) if (0.0..=1e9).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => bail!("{text:?} is not a number of seconds"),
    }
}

fn service(args: &StartArgs, connected: bool) -> Result<Service> {
    let mut ready = Vec::new();
    if let Some(text) = &args.ready_port {
        let (host, port) = parse_port(text)?;
        let addresses = match host {
            // Resolved here: names mean what they mean outside.
            Some(host) => (host, port)
                .to_socket_addrs()
                .with_context(|| format!("--ready-port {text:?}"))?
                .collect(),
            None => vec![
                ([127, 0, 0, 1], port).into(),
                ([0, 0, 0, 0, 0, 0, 0, 1], port).into(),
            ],
        };
        ready.push(Ready::Port(addresses));
    }
    if let Some(path) = &args.ready_file {
        ready.push(Ready::File(normalise(&Path::new("/").join(path))));
    }
    if let Some(pattern) = &args.ready_log {
        if let Err(error) = regex_lite::Regex::new(pattern) {
            bail!("--ready-log {pattern:?} is not a regular expression: {error}");
        }
        ready.push(Ready::Log(pattern.clone()));
    }
    if let Some(command) = &args.ready_cmd {
        ready.push(Ready::Command(command.clone()));
    }
    if args.ready_notify {
        ready.push(Ready::Notify);
    }
    if ready.len() > 1 {
        bail!(
            "give only one of --ready-port, --ready-file, --ready-log, --ready-cmd and --ready-notify"
        );
    }
    Ok(Service {
        restart: args
            .restart
            .as_deref()
            .map(parse_restart)
            .transpose()?
            .unwrap_or_default(),
        ready: ready.pop().unwrap_or_default(),
        connected,
        ends: args.foreground,
    })
}

#[allow(clippy::too_many_arguments)] // all that a record says comes together here
fn record(
    verb: &str,
    name: &str,
    args: &StartArgs,
    host: &Host,
    registry: &Registry,
    plan: &plan::Plan,
    service: &Service,
    image: &Path,
) -> Record {
    let directory = logs::directory(host, registry.job.as_deref());
    let action = &args.action;
    let binds = plan.mounts.iter().filter(|m| m.why == plan::Why::Bind);
    Record {
        name: name.to_owned(),
        user: host.user.name.clone(),
        host: logs::node_name(),
        boot: proc::boot_id(),
        job: registry.job.clone(),
        image: image.to_owned(),
        verb: verb.to_owned(),
        args: action
            .rest
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect(),
        created_s: now_s(),
        ended_s: None,
        monitor: proc::Id { pid: 0, start: 0 },
        init: None,
        ip: None,
        log_err: directory.join(format!("{name}.err")),
        log_out: directory.join(format!("{name}.out")),
        pid_file: args.pid_file.as_ref().map(|p| normalise(&host.cwd.join(p))),
        container: Container {
            ids: plan.ids,
            namespaces: plan.namespaces,
            processes: 0,
            home: plan.process.home.clone(),
            home_moved: action.home.is_some(),
            contained: action.contain || action.containall || action.compat,
            binds: binds
                .map(|m| m.target.to_string_lossy().into_owned())
                .collect(),
        },
        script: Script::default(),
        restart: service.restart,
        ready_when: service.ready.clone(),
        awaited: args.wait.is_some(),
        cgroup: None,
        peak: None,
    }
}

fn await_start(
    name: &str,
    report: &Report,
    registry: &Registry,
    service: &Service,
    patience: Option<Duration>,
) -> Result<u8> {
    match report.next(None)? {
        Some(Message::Failed(text)) => bail!("{text}"),
        _ => say::info(format_args!("instance started successfully")),
    }
    let Some(patience) = patience.filter(|_| service.ready.is_declared()) else {
        return Ok(exit::OK);
    };
    match report.next(Some(Instant::now() + patience))? {
        Some(Message::Failed(text)) => bail!("{text}"),
        Some(_) => {
            say::info(format_args!("instance {name} is ready"));
            Ok(exit::OK)
        }
        None => {
            if let Some(instance) = registry.find_any(name) {
                let stop = control::Stop {
                    signal: None,
                    patience: Duration::from_secs(5),
                    force: false,
                };
                control::finish(&control::begin(instance, &stop), stop.patience)?;
            }
            bail!(
                "instance {name} was not ready after {} s and has been stopped: see capsid instance logs {name}, or give --wait more seconds",
                patience.as_secs_f64()
            )
        }
    }
}

/// The caller's process is the monitor, and tells the service manager that started it, if one did.
fn in_foreground(registry: &Registry, spec: Spec, host: &Host) -> Result<u8> {
    let notify = host.var("NOTIFY_SOCKET").map(OsString::from);
    let declared = spec.service.ready.is_declared();
    let tell = move |message: &Message| {
        let ready = match message {
            Message::Started => !declared,
            Message::Ready => true,
            Message::Failed(_) => false,
        };
        if ready && let Some(socket) = &notify {
            // A manager that does not listen will give us up by itself.
            let _ = notify_manager(socket);
        }
    };
    monitor::run(registry, spec, &tell)
}

/// `sd_notify(3)`: a datagram to the manager's socket.
fn notify_manager(socket: &std::ffi::OsStr) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let text = format!("READY=1\nMAINPID={}", std::process::id());
    UnixDatagram::unbound()?
        .send_to_addr(text.as_bytes(), &address)
        .map(drop)
}

/// A usage error of `instance`.
pub fn usage(command: &str, text: impl Into<String>) -> anyhow::Error {
    Usage {
        command: command.into(),
        text: text.into(),
    }
    .into()
}
