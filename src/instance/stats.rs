//! What an instance uses.
//!
//! From its cgroup when it has one of its own; else summed over the processes of its pid namespace, memory as their
//! proportional share (PSS), so that pages which several of them map count once. Works without cgroups, systemd and D-Bus.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use super::Record;
use crate::engine::cgroup;
use crate::proc;

/// Whose limit is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitOf {
    /// The instance's own, or that of what surrounds it outside of jobs.
    Instance,
    /// The Slurm job's, which all its processes share.
    Job,
    /// There is none: all the memory that there is.
    Machine,
}

/// A look at an instance.
#[derive(Debug, Clone)]
pub struct Usage {
    at: Instant,
    /// Processors' time so far, nanoseconds, in user and in kernel mode.
    pub user_ns: u64,
    /// The same in kernel mode.
    pub system_ns: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes: its limit, the surrounding job's, or the machine's memory.
    pub memory_limit: u64,
    /// Whose limit that is.
    pub limit_of: LimitOf,
    /// Bytes read from disks.
    pub read: u64,
    /// Bytes written to disks.
    pub written: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Most of them that may be.
    pub pids_limit: Option<u64>,
}

/// Looks at an instance that runs; `None` when it has no process 1 yet.
pub fn usage(record: &Record) -> Option<Usage> {
    let init = record.init?;
    let machine = || {
        // As /proc/meminfo says, which may be hidden.
        let system = rustix::system::sysinfo();
        system.totalram * u64::from(system.mem_unit)
    };
    let in_job = record.job.is_some();
    let limit = |own: Option<u64>| {
        let around = cgroup::memory_limit(init.pid);
        match (own, around) {
            (Some(own), Some(around)) if own <= around => (own, LimitOf::Instance),
            (_, Some(around)) if in_job => (around, LimitOf::Job),
            (Some(limit), None) | (_, Some(limit)) => (limit, LimitOf::Instance),
            (None, None) => (machine(), LimitOf::Machine),
        }
    };
    let own = record
        .cgroup
        .as_deref()
        .and_then(|path| from_cgroup(&Path::new("/sys/fs/cgroup").join(path)));
    let mut usage = match own {
        Some(usage) => usage,
        None => from_processes(init.pid, record.container.processes),
    };
    (usage.memory_limit, usage.limit_of) = limit(Some(usage.memory_limit).filter(|l| *l > 0));
    Some(usage)
}

fn from_cgroup(path: &Path) -> Option<Usage> {
    let text = |file: &str| fs::read_to_string(path.join(file)).ok();
    let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
    let keyed = |text: &str, key: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok())
    };
    let cpu = text("cpu.stat")?;
    let io = text("io.stat").unwrap_or_default();
    let sum = |key: &str| -> u64 {
        let fields = io.split_ascii_whitespace();
        fields
            .filter_map(|f| f.strip_prefix(key)?.parse::<u64>().ok())
            .sum()
    };
    Some(Usage {
        at: Instant::now(),
        user_ns: keyed(&cpu, "user_usec ")? * 1000,
        system_ns: keyed(&cpu, "system_usec ")? * 1000,
        memory: number("memory.current")?,
        memory_limit: number("memory.max").unwrap_or(0),
        limit_of: LimitOf::Instance,
        read: sum("rbytes="),
        written: sum("wbytes="),
        pids: number("pids.current")?,
        pids_limit: number("pids.max"),
    })
}

