//! The worker: serves the image from threads, and clients from the first one.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use capsid_fuse::{Server, ViewEntry, ViewKind};
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::Image;
use super::desk::Desk;
use super::keeper::{Bond, LEFT, end_worker};
use super::mount::{Effort, Home, MOUNT_POINT, Mounted, mount, open_tree};
use super::place::Place;
use crate::engine::sys;
use crate::engine::wire::{self, Point};

/// The mount points asked for so far, for a worker that takes over.
const VIEWS: &str = "/views";

/// Distinct sets of mount points that one server takes, and bytes of them: beyond that the next one starts another.
const VIEWS_MAX: usize = 1024;
const VIEWS_BYTES_MAX: usize = 1 << 20;

/// Where most images have their programs; a guess is enough.
const USUAL: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"];

/// What a worker begins with.
pub(super) struct Had {
    /// The client that waits for the first one.
    pub(super) first: Option<OwnedFd>,
    /// The mount of the worker before; the first one makes it.
    pub(super) mounted: Option<Rc<Mounted>>,
    /// The users of the worker before.
    pub(super) users: Vec<OwnedFd>,
}

/// The worker: serves the image from threads, and clients from this one, until nobody is left. Returns only when nothing
/// was mounted.
pub(super) fn work(image: &Image, home: &Home, place: Option<&Place>, had: Had, bond: Bond) {
    // Before there are threads, which then do not take it.
    let term = sys::signal_set([libc::SIGTERM]);
    let hurry = term
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&term, SfdFlags::SFD_CLOEXEC))
        .ok();
    let is_first = had.mounted.is_none();
    let begun = match begin(image, home, had.mounted) {
        Ok(begun) => begun,
        Err(error) if is_first => return bond.tell_failed(&error),
        Err(_) => end_worker(),
    };
    let mut place = place;
    if is_first {
        bond.tell_mounted(&begun.mounted);
    } else {
        place = place.filter(|_| !Path::new(LEFT).exists());
    }
    let mut desk = Desk {
        image,
        hurry: hurry.as_ref(),
        server: begun.server,
        home,
        mounted: begun.mounted,
        place,
        bond,
        users: had.users,
        last: Instant::now(),
        known: begun.known,
        seen: HashSet::new(),
        left: false,
    };
    if let Some(first) = had.first
        && desk.answer(&first) == Room::Full
    {
        // Nothing is known yet, so it is descriptors that there is no room for.
        if let Some(place) = place {
            desk.leave(place);
        }
        let _ = wire::send(
            first.as_fd(),
            b"\x01too many open files: raise the limit (ulimit -n)",
            &[],
        );
    }
    desk.run(place, &begun.serving);
    // The mount goes when the last container's copy goes, and the serving thread ends with it.
    let detach = rustix::mount::UnmountFlags::DETACH;
    let _ = sys::mounting(|| rustix::mount::unmount(MOUNT_POINT, detach));
    desk.server.shrink();
    desk.wait_for(&begun.rung);
    let _ = begun.serving.join();
    desk.server.save_profile();
    end_worker()
}

/// A server at work.
struct Begun {
    server: Arc<Server>,
    mounted: Rc<Mounted>,
    known: Known,
    serving: std::thread::JoinHandle<()>,
    /// Rings when that thread ends.
    rung: std::io::PipeReader,
}

/// Opens the image, mounts it unless a worker before has, and starts to serve it.
fn begin(image: &Image, home: &Home, mounted: Option<Rc<Mounted>>) -> Result<Begun> {
    let effort = mounted.as_ref().map_or_else(Effort::allowed, |m| m.effort);
    let server = Arc::new(open_tree(image, effort)?);
    server.on_stuck(die);
    if let Some(profiles) = home.profiles.as_ref().and_then(|p| p.try_clone().ok()) {
        server.keep_profile(profiles);
    }
    let mut known = Known::default();
    let mounted = match mounted {
        Some(mounted) => {
            known.restore(&server);
            Server::resume(mounted.devices[0].as_fd());
            mounted
        }
        None => {
            if let Some(program) = image.program {
                // A path from the root stays what it is.
                let paths = USUAL.map(|usual| Path::new(usual).join(program));
                server.expect(paths.map(|path| path.into_os_string().into_vec()).into());
            }
            Rc::new(sys::mounting(|| mount(image, effort))?)
        }
    };
    let devices = mounted.devices.iter().filter_map(|d| d.try_clone().ok());
    let devices: Vec<OwnedFd> = devices.collect();
    let (rung, bell) = std::io::pipe().context("cannot create a pipe")?;
    let serve = {
        let server = Arc::clone(&server);
        move || {
            // It reads what strangers have written.
            sys::drop_capabilities();
            let _bell = Bell(bell);
            if server.serve_on(devices).is_err() {
                die();
            }
        }
    };
    let serving = std::thread::Builder::new()
        .name("serve".into())
        .spawn(serve)
        .context("cannot start a thread")?;
    Ok(Begun {
        server,
        mounted,
        known,
        serving,
        rung,
    })
}

/// The keeper replaces a worker that dies so.
fn die() {
    let _ = nix::sys::signal::kill(nix::unistd::getpid(), Signal::SIGKILL);
}

/// Rings, by a byte in a pipe, when it goes: a copy of its descriptor in a new keeper does not matter.
pub(super) struct Bell(std::io::PipeWriter);

impl Drop for Bell {
    fn drop(&mut self) {
        let _ = self.0.write_all(&[0]);
    }
}

pub(super) fn entries(points: &[Point]) -> Vec<ViewEntry> {
    points
        .iter()
        .map(|p| ViewEntry {
            path: p.path.as_os_str().as_bytes().to_vec(),
            kind: if p.directory {
                ViewKind::Directory
            } else {
                ViewKind::File
            },
        })
        .collect()
}

/// Whether a server can take one more distinct request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Left,
    Full,
}

/// The distinct requests so far: here, and in a file for a worker that takes over.
#[derive(Default)]
pub(super) struct Known {
    requests: HashSet<Vec<u8>>,
    bytes: usize,
}

impl Known {
    pub(super) fn room(&self, raw: &[u8]) -> Room {
        let more = self.requests.len() < VIEWS_MAX && self.bytes + raw.len() <= VIEWS_BYTES_MAX;
        // The first one always fits; what is wrong with it is told when it is tried.
        if more || self.requests.is_empty() || self.requests.contains(raw) {
            Room::Left
        } else {
            Room::Full
        }
    }

    pub(super) fn note(&mut self, raw: &[u8]) -> Result<()> {
        if !self.requests.insert(raw.to_vec()) {
            return Ok(());
        }
        self.bytes += raw.len();
        let mut record = u32::try_from(raw.len())
            .context("a request")?
            .to_le_bytes()
            .to_vec();
        record.extend(raw);
        File::options()
            .create(true)
            .append(true)
            .open(VIEWS)
            .and_then(|mut file| file.write_all(&record))
            .context("cannot note the mount points")
    }

    /// Makes the views again that the worker before this one made, with the same numbers.
    pub(super) fn restore(&mut self, server: &Server) {
        let text = std::fs::read(VIEWS).unwrap_or_default();
        let mut rest = text.as_slice();
        while let Some((len, tail)) = rest.split_first_chunk::<4>() {
            let Some((record, tail)) = tail.split_at_checked(u32::from_le_bytes(*len) as usize)
            else {
                return;
            };
            if let Some(points) = wire::decode_points(record) {
                let _ = server.add_view(&entries(&points));
            }
            self.bytes += record.len();
            self.requests.insert(record.to_vec());
            rest = tail;
        }
    }
}
