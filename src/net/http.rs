//! The one HTTP client: blocking, over `ureq`, which no other file uses.
//!
//! Promises: what the network does for a moment (a dropped connection, 429, 5xx) is tried again, a limited number of
//! times, as late as `Retry-After` asks; redirects are followed here, and `Authorization` goes to no other origin; an
//! address that leads from `https` to `http` is refused; a server that says nothing for a minute has ended, and one that
//! says next to nothing is given up ([`Paced`]). Messages hold no query of an address and no header (both may be secrets). Their wording is Go's, which clients sort on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ureq::RequestExt as _;
use ureq::http;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};

use super::pace::Paced;
use super::proxy;
use super::url::{Origin, Scheme, Url};
use crate::{given, say};

/// Largest file of certificates, bytes.
const MAX_CERTIFICATES: u64 = 16 << 20;

/// A server that cannot be reached by then is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A connection on which nothing happens for so long is dead.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// A server on this machine has answered by then whether it speaks TLS.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// How often a request is sent at most.
const ATTEMPTS: u32 = 5;
/// The first pause between attempts; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// More redirects than this are a circle.
const MAX_REDIRECTS: u32 = 10;
/// Of an answer that explains an error, this much is read.
const MAX_ERROR_TEXT: u64 = 64 << 10;

/// What the environment says about the network.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, in small letters or large.
    pub http_proxy: Option<String>,
    /// For `https`.
    pub https_proxy: Option<String>,
    /// Hosts that are reached directly.
    pub no_proxy: String,
    /// Directories with a directory for each `host:port`, whose `*.crt` are certificate authorities
    /// (docker's and containers' `certs.d`).
    pub certificates: Vec<PathBuf>,
}

/// A method of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Method {
    Get,
    Head,
    Put,
    Post,
    Patch,
    Delete,
}

impl Method {
    fn http(self) -> http::Method {
        match self {
            Method::Get => http::Method::GET,
            Method::Head => http::Method::HEAD,
            Method::Put => http::Method::PUT,
            Method::Post => http::Method::POST,
            Method::Patch => http::Method::PATCH,
            Method::Delete => http::Method::DELETE,
        }
    }

    /// As Go's messages name it.
    fn word(self) -> &'static str {
        match self {
            Method::Get => "Get",
            Method::Head => "Head",
            Method::Put => "Put",
            Method::Post => "Post",
            Method::Patch => "Patch",
            Method::Delete => "Delete",
        }
    }
}

/// What is sent; it can be sent again.
#[derive(Clone, Copy)]
pub enum Body<'a> {
    /// Nothing.
    None,
    /// A document.
    Bytes(&'a [u8]),
    /// A part of a file; each byte that has gone out is told to the function.
    File {
        /// Open for reading.
        file: &'a File,
        /// Where it begins.
        offset_bytes: u64,
        /// How long it is.
        len_bytes: u64,
        /// Called with the number of bytes that were read.
        sent: &'a (dyn Fn(u64) + Sync),
    },
}

/// A request.
pub struct Request<'a> {
    /// What to do.
    pub method: Method,
    /// Where.
    pub url: Url,
    /// Further headers, none of them secret.
    pub headers: Vec<(&'static str, String)>,
    /// The value of `Authorization`.
    pub authorization: Option<String>,
    /// What is sent.
    pub body: Body<'a>,
}

impl<'a> Request<'a> {
    /// Without headers or body.
    pub fn new(method: Method, url: Url) -> Request<'a> {
        Request {
            method,
            url,
            headers: Vec::new(),
            authorization: None,
            body: Body::None,
        }
    }

    /// With a header.
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Request<'a> {
        self.headers.push((name, value.into()));
        self
    }

    /// With a JSON document.
    pub fn json(mut self, text: &'a [u8]) -> Request<'a> {
        self.body = Body::Bytes(text);
        self.header("Content-Type", "application/json")
    }
}

/// An answer.
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Where it came from, after redirects.
    pub url: Url,
    headers: http::HeaderMap,
    body: ureq::Body,
}

impl Response {
    /// A header, if it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// All headers of a name.
    pub fn headers(&self, name: &str) -> Vec<String> {
        let values = self.headers.get_all(name).iter();
        values
            .filter_map(|v| v.to_str().ok().map(str::to_owned))
            .collect()
    }

    /// `Content-Length`.
    pub fn len_bytes(&self) -> Option<u64> {
        self.header("Content-Length")?.parse().ok()
    }

