//! Who the container's processes are: the id map, and the lines that `passwd(5)` and `group(5)` get.
//!
//! Source: `user_namespaces(7)`, `newuidmap(1)`, `subuid(5)`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::host::Host;

/// Subordinate ids of a user: first id and count, for users and for groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubIds {
    /// `/etc/subuid`.
    pub uids: (u32, u32),
    /// `/etc/subgid`.
    pub gids: (u32, u32),
}

/// The map of the container's user namespace. `uid` and `gid` are the caller's own outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdMap {
    /// The caller is itself, and nobody else exists.
    Own {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// The caller is the machine's root, and everybody exists.
    All,
    /// The caller is root, and nobody else exists.
    Root {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// The caller is root; ids from 1 are subordinate ids.
    Ranges {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
        /// What ids from 1 on are outside.
        sub: SubIds,
    },
}

impl IdMap {
    /// Whether the process is root inside.
    pub fn is_root(&self) -> bool {
        !matches!(self, IdMap::Own { .. })
    }

    /// Whether ids other than the caller's exist inside, so that owners in the image mean something.
    pub fn has_others(&self) -> bool {
        matches!(self, IdMap::All | IdMap::Ranges { .. })
    }
}

/// Who keeps the owners of files that are not root's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ownership {
    /// The kernel, as far as ids are mapped.
    Kernel,
    /// Our own supervisor, for a container in which only root exists (`engine::emulate`).
    Emulated,
    /// The kernel, as far as ids are mapped; and our own supervisor lets root make devices, which are then left out of the
    /// image: scripts that make some go on.
    Devices,
}

/// Chooses who does. `possible`: the machine can emulate, and it is wanted.
pub fn ownership(ids: &IdMap, possible: bool) -> Ownership {
    if possible && matches!(ids, IdMap::Root { .. }) {
        Ownership::Emulated
    } else {
        Ownership::Kernel
    }
}

/// Chooses the map. `fakeroot` is `Some` when asked for, holding the subordinate ids if there are any.
pub fn choose(host: &Host, fakeroot: Option<&Option<SubIds>>) -> IdMap {
    let (uid, gid) = (host.uid, host.gid);
    match fakeroot {
        _ if uid == 0 => IdMap::All,
        None => IdMap::Own { uid, gid },
        Some(None) => IdMap::Root { uid, gid },
        Some(Some(sub)) => IdMap::Ranges {
            uid,
            gid,
            sub: *sub,
        },
    }
}

/// The largest range for `name` or `uid` in the text of `/etc/subuid` or `/etc/subgid`: first id, count.
/// Ranges that overflow or reach below 1000 are not usable.
pub fn sub_range(text: &str, name: &str, uid: u32) -> Option<(u32, u32)> {
    let id = uid.to_string();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let owner = fields.next()?;
            let start: u32 = fields.next()?.parse().ok()?;
            let count: u32 = fields.next()?.parse().ok()?;
            ((owner == name || owner == id)
                && start >= 1000
                && count > 0
                && start.checked_add(count).is_some())
            .then_some((start, count))
        })
        .max_by_key(|(_, count)| *count)
}

/// Ids that a user should get: as many as a system has, and `nobody`.
pub const WANTED_IDS: u32 = 65536;

/// A range of [`WANTED_IDS`] that nobody has: not in these texts of `/etc/subuid` and `/etc/subgid`, nor as somebody's own
/// id in these of `/etc/passwd` and `/etc/group`. From `first` on; `None` when there is none.
pub fn free_range(ranges: &[&str], accounts: &[&str], first: u32) -> Option<u32> {
    let number = |field: Option<&str>| field?.trim().parse::<u64>().ok();
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for line in ranges.iter().flat_map(|text| text.lines()) {
        let mut fields = line.split(':').skip(1);
        if let (Some(start), Some(count)) = (number(fields.next()), number(fields.next())) {
            taken.push((start, start.saturating_add(count).min(1 << 33)));
        }
    }
    for line in accounts.iter().flat_map(|text| text.lines()) {
        taken.extend(
            number(line.split(':').nth(2)).map(|id| (id, id.saturating_add(1).min(1 << 33))),
        );
    }
    taken.sort_unstable();
    let mut start = u64::from(first);
    for (from, end) in taken {
        if from >= start + u64::from(WANTED_IDS) {
            break;
        }
        start = start.max(end);
    }
    // The last id is no id.
    let end = start + u64::from(WANTED_IDS);
    (end <= u64::from(u32::MAX)).then_some(u32::try_from(start).ok()?)
}

/// What the account files inside say of the caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// Id inside.
    pub uid: u32,
    /// Group id inside.
    pub gid: u32,
    /// Real name.
    pub gecos: String,
    /// Home inside.
    pub home: PathBuf,
    /// Login shell.
    pub shell: String,
    /// The caller's groups: name and id.
    pub groups: Vec<(String, u32)>,
}

