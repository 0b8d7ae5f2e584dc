//! HTTP addresses: parsed once, compared by origin, resolved against each other (RFC 3986, without user information,
//! which would be a secret on a command line).

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};

/// With or without TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// Plain.
    Http,
    /// Over TLS.
    Https,
}

impl Scheme {
    /// As it is written before `://`.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Scheme::Http => 80,
            Scheme::Https => 443,
        }
    }
}

/// What credentials are bound to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// With or without TLS.
    pub scheme: Scheme,
    /// In lower case; IPv6 in brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Origin {
    /// `host`, or `host:port` where the port is not the scheme's own.
    pub fn authority(&self) -> String {
        match self.port == self.scheme.default_port() {
            true => self.host.clone(),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Whether it is this machine.
    pub fn is_loopback(&self) -> bool {
        let host = self.host.trim_matches(['[', ']']);
        host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback())
    }
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Where.
    pub origin: Origin,
    /// Path and query, from the first `/` on.
    pub target: String,
}

impl Url {
    /// The root of a host as people write it: `host` or `host:port`.
    ///
    /// # Errors
    /// When it is no host.
    pub fn host(scheme: Scheme, authority: &str) -> Result<Url> {
        let (host, port) = split_authority(authority)?;
        Ok(Url {
            origin: Origin {
                scheme,
                host,
                port: port.unwrap_or(scheme.default_port()),
            },
            target: "/".into(),
        })
    }

    /// The same origin with another path (and query).
    pub fn with_target(&self, target: impl Into<String>) -> Url {
        Url {
            origin: self.origin.clone(),
            target: target.into(),
        }
    }

    /// With one more parameter in the query. `value` is escaped.
    pub fn with_query(mut self, name: &str, value: &str) -> Url {
        self.target
            .push(if self.target.contains('?') { '&' } else { '?' });
        self.target.push_str(name);
        self.target.push('=');
        self.target.push_str(&escape(value));
        self
    }

    /// The path without the query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// Where a `Location` leads to from here.
    ///
    /// # Errors
    /// When it is no address.
    pub fn join(&self, location: &str) -> Result<Url> {
        let location = location.split('#').next().unwrap_or_default();
        if location.contains("://") && !location.starts_with(['/', '?']) {
            return location.parse();
        }
        if let Some(rest) = location.strip_prefix("//") {
            return format!("{}://{rest}", self.origin.scheme.name()).parse();
        }
        let target = match location.as_bytes().first() {
            None => self.target.clone(),
            Some(b'/') => location.to_owned(),
            Some(b'?') => format!("{}{location}", self.path()),
            Some(_) => {
                let directory = self.path().rfind('/').map_or("", |end| &self.path()[..end]);
                format!("{directory}/{location}")
            }
        };
        check_target(&target)?;
        Ok(self.with_target(target))
    }

    /// For messages: signed addresses hold secrets in their query.
    pub fn redacted(&self) -> String {
        let query = if self.target.contains('?') {
            "?…"
        } else {
            ""
        };
        format!(
            "{}://{}{}{query}",
            self.origin.scheme.name(),
            self.origin.authority(),
            self.path()
        )
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{}://{}{}",
            self.origin.scheme.name(),
            self.origin.authority(),
            self.target
        )
    }
}

impl FromStr for Url {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Url> {
        let Some((scheme, rest)) = text.split_once("://") else {
            bail!("{text:?} is not an address: http:// or https://");
        };
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => bail!("{text:?} is not an address of http:// or https://"),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        if authority.contains('@') {
            bail!(
                "an address must not hold a user name or password, which others on this machine could read: use registry login"
            );
        }
        let target = match target.starts_with('/') {
            true => target.to_owned(),
            false => format!("/{target}"),
        };
        check_target(&target)?;
        Ok(Url::host(scheme, authority)?.with_target(target))
    }
}

fn check_target(target: &str) -> Result<()> {
    if target.len() > 16 << 10 || !target.bytes().all(|b| b.is_ascii_graphic()) {
        bail!("the path of an address must be printable ASCII without blanks, at most 16 KiB long");
    }
    Ok(())
}

/// Host in lower case, and the port if one is given.
///
/// # Errors
/// When it is no host.
pub fn split_authority(authority: &str) -> Result<(String, Option<u16>)> {
    let end = match authority.find(']') {
        Some(bracket) if authority.starts_with('[') => bracket + 1,
        _ => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(end);
    let is_name = |host: &str| {
        !host.is_empty()
            && host.len() <= 253
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
            && !host.starts_with(['-', '.'])
    };
    let address = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let good = address.map_or_else(
        || is_name(host),
        |ip| ip.parse::<std::net::Ipv6Addr>().is_ok(),
    );
    if !good {
        bail!("{authority:?} is not the name of a host");
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => None,
        Some(digits) => match digits.parse::<u16>() {
            Ok(number) if number > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => Some(number),
            _ => bail!("{authority:?}: {digits:?} is not a port"),
        },
        None => bail!("{authority:?} is not the name of a host"),
    };
    Ok((host.to_ascii_lowercase(), port))
}

/// Escapes all but the characters that need no escape anywhere in an address (RFC 3986, 2.3).
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsing_and_printing_are_inverse() {
        for text in [
            "https://example.org/",
            "http://127.0.0.1:5000/v2/?a=b",
            "https://[::1]:8443/x",
        ] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), text);
        }
        let url: Url = "HTTPS://Example.ORG:443?x#part".parse().unwrap();
        assert_eq!(url.to_string(), "https://example.org/?x");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "ftp://x/",
            "x",
            "http://",
            "http://a b/",
            "http://x:0/",
            "http://x:99999/",
            "http://u:p@x/",
            "http://x/\n",
            "http://[zz]/",
            "http://-x/",
            "http://x:+1/",
        ] {
            assert!(text.parse::<Url>().is_err(), "{text}");
        }
    }

    #[test]
    fn locations_are_resolved() {
        let base: Url = "http://a:1/x/y?q".parse().unwrap();
        for (location, result) in [
            ("https://b/z", "https://b/z"),
            ("//c/z", "http://c/z"),
            ("/z?r", "http://a:1/z?r"),
            ("z", "http://a:1/x/z"),
            ("?r=http://q", "http://a:1/x/y?r=http://q"),
            ("/z?u=http://q", "http://a:1/z?u=http://q"),
        ] {
            assert_eq!(base.join(location).unwrap().to_string(), result);
        }
    }

    #[test]
    fn origin_is_scheme_host_and_port() {
        let origin = |text: &str| text.parse::<Url>().unwrap().origin;
        assert_eq!(origin("https://a/x"), origin("https://A:443/y"));
        assert_ne!(origin("https://a/"), origin("http://a/"));
        assert_ne!(origin("https://a/"), origin("https://a:444/"));
    }

    #[test]
    fn queries_are_not_shown() {
        let url: Url = "http://a/x?signature=secret".parse().unwrap();
        assert_eq!(url.redacted(), "http://a/x?…");
    }
}
