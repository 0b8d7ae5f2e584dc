//! Read-only ext2/3/4: the overlay of an Apptainer SIF file or overlay image, shown as a layer for overlayfs.
//!
//! The reader (`ext4-view`) knows files by path and must stay on one thread. It gets a thread of its own when the
//! first file is asked for: opening starts none, since a process with threads cannot enter a user namespace.
//!
//! A file is numbered by a hash of its path. A number from before a restart is found again by walking the tree.
//!
//! Whiteouts: a character device stays one and has number 0:0, the only kind that a layer of an overlay holds;
//! `.wh.NAME` is shown as such a device; `.wh..wh..opq` makes its directory opaque. What the reader does not show, and
//! so is not shown here: extended attributes, hard link counts, device numbers.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType};

use crate::cache::lock;
use crate::error::{Error, Result};
use crate::format::Kind;
use crate::server::{Entry, Place, Stat};
use crate::source::Source;

/// Files known by their number, at most; beyond it they are found by walking the tree again.
const KNOWN_MAX: usize = 1 << 20;
/// Bytes of a symlink target, at most.
const TARGET_MAX: usize = 4096;
/// The mark of an opaque directory, for overlayfs with the option `userxattr`.
const OPAQUE: &[u8] = b"user.overlay.opaque";
/// Begins the name of a whiteout.
const WHITEOUT: &[u8] = b".wh.";
/// Name of the file that makes its directory opaque.
const OPAQUE_FILE: &[u8] = b".wh..wh..opq";

type Job = Box<dyn FnOnce(&mut Reader) + Send>;

/// An ext2/3/4 file system.
pub(crate) struct Ext {
    source: Arc<Source>,
    top: Vec<u8>,
    jobs: Mutex<Option<Sender<Job>>>,
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
            jobs: Mutex::default(),
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
                .read_link(path.real.as_slice())
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
        self.jobs()?.send(job).map_err(|_| Error::Panicked)?;
        // A job that panics drops its end.
        answered.recv().unwrap_or(Err(Error::Panicked))
    }

    fn jobs(&self) -> Result<Sender<Job>> {
        let mut jobs = lock(&self.jobs);
        if let Some(jobs) = &*jobs {
            return Ok(jobs.clone());
        }
        let (sender, receiver) = channel::<Job>();
        let (opened, open) = sync_channel(1);
        let (source, top) = (self.source.clone(), self.top.clone());
        let thread = std::thread::Builder::new().name("ext".into());
        let run = move || {
            let mut reader = match load(source) {
                Ok(ext4) => Reader::new(ext4, top),
                Err(error) => return drop(opened.send(Err(error))),
            };
            drop(opened.send(Ok(())));
            for job in receiver {
                let job = std::panic::AssertUnwindSafe(|| job(&mut reader));
                if std::panic::catch_unwind(job).is_err() {
                    reader.forget();
                }
            }
        };
        thread
            .spawn(run)
            .map_err(|e| Error::os("start a thread", &e))?;
        open.recv().unwrap_or(Err(Error::Panicked))?;
        *jobs = Some(sender.clone());
        Ok(sender)
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
    real: Vec<u8>,
    is_whiteout: bool,
}

/// What the reader's thread owns.
struct Reader {
    ext4: Ext4,
    top: Vec<u8>,
    known: HashMap<Place, Path>,
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
            listing: None,
            file: None,
        };
        reader.forget();
        reader
    }

    /// Keeps the root only.
    fn forget(&mut self) {
        self.known.clear();
        (self.listing, self.file) = (None, None);
        let path = Path {
            real: self.top.clone(),
            is_whiteout: false,
        };
        self.known.insert(number(&self.top), path);
    }

    fn path(&mut self, at: Place) -> Result<Path> {
        if let Some(path) = self.known.get(&at) {
            return Ok(path.clone());
        }
        self.search(at)?;
        self.known
            .get(&at)
            .cloned()
            .ok_or(Error::Damaged("node number"))
    }

    /// Walks the tree until `wanted` is known.
    fn search(&mut self, wanted: Place) -> Result<()> {
        let mut open = vec![number(&self.top)];
        while let Some(dir) = open.pop() {
            // What is damaged elsewhere does not matter here.
            let Ok(names) = self.listing(dir) else {
                continue;
            };
            if self.known.contains_key(&wanted) {
                return Ok(());
            }
            open.extend(names.iter().filter(|n| n.kind == Kind::Dir).map(|n| n.at));
        }
        Ok(())
    }

    fn listing(&mut self, dir: Place) -> Result<Arc<Vec<Name>>> {
        if let Some((at, names)) = &self.listing
            && *at == dir
        {
            return Ok(names.clone());
        }
        let path = self.path(dir)?;
        let mut names = Vec::new();
        let mut paths = Vec::new();
        for entry in self.read_dir(&path.real)? {
            let entry = entry.map_err(refused)?;
            let raw = entry.file_name();
            let raw: &[u8] = raw.as_ref();
            if matches!(raw, b"." | b".." | OPAQUE_FILE) {
                continue;
            }
            let real = [path.real.as_slice(), b"/", raw].concat();
            let at = number(&real);
            let hidden = raw.strip_prefix(WHITEOUT).filter(|name| !name.is_empty());
            let kind = match hidden {
                Some(_) => Kind::CharDevice,
                None => kind(entry.file_type().map_err(refused)?),
            };
            names.push(Name {
                shown: hidden.unwrap_or(raw).to_vec(),
                at,
                kind,
            });
            paths.push((
                at,
                Path {
                    real,
                    is_whiteout: hidden.is_some(),
                },
            ));
        }
        self.remember(paths)?;
        // A file that is there again hides its own whiteout.
        names.sort_by(|a, b| {
            (&a.shown, a.kind == Kind::CharDevice).cmp(&(&b.shown, b.kind == Kind::CharDevice))
        });
        names.dedup_by(|a, b| a.shown == b.shown);
        let names = Arc::new(names);
        self.listing = Some((dir, names.clone()));
        Ok(names)
    }

    fn read_dir(&self, path: &[u8]) -> Result<ext4_view::ReadDir> {
        let path = if path.is_empty() { b"/" } else { path };
        self.ext4.read_dir(path).map_err(refused)
    }

    fn remember(&mut self, paths: Vec<(Place, Path)>) -> Result<()> {
        if self.known.len() + paths.len() > KNOWN_MAX {
            self.forget();
        }
        for (at, path) in paths {
            match self.known.get(&at) {
                Some(other) if other.real != path.real => {
                    return Err(Error::Ext("two files have the same number".into()));
                }
                _ => drop(self.known.insert(at, path)),
            }
        }
        Ok(())
    }

    fn stat(&mut self, at: Place) -> Result<Stat> {
        let path = self.path(at)?;
        let real = if path.real.is_empty() {
            b"/"
        } else {
            path.real.as_slice()
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
            _ => self.ext4.open(path.real.as_slice()).map_err(refused)?,
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
        let mark = [path.real.as_slice(), b"/", OPAQUE_FILE].concat();
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
