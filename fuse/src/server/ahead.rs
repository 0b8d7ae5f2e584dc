//! Decompresses what a reader will want next, on threads of its own: the next blocks of one who reads on, the whole of a
//! program or library whose pages are asked for here and there, as by a program that starts, and the next fragment block
//! of one who reads small files in the order in which they were packed, as all do who walk a tree.
//!
//! The kernel reads ahead too, but only 128 KiB for a user's mount: less than one block of many images.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::tree::{Place, Stored, Tree};
use crate::cache::lock;
use crate::error::Result;
use crate::file::Extent;
use crate::format::Kind;

/// Readers that are watched; the one that was idle longest gives way.
const STREAMS: usize = 16;
/// Bytes prepared for each, if a block is not larger.
const AHEAD_BYTES: u64 = 512 << 10;
/// Only files of more blocks than this are worth it for one who reads on.
const BLOCKS_MIN: u64 = 4;
/// Files of at most so many bytes are prepared as a whole for one who reads here and there. Most shared libraries are
/// smaller.
const WHOLE_BYTES: u64 = 4 << 20;
/// How far requests that the kernel sends at once may overtake each other.
const DISORDER_BYTES: u64 = 1 << 20;
/// Requests to the threads that wait, at most; more are dropped, since they would come too late.
const QUEUE_MAX: usize = 32;
/// No fragment block.
const NONE: u32 = u32::MAX;
/// How long a thread waits for more before it ends.
const IDLE: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Ahead {
    streams: Mutex<VecDeque<Stream>>,
    /// The fragment block that was asked for last, and those in which readers of small files stand.
    fragment: AtomicU32,
    fragments: Mutex<VecDeque<u32>>,
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
    block_size: u64,
    threads_max: usize,
    queue: Mutex<Queue>,
    wanted: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Programs by their possible paths, files from which block on and how many, and fragment blocks.
    jobs: VecDeque<Job>,
    /// Blocks of those before, which come first.
    blocks: VecDeque<Extent>,
    threads: usize,
    /// Threads that wait for a job.
    idle: usize,
}

enum Job {
    Program(Vec<Vec<u8>>),
    File(Place, u64, u64),
    Fragment(u32),
    Block(Extent),
}

impl Ahead {
    /// With at most so many threads.
    pub(super) fn new(tree: Arc<Tree>, block_size: u32, threads_max: usize) -> Ahead {
        Ahead {
            streams: Mutex::default(),
            fragment: AtomicU32::new(NONE),
            fragments: Mutex::default(),
            shared: Arc::new(Shared {
                tree,
                block_size: u64::from(block_size),
                threads_max,
                queue: Mutex::default(),
                wanted: Condvar::new(),
            }),
        }
    }

    /// Notes that `len` bytes at `offset` of a file are read.
    pub(super) fn note(&self, at: Place, offset: u64, len: usize, file: &Stored) {
        if len == 0 {
            return;
        }
        if file.size <= self.shared.block_size {
            if let Some(next) = file.fragment.and_then(|index| self.follow_fragments(index)) {
                self.send(Job::Fragment(next));
            }
            return;
        }
        let end = offset.saturating_add(len as u64);
        if let Some((first, count)) = self.follow(at, offset, end, file.size) {
            self.send(Job::File(at, first, count));
        }
    }

    /// Prepares the first program that there is of `paths`, as much of it as of a file that is read here and there.
    pub(super) fn expect(&self, paths: Vec<Vec<u8>>) {
        self.send(Job::Program(paths));
    }

    /// The fragment block to prepare now: the next one, when a reader comes from the one before.
    fn follow_fragments(&self, index: u32) -> Option<u32> {
        if self.fragment.swap(index, Relaxed) == index {
            return None;
        }
        let mut readers = lock(&self.fragments);
        if readers.contains(&index) {
            return None;
        }
        let came = readers
            .iter()
            .position(|at| at.checked_add(1) == Some(index));
        match came {
            Some(reader) => drop(readers.remove(reader)),
            None => readers.truncate(STREAMS - 1),
        }
        readers.push_front(index);
        came.and(index.checked_add(1))
    }

    /// The blocks to prepare now, and how many.
    fn follow(&self, at: Place, offset: u64, end: u64, size: u64) -> Option<(u64, u64)> {
        let mut streams = lock(&self.streams);
        let is_small = size <= WHOLE_BYTES;
        let is_same =
            |s: &Stream| s.at == at && (is_small || s.end.abs_diff(offset) <= DISORDER_BYTES);
        let Some(index) = streams.iter().position(is_same) else {
            streams.truncate(STREAMS - 1);
            let next_block = end.div_ceil(self.shared.block_size);
            streams.push_front(Stream {
                at,
                end,
                next_block,
            });
            return None;
        };
        let mut stream = streams.remove(index)?;
        let (first, last) = if is_small && offset != stream.end {
            // What is there already is passed over.
            let blocks = size.div_ceil(self.shared.block_size);
            (
                if stream.next_block < blocks {
                    0
                } else {
                    blocks
                },
                blocks,
            )
        } else if size > BLOCKS_MIN * self.shared.block_size && end > stream.end {
            let last =
                (end + AHEAD_BYTES.max(self.shared.block_size)).min(size) / self.shared.block_size;
            (stream.next_block.max(end / self.shared.block_size), last)
        } else {
            (0, 0)
        };
        stream.end = match is_small {
            true => end,
            false => stream.end.max(end),
        };
        let count = last.checked_sub(first).filter(|count| *count > 0);
        if count.is_some() {
            stream.next_block = last;
        }
        streams.push_front(stream);
        count.map(|count| (first, count))
    }

