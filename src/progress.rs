//! One line on a terminal that says how far something long is, how fast, and how long it will take; nothing anywhere else,
//! and nothing on a terminal that cannot overwrite a line (`TERM=dumb`).

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::say;

/// The line changes at most so often.
const EVERY: Duration = Duration::from_millis(100);
/// Before that a rate is a guess.
const SETTLED: Duration = Duration::from_secs(1);
/// The width of a terminal that does not tell it.
const COLUMNS: u16 = 80;

/// A transfer, told of by all its threads.
pub struct Progress {
    label: String,
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    shown: Option<Mutex<Shown>>,
    stopped: AtomicBool,
}

/// What is on the terminal.
struct Shown {
    begun: Instant,
    last: Instant,
    has_line: bool,
}

impl Progress {
    /// Of `total_bytes`, 0 when that is not known yet.
    pub fn new(label: &str, total_bytes: u64) -> Progress {
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let visible = say::level() >= say::INFO && !is_dumb && std::io::stderr().is_terminal();
        let now = Instant::now();
        let shown = Shown {
            begun: now,
            last: now,
            has_line: false,
        };
        Progress {
            label: say::printable(label),
            total_bytes: AtomicU64::new(total_bytes),
            done_bytes: AtomicU64::new(0),
            shown: visible.then(|| Mutex::new(shown)),
            stopped: AtomicBool::new(false),
        }
    }

    /// Whether anybody sees it: what only the line needs has not to be found out otherwise.
    pub fn is_shown(&self) -> bool {
        self.shown.is_some()
    }

    /// The length has become known.
    pub fn set_total(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// So much more is done.
    pub fn add(&self, bytes: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let Some(Ok(mut shown)) = self.shown.as_ref().map(Mutex::try_lock) else {
            return;
        };
        if shown.last.elapsed() < EVERY {
            return;
        }
        shown.last = Instant::now();
        shown.has_line = true;
        let total = self.total_bytes.load(Ordering::Relaxed);
        let text = line(&self.label, done, total, shown.begun.elapsed());
        // A line that wraps cannot be overwritten.
        let size = rustix::termios::tcgetwinsize(std::io::stderr());
        let columns = size.map(|s| s.ws_col).ok().filter(|c| *c > 0);
        let width = usize::from(columns.unwrap_or(COLUMNS)) - 1;
        let text: String = text.chars().take(width).collect();
        put(&format!("\r\x1b[K{text}"));
    }

    /// One thread has failed: the others need not go on.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether the threads are to end.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let shown = self.shown.as_ref().map(Mutex::lock);
        if let Some(Ok(shown)) = shown
            && shown.has_line
        {
            put("\r\x1b[K");
        }
    }
}

/// By one call, so that no other process writes into it.
fn put(text: &str) {
    // Nobody is left to tell when stderr is gone.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// `downloading:  27 % of 45.6 MiB, 3.4 MiB/s, 0:10 left`.
fn line(label: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let mut text = match total {
        0 => format!("{label}: {}", size(done)),
        total => {
            let percent = u128::from(done.min(total)) * 100 / u128::from(total);
            format!("{label}: {percent:3} % of {}", size(total))
        }
    };
    if elapsed < SETTLED {
        return text;
    }
    let rate = done as f64 / elapsed.as_secs_f64();
    text += &format!(", {}/s", size(rate as u64));
    if total > done && rate >= 1.0 {
        let left = ((total - done) as f64 / rate).ceil() as u64;
        text += &match left {
            86400.. => ", more than a day left".to_owned(),
            3600.. => format!(
                ", {}:{:02}:{:02} left",
                left / 3600,
                left / 60 % 60,
                left % 60
            ),
            _ => format!(", {}:{:02} left", left / 60, left % 60),
        };
    }
    text
}

fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_says_how_far_how_fast_and_how_long() {
        let mib = |n: u64| n << 20;
        for (done, total, seconds, expected) in [
            (0, 0, 0, "x: 0 B"),
            (mib(5), 0, 5, "x: 5.0 MiB, 1.0 MiB/s"),
            (mib(5), mib(20), 0, "x:  25 % of 20.0 MiB"),
            (
                mib(5),
                mib(20),
                5,
                "x:  25 % of 20.0 MiB, 1.0 MiB/s, 0:15 left",
            ),
            (mib(20), mib(20), 5, "x: 100 % of 20.0 MiB, 4.0 MiB/s"),
            (mib(30), mib(20), 5, "x: 100 % of 20.0 MiB, 6.0 MiB/s"),
            (
                mib(1),
                mib(3000),
                2,
                "x:   0 % of 2.9 GiB, 512.0 KiB/s, 1:39:58 left",
            ),
            (
                100,
                mib(3000),
                2,
                "x:   0 % of 2.9 GiB, 50 B/s, more than a day left",
            ),
            (0, mib(1), 9, "x:   0 % of 1.0 MiB, 0 B/s"),
            (
                u64::MAX,
                u64::MAX,
                1,
                "x: 100 % of 17179869184.0 GiB, 17179869184.0 GiB/s",
            ),
        ] {
            let elapsed = Duration::from_secs(seconds);
            assert_eq!(line("x", done, total, elapsed), expected);
        }
    }
}
