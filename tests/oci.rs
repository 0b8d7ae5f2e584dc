//! OCI images from archives and layouts as skopeo, umoci and buildah write them: merged and unpacked as `umoci unpack` does
//! it, and converted to images that run.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use capsid::build::convert;
use capsid::digest::{Digest, Hashing};
use capsid::oci::config::Origin;
use capsid::oci::layers::{self, Owners};
use capsid::oci::{Image, Place, Platform, archive, layout};
use capsid::sif::Stamp;
use capsid::squash::{Data, Options, Store, Writer};
use common::{Env, output};

const STAMP: Stamp = Stamp {
    time_s: 1_800_000_000,
    identity: [7; 16],
};

fn platform() -> Platform {
    Platform {
        architecture: capsid::host::go_arch(std::env::consts::ARCH).into(),
        os: "linux".into(),
        variant: None,
    }
}

#[track_caller]
fn tool(program: &str, args: &[&str]) -> String {
    output(Command::new(program).args(args)).ok().to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A member of a layer: path, type, and content or target.
type Made<'a> = (&'a str, char, &'a str);

/// Writes a layer by hand: whiteouts and other things that no directory on disk can hold.
fn layer(path: &Path, members: &[Made]) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for (name, kind, rest) in members {
        let mut header = tar::Header::new_gnu();
        let (kind, mode) = match kind {
            'f' => (tar::EntryType::Regular, 0o644),
            's' => (tar::EntryType::Regular, 0o4755),
            '0' => (tar::EntryType::Regular, 0),
            'd' => (tar::EntryType::Directory, 0o755),
            't' => (tar::EntryType::Directory, 0o1777),
            'l' => (tar::EntryType::Symlink, 0o777),
            'h' => (tar::EntryType::Link, 0o644),
            'p' => (tar::EntryType::Fifo, 0o600),
            other => panic!("{other}"),
        };
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1234);
        header.set_gid(2345);
        header.set_mtime(1_500_000_000);
        let is_link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        if is_link {
            header.set_size(0);
            builder.append_link(&mut header, name, rest).unwrap();
        } else {
            header.set_size(rest.len() as u64);
            builder
                .append_data(&mut header, name, rest.as_bytes())
                .unwrap();
        }
    }
    builder.finish().unwrap();
}

/// Files of this Debian, as a layer: programs with hard links, many small files, symbolic links, and some of our own.
fn debian(env: &Env) -> PathBuf {
    let root = env.tree("debian");
    for (from, to) in [
        ("/usr/lib/x86_64-linux-gnu/perl-base", "usr/lib/perl-base"),
        ("/etc/alternatives", "etc/alternatives"),
        ("/usr/share/doc/base-files", "usr/share/doc/base-files"),
    ] {
        fs::create_dir_all(root.join(to).parent().unwrap()).unwrap();
        tool(
            "cp",
            &[
                "-r",
                "--preserve=mode,timestamps,links",
                from,
                text(&root.join(to)),
            ],
        );
    }
    for directory in ["opq/deep", "gone", "replaced"] {
        fs::create_dir_all(root.join(directory)).unwrap();
        fs::write(root.join(directory).join("file"), directory).unwrap();
    }
    symlink("usr/lib", root.join("lib")).unwrap();
    symlink("/opt", root.join("link")).unwrap();
    fs::write(root.join("one"), "two names").unwrap();
    fs::hard_link(root.join("one"), root.join("two")).unwrap();
    let tar = env.path("debian.tar");
    tool(
        "tar",
        &["-C", text(&root), "--format=posix", "-cf", text(&tar), "."],
    );
    tar
}

