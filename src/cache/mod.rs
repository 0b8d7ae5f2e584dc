//! What was downloaded or converted, kept by its content: `cache` in `$APPTAINER_CACHEDIR`, else `~/.apptainer/cache`.
//!
//! ```text
//! blob/blobs/sha256/HEX     layers, configurations (an OCI layout's tree)
//! oci-tmp/ oras/ library/ net/   images, by the digest that names them
//! build/ profile/           steps of builds; what starts of images have read
//! .tmp/                     what is being written; renamed into its place when whole
//! .claims/                  who is fetching what ([`claim`])
//! ```
//!
//! Readers need no lock: a name holds a whole file or nothing. Writers need none for correctness; claims only keep two
//! of them from fetching the same. All of it works on network file systems.
//!
//! What lies there is looked at before it is used: a disk that was full, a crash or somebody's hand may have changed it.
//! [`Cache::obtain`] takes a test of that, and what fails it is made again.

mod claim;
pub mod usage;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

pub use claim::{Claim, Obtained};

use crate::digest::Digest;
use crate::durable;
use crate::say;

/// What an entry is; the names of the directories are the peers'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SIFs of a library.
    Library,
    /// SIFs made from OCI images.
    OciTmp,
    /// SIFs of registries.
    Oras,
    /// Files of web servers.
    Net,
    /// Layers and configurations of OCI images.
    Blob,
    /// What a build has made on the way.
    Build,
    /// What starts of images have read.
    Profile,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [
        Kind::Library,
        Kind::OciTmp,
        Kind::Oras,
        Kind::Net,
        Kind::Blob,
        Kind::Build,
        Kind::Profile,
    ];

    /// Its name, and that of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Library => "library",
            Kind::OciTmp => "oci-tmp",
            Kind::Oras => "oras",
            Kind::Net => "net",
            Kind::Blob => "blob",
            Kind::Build => "build",
            Kind::Profile => "profile",
        }
    }

    /// The directory below the cache.
    fn directory(self) -> &'static str {
        match self {
            Kind::Blob => "blob/blobs/sha256",
            other => other.name(),
        }
    }
}

/// A cache.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Drafts of other machines that nobody has written to for so long are left over.
const FORGOTTEN: Duration = Duration::from_secs(7 * 24 * 3600);

impl Cache {
    /// A cache as it is: nothing is made, and there may be none.
    pub fn at(root: &Path) -> Cache {
        Cache {
            root: root.to_owned(),
        }
    }

    /// Opens a cache to write to, and makes its directories for its owner alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(root: &Path) -> Result<Cache> {
        let cache = Cache {
            root: root.to_owned(),
        };
        for name in [".tmp", ".claims"]
            .into_iter()
            .chain(Kind::ALL.map(Kind::directory))
        {
            let path = root.join(name);
            make_directories(&path).with_context(|| {
                format!(
                    "cannot create the cache directory {} (APPTAINER_CACHEDIR names another place)",
                    path.display()
                )
            })?;
        }
        if rustix::fs::access(root.join(".tmp"), rustix::fs::Access::WRITE_OK).is_err() {
            bail!(
                "the cache {} cannot be written (APPTAINER_CACHEDIR names another place)",
                root.display()
            );
        }
        cache.remove_forgotten();
        Ok(cache)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a kind.
    pub fn directory(&self, kind: Kind) -> PathBuf {
        self.root.join(kind.directory())
    }

    /// Where an entry is, or would be.
    ///
    /// # Errors
    /// When `key` is no plain name.
    pub fn place(&self, kind: Kind, key: &str) -> Result<PathBuf> {
        let good = (1..=200).contains(&key.len())
            && !key.starts_with('.')
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !good {
            bail!("{key:?} cannot be a name in the cache");
        }
        Ok(self.directory(kind).join(key))
    }

