//! Resource limits by the unified cgroup hierarchy, where an ordinary user may set some.
//!
//! Three ways, in this order: a subtree that was delegated to us (`Delegate=yes`, or a container's own); a transient scope
//! that the user's systemd makes, asked over the session bus with `busctl`; and, where the surrounding batch job is already
//! limited as strictly, nothing at all. Inside a Slurm job only the last: leaving the job's cgroups would leave the job.
//! Source: `cgroups(7)`, the kernel's cgroup-v2 document, `org.freedesktop.systemd1(5)`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::plan::limits::{Policy, cpu_list};
use crate::say;

pub use crate::plan::limits::Limits;

/// Where the unified hierarchy is mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// How long systemd may take to move us.
const SCOPE: Duration = Duration::from_secs(10);
/// systemd's program for talking to it.
const BUSCTL: [&str; 2] = ["/usr/bin/busctl", "/bin/busctl"];
/// The unit that systemd's own instance for the user lives in: what is below belongs to that instance.
const USER_MANAGER: &str = "user@";

/// Puts this process, and all that it starts, under the limits. Gives the cgroup that was made for that, below the mount
/// point.
///
/// # Errors
/// When a limit cannot be enforced here, with what would help.
pub fn apply(limits: &Limits, policy: Policy, name: &str) -> Result<Option<PathBuf>> {
    if limits.is_empty() || policy == Policy::Off {
        return Ok(None);
    }
    let reason = match in_new_cgroup(limits, name) {
        Ok(path) => return Ok(Some(path)),
        Err(reason) => reason,
    };
    let missing = not_covered(limits);
    if missing.is_empty() {
        say::verbose(format_args!(
            "the limits that surround this process are as strict as those asked for"
        ));
        return Ok(None);
    }
    if policy == Policy::BestEffort {
        approximate(limits, &missing);
        return Ok(None);
    }
    let help = if in_batch_job() {
        "ask the batch system for the limit (srun --mem, --cpus-per-task)"
    } else if !has_unified_hierarchy() {
        "boot with systemd.unified_cgroup_hierarchy=1, or run it in a batch job that has the limit"
    } else {
        "an administrator can delegate cgroups to users (loginctl enable-linger)"
    };
    bail!(
        "cannot enforce {}: {reason:#}; {help}, or set CAPSID_LIMITS=best-effort to have limits approximated, or off",
        missing.join(", ")
    )
}

fn in_new_cgroup(limits: &Limits, name: &str) -> Result<PathBuf> {
    let own = usable()?;
    let unit = format!("capsid-{name}-{}", std::process::id());
    let path = match delegated(&own) {
        Some(top) => in_subtree(&top, &unit)?,
        None => in_scope(limits, &own, &unit)?,
    };
    write_limits(&Path::new(MOUNT).join(&path), limits)?;
    Ok(path)
}

/// By which way limits can be set here, in words.
///
/// # Errors
/// Why they cannot.
pub fn way() -> Result<String> {
    let own = usable()?;
    if let Some(top) = delegated(&own) {
        return Ok(format!("in the delegated cgroup /{}", top.display()));
    }
    if BUSCTL.iter().any(|p| Path::new(p).exists()) {
        return Ok("through the user's systemd".into());
    }
    bail!("no cgroup is delegated to this user, and there is no systemd (busctl) to ask for one")
}

/// Our cgroup, if limits may be set from it at all.
fn usable() -> Result<PathBuf> {
    if in_batch_job() {
        bail!("this is a batch job, whose cgroups belong to the batch system");
    }
    match own_cgroup() {
        Some(own) if has_unified_hierarchy() => Ok(own),
        _ => bail!("this machine has no unified cgroup hierarchy (cgroup v2) in use"),
    }
}

/// Whether version 2 is what limits are set in.
fn has_unified_hierarchy() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

/// Whether a batch system's cgroups are around us.
fn in_batch_job() -> bool {
    std::env::var_os("SLURM_JOB_ID").is_some()
        || fs::read_to_string("/proc/self/cgroup").is_ok_and(|t| t.contains("slurm"))
}

/// Our cgroup in the unified hierarchy, without the leading slash.
fn own_cgroup() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.into())
}

