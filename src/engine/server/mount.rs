//! What a server sets up once: namespaces, an empty file tree of its own, and the image mounted in it.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use capsid_fuse::{Archive, Options, Owner, Server};
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;

use super::{Image, Namespace, Place, budget};
use crate::engine::{profiles, rootfs, sys, userns};
use crate::image::Root;
use crate::plan::IdMap;

/// Where the image is mounted in the server's own, otherwise empty file tree.
pub(super) const MOUNT_POINT: &str = "/m";

/// What keeper and workers have from the beginning.
pub(super) struct Home {
    pub(super) userns: OwnedFd,
    /// Both ends of a pipe that only keeper and worker write to: what clients get of it hangs up with the last of them.
    pub(super) life: (OwnedFd, OwnedFd),
    /// Where the profile of the image is kept, if it lies on slow storage.
    pub(super) profiles: Option<OwnedFd>,
}

/// The mounted image, as the first worker made it and those after it take it over.
pub(super) struct Mounted {
    /// One descriptor of the FUSE connection for each thread that may serve.
    pub(super) devices: Vec<OwnedFd>,
    /// How much of the machine it may use.
    pub(super) effort: Effort,
}

/// Leaves the caller's session, descriptors and namespaces, and gives up what a server has no use for.
pub(super) fn settle(image: &Image, place: Option<&Place>, first: &OwnedFd) -> Result<Home> {
    let _ = rustix::process::setsid();
    sys::ignore_signals(&[
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGPIPE,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]);
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
    // One descriptor for each user.
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    sys::detach_standard_descriptors();
    let mut keep = vec![image.file.as_raw_fd(), first.as_raw_fd()];
    if let Some(place) = place {
        keep.push(place.listener.as_raw_fd());
        keep.extend(place.directory.as_ref().map(|d| d.fd().as_raw_fd()));
    }
    keep.sort_unstable();
    sys::close_all_but(&keep);
    let profiles = match image.root {
        Root::Squashfs { .. } => profiles::for_image(&image.file, image.profiles),
        _ => None,
    };
    sys::set_title(&format!("capsid-image {}", image.path.display()));
    match image.namespace {
        Namespace::New => userns::create(&image.ids, CloneFlags::CLONE_NEWNS)?,
        Namespace::Current => nix::sched::unshare(CloneFlags::CLONE_NEWNS)
            .map_err(|error| userns::no_mounts(error.into()))?,
    }
    // The container's root has every right over what lives in its user namespace, and may see it where /proc is the host's: it
    // must not come by our descriptors and memory, which are of the host.
    sys::forbid_tracing();
    let private = rustix::mount::MountPropagationFlags::DOWNSTREAM
        | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context("cannot make the mounts private")?;
    // Where `pivot_root` of the first worker takes the keeper along.
    rustix::process::chdir("/").context("cannot enter /")?;
    sys::keep_only_mounting();
    sys::confine_server();
    let life = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context("cannot create a pipe")?;
    Ok(Home {
        userns: userns::current()?,
        life,
        profiles,
    })
}

/// Mounts the image in an empty file tree, which keeper and worker enter.
pub(super) fn mount(image: &Image, effort: Effort) -> Result<Mounted> {
    let (uid, gid) = match &image.ids {
        IdMap::Own { uid, gid } => (*uid, *gid),
        _ => (0, 0),
    };
    let mount = capsid_fuse::mount::fuse(&capsid_fuse::mount::MountOptions {
        uid,
        gid,
        allow_other: image.ids.has_others(),
        source: image.path.to_string_lossy().into_owned(),
    })?;
    // While /dev/fuse can still be seen.
    let mut devices = vec![mount.device];
    while devices.len() < effort.threads {
        match capsid_fuse::clone_device(devices[0].as_fd()) {
            Ok(device) => devices.push(device),
            Err(_) => break, // before Linux 4.2; one descriptor serves all the same
        }
    }
    enter_empty_tree(&mount.tree)?;
    Ok(Mounted { devices, effort })
}

/// Leaves the host's mounts: the server must not keep a file system busy that an administrator wants to unmount.
fn enter_empty_tree(image: &OwnedFd) -> Result<()> {
    let tree = sys::new_filesystem("tmpfs", &[("mode", Some(c"0700")), ("size", Some(c"4m"))])?;
    sys::attach_over_root(tree.as_fd())?;
    rustix::fs::mkdirat(&tree, &MOUNT_POINT[1..], rustix::fs::Mode::RWXU)
        .context("cannot create the mount point")?;
    let point = sys::open_in_root(
        tree.as_fd(),
        Path::new(MOUNT_POINT),
        rustix::fs::OFlags::PATH,
    )
    .context("cannot open the mount point")?;
    sys::attach(image.as_fd(), point.as_fd()).context("cannot mount the image")?;
    rootfs::pivot(&tree, 0)
}

/// How much of the machine a server may use. Asked for once, and while /proc and /sys can be seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Threads that serve, at most.
    pub(super) threads: usize,
    /// Bytes of decompressed data that are kept.
    pub(super) cache_bytes: usize,
}

impl Effort {
    /// One thread for each processor that this process may use, up to 8, and the cgroup's share of memory.
    pub(super) fn allowed() -> Effort {
        Effort {
            threads: std::thread::available_parallelism()
                .map_or(1, usize::from)
                .min(8),
            cache_bytes: budget::cache_bytes(),
        }
    }
}

impl Effort {
    /// For the keeper, which has it from the first worker.
    pub(super) fn encode(self) -> Vec<u8> {
        let words = [self.threads as u64, self.cache_bytes as u64];
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    pub(super) fn decode(raw: &[u8]) -> Option<Effort> {
        let (threads, rest) = raw.split_first_chunk()?;
        let cache_bytes = u64::from_le_bytes(*rest.first_chunk()?);
        Some(Effort {
            threads: u64::from_le_bytes(*threads) as usize,
            cache_bytes: cache_bytes as usize,
        })
    }
}

fn options(ids: &IdMap, effort: Effort) -> Options {
    let owner = match ids {
        IdMap::Own { uid, gid } => Owner::Fixed {
            uid: *uid,
            gid: *gid,
        },
        IdMap::Root { .. } => Owner::Fixed { uid: 0, gid: 0 },
        IdMap::All | IdMap::Ranges { .. } => Owner::Image,
    };
    Options {
        owner,
        stage: true,
        max_threads: effort.threads,
        cache_bytes: effort.cache_bytes,
    }
}

pub(super) fn open_tree(image: &Image, effort: Effort) -> Result<Server> {
    let file = image
        .file
        .try_clone()
        .context("cannot duplicate a descriptor")?;
    let what = || format!("cannot read image {}", image.path.display());
    match image.root {
        Root::Ext { top, .. } => Server::ext(
            file,
            image.offset,
            Some(image.len),
            top.directory(),
            options(&image.ids, effort),
        )
        .with_context(what),
        _ => Ok(Server::squashfs(
            Archive::open(file, image.offset, Some(image.len)).with_context(what)?,
            options(&image.ids, effort),
        )),
    }
}