    fn send(&self, job: Job) {
        let mut queue = lock(&self.shared.queue);
        if queue.jobs.len() < QUEUE_MAX {
            queue.jobs.push_back(job);
            self.shared.wake(&mut queue);
        }
    }
}

impl Shared {
    /// Sees to it that the jobs that wait find a thread.
    fn wake(self: &Arc<Self>, queue: &mut Queue) {
        let wanted = (queue.jobs.len() + queue.blocks.len()).saturating_sub(queue.idle);
        for _ in 0..wanted.min(self.threads_max.saturating_sub(queue.threads)) {
            let shared = self.clone();
            let thread = std::thread::Builder::new().name("ahead".into());
            if thread.spawn(move || shared.run()).is_err() {
                break;
            }
            queue.threads += 1;
        }
        self.wanted.notify_all();
    }

    fn run(self: &Arc<Self>) {
        while let Some(job) = self.next() {
            // Who asks for a bad block gets its error; a panic must not end the thread in silence.
            let work = std::panic::AssertUnwindSafe(|| match job {
                Job::Program(paths) => {
                    let find = |path: &Vec<u8>| self.find_file(path).ok().flatten();
                    if let Some((at, size)) = paths.iter().find_map(find) {
                        let blocks = size.min(WHOLE_BYTES).div_ceil(self.block_size);
                        self.announce(at, 0, blocks);
                    }
                }
                Job::File(at, first, count) => self.announce(at, first, count),
                Job::Fragment(index) => {
                    if let Ok(Some(extent)) = self.tree.missing_fragment(index) {
                        let _told_to_who_asks = self.tree.make_ready(extent);
                    }
                }
                Job::Block(extent) => {
                    let _told_to_who_asks = self.tree.make_ready(extent);
                    // Who was woken by an answer meanwhile comes first, also where there is no processor to spare.
                    std::thread::yield_now();
                }
            });
            let _told_to_who_asks = std::panic::catch_unwind(work);
        }
    }

    /// A file by its path, links followed, with its size.
    fn find_file(&self, path: &[u8]) -> Result<Option<(Place, u64)>> {
        let Some(at) = self.tree.resolve(path)? else {
            return Ok(None);
        };
        let stat = self.tree.stat(at)?;
        Ok((stat.kind == Kind::File).then_some((at, stat.size)))
    }

    fn announce(self: &Arc<Self>, at: Place, first: u64, count: u64) {
        let blocks = self.tree.announce(at, first, count).unwrap_or_default();
        let mut queue = lock(&self.queue);
        queue.blocks.extend(blocks);
        self.wake(&mut queue);
    }

    fn next(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(extent) = queue.blocks.pop_front() {
                return Some(Job::Block(extent));
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            let (guard, waited) = self
                .wanted
                .wait_timeout(queue, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            queue = guard;
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() && queue.blocks.is_empty() {
                queue.threads -= 1;
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead() -> Ahead {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let image = dir.path().join("image");
        let packed = std::process::Command::new("mksquashfs")
            .args([dir.path(), &image])
            .args(["-quiet", "-no-progress"])
            .output();
        assert!(packed.expect("mksquashfs").status.success());
        let file = std::fs::File::open(&image).expect("the image");
        let archive = crate::Archive::open(file, 0, None).expect("an archive");
        Ahead::new(Arc::new(Tree::Squashfs(Arc::new(archive))), 128 << 10, 1)
    }

    /// What is prepared for requests of this place and length in KiB, one after the other, in a file of `size` KiB.
    fn jobs(size: u64, requests: &[(u64, u64)]) -> Vec<Option<(u64, u64)>> {
        let ahead = ahead();
        let follow = |(offset, len): &(u64, u64)| {
            ahead.follow(Place(7), offset << 10, (offset + len) << 10, size << 10)
        };
        requests.iter().map(follow).collect()
    }

    #[test]
    fn one_who_reads_on_gets_the_next_blocks_and_one_who_leaps_the_whole_file() {
        let on = jobs(3000, &[(0, 128), (128, 128), (256, 128)]);
        assert_eq!(on, [None, Some((2, 4)), Some((6, 1))]);
        let leaps = jobs(
            2000,
            &[(0, 16), (1868, 68), (56, 128), (184, 128), (600, 128)],
        );
        assert_eq!(leaps, [None, Some((0, 16)), None, None, None]);
        // A large file is not prepared for one who leaps, and one of a single block never.
        assert_eq!(jobs(90_000, &[(0, 16), (50_000, 128)]), [None, None]);
    }

    #[test]
    fn who_reads_small_files_in_order_gets_the_next_fragment_block() {
        let ahead = ahead();
        let mut next = |index| ahead.follow_fragments(index);
        assert_eq!([7, 7, 8, 8].map(&mut next), [None, None, Some(9), None]);
        // Two readers, each in its place, and one who leaps.
        let both = [30, 9, 31, 10, 500, 32].map(&mut next);
        assert_eq!(both, [None, Some(10), Some(32), Some(11), None, Some(33)]);
        assert_eq!([NONE - 1, NONE].map(next), [None; 2]);
    }
}