const CHANGES: &[Made] = &[
    ("opt/", 'd', ""),
    ("opt/new", 'f', "new"),
    ("bin/.wh.zcat", 'f', ""),
    (".wh.gone", 'f', ""),
    ("opq/", 'd', ""),
    ("opq/own", 'f', "own"),
    ("opq/.wh..wh..opq", 'f', ""),
    ("lib/through-a-link", 'f', "new"),
    ("link/too", 'f', "new"),
    ("replaced", 'l', "one"),
    ("etc/alternatives", 'f', "was a directory"),
    ("one", 'f', "not two names any more"),
    ("three", 'h', "two"),
    ("set-id", 's', "x"),
    ("unreadable", '0', "x"),
    ("sticky/", 't', ""),
    ("pipe", 'p', ""),
    // umoci gives directories that something is taken away from the time of now, unless they are named later.
    ("bin/", 'd', ""),
    ("./", 'd', ""),
];

const MORE_CHANGES: &[Made] = &[
    (".wh.opq", 'f', ""),
    ("opq/", 'd', ""),
    ("opq/again", 'f', "again"),
    ("sticky/twice", 'f', "one"),
    ("sticky/twice", 'f', "two"),
    ("link/", 'd', ""),
    ("link/directory-now", 'f', "x"),
    (".wh.two", 'f', ""),
    ("opt/.wh..wh..opq", 'f', ""),
    ("usr/lib/.wh.through-a-link", 'f', ""),
    ("replaced", 'f', "was a link"),
    ("a/very/deep/", 'd', ""),
    ("a/", 'd', ""),
    ("a/very/", 'd', ""),
    ("usr/lib/", 'd', ""),
    ("opt/", 'd', ""),
    ("./", 'd', ""),
];

/// A layout with one image of three layers, made by umoci.
fn umoci(env: &Env) -> PathBuf {
    let layout = env.path("layout");
    let image = format!("{}:made", layout.display());
    tool("umoci", &["init", "--layout", text(&layout)]);
    tool("umoci", &["new", "--image", &image]);
    let base = debian(env);
    let (changes, more) = (env.path("changes.tar"), env.path("more.tar"));
    layer(&changes, CHANGES);
    layer(&more, MORE_CHANGES);
    for layer in [&base, &changes, &more] {
        tool(
            "umoci",
            &["raw", "add-layer", "--image", &image, text(layer)],
        );
    }
    tool(
        "umoci",
        &[
            "config",
            "--image",
            &image,
            "--config.entrypoint=/bin/echo",
            "--config.entrypoint=the entrypoint",
            "--config.cmd=the command",
            "--config.env=VALUE=it's \"$HOME\"",
            "--config.label=some.label=its value",
        ],
    );
    layout
}

/// What is in a directory: for each path its kind, permissions, time, content, and the first of its names.
fn facts(root: &Path, mode_mask: u32) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut names: HashMap<u64, String> = HashMap::new();
    let mut todo = vec![(root.to_owned(), String::new())];
    let mut all = Vec::new();
    while let Some((path, name)) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                let entry = entry.unwrap();
                let name = format!("{name}/{}", entry.file_name().display());
                todo.push((entry.path(), name));
            }
        }
        all.push((name, path, meta));
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, path, meta) in all {
        let kind = meta.file_type();
        let content = if kind.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().display())
        } else if kind.is_file() {
            let content = fs::read(&path).map(|b| Digest::of(&b).hex()[..12].to_owned());
            let first = names.entry(meta.ino()).or_insert_with(|| name.clone());
            format!("{} {:?} = {first}", meta.len(), content.ok())
        } else if kind.is_fifo() {
            "pipe".into()
        } else {
            "directory".into()
        };
        let mode = if kind.is_symlink() {
            0
        } else {
            meta.mode() & mode_mask
        };
        found.insert(name, format!("{mode:o} {} {content}", meta.mtime()));
    }
    found
}

#[track_caller]
fn assert_alike(found: &BTreeMap<String, String>, expected: &BTreeMap<String, String>, what: &str) {
    assert!(expected.len() > 20, "{what}: there is something to compare");
    for (path, facts) in expected {
        assert_eq!(found.get(path), Some(facts), "{what}: {path}");
    }
    let more: Vec<_> = found
        .keys()
        .filter(|p| !expected.contains_key(*p))
        .collect();
    assert!(more.is_empty(), "{what}: {more:?}");
}

