//! Which file systems other machines see too: one list, by the magic numbers of `statfs(2)` (linux/magic.h, and the sources
//! of those that are not in Linux).

/// Seen by several machines, in any case.
const NETWORK: [u32; 16] = [
    0x0000_6969, // NFS
    0x0000_517b, // SMB
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB2
    0x5346_414f, // AFS, of Linux
    0x6b41_4653, // AFS, of Linux since 5.2
    0x00c3_6400, // Ceph
    0x0bd0_0bd0, // Lustre
    0x4750_4653, // GPFS
    0x1983_0326, // BeeGFS
    0xaad7_aaea, // PanFS
    0x2003_0528, // OrangeFS
    0x0102_1997, // 9P
    0x7461_636f, // OCFS2
    0x0116_1970, // GFS2
    0x7375_7245, // Coda
];
/// Of a program of this machine, which may ask another one.
const FUSE: u32 = 0x6573_5546;

/// Whether a file system is one that several machines see. The type has another width on some machines, and a sign.
pub fn is_network(kind: u64) -> bool {
    NETWORK.contains(&((kind & 0xffff_ffff) as u32))
}

/// Whether it may be one: those of FUSE too.
pub fn may_be_shared(kind: u64) -> bool {
    is_network(kind) || kind & 0xffff_ffff == u64::from(FUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart_whatever_the_width() {
        for kind in [0x6969, 0xfe53_4d42, 0xffff_ffff_fe53_4d42, 0x0bd0_0bd0] {
            assert!(is_network(kind) && may_be_shared(kind), "{kind:x}");
        }
        // ext4, XFS, Btrfs, tmpfs, overlay, squashfs, ZFS.
        for kind in [
            0xef53,
            0x5846_5342,
            0x9123_683e,
            0x0102_1994,
            0x794c_7630,
            0x7371_7368,
            0x2fc1_2fc1,
        ] {
            assert!(!is_network(kind) && !may_be_shared(kind), "{kind:x}");
        }
        assert!(!is_network(0x6573_5546) && may_be_shared(0x6573_5546));
    }
}
