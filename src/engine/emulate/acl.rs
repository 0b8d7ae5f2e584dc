//! Access control lists of files (`acl(5)`), for a namespace in which only root exists.
//!
//! The kernel refuses a list that names somebody whom it does not know. So it gets the list without those, which sets the
//! permission bits and shows whether this file may have a list at all, and the whole one is remembered for the run: images
//! have no place for lists. Permissions are root's either way.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::super::sys::{self, Answer};
use super::filter::At;
use super::owners::{Mark, Seen};
use super::view::View;

/// Which list of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Who may use it.
    Access,
    /// What new files in a directory get.
    Default,
}

impl Kind {
    fn of(name: &[u8]) -> Option<Kind> {
        match name {
            b"system.posix_acl_access" => Some(Kind::Access),
            b"system.posix_acl_default" => Some(Kind::Default),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Access => "system.posix_acl_access",
            Kind::Default => "system.posix_acl_default",
        }
    }
}

/// The lists that the kernel does not have.
#[derive(Debug, Default)]
pub struct Lists(HashMap<(Mark, Kind), Vec<u8>>);

/// An entry: tag, permissions, id (`linux/posix_acl_xattr.h`).
type Entry = (u16, u16, u32);

/// `POSIX_ACL_XATTR_VERSION`
const VERSION: u32 = 2;
const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const OWNING_GROUP: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// Longest name of an attribute, with its NUL (`XATTR_NAME_MAX`).
const MAX_NAME: usize = 256;
/// Most bytes of a value (`XATTR_SIZE_MAX`).
const MAX_VALUE: u64 = 65536;

fn parse(value: &[u8]) -> Option<Vec<Entry>> {
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % 8 != 0 {
        return None;
    }
    let entries = entries.chunks_exact(8).map(|e| {
        let short = |at: usize| u16::from_le_bytes([e[at], e[at + 1]]);
        (
            short(0),
            short(2),
            u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
        )
    });
    Some(entries.collect())
}

