//! Resource limits as they are asked for.
//!
//! Source: `cgroups(7)`, the kernel's cgroup-v2 document; the file of `--apply-cgroups` is the `linux.resources` part of the
//! OCI runtime specification in TOML.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What to do with a limit that cannot be enforced here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// An error.
    #[default]
    Require,
    /// Approximate it by limits of the process and by its processors, and say so.
    BestEffort,
    /// Limits are not looked at.
    Off,
}

/// Upper bounds for everything in a container together.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Memory, bytes.
    pub memory: Option<u64>,
    /// Swap alone, bytes; `Some(None)` for all there is.
    pub swap: Option<Option<u64>>,
    /// Memory that is kept when others need some, bytes.
    pub reservation: Option<u64>,
    /// Processors' time, in thousandths of a processor.
    pub cpu_millis: Option<u64>,
    /// Processors that may be used, as `0-3,8`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes that may be used.
    pub cpuset_mems: Option<String>,
    /// Share of the processors against others, 2 to 262144; 1024 is usual.
    pub cpu_shares: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Share of the disks against others, 10 to 1000.
    pub blkio_weight: Option<u64>,
}

/// The options as typed.
#[derive(Debug, Default)]
pub struct Texts<'a> {
    /// `--memory`
    pub memory: Option<&'a str>,
    /// `--memory-swap`: memory and swap together; -1 for no limit of swap.
    pub memory_swap: Option<&'a str>,
    /// `--memory-reservation`
    pub memory_reservation: Option<&'a str>,
    /// `--cpus`
    pub cpus: Option<&'a str>,
    /// `--cpuset-cpus`
    pub cpuset_cpus: Option<&'a str>,
    /// `--cpuset-mems`
    pub cpuset_mems: Option<&'a str>,
    /// `--cpu-shares`
    pub cpu_shares: Option<&'a str>,
    /// `--pids-limit`
    pub pids_limit: Option<&'a str>,
    /// `--blkio-weight`
    pub blkio_weight: Option<&'a str>,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        *self == Limits::default()
    }

    /// Each limit in words.
    pub fn words(&self) -> impl Iterator<Item = String> {
        let bytes = |what: &str, n: Option<u64>| n.map(|n| format!("{what} of {n} bytes"));
        let plain = |what: &str, n: Option<u64>| n.map(|n| format!("{what} {n}"));
        let list = |what: &str, l: &Option<String>| l.as_ref().map(|l| format!("{what} {l}"));
        let words = [
            bytes("memory", self.memory),
            self.swap.map(|swap| match swap {
                Some(n) => format!("swap of {n} bytes"),
                None => "all the swap there is".into(),
            }),
            bytes("kept memory", self.reservation),
            self.cpu_millis
                .map(|n| format!("time of {}.{:03} processors", n / 1000, n % 1000)),
            list("processors", &self.cpuset_cpus),
            list("memory nodes", &self.cpuset_mems),
            plain("processors' share", self.cpu_shares),
            plain("processes", self.pids),
            plain("disks' share", self.blkio_weight),
        ];
        words.into_iter().flatten()
    }

    /// Reads the options.
    ///
    /// # Errors
    /// Naming the option and what it takes.
    pub fn parse(texts: &Texts) -> Result<Limits> {
        let memory = texts
            .memory
            .map(|t| size(t).context("--memory"))
            .transpose()?;
        let swap = match texts.memory_swap {
            None => None,
            Some("-1") => Some(None),
            Some(text) => {
                let total = size(text).context("--memory-swap")?;
                let Some(memory) = memory else {
                    bail!("--memory-swap needs --memory: it is the sum of both");
                };
                let Some(swap) = total.checked_sub(memory) else {
                    bail!(
                        "--memory-swap {text:?} is less than --memory: it is memory and swap together"
                    );
                };
                Some(Some(swap))
            }
        };
        Ok(Limits {
            memory,
            swap,
            reservation: texts
                .memory_reservation
                .map(|t| size(t).context("--memory-reservation"))
                .transpose()?,
            cpu_millis: texts.cpus.map(cpus).transpose()?,
            cpuset_cpus: set("--cpuset-cpus", texts.cpuset_cpus)?,
            cpuset_mems: set("--cpuset-mems", texts.cpuset_mems)?,
            cpu_shares: number("--cpu-shares", texts.cpu_shares, 2, 262_144)?,
            pids: match texts.pids_limit {
                Some("-1" | "0") => None,
                text => number("--pids-limit", text, 1, 1 << 32)?,
            },
            blkio_weight: number("--blkio-weight", texts.blkio_weight, 10, 1000)?,
        })
    }

    /// Reads the file of `--apply-cgroups`.
    ///
    /// # Errors
    /// When it is not TOML, or holds what is not supported.
    pub fn from_toml(text: &str) -> Result<Limits> {
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields)]
        struct File {
            memory: Option<Memory>,
            cpu: Option<Cpu>,
            pids: Option<Pids>,
            #[serde(rename = "blockIO")]
            block_io: Option<BlockIo>,
            devices: Option<toml::Value>,
            network: Option<toml::Value>,
            rdma: Option<toml::Value>,
            #[serde(rename = "hugepageLimits")]
            huge_pages: Option<toml::Value>,
            unified: Option<toml::Value>,
        }
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields)]
        struct Memory {
            limit: Option<i64>,
            reservation: Option<i64>,
            swap: Option<i64>,
        }
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields)]
        struct Cpu {
            shares: Option<u64>,
            quota: Option<i64>,
            period: Option<u64>,
            cpus: Option<String>,
            mems: Option<String>,
        }
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields)]
        struct Pids {
            limit: Option<i64>,
        }
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields)]
        struct BlockIo {
            weight: Option<u64>,
        }
        let file: File = toml::from_str(text).map_err(|e| anyhow::anyhow!("{}", e.message()))?;
        for (given, what) in [
            (
                &file.devices,
                "rules for devices (devices) are not supported: a container can use those that its user can, and with --contain only the harmless ones",
            ),
            (
                &file.network,
                "limits of the network (network) are not supported",
            ),
            (&file.rdma, "limits of RDMA (rdma) are not supported"),
            (
                &file.huge_pages,
                "limits of huge pages (hugepageLimits) are not supported",
            ),
            (
                &file.unified,
                "settings by their names in the kernel (unified) are not supported",
            ),
        ] {
            // An empty list asks for nothing.
            let asked = given
                .as_ref()
                .filter(|v| v.as_array().is_none_or(|a| !a.is_empty()));
            if asked.is_some() {
                bail!("{what}: take it out of the file");
            }
        }
        let (memory, cpu) = (
            file.memory.unwrap_or_default(),
            file.cpu.unwrap_or_default(),
        );
        let positive = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
        let limit = positive(memory.limit);
        let quota = positive(cpu.quota);
        let text = |n: Option<u64>| n.map(|n| n.to_string());
        let (limit_text, shares) = (text(limit), text(cpu.shares));
        let swap = memory.swap.map(|n| n.to_string());
        let weight = text(file.block_io.and_then(|b| b.weight));
        let pids = file.pids.and_then(|p| p.limit).map(|n| n.to_string());
        let mut limits = Limits::parse(&Texts {
            memory: limit_text.as_deref(),
            memory_swap: swap.as_deref(),
            cpuset_cpus: cpu.cpus.as_deref(),
            cpuset_mems: cpu.mems.as_deref(),
            cpu_shares: shares.as_deref(),
            pids_limit: pids.as_deref(),
            blkio_weight: weight.as_deref(),
            ..Texts::default()
        })?;
        limits.reservation = positive(memory.reservation);
        limits.cpu_millis = quota.map(|quota| {
            let period = cpu.period.filter(|p| *p > 0).unwrap_or(100_000);
            (quota.saturating_mul(1000) / period).max(1)
        });
        Ok(limits)
    }
}

