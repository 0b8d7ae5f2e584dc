//! `instance logs`, `wait`, `inspect` and `stats`.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{check_user, instance_of, none_found, print_table};
use crate::cmd::{print_json, utc};
use crate::host::Host;
use crate::instance::stats::{self, Usage};
use crate::instance::{Instance, Record, Registry, State, control, logs};
use crate::plan::pattern::fits;
use crate::{exit, say};

/// Options of `instance logs`.
#[derive(clap::Args, Debug)]
pub struct LogsArgs {
    /// The name; the instance may have ended
    pub name: String,
    /// Go on as long as the instance runs
    #[arg(short = 'f', long)]
    pub follow: bool,
    /// Only the last so many lines of each
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<usize>,
    /// Only standard output
    #[arg(long, conflicts_with = "err")]
    pub out: bool,
    /// Only standard error
    #[arg(long)]
    pub err: bool,
}

/// Shows what a service said.
///
/// # Errors
/// When there is no such instance, and never was one.
pub fn logs(args: &LogsArgs) -> Result<u8> {
    let host = Host::read()?;
    let Instance {
        record, monitor, ..
    } = instance_of(&args.name, &host)?;
    let mut paths = Vec::new();
    if !args.err {
        paths.push(&record.log_out);
    }
    if !args.out {
        paths.push(&record.log_err);
    }
    let opened = paths.iter().map(|path| logs::Reader::open(path));
    let mut readers = opened.collect::<Result<Vec<_>>>()?;
    let mut stdout = std::io::stdout().lock();
    let what = "cannot write to standard output";
    for reader in &readers {
        reader.copy(args.tail, &mut stdout)?;
    }
    stdout.flush().context(what)?;
    if !args.follow {
        return Ok(exit::OK);
    }
    loop {
        let running = monitor
            .as_ref()
            .is_some_and(|m| !m.wait(Duration::from_millis(50)));
        for reader in &mut readers {
            stdout.write_all(&reader.more()).context(what)?;
        }
        stdout.flush().context(what)?;
        if !running {
            return Ok(exit::OK);
        }
    }
}

/// Options of `instance wait`.
#[derive(clap::Args, Debug)]
pub struct WaitArgs {
    /// The name
    pub name: String,
    /// What to wait for [default: ready when the instance was started with --ready-… and not waited for, else exit]
    #[arg(long = "for", value_name = "WHAT", value_parser = ["ready", "exit", "stop"])]
    pub until: Option<String>,
    /// Give up after so many seconds
    #[arg(short = 't', long, value_name = "SEC")]
    pub timeout: Option<f64>,
}

/// Waits for an instance; for the end of its script, prints its status and ends with it.
///
/// # Errors
/// When it is waited for in vain.
pub fn wait(args: &WaitArgs) -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    if registry.job.is_some() && args.until.as_deref() == Some("ready") {
        // It may be declared, and wait for others.
        crate::job::await_ready(&registry, &args.name)?;
    }
    let Some(record) = registry.find_any(&args.name) else {
        // One that has ended has its status still.
        let record = instance_of(&args.name, &host)?;
        if args.until.as_deref() == Some("ready") {
            bail!("instance {} has ended", args.name);
        }
        say::out(format_args!("{}\n", record.exit_status()))?;
        return Ok(record.exit_status());
    };
    let until = match args.until.as_deref() {
        Some("ready") => control::Until::Ready,
        Some("stop") => control::Until::Stop,
        Some(_) => control::Until::Exit,
        None if record.ready_when.is_declared() && !record.awaited => control::Until::Ready,
        None => control::Until::Exit,
    };
    let deadline = match args.timeout {
        Some(seconds) if (0.0..=1e9).contains(&seconds) => {
            Some(Instant::now() + Duration::from_secs_f64(seconds))
        }
        Some(_) => {
            return Err(super::start::usage(
                "wait",
                "--timeout is a number of seconds",
            ));
        }
        None => None,
    };
    match control::wait(&registry, &args.name, until, deadline)? {
        None => bail!(
            "waited {} s for instance {} in vain",
            args.timeout.unwrap_or_default(),
            args.name
        ),
        Some(_) if until == control::Until::Ready => Ok(exit::OK),
        Some(record) => {
            say::out(format_args!("{}\n", record.exit_status()))?;
            Ok(record.exit_status())
        }
    }
}

/// Options of `instance inspect`.
#[derive(clap::Args, Debug)]
pub struct InspectArgs {
    /// The name; the instance may have ended
    pub name: String,
    /// As JSON
    #[arg(short = 'j', long)]
    pub json: bool,
}

#[derive(serde::Serialize)]
struct Inspection<'a> {
    #[serde(flatten)]
    record: &'a Record,
    running: bool,
    hints: Vec<String>,
}

