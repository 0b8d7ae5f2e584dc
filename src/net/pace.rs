//! A server that sends next to nothing is no better than one that is silent, and the limit for each read does not end it:
//! a byte a second keeps a connection for ever.

use std::fmt;
use std::io::{self, Read};
use std::time::{Duration, Instant};

/// The pace is looked at so often.
const WINDOW: Duration = Duration::from_secs(30);
/// Less than this in a window is too slow: 100 bytes a second. A modem brings fifty times as much.
const LEAST: u64 = 3000;

/// Reads from a server, as long as that sends at least [`LEAST`] bytes in each [`WINDOW`] of waiting. The time that its
/// reader takes does not count.
pub struct Paced<R> {
    inner: R,
    pace: Pace,
}

/// Bytes, and the time that was waited for them.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

/// Why a transfer was given up.
#[derive(Debug)]
pub struct TooSlow(u64);

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "the server is too slow: {} bytes in {} s",
            self.0,
            WINDOW.as_secs()
        )
    }
}

impl std::error::Error for TooSlow {}

impl Pace {
    /// One read is over. Gives how little came in a window that was too slow.
    fn note(&mut self, waited: Duration, bytes: usize) -> Result<(), TooSlow> {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < WINDOW {
            return Ok(());
        }
        let bytes = std::mem::take(self).bytes;
        match bytes < LEAST {
            true => Err(TooSlow(bytes)),
            false => Ok(()),
        }
    }
}

impl<R> Paced<R> {
    /// From a server that has begun to answer.
    pub fn new(inner: R) -> Paced<R> {
        Paced {
            inner,
            pace: Pace::default(),
        }
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let before = Instant::now();
        let len = self.inner.read(buffer)?;
        // The end is the end, however late it came.
        if len > 0 {
            self.pace
                .note(before.elapsed(), len)
                .map_err(|error| io::Error::new(io::ErrorKind::TimedOut, error))?;
        }
        Ok(len)
    }
}

/// Whether a transfer was given up for its pace: another try would be no better.
pub fn is_too_slow(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|e| e.is::<TooSlow>())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds until reads of so many bytes, so many milliseconds apart, are given up; `None` when a day is not enough.
    fn given_up(bytes: usize, apart_ms: u64) -> Option<u64> {
        let mut pace = Pace::default();
        let apart = Duration::from_millis(apart_ms);
        let reads = 24 * 3600 * 1000 / apart_ms;
        (1..=reads)
            .find(|_| pace.note(apart, bytes).is_err())
            .map(|reads| reads * apart_ms / 1000)
    }

    #[test]
    fn a_least_pace_is_kept_to() {
        assert_eq!(given_up(1, 1000), Some(30));
        assert_eq!(given_up(10, 200), Some(30));
        assert_eq!(given_up(500, 59_000), Some(59));
        assert_eq!(given_up(99, 1000), Some(30));
        assert_eq!(given_up(100, 1000), None);
        assert_eq!(given_up(131_072, 50_000), None, "in bursts");
        let mut pace = Pace::default();
        pace.note(Duration::from_secs(29), 1_000_000).unwrap();
        pace.note(Duration::from_secs(2), 1).unwrap();
        let error = pace.note(Duration::from_secs(30), 7).unwrap_err();
        let error = io::Error::new(io::ErrorKind::TimedOut, error);
        assert!(is_too_slow(&error));
        assert!(error.to_string().contains("too slow: 7 bytes in 30 s"));
        assert!(!is_too_slow(&io::ErrorKind::TimedOut.into()));
    }
}
