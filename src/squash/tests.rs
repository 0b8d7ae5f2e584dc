//! Images are read back by the driver's reader and by `backhand`; the reference tools read them in `tests/squash.rs`.

use std::fs::File;
use std::io::Read as _;

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
    for compression in ["gzip", "gzip:1", "zstd:3", "xz:1", "lz4"] {
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
    let (one, _) = image(&Options::default(), &[content.clone()]);
    let copies = vec![content; 20];
    let (many, summary) = image(&Options::default(), &copies);
    let grown = bytes(many).len() - bytes(one).len();
    assert!(grown <= 4096, "{grown} bytes more");
    assert!(summary.saved_bytes > 0);
}
