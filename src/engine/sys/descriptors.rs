//! The descriptor table: what is there at the start, and what the next program gets.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context as _, Result};

use super::own;

/// Makes descriptors 0, 1 and 2 exist, so that nothing that we open lands on them.
pub fn open_standard_descriptors() {
    for fd in 0..3 {
        // SAFETY: fcntl(F_GETFD) on a number has no effect beyond its answer.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // SAFETY: a valid C string; the lowest free number is `fd`, as all below are open.
            unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
        }
    }
}

/// Points 0, 1 and 2 at `/dev/null`.
pub fn detach_standard_descriptors() {
    // SAFETY: a valid C string; dup2 onto the standard descriptors of this process, then close of our own.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            for fd in 0..3 {
                libc::dup2(null, fd);
            }
            if null > 2 {
                libc::close(null);
            }
        }
    }
}

/// Closes every descriptor from 3 on that is not in `keep` (sorted).
pub fn close_all_but(keep: &[RawFd]) {
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: the process owns its descriptor table, and nothing uses the closed ones afterwards: this
            // is called once, in a new process, which names what it still needs in `keep`.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    };
    let mut from = 3u32;
    for fd in keep
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .filter(|fd| *fd >= 3)
    {
        close(from, fd.saturating_sub(1));
        from = fd + 1;
    }
    close(from, u32::MAX);
}

/// Marks the directories among the caller's descriptors close-on-exec: a directory of the host must never become a way
/// out of the container. Called first of all, while nothing of ours is open and /proc is the host's; where there is none,
/// no descriptor is let through.
///
/// # Errors
/// Without /proc before Linux 5.11.
pub fn guard_directories() -> Result<()> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return close_on_exec();
    };
    let open: Vec<RawFd> = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // SAFETY: the number was just listed as open; if it was the listing's own it is closed by now and the
        // call fails with EBADF, which is ignored.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if rustix::fs::fstat(fd)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir())
        {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)
                .context("cannot keep a directory back")?;
        }
    }
    Ok(())
}

/// Marks every descriptor but the standard ones close-on-exec.
///
/// # Errors
/// Before Linux 5.11.
pub fn close_on_exec() -> Result<()> {
    // SAFETY: a flag of descriptors changes, and no memory is passed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context("cannot keep descriptors back (close_range)")
    }
}

/// The program that is started next inherits this descriptor.
///
/// # Errors
/// As `fcntl(2)`.
pub fn inherit(fd: &impl std::os::fd::AsFd) -> Result<()> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).context("cannot hand a descriptor on")
}

/// The process at the other end of a Unix socket, as it was when it connected or began to listen (`SO_PEERPIDFD`).
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.5; others when that process is gone.
pub fn peer_process(socket: BorrowedFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int and the length, which both live through the call.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if done != 0 || fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(own(fd))
}