    /// An entry that is there and can be read; it counts as used now.
    pub fn entry(&self, kind: Kind, key: &str) -> Option<PathBuf> {
        let path = self.place(kind, key).ok()?;
        let used = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_NOW,
            },
            last_modification: rustix::fs::Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
        };
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        // A cache that others fill may not be ours to mark; then it is only there.
        if rustix::fs::utimensat(rustix::fs::CWD, &path, &used, flags)
            == Err(rustix::io::Errno::NOENT)
        {
            return None;
        }
        let is_file = fs::metadata(&path).is_ok_and(|m| m.is_file());
        (is_file && File::open(&path).is_ok()).then_some(path)
    }

    /// A blob that is there.
    pub fn blob(&self, digest: &Digest) -> Option<PathBuf> {
        self.entry(Kind::Blob, &digest.hex())
    }

    /// Stores bytes that are at hand as a blob.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn put(&self, bytes: &[u8]) -> Result<PathBuf> {
        let key = Digest::of(bytes).hex();
        if let Some(path) = self.entry(Kind::Blob, &key)
            && fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64)
            && fs::read(&path).is_ok_and(|there| there == bytes)
        {
            return Ok(path);
        }
        let place = self.place(Kind::Blob, &key)?;
        self.clear(&place)?;
        let draft = self.draft()?;
        io::Write::write_all(&mut &draft.file, bytes)
            .with_context(|| format!("cannot write {}", draft.path.display()))?;
        draft.publish(&place)
    }

    /// Makes room for a file: one that is there is replaced by it, and something else goes.
    fn clear(&self, place: &Path) -> Result<()> {
        if !fs::symlink_metadata(place).is_ok_and(|m| m.is_dir()) {
            return Ok(());
        }
        // Somebody may be writing into it.
        remove_directory_in_use(place, &self.root.join(".tmp"))
            .with_context(|| format!("{} is in the way, and cannot be removed", place.display()))
    }

    /// A file to write to, which goes unless it is published.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn draft(&self) -> Result<Draft> {
        Draft::new(&self.root.join(".tmp"))
    }

    /// A directory to write to, which goes with the value.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn draft_directory(&self) -> Result<DraftDirectory> {
        DraftDirectory::new(&self.root.join(".tmp"))
    }

    /// Gives an entry that is good, or the right and duty to make it: other processes wait for whoever got that, as long
    /// as it lives. An entry that is not good is replaced by what is published in its place.
    ///
    /// # Errors
    /// When claims cannot be written.
    pub fn obtain(
        &self,
        kind: Kind,
        key: &str,
        is_good: &dyn Fn(&Path) -> bool,
    ) -> Result<Obtained> {
        let place = self.place(kind, key)?;
        let name = format!("{}-{key}", kind.name());
        let (claims, drafts) = (self.root.join(".claims"), self.root.join(".tmp"));
        // Looking may take long, and a waiting process asks often: what was bad stays so until it changes.
        let bad = Cell::new(None);
        let ready = || {
            let path = self.entry(kind, key)?;
            let meta = fs::metadata(&path).ok()?;
            let is = (
                meta.dev(),
                meta.ino(),
                meta.len(),
                meta.mtime(),
                meta.mtime_nsec(),
            );
            if bad.get() == Some(is) {
                return None;
            }
            if is_good(&path) {
                return Some(path);
            }
            bad.set(Some(is));
            say::verbose(format_args!(
                "{} is damaged: it is made again",
                path.display()
            ));
            None
        };
        let obtained = claim::obtain(&claims, &drafts, &name, &ready)?;
        if matches!(obtained, Obtained::Claimed(_)) {
            self.clear(&place)?;
        }
        Ok(obtained)
    }

    /// Removes drafts whose writer has died.
    fn remove_forgotten(&self) {
        let entries = fs::read_dir(self.root.join(".tmp")).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let writer =
                claim::Writer::parse(name.to_string_lossy().split('~').next().unwrap_or_default());
            let forgotten = match writer.and_then(|w| w.is_alive()) {
                Some(alive) => !alive,
                None => entry
                    .metadata()
                    .and_then(|m| m.modified())
                    .ok()
                    .and_then(|t| SystemTime::now().duration_since(t).ok())
                    .is_some_and(|age| age > FORGOTTEN),
            };
            if forgotten {
                let path = entry.path();
                // Another process may be quicker.
                let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
            }
        }
    }
}

