//! Decompresses what a sequential reader will want next, on a thread of its own.
//!
//! The kernel reads ahead too, but only 128 KiB for a user's mount: less than one block of many images.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::tree::{Place, Tree};
use crate::cache::lock;

/// Readers that are watched; the one that was idle longest gives way.
const STREAMS: usize = 16;
/// Bytes prepared for each, if a block is not larger.
const AHEAD_BYTES: u64 = 512 << 10;
/// Only files of more blocks than this are worth it.
const BLOCKS_MIN: u64 = 4;
/// How far requests that the kernel sends at once may overtake each other.
const DISORDER_BYTES: u64 = 1 << 20;
/// Requests to the thread that wait, at most; more are dropped, since they would come too late.
const QUEUE_MAX: usize = 32;
/// How long the thread waits for more before it ends.
const IDLE: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Ahead {
    block_size: u64,
    streams: Mutex<VecDeque<Stream>>,
    shared: Arc<Shared>,
}

struct Stream {
    at: Place,
    /// Where the last request ended.
    end: u64,
    /// The first block that nobody has been sent for.
    next_block: u64,
}

struct Shared {
    tree: Arc<Tree>,
    queue: Mutex<Queue>,
    wanted: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(Place, u64, u64)>,
    is_running: bool,
}

impl Ahead {
    pub(super) fn new(tree: Arc<Tree>, block_size: u32) -> Ahead {
        Ahead {
            block_size: u64::from(block_size),
            streams: Mutex::default(),
            shared: Arc::new(Shared {
                tree,
                queue: Mutex::default(),
                wanted: Condvar::new(),
            }),
        }
    }

    /// Notes that `len` bytes at `offset` of a file of `size` bytes are read.
    pub(super) fn note(&self, at: Place, offset: u64, len: usize, size: u64) {
        if size <= BLOCKS_MIN * self.block_size || len == 0 {
            return;
        }
        let end = offset.saturating_add(len as u64);
        if let Some((first, count)) = self.follow(at, offset, end, size) {
            self.send((at, first, count));
        }
    }

    /// The blocks to prepare now.
    fn follow(&self, at: Place, offset: u64, end: u64, size: u64) -> Option<(u64, u64)> {
        let mut streams = lock(&self.streams);
        let is_same = |s: &Stream| s.at == at && s.end.abs_diff(offset) <= DISORDER_BYTES;
        let Some(index) = streams.iter().position(is_same) else {
            streams.truncate(STREAMS - 1);
            let next_block = end.div_ceil(self.block_size);
            streams.push_front(Stream {
                at,
                end,
                next_block,
            });
            return None;
        };
        let mut stream = streams.remove(index)?;
        let is_forward = end > stream.end;
        stream.end = stream.end.max(end);
        let last = (stream.end + AHEAD_BYTES.max(self.block_size)).min(size) / self.block_size;
        let first = stream.next_block.max(stream.end / self.block_size);
        let job = (is_forward && first < last).then_some((first, last.saturating_sub(first)));
        if job.is_some() {
            stream.next_block = last;
        }
        streams.push_front(stream);
        job
    }

    fn send(&self, job: (Place, u64, u64)) {
        let mut queue = lock(&self.shared.queue);
        if queue.jobs.len() >= QUEUE_MAX {
            return;
        }
        queue.jobs.push_back(job);
        if !queue.is_running {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("ahead".into());
            queue.is_running = thread.spawn(move || shared.run()).is_ok();
        }
        self.shared.wanted.notify_one();
    }
}

impl Shared {
    fn run(&self) {
        while let Some((at, first, count)) = self.next() {
            // Who asks for a bad block gets its error; a panic must not end the thread in silence.
            let work = std::panic::AssertUnwindSafe(|| self.tree.prefetch(at, first, count));
            let _told_to_who_asks = std::panic::catch_unwind(work);
        }
    }

    fn next(&self) -> Option<(Place, u64, u64)> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            let (guard, waited) = self
                .wanted
                .wait_timeout(queue, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            queue = guard;
            if waited.timed_out() && queue.jobs.is_empty() {
                queue.is_running = false;
                return None;
            }
        }
    }
}
