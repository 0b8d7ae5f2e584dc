//! Gives memory back when nobody asks for anything.
//!
//! What was read is in the kernel's caches; while a program computes, the blocks that the server keeps serve nobody. The
//! thread that watches begins when there is something to give back, and ends when it has done so: a server of a program
//! that only starts never has one. The same thread writes the profile of the start.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::tree::Tree;
use crate::profile::Profile;

/// Cached bytes that are not worth a thread.
const KEEP_BYTES: usize = 2 << 20;
/// Without a request for one to two of these, the server is idle.
const PATIENCE: Duration = Duration::from_secs(4);
/// A start takes no longer than so many of these; what is read later is not noted.
const START_ROUNDS: u32 = 5;

/// See the module.
pub(super) struct Idle {
    tree: Arc<Tree>,
    /// A request came since the watcher last looked.
    is_busy: AtomicBool,
    is_watched: AtomicBool,
    /// To be written when the start is over.
    pub(super) profile: OnceLock<Arc<Profile>>,
}

impl Idle {
    pub(super) fn new(tree: Arc<Tree>) -> Idle {
        Idle {
            tree,
            is_busy: AtomicBool::new(false),
            is_watched: AtomicBool::new(false),
            profile: OnceLock::new(),
        }
    }

    pub(super) fn save_profile(&self) {
        if let Some(profile) = self.profile.get() {
            self.tree.save_profile(profile);
        }
    }

    /// A request came.
    pub(super) fn note(this: &Arc<Idle>) {
        // Only looked at, mostly: threads do not take the cache line from each other.
        if !this.is_busy.load(Relaxed) {
            this.is_busy.store(true, Relaxed);
        }
        if !this.is_watched.load(Relaxed) && this.tree.cached_bytes() > KEEP_BYTES {
            Idle::watch(this);
        }
    }

    fn watch(this: &Arc<Idle>) {
        if this.is_watched.swap(true, SeqCst) {
            return;
        }
        let watched = this.clone();
        let thread = std::thread::Builder::new().name("idle".into());
        if thread.spawn(move || watched.run()).is_err() {
            this.is_watched.store(false, SeqCst);
        }
    }

    fn run(&self) {
        for round in 0.. {
            std::thread::sleep(PATIENCE);
            if !self.is_busy.swap(false, SeqCst) {
                break;
            }
            if round == START_ROUNDS {
                self.save_profile();
            }
        }
        self.save_profile();
        // A request that comes now starts the next watcher.
        self.is_watched.store(false, SeqCst);
        self.tree.shrink();
        crate::sys::give_back();
    }
}
