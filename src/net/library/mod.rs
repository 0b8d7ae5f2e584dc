//! Libraries: the API that Sylabs' library and compatible servers speak (`scs-library-client` documents it).
//!
//! ```text
//! GET  /v1/images/ENTITY/COLLECTION/CONTAINER:TAG?arch=A        what the image is: hash, size
//! GET  /v1/imagefile/ENTITY/COLLECTION/CONTAINER:TAG?arch=A     the file, through a redirect to a signed address
//! GET, POST /v1/entities, /v1/collections, /v1/containers, /v1/images
//! POST /v2/imagefile/ID, PUT signed address, PUT /v2/imagefile/ID/_complete            a file in one part
//! POST, PUT /v2/imagefile/ID/_multipart, PUT signed addresses, PUT …/_multipart_complete    in several parts
//! POST /v2/tags/CONTAINER                                                     tags for each architecture
//! ```

mod push;

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::download::{self, Expected};
use super::http::{Client, Method, Request, Response};
use super::reference::LibraryName;
use super::remotes::{Endpoint, Files, Remotes};
use super::url::{Scheme, Url};
use super::{Options, has_len};
use crate::cache::{Cache, Kind, Obtained};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::{image, oci, say};

pub use push::push;

/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 4 << 20;

/// How a library is found.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// `--library`.
    pub url: Option<String>,
    /// The endpoints.
    pub files: Files,
}

/// A library, as it is reached: computed once, used for every request.
pub struct Library<'a> {
    client: &'a Client,
    root: Url,
    token: Option<String>,
}

/// What a library says of an image.
#[derive(Deserialize, Default)]
struct ImageInfo {
    #[serde(default)]
    id: String,
    #[serde(default)]
    hash: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    uploaded: bool,
}

impl<'a> Library<'a> {
    /// The library that a reference means.
    ///
    /// # Errors
    /// When there is none, or the endpoint does not say where it is.
    pub fn of(name: &LibraryName, options: &'a Options) -> Result<Library<'a>> {
        let client = &options.client;
        let choice = &options.library;
        if let Some(host) = &name.host {
            let root = client.root(options.scheme, host)?;
            let remotes = Remotes::read(&choice.files.own, &choice.files.site)?;
            // A login is for the endpoint that it was made for.
            let known = remotes.remotes.values().find(|e| {
                endpoint_url(e).is_ok_and(|u| u.origin == root.origin) && !e.token.is_empty()
            });
            return Ok(Library {
                client,
                root,
                token: known.map(|e| e.token.clone()),
            });
        }
        if let Some(text) = &choice.url {
            let root: Url = match text.contains("://") {
                true => text.parse()?,
                false => client.root(options.scheme, text)?,
            };
            return Ok(Library {
                client,
                root,
                token: None,
            });
        }
        let remotes = Remotes::read(&choice.files.own, &choice.files.site)?;
        let (name, endpoint) = remotes.get(None)?;
        if endpoint.uri == "cloud.apptainer.org" {
            bail!(
                "Unable to get library client configuration: remote {name} has no library client: choose an endpoint that has one (capsid remote add NAME URI), or name a library by --library URL"
            );
        }
        let root = service(client, endpoint).with_context(|| {
            format!("Unable to get library client configuration of remote {name}")
        })?;
        Ok(Library {
            client,
            root,
            token: Some(endpoint.token.clone()).filter(|t| !t.is_empty()),
        })
    }

    fn url(&self, path: &str) -> Url {
        self.root
            .with_target(format!("{}/{path}", self.root.path().trim_end_matches('/')))
    }

    fn send(&self, mut request: Request) -> Result<Response> {
        if request.url.origin == self.root.origin
            && let Some(token) = &self.token
        {
            request.authorization = Some(format!("BEARER {token}"));
        }
        self.client.send(&request)
    }

    /// The `data` of an answer; `None` for 404.
    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Option<T>> {
        self.call_url(method, self.url(path), body)
    }

    fn call_url<T: DeserializeOwned>(
        &self,
        method: Method,
        url: Url,
        body: Option<&Value>,
    ) -> Result<Option<T>> {
        let what = format!("library {}", url.redacted());
        let text = body.map(Value::to_string).unwrap_or_default();
        let mut request = Request::new(method, url);
        if body.is_some() {
            request = request.json(text.as_bytes());
        }
        let response = self.send(request)?;
        if response.status == 404 {
            return Ok(None);
        }
        if !response.is_success() {
            return Err(refusal(response, &what));
        }
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            data: Value,
        }
        let text = response.document(MAX_ANSWER)?;
        let answer = match text.is_empty() {
            true => Answer { data: Value::Null },
            false => oci::parse(&text)
                .with_context(|| format!("{what} gives an answer that is not understood"))?,
        };
        serde_json::from_value(answer.data)
            .map(Some)
            .with_context(|| format!("{what} gives an answer that is not understood"))
    }

