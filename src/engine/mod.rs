//! Carries a [`Plan`] out: the only writer of process and kernel state. It decides nothing that the plan decides.
//!
//! The order is not taste:
//! 1. Everything that can be found out without a namespace is checked first, so that a bad request starts nothing.
//! 2. A file image's user namespace is joined, never made here: all containers of one image share it.
//! 3. The mount namespace is a copy of the *caller's* mounts, so a job's private /tmp is what the container sees. All that is
//!    taken from there is opened before anything lies over `/` ([`sources`]).
//! 4. A pid namespace comes with the child's birth (`clone(2)`): whoever unshared it could start no thread any more.
//! 5. procfs is mounted while the host's /proc is still visible: the kernel demands that.
//! 6. `no_new_privs` and the filter come last before `execve`; nothing after them needs help.

mod aside;
pub mod background;
pub mod cgroup;
pub mod command;
pub mod dev;
pub mod emulate;
pub mod environment;
pub mod init;
pub mod join;
pub mod libraries;
mod marks;
pub mod network;
pub mod overlay;
mod points;
pub mod process;
pub mod profiles;
pub mod ready;
pub mod rootfs;
pub mod runtime;
pub mod server;
pub mod session;
mod sources;
pub mod sys;
mod targets;
pub mod userns;
pub mod wait;
pub mod wire;

use std::convert::Infallible;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};

use crate::image::Root;
use crate::plan::{Init, Namespaces, Ownership, Plan};
use crate::{exit, proc, say};
pub use aside::aside;
use emulate::Owners;
use network::{Connector, Network};
use process::Next;
use sys::Fork;

/// Runs the plan: this process becomes the program, or waits for it. `Ok` is the status to end with.
///
/// # Errors
/// When the container cannot be made or the program not be started.
pub fn run(plan: &Plan, places: &server::Places, network: Option<&Network>) -> Result<u8> {
    run_owned(plan, places, network, Owners::default(), |_| Ok(()))
}

/// Runs a plan with a record of owners in a process of its own, and waits for it: this process (one thread) stays where
/// it is. `owners` is the record before, and afterwards the one that the program left, also of one that failed. A plan
/// whose owners the kernel keeps leaves it as it is.
///
/// # Errors
/// When the process cannot be made, or ended before it could hand the record back. What goes wrong inside is told there
/// by a `FATAL:` line, and is status 255 here.
pub fn run_emulated(
    plan: &Plan,
    places: &server::Places,
    network: Option<&Network>,
    owners: &mut Owners,
) -> Result<u8> {
    use std::io::{Read as _, Seek as _, Write as _};
    // Not a pipe: the record may be longer than one, and this process must hand signals on meanwhile.
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let record = rustix::fs::memfd_create("owners", flags).context("cannot get memory")?;
    let mut record = std::fs::File::from(record);
    let own = proc::Held::child(rustix::process::getpid().as_raw_nonzero().get());
    let mask = wait::block()?;
    let child = match sys::fork()? {
        Fork::Parent(child) => child,
        Fork::Child => {
            sys::die_with(own.as_ref());
            let _ = mask.thread_set_mask();
            let tell = |owners: &Owners| {
                let bytes = owners.to_bytes()?;
                (&record)
                    .write_all(&bytes)
                    .context("no memory for the owners' record")
            };
            let before = std::mem::take(owners);
            let status = run_owned(plan, places, network, before, tell).unwrap_or_else(|error| {
                let text = format!("{error:#}").replace('\n', " ");
                say::fatal(format_args!("{text}"));
                exit::FATAL
            });
            sys::exit_now(status)
        }
    };
    let end = wait::until_exit(child, false, sys::pending_signals());
    mask.thread_set_mask()
        .context("cannot restore the signal mask")?;
    let mut bytes = Vec::new();
    record
        .rewind()
        .and_then(|()| record.read_to_end(&mut bytes))
        .context("cannot read the owners' record")?;
    if !bytes.is_empty() {
        *owners = Owners::from_bytes(&bytes)?;
    }
    Ok(match end? {
        wait::End::Exited(status) => status,
        wait::End::Signalled(signal) => exit::signalled(signal as i32),
    })
}

/// Does some work in a process of its own and waits for it, handing signals on. Its status is the work's; what goes wrong
/// there is told by a `FATAL:` line, and is status 255. This process must have one thread.
///
/// # Errors
/// When the process cannot be made.
pub fn in_child(work: impl FnOnce() -> Result<u8>) -> Result<wait::End> {
    let own = proc::Held::child(rustix::process::getpid().as_raw_nonzero().get());
    let mask = wait::block()?;
    let child = match sys::fork()? {
        Fork::Parent(child) => child,
        Fork::Child => {
            sys::die_with(own.as_ref());
            let _ = mask.thread_set_mask();
            let status = work().unwrap_or_else(|error| {
                let text = format!("{error:#}").replace('\n', " ");
                say::fatal(format_args!("{text}"));
                exit::FATAL
            });
            sys::exit_now(status)
        }
    };
    let end = wait::until_exit(child, false, sys::pending_signals());
    mask.thread_set_mask()
        .context("cannot restore the signal mask")?;
    end
}

