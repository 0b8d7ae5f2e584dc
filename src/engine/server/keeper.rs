//! The keeper: holds what a worker that takes over needs, starts workers, and waits.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::Image;
use super::mount::{Effort, Home, Mounted, settle};
use super::place::{Place, leave};
use super::worker::{Had, work};
use crate::engine::sys::{self, Fork};
use crate::engine::wire;

/// A worker that dies this often within [`RESTART_WINDOW`] is not replaced any more.
const RESTARTS: usize = 3;
const RESTART_WINDOW: Duration = Duration::from_secs(10);

/// There when the server has left its name, which is not to be listened to any more.
pub(super) const LEFT: &str = "/left";
/// There when the worker has ended by itself.
const ENDED: &str = "/ended";

/// The keeper: makes the namespaces and starts workers. Does not return.
pub(super) fn keep(image: &Image, place: Option<&Place>, first: OwnedFd) {
    let home = match settle(image, place, &first) {
        Ok(home) => home,
        Err(error) => return refuse(&first, place, &error),
    };
    let keeper = Keeper {
        image,
        home: &home,
        first: Some(first),
        mounted: None,
        failure: None,
        place,
        users: Vec::new(),
        deaths: Vec::new(),
    };
    keeper.run();
}

/// Holds what a worker that takes over needs.
pub(super) struct Keeper<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) home: &'a Home,
    /// The client that waits for the first worker, until that one has mounted the image.
    pub(super) first: Option<OwnedFd>,
    /// From the first worker, as soon as it has mounted the image.
    pub(super) mounted: Option<Rc<Mounted>>,
    /// Why it could not.
    pub(super) failure: Option<anyhow::Error>,
    pub(super) place: Option<&'a Place>,
    /// The worker's users, which it tells over a socket.
    pub(super) users: Vec<OwnedFd>,
    pub(super) deaths: Vec<Instant>,
}

impl Keeper<'_> {
    /// Starts the first worker, and goes on from there.
    fn run(mut self) {
        match self.start() {
            Ok((worker, told)) => {
                let ended = self.watch(&worker, &told);
                if self.mounted.is_none() {
                    self.refuse_first();
                } else if ended == Ended::Killed && self.may_go_on() {
                    self.replace();
                }
            }
            Err(error) => {
                self.failure = Some(error);
                self.refuse_first();
            }
        }
    }

    /// Tells the client that waits for the first worker why there is no mount. One whose worker was killed hears nothing,
    /// and tries again.
    fn refuse_first(&mut self) {
        match (&self.first, self.failure.take()) {
            (Some(first), Some(error)) => refuse(first, self.place, &error),
            (Some(_), None) => leave(self.place),
            (None, _) => {}
        }
    }

    /// Starts workers until one ends by itself.
    fn replace(mut self) {
        loop {
            let Ok((worker, told)) = self.start() else {
                return leave_once(self.place);
            };
            if self.watch(&worker, &told) == Ended::ByItself || !self.may_go_on() {
                return;
            }
        }
    }

    /// Goes on for a keeper that was killed, beside its worker.
    pub(super) fn take_over(mut self, worker: &OwnedFd, told: &OwnedFd) {
        if self.watch(worker, told) == Ended::Killed && self.may_go_on() {
            self.replace();
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
    fn start(&mut self) -> Result<(OwnedFd, OwnedFd)> {
        let (told, tell) = line()?;
        let keeper = own_process()?;
        match sys::fork()? {
            Fork::Child => {
                drop(told);
                let bond = Bond {
                    keeper: Some(keeper),
                    tell,
                };
                let had = Had {
                    first: self.first.take(),
                    mounted: self.mounted.take(),
                    users: std::mem::take(&mut self.users),
                };
                work(self.image, self.home, self.place, had, bond);
                sys::exit_now(0)
            }
            Fork::Parent(worker) => {
                let opened = rustix::process::Pid::from_raw(worker.as_raw())
                    .context("a process id")
                    .and_then(open_process);
                let Ok(opened) = opened else {
                    // It serves its clients, and has no successor.
                    while waitpid(worker, None) == Err(nix::Error::EINTR) {}
                    while self.hear(&told) {}
                    self.refuse_first();
                    sys::exit_now(0)
                };
                Ok((opened, told))
            }
        }
    }

    /// Takes what a worker tells; false when it has nothing more to say.
    fn hear(&mut self, told: &OwnedFd) -> bool {
        let (bytes, fds) = match wire::receive(told.as_fd()) {
            Ok(received) => received,
            Err(nix::Error::EMFILE) => {
                self.first = None; // it may have been the mount: the worker has no successor
                return false;
            }
            Err(_) => return false,
        };
        match bytes.split_first() {
            Some((&USER, _)) => self.users.extend(fds),
            Some((&MOUNTED, effort)) => {
                self.first = None;
                let devices = fds;
                let effort = Effort::decode(effort).filter(|_| !devices.is_empty());
                self.mounted = effort.map(|effort| Rc::new(Mounted { devices, effort }));
            }
            Some((&FAILED, text)) => {
                self.failure = Some(anyhow!("{}", String::from_utf8_lossy(text)));
            }
            _ => return false,
        }
        true
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
                telling = self.hear(told);
            }
            if ready.first() == Some(&true) {
                // What it told last.
                while self.hear(told) {}
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
    /// Where it is told of users and of the mount.
    pub(super) tell: OwnedFd,
}

/// The first byte of what a worker tells: with a user's descriptor,
const USER: u8 = 0;
/// with those of the mount, and the effort,
const MOUNTED: u8 = 1;
/// and with the text of why there is none.
const FAILED: u8 = 2;

impl Bond {
    /// A keeper that does not keep up knows fewer.
    pub(super) fn tell_user(&self, user: &OwnedFd) {
        let _fewer = wire::send_now(self.tell.as_fd(), &[USER], &[user.as_raw_fd()]);
    }

    /// Without it the worker has no successor.
    pub(super) fn tell_mounted(&self, mounted: &Mounted) {
        let devices: Vec<RawFd> = mounted.devices.iter().map(|d| d.as_raw_fd()).collect();
        let message = [&[MOUNTED], mounted.effort.encode().as_slice()].concat();
        let _alone = wire::send_now(self.tell.as_fd(), &message, &devices);
    }

    pub(super) fn tell_failed(&self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        let message: Vec<u8> = [FAILED]
            .into_iter()
            .chain(text.bytes())
            .take(8000)
            .collect();
        let _gone = wire::send(self.tell.as_fd(), &message, &[]);
    }
}

/// A socket pair: the worker tells its keeper, and never waits for it.
pub(super) fn line() -> Result<(OwnedFd, OwnedFd)> {
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
fn refuse(first: &OwnedFd, place: Option<&Place>, error: &anyhow::Error) {
    leave(place);
    let mut answer = vec![1];
    answer.extend(format!("{error:#}").bytes().take(8000));
    let _ = wire::receive(first.as_fd());
    let _ = wire::send(first.as_fd(), &answer, &[]);
}

/// The same where the server's own file tree is in place: once, as the name may be somebody else's afterwards.
pub(super) fn leave_once(place: Option<&Place>) {
    if !Path::new(LEFT).exists() {
        let _ = File::create(LEFT);
        leave(place);
    }
}
