//! Read-only ext2/3/4: the overlay of an Apptainer SIF file or overlay image, shown as a layer for overlayfs.
//!
//! The reader (`ext4-view`) knows files by path and must stay on one thread. It gets a thread of its own when the
//! first file is asked for: opening starts none, since a process with threads cannot enter a user namespace.
//!
//! A file is numbered by a hash of its path. A number from before a restart is found again by walking the tree.
//!
//! A damaged file system costs bounded time and memory. The reader knows no files but paths, and in a damaged directory may
//! go on for hours without a word; so its thread gets a few seconds of processor time for each answer. One that needs
//! more is given up, with the whole reader: everything is `EIO` from then on, until another process takes over.
//!
//! Whiteouts: a character device stays one and has number 0:0, the only kind that a layer of an overlay holds;
//! `.wh.NAME` is shown as such a device; `.wh..wh..opq` makes its directory opaque. What the reader does not show, and
//! so is not shown here: extended attributes, hard link counts, device numbers.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType};

use crate::cache::lock;
use crate::error::{Error, Result};
use crate::format::Kind;
use crate::server::{Entry, Place, Stat};
use crate::source::Source;
use crate::sys;

/// Files known by their number, at most, and names in one directory.
const KNOWN_MAX: usize = 1 << 20;
/// Bytes of paths that are kept for them, and that one walk through the tree has before it, at most.
const PATHS_MAX: usize = 128 << 20;
/// Processor time for one answer. A directory of a million names takes about one second.
const ANSWER_MAX: Duration = Duration::from_secs(6);
/// The same for a walk through the tree, which gives up by itself.
const WALK_MAX: Duration = Duration::from_secs(3);
/// How often it is looked whether a reader that does not answer is at work or waits for storage.
const LOOK: Duration = Duration::from_millis(200);
/// Bytes of a symlink target, at most.
const TARGET_MAX: usize = 4096;
/// The mark of an opaque directory, for overlayfs with the option `userxattr`.
const OPAQUE: &[u8] = b"user.overlay.opaque";
/// Begins the name of a whiteout.
const WHITEOUT: &[u8] = b".wh.";
/// Name of the file that makes its directory opaque.
const OPAQUE_FILE: &[u8] = b".wh..wh..opq";

type Job = Box<dyn FnOnce(&mut Reader) + Send>;

/// The reader's thread.
struct Thread {
    jobs: Sender<Job>,
    handle: JoinHandle<()>,
    /// Processor time in nanoseconds that it had used when the job at hand began.
    begun: Arc<AtomicU64>,
}

impl Thread {
    /// Processor time that the job at hand has used.
    fn used(&self) -> Duration {
        let begun = Duration::from_nanos(self.begun.load(Ordering::Acquire));
        sys::thread_time(&self.handle).saturating_sub(begun)
    }
}

/// An ext2/3/4 file system.
pub(crate) struct Ext {
    source: Arc<Source>,
    top: Vec<u8>,
    thread: Mutex<Option<Thread>>,
    /// The reader was given up.
    stuck: AtomicBool,
    /// Processor time after which it is.
    answer_max: Duration,
}

impl Ext {
    /// Opens the file system and chooses the directory `subdir` as its root, if there is one.
    pub(crate) fn open(file: File, offset: u64, len: Option<u64>, subdir: &str) -> Result<Ext> {
        let source = Arc::new(Source::open(file, offset, len)?);
        let ext4 = load(source.clone())?;
        let top = format!("/{}", subdir.trim_matches('/'));
        let is_there = ext4
            .symlink_metadata(top.as_str())
            .is_ok_and(|stat| stat.is_dir());
        let top = if is_there && top != "/" {
            top
        } else {
            String::new()
        };
        Ok(Ext {
            source,
            top: top.into_bytes(),
            thread: Mutex::default(),
            stuck: AtomicBool::new(false),
            answer_max: ANSWER_MAX,
        })
    }

