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
mod prompt;
pub mod pull;
pub mod push;
pub mod registry;
pub mod remote;
pub mod sif;
mod sif_edit;
pub mod transfer;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use clap::{Args, Command, FromArgMatches};

use crate::host::Host;
use crate::{exit, say};
use flags::ActionArgs;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
const MISSING: &[&str] = &[
    "capability",
    "checkpoint",
    "config",
    "delete",
    "key",
    "keyserver",
    "oci",
    "plugin",
    "search",
    "sign",
    "verify",
];

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
    let Some(verb) = words.first() else {
        print_usage(persona)?;
        return Ok(exit::USAGE);
    };
    let rest = &words[1..];
    match verb.to_str().unwrap_or_default() {
        name @ ("exec" | "run" | "shell" | "test" | "run-help") => {
            let host = Host::read()?;
            let args = parse_action(name, rest, &host)?;
            action::run_on(name, args, globals.explain, persona, host)
        }
        "build" => {
            let host = Host::read()?;
            let (args, words) = parse_interspersed::<build::BuildArgs>("build", rest, &host)?;
            build::run(&args, &words, host)
        }
        "inspect" => inspect::run(parse::<inspect::InspectArgs>("inspect", rest)?),
        "instance" => instance::run(rest, persona),
        "job" => job::run(rest, persona),
        // As an older client writes them.
        name @ ("instance.start" | "instance.stop" | "instance.list") => {
            let mut words = vec![OsString::from(&name["instance.".len()..])];
            words.extend_from_slice(rest);
            instance::run(&words, persona)
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
            say::out(format_args!("{}\n", version(persona)))?;
            Ok(exit::OK)
        }
        "help" => {
            print_help(rest.first().and_then(|w| w.to_str()), persona)?;
            Ok(exit::OK)
        }
        name if MISSING.contains(&name) => {
            bail!("the command {name:?} is not supported by this version of capsid")
        }
        name => {
            print_usage(persona)?;
            Err(Usage {
                command: String::new(),
                text: format!("unknown command {name:?} for {:?}", program(persona)),
            }
            .into())
        }
    }
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
                print_help(words.get(i + 1).and_then(|w| w.to_str()), persona)?;
                return Ok(Global::Done(exit::OK));
            }
            "-c" | "--config" => bail!("--config is not supported: there is no configuration file"),
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

/// Parses the words of an action command, with the environment's options in front.
fn parse_action(name: &str, words: &[OsString], host: &Host) -> Result<ActionArgs> {
    let needed = if name == "exec" { 2 } else { 1 };
    let (mut args, rest) = parse_with_image::<ActionArgs>(name, words, host, needed)?;
    let mut rest = rest.into_iter();
    args.image = rest.next().unwrap_or_default();
    args.rest = rest.collect();
    args.typed = typed(name, words)?;
    Ok(args)
}

/// Names of the options that were typed.
fn typed(name: &str, words: &[OsString]) -> Result<Vec<String>> {
    let command = command::<ActionArgs>(name);
    let (options, ..) = split_at_image(&command, words);
    let matches = matches(command, name, options)?;
    let typed = |id: &&clap::Id| {
        matches.value_source(id.as_str()) == Some(clap::parser::ValueSource::CommandLine)
    };
    Ok(matches
        .ids()
        .filter(typed)
        .map(|id| id.as_str().to_owned())
        .collect())
}

/// Parses options, with the environment's in front, and gives with them the image and all words behind it.
fn parse_with_image<A: Args + FromArgMatches>(
    name: &str,
    words: &[OsString],
    host: &Host,
    needed: usize,
) -> Result<(A, Vec<OsString>)> {
    let command = command::<A>(name);
    let (options, denied, image, rest) = split_at_image(&command, words);
    let matches = matches(command.clone(), name, options.clone())?;
    let typed = |id: &str| {
        denied.iter().any(|d| d == id)
            || matches.value_source(id) == Some(clap::parser::ValueSource::CommandLine)
    };
    let mut all = environment::words(&command, &host.env, &typed)?;
    let args = if all.is_empty() {
        A::from_arg_matches(&matches)?
    } else {
        all.extend(options);
        A::from_arg_matches(&self::matches(command, name, all)?)?
    };
    let words: Vec<OsString> = image.into_iter().chain(rest).collect();
    if words.len() < needed {
        print_action_usage(name)?;
        let text = format!(
            "requires at least {needed} arg(s), only received {}",
            words.len()
        );
        return Err(Usage {
            command: name.into(),
            text,
        }
        .into());
    }
    Ok((args, words))
}

