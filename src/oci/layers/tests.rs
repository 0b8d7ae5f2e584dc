//! Layers made of entries written by hand: what they come to, merged and unpacked.

use std::fs;
use std::io::{Cursor, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use super::*;
use crate::digest::Digest;
use crate::oci::{Blobs, Descriptor, ImageConfig, Manifest, RootFs};
use crate::squash::{Attributes, Data};
use ::tar;

/// Keeps contents in memory.
#[derive(Default)]
struct Memory(Vec<Vec<u8>>);

impl Store for Memory {
    fn store(&mut self, content: &mut dyn std::io::Read) -> Result<Data> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        self.0.push(bytes);
        Ok(Data {
            len_bytes: self.0.last().map_or(0, |b| b.len() as u64),
            number: Some(self.0.len() as u32 - 1),
        })
    }
}

struct Blob(BTreeMap<Digest, Vec<u8>>);

impl Blobs for Blob {
    fn open(&self, blob: &Descriptor) -> Result<Box<dyn std::io::Read + Send>> {
        let bytes = self.0.get(&blob.digest).context("no such blob")?.clone();
        let reader =
            crate::oci::blob::Verified::new(Cursor::new(bytes), blob.digest, Some(blob.size));
        Ok(Box::new(reader))
    }
}

/// A member: its path, its type (`f` with content, `d`, `l` with target, `h` with target, `c`, `p`), and the rest.
type Made<'a> = (&'a str, char, &'a str);

fn archive(members: &[Made]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, kind, rest) in members {
        let mut header = tar::Header::new_gnu();
        let content = if *kind == 'f' { rest.as_bytes() } else { b"" };
        let bytes = path.as_bytes();
        header.as_old_mut().name[..bytes.len()].copy_from_slice(bytes);
        header.set_entry_type(match kind {
            'f' => tar::EntryType::Regular,
            'd' => tar::EntryType::Directory,
            'l' => tar::EntryType::Symlink,
            'h' => tar::EntryType::Link,
            'c' => tar::EntryType::Char,
            'p' => tar::EntryType::Fifo,
            other => tar::EntryType::new(*other as u8),
        });
        if matches!(kind, 'l' | 'h') {
            header.set_link_name_literal(rest).unwrap();
        }
        header.set_mode(if *kind == 'd' { 0o750 } else { 0o640 });
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn image_of(layers: Vec<Vec<u8>>) -> Image {
    let mut blobs = BTreeMap::new();
    let mut manifest: Manifest = serde_json::from_value(serde_json::json!({
        "schemaVersion": 2,
        "config": {"digest": Digest::of(b"").to_string(), "size": 0},
    }))
    .unwrap();
    let mut diff_ids = Vec::new();
    for (index, layer) in layers.into_iter().enumerate() {
        diff_ids.push(Digest::of(&layer));
        // Each format has its turn.
        let stored = match index % 3 {
            0 => {
                let level = flate2::Compression::fast();
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), level);
                gzip.write_all(&layer).unwrap();
                gzip.finish().unwrap()
            }
            1 => zstd::stream::encode_all(&layer[..], 1).unwrap(),
            _ => layer,
        };
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        let len = stored.len() as u64;
        manifest
            .layers
            .push(Descriptor::new(kind, Digest::of(&stored), len));
        blobs.insert(Digest::of(&stored), stored);
    }
    Image {
        digest: Digest::of(b""),
        manifest,
        config: ImageConfig {
            rootfs: RootFs { diff_ids },
            ..ImageConfig::default()
        },
        blobs: Box::new(Blob(blobs)),
    }
}

fn image(layers: &[&[Made]]) -> Image {
    image_of(layers.iter().map(|l| archive(l)).collect())
}

/// `path kind rest`, sorted; hard links are shown by the first of their names.
fn listing(tree: &Tree, store: &Memory) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![(Tree::ROOT, String::new())];
    while let Some((directory, path)) = todo.pop() {
        for (name, id) in tree.names(directory).into_iter().flatten() {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            let rest = match &tree.node(*id).kind {
                Kind::Directory(_) => "d".into(),
                Kind::File(data) => {
                    let content = &store.0[data.number.unwrap() as usize];
                    format!("f {}", String::from_utf8_lossy(content))
                }
                Kind::Symlink(target) => format!("l {}", String::from_utf8_lossy(target)),
                Kind::Fifo => "p".into(),
                other => format!("{other:?}"),
            };
            lines.push(format!("{path} {rest}"));
            if tree.names(*id).is_some() {
                todo.push((*id, path));
            }
        }
    }
    lines.sort();
    lines
}

