//! From the words behind a command to its options. Each parser is built once, and where the environment sets no option
//! it parses once: the words of a short command cost as much as its mounts.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use anyhow::Result;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::environment;
use super::flags::{ActionArgs, Given};
use super::{Usage, about, print_action_usage, usage_line};
use crate::host::Host;
use crate::{exit, say};

/// What the words of a command say.
pub(super) struct Parsed<A> {
    pub(super) args: A,
    /// The options that were given.
    pub(super) given: Vec<Given>,
    /// The words that are no options.
    pub(super) words: Vec<OsString>,
}

/// The parser of a command.
pub(super) fn command<A: Args>(name: &str) -> Command {
    let command = Command::new(name.to_owned())
        .no_binary_name(true)
        .args_override_self(true)
        .disable_version_flag(true)
        .override_usage(usage_line(name));
    // Behind the options, which bring the description of their struct.
    A::augment_args(command).about(about(name))
}

/// Parses options that may stand anywhere, and nothing of the environment.
pub(super) fn parse<A: Args + FromArgMatches>(name: &str, words: &[OsString]) -> Result<A> {
    let matches = matches(&mut command::<A>(name), words)?;
    Ok(A::from_arg_matches(&matches)?)
}

/// Parses the words of an action command, with the environment's options in front.
pub(super) fn parse_action(name: &str, words: &[OsString], host: &Host) -> Result<ActionArgs> {
    let needed = if name == "exec" { 2 } else { 1 };
    let parsed = parse_with_image::<ActionArgs>(name, words, host, needed)?;
    let mut words = parsed.words.into_iter();
    Ok(ActionArgs {
        image: words.next().unwrap_or_default(),
        rest: words.collect(),
        given: parsed.given,
        ..parsed.args
    })
}

/// Parses options, with the environment's in front, up to the image: it and all behind it are words.
pub(super) fn parse_with_image<A: Args + FromArgMatches>(
    name: &str,
    words: &[OsString],
    host: &Host,
    needed: usize,
) -> Result<Parsed<A>> {
    let mut command = command::<A>(name);
    let (options, denied, image, rest) = split_at_image(&command, words);
    let (args, given) = with_environment(&mut command, &options, &denied, host)?;
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
    Ok(Parsed { args, given, words })
}

/// Parses options that may stand before, between and behind the other words, with the environment's in front.
pub(super) fn parse_interspersed<A: Args + FromArgMatches>(
    name: &str,
    words: &[OsString],
    host: &Host,
) -> Result<Parsed<A>> {
    let mut command = command::<A>(name);
    let (mut options, mut denied, mut others) = (Vec::new(), Vec::new(), Vec::new());
    let mut rest = words.to_vec();
    loop {
        let literal = rest.first().is_some_and(|w| *w == "--");
        let (more, no, word, behind) = split_at_image(&command, &rest);
        options.extend(more);
        denied.extend(no);
        let Some(word) = word else { break };
        others.push(word);
        if literal {
            others.extend(behind);
            break;
        }
        rest = behind;
    }
    let (args, given) = with_environment(&mut command, &options, &denied, host)?;
    Ok(Parsed {
        args,
        given,
        words: others,
    })
}

/// Parses options that may stand anywhere, with the environment's in front.
pub(super) fn parse_with_environment<A: Args + FromArgMatches>(
    name: &str,
    words: &[OsString],
    host: &Host,
) -> Result<A> {
    Ok(with_environment(&mut command::<A>(name), words, &[], host)?.0)
}

/// Parses options, with those of the environment in front that were neither typed nor denied, and says which ones were
/// given.
fn with_environment<A: Args + FromArgMatches>(
    command: &mut Command,
    options: &[OsString],
    denied: &[String],
    host: &Host,
) -> Result<(A, Vec<Given>)> {
    let found = matches(command, options)?;
    let is_given = |m: &ArgMatches, id: &str| m.value_source(id) == Some(ValueSource::CommandLine);
    let is_settled = |id: &str| denied.iter().any(|d| d == id) || is_given(&found, id);
    let set = environment::words(command, &host.env, &is_settled)?;
    let whole = match set.before.is_empty() && set.behind.is_empty() {
        true => None,
        false => {
            let all = [&set.before, options, &set.behind].concat();
            Some(matches(command, &all)?)
        }
    };
    let whole = whole.as_ref().unwrap_or(&found);
    let given = command.get_arguments().filter_map(|arg| {
        let id = arg.get_id().as_str();
        (arg.get_long().is_some() && is_given(whole, id)).then(|| Given {
            id: id.to_owned(),
            long: arg.get_long().unwrap_or(id).to_owned(),
            heading: arg.get_help_heading().unwrap_or_default().to_owned(),
            typed: is_given(&found, id),
        })
    });
    Ok((A::from_arg_matches(whole)?, given.collect()))
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

fn matches(command: &mut Command, words: &[OsString]) -> Result<ArgMatches> {
    match command.try_get_matches_from_mut(words) {
        Ok(matches) => Ok(matches),
        Err(error) if error.kind() == clap::error::ErrorKind::DisplayHelp => {
            say::out(format_args!("{}", error.render()))?;
            std::process::exit(exit::OK.into());
        }
        Err(error) => Err(Usage {
            command: command.get_name().to_owned(),
            text: in_one_line(&error),
        }
        .into()),
    }
}

/// What is wrong with the words, with the name that is missing or the values that there are. clap puts these on lines of
/// their own.
fn in_one_line(error: &clap::Error) -> String {
    let names = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) => name.clone(),
        Some(ContextValue::Strings(names)) => names.join(", "),
        _ => String::new(),
    };
    if error.kind() == ErrorKind::UnknownArgument {
        let word = names(ContextKind::InvalidArg);
        let word = word.split('=').next().unwrap_or_default();
        let meant = names(ContextKind::SuggestedArg);
        let text = match word.starts_with("--") {
            true => format!("unknown flag: {word}"),
            false if word.starts_with('-') => format!("unknown shorthand flag: {word}"),
            false => format!("unexpected word {word:?}"),
        };
        return match meant.as_str() {
            "" => text,
            meant => format!("{text} (did you mean {meant}?)"),
        };
    }
    let text = error.render().to_string();
    let text = text
        .lines()
        .next()
        .unwrap_or_default()
        .trim_start_matches("error: ");
    match error.kind() {
        ErrorKind::MissingRequiredArgument => {
            format!("{text} {}", names(ContextKind::InvalidArg))
        }
        ErrorKind::InvalidValue if !names(ContextKind::ValidValue).is_empty() => {
            format!("{text}: use {}", names(ContextKind::ValidValue))
        }
        _ => text.to_owned(),
    }
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
}
