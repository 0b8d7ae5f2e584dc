//! A squashfs to a directory: every kind of file, hard links, holes, owners, extended attributes, times. The image may
//! be hostile: names are checked, nothing is followed, and nothing that exists is opened or replaced.
//!
//! One thread makes the names, several decompress and write contents.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use capsid_fuse::{Archive, InodeRef};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::archive;
use super::chain::{Chain, descend};
use super::tree::{Attributes, Data, Kind, NodeId, Tree};
use crate::progress::Progress;
use crate::{say, threads};

/// Threads that write contents, at most: more do not help a disk.
const MAX_THREADS: usize = 8;
/// Files that wait for them.
const QUEUE: usize = 64;
/// Bytes that are asked of the archive at once.
const STEP_BYTES: usize = 1 << 20;
/// Names in the notice about what could not be made.
const NAMED: usize = 3;

/// How an image is unpacked.
#[derive(Clone, Copy)]
pub struct Unpack<'a> {
    /// The owner on disk for a user and group of the image; `None` leaves the file to whoever unpacks.
    pub owner: &'a (dyn Fn(u32, u32) -> Option<(u32, u32)> + Sync),
}

impl Default for Unpack<'_> {
    /// All files belong to whoever unpacks.
    fn default() -> Self {
        Unpack {
            owner: &|_, _| None,
        }
    }
}

/// Unpacks an image into `root`, an empty directory, which gets the attributes of the image's root. Devices, and
/// extended attributes that only root may set, are left out with a notice where they cannot be made.
///
/// # Errors
/// When the image is damaged or hostile, or writing fails; what was unpacked until then stays.
pub fn unpack(archive: &Archive, root: &Path, options: &Unpack) -> Result<()> {
    let mut places: Vec<InodeRef> = Vec::new();
    let mut total_bytes = 0_u64;
    let tree = archive::tree(archive, &mut |at, inode| {
        places.push(at);
        total_bytes = total_bytes.saturating_add(inode.size);
        Ok(Data {
            len_bytes: inode.size,
            number: Some(u32::try_from(places.len() - 1)?),
        })
    })?;
    let notes = Notes::default();
    let progress = Progress::new("extracting", total_bytes);
    let (send, receive) = sync_channel::<Job>(QUEUE);
    let receive = Mutex::new(receive);
    let failure: Mutex<Option<anyhow::Error>> = Mutex::new(None);
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    let writing = Writing {
        archive,
        failure: &failure,
        options,
        notes: &notes,
        progress: &progress,
    };
    let made = std::thread::scope(|scope| {
        let work = || writing.all(&receive);
        let crew = threads::crew(scope, "unpack", most.min(MAX_THREADS), work);
        let mut maker = Maker {
            tree: &tree,
            places: &places,
            options,
            notes: &notes,
            // Where there can be no other thread, this one writes too.
            send: (!crew.is_empty()).then_some(send),
            writing: &writing,
            links: HashMap::new(),
            at: Chain::new(root)?,
        };
        maker.all()
    });
    drop(progress);
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    made?;
    notes.tell();
    Ok(())
}

/// A file that exists and is empty.
struct Job {
    file: File,
    path: PathBuf,
    place: InodeRef,
    len_bytes: u64,
    attributes: Attributes,
}

/// What could not be made.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Notes {
    fn add(&self, what: String) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what);
    }

    fn tell(&self) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.is_empty() {
            return;
        }
        let more = match all.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let first: Vec<_> = all.iter().take(NAMED).map(String::as_str).collect();
        say::warn(format_args!(
            "only root can make these, they are left out: {}{more}",
            first.join(", ")
        ));
    }
}

/// What whoever writes contents needs.
struct Writing<'a> {
    archive: &'a Archive,
    failure: &'a Mutex<Option<anyhow::Error>>,
    options: &'a Unpack<'a>,
    notes: &'a Notes,
    progress: &'a Progress,
}

