//! Creating a user namespace and mapping ids into it.
//!
//! Source: `user_namespaces(7)`, `newuidmap(1)`. newuidmap must be run by a process of the parent namespace, so
//! the mapper is forked before `unshare` and waits for a byte.

use std::io::{Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};

use super::sys::{self, Fork};
use crate::plan::{IdMap, SubIds};

/// Moves this process (one thread) into a new user namespace with these ids, and into new namespaces of the
/// further kinds, which then belong to it.
///
/// # Errors
/// Where the machine forbids it, with the setting that does.
pub fn create(ids: &IdMap, more: CloneFlags) -> Result<()> {
    debug_assert!(sys::has_one_thread(), "threads come later");
    let mapper = match ids {
        IdMap::Ranges { .. } | IdMap::All => Some(Mapper::start(*ids)?),
        IdMap::Own { .. } | IdMap::Root { .. } => None,
    };
    if let Err(error) = unshare(CloneFlags::CLONE_NEWUSER | more) {
        if let Some(mapper) = mapper {
            mapper.stop();
        }
        // Root of a namespace in which there may be no further one can do with that one.
        let full = matches!(error, nix::Error::ENOSPC | nix::Error::EUSERS);
        if full && *ids == IdMap::All && sys::is_root_of_nested_namespace() {
            return unshare(more).map_err(|error| no_mounts(error.into()));
        }
        return Err(explain(error));
    }
    // Also when this program may not be read (mode 0711): the files of /proc/self would be root's.
    sys::allow_tracing();
    if let Some(mapper) = mapper {
        mapper.map()?;
        // Mapped from outside, it may still have no rights; the first mount would say so, without the cause.
        return match policy(text_of) {
            Some(cause) if !sys::has_rights_to_mount() => {
                bail!("cannot use the new user namespace: {cause}")
            }
            _ => Ok(()),
        };
    }
    match ids {
        IdMap::Root { uid, gid } => write_maps(&format!("0 {uid} 1"), &format!("0 {gid} 1")),
        IdMap::Own { uid, gid } => write_maps(&format!("{uid} {uid} 1"), &format!("{gid} {gid} 1")),
        IdMap::Ranges { .. } | IdMap::All => Ok(()),
    }
}

fn write_maps(uids: &str, gids: &str) -> Result<()> {
    // Asked for by the kernel before an unprivileged gid_map (CVE-2014-8989).
    write_map("self", "setgroups", "deny")
        .and_then(|()| write_map("self", "uid_map", uids))
        .and_then(|()| write_map("self", "gid_map", gids))
        .map_err(|error| match policy(text_of) {
            Some(cause) => anyhow!("cannot map ids into the new user namespace: {cause}"),
            None => error,
        })
}

fn write_map(pid: &str, file: &str, text: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, text).with_context(|| format!("cannot write {text:?} to {path}"))
}

/// Maps every id of this namespace onto itself in the namespace of `pid`: what root does, who needs no helper.
fn map_all(pid: i32) -> Result<()> {
    for file in ["uid_map", "gid_map"] {
        let own = std::fs::read_to_string(format!("/proc/self/{file}"))
            .with_context(|| format!("cannot read {file}"))?;
        let lines = own.lines().filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (first, count) = (fields.next()?, fields.nth(1)?);
            Some(format!("{first} {first} {count}\n"))
        });
        write_map(&pid.to_string(), file, &lines.collect::<String>())?;
    }
    Ok(())
}

/// Joins a user namespace, unless this process lives in it already.
///
/// # Errors
/// As `setns(2)`.
pub fn join(userns: &OwnedFd) -> Result<()> {
    debug_assert!(sys::has_one_thread(), "threads come later");
    match setns(userns, CloneFlags::CLONE_NEWUSER) {
        // Also what the kernel says of the namespace that one is in.
        Err(nix::Error::EINVAL)
            if sys::identity(current()?.as_fd())? == sys::identity(userns.as_fd())? =>
        {
            Ok(())
        }
        other => other.context("cannot join the user namespace (setns)"),
    }
}