/// `tell` gets the record of owners when the program has ended.
fn run_owned(
    plan: &Plan,
    places: &server::Places,
    network: Option<&Network>,
    owners: Owners,
    tell: impl FnOnce(&Owners) -> Result<()>,
) -> Result<u8> {
    sources::check(plan)?;
    let connector = network.map(Connector::start).transpose()?;
    let points = rootfs::points(plan);
    let client = server::Client::own(places, plan.program());
    let stage = enter_user_namespace(plan, &points, &client)?;
    let images = rootfs::images(plan, &client, &mut Vec::new())?;
    if let Some(directory) = &places.unneeded
        && let Err(error) = std::fs::remove_dir_all(directory)
    {
        say::warn(format_args!(
            "cannot remove {}: {error}",
            directory.display()
        ));
    }
    sys::forbid_tracing();
    let mut namespaces = plan.namespaces;
    if let Some(connector) = connector {
        // Before there is a process 1: whoever connects it needs a number that counts outside.
        new_network()?;
        connector.connect(rustix::process::getpid().as_raw_nonzero().get())?;
        namespaces.net = false;
    }
    let link = match plan.ownership {
        Ownership::Emulated => Some(emulate::Link::new(emulate::Extent::Owners)?),
        Ownership::Devices => Some(emulate::Link::new(emulate::Extent::Devices)?),
        Ownership::Kernel => None,
    };
    if !plan.namespaces.pid {
        if link.is_some() {
            bail!("owners are emulated only in a pid namespace");
        }
        create_namespaces(plan, namespaces)?;
        return match inside(plan, stage, &points, images)? {
            Next::End(status) => Ok(status),
            Next::Run(program) => never(process::exec(&program)),
        };
    }
    let mask = wait::block()?;
    match sys::fork_into_pid_namespace(sys::Parent::Own)? {
        Fork::Parent(child) => {
            let early = sys::pending_signals();
            drop((stage, images));
            let supervisor = link.map(|link| link.supervise(owners)).transpose()?;
            let limit = plan.process.time_limit;
            let deadline = limit.map(|limit| Instant::now() + limit);
            let Some(end) = wait::until(child, false, early, deadline)? else {
                // With process 1 goes the whole namespace.
                let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
                let _ = wait::until_exit(child, false, SigSet::empty());
                bail!(
                    "the run was ended after {:?} (--runscript-timeout)",
                    limit.unwrap_or_default()
                );
            };
            if let Some(supervisor) = supervisor {
                tell(&supervisor.finish())?;
            }
            Ok(wait::end_like(end))
        }
        Fork::Child => {
            sys::die_with(client.user.as_ref());
            create_namespaces(plan, namespaces)?;
            first_process(plan, stage, &points, images, link, &mask)
        }
    }
}

/// Process 1 of a new pid namespace.
fn first_process(
    plan: &Plan,
    stage: Option<server::Stage>,
    points: &[wire::Point],
    images: rootfs::Images,
    link: Option<emulate::Link>,
    mask: &SigSet,
) -> Result<u8> {
    let next = inside(plan, stage, points, images)?;
    if let Some(link) = link {
        link.submit()?;
    }
    match next {
        Next::End(status) => Ok(status),
        Next::Run(program) => match plan.process.init {
            Init::Appinit => never(init::run(&program, mask)),
            Init::Payload => {
                mask.thread_set_mask()
                    .context("cannot restore the signal mask")?;
                never(process::exec(&program))
            }
        },
    }
}

fn never(result: Result<Infallible>) -> Result<u8> {
    match result? {}
}

/// A file image's server gives the namespace and the root; a directory needs no server.
fn enter_user_namespace(
    plan: &Plan,
    points: &[wire::Point],
    client: &server::Client,
) -> Result<Option<server::Stage>> {
    if let Root::Directory(path) = &plan.root {
        match plan.share_users {
            true => userns::join(&server::shared_users(path, plan.ids, client)?)?,
            false => userns::create(&plan.ids, CloneFlags::empty())?,
        }
        return Ok(None);
    }
    say::debug(format_args!("image server for {:?}", plan.root));
    let mut stage = server::enter(&plan.root, plan.ids, server::Namespace::New, points, client)?;
    userns::join(&stage.userns)?;
    let targets = plan.mounts.iter().map(|mount| mount.target.as_path());
    stage.look(targets.chain([plan.process.cwd.as_path()]));
    Ok(Some(stage))
}

fn create_namespaces(plan: &Plan, namespaces: Namespaces) -> Result<()> {
    let Namespaces { ipc, net, uts, .. } = namespaces;
    let mut flags = CloneFlags::CLONE_NEWNS;
    flags.set(CloneFlags::CLONE_NEWIPC, ipc);
    flags.set(CloneFlags::CLONE_NEWUTS, uts);
    unshare(flags).map_err(|error| match flags {
        CloneFlags::CLONE_NEWNS => userns::no_mounts(error.into()),
        _ => anyhow!(error).context(
            "cannot create namespaces (a limit like user.max_mnt_namespaces or user.max_ipc_namespaces may be reached)",
        ),
    })?;
    if net {
        new_network()?;
    }
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name)
            .with_context(|| format!("cannot set the host name {name:?}"))?;
    }
    Ok(())
}

/// A network with nothing but the loopback interface.
fn new_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context(
        "cannot create a network namespace (is the limit user.max_net_namespaces reached?)",
    )?;
    sys::loopback_up()?;
    // A network of its own has no ports that belong to the system. Best effort: programs can use higher ones.
    let _ = std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    Ok(())
}

/// Builds the file tree, enters it, and finds the program.
fn inside(
    plan: &Plan,
    stage: Option<server::Stage>,
    points: &[wire::Point],
    images: rootfs::Images,
) -> Result<Next> {
    let room = sources::Room::for_mounts(plan)?;
    let mut tree = rootfs::Tree::stack(plan, stage, points, images)?;
    for place in 0..plan.mounts.len() {
        tree.apply(place)?;
    }
    tree.finish()?;
    rootfs::pivot(&tree.root, 1)?; // the session lies over the host's root
    drop(tree);
    drop(room);
    let cwd = process::enter_directory(&plan.process)?;
    let next = process::resolve(&plan.process, &plan.environment, &cwd)?;
    process::restrict(&plan.ids, &plan.process)?;
    Ok(next)
}
