//! The protocol, spoken over a socket instead of the kernel's device: what each request is answered.
#![allow(clippy::unwrap_used)] // an error ends the test

mod common;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use capsid_fuse::{Error, Options, Owner, Server, ViewEntry, ViewKind};
use common::{image, open, run};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const OPEN: u32 = 14;
const READ: u32 = 15;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const INIT: u32 = 26;
const READDIR: u32 = 28;
const READDIRPLUS: u32 = 44;
const DIRECTORY: u32 = libc::S_IFDIR;
const REGULAR: u32 = libc::S_IFREG;
const ENTRY_LEN: usize = 128;

const STAGE: Options = Options {
    owner: Owner::Fixed {
        uid: 4321,
        gid: 8765,
    },
    stage: true,
    max_threads: 2,
    cache_bytes: 0,
};

/// The kernel's side.
struct Kernel(OwnedFd, Arc<Server>);

impl Kernel {
    fn new(server: Server) -> Kernel {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let timeout = Some(std::time::Duration::from_secs(20));
        rustix::net::sockopt::set_socket_timeout(
            &ours,
            rustix::net::sockopt::Timeout::Recv,
            timeout,
        )
        .unwrap();
        let server = Arc::new(server);
        let serving = server.clone();
        std::thread::spawn(move || serving.serve(theirs).unwrap());
        Kernel(ours, server)
    }

    fn send(&self, opcode: u32, node: u64, body: &[u8]) {
        let mut request = (40 + body.len() as u32).to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(77_u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.resize(40, 0);
        request.extend(body);
        rustix::io::write(&self.0, &request).unwrap();
    }

    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(opcode, node, body);
        let mut answer = vec![0; 2 << 20];
        let len = rustix::io::read(&self.0, answer.as_mut_slice()).expect("an answer in time");
        answer.truncate(len);
        assert_eq!(u32_at(&answer, 0) as usize, len);
        assert_eq!(u64_at(&answer, 8), 77);
        match -(u32_at(&answer, 4) as i32) {
            0 => Ok(answer.split_off(16)),
            errno => Err(errno),
        }
    }

    /// Node and mode of a name; `None` when the answer is that there is none, for ever.
    fn lookup(&self, parent: u64, name: &str) -> Option<(u64, u32)> {
        let entry = self
            .ask(LOOKUP, parent, &[name.as_bytes(), b"\0"].concat())
            .unwrap();
        assert_eq!(entry.len(), ENTRY_LEN);
        assert!(u64_at(&entry, 16) > 1 << 20, "kept for long");
        (u64_at(&entry, 0) != 0).then(|| (u64_at(&entry, 0), u32_at(&entry, 40 + 60)))
    }

    fn path(&self, root: u64, path: &str) -> Option<(u64, u32)> {
        let mut names = path.split('/').filter(|name| !name.is_empty());
        names.try_fold((root, DIRECTORY), |(node, _), name| self.lookup(node, name))
    }

