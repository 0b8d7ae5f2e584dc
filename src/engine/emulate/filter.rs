//! Which system calls the supervisor is asked about, and what their arguments mean.
//!
//! The filter names them by number for this machine's architecture. Calls of another one (32-bit programs) pass
//! untouched and see what is really there: one user, root; but the supervisor hears of those after which paths or rights
//! may be others. Everything that is not named is decided by the number alone,
//! which the kernel caches (Linux 5.11), so it costs nothing. `io_uring_setup(2)` is refused: it would make the same calls
//! past the filter, and programs do without it; so are the second set of numbers that x86 has (x32).

use libc::{c_long, sock_filter};

use super::super::sys::Notification;
use super::super::sys::seccomp::{self, ARCHITECTURE, end, if_equal, load_argument};

/// A file that a call names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Where a relative path begins: a descriptor or `AT_FDCWD`. The file itself without a path.
    pub dir: i32,
    /// Address of the path; `None` names the file that is open as `dir`.
    pub path: Option<u64>,
    /// A symbolic link at the end is followed.
    pub follow: bool,
    /// An empty path names the file that is open as `dir`.
    pub empty: bool,
}

/// A call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `stat(2)`: into a `struct stat` at this address.
    Stat(At, u64),
    /// `statx(2)`: flags, mask, address.
    Statx(At, i32, u32, u64),
    /// `chown(2)`: user and group, [`super::credentials::KEEP`] for neither.
    Chown(At, u32, u32),
    /// `open(2)` that may create a file: flags and mode.
    Open(At, i32, u32),
    /// `openat2(2)`: address and size of its `struct open_how`.
    OpenHow(At, u64, u64),
    /// `mkdir(2)`: mode.
    MakeDirectory(At, u32),
    /// `mknod(2)`: mode and device number.
    MakeNode(At, u32, u32),
    /// `symlink(2)`: address of the target.
    MakeLink(At, u64),
    /// `setxattr(2)`: addresses of name and value, size, flags.
    SetAttribute(At, u64, u64, u64, i32),
    /// `getxattr(2)`: addresses of name and buffer, size.
    Attribute(At, u64, u64, u64),
    /// `removexattr(2)`: address of the name.
    RemoveAttribute(At, u64),
    /// A call of `credentials(7)`.
    Identity,
    /// A call after which paths may mean something else to one process.
    Root,
    /// `prctl(PR_SET_TIMERSLACK)`: the slack is where the number of the credentials is kept.
    TimerSlack,
    /// `prctl(PR_SET_KEEPCAPS)`.
    KeepCapabilities(bool),
    /// `execve(2)`.
    Execute,
    /// `landlock_restrict_self(2)`: flags.
    Landlock(u32),
}

const FILES: &[c_long] = &[
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_mknodat,
    libc::SYS_mkdirat,
    libc::SYS_symlinkat,
    libc::SYS_openat2,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
];

/// Those that newer architectures have no more.
#[cfg(target_arch = "x86_64")]
const OLD_FILES: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_mknod,
    libc::SYS_mkdir,
    libc::SYS_symlink,
    libc::SYS_creat,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD_FILES: &[c_long] = &[];

const IDENTITY: &[c_long] = &[
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];

const ROOTS: &[c_long] = &[
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_umount2,
];

/// The same of 32-bit programs: chroot, pivot_root, unshare, setns, mount, move_mount, mount_setattr, umount, umount2.
#[cfg(target_arch = "x86_64")]
const ROOTS_32: &[u32] = &[61, 217, 310, 346, 21, 429, 442, 22, 52];
#[cfg(not(target_arch = "x86_64"))]
const ROOTS_32: &[u32] = &[61, 218, 337, 375, 21, 429, 442, 52];

/// prctl(2) of 32-bit programs, of Intel's and ARM's alike.
const PRCTL_32: u32 = 172;