/// A size with an optional unit K, M, G or T (powers of 1024), as `100m`, `1G`, `2GiB`.
///
/// # Errors
/// Anything else, and 0.
pub fn size(text: &str) -> Result<u64> {
    let wrong = || format!("{text:?} is not a size: use a number with K, M, G or T");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..]
        .to_ascii_uppercase()
        .trim_end_matches('B')
        .trim_end_matches('I')
    {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => bail!(wrong()),
    };
    let number: u64 = digits.parse().with_context(wrong)?;
    number
        .checked_mul(1 << unit)
        .filter(|n| *n > 0)
        .with_context(wrong)
}

fn cpus(text: &str) -> Result<u64> {
    match text.parse::<f64>() {
        Ok(cpus) if (0.001..=65536.0).contains(&cpus) => Ok((cpus * 1000.0).round() as u64),
        _ => bail!("--cpus {text:?}: use a number of processors such as 1.5"),
    }
}

fn number(option: &str, text: Option<&str>, least: u64, most: u64) -> Result<Option<u64>> {
    let Some(text) = text else { return Ok(None) };
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(Some(number)),
        _ => bail!("{option} {text:?}: use a number from {least} to {most}"),
    }
}

fn set(option: &str, text: Option<&str>) -> Result<Option<String>> {
    let Some(text) = text else { return Ok(None) };
    match cpu_list(text) {
        Some(_) => Ok(Some(text.to_owned())),
        None => bail!("{option} {text:?}: use a list such as 0-3,8"),
    }
}