/// The nearest directory from our own upwards that was given to us as a whole, and not to the user's systemd.
fn delegated(own: &Path) -> Option<PathBuf> {
    let writable = |path: &Path| {
        let path = Path::new(MOUNT).join(path);
        ["cgroup.procs", "cgroup.subtree_control", "."]
            .iter()
            .all(|f| rustix::fs::access(path.join(f), rustix::fs::Access::WRITE_OK).is_ok())
    };
    let marked = |path: &Path| {
        let mut value = [0; 8];
        rustix::fs::getxattr(Path::new(MOUNT).join(path), "user.delegate", &mut value)
            .is_ok_and(|len| value[..len] == *b"1")
    };
    let managed = own
        .components()
        .any(|c| c.as_os_str().to_string_lossy().starts_with(USER_MANAGER));
    for path in own.ancestors() {
        let last = path.file_name().unwrap_or_default().to_string_lossy();
        if last.starts_with(USER_MANAGER) {
            return None;
        }
        if writable(path) && (marked(path) || !managed) {
            // Root may write everywhere; only what is marked, or a container's own hierarchy, is ours.
            let root = rustix::process::getuid().is_root();
            return (!root || marked(path) || path == Path::new("")).then(|| path.to_owned());
        }
    }
    None
}

/// A directory for us in a delegated subtree, with every controller that there is.
fn in_subtree(top: &Path, unit: &str) -> Result<PathBuf> {
    let top_path = Path::new(MOUNT).join(top);
    let what = || format!("cannot use the delegated cgroup {}", top_path.display());
    remove_empty(&top_path);
    if enable_controllers(&top_path).is_err() {
        // Processes may only be in leaves: those that are here move down, us among them.
        let leaf = top_path.join("capsid-others");
        make(&leaf).with_context(what)?;
        let procs = fs::read_to_string(top_path.join("cgroup.procs")).with_context(what)?;
        for pid in procs.lines() {
            // It may have ended, and then need not move.
            let _ = fs::write(leaf.join("cgroup.procs"), pid);
        }
        enable_controllers(&top_path).with_context(what)?;
    }
    let path = top_path.join(unit);
    make(&path).with_context(what)?;
    fs::write(path.join("cgroup.procs"), "0").with_context(what)?;
    Ok(top.join(unit))
}

