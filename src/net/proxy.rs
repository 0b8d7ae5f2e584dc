//! Which servers are reached without a proxy: `NO_PROXY`, as curl and Go's programs read it.

use super::url::Origin;

/// Whether `NO_PROXY` names a host: `*`, names with their subdomains, addresses, either with a port.
pub fn bypasses(list: &str, origin: &Origin) -> bool {
    let host = origin.host.trim_matches(['[', ']']);
    list.split(',').map(str::trim).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" {
            return true;
        }
        let (name, port) = match entry.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
            _ => (entry.as_str(), None),
        };
        if port.is_some_and(|port| port != origin.port.to_string()) {
            return false;
        }
        let name = name
            .trim_matches(['[', ']'])
            .trim_start_matches('*')
            .trim_start_matches('.');
        !name.is_empty()
            && (host == name
                || host
                    .strip_suffix(name)
                    .is_some_and(|front| front.ends_with('.')))
    })
}

#[cfg(test)]
mod tests {
    use super::super::url::Url;
    use super::*;

    #[test]
    fn no_proxy_names_hosts() {
        let origin = |text: &str| text.parse::<Url>().unwrap().origin;
        for (list, url, direct) in [
            ("*", "http://a/", true),
            ("a.org", "http://a.org/", true),
            ("a.org", "http://x.a.org/", true),
            (".a.org", "http://x.a.org/", true),
            ("*.a.org", "http://x.a.org/", true),
            ("a.org", "http://ba.org/", false),
            ("x, a.org:81", "http://a.org:81/", true),
            ("a.org:81", "http://a.org/", false),
            ("10.0.0.1", "http://10.0.0.1:5/", true),
            ("", "http://a/", false),
            (",", "http://a/", false),
        ] {
            assert_eq!(bypasses(list, &origin(url)), direct, "{list} {url}");
        }
    }
}
