//! The threads that answer.
//!
//! One thread answers: that is twice as quick as several that take turns, as each would have to be woken. But a thread that
//! works on a question may wait for the file system, and a file system may be served by the container itself (FUSE), so
//! a second thread watches, and starts further ones when nothing moves or when questions never stop. What fails here is left to the
//! kernel, which gives the program the error that it would have without us. A bug that ends a thread ends this process,
//! and with it the container: a program must not wait for ever.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rustix::thread::CapabilitySets;

use super::super::sys::{self, Answer, Notification};
use super::Extent;
use super::acl::Lists;
use super::credentials::{Credentials, Ids, Refused, Table};
use super::filter::{self, Call};
use super::owners::Owners;
use super::tracee::Tracee;
use super::view::{self, View};

/// What is learnt about this process before the container is made.
#[derive(Debug)]
pub struct Host {
    /// The host's procfs.
    pub proc: OwnedFd,
    /// The timer slack that the container begins with, nanoseconds.
    pub slack: u64,
    /// Device and number of the user namespace.
    pub userns: (u64, u64),
    /// This process's.
    pub capabilities: CapabilitySets,
}

/// What all threads share.
#[derive(Debug)]
pub struct Shared {
    /// Gives the questions.
    pub listener: OwnedFd,
    /// What is asked.
    pub extent: Extent,
    /// The host's procfs.
    pub proc: OwnedFd,
    /// The container's root.
    pub root: OwnedFd,
    /// What the container began with.
    pub slack: u64,
    /// Device and number of the container's user namespace, and the supervisor's.
    pub userns: (u64, u64),
    /// The supervisor's.
    pub capabilities: CapabilitySets,
    owners: Mutex<Owners>,
    /// Nothing is recorded: the common case is decided without a lock.
    pub has_owners: AtomicBool,
    acls: Mutex<Lists>,
    table: Mutex<Table>,
    /// Some thread was ever somebody else than root.
    pub has_credentials: AtomicBool,
    /// Some process may have a root or mounts of its own.
    pub is_apart: AtomicBool,
    /// All of some process, or one whose calls are not understood, confined itself by Landlock.
    pub is_confined: AtomicBool,
    /// Threads that work on a question.
    busy: AtomicUsize,
    /// Threads that answer.
    threads: AtomicUsize,
    /// Questions answered.
    answered: AtomicUsize,
}

/// Most threads. Each further one is there because all others wait for something,
const MAX_THREADS: usize = 64;
/// or, up to so many, because one cannot keep up with a container of many processes.
const MAX_HELPERS: usize = 8;
/// How often the watch looks. A container that blocks its supervisor waits for a few of these.
const LOOK: Duration = Duration::from_millis(10);
/// All threads worked on the same questions at so many looks: they wait.
const STUCK_LOOKS: u32 = 5;
/// A question waited at so many looks: there are too many.
const CROWDED_LOOKS: u32 = 20;
/// What a thread needs: the deepest call keeps a path of 4 KiB and three structures.
const STACK_BYTES: usize = 256 << 10;

impl Shared {
    /// With everything that is known at the start: the record, who gives the questions, and the container's root.
    pub fn new(
        owners: Owners,
        extent: Extent,
        host: Host,
        listener: OwnedFd,
        root: OwnedFd,
    ) -> Shared {
        Shared {
            extent,
            listener,
            proc: host.proc,
            root,
            slack: host.slack,
            userns: host.userns,
            capabilities: host.capabilities,
            has_owners: AtomicBool::new(!owners.is_empty()),
            owners: Mutex::new(owners),
            acls: Mutex::default(),
            table: Mutex::default(),
            has_credentials: AtomicBool::new(false),
            // Nobody tells of roots where only devices are asked about.
            is_apart: AtomicBool::new(extent == Extent::Devices),
            is_confined: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            answered: AtomicUsize::new(0),
        }
    }

