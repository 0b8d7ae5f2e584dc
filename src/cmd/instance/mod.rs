//! `instance start|run|list|stop|stats|logs|wait|inspect|unit`, and stepping into an instance.

pub mod join;
pub mod list;
pub mod start;
pub mod unit;
pub mod watch;

use std::ffi::OsString;

use anyhow::Result;

use super::{Explain, Persona, Usage};
use crate::host::Host;
use crate::instance::Instance;
use crate::say;

/// The commands below `instance`, with the line that their list shows.
pub const COMMANDS: &[(&str, &str)] = &[
    (
        "start",
        "Start an instance: the image's startscript in the background",
    ),
    (
        "run",
        "Start an instance: the image's runscript in the background",
    ),
    ("list", "List running instances"),
    ("stop", "Stop instances"),
    ("stats", "Show what instances use"),
    ("logs", "Show what an instance's service said"),
    (
        "wait",
        "Wait until an instance's service is ready, or its script has ended",
    ),
    ("inspect", "Show all that is known of an instance"),
    ("unit", "Print a systemd unit for an instance"),
];

/// Runs `instance WORDS…`.
///
/// # Errors
/// [`Usage`] for a wrong command line; anything else is fatal.
pub fn run(words: &[OsString], explain: Option<Explain>, persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let rest = words.get(1..).unwrap_or_default();
    match verb {
        "start" | "run" => start::run(verb, rest, explain),
        "list" => list::list(&parse("instance list", rest)?),
        "stop" => list::stop(&parse("instance stop", rest)?),
        "stats" => watch::stats(&parse("instance stats", rest)?),
        "logs" => watch::logs(&parse("instance logs", rest)?),
        "wait" => watch::wait(&parse("instance wait", rest)?),
        "inspect" => watch::inspect(&parse("instance inspect", rest)?),
        "unit" => unit::run(rest),
        other => super::print_group(
            "instance",
            "Manage containers running as services",
            COMMANDS,
            other,
            persona,
        ),
    }
}

/// Options of a command, with the environment's in front.
fn parse<A: clap::Args + clap::FromArgMatches>(name: &str, words: &[OsString]) -> Result<A> {
    super::parse_with_environment(name, words, &Host::read()?)
}

/// Says that a command found no instance: a wrong command line, as clients expect it.
fn none_found(command: &str) -> anyhow::Error {
    Usage {
        command: command.into(),
        text: "no instance found".into(),
    }
    .into()
}

/// `-u USER` of the peers: everybody sees their own.
fn check_user(user: Option<&str>, host: &Host) -> Result<()> {
    if user.is_some_and(|user| user != host.user.name) {
        anyhow::bail!(
            "Only root user can list user's instances, and capsid keeps those of each user to themselves: become that user"
        );
    }
    Ok(())
}

/// The instance that a command names, running or not. One that has ended has no processes.
fn instance_of(name: &str, host: &Host) -> Result<Instance> {
    let registry = crate::instance::Registry::open(host);
    if let Some(instance) = registry.find_any(name) {
        return Ok(instance);
    }
    let usual = crate::instance::logs::directory(host, registry.job.as_deref());
    let instead = registry.directory().map(|d| d.path.join("logs"));
    [Some(usual), instead]
        .iter()
        .flatten()
        .find_map(|directory| crate::instance::logs::last_end(directory, name))
        .map(Instance::ended)
        .ok_or_else(|| anyhow::anyhow!("no instance found with name {name}"))
}

/// Prints a table as the peers do: each column as wide as its widest field, and four blanks.
fn print_table(rows: &[Vec<String>]) -> Result<()> {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|n| rows.iter().map(|r| r[n].chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let line: String = row
            .iter()
            .zip(&widths)
            .map(|(field, width)| format!("{:<1$}    ", say::printable(field), width))
            .collect();
        say::out(format_args!("{}\n", line.trim_end()))?;
    }
    Ok(())
}
