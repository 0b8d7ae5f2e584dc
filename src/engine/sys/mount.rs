//! Mounts as descriptors: made, copied, changed and attached (`fsopen(2)`, `open_tree(2)`, `mount_setattr(2)`).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Attributes of a mount, as `mount_setattr(2)` has them.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 1;
    /// Set-user-id bits have no effect.
    pub const NOSUID: u64 = 2;
    /// Device nodes cannot be opened.
    pub const NODEV: u64 = 4;
}

/// Sets attributes on a mount and all below it. Flags that are already set stay, so a locked flag is no
/// trouble.
///
/// # Errors
/// As `mount_setattr(2)`; `ENOSYS` before Linux 5.12 is handled by a remount of the top mount.
pub fn set_mount_attributes(tree: BorrowedFd, set: u64) -> Result<()> {
    change_attributes(tree, set, libc::AT_RECURSIVE)
}

/// Makes a mount read-only, and none of those below it.
///
/// # Errors
/// As [`set_mount_attributes`].
pub fn make_top_read_only(tree: BorrowedFd) -> Result<()> {
    change_attributes(tree, attr::RDONLY, 0)
}

fn change_attributes(tree: BorrowedFd, set: u64, more: i32) -> Result<()> {
    let attr = MountAttr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | more;
    // SAFETY: the path is a valid empty C string, and attr a live structure of the size that is passed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context("cannot set mount attributes (mount_setattr)")
    }
}

/// A detached copy of the mount at `path` with everything below it.
///
/// # Errors
/// As `open_tree(2)`.
pub fn clone_tree(at: BorrowedFd, path: &Path) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(at, path, flags)
        .with_context(|| format!("cannot open {} for a bind mount", path.display()))
}

/// Attaches a detached mount at the place that `target` has open.
///
/// # Errors
/// As `move_mount(2)`; `ENOTDIR` for a file on a directory or the other way round.
pub fn attach(tree: BorrowedFd, target: BorrowedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", target, "", flags)?)
}

/// Attaches a detached mount over `/`: the process still sees the old root, and the descriptor the new one.
///
/// # Errors
/// As `move_mount(2)`.
pub fn attach_over_root(tree: BorrowedFd) -> Result<()> {
    rustix::mount::move_mount(tree, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("cannot attach a mount over / (move_mount)")
}

/// Sees that /proc shows the processes of this process's pid namespace.
///
/// # Errors
/// Why the kernel gives no such procfs.
pub fn own_processes() -> Result<()> {
    let own = std::fs::read_link("/proc/self").context("cannot read /proc/self")?;
    match own.as_os_str() == std::process::id().to_string().as_str() {
        true => Ok(()),
        false => new_filesystem("proc", &[]).map(drop),
    }
}

/// A new file system, configured and ready as a detached mount.
///
/// # Errors
/// As `fsopen(2)` and friends, naming the type.
pub fn new_filesystem(kind: &str, options: &[(&str, Option<&CStr>)]) -> Result<OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    };
    let what = || format!("cannot mount {kind}");
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).with_context(what)?;
    for (key, value) in options {
        match value {
            Some(value) => fsconfig_set_string(context.as_fd(), *key, *value),
            None => fsconfig_set_flag(context.as_fd(), *key),
        }
        .with_context(|| format!("cannot mount {kind}: option {key}"))?;
    }
    fsconfig_create(context.as_fd()).with_context(what)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let attributes = if kind == "devpts" {
        MountAttrFlags::MOUNT_ATTR_NOSUID
    } else {
        attributes
    };
    // A detached mount lives in a mount namespace of its own.
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|error| match error {
            rustix::io::Errno::NOSPC => crate::engine::userns::no_mounts(error.into()),
            // A whole view is given to those only who have one (`mount_namespaces(7)`, restrictions).
            rustix::io::Errno::PERM if kind == "proc" => anyhow!(
                "something is mounted over parts of this machine's /proc, and the kernel then gives nobody another one: start the \
                 container around us with its whole /proc (docker run --security-opt systempaths=unconfined, podman run \
                 --security-opt unmask=ALL), or do without process ids of the container's own (--pid, --containall, instances)"
            ),
            _ => error.into(),
        })
        .with_context(what)
}
