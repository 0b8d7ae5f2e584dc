//! System calls that `nix` and `rustix` do not offer safely; the only file of the program with `unsafe`.
//!
//! Wrappers take borrowed descriptors and paths, return owned descriptors, and set close-on-exec. Each
//! failure names its arguments.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::unistd::{ForkResult, Pid};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use crate::proc::Held;

/// Which side of a fork we are.
pub enum Fork {
    /// The caller, with the child's id.
    Parent(Pid),
    /// The new process.
    Child,
}

/// `fork(2)` of a process with one thread.
///
/// # Errors
/// `EAGAIN` at a process limit.
pub fn fork() -> Result<Fork> {
    // SAFETY: the process has one thread here (threads start only in the image server's worker, after its
    // last fork), so no lock can be held for ever in the child.
    match unsafe { nix::unistd::fork() }.context("cannot create a process (fork)")? {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// `fork(2)` of a process with threads, of which the child has only the calling one.
///
/// # Errors
/// `EAGAIN` at a process limit.
pub fn fork_beside_threads() -> Result<Fork> {
    // SAFETY: the C library keeps its own locks (memory, threads) usable in the child. Of ours, the caller's child
    // touches none that another thread may have held: the image server's new keeper opens everything anew.
    match unsafe { nix::unistd::fork() }.context("cannot create a process (fork)")? {
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        ForkResult::Child => Ok(Fork::Child),
    }
}

/// Whose child a new process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// Its creator's.
    Own,
    /// Its creator's parent's (`CLONE_PARENT`).
    Sibling,
}

/// `fork` whose child is process 1 of a new pid namespace (`clone(2)`, `pid_namespaces(7)`).
///
/// # Errors
/// `ENOSPC` or `EPERM` where pid namespaces are limited.
pub fn fork_into_pid_namespace(parent: Parent) -> Result<Fork> {
    let flags = match parent {
        Parent::Own => libc::CLONE_NEWPID | libc::SIGCHLD,
        Parent::Sibling => libc::CLONE_NEWPID | libc::CLONE_PARENT,
    };
    // SAFETY: as for fork: one thread, no stack is passed, so the child goes on with a copy of this one.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags as libc::c_ulong, 0, 0, 0, 0) };
    match pid {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent(Pid::from_raw(
            i32::try_from(pid).context("a process id")?,
        ))),
        _ => Err(io::Error::last_os_error())
            .context("cannot create a process in a new pid namespace (clone)"),
    }
}

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
    let attr = MountAttr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
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

/// Opens `path` for reference only, resolved as if `root` were `/`: no symbolic link leads out.
///
/// # Errors
/// As `openat2(2)`.
pub fn open_in_root(root: BorrowedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
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
            ResolveFlags::IN_ROOT,
        ) {
            // A rename elsewhere on the machine while `..` was resolved.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
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
            rustix::io::Errno::NOSPC => super::userns::no_mounts(error.into()),
            _ => error.into(),
        })
        .with_context(what)
}

/// A file descriptor number that this process was given: in `main`, or in a control message just received.
pub fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass numbers that the kernel has just handed to this process and that nothing else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The words of the command line, from `main`'s own parameters.
#[allow(clippy::not_unsafe_ptr_arg_deref)] // only `main` has such pointers to give
pub fn arguments(argc: i32, argv: *const *const libc::c_char) -> Vec<OsString> {
    (0..usize::try_from(argc).unwrap_or(0))
        // SAFETY: argv holds argc pointers to C strings for the life of the process (execve(2)).
        .map(|i| OsString::from_vec(unsafe { CStr::from_ptr(*argv.add(i)) }.to_bytes().to_vec()))
        .collect()
}