    /// The record.
    pub fn owners(&self) -> MutexGuard<'_, Owners> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The access control lists that the kernel does not have.
    pub fn acls(&self) -> MutexGuard<'_, Lists> {
        self.acls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The credentials in use.
    pub fn credentials(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts answering; returns when the first thread is ready.
///
/// # Errors
/// When the container's root cannot be entered.
pub fn start(shared: &Arc<Shared>) -> Result<()> {
    sys::answer_on_same_processor(shared.listener.as_fd());
    let (ready, first) = mpsc::channel();
    spawn(shared, move |result| {
        let _ = ready.send(result);
    })?;
    first.recv().context("the supervisor's thread is gone")??;
    let own = Arc::clone(shared);
    std::thread::Builder::new()
        .name("owners-watch".into())
        .stack_size(STACK_BYTES)
        .spawn(move || watch(&own))
        .map(drop)
        .context("cannot start a thread")
}

fn spawn(shared: &Arc<Shared>, ready: impl FnOnce(Result<()>) + Send + 'static) -> Result<()> {
    let own = Arc::clone(shared);
    shared.threads.fetch_add(1, Ordering::AcqRel);
    let spawned = std::thread::Builder::new()
        .name("owners".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _guard = Guard;
            let entered = enter(&own);
            let good = entered.is_ok();
            ready(entered);
            if good {
                serve(&own);
            }
        });
    if spawned.is_err() {
        shared.threads.fetch_sub(1, Ordering::AcqRel);
    }
    spawned.map(drop).context("cannot start a thread")
}

/// Starts further threads when those that there are do not suffice; ends when nobody can ask any more.
fn watch(shared: &Arc<Shared>) {
    let _guard = Guard;
    let most = std::thread::available_parallelism().map_or(1, usize::from) / 2;
    let (mut before, mut stuck, mut crowded) = (0, 0, 0);
    loop {
        std::thread::sleep(LOOK);
        let mut set = [PollFd::new(shared.listener.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut set, PollTimeout::ZERO);
        let seen = set[0].revents().unwrap_or(PollFlags::empty());
        if seen.contains(PollFlags::POLLHUP) {
            return;
        }
        let threads = shared.threads.load(Ordering::Acquire);
        let answered = shared.answered.load(Ordering::Acquire);
        let waits = seen.contains(PollFlags::POLLIN);
        let still = answered == before && shared.busy.load(Ordering::Acquire) == threads;
        before = answered;
        stuck = if waits && still { stuck + 1 } else { 0 };
        crowded = if waits { crowded + 1 } else { 0 };
        let helpful = crowded >= CROWDED_LOOKS && threads < most.min(MAX_HELPERS);
        if (stuck >= STUCK_LOOKS && threads < MAX_THREADS) || helpful {
            // Without a further thread the others go on alone.
            let _ = spawn(shared, |_| ());
            (stuck, crowded) = (0, 0);
        }
    }
}

/// Ends the process when its thread panics.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            sys::exit_now(255);
        }
    }
}

fn enter(shared: &Shared) -> Result<()> {
    unshare(CloneFlags::CLONE_FS).context("cannot give a thread a root of its own (unshare)")?;
    view::enter(&shared.root).context("cannot enter the container's root (chroot)")
}

