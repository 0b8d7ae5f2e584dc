//! A repository of a registry: requests with the authorization that it asks for (OCI distribution specification 1.1;
//! Docker's token authentication, `distribution/docs/spec/auth/token.md`).

use std::ops::Range;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use super::credentials::Login;
use super::http::{Client, Method, Request, Response};
use super::reference::Repository;
use super::url::{Scheme, Url, escape};
use crate::digest::Digest;
use crate::oci::platform::{Chosen, Documents, Received};
use crate::oci::{self, Descriptor, ImageConfig, MAX_DOCUMENT, Platform};

/// The manifests that are understood.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// The host of Docker's own registry.
const DOCKER_HOST: &str = "registry-1.docker.io";
/// What Docker's registry says to those who may not.
const DENIED: &str = "requested access to the resource is denied";
/// Longest answer of a token server, in bytes.
const MAX_TOKEN: u64 = 1 << 20;

/// What is done with a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Pull,
    /// Reading and writing.
    Push,
}

impl Access {
    fn scope(self) -> &'static str {
        match self {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        }
    }
}

/// A repository, as it is reached.
pub struct Remote<'a> {
    client: &'a Client,
    root: Url,
    /// As the person wrote the registry.
    registry: String,
    path: String,
    login: Option<Login>,
    access: Access,
    /// What an authorization is for.
    session: String,
}