/// Overwrites the command line that `ps` shows: a server must not look like the program of the user that
/// happened to start it, or `pkill -f` of that program would hit the server. The environment goes too: it may hold
/// secrets of a program that ended long ago. Best effort.
pub fn set_title(title: &str) {
    // The areas lie between fields 48 and 49, 50 and 51 of /proc/self/stat (proc(5)): arg_start, arg_end, env_start,
    // env_end.
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return;
    };
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    let number = |field: usize| fields.get(field - 3).and_then(|f| f.parse::<usize>().ok());
    let (Some(start), Some(end)) = (number(48), number(49)) else {
        return;
    };
    if start == 0 || end <= start || end - start > 4 << 20 {
        return;
    }
    let len = end - start;
    let text = &title.as_bytes()[..title.len().min(len - 1)];
    // SAFETY: the kernel put the arguments there, the area is writable stack of this process, and nobody reads
    // it any more: the words were copied at the start.
    unsafe {
        let area = std::ptr::with_exposed_provenance_mut::<u8>(start);
        std::ptr::write_bytes(area, 0, len);
        std::ptr::copy_nonoverlapping(text.as_ptr(), area, text.len());
    }
    if let (Some(start), Some(end)) = (number(50), number(51))
        && start != 0
        && start < end
    {
        // SAFETY: as above; the C library's pointers into this area lead to empty strings from now on.
        unsafe {
            let area = std::ptr::with_exposed_provenance_mut::<u8>(start);
            std::ptr::write_bytes(area, 0, end - start);
        }
    }
    let name = CString::new(title.split(' ').next().unwrap_or("capsid")).unwrap_or_default();
    let _ = rustix::thread::set_name(&name);
}

/// Closes every descriptor from 3 on that is not in `keep` (sorted).
pub fn close_all_but(keep: &[RawFd]) {
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: the process owns its descriptor table, and nothing uses the closed ones afterwards: this
            // is called once, in a new process, which names what it still needs in `keep`.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    };
    let mut from = 3u32;
    for fd in keep
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .filter(|fd| *fd >= 3)
    {
        close(from, fd.saturating_sub(1));
        from = fd + 1;
    }
    close(from, u32::MAX);
}

/// Marks the directories among the caller's descriptors close-on-exec: a directory of the host must never become a way
/// out of the container. Called first of all, while nothing of ours is open and /proc is the host's; where there is none,
/// no descriptor is let through.
///
/// # Errors
/// Without /proc before Linux 5.11.
pub fn guard_directories() -> Result<()> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return close_on_exec();
    };
    let open: Vec<RawFd> = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // SAFETY: the number was just listed as open; if it was the listing's own it is closed by now and the
        // call fails with EBADF, which is ignored.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if rustix::fs::fstat(fd)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir())
        {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)
                .context("cannot keep a directory back")?;
        }
    }
    Ok(())
}

/// Marks every descriptor but the standard ones close-on-exec.
///
/// # Errors
/// Before Linux 5.11.
pub fn close_on_exec() -> Result<()> {
    // SAFETY: a flag of descriptors changes, and no memory is passed.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context("cannot keep descriptors back (close_range)")
    }
}

/// Makes descriptors 0, 1 and 2 exist, so that nothing that we open lands on them.
pub fn open_standard_descriptors() {
    for fd in 0..3 {
        // SAFETY: fcntl(F_GETFD) on a number has no effect beyond its answer.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // SAFETY: a valid C string; the lowest free number is `fd`, as all below are open.
            unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
        }
    }
}

/// Points 0, 1 and 2 at `/dev/null`.
pub fn detach_standard_descriptors() {
    // SAFETY: a valid C string; dup2 onto the standard descriptors of this process, then close of our own.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            for fd in 0..3 {
                libc::dup2(null, fd);
            }
            if null > 2 {
                libc::close(null);
            }
        }
    }
}