/// Compares an image, merged and unpacked, with what umoci makes of an image of a layout.
fn assert_as_umoci(env: &Env, image: &Image, reference: &str, what: &str) {
    let bundle = env.path(&format!("umoci-{what}"));
    tool(
        "umoci",
        &["unpack", "--rootless", "--image", reference, text(&bundle)],
    );
    let rootfs = bundle.join("rootfs");
    let unpacked = env.path(&format!("unpacked-{what}"));
    layers::unpack(image, &unpacked, &mut Owners::Writer, |_, _| Ok(())).unwrap();
    assert_alike(&facts(&unpacked, 0o7777), &facts(&rootfs, 0o7777), what);

    let squashfs = env.path(&format!("{what}.squashfs"));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&squashfs)
        .unwrap();
    let mut writer = Writer::new(file, &Options::default()).unwrap();
    let tree = layers::merge(image, &mut writer).unwrap();
    writer.finish(&tree).unwrap();
    let merged = env.path(&format!("merged-{what}"));
    tool(
        "unsquashfs",
        &[
            "-quiet",
            "-no-progress",
            "-d",
            text(&merged),
            text(&squashfs),
        ],
    );
    // unsquashfs sets no set-id bits for a normal user.
    assert_alike(&facts(&merged, 0o1777), &facts(&rootfs, 0o1777), what);
}

#[test]
fn images_of_umoci_and_skopeo_become_what_umoci_unpacks() {
    let env = Env::new();
    let layout = umoci(&env);
    let reference = format!("{}:made", layout.display());
    let image = layout::open(&layout, Some("made"), &platform()).unwrap();
    assert_as_umoci(&env, &image, &reference, "layout");

    let source = format!("oci:{reference}");
    for kind in ["oci-archive", "docker-archive"] {
        let path = env.path(&format!("{kind}.tar"));
        let target = format!("{kind}:{}:some/name:tag", path.display());
        tool("skopeo", &["copy", "--quiet", &source, &target]);
        let named = PathBuf::from(format!("{}:some/name:tag", path.display()));
        open(&env, kind, &named);
        let image = open(&env, kind, &path);
        assert_as_umoci(&env, &image, &reference, kind);
    }
    // Compressed as a whole, as people keep them.
    let path = env.path("docker-archive.tar");
    tool("gzip", &["-1", text(&path)]);
    let image = open(&env, "docker-archive", &env.path("docker-archive.tar.gz"));
    assert_as_umoci(&env, &image, &reference, "gzip");
    // Layers of zstd.
    let target = format!("oci:{}:zstd", env.path("zstd").display());
    tool(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "--dest-compress-format=zstd",
            &source,
            &target,
        ],
    );
    let image = layout::open(&env.path("zstd"), None, &platform()).unwrap();
    assert!(image.manifest.layers[0].media_type.ends_with("+zstd"));
    assert_as_umoci(&env, &image, &reference, "zstd");
}

fn open(env: &Env, kind: &str, path: &Path) -> Image {
    let place = Place::of(kind).unwrap();
    place
        .open(text(path), &env.work(), &platform(), &env.work())
        .unwrap()
}