/// Parses options that may stand before, between and behind the other words, with the environment's in front. Gives the
/// other words too.
fn parse_interspersed<A: Args + FromArgMatches>(
    name: &str,
    words: &[OsString],
    host: &Host,
) -> Result<(A, Vec<OsString>)> {
    let command = command::<A>(name);
    let (mut options, mut denied, mut others) = (Vec::new(), Vec::new(), Vec::new());
    let mut words = words.to_vec();
    loop {
        let literal = words.first().is_some_and(|w| *w == "--");
        let (more, no, word, rest) = split_at_image(&command, &words);
        options.extend(more);
        denied.extend(no);
        let Some(word) = word else { break };
        others.push(word);
        if literal {
            others.extend(rest);
            break;
        }
        words = rest;
    }
    let matches = matches(command.clone(), name, options.clone())?;
    let typed = |id: &str| {
        denied.iter().any(|d| d == id)
            || matches.value_source(id) == Some(clap::parser::ValueSource::CommandLine)
    };
    let mut all = environment::words(&command, &host.env, &typed)?;
    all.extend(options);
    let args = A::from_arg_matches(&self::matches(command, name, all)?)?;
    Ok((args, others))
}

/// Options, switches that were denied, image, and what belongs to the payload. `--flag=true` and `--flag=false` of
/// switches, which Go programs accept, are settled here: the last one counts.
fn split_at_image(
    command: &Command,
    words: &[OsString],
) -> (Vec<OsString>, Vec<String>, Option<OsString>, Vec<OsString>) {
    let mut options: Vec<OsString> = Vec::new();
    let mut denied = Vec::new();
    let mut i = 0;
    let long = |name: &str| {
        command.get_arguments().find(|a| {
            a.get_long() == Some(name) || a.get_all_aliases().is_some_and(|all| all.contains(&name))
        })
    };
    let short = |c: char| command.get_arguments().find(|a| a.get_short() == Some(c));
    // An optional value can only be joined by a sign.
    let takes_value = |a: &clap::Arg| a.get_action().takes_values() && !a.is_require_equals_set();
    while let Some(word) = words.get(i) {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            i += 1;
            break;
        }
        if bytes.len() < 2 || bytes[0] != b'-' {
            break;
        }
        i += 1;
        let mut value_follows = false;
        if let Some(name) = bytes.strip_prefix(b"--") {
            let mut parts = name.splitn(2, |b| *b == b'=');
            let arg = parts
                .next()
                .and_then(|n| std::str::from_utf8(n).ok())
                .and_then(long);
            match (arg, parts.next()) {
                (Some(arg), Some(value)) if !arg.get_action().takes_values() => {
                    match environment::parse_bool("", OsStr::from_bytes(value)) {
                        Ok(true) => {
                            options.push(format!("--{}", arg.get_long().unwrap_or_default()).into())
                        }
                        Ok(false) => {
                            let long = format!("--{}", arg.get_long().unwrap_or_default());
                            let short = arg.get_short().map(|c| format!("-{c}"));
                            options.retain(|o| {
                                *o != *long && short.as_ref().is_none_or(|s| *o != **s)
                            });
                            denied.push(arg.get_id().to_string());
                        }
                        Err(_) => options.push(word.clone()), // clap explains
                    }
                    continue;
                }
                (Some(arg), None) => value_follows = takes_value(arg),
                _ => {}
            }
        } else {
            let letters: Vec<char> = String::from_utf8_lossy(&bytes[1..]).chars().collect();
            for (n, c) in letters.iter().enumerate() {
                if short(*c).is_some_and(takes_value) {
                    value_follows = n + 1 == letters.len();
                    break;
                }
            }
        }
        options.push(word.clone());
        if value_follows && let Some(value) = words.get(i) {
            // Joined by `=`, so that a value that begins with a dash is still one.
            if bytes.starts_with(b"--") {
                let mut joined = options.pop().unwrap_or_default();
                joined.push("=");
                joined.push(value);
                options.push(joined);
            } else {
                options.push(value.clone());
            }
            i += 1;
        }
    }
    (
        options,
        denied,
        words.get(i).cloned(),
        words.get(i + 1..).unwrap_or_default().to_vec(),
    )
}

fn command<A: Args>(name: &str) -> Command {
    A::augment_args(
        Command::new(name.to_owned())
            .no_binary_name(true)
            .args_override_self(true)
            .disable_version_flag(true),
    )
}

/// Parses options that may stand anywhere, with the environment's in front.
fn parse_with_environment<A: Args + FromArgMatches>(
    name: &str,
    words: &[OsString],
    host: &Host,
) -> Result<A> {
    let command = command::<A>(name);
    let matches = matches(command.clone(), name, words.to_vec())?;
    let typed = |id: &str| matches.value_source(id) == Some(clap::parser::ValueSource::CommandLine);
    let mut all = environment::words(&command, &host.env, &typed)?;
    if all.is_empty() {
        return Ok(A::from_arg_matches(&matches)?);
    }
    all.extend_from_slice(words);
    Ok(A::from_arg_matches(&self::matches(command, name, all)?)?)
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
        other => Err(Usage {
            command: group.into(),
            text: format!("unknown command {other:?}"),
        }
        .into()),
    }
}