/// The numbers of a list such as `0-3,8`; `None` when it is none (`cpuset(7)`).
pub fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (low, high): (usize, usize) = (low.trim().parse().ok()?, high.trim().parse().ok()?);
        if low > high || high > 65535 {
            return None;
        }
        numbers.extend(low..=high);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("64M").ok(), Some(64 << 20));
        assert_eq!(size("100m").ok(), Some(100 << 20));
        assert_eq!(size("1GiB").ok(), Some(1 << 30));
        assert_eq!(size("4096").ok(), Some(4096));
        for bad in ["", "0", "x", "5Q", "99999999999T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_are_read_or_named() {
        let limits = Limits::parse(&Texts {
            memory: Some("1G"),
            memory_swap: Some("1536M"),
            cpus: Some("1.5"),
            cpuset_cpus: Some("0-1,3"),
            pids_limit: Some("-1"),
            ..Texts::default()
        })
        .unwrap();
        assert_eq!(limits.swap, Some(Some(512 << 20)));
        assert_eq!(limits.cpu_millis, Some(1500));
        assert_eq!(limits.pids, None);
        for (texts, word) in [
            (
                Texts {
                    memory: Some("lots"),
                    ..Texts::default()
                },
                "--memory",
            ),
            (
                Texts {
                    cpus: Some("-1"),
                    ..Texts::default()
                },
                "--cpus",
            ),
            (
                Texts {
                    memory_swap: Some("1G"),
                    ..Texts::default()
                },
                "--memory-swap",
            ),
            (
                Texts {
                    cpuset_cpus: Some("1-0"),
                    ..Texts::default()
                },
                "--cpuset-cpus",
            ),
        ] {
            let error = format!("{:#}", Limits::parse(&texts).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn file_of_the_runtime_specification_is_read() {
        let limits = Limits::from_toml(
            "[memory]\nlimit = 524288000\n[cpu]\nquota = 50000\nperiod = 100000\ncpus = \"0\"\n[pids]\nlimit = 20\n",
        )
        .unwrap();
        assert_eq!(limits.memory, Some(524_288_000));
        assert_eq!(limits.cpu_millis, Some(500));
        assert_eq!(limits.pids, Some(20));
        assert!(Limits::from_toml("[memory]\nlimits = 1\n").is_err());
        assert!(Limits::from_toml("[").is_err());
        assert!(Limits::from_toml("devices = []\n").is_ok());
        for (text, word) in [
            ("[[devices]]\nallow = false\naccess = \"rwm\"\n", "devices"),
            ("[network]\nclassID = 1\n", "network"),
            ("[unified]\n\"memory.max\" = \"1\"\n", "unified"),
        ] {
            let error = Limits::from_toml(text).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("not supported"),
                "{error}"
            );
        }
    }
}
