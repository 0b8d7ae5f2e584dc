//! Archives as old and new versions of Docker write them, and damaged ones.

use serde_json::json;

use ::tar;

use super::*;

fn platform() -> Platform {
    Platform {
        architecture: "amd64".into(),
        os: "linux".into(),
        variant: None,
    }
}

/// A file, or a link.
enum Made<'a> {
    File(&'a [u8]),
    Symlink(&'a str),
    Link(&'a str),
}

fn archive(members: &[(&str, Made)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, made) in members {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        match made {
            Made::File(bytes) => {
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, name, *bytes).unwrap();
            }
            Made::Symlink(target) | Made::Link(target) => {
                let is_hard = matches!(made, Made::Link(_));
                let kind = if is_hard {
                    tar::EntryType::Link
                } else {
                    tar::EntryType::Symlink
                };
                header.set_entry_type(kind);
                header.set_size(0);
                builder.append_link(&mut header, name, target).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

struct Saved {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

/// Two layers alike, saved by an old Docker, which writes the second as a link.
fn saved() -> Saved {
    let layer = archive(&[("file", Made::File(b"content"))]);
    let diff_id = Digest::of(&layer).to_string();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id, diff_id, diff_id]},
    });
    let manifest = json!([
        {"Config": "c.json", "RepoTags": ["some/name:1.0", "alpine:latest"],
         "Layers": ["one/layer.tar", "two/layer.tar", "three/layer.tar"]},
        {"Config": "missing.json", "RepoTags": null, "Layers": []},
    ]);
    Saved {
        layer,
        config: config.to_string().into_bytes(),
        manifest: manifest.to_string().into_bytes(),
    }
}

fn open(bytes: &[u8], reference: Option<&str>) -> Result<Image> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    std::fs::write(&path, bytes).unwrap();
    let image = open_docker(&path, reference, &platform(), dir.path());
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 1, "nothing beside the archive");
    image
}

fn error(bytes: &[u8], reference: Option<&str>) -> String {
    match open(bytes, reference) {
        Ok(_) => panic!("it was opened"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn links_between_layers_are_followed_and_names_completed() {
    let Saved {
        layer,
        config,
        manifest,
    } = saved();
    let members = [
        ("manifest.json", Made::File(&manifest)),
        ("c.json", Made::File(&config)),
        ("two/layer.tar", Made::Symlink("../one/layer.tar")),
        ("three/layer.tar", Made::Link("two/layer.tar")),
        ("one/layer.tar", Made::File(&layer)),
    ];
    let plain = archive(&members);
    let zstd = zstd::stream::encode_all(&plain[..], 1).unwrap();
    for bytes in [&plain, &zstd] {
        for reference in [
            "alpine",
            "docker.io/library/alpine:latest",
            "some/name:1.0",
            "@0",
        ] {
            let image = open(bytes, Some(reference)).unwrap();
            assert_eq!(image.digest, Digest::of(&config), "{reference}");
            for descriptor in &image.manifest.layers {
                let mut content = Vec::new();
                let mut blob = image.blobs.open(descriptor).unwrap();
                blob.read_to_end(&mut content).unwrap();
                assert!(content == layer);
            }
        }
    }
    assert!(error(&plain, None).contains("some/name:1.0, alpine:latest"));
    assert!(error(&plain, Some("debian")).contains("no image \"debian\""));
    assert!(error(&plain, Some("@2")).contains("but 2 images"));
    assert!(error(&plain, Some("@1")).contains("missing.json"));
}

#[test]
fn what_is_no_saved_image_is_a_clear_error() {
    let Saved { layer, config, .. } = saved();
    assert!(error(b"", None).contains("no manifest.json"));
    assert!(error(&layer, None).contains("no manifest.json"));
    assert!(error(&b"text".repeat(500), None).contains("no tar header"));
    let index = archive(&[("index.json", Made::File(b"{}"))]);
    assert!(error(&index, None).contains("use oci-archive:"));
    let manifest = json!([{"Config": "c.json", "Layers": ["loop", "loop", "none"]}]);
    let manifest = manifest.to_string().into_bytes();
    let members = [
        ("manifest.json", Made::File(&manifest)),
        ("c.json", Made::File(&config)),
        ("loop", Made::Symlink("loop")),
    ];
    assert!(error(&archive(&members), None).contains("link to a link"));
    let members = [
        ("manifest.json", Made::File(&manifest)),
        ("c.json", Made::File(b"{}")),
    ];
    assert!(error(&archive(&members), None).contains("has 3 layers"));
    let whole = archive(&[("manifest.json", Made::File(&manifest))]);
    assert!(error(&whole[..600], None).contains("ends early"));
}

#[test]
fn pipes_are_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    let kind = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
    let result = open_oci(&path, None, &platform(), dir.path());
    let text = format!("{:#}", result.err().unwrap());
    assert!(text.contains("not a regular file"), "{text}");
}
