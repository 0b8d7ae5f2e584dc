//! Capabilities that a program is started with, beyond or below those of its user (`capabilities(7)`). They are of the
//! container's user namespace: over the machine they give nothing.

use anyhow::{Result, bail};
use serde::Serialize;

/// Names of capabilities, by number: `linux/capability.h` up to Linux 6.12.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities: bit N is number N.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// All there are, also those of a later kernel.
    pub const ALL: Capabilities = Capabilities(u64::MAX);

    /// Reads `CAP_NET_RAW,net_admin` or `all`.
    ///
    /// # Errors
    /// Naming the option and the word that is none.
    pub fn parse(option: &str, text: &str) -> Result<Capabilities> {
        let mut set = 0;
        for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let name = word.to_ascii_uppercase();
            let name = name.strip_prefix("CAP_").unwrap_or(&name);
            set |= match NAMES.iter().position(|n| *n == name) {
                Some(number) => 1 << number,
                None if name == "ALL" => u64::MAX,
                None => {
                    bail!("{option}: {word:?} is no capability: use names like CAP_NET_RAW, or all")
                }
            };
        }
        Ok(Capabilities(set))
    }

    /// The names, by commas.
    pub fn names(self) -> String {
        if self == Capabilities::ALL {
            return "all".into();
        }
        let names = NAMES.iter().enumerate();
        let names = names.filter(|(number, _)| self.0 & (1 << number) != 0);
        let names: Vec<String> = names.map(|(_, name)| format!("CAP_{name}")).collect();
        names.join(",")
    }
}

impl Serialize for Capabilities {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.names())
    }
}

/// What changes of the rights of a program's user: root inside has all capabilities, others have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Rights {
    /// `--add-caps`.
    pub add: Capabilities,
    /// `--drop-caps` and `--no-privs`; these win.
    pub drop: Capabilities,
}

impl Rights {
    /// The capabilities that the program may have, for root inside or for another user.
    pub fn left(self, root: bool) -> Capabilities {
        let all = if root { u64::MAX } else { self.add.0 };
        Capabilities(all & !self.drop.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_any_form() {
        for text in ["CAP_NET_RAW,CAP_KILL", "net_raw, kill", "Cap_Kill,,NET_RAW"] {
            let set = Capabilities::parse("--add-caps", text).unwrap();
            assert_eq!(set, Capabilities(1 << 13 | 1 << 5), "{text}");
            assert_eq!(set.names(), "CAP_KILL,CAP_NET_RAW");
        }
        let all = Capabilities::parse("--drop-caps", "all").unwrap();
        assert_eq!((all, all.names()), (Capabilities::ALL, "all".into()));
        for wrong in ["CAP_BOGUS", "13", "net-raw", "kill;", "CAP_"] {
            let error = Capabilities::parse("--add-caps", wrong).unwrap_err();
            assert!(error.to_string().contains("--add-caps"), "{error}");
        }
    }

    #[test]
    fn what_is_dropped_is_gone() {
        let set = |text| Capabilities::parse("", text).unwrap();
        let rights = Rights {
            add: set("net_raw,kill"),
            drop: set("kill"),
        };
        assert_eq!(rights.left(false), set("net_raw"));
        assert_eq!(rights.left(true).0, !set("kill").0);
        assert_eq!(Rights::default().left(false), Capabilities(0));
        assert_eq!(Rights::default().left(true), Capabilities::ALL);
    }
}
