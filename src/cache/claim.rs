//! Claims: a file that says which process is fetching something, so that others wait instead of fetching it too.
//!
//! No lock of the file system is used, since network file systems have none to rely on. A claim is a file made by
//! `O_EXCL`, whose text names its process by host, boot, pid namespace, pid and start time; it is touched every few
//! seconds. It is void when its process is known to have died, or, for a process of another machine, when it has not
//! been touched for a minute by the waiting machine's own clock. Two processes that both believe a claim is theirs do
//! work twice, and nothing worse.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use crate::{proc, say};

/// How often a claim is touched.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// A claim of another machine that was not touched for so long is void.
const SILENCE: Duration = Duration::from_secs(60);
/// How often a waiting process looks.
const LOOK: Duration = Duration::from_millis(100);

/// What [`obtain`] gives.
pub enum Obtained {
    /// It is there.
    Ready(PathBuf),
    /// It is to be made by the caller, who holds the claim until then.
    Claimed(Claim),
}

/// A process, as another one can recognise it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    /// Machine, its boot, and the pid namespace.
    place: String,
    pid: i32,
    /// Start time in clock ticks.
    pub(super) started: u64,
}

impl Writer {
    /// This process.
    pub fn own() -> Writer {
        let pid = std::process::id().cast_signed();
        Writer {
            place: own_place(),
            pid,
            started: proc::stat_field(pid, 22).unwrap_or(0),
        }
    }

    /// What [`Writer`]'s `Display` has written.
    pub fn parse(text: &str) -> Option<Writer> {
        let mut parts = text.rsplitn(3, '+');
        let started = parts.next()?.parse().ok()?;
        let pid = parts.next()?.parse().ok()?;
        Some(Writer {
            place: parts.next()?.to_owned(),
            pid,
            started,
        })
    }

    /// Whether it lives; `None` when that cannot be told from here.
    pub fn is_alive(&self) -> Option<bool> {
        (self.place == own_place()).then(|| proc::stat_field(self.pid, 22) == Some(self.started))
    }
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}+{}+{}", self.place, self.pid, self.started)
    }
}

/// Where process numbers mean the same as here.
fn own_place() -> String {
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let host: String = host
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-' || *c == '.')
        .take(64)
        .collect();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let namespace: String = namespace
        .to_string_lossy()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    let boot = proc::boot_id();
    format!("{host}-{}-{namespace}", boot.get(..8).unwrap_or("boot"))
}

/// The right and duty to make something; given back by dropping it.
pub struct Claim {
    path: PathBuf,
    text: String,
    stop: Option<Sender<()>>,
    heart: Option<JoinHandle<()>>,
}

