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
    File(#[serde(with = "super::lossless")] PathBuf),
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

/// Characters of an instance's name at most: its logs are files of that name, with up to seven more (`NAME_MAX` is 255).
pub const LONGEST_NAME: usize = 240;

/// Whether this can be an instance's name: `[A-Za-z0-9_.-]`, not `.` or `..`, and not like an option.
pub fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(allowed)
        && name != "."
        && name != ".."
        && !name.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["db", "a.b-c_1", "..a", &"x".repeat(LONGEST_NAME)] {
            assert!(is_name(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "a b",
            "é",
            &"x".repeat(LONGEST_NAME + 1),
        ] {
            assert!(!is_name(bad), "{bad}");
        }
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