    /// Bytes of the file system.
    pub(crate) fn len(&self) -> u64 {
        self.source.len()
    }

    /// The root directory.
    pub(crate) fn root(&self) -> Place {
        number(&self.top)
    }

    pub(crate) fn stat(&self, at: Place) -> Result<Stat> {
        self.ask(move |reader| reader.stat(at))
    }

    pub(crate) fn lookup(&self, dir: Place, name: &[u8]) -> Result<Option<Place>> {
        let name = name.to_vec();
        self.ask(move |reader| {
            let names = reader.listing(dir)?;
            let found = names.binary_search_by(|n| n.shown.cmp(&name));
            Ok(found.ok().map(|index| names[index].at))
        })
    }

    pub(crate) fn list(
        &self,
        dir: Place,
        from: u64,
        f: &mut dyn FnMut(Entry<'_>) -> bool,
    ) -> Result<()> {
        let names = self.ask(move |reader| reader.listing(dir))?;
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        for (index, name) in names.iter().enumerate().skip(start) {
            let entry = Entry {
                name: &name.shown,
                at: name.at,
                number: name.at.0,
                kind: name.kind,
                next: index as u64 + 1,
            };
            if !f(entry) {
                break;
            }
        }
        Ok(())
    }

    pub(crate) fn read_link(&self, at: Place) -> Result<Vec<u8>> {
        self.ask(move |reader| {
            let path = reader.path(at)?;
            let target = reader
                .ext4
                .read_link(path.real().as_slice())
                .map_err(refused)?;
            let target: &[u8] = target.as_ref();
            if target.len() > TARGET_MAX {
                return Err(Error::Damaged("symlink length"));
            }
            Ok(target.to_vec())
        })
    }

    /// The size of a file, and at most `len` bytes of it from `offset`.
    pub(crate) fn read(&self, at: Place, offset: u64, len: usize) -> Result<(u64, Vec<u8>)> {
        self.ask(move |reader| reader.read(at, offset, len))
    }

    pub(crate) fn xattr(&self, at: Place, name: &[u8]) -> Result<Option<Vec<u8>>> {
        if name != OPAQUE {
            return Ok(None);
        }
        let opaque = self.ask(move |reader| reader.is_opaque(at))?;
        Ok(opaque.then(|| b"y".to_vec()))
    }

    /// The names, each ended by NUL.
    pub(crate) fn xattr_names(&self, at: Place) -> Result<Vec<u8>> {
        let opaque = self.ask(move |reader| reader.is_opaque(at))?;
        Ok(if opaque {
            [OPAQUE, b"\0"].concat()
        } else {
            Vec::new()
        })
    }

    /// Whether the reader was given up: only another process can go on.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire)
    }

    /// Has the reader's thread do something, and waits for it.
    fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Reader) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = sync_channel(1);
        let job: Job = Box::new(move |reader| {
            // Nobody waits any more: nothing is lost.
            let _gone = answer.send(job(reader));
        });
        self.send(job)?;
        loop {
            match answered.recv_timeout(LOOK) {
                Ok(answer) => return answer,
                // A job that panics drops its end.
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Panicked),
                Err(RecvTimeoutError::Timeout) => self.check()?,
            }
        }
    }

    /// Gives the reader up when it has been at work for too long.
    fn check(&self) -> Result<()> {
        let thread = lock(&self.thread);
        if thread.as_ref().is_some_and(|t| t.used() > self.answer_max) {
            self.stuck.store(true, Ordering::Release);
        }
        match self.is_stuck() {
            true => Err(Error::Damaged("ext file system: reading it does not end")),
            false => Ok(()),
        }
    }

    fn send(&self, job: Job) -> Result<()> {
        let mut thread = lock(&self.thread);
        if self.is_stuck() {
            return Err(Error::Damaged("ext file system: reading it does not end"));
        }
        if thread.is_none() {
            *thread = Some(self.start()?);
        }
        let sent = thread.as_ref().map(|thread| thread.jobs.send(job));
        sent.is_some_and(|sent| sent.is_ok())
            .then_some(())
            .ok_or(Error::Panicked)
    }

    fn start(&self) -> Result<Thread> {
        let (jobs, receiver) = channel::<Job>();
        let (opened, open) = sync_channel(1);
        let (source, top) = (self.source.clone(), self.top.clone());
        let begun = Arc::new(AtomicU64::new(0));
        let clock = begun.clone();
        let run = move || match load(source) {
            Ok(ext4) => {
                drop(opened.send(Ok(())));
                work(Reader::new(ext4, top), &receiver, &clock);
            }
            Err(error) => drop(opened.send(Err(error))),
        };
        let thread = std::thread::Builder::new().name("ext".into());
        let handle = thread
            .spawn(run)
            .map_err(|e| Error::os("start a thread", &e))?;
        open.recv().unwrap_or(Err(Error::Panicked))?;
        Ok(Thread {
            jobs,
            handle,
            begun,
        })
    }
}

