//! System calls that a supervisor answers (`seccomp_unotify(2)`).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use super::{own, seccomp};

/// A system call that waits for the supervisor's word (`struct seccomp_notif`).
#[derive(Debug, Clone, Copy)]
pub struct Notification {
    /// Of this call, until it is answered.
    pub id: u64,
    /// The thread that calls.
    pub thread: u32,
    /// Whose numbers it uses, `AUDIT_ARCH_*`.
    pub architecture: u32,
    /// Number of the call.
    pub number: i32,
    /// Its arguments.
    pub args: [u64; 6],
}

/// The supervisor's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The kernel carries the call out.
    Continue,
    /// The call returns this.
    Value(i64),
    /// The call fails with this number of `errno(3)`.
    Error(i32),
}

/// Whether the kernel can ask a supervisor (`seccomp_unotify(2)`, Linux 5.0).
pub fn has_notifications() -> bool {
    let action: u32 = libc::SECCOMP_RET_USER_NOTIF;
    // SAFETY: the kernel reads one u32, which lives through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    done == 0
}

/// Installs a filter for this thread and all that it starts; the descriptor gives its questions. A call that a
/// supervisor works on is not interrupted by signals where the kernel can do that (Linux 5.19).
///
/// # Errors
/// `EBUSY` when a supervisor watches this process already.
pub fn install_listener(filter: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let basic = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    let install = |flags| seccomp::install(filter, flags).map(own);
    match install(basic | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(basic),
        other => other,
    }
}

/// The kernel wakes the other side on the same processor (Linux 6.6): a question and its answer are one after the other.
pub fn answer_on_same_processor(listener: BorrowedFd) {
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: the ioctl takes its argument by value.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS,
            SYNC_WAKE_UP,
        )
    };
}

/// Waits for a question.
///
/// # Errors
/// `ENOENT` when who asked has died, `EINTR` after a signal.
pub fn receive_notification(listener: BorrowedFd) -> io::Result<Notification> {
    /// Room for what later kernels add.
    #[repr(C)]
    struct Room {
        notification: libc::seccomp_notif,
        more: [u64; 32],
    }
    // SAFETY: plain data, for which all zeroes are a valid value; the kernel demands zeroes.
    let mut room: Room = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl writes one seccomp_notif, of the size in its number, into the room.
    let done = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut room,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let note = &room.notification;
    Ok(Notification {
        id: note.id,
        thread: note.pid,
        architecture: note.data.arch,
        number: note.data.nr,
        args: note.data.args,
    })
}

/// Whether the question still stands: who asked lives, and waits.
pub fn is_pending(listener: BorrowedFd, id: u64) -> bool {
    // SAFETY: the ioctl reads one u64, which lives through the call.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
            &raw const id,
        ) == 0
    }
}

/// Answers a question.
///
/// # Errors
/// `ENOENT` when who asked is gone.
pub fn answer(listener: BorrowedFd, id: u64, answer: Answer) -> io::Result<()> {
    let (val, error, flags) = match answer {
        Answer::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Answer::Value(value) => (value, 0, 0),
        Answer::Error(error) => (0, -error, 0),
    };
    let response = libc::seccomp_notif_resp {
        id,
        val,
        error,
        flags,
    };
    // SAFETY: the ioctl reads one seccomp_notif_resp, which lives through the call.
    let done = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw const response,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives who asked a copy of an open file, as its lowest free descriptor with these flags (`O_CLOEXEC` or none).
///
/// # Errors
/// `EMFILE` when it has too many.
pub fn give_descriptor(
    listener: BorrowedFd,
    id: u64,
    file: BorrowedFd,
    flags: i32,
) -> io::Result<i32> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: 0,
        srcfd: file.as_raw_fd().cast_unsigned(),
        newfd: 0,
        newfd_flags: flags.cast_unsigned(),
    };
    // SAFETY: the ioctl reads one seccomp_notif_addfd, which lives through the call.
    let fd = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_ADDFD,
            &raw const request,
        )
    };
    if fd >= 0 {
        Ok(fd)
    } else {
        Err(io::Error::last_os_error())
    }
}
