//! Which contents of lower layers the higher ones hide, judged by the paths as they are written: links are not followed,
//! because what they lead to is in layers that were not read yet. So it is a guess, for which [`super::resolve`] makes good.

use std::collections::{HashMap, HashSet};

use super::entry::{Entry, What, split};

/// What is at the path itself is hidden.
const ITSELF: u8 = 1;
/// What is below the path is hidden.
const BELOW: u8 = 2;

/// What the layers above have.
#[derive(Default)]
pub struct Hidden {
    paths: HashMap<Box<[u8]>, u8>,
    /// Targets of hard links: they may lie in a lower layer, hidden or not.
    targets: HashSet<Box<[u8]>>,
}

impl Hidden {
    /// Takes note of an entry of a higher layer.
    pub fn add(&mut self, entry: &Entry) {
        let cover = match &entry.what {
            What::Directory => ITSELF,
            What::Opaque => BELOW,
            _ => ITSELF | BELOW,
        };
        *self.paths.entry(entry.path.clone()).or_default() |= cover;
        if let What::Link(target) = &entry.what {
            self.targets.insert(target.clone());
        }
    }

    /// Whether a content at this path of the next layer seems to be needed.
    pub fn keeps(&self, path: &[u8]) -> bool {
        if self.paths.is_empty() || self.targets.contains(path) {
            return true;
        }
        if self.is(path, ITSELF) {
            return false;
        }
        let mut at = path;
        while !at.is_empty() {
            at = split(at).0;
            if self.is(at, BELOW) {
                return false;
            }
        }
        true
    }

    fn is(&self, path: &[u8], cover: u8) -> bool {
        self.paths.get(path).is_some_and(|found| found & cover != 0)
    }
}
