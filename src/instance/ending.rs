//! What is written down of an instance of a job when it has ended: one line, in the job's directory on this node, where
//! `capsid job stop` finds it. Only for instances of a supervisor, which removes the file.

use std::io::Write as _;
use std::time::{Duration, Instant};

use super::{Record, Registry, stats};

/// Between two looks at the memory of an instance: a look reads all of `/proc`.
const INTERVAL: Duration = Duration::from_secs(30);
/// Bytes of lines that are kept of a job at most.
const MAX: u64 = 256 << 10;

/// Whether the end of an instance is written down for its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noted {
    /// It is.
    ForTheJob,
    /// There is nobody who would read it.
    No,
}

/// The most memory that an instance was seen to use.
pub struct Peak {
    due: Option<Instant>,
    most: u64,
}

impl Peak {
    /// Begins to look, if anybody wants to know.
    pub fn of(noted: Noted) -> Peak {
        let soon = || Instant::now() + Duration::from_secs(1);
        Peak {
            due: (noted == Noted::ForTheJob).then(soon),
            most: 0,
        }
    }

    /// Whether anybody wants to know.
    pub fn is_wanted(&self) -> bool {
        self.due.is_some()
    }

    /// When the next look is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Looks, if it is time to.
    pub fn look(&mut self, record: &Record) {
        if self.due.is_some_and(|due| due <= Instant::now()) {
            self.most = self.most.max(stats::usage(record).map_or(0, |u| u.memory));
            self.due = Some(Instant::now() + INTERVAL);
        }
    }

    /// Bytes: the most of what was seen, and of what the kernel says of the largest process that has ended. For the
    /// monitor, when process 1 has been waited for.
    pub fn so_far(&self) -> Option<u64> {
        self.due?;
        let ended = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN);
        let largest = ended.map_or(0, |u| u64::try_from(u.max_rss()).unwrap_or(0) * 1024);
        Some(self.most.max(largest)).filter(|bytes| *bytes > 0)
    }
}

fn file(job: &str) -> String {
    format!("ended-{job}")
}

/// Writes the line of an instance that has ended.
pub fn note(registry: &Registry, record: &Record) {
    let (Some(job), Some(directory)) = (&registry.job, registry.directory()) else {
        return;
    };
    let _lock = directory.lock();
    let mut text = directory.read(&file(job), MAX).unwrap_or_default();
    let _ = writeln!(text, "{}", line(record));
    if text.len() as u64 <= MAX {
        // A full directory costs the line.
        let _ = directory.replace(&file(job), &text);
    }
}

/// The lines of the instances of our job that have ended on this node; they are read once.
pub fn take(registry: &Registry) -> String {
    let (Some(job), Some(directory)) = (&registry.job, registry.directory()) else {
        return String::new();
    };
    let _lock = directory.lock();
    let text = directory.read(&file(job), MAX).unwrap_or_default();
    directory.remove(&file(job));
    String::from_utf8_lossy(&text).into_owned()
}

/// `CAPSID: db: exit 0, 00:12:31, peak 412 MiB`.
fn line(record: &Record) -> String {
    let how = match (record.script.status, record.script.signal) {
        (_, Some(_)) if record.script.oom => "out of memory".into(),
        (Some(status), _) => format!("exit {status}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "ended".into(),
    };
    let seconds = (record.ended_s.unwrap_or(record.created_s) - record.created_s).max(0);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let peak = record.peak.map_or(String::new(), |bytes| {
        format!(", peak {} MiB", bytes.div_ceil(1 << 20))
    });
    format!(
        "CAPSID: {}: {how}, {hours:02}:{minutes:02}:{:02}{peak}",
        record.name,
        seconds % 60
    )
}
