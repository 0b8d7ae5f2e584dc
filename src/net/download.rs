//! Content to a file: counted, hashed, gone on with after a dropped connection, large content in several parts at once.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::http::Response;
use super::pace::is_too_slow;
use crate::cache::Draft;
use crate::digest::{Digest, Hashing};
use crate::progress::Progress;
use crate::{say, threads};

/// Content of at least this length is fetched in parts where the server can do that.
const LARGE: u64 = 64 << 20;
/// The length of a part.
const PART: u64 = 16 << 20;
/// Connections for one content.
pub const CONNECTIONS: usize = 4;
/// How often in a row a connection may end without having brought anything.
const EMPTY_ATTEMPTS: u32 = 5;
/// The first pause after such an end; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// What must come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected {
    /// Its length, if known.
    pub len_bytes: Option<u64>,
    /// Its digest, if known.
    pub digest: Option<Digest>,
}

/// Asks for content, all of it or from one byte to before another; `u64::MAX` is the end.
pub type Open<'a> = &'a (dyn Fn(Option<Range<u64>>) -> Result<Response> + Sync);

/// Fetches content and gives its digest and length.
///
/// # Errors
/// When it does not come, is not what was expected, or cannot be written.
pub fn to_draft(
    what: &str,
    open: Open,
    expected: Expected,
    draft: &Draft,
    progress: &Progress,
) -> Result<(Digest, u64)> {
    let transfer = Transfer {
        what,
        open,
        file: &draft.file,
        progress,
    };
    let large = expected.len_bytes.filter(|len| *len >= LARGE);
    let (digest, len) = match large {
        Some(len) => transfer.in_parts(len)?,
        None => transfer.in_order(None, expected.len_bytes)?,
    };
    if let Some(wanted) = expected.len_bytes
        && wanted != len
    {
        bail!(
            "{what} has {len} bytes, and should have {wanted}: damaged on the way or at the source"
        );
    }
    if let Some(wanted) = expected.digest
        && wanted != digest
    {
        bail!("{what} has the digest {digest}: damaged on the way or at the source");
    }
    Ok((digest, len))
}

struct Transfer<'a> {
    what: &'a str,
    open: Open<'a>,
    file: &'a File,
    progress: &'a Progress,
}

