//! A bounded cache shared by threads, in which each value is made once however many ask.
//!
//! A slot is claimed under the lock, filled outside it, and published. Whoever asks meanwhile waits for
//! that slot, not for the cache. Failures are not kept: the next asker tries again. Eviction is CLOCK:
//! a value that was used since the hand last passed stays, so one long sequential read does not push
//! out what is used again and again.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Bytes of memory that a cached value holds.
pub(crate) trait Weigh {
    /// Bytes, near enough.
    fn weight(&self) -> usize;
}

/// Locks even when a panicking thread held the lock: all states behind our locks are valid between calls.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hasher for keys made of positions: one multiplication. Maps are bounded, so a hostile choice of
/// positions costs little.
#[derive(Default)]
pub(crate) struct PositionHasher(u64);

impl Hasher for PositionHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Map keyed by positions.
pub(crate) type PositionMap<K, V> = HashMap<K, V, BuildHasherDefault<PositionHasher>>;

/// See the module.
pub(crate) struct Cache<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    shard_bytes: usize,
    /// Bytes held now by all shards, to be asked without their locks.
    held: AtomicUsize,
}

struct Shard<K, V> {
    slots: PositionMap<K, Slot<V>>,
    ring: Vec<Entry<K, V>>,
    hand: usize,
    bytes: usize,
}

enum Slot<V> {
    Ready(usize),
    Loading(Arc<Flight<V>>),
}

struct Entry<K, V> {
    key: K,
    value: Arc<V>,
    used: AtomicBool,
}

struct Flight<V> {
    outcome: Mutex<Option<Result<Arc<V>>>>,
    landed: Condvar,
}

enum Found<V> {
    Value(Arc<V>),
    Wait(Arc<Flight<V>>),
    Claimed(Arc<Flight<V>>),
}

impl<K: Copy + Eq + Hash, V: Weigh> Cache<K, V> {
    /// A cache of at most `max_bytes` over `shards` locks.
    pub(crate) fn new(max_bytes: usize, shards: usize) -> Cache<K, V> {
        let shard = || Shard {
            slots: PositionMap::default(),
            ring: Vec::new(),
            hand: 0,
            bytes: 0,
        };
        let shards = shards.max(1);
        Cache {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            shard_bytes: max_bytes / shards,
            held: AtomicUsize::new(0),
        }
    }

    /// The value of `key`, made by `load` if it is neither there nor being made.
    pub(crate) fn get_or_load(&self, key: K, load: impl FnOnce() -> Result<V>) -> Result<Arc<V>> {
        let shard = self.shard(&key);
        // Not in the `match`: the lock would be held to its end.
        let found = find(&mut lock(shard), key);
        match found {
            Found::Value(value) => Ok(value),
            Found::Wait(flight) => flight.wait(),
            Found::Claimed(flight) => {
                let mut claim = Claim {
                    cache: self,
                    key,
                    flight,
                    done: false,
                };
                let outcome = load().map(Arc::new);
                claim.settle(outcome.clone());
                outcome
            }
        }
    }

    /// Whether `key` is there or being made.
    pub(crate) fn contains(&self, key: &K) -> bool {
        lock(self.shard(key)).slots.contains_key(key)
    }

    /// Counts a value as used, if it is there.
    pub(crate) fn touch(&self, key: &K) {
        let shard = lock(self.shard(key));
        if let Some(Slot::Ready(index)) = shard.slots.get(key) {
            shard.ring[*index].used.store(true, Ordering::Relaxed);
        }
    }

    /// Drops every value that nobody is making.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            let mut shard = lock(shard);
            shard
                .slots
                .retain(|_, slot| matches!(slot, Slot::Loading(_)));
            shard.slots.shrink_to_fit();
            shard.ring = Vec::new();
            shard.hand = 0;
            self.held.fetch_sub(shard.bytes, Ordering::Relaxed);
            shard.bytes = 0;
        }
    }

    /// Bytes held now.
    pub(crate) fn bytes(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn shard(&self, key: &K) -> &Mutex<Shard<K, V>> {
        let mut hasher = PositionHasher::default();
        key.hash(&mut hasher);
        // The map uses the low and the top bits, so pick by bits in between.
        let index = (hasher.finish() >> 20) as usize % self.shards.len();
        &self.shards[index]
    }
}

