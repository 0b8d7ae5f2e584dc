//! What a service needs beside a container: when it counts as ready, and when it is started again.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// How an instance's script is looked after.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Service {
    /// When the script is started again.
    pub restart: Restart,
    /// When the service counts as ready.
    pub ready: Ready,
    /// The network is connected from outside before the script starts.
    pub connected: bool,
    /// The instance ends with its script (`--foreground`).
    pub ends: bool,
}

/// When the script is started again after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// After a status other than 0 or a signal, this often at most.
    OnFailure(Option<u32>),
    /// Always.
    Always,
}

/// When a service counts as ready.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ready {
    /// When its script has been executed.
    #[default]
    Started,
    /// When one of these addresses takes connections.
    Port(Vec<SocketAddr>),
    /// When this file of the container is there, and is not the one that was there before the start.
    File(PathBuf),
    /// When this shell command, run in the container, ends with status 0.
    Command(String),
    /// When a line of its output matches this regular expression.
    Log(String),
    /// When it says so by `sd_notify(3)`.
    Notify,
}

impl Ready {
    /// Whether there is something to wait for after the start.
    pub fn is_declared(&self) -> bool {
        *self != Ready::Started
    }
}

/// `no`, `on-failure`, `on-failure:N`, `always` (and podman's `unless-stopped`, which means the same here).
///
/// # Errors
/// Anything else.
pub fn parse_restart(text: &str) -> Result<Restart> {
    Ok(match text.split_once(':') {
        None if text == "no" => Restart::No,
        None if text == "on-failure" => Restart::OnFailure(None),
        None if text == "always" || text == "unless-stopped" => Restart::Always,
        Some(("on-failure", count)) if count.parse::<u32>().is_ok() => {
            Restart::OnFailure(count.parse().ok())
        }
        _ => bail!("--restart {text:?}: use no, on-failure, on-failure:N or always"),
    })
}

/// `[HOST:]PORT` of `--ready-port`: host, or the machine itself, and port.
///
/// # Errors
/// When there is no port from 1 to 65535.
pub fn parse_port(text: &str) -> Result<(Option<&str>, u16)> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (Some(host.trim_matches(['[', ']'])), port),
        None => (None, text),
    };
    match port.parse() {
        Ok(port) if port > 0 && host != Some("") => Ok((host, port)),
        _ => bail!("--ready-port {text:?}: use [HOST:]PORT with a port from 1 to 65535"),
    }
}

/// Whether this can be an instance's name: `[A-Za-z0-9_.-]{1,64}`, not `.` or `..`, and not like an option.
pub fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=64).contains(&name.len())
        && name.bytes().all(allowed)
        && name != "."
        && name != ".."
        && !name.starts_with('-')
}

/// Whether a shell pattern (`*`, `?`, `[…]`) matches a name.
pub fn fits(pattern: &str, name: &str) -> bool {
    fn at(pattern: &[u8], name: &[u8]) -> bool {
        match pattern.split_first() {
            None => name.is_empty(),
            Some((b'*', rest)) => (0..=name.len()).any(|n| at(rest, &name[n..])),
            Some((b'?', rest)) => !name.is_empty() && at(rest, &name[1..]),
            Some((b'[', rest)) if rest.iter().skip(1).any(|b| *b == b']') => {
                let end = 1 + rest.iter().skip(1).position(|b| *b == b']').unwrap_or(0);
                let (mut set, rest) = (&rest[..end], &rest[end + 1..]);
                let negated = matches!(set.first(), Some(b'^' | b'!'));
                if negated {
                    set = &set[1..];
                }
                let Some((first, tail)) = name.split_first() else {
                    return false;
                };
                let mut found = false;
                while let Some((low, more)) = set.split_first() {
                    (found, set) = match more {
                        [b'-', high, more @ ..] => (found || (*low..=*high).contains(first), more),
                        more => (found || low == first, more),
                    };
                }
                found != negated && at(rest, tail)
            }
            Some((b'\\', [byte, rest @ ..])) => name.first() == Some(byte) && at(rest, &name[1..]),
            Some((byte, rest)) => name.first() == Some(byte) && at(rest, &name[1..]),
        }
    }
    // The longest pattern that can match a name at all; a longer one would only take time.
    pattern.len() <= 256 && at(pattern.as_bytes(), name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["db", "a.b-c_1", "..a", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn patterns() {
        assert!(fits("*", "a") && fits("*2", "web2") && fits("w?b", "web") && fits("[a-c]x", "bx"));
        assert!(!fits("*2", "web3") && !fits("w?b", "wb") && !fits("[!a-c]x", "bx"));
        assert!(fits("web", "web") && !fits("web", "web1") && !fits("[a", "b"));
    }

    #[test]
    fn restart_policies() {
        assert_eq!(parse_restart("no").ok(), Some(Restart::No));
        assert_eq!(
            parse_restart("on-failure:3").ok(),
            Some(Restart::OnFailure(Some(3)))
        );
        assert_eq!(parse_restart("always").ok(), Some(Restart::Always));
        for bad in ["", "on-failure:", "on-failure:x", "yes"] {
            assert!(parse_restart(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports() {
        assert_eq!(parse_port("8080").ok(), Some((None, 8080)));
        assert_eq!(parse_port("[::1]:80").ok(), Some((Some("::1"), 80)));
        assert_eq!(parse_port("db:5432").ok(), Some((Some("db"), 5432)));
        for bad in ["", "0", "65536", ":80", "a:b"] {
            assert!(parse_port(bad).is_err(), "{bad}");
        }
    }
}