/// The same for a directory on disk.
fn on_disk(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![(root.to_owned(), String::new())];
    while let Some((directory, path)) = todo.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{path}/{}", entry.file_name().display());
            let kind = entry.file_type().unwrap();
            let rest = if kind.is_dir() {
                todo.push((entry.path(), path.clone()));
                "d".into()
            } else if kind.is_symlink() {
                format!("l {}", fs::read_link(entry.path()).unwrap().display())
            } else if kind.is_file() {
                format!("f {}", fs::read_to_string(entry.path()).unwrap())
            } else {
                "p".into()
            };
            lines.push(format!("{path} {rest}"));
        }
    }
    lines.sort();
    lines
}

/// What layers come to; the same merged and unpacked.
fn result(layers: &[&[Made]]) -> Vec<String> {
    let image = image(layers);
    let mut store = Memory::default();
    let tree = merge(&image, &mut store).unwrap();
    let merged = listing(&tree, &store);
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    unpack(&image, &root, &mut Owners::Writer, |_, _| Ok(())).unwrap();
    assert_eq!(on_disk(&root), merged, "unpacked and merged");
    merged
}

fn error(layers: &[&[Made]]) -> String {
    let image = image(layers);
    let error = merge(&image, &mut Memory::default()).unwrap_err();
    format!("{error:#}")
}

#[test]
fn higher_layers_replace_add_and_take_away() {
    let lower: &[Made] = &[
        ("./", 'd', ""),
        ("etc/", 'd', ""),
        ("etc/a", 'f', "old"),
        ("etc/b", 'f', "goes"),
        ("etc/c", 'f', "stays"),
        ("opq/", 'd', ""),
        ("opq/x", 'f', "goes"),
        ("opq/deep/", 'd', ""),
        ("opq/deep/y", 'f', "goes"),
        ("dir/", 'd', ""),
        ("dir/in", 'f', "goes"),
        ("file", 'f', "becomes a directory"),
    ];
    let upper: &[Made] = &[
        ("etc/a", 'f', "new"),
        ("etc/.wh.b", 'f', ""),
        ("etc/.wh.never", 'f', ""),
        ("opq/", 'd', ""),
        ("opq/.wh..wh..opq", 'f', ""),
        ("opq/z", 'f', "own"),
        ("dir", 'f', "was a directory"),
        ("file/", 'd', ""),
        ("file/in", 'f', "new"),
    ];
    let expected = [
        "/dir f was a directory",
        "/etc d",
        "/etc/a f new",
        "/etc/c f stays",
        "/file d",
        "/file/in f new",
        "/opq d",
        "/opq/z f own",
    ];
    assert_eq!(result(&[lower, upper]), expected);
}

#[test]
fn whiteouts_spare_what_their_own_layer_has() {
    let lower: &[Made] = &[
        ("d/", 'd', ""),
        ("d/lower", 'f', "goes"),
        ("d/s/", 'd', ""),
        ("d/s/lower", 'f', "goes"),
    ];
    let before: &[Made] = &[(".wh.d", 'f', ""), ("d/", 'd', ""), ("d/s/own", 'f', "own")];
    let after: &[Made] = &[
        ("d/", 'd', ""),
        ("d/s/own", 'f', "own"),
        (".wh.d", 'f', ""),
        ("d/.wh..wh..opq", 'f', ""),
    ];
    for upper in [before, after] {
        assert_eq!(
            result(&[lower, upper]),
            ["/d d", "/d/s d", "/d/s/own f own"]
        );
    }
}

#[test]
fn contents_that_are_hidden_are_never_stored() {
    let image = image(&[
        &[
            ("a", 'f', "one"),
            ("d/", 'd', ""),
            ("d/b", 'f', "two"),
            ("c", 'f', "three"),
        ],
        &[("a", 'f', "new"), ("d/.wh..wh..opq", 'f', "")],
        &[(".wh.c", 'f', "")],
    ]);
    let mut store = Memory::default();
    merge(&image, &mut store).unwrap();
    let stored: Vec<&[u8]> = store.0.iter().map(Vec::as_slice).collect();
    assert_eq!(stored, [b"new"]);
}

