//! Layouts that are damaged, or hold several images.

use std::collections::BTreeMap;
use std::io::Cursor;

use serde_json::{Value, json};

use super::*;

/// A layout in memory.
#[derive(Default, Clone)]
struct Memory(BTreeMap<String, Vec<u8>>);

impl Files for Memory {
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>> {
        let bytes = self.0.get(path).with_context(|| format!("no {path}"))?;
        Ok(Box::new(Cursor::new(bytes.clone())))
    }
}

impl Memory {
    /// Adds a document, and gives its descriptor.
    fn add(&mut self, document: &Value, kind: &str) -> Value {
        let text = document.to_string().into_bytes();
        let digest = Digest::of(&text);
        let descriptor =
            json!({"mediaType": kind, "digest": digest.to_string(), "size": text.len()});
        self.0
            .insert(format!("blobs/sha256/{}", digest.hex()), text);
        descriptor
    }

    /// Adds an image without layers.
    fn image(&mut self, architecture: &str) -> Value {
        let config = json!({"architecture": architecture, "os": "linux"});
        let config = self.add(&config, "application/vnd.oci.image.config.v1+json");
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": []});
        self.add(&manifest, "application/vnd.oci.image.manifest.v1+json")
    }

    fn open(&self, index: &Value, reference: Option<&str>) -> Result<Image> {
        let mut files = self.clone();
        files
            .0
            .insert("index.json".into(), index.to_string().into_bytes());
        let wanted = Platform {
            architecture: "amd64".into(),
            os: "linux".into(),
            variant: None,
        };
        image_of(Box::new(files), reference, &wanted)
    }

    fn error(&self, index: &Value, reference: Option<&str>) -> String {
        match self.open(index, reference) {
            Ok(_) => panic!("{index} was opened"),
            Err(error) => format!("{error:#}"),
        }
    }
}

fn index(manifests: &[Value]) -> Value {
    json!({"schemaVersion": 2, "manifests": manifests})
}

fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({ REFERENCE: name });
    descriptor
}

#[test]
fn image_is_found_by_name_digest_and_platform() {
    let mut files = Memory::default();
    let (amd, arm) = (files.image("amd64"), files.image("arm64"));
    let digest = amd["digest"].as_str().unwrap().to_owned();
    let two = index(&[named(amd.clone(), "one"), named(arm.clone(), "two")]);
    for reference in ["one", digest.as_str()] {
        let image = files.open(&two, Some(reference)).unwrap();
        assert_eq!(image.digest.to_string(), digest, "{reference}");
    }
    assert!(files.error(&two, None).contains("one, two"));
    assert!(files.error(&two, Some("three")).contains("one, two"));
    assert!(files.error(&two, Some("two")).contains("--arch arm64"));
    // An index within the index, for several machines.
    let on = |mut descriptor: Value, architecture: &str| {
        descriptor["platform"] = json!({"architecture": architecture, "os": "linux"});
        descriptor
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let nested = index(&[on(arm.clone(), "arm64"), on(amd, "amd64")]);
    let nested = files.add(&nested, kind);
    let image = files.open(&index(&[named(nested, "multi")]), None).unwrap();
    assert_eq!(image.digest.to_string(), digest);
    let other = index(&[on(arm, "arm64")]);
    let other = files.add(&other, kind);
    // One image for another machine only.
    let text = files.error(&index(&[other]), None);
    assert!(
        text.contains("linux/amd64") && text.contains("linux/arm64"),
        "{text}"
    );
}

#[test]
fn what_is_no_image_is_a_clear_error() {
    let mut files = Memory::default();
    assert!(files.error(&index(&[]), None).contains("names no image"));
    let mut loops = files.image("amd64");
    for _ in 0..20 {
        loops = files.add(&index(&[loops]), "");
    }
    assert!(
        files
            .error(&index(&[loops]), None)
            .contains("within indexes")
    );
    let empty = json!({"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(b"{}").to_string(), "size": 2});
    let artifact = json!({"schemaVersion": 2, "config": empty, "layers": []});
    let artifact = files.add(&artifact, "");
    assert!(files.error(&index(&[artifact]), None).contains("artifact"));
    let old = files.add(&json!({"schemaVersion": 1, "fsLayers": []}), "");
    assert!(
        files
            .error(&index(&[old]), None)
            .contains("only 2 is supported")
    );
    let text = files.add(&json!("text"), "");
    assert!(files.open(&index(&[text]), None).is_err());
    for bad in [json!([]), json!({"manifests": 1}), json!(null)] {
        assert!(files.error(&bad, None).contains("index.json"));
    }
}

#[test]
fn documents_are_checked_against_digest_and_size() {
    let mut files = Memory::default();
    let mut image = files.image("amd64");
    let path = format!(
        "blobs/{}",
        image["digest"].as_str().unwrap().replace(':', "/")
    );
    let text = files.0[&path].clone();
    files
        .0
        .insert(path.clone(), [text.as_slice(), b" "].concat());
    assert!(
        files
            .error(&index(&[image.clone()]), None)
            .contains("longer")
    );
    image["size"] = json!(text.len() + 1);
    assert!(
        files
            .error(&index(&[image.clone()]), None)
            .contains("damaged")
    );
    image["size"] = json!(1u64 << 40);
    assert!(
        files
            .error(&index(&[image.clone()]), None)
            .contains("too large")
    );
    image["digest"] = json!("sha256:../../../etc/passwd");
    assert!(files.error(&index(&[image]), None).contains("not a digest"));
}