    /// Whether the status is 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body, of whatever length.
    pub fn into_reader(self) -> impl Read + Send {
        Paced::new(self.body.into_with_config().limit(u64::MAX).reader())
    }

    /// A document of at most `limit` bytes.
    ///
    /// # Errors
    /// When it is longer or the connection fails.
    pub fn document(self, limit: u64) -> Result<Vec<u8>> {
        let url = self.url.redacted();
        let mut text = Vec::new();
        let read = self.into_reader().take(limit + 1).read_to_end(&mut text);
        read.with_context(|| format!("cannot read {url}"))?;
        if text.len() as u64 > limit {
            bail!("the document at {url} has more than {limit} bytes: too large");
        }
        Ok(text)
    }

    /// The beginning of a text that explains an error; empty when there is none.
    pub fn explanation(self) -> String {
        let mut text = Vec::new();
        // Whatever comes is better than nothing.
        let _ = self
            .into_reader()
            .take(MAX_ERROR_TEXT)
            .read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// Connections to servers, kept open between requests. One for all threads.
pub struct Client {
    settings: Settings,
    agents: Mutex<BTreeMap<Origin, ureq::Agent>>,
    sessions: Mutex<BTreeMap<String, String>>,
    /// The roots of hosts of this machine, by scheme and name.
    local: Mutex<BTreeMap<(Scheme, String), Url>>,
}

impl Client {
    /// Without any connection yet.
    pub fn new(settings: Settings) -> Client {
        Client {
            settings,
            agents: Mutex::default(),
            sessions: Mutex::default(),
            local: Mutex::default(),
        }
    }

    /// The root of a registry or library as people write it. One on this machine (`localhost`, 127.0.0.0/8, `::1`) may
    /// speak plain HTTP, as docker has it: that is tried where TLS cannot be had. A certificate that is not trusted is no
    /// such case.
    ///
    /// # Errors
    /// When it is no host.
    pub fn root(&self, scheme: Scheme, authority: &str) -> Result<Url> {
        let root = Url::host(scheme, authority)?;
        if scheme == Scheme::Http || !root.origin.is_loopback() {
            return Ok(root);
        }
        let mut local = self.local.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (scheme, authority.to_owned());
        if let Some(known) = local.get(&key) {
            return Ok(known.clone());
        }
        let plain = Url::host(Scheme::Http, authority)?;
        let chosen = match self.probe(&root) {
            Err(error) if !is_untrusted(&error) && self.probe(&plain).is_ok() => {
                say::verbose(format_args!("{authority} speaks plain HTTP"));
                plain
            }
            _ => root,
        };
        local.insert(key, chosen.clone());
        Ok(chosen)
    }

    /// Whether a server answers with anything at all.
    fn probe(&self, root: &Url) -> Result<(), ureq::Error> {
        let agent = self.agent(&root.origin)?;
        let request = http::Request::builder()
            .method(http::Method::GET)
            .uri(root.with_target("/v2/").to_string())
            .body(())?;
        let request = request.with_agent(&agent).configure();
        request.timeout_global(Some(PROBE_LIMIT)).build().run()?;
        Ok(())
    }

    /// The authorization that was given last for what `key` names.
    pub fn session(&self, key: &str) -> Option<String> {
        let sessions = self.sessions.lock();
        sessions
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    }

    /// Remembers an authorization for what `key` names, as long as this client lives.
    pub fn remember(&self, key: &str, authorization: &str) {
        let sessions = self.sessions.lock();
        let mut sessions = sessions.unwrap_or_else(PoisonError::into_inner);
        sessions.insert(key.to_owned(), authorization.to_owned());
    }

    /// Sends a request and follows redirects, more than once where that may help. Any status of the final answer is a
    /// success here.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn send(&self, request: &Request) -> Result<Response> {
        let mut url = request.url.clone();
        let mut method = request.method;
        for _ in 0..=MAX_REDIRECTS {
            let same = url.origin == request.url.origin;
            let authorization = request.authorization.as_ref().filter(|_| same);
            let response = self.persist(request, method, &url, authorization)?;
            let redirected = matches!(response.status, 301 | 302 | 303 | 307 | 308);
            let Some(location) = response.header("Location").filter(|_| redirected) else {
                return Ok(response);
            };
            let safe = matches!(method, Method::Get | Method::Head);
            if response.status == 303 && !safe {
                method = Method::Get;
            } else if !safe && matches!(response.status, 301 | 302) {
                return Ok(response);
            }
            let next = url
                .join(location)
                .with_context(|| format!("{} leads to no address", url.redacted()))?;
            if (url.origin.scheme, next.origin.scheme) == (Scheme::Https, Scheme::Http) {
                bail!(
                    "{} leads to {}, which is not protected: refused",
                    url.redacted(),
                    next.redacted()
                );
            }
            say::debug(format_args!("{} -> {}", url.redacted(), next.redacted()));
            url = next;
        }
        bail!(
            "{} leads in a circle: more than {MAX_REDIRECTS} redirects",
            request.url.redacted()
        )
    }

    /// One address, as often as it may help.
    fn persist(
        &self,
        request: &Request,
        method: Method,
        url: &Url,
        authorization: Option<&String>,
    ) -> Result<Response> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            // A part of an upload that has arrived already must not arrive again.
            let last = attempt == ATTEMPTS || method == Method::Patch;
            let (why, wait) = match self.once(request, method, url, authorization) {
                Ok(response) if last || !is_passing(response.status) => return Ok(response),
                Ok(response) => {
                    let asked = response
                        .header("Retry-After")
                        .and_then(|s| s.trim().parse().ok())
                        .map(Duration::from_secs);
                    if asked.is_some_and(|asked| asked > LONGEST_PAUSE) {
                        return Ok(response);
                    }
                    (
                        format!("status {}", response.status),
                        asked.unwrap_or(pause),
                    )
                }
                Err(error) if last || !is_dropped(&error) => {
                    return Err(explain(error, method, url));
                }
                Err(error) => (error.to_string(), pause),
            };
            say::verbose(format_args!(
                "{}: {why}: trying again in {} ms",
                url.redacted(),
                wait.as_millis()
            ));
            std::thread::sleep(wait);
            pause *= 2;
        }
        bail!("{} was not asked", url.redacted())
    }

    fn once(
        &self,
        request: &Request,
        method: Method,
        url: &Url,
        authorization: Option<&String>,
    ) -> Result<Response, ureq::Error> {
        say::debug(format_args!("{} {}", method.http(), url.redacted()));
        let agent = self.agent(&url.origin)?;
        let mut builder = http::Request::builder()
            .method(method.http())
            .uri(url.to_string());
        for (name, value) in &request.headers {
            builder = builder.header(*name, value);
        }
        if let Some(secret) = authorization {
            builder = builder.header("Authorization", secret);
        }
        let safe = matches!(method, Method::Get | Method::Head);
        let response = match request.body {
            _ if safe => agent.run(builder.body(())?)?,
            Body::None => agent.run(builder.body(&[][..])?)?,
            Body::Bytes(bytes) => agent.run(builder.body(bytes)?)?,
            Body::File {
                file,
                offset_bytes,
                len_bytes,
                sent,
            } => {
                let mut part = Part {
                    file,
                    next: offset_bytes,
                    end: offset_bytes + len_bytes,
                    sent,
                };
                let builder = builder.header("Content-Length", len_bytes);
                agent.run(builder.body(ureq::SendBody::from_reader(&mut part))?)?
            }
        };
        let (parts, body) = response.into_parts();
        Ok(Response {
            status: parts.status.as_u16(),
            url: url.clone(),
            headers: parts.headers,
            body,
        })
    }

    /// The connections to a server.
    fn agent(&self, origin: &Origin) -> Result<ureq::Agent, ureq::Error> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = agents.get(origin) {
            return Ok(agent.clone());
        }
        let mut tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier);
        let own = self.certificates(origin);
        if !own.is_empty() {
            tls = tls.root_certs(RootCerts::Specific(Arc::new(own)));
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("capsid/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(CONNECT_LIMIT))
            .timeout_connect(Some(CONNECT_LIMIT))
            .timeout_recv_response(Some(STALL_LIMIT))
            .timeout_per_read(Some(STALL_LIMIT))
            .timeout_per_write(Some(STALL_LIMIT))
            .proxy(self.proxy(origin)?)
            .tls_config(tls.build())
            .build();
        let agent = ureq::Agent::new_with_config(config);
        agents.insert(origin.clone(), agent.clone());
        Ok(agent)
    }

    /// What `certs.d` adds for a server, with what the system trusts; empty when it adds nothing.
    fn certificates(&self, origin: &Origin) -> Vec<Certificate<'static>> {
        let names = [
            format!("{}:{}", origin.host, origin.port),
            origin.host.clone(),
        ];
        let directories = self
            .settings
            .certificates
            .iter()
            .flat_map(|d| names.iter().map(move |n| d.join(n)));
        let files = directories
            .filter_map(|d| fs::read_dir(d).ok())
            .flatten()
            .flatten();
        let mut own = Vec::new();
        for file in files.filter(|f| f.path().extension().is_some_and(|e| e == "crt")) {
            match given::text(&file.path(), MAX_CERTIFICATES) {
                Ok(pem) => {
                    own.extend(
                        ureq::tls::parse_pem(&pem)
                            .flatten()
                            .filter_map(|item| match item {
                                PemItem::Certificate(certificate) => Some(certificate),
                                _ => None,
                            }),
                    )
                }
                Err(error) => say::warn(format_args!(
                    "cannot read certificate {}: {error}",
                    file.path().display()
                )),
            }
        }
        if !own.is_empty() {
            let system = rustls_native_certs::load_native_certs().certs;
            own.extend(
                system
                    .iter()
                    .map(|c| Certificate::from_der(c.as_ref()).to_owned()),
            );
        }
        own
    }

    fn proxy(&self, origin: &Origin) -> Result<Option<ureq::Proxy>, ureq::Error> {
        let proxy = match origin.scheme {
            Scheme::Http => &self.settings.http_proxy,
            Scheme::Https => &self.settings.https_proxy,
        };
        let Some(proxy) = proxy.as_ref().filter(|p| !p.is_empty()) else {
            return Ok(None);
        };
        if origin.is_loopback() || proxy::bypasses(&self.settings.no_proxy, origin) {
            return Ok(None);
        }
        ureq::Proxy::new(proxy).map(Some)
    }
}