impl Transfer<'_> {
    /// Everything from the beginning on, hashed as it comes.
    fn in_order(&self, first: Option<Response>, len: Option<u64>) -> Result<(Digest, u64)> {
        let mut hash = Hashing::new(io::sink());
        let mut whole = 0..len.unwrap_or(u64::MAX);
        self.range(first, &mut whole, len.is_none(), &mut |bytes| {
            hash.write_all(bytes).map_err(Into::into)
        })?;
        let (digest, len, _) = hash.finish();
        Ok((digest, len))
    }

    /// Several parts at once, hashed at the end.
    fn in_parts(&self, len: u64) -> Result<(Digest, u64)> {
        let first = (self.open)(Some(0..PART))?;
        if first.status != 206 {
            return self.in_order(Some(first), Some(len));
        }
        let first = Mutex::new(Some(first));
        let next = AtomicU64::new(0);
        let worker = || -> Result<()> {
            loop {
                let start = next.fetch_add(PART, Ordering::Relaxed);
                if start >= len {
                    return Ok(());
                }
                let response = match start {
                    0 => first.lock().map_or(None, |mut first| first.take()),
                    _ => None,
                };
                let mut part = start..(start + PART).min(len);
                let done = self.range(response, &mut part, false, &mut |_| Ok(()));
                if done.is_err() {
                    self.progress.stop();
                }
                done?;
            }
        };
        first_error(threads::all("download", CONNECTIONS, worker).into_iter())?;
        let mut hash = Hashing::new(io::sink());
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let read = self.file.read_at(&mut buffer, at)?;
            if read == 0 {
                let (digest, len, _) = hash.finish();
                return Ok((digest, len));
            }
            hash.write_all(&buffer[..read])?;
            at += read as u64;
        }
    }

    /// The bytes of a range to their places in the file, by as many connections as it takes. `part.start` moves on.
    fn range(
        &self,
        mut first: Option<Response>,
        part: &mut Range<u64>,
        open_ended: bool,
        also: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut empty = 0;
        loop {
            let before = part.start;
            let asked = (part.start > 0).then_some(part.start..part.end);
            let response = match first.take() {
                Some(response) => response,
                None => (self.open)(asked)?,
            };
            match self.body(response, part, open_ended, also)? {
                None => return Ok(()),
                Some(why) => {
                    empty = if part.start > before { 0 } else { empty + 1 };
                    if empty == EMPTY_ATTEMPTS {
                        return Err(why.context(format!("cannot read {}", self.what)));
                    }
                    say::verbose(format_args!(
                        "{}: {why:#}: going on at byte {}",
                        self.what, part.start
                    ));
                    std::thread::sleep(FIRST_PAUSE * 2_u32.pow(empty));
                }
            }
        }
    }

    /// One answer's body. Gives what the connection ended with before the end.
    fn body(
        &self,
        response: Response,
        part: &mut Range<u64>,
        open_ended: bool,
        also: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Option<anyhow::Error>> {
        let mut skip = match response.status {
            200 => part.start,
            206 => {
                let begins = response.header("Content-Range").and_then(range_start);
                if begins != Some(part.start) {
                    bail!("{} came from another place than asked for", self.what);
                }
                0
            }
            other => bail!("cannot read {}: StatusCode: {other}", self.what),
        };
        if open_ended && let Some(len) = response.len_bytes() {
            self.progress.set_total(len + part.start - skip);
        }
        let promised = response.len_bytes().map(|len| part.start - skip + len);
        let mut reader = response.into_reader();
        let mut buffer = vec![0; 128 << 10];
        loop {
            if self.progress.is_stopped() {
                bail!("given up");
            }
            let len = match reader.read(&mut buffer) {
                Ok(0) if open_ended && promised.is_none_or(|end| part.start >= end) => {
                    return Ok(None);
                }
                Ok(0) if !open_ended && part.start == part.end => return Ok(None),
                Ok(0) => return Ok(Some(anyhow!("the connection ended early"))),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_too_slow(&error) => {
                    return Err(error).with_context(|| format!("cannot read {}", self.what));
                }
                Err(error) => return Ok(Some(error.into())),
            };
            let passed = usize::try_from(skip).map_or(len, |skip| skip.min(len));
            skip -= passed as u64;
            let mut bytes = &buffer[passed..len];
            let room = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
            if bytes.len() > room {
                // More than belongs to a part is another part's; more than the whole is not what was promised.
                bytes = &bytes[..room];
                self.store(bytes, part, also)?;
                return match self.is_part(part) {
                    true => Ok(None),
                    false => bail!("{} is longer than {} bytes", self.what, part.end),
                };
            }
            self.store(bytes, part, also)?;
        }
    }

    /// Whether more content may follow behind this range.
    fn is_part(&self, part: &Range<u64>) -> bool {
        part.end.is_multiple_of(PART)
    }

    fn store(
        &self,
        bytes: &[u8],
        part: &mut Range<u64>,
        also: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let written = self.file.write_all_at(bytes, part.start);
        written.with_context(|| format!("cannot store {}", self.what))?;
        also(bytes)?;
        part.start += bytes.len() as u64;
        self.progress.add(bytes.len() as u64);
        Ok(())
    }
}

/// The `N` of `bytes N-M/TOTAL`.
fn range_start(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// The error of the first thread that has failed by itself.
///
/// # Errors
/// That.
pub fn first_error(results: impl Iterator<Item = std::thread::Result<Result<()>>>) -> Result<()> {
    let mut found = Ok(());
    for result in results {
        let result = result.unwrap_or_else(|_| Err(anyhow!("a thread has died")));
        let given_up = |e: &anyhow::Error| e.to_string() == "given up";
        if let Err(error) = result
            && found.as_ref().err().is_none_or(given_up)
        {
            found = Err(error);
        }
    }
    found
}
