//! The command line: which command was asked for, and its options as typed.
//!
//! Only the command that is named gets its parser built: parsing all of them would cost more than a
//! container does. Options end at the image; everything after it belongs to the payload, so the words
//! are split before clap sees them.

pub mod action;
pub mod build;
pub mod cache;
pub mod demo;
pub mod doctor;
pub mod environment;
pub mod explain;
pub mod fetch;
pub mod flags;
pub mod inspect;
pub mod instance;
pub mod job;
mod overlay;
mod parse;
mod prompt;
pub mod pull;
pub mod push;
pub mod registry;
pub mod remote;
pub mod sif;
mod sif_edit;
pub mod transfer;
mod unsquash;

use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

use crate::host::Host;
use crate::{exit, say};
use parse::{
    command, parse, parse_action, parse_interspersed, parse_with_environment, parse_with_image,
};

/// The release of Apptainer whose behaviour we follow; printed when called by its name, because
/// clients parse it (`reference/CLIENTS.md` A).
const APPTAINER_VERSION: &str = "1.5.3";

/// The name that the program was called by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persona {
    /// Our own.
    Capsid,
    /// `apptainer` or `singularity`: a drop-in.
    Apptainer,
}

/// Options before the command.
#[derive(Debug, Default)]
struct Globals {
    explain: Option<Explain>,
}

/// The form of `--explain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Explain {
    /// For reading.
    Text,
    /// For programs.
    Json,
}

/// A wrong command line: what was wrong, and for which command. It ends with status 1.
#[derive(Debug)]
pub struct Usage {
    /// Empty for the program itself.
    pub command: String,
    /// What was wrong.
    pub text: String,
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Usage {}

/// A child process has failed, and has said why: the status to end with.
#[derive(Debug)]
pub struct Told(pub u8);

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("the reason was told")
    }
}

impl std::error::Error for Told {}

/// The commands, with the line that the list of commands shows.
const COMMANDS: &[(&str, &str)] = &[
    (
        "build",
        "Build an image from a definition file, another image or an address",
    ),
    ("cache", "Manage what was downloaded and converted"),
    (
        "demo",
        "Make a small image from this machine's own programs, run it, show each command",
    ),
    (
        "doctor",
        "Check what this machine offers, and what an administrator has to do",
    ),
    ("exec", "Run a command within a container"),
    ("inspect", "Show what an image says about itself"),
    ("instance", "Manage containers running as services"),
    ("job", "Services of Slurm jobs"),
    ("overlay", "Make a writable overlay: create"),
    ("pull", "Download an image to a file"),
    ("push", "Upload an image to a registry or a library"),
    ("registry", "Manage logins for registries"),
    ("remote", "Manage endpoints of libraries"),
    (
        "run",
        "Run the user-defined default command within a container",
    ),
    ("run-help", "Show the user-defined help for an image"),
    ("shell", "Run a shell within a container"),
    (
        "sif",
        "Look into a SIF and change it: list, header, info, dump, new, add, del, setprim",
    ),
    ("test", "Run the user-defined tests within a container"),
    ("version", "Show the version"),
];

/// Commands of the peers that this version does not have, with the reason.
const MISSING: &[(&str, &str)] = &[
    (
        "buildcfg",
        "nothing is settled when it is built: see doctor",
    ),
    (
        "capability",
        "there are no lists of who may have which: --add-caps gives those of the container to anybody",
    ),
    ("checkpoint", "it cannot freeze and restore processes"),
    ("completion", "it has no completions for shells"),
    ("config", "there is no configuration that has to be made"),
    ("delete", "use the registry's or library's own program"),
    ("key", SIGNATURES),
    ("keys", SIGNATURES),
    ("keyserver", SIGNATURES),
    (
        "oci",
        "it runs no bundles but Slurm's (job oci-run): use runc or crun",
    ),
    ("plugin", "there are no plugins"),
    ("search", "use the library's web page"),
    ("sign", SIGNATURES),
    ("tag", "use skopeo copy or oras tag"),
    ("verify", SIGNATURES),
];
const SIGNATURES: &str = "signatures are neither made nor checked";