/// A part of a file as a stream.
struct Part<'a> {
    file: &'a File,
    next: u64,
    end: u64,
    sent: &'a (dyn Fn(u64) + Sync),
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.end - self.next)
            .map_or(buffer.len(), |left| left.min(buffer.len()));
        let len = self.file.read_at(&mut buffer[..want], self.next)?;
        self.next += len as u64;
        (self.sent)(len as u64);
        Ok(len)
    }
}

/// Whether a server may answer otherwise in a moment.
fn is_passing(status: u16) -> bool {
    matches!(status, 429 | 500 | 502 | 503 | 504)
}

/// Whether a connection was made and lost.
fn is_dropped(error: &ureq::Error) -> bool {
    use io::ErrorKind as Kind;
    match error {
        ureq::Error::Io(error) => matches!(
            error.kind(),
            Kind::ConnectionReset
                | Kind::ConnectionAborted
                | Kind::BrokenPipe
                | Kind::UnexpectedEof
        ),
        _ => false,
    }
}

/// Whether TLS is spoken there, and only the certificate is not what it should be.
fn is_untrusted(error: &ureq::Error) -> bool {
    let text = match error {
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Rustls(error) => error.to_string(),
        _ => return false,
    };
    text.contains("certificate")
}

/// What went wrong, in the words that clients sort on.
fn explain(error: ureq::Error, method: Method, url: &Url) -> anyhow::Error {
    let Origin { host, port, .. } = &url.origin;
    let dial = format!("dial tcp {host}:{port}");
    let lookup = format!("dial tcp: lookup {host}: no such host");
    let text = match &error {
        ureq::Error::HostNotFound => lookup,
        ureq::Error::Io(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            format!("{dial}: connect: connection refused")
        }
        ureq::Error::Io(e) if e.to_string().contains("failed to lookup") => lookup,
        ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => {
            format!("{dial}: i/o timeout")
        }
        ureq::Error::Timeout(_) => {
            format!("the server said nothing for {} s", STALL_LIMIT.as_secs())
        }
        ureq::Error::Io(e) if e.to_string().contains("InvalidContentType") => {
            "http: server gave HTTP response to HTTPS client (--no-https speaks plain HTTP)".into()
        }
        ureq::Error::Io(e) if e.to_string().contains("UnknownIssuer") => unknown_issuer(),
        ureq::Error::Rustls(e) if e.to_string().contains("UnknownIssuer") => unknown_issuer(),
        ureq::Error::Rustls(e) => format!("tls: {e}"),
        ureq::Error::Io(e) => e.to_string(),
        other => other.to_string(),
    };
    anyhow!("{} {:?}: {text}", method.word(), url.redacted())
}

fn unknown_issuer() -> String {
    "tls: the certificate is signed by an unknown authority: name its certificate in SSL_CERT_FILE, or put it into ~/.config/containers/certs.d/HOST:PORT/ca.crt".into()
}