/// Drops the whole capability bounding set (`capabilities(7)`): nothing executed later gains any.
pub fn drop_bounding_set() {
    for capability in 0..64 {
        // SAFETY: prctl with integers only. Beyond the last known capability it fails with EINVAL.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// This process dies by `SIGKILL` when its parent ends (`PR_SET_PDEATHSIG`), also when that has happened already.
pub fn die_with(parent: Option<&Held>) {
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    if parent.is_some_and(|parent| !parent.is_alive()) {
        exit_now(255);
    }
}

/// Sends a signal with a number attached, as `sigqueue(3)` does, to exactly the process that is held.
///
/// # Errors
/// `ESRCH` when it has ended, `EPERM` when it is somebody else's.
pub fn queue_signal(process: &Held, signal: i32, value: i32) -> io::Result<()> {
    /// The head of `siginfo_t` for `SI_QUEUE` (`sigaction(2)`), padded to its 128 bytes.
    #[repr(C)]
    struct Queued {
        number: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: u64,
        rest: [u64; 12],
    }
    let info = Queued {
        number: signal,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        pid: rustix::process::getpid().as_raw_nonzero().get(),
        uid: rustix::process::getuid().as_raw(),
        value: u64::from(value.cast_unsigned()),
        rest: [0; 12],
    };
    // SAFETY: the structure has the size and layout of siginfo_t on 64-bit machines and lives through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_fd().as_raw_fd(),
            signal,
            &raw const info,
            0,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The signal by which process 1 of an instance is asked to stop it: `SIGRTMIN` of the kernel plus 3, as system managers
/// use for a halt. The C library's own real-time signals lie below.
pub const STOP_SIGNAL: i32 = 37;

/// A set of signals by number, real-time ones too.
pub fn signal_set(signals: impl IntoIterator<Item = i32>) -> nix::sys::signal::SigSet {
    let mut set = nix::sys::signal::SigSet::empty();
    for signal in signals {
        let mut raw = *set.as_ref();
        // SAFETY: the set was initialised by `empty`, and what `sigaddset` makes of it is a valid set.
        set = unsafe {
            libc::sigaddset(&raw mut raw, signal);
            nix::sys::signal::SigSet::from_sigset_t_unchecked(raw)
        };
    }
    set
}

/// Gives up every capability (`capabilities(7)`).
pub fn drop_capabilities() {
    let none = rustix::thread::CapabilitySet::empty();
    let sets = rustix::thread::CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    let _ = rustix::thread::set_capabilities(None, sets);
}

/// Other processes of the user may look at this one again: `setns(2)` into its namespaces asks for that.
pub fn allow_tracing() {
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable);
}

/// A signal disposition of this process.
pub fn ignore_signals(signals: &[nix::sys::signal::Signal]) {
    for signal in signals {
        // SAFETY: SIG_IGN runs no code of ours.
        let _ = unsafe { nix::sys::signal::signal(*signal, nix::sys::signal::SigHandler::SigIgn) };
    }
}

/// While this lives, a write beyond the limit of a file's size (`RLIMIT_FSIZE`) fails and does not end the process.
pub struct LimitsFail(Option<nix::sys::signal::SigHandler>);

impl LimitsFail {
    /// From now on.
    pub fn begin() -> LimitsFail {
        use nix::sys::signal::{SigHandler, Signal, signal};
        // SAFETY: SIG_IGN runs no code of ours.
        LimitsFail(unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.ok())
    }
}

impl Drop for LimitsFail {
    fn drop(&mut self) {
        use nix::sys::signal::{Signal, signal};
        if let Some(before) = self.0 {
            // SAFETY: this was the disposition before, so it is fit to be one.
            let _ = unsafe { signal(Signal::SIGXFSZ, before) };
        }
    }
}

/// Gives a signal its default disposition, for ending ourselves by it.
pub fn default_signal(signal: nix::sys::signal::Signal) {
    // SAFETY: SIG_DFL runs no code of ours.
    let _ = unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) };
}

/// The program that is started next inherits this descriptor.
///
/// # Errors
/// As `fcntl(2)`.
pub fn inherit(fd: &impl std::os::fd::AsFd) -> Result<()> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).context("cannot hand a descriptor on")
}

/// A helper program dies by `SIGTERM` when this thread ends, and begins with ordinary signals.
pub fn end_with_us(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: between fork and execve only system calls are made, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
                .map_err(Into::into)
        });
    }
}

/// Gives every signal its default disposition, whatever the caller ignored: for a service that nobody's shell started.
pub fn default_signals() {
    for signal in nix::sys::signal::Signal::iterator() {
        if !matches!(
            signal,
            nix::sys::signal::Signal::SIGKILL | nix::sys::signal::Signal::SIGSTOP
        ) {
            default_signal(signal);
        }
    }
}

/// Whether the caller ignored `SIGCHLD`.
static CHILDREN_IGNORED: AtomicBool = AtomicBool::new(false);

/// Gives `SIGCHLD` its default disposition: where it is ignored, nobody can wait for a child (`wait(2)`).
pub fn watch_children() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: SIG_DFL runs no code of ours.
    let before = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
    CHILDREN_IGNORED.store(matches!(before, Ok(SigHandler::SigIgn)), Ordering::Relaxed);
}

/// Gives the payload the disposition of `SIGCHLD` that the caller had.
pub fn restore_children() {
    if CHILDREN_IGNORED.load(Ordering::Relaxed) {
        ignore_signals(&[nix::sys::signal::Signal::SIGCHLD]);
    }
}

/// Brings the loopback interface of the current network namespace up (`netdevice(7)`).
///
/// # Errors
/// As the ioctl.
pub fn loopback_up() -> Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .context("cannot open a socket for the loopback interface")?;
    // SAFETY: ifreq is plain data, for which all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the ioctl reads one ifreq, which lives through the call.
    if unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    } != 0
    {
        return Err(io::Error::last_os_error()).context("cannot bring up the loopback interface");
    }
    Ok(())
}

