//! Images are read back by the driver's reader and by `backhand`; the reference tools read them in `tests/squash.rs`.

use std::fs::File;
use std::io::Read as _;

use capsid_fuse::Archive;

use super::*;

fn attributes(mode: u16) -> Attributes {
    Attributes {
        mode,
        uid: 3,
        gid: 4,
        mtime_s: 5,
        ..Attributes::default()
    }
}

fn file(data: Data) -> Node {
    Node {
        attributes: attributes(0o4755),
        kind: Kind::File(data),
    }
}

/// Bytes that compress somewhat, different for each seed.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(format!("{state} ").bytes());
    }
    out.truncate(len);
    out
}

fn image(options: &Options, contents: &[Vec<u8>]) -> (File, Summary) {
    let out = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(out.try_clone().unwrap(), options).unwrap();
    let mut tree = Tree::new(attributes(0o755));
    for (number, content) in contents.iter().enumerate() {
        let data = writer.store(&mut &content[..]).unwrap();
        tree.add(Tree::ROOT, format!("f{number:05}").as_bytes(), file(data))
            .unwrap();
    }
    let summary = writer.finish(&tree).unwrap();
    (out, summary)
}

fn bytes(mut file: File) -> Vec<u8> {
    use std::io::Seek as _;
    let mut all = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut all).unwrap();
    all
}

fn samples() -> Vec<Vec<u8>> {
    let mut samples: Vec<Vec<u8>> = [0, 1, 4095, 4096, 4097, 8192, 200_000, 131_072, 131_073]
        .iter()
        .zip(1..)
        .map(|(len, seed)| text(seed, *len))
        .collect();
    samples.push(vec![0; 300_000]);
    let mut holes = vec![0; 400_000];
    holes[200_000..200_010].fill(7);
    samples.push(holes);
    // A copy, one that differs in its last byte, one with the same tail.
    samples.push(samples[6].clone());
    let mut other = samples[6].clone();
    *other.last_mut().unwrap() ^= 1;
    samples.push(other);
    samples.push([text(99, 131_072), samples[6][131_072..].to_vec()].concat());
    samples
}

#[test]
fn every_compressor_and_block_size_is_read_back() {
    let samples = samples();
    for compression in ["gzip", "gzip:1", "zstd:3", "xz:1", "lz4", "lz4:12"] {
        for block_bytes in [4096, 131_072, 1 << 20] {
            let options = Options {
                compression: compression.parse().unwrap(),
                block_bytes,
                threads: 2,
                ..Options::default()
            };
            let (out, _) = image(&options, &samples);
            let archive = capsid_fuse::Archive::open(out, 0, None).unwrap();
            for (number, content) in samples.iter().enumerate() {
                let path = format!("f{number:05}");
                let read = archive
                    .read_file(path.as_bytes(), 1 << 30)
                    .unwrap()
                    .unwrap();
                assert!(read == *content, "{compression} {block_bytes} {path}");
            }
        }
    }
}

#[test]
fn backhand_reads_the_same() {
    let samples = samples();
    let (out, _) = image(&Options::default(), &samples);
    let reader = backhand::FilesystemReader::from_reader(std::io::BufReader::new(out)).unwrap();
    let mut seen = 0;
    for node in reader.files() {
        if let backhand::InnerNode::File(file) = &node.inner {
            let mut content = Vec::new();
            reader
                .file(file)
                .reader()
                .read_to_end(&mut content)
                .unwrap();
            let name = node.fullpath.file_name().unwrap().to_str().unwrap();
            let number: usize = name[1..].parse().unwrap();
            assert!(content == samples[number], "{name}");
            assert_eq!(node.header.permissions, 0o4755);
            assert_eq!(
                (node.header.uid, node.header.gid, node.header.mtime),
                (3, 4, 5)
            );
            seen += 1;
        }
    }
    assert_eq!(seen, samples.len());
}

#[test]
fn output_does_not_depend_on_the_number_of_threads() {
    let samples: Vec<_> = (0..200).map(|n| text(n % 150, 1000 * n as usize)).collect();
    let pack = |threads| {
        let options = Options {
            threads,
            block_bytes: 16 << 10,
            ..Options::default()
        };
        bytes(image(&options, &samples).0)
    };
    assert!(pack(1) == pack(4));
}

#[test]
fn equal_contents_are_stored_once() {
    let content = text(1, 1_000_001);
    let (one, _) = image(&Options::default(), std::slice::from_ref(&content));
    let copies = vec![content; 20];
    let (many, summary) = image(&Options::default(), &copies);
    let grown = bytes(many).len() - bytes(one).len();
    assert!(grown <= 4096, "{grown} bytes more");
    assert!(summary.saved_bytes > 0);
}

/// A tree with one node, and what the driver's reader sees of it.
fn alone(node: Node) -> (Archive, Option<capsid_fuse::InodeRef>) {
    let out = tempfile::tempfile().unwrap();
    let writer = Writer::new(out.try_clone().unwrap(), &Options::default()).unwrap();
    let mut tree = Tree::new(attributes(0o755));
    let id = tree.add(Tree::ROOT, b"a", node).unwrap();
    tree.link(Tree::ROOT, b"b", id).unwrap();
    writer.finish(&tree).unwrap();
    let archive = Archive::open(out, 0, None).unwrap();
    let at = archive.lookup(archive.root(), b"a").unwrap();
    assert_eq!(at, archive.lookup(archive.root(), b"b").unwrap());
    (archive, at)
}

