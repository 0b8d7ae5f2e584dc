//! `instance list` and `instance stop`.

use std::borrow::Cow;
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use serde::Serialize;

use super::{check_user, none_found, print_table, start::usage};
use crate::cmd::print_json;
use crate::host::Host;
use crate::instance::{Record, Registry, control};
use crate::plan::pattern::fits;
use crate::{exit, say};

/// Options of `instance list`.
#[derive(clap::Args, Debug)]
pub struct ListArgs {
    /// Only those whose name matches this shell pattern
    pub pattern: Option<String>,
    /// As JSON
    #[arg(short = 'j', long)]
    pub json: bool,
    /// Show where the logs are
    #[arg(short = 'l', long)]
    pub logs: bool,
    /// Inside a Slurm job: also those of other jobs and of the login session
    #[arg(short = 'a', long)]
    pub all: bool,
    /// Inside a Slurm job: those of all its nodes (by srun), each line behind the node's number
    #[arg(long)]
    pub all_nodes: bool,
    /// Those of another user (root only; not supported)
    #[arg(short = 'u', long, hide = true)]
    pub user: Option<String>,
}

/// One instance as clients of the peers read it.
#[derive(Serialize)]
struct Entry<'a> {
    instance: &'a str,
    pid: i32,
    img: Cow<'a, str>,
    ip: &'a str,
    #[serde(rename = "logErrPath")]
    log_err: Cow<'a, str>,
    #[serde(rename = "logOutPath")]
    log_out: Cow<'a, str>,
}

#[derive(Serialize)]
struct Entries<'a> {
    instances: Vec<Entry<'a>>,
}

fn pid(record: &Record) -> i32 {
    record.init.map_or(0, |init| init.pid)
}

/// The name, with the job where that is not ours.
fn shown_name(record: &Record, registry: &Registry) -> String {
    match &record.job {
        Some(job) if registry.job.is_none() => format!("{} (job {job})", record.name),
        _ => record.name.clone(),
    }
}

/// Lists running instances.
///
/// # Errors
/// When there is no place where they could be.
pub fn list(args: &ListArgs) -> Result<u8> {
    let host = Host::read()?;
    check_user(args.user.as_deref(), &host)?;
    if args.json && args.logs {
        bail!("json and logs flags are mutually exclusive");
    }
    if args.all_nodes {
        if args.json {
            bail!(
                "--all-nodes and --json cannot be combined: run capsid instance list --json by srun on each node"
            );
        }
        let mut words = vec!["instance", "list"];
        words.extend(args.logs.then_some("--logs"));
        words.extend(args.pattern.as_deref());
        return crate::cmd::job::on_all_nodes(&host, &words);
    }
    let mut registry = Registry::open(&host);
    if args.all {
        registry.job = None;
    }
    let mut records = registry.list();
    let pattern = args.pattern.as_deref().unwrap_or("*");
    records.retain(|r| fits(pattern, &r.name));
    if args.json {
        print_json(&Entries {
            instances: records.iter().map(|r| Entry::of(r)).collect(),
        })?;
        return Ok(exit::OK);
    }
    let head = |words: &[&str]| vec![words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()];
    let mut rows;
    if args.logs {
        rows = head(&["INSTANCE NAME", "PID", "LOGS"]);
        for record in &records {
            let path = |p: &std::path::Path| p.display().to_string();
            let name = shown_name(record, &registry);
            rows.push(vec![name, pid(record).to_string(), path(&record.log_err)]);
            rows.push(vec![String::new(), String::new(), path(&record.log_out)]);
        }
    } else {
        rows = head(&["INSTANCE NAME", "PID", "IP", "IMAGE"]);
        for record in &records {
            rows.push(vec![
                shown_name(record, &registry),
                pid(record).to_string(),
                record.ip.clone().unwrap_or_default(),
                record.image.display().to_string(),
            ]);
        }
    }
    print_table(&rows)?;
    Ok(exit::OK)
}

impl<'a> Entry<'a> {
    fn of(record: &'a Record) -> Entry<'a> {
        Entry {
            instance: &record.name,
            pid: pid(record),
            img: record.image.to_string_lossy(),
            ip: record.ip.as_deref().unwrap_or_default(),
            log_err: record.log_err.to_string_lossy(),
            log_out: record.log_out.to_string_lossy(),
        }
    }
}

/// Options of `instance stop`.
#[derive(clap::Args, Debug)]
pub struct StopArgs {
    /// The name, or a shell pattern
    pub pattern: Option<String>,
    /// All instances
    #[arg(short = 'a', long, alias = "a")]
    pub all: bool,
    /// The signal for the service, by name or number [default: INT]
    #[arg(short = 's', long, value_name = "SIG")]
    pub signal: Option<String>,
    /// Seconds after which the service is killed
    #[arg(short = 't', long, value_name = "SEC", default_value = "10")]
    pub timeout: f64,
    /// Kill it at once
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Those of another user (root only; not supported)
    #[arg(short = 'u', long, hide = true)]
    pub user: Option<String>,
}

/// Stops instances.
///
/// # Errors
/// When none matches, or one does not end.
pub fn stop(args: &StopArgs) -> Result<u8> {
    let host = Host::read()?;
    check_user(args.user.as_deref(), &host)?;
    let pattern = match (&args.pattern, args.all) {
        (Some(pattern), _) => pattern.as_str(),
        (None, true) => "*",
        (None, false) => {
            return Err(usage(
                "stop",
                "invalid command: name an instance, or give --all",
            ));
        }
    };
    if !(0.0..=1e9).contains(&args.timeout) {
        return Err(usage("stop", "--timeout is a number of seconds"));
    }
    let stop = control::Stop {
        signal: args.signal.as_deref().map(signal).transpose()?,
        patience: Duration::from_secs_f64(args.timeout),
        force: args.force,
    };
    let registry = Registry::open(&host);
    let mut records = registry.list();
    // What belongs to a job is stopped inside that job.
    records.retain(|r| r.job == registry.job && fits(pattern, &r.name));
    if records.is_empty() {
        return match registry.find_silent(pattern) {
            Some(monitor) => control::end_silent(pattern, &monitor, &stop),
            None => Err(none_found("stop")),
        };
    }
    let mut endings = Vec::new();
    for record in records {
        say::info(format_args!(
            "Stopping {} instance of {} (PID={})",
            record.name,
            record.image.display(),
            pid(&record)
        ));
        endings.push(control::begin(record, &stop));
    }
    let end = std::time::Instant::now() + stop.patience;
    let mut failures = Vec::new();
    for ending in endings {
        let left = end.saturating_duration_since(std::time::Instant::now());
        if let Err(error) = control::finish(&ending, left) {
            failures.push(format!("{error:#}"));
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(exit::OK)
}

/// A signal by name, with or without `SIG`, or by number.
fn signal(text: &str) -> Result<Signal> {
    let upper = text.to_ascii_uppercase();
    let named = upper
        .parse()
        .or_else(|_| format!("SIG{upper}").parse())
        .ok();
    let numbered = || {
        text.parse()
            .ok()
            .and_then(|n: i32| Signal::try_from(n).ok())
    };
    match named.or_else(numbered) {
        Some(signal) => Ok(signal),
        None => bail!("{text:?} is not a signal (--signal): use a name such as TERM, or a number"),
    }
}
