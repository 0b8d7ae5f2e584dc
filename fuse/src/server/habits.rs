//! Whether those who list directories want attributes.
//!
//! With them a listing costs an inode for each name, which a walk by names alone never needs; without them a program that
//! looks at each file sends a request for each. So listings begin without; when the names are then looked up, the next
//! listings carry attributes, and after a while one is left bare again to see whether that is still so.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Names that must have been listed before a judgement.
const ENOUGH: u32 = 16;
/// Listings with attributes until the next look, at first and at most.
const TRUST: u32 = 64;
const TRUST_MAX: u32 = 1024;

/// Counts of what happened since the last judgement. They only steer effort, so that races between them do no harm.
#[derive(Default)]
pub(super) struct Habits {
    /// Names listed without attributes.
    bare: AtomicU32,
    /// Names looked up.
    lookups: AtomicU32,
    /// Listings that still get attributes.
    trusted: AtomicU32,
    /// How many there will be next time.
    trust: AtomicU32,
}

impl Habits {
    /// A name was looked up and found.
    pub(super) fn looked_up(&self) {
        self.lookups.fetch_add(1, Relaxed);
    }

    /// So many names were listed without attributes.
    pub(super) fn listed_bare(&self, names: u32) {
        self.bare.fetch_add(names, Relaxed);
    }

    /// Whether the listing that begins now should carry attributes.
    pub(super) fn wants_attributes(&self) -> bool {
        let left = self.trusted.load(Relaxed);
        if left > 0 {
            self.trusted.store(left - 1, Relaxed);
            return true;
        }
        let bare = self.bare.load(Relaxed);
        if bare < ENOUGH {
            return false;
        }
        let wanted = self.lookups.swap(0, Relaxed) >= bare / 4;
        self.bare.store(0, Relaxed);
        let trust = self.trust.load(Relaxed).max(TRUST);
        self.trust.store(
            if wanted {
                (trust * 2).min(TRUST_MAX)
            } else {
                TRUST
            },
            Relaxed,
        );
        self.trusted.store(if wanted { trust } else { 0 }, Relaxed);
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_when_names_are_looked_up() {
        let habits = Habits::default();
        assert!(!habits.wants_attributes());
        habits.listed_bare(100);
        assert!(!habits.wants_attributes(), "nobody looked");
        habits.listed_bare(100);
        (0..90).for_each(|_| habits.looked_up());
        let with = (0..1000).take_while(|_| habits.wants_attributes()).count();
        assert_eq!(with, 1 + TRUST as usize, "and a new look after a while");
    }
}