/// A refusal of a mount namespace, with the limit when that is what refuses.
pub fn no_mounts(error: std::io::Error) -> anyhow::Error {
    let full = error.raw_os_error() == Some(libc::ENOSPC);
    let limit = "/proc/sys/user/max_mnt_namespaces";
    match std::fs::read_to_string(limit) {
        Ok(now) if full => anyhow!(
            "cannot create a mount namespace: the limit user.max_mnt_namespaces (now {}) is reached: \
             sysctl -w user.max_mnt_namespaces=65536",
            now.trim()
        ),
        _ => anyhow!(error).context("cannot create a mount namespace"),
    }
}

/// A file of procfs or sysfs, trimmed; nothing when it is not there.
pub fn text_of(path: &str) -> String {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// A refusal of user namespaces, with what refuses them and what an administrator can do.
fn explain(error: nix::Error) -> anyhow::Error {
    let hint = match error {
        nix::Error::ENOSPC | nix::Error::EUSERS => format!(
            "the limit user.max_user_namespaces (now {}) or user.max_mnt_namespaces is reached: {}",
            text_of("/proc/sys/user/max_user_namespaces"),
            lasting("user.max_user_namespaces", "65536")
        ),
        nix::Error::EPERM | nix::Error::EACCES => policy(text_of).unwrap_or_else(|| {
            "a security policy (SELinux, a setting of this machine) forbids them".into()
        }),
        nix::Error::ENOSYS | nix::Error::EINVAL => "this kernel has none (CONFIG_USER_NS)".into(),
        _ => "see capsid doctor".into(),
    };
    anyhow!("cannot create a user namespace: {error}; {hint}")
}

/// A setting of the kernel as root types it, so that it outlasts a reboot (`sysctl.d(5)`).
pub fn lasting(setting: &str, value: &str) -> String {
    format!("echo {setting}={value} >/etc/sysctl.d/60-capsid.conf && sysctl --system")
}

/// What takes user namespaces, or the rights in them, from this process, and the way out. `read` reads a file.
pub fn policy(read: impl Fn(&str) -> String) -> Option<String> {
    if read("/proc/sys/kernel/unprivileged_userns_clone") == "0" {
        let remedy = lasting("kernel.unprivileged_userns_clone", "1");
        return Some(format!("unprivileged user namespaces are off: {remedy}"));
    }
    if read(APPARMOR) == "1" {
        return Some(format!(
            "AppArmor restricts user namespaces ({}=1): as root, put a profile with `userns,` for this program into {PROFILE}, as capsid doctor prints it, or {}",
            "kernel.apparmor_restrict_unprivileged_userns",
            lasting("kernel.apparmor_restrict_unprivileged_userns", "0")
        ));
    }
    // Mode 2 is a filter; systems put none around a login.
    let status = read("/proc/self/status");
    let filtered = status.lines().any(|line| line == "Seccomp:\t2");
    filtered.then(|| {
        "the container or service around this process forbids them, most likely by its filter of system calls (seccomp): \
         docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
            .into()
    })
}

/// Ubuntu's setting.
const APPARMOR: &str = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";
/// Where a profile for this program belongs.
pub const PROFILE: &str = "/etc/apparmor.d/capsid";

/// What root types so that AppArmor lets this program create user namespaces, for good.
pub fn apparmor_profile(program: &std::path::Path) -> Option<String> {
    // A word of the profile's language; what could end it is not guessed at.
    let program = program.to_str()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
    program.chars().all(plain).then(|| {
        format!(
            "printf 'abi <abi/4.0>,\\ninclude <tunables/global>\\nprofile capsid {program} flags=(unconfined) {{\\n  userns,\\n}}\\n' \
             >{PROFILE} && apparmor_parser -r {PROFILE}"
        )
    })
}

/// The process that maps ids from outside, where it is still permitted.
struct Mapper {
    pid: nix::unistd::Pid,
    start: std::io::PipeWriter,
    answer: std::io::PipeReader,
}

impl Mapper {
    fn start(ids: IdMap) -> Result<Mapper> {
        let (mut go, start) = std::io::pipe().context("cannot create a pipe")?;
        let (answer, mut reply) = std::io::pipe().context("cannot create a pipe")?;
        let target = rustix::process::getpid().as_raw_nonzero().get();
        match sys::fork()? {
            Fork::Parent(pid) => Ok(Mapper { pid, start, answer }),
            Fork::Child => {
                drop((start, answer));
                // A closed pipe means that the parent failed: go away.
                if go.read_exact(&mut [0]).is_ok() {
                    let done = match ids {
                        IdMap::Ranges { uid, gid, sub } => {
                            run_helper("newuidmap", target, uid, sub.uids)
                                .and_then(|()| run_helper("newgidmap", target, gid, sub.gids))
                        }
                        _ => map_all(target),
                    };
                    if let Err(error) = done {
                        let _ = reply.write_all(format!("{error:#}").as_bytes());
                    }
                }
                sys::exit_now(0)
            }
        }
    }

    /// Lets it go: it sees the closed pipe.
    fn stop(self) {
        drop(self.start);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }

    fn map(mut self) -> Result<()> {
        self.start
            .write_all(&[1])
            .context("the id mapper is gone")?;
        let mut error = String::new();
        self.answer
            .read_to_string(&mut error)
            .context("cannot hear from the id mapper")?;
        let _ = nix::sys::wait::waitpid(self.pid, None);
        if !error.is_empty() {
            bail!("{error}");
        }
        Ok(())
    }
}

/// Where the helpers are looked for: never through the caller's PATH.
const HELPER_DIRECTORIES: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin"];

/// The absolute path of a setuid helper.
pub fn helper(name: &str) -> Option<String> {
    HELPER_DIRECTORIES
        .iter()
        .map(|d| format!("{d}/{name}"))
        .find(|p| {
            rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok()
                && std::path::Path::new(p).is_file()
        })
}

fn run_helper(name: &str, pid: i32, own: u32, (start, count): (u32, u32)) -> Result<()> {
    let Some(program) = helper(name) else {
        bail!("{name} is not installed: apt-get install uidmap (or shadow-utils)")
    };
    let words = [
        pid.to_string(),
        "0".into(),
        own.to_string(),
        "1".into(),
        "1".into(),
        start.to_string(),
        count.to_string(),
    ];
    let out = Command::new(&program)
        .args(&words)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        if said.contains("Permission denied")
            && let Some(policy) = policy(text_of)
        {
            bail!("cannot map subordinate ids: {policy}");
        }
        let cause = helper_trouble(name, start, count)
            .unwrap_or_else(|| "does the range in /etc/subuid and /etc/subgid stand?".into());
        bail!(
            "{program} {} failed: {}; {cause}; --ignore-subuid does without",
            words.join(" "),
            said.trim()
        );
    }
    Ok(())
}