/// The image's passwd with the caller in it: an existing line of the same id gets the caller's name, real
/// name and home; else a line is added.
pub fn passwd_text(image: &str, account: &Account) -> String {
    let mut out = String::with_capacity(image.len() + 100);
    let mut found = false;
    for line in image.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let same = fields.len() >= 7 && fields[2].parse() == Ok(account.uid);
        if !same || found {
            out.push_str(line);
        } else {
            found = true;
            let (a, f) = (account, &fields);
            out.push_str(&format!(
                "{}:{}:{}:{}:{}:{}:{}",
                a.name,
                f[1],
                a.uid,
                a.gid,
                a.gecos,
                a.home.display(),
                f[6]
            ));
        }
        out.push('\n');
    }
    if !found {
        let a = account;
        out.push_str(&format!(
            "{}:x:{}:{}:{}:{}:{}\n",
            a.name,
            a.uid,
            a.gid,
            a.gecos,
            a.home.display(),
            a.shell
        ));
    }
    out
}

/// The image's group file with the caller's groups added: those of which it has no line of the same name and id. One that
/// the image calls otherwise is known by both names.
pub fn group_text(image: &str, account: &Account) -> String {
    let mut out = image.to_owned();
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    let has = |name: &str, gid: u32| {
        image.lines().any(|line| {
            let mut fields = line.split(':');
            fields.next() == Some(name) && fields.nth(1).is_some_and(|g| g.parse() == Ok(gid))
        })
    };
    for (name, gid) in &account.groups {
        if !has(name, *gid) {
            out.push_str(&format!("{name}:x:{gid}:{}\n", account.name));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ada() -> Account {
        Account {
            name: "ada".into(),
            uid: 1000,
            gid: 100,
            gecos: "Ada".into(),
            home: "/home/ada".into(),
            shell: "/bin/bash".into(),
            groups: vec![("users".into(), 100), ("lab".into(), 5000)],
        }
    }

    #[test]
    fn caller_is_added_to_passwd() {
        assert_eq!(
            passwd_text("root:x:0:0:root:/root:/bin/sh", &ada()),
            "root:x:0:0:root:/root:/bin/sh\nada:x:1000:100:Ada:/home/ada:/bin/bash\n"
        );
    }

    #[test]
    fn line_of_the_same_id_is_taken_over_but_keeps_its_shell() {
        let text = passwd_text("node:x:1000:1000::/home/node:/bin/ash\n", &ada());
        assert_eq!(text, "ada:x:1000:100:Ada:/home/ada:/bin/ash\n");
    }

    #[test]
    fn groups_are_added_that_have_no_line_of_their_name_and_id() {
        for (image, added) in [
            ("users:x:100:\n", "lab:x:5000:ada\n"),
            ("users:x:100:", "lab:x:5000:ada\n"),
            ("staff:x:100:\nlab:x:5000:eve\n", "users:x:100:ada\n"),
            ("users:x:7:\nlab:!:5000\n", "users:x:100:ada\n"),
            ("users::100:\nlab\n:x:5000:\n", "lab:x:5000:ada\n"),
            ("", "users:x:100:ada\nlab:x:5000:ada\n"),
        ] {
            let newline = if image.ends_with('\n') || image.is_empty() {
                ""
            } else {
                "\n"
            };
            let expected = format!("{image}{newline}{added}");
            assert_eq!(group_text(image, &ada()), expected);
        }
    }

    #[test]
    fn free_range_overlaps_nobodys_in_either_file() {
        let free = |ranges: &[&str], accounts: &[&str]| free_range(ranges, accounts, 100_000);
        assert_eq!(free(&[], &[]), Some(100_000));
        assert_eq!(free(&["eve:100000:65536\n"], &[]), Some(165_536));
        let groups = "eve:165536:65536\n1007:100000:65536\n# x\nbad:1\n";
        assert_eq!(free(&["eve:300000:10\n", groups], &[]), Some(231_072));
        assert_eq!(free(&["eve:231071:1\n", groups], &[]), Some(231_072));
        // A gap that is just large enough, and one that is one too small.
        let gap = |size: u32| format!("a:100000:10\nb:{}:65536\n", 100_010 + size);
        assert_eq!(free(&[&gap(65536)], &[]), Some(100_010));
        assert_eq!(free(&[&gap(65535)], &[]), Some(100_010 + 65535 + 65536));
        // A person of a directory service with a high id of its own.
        assert_eq!(free(&[], &["ada:x:120000:100::/:/bin/sh\n"]), Some(120_001));
        assert_eq!(free(&["eve:100000:4294867295\n"], &[]), None);
        assert_eq!(free(&["eve:100000:18446744073709551615\n"], &[]), None);
    }

    #[test]
    fn sub_range_takes_the_largest_sound_range_of_the_user() {
        let text = "bob:100000:65536\nada:200000:10\n1000:300000:65536\nada:4294967295:65536\nada:5:70000\n";
        assert_eq!(sub_range(text, "ada", 1000), Some((300_000, 65536)));
        assert_eq!(sub_range(text, "eve", 7), None);
    }
}
