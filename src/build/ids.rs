//! Whose files a build may make: how `%post` is root without being root.

use anyhow::Result;
use nix::sched::CloneFlags;

use super::keeper;
use crate::engine::{emulate, userns};
use crate::host::Host;
use crate::plan::{IdMap, SubIds};
use crate::say;

/// How owners other than root come into the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// The caller is the machine's root.
    All,
    /// Subordinate ids, mapped by newuidmap: the root file system holds files of theirs.
    Mapped(SubIds),
    /// One id is mapped, and ownership is emulated.
    Emulated,
    /// One id is mapped: only root exists.
    Single,
}

impl Ids {
    /// The best one that works here; `subordinate` says whether subordinate ids may be used.
    pub fn choose(host: &Host, subordinate: Subordinate) -> Ids {
        if host.uid == 0 {
            return Ids::All;
        }
        let found = match subordinate {
            Subordinate::Use => userns::subordinate_ids(&host.user.name, host.uid),
            Subordinate::Ignore => None,
        };
        if let Some(sub) = found {
            let ids = Ids::Mapped(sub);
            match ids.try_out(host) {
                Ok(()) => return ids,
                Err(error) => say::warn(format_args!(
                    "the subordinate ids of {} cannot be used: {error:#}",
                    host.user.name
                )),
            }
        }
        match emulate::check() {
            Ok(()) => Ids::Emulated,
            Err(_) => Ids::Single,
        }
    }

    /// Makes such a namespace, in a process of its own.
    fn try_out(self, host: &Host) -> Result<()> {
        keeper::in_child(|| userns::create(&self.map(host), CloneFlags::empty()).map(drop))
    }

    /// The map of the build's user namespace.
    pub fn map(self, host: &Host) -> IdMap {
        let (uid, gid) = (host.uid, host.gid);
        match self {
            Ids::All => IdMap::All,
            Ids::Mapped(sub) => IdMap::Ranges { uid, gid, sub },
            Ids::Emulated | Ids::Single => IdMap::Root { uid, gid },
        }
    }

    /// Says which way was taken.
    pub fn tell(self, host: &Host) {
        match self {
            Ids::All => {}
            Ids::Mapped(SubIds {
                uids: (first, count),
                ..
            }) => say::info(format_args!(
                "Building as root with subordinate ids {first}-{}",
                u64::from(first) + u64::from(count) - 1
            )),
            Ids::Emulated => say::info(format_args!(
                "Building as root with emulated ownership: no subordinate ids are used for {}",
                host.user.name
            )),
            Ids::Single => say::warn(format_args!(
                "only root exists in this build, and programs that give files to others fail: \
                 {} has no subordinate ids (a line in /etc/subuid and /etc/subgid, and newuidmap, see capsid doctor), \
                 and this kernel cannot emulate ownership (seccomp user notification)",
                host.user.name
            )),
        }
    }
}

/// Whether subordinate ids are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subordinate {
    /// Where there are any.
    Use,
    /// `--ignore-subuid`.
    Ignore,
}