#[test]
fn images_of_buildah_become_what_umoci_unpacks() {
    let env = Env::new();
    let storage = env.path("storage");
    let run = env.path("storage-run");
    let buildah = |args: &[&str]| {
        let mut all = vec![
            "--storage-driver=vfs",
            "--root",
            text(&storage),
            "--runroot",
            text(&run),
        ];
        all.extend(args);
        tool("buildah", &all)
    };
    let container = buildah(&["from", "scratch"]);
    buildah(&["add", &container, text(&debian(&env)), "/"]);
    let first = buildah(&["commit", "--quiet", &container, "first"]);
    // A second layer, with what buildah makes of removed files.
    let container = buildah(&["from", &first]);
    fs::write(env.path("file"), "new").unwrap();
    buildah(&["copy", &container, text(&env.path("file")), "/opt/new"]);
    buildah(&[
        "config",
        "--entrypoint",
        r#"["/bin/echo","built"]"#,
        &container,
    ]);
    let script = format!(
        "m=$(buildah --storage-driver=vfs --root {0} --runroot {1} mount {container}) && rm -r $m/gone $m/opq && mkdir $m/opq && touch $m/opq/x",
        storage.display(),
        run.display()
    );
    tool("buildah", &["unshare", "sh", "-ec", &script]);
    for kind in ["oci-archive", "docker-archive"] {
        let path = env.path(&format!("buildah-{kind}.tar"));
        buildah(&[
            "commit",
            "--quiet",
            &container,
            &format!("{kind}:{}:some/name:tag", path.display()),
        ]);
        let copy = env.path(&format!("copy-{kind}"));
        let source = format!("{kind}:{}", path.display());
        tool(
            "skopeo",
            &[
                "copy",
                "--quiet",
                &source,
                &format!("oci:{}:copy", copy.display()),
            ],
        );
        let image = open(&env, kind, &path);
        assert!(!image.manifest.layers.is_empty());
        assert_as_umoci(
            &env,
            &image,
            &format!("{}:copy", copy.display()),
            &format!("buildah-{kind}"),
        );
    }
    let path = format!("{} {}", storage.display(), run.display());
    tool(
        "buildah",
        &["unshare", "sh", "-c", &format!("rm -rf {path}")],
    );
}

#[test]
fn owners_are_those_of_the_layers() {
    let env = Env::new();
    let layout = umoci(&env);
    let image = layout::open(&layout, None, &platform()).unwrap();
    let mut told = BTreeMap::new();
    let mut record = |place: &layers::Place, uid: u32, gid: u32| {
        told.insert(String::from_utf8_lossy(place.path).into_owned(), (uid, gid));
        Ok(())
    };
    layers::unpack(
        &image,
        &env.path("root"),
        &mut Owners::Record(&mut record),
        |_, _| Ok(()),
    )
    .unwrap();
    let (uid, gid) = (
        nix::unistd::getuid().as_raw(),
        nix::unistd::getgid().as_raw(),
    );
    for (path, owner) in [
        ("bin/busybox", (uid, gid)),
        ("usr/lib/perl-base", (uid, gid)),
        ("opq", (1234, 2345)),
        ("opq/again", (1234, 2345)),
        ("replaced", (1234, 2345)),
    ] {
        assert_eq!(told.get(path), Some(&owner), "{path}");
    }
}

#[test]
fn converted_image_runs_its_entrypoint() {
    let env = Env::new();
    let layout = umoci(&env);
    let image = layout::open(&layout, None, &platform()).unwrap();
    let origin = Origin {
        bootstrap: "oci".into(),
        from: "layout:made".into(),
    };
    let sif = env.path("image.sif");
    convert::to_sif(&image, &sif, &origin, STAMP, Options::default()).unwrap();
    let run = |args: &[&str]| env.run(args).ok().to_owned();
    let sif = text(&sif);
    assert_eq!(run(&["run", sif]), "the entrypoint the command");
    assert_eq!(run(&["run", sif, "my", "words"]), "the entrypoint my words");
    assert_eq!(
        run(&["exec", sif, "sh", "-c", "echo $VALUE"]),
        "it's \"$HOME\""
    );
    assert_eq!(run(&["exec", sif, "cat", "/three"]), "two names");
    let labels = run(&["inspect", "--json", "--labels", sif]);
    for label in [
        "\"some.label\": \"its value\"",
        "\"org.label-schema.build-date\": \"Friday_15_January_2027_08:00:00_UTC\"",
        "\"org.label-schema.usage.singularity.deffile.from\": \"layout:made\"",
        &format!(
            "\"org.opencontainers.image.base.digest\": \"{}\"",
            image.digest
        ),
    ] {
        assert!(labels.contains(label), "{label}: {labels}");
    }
    assert_eq!(
        run(&["inspect", "--deffile", sif]),
        "bootstrap: oci\nfrom: layout:made"
    );

    // The same again, to the byte.
    let again = env.path("again.sif");
    convert::to_sif(&image, &again, &origin, STAMP, Options::default()).unwrap();
    assert!(fs::read(&again).unwrap() == fs::read(sif).unwrap());

    let sandbox = env.path("sandbox");
    convert::to_directory(&image, &sandbox, &origin, STAMP.time_s, &mut Owners::Writer).unwrap();
    assert_eq!(run(&["run", text(&sandbox)]), "the entrypoint the command");
    env.assert_nothing_left();
}