/// Why the helpers cannot map subordinate ids here; found out without running them.
///
/// # Errors
/// The cause, and the way out where there is one.
pub fn check_helpers(sub: &SubIds) -> Result<()> {
    for (name, (start, count)) in [("newuidmap", sub.uids), ("newgidmap", sub.gids)] {
        if let Some(trouble) = helper_trouble(name, start, count) {
            bail!("{trouble}");
        }
    }
    Ok(())
}

fn helper_trouble(name: &str, start: u32, count: u32) -> Option<String> {
    let program = helper(name)?;
    if rustix::thread::no_new_privs().unwrap_or(false) {
        return Some(format!(
            "{program} can have no rights here: the container or service around this process set no_new_privs"
        ));
    }
    let nosuid = rustix::fs::statvfs(&*program)
        .is_ok_and(|s| s.f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID));
    if nosuid {
        return Some(format!(
            "{program} can have no rights here: it lies on a file system that is mounted nosuid"
        ));
    }
    let file = if name == "newuidmap" {
        "uid_map"
    } else {
        "gid_map"
    };
    if !is_mapped(&text_of(&format!("/proc/self/{file}")), start, count) {
        return Some(format!(
            "the ids {start}-{} do not exist in the container around this process",
            u64::from(start) + u64::from(count) - 1
        ));
    }
    use std::os::unix::fs::MetadataExt as _;
    let privileged = std::fs::metadata(&program)
        .is_ok_and(|s| s.mode() & 0o4000 != 0 && s.uid() == 0)
        || rustix::fs::getxattr(&*program, "security.capability", &mut [0; 64]).is_ok();
    (!privileged).then(|| format!("{program} is not setuid root (chmod u+s {program})"))
}