#[test]
fn hard_links_live_on_when_the_first_name_is_hidden() {
    let lower: &[Made] = &[("a", 'f', "content"), ("b", 'h', "a"), ("c", 'h', "./b")];
    // In the same layer: the content is fetched in a second reading.
    assert_eq!(
        result(&[lower, &[("a", 'f', "new")]]),
        ["/a f new", "/b f content", "/c f content"]
    );
    // From a higher layer, while the lower name goes.
    let upper: &[Made] = &[("x/y", 'h', "/a"), (".wh.a", 'f', ""), (".wh.c", 'f', "")];
    assert_eq!(
        result(&[lower, upper]),
        ["/b f content", "/x d", "/x/y f content"]
    );
    let image = image(&[lower]);
    let tree = merge(&image, &mut Memory::default()).unwrap();
    assert_eq!(tree.lookup(b"a"), tree.lookup(b"c"), "one file");
}

#[test]
fn parents_are_looked_up_through_links_of_the_image() {
    let lower: &[Made] = &[
        ("usr/lib/", 'd', ""),
        ("usr/lib/old", 'f', "old"),
        ("usr/lib/same", 'f', "old"),
        ("lib", 'l', "usr/lib"),
        ("abs", 'l', "/../../usr/./lib"),
        ("void", 'l', "/no/where"),
    ];
    let upper: &[Made] = &[
        ("lib/new", 'f', "new"),
        ("abs/same", 'f', "new"),
        ("lib/.wh.old", 'f', ""),
        ("void/x", 'f', "made"),
    ];
    let expected = [
        "/abs l /../../usr/./lib",
        "/lib l usr/lib",
        "/no d",
        "/no/where d",
        "/no/where/x f made",
        "/usr d",
        "/usr/lib d",
        "/usr/lib/new f new",
        "/usr/lib/same f new",
        "/void l /no/where",
    ];
    assert_eq!(result(&[lower, upper]), expected);
    // A directory of that name takes the link's place.
    let upper: &[Made] = &[("lib/", 'd', ""), ("lib/new", 'f', "new")];
    let merged = result(&[lower, upper]);
    assert!(merged.contains(&"/lib/new f new".to_owned()));
    assert!(merged.contains(&"/usr/lib/old f old".to_owned()));
}

#[test]
fn links_never_lead_out_of_the_directory_that_is_written() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap().to_owned();
    let layers: [&[Made]; 2] = [
        &[
            ("evil", 'l', &target),
            ("d/", 'd', ""),
            ("d", 'l', &target),
            ("d/in", 'f', "x"),
            ("evil/.wh.kept", 'f', ""),
        ],
        &[("evil/written", 'f', "x"), ("evil/.wh.kept", 'f', "")],
    ];
    fs::write(outside.path().join("kept"), "kept").unwrap();
    let merged = result(&layers);
    assert!(merged.iter().any(|l| l.ends_with("/written f x")));
    let left: Vec<_> = fs::read_dir(outside.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(
        fs::read_to_string(outside.path().join("kept")).unwrap(),
        "kept"
    );
}

#[test]
fn hostile_members_are_clear_errors() {
    for (members, expected) in [
        ([("../../etc/passwd", 'f', "x")], "leads out of the image"),
        ([("a/../../x", 'f', "x")], "leads out of the image"),
        ([(".wh...", 'f', "")], "names no file to take away"),
        ([("d/.wh.", 'f', "")], "names no file to take away"),
        (
            [("x", 'h', "../../../etc/passwd")],
            "leads out of the image",
        ),
        ([("x", 'h', "none")], "which is not there"),
        ([("x", 'h', "/")], "root of the image"),
        ([("x", 'l', "")], "a link to nothing"),
        ([(".", 'f', "")], "root of the image is no directory"),
        ([("x", 'Q', "")], "unknown type 'Q'"),
        ([("loop", 'l', "loop")], "symbolic links"),
    ] {
        let mut all = members.to_vec();
        if members[0].0 == "loop" {
            all.push(("loop/x", 'f', "x"));
        }
        let text = error(&[&[("d/", 'd', "")], &all]);
        assert!(text.contains(expected), "{members:?}: {text}");
        assert!(text.contains("layer 2"), "{text}");
    }
    let text = error(&[&[("f", 'f', "x"), ("f/in", 'f', "x")]]);
    assert!(text.contains("is no directory"), "{text}");
}

