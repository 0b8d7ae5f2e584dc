//! Makes FUSE mounts without a helper program: as root, or as a user in a user namespace of its own
//! (fsopen(2), user_namespaces(7); Linux 5.2).
//!
//! Who may do what with a file is decided by the kernel, by owner and mode (`default_permissions`), as for its own
//! squashfs: without that it would ask for `access(2)` alone, grant it when nobody answers, and let anybody read
//! everything. It has both with each entry, so that deciding costs no request.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::error::{Error, Result};

/// Bytes of a string that fsconfig(2) takes, without its NUL.
const SOURCE_MAX: usize = 255;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Whose mount it is: without `allow_other` only this user's processes can enter it.
    pub uid: u32,
    /// Group of the owner.
    pub gid: u32,
    /// Other users may enter it.
    pub allow_other: bool,
    /// What mount tables show as the source; of a long one, its end.
    pub source: String,
}

/// A mount that is not attached anywhere yet.
#[derive(Debug)]
pub struct Mount {
    /// For [`crate::Server::serve`].
    pub device: OwnedFd,
    /// The mount; attach it with move_mount(2).
    pub tree: OwnedFd,
}

/// Makes a read-only mount with `nosuid` and `nodev`.
///
/// # Errors
/// When there is no FUSE device, it may not be used, or the kernel refuses the mount.
pub fn fuse(options: &MountOptions) -> Result<Mount> {
    let device = open_device()?;
    let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| {
        match errno {
            Errno::NODEV => {
                Error::Fuse("the kernel has no FUSE: ask an administrator to load the module fuse")
            }
            Errno::PERM => Error::Fuse(
                "mounting is not permitted here: it takes root or a user namespace of one's own, \
                 which an administrator may have to permit",
            ),
            Errno::NOSYS => Error::Fuse("the kernel is too old: Linux 5.2 can open file systems"),
            errno => Error::sys("open the file system fuse", errno),
        }
    })?;
    let tree = configure(context.as_fd(), &device, options)
        .and_then(|()| make(context.as_fd()))
        .map_err(|errno| refused(context.as_fd(), errno))?;
    Ok(Mount { device, tree })
}

fn open_device() -> Result<OwnedFd> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => Error::Fuse(
                "there is no /dev/fuse: ask an administrator to load the kernel module fuse",
            ),
            Errno::ACCESS | Errno::PERM => Error::Fuse(
                "/dev/fuse may not be opened: ask an administrator to set its mode to 0666",
            ),
            errno => Error::sys("open /dev/fuse", errno),
        })?;
    // Character device 10:229 (Documentation/admin-guide/devices.txt).
    let is_fuse =
        rustix::fs::fstat(&device).is_ok_and(|s| s.st_rdev == rustix::fs::makedev(10, 229));
    if !is_fuse {
        return Err(Error::Fuse(
            "/dev/fuse is not the FUSE device: ask an administrator for mknod -m 666 /dev/fuse c 10 229",
        ));
    }
    Ok(device)
}

fn configure(
    context: BorrowedFd<'_>,
    device: &OwnedFd,
    options: &MountOptions,
) -> rustix::io::Result<()> {
    use rustix::mount::{fsconfig_set_flag, fsconfig_set_string};
    if !options.source.is_empty() {
        fsconfig_set_string(context, "source", &*shown_source(&options.source))?;
    }
    fsconfig_set_flag(context, "ro")?;
    fsconfig_set_string(context, "subtype", "capsid")?;
    // As text: before Linux 6.13 the kernel does not take a descriptor here.
    fsconfig_set_string(context, "fd", device.as_raw_fd().to_string())?;
    fsconfig_set_string(context, "rootmode", "40755")?;
    fsconfig_set_string(context, "user_id", options.uid.to_string())?;
    fsconfig_set_string(context, "group_id", options.gid.to_string())?;
    if options.allow_other {
        fsconfig_set_flag(context, "allow_other")?;
    }
    fsconfig_set_flag(context, "default_permissions")
}

/// A source as the kernel takes it: it refuses longer strings (fsconfig(2)).
fn shown_source(source: &str) -> Cow<'_, str> {
    const MARK: &str = "...";
    if source.len() <= SOURCE_MAX {
        return Cow::Borrowed(source);
    }
    let mut start = source.len() - (SOURCE_MAX - MARK.len());
    while !source.is_char_boundary(start) {
        start += 1;
    }
    Cow::Owned(format!("{MARK}{}", &source[start..]))
}

fn make(context: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    rustix::mount::fsconfig_create(context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// The error with what the kernel has to say about it, if anything.
fn refused(context: BorrowedFd<'_>, errno: Errno) -> Error {
    let mut text = std::io::Error::from(errno).to_string();
    let mut message = [0; 1024];
    while let Ok(len) = rustix::io::read(context, &mut message) {
        let said = String::from_utf8_lossy(&message[..len]);
        // Writing to a string cannot fail.
        let _written = write!(text, "; {}", said.trim());
    }
    Error::Mount {
        errno: errno.raw_os_error(),
        text,
    }
}

/// Opens another descriptor of a connection: each thread that serves should have its own.
///
/// # Errors
/// When `/dev/fuse` cannot be opened here, or the kernel cannot do it (before Linux 4.2).
pub fn clone_device(device: BorrowedFd<'_>) -> Result<OwnedFd> {
    let clone = open_device()?;
    crate::sys::join_connection(clone.as_fd(), device)
        .map_err(|errno| Error::sys("clone the FUSE device", errno))?;
    Ok(clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_of_any_length_is_one_that_the_kernel_takes() {
        for (unit, count) in [
            ("a", 255),
            ("a", 256),
            ("a", 5000),
            ("\u{fffd}", 86),
            ("\u{1f600}", 900),
        ] {
            for start in ["", "/", "//", "///"] {
                let source = format!("{start}{}end", unit.repeat(count - 3));
                let shown = shown_source(&source);
                assert!(
                    shown.len() <= SOURCE_MAX && shown.len() + 4 > SOURCE_MAX.min(source.len())
                );
                if source.len() <= SOURCE_MAX {
                    assert_eq!(shown, source);
                } else {
                    assert!(shown.starts_with("...") && source.ends_with(&shown[3..]));
                }
            }
        }
    }
}
