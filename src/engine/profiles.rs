//! Where access profiles of images are kept (see `profile` in the driver): `profile` in the cache, mode 0700.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::filesystem;

/// The directory for the profile of an image that lies on slow storage. On other storage there is nothing to gain, and
/// nothing is looked at.
pub fn for_image(image: &File, place: Option<&Path>) -> Option<OwnedFd> {
    let kind = rustix::fs::fstatfs(image).ok()?.f_type as u64;
    // There a read may be a round trip.
    filesystem::may_be_shared(kind)
        .then(|| directory(place?))
        .flatten()
}

/// The directory, made if need be. Without one, starts are slower, and that is all.
pub fn directory(path: &Path) -> Option<OwnedFd> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .ok()?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}
