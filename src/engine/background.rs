//! Starting a container that stays: its process 1 is a child of the caller, who hears from it over a socket.
//!
//! The caller, an instance's monitor, remains in the host's namespaces. A process between joins the image server's user
//! namespace and gives birth to process 1 as the monitor's child (`CLONE_PARENT`), then ends, or supervises owners.

use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};

use super::emulate::{Extent, Link, Owners};
use super::sys::{self, Fork};
use super::{init, rootfs, server, sources, wire};
use crate::plan::{Ownership, Plan, Service};
use crate::proc::Held;

/// What process 1 of an instance tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// It exists, with this number outside. Comes with what hangs up when an image server is gone.
    Born(i32),
    /// Its network namespace is there and waits for a connection.
    Unconnected,
    /// Comes with descriptors of its namespaces, that of users first: who steps into the container joins them in this order.
    Namespaces,
    /// The script has been executed.
    Running,
    /// The image has no script: there is nothing to run.
    Idle,
    /// The container cannot be made, or its script not be executed.
    Failed(String),
    /// The script has ended.
    Exited {
        /// With this status,
        status: Option<u8>,
        /// or by this signal.
        signal: Option<i32>,
        /// It will be started again.
        again: bool,
    },
    /// The service is ready.
    Ready,
}

/// Where the service's output goes: the ends of two pipes to write to.
pub struct Streams {
    /// Standard output.
    pub out: OwnedFd,
    /// Standard error.
    pub err: OwnedFd,
}

/// A running container.
pub struct Background {
    /// Its process 1.
    pub pid: i32,
    /// The same, held.
    pub held: Held,
    /// Where it tells what happens ([`Event`]).
    pub control: OwnedFd,
    /// What hangs up when an image server that it needs is gone.
    pub lives: Vec<OwnedFd>,
    /// Its namespaces, as soon as [`Event::Namespaces`] has been heard.
    pub namespaces: Vec<OwnedFd>,
}

/// Starts process 1 of a container.
///
/// # Errors
/// When the image cannot be mounted or the namespaces not be made. What goes wrong later is an [`Event::Failed`].
pub fn start(
    plan: &Plan,
    service: &Service,
    streams: Streams,
    places: &server::Places,
) -> Result<Background> {
    sources::check(plan)?;
    let (control, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context("cannot create a socket")?;
    let client = server::Client::own(places, plan.program());
    let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
    match sys::fork()? {
        Fork::Child => {
            drop(control);
            if plan.ownership == Ownership::Emulated {
                sys::die_with(own.as_ref());
            }
            if let Err(error) = give_birth(plan, service, streams, &theirs, &client) {
                // Nobody else is there to hear it.
                let _ = tell(&theirs, &Event::Failed(format!("{error:#}")), &[]);
            }
            sys::exit_now(0)
        }
        Fork::Parent(child) => {
            drop((theirs, streams));
            let first = hear(&control);
            // One that supervises owners stays, and ends with us.
            let stays =
                plan.ownership == Ownership::Emulated && matches!(first, Some((Event::Born(_), _)));
            while !stays && nix::sys::wait::waitpid(child, None) == Err(nix::Error::EINTR) {}
            match first {
                Some((Event::Born(pid), lives)) => Ok(Background {
                    pid,
                    held: Held::child(pid).context("cannot hold process 1 (pidfd_open)")?,
                    control,
                    lives,
                    namespaces: Vec::new(),
                }),
                Some((Event::Failed(text), _)) => Err(anyhow!(text)),
                _ => bail!("the container's first process was killed before it began"),
            }
        }
    }
}

fn give_birth(
    plan: &Plan,
    service: &Service,
    streams: Streams,
    control: &OwnedFd,
    client: &server::Client,
) -> Result<()> {
    let points = rootfs::points(plan);
    let mut stage = super::enter_user_namespace(plan, &points, client)?;
    let mut lives = Vec::new();
    let images = rootfs::images(plan, client, &mut lives)?;
    if let Some(stage) = &mut stage {
        lives.push(
            stage
                .life
                .try_clone()
                .context("cannot duplicate a descriptor")?,
        );
    }
    sys::forbid_tracing();
    init::block_signals()?;
    let link = match plan.ownership {
        Ownership::Emulated => Some(Link::new(Extent::Owners)?),
        Ownership::Kernel | Ownership::Devices => None,
    };
    // Held by the supervisor of owners, whose end is the container's.
    let (life, held) = std::io::pipe().context("cannot create a pipe")?;
    let (mut told, telling) = std::io::pipe().context("cannot create a pipe")?;
    match sys::fork_into_pid_namespace(sys::Parent::Sibling)? {
        Fork::Parent(pid) => {
            let mut lives: Vec<RawFd> = lives.iter().map(|fd| fd.as_raw_fd()).collect();
            if link.is_some() {
                lives.push(life.as_raw_fd());
            }
            tell(control, &Event::Born(pid.as_raw()), &lives)?;
            // Only now may process 1 tell its own events.
            drop(telling);
            match link {
                Some(link) => supervise(link, &held),
                None => Ok(()),
            }
        }
        Fork::Child => {
            sys::die_with(client.user.as_ref());
            drop((telling, life, held));
            // Its own events come after that of its birth.
            let _end = told.read(&mut [0]);
            drop(told);
            let made = super::create_namespaces(plan, plan.namespaces).and_then(|()| {
                init::serve(plan, service, streams, control, |plan| {
                    let next = super::inside(plan, stage, &points, images)?;
                    link.map_or(Ok(()), Link::submit)?;
                    Ok(next)
                })
            });
            let Err(error) = made;
            // Nobody else is there to hear it.
            let _ = tell(control, &Event::Failed(format!("{error:#}")), &[]);
            sys::exit_now(255)
        }
    }
}

/// Answers for a container's owners until the monitor ends, with which this process does, too. It keeps nothing open that
/// others wait for.
fn supervise(link: Link, life: &impl AsRawFd) -> Result<()> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?
        .into();
    init::redirect(&null, &null, &null)?;
    let mut keep = link.descriptors().to_vec();
    keep.push(life.as_raw_fd());
    keep.sort_unstable();
    sys::close_all_but(&keep);
    // Its descriptor is closed already.
    std::mem::forget(null);
    sys::set_title("capsid-owners");
    let _supervisor = link.supervise(Owners::default())?;
    loop {
        nix::unistd::pause();
    }
}

/// Tells an event, with descriptors.
///
/// # Errors
/// When nobody listens any more.
pub fn tell(control: &OwnedFd, event: &Event, fds: &[RawFd]) -> Result<()> {
    let text = serde_json::to_vec(event).context("an event")?;
    wire::send(control.as_fd(), &text, fds).context("the instance's monitor is gone")
}

/// Waits for the next event; `None` when the other side is gone or does not speak our language.
pub fn hear(control: &OwnedFd) -> Option<(Event, Vec<OwnedFd>)> {
    loop {
        match wire::receive(control.as_fd()) {
            Ok((bytes, fds)) => return Some((serde_json::from_slice(&bytes).ok()?, fds)),
            Err(nix::Error::EINTR) => {}
            Err(_) => return None,
        }
    }
}