fn make(path: &Path) -> std::io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn enable_controllers(path: &Path) -> std::io::Result<()> {
    let have = fs::read_to_string(path.join("cgroup.controllers"))?;
    let on = fs::read_to_string(path.join("cgroup.subtree_control"))?;
    let missing: Vec<String> = have
        .split_ascii_whitespace()
        .filter(|c| !on.split_ascii_whitespace().any(|o| o == *c))
        .map(|c| format!("+{c}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(path.join("cgroup.subtree_control"), missing.join(" "))
}

/// Directories that earlier runs left, which nobody is in any more.
fn remove_empty(top: &Path) {
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("capsid-") {
            // Refused by the kernel as long as somebody is in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// A transient scope of the user's systemd, with this process in it.
fn in_scope(limits: &Limits, own: &Path, unit: &str) -> Result<PathBuf> {
    let Some(program) = BUSCTL.into_iter().find(|p| Path::new(p).exists()) else {
        bail!(
            "no cgroup is delegated to this user, and there is no systemd (busctl) to ask for one"
        );
    };
    let mut words: Vec<String> = vec![];
    let mut count = 0;
    let mut add = |name: &str, kind: &str, values: &[String]| {
        count += 1;
        words.extend([name.to_owned(), kind.to_owned()]);
        words.extend_from_slice(values);
    };
    add("PIDs", "au", &["1".into(), std::process::id().to_string()]);
    add("Delegate", "b", &["true".into()]);
    add("CollectMode", "s", &["inactive-or-failed".into()]);
    let mut number = |name: &str, value: Option<u64>| {
        if let Some(value) = value {
            add(name, "t", &[value.to_string()]);
        }
    };
    number("MemoryMax", limits.memory);
    number("TasksMax", limits.pids);
    number("CPUQuotaPerSecUSec", limits.cpu_millis.map(|m| m * 1000));
    let bus = if rustix::process::getuid().is_root() {
        "--system"
    } else {
        "--user"
    };
    let mut command = Command::new(program);
    command
        .args([
            bus,
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
        ])
        .args([
            "org.freedesktop.systemd1.Manager",
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
        ])
        .args([&format!("{unit}.scope"), "fail", &count.to_string()])
        .args(&words)
        .arg("0")
        .stdin(Stdio::null());
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        let uid = rustix::process::getuid().as_raw();
        command.env("XDG_RUNTIME_DIR", format!("/run/user/{uid}"));
    }
    let end = Instant::now() + SCOPE;
    loop {
        let out = command.output().context("cannot run busctl")?;
        if out.status.success() {
            break;
        }
        // With many starts at once the bus refuses some.
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        let busy = said.contains("limit") || said.contains("temporarily");
        if !busy || Instant::now() > end {
            bail!(
                "no cgroup is delegated to this user, and the user's systemd makes none: {}",
                said.lines().next().unwrap_or("busctl failed")
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    loop {
        match own_cgroup() {
            Some(path) if path != own && path.to_string_lossy().contains(unit) => return Ok(path),
            _ if Instant::now() > end => {
                bail!("the user's systemd did not make the cgroup in time")
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Writes the limits into the files of a cgroup of ours; what the kernel has no file for cannot be enforced.
fn write_limits(path: &Path, limits: &Limits) -> Result<()> {
    let text = |n: u64| n.to_string();
    let wanted: [(&str, &str, Option<String>); 9] = [
        ("--memory", "memory.max", limits.memory.map(text)),
        (
            "--memory-swap",
            "memory.swap.max",
            limits.swap.map(|s| s.map_or_else(|| "max".into(), text)),
        ),
        (
            "--memory-reservation",
            "memory.low",
            limits.reservation.map(text),
        ),
        (
            "--cpus",
            "cpu.max",
            limits.cpu_millis.map(|m| format!("{} 100000", m * 100)),
        ),
        ("--cpuset-cpus", "cpuset.cpus", limits.cpuset_cpus.clone()),
        ("--cpuset-mems", "cpuset.mems", limits.cpuset_mems.clone()),
        (
            "--cpu-shares",
            "cpu.weight",
            limits.cpu_shares.map(|s| text(weight(s))),
        ),
        ("--pids-limit", "pids.max", limits.pids.map(text)),
        (
            "--blkio-weight",
            "io.weight",
            limits
                .blkio_weight
                .map(|w| format!("default {}", 1 + (w - 10) * 9999 / 990)),
        ),
    ];
    for (option, file, value) in wanted {
        let Some(value) = value else { continue };
        fs::write(path.join(file), &value).map_err(|error| {
            let controller = file.split('.').next().unwrap_or_default();
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied
            ) {
                anyhow!("{option}: the {controller} controller is not delegated to users here (Delegate= of user@.service)")
            } else {
                anyhow!("{option} {value}: {}", say::plain(&error.to_string()))
            }
        })?;
    }
    Ok(())
}

/// Shares of the older hierarchy as a weight of the unified one, as every runtime converts them.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// The limits asked for that nothing around us enforces already.
fn not_covered(limits: &Limits) -> Vec<&'static str> {
    let mut missing = Vec::new();
    let mut check = |option: &'static str, covered: bool| {
        if !covered {
            missing.push(option);
        }
    };
    if let Some(wanted) = limits.memory {
        check(
            "--memory",
            surrounding("memory", MEMORY).is_some_and(|m| m <= wanted),
        );
    }
    if let Some(wanted) = limits.pids {
        check(
            "--pids-limit",
            surrounding("pids", &["pids.max"]).is_some_and(|m| m <= wanted),
        );
    }
    let allowed = allowed_cpus();
    if let Some(wanted) = limits.cpu_millis {
        check("--cpus", allowed.len() as u64 * 1000 <= wanted);
    }
    if let Some(wanted) = limits.cpuset_cpus.as_deref().and_then(cpu_list) {
        check(
            "--cpuset-cpus",
            allowed.iter().all(|cpu| wanted.contains(cpu)),
        );
    }
    for (option, wanted) in [
        ("--memory-swap", limits.swap.is_some()),
        ("--memory-reservation", limits.reservation.is_some()),
        ("--cpuset-mems", limits.cpuset_mems.is_some()),
        ("--cpu-shares", limits.cpu_shares.is_some()),
        ("--blkio-weight", limits.blkio_weight.is_some()),
    ] {
        check(option, !wanted);
    }
    missing
}

/// The files of a limit to memory, of version 2 and 1.
const MEMORY: &[&str] = &["memory.max", "memory.limit_in_bytes"];

/// The smallest of a limit from our cgroup upwards, in either hierarchy.
fn surrounding(controller: &str, files: &[&str]) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    smallest_of(&text, Path::new(MOUNT), controller, files)
}

/// The same for the cgroups that a text of `cgroups(7)` names, below a mount point.
fn smallest_of(text: &str, mount: &Path, controller: &str, files: &[&str]) -> Option<u64> {
    let mut smallest: Option<u64> = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let top = if controllers.is_empty() {
            mount.to_owned()
        } else if controllers.split(',').any(|c| c == controller) {
            mount.join(controllers)
        } else {
            continue;
        };
        for directory in Path::new(path.trim_start_matches('/')).ancestors() {
            for file in files {
                let value = fs::read_to_string(top.join(directory).join(file))
                    .ok()
                    .and_then(|t| t.trim().parse().ok());
                // The older hierarchy writes "no limit" as a number near the largest.
                smallest = value
                    .filter(|v: &u64| *v < 1 << 60)
                    .into_iter()
                    .chain(smallest)
                    .min();
            }
        }
    }
    smallest
}

/// How much memory the cgroups around a process allow, bytes, in either version of cgroups; `None` without a limit.
pub fn memory_limit(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    smallest_of(&text, Path::new(MOUNT), "memory", MEMORY)
}

fn allowed_cpus() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None);
    set.map(|set| {
        (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|cpu| set.is_set(*cpu))
            .collect()
    })
    .unwrap_or_default()
}

/// What a process can do about itself: data size for memory, fewer processors for processors' time.
fn approximate(limits: &Limits, missing: &[&str]) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let mut done = Vec::new();
    if let Some(bytes) = limits.memory {
        let (soft, hard) = getrlimit(Resource::RLIMIT_DATA).unwrap_or((u64::MAX, u64::MAX));
        let bytes = bytes.min(soft).min(hard);
        if setrlimit(Resource::RLIMIT_DATA, bytes, hard.min(bytes)).is_ok() {
            done.push("--memory (data size of each process)");
        }
    }
    let allowed = allowed_cpus();
    let wanted: Vec<usize> = match (&limits.cpuset_cpus, limits.cpu_millis) {
        (Some(list), _) => {
            let list = cpu_list(list).unwrap_or_default();
            allowed.into_iter().filter(|c| list.contains(c)).collect()
        }
        (None, Some(millis)) => {
            let count = usize::try_from(millis.div_ceil(1000)).unwrap_or(usize::MAX);
            allowed.into_iter().take(count).collect()
        }
        (None, None) => Vec::new(),
    };
    if !wanted.is_empty() {
        let mut set = rustix::thread::CpuSet::new();
        wanted.iter().for_each(|cpu| set.set(*cpu));
        if rustix::thread::sched_setaffinity(None, &set).is_ok() {
            done.push("--cpus, --cpuset-cpus (processors that may be used)");
        }
    }
    let left: Vec<&str> = missing
        .iter()
        .copied()
        .filter(|m| !done.iter().any(|d| d.split([',', ' ']).any(|w| w == *m)))
        .collect();
    if !done.is_empty() {
        say::info(format_args!(
            "limits are approximated here (CAPSID_LIMITS=best-effort): {}",
            done.join("; ")
        ));
    }
    if !left.is_empty() {
        say::warn(format_args!(
            "not enforced here (CAPSID_LIMITS=best-effort): {}",
            left.join(", ")
        ));
    }
}

/// How many processes of our cgroup the kernel has killed because memory ran out.
pub fn oom_kills() -> u64 {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let counted = |path: PathBuf| {
        let text = fs::read_to_string(path).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("oom_kill "))?;
        line.trim().parse::<u64>().ok()
    };
    text.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
            let top = Path::new(MOUNT);
            match controllers {
                "" => counted(top.join(path).join("memory.events")),
                "memory" => counted(top.join("memory").join(path).join("memory.oom_control")),
                _ => None,
            }
        })
        .sum()
}