/// Runs the command line.
///
/// # Errors
/// [`Usage`] for a wrong command line; anything else is fatal.
pub fn main(args: &[OsString]) -> Result<u8> {
    let called = args.first().map_or("capsid", |a| {
        a.to_str()
            .unwrap_or("capsid")
            .rsplit('/')
            .next()
            .unwrap_or("capsid")
    });
    let persona = match called {
        "apptainer" | "singularity" | "run-singularity" => Persona::Apptainer,
        _ => Persona::Capsid,
    };
    PEER.store(persona == Persona::Apptainer, Ordering::Relaxed);
    let words = args.get(1..).unwrap_or_default();
    if called == "run-singularity" {
        return action::run(
            "run",
            parse_action("run", words, &Host::read()?)?,
            None,
            persona,
        );
    }
    let (globals, words) = match global_options(words, persona)? {
        Global::Go(globals, words) => (globals, words),
        Global::Done(status) => return Ok(status),
    };
    if words.is_empty() {
        print_usage(persona)?;
        return Ok(exit::USAGE);
    }
    if globals.explain.is_some() {
        check_explained(&words)?;
    }
    command_of(&words, globals.explain, persona)
}

/// Runs the command that the words name.
fn command_of(words: &[OsString], explain: Option<Explain>, persona: Persona) -> Result<u8> {
    let (verb, rest) = words.split_at(1);
    match verb[0].to_str().unwrap_or_default() {
        name @ ("exec" | "run" | "shell" | "test" | "run-help") => {
            let host = Host::read()?;
            let args = parse_action(name, rest, &host)?;
            let explain = args.explain.or(explain);
            action::run_on(name, args, explain, persona, host)
        }
        "build" => {
            let host = Host::read()?;
            let parsed = parse_interspersed::<build::BuildArgs>("build", rest, &host)?;
            build::run(&parsed.args, &parsed.words, host)
        }
        "inspect" => inspect::run(parse::<inspect::InspectArgs>("inspect", rest)?),
        "instance" => instance::run(rest, explain, persona),
        "job" => job::run(rest, persona),
        // As an older client writes them.
        name @ ("instance.start" | "instance.stop" | "instance.list") => {
            let mut words = vec![OsString::from(&name["instance.".len()..])];
            words.extend_from_slice(rest);
            instance::run(&words, explain, persona)
        }
        "overlay" => overlay::run(rest, persona),
        "sif" => sif::run(rest, persona),
        "cache" => cache::run(rest, persona),
        "pull" => pull::run(rest),
        "push" => push::run(rest),
        "registry" => registry::run(rest, persona),
        "remote" => remote::run(rest, persona),
        fetch::FETCH => {
            let host = Host::read()?;
            fetch::run_fetch(&parse_with_environment(fetch::FETCH, rest, &host)?)
        }
        "doctor" => doctor::run(&parse::<doctor::DoctorArgs>("doctor", rest)?),
        "demo" => demo::run(&parse::<demo::DemoArgs>("demo", rest)?),
        "version" => {
            parse::<NoArgs>("version", rest)?;
            say::out(format_args!("{}\n", version(persona)))?;
            Ok(exit::OK)
        }
        "help" => print_help(rest, persona),
        name => Err(no_command(name, persona)?),
    }
}

/// No options.
#[derive(clap::Args, Debug)]
struct NoArgs {}

/// `--explain` does nothing, so it is refused before anything is done where there is no plan to show.
fn check_explained(words: &[OsString]) -> Result<()> {
    let word = |n: usize| words.get(n).and_then(|w| w.to_str()).unwrap_or_default();
    let name = match (word(0), word(1)) {
        ("exec" | "run" | "shell" | "test" | "instance.start", _) => return Ok(()),
        ("instance", "start" | "run") => return Ok(()),
        (
            group @ ("instance" | "cache" | "job" | "overlay" | "registry" | "remote" | "sif"),
            verb,
        ) => {
            format!("{group} {verb}")
        }
        (name, _) => name.to_owned(),
    };
    Err(Usage {
        command: name.trim_end().to_owned(),
        text: "--explain shows the plans of exec, run, shell, test, instance start and instance run, and of no other command: nothing was done"
            .into(),
    }
    .into())
}