/// The reader's thread: one job after the other.
fn work(mut reader: Reader, jobs: &Receiver<Job>, begun: &AtomicU64) {
    for job in jobs {
        let now = sys::own_thread_time().as_nanos();
        begun.store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Release);
        let job = std::panic::AssertUnwindSafe(|| job(&mut reader));
        if std::panic::catch_unwind(job).is_err() {
            reader.forget();
        }
        // It waits from here on, and what it did does not count for the next one.
        begun.store(u64::MAX, Ordering::Release);
    }
}

/// Lets the reader read the image.
struct Bytes(Arc<Source>);

impl Ext4Read for Bytes {
    fn read(
        &mut self,
        start: u64,
        out: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.read_exact(start, out)?)
    }
}

fn load(source: Arc<Source>) -> Result<Ext4> {
    Ext4::load(Box::new(Bytes(source))).map_err(refused)
}

fn refused(error: Ext4Error) -> Error {
    match error {
        Ext4Error::NotADirectory => Error::NotDirectory,
        Ext4Error::IsADirectory => Error::IsDirectory,
        Ext4Error::NotASymlink | Ext4Error::IsASpecialFile => Error::WrongKind,
        Ext4Error::TooManySymlinks => Error::Loop,
        other => Error::Ext(other.to_string()),
    }
}

fn number(path: &[u8]) -> Place {
    let mut hash = DefaultHasher::new();
    path.hash(&mut hash);
    Place(hash.finish() >> (64 - Place::BITS))
}

/// A name in a directory, as it is shown; a listing is sorted by it.
struct Name {
    shown: Vec<u8>,
    at: Place,
    kind: Kind,
}

/// A known file.
#[derive(Clone)]
struct Path {
    /// The directory that it is in, which its other files share.
    dir: Arc<[u8]>,
    /// Its name in the file system; of the root, all of its path.
    name: Box<[u8]>,
    is_whiteout: bool,
}

impl Path {
    fn real(&self) -> Vec<u8> {
        [&*self.dir, &*self.name].concat()
    }

    /// Bytes that it takes, about.
    fn cost(&self) -> usize {
        self.name.len() + 64
    }
}

/// A file that a directory holds.
struct Found {
    path: Path,
    at: Place,
    kind: Kind,
}

impl Found {
    /// The name that is shown.
    fn shown(&self) -> &[u8] {
        let name = &*self.path.name;
        if self.path.is_whiteout {
            &name[WHITEOUT.len()..]
        } else {
            name
        }
    }
}

/// What the reader's thread owns.
struct Reader {
    ext4: Ext4,
    top: Vec<u8>,
    known: HashMap<Place, Path>,
    /// Bytes that these take, about.
    known_bytes: usize,
    /// The listing used last, which a lookup often asks for again.
    listing: Option<(Place, Arc<Vec<Name>>)>,
    /// The file read last: a new one would have to find its blocks again.
    file: Option<(Place, ext4_view::File)>,
}