    fn list(&self, node: u64, room: u32) -> Vec<String> {
        let mut names = Vec::new();
        let mut from = 0;
        loop {
            let answer = self.ask(READDIR, node, &read_request(from, room)).unwrap();
            if answer.is_empty() {
                return names;
            }
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                let len = u32_at(rest, 16) as usize;
                from = u64_at(rest, 8);
                names.push(String::from_utf8_lossy(&rest[24..24 + len]).into_owned());
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn read_request(offset: u64, size: u32) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(offset.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.resize(40, 0);
    body
}

fn point(path: &str, kind: ViewKind) -> ViewEntry {
    ViewEntry {
        path: path.into(),
        kind,
    }
}

fn stage(image: &Path) -> Kernel {
    Kernel::new(Server::squashfs(open(image), STAGE))
}

#[test]
fn a_view_adds_what_is_missing_and_changes_nothing_else() {
    let (_dir, image) = image(&[]);
    let kernel = stage(&image);
    let server = &kernel.1;
    assert_eq!(kernel.ask(LOOKUP, 1, b"0\0"), Err(libc::ENOENT));
    let plain = server.add_view(&[]).unwrap();
    let view = server
        .add_view(&[
            point("/new/er/dir", ViewKind::Directory),
            point("/new/file", ViewKind::File),
            point("/deep link/made", ViewKind::Directory),
            point("/small", ViewKind::File),
            point("/many", ViewKind::Directory),
        ])
        .unwrap();
    assert_eq!((plain.0, view.0), (0, 1));
    let (plain, _) = kernel.lookup(1, "0").unwrap();
    let (root, _) = kernel.lookup(1, "1").unwrap();
    assert_ne!(plain, root);
    assert_eq!(kernel.lookup(plain, "new"), None);
    assert_eq!(
        kernel.path(root, "new/er/dir").unwrap().1,
        DIRECTORY | 0o755
    );
    assert_eq!(kernel.path(root, "new/file").unwrap().1, REGULAR | 0o644);
    assert_eq!(kernel.path(root, "deep/made").unwrap().1, DIRECTORY | 0o755);
    assert_eq!(kernel.path(plain, "deep/made"), None);
    // Files are the same nodes in all views, and so share what is cached.
    assert_eq!(kernel.path(root, "small"), kernel.path(plain, "small"));
    let (file, _) = kernel.path(root, "new/file").unwrap();
    assert_eq!(kernel.ask(READ, file, &read_request(0, 4096)).unwrap(), b"");
    let attr = kernel.ask(GETATTR, file, &[0; 16]).unwrap();
    assert_eq!(
        (u32_at(&attr, 16 + 68), u32_at(&attr, 16 + 72)),
        (4321, 8765)
    );

    let mut names = kernel.list(root, 4096);
    let before = kernel.list(plain, 4096);
    names.retain(|name| name != "new");
    assert_eq!(names, before);
    assert!(
        kernel
            .list(kernel.path(root, "new").unwrap().0, 4096)
            .contains(&"file".to_string())
    );
    // Little room: many answers; each name once.
    let many = kernel.list(kernel.path(root, "many").unwrap().0, 300);
    assert_eq!(many.len(), 3202);
    assert_eq!(
        many.iter().collect::<std::collections::HashSet<_>>().len(),
        3202
    );
}

#[test]
fn equal_mount_points_are_one_view() {
    let (_dir, image) = image(&[]);
    let server = Server::squashfs(open(&image), STAGE);
    let one = [point("/a", ViewKind::Directory)];
    let other = [point("/a", ViewKind::File)];
    let id = server.add_view(&one).unwrap();
    assert_eq!(server.add_view(&one).unwrap(), id);
    assert_ne!(server.add_view(&other).unwrap(), id);
}

#[test]
fn mount_points_that_cannot_be_are_refused_by_name() {
    let (_dir, image) = image(&[]);
    let server = Server::squashfs(open(&image), STAGE);
    let refused = |path: &str| server.add_view(&[point(path, ViewKind::File)]).err();
    // These are left out, and whoever mounts there is told.
    assert_eq!((refused("/small/x"), refused("/long link/x")), (None, None));
    assert_eq!(refused("relative"), Some(Error::BadPath("relative".into())));
    assert_eq!(refused("/a/../b"), Some(Error::BadPath("/a/../b".into())));
    let many: Vec<_> = (0..5000)
        .map(|n| point(&format!("/{n}"), ViewKind::File))
        .collect();
    assert_eq!(server.add_view(&many), Err(Error::TooManyViews));
    assert!(server.exists(b"/link").unwrap());
    assert!(!server.exists(b"/small/x").unwrap());
    assert!(!server.exists(b"/long link").unwrap());
}

#[test]
fn malformed_requests_are_refused_and_the_next_one_is_served() {
    let (_dir, image) = image(&[]);
    let options = Options {
        stage: false,
        ..STAGE
    };
    let kernel = Kernel::new(Server::squashfs(open(&image), options));
    for opcode in 0..60 {
        if matches!(opcode, 2 | 36 | 42) {
            continue; // never answered
        }
        for node in [
            0,
            1,
            5,
            1 << 62,
            (1 << 62) + 0x1ffe,
            1 << 63,
            u64::MAX,
            0x7fff_ffff_ffff_ffff,
        ] {
            for body in [&b""[..], b"x", &[0xff; 7], &[0xff; 200], &[0; 40]] {
                let _any = kernel.ask(opcode, node, body);
            }
        }
    }
    rustix::io::write(&kernel.0, b"short").unwrap();
    assert!(kernel.lookup(1, "small").is_some());
    assert_eq!(kernel.ask(OPEN, 1, &[0; 8]), Err(libc::ENOSYS));
    assert_eq!(kernel.ask(LOOKUP, 1, b"no end"), Err(libc::EINVAL));
}

#[test]
fn a_connection_that_somebody_else_began_is_served_at_once() {
    let (dir, image) = image(&[]);
    let first = stage(&image);
    first.1.add_view(&[point("/x", ViewKind::File)]).unwrap();
    let (root, _) = first.lookup(1, "0").unwrap();
    let nodes = [
        first.path(root, "large").unwrap().0,
        first.path(root, "x").unwrap().0,
    ];
    let second = stage(&image);
    second.1.add_view(&[point("/x", ViewKind::File)]).unwrap();
    let bytes = second
        .ask(READ, nodes[0], &read_request(1_000_000, 100_000))
        .unwrap();
    assert!(bytes == fs::read(dir.path().join("tree/large")).unwrap()[1_000_000..1_100_000]);
    assert_eq!(
        second.ask(READ, nodes[1], &read_request(0, 10)).unwrap(),
        b""
    );
}

#[test]
fn init_answers_with_what_the_kernel_offers() {
    let (_dir, image) = image(&[]);
    let kernel = stage(&image);
    let init = |flags: u32| {
        let words = [7, 36, 1 << 17, flags];
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        u32_at(&kernel.ask(INIT, 0, &body).unwrap(), 12)
    };
    assert_eq!(init(0), 0);
    let all = init(u32::MAX);
    // No open, no opendir, cached links, large reads.
    for bit in [17, 24, 23, 22] {
        assert_ne!(all & 1 << bit, 0, "bit {bit}");
    }
}

#[test]
fn xattrs_are_answered_by_size_and_only_where_there_are_any() {
    let (_dir, with) = image(&[]);
    let kernel = stage(&with);
    kernel.1.add_view(&[]).unwrap();
    let (small, _) = kernel
        .path(kernel.lookup(1, "0").unwrap().0, "small")
        .unwrap();
    let ask = |size: u32, name: &[u8]| {
        kernel.ask(
            GETXATTR,
            small,
            &[&size.to_le_bytes()[..], &[0; 4], name].concat(),
        )
    };
    assert_eq!(ask(100, b"user.short\0").unwrap(), b"value");
    assert_eq!(u32_at(&ask(0, b"user.short\0").unwrap(), 0), 5);
    assert_eq!(ask(4, b"user.short\0"), Err(libc::ERANGE));
    assert_eq!(ask(100, b"user.none\0"), Err(libc::ENODATA));
    let names = kernel
        .ask(LISTXATTR, small, &[100, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    assert_eq!(
        names.split(|b| *b == 0).filter(|n| !n.is_empty()).count(),
        2
    );

    let (_dir, without) = image(&["-no-xattrs"]);
    let kernel = stage(&without);
    let body = [&[100, 0, 0, 0, 0, 0, 0, 0][..], b"user.short\0"].concat();
    assert_eq!(kernel.ask(GETXATTR, 1, &body), Err(libc::ENOSYS));
}

#[test]
fn names_that_no_file_can_have_are_refused() {
    let (_dir, with) = image(&[]);
    let kernel = stage(&with);
    kernel.1.add_view(&[]).unwrap();
    let (root, _) = kernel.lookup(1, "0").unwrap();
    for len in [255, 256, 300, 1000] {
        let answer = kernel.ask(LOOKUP, root, &[&vec![b'z'; len][..], b"\0"].concat());
        match len {
            255 => assert_eq!(u64_at(&answer.unwrap(), 0), 0, "there is none"),
            _ => assert_eq!(answer, Err(libc::ENAMETOOLONG), "{len}"),
        }
    }
    let (small, _) = kernel.path(root, "small").unwrap();
    for (name, errno) in [
        ("short", libc::EOPNOTSUPP),
        ("nosuchclass.short", libc::EOPNOTSUPP),
        ("system.posix_acl_access", libc::EOPNOTSUPP),
        ("", libc::EOPNOTSUPP),
        ("user", libc::EOPNOTSUPP),
        ("user.", libc::EINVAL),
        ("security.", libc::EINVAL),
        ("user.none", libc::ENODATA),
        ("security.capability", libc::ENODATA),
    ] {
        let body = [&[100, 0, 0, 0, 0, 0, 0, 0][..], name.as_bytes(), b"\0"].concat();
        assert_eq!(kernel.ask(GETXATTR, small, &body), Err(errno), "{name}");
    }
}

#[test]
fn attributes_for_the_administrator_are_not_listed() {
    let (_dir, path) = image(&["-noX"]);
    let mut bytes = fs::read(&path).unwrap();
    // Class 0 is user., and 1 trusted. (see `xattr`).
    let name = b"\0\0\x05\0short";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    bytes[at] = 1;
    fs::write(&path, bytes).unwrap();
    let kernel = stage(&path);
    kernel.1.add_view(&[]).unwrap();
    let (small, _) = kernel
        .path(kernel.lookup(1, "0").unwrap().0, "small")
        .unwrap();
    let list = |size: u32| kernel.ask(LISTXATTR, small, &[size.to_le_bytes(), [0; 4]].concat());
    assert_eq!(list(100).unwrap(), b"user.empty\0");
    assert_eq!(u32_at(&list(0).unwrap(), 0), 11);
    let body = [&[100, 0, 0, 0, 0, 0, 0, 0][..], b"trusted.short\0"].concat();
    assert_eq!(
        kernel.ask(GETXATTR, small, &body).unwrap(),
        b"value",
        "the kernel asks for who may"
    );
}

#[test]
fn entries_carry_what_a_lookup_answers() {
    let (_dir, image) = image(&[]);
    let kernel = stage(&image);
    kernel.1.add_view(&[]).unwrap();
    let (root, _) = kernel.lookup(1, "0").unwrap();
    let list = || {
        kernel
            .ask(READDIRPLUS, root, &read_request(0, 1 << 20))
            .unwrap()
    };
    // Listings begin bare; those who look up what was listed then get attributes at once.
    for _ in 0..16 {
        list();
        kernel.lookup(root, "small").unwrap();
        kernel.lookup(root, "deep").unwrap();
        kernel.lookup(root, "link").unwrap();
    }
    let answer = list();
    let mut rest = answer.as_slice();
    let mut found = 0;
    while !rest.is_empty() {
        let len = u32_at(rest, ENTRY_LEN + 16) as usize;
        let name =
            String::from_utf8_lossy(&rest[ENTRY_LEN + 24..ENTRY_LEN + 24 + len]).into_owned();
        if name == "small" || name == "deep" {
            assert_eq!(u64_at(rest, 0), kernel.lookup(root, &name).unwrap().0);
            found += 1;
        }
        rest = &rest[(ENTRY_LEN + 24 + len).next_multiple_of(8)..];
    }
    assert_eq!(found, 2);
    let (link, _) = kernel.lookup(root, "link").unwrap();
    assert_eq!(kernel.ask(READLINK, link, b"").unwrap(), b"small");
}

/// An ext3 file system with this tree.
fn ext(dir: &Path, tree: &Path) -> File {
    let image = dir.join("ext");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let tool = ["/usr/sbin/mkfs.ext3", "/sbin/mkfs.ext3"]
        .into_iter()
        .find(|p| Path::new(p).exists());
    let tool = tool.expect("mkfs.ext3 of e2fsprogs is needed");
    run(Command::new(tool)
        .args(["-q", "-F", "-d"])
        .arg(tree)
        .arg(&image));
    File::open(&image).unwrap()
}

#[test]
fn an_ext_overlay_is_served_as_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("upper/dir/opaque")).unwrap();
    fs::create_dir_all(tree.join("work")).unwrap();
    let large = common::noise(3_000_000, 3);
    fs::write(tree.join("upper/large"), &large).unwrap();
    fs::write(tree.join("upper/dir/.wh.gone"), "").unwrap();
    fs::write(tree.join("upper/dir/opaque/.wh..wh..opq"), "").unwrap();
    std::os::unix::fs::symlink("dir", tree.join("upper/link")).unwrap();
    let server = Server::ext(ext(dir.path(), &tree), 0, None, "upper", STAGE).unwrap();
    let kernel = Kernel::new(server);
    kernel
        .1
        .add_view(&[
            point("/link/mount", ViewKind::Directory),
            point("/f", ViewKind::File),
        ])
        .unwrap();
    assert!(kernel.1.exists(b"/link/opaque").unwrap());
    let (root, _) = kernel.lookup(1, "0").unwrap();
    assert_eq!(kernel.lookup(root, "work"), None);
    assert_eq!(kernel.path(root, "f").unwrap().1, REGULAR | 0o644);
    assert_eq!(kernel.path(root, "dir/mount").unwrap().1, DIRECTORY | 0o755);
    let (gone, mode) = kernel.path(root, "dir/gone").unwrap();
    assert_eq!(mode & libc::S_IFMT, libc::S_IFCHR);
    let attr = kernel.ask(GETATTR, gone, &[0; 16]).unwrap();
    assert_eq!(u32_at(&attr, 16 + 76), 0, "device number 0:0");
    let (opaque, _) = kernel.path(root, "dir/opaque").unwrap();
    assert_eq!(kernel.list(opaque, 4096), [".", ".."]);
    let ask = |node| {
        let body = [&[10, 0, 0, 0, 0, 0, 0, 0][..], b"user.overlay.opaque\0"].concat();
        kernel.ask(GETXATTR, node, &body)
    };
    assert_eq!(ask(opaque).unwrap(), b"y");
    assert_eq!(ask(root), Err(libc::ENODATA));
    let (file, _) = kernel.lookup(root, "large").unwrap();
    for offset in [0, 1_000_000, 2_900_000] {
        let bytes = kernel
            .ask(READ, file, &read_request(offset as u64, 131_072))
            .unwrap();
        assert!(
            bytes == large[offset..(offset + 131_072).min(large.len())],
            "at {offset}"
        );
    }

    // After a restart nothing is known by number, and all is found again.
    let image = File::open(dir.path().join("ext")).unwrap();
    let kernel = Kernel::new(Server::ext(image, 0, None, "upper", STAGE).unwrap());
    let bytes = kernel.ask(READ, file, &read_request(0, 4096)).unwrap();
    assert!(bytes == large[..4096]);
    assert_eq!(
        kernel.ask(READ, (1 << 62) | 12345, &read_request(0, 4096)),
        Err(libc::EIO)
    );
}

/// Walks all that is listed, a bounded way down; every request must be answered in time.
fn walk(kernel: &Kernel, node: u64, depth: u32) -> usize {
    let Ok(answer) = kernel.ask(READDIRPLUS, node, &read_request(0, 100_000)) else {
        return 0;
    };
    let mut rest = answer.as_slice();
    let mut files = 0;
    while !rest.is_empty() {
        let (mut child, mut mode) = (u64_at(rest, 0), u32_at(rest, 40 + 60));
        let len = u32_at(rest, ENTRY_LEN + 16) as usize;
        let name = &rest[ENTRY_LEN + 24..ENTRY_LEN + 24 + len];
        if child == 0 && name != b"." && name != b".." {
            // As the kernel does when a listing carries no attributes.
            if let Ok(entry) = kernel.ask(LOOKUP, node, &[name, b"\0"].concat()) {
                (child, mode) = (u64_at(&entry, 0), u32_at(&entry, 40 + 60));
            }
        }
        rest = &rest[(ENTRY_LEN + 24 + len).next_multiple_of(8)..];
        if child == 0 {
            continue;
        }
        files += 1;
        let _any = kernel.ask(READ, child, &read_request(0, 65_536));
        let _any = kernel.ask(READLINK, child, b"");
        if mode & libc::S_IFMT == DIRECTORY && depth > 0 {
            files += walk(kernel, child, depth - 1);
        }
    }
    files
}

#[test]
fn a_damaged_ext_overlay_is_answered_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("upper/a/b")).unwrap();
    fs::write(tree.join("upper/a/file"), common::noise(300_000, 3)).unwrap();
    std::os::unix::fs::symlink("a/file", tree.join("upper/link")).unwrap();
    drop(ext(dir.path(), &tree));
    let path = dir.path().join("ext");
    let good = fs::read(&path).unwrap();
    let used: Vec<usize> = (1024..good.len()).filter(|at| good[*at] != 0).collect();
    let mut walked = 0;
    for round in 0..200 {
        let at = used[used.len().min(3000) * round / 200];
        let mut bytes = good.clone();
        bytes[at] ^= if round % 2 == 0 {
            0xff
        } else {
            1 << (round % 8)
        };
        fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        if let Ok(server) = Server::ext(file, 0, None, "upper", STAGE) {
            let kernel = Kernel::new(server);
            if kernel.1.add_view(&[]).is_ok() {
                walked += walk(&kernel, 1, 6);
            }
        }
    }
    assert!(walked > 200, "only {walked}");
}

#[test]
fn what_is_no_ext_file_system_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zeros");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    let error = Server::ext(File::open(&path).unwrap(), 0, None, "upper", STAGE)
        .err()
        .unwrap();
    assert!(
        error.to_string().starts_with("cannot read the ext image: "),
        "{error}"
    );
}
