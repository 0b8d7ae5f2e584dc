//! Compresses blocks on all cores and writes them in the order in which they were handed in.
//!
//! ```text
//!  caller ──jobs──► workers ──done──► writer ──► file
//!    ▲                                   │
//!    └────────────── free slots ─────────┘
//! ```
//!
//! There is a fixed number of slots, so memory is bounded: a caller that is faster than the compressors waits for one.
//! The writer puts blocks in the order of their numbers, so the image does not depend on who was faster. A failure is
//! kept and told to the caller at its next call; what is still under way is thrown away.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use super::compress::{Compression, Encoder};
use crate::threads;

/// What blocks and compressors may take together.
const MEMORY_BYTES: usize = 160 << 20;
/// The bit of a size word that says: stored as it is.
pub(super) const STORED: u32 = 1 << 24;
/// Files of one length and checksum that are compared, at most: a bound for content made to collide.
pub(super) const MAX_CANDIDATES: u8 = 8;
/// Bytes compared at once.
const COMPARED_BYTES: usize = 128 << 10;

/// Room for a block.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) raw: Vec<u8>,
    packed: Vec<u8>,
}

/// What a block is for.
enum Use {
    /// The block of this index in the file that is being written.
    Block(u32),
    /// The next fragment block.
    Fragment,
}

struct Job {
    turn: u64,
    slot: Slot,
    purpose: Use,
}

enum Done {
    Packed {
        slot: Slot,
        pays: bool,
        purpose: Use,
    },
    /// The file that is being written has this many blocks, those in holes among them.
    End(u32),
    Failed(anyhow::Error),
}

/// The blocks of a file.
#[derive(Debug, Clone, Default)]
pub(super) struct Run {
    /// First byte in the image.
    pub(super) start: u64,
    /// Size words; 0 is a hole.
    pub(super) words: Arc<[u32]>,
}

/// What has been written when the pipeline ends.
pub(super) struct Output {
    pub(super) file: File,
    /// The next byte.
    pub(super) position: u64,
    pub(super) runs: Vec<Run>,
    /// Start and size word of the fragment blocks.
    pub(super) fragments: Vec<(u64, u32)>,
    /// Bytes that were not stored again.
    pub(super) saved_bytes: u64,
}

/// What all threads see.
#[derive(Default)]
struct Shared {
    failed: AtomicBool,
    failure: Mutex<Option<anyhow::Error>>,
    fragments: Mutex<Vec<(u64, u32)>>,
    written: Condvar,
}