impl Reader {
    fn new(ext4: Ext4, top: Vec<u8>) -> Reader {
        let mut reader = Reader {
            ext4,
            top,
            known: HashMap::new(),
            known_bytes: 0,
            listing: None,
            file: None,
        };
        reader.forget();
        reader
    }

    /// Keeps the root only.
    fn forget(&mut self) {
        self.known.clear();
        self.known_bytes = 0;
        (self.listing, self.file) = (None, None);
        let path = Path {
            dir: Arc::default(),
            name: self.top.clone().into(),
            is_whiteout: false,
        };
        self.known.insert(number(&self.top), path);
    }

    fn path(&mut self, at: Place) -> Result<Path> {
        if let Some(path) = self.known.get(&at) {
            return Ok(path.clone());
        }
        let found = self.search(at)?;
        let path = found.path.clone();
        self.remember(vec![found])?;
        Ok(path)
    }

    /// Walks the tree until `wanted` is found, level by level, so that what leads round in circles hides nothing above it.
    fn search(&mut self, wanted: Place) -> Result<Found> {
        let begun = sys::own_thread_time();
        let mut open = VecDeque::from([self.top.clone()]);
        let mut waiting = 0;
        while let Some(dir) = open.pop_front() {
            waiting -= dir.len().min(waiting);
            // What is damaged elsewhere does not matter here.
            for found in self.names(&dir).unwrap_or_default() {
                if found.at == wanted {
                    return Ok(found);
                }
                if found.kind == Kind::Dir {
                    let real = found.path.real();
                    waiting += real.len();
                    open.push_back(real);
                }
            }
            if waiting > PATHS_MAX || sys::own_thread_time().saturating_sub(begun) > WALK_MAX {
                return Err(Error::Ext(
                    "a file cannot be found again: there are too many".into(),
                ));
            }
        }
        Err(Error::Damaged("node number"))
    }

    fn listing(&mut self, dir: Place) -> Result<Arc<Vec<Name>>> {
        if let Some((at, names)) = &self.listing
            && *at == dir
        {
            return Ok(names.clone());
        }
        let path = self.path(dir)?;
        let found = self.names(&path.real())?;
        let name = |found: &Found| Name {
            shown: found.shown().to_vec(),
            at: found.at,
            kind: found.kind,
        };
        let mut names: Vec<Name> = found.iter().map(name).collect();
        self.remember(found)?;
        // A file that is there again hides its own whiteout.
        names.sort_by(|a, b| {
            (&a.shown, a.kind == Kind::CharDevice).cmp(&(&b.shown, b.kind == Kind::CharDevice))
        });
        names.dedup_by(|a, b| a.shown == b.shown);
        let names = Arc::new(names);
        self.listing = Some((dir, names.clone()));
        Ok(names)
    }

    /// What a directory holds, in the order of the file system.
    fn names(&self, dir: &[u8]) -> Result<Vec<Found>> {
        self.check_place(dir)?;
        let mut found = Vec::new();
        let mut bytes = 0;
        let prefix: Arc<[u8]> = [dir, b"/"].concat().into();
        for entry in self.read_dir(dir)? {
            let entry = entry.map_err(refused)?;
            let raw = entry.file_name();
            let raw: &[u8] = raw.as_ref();
            if matches!(raw, b"." | b".." | OPAQUE_FILE) {
                continue;
            }
            let is_whiteout = raw.strip_prefix(WHITEOUT).is_some_and(|n| !n.is_empty());
            let kind = match is_whiteout {
                true => Kind::CharDevice,
                false => kind(entry.file_type().map_err(refused)?),
            };
            let path = Path {
                dir: prefix.clone(),
                name: raw.into(),
                is_whiteout,
            };
            bytes += path.cost();
            let at = number(&path.real());
            found.push(Found { path, at, kind });
            if found.len() > KNOWN_MAX || bytes > PATHS_MAX {
                return Err(Error::Ext("a directory is too large".into()));
            }
        }
        Ok(found)
    }