    /// The API version that the server names, as numbers; old servers name none.
    fn version(&self) -> String {
        #[derive(Deserialize)]
        struct Version {
            #[serde(rename = "apiVersion", default)]
            api: String,
        }
        let version = self.call::<Version>(Method::Get, "version", None);
        version.ok().flatten().map(|v| v.api).unwrap_or_default()
    }
}

fn refusal(response: Response, what: &str) -> anyhow::Error {
    #[derive(Deserialize)]
    struct Answer {
        error: Problem,
    }
    #[derive(Deserialize)]
    struct Problem {
        #[serde(default)]
        message: String,
    }
    let status = response.status;
    let answer: Option<Answer> = serde_json::from_str(&response.explanation()).ok();
    let words = answer.map(|a| a.error.message).filter(|m| !m.is_empty());
    let words: String = words
        .map(|w| format!(": {w}"))
        .unwrap_or_default()
        .chars()
        .take(500)
        .collect();
    let hint = match status {
        401 | 403 => " (capsid remote login)",
        _ => "",
    };
    anyhow!("{what}: StatusCode: {status}{words}{hint}")
}

fn endpoint_url(endpoint: &Endpoint) -> Result<Url> {
    let scheme = match endpoint.insecure {
        true => Scheme::Http,
        false => Scheme::Https,
    };
    Url::host(scheme, endpoint.uri.trim_end_matches('/'))
}

/// Asks an endpoint where its library is.
///
/// # Errors
/// When it does not say so.
pub fn service(client: &Client, endpoint: &Endpoint) -> Result<Url> {
    // The one endpoint whose services everybody knows.
    if endpoint.uri == "cloud.sylabs.io" {
        return "https://library.sylabs.io".parse();
    }
    let services = services(client, endpoint)?;
    let found = services.iter().find(|(name, _)| name == "library");
    match found {
        Some((_, url)) => url.parse(),
        None => bail!("library is not a service at endpoint {}", endpoint.uri),
    }
}

/// The services of an endpoint with their addresses.
///
/// # Errors
/// When it does not name them.
pub fn services(client: &Client, endpoint: &Endpoint) -> Result<Vec<(String, String)>> {
    let url = endpoint_url(endpoint)?.with_target("/assets/config/config.prod.json");
    let what = format!("endpoint {}", endpoint.uri);
    let response = client
        .send(&Request::new(Method::Get, url))
        .context("error making request to server")?;
    if !response.is_success() {
        return Err(refusal(response, &what));
    }
    let all: serde_json::Map<String, Value> =
        serde_json::from_slice(&response.document(MAX_ANSWER)?)
            .with_context(|| format!("{what} gives an answer that is not understood"))?;
    let service = |(name, value): (&String, &Value)| {
        let uri = value.get("uri")?.as_str().filter(|u| !u.is_empty())?;
        Some((name.trim_end_matches("API").to_owned(), uri.to_owned()))
    };
    Ok(all.iter().filter_map(service).collect())
}