impl Shared {
    fn fail(&self, error: anyhow::Error) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        // Whoever waits for a fragment looks again, not between a look and its sleep.
        let _order = lock(&self.fragments);
        self.written.notify_all();
    }

    fn check(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let failure = lock(&self.failure).take();
        Err(failure.unwrap_or_else(|| anyhow!("the image could not be written")))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The caller's side.
pub(super) struct Pipeline {
    jobs: Option<Sender<Job>>,
    done: Option<Sender<(u64, Done)>>,
    free: Receiver<Slot>,
    /// Taken and not used.
    spare: Vec<Slot>,
    shared: Arc<Shared>,
    file: File,
    workers: Vec<JoinHandle<()>>,
    /// Where no worker could be started, the caller compresses.
    own: Option<Encoder>,
    writer: Option<JoinHandle<Output>>,
    turn: u64,
}

impl Pipeline {
    /// Starts the threads. Blocks go into `file` from `position`.
    ///
    /// # Errors
    /// When a thread or a compressor cannot be set up.
    pub(super) fn start(
        file: File,
        position: u64,
        compression: Compression,
        block_bytes: usize,
        count: usize,
    ) -> Result<Pipeline> {
        let each = compression.context_bytes(block_bytes) + 4 * block_bytes;
        let count = count.clamp(1, (MEMORY_BYTES / each).max(1));
        let shared = Arc::new(Shared::default());
        let (jobs, todo) = channel();
        let (done, finished) = channel();
        let (give, free) = channel();
        for _ in 0..2 * count + 2 {
            give.send(Slot::default())?;
        }
        let again = file
            .try_clone()
            .context("cannot open the image a second time")?;
        let output = Output {
            file,
            position,
            runs: Vec::new(),
            fragments: Vec::new(),
            saved_bytes: 0,
        };
        let all = shared.clone();
        let writer = threads::start("write", move || {
            write(Sink::new(output), &finished, &give, &all)
        })?;
        let todo = Arc::new(Mutex::new(todo));
        let mut workers = Vec::new();
        for _ in 0..count {
            let mut encoder = Encoder::new(compression, block_bytes)?;
            let (todo, done) = (todo.clone(), done.clone());
            match threads::start("pack", move || work(&todo, &done, &mut encoder)) {
                Ok(worker) => workers.push(worker),
                Err(_) => break,
            }
        }
        let own = match workers.is_empty() {
            true => Some(Encoder::new(compression, block_bytes)?),
            false => None,
        };
        Ok(Pipeline {
            jobs: Some(jobs),
            done: Some(done),
            free,
            spare: Vec::new(),
            shared,
            file: again,
            workers,
            own,
            writer: Some(writer),
            turn: 0,
        })
    }

    /// A slot to be filled: waits until there is one.
    ///
    /// # Errors
    /// What has failed meanwhile.
    pub(super) fn slot(&mut self) -> Result<Slot> {
        self.shared.check()?;
        match self.spare.pop() {
            Some(slot) => Ok(slot),
            None => self.free.recv().context("the writing thread has ended"),
        }
    }

    /// Takes back a slot that was not needed.
    pub(super) fn give_back(&mut self, slot: Slot) {
        self.spare.push(slot);
    }

    /// Hands in the block of an index of the current file.
    pub(super) fn block(&mut self, index: u32, slot: Slot) -> Result<()> {
        self.submit(slot, Use::Block(index))
    }

    /// Hands in the next fragment block; only between files.
    pub(super) fn fragment(&mut self, slot: Slot) -> Result<()> {
        self.submit(slot, Use::Fragment)
    }

    fn submit(&mut self, slot: Slot, purpose: Use) -> Result<()> {
        let turn = self.next();
        let job = Job {
            turn,
            slot,
            purpose,
        };
        if let Some(encoder) = &mut self.own {
            let done = self.done.as_ref().context("the image is finished")?;
            return done
                .send((turn, compressed(job, encoder)))
                .map_err(|_| anyhow!("the writing thread has ended"));
        }
        let jobs = self.jobs.as_ref().context("the image is finished")?;
        jobs.send(job)
            .map_err(|_| anyhow!("the packing threads have ended"))
    }

    /// Ends the current file, which has `blocks` blocks. The number of its run is the number of earlier calls.
    pub(super) fn end(&mut self, blocks: u32) -> Result<()> {
        let turn = self.next();
        let done = self.done.as_ref().context("the image is finished")?;
        done.send((turn, Done::End(blocks)))
            .map_err(|_| anyhow!("the writing thread has ended"))
    }

    fn next(&mut self) -> u64 {
        let turn = self.turn;
        self.turn += 1;
        turn
    }

    /// Where a fragment block that was handed in lies: waits until it is written.
    pub(super) fn written(&self, fragment: u32) -> Result<(u64, u32)> {
        let mut fragments = lock(&self.shared.fragments);
        loop {
            if let Some(place) = fragments.get(fragment as usize) {
                return Ok(*place);
            }
            drop(fragments);
            self.shared.check()?;
            fragments = lock(&self.shared.fragments);
            if fragments.len() <= fragment as usize && !self.shared.failed.load(Ordering::Acquire) {
                fragments = self
                    .shared
                    .written
                    .wait(fragments)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Reads what is written.
    pub(super) fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file
            .read_exact_at(bytes, at)
            .context("cannot read the image that is being written")
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// What has failed.
    pub(super) fn finish(mut self) -> Result<Output> {
        let output = self.join();
        self.shared.check()?;
        output.context("the writing thread has ended early")
    }

    fn join(&mut self) -> Option<Output> {
        self.jobs = None;
        self.done = None;
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                self.shared.fail(anyhow!("a packing thread broke"));
            }
        }
        self.writer.take()?.join().ok()
    }
}

impl Drop for Pipeline {
    /// No thread outlives the pipeline: what is queued is thrown away.
    fn drop(&mut self) {
        if self.writer.is_some() {
            self.shared.failed.store(true, Ordering::Release);
            self.join();
        }
    }
}

fn work(todo: &Mutex<Receiver<Job>>, done: &Sender<(u64, Done)>, encoder: &mut Encoder) {
    loop {
        let job = lock(todo).recv();
        let Ok(job) = job else { return };
        if done.send((job.turn, compressed(job, encoder))).is_err() {
            return;
        }
    }
}

fn compressed(job: Job, encoder: &mut Encoder) -> Done {
    let Job {
        mut slot, purpose, ..
    } = job;
    match encoder.compress(&slot.raw, &mut slot.packed) {
        Ok(pays) => Done::Packed {
            slot,
            pays,
            purpose,
        },
        Err(error) => Done::Failed(error),
    }
}

fn write(
    mut sink: Sink,
    finished: &Receiver<(u64, Done)>,
    free: &Sender<Slot>,
    shared: &Shared,
) -> Output {
    let mut early = BTreeMap::new();
    let mut turn = 0;
    for (its, done) in finished {
        early.insert(its, done);
        while let Some(done) = early.remove(&turn) {
            turn += 1;
            let (slot, result) = if shared.failed.load(Ordering::Acquire) {
                match done {
                    Done::Packed { slot, .. } => (Some(slot), Ok(())),
                    Done::Failed(_) => (Some(Slot::default()), Ok(())),
                    Done::End(_) => (None, Ok(())),
                }
            } else {
                sink.take(done, shared)
            };
            if let Err(error) = result {
                shared.fail(error);
            }
            if let Some(slot) = slot {
                // The caller may be gone.
                let _ = free.send(slot);
            }
        }
    }
    sink.output
}

/// The writer's state.
struct Sink {
    output: Output,
    /// Where the current file begins, its size words and the checksum of its stored bytes.
    start: u64,
    words: Vec<u32>,
    sum: libdeflater::Crc,
    /// Runs by stored length, checksum, and a number for those that are alike in both.
    known: HashMap<(u64, u32, u8), u32>,
}

impl Sink {
    fn new(output: Output) -> Sink {
        Sink {
            start: output.position,
            output,
            words: Vec::new(),
            sum: libdeflater::Crc::new(),
            known: HashMap::new(),
        }
    }

    /// Returns the slot, which can be used again.
    fn take(&mut self, done: Done, shared: &Shared) -> (Option<Slot>, Result<()>) {
        match done {
            Done::Packed {
                slot,
                pays,
                purpose,
            } => {
                let result = self.put(&slot, pays, &purpose, shared);
                (Some(slot), result)
            }
            Done::End(blocks) => (None, self.end(blocks)),
            Done::Failed(error) => (Some(Slot::default()), Err(error)),
        }
    }

    fn put(&mut self, slot: &Slot, pays: bool, purpose: &Use, shared: &Shared) -> Result<()> {
        let bytes = if pays { &slot.packed } else { &slot.raw };
        let word = bytes.len() as u32 | if pays { 0 } else { STORED };
        let at = self.output.position;
        self.output
            .file
            .write_all_at(bytes, at)
            .context("cannot write the image")?;
        self.output.position += bytes.len() as u64;
        match purpose {
            Use::Block(index) => {
                self.words.resize(*index as usize, 0);
                self.words.push(word);
                self.sum.update(bytes);
            }
            Use::Fragment => {
                self.start = self.output.position;
                self.output.fragments.push((at, word));
                lock(&shared.fragments).push((at, word));
                shared.written.notify_all();
            }
        }
        Ok(())
    }

    /// A file ends: if its blocks are there already, it gets those, and what was written for it will be overwritten.
    fn end(&mut self, blocks: u32) -> Result<()> {
        let mut words = std::mem::take(&mut self.words);
        words.resize(blocks as usize, 0);
        let sum = std::mem::replace(&mut self.sum, libdeflater::Crc::new()).sum();
        let (start, len) = (self.start, self.output.position - self.start);
        let number = self.output.runs.len() as u32;
        let mut run = Run {
            start,
            words: words.into(),
        };
        if len > 0 {
            if let Some(same) = self.find(&run, len, sum, number)? {
                run = self.output.runs[same as usize].clone();
                self.output.position = start;
                self.output.saved_bytes += len;
            }
        } else {
            run.start = 0;
        }
        self.output.runs.push(run);
        self.start = self.output.position;
        Ok(())
    }

    /// The run that holds the same bytes; without one, remembers this one.
    fn find(&mut self, run: &Run, len: u64, sum: u32, number: u32) -> Result<Option<u32>> {
        for nth in 0..MAX_CANDIDATES {
            let Some(other) = self.known.get(&(len, sum, nth)) else {
                self.known.insert((len, sum, nth), number);
                return Ok(None);
            };
            let found = &self.output.runs[*other as usize];
            if found.words == run.words && self.same_bytes(found.start, run.start, len)? {
                return Ok(Some(*other));
            }
        }
        Ok(None)
    }

    /// Equal compressed bytes are equal content, and every compressor gives equal bytes for equal content.
    fn same_bytes(&self, one: u64, other: u64, len: u64) -> Result<bool> {
        let (mut left, mut right) = ([0; COMPARED_BYTES], [0; COMPARED_BYTES]);
        let mut at = 0;
        while at < len {
            let part = (len - at).min(COMPARED_BYTES as u64) as usize;
            for (bytes, start) in [(&mut left, one), (&mut right, other)] {
                self.output
                    .file
                    .read_exact_at(&mut bytes[..part], start + at)
                    .context("cannot read the image that is being written")?;
            }
            if left[..part] != right[..part] {
                return Ok(false);
            }
            at += part as u64;
        }
        Ok(true)
    }
}
