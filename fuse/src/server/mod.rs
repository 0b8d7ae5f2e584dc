//! Serves an image through FUSE.
//!
//! * `tree`: the image as numbered files, whatever its format;
//! * `views`: mount points that the image lacks;
//! * `protocol`: one request in, one answer out;
//! * `threads`: the request loops, and how many there are;
//! * `ahead`: decompresses what a sequential reader will want next;
//! * `habits`: whether listings should carry attributes;
//! * `idle`: gives memory back when nobody asks for anything.

mod ahead;
mod habits;
mod idle;
mod protocol;
mod threads;
mod tree;
mod views;

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use fuse_backend_rs::abi::fuse_abi::{NotifyOpcode, OutHeader};
use vm_memory::ByteValued as _;

use crate::archive::Archive;
use crate::error::Result;
use crate::ext::Ext;

use ahead::Ahead;
use habits::Habits;
use idle::Idle;
use tree::Tree;
pub(crate) use tree::{Entry, Place, Stat};
use views::Views;
pub use views::{ViewEntry, ViewId, ViewKind};

/// Threads that serve by default, at most.
const THREADS_MAX: usize = 8;

/// Whose the files are said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// All of them this user's and group's.
    Fixed {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// As the image has it.
    Image,
}

/// How to serve.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whose the files are said to be.
    pub owner: Owner,
    /// The root is a directory of views, each by its number, instead of the image itself.
    pub stage: bool,
    /// Threads that serve, at most; 0 means one for each core, up to 8.
    pub max_threads: usize,
    /// Decompressed data kept, in bytes, and half as much of names and attributes; 0 means 32 MiB. With what is at work
    /// that stays below 64 MiB.
    pub cache_bytes: usize,
}

/// Serves one image.
pub struct Server {
    tree: Arc<Tree>,
    views: Views,
    options: Options,
    ahead: Option<Ahead>,
    habits: Habits,
    idle: Arc<Idle>,
    on_stuck: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Server {
    /// Serves a squashfs image.
    pub fn squashfs(mut archive: Archive, options: Options) -> Server {
        archive.set_cache_bytes(options.cache_bytes);
        let block_size = archive.superblock().block_size;
        let tree = Arc::new(Tree::Squashfs(Arc::new(archive)));
        let threads = helper_count(&options);
        let ahead = (threads > 0).then(|| Ahead::new(tree.clone(), block_size, threads));
        Server::new(tree, options, ahead)
    }

    /// Serves the ext2/3/4 file system that lies `offset` bytes into `file` and is at most `len` bytes long: its
    /// directory `subdir`, or if it has none, its root; that too for no name.
    ///
    /// # Errors
    /// When there is no such file system, or it has features that cannot be read.
    pub fn ext(
        file: File,
        offset: u64,
        len: Option<u64>,
        subdir: &str,
        options: Options,
    ) -> Result<Server> {
        let tree = Arc::new(Tree::Ext(Ext::open(file, offset, len, subdir)?));
        Ok(Server::new(tree, options, None))
    }

    fn new(tree: Arc<Tree>, options: Options, ahead: Option<Ahead>) -> Server {
        Server {
            idle: Arc::new(Idle::new(tree.clone())),
            tree,
            views: Views::default(),
            options,
            ahead,
            habits: Habits::default(),
            on_stuck: OnceLock::new(),
        }
    }

    /// Makes a view with these mount points, or finds the one that was made for the same ones. In stage mode it is
    /// the directory of its number in the root; otherwise the first one is the root.
    ///
    /// # Errors
    /// When a path is not absolute, when there are too many views or mount points, or the image is damaged there. A path that
    /// leads through a file, or round in links, is left out.
    pub fn add_view(&self, entries: &[ViewEntry]) -> Result<ViewId> {
        self.views.add(&self.tree, entries)
    }

    /// Whether the image itself has a file at `path`. Links are followed and do not lead outside.
    ///
    /// # Errors
    /// When the image is damaged there, or there are too many links.
    pub fn exists(&self, path: &[u8]) -> Result<bool> {
        Ok(self.kind(path)?.is_some())
    }

    /// What the image itself has at `path`. Links are followed and do not lead outside.
    ///
    /// # Errors
    /// When the image is damaged there, or there are too many links.
    pub fn kind(&self, path: &[u8]) -> Result<Option<crate::Kind>> {
        views::kind(&self.tree, path)
    }

    /// Says that a program will be started soon, the first that the image has of `paths`: its blocks are made ready in the
    /// background, where there is more than one thread. Links are followed. What is damaged is told to who asks for it.
    pub fn expect(&self, paths: Vec<Vec<u8>>) {
        if let Some(ahead) = &self.ahead {
            ahead.expect(paths);
        }
    }

    /// Says what to do when a damaged image keeps a thread busy for ever: everything is an error from then on, and only a new
    /// process can go on. The first call counts.
    pub fn on_stuck(&self, leave: impl Fn() + Send + Sync + 'static) {
        let _first = self.on_stuck.set(Box::new(leave));
    }

    /// Serves from one descriptor, until the file system is unmounted everywhere.
    ///
    /// # Errors
    /// When the descriptor cannot be read.
    pub fn serve(self: &Arc<Self>, device: OwnedFd) -> Result<()> {
        self.serve_on(vec![device])
    }

    /// Serves from several descriptors of one connection (see [`crate::clone_device`]), until the file system is
    /// unmounted everywhere. Starts with one thread, and adds one when all are busy.
    ///
    /// # Errors
    /// When a descriptor cannot be read.
    pub fn serve_on(self: &Arc<Self>, devices: Vec<OwnedFd>) -> Result<()> {
        if !self.options.stage && self.views.count() == 0 {
            self.add_view(&[])?;
        }
        threads::serve(self, &devices, thread_count(&self.options))
    }

    /// Reads ahead what earlier starts of this image have read, decompresses it, and notes what this one reads, in a file
    /// in `directory` (see the module `profile`). For images on slow storage; call it once, before or after the first request.
    pub fn keep_profile(&self, directory: OwnedFd) {
        let Some(profile) = self.tree.profile(directory) else {
            return;
        };
        let profile = Arc::new(profile);
        if self.idle.profile.set(profile.clone()).is_err() {
            return;
        }
        if profile.is_empty() {
            return;
        }
        let tree = self.tree.clone();
        let thread = std::thread::Builder::new().name("prefetch".into());
        // Without the thread, everything is read when it is asked for.
        let threads = helper_count(&self.options);
        let _slower = thread.spawn(move || tree.prefetch_profile(&profile, threads));
    }

    /// Writes what was read so far to the profile, if there is one. It is also written by itself, when nobody has asked
    /// for anything for a while.
    pub fn save_profile(&self) {
        self.idle.save_profile();
    }

    /// Forgets what is cached.
    pub fn shrink(&self) {
        self.tree.shrink();
        crate::sys::give_back();
    }

    /// Has the kernel send again what a process that died has read and not answered. Linux before 6.9 cannot; there,
    /// whoever waits for such an answer waits until it is interrupted.
    pub fn resume(device: BorrowedFd<'_>) {
        let notice = OutHeader {
            len: size_of::<OutHeader>() as u32,
            error: NotifyOpcode::Resend as i32,
            unique: 0,
        };
        // Nothing can be done where the kernel does not know it.
        let _unknown = rustix::io::write(device, notice.as_slice());
    }
}

fn thread_count(options: &Options) -> usize {
    match options.max_threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS_MAX)),
        count => count,
    }
}

/// Threads that decompress what has not been asked for, at most.
fn helper_count(options: &Options) -> usize {
    thread_count(options) / 2
}
