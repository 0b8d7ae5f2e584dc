//! Namespaces that are there already.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};

use super::own;

/// Whether this process may mount in its user namespace, and that one is not the machine's own.
pub fn is_root_of_nested_namespace() -> bool {
    let nested = std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let fields: Vec<&str> = map.split_ascii_whitespace().collect();
        fields != ["0", "0", "4294967295"]
    });
    nested
        && rustix::thread::capabilities(None).is_ok_and(|sets| {
            sets.effective
                .contains(rustix::thread::CapabilitySet::SYS_ADMIN)
        })
}

/// Whether this process may really make a mount namespace: a security module can deny what its capabilities say. Tried in
/// a process of its own.
pub fn has_rights_to_mount() -> bool {
    let flags = nix::sched::CloneFlags::CLONE_NEWNS;
    match super::fork() {
        Ok(super::Fork::Child) => {
            let made = nix::sched::unshare(flags).is_ok();
            super::exit_now(u8::from(!made))
        }
        Ok(super::Fork::Parent(child)) => {
            use nix::sys::wait::{WaitStatus, waitpid};
            matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 0)))
        }
        Err(_) => true,
    }
}

/// The user namespace that a namespace of another kind belongs to (`ioctl_ns(2)`).
///
/// # Errors
/// `EPERM` when it is outside of ours.
pub fn owner_of_namespace(namespace: BorrowedFd) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: takes no argument; the result is a new descriptor, close-on-exec, or negative.
    match unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) } {
        fd if fd >= 0 => Ok(own(fd)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Device and number of a namespace of this kind (`user`, `mnt`, ...) of a process, by a procfs that knows it.
///
/// # Errors
/// When there is no such process, or it may not be looked at.
pub fn namespace(proc: BorrowedFd, pid: u32, kind: &str) -> io::Result<(u64, u64)> {
    let path = format!("{pid}/ns/{kind}");
    let stat = rustix::fs::statat(proc, path, rustix::fs::AtFlags::empty())?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Brings the loopback interface of the current network namespace up (`netdevice(7)`).
///
/// # Errors
/// As the ioctl.
pub fn loopback_up() -> Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .context("cannot open a socket for the loopback interface")?;
    // SAFETY: ifreq is plain data, for which all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the ioctl reads one ifreq, which lives through the call.
    if unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    } != 0
    {
        return Err(io::Error::last_os_error()).context("cannot bring up the loopback interface");
    }
    Ok(())
}