#[test]
fn damaged_image_leaves_the_target_as_it_was() {
    let env = Env::new();
    let layout = umoci(&env);
    let image = layout::open(&layout, None, &platform()).unwrap();
    let blob = format!("blobs/sha256/{}", image.manifest.layers[0].digest.hex());
    let blob = layout.join(blob);
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let directory = env.path("target");
    fs::create_dir(&directory).unwrap();
    let sif = directory.join("image.sif");
    fs::write(&sif, "old").unwrap();
    let origin = Origin {
        bootstrap: "oci".into(),
        from: "layout".into(),
    };
    let error = convert::to_sif(&image, &sif, &origin, STAMP, Options::default()).unwrap_err();
    let chain = format!("{error:#}");
    assert!(chain.contains("layer 1 of 3 (sha256:"), "{chain}");
    assert_eq!(fs::read_to_string(&sif).unwrap(), "old");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}

/// Takes contents, and throws them away.
struct Nowhere;

impl Store for Nowhere {
    fn store(&mut self, content: &mut dyn Read) -> anyhow::Result<Data> {
        let len_bytes = io::copy(content, &mut io::sink())?;
        Ok(Data {
            len_bytes,
            number: None,
        })
    }
}

/// Writes a layout of one layer with 1 GiB in 20 000 files.
fn large_layout(root: &Path) {
    fs::create_dir_all(root.join("blobs/sha256")).unwrap();
    let draft = root.join("draft");
    let file = Hashing::new(File::create(&draft).unwrap());
    let encoder = zstd::stream::write::Encoder::new(file, 1).unwrap();
    let mut builder = tar::Builder::new(Hashing::new(encoder));
    let mut content = vec![0; 1 << 30];
    for (index, byte) in content.iter_mut().enumerate() {
        *byte = (index / 64) as u8;
    }
    let len = content.len() / 20_000;
    for (index, piece) in content.chunks(len).enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(piece.len() as u64);
        header.set_mode(0o644);
        let name = format!(
            "some/directory/of/many/{:03}/a-file-with-a-name-{index}",
            index % 100
        );
        builder.append_data(&mut header, name, piece).unwrap();
    }
    let (diff_id, _, encoder) = builder.into_inner().unwrap().finish();
    let (digest, size, _) = encoder.finish().unwrap().finish();
    let blob = |digest: &Digest| root.join("blobs/sha256").join(digest.hex());
    fs::rename(&draft, blob(&digest)).unwrap();
    let document = |value: serde_json::Value| {
        let text = value.to_string();
        let digest = Digest::of(text.as_bytes());
        File::create(blob(&digest))
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        serde_json::json!({"digest": digest.to_string(), "size": text.len()})
    };
    let config = document(serde_json::json!({"rootfs": {"diff_ids": [diff_id.to_string()]}}));
    let layers = serde_json::json!([{"digest": digest.to_string(), "size": size}]);
    let manifest =
        document(serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers}));
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(root.join("index.json"), index.to_string()).unwrap();
}