/// Why there is no command of this name.
fn no_command(name: &str, persona: Persona) -> Result<anyhow::Error> {
    if let Some((_, why)) = MISSING.iter().find(|(missing, _)| *missing == name) {
        return Ok(anyhow::anyhow!(
            "the command {name:?} is not supported by this version of capsid: {why}"
        ));
    }
    let meant = similar(name, COMMANDS.iter().map(|(name, _)| *name));
    if meant.is_none() {
        print_usage(persona)?;
    }
    let text = format!("unknown command {name:?} for {:?}", program(persona));
    let usage = Usage {
        command: String::new(),
        text: text + &did_you_mean(meant),
    };
    Ok(usage.into())
}

/// A question behind the text of an error.
fn did_you_mean(meant: Option<&str>) -> String {
    meant.map_or_else(String::new, |meant| format!(" (did you mean {meant:?}?)"))
}

/// The name that was most likely meant: one of its letters, or less than a third, are wrong, missing or too many.
fn similar<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let near = names.map(|name| (edits(word.as_bytes(), name.as_bytes()), name));
    let (edits, name) = near.min_by_key(|(edits, _)| *edits)?;
    let len = name.len().max(word.len());
    (edits * 3 < len || edits == 1 && len > 2).then_some(name)
}

/// How many letters have to be changed, added or removed (Levenshtein); two that changed places count as one.
fn edits(one: &[u8], other: &[u8]) -> usize {
    let mut rows = vec![vec![0; other.len() + 1]; one.len() + 1];
    for i in 0..=one.len() {
        for j in 0..=other.len() {
            if i == 0 || j == 0 {
                rows[i][j] = i + j;
                continue;
            }
            let same = usize::from(one[i - 1] != other[j - 1]);
            let mut least = rows[i - 1][j - 1] + same;
            least = least.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && one[i - 1] == other[j - 2] && one[i - 2] == other[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = least;
        }
    }
    rows[one.len()][other.len()]
}

enum Global {
    Go(Globals, Vec<OsString>),
    Done(u8),
}

fn global_options(words: &[OsString], persona: Persona) -> Result<Global> {
    let mut globals = Globals::default();
    level_from_environment()?;
    let mut i = 0;
    while let Some(word) = words
        .get(i)
        .and_then(|w| w.to_str())
        .filter(|w| w.starts_with('-') && w.len() > 1)
    {
        match word {
            "--debug" => say::set_level(say::DEBUG),
            "--verbose" => say::set_level(say::VERBOSE),
            "--quiet" => say::set_level(say::WARNING),
            "--silent" => say::set_level(say::ERROR),
            "--nocolor" => say::disable_colour(),
            "--explain" | "--explain=text" => globals.explain = Some(Explain::Text),
            "--explain=json" => globals.explain = Some(Explain::Json),
            "--version" => {
                say::out(format_args!(
                    "{} version {}\n",
                    program(persona),
                    version(persona)
                ))?;
                return Ok(Global::Done(exit::OK));
            }
            "--help" | "-h" => {
                return print_help(&words[i + 1..], persona).map(Global::Done);
            }
            "-c" | "--config" => bail!("--config is not supported: there is no configuration file"),
            "--build-config" => {
                bail!("--build-config is not supported: nothing is settled when it is built")
            }
            _ if !word.starts_with("--") && word[1..].chars().all(|c| "dvqs".contains(c)) => {
                for c in word[1..].chars() {
                    say::set_level(match c {
                        'd' => say::DEBUG,
                        'v' => say::VERBOSE,
                        'q' => say::WARNING,
                        _ => say::ERROR,
                    });
                }
            }
            _ => {
                return Err(Usage {
                    command: String::new(),
                    text: format!("unknown flag: {word}"),
                }
                .into());
            }
        }
        i += 1;
    }
    Ok(Global::Go(globals, words[i..].to_vec()))
}

/// `APPTAINER_DEBUG`, `_VERBOSE`, `_QUIET`, `_SILENT`, `_NOCOLOR` and `_MESSAGELEVEL`.
fn level_from_environment() -> Result<()> {
    let value = |key: &str| {
        ["APPTAINER_", "SINGULARITY_"]
            .iter()
            .find_map(|p| std::env::var_os(format!("{p}{key}")).filter(|v| !v.is_empty()))
    };
    let level = value("MESSAGELEVEL").and_then(|v| v.to_str().and_then(|v| v.parse::<i8>().ok()));
    if let Some(level) = level {
        say::set_level(level);
    }
    for (key, level) in [
        ("SILENT", say::ERROR),
        ("QUIET", say::WARNING),
        ("VERBOSE", say::VERBOSE),
        ("DEBUG", say::DEBUG),
    ] {
        if let Some(v) = value(key)
            && environment::parse_bool(&key.to_lowercase(), &v)?
        {
            say::set_level(level);
        }
    }
    if let Some(v) = value("NOCOLOR")
        && environment::parse_bool("nocolor", &v)?
    {
        say::disable_colour();
    }
    Ok(())
}

/// Answers a group of commands that was called without one of them, or with a wrong one.
fn print_group(
    group: &str,
    about: &str,
    commands: &[(&str, &str)],
    verb: &str,
    persona: Persona,
) -> Result<u8> {
    let program = program(persona);
    let widest = commands.iter().map(|(name, _)| name.len()).max();
    let width = widest.unwrap_or(0) + 2;
    say::out(format_args!(
        "{about}\n\nUsage:\n  {program} {group} <command>\n\nAvailable Commands:\n"
    ))?;
    for (name, about) in commands {
        say::out(format_args!("  {name:<width$}{about}\n"))?;
    }
    say::out(format_args!(
        "\nRun '{program} {group} <command> --help' for the options of a command.\n"
    ))?;
    match verb {
        "help" | "--help" | "-h" => Ok(exit::OK),
        "" => Ok(exit::USAGE),
        other => {
            let meant = similar(other, commands.iter().map(|(name, _)| *name));
            Err(Usage {
                command: group.into(),
                text: format!("unknown command {other:?}") + &did_you_mean(meant),
            }
            .into())
        }
    }
}

/// Whether the program was called by a peer's name, for the usage lines.
static PEER: AtomicBool = AtomicBool::new(false);

/// The name that the usage lines show.
fn own_name() -> &'static str {
    program(if PEER.load(Ordering::Relaxed) {
        Persona::Apptainer
    } else {
        Persona::Capsid
    })
}

