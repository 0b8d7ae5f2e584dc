//! The calls that nothing safe makes: a request to the FUSE device, giving memory back, and the clock of a thread.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::thread::JoinHandleExt as _;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::ioctl::{Setter, ioctl, opcode};

/// `FUSE_DEV_IOC_CLONE`: reads a descriptor's number.
const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);

/// Makes `fresh` a descriptor of the connection of `device` (fuse(4)).
pub(crate) fn join_connection(
    fresh: BorrowedFd<'_>,
    device: BorrowedFd<'_>,
) -> rustix::io::Result<()> {
    let number = device.as_raw_fd().unsigned_abs();
    // SAFETY: the opcode takes a pointer to a u32, which it only reads; that is what `Setter` passes.
    let request = unsafe { Setter::<CLONE, u32>::new(number) };
    // SAFETY: `request` is the argument that this opcode takes, and the kernel keeps nothing of it.
    unsafe { ioctl(fresh, request) }
}

/// Gives freed memory back to the system, where the C library keeps it.
pub(crate) fn give_back() {
    // SAFETY: it only releases what nobody uses, and takes its own locks.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Processor time that a thread has used (pthread_getcpuclockid(3)); none of one that has ended.
pub(crate) fn thread_time(thread: &JoinHandle<()>) -> Duration {
    let mut clock = libc::CLOCK_REALTIME;
    // SAFETY: the handle keeps the thread's number valid, as it is neither joined nor detached while it exists.
    let failed = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
    if failed == 0 {
        clock_time(clock)
    } else {
        Duration::ZERO
    }
}

/// Processor time that this thread has used.
pub(crate) fn own_thread_time() -> Duration {
    clock_time(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock_time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes a timespec to where it is told, and refuses a clock that does not exist.
    let failed = unsafe { libc::clock_gettime(clock, &raw mut time) };
    if failed != 0 {
        return Duration::ZERO;
    }
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}