#[test]
fn layer_of_a_gibibyte_is_merged_in_little_memory() {
    const LAYOUT: &str = "CAPSID_TEST_LARGE_LAYOUT";
    // The measurement needs a process of its own.
    if let Some(path) = std::env::var_os(LAYOUT) {
        let image = layout::open(Path::new(&path), None, &platform()).unwrap();
        layers::merge(&image, &mut Nowhere).unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
        println!("{line}");
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(kib < 64 << 10, "{line}");
        return;
    }
    let env = Env::new();
    let layout = env.path("large");
    large_layout(&layout);
    let out = output(
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "layer_of_a_gibibyte_is_merged_in_little_memory",
                "--nocapture",
            ])
            .env(LAYOUT, &layout),
    );
    assert!(out.ok().contains("VmHWM"), "{out}");
}

#[test]
fn image_of_apptainer_and_ours_of_the_same_archive_are_alike() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    if !fixtures.is_dir() {
        eprintln!(
            "SKIPPED: there are no images of the real Apptainer in {}",
            fixtures.display()
        );
        return;
    }
    let env = Env::new();
    let image = archive::open_oci(
        &fixtures.join("busy-oci.tar"),
        None,
        &platform(),
        &env.work(),
    );
    let origin = Origin {
        bootstrap: "oci-archive".into(),
        from: "busy-oci.tar".into(),
    };
    let sif = env.path("ours.sif");
    convert::to_sif(&image.unwrap(), &sif, &origin, STAMP, Options::default()).unwrap();
    let tree = |sif: &Path, name: &str| {
        let file = File::open(sif).unwrap();
        let read = capsid::sif::Sif::read(&file).unwrap();
        let offset = read.primary().unwrap().0.offset_bytes.to_string();
        let root = env.path(name);
        tool(
            "unsquashfs",
            &[
                "-quiet",
                "-no-progress",
                "-o",
                &offset,
                "-d",
                text(&root),
                text(sif),
            ],
        );
        facts(&root, 0o7777)
    };
    let (theirs, ours) = (
        tree(&fixtures.join("oci.sif"), "theirs"),
        tree(&sif, "ours"),
    );
    for (path, their) in &theirs {
        match path.as_str() {
            // It starts nothing, and says so by not being there; no applications, no file about them.
            "/.singularity.d/startscript" | "/.singularity.d/env/94-appsbase.sh" => {
                assert!(!ours.contains_key(path), "{path}");
            }
            // These have our text.
            _ if path.starts_with("/.singularity.d") => {
                let our = ours
                    .get(path)
                    .unwrap_or_else(|| panic!("{path} is missing"));
                assert_eq!(
                    our.split(' ').next(),
                    their.split(' ').next(),
                    "mode of {path}"
                );
            }
            // Times: Apptainer's are those of the build, ours those of the layers. Else all is equal.
            _ => {
                let our = ours
                    .get(path)
                    .unwrap_or_else(|| panic!("{path} is missing"));
                let timeless = |facts: &str| {
                    let mut parts: Vec<_> = facts.split(' ').map(str::to_owned).collect();
                    parts.remove(1);
                    parts
                };
                assert_eq!(timeless(our), timeless(their), "{path}");
                let is_old = !matches!(
                    path.as_str(),
                    "" | "/etc" | "/etc/hosts" | "/etc/resolv.conf"
                ) && !their.contains(".singularity.d");
                assert!(!is_old || our == their, "{path}: {our}: {their}");
            }
        }
    }
    let more: Vec<_> = ours.keys().filter(|p| !theirs.contains_key(*p)).collect();
    assert!(more.is_empty(), "{more:?}");
    let run = |args: &[&str]| env.run(args).ok().to_owned();
    let quoted = run(&["exec", text(&sif), "sh", "-c", "echo $OCI_QUOTE"]);
    assert_eq!(quoted, "it's \"q\" $HOME", "Apptainer escapes it twice");
    let theirs = env.run(["run", text(&fixtures.join("oci.sif")), "a b", "$HOME"]);
    assert_eq!(run(&["run", text(&sif), "a b", "$HOME"]), theirs.ok());
}