#[test]
fn odd_but_honest_members_are_applied() {
    let merged = result(&[&[
        // A file before its directory, twice the same name, an archiver's link to itself, files of AUFS, devices.
        ("d/f", 'f', "one"),
        ("d/", 'd', ""),
        ("/d/f", 'f', "two"),
        ("./d/f", 'h', "d/f"),
        (".wh..wh.plnk/1.2", 'f', "aufs"),
        ("null", 'c', ""),
        ("null2", 'h', "null"),
        ("pipe", 'p', ""),
        ("e", 'f', ""),
    ]]);
    assert_eq!(merged, ["/d d", "/d/f f two", "/e f ", "/pipe p"]);
}

#[test]
fn attributes_are_those_of_the_last_layer_that_names_a_file() {
    let lower: &[Made] = &[("d/", 'd', ""), ("implied/x/f", 'f', "")];
    let image = image(&[lower, &[("d/new", 'f', "")]]);
    let tree = merge(&image, &mut Memory::default()).unwrap();
    let attributes = |path: &str| &tree.node(tree.lookup(path.as_bytes()).unwrap()).attributes;
    let expected = Attributes {
        mode: 0o750,
        uid: 1000,
        gid: 1001,
        mtime_s: 1_000_000,
        xattrs: BTreeMap::new(),
    };
    assert_eq!(
        *attributes("d"),
        expected,
        "a new file in it changes nothing"
    );
    let made = Attributes {
        mode: 0o755,
        uid: 0,
        gid: 0,
        ..expected
    };
    assert_eq!(*attributes("implied/x"), made);
}

#[test]
fn unpacked_files_have_their_attributes_and_owners_are_told() {
    let image = image(&[&[
        ("d/", 'd', ""),
        ("d/f", 'f', "x"),
        ("d/g", 'h', "d/f"),
        ("l", 'l', "d"),
    ]]);
    let dir = tempfile::tempdir().unwrap();
    let mut told = Vec::new();
    let mut record = |place: &Place, uid: u32, gid: u32| {
        told.push((String::from_utf8_lossy(place.path).into_owned(), uid, gid));
        let stat = rustix::fs::statat(
            place.directory,
            place.name,
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        );
        stat.map(|_| ()).context("it is there already")
    };
    unpack(
        &image,
        dir.path(),
        &mut Owners::Record(&mut record),
        |_, _| Ok(()),
    )
    .unwrap();
    told.sort();
    let expected = [
        ("", 0, 0),
        ("d", 1000, 1001),
        ("d/f", 1000, 1001),
        ("l", 1000, 1001),
    ];
    assert_eq!(
        told,
        expected.map(|(p, u, g)| (p.to_owned(), u, g)),
        "once for each file"
    );
    let stat = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap();
    assert_eq!(stat("d").permissions().mode() & 0o7777, 0o750);
    assert_eq!(stat("d/f").permissions().mode() & 0o7777, 0o640);
    assert_eq!(stat("d/f").ino(), stat("d/g").ino());
    for path in ["d", "d/f", "l"] {
        assert_eq!(stat(path).mtime(), 1_000_000, "{path}");
    }
    let full = unpack(&image, dir.path(), &mut Owners::Writer, |_, _| Ok(()));
    assert!(format!("{:#}", full.unwrap_err()).contains("not empty"));
}