/// On every architecture.
const LANDLOCK: u32 = 446;

const EXECUTE: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];

/// Asked about only when this bit of this argument is set.
#[cfg(target_arch = "x86_64")]
const CREATING: &[(c_long, u32)] = &[(libc::SYS_open, 1), (libc::SYS_openat, 2)];
#[cfg(not(target_arch = "x86_64"))]
const CREATING: &[(c_long, u32)] = &[(libc::SYS_openat, 2)];

/// The program of the filter; `None` on a machine that it is not written for.
pub fn program() -> Option<Vec<sock_filter>> {
    // Skips one when it is not equal.
    let equal = |value: u32| if_equal(value, 0, 1);
    let (allow, ask) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
    let mut others = vec![
        if_equal(seccomp::ARCHITECTURE_32, 1, 0),
        end(allow),
        seccomp::load_number(),
    ];
    for call in ROOTS_32.iter().chain([&LANDLOCK]) {
        others.extend([equal(*call), end(ask)]);
    }
    // The place of the credentials, which no thread changes by itself.
    others.extend([
        if_equal(PRCTL_32, 0, 3),
        load_argument(0),
        equal(libc::PR_SET_TIMERSLACK as u32),
        seccomp::refuse(libc::EPERM),
    ]);
    others.push(end(allow));
    let mut program = vec![
        seccomp::load_architecture(),
        if_equal(ARCHITECTURE?, u8::try_from(others.len()).ok()?, 0),
    ];
    program.extend(others);
    program.push(seccomp::load_number());
    if cfg!(target_arch = "x86_64") {
        const X32: u32 = 0x4000_0000;
        program.extend([seccomp::if_set(X32), seccomp::refuse(libc::ENOSYS)]);
    }
    // First those that are frequent and not decided by the number alone.
    for (call, index) in CREATING {
        program.extend([
            if_equal(*call as u32, 0, 4),
            load_argument(*index),
            seccomp::if_set(libc::O_CREAT as u32),
            end(ask),
            end(allow),
        ]);
    }
    program.extend([
        if_equal(libc::SYS_prctl as u32, 0, 5),
        load_argument(0),
        if_equal(libc::PR_SET_TIMERSLACK as u32, 1, 0),
        equal(libc::PR_SET_KEEPCAPS as u32),
        end(ask),
        end(allow),
    ]);
    for call in [FILES, OLD_FILES, IDENTITY, ROOTS, EXECUTE]
        .into_iter()
        .flatten()
    {
        program.extend([equal(*call as u32), end(ask)]);
    }
    program.extend([
        equal(LANDLOCK),
        end(ask),
        equal(libc::SYS_io_uring_setup as u32),
        seccomp::refuse(libc::ENOSYS),
        end(allow),
    ]);
    Some(program)
}

/// The program where only devices are emulated.
pub fn devices() -> Option<Vec<sock_filter>> {
    let (allow, ask) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
    let mut program = vec![
        seccomp::load_architecture(),
        if_equal(ARCHITECTURE?, 1, 0),
        end(allow),
        seccomp::load_number(),
    ];
    for call in [libc::SYS_mknodat as u32, LANDLOCK] {
        program.extend([if_equal(call, 0, 1), end(ask)]);
    }
    #[cfg(target_arch = "x86_64")]
    program.extend([if_equal(libc::SYS_mknod as u32, 0, 1), end(ask)]);
    program.push(end(allow));
    Some(program)
}

fn at(dir: u64, path: u64, flags: i32) -> At {
    let empty = flags & libc::AT_EMPTY_PATH != 0;
    At {
        dir: dir as i32,
        path: (path != 0 || !empty).then_some(path),
        follow: flags & libc::AT_SYMLINK_NOFOLLOW == 0,
        empty,
    }
}

fn open_file(fd: u64) -> At {
    at(fd, 0, libc::AT_EMPTY_PATH)
}