#[test]
fn nodes_of_every_kind_keep_owner_device_and_attributes() {
    let kinds = [
        Kind::CharDevice(0x0102_0304),
        Kind::BlockDevice(0x801),
        Kind::Fifo,
        Kind::Socket,
        Kind::Symlink(b"somewhere/else".to_vec()),
        Kind::File(Data::default()),
    ];
    for kind in kinds {
        for xattrs in [
            &[][..],
            &[("trusted.a", "1"), ("security.capability", "\0x")],
        ] {
            let pairs = xattrs
                .iter()
                .map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()));
            let node = Node {
                attributes: Attributes {
                    mode: 0o7421,
                    uid: 70_000,
                    gid: u32::MAX - 1,
                    mtime_s: u32::MAX,
                    xattrs: pairs.clone().collect(),
                },
                kind: kind.clone(),
            };
            let (archive, at) = alone(node);
            let at = at.unwrap();
            let inode = archive.inode(at).unwrap();
            assert_eq!((inode.mode & 0o7777, inode.nlink), (0o7421, 2), "{kind:?}");
            assert_eq!(
                (inode.uid, inode.gid, inode.mtime),
                (70_000, u32::MAX - 1, u32::MAX)
            );
            if let Kind::CharDevice(device) | Kind::BlockDevice(device) = kind {
                assert_eq!(inode.rdev, device);
            }
            let mut found = archive.xattrs(at).unwrap();
            let mut wanted: Vec<_> = pairs.collect();
            found.sort();
            wanted.sort();
            assert_eq!(found, wanted, "{kind:?}");
        }
    }
}

#[test]
fn what_squashfs_cannot_hold_is_refused_or_counted() {
    let writer = || Writer::new(tempfile::tempfile().unwrap(), &Options::default()).unwrap();
    let mut tree = Tree::new(attributes(0o755));
    for n in 0..70_000u32 {
        let mut node = file(Data::default());
        node.attributes.uid = n;
        tree.add(Tree::ROOT, n.to_string().as_bytes(), node)
            .unwrap();
    }
    let error = writer().finish(&tree).unwrap_err();
    assert!(
        error.to_string().contains("65535 different owners"),
        "{error}"
    );

    let mut tree = Tree::new(attributes(0o755));
    let mut node = file(Data::default());
    let acl = b"system.posix_acl_access".to_vec();
    node.attributes.xattrs.insert(acl, vec![1]);
    tree.add(Tree::ROOT, b"a", node).unwrap();
    assert_eq!(writer().finish(&tree).unwrap().xattrs_left_out, 1);

    let mut tree = Tree::new(attributes(0o755));
    let elsewhere = Data {
        len_bytes: 1,
        number: Some(3),
    };
    tree.add(Tree::ROOT, b"a", file(elsewhere)).unwrap();
    assert!(
        writer().finish(&tree).is_err(),
        "a content of another image"
    );

    for block_bytes in [0, 2048, 5000, 2 << 20] {
        let options = Options {
            block_bytes,
            ..Options::default()
        };
        assert!(Writer::new(tempfile::tempfile().unwrap(), &options).is_err());
    }
}

#[test]
fn directories_have_one_name() {
    let mut tree = Tree::new(attributes(0o755));
    let directory = Node {
        attributes: attributes(0o755),
        kind: Kind::Directory(std::collections::BTreeMap::new()),
    };
    let id = tree.add(Tree::ROOT, b"a", directory).unwrap();
    assert!(tree.link(id, b"circle", Tree::ROOT).is_err());
    assert!(tree.link(Tree::ROOT, b"b", id).is_err());
}

#[test]
fn compressions_are_parsed_and_printed() {
    for text in ["gzip:9", "gzip:1", "zstd:15", "xz:6", "lz4", "lz4:9"] {
        assert_eq!(text.parse::<Compression>().unwrap().to_string(), text);
    }
    assert_eq!(
        "zstd".parse::<Compression>().unwrap(),
        Compression::Zstd { level: 15 }
    );
    for text in [
        "", "gzip:0", "gzip:13", "zstd:23", "zstd:x", "lz4:1", "lz4:13", "lzo", "xz:10",
    ] {
        assert!(text.parse::<Compression>().is_err(), "{text}");
    }
}

#[test]
fn a_writer_that_is_dropped_ends_its_threads() {
    let mut writer = Writer::new(tempfile::tempfile().unwrap(), &Options::default()).unwrap();
    writer.store(&mut &text(1, 3_000_000)[..]).unwrap();
    drop(writer);
}

#[test]
fn a_full_disk_is_an_error_and_not_a_wait() {
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut writer = Writer::new(full, &Options::default()).unwrap();
    let mut stored = Ok(Data::default());
    for seed in 0..100 {
        stored = writer.store(&mut &text(seed, 1_000_000)[..]);
        if stored.is_err() {
            break;
        }
    }
    let text = format!("{:#}", stored.unwrap_err());
    assert!(text.contains("No space left on device"), "{text}");
}
