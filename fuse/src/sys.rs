//! The calls that nothing safe makes: a request to the FUSE device, and giving memory back.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd as _, BorrowedFd};

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