    /// Refuses a directory that is in two places: a walk would not end. Its `..` leads to one of them, where it has the same
    /// name by accident at most.
    fn check_place(&self, dir: &[u8]) -> Result<()> {
        if dir == self.top {
            return Ok(());
        }
        let name = dir.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let back = [dir, b"/../", name].concat();
        match self.ext4.exists(back.as_slice()).map_err(refused)? {
            true => Ok(()),
            false => Err(Error::Damaged("directory: it is in two places")),
        }
    }

    fn read_dir(&self, path: &[u8]) -> Result<ext4_view::ReadDir> {
        let path = if path.is_empty() { b"/" } else { path };
        self.ext4.read_dir(path).map_err(refused)
    }

    fn remember(&mut self, found: Vec<Found>) -> Result<()> {
        let more: usize = found.iter().map(|f| f.path.cost()).sum();
        if self.known.len() + found.len() > KNOWN_MAX || self.known_bytes + more > PATHS_MAX {
            self.forget();
        }
        for Found { path, at, .. } in found {
            match self.known.get(&at) {
                Some(other) if (&other.dir, &other.name) == (&path.dir, &path.name) => {}
                Some(_) => return Err(Error::Ext("two files have the same number".into())),
                None => {
                    self.known_bytes += path.cost();
                    self.known.insert(at, path);
                }
            }
        }
        Ok(())
    }

    fn stat(&mut self, at: Place) -> Result<Stat> {
        let path = self.path(at)?;
        let real = path.real();
        let real = if real.is_empty() {
            b"/"
        } else {
            real.as_slice()
        };
        let found = self.ext4.symlink_metadata(real).map_err(refused)?;
        let kind = if path.is_whiteout {
            Kind::CharDevice
        } else {
            kind(found.file_type())
        };
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        let size = if is_device { 0 } else { found.len() };
        let mtime = found.modified();
        Ok(Stat {
            kind,
            mode: u32::from(found.mode()) & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
            mtime: (mtime.seconds(), mtime.nanoseconds()),
            nlink: if kind == Kind::Dir { 2 } else { 1 },
            size,
            blocks: size.div_ceil(512),
            rdev: 0,
            number: at.0,
        })
    }

    fn read(&mut self, at: Place, offset: u64, len: usize) -> Result<(u64, Vec<u8>)> {
        let path = self.path(at)?;
        let mut file = match self.file.take() {
            Some((open, file)) if open == at => file,
            _ => self.ext4.open(path.real().as_slice()).map_err(refused)?,
        };
        let size = file.metadata().len();
        let len = usize::try_from(size.saturating_sub(offset)).map_or(len, |rest| rest.min(len));
        let mut bytes = vec![0; len];
        let mut done = 0;
        if file.position() != offset {
            file.seek_to(offset).map_err(refused)?;
        }
        while done < len {
            match file.read_bytes(&mut bytes[done..]).map_err(refused)? {
                0 => return Err(Error::Damaged("file: it is cut off")),
                count => done += count,
            }
        }
        self.file = Some((at, file));
        Ok((size, bytes))
    }

    fn is_opaque(&mut self, at: Place) -> Result<bool> {
        let path = self.path(at)?;
        let mark = [path.real().as_slice(), b"/", OPAQUE_FILE].concat();
        let is_dir = self.stat(at)?.kind == Kind::Dir;
        Ok(is_dir && self.ext4.exists(mark.as_slice()).map_err(refused)?)
    }
}

