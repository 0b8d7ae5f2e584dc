//! The request loops.
//!
//! Each thread reads requests from its own descriptor and answers on it. There is one at first; when the last idle
//! one takes a request, another is started, up to the limit.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, Scope};

use rustix::io::Errno;

use super::Server;
use super::protocol::{Answer, Reply};
use crate::error::{Error, Result};
use crate::file::Piece;

/// Bytes of a request, at most: the kernel demands room for 4 KiB of data, which a read-only tree is never sent.
const REQUEST_MAX: usize = 16 << 10;
/// Unexpected errors in a row after which a thread gives up: who waits for an answer must not wait for ever.
const FAILURES_MAX: u32 = 16;
/// What holes are written from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Parts of one write, at most (IOV_MAX).
const PARTS_MAX: usize = 1024;

struct Pool<'a> {
    server: &'a Arc<Server>,
    devices: &'a [OwnedFd],
    max: usize,
    started: AtomicUsize,
    idle: AtomicUsize,
}

/// Serves until the connection has ended.
pub(super) fn serve(server: &Arc<Server>, devices: &[OwnedFd], max: usize) -> Result<()> {
    let pool = Pool {
        server,
        devices,
        max: max.max(1),
        started: AtomicUsize::new(1),
        idle: AtomicUsize::new(0),
    };
    let pool = &pool;
    std::thread::scope(|scope| pool.run(scope, 0))
}

impl Pool<'_> {
    fn run<'s>(&'s self, scope: &'s Scope<'s, '_>, index: usize) -> Result<()> {
        let Some(device) = self.devices.get(index % self.devices.len().max(1)) else {
            return Err(Error::Os {
                what: "serve without a FUSE device",
                errno: libc::EBADF,
            });
        };
        let mut request = vec![0; REQUEST_MAX];
        let mut reply = Reply::default();
        let mut failures = 0;
        loop {
            self.idle.fetch_add(1, Ordering::SeqCst);
            let read = rustix::io::read(device, request.as_mut_slice());
            let was_last = self.idle.fetch_sub(1, Ordering::SeqCst) == 1;
            let len = match read {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                // Interrupted requests, by us or by who made them.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(Errno::NODEV) => return Ok(()),
                Err(errno) => {
                    failures += 1;
                    if failures > FAILURES_MAX {
                        return Err(Error::sys("read from the FUSE device", errno));
                    }
                    continue;
                }
            };
            failures = 0;
            if was_last {
                self.grow(scope);
            }
            self.answer(device, &request[..len], &mut reply);
            self.leave_if_stuck();
        }
    }

    fn grow<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let more = |count| (count < self.max).then_some(count + 1);
        let order = Ordering::SeqCst;
        let Ok(index) = self.started.fetch_update(order, order, more) else {
            return;
        };
        let thread = Builder::new().name(format!("serve-{index}"));
        // The first thread reports what ends the connection; without this one the others do its work.
        let run = move || drop(self.run(scope, index));
        if thread.spawn_scoped(scope, run).is_err() {
            self.started.fetch_sub(1, order);
        }
    }

    /// Lets the process end when the image keeps a thread busy for ever, and all who waited have their answers.
    fn leave_if_stuck(&self) {
        let others_idle = || {
            let order = Ordering::SeqCst;
            self.idle.load(order) + 1 >= self.started.load(order)
        };
        if self.server.tree.is_stuck()
            && others_idle()
            && let Some(leave) = self.server.on_stuck.get()
        {
            leave();
        }
    }

    fn answer(&self, device: &OwnedFd, request: &[u8], reply: &mut Reply) {
        let handled = catch_unwind(AssertUnwindSafe(|| self.server.handle(request, reply)));
        let answer = handled.unwrap_or_else(|_| reply.fail(request, libc::EIO));
        if matches!(answer, Answer::None) {
            return;
        }
        match write(device, reply) {
            // The request was interrupted, or the connection has ended, which the next read tells.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
            // The kernel refuses the answer; whoever waits must not wait for ever.
            Err(_) => {
                reply.fail(request, libc::EIO);
                let _gone = write(device, reply);
            }
        }
        reply.release();
    }
}

/// Writes header, bytes and pieces at once, from where they are.
fn write(device: &OwnedFd, reply: &Reply) -> std::result::Result<(), Errno> {
    let header = reply.header();
    let mut parts = vec![IoSlice::new(&header)];
    if !reply.bytes.is_empty() {
        parts.push(IoSlice::new(&reply.bytes));
    }
    for piece in &reply.pieces {
        match (piece.bytes(), piece) {
            (Some(bytes), _) => parts.push(IoSlice::new(bytes)),
            (None, Piece::Zeros(len)) => {
                let mut left = *len;
                while left > 0 {
                    let part = left.min(ZEROS.len());
                    parts.push(IoSlice::new(&ZEROS[..part]));
                    left -= part;
                }
            }
            (None, _) => {}
        }
    }
    if parts.len() > PARTS_MAX {
        return Err(Errno::INVAL);
    }
    rustix::io::writev(device, &parts).map(drop)
}