#[test]
fn failed_unpacking_leaves_no_staging_area() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(&[&[("a", 'f', "x"), ("b", 'h', "none")]]);
    assert!(unpack(&image, dir.path(), &mut Owners::Writer, |_, _| Ok(())).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn damage_is_found_whatever_is_damaged() {
    let members: &[Made] = &[("a", 'f', "content"), ("b", 'f', "more")];
    let failing = |change: &dyn Fn(&mut Image)| {
        let mut image = image(&[members]);
        change(&mut image);
        let error = merge(&image, &mut Memory::default()).unwrap_err();
        format!("{error:#}")
    };
    let text = failing(&|image| image.config.rootfs.diff_ids[0] = Digest::of(b"other"));
    assert!(text.contains("it is damaged"), "{text}");
    let text = failing(&|image| image.manifest.layers[0].size += 1);
    assert!(text.contains("1 are missing"), "{text}");
    let text = failing(&|image| image.manifest.layers[0].digest = Digest::of(b"other"));
    assert!(text.contains("no such blob"), "{text}");
    let text = failing(&|image| image.config.rootfs.diff_ids.clear());
    assert!(
        text.contains("has 1 layers, and its configuration has digests of 0"),
        "{text}"
    );
    for (kind, expected) in [
        (
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "encrypted",
        ),
        ("application/vnd.sylabs.sif.layer.v1.sif", "artifact"),
    ] {
        let text = failing(&|image| image.manifest.layers[0].media_type = kind.into());
        assert!(text.contains(expected), "{text}");
    }
    // The layer's archive cut at each of its parts.
    let whole = archive(members);
    for len in [100, 512, 700, 1100, 1536] {
        let image = image_of(vec![whole[..len].to_vec()]);
        let result = merge(&image, &mut Memory::default());
        assert_eq!(result.is_ok(), len == 1024 || len == 0, "cut at {len}");
    }
}

#[test]
fn owners_beyond_32_bits_are_refused() {
    let mut bytes = archive(&[("a", 'f', "x")]);
    let mut header = tar::Header::from_byte_slice(&bytes[..512]).clone();
    for uid in [u64::from(u32::MAX), 1 << 32] {
        header.set_uid(uid);
        header.set_cksum();
        bytes[..512].copy_from_slice(header.as_bytes());
        let image = image_of(vec![bytes.clone()]);
        let error = merge(&image, &mut Memory::default()).unwrap_err();
        assert!(format!("{error:#}").contains("owner is out of range"));
    }
}

#[test]
fn extended_attributes_are_kept_where_they_mean_something() {
    let capability = [
        1, 0, 0, 2, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut builder = tar::Builder::new(Vec::new());
    let records: [(&str, &[u8]); 4] = [
        ("SCHILY.xattr.user.comment", b"two\nlines"),
        ("SCHILY.xattr.security.capability", &capability),
        ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ("SCHILY.xattr.trusted.x", b"y"),
    ];
    builder.append_pax_extensions(records).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o4555);
    header.set_size(1);
    builder.append_data(&mut header, "f", &b"x"[..]).unwrap();
    let image = image_of(vec![builder.into_inner().unwrap()]);
    let tree = merge(&image, &mut Memory::default()).unwrap();
    let node = tree.node(tree.lookup(b"f").unwrap());
    let kept: Vec<(&[u8], &[u8])> = node
        .attributes
        .xattrs
        .iter()
        .map(|(k, v)| (k.as_slice(), v.as_slice()))
        .collect();
    let expected: [(&[u8], &[u8]); 2] = [
        (b"security.capability", &capability),
        (b"user.comment", b"two\nlines"),
    ];
    assert_eq!(kept, expected);
    // Not in /tmp, which has no such attributes on old kernels.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    unpack(&image, dir.path(), &mut Owners::Writer, |_, _| Ok(())).unwrap();
    let file = dir.path().join("f");
    let mut value = [0; 64];
    let len = rustix::fs::getxattr(&file, "user.comment", &mut value[..]).unwrap();
    assert_eq!(&value[..len], b"two\nlines");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o4555, "set after the attributes");
}

#[test]
fn types_of_layers_decide_what_is_an_image() {
    let manifest = |config: &str, layers: &[&str]| Manifest {
        schema_version: 2,
        media_type: String::new(),
        artifact_type: None,
        config: Descriptor::new(config, Digest::of(b""), 0),
        layers: layers
            .iter()
            .map(|kind| Descriptor::new(kind, Digest::of(b""), 0))
            .collect(),
        annotations: BTreeMap::new(),
    };
    let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    for (config, layers, is_image) in [
        (
            "application/vnd.oci.image.config.v1+json",
            &[docker][..],
            true,
        ),
        ("application/vnd.oci.image.config.v1+json", &[], true),
        ("application/octet-stream", &[docker, docker], true),
        ("text/plain", &[docker], true),
        ("", &[""], true),
        (
            "application/vnd.docker.container.image.v1+json",
            &[
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                "application/vnd.oci.image.layer.v1.tar+zstd",
            ],
            true,
        ),
        (
            "",
            &["application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"],
            true,
        ),
        ("application/vnd.oci.empty.v1+json", &[], false),
        (
            "application/vnd.oci.image.config.v1+json",
            &["application/vnd.in-toto+json"],
            false,
        ),
        (
            "application/vnd.cncf.helm.config.v1+json",
            &["application/vnd.cncf.helm.chart.content.v1.tar+gzip"],
            false,
        ),
        (
            "application/vnd.sylabs.sif.config.v1+json",
            &["application/vnd.sylabs.sif.layer.v1.sif"],
            false,
        ),
        ("application/octet-stream", &[docker, "text/plain"], false),
    ] {
        let result = check_types(&manifest(config, layers));
        assert_eq!(result.is_ok(), is_image, "{config} {layers:?}");
    }
}
