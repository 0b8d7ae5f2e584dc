//! A directory with one file in which each read takes longer, as on a network file system: FUSE, by hand.
#![allow(clippy::unwrap_used)] // an error ends the test, or the bench

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use capsid_fuse::{clone_device, mount};

const REGULAR: u32 = libc::S_IFREG | 0o444;
const DIRECTORY: u32 = libc::S_IFDIR | 0o755;
const READ: u32 = 15;

/// A directory that is served.
pub struct Storage {
    threads: Vec<JoinHandle<()>>,
    /// How often the file was read.
    pub reads: Arc<AtomicU64>,
}

impl Storage {
    /// Waits until it is unmounted.
    pub fn join(self) -> std::thread::Result<()> {
        self.threads.into_iter().try_for_each(JoinHandle::join)
    }
}

/// Mounts a directory with one file, `image`, on `point`: the bytes of `image`, each read of which takes `latency` longer.
/// The threads that serve it, nine reads at the same time, end when it is unmounted.
pub fn serve(image: &Path, point: &Path, latency: Duration) -> std::io::Result<Storage> {
    let mounted = mount::fuse(&mount::MountOptions {
        uid: 0,
        gid: 0,
        allow_other: false,
        source: "slow".into(),
    })
    .map_err(std::io::Error::other)?;
    let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mounted.tree, "", rustix::fs::CWD, point, flags)?;
    let file = Arc::new(File::open(image)?);
    let mut devices = Vec::new();
    for _ in 0..8 {
        devices.push(clone_device(mounted.device.as_fd()).map_err(std::io::Error::other)?);
    }
    devices.push(mounted.device);
    let reads = Arc::new(AtomicU64::new(0));
    let serve = |device| {
        let (file, reads) = (file.clone(), reads.clone());
        std::thread::spawn(move || answer_all(&device, &file, latency, &reads))
    };
    Ok(Storage {
        threads: devices.into_iter().map(serve).collect(),
        reads,
    })
}

fn answer_all(device: &OwnedFd, file: &File, latency: Duration, reads: &AtomicU64) {
    let mut request = vec![0; 16 << 10];
    while let Ok(len) = rustix::io::read(device, request.as_mut_slice()) {
        if request[4..8] == READ.to_le_bytes() {
            reads.fetch_add(1, SeqCst);
        }
        if let Some(answer) = answer(&request[..len], file, latency) {
            let _interrupted = rustix::io::write(device, &answer);
        }
    }
}

fn answer(request: &[u8], file: &File, latency: Duration) -> Option<Vec<u8>> {
    let u32_at = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
    let (opcode, node) = (u32_at(4), u64_at(16));
    let attr = |node: u64| {
        let size = if node == 2 {
            file.metadata().unwrap().len()
        } else {
            0
        };
        let mut attr = [
            node.to_le_bytes(),
            size.to_le_bytes(),
            size.div_ceil(512).to_le_bytes(),
        ]
        .concat();
        attr.resize(60, 0);
        attr.extend(if node == 2 { REGULAR } else { DIRECTORY }.to_le_bytes());
        attr.extend(1_u32.to_le_bytes());
        attr.resize(88, 0);
        attr
    };
    let forever = 1_000_000_u64.to_le_bytes();
    let body = match opcode {
        2 | 36 | 42 => return None, // forget, interrupt, batch forget
        1 if request[40..].starts_with(b"image\0") => {
            let head = [2_u64.to_le_bytes(), [0; 8], forever, forever, [0; 8]].concat();
            Ok([head, attr(2)].concat())
        }
        1 => Err(libc::ENOENT),
        3 => Ok([forever.to_vec(), vec![0; 8], attr(node)].concat()),
        READ => {
            std::thread::sleep(latency);
            let mut bytes = vec![0; u32_at(56) as usize];
            let len = file.read_at(&mut bytes, u64_at(48)).unwrap();
            bytes.truncate(len);
            Ok(bytes)
        }
        26 => {
            // 7.31, read-ahead of 128 KiB, asynchronous reads, 12 of them at once, writes of a page.
            let words = [7, 31, 128 << 10, 1, 12 | 9 << 16, 4096, 1, 0];
            let mut body: Vec<u8> = words
                .iter()
                .flat_map(|word: &u32| word.to_le_bytes())
                .collect();
            body.resize(64, 0);
            Ok(body)
        }
        _ => Err(libc::ENOSYS),
    };
    let (errno, body) = body.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
    let mut answer = (16 + body.len() as u32).to_le_bytes().to_vec();
    answer.extend(errno.to_le_bytes());
    answer.extend(&request[8..16]);
    answer.extend(body);
    Some(answer)
}
