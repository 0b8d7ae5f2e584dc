//! Where access profiles of images are kept (see `profile` in the driver): `$APPTAINER_CACHEDIR/profile`, else
//! `~/.apptainer/cache/profile`, mode 0700.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// Magic numbers of file systems on which a read may be a round trip (statfs(2)): NFS, SMB in three forms, Lustre, FUSE,
/// GPFS, Ceph, BeeGFS, PanFS, AFS, 9P, OrangeFS.
const SLOW: [u32; 13] = [
    0x6969,
    0x517b,
    0xfe53_4d42,
    0xff53_4d42,
    0x0bd0_0bd0,
    0x6573_5546,
    0x4750_4653,
    0x00c3_6400,
    0x1983_0326,
    0xaad7_aaea,
    0x5346_414f,
    0x0102_1997,
    0x2003_0528,
];

/// The directory for the profile of an image that lies on slow storage. On other storage there is nothing to gain, and
/// nothing is looked at.
pub fn for_image(image: &File, place: Option<&Path>) -> Option<OwnedFd> {
    let kind = rustix::fs::fstatfs(image).ok()?.f_type as u32;
    SLOW.contains(&kind).then(|| directory(place?)).flatten()
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