/// Leaves and removes a cgroup that [`apply`] made. systemd removes its scopes itself.
pub fn remove(path: Option<&Path>) {
    let Some(path) = path else { return };
    let path = Path::new(MOUNT).join(path);
    if path.extension().is_some_and(|e| e == "scope") {
        return;
    }
    let Some(top) = path.parent() else { return };
    let leaf = top.join("capsid-others");
    if make(&leaf).is_ok() && fs::write(leaf.join("cgroup.procs"), "0").is_ok() {
        // Best effort: the next run removes what is empty.
        let _ = fs::remove_dir(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_jobs_are_read_in_both_versions() {
        let top = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = top.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let read = |text: &str| smallest_of(text, top.path(), "memory", MEMORY);
        put(
            "memory/slurm/uid_1/job_7/memory.limit_in_bytes",
            "104857600\n",
        );
        let file = "memory/slurm/uid_1/job_7/step_0/memory.limit_in_bytes";
        put(file, "9223372036854771712\n");
        let v1 = "5:memory:/slurm/uid_1/job_7/step_0\n6:freezer:/slurm\n0::/\n";
        assert_eq!(read(v1), Some(100 << 20));
        let scope = "system.slice/n1_slurmstepd.scope/job_7";
        put(&format!("{scope}/memory.max"), "209715200\n");
        put(&format!("{scope}/step_batch/user/memory.max"), "max\n");
        assert_eq!(
            read(&format!("0::/{scope}/step_batch/user/task_0\n")),
            Some(200 << 20)
        );
        assert_eq!(read("0::/elsewhere\n"), None);
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!(super::weight(2), 1);
        assert_eq!(super::weight(262_144), 10_000);
        assert_eq!(super::weight(1024), 39);
    }
}
