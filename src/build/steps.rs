//! Results of build steps, kept so that a build does not do again what has not changed: the root file system of a stage
//! behind its bootstrap, or behind its `%post`, as a squashfs under a digest of everything that it was made from.
//!
//! Files are written aside and renamed, so that several builds, also of several nodes, can share the directory without locks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use super::{keeper, owners};
use crate::digest::Digest;
use crate::engine::emulate::Owners;
use crate::squash::{self, Compression, Options, Scan, Writer};
use crate::{durable, say};

/// Largest sum of what is kept, in bytes. The longest unused goes first.
const MAX_TOTAL: u64 = 16 << 30;

/// Drafts of builds that were killed are removed after so long.
const DRAFT_AGE: Duration = Duration::from_secs(86400);

/// The store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Steps {
    directory: PathBuf,
    /// Where a step is written, until it is whole.
    draft: PathBuf,
}

impl Steps {
    /// In `build` of the cache directory. `None`, with a notice, where that cannot be written.
    pub fn open(cache: &Path) -> Option<Steps> {
        use std::os::unix::fs::DirBuilderExt as _;
        let directory = cache.join("build");
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory);
        match made {
            Ok(()) => {
                let draft = directory.join(format!(".{}", uuid::Uuid::new_v4()));
                Some(Steps { directory, draft })
            }
            Err(error) => {
                say::verbose(format_args!(
                    "steps are not kept: cannot create {}: {error}",
                    directory.display()
                ));
                None
            }
        }
    }

    /// What a build that is killed leaves.
    pub fn draft(&self) -> &Path {
        &self.draft
    }

    fn place(&self, key: &str) -> PathBuf {
        self.directory
            .join(format!("{}.squashfs", Digest::of(key.as_bytes()).hex()))
    }

    /// The file of a step, if it is kept: it counts as used now.
    pub fn find(&self, key: &str) -> Option<PathBuf> {
        let path = self.place(key);
        // A disk that was full may have left a part.
        crate::image::check(&path).ok()?;
        let file = File::open(&path).ok()?;
        let _ = file.set_modified(SystemTime::now());
        Some(path)
    }

    /// Keeps a root file system. That it cannot be kept is told, and no error.
    pub fn keep(&self, key: &str, root: &Path, record: &Owners) {
        match self.try_keep(key, root, record) {
            Ok(()) => self.prune(),
            Err(error) => say::verbose(format_args!("this step is not kept: {error:#}")),
        }
    }

    fn try_keep(&self, key: &str, root: &Path, record: &Owners) -> Result<()> {
        // Packing starts threads, and this process has to fork later.
        let packed = keeper::in_child(|| {
            let out = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&self.draft)?;
            let options = Options {
                compression: Compression::Zstd { level: 1 },
                ..Options::default()
            };
            let mut writer = Writer::new(out, &options)?;
            let mut tree = squash::scan(root, &mut writer, &Scan::default())?;
            owners::amend(&mut tree, root, record)?;
            writer.finish(&tree).map(drop)
        });
        packed
            .and_then(|()| {
                let (content, place) = (File::open(&self.draft)?, self.place(key));
                let rename = || fs::rename(&self.draft, &place);
                durable::publish(&content, &place, rename).context("cannot rename")
            })
            .inspect_err(|_| drop(fs::remove_file(&self.draft)))
    }

    /// Removes what is beyond the limit, and what killed builds have left.
    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return;
        };
        let mut kept = Vec::new();
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let draft = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !draft {
                kept.push((used, meta.len(), entry.path()));
            } else if used.elapsed().is_ok_and(|age| age > DRAFT_AGE) {
                let _ = fs::remove_file(entry.path());
            }
        }
        kept.sort();
        let mut total: u64 = kept.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in kept {
            if total <= MAX_TOTAL {
                break;
            }
            let _ = fs::remove_file(path);
            total -= len;
        }
    }
}
