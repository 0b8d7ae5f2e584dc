//! The keeper: holds what a worker that takes over needs, starts workers, and waits.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::mount::{Prepared, prepare};
use super::worker::work;
use super::{Image, Place};
use crate::engine::sys::{self, Fork};
use crate::engine::wire;

/// A worker that dies this often within [`RESTART_WINDOW`] is not replaced any more.
const RESTARTS: usize = 3;
const RESTART_WINDOW: Duration = Duration::from_secs(10);

/// There when the server has left its name, which is not to be listened to any more.
pub(super) const LEFT: &str = "/left";
/// There when the worker has ended by itself.
const ENDED: &str = "/ended";

/// The keeper: makes namespaces and mount, starts workers. Does not return.
pub(super) fn keep(image: &Image, place: Option<&Place>, first: OwnedFd) {
    let _ = rustix::process::setsid();
    let ready = prepare(image, place, &first);
    let prepared = match ready {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&first, place, &error),
    };
    let keeper = Keeper {
        image,
        prepared: &prepared,
        place,
        users: Vec::new(),
        deaths: Vec::new(),
    };
    keeper.run(Some(first));
}

/// Holds what a worker that takes over needs.
pub(super) struct Keeper<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) prepared: &'a Prepared,
    pub(super) place: Option<&'a Place>,
    /// The worker's users, which it tells over a socket.
    pub(super) users: Vec<OwnedFd>,
    pub(super) deaths: Vec<Instant>,
}

impl Keeper<'_> {
    /// Starts workers until one ends by itself. `first` is the client that waits for the first one.
    fn run(mut self, mut first: Option<OwnedFd>) {
        loop {
            match self.start(&mut first) {
                Ok((worker, told)) => {
                    first = None;
                    if self.watch(&worker, &told) == Ended::ByItself || !self.may_go_on() {
                        return;
                    }
                }
                Err(error) => {
                    return match &first {
                        Some(first) => refuse(first, self.place, &error),
                        None => leave_once(self.place),
                    };
                }
            }
        }
    }

    /// Goes on for a keeper that was killed, beside its worker.
    pub(super) fn take_over(mut self, worker: &OwnedFd, told: &OwnedFd) {
        if self.watch(worker, told) == Ended::Killed && self.may_go_on() {
            self.run(None);
        }
    }

    fn may_go_on(&mut self) -> bool {
        self.deaths.push(Instant::now());
        self.deaths.retain(|at| at.elapsed() < RESTART_WINDOW);
        let may = self.deaths.len() <= RESTARTS;
        if !may {
            leave_once(self.place);
        }
        may
    }

    /// Starts a worker; gives a descriptor of it, and the socket over which it tells of its users.
    fn start(&mut self, first: &mut Option<OwnedFd>) -> Result<(OwnedFd, OwnedFd)> {
        let (told, tell) = user_line()?;
        let keeper = own_process()?;
        match sys::fork()? {
            Fork::Child => {
                drop(told);
                let bond = Bond {
                    keeper: Some(keeper),
                    tell,
                };
                let users = std::mem::take(&mut self.users);
                let (image, prepared, place) = (self.image, self.prepared, self.place);
                let fresh = self.deaths.is_empty();
                work(image, prepared, place, first.take(), users, bond, fresh);
                end_worker()
            }
            Fork::Parent(worker) => {
                let opened = rustix::process::Pid::from_raw(worker.as_raw())
                    .context("a process id")
                    .and_then(open_process);
                let Ok(opened) = opened else {
                    // It serves its clients, and has no successor.
                    *first = None;
                    while waitpid(worker, None) == Err(nix::Error::EINTR) {}
                    sys::exit_now(0)
                };
                Ok((opened, told))
            }
        }
    }

    /// Waits for the end of a worker, and meanwhile notes its users.
    fn watch(&mut self, worker: &OwnedFd, told: &OwnedFd) -> Ended {
        let mut telling = true;
        loop {
            let mut set = vec![PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
            set.extend(
                self.users
                    .iter()
                    .map(|u| PollFd::new(u.as_fd(), PollFlags::POLLIN)),
            );
            set.extend(telling.then(|| PollFd::new(told.as_fd(), PollFlags::POLLIN)));
            if !matches!(poll(&mut set, PollTimeout::NONE), Ok(n) if n > 0) {
                continue;
            }
            let ready: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            let mut gone = ready.iter().skip(1);
            self.users.retain(|_| gone.next() != Some(&true));
            if gone.next() == Some(&true) {
                match wire::receive(told.as_fd()) {
                    Ok((bytes, users)) if !bytes.is_empty() => self.users.extend(users),
                    _ => telling = false,
                }
            }
            if ready.first() == Some(&true) {
                // What it told last.
                while let Ok((bytes, users)) = wire::receive(told.as_fd())
                    && !bytes.is_empty()
                {
                    self.users.extend(users);
                }
                while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(s) if s != WaitStatus::StillAlive)
                {
                }
                return if Path::new(ENDED).exists() {
                    Ended::ByItself
                } else {
                    Ended::Killed
                };
            }
        }
    }
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    ByItself,
    Killed,
}

/// What a worker has of its keeper.
pub(super) struct Bond {
    /// The process, for the worker to see its end. `None` when there is no other any more.
    pub(super) keeper: Option<OwnedFd>,
    /// Where users are told.
    pub(super) tell: OwnedFd,
}

/// A socket pair: the worker sends each user to its keeper, and never waits for it.
pub(super) fn user_line() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .context("cannot create a socket")
}

pub(super) fn own_process() -> Result<OwnedFd> {
    open_process(rustix::process::getpid())
}

pub(super) fn open_process(pid: rustix::process::Pid) -> Result<OwnedFd> {
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .context("cannot open a process")
}

/// Ends a worker in a way that its keeper takes for no accident.
pub(super) fn end_worker() -> ! {
    let _ = File::create(ENDED);
    sys::exit_now(0)
}

/// Tells the first client why there is no server. Others that wait by now find the socket closed and try themselves.
pub(super) fn refuse(first: &OwnedFd, place: Option<&Place>, error: &anyhow::Error) {
    leave(place);
    let mut answer = vec![1];
    answer.extend(format!("{error:#}").bytes().take(8000));
    let _ = wire::receive(first.as_fd());
    let _ = wire::send(first.as_fd(), &answer, &[]);
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

/// The same where the server's own file tree is in place: once, as the name may be somebody else's afterwards.
pub(super) fn leave_once(place: Option<&Place>) {
    if !Path::new(LEFT).exists() {
        let _ = File::create(LEFT);
        leave(place);
    }
}