impl Writing<'_> {
    fn has_failed(&self) -> bool {
        let failure = self.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn all(&self, jobs: &Mutex<Receiver<Job>>) {
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(job) = job else { return };
            if self.has_failed() {
                continue;
            }
            if let Err(error) = self.one(&job) {
                let failure = self.failure.lock();
                failure
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(error);
            }
        }
    }

    fn one(&self, job: &Job) -> Result<()> {
        let what = || format!("cannot unpack {}", job.path.display());
        write(self.archive, job, self.progress).with_context(what)?;
        let (options, notes) = (self.options, self.notes);
        finish(&job.file, &job.attributes, &job.path, options, notes).with_context(what)
    }
}

/// Writes a content; holes stay holes.
fn write(archive: &Archive, job: &Job, progress: &Progress) -> Result<()> {
    let mut at = 0;
    while at < job.len_bytes {
        let mut written = Ok(());
        let mut position = at;
        let len = archive.visit(job.place, at, STEP_BYTES, &mut |len, bytes| {
            if let (Some(bytes), Ok(())) = (bytes, &written) {
                written = job.file.write_all_at(bytes, position);
            }
            position += len as u64;
        })?;
        written?;
        if len == 0 {
            bail!("the image is damaged: the file is shorter than it says");
        }
        at += len as u64;
        progress.add(len as u64);
    }
    job.file.set_len(job.len_bytes)?;
    Ok(())
}

/// Gives an open file its attributes: the owner first, since it takes set-id bits and capabilities away.
fn finish(
    fd: &impl AsFd,
    attributes: &Attributes,
    path: &Path,
    options: &Unpack,
    notes: &Notes,
) -> Result<()> {
    if let Some((uid, gid)) = (options.owner)(attributes.uid, attributes.gid) {
        rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .with_context(|| format!("cannot give it to user {uid} and group {gid}"))?;
    }
    for (name, value) in &attributes.xattrs {
        let set = rustix::fs::fsetxattr(fd, OsStr::from_bytes(name), value, XattrFlags::empty());
        let what = || {
            format!(
                "attribute {} of {}",
                String::from_utf8_lossy(name),
                path.display()
            )
        };
        match set {
            Ok(()) => {}
            Err(Errno::PERM | Errno::OPNOTSUPP) => notes.add(what()),
            Err(error) => return Err(error).with_context(what),
        }
    }
    rustix::fs::fchmod(fd, Mode::from_raw_mode(u32::from(attributes.mode)))?;
    rustix::fs::futimens(fd, &times(attributes))?;
    Ok(())
}

