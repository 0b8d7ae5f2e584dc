//! Where a server is found: a socket in a directory of its user, which nobody else may look into.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};

use crate::engine::runtime::Directory;
use crate::engine::wire;

/// Sockets that are younger are not asked whether their server lives,
const SWEEP_AGE: Duration = Duration::from_secs(10);
/// and not more than so many by each new server.
const SWEEP_MOST: usize = 4;

/// Where a server can be found by others.
pub(super) struct Place {
    pub(super) directory: Option<Directory>,
    name: String,
    pub(super) listener: OwnedFd,
}

/// The server of this name, if there is one that is ours.
pub(super) fn connect_to(directory: &Directory, name: &str) -> Option<OwnedFd> {
    let fd = packet_socket(SockFlag::empty()).ok()?;
    let address = UnixAddr::new(&directory.entry(name)).ok()?;
    connect(fd.as_raw_fd(), &address).ok()?;
    // Only a socket of our own user is listened to, whoever made the file.
    wire::is_own_peer(&fd).then_some(fd)
}

fn packet_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// Binds the server's socket, unless somebody else has by now. From here on others connect and wait for us.
///
/// # Errors
/// When the directory cannot be written to.
pub(super) fn claim(directory: &Directory, name: &str) -> Result<Option<Place>> {
    let _lock = directory.lock();
    if connect_to(directory, name).is_some() {
        return Ok(None);
    }
    directory.remove(name);
    sweep(directory);
    let fd = packet_socket(SockFlag::SOCK_NONBLOCK).context("cannot create a socket")?;
    let address = UnixAddr::new(&directory.entry(name)).context("the socket's address")?;
    let what = || format!("cannot create a socket in {}", directory.path.display());
    bind(fd.as_raw_fd(), &address).with_context(what)?;
    let listening = listen(&fd, Backlog::new(4095).unwrap_or(Backlog::MAXCONN));
    if listening.is_err() {
        directory.remove(name);
    }
    listening.with_context(what)?;
    Ok(Some(Place {
        directory: directory.reopen(),
        name: name.to_owned(),
        listener: fd,
    }))
}

/// Removes what servers left that were killed. Under the lock, so that none is between `bind` and `listen`.
fn sweep(directory: &Directory) {
    let Ok(entries) = std::fs::read_dir(directory.entry(".")) else {
        return;
    };
    // A live server is woken by the question: young ones are not asked, and of the others only a few each time.
    let old = |entry: &std::fs::DirEntry| {
        let made = entry.metadata().and_then(|m| m.modified());
        made.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > SWEEP_AGE))
    };
    let names = entries
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().starts_with(b"image-") && old(entry));
    for name in names.take(SWEEP_MOST).map(|e| e.file_name()) {
        let Some(name) = name.to_str() else { continue };
        if let Ok(fd) = packet_socket(SockFlag::SOCK_NONBLOCK)
            && let Ok(address) = UnixAddr::new(&directory.entry(name))
            && connect(fd.as_raw_fd(), &address) == Err(nix::Error::ECONNREFUSED)
        {
            directory.remove(name);
        }
    }
}

/// Takes the server's name away. Only while the listener is alive: as long as it answers, nobody else can have bound
/// the name.
pub(super) fn leave(place: Option<&Place>) {
    if let Some(place) = place
        && let Some(directory) = &place.directory
    {
        let _lock = directory.lock();
        directory.remove(&place.name);
        // Also ends the waiting of clients that found the name just before.
        let _ = nix::sys::socket::shutdown(
            place.listener.as_raw_fd(),
            nix::sys::socket::Shutdown::Both,
        );
    }
}