impl<'a> Remote<'a> {
    /// A repository that nothing has been asked of.
    ///
    /// # Errors
    /// When the registry's name is none.
    pub fn new(
        client: &'a Client,
        scheme: Scheme,
        repository: &Repository,
        login: Option<Login>,
        access: Access,
    ) -> Result<Remote<'a>> {
        Remote::at(
            client,
            scheme,
            repository.registry(),
            &repository.path(),
            login,
            access,
        )
    }

    /// The same by its parts.
    ///
    /// # Errors
    /// When the registry's name is none.
    pub fn at(
        client: &'a Client,
        scheme: Scheme,
        registry: &str,
        path: &str,
        login: Option<Login>,
        access: Access,
    ) -> Result<Remote<'a>> {
        let host = match registry {
            "docker.io" => DOCKER_HOST,
            other => other,
        };
        let root = client.root(scheme, host)?;
        Ok(Remote {
            session: format!("{root} {path} {}", access.scope()),
            client,
            root,
            registry: registry.to_owned(),
            path: path.to_owned(),
            login,
            access,
        })
    }

    /// For messages.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.path)
    }

    /// The connections.
    pub fn client(&self) -> &Client {
        self.client
    }

    /// An address below the repository.
    pub fn url(&self, rest: &str) -> Url {
        self.root.with_target(format!("/v2/{}/{rest}", self.path))
    }

    /// Checks that the registry knows us.
    ///
    /// # Errors
    /// When it does not, or is none.
    pub fn ping(&self) -> Result<()> {
        let request = Request::new(Method::Get, self.root.with_target("/v2/"));
        let response = self.send(request)?;
        match response.is_success() {
            true => Ok(()),
            false => Err(self.refusal(response, format!("cannot log in to {}", self.registry))),
        }
    }

    /// Sends a request, with the authorization that the registry has asked for.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn send(&self, mut request: Request) -> Result<Response> {
        // An upload may go elsewhere, and a secret does not.
        let ours = request.url.origin == self.root.origin;
        if ours {
            request.authorization = self.client.session(&self.session);
        }
        let response = self.client.send(&request)?;
        if response.status != 401 || !ours || response.url.origin != self.root.origin {
            return Ok(response);
        }
        let challenges = response.headers("WWW-Authenticate");
        let Some(authorization) = self.authorize(&challenges)? else {
            return Ok(response);
        };
        if request.authorization.as_ref() == Some(&authorization) {
            return Ok(response);
        }
        self.client.remember(&self.session, &authorization);
        request.authorization = Some(authorization);
        self.client.send(&request)
    }

    /// What the challenges ask for; `None` when nothing is at hand.
    fn authorize(&self, headers: &[String]) -> Result<Option<String>> {
        let challenges = challenges(headers);
        let asked = |kind: &str| challenges.iter().find(|(k, _)| k == kind);
        if let Some((_, parameters)) = asked("bearer") {
            return self.token(&parameters_of(parameters)).map(Some);
        }
        if asked("basic").is_some() {
            return Ok(self.login.as_ref().and_then(Login::basic));
        }
        Ok(None)
    }

    /// Asks the token server that the registry has named.
    fn token(&self, parameters: &[(String, String)]) -> Result<String> {
        let value = |name: &str| {
            let found = parameters.iter().find(|(n, _)| n == name);
            found.map(|(_, value)| value.as_str())
        };
        let realm = value("realm").ok_or_else(|| {
            anyhow!(
                "registry {} asks for a token, and does not say whose",
                self.registry
            )
        })?;
        let realm = self.root.join(realm).context("cannot ask for a token")?;
        if realm.origin.scheme == Scheme::Http && self.root.origin.scheme == Scheme::Https {
            bail!(
                "registry {} asks for a token of {}, which is not protected: refused",
                self.registry,
                realm.redacted()
            );
        }
        let scope = match value("scope") {
            Some(scope) => scope.to_owned(),
            None if self.path.is_empty() => String::new(),
            None => format!("repository:{}:{}", self.path, self.access.scope()),
        };
        let service = value("service").unwrap_or_default();
        let form;
        let request = match &self.login {
            Some(Login::Identity(token)) => {
                form = format!(
                    "grant_type=refresh_token&client_id=capsid&service={}&scope={}&refresh_token={}",
                    escape(service),
                    escape(&scope),
                    escape(token)
                );
                let mut request = Request::new(Method::Post, realm)
                    .header("Content-Type", "application/x-www-form-urlencoded");
                request.body = super::http::Body::Bytes(form.as_bytes());
                request
            }
            login => {
                let mut url = realm;
                if !service.is_empty() {
                    url = url.with_query("service", service);
                }
                if !scope.is_empty() {
                    url = url.with_query("scope", &scope);
                }
                let mut request = Request::new(Method::Get, url);
                request.authorization = login.as_ref().and_then(Login::basic);
                request
            }
        };
        let response = self.client.send(&request)?;
        if !response.is_success() {
            return Err(self.refusal(
                response,
                format!("cannot get a token for {}", self.registry),
            ));
        }
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let answer: Option<Answer> = oci::parse(&response.document(MAX_TOKEN)?).ok();
        let token = answer
            .and_then(|a| a.token.or(a.access_token))
            .filter(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_graphic()));
        match token {
            Some(token) => Ok(format!("Bearer {token}")),
            None => bail!("the token server of {} gave no token", self.registry),
        }
    }

    /// What an answer that is no success means, in the registry's own words.
    pub fn refusal(&self, response: Response, what: String) -> anyhow::Error {
        let status = response.status;
        let words = registry_words(&response.explanation());
        let words = match (status, words) {
            (401, None) => "unauthorized: authentication required".into(),
            (403, None) => "denied".into(),
            (404, None) => "not found (StatusCode: 404)".into(),
            (429, None) => "toomanyrequests: the registry limits how much is pulled".into(),
            (status, None) => format!("StatusCode: {status}"),
            (_, Some(words)) => words,
        };
        // Clients tell by these words that no other try will help.
        let words = match status {
            401 | 403 if !words.contains(DENIED) => format!("{words}: {DENIED}"),
            _ => words,
        };
        let hint = match (status, &self.login) {
            (401 | 403, None) => format!(
                " (no login is known: capsid registry login docker://{})",
                self.registry
            ),
            (401 | 403, Some(_)) => " (with the login that is known)".into(),
            _ => String::new(),
        };
        anyhow!("{what}: {words}{hint}")
    }

    /// Reads a manifest by tag or digest.
    ///
    /// # Errors
    /// When there is none, it is too large, or it is not what its digest says.
    pub fn manifest(&self, version: &str) -> Result<Received> {
        let request = Request::new(Method::Get, self.url(&format!("manifests/{version}")))
            .header("Accept", ACCEPTED.join(", "));
        let response = self.send(request)?;
        let what = format!("reading manifest {version} in {}", self.name());
        match response.status {
            200 => {}
            404 => {
                let text = response.explanation();
                // Clients tell by these words whether the image or the tag is not there.
                match registry_words(&text) {
                    Some(words) if words.contains("manifest unknown") => bail!("{what}: {words}"),
                    Some(words) => bail!("{what}: StatusCode: 404, {words}"),
                    None => bail!("{what}: StatusCode: 404, {}", first_words(&text)),
                }
            }
            _ => return Err(self.refusal(response, what)),
        }
        let declared = response.header("Content-Type").map(|text| {
            let kind = text.split(';').next().unwrap_or_default();
            kind.trim().to_owned()
        });
        let promised = response.header("Docker-Content-Digest").map(str::to_owned);
        let text = response
            .document(MAX_DOCUMENT)
            .with_context(|| what.clone())?;
        let digest = Digest::of(&text);
        for wanted in [promised.as_deref(), Some(version)].into_iter().flatten() {
            if let Ok(wanted) = wanted.parse::<Digest>()
                && wanted != digest
            {
                bail!("{what}: it has the digest {digest}, and should have {wanted}");
            }
        }
        #[derive(Deserialize)]
        struct Kind {
            #[serde(rename = "mediaType")]
            media_type: Option<String>,
        }
        let kind: Kind =
            oci::parse(&text).with_context(|| format!("{what}: it is not a JSON document"))?;
        Ok(Received {
            media_type: kind.media_type.or(declared).unwrap_or_default(),
            text,
            digest,
        })
    }

    /// The manifest for a machine, through indexes where there are some.
    ///
    /// # Errors
    /// As [`Remote::manifest`], and when the image is not there for that machine.
    pub fn manifest_for(&self, version: &str, platform: &Platform) -> Result<Chosen> {
        let received = self.manifest(version)?;
        oci::platform::choose(received, self, platform)
            .with_context(|| format!("reading manifest {version} in {}", self.name()))
    }

    /// Asks for a blob, or a part of it.
    ///
    /// # Errors
    /// When it does not come.
    pub fn blob(&self, blob: &Descriptor, part: Option<Range<u64>>) -> Result<Response> {
        let url = self.url(&format!("blobs/{}", blob.digest));
        let mut request = Request::new(Method::Get, url);
        if let Some(part) = part {
            let last = (part.end != u64::MAX).then(|| (part.end - 1).to_string());
            let range = format!("bytes={}-{}", part.start, last.unwrap_or_default());
            request = request.header("Range", range);
        }
        let response = self.send(request)?;
        match response.status {
            200 | 206 => Ok(response),
            _ => Err(self.refusal(
                response,
                format!("reading blob {} in {}", blob.digest, self.name()),
            )),
        }
    }
}

