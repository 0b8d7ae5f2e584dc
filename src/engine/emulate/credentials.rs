//! Users and groups of processes, as `credentials(7)` has them, for a namespace in which only root exists.
//!
//! Pure: the rules of `setresuid(2)` and its kin as a normal kernel has them. A process whose emulated effective user is
//! root may become anybody; another one only what it has been.

use std::collections::HashMap;
use std::sync::Arc;

/// The four ids of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Ids {
    /// Who started it.
    pub real: u32,
    /// Whose rights it has.
    pub effective: u32,
    /// Whose rights it can take again.
    pub saved: u32,
    /// Who owns the files that it makes.
    pub fs: u32,
}

/// What a thread has. The default is root, without further groups.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Credentials {
    /// Users.
    pub uid: Ids,
    /// Groups.
    pub gid: Ids,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Capabilities shall outlast the change to another user (`PR_SET_KEEPCAPS`).
    pub keep: bool,
    /// They have.
    pub kept: bool,
    /// It confined itself by Landlock, for ever.
    pub confined: bool,
}

/// What a call may refuse.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// `EPERM`
    Permission,
    /// `EINVAL`
    Invalid,
}

/// Leave as it is, in the calls that set several.
pub const KEEP: u32 = u32::MAX;

impl Ids {
    fn has(&self, id: u32) -> bool {
        [self.real, self.effective, self.saved].contains(&id)
    }

    /// `setuid(2)`, `setgid(2)`.
    ///
    /// # Errors
    /// As the call.
    pub fn set(self, id: u32, privileged: bool) -> Result<Ids, Refused> {
        if id == KEEP {
            return Err(Refused::Invalid);
        }
        if privileged {
            return Ok(Ids {
                real: id,
                effective: id,
                saved: id,
                fs: id,
            });
        }
        if id != self.real && id != self.saved {
            return Err(Refused::Permission);
        }
        Ok(Ids {
            effective: id,
            fs: id,
            ..self
        })
    }

    /// `setreuid(2)`, `setregid(2)`.
    ///
    /// # Errors
    /// As the call.
    pub fn set_two(self, real: u32, effective: u32, privileged: bool) -> Result<Ids, Refused> {
        let real_ok = real == KEEP || real == self.real || real == self.effective;
        let effective_ok = effective == KEEP || self.has(effective);
        if !(privileged || real_ok && effective_ok) {
            return Err(Refused::Permission);
        }
        let or = |new: u32, old: u32| if new == KEEP { old } else { new };
        let mut ids = self;
        ids.effective = or(effective, self.effective);
        ids.real = or(real, self.real);
        if real != KEEP || (effective != KEEP && effective != self.real) {
            ids.saved = ids.effective;
        }
        ids.fs = ids.effective;
        Ok(ids)
    }

    /// `setresuid(2)`, `setresgid(2)`.
    ///
    /// # Errors
    /// As the call.
    pub fn set_three(self, new: [u32; 3], privileged: bool) -> Result<Ids, Refused> {
        if !privileged && new.iter().any(|id| *id != KEEP && !self.has(*id)) {
            return Err(Refused::Permission);
        }
        let or = |new: u32, old: u32| if new == KEEP { old } else { new };
        let effective = or(new[1], self.effective);
        Ok(Ids {
            real: or(new[0], self.real),
            effective,
            saved: or(new[2], self.saved),
            fs: effective,
        })
    }

    /// `setfsuid(2)`, `setfsgid(2)`: no error, the answer is the old one.
    pub fn set_fs(self, id: u32, privileged: bool) -> Ids {
        if id != KEEP && (privileged || self.has(id) || id == self.fs) {
            return Ids { fs: id, ..self };
        }
        self
    }
}

impl Credentials {
    /// Whether it may do what root may.
    pub fn is_privileged(&self) -> bool {
        self.uid.effective == 0 || self.kept
    }

    /// Whether its ids are those that the container began with.
    pub fn is_first(&self) -> bool {
        let first = Credentials {
            confined: self.confined,
            ..Credentials::default()
        };
        *self == first
    }

