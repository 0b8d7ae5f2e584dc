//! Signals: dispositions, sets, and one that carries a number.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

use crate::proc::Held;

/// The signal by which process 1 of an instance is asked to stop it: `SIGRTMIN` of the kernel plus 3, as system managers
/// use for a halt. The C library's own real-time signals lie below.
pub const STOP_SIGNAL: i32 = 37;

/// A set of signals by number, real-time ones too.
pub fn signal_set(signals: impl IntoIterator<Item = i32>) -> SigSet {
    let mut set = SigSet::empty();
    for signal in signals {
        let mut raw = *set.as_ref();
        // SAFETY: the set was initialised by `empty`, and what `sigaddset` makes of it is a valid set.
        set = unsafe {
            libc::sigaddset(&raw mut raw, signal);
            SigSet::from_sigset_t_unchecked(raw)
        };
    }
    set
}

/// The signals that have come and are blocked (`sigpending(2)`).
pub fn pending_signals() -> SigSet {
    let mut raw = *SigSet::empty().as_ref();
    // SAFETY: the call fills the set, which was initialised by `empty` before, so that it is valid in any case.
    unsafe {
        libc::sigpending(&raw mut raw);
        SigSet::from_sigset_t_unchecked(raw)
    }
}

/// Sends a signal with a number attached, as `sigqueue(3)` does, to exactly the process that is held.
///
/// # Errors
/// `ESRCH` when it has ended, `EPERM` when it is somebody else's.
pub fn queue_signal(process: &Held, signal: i32, value: i32) -> io::Result<()> {
    /// The head of `siginfo_t` for `SI_QUEUE` (`sigaction(2)`), padded to its 128 bytes.
    #[repr(C)]
    struct Queued {
        number: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: u64,
        rest: [u64; 12],
    }
    let info = Queued {
        number: signal,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        pid: rustix::process::getpid().as_raw_nonzero().get(),
        uid: rustix::process::getuid().as_raw(),
        value: u64::from(value.cast_unsigned()),
        rest: [0; 12],
    };
    // SAFETY: the structure has the size and layout of siginfo_t on 64-bit machines and lives through the call.
    let mut done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_fd().as_raw_fd(),
            signal,
            &raw const info,
            0,
        )
    };
    // As `Held::try_signal`.
    if done != 0
        && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS)
        && let Some(pid) = process.number()
    {
        // SAFETY: as above.
        done = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &raw const info) };
    }
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Signals that this process ignores from now on.
pub fn ignore_signals(ignored: &[Signal]) {
    for number in ignored {
        // SAFETY: SIG_IGN runs no code of ours.
        let _ = unsafe { signal(*number, SigHandler::SigIgn) };
    }
}

/// Gives a signal its default disposition, for ending ourselves by it.
pub fn default_signal(number: Signal) {
    // SAFETY: SIG_DFL runs no code of ours.
    let _ = unsafe { signal(number, SigHandler::SigDfl) };
}

/// Gives every signal its default disposition, whatever the caller ignored: for a service that nobody's shell started.
pub fn default_signals() {
    for number in Signal::iterator() {
        if !matches!(number, Signal::SIGKILL | Signal::SIGSTOP) {
            default_signal(number);
        }
    }
}

/// While this lives, a write beyond the limit of a file's size (`RLIMIT_FSIZE`) fails and does not end the process.
pub struct LimitsFail(Option<SigHandler>);

impl LimitsFail {
    /// From now on.
    pub fn begin() -> LimitsFail {
        // SAFETY: SIG_IGN runs no code of ours.
        LimitsFail(unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.ok())
    }
}

impl Drop for LimitsFail {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            // SAFETY: this was the disposition before, so it is fit to be one.
            let _ = unsafe { signal(Signal::SIGXFSZ, before) };
        }
    }
}

/// Whether the caller ignored `SIGCHLD`.
static CHILDREN_IGNORED: AtomicBool = AtomicBool::new(false);

/// Gives `SIGCHLD` its default disposition: where it is ignored, nobody can wait for a child (`wait(2)`).
pub fn watch_children() {
    // SAFETY: SIG_DFL runs no code of ours.
    let before = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
    CHILDREN_IGNORED.store(matches!(before, Ok(SigHandler::SigIgn)), Ordering::Relaxed);
}

/// Whether a write beyond `RLIMIT_FSIZE` ended the caller's programs.
static FILE_LIMIT_ENDS: AtomicBool = AtomicBool::new(false);

/// A write beyond the limit of a file's size fails from now on, and is told like every other failure.
pub fn outlive_file_limit() {
    // SAFETY: SIG_IGN runs no code of ours.
    let before = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    FILE_LIMIT_ENDS.store(matches!(before, Ok(SigHandler::SigDfl)), Ordering::Relaxed);
}

/// Gives the payload the dispositions of `SIGCHLD` and `SIGXFSZ` that the caller had.
pub fn restore_signals() {
    if CHILDREN_IGNORED.load(Ordering::Relaxed) {
        ignore_signals(&[Signal::SIGCHLD]);
    }
    if FILE_LIMIT_ENDS.load(Ordering::Relaxed) {
        default_signal(Signal::SIGXFSZ);
    }
}
