//! Files of web servers. What a server says of a file's version (`ETag`, `Last-Modified`) is its name in the cache.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::download::{self, Expected};
use super::http::{Client, Method, Request, Response};
use super::url::Url;
use super::{Options, has_len};
use crate::cache::{Cache, Kind, Obtained};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::say;

/// Downloads a file, unless the cache has the version that the server has. `check` is asked of what has come and of what
/// the cache has.
///
/// # Errors
/// When it does not come, or is not what it should be.
pub fn pull(
    url: &Url,
    options: &Options,
    cache: &Cache,
    check: &dyn Fn(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let client = &options.client;
    let head = client.send(&Request::new(Method::Head, url.clone()))?;
    let version = match head.status {
        200 => version(&head),
        // Some servers answer to GET only.
        400 | 403 | 405 | 501 => None,
        _ => return Err(refusal(url, &head)),
    };
    // Without a version the file is fetched anew each time.
    let name = version
        .clone()
        .unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let key = format!(
        "sha256.{}",
        Digest::of(format!("{url} {name}").as_bytes()).hex()
    );
    let len_bytes = (head.status == 200).then(|| head.len_bytes()).flatten();
    let is_good =
        |path: &Path| len_bytes.is_none_or(|len| has_len(path, len)) && check(path).is_ok();
    let claim = match cache.obtain(Kind::Net, &key, &is_good)? {
        Obtained::Ready(path) => {
            say::info(format_args!("Using cached image"));
            return Ok(path);
        }
        Obtained::Claimed(claim) => claim,
    };
    let draft = cache.draft()?;
    say::info(format_args!("Downloading network image"));
    let progress = Progress::new("downloading", len_bytes.unwrap_or(0));
    let expected = Expected {
        len_bytes,
        digest: None,
    };
    let open = |part| get(client, url, part);
    download::to_draft(&url.redacted(), &open, expected, &draft, &progress)?;
    drop(progress);
    check(draft.path()).with_context(|| {
        format!(
            "what {} has sent{} is no image",
            url.redacted(),
            kind(&draft.file)
        )
    })?;
    let path = draft.publish(&cache.place(Kind::Net, &key)?)?;
    drop(claim);
    Ok(path)
}

/// A hint for those who got a page instead of a file.
fn kind(file: &File) -> &'static str {
    let mut head = [0; 256];
    let len = file.read_at(&mut head, 0).unwrap_or(0);
    let head = String::from_utf8_lossy(&head[..len]).to_ascii_lowercase();
    match head.trim_start().starts_with('<') && (head.contains("html") || head.contains("xml")) {
        true => " (a web page: is the address right, does it want a login?)",
        false => "",
    }
}

/// Asks for a file, or a part of it.
///
/// # Errors
/// When it does not come.
pub fn get(client: &Client, url: &Url, part: Option<Range<u64>>) -> Result<Response> {
    let mut request = Request::new(Method::Get, url.clone());
    if let Some(part) = part {
        let last = (part.end != u64::MAX).then(|| (part.end - 1).to_string());
        let range = format!("bytes={}-{}", part.start, last.unwrap_or_default());
        request = request.header("Range", range);
    }
    let response = client.send(&request)?;
    match response.status {
        200 | 206 => Ok(response),
        _ => Err(refusal(url, &response)),
    }
}

fn version(head: &Response) -> Option<String> {
    let mut version = String::new();
    for name in ["ETag", "Last-Modified"] {
        if let Some(value) = head.header(name) {
            version.push_str(value);
        }
    }
    let len = head.len_bytes().unwrap_or(0);
    (!version.is_empty()).then(|| format!("{version} {len}"))
}

fn refusal(url: &Url, response: &Response) -> anyhow::Error {
    let why = match response.status {
        404 => " (there is no such file)",
        401 | 403 => " (it wants a login, which web addresses cannot have here)",
        _ => "",
    };
    anyhow!(
        "could not get {}: StatusCode: {}{why}",
        url.redacted(),
        response.status
    )
}
