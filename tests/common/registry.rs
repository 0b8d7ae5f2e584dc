//! An image of a registry, and a registry that has it.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use capsid::digest::Digest;
use serde_json::{Value, json};

use super::http::{Answer, Asked, Server};
use super::{Env, Output, output};

/// The program with a cache and a configuration of its own.
pub fn command(t: &Env, words: &[&str]) -> Command {
    let mut command = t.command(words);
    command
        .env("APPTAINER_CONFIGDIR", t.path("config"))
        .env("HOME", t.path("home"));
    command
}

/// Runs it.
pub fn run(t: &Env, words: &[&str]) -> Output {
    output(&mut command(t, words))
}

/// An image of a layer as a registry has it: its blobs by digest, its manifest.
#[derive(Clone)]
pub struct Image {
    /// By digest.
    pub blobs: BTreeMap<String, Vec<u8>>,
    /// As it is sent.
    pub manifest: Vec<u8>,
    /// Its only layer.
    pub layer: String,
}

/// Of the tests' own tree.
pub fn image(t: &Env) -> Image {
    let tree = t.tree("tree");
    let tar = t.path("layer.tar");
    let packed = output(
        Command::new("tar")
            .arg("-C")
            .arg(&tree)
            .arg("-cf")
            .arg(&tar)
            .arg("."),
    );
    packed.ok();
    let layer = fs::read(&tar).unwrap();
    let digest = Digest::of(&layer).to_string();
    let config = json!({
        "architecture": capsid::host::go_arch(std::env::consts::ARCH), "os": "linux",
        "created": "2026-01-02T03:04:05Z", "config": {"Cmd": ["/bin/cat", "/opt/hello.txt"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]}
    })
    .to_string()
    .into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config).to_string(), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len()}]
    })
    .to_string()
    .into_bytes();
    let blobs = [config, layer].map(|b| (Digest::of(&b).to_string(), b));
    Image {
        blobs: blobs.into(),
        manifest,
        layer: digest,
    }
}

/// A registry with one image, `test/image:v1`.
pub fn registry(
    image: &Image,
    special: impl Fn(&Asked) -> Option<Answer> + Send + Sync + 'static,
) -> Server {
    let (blobs, manifest) = (image.blobs.clone(), image.manifest.clone());
    Server::start(move |asked| {
        if let Some(answer) = special(asked) {
            return answer;
        }
        if asked.target == "/v2/test/image/manifests/v1" {
            return Answer::new(200, manifest.clone())
                .header("Content-Type", "application/vnd.oci.image.manifest.v1+json");
        }
        match asked.target.strip_prefix("/v2/test/image/blobs/") {
            Some(digest) if blobs.contains_key(digest) => Answer::content(asked, &blobs[digest]),
            _ => Answer::new(
                404,
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
            ),
        }
    })
}

impl Image {
    /// The same image with its manifest changed.
    pub fn changed(&self, change: impl FnOnce(&mut Value)) -> Image {
        let mut manifest = serde_json::from_slice(&self.manifest).expect("JSON");
        change(&mut manifest);
        Image {
            manifest: manifest.to_string().into_bytes(),
            ..self.clone()
        }
    }
}
