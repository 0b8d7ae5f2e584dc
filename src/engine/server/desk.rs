//! Where clients are received: each gets a detached copy of the mount, and is counted as long as it lives.

use std::collections::HashSet;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use capsid_fuse::{Server, ViewId};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{SockFlag, accept4};

use super::Image;
use super::keeper::{Bond, Keeper, leave_once, line, open_process, own_process};
use super::mount::{Home, MOUNT_POINT, Mounted};
use super::place::Place;
use super::worker::{Known, Room, entries};
use crate::engine::sys::{self, Fork};
use crate::engine::wire::{self, Point};

/// How long a server without users goes on listening: long enough for the next command of a script.
const IDLE: Duration = Duration::from_secs(3);

/// For so long a name that no container uses any more is taken for known to the kernel, which may drop it when memory is
/// short. Below it, commands one after the other do not look everything up twice.
const KEPT: Duration = Duration::from_millis(100);

/// Where clients are received.
pub(super) struct Desk<'a> {
    /// Where `SIGTERM` arrives: a service manager wants an end, so an idle server does not linger. `None` when it has
    /// arrived.
    pub(super) hurry: Option<&'a SignalFd>,
    pub(super) image: &'a Image<'a>,
    pub(super) server: Arc<Server>,
    pub(super) home: &'a Home,
    pub(super) mounted: Rc<Mounted>,
    /// For a new keeper.
    pub(super) place: Option<&'a Place>,
    pub(super) bond: Bond,
    pub(super) users: Vec<OwnedFd>,
    pub(super) last: Instant,
    pub(super) known: Known,
    /// Views that a client has looked into, and that the kernel still knows.
    pub(super) seen: HashSet<ViewId>,
    /// The name is given up.
    pub(super) left: bool,
}