impl Documents for Remote<'_> {
    fn manifest(&self, named: &Descriptor) -> Result<Received> {
        Remote::manifest(self, &named.digest.to_string())
    }

    fn config(&self, named: &Descriptor) -> Result<ImageConfig> {
        let text = self.blob(named, None)?.document(MAX_DOCUMENT)?;
        if Digest::of(&text) != named.digest {
            bail!("the configuration {} is damaged", named.digest);
        }
        oci::parse(&text).with_context(|| format!("cannot understand {}", named.digest))
    }
}

/// The errors of a registry's answer, as `code: message`.
fn registry_words(text: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        errors: Vec<Problem>,
        details: Option<String>,
    }
    #[derive(Deserialize)]
    struct Problem {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let answer: Answer = oci::parse(text.as_bytes()).ok()?;
    let words: Vec<String> = answer
        .errors
        .iter()
        .take(3)
        .map(|problem| {
            let code = problem.code.to_lowercase().replace('_', " ");
            match (code.is_empty(), problem.message.is_empty()) {
                (_, true) => code,
                (true, _) => problem.message.clone(),
                _ if problem.message.to_lowercase() == code => code,
                _ => format!("{code}: {}", problem.message),
            }
        })
        .filter(|words| !words.is_empty())
        .map(|words| words.chars().take(500).collect())
        .collect();
    match words.is_empty() {
        true => answer.details.filter(|d| !d.is_empty()),
        false => Some(words.join("; ")),
    }
}

/// The beginning of a text that is for people.
fn first_words(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(100).collect()
}