fn times(attributes: &Attributes) -> Timestamps {
    let time = Timespec {
        tv_sec: i64::from(attributes.mtime_s),
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

struct Maker<'a> {
    tree: &'a Tree,
    places: &'a [InodeRef],
    options: &'a Unpack<'a>,
    notes: &'a Notes,
    send: Option<SyncSender<Job>>,
    writing: &'a Writing<'a>,
    /// Where nodes that have been made lie: the names from the root.
    links: HashMap<NodeId, Vec<Vec<u8>>>,
    at: Chain,
}

impl Maker<'_> {
    fn all(&mut self) -> Result<()> {
        let tree = self.tree;
        let names = |id| tree.names(id).context("no directory");
        // Directories whose names are being made.
        let mut open = vec![(Tree::ROOT, names(Tree::ROOT)?.iter())];
        while let Some((directory, rest)) = open.last_mut() {
            if let Some((name, id)) = rest.next() {
                let what = || format!("cannot unpack {}", self.at.path(name).display());
                let message = what();
                if tree.names(*id).is_some() {
                    self.enter(name).with_context(|| message)?;
                    open.push((*id, names(*id)?.iter()));
                } else {
                    self.make(name, *id).with_context(|| message)?;
                }
                continue;
            }
            // Complete: nothing below changes its time any more.
            let attributes = &tree.node(*directory).attributes;
            let path = self.at.path(b"");
            let (options, notes) = (self.options, self.notes);
            finish(&self.at.here()?, attributes, &path, options, notes)
                .with_context(|| format!("cannot unpack {}", path.display()))?;
            open.pop();
            self.at.leave_to(open.len());
        }
        Ok(())
    }

    fn enter(&mut self, name: &[u8]) -> Result<()> {
        let here = self.at.here()?;
        rustix::fs::mkdirat(here, OsStr::from_bytes(name), Mode::RWXU)?;
        self.at.enter(name)
    }

    fn make(&mut self, name: &[u8], id: NodeId) -> Result<()> {
        if let Some(known) = self.links.get(&id) {
            let Some((last, way)) = known.split_last() else {
                bail!("it has no name");
            };
            let old = descend(self.at.root()?, way)?;
            let (from, to) = (OsStr::from_bytes(last), OsStr::from_bytes(name));
            rustix::fs::linkat(&old, from, self.at.here()?, to, AtFlags::empty())?;
            return Ok(());
        }
        let path = self.at.path(name);
        let node = self.tree.node(id);
        let os_name = OsStr::from_bytes(name);
        match &node.kind {
            Kind::Directory(_) => bail!("a directory is no file"),
            Kind::File(data) => self.file(name, *data, &node.attributes)?,
            Kind::Symlink(target) => {
                let target = OsStr::from_bytes(target);
                rustix::fs::symlinkat(target, self.at.here()?, os_name)?;
                self.finish_by_name(name, &node.attributes, None)?;
            }
            other => {
                let (kind, device) = match other {
                    Kind::CharDevice(device) => (FileType::CharacterDevice, *device),
                    Kind::BlockDevice(device) => (FileType::BlockDevice, *device),
                    Kind::Socket => (FileType::Socket, 0),
                    _ => (FileType::Fifo, 0),
                };
                let made = rustix::fs::mknodat(
                    self.at.here()?,
                    os_name,
                    kind,
                    Mode::RUSR | Mode::WUSR,
                    u64::from(device),
                );
                match made {
                    Ok(()) => {
                        self.finish_by_name(name, &node.attributes, Some(node.attributes.mode))?
                    }
                    Err(Errno::PERM) => {
                        self.notes.add(path.display().to_string());
                        return Ok(());
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let mut way = self.at.names();
        way.push(name.to_vec());
        self.links.insert(id, way);
        Ok(())
    }

    fn file(&mut self, name: &[u8], data: Data, attributes: &Attributes) -> Result<()> {
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = self.at.path(name);
        let mode = Mode::RUSR | Mode::WUSR;
        let fd: OwnedFd =
            rustix::fs::openat(self.at.here()?, OsStr::from_bytes(name), flags, mode)?;
        let number = data.number.context("a file without a content")? as usize;
        let job = Job {
            file: fd.into(),
            path,
            place: *self.places.get(number).context("a file without a place")?,
            len_bytes: data.len_bytes,
            attributes: attributes.clone(),
        };
        if self.writing.has_failed() {
            bail!("another file failed");
        }
        match &self.send {
            Some(send) => send
                .send(job)
                .map_err(|_| anyhow!("the writing threads have ended")),
            None => self.writing.one(&job),
        }
    }

    /// Owner, permissions and time of what is not opened. Links have no permissions of their own.
    fn finish_by_name(
        &mut self,
        name: &[u8],
        attributes: &Attributes,
        mode: Option<u16>,
    ) -> Result<()> {
        let options = self.options;
        let here = self.at.here()?;
        let name = OsStr::from_bytes(name);
        if let Some((uid, gid)) = (options.owner)(attributes.uid, attributes.gid) {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(here, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if let Some(mode) = mode {
            // It was made a moment ago in a directory that nobody else may enter.
            let mode = Mode::from_raw_mode(u32::from(mode));
            rustix::fs::chmodat(here, name, mode, AtFlags::empty())?;
        }
        rustix::fs::utimensat(here, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }
}