impl Claim {
    fn new(path: PathBuf, text: String) -> Claim {
        let (stop, stopped) = mpsc::channel();
        let touched = path.clone();
        let heart = std::thread::Builder::new()
            .name("claim".into())
            .spawn(move || {
                while stopped.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
                    let now = SystemTime::now();
                    // Whoever has taken it over will be done soon.
                    let _ = File::options()
                        .write(true)
                        .open(&touched)
                        .and_then(|f| f.set_modified(now));
                }
            });
        Claim {
            path,
            text,
            stop: Some(stop),
            heart: heart.ok(),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(heart) = self.heart.take() {
            // It does nothing that could panic.
            let _ = heart.join();
        }
        let mut drafts = super::drafts();
        drafts.remove(&self.path);
        if fs::read_to_string(&self.path).is_ok_and(|text| text == self.text) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What a waiting process has seen of a claim.
struct Seen {
    text: String,
    touched: Option<SystemTime>,
    since: Instant,
}

/// Gives what `ready` finds, or the claim to it, a file in `directory`. What it is made from lies in `drafts` for a moment.
///
/// # Errors
/// When the directories cannot be written.
pub fn obtain(
    directory: &Path,
    drafts: &Path,
    name: &str,
    ready: &dyn Fn() -> Option<PathBuf>,
) -> Result<Obtained> {
    let path = directory.join(name);
    let own = format!("{}~{}", Writer::own(), uuid::Uuid::new_v4());
    let mut seen: Option<Seen> = None;
    loop {
        if let Some(found) = ready() {
            return Ok(Obtained::Ready(found));
        }
        match create(&path, drafts, &own) {
            Ok(()) => {
                let claim = Claim::new(path, own);
                // Whoever held it before may have just finished.
                return Ok(match ready() {
                    Some(found) => Obtained::Ready(found),
                    None => Obtained::Claimed(claim),
                });
            }
            Err(error) if is_taken(&error) => {}
            Err(error) => return Err(error),
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        let touched = fs::metadata(&path).and_then(|m| m.modified()).ok();
        match &seen {
            Some(seen) if (&seen.text, seen.touched) == (&text, touched) => {
                if is_void(seen) {
                    say::debug(format_args!("{}: its holder has died", path.display()));
                    take_away(&path, drafts, &text);
                }
            }
            before => {
                if before.is_none() {
                    say::verbose(format_args!(
                        "waiting for another process that fetches {name}"
                    ));
                }
                seen = Some(Seen {
                    text,
                    touched,
                    since: Instant::now(),
                });
            }
        }
        std::thread::sleep(LOOK);
    }
}

/// Makes a claim, which goes with the process when a signal ends it.
fn create(path: &Path, drafts: &Path, text: &str) -> Result<()> {
    let what = || format!("cannot create {}", path.display());
    // Written beside and linked, so that nobody sees a claim without a holder.
    let draft = super::Draft::new(drafts)?;
    let linked = (&draft.file).write_all(text.as_bytes()).and_then(|()| {
        let mut drafts = super::drafts();
        match fs::hard_link(draft.path(), path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                // A file system without hard links: the claim is without a holder for a moment.
                File::create_new(path).and_then(|mut file| file.write_all(text.as_bytes()))
            }
            other => other,
        }?;
        drafts.insert(path.to_owned());
        Ok(())
    });
    draft.remove();
    linked.with_context(what)
}

fn is_taken(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::AlreadyExists)
}

fn is_void(seen: &Seen) -> bool {
    let writer = Writer::parse(seen.text.split('~').next().unwrap_or_default());
    match writer.and_then(|w| w.is_alive()) {
        Some(alive) => !alive,
        None => seen.since.elapsed() > SILENCE,
    }
}

/// Removes a void claim, and only that one.
fn take_away(path: &Path, drafts: &Path, text: &str) {
    let aside = super::draft_path(drafts);
    if fs::rename(path, &aside).is_err() {
        return;
    }
    if fs::read_to_string(&aside).is_ok_and(|found| found != text) {
        // It was another's, made a moment ago.
        let _ = fs::hard_link(&aside, path);
    }
    let _ = fs::remove_file(&aside);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> Option<PathBuf> {
        None
    }

    #[test]
    fn writers_are_recognised() {
        let own = Writer::own();
        assert_eq!(Writer::parse(&own.to_string()), Some(own.clone()));
        assert_eq!(own.is_alive(), Some(true));
        let dead = Writer {
            started: own.started + 1,
            ..own.clone()
        };
        assert_eq!(dead.is_alive(), Some(false));
        let elsewhere = Writer {
            place: "other-host".into(),
            ..own
        };
        assert_eq!(elsewhere.is_alive(), None);
    }

    #[test]
    fn claim_of_a_dead_process_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut dead = Writer::own();
        dead.started += 1;
        create(&dir.path().join("x"), dir.path(), &format!("{dead}~1")).unwrap();
        let obtained = obtain(dir.path(), dir.path(), "x", &none).unwrap();
        assert!(matches!(obtained, Obtained::Claimed(_)));
        drop(obtained);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn claim_of_a_living_process_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let Obtained::Claimed(claim) = obtain(dir.path(), dir.path(), "x", &none).unwrap() else {
            panic!("nobody else claims it");
        };
        let made = dir.path().join("made");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                obtain(dir.path(), dir.path(), "x", &|| {
                    made.exists().then(|| made.clone())
                })
                .unwrap()
            });
            std::thread::sleep(Duration::from_millis(300));
            assert!(!waiting.is_finished(), "it waits");
            fs::write(&made, "").unwrap();
            drop(claim);
            assert!(matches!(waiting.join().unwrap(), Obtained::Ready(_)));
        });
    }
}