fn pack(entries: &[Entry]) -> Vec<u8> {
    let mut out = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        out.extend(tag.to_le_bytes());
        out.extend(permissions.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

/// Somebody whom the kernel does not know here.
fn is_unknown((tag, _, id): &Entry) -> bool {
    matches!(*tag, USER | GROUP) && *id != 0
}

/// Whether a list that names somebody is one: each of the four general entries once, at most one line for each name.
fn is_sound(entries: &[Entry]) -> bool {
    let count = |tag| entries.iter().filter(|e| e.0 == tag).count();
    let general = [OWNER, OWNING_GROUP, MASK, OTHER]
        .iter()
        .all(|tag| count(*tag) == 1);
    let mut names: Vec<_> = entries
        .iter()
        .filter(|e| matches!(e.0, USER | GROUP))
        .collect();
    names.sort_unstable_by_key(|e| (e.0, e.2));
    let twice = names
        .windows(2)
        .any(|pair| (pair[0].0, pair[0].2) == (pair[1].0, pair[1].2));
    let known = count(USER) + count(GROUP) + 4 == entries.len();
    general && known && !twice && entries.iter().all(|e| e.1 <= 7)
}

/// The list as it is now that the file has these permission bits, which may have changed since.
fn with_mode(value: &[u8], mode: u32) -> Option<Vec<u8>> {
    let mut entries = parse(value)?;
    for (tag, permissions, _) in &mut entries {
        let shift = match *tag {
            OWNER => 6,
            MASK => 3,
            OTHER => 0,
            _ => continue,
        };
        *permissions = ((mode >> shift) & 7) as u16;
    }
    Some(pack(&entries))
}

impl View<'_> {
    /// `setxattr(2)`.
    pub fn set_acl(&self, at: &At, name: u64, value: u64, size: u64, flags: i32) -> Option<Answer> {
        let kind = self.acl_kind(name)?;
        let bytes = match size {
            1..=MAX_VALUE => self.tracee.read_exact(value, usize::try_from(size).ok()?)?,
            _ => return None,
        };
        let entries = parse(&bytes)?;
        let file = self.open(&self.named(at)?)?;
        if !entries.iter().any(is_unknown) {
            self.forget_acl(&file, kind)?;
            return None;
        }
        if !is_sound(&entries) {
            return Some(Answer::Error(libc::EINVAL));
        }
        let caller = self.tracee.credentials();
        let owner = self.owner(&file).unwrap_or_default();
        if !caller.is_privileged() && owner.uid != caller.uid.fs {
            return Some(Answer::Error(libc::EPERM));
        }
        let known: Vec<Entry> = entries.iter().copied().filter(|e| !is_unknown(e)).collect();
        let flags = XattrFlags::from_bits_retain(flags.cast_unsigned());
        let done = self.by_own_descriptor(&file, |path| {
            rustix::fs::setxattr(path, kind.name(), &pack(&known), flags)
        });
        if let Err(error) = done {
            return Some(Answer::Error(error.raw_os_error()));
        }
        let mark = self.mark(&file)?;
        self.tracee.shared.acls().0.insert((mark, kind), bytes);
        Some(Answer::Value(0))
    }

    /// `getxattr(2)`.
    pub fn acl(&self, at: &At, name: u64, buffer: u64, size: u64) -> Option<Answer> {
        if self.tracee.shared.acls().0.is_empty() {
            return None;
        }
        let kind = self.acl_kind(name)?;
        let file = self.open(&self.named(at)?)?;
        let mark = self.mark(&file)?;
        let mut value = self.tracee.shared.acls().0.get(&(mark, kind))?.clone();
        if kind == Kind::Access {
            value = with_mode(&value, sys::fstat(file.as_fd()).ok()?.st_mode)?;
        }
        if size == 0 {
            return Some(Answer::Value(i64::try_from(value.len()).ok()?));
        }
        if size < value.len() as u64 {
            return Some(Answer::Error(libc::ERANGE));
        }
        self.tracee.write(buffer, &value)?;
        Some(Answer::Value(i64::try_from(value.len()).ok()?))
    }

    /// `removexattr(2)`: what the kernel has goes too.
    pub fn remove_acl(&self, at: &At, name: u64) -> Option<Answer> {
        if self.tracee.shared.acls().0.is_empty() {
            return None;
        }
        let kind = self.acl_kind(name)?;
        self.forget_acl(&self.open(&self.named(at)?)?, kind)?;
        None
    }

    fn acl_kind(&self, name: u64) -> Option<Kind> {
        let mut bytes = self.tracee.read(name, MAX_NAME)?;
        let end = bytes.iter().position(|b| *b == 0)?;
        bytes.truncate(end);
        Kind::of(&bytes)
    }

    fn mark(&self, file: &OwnedFd) -> Option<Mark> {
        let seen = Seen::look(file.as_fd()).ok()?;
        Some(seen.mark(sys::file_handle(file.as_fd())))
    }

    fn forget_acl(&self, file: &OwnedFd, kind: Kind) -> Option<()> {
        if self.tracee.shared.acls().0.is_empty() {
            return Some(());
        }
        let mark = self.mark(file)?;
        self.tracee.shared.acls().0.remove(&(mark, kind));
        Some(())
    }

    /// Does something to a file that is open for reference only, by its name in our own directory of procfs. This thread's
    /// working directory, which is no other's, is there meanwhile.
    fn by_own_descriptor(
        &self,
        file: &OwnedFd,
        act: impl FnOnce(&str) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        use std::os::fd::AsRawFd as _;
        let root = rustix::fs::openat(
            rustix::fs::CWD,
            "/",
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        rustix::process::fchdir(&self.tracee.shared.proc)?;
        let done = act(&format!("self/fd/{}", file.as_raw_fd()));
        if rustix::process::fchdir(&root).is_err() {
            // It would stay outside of the container.
            sys::exit_now(255);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> Vec<Entry> {
        vec![
            (OWNER, 7, u32::MAX),
            (USER, 6, 1000),
            (OWNING_GROUP, 5, u32::MAX),
            (GROUP, 4, 0),
            (MASK, 7, u32::MAX),
            (OTHER, 1, u32::MAX),
        ]
    }

    #[test]
    fn list_is_what_was_packed() {
        assert_eq!(parse(&pack(&list())), Some(list()));
        for bad in [&b""[..], b"\x02\0\0", b"\x01\0\0\0", b"\x02\0\0\0\x01"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn only_sound_lists_are_taken() {
        assert!(is_sound(&list()));
        for wrong in 0..list().len() {
            let mut less = list();
            less.remove(wrong);
            let name = matches!(list()[wrong].0, USER | GROUP);
            assert_eq!(is_sound(&less), name, "without {wrong}");
            let mut twice = list();
            twice.push(list()[wrong]);
            assert!(!is_sound(&twice), "{wrong} twice");
            let mut odd = list();
            odd[wrong].1 = 8;
            assert!(!is_sound(&odd), "{wrong} with 8");
        }
    }

    #[test]
    fn permission_bits_show_in_the_list() {
        let now = parse(&with_mode(&pack(&list()), 0o100_640).unwrap()).unwrap();
        let of = |tag| now.iter().find(|e| e.0 == tag).unwrap().1;
        assert_eq!((of(OWNER), of(MASK), of(OTHER)), (6, 4, 0));
        assert_eq!((of(OWNING_GROUP), of(USER)), (5, 6));
    }
}
