//! Carries a [`Plan`] out: the only writer of process and kernel state. It decides nothing that the plan decides.
//!
//! The order is not taste:
//! 1. Everything that can be found out without a namespace is checked first, so that a bad request starts nothing.
//! 2. A file image's user namespace is joined, never made here: all containers of one image share it.
//! 3. The mount namespace is a copy of the *caller's* mounts, so a job's private /tmp is what the container sees.
//! 4. A pid namespace comes with the child's birth (`clone(2)`): whoever unshared it could start no thread any more.
//! 5. procfs is mounted while the host's /proc is still visible: the kernel demands that.
//! 6. `no_new_privs` and the filter come last before `execve`; nothing after them needs help.

pub mod background;
pub mod cgroup;
pub mod dev;
pub mod environment;
pub mod init;
pub mod join;
pub mod network;
pub mod process;
pub mod profiles;
pub mod ready;
pub mod rootfs;
pub mod runtime;
pub mod server;
pub mod sys;
pub mod userns;
pub mod wait;
pub mod wire;

use std::convert::Infallible;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;

use crate::image::Root;
use crate::plan::{Init, Namespaces, Plan};
use crate::say;
use network::{Connector, Network};
use process::Next;
use sys::Fork;

/// Runs the plan: this process becomes the program, or waits for it. `Ok` is the status to end with.
///
/// # Errors
/// When the container cannot be made or the program not be started.
pub fn run(plan: &Plan, places: &server::Places, network: Option<&Network>) -> Result<u8> {
    rootfs::check_sources(plan)?;
    let connector = network.map(Connector::start).transpose()?;
    let points = rootfs::points(plan);
    let client = server::Client::own(places);
    let stage = enter_user_namespace(plan, &points, &client)?;
    let images = rootfs::images(plan, &client, &mut Vec::new())?;
    sys::forbid_tracing();
    let mut namespaces = plan.namespaces;
    if let Some(connector) = connector {
        // Before there is a process 1: whoever connects it needs a number that counts outside.
        new_network()?;
        connector.connect(rustix::process::getpid().as_raw_nonzero().get())?;
        namespaces.net = false;
    }
    if !plan.namespaces.pid {
        create_namespaces(plan, namespaces)?;
        return match inside(plan, stage, &points, images)? {
            Next::End(status) => Ok(status),
            Next::Run(program) => never(process::exec(&program)),
        };
    }
    let mask = wait::block()?;
    match sys::fork_into_pid_namespace(sys::Parent::Own)? {
        Fork::Parent(child) => {
            drop((stage, images));
            Ok(wait::end_like(wait::until_exit(child, false)?))
        }
        Fork::Child => {
            sys::die_with(client.user.as_ref());
            create_namespaces(plan, namespaces)?;
            first_process(plan, stage, &points, images, &mask)
        }
    }
}

/// Process 1 of a new pid namespace.
fn first_process(
    plan: &Plan,
    stage: Option<server::Stage>,
    points: &[wire::Point],
    images: rootfs::Images,
    mask: &SigSet,
) -> Result<u8> {
    match inside(plan, stage, points, images)? {
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
    if matches!(plan.root, Root::Directory(_)) {
        userns::create(&plan.ids, CloneFlags::empty())?;
        return Ok(None);
    }
    say::debug(format_args!("image server for {:?}", plan.root));
    let stage = server::enter(&plan.root, plan.ids, server::Namespace::New, points, client)?;
    userns::join(&stage.userns)?;
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
    let mut tree = rootfs::Tree::stack(plan, stage, points, images)?;
    for mount in &plan.mounts {
        tree.apply(mount)?;
    }
    rootfs::pivot(&tree.root, 1)?; // the session lies over the host's root
    drop(tree);
    let cwd = process::enter_directory(&plan.process)?;
    let next = process::resolve(&plan.process, &plan.environment, &cwd)?;
    process::restrict(&plan.ids, &plan.process, plan.process.close_descriptors)?;
    Ok(next)
}