    /// With other users: `capabilities(7)`, "Effect of user ID changes".
    pub fn with_uid(&self, uid: Ids) -> Credentials {
        let had = self.kept || (self.keep && self.uid.has(0));
        Credentials {
            uid,
            kept: had && !uid.has(0),
            ..self.clone()
        }
    }

    /// After `execve(2)`.
    pub fn executed(&self) -> Credentials {
        let mut new = self.clone();
        new.uid.saved = new.uid.effective;
        new.gid.saved = new.gid.effective;
        (new.keep, new.kept) = (false, false);
        new
    }

    /// Whether it belongs to a group (by the id for files).
    pub fn is_in(&self, group: u32) -> bool {
        self.gid.fs == group || self.groups.contains(&group)
    }
}

/// Most different credentials of one run: beyond it a change is refused. Each is a nanosecond of timer slack.
const MAX: usize = 40_000;

/// The credentials that there are in a run, each with a number; 0 is root.
#[derive(Debug)]
pub struct Table {
    all: Vec<Arc<Credentials>>,
    numbers: HashMap<Arc<Credentials>, usize>,
}

impl Default for Table {
    fn default() -> Table {
        let root = Arc::new(Credentials::default());
        Table {
            all: vec![Arc::clone(&root)],
            numbers: HashMap::from([(root, 0)]),
        }
    }
}

impl Table {
    /// The number of these; `None` when there are too many.
    pub fn number(&mut self, credentials: Credentials) -> Option<usize> {
        if let Some(number) = self.numbers.get(&credentials) {
            return Some(*number);
        }
        if self.all.len() >= MAX {
            return None;
        }
        let new = Arc::new(credentials);
        self.all.push(Arc::clone(&new));
        self.numbers.insert(new, self.all.len() - 1);
        Some(self.all.len() - 1)
    }

    /// Those of a number; root's for one that was never given.
    pub fn get(&self, number: usize) -> Arc<Credentials> {
        Arc::clone(self.all.get(number).unwrap_or(&self.all[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gave_up_root_cannot_take_it_again() {
        let user = Ids::default().set(33, true).unwrap();
        assert_eq!(user.set(0, false), Err(Refused::Permission));
        assert_eq!(user.set_two(KEEP, 0, false), Err(Refused::Permission));
        assert_eq!(
            user.set_three([0, KEEP, KEEP], false),
            Err(Refused::Permission)
        );
        assert_eq!(user.set_fs(0, false), user);
    }

    #[test]
    fn who_kept_it_saved_can() {
        let seteuid = Ids::default().set_three([KEEP, 33, KEEP], true).unwrap();
        assert_eq!((seteuid.effective, seteuid.fs, seteuid.saved), (33, 33, 0));
        assert_eq!(seteuid.set(0, false).unwrap().effective, 0);
        assert_eq!(
            seteuid.set_three([KEEP, 0, KEEP], false).unwrap(),
            Ids::default()
        );
    }

    #[test]
    fn setreuid_saves_the_effective_id() {
        let ids = Ids::default().set_two(7, 8, true).unwrap();
        assert_eq!((ids.real, ids.effective, ids.saved, ids.fs), (7, 8, 8, 8));
        assert!(ids.set_two(8, 7, false).is_ok(), "exchanged");
        assert_eq!(ids.set_two(9, KEEP, false), Err(Refused::Permission));
    }

    #[test]
    fn kept_capabilities_last_until_execve() {
        let root = Credentials::default();
        let user = root.uid.set(33, true).unwrap();
        assert!(!root.with_uid(user).is_privileged());
        let keeper = Credentials { keep: true, ..root };
        let kept = keeper.with_uid(user);
        assert!(
            kept.is_privileged(),
            "setpriv sets the group after the user"
        );
        assert!(!kept.executed().is_privileged());
    }

    #[test]
    fn same_credentials_have_one_number() {
        let mut table = Table::default();
        let user = Credentials {
            groups: vec![4, 5],
            ..Credentials::default()
        };
        assert_eq!(table.number(Credentials::default()), Some(0));
        assert_eq!(table.number(user.clone()), Some(1));
        assert_eq!(table.number(user.clone()), Some(1));
        assert_eq!(*table.get(1), user);
        assert_eq!(*table.get(99), Credentials::default());
    }
}