fn parse<A: Args + FromArgMatches>(name: &str, words: &[OsString]) -> Result<A> {
    Ok(A::from_arg_matches(&matches(
        command::<A>(name),
        name,
        words.to_vec(),
    )?)?)
}

fn matches(command: Command, name: &str, words: Vec<OsString>) -> Result<clap::ArgMatches> {
    let usage = usage_line(name);
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
    let about = table.iter().find(|(n, _)| *n == own);
    let command = command
        .override_usage(usage)
        .about(about.map_or("", |(_, about)| *about));
    match command.try_get_matches_from(words) {
        Ok(matches) => Ok(matches),
        Err(error) if error.kind() == clap::error::ErrorKind::DisplayHelp => {
            say::out(format_args!("{}", error.render()))?;
            std::process::exit(exit::OK.into());
        }
        Err(error) => {
            let text = error.render().to_string();
            let text = text
                .lines()
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ");
            let text = if error.kind() == clap::error::ErrorKind::UnknownArgument {
                let word = error
                    .get(clap::error::ContextKind::InvalidArg)
                    .map(ToString::to_string)
                    .unwrap_or_default();
                let word = word.split('=').next().unwrap_or_default();
                if word.starts_with("--") {
                    format!("unknown flag: {word}")
                } else {
                    format!("unknown shorthand flag: {word}")
                }
            } else {
                text.to_owned()
            };
            Err(Usage {
                command: name.into(),
                text,
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

fn print_help(name: Option<&str>, persona: Persona) -> Result<()> {
    match name {
        Some(name @ ("exec" | "run" | "shell" | "test" | "run-help")) => drop(matches(
            command::<ActionArgs>(name),
            name,
            vec!["--help".into()],
        )?),
        Some("build") => drop(matches(
            command::<build::BuildArgs>("build"),
            "build",
            vec!["--help".into()],
        )?),
        Some("inspect") => drop(matches(
            command::<inspect::InspectArgs>("inspect"),
            "inspect",
            vec!["--help".into()],
        )?),
        Some("instance") => drop(instance::run(&["help".into()], persona)?),
        Some("overlay") => drop(overlay::run(&["help".into()], persona)?),
        Some("sif") => drop(sif::run(&["help".into()], persona)?),
        Some("job") => drop(job::run(&["help".into()], persona)?),
        Some("cache") => drop(cache::run(&["help".into()], persona)?),
        Some("registry") => drop(registry::run(&["help".into()], persona)?),
        Some("remote") => drop(remote::run(&["help".into()], persona)?),
        Some("pull") => drop(pull::run(&["--help".into()])?),
        Some("push") => drop(push::run(&["--help".into()])?),
        Some("doctor") => drop(matches(
            command::<doctor::DoctorArgs>("doctor"),
            "doctor",
            vec!["--help".into()],
        )?),
        Some("demo") => drop(matches(
            command::<demo::DemoArgs>("demo"),
            "demo",
            vec!["--help".into()],
        )?),
        _ => print_usage(persona)?,
    }
    Ok(())
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

    fn split(words: &[&str]) -> (Vec<OsString>, Option<OsString>, Vec<OsString>) {
        let words: Vec<OsString> = words.iter().map(Into::into).collect();
        let (options, _, image, rest) = split_at_image(&command::<ActionArgs>("exec"), &words);
        (options, image, rest)
    }

    #[test]
    fn options_end_at_the_image() {
        let (options, image, rest) =
            split(&["-B", "/a:/b", "--pid", "x.sif", "prog", "--pid", "-B"]);
        assert_eq!(options, ["-B", "/a:/b", "--pid"]);
        assert_eq!(image.as_deref(), Some(OsStr::new("x.sif")));
        assert_eq!(rest, ["prog", "--pid", "-B"]);
    }

    #[test]
    fn values_may_be_joined_or_begin_with_a_dash() {
        let (options, image, _) = split(&[
            "-B/a:/b",
            "--env",
            "-x=1",
            "-ec",
            "--pid=false",
            "--ipc=true",
            "x.sif",
        ]);
        assert_eq!(options, ["-B/a:/b", "--env=-x=1", "-ec", "--ipc"]);
        assert_eq!(image.as_deref(), Some(OsStr::new("x.sif")));
    }

    #[test]
    fn two_dashes_end_the_options() {
        let (options, image, rest) = split(&["--", "x.sif", "--", "a"]);
        assert!(options.is_empty());
        assert_eq!(image.as_deref(), Some(OsStr::new("x.sif")));
        assert_eq!(rest, ["--", "a"]);
    }

    #[test]
    fn times_are_civil() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56");
        assert_eq!(utc(1_796_000_000), "2026-11-30 00:53:20");
        assert_eq!(utc(-62_135_596_800), "0001-01-01 00:00:00");
    }
}
