//! Files by descriptor, and what the kernel says of them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};

/// A file descriptor number that this process was given: in `main`, or in a control message just received.
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass numbers that the kernel has just handed to this process and that nothing else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Opens with no flags but close-on-exec, for reference only.
///
/// # Errors
/// As `open(2)`, naming the path.
pub fn open_path(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Opens `path` for reference only, resolved as if `root` were `/`: no symbolic link leads out.
///
/// # Errors
/// As `openat2(2)`.
pub fn open_in_root(root: BorrowedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    resolve_in_root(root, path, flags, ResolveFlags::empty())
}

fn resolve_in_root(
    root: BorrowedFd,
    path: &Path,
    flags: OFlags,
    more: ResolveFlags,
) -> io::Result<OwnedFd> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    loop {
        match rustix::fs::openat2(
            root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | more,
        ) {
            // A rename elsewhere on the machine while `..` was resolved.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// The same for a path on whose way there is no link: one is refused (`ELOOP`).
///
/// # Errors
/// As `openat2(2)`.
pub fn open_in_root_directly(root: BorrowedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    resolve_in_root(root, path, flags, ResolveFlags::NO_SYMLINKS)
}

/// Opens the directory `name` of `dir` for reference only; a symbolic link is refused (`ELOOP`), wherever it leads.
///
/// # Errors
/// As `openat2(2)`.
pub fn open_directory_of(dir: BorrowedFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    Ok(rustix::fs::openat2(
        dir,
        name,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

/// Device and inode of an open file.
pub fn identity(fd: BorrowedFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// `statx(2)`, with the kernel's own structure.
///
/// # Errors
/// As the call.
pub fn statx(dir: BorrowedFd, path: &CStr, flags: i32, mask: u32) -> io::Result<libc::statx> {
    // SAFETY: plain data, for which all zeroes are a valid value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: a valid C string, and a structure that the kernel fills; both live through the call.
    let done = unsafe { libc::statx(dir.as_raw_fd(), path.as_ptr(), flags, mask, &raw mut stat) };
    if done == 0 {
        Ok(stat)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `fstat(2)`, with the kernel's own structure.
///
/// # Errors
/// As the call.
pub fn fstat(file: BorrowedFd) -> io::Result<libc::stat> {
    // SAFETY: plain data, for which all zeroes are a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives through the call, and the kernel fills it.
    if unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) } == 0 {
        Ok(stat)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A structure that [`statx`] or [`fstat`] gave, as the kernel would write it.
pub trait Raw: Copy {
    /// Its bytes.
    fn raw(&self) -> &[u8] {
        // SAFETY: the types below are plain C structures that began as zeroes, padding too, so each byte of them has
        // a value; the slice borrows the structure.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }
}

impl Raw for libc::stat {}
impl Raw for libc::statx {}

/// The file handle (`name_to_handle_at(2)`) with its type before it; `None` where the file system has none.
pub fn file_handle(file: BorrowedFd) -> Option<Vec<u8>> {
    /// `struct file_handle` with room for the longest.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; 128], // MAX_HANDLE_SZ
    }
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        handle: [0; 128],
    };
    let mut mount: i32 = 0;
    // SAFETY: an empty C string, and two places that the kernel fills, the first within the size that it says.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    let bytes = handle.handle.get(..usize::try_from(handle.bytes).ok()?)?;
    (done == 0).then(|| [&handle.kind.to_le_bytes()[..], bytes].concat())
}
