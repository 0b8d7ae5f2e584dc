//! Filters of system calls (`seccomp(2)`): their instructions, and how they are installed.
//!
//! The offsets are those of `struct seccomp_data`: the number at 0, the architecture at 4, arguments from 16 on, 8 bytes
//! each, of which the low half is looked at (little-endian).

use std::io;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// `AUDIT_ARCH_*` of `linux/audit.h`; `None` where the numbers are not known here.
pub const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

/// That of 32-bit programs on the same machine.
pub const ARCHITECTURE_32: u32 = if cfg!(target_arch = "x86_64") {
    0x4000_0003
} else {
    0x4000_0028
};

const fn op(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

/// Looks at the number of the call.
pub const fn load_number() -> sock_filter {
    op(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0)
}

/// Looks at the architecture.
pub const fn load_architecture() -> sock_filter {
    op(BPF_LD | BPF_W | BPF_ABS, 0, 0, 4)
}

/// Looks at an argument.
pub const fn load_argument(index: u32) -> sock_filter {
    op(BPF_LD | BPF_W | BPF_ABS, 0, 0, 16 + 8 * index)
}

/// Skips so many instructions when what is looked at is `value`, and so many when not.
pub const fn if_equal(value: u32, then: u8, otherwise: u8) -> sock_filter {
    op(BPF_JMP | BPF_JEQ | BPF_K, then, otherwise, value)
}

/// Goes on with the next instruction when a bit of `bits` is set, and skips one when none is.
pub const fn if_set(bits: u32) -> sock_filter {
    op(BPF_JMP | BPF_JSET | BPF_K, 0, 1, bits)
}

/// Ends with this action, `SECCOMP_RET_*`.
pub const fn end(action: u32) -> sock_filter {
    op(BPF_RET | BPF_K, 0, 0, action)
}

/// Ends with an error, a number of `errno(3)`.
pub const fn refuse(errno: i32) -> sock_filter {
    end(libc::SECCOMP_RET_ERRNO | errno.cast_unsigned())
}

/// Installs a filter for this thread and all that it starts; returns what the call returned. Speculation mitigations that
/// seccomp brings before Linux 5.16 are declined: they slow the payload and guard nothing here.
///
/// # Errors
/// As the call.
pub(super) fn install(filter: &[sock_filter], flags: libc::c_ulong) -> io::Result<i32> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and the filter it points to live through the call; the kernel copies them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
    match i32::try_from(done) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