fn from_processes(init: i32, namespace: u64) -> Usage {
    let tick_ns = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .and_then(|hz| u64::try_from(hz).ok())
        .filter(|hz| *hz > 0)
        .map_or(10_000_000, |hz| 1_000_000_000 / hz);
    let mut usage = Usage {
        at: Instant::now(),
        user_ns: 0,
        system_ns: 0,
        memory: 0,
        memory_limit: 0,
        limit_of: LimitOf::Machine,
        read: 0,
        written: 0,
        pids: 0,
        pids_limit: None,
    };
    for pid in members(init, namespace) {
        let file =
            |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        // What ended children used stays with the parents who collected them.
        let ticks = |fields: [usize; 2]| -> u64 {
            fields
                .into_iter()
                .filter_map(|f| proc::stat_field(pid, f))
                .sum()
        };
        usage.user_ns += ticks([14, 16]) * tick_ns;
        usage.system_ns += ticks([15, 17]) * tick_ns;
        usage.pids += proc::stat_field(pid, 20).unwrap_or(1);
        usage.memory += kib(&file("smaps_rollup"), "Pss:")
            .or_else(|| kib(&file("status"), "VmRSS:"))
            .unwrap_or(0);
        let io = file("io");
        let bytes = |key: &str| {
            io.lines()
                .find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        usage.read += bytes("read_bytes:");
        usage.written += bytes("write_bytes:");
    }
    usage
}

/// Bytes of a line in kB.
fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// The processes of a container: the descendants of its process 1, and who else is in its pid namespace, which has this
/// number.
fn members(init: i32, namespace: u64) -> BTreeSet<i32> {
    let own = PathBuf::from(format!("pid:[{namespace}]"));
    let is_inside =
        |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|theirs| theirs == own);
    let pids: Vec<(i32, i32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, i32::try_from(proc::stat_field(pid, 4)?).ok()?)))
        .collect();
    let mut members = BTreeSet::from([init]);
    loop {
        let before = members.len();
        members.extend(
            pids.iter()
                .filter(|(_, parent)| members.contains(parent))
                .map(|(pid, _)| *pid)
                .collect::<Vec<_>>(),
        );
        if members.len() == before {
            break;
        }
    }
    members.extend(pids.iter().map(|(pid, _)| *pid).filter(is_inside));
    members
}

/// A line of the table. The processors' share needs an earlier look.
pub fn row(name: &str, earlier: Option<&Usage>, now: &Usage) -> Vec<String> {
    let cpu = earlier.map_or(0.0, |earlier| {
        let used =
            (now.user_ns + now.system_ns).saturating_sub(earlier.user_ns + earlier.system_ns);
        100.0 * used as f64 / (now.at - earlier.at).as_nanos().max(1) as f64
    });
    let share = 100.0 * now.memory as f64 / now.memory_limit.max(1) as f64;
    vec![
        name.to_owned(),
        format!("{cpu:.2}%"),
        format!(
            "{} / {}{}",
            binary(now.memory),
            binary(now.memory_limit),
            if now.limit_of == LimitOf::Job {
                " (job)"
            } else {
                ""
            }
        ),
        format!("{share:.2}%"),
        format!("{} / {}", binary(now.read), binary(now.written)),
        now.pids.to_string(),
    ]
}

/// Bytes with a unit of 1024, as `1.5MiB`.
fn binary(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes}B"),
        _ => {
            format!("{value:.4}")
                .chars()
                .take(5)
                .collect::<String>()
                .trim_end_matches('.')
                .to_owned()
                + UNITS[unit]
        }
    }
}

/// The object that clients of the peers read.
pub fn as_json(name: &str, usage: &Usage) -> Value {
    json!({
        "instance": name,
        "cpu_stats": {
            "cpu_usage": {
                "total_usage": usage.user_ns + usage.system_ns,
                "usage_in_kernelmode": usage.system_ns,
                "usage_in_usermode": usage.user_ns,
            },
            "throttling_data": {},
        },
        "memory_stats": {
            "usage": {"usage": usage.memory, "limit": usage.memory_limit, "failcnt": 0},
            "limit_of": match usage.limit_of {
                LimitOf::Instance => "instance",
                LimitOf::Job => "job",
                LimitOf::Machine => "machine",
            },
            "stats": {},
        },
        "pids_stats": {"current": usage.pids, "limit": usage.pids_limit.unwrap_or(0)},
        "blkio_stats": {
            "io_service_bytes_recursive": [
                {"op": "Read", "value": usage.read},
                {"op": "Write", "value": usage.written},
            ],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(binary(512), "512B");
        assert_eq!(binary(1536), "1.500KiB");
        assert_eq!(binary(100 << 20), "100.0MiB");
    }

    #[test]
    fn own_process_is_a_member() {
        let usage = from_processes(i32::try_from(std::process::id()).unwrap(), 0);
        assert!(usage.pids >= 1 && usage.memory > 0);
    }
}