const CWD: u64 = libc::AT_FDCWD as u64;

fn plain(path: u64) -> At {
    at(CWD, path, 0)
}

/// A path whose last component is not followed: that of a file to be made.
fn new(dir: u64, path: u64) -> At {
    at(dir, path, libc::AT_SYMLINK_NOFOLLOW)
}

/// What is asked. The kernel takes the low half of most arguments.
pub fn call(note: &Notification) -> Option<Call> {
    let [a, b, c, d, e, _] = note.args;
    if note.number.cast_unsigned() == LANDLOCK {
        return Some(Call::Landlock(b as u32));
    }
    if Some(note.architecture) != ARCHITECTURE {
        return Some(Call::Root);
    }
    let number = c_long::from(note.number);
    if IDENTITY.contains(&number) {
        return Some(Call::Identity);
    }
    if ROOTS.contains(&number) {
        return Some(Call::Root);
    }
    if EXECUTE.contains(&number) {
        return Some(Call::Execute);
    }
    Some(match number {
        libc::SYS_fstat => Call::Stat(open_file(a), b),
        libc::SYS_newfstatat => Call::Stat(at(a, b, d as i32), c),
        libc::SYS_statx => Call::Statx(at(a, b, c as i32), c as i32, d as u32, e),
        libc::SYS_fchown => Call::Chown(open_file(a), b as u32, c as u32),
        libc::SYS_fchownat => Call::Chown(at(a, b, e as i32), c as u32, d as u32),
        libc::SYS_mknodat => Call::MakeNode(new(a, b), c as u32, d as u32),
        libc::SYS_mkdirat => Call::MakeDirectory(new(a, b), c as u32),
        libc::SYS_symlinkat => Call::MakeLink(new(b, c), a),
        libc::SYS_openat => Call::Open(new(a, b), c as i32, d as u32),
        libc::SYS_openat2 => Call::OpenHow(new(a, b), c, d),
        libc::SYS_setxattr => Call::SetAttribute(plain(a), b, c, d, e as i32),
        libc::SYS_lsetxattr => Call::SetAttribute(new(CWD, a), b, c, d, e as i32),
        libc::SYS_fsetxattr => Call::SetAttribute(open_file(a), b, c, d, e as i32),
        libc::SYS_getxattr => Call::Attribute(plain(a), b, c, d),
        libc::SYS_lgetxattr => Call::Attribute(new(CWD, a), b, c, d),
        libc::SYS_fgetxattr => Call::Attribute(open_file(a), b, c, d),
        libc::SYS_removexattr => Call::RemoveAttribute(plain(a), b),
        libc::SYS_lremovexattr => Call::RemoveAttribute(new(CWD, a), b),
        libc::SYS_fremovexattr => Call::RemoveAttribute(open_file(a), b),
        libc::SYS_prctl if a as i32 == libc::PR_SET_KEEPCAPS => Call::KeepCapabilities(b != 0),
        libc::SYS_prctl => Call::TimerSlack,
        _ => return old_call(number, [a, b, c]),
    })
}