impl Desk<'_> {
    /// Answers clients until there have been no users for a while, and then leaves the name.
    pub(super) fn run(&mut self, mut place: Option<&Place>, serving: &std::thread::JoinHandle<()>) {
        loop {
            let patience = if place.is_some() && self.hurry.is_some() {
                IDLE
            } else {
                Duration::ZERO
            };
            let idle = if self.users.is_empty() {
                patience.saturating_sub(self.last.elapsed())
            } else {
                Duration::from_secs(3600)
            };
            if idle.is_zero() || serving.is_finished() || (self.left && place.is_some()) {
                let Some(place) = place.take() else { return };
                self.leave(place);
                // Who knocked before the name was gone is still let in.
                while self.receive(place) {}
                continue;
            }
            let mut set: Vec<PollFd> = self
                .users
                .iter()
                .map(|u| PollFd::new(u.as_fd(), PollFlags::POLLIN))
                .collect();
            set.extend(
                self.bond
                    .keeper
                    .iter()
                    .map(|k| PollFd::new(k.as_fd(), PollFlags::POLLIN)),
            );
            set.extend(place.map(|p| PollFd::new(p.listener.as_fd(), PollFlags::POLLIN)));
            set.extend(
                self.hurry
                    .map(|h| PollFd::new(h.as_fd(), PollFlags::POLLIN)),
            );
            let timeout =
                PollTimeout::try_from(idle.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
            if !matches!(poll(&mut set, timeout), Ok(n) if n > 0) {
                continue;
            }
            let mut ready: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            if self.hurry.is_some() && ready.pop() == Some(true) {
                self.hurry = None;
            }
            let knock = place.is_some() && ready.pop() == Some(true);
            let alone = self.bond.keeper.is_some() && ready.pop() == Some(true);
            let mut ready = ready.into_iter();
            let before = self.users.len();
            self.users.retain(|_| !ready.next().unwrap_or(false));
            if self.users.len() < before {
                self.last = Instant::now();
            }
            if alone {
                self.replace_keeper();
            }
            if knock && let Some(place) = place {
                self.receive(place);
            }
        }
    }

    /// Waits for the bell of the serving thread.
    pub(super) fn wait_for(&mut self, rung: &std::io::PipeReader) {
        loop {
            let mut set = vec![PollFd::new(rung.as_fd(), PollFlags::POLLIN)];
            set.extend(
                self.bond
                    .keeper
                    .iter()
                    .map(|k| PollFd::new(k.as_fd(), PollFlags::POLLIN)),
            );
            let _ = poll(&mut set, PollTimeout::NONE);
            let ready: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            if ready.first() == Some(&true) {
                return;
            }
            if ready.get(1) == Some(&true) {
                self.replace_keeper();
            }
        }
    }

    /// The keeper was killed: makes a child the new one. Without one the worker goes on unprotected.
    fn replace_keeper(&mut self) {
        self.bond.keeper = None;
        let (Ok((told, tell)), Ok(worker)) = (line(), own_process()) else {
            return;
        };
        match sys::fork_beside_threads() {
            Ok(Fork::Child) => {
                drop(tell);
                let keeper = Keeper {
                    image: self.image,
                    home: self.home,
                    first: None,
                    mounted: Some(Rc::clone(&self.mounted)),
                    failure: None,
                    place: self.place,
                    users: std::mem::take(&mut self.users),
                    deaths: Vec::new(),
                };
                keeper.take_over(&worker, &told);
                sys::exit_now(0)
            }
            Ok(Fork::Parent(keeper)) => {
                let keeper = rustix::process::Pid::from_raw(keeper.as_raw());
                self.bond = Bond {
                    keeper: keeper.and_then(|keeper| open_process(keeper).ok()),
                    tell,
                };
            }
            Err(_) => {}
        }
    }

    /// Lets one waiting client in; false when there is none.
    fn receive(&mut self, place: &Place) -> bool {
        let client = match accept4(place.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(client) => client,
            Err(nix::Error::EMFILE | nix::Error::ENFILE) => {
                self.leave(place); // the next one starts a server with room
                return false;
            }
            Err(_) => return false,
        };
        let client = sys::own(client);
        if wire::is_own_peer(&client) && self.answer(&client) == Room::Full {
            // Before the client hears that there is no answer, so that it finds the name free.
            self.leave(place);
        }
        true
    }

    /// Leaves the name, once: it may be somebody else's afterwards.
    pub(super) fn leave(&mut self, place: &Place) {
        if !self.left {
            self.left = true;
            leave_once(Some(place));
        }
    }

    pub(super) fn answer(&mut self, client: &OwnedFd) -> Room {
        // A client sends at once; one that does not must not keep the others waiting.
        let timeout = nix::sys::time::TimeVal::new(2, 0);
        let _ = nix::sys::socket::setsockopt(
            client,
            nix::sys::socket::sockopt::ReceiveTimeout,
            &timeout,
        );
        let (packet, fds) = match wire::receive(client.as_fd()) {
            Ok(received) => received,
            Err(nix::Error::EMFILE) => return Room::Full,
            Err(_) => return Room::Left,
        };
        let Some(points) = packet
            .split_first()
            .and_then(|(_, body)| wire::decode_points(body))
        else {
            return Room::Left;
        };
        if self.known.room(&packet[1..]) == Room::Full {
            return Room::Full;
        }
        if self.users.is_empty() && self.last.elapsed() > KEPT {
            self.seen.clear();
        }
        let (sent, unseen) = match self.view_with(&points, &packet[1..]) {
            Ok((stage, view, made)) => {
                let unseen = !self.seen.contains(&view);
                let mut answer = vec![0, u8::from(unseen)];
                answer.extend(view.0.to_le_bytes());
                answer.extend(made.into_iter().map(u8::from));
                let fds = [
                    self.home.userns.as_raw_fd(),
                    stage.as_raw_fd(),
                    self.home.life.0.as_raw_fd(),
                ];
                let sent = wire::send_now(client.as_fd(), &answer, &fds);
                if sent == Err(nix::Error::ETOOMANYREFS) {
                    return Room::Full;
                }
                (sent, unseen.then_some(view))
            }
            // Another server has room.
            Err(error) if error.downcast_ref() == Some(&rustix::io::Errno::MFILE) => {
                return Room::Full;
            }
            Err(error) => {
                let mut answer = vec![1];
                answer.extend(format!("{error:#}").bytes().take(8000));
                (wire::send(client.as_fd(), &answer, &[]), None)
            }
        };
        if sent.is_ok()
            && let Some(user) = fds.into_iter().next()
        {
            self.bond.tell_user(&user);
            self.users.push(user);
        }
        // See `Stage::look`. One that ends meanwhile, or takes too long, leaves that to the next one.
        if sent.is_ok()
            && let Some(view) = unseen
            && wire::receive(client.as_fd()).is_ok_and(|(said, _)| !said.is_empty())
        {
            self.seen.insert(view);
        }
        self.last = Instant::now();
        Room::Left
    }

    /// A detached copy of the mount, the view in it in which all mount points exist, and which of them are new.
    fn view_with(&mut self, points: &[Point], raw: &[u8]) -> Result<(OwnedFd, ViewId, Vec<bool>)> {
        let missing = |p: &Point| {
            !self
                .server
                .exists(p.path.as_os_str().as_bytes())
                .unwrap_or(false)
        };
        let made: Vec<bool> = points.iter().map(missing).collect();
        let view = self
            .server
            .add_view(&entries(points))
            .context("cannot make the mount points")?;
        self.known.note(raw)?;
        let stage = sys::mounting(|| sys::clone_tree(rustix::fs::CWD, Path::new(MOUNT_POINT)))?;
        Ok((stage, view, made))
    }
}