/// What a command does, as the list of its group has it.
fn about(name: &str) -> &'static str {
    let groups = [
        ("instance ", instance::COMMANDS),
        ("job ", job::COMMANDS),
        ("cache ", cache::COMMANDS),
        ("registry ", registry::COMMANDS),
        ("remote ", remote::COMMANDS),
    ];
    let (table, own) = groups
        .iter()
        .find_map(|(group, table)| Some((*table, name.strip_prefix(group)?)))
        .unwrap_or((COMMANDS, name));
    let found = table.iter().find(|(n, _)| *n == own);
    found.map_or("", |(_, about)| *about)
}

fn usage_line(name: &str) -> String {
    let line = capsid_usage_line(name);
    line.replacen("capsid", own_name(), 1)
}

fn capsid_usage_line(name: &str) -> String {
    match name {
        "exec" => "capsid [global options...] exec [exec options...] <container> <command>".into(),
        "run" => "capsid [global options...] run [run options...] <container> [args...]".into(),
        "instance start" | "instance run" | "instance unit" => {
            format!("capsid [global options...] {name} [options...] <container> <name> [args...]")
        }
        "instance logs" | "instance wait" | "instance inspect" => {
            format!("capsid {name} [options...] <name>")
        }
        "instance list" | "instance stop" | "instance stats" => {
            format!("capsid {name} [options...] [name or pattern]")
        }
        "shell" | "test" | "run-help" => {
            format!("capsid [global options...] {name} [{name} options...] <container>")
        }
        "build" => "capsid [global options...] build [build options...] <image to be made> <definition, image or address>".into(),
        "inspect" => "capsid inspect [options...] <image>".into(),
        "cache warm" => "capsid cache warm <image>...".into(),
        "pull" => "capsid pull [options...] [file] <URI>".into(),
        "push" => "capsid push [options...] <file> <URI>".into(),
        "registry login" | "registry logout" => format!("capsid {name} [options...] <URI>"),
        "remote use" | "remote remove" => format!("capsid {name} [options...] <name>"),
        "remote add" => "capsid remote add [options...] <name> <URI>".into(),
        "remote login" | "remote logout" | "remote status" => {
            format!("capsid {name} [options...] [name]")
        }
        "overlay create" => "capsid overlay create [options...] <image>".into(),
        other => format!("capsid {other} [options...]"),
    }
}