#[cfg(target_arch = "x86_64")]
fn old_call(number: c_long, [a, b, c]: [u64; 3]) -> Option<Call> {
    const CREAT: i32 = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;
    Some(match number {
        libc::SYS_stat => Call::Stat(plain(a), b),
        libc::SYS_lstat => Call::Stat(new(CWD, a), b),
        libc::SYS_chown => Call::Chown(plain(a), b as u32, c as u32),
        libc::SYS_lchown => Call::Chown(new(CWD, a), b as u32, c as u32),
        libc::SYS_mknod => Call::MakeNode(new(CWD, a), b as u32, c as u32),
        libc::SYS_mkdir => Call::MakeDirectory(new(CWD, a), b as u32),
        libc::SYS_symlink => Call::MakeLink(new(CWD, b), a),
        libc::SYS_creat => Call::Open(new(CWD, a), CREAT, b as u32),
        libc::SYS_open => Call::Open(new(CWD, a), b as i32, c as u32),
        _ => return None,
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn old_call(_: c_long, _: [u64; 3]) -> Option<Call> {
    None
}

#[cfg(test)]
mod tests {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_W};

    use super::*;

    fn note(number: c_long, args: [u64; 6]) -> Notification {
        Notification {
            id: 1,
            thread: 1,
            architecture: ARCHITECTURE.unwrap(),
            number: i32::try_from(number).unwrap(),
            args,
        }
    }

    #[test]
    fn every_call_that_is_asked_about_is_understood() {
        let creating: Vec<c_long> = CREATING.iter().map(|c| c.0).collect();
        for number in [FILES, OLD_FILES, IDENTITY, ROOTS, EXECUTE, &creating]
            .into_iter()
            .flatten()
        {
            assert!(call(&note(*number, [0; 6])).is_some(), "call {number}");
        }
    }

    /// Runs the program as the kernel does.
    fn decide(number: c_long, arch: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend((number as u32).to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        data.extend(args.iter().flat_map(|a| a.to_le_bytes()));
        let program = program().unwrap();
        let (mut pc, mut a) = (0, 0u32);
        loop {
            let op = program[pc];
            pc += 1;
            let code = u32::from(op.code);
            let jump = |yes: bool| usize::from(if yes { op.jt } else { op.jf });
            if code == BPF_LD | BPF_W | BPF_ABS {
                let at = op.k as usize;
                a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            } else if code == BPF_JMP | BPF_JEQ | BPF_K {
                pc += jump(a == op.k);
            } else if code == BPF_JMP | BPF_JSET | BPF_K {
                pc += jump(a & op.k != 0);
            } else {
                return op.k;
            }
        }
    }

    #[test]
    fn filter_asks_about_what_it_should() {
        let arch = ARCHITECTURE.unwrap();
        let (allow, ask) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(decide(libc::SYS_fchownat, arch, [0; 6]), ask);
        assert_eq!(decide(libc::SYS_setgroups, arch, [0; 6]), ask);
        let other = seccomp::ARCHITECTURE_32;
        assert_eq!(decide(libc::SYS_fchownat, other, [0; 6]), allow);
        for call in ROOTS_32.iter().chain([&LANDLOCK]) {
            assert_eq!(decide((*call).into(), other, [0; 6]), ask, "{call}");
        }
        let slack = [libc::PR_SET_TIMERSLACK as u64, 50_001, 0, 0, 0, 0];
        let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        assert_eq!(decide(PRCTL_32.into(), other, slack), refused);
        assert_eq!(decide(PRCTL_32.into(), other, [0; 6]), allow);
        for call in ROOTS.iter().chain([&c_long::from(LANDLOCK)]) {
            assert_eq!(decide(*call, arch, [0; 6]), ask, "{call}");
        }
        if cfg!(target_arch = "x86_64") {
            let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
            assert_eq!(
                decide(libc::SYS_fchownat | 0x4000_0000, arch, [0; 6]),
                refused
            );
        }
        assert_eq!(decide(libc::SYS_read, arch, [0; 6]), allow);
        assert_eq!(decide(libc::SYS_openat, arch, [0; 6]), allow);
        let create = [0, 0, (libc::O_CREAT | libc::O_WRONLY) as u64, 0, 0, 0];
        assert_eq!(decide(libc::SYS_openat, arch, create), ask);
        assert_eq!(decide(libc::SYS_prctl, arch, [4, 0, 0, 0, 0, 0]), allow);
        let slack = [libc::PR_SET_TIMERSLACK as u64, 0, 0, 0, 0, 0];
        assert_eq!(decide(libc::SYS_prctl, arch, slack), ask);
        let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
        assert_eq!(decide(libc::SYS_io_uring_setup, arch, [0; 6]), refused);
    }
}