#[test]
fn root_of_a_user_namespace_gives_files_their_owners() {
    const LAYOUT: &str = "CAPSID_TEST_OWNED_LAYOUT";
    if let Some(layout) = std::env::var_os(LAYOUT) {
        let layout = PathBuf::from(layout);
        let image = layout::open(&layout, None, &platform()).unwrap();
        let root = layout.with_file_name("owned");
        let unpacked = layers::unpack(&image, &root, &mut Owners::Change, |_, _| Ok(()));
        match unpacked {
            Ok(()) => {}
            Err(error) => println!("error: {error:#}"),
        }
        for name in ["bin/busybox", "opq/again", "set-id"] {
            if let Ok(meta) = fs::symlink_metadata(root.join(name)) {
                println!(
                    "{name} {}:{} {:o}",
                    meta.uid(),
                    meta.gid(),
                    meta.mode() & 0o7777
                );
            }
        }
        // The user could not remove them.
        fs::remove_dir_all(&root).unwrap();
        return;
    }
    let env = Env::new();
    let layout = umoci(&env);
    let unpack = |options: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user"]).args(options);
        command.arg(std::env::current_exe().unwrap());
        command.args([
            "--exact",
            "root_of_a_user_namespace_gives_files_their_owners",
            "--nocapture",
        ]);
        output(command.env(LAYOUT, &layout)).ok().to_owned()
    };
    let out = unpack(&["--map-auto"]);
    // The archiver's own id is root there only by chance; the others are as the layers have them.
    for line in ["opq/again 1234:2345 644", "set-id 1234:2345 4755"] {
        assert!(out.contains(line), "{out}");
    }
    let out = unpack(&[]);
    assert!(out.contains("no subordinate id"), "{out}");
}

#[test]
fn images_of_the_docker_engine_come_through_docker_save() {
    const CHILD: &str = "CAPSID_TEST_DOCKER";
    if let Some(scratch) = std::env::var_os(CHILD) {
        match archive::open_docker_daemon("some/name:tag", &platform(), Path::new(&scratch)) {
            Ok(image) => println!("{} layers", image.manifest.layers.len()),
            Err(error) => println!("{error:#}"),
        }
        return;
    }
    let env = Env::new();
    let bin = env.path("bin");
    fs::create_dir(&bin).unwrap();
    let run = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "--exact",
            "images_of_the_docker_engine_come_through_docker_save",
            "--nocapture",
        ]);
        command.env("DOCKER_HOST", "unix:///nonexistent");
        output(command.env(CHILD, env.work()).env("PATH", &bin))
            .ok()
            .to_owned()
    };
    let none = run();
    assert!(
        none.contains("docker save -o image.tar some/name:tag"),
        "{none}"
    );
    let layout = umoci(&env);
    let path = env.path("saved.tar");
    let target = format!("docker-archive:{}:some/name:tag", path.display());
    tool(
        "skopeo",
        &[
            "copy",
            "--quiet",
            &format!("oci:{}:made", layout.display()),
            &target,
        ],
    );
    let script = format!(
        "#!/bin/sh\n[ \"$*\" = 'save -- some/name:tag' ] && exec /bin/cat {}\n",
        path.display()
    );
    common::script(&bin.join("docker"), &script);
    let out = run();
    assert!(out.contains("3 layers"), "{out}");
    common::script(
        &bin.join("docker"),
        "#!/bin/sh\necho 'no such image' >&2\nexit 1\n",
    );
    let out = run();
    assert!(out.contains("docker save says \"no such image\""), "{out}");
    assert_eq!(fs::read_dir(env.work()).unwrap().count(), 0);
}