/// Whether all of a range exists in the user namespace that has this map (`user_namespaces(7)`).
fn is_mapped(map: &str, start: u32, count: u32) -> bool {
    let (mut at, end) = (u64::from(start), u64::from(start) + u64::from(count));
    let mut lines: Vec<(u64, u64)> = map
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let first: u64 = fields.next()?.parse().ok()?;
            Some((first, first + fields.nth(1)?.parse::<u64>().ok()?))
        })
        .collect();
    lines.sort_unstable();
    for (from, to) in lines {
        if from <= at && at < to {
            at = to;
        }
    }
    at >= end
}

/// The user namespace of this process.
///
/// # Errors
/// When /proc is not mounted.
pub fn current() -> Result<OwnedFd> {
    Ok(std::fs::File::open("/proc/self/ns/user")
        .context("cannot open /proc/self/ns/user")?
        .into())
}

/// Subordinate ids of a user, from the files or, where the site keeps them elsewhere, from `getsubids`.
pub fn subordinate_ids(name: &str, uid: u32) -> Option<SubIds> {
    helper("newuidmap")?;
    helper("newgidmap")?;
    let range = |file: &str, group: bool| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        crate::plan::identity::sub_range(&text, name, uid)
            .or_else(|| ask_getsubids(name, uid, group))
    };
    Some(SubIds {
        uids: range("/etc/subuid", false)?,
        gids: range("/etc/subgid", true)?,
    })
}

/// `getsubids` prints lines like `0: ada 100000 65536`.
fn ask_getsubids(name: &str, uid: u32, group: bool) -> Option<(u32, u32)> {
    let program = helper("getsubids")?;
    let mut command = Command::new(program);
    if group {
        command.arg("-g");
    }
    let out = command
        .arg(name)
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let lines = String::from_utf8_lossy(&out.stdout).into_owned();
    let as_file: String = lines
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            (fields.len() == 4).then(|| format!("{}:{}:{}\n", fields[1], fields[2], fields[3]))
        })
        .collect();
    crate::plan::identity::sub_range(&as_file, name, uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_names_what_forbids_and_a_way_that_lasts() {
        let asked = |path: &'static str, text: &'static str| {
            policy(move |p| {
                if p == path {
                    text.into()
                } else {
                    String::new()
                }
            })
        };
        for (path, text, words) in [
            (APPARMOR, "1", &["AppArmor", PROFILE, "/etc/sysctl.d/"][..]),
            (
                "/proc/sys/kernel/unprivileged_userns_clone",
                "0",
                &["kernel.unprivileged_userns_clone=1", "/etc/sysctl.d/"],
            ),
            (
                "/proc/self/status",
                "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1",
                &["seccomp", "docker run --security-opt"],
            ),
        ] {
            let told = asked(path, text).unwrap();
            assert!(words.iter().all(|word| told.contains(word)), "{told}");
            assert!(!told.contains('\n'), "{told}");
        }
        for (path, text) in [
            (APPARMOR, "0"),
            ("/proc/sys/kernel/unprivileged_userns_clone", "1"),
            ("/proc/self/status", "Seccomp:\t0"),
        ] {
            assert_eq!(asked(path, text), None, "{path}");
        }
    }

    #[test]
    fn profile_is_for_a_plain_path_alone() {
        let profile = |path: &str| apparmor_profile(std::path::Path::new(path));
        let text = profile("/opt/capsid-1.0/bin/capsid").unwrap();
        assert!(
            text.contains("profile capsid /opt/capsid-1.0/bin/capsid flags=(unconfined)"),
            "{text}"
        );
        for path in ["/a b", "/a'b", "/a{b,c}", "/a*", "/a\"b", "/a\nb"] {
            assert_eq!(profile(path), None, "{path}");
        }
    }

    #[test]
    fn range_is_mapped_when_each_id_is() {
        let all = "         0          0 4294967295";
        assert!(is_mapped(all, 100_000, 65536));
        let pieces = "0 1000 1\n65536 200000 65536\n1 100000 65535\n";
        assert!(is_mapped(pieces, 1, 131_071));
        assert!(!is_mapped(pieces, 1, 131_072));
        assert!(!is_mapped("0 1000 1\n", 100_000, 65536));
        assert!(!is_mapped("", 0, 1));
    }
}
