//! One line on a terminal that says how far a transfer is; nothing anywhere else.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::say;

/// The line changes at most so often.
const EVERY: Duration = Duration::from_millis(100);

/// A transfer, told of by all its threads.
pub struct Progress {
    label: String,
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    shown: Option<Mutex<Instant>>,
    stopped: AtomicBool,
}

impl Progress {
    /// Of `total_bytes`, 0 when that is not known yet.
    pub fn new(label: &str, total_bytes: u64) -> Progress {
        let visible = say::level() >= say::INFO && std::io::stderr().is_terminal();
        Progress {
            label: label.to_owned(),
            total_bytes: AtomicU64::new(total_bytes),
            done_bytes: AtomicU64::new(0),
            shown: visible.then(|| Mutex::new(Instant::now())),
            stopped: AtomicBool::new(false),
        }
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
        if shown.elapsed() < EVERY {
            return;
        }
        *shown = Instant::now();
        let total = self.total_bytes.load(Ordering::Relaxed);
        let share = match total {
            0 => String::new(),
            total => format!(
                "{:3} % of {:.1} MiB",
                done.min(total) * 100 / total,
                mib(total)
            ),
        };
        // Nobody is left to tell when stderr is gone.
        let _ = write!(
            std::io::stderr().lock(),
            "\r\x1b[K{}: {:.1} MiB {share}",
            say::printable(&self.label),
            mib(done)
        );
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
        if self.shown.is_some() {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