fn find<K: Copy + Eq + Hash, V>(shard: &mut Shard<K, V>, key: K) -> Found<V> {
    match shard.slots.get(&key) {
        Some(Slot::Ready(index)) => {
            let entry = &shard.ring[*index];
            entry.used.store(true, Ordering::Relaxed);
            Found::Value(entry.value.clone())
        }
        Some(Slot::Loading(flight)) => Found::Wait(flight.clone()),
        None => {
            let flight = Arc::new(Flight {
                outcome: Mutex::new(None),
                landed: Condvar::new(),
            });
            shard.slots.insert(key, Slot::Loading(flight.clone()));
            Found::Claimed(flight)
        }
    }
}

impl<K: Copy + Eq + Hash, V: Weigh> Shard<K, V> {
    fn insert(&mut self, key: K, value: Arc<V>, max_bytes: usize) {
        let weight = value.weight();
        while self.bytes + weight > max_bytes && !self.ring.is_empty() {
            self.evict_one();
        }
        self.slots.insert(key, Slot::Ready(self.ring.len()));
        self.ring.push(Entry {
            key,
            value,
            used: AtomicBool::new(false),
        });
        self.bytes += weight;
    }

    fn evict_one(&mut self) {
        loop {
            if self.hand >= self.ring.len() {
                self.hand = 0;
            }
            if !self.ring[self.hand].used.swap(false, Ordering::Relaxed) {
                break;
            }
            self.hand += 1;
        }
        let gone = self.ring.swap_remove(self.hand);
        self.bytes = self.bytes.saturating_sub(gone.value.weight());
        self.slots.remove(&gone.key);
        if let Some(moved) = self.ring.get(self.hand) {
            self.slots.insert(moved.key, Slot::Ready(self.hand));
        }
    }
}

impl<V> Flight<V> {
    fn wait(&self) -> Result<Arc<V>> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self
                .landed
                .wait(outcome)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The duty to settle a claimed slot, also when making its value panics.
struct Claim<'a, K: Copy + Eq + Hash, V: Weigh> {
    cache: &'a Cache<K, V>,
    key: K,
    flight: Arc<Flight<V>>,
    done: bool,
}

impl<K: Copy + Eq + Hash, V: Weigh> Claim<'_, K, V> {
    fn settle(&mut self, outcome: Result<Arc<V>>) {
        self.done = true;
        {
            let mut shard = lock(self.cache.shard(&self.key));
            match &outcome {
                Ok(value) => {
                    let held = &self.cache.held;
                    held.fetch_sub(shard.bytes, Ordering::Relaxed);
                    shard.insert(self.key, value.clone(), self.cache.shard_bytes);
                    held.fetch_add(shard.bytes, Ordering::Relaxed);
                }
                Err(_) => {
                    shard.slots.remove(&self.key);
                }
            }
        }
        *lock(&self.flight.outcome) = Some(outcome);
        self.flight.landed.notify_all();
    }
}

impl<K: Copy + Eq + Hash, V: Weigh> Drop for Claim<'_, K, V> {
    fn drop(&mut self) {
        if !self.done {
            self.settle(Err(Error::Panicked));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    impl Weigh for usize {
        fn weight(&self) -> usize {
            10
        }
    }

    #[test]
    fn a_value_is_made_once_however_many_ask() {
        let cache: Cache<u64, usize> = Cache::new(1000, 2);
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let value = cache.get_or_load(7, || {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok(made.fetch_add(1, Ordering::SeqCst))
                    });
                    assert_eq!(*value.expect("made"), 0);
                });
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn memory_stays_below_the_bound_and_used_values_survive() {
        let cache: Cache<u64, usize> = Cache::new(100, 1);
        for key in 0..1000u64 {
            cache.get_or_load(key, || Ok(key as usize)).expect("made");
            if key > 0 {
                cache.get_or_load(0, || Ok(0)).expect("made");
            }
            assert!(cache.bytes() <= 100);
        }
        assert!(cache.contains(&0));
        cache.clear();
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn a_failure_and_a_panic_free_the_slot() {
        let cache: Cache<u64, usize> = Cache::new(100, 1);
        let failed = cache.get_or_load(1, || Err(Error::Loop));
        assert_eq!(failed.err(), Some(Error::Loop));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _never = cache.get_or_load(1, || panic!("for the test"));
        }));
        assert!(panicked.is_err());
        assert_eq!(*cache.get_or_load(1, || Ok(5)).expect("made"), 5);
    }
}
