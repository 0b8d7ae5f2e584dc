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
    if let Some(mapper) = mapper {
        return mapper.map();
    }
    match ids {
        IdMap::Root { uid, gid } => write_maps(&format!("0 {uid} 1"), &format!("0 {gid} 1")),
        IdMap::Own { uid, gid } => write_maps(&format!("{uid} {uid} 1"), &format!("{gid} {gid} 1")),
        IdMap::Ranges { .. } | IdMap::All => Ok(()),
    }
}

fn write_maps(uids: &str, gids: &str) -> Result<()> {
    // Asked for by the kernel before an unprivileged gid_map (CVE-2014-8989).
    write_map("self", "setgroups", "deny")?;
    write_map("self", "uid_map", uids)?;
    write_map("self", "gid_map", gids)
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

/// A refusal of user namespaces, with what refuses them and what an administrator can do.
fn explain(error: nix::Error) -> anyhow::Error {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map(|t| t.trim().to_owned())
            .unwrap_or_default()
    };
    let hint = match error {
        nix::Error::ENOSPC | nix::Error::EUSERS => format!(
            "the limit user.max_user_namespaces (now {}) or user.max_mnt_namespaces is reached: sysctl -w user.max_user_namespaces=65536",
            read("/proc/sys/user/max_user_namespaces")
        ),
        nix::Error::EPERM if read("/proc/sys/kernel/unprivileged_userns_clone") == "0" => {
            "unprivileged user namespaces are off: sysctl -w kernel.unprivileged_userns_clone=1".into()
        }
        nix::Error::EPERM | nix::Error::EACCES if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1" => {
            "AppArmor restricts them: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile for capsid with `userns,`".into()
        }
        nix::Error::EPERM => "a security policy (seccomp, SELinux, a container around us) forbids them: see capsid doctor".into(),
        nix::Error::ENOSYS | nix::Error::EINVAL => "this kernel has none (CONFIG_USER_NS)".into(),
        _ => "see capsid doctor".into(),
    };
    anyhow!("cannot create a user namespace: {error}; {hint}")
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
        bail!(
            "{program} {} failed: {}; is it setuid root, and does the range in /etc/subuid and /etc/subgid stand?",
            words.join(" "),
            said.trim()
        );
    }
    Ok(())
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