/// The challenges of `WWW-Authenticate` headers: each may hold several, and several headers are one list (RFC 9110,
/// 11.6.1). Gives kinds in small letters, with what follows them.
fn challenges(headers: &[String]) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for part in headers.iter().flat_map(|header| list(header)) {
        // A kind is followed by a blank or by nothing, a parameter's name by its value.
        let kind = part.split([' ', '\t']).next().unwrap_or_default();
        match kind.contains('=') {
            false => {
                let rest = part[kind.len()..].trim().to_owned();
                found.push((kind.to_ascii_lowercase(), rest));
            }
            true => {
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.push(',');
                    parameters.push_str(part);
                }
            }
        }
    }
    found
}

/// The parts of a list: what lies between commas that are not quoted.
fn list(text: &str) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    let parts = text.split(move |c| {
        let is_end = c == ',' && !quoted;
        quoted ^= c == '"' && !escaped;
        escaped = c == '\\' && quoted && !escaped;
        is_end
    });
    parts.map(str::trim).filter(|p| !p.is_empty()).collect()
}

/// The `name="value"` pairs of a challenge.
fn parameters_of(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text.trim();
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([',', ' ']).to_ascii_lowercase();
        let (value, tail) = match after.strip_prefix('"') {
            Some(quoted) => match quoted.split_once('"') {
                Some((value, tail)) => (value, tail),
                None => (quoted, ""),
            },
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.push((name, value.to_owned()));
        rest = tail;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let pairs =
            parameters_of(r#"realm="https://a/t?x=y",service="s, t",scope="repository:a/b:pull""#);
        let value = |n: &str| {
            pairs
                .iter()
                .find(|(name, _)| name == n)
                .map(|(_, v)| v.as_str())
        };
        assert_eq!(value("realm"), Some("https://a/t?x=y"));
        assert_eq!(value("service"), Some("s, t"));
        assert_eq!(value("scope"), Some("repository:a/b:pull"));
        assert!(parameters_of("").is_empty());
        assert_eq!(parameters_of("a=\"b").len(), 1);
    }

    #[test]
    fn challenges_stand_in_one_header_or_in_several() {
        let bearer = r#"Bearer realm="https://a/t",service="s, Basic x",scope="a:b,c""#;
        let expected = ["https://a/t", "s, Basic x", "a:b,c"];
        for headers in [
            &[bearer][..],
            &["Negotiate", bearer],
            &[
                r#"Negotiate, Basic realm="x", Bearer realm="https://a/t",service="s, Basic x",scope="a:b,c""#,
            ],
            &[
                r#"Bearer realm="https://a/t" , service="s, Basic x", scope="a:b,c", Basic realm="a \"quoted\", Bearer x""#,
            ],
            &[
                "Basic realm=x, Negotiate",
                "  bearer  realm=https://a/t,service=\"s, Basic x\",scope=\"a:b,c\"",
            ],
            &[
                r#"NTLM, , Digest realm="x", nonce=1, Bearer realm="https://a/t",service="s, Basic x",scope="a:b,c""#,
            ],
        ] {
            let headers: Vec<String> = headers.iter().map(|h| (*h).to_owned()).collect();
            let all = challenges(&headers);
            let (_, parameters) = all.iter().find(|(k, _)| k == "bearer").unwrap();
            let pairs = parameters_of(parameters);
            for (name, value) in ["realm", "service", "scope"].iter().zip(expected) {
                let found = pairs.iter().find(|(n, _)| n == name);
                assert_eq!(found.map(|(_, v)| v.as_str()), Some(value), "{headers:?}");
            }
        }
        for (header, kinds) in [
            ("", &[][..]),
            (",", &[]),
            ("Basic", &["basic"]),
            (
                "Negotiate abc==, Basic realm=\"x, y\"",
                &["negotiate", "basic"],
            ),
            ("a=b", &[]),
        ] {
            let all = challenges(&[header.to_owned()]);
            let found: Vec<&str> = all.iter().map(|(k, _)| k.as_str()).collect();
            assert_eq!(found, kinds, "{header}");
        }
    }

    #[test]
    fn registries_explain_themselves() {
        let words = |text: &str| registry_words(text);
        assert_eq!(
            words(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{}}]}"#).as_deref(),
            Some("manifest unknown")
        );
        assert_eq!(
            words(r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#).as_deref(),
            Some("denied: requested access to the resource is denied")
        );
        assert_eq!(words("<html>"), None);
        assert_eq!(words("{}"), None);
    }
}