/// Whether a disk cannot take more.
pub fn is_full(error: &anyhow::Error) -> bool {
    use rustix::io::Errno;
    let full = [Errno::NOSPC, Errno::DQUOT, Errno::ROFS].map(Errno::raw_os_error);
    error.chain().any(|cause| {
        let code = match cause.downcast_ref::<io::Error>() {
            Some(error) => error.raw_os_error(),
            None => cause.downcast_ref::<Errno>().map(|e| e.raw_os_error()),
        };
        code.is_some_and(|code| full.contains(&code))
    })
}

/// Makes a directory and those above it, for their owner alone.
fn make_directories(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Files that go when a signal ends the program.
static DRAFTS: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn drafts() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    DRAFTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what this process is writing, for its end by a signal: whoever would make, publish or drop a draft from now
/// on waits for that end.
pub fn remove_drafts() {
    let drafts = drafts();
    for path in &*drafts {
        // The program ends anyway, and the next one that opens the cache removes what stays.
        let _ = fs::remove_file(path)
            .or_else(|_| remove_directory_in_use(path, path.parent().unwrap_or(path)));
    }
    std::mem::forget(drafts);
}

/// Does something short that the end by a signal comes before or after, but not between.
pub fn uninterrupted<T>(act: impl FnOnce() -> T) -> T {
    let _held = drafts();
    act()
}

/// A draft is done with. An end by a signal waits until it is gone, or removes it.
fn forget(path: &Path, remove: bool) {
    let mut drafts = drafts();
    if remove {
        // Published, it is not there any more; what cannot be removed goes when the cache is opened again.
        let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
    }
    drafts.remove(path);
}

/// Removes a directory into which somebody may still be writing by its name, by way of another directory.
fn remove_directory_in_use(path: &Path, by: &Path) -> io::Result<()> {
    let aside = draft_path(by);
    match fs::rename(path, &aside) {
        Ok(()) => fs::remove_dir_all(aside),
        Err(_) => fs::remove_dir_all(path),
    }
}

/// Whether drafts stay when something fails.
static KEPT: AtomicBool = AtomicBool::new(false);

/// `--no-cleanup`: what was being written stays when something fails, until the cache is opened again.
pub fn keep_drafts() {
    KEPT.store(true, Ordering::Relaxed);
}

/// Moves a whole file from a draft directory to its place, the content first.
///
/// # Errors
/// When the disk is full or the place cannot be written.
pub fn publish(from: &Path, place: &Path) -> Result<()> {
    let what = || format!("cannot write {}", place.display());
    let content = File::open(from).with_context(what)?;
    let rename = || uninterrupted(|| fs::rename(from, place));
    durable::publish(&content, place, rename).with_context(what)
}

/// A directory that goes as a [`Draft`] does.
pub struct DraftDirectory(PathBuf);

impl DraftDirectory {
    /// In a directory of any kind, for its owner alone.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(parent: &Path) -> Result<DraftDirectory> {
        let path = draft_path(parent);
        let mut drafts = drafts();
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("cannot create a directory in {}", parent.display()))?;
        drafts.insert(path.clone());
        Ok(DraftDirectory(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Removes it in any case: all went well.
    pub fn remove(self) {
        forget(&self.0, true);
    }

    /// Leaves it to somebody else, who removes it.
    pub fn leave(self) {
        drafts().remove(&self.0);
        std::mem::forget(self);
    }
}

impl Drop for DraftDirectory {
    fn drop(&mut self) {
        forget(&self.0, !KEPT.load(Ordering::Relaxed));
    }
}

/// A name that tells its writer, hidden where people look.
fn draft_path(directory: &Path) -> PathBuf {
    let hidden = if directory.file_name() == Some(".tmp".as_ref()) {
        ""
    } else {
        "."
    };
    directory.join(format!(
        "{hidden}{}~{}",
        claim::Writer::own(),
        uuid::Uuid::new_v4()
    ))
}

/// A file that is being written. It goes with this value, with the process (by [`remove_drafts`]), or with the next
/// process that opens the cache.
pub struct Draft {
    /// Open for reading and writing, empty at first.
    pub file: File,
    path: PathBuf,
}

impl Draft {
    /// In a directory of any kind; the name begins with a dot.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(directory: &Path) -> Result<Draft> {
        let path = draft_path(directory);
        let mut drafts = drafts();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot create a file in {}", directory.display()))?;
        drafts.insert(path.clone());
        Ok(Draft { file, path })
    }

    /// Where it is now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it in any case: it is not wanted.
    pub fn remove(self) {
        forget(&self.path, true);
    }

    /// Gives it its place, where it replaces what was there, and safely: the content first.
    ///
    /// # Errors
    /// When the disk is full or the place cannot be written.
    pub fn publish(self, place: &Path) -> Result<PathBuf> {
        let what = || format!("cannot write {}", place.display());
        let rename = || uninterrupted(|| fs::rename(&self.path, place));
        durable::publish(&self.file, place, rename).with_context(what)?;
        Ok(place.to_owned())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        forget(&self.path, !KEPT.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_found_and_what_is_not_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache")).unwrap();
        let path = cache.put(b"abc").unwrap();
        assert_eq!(cache.blob(&Digest::of(b"abc")), Some(path));
        assert_eq!(cache.blob(&Digest::of(b"abd")), None);
        drop(cache.draft().unwrap());
        assert_eq!(fs::read_dir(cache.root().join(".tmp")).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_good_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let place = cache.place(Kind::Net, "x").unwrap();
        let is_good = |path: &Path| fs::read(path).is_ok_and(|bytes| bytes == b"good");
        let damage: [(&str, &dyn Fn()); 7] = [
            ("nothing", &|| {}),
            ("empty", &|| fs::write(&place, "").unwrap()),
            ("short", &|| fs::write(&place, "goo").unwrap()),
            ("flipped", &|| fs::write(&place, "Good").unwrap()),
            ("directory", &|| {
                fs::create_dir_all(place.join("a/b")).unwrap()
            }),
            ("broken link", &|| {
                std::os::unix::fs::symlink("none", &place).unwrap();
            }),
            ("link to a directory", &|| {
                std::os::unix::fs::symlink(dir.path(), &place).unwrap();
            }),
        ];
        for (what, damage) in damage {
            damage();
            let Obtained::Claimed(claim) = cache.obtain(Kind::Net, "x", &is_good).unwrap() else {
                panic!("{what} is taken for good");
            };
            let draft = cache.draft().unwrap();
            io::Write::write_all(&mut &draft.file, b"good").unwrap();
            draft.publish(&place).unwrap();
            drop(claim);
            let obtained = cache.obtain(Kind::Net, "x", &is_good).unwrap();
            assert!(matches!(obtained, Obtained::Ready(_)), "{what}");
            fs::remove_file(&place).unwrap();
        }
        let left = fs::read_dir(dir.path().join(".tmp")).unwrap().count();
        assert_eq!(left, 0);
        assert!(dir.path().exists());
    }

    #[test]
    fn cache_that_is_only_looked_at_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("none");
        assert!(Cache::at(&root).list(&Kind::ALL).unwrap().is_empty());
        assert!(!root.exists());
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Cache::at(&file).list(&Kind::ALL).unwrap().is_empty());
    }

    #[test]
    fn names_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        for key in ["", ".", "..", "a/b", "../x", ".tmp", "a:b"] {
            assert!(cache.place(Kind::Net, key).is_err(), "{key}");
        }
    }

    #[test]
    fn drafts_of_dead_processes_go() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let own = cache.draft().unwrap();
        let mut dead = claim::Writer::own();
        dead.started += 1;
        let left = dir.path().join(format!(".tmp/{dead}~x"));
        fs::write(&left, "").unwrap();
        let other = dir.path().join(".tmp/elsewhere");
        fs::write(&other, "").unwrap();
        Cache::open(dir.path()).unwrap();
        assert!(!left.exists(), "its writer has died");
        assert!(own.path().exists(), "its writer lives");
        assert!(other.exists(), "its writer may live");
    }
}
