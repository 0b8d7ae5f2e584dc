//! Layers over a root by overlayfs (`mount(2)` with `userxattr`; Documentation/filesystems/overlayfs.rst).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;

use super::sys;

/// An empty tree in memory with `upper` and `work`.
pub(super) fn throw_away(size_bytes: Option<u64>) -> Result<OwnedFd> {
    let size = size_bytes
        .map(|b| CString::new(b.to_string()))
        .transpose()?;
    let mut options = vec![("mode", Some(c"0755"))];
    if let Some(size) = &size {
        options.push(("size", Some(size)));
    }
    let fd = sys::new_filesystem("tmpfs", &options)?;
    for name in ["upper", "work"] {
        make_part(&fd, name).context("cannot create the writable layer")?;
    }
    Ok(fd)
}

/// `upper` is what `/` will be: with the mode of a root, whatever the caller's umask is.
fn make_part(layer: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(0o755);
    rustix::fs::mkdirat(layer, name, mode)?;
    rustix::fs::chmodat(layer, name, mode, AtFlags::empty())
}

/// `upper` and `work` in the caller's directory, which is open, created when missing.
pub(super) fn upper_and_work(fd: &OwnedFd, dir: &Path) -> Result<[OwnedFd; 2]> {
    let part = |name: &str| {
        match make_part(fd, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("cannot create {name} in the overlay {}", dir.display())
                });
            }
        }
        sys::open_directory_of(fd.as_fd(), name).map_err(|error| bad_part(&error, name, dir))
    };
    Ok([part("upper")?, part("work")?])
}

/// `upper` of a read-only layer, if it has one. Never through a link: the kernel would follow it on the host.
pub(super) fn upper_of(layer: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>> {
    match sys::open_directory_of(layer.as_fd(), "upper") {
        Ok(fd) => Ok(Some(fd)),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(None),
            _ => Err(bad_part(&error, "upper", path)),
        },
    }
}

fn bad_part(error: &io::Error, name: &str, layer: &Path) -> anyhow::Error {
    let layer = layer.display();
    if error.raw_os_error() == Some(libc::ELOOP) {
        anyhow!(
            "cannot use the overlay {layer}: {name} in it is a symbolic link, and must be a directory"
        )
    } else {
        anyhow!("cannot open {name} in the overlay {layer}: {error}")
    }
}

/// What is written goes here.
pub(super) struct Writable {
    pub(super) upper: String,
    pub(super) work: String,
    /// The directory that was asked for; `None`: memory.
    pub(super) directory: Option<PathBuf>,
}

/// An overlayfs of these directories, topmost first.
pub(super) fn mount(lower: &[String], writable: Option<&Writable>) -> Result<OwnedFd> {
    let text = |s: &str| CString::new(s).context("a path holds a NUL byte");
    let lower = text(&lower.join(":"))?;
    let mut options = vec![
        ("source", Some(c"capsid")),
        ("lowerdir", Some(lower.as_c_str())),
    ];
    let (upper, work);
    if let Some(writable) = writable {
        (upper, work) = (text(&writable.upper)?, text(&writable.work)?);
        options.push(("upperdir", Some(&upper)));
        options.push(("workdir", Some(&work)));
    }
    // Marks in user.* attributes: trusted.* ones are not for user namespaces.
    options.push(("userxattr", None));
    let directory = writable.and_then(|w| w.directory.as_deref());
    sys::new_filesystem("overlay", &options).with_context(|| match directory {
        Some(dir) => format!(
            "cannot use {} as a writable overlay; its file system must support extended attributes and whiteouts (not NFS, Lustre or \
             FUSE): use --writable-tmpfs, or a directory on a local disk",
            dir.display()
        ),
        None => "cannot lay a layer over the image; the kernel must allow overlayfs in user namespaces (Linux 5.11)".into(),
    })
}

/// Whether overlayfs can be mounted in the namespaces of this process, which are its own to spoil.
///
/// # Errors
/// The kernel's refusal.
pub fn try_out() -> Result<()> {
    let tree = throw_away(None)?;
    sys::attach_over_root(tree.as_fd())?;
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    rustix::fs::mkdirat(&tree, "lower", Mode::RWXU).context("cannot create a directory")?;
    let writable = Writable {
        upper: format!("{path}/upper"),
        work: format!("{path}/work"),
        directory: None,
    };
    mount(&[format!("{path}/lower")], Some(&writable)).map(drop)
}