/// Forbids the two ioctls that type into the caller's terminal, `TIOCSTI` and `TIOCLINUX`: a program in a
/// container shares the terminal with the shell outside. The number is compared in 32 bits, as the kernel
/// takes it. Speculation mitigations that seccomp brings before Linux 5.16 are declined: they slow the
/// payload and guard nothing here.
///
/// # Errors
/// When the kernel has seccomp and refuses the filter.
pub fn forbid_terminal_injection() -> Result<()> {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    const NR: u32 = 0;
    const REQUEST: u32 = 24; // low half of args[1] in struct seccomp_data, little-endian
    const TIOCLINUX: u32 = 0x541C;
    let ioctl = libc::SYS_ioctl as u32;
    // The number of ioctl in the 32-bit table of x86; on other machines the same as `ioctl`.
    let ioctl32 = if cfg!(target_arch = "x86_64") {
        54
    } else {
        ioctl
    };
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let filter = [
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0, NR),
        op(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, ioctl),
        op(BPF_JMP | BPF_JEQ | BPF_K, 0, 3, ioctl32),
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0, REQUEST),
        op(BPF_JMP | BPF_JEQ | BPF_K, 2, 0, libc::TIOCSTI as u32),
        op(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, TIOCLINUX),
        op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        op(
            BPF_RET | BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and the filter it points to live through the call; the kernel copies them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // A kernel without seccomp offers nobody this protection.
        Some(libc::ENOSYS | libc::EINVAL) => Ok(()),
        _ => Err(error).context("cannot install the filter against terminal injection (seccomp)"),
    }
}

/// Takes from a process that parses strangers' bytes what it never needs: starting programs, opening connections,
/// touching other processes. Its file tree is empty already. Machines whose numbers are not known here go without.
pub fn confine_server() {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    const DENIED: [libc::c_long; 9] = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_bpf,
        libc::SYS_keyctl,
    ];
    // Offsets in struct seccomp_data; AUDIT_ARCH of linux/audit.h.
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    let arch: u32 = match std::env::consts::ARCH {
        "x86_64" => 0xc000_003e,
        "aarch64" => 0xc000_00b7,
        _ => return,
    };
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = vec![
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0, ARCH),
        op(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, arch),
        op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0, NR),
    ];
    for call in DENIED {
        filter.push(op(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, call as u32));
        filter.push(op(
            BPF_RET | BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ));
    }
    filter.push(op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    let _ = rustix::thread::set_no_new_privs(true);
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program and the filter it points to live through the call; the kernel copies them.
    unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &raw const program,
        )
    };
}

/// Gives up every capability but the one that copying and detaching mounts takes (`capabilities(7)`). Best effort: what
/// it guards against is a bug.
pub fn keep_only_mounting() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    drop_bounding_set();
    let mounting = CapabilitySets {
        effective: CapabilitySet::SYS_ADMIN,
        permitted: CapabilitySet::SYS_ADMIN,
        inheritable: CapabilitySet::empty(),
    };
    let _ = set_capabilities(None, mounting);
}

/// Until the next `execve(2)` no other process of the user may trace this one or open its descriptors
/// (`PR_SET_DUMPABLE`): it holds capabilities in its user namespace, and files of the host.
pub fn forbid_tracing() {
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
}

/// A new anonymous session keyring, so that the caller's keys are out of reach.
pub fn new_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is passed. Kernels without keys say ENOSYS.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
}

/// Whether this process may mount in its user namespace, and that one is not the machine's own.
pub fn is_root_of_nested_namespace() -> bool {
    let nested = std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let fields: Vec<&str> = map.split_ascii_whitespace().collect();
        fields != ["0", "0", "4294967295"]
    });
    nested
        && rustix::thread::capabilities(None).is_ok_and(|sets| {
            sets.effective
                .contains(rustix::thread::CapabilitySet::SYS_ADMIN)
        })
}

/// Ends the process at once, running nothing of the parent's.
pub fn exit_now(status: u8) -> ! {
    // SAFETY: _exit never returns and runs no code of ours.
    unsafe { libc::_exit(status.into()) }
}

/// Opens with no flags but close-on-exec, for reference only.
///
/// # Errors
/// As `open(2)`, naming the path.
pub fn open_path(path: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", path.display()))
}

