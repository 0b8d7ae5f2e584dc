//! What a client and an image server say to each other: one request and one answer over a `SOCK_SEQPACKET`
//! Unix socket, so that a message arrives whole or not at all.
//!
//! Request: for each mount point wanted, kind (0 directory, 1 file), length (u16, little-endian), path; with the
//! client's pidfd. Answer: a status byte; when 0, a byte that is 1 when nobody has looked into the view yet, the number of the
//! view (u32, little-endian), one byte a mount point (1 = it was not in the image and has been made) and the descriptors of
//! the user namespace, of the detached mount of all views, and of a pipe that hangs up when the server is gone; when 1, the
//! text of an error. The first one to look into a view says by one more packet of a byte that it has done so.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::sys;
use crate::proc::Held;

/// Part of the socket's name: programs of different versions do not talk to each other.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), ".5");

/// Largest message, bytes. The kernel's default limit for one packet is 208 KiB.
const MAX: usize = 192 << 10;

/// How long there may be too many descriptors on their way.
const CROWDED: Duration = Duration::from_secs(10);
/// Between two tries at most; the first one comes soon.
const PAUSE: Duration = Duration::from_millis(20);

/// Who cannot send since too many descriptors are on their way. Nothing tells when there are fewer, so that it is tried
/// again and again.
#[derive(Default)]
pub struct Crowd {
    since: Option<Instant>,
    last: Duration,
}

impl Crowd {
    /// Waits for a moment; false when that has been done for too long.
    pub fn pause(&mut self) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.last = (self.last * 2).clamp(Duration::from_millis(1), PAUSE);
        std::thread::sleep(self.last);
        since.elapsed() < CROWDED
    }
}

/// Descriptors that one packet carries at most.
const MAX_FDS: usize = 16;

/// A mount point that must exist in the container's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Absolute, inside.
    pub path: PathBuf,
    /// A directory, else an empty file.
    pub directory: bool,
}

/// Encodes the mount points.
///
/// # Errors
/// When there are too many for one message.
pub fn encode_points(points: &[Point]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(512);
    for point in points {
        let path = point.path.as_os_str().as_bytes();
        out.push(u8::from(!point.directory));
        out.extend(
            u16::try_from(path.len())
                .context("a mount point's path is too long")?
                .to_le_bytes(),
        );
        out.extend(path);
    }
    if out.len() > MAX {
        bail!(
            "too many mount points ({}): their paths do not fit into one request of {MAX} bytes",
            points.len()
        );
    }
    Ok(out)
}

/// The inverse; `None` for bytes that no client of ours sends.
pub fn decode_points(mut bytes: &[u8]) -> Option<Vec<Point>> {
    let mut points = Vec::new();
    while let Some((kind, rest)) = bytes.split_first() {
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let (path, rest) = rest.split_at_checked(u16::from_le_bytes(*len).into())?;
        points.push(Point {
            path: Path::new(std::ffi::OsStr::from_bytes(path)).to_owned(),
            directory: *kind == 0,
        });
        bytes = rest;
    }
    Some(points)
}

/// Sends one packet with descriptors. Of one user's processes the kernel lets only so many descriptors be on their way as
/// the sender may have open (`RLIMIT_NOFILE`, unix(7)): where many start together, they wait for each other.
///
/// # Errors
/// As `sendmsg(2)`; `ETOOMANYREFS` after 10 s.
pub fn send(socket: BorrowedFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let mut crowd = Crowd::default();
    loop {
        match send_now(socket, bytes, fds) {
            Err(nix::Error::ETOOMANYREFS) if crowd.pause() => {}
            other => return other,
        }
    }
}

/// The same, once: for the one whom the others may be waiting for.
///
/// # Errors
/// As `sendmsg(2)`.
pub fn send_now(socket: BorrowedFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    again(|| {
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map(drop)
    })
}

/// Repeats what a signal interrupted: a process that was stopped goes on where it was.
fn again<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            other => return other,
        }
    }
}

/// Receives one packet with its descriptors; no bytes at all is the end of the conversation.
///
/// # Errors
/// As `recvmsg(2)`, and `EMFILE` when there was no room for a descriptor.
pub fn receive(socket: BorrowedFd) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    again(|| receive_once(socket))
}

fn receive_once(socket: BorrowedFd) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let (len, fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(nix::Error::EMFILE); // the kernel leaves out what finds no place (unix(7))
        }
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                fds.extend(received.into_iter().map(sys::own));
            }
        }
        (message.bytes, fds)
    };
    bytes.truncate(len);
    Ok((bytes, fds))
}

/// Whether the process at the other end belongs to our user.
pub fn is_own_peer(socket: &OwnedFd) -> bool {
    nix::sys::socket::getsockopt(&socket.as_fd(), nix::sys::socket::sockopt::PeerCredentials)
        .is_ok_and(|peer| peer.uid() == rustix::process::getuid().as_raw())
}

/// Whether the process at the other end belongs to our user and lives in our user namespace. A program in a container has
/// the same user id, and what it shows of itself may be another's: the kernel is asked who it is, and nothing is sent to it
/// before.
///
/// Before Linux 6.5 it is known by its number alone, which counts as long as the connection stands.
pub fn is_fellow(socket: &OwnedFd) -> bool {
    let peer = nix::sys::socket::getsockopt(&socket.as_fd(), PeerCredentials);
    let Ok(peer) = peer.map_err(drop) else {
        return false;
    };
    if peer.uid() != rustix::process::getuid().as_raw() || peer.pid() <= 0 {
        return false;
    }
    let held = match sys::peer_process(socket.as_fd()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Held::child(peer.pid()),
        held => held.ok().map(Held::from),
    };
    let users = |of: &str| std::fs::metadata(format!("/proc/{of}/ns/user"));
    let (Some(held), Ok(own), Ok(theirs)) = (held, users("self"), users(&peer.pid().to_string()))
    else {
        return false;
    };
    // As it still runs, the number was its own when it was looked up.
    (own.dev(), own.ino()) == (theirs.dev(), theirs.ino()) && held.is_alive()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_come_back() {
        let points = vec![
            Point {
                path: "/home/ada".into(),
                directory: true,
            },
            Point {
                path: std::ffi::OsStr::from_bytes(b"/etc/\xff").into(),
                directory: false,
            },
        ];
        let bytes = encode_points(&points).expect("fits");
        assert_eq!(decode_points(&bytes), Some(points));
        assert_eq!(decode_points(&bytes[..bytes.len() - 1]), None);
    }
}
