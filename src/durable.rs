//! Names for finished files, so that a power loss leaves the old content or the new one, and never neither: the content
//! reaches the disk first, then the file gets its name, then the directory reaches the disk (`fsync(2)`).

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;

/// Makes `content`, an open file or directory, durable, and then lets `rename` give it the name `place`.
///
/// # Errors
/// When the disk is full or broken, or those of `rename`, which is not called before the content is safe.
pub fn publish(
    content: &File,
    place: &Path,
    rename: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    if content.metadata()?.is_dir() {
        // All that lies below it, in one call.
        rustix::fs::syncfs(content)?;
    } else {
        sync(content)?;
    }
    rename()?;
    // A moment later at worst, where that cannot be.
    let parent = place.parent().filter(|p| !p.as_os_str().is_empty());
    let _ = File::open(parent.unwrap_or(Path::new("."))).and_then(|d| d.sync_all());
    Ok(())
}

fn sync(file: &File) -> io::Result<()> {
    match rustix::fs::fsync(file) {
        // A file system that has nothing to make safe.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_directories_get_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&from, "x").unwrap();
        let rename = || std::fs::rename(&from, &to);
        publish(&File::open(&from).unwrap(), &to, rename).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"x");
        std::fs::create_dir(&from).unwrap();
        let place = dir.path().join("c");
        let failed = publish(&File::open(&from).unwrap(), &place, || {
            Err(io::ErrorKind::PermissionDenied.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        publish(&File::open(&from).unwrap(), &place, || {
            std::fs::rename(&from, &place)
        })
        .unwrap();
        assert!(place.is_dir());
    }

    #[test]
    fn content_that_is_not_safe_gets_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "x").unwrap();
        // A descriptor that cannot be synchronised.
        let flags = rustix::fs::OFlags::PATH;
        let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
        let done = publish(&file.into(), &path, || panic!("not before it is safe"));
        assert!(done.is_err());
    }
}