fn serve(shared: &Arc<Shared>) {
    let listener = shared.listener.as_fd();
    loop {
        let note = match sys::receive_notification(listener) {
            Ok(note) => note,
            // Who asked was killed; or all are gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                let mut set = [PollFd::new(listener, PollFlags::empty())];
                let _ = poll(&mut set, PollTimeout::ZERO);
                let hung_up = set[0]
                    .revents()
                    .is_some_and(|r| r.contains(PollFlags::POLLHUP));
                if hung_up {
                    return;
                }
                continue;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        shared.busy.fetch_add(1, Ordering::AcqRel);
        let answer = decide(shared, note);
        // ENOENT: it was killed, or a signal took it out of the call.
        let _ = sys::answer(listener, note.id, answer);
        shared.busy.fetch_sub(1, Ordering::AcqRel);
        shared.answered.fetch_add(1, Ordering::AcqRel);
    }
}

fn decide(shared: &Shared, note: Notification) -> Answer {
    let tracee = Tracee { shared, note };
    let Some(call) = filter::call(&note) else {
        return Answer::Continue;
    };
    let answer = match call {
        Call::Root => {
            shared.is_apart.store(true, Ordering::Release);
            None
        }
        Call::TimerSlack => Some(Answer::Value(0)),
        Call::KeepCapabilities(keep) => {
            let now = tracee.credentials();
            if now.keep != keep {
                let mut new = Credentials::clone(&now);
                new.keep = keep;
                let _ = tracee.set_credentials(new);
            }
            None
        }
        Call::Execute => {
            let now = tracee.credentials();
            let new = now.executed();
            if new != *now {
                let _ = tracee.set_credentials(new);
            }
            None
        }
        Call::Landlock(flags) => {
            confine(&tracee, flags);
            None
        }
        Call::Identity => tracee.identity(),
        Call::Stat(..) | Call::Statx(..) if !shared.has_owners.load(Ordering::Acquire) => None,
        file => View::enter(&tracee).and_then(|view| view.file(file)),
    };
    answer.unwrap_or(Answer::Continue)
}

/// `landlock_restrict_self(2)`: from now on the thread makes its files itself. If the call fails, that costs their owners.
fn confine(tracee: &Tracee, flags: u32) {
    // LOG_SAME_EXEC_OFF, LOG_NEW_EXEC_ON, LOG_SUBDOMAINS_OFF: a flag beyond these may be about more than this thread.
    const KNOWN: u32 = 7;
    let mut new = Credentials::clone(&tracee.credentials());
    new.confined = true;
    let whole = tracee.shared.extent == Extent::Devices || flags & !KNOWN != 0;
    if whole || tracee.set_credentials(new).is_none() {
        tracee.shared.is_confined.store(true, Ordering::Release);
    }
}

/// Most groups of a process (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65536;

impl Tracee<'_> {
    /// The calls of `credentials(7)`. `None`: the kernel's answer, root, is right.
    fn identity(&self) -> Option<Answer> {
        let number = i64::from(self.note.number);
        if !self.shared.has_credentials.load(Ordering::Acquire) && is_question(number) {
            return None;
        }
        let now = self.credentials();
        let value = |id: u32| Some(Answer::Value(id.into()));
        match number {
            libc::SYS_getuid => value(now.uid.real),
            libc::SYS_geteuid => value(now.uid.effective),
            libc::SYS_getgid => value(now.gid.real),
            libc::SYS_getegid => value(now.gid.effective),
            libc::SYS_getresuid => self.tell(&now.uid),
            libc::SYS_getresgid => self.tell(&now.gid),
            // Root's own groups are the kernel's.
            libc::SYS_getgroups if now.is_first() => None,
            libc::SYS_getgroups => self.tell_groups(&now.groups),
            libc::SYS_setfsuid | libc::SYS_setfsgid => self.set_fs(&now),
            _ => Some(match self.changed(&now) {
                Err(Refused::Permission) => Answer::Error(libc::EPERM),
                Err(Refused::Invalid) => Answer::Error(libc::EINVAL),
                Ok(new) if new == *now => Answer::Value(0),
                Ok(new) => match self.set_credentials(new) {
                    Some(()) => Answer::Value(0),
                    None => Answer::Error(libc::EAGAIN),
                },
            }),
        }
    }

    fn changed(&self, now: &Credentials) -> Result<Credentials, Refused> {
        // The kernel takes 32 bits.
        let [a, b, c, ..] = self.note.args.map(|arg| arg as u32);
        let privileged = now.is_privileged();
        let mut new = now.clone();
        match i64::from(self.note.number) {
            libc::SYS_setuid => new = now.with_uid(now.uid.set(a, privileged)?),
            libc::SYS_setgid => new.gid = now.gid.set(a, privileged)?,
            libc::SYS_setreuid => new = now.with_uid(now.uid.set_two(a, b, privileged)?),
            libc::SYS_setregid => new.gid = now.gid.set_two(a, b, privileged)?,
            libc::SYS_setresuid => new = now.with_uid(now.uid.set_three([a, b, c], privileged)?),
            libc::SYS_setresgid => new.gid = now.gid.set_three([a, b, c], privileged)?,
            libc::SYS_setgroups if privileged => new.groups = self.groups()?,
            _ => return Err(Refused::Permission),
        }
        Ok(new)
    }

    fn groups(&self) -> Result<Vec<u32>, Refused> {
        let [count, address, ..] = self.note.args;
        let count = (count as u32) as usize;
        if count > MAX_GROUPS {
            return Err(Refused::Invalid);
        }
        let bytes = match count {
            0 => Vec::new(),
            _ => self
                .read_exact(address, count * 4)
                .ok_or(Refused::Invalid)?,
        };
        let mut groups: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        groups.sort_unstable(); // as the kernel keeps them
        Ok(groups)
    }

    fn set_fs(&self, now: &Credentials) -> Option<Answer> {
        let id = self.note.args[0] as u32;
        let mut new = now.clone();
        let before = if i64::from(self.note.number) == libc::SYS_setfsuid {
            new.uid = now.uid.set_fs(id, now.is_privileged());
            now.uid.fs
        } else {
            new.gid = now.gid.set_fs(id, now.is_privileged());
            now.gid.fs
        };
        if new != *now {
            let _ = self.set_credentials(new);
        }
        Some(Answer::Value(before.into()))
    }

    fn tell(&self, ids: &Ids) -> Option<Answer> {
        let values = [ids.real, ids.effective, ids.saved];
        for (address, id) in self.note.args.iter().zip(values) {
            if self.write(*address, &id.to_ne_bytes()).is_none() {
                return Some(Answer::Error(libc::EFAULT));
            }
        }
        Some(Answer::Value(0))
    }

    fn tell_groups(&self, groups: &[u32]) -> Option<Answer> {
        let [size, address, ..] = self.note.args;
        let count = i64::try_from(groups.len()).ok()?;
        if size as i32 == 0 {
            return Some(Answer::Value(count));
        }
        if i64::from(size as i32) < count {
            return Some(Answer::Error(libc::EINVAL));
        }
        let bytes: Vec<u8> = groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
        if !bytes.is_empty() && self.write(address, &bytes).is_none() {
            return Some(Answer::Error(libc::EFAULT));
        }
        Some(Answer::Value(count))
    }
}

fn is_question(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_getuid
            | libc::SYS_geteuid
            | libc::SYS_getgid
            | libc::SYS_getegid
            | libc::SYS_getresuid
            | libc::SYS_getresgid
            | libc::SYS_getgroups
    )
}
