//! Files of web servers. What a server says of a file's version (`ETag`, `Last-Modified`) is its name in the cache.

use std::path::PathBuf;

use anyhow::{Result, anyhow};

use super::Options;
use super::download::{self, Expected};
use super::http::{Method, Request, Response};
use super::url::Url;
use crate::cache::{Cache, Kind, Obtained};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::say;

/// Downloads a file, unless the cache has the version that the server has.
///
/// # Errors
/// When it does not come.
pub fn pull(url: &Url, options: &Options, cache: &Cache) -> Result<PathBuf> {
    let head = options
        .client
        .send(&Request::new(Method::Head, url.clone()))?;
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
    let claim = match cache.obtain(Kind::Net, &key)? {
        Obtained::Ready(path) => {
            say::info(format_args!("Using cached image"));
            return Ok(path);
        }
        Obtained::Claimed(claim) => claim,
    };
    let open = |part: Option<std::ops::Range<u64>>| {
        let mut request = Request::new(Method::Get, url.clone());
        if let Some(part) = part {
            let last = (part.end != u64::MAX).then(|| (part.end - 1).to_string());
            let range = format!("bytes={}-{}", part.start, last.unwrap_or_default());
            request = request.header("Range", range);
        }
        let response = options.client.send(&request)?;
        match response.status {
            200 | 206 => Ok(response),
            _ => Err(refusal(url, &response)),
        }
    };
    let len_bytes = (head.status == 200).then(|| head.len_bytes()).flatten();
    let draft = cache.draft()?;
    say::info(format_args!("Downloading network image"));
    let progress = Progress::new("downloading", len_bytes.unwrap_or(0));
    let expected = Expected {
        len_bytes,
        digest: None,
    };
    download::to_draft(&url.redacted(), &open, expected, &draft, &progress)?;
    drop(progress);
    let path = draft.publish(&cache.place(Kind::Net, &key)?)?;
    drop(claim);
    Ok(path)
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