fn print_action_usage(name: &str) -> Result<()> {
    say::out(format_args!(
        "Usage:\n  {}\n\nRun '{} help {name}' for more information.\n",
        usage_line(name),
        own_name()
    ))
}

fn program(persona: Persona) -> &'static str {
    match persona {
        Persona::Capsid => "capsid",
        Persona::Apptainer => "apptainer",
    }
}

fn version(persona: Persona) -> &'static str {
    match persona {
        Persona::Capsid => env!("CARGO_PKG_VERSION"),
        Persona::Apptainer => APPTAINER_VERSION,
    }
}

fn print_usage(persona: Persona) -> Result<()> {
    say::out(format_args!(
        "Usage:\n  {} [global options...] <command>\n\nAvailable Commands:\n",
        program(persona)
    ))?;
    for (name, about) in COMMANDS {
        say::out(format_args!("  {name:<12}{about}\n"))?;
    }
    say::out(format_args!(
        "\nGlobal options:\n  -d, --debug      show the plan and each step\n  -v, --verbose    say more\n  -q, --quiet      no INFO messages\n  \
         -s, --silent     errors only\n      --nocolor    no colours\n      --explain[=json]  print what would be done, and do nothing\n      \
         --version    show the version\n  -h, --help       show this help\n"
    ))
}

/// The help of the command that the words name: what it says itself when it is asked.
fn print_help(words: &[OsString], persona: Persona) -> Result<u8> {
    let word = |n: usize| words.get(n).and_then(|w| w.to_str()).unwrap_or_default();
    let help = OsString::from("--help");
    match word(0) {
        "" | "help" | "--help" | "-h" => {
            print_usage(persona)?;
            Ok(exit::OK)
        }
        group @ ("cache" | "instance" | "job" | "overlay" | "registry" | "remote" | "sif") => {
            let mut all = vec![OsString::from(group)];
            all.extend(words.get(1).filter(|w| !w.is_empty()).cloned());
            if !matches!(word(1), "help" | "--help" | "-h") {
                all.push(help);
            }
            command_of(&all, None, persona)
        }
        name if COMMANDS.iter().any(|(known, _)| *known == name) => {
            command_of(&[name.into(), help], None, persona)
        }
        name => Err(no_command(name, persona)?),
    }
}

/// UTC as `2026-11-24 21:12:42` (civil calendar from days, proleptic Gregorian).
fn utc(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Days since 0000-03-01, in eras of 400 years.
    let z = days + 719_468;
    let (era, day) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let in_year = day - (365 * year + year / 4 - year / 100);
    let m = (5 * in_year + 2) / 153;
    let month = if m < 10 { m + 3 } else { m - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{:02} {:02}:{:02}:{:02}",
        in_year - (153 * m + 2) / 5 + 1,
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Prints JSON as the peers do: indented by tabs.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let mut text = Vec::new();
    let form = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, form);
    value.serialize(&mut serializer)?;
    say::out(format_args!("{}\n", String::from_utf8_lossy(&text)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_was_meant() {
        let meant = |word| similar(word, COMMANDS.iter().map(|(name, _)| *name));
        for (word, name) in [
            ("exce", "exec"),
            ("exe", "exec"),
            ("Run", "run"),
            ("shel", "shell"),
            ("intsance", "instance"),
            ("biuld", "build"),
            ("pulll", "pull"),
            ("inspct", "inspect"),
        ] {
            assert_eq!(meant(word), Some(name), "{word}");
        }
        for word in ["", "x", "docker", "frobnicate"] {
            assert_eq!(meant(word), None, "{word}");
        }
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56");
        assert_eq!(utc(1_796_000_000), "2026-11-30 00:53:20");
        assert_eq!(utc(-62_135_596_800), "0001-01-01 00:00:00");
    }
}