/// Shows all that is known of an instance.
///
/// # Errors
/// When there is no such instance, and never was one.
pub fn inspect(args: &InspectArgs) -> Result<u8> {
    let host = Host::read()?;
    let instance = instance_of(&args.name, &host)?;
    let running = instance.is_running();
    let record = instance.record;
    let hints = hints(&record);
    if args.json {
        print_json(&Inspection {
            record: &record,
            running,
            hints,
        })?;
        return Ok(exit::OK);
    }
    let script = &record.script;
    let state = match (script.state, running) {
        (_, false) => "ended",
        (State::Starting, true) => "starting",
        (State::Running, true) => "running",
        (State::Restarting, true) => "waiting for its next start",
        (State::Exited, true) => "its script has ended",
        (State::None, true) => "idle",
    };
    let mut lines = vec![
        ("name", record.name.clone()),
        ("image", record.image.display().to_string()),
        ("state", state.to_owned()),
        ("ready", if script.ready { "yes" } else { "no" }.to_owned()),
        ("started", utc(record.created_s) + "Z"),
    ];
    lines.extend(
        record
            .init
            .filter(|_| running)
            .map(|i| ("pid", i.pid.to_string())),
    );
    lines.extend(record.job.clone().map(|j| ("job", j)));
    lines.extend(record.ip.clone().map(|i| ("address", i)));
    if let (State::Exited | State::Restarting, Some(at)) = (script.state, script.ended_s) {
        let how = match (script.status, script.signal) {
            (Some(status), _) => format!("status {status}"),
            (None, Some(signal)) if script.oom => format!("signal {signal}, out of memory"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "unknown".into(),
        };
        lines.push(("script", format!("{how}, {}Z", utc(at))));
    }
    lines.push(("restarts", script.restarts.to_string()));
    lines.extend(record.ended_s.map(|at| ("ended", utc(at) + "Z")));
    lines.push(("stdout", record.log_out.display().to_string()));
    lines.push(("stderr", record.log_err.display().to_string()));
    lines.extend(hints.into_iter().map(|h| ("hint", h)));
    for (name, value) in lines {
        say::out(format_args!("{name:<10}{}\n", say::printable(&value)))?;
    }
    Ok(exit::OK)
}

/// What the end of a log tells somebody who knows.
fn hints(record: &Record) -> Vec<String> {
    let mut text = Vec::new();
    // Without a log there is nothing to say.
    let _ = logs::Reader::open(&record.log_err).and_then(|log| log.copy(Some(200), &mut text));
    let text = String::from_utf8_lossy(&text);
    let refused = |line: &&str| {
        let line = line.to_ascii_lowercase();
        line.contains("bind") && (line.contains("permission denied") || line.contains("eacces"))
    };
    let mut hints = Vec::new();
    if text.lines().any(|l| refused(&l)) {
        hints.push(
            "the service may not open a port below 1024: use a higher port, or --net --publish HOSTPORT:PORT".to_owned(),
        );
    }
    if record.script.oom {
        hints.push(
            "memory ran out: give it more with --memory, or ask the batch system for more"
                .to_owned(),
        );
    }
    hints
}

/// Options of `instance stats`.
#[derive(clap::Args, Debug)]
pub struct StatsArgs {
    /// The name, or a shell pattern [default: all]
    pub name: Option<String>,
    /// One look only
    #[arg(long)]
    pub no_stream: bool,
    /// As JSON (one look only)
    #[arg(short = 'j', long)]
    pub json: bool,
    /// Those of another user (root only; not supported)
    #[arg(short = 'u', long, hide = true)]
    pub user: Option<String>,
}

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Shows what instances use.
///
/// # Errors
/// When none matches.
pub fn stats(args: &StatsArgs) -> Result<u8> {
    let host = Host::read()?;
    check_user(args.user.as_deref(), &host)?;
    let registry = Registry::open(&host);
    let pattern = args.name.as_deref().unwrap_or("*");
    let look = || -> Vec<(Record, Usage)> {
        let all = registry.list().into_iter().map(|i| i.record);
        all.filter(|r| fits(pattern, &r.name))
            .filter_map(|r| stats::usage(&r).map(|usage| (r, usage)))
            .collect()
    };
    let mut before = look();
    if before.is_empty() {
        return Err(none_found("stats"));
    }
    let terminal = std::io::stdout().is_terminal();
    let once = args.no_stream || args.json || !terminal;
    loop {
        std::thread::sleep(INTERVAL);
        let now = look();
        if now.is_empty() {
            return Ok(exit::OK);
        }
        if args.json {
            let usage: Vec<_> = now
                .iter()
                .map(|(r, u)| stats::as_json(&r.name, u))
                .collect();
            match (&args.name, usage.as_slice()) {
                (Some(_), [one]) => print_json(one)?,
                _ => print_json(&usage)?,
            }
            return Ok(exit::OK);
        }
        let head = [
            "INSTANCE NAME",
            "CPU USAGE",
            "MEM USAGE / LIMIT",
            "MEM %",
            "BLOCK I/O",
            "PIDS",
        ];
        let mut rows = vec![head.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()];
        for (record, usage) in &now {
            let earlier = before.iter().find(|(r, _)| r.name == record.name);
            rows.push(stats::row(&record.name, earlier.map(|(_, u)| u), usage));
        }
        if terminal && !once {
            // Home, and clear what is below.
            say::out(format_args!("\x1b[H\x1b[J"))?;
        }
        print_table(&rows)?;
        std::io::stdout()
            .flush()
            .context("cannot write to standard output")?;
        if once {
            return Ok(exit::OK);
        }
        before = now;
    }
}