fn kind(of: FileType) -> Kind {
    match of {
        FileType::Directory => Kind::Dir,
        FileType::Regular => Kind::File,
        FileType::Symlink => Kind::Symlink,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // an error ends the test

    use super::*;
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    fn tool(name: &str) -> Command {
        let places = ["/usr/sbin", "/sbin", "/usr/bin"].map(|d| std::path::Path::new(d).join(name));
        Command::new(
            places
                .into_iter()
                .find(|p| p.exists())
                .unwrap_or_else(|| name.into()),
        )
    }

    fn run(command: &mut Command) {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
    }

    /// An ext2 file system of 4 MiB in blocks of 4 KiB, changed by commands of debugfs.
    fn image(name: &str, files: &[&str], changes: &[&str]) -> (std::path::PathBuf, File) {
        let dir = std::env::temp_dir().join(format!("capsid-ext-{name}-{}", std::process::id()));
        for file in files {
            let path = dir.join("tree").join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "text").unwrap();
        }
        let image = dir.join("image");
        File::create(&image).unwrap().set_len(4 << 20).unwrap();
        run(tool("mkfs.ext2")
            .args(["-q", "-F", "-b", "4096", "-d"])
            .arg(dir.join("tree"))
            .arg(&image));
        for change in changes {
            run(tool("debugfs").args(["-w", "-R", change]).arg(&image));
        }
        let file = File::options().read(true).write(true).open(&image).unwrap();
        (dir, file)
    }

    fn names(ext: &Ext, dir: Place) -> Result<Vec<String>> {
        let mut names = Vec::new();
        ext.list(dir, 0, &mut |entry| {
            names.push(String::from_utf8_lossy(entry.name).into_owned());
            true
        })?;
        Ok(names)
    }

    #[test]
    fn a_directory_in_two_places_ends_every_walk() {
        // Round in circles, at once, further up, and twice: a walk would never end.
        let changes = [
            "ln /upper /upper/a/l1",
            "ln /upper/a /upper/a/l2",
            "ln /upper/a /upper/b/l3",
        ];
        let (dir, file) = image("cycle", &["upper/a/f", "upper/b/c/d/deep"], &changes);
        let ext = Ext::open(file.try_clone().unwrap(), 0, None, "upper").unwrap();
        let find = |ext: &Ext, path: &[&str]| {
            path.iter().fold(ext.root(), |at, name| {
                ext.lookup(at, name.as_bytes()).unwrap().unwrap()
            })
        };
        let a = find(&ext, &["a"]);
        assert_eq!(names(&ext, a).unwrap(), ["f", "l1", "l2"]);
        for path in [&["a", "l1"][..], &["a", "l2"], &["b", "l3"]] {
            let at = find(&ext, path);
            assert_eq!(ext.stat(at).unwrap().kind, Kind::Dir);
            assert_eq!(names(&ext, at).unwrap_err().errno(), libc::EIO, "{path:?}");
            assert_eq!(
                ext.lookup(at, b"f").unwrap_err().errno(),
                libc::EIO,
                "{path:?}"
            );
        }
        let deep = find(&ext, &["b", "c", "d", "deep"]);
        // Another process finds by number what is there, and ends its search for what is not.
        let ext = Ext::open(file, 0, None, "upper").unwrap();
        assert_eq!(ext.read(deep, 0, 9).unwrap().1, b"text");
        assert_eq!(ext.stat(Place(12345)).unwrap_err().errno(), libc::EIO);
        std::fs::remove_dir_all(dir).unwrap();
    }

    /// Sets the words of an inode that say where its blocks are.
    fn set_blocks(image: &std::path::Path, file: &str, words: &[(usize, u32)]) {
        for (index, word) in words {
            let place = match index {
                12 => "IND".to_owned(),
                13 => "DIND".into(),
                14 => "TIND".into(),
                index => index.to_string(),
            };
            let change = format!("set_inode_field {file} block[{place}] {word}");
            run(tool("debugfs").args(["-w", "-R", &change]).arg(image));
        }
    }

    #[test]
    fn a_directory_of_more_names_than_are_held_is_an_error() {
        // 4 GiB in a file of 4 MiB: all entries of one level lead to the only block of the next one, up to one of 341 names.
        let (dir, file) = image(
            "large",
            &["upper/d/f"],
            &["set_inode_field /upper/d size 4294963200"],
        );
        for block in 1000..1003_u32 {
            let pointers: Vec<u8> = (0..1024).flat_map(|_| (block + 1).to_le_bytes()).collect();
            file.write_all_at(&pointers, u64::from(block) * 4096)
                .unwrap();
        }
        let entry = [
            &12_u32.to_le_bytes()[..],
            &12_u16.to_le_bytes(),
            &[1, 1, b'n', 0, 0, 0],
        ]
        .concat();
        let mut names_block = entry.repeat(341);
        names_block[340 * 12 + 4] = 16;
        names_block.resize(4096, 0);
        file.write_all_at(&names_block, 1003 * 4096).unwrap();
        let direct = (1..12).map(|n| (n, 1003));
        let places: Vec<_> = direct.chain([(12, 1002), (13, 1001), (14, 1000)]).collect();
        set_blocks(&dir.join("image"), "/upper/d", &places);
        let ext = Ext::open(file, 0, None, "upper").unwrap();
        let large = ext.lookup(ext.root(), b"d").unwrap().unwrap();
        let error = names(&ext, large).unwrap_err();
        assert!(error.to_string().contains("too large"), "{error}");
        assert!(!ext.is_stuck() && ext.stat(large).is_ok());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_directory_without_end_is_given_up() {
        let (dir, file) = image("endless", &["upper/d/f", "upper/good"], &[]);
        let blocks = tool("debugfs")
            .args(["-R", "blocks /upper/d"])
            .arg(dir.join("image"))
            .output()
            .unwrap();
        let first: u32 = String::from_utf8(blocks.stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let node = |depth: u32, children: &[u32]| -> Vec<u8> {
            let head = [
                0xf30a | (children.len() as u32) << 16,
                children.len() as u32 | depth << 16,
                0,
            ];
            let rest = children
                .iter()
                .enumerate()
                .flat_map(|(n, child)| match depth {
                    0 => [n as u32, 1, *child],
                    _ => [n as u32, *child, 0],
                });
            head.into_iter()
                .chain(rest)
                .flat_map(u32::to_le_bytes)
                .collect()
        };
        // A tree of five levels: one branch leads to the block with the names, and 340 times 340 and so on to nothing.
        for depth in 0..5_u32 {
            let (good, empty) = (990 + depth, 1000 + depth);
            let to_good = if depth == 0 { first } else { good - 1 };
            let to_empty = vec![empty.saturating_sub(1); if depth == 0 { 0 } else { 340 }];
            file.write_all_at(&node(depth, &[to_good]), u64::from(good) * 4096)
                .unwrap();
            file.write_all_at(&node(depth, &to_empty), u64::from(empty) * 4096)
                .unwrap();
        }
        let root = node(5, &[994, 1004, 1004, 1004]);
        let words: Vec<_> = root
            .chunks_exact(4)
            .map(|w| u32::from_le_bytes(w.try_into().unwrap()))
            .enumerate()
            .collect();
        for (field, value) in [("size", "8192"), ("flags", "0x80000")] {
            let change = format!("set_inode_field /upper/d {field} {value}");
            run(tool("debugfs")
                .args(["-w", "-R", &change])
                .arg(dir.join("image")));
        }
        set_blocks(&dir.join("image"), "/upper/d", &words);
        let mut ext = Ext::open(file, 0, None, "upper").unwrap();
        ext.answer_max = Duration::from_millis(50);
        let good = ext.lookup(ext.root(), b"good").unwrap().unwrap();
        assert_eq!(ext.read(good, 0, 9).unwrap().1, b"text");
        let endless = ext.lookup(ext.root(), b"d").unwrap().unwrap();
        assert!(!ext.is_stuck());
        let error = names(&ext, endless).unwrap_err();
        assert!(
            error.errno() == libc::EIO && error.to_string().contains("does not end"),
            "{error}"
        );
        assert!(ext.is_stuck());
        assert_eq!(ext.stat(good).unwrap_err().errno(), libc::EIO, "at once");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