/// The version of a service.
///
/// # Errors
/// When it does not answer.
pub fn service_version(client: &Client, uri: &str) -> Result<String> {
    let url: Url = format!("{}/version", uri.trim_end_matches('/')).parse()?;
    let response = client.send(&Request::new(Method::Get, url))?;
    if !response.is_success() {
        return Err(refusal(response, uri));
    }
    let answer: Value = serde_json::from_slice(&response.document(MAX_ANSWER)?)?;
    let version = answer.pointer("/data/version").and_then(Value::as_str);
    Ok(version.unwrap_or("unknown").to_owned())
}

/// Asks the token service of an endpoint whether a token is good.
///
/// # Errors
/// When it is not, or nobody can say.
pub fn check_token(client: &Client, endpoint: &Endpoint, token: &str) -> Result<()> {
    let services = services(client, endpoint)?;
    let Some((_, uri)) = services.iter().find(|(name, _)| name == "token") else {
        bail!("endpoint {} has no token service", endpoint.uri);
    };
    let url: Url = format!("{}/v1/token-status", uri.trim_end_matches('/')).parse()?;
    let mut request = Request::new(Method::Get, url);
    request.authorization = Some(format!("BEARER {token}"));
    let response = client.send(&request)?;
    match response.is_success() {
        true => Ok(()),
        false => Err(refusal(response, "the token is not accepted")),
    }
}

/// Downloads an image into the cache.
///
/// # Errors
/// When it is not there or damaged.
pub fn pull(name: &LibraryName, options: &Options, cache: &Cache) -> Result<PathBuf> {
    let library = Library::of(name, options)?;
    let arch = &options.platform.architecture;
    let path = format!("{}:{}", name.path().join("/"), name.tag());
    let url = library
        .url(&format!("v1/images/{path}"))
        .with_query("arch", arch);
    say::verbose(format_args!("library {}", url.redacted()));
    let Some(info) = library.call_url::<ImageInfo>(Method::Get, url, None)? else {
        bail!(
            "image does not exist in the library: {path} ({arch}) at {}",
            library.root.redacted()
        );
    };
    let digest = info
        .hash
        .strip_prefix("sha256.")
        .and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
    if digest.is_none() && !info.hash.starts_with("sif.") {
        bail!(
            "the library gives {path} the hash {:?}, which is none",
            info.hash
        );
    }
    let is_good =
        |path: &Path| (info.size == 0 || has_len(path, info.size)) && image::check(path).is_ok();
    let claim = match cache.obtain(Kind::Library, &info.hash, &is_good)? {
        Obtained::Ready(path) => {
            say::info(format_args!("Using cached image"));
            return Ok(path);
        }
        Obtained::Claimed(claim) => claim,
    };
    let open = |part: Option<Range<u64>>| {
        let url = library
            .url(&format!("v1/imagefile/{path}"))
            .with_query("arch", arch);
        let mut request = Request::new(Method::Get, url);
        if let Some(part) = part {
            let last = (part.end != u64::MAX).then(|| (part.end - 1).to_string());
            let range = format!("bytes={}-{}", part.start, last.unwrap_or_default());
            request = request.header("Range", range);
        }
        let response = library.send(request)?;
        match response.status {
            200 | 206 => Ok(response),
            _ => Err(refusal(response, &format!("cannot download {path}"))),
        }
    };
    let expected = Expected {
        len_bytes: Some(info.size).filter(|size| *size > 0),
        digest,
    };
    let draft = cache.draft()?;
    say::info(format_args!("Downloading library image"));
    let progress = Progress::new("downloading", info.size);
    download::to_draft(&format!("image {path}"), &open, expected, &draft, &progress)?;
    drop(progress);
    image::check(draft.path())
        .with_context(|| format!("what the library has sent for {path} is no image"))?;
    let place = draft.publish(&cache.place(Kind::Library, &info.hash)?)?;
    drop(claim);
    Ok(place)
}