/// The user namespace that a namespace of another kind belongs to (`ioctl_ns(2)`).
///
/// # Errors
/// `EPERM` when it is outside of ours.
pub fn owner_of_namespace(namespace: BorrowedFd) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: takes no argument; the result is a new descriptor, close-on-exec, or negative.
    match unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) } {
        fd if fd >= 0 => Ok(own(fd)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Device and inode of an open file.
pub fn identity(fd: BorrowedFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// A system call that waits for the supervisor's word (`struct seccomp_notif`).
#[derive(Debug, Clone, Copy)]
pub struct Notification {
    /// Of this call, until it is answered.
    pub id: u64,
    /// The thread that calls.
    pub thread: u32,
    /// Number of the call.
    pub number: i32,
    /// Its arguments.
    pub args: [u64; 6],
}

/// The supervisor's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The kernel carries the call out.
    Continue,
    /// The call returns this.
    Value(i64),
    /// The call fails with this number of `errno(3)`.
    Error(i32),
}

/// Whether the kernel can ask a supervisor (`seccomp_unotify(2)`, Linux 5.0).
pub fn has_notifications() -> bool {
    let action: u32 = libc::SECCOMP_RET_USER_NOTIF;
    // SAFETY: the kernel reads one u32, which lives through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    done == 0
}

/// Installs a filter for this thread and all that it starts; the descriptor gives its questions. A call that a
/// supervisor works on is not interrupted by signals where the kernel can do that (Linux 5.19).
///
/// # Errors
/// `EBUSY` when a supervisor watches this process already.
pub fn install_listener(filter: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut(),
    };
    let basic = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let install = |flags: libc::c_ulong| {
        // SAFETY: the program and the filter it points to live through the call; the kernel copies them.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(own(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    };
    match install(basic | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(basic),
        other => other,
    }
}

/// The kernel wakes the other side on the same processor (Linux 6.6): a question and its answer are one after the other.
pub fn answer_on_same_processor(listener: BorrowedFd) {
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: the ioctl takes its argument by value.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS,
            SYNC_WAKE_UP,
        )
    };
}

/// Waits for a question.
///
/// # Errors
/// `ENOENT` when who asked has died, `EINTR` after a signal.
pub fn receive_notification(listener: BorrowedFd) -> io::Result<Notification> {
    /// Room for what later kernels add.
    #[repr(C)]
    struct Room {
        notification: libc::seccomp_notif,
        more: [u64; 32],
    }
    // SAFETY: plain data, for which all zeroes are a valid value; the kernel demands zeroes.
    let mut room: Room = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl writes one seccomp_notif, of the size in its number, into the room.
    let done = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut room,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let note = &room.notification;
    Ok(Notification {
        id: note.id,
        thread: note.pid,
        number: note.data.nr,
        args: note.data.args,
    })
}

/// Whether the question still stands: who asked lives, and waits.
pub fn is_pending(listener: BorrowedFd, id: u64) -> bool {
    // SAFETY: the ioctl reads one u64, which lives through the call.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
            &raw const id,
        ) == 0
    }
}

/// Answers a question.
///
/// # Errors
/// `ENOENT` when who asked is gone.
pub fn answer(listener: BorrowedFd, id: u64, answer: Answer) -> io::Result<()> {
    let (val, error, flags) = match answer {
        Answer::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Answer::Value(value) => (value, 0, 0),
        Answer::Error(error) => (0, -error, 0),
    };
    let response = libc::seccomp_notif_resp {
        id,
        val,
        error,
        flags,
    };
    // SAFETY: the ioctl reads one seccomp_notif_resp, which lives through the call.
    let done = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw const response,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives who asked a copy of an open file, as its lowest free descriptor with these flags (`O_CLOEXEC` or none).
///
/// # Errors
/// `EMFILE` when it has too many.
pub fn give_descriptor(
    listener: BorrowedFd,
    id: u64,
    file: BorrowedFd,
    flags: i32,
) -> io::Result<i32> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: 0,
        srcfd: file.as_raw_fd().cast_unsigned(),
        newfd: 0,
        newfd_flags: flags.cast_unsigned(),
    };
    // SAFETY: the ioctl reads one seccomp_notif_addfd, which lives through the call.
    let fd = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_ADDFD,
            &raw const request,
        )
    };
    if fd >= 0 {
        Ok(fd)
    } else {
        Err(io::Error::last_os_error())
    }
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
