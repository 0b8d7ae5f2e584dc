//! Which of several images is for a machine (OCI image specification, `image-index.md`): the one place where that is
//! decided, for registries, layouts and archives alike.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Descriptor, ImageConfig, Index, Manifest, Platform, parse};
use crate::digest::Digest;

/// Indexes within indexes, at most.
const MAX_DEPTH: usize = 8;
/// Documents that are read to find an image, at most.
const MAX_READ: usize = 64;
/// Of an annotation that says what an attestation is about, as buildkit writes it.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// A manifest or an index as it came.
#[derive(Debug, Clone)]
pub struct Received {
    /// Its bytes.
    pub text: Vec<u8>,
    /// What it says to be.
    pub media_type: String,
    /// Of the bytes.
    pub digest: Digest,
}

/// The image for a machine.
#[derive(Debug)]
pub struct Chosen {
    /// What it consists of.
    pub manifest: Manifest,
    /// The manifest as it came.
    pub received: Received,
    /// Somebody has said for which machine it is: an index, or among several its configuration.
    pub is_told: bool,
}

/// Where the documents that an index names are.
pub trait Documents {
    /// Reads a manifest or an index.
    ///
    /// # Errors
    /// When it is not there or damaged.
    fn manifest(&self, named: &Descriptor) -> Result<Received>;

    /// Reads a configuration.
    ///
    /// # Errors
    /// When it is not there or damaged.
    fn config(&self, named: &Descriptor) -> Result<ImageConfig>;
}

enum Document {
    Index(Index),
    Manifest(Box<Manifest>),
}

impl Received {
    /// By what is in it: media types of old writers are wrong or missing.
    fn understand(&self) -> Result<Document> {
        let damaged = || format!("cannot understand {}", self.digest);
        let value: Value = parse(&self.text).with_context(damaged)?;
        let declared = value["mediaType"].as_str().unwrap_or(&self.media_type);
        if declared.starts_with("application/vnd.docker.distribution.manifest.v1") {
            bail!("manifests of version 1 are too old: push the image again");
        }
        let version = &value["schemaVersion"];
        if !version.is_null() && *version != 2 {
            bail!(
                "{}: its schema version is {version}: only 2 is supported (skopeo copy converts it)",
                self.digest
            );
        }
        if value.get("manifests").is_some()
            || declared.contains("index") && value.get("layers").is_none()
        {
            return serde_json::from_value(value)
                .map(Document::Index)
                .with_context(damaged);
        }
        if value.get("config").is_none() {
            bail!("{} is no image manifest, but {declared:?}", self.digest);
        }
        serde_json::from_value(value)
            .map(|manifest| Document::Manifest(Box::new(manifest)))
            .with_context(damaged)
    }
}

/// Follows a document through indexes to the image for a machine: first what an index says to be for it, the best first,
/// then what it says nothing about. Attestations and other things that run nowhere are passed over.
///
/// # Errors
/// When a document is missing, damaged or of a kind that is no image, and when none fits; the message names those that are
/// there.
pub fn choose(start: Received, documents: &dyn Documents, wanted: &Platform) -> Result<Chosen> {
    let mut search = Search {
        documents,
        wanted,
        left: MAX_READ,
        there: Vec::new(),
    };
    match start.understand()? {
        Document::Manifest(manifest) => Ok(Chosen {
            manifest: *manifest,
            received: start,
            is_told: false,
        }),
        Document::Index(index) => search.of(&index),
    }
}

/// The same for the images that an index lists.
///
/// # Errors
/// As [`choose`].
pub fn choose_of(index: &Index, documents: &dyn Documents, wanted: &Platform) -> Result<Chosen> {
    let mut search = Search {
        documents,
        wanted,
        left: MAX_READ,
        there: Vec::new(),
    };
    search.of(index)
}

struct Search<'a> {
    documents: &'a dyn Documents,
    wanted: &'a Platform,
    left: usize,
    /// The machines that there are images for.
    there: Vec<String>,
}

impl Search<'_> {
    fn of(&mut self, index: &Index) -> Result<Chosen> {
        if let Some(chosen) = self.within(index, false, 1)? {
            return Ok(chosen);
        }
        self.there.sort();
        self.there.dedup();
        self.there.truncate(20);
        let wanted = Platform {
            os: "linux".into(),
            ..self.wanted.clone()
        };
        bail!(
            "there is no image for {}, but for {}",
            wanted.name(),
            match self.there.is_empty() {
                true => "no known machine".into(),
                false => self.there.join(", "),
            }
        )
    }

    fn within(&mut self, index: &Index, is_told: bool, depth: usize) -> Result<Option<Chosen>> {
        if depth > MAX_DEPTH {
            bail!("indexes within indexes, more than {MAX_DEPTH}");
        }
        let mut fitting = Vec::new();
        for named in &index.manifests {
            let rank = match told(named) {
                Some(platform) => {
                    if platform.os != "unknown" {
                        self.there.push(platform.name());
                    }
                    rank(platform, self.wanted)
                }
                None if named.annotations.contains_key(ATTESTATION) => None,
                None => Some(u32::MAX),
            };
            fitting.extend(rank.map(|rank| (rank, named)));
        }
        // The first of equals, as other clients choose.
        fitting.sort_by_key(|(rank, _)| *rank);
        for (_, named) in fitting {
            let is_told = is_told || told(named).is_some();
            let is_only = index.manifests.len() == 1;
            if let Some(chosen) = self.behind(named, is_told, is_only, depth)? {
                return Ok(Some(chosen));
            }
        }
        Ok(None)
    }

    /// What a descriptor leads to, if that is for the machine.
    fn behind(
        &mut self,
        named: &Descriptor,
        is_told: bool,
        is_only: bool,
        depth: usize,
    ) -> Result<Option<Chosen>> {
        let Some(left) = self.left.checked_sub(1) else {
            bail!("more than {MAX_READ} documents would have to be read to find the image");
        };
        self.left = left;
        let received = self.documents.manifest(named)?;
        let manifest = match received.understand()? {
            Document::Index(index) => return self.within(&index, is_told, depth + 1),
            Document::Manifest(manifest) => *manifest,
        };
        if !is_told && !is_only {
            // A signature, a list of parts: whatever else is kept beside images.
            if super::layers::check_types(&manifest).is_err() {
                return Ok(None);
            }
            let config = self.documents.config(&manifest.config)?;
            if check(&config, self.wanted).is_err() {
                self.there.push(of(&config).name());
                return Ok(None);
            }
        }
        Ok(Some(Chosen {
            manifest,
            received,
            is_told: is_told || !is_only,
        }))
    }
}

/// What an index says of an entry's machine, if it says anything.
fn told(named: &Descriptor) -> Option<&Platform> {
    named
        .platform
        .as_ref()
        .filter(|p| !p.architecture.is_empty())
}

fn of(config: &ImageConfig) -> Platform {
    Platform {
        architecture: config.architecture.clone(),
        os: config.os.clone(),
        variant: config.variant.clone(),
    }
}

/// Whether an image of which nobody has said for what machine it is can be meant.
///
/// # Errors
/// Naming the machine that it is for.
pub fn check(config: &ImageConfig, wanted: &Platform) -> Result<()> {
    if !is_linux(&config.os) {
        bail!("it is for {:?}, not for linux", config.os);
    }
    check_architecture(&config.architecture, wanted)
}

/// The same for the name of a processor; an image that names none may be for any.
///
/// # Errors
/// Naming the processor that it is for.
pub fn check_architecture(found: &str, wanted: &Platform) -> Result<()> {
    let (found, wanted) = (architecture(found), architecture(&wanted.architecture));
    if found != wanted && !matches!(found, "" | "unknown") && !wanted.is_empty() {
        bail!("it is for {found}, not for {wanted}: --arch {found} takes it");
    }
    Ok(())
}

fn is_linux(os: &str) -> bool {
    matches!(os, "" | "linux")
}

/// Go's name of a processor that goes by another one too.
fn architecture(name: &str) -> &str {
    match name {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        "i386" | "i486" | "i586" | "i686" | "x86" => "386",
        "armhf" | "armel" => "arm",
        other => other,
    }
}

/// Lower is better; `None` does not run.
fn rank(found: &Platform, wanted: &Platform) -> Option<u32> {
    let processor = architecture(&wanted.architecture);
    if !is_linux(&found.os) || architecture(&found.architecture) != processor {
        return None;
    }
    // What is meant where no variant is named, as containerd has it.
    let usual = match processor {
        "arm64" => Some("v8"),
        "arm" => Some("v7"),
        "amd64" => Some("v1"),
        _ => None,
    };
    let asked = wanted.variant.as_deref().filter(|v| !v.is_empty());
    let Some(wanted) = asked.or(usual) else {
        return Some(u32::from(found.variant.is_some()));
    };
    let found = found.variant.as_deref().filter(|v| !v.is_empty());
    let Some(found) = found.or(usual) else {
        return Some(1);
    };
    match (level(found), level(wanted)) {
        (Some(found), Some(wanted)) if found <= wanted => Some(wanted - found),
        // Where nobody has asked for one, the lowest of the newer ones may run.
        (Some(found), Some(wanted)) if asked.is_none() => Some((1 << 16) + found - wanted),
        (None, None) if found == wanted => Some(0),
        _ => None,
    }
}

/// A variant is a number: `v7`, `7`, `v8.2`. A newer machine runs what is for an older one.
fn level(variant: &str) -> Option<u32> {
    let digits = variant.trim_start_matches(['v', 'V']);
    let (major, minor) = digits.split_once('.').unwrap_or((digits, "0"));
    let (major, minor): (u8, u8) = (major.parse().ok()?, minor.parse().ok()?);
    Some(u32::from(major) << 8 | u32::from(minor))
}

impl Platform {
    /// `linux/arm64/v8`.
    pub fn name(&self) -> String {
        let variant = self.variant.iter().map(String::as_str);
        let parts: Vec<&str> = [self.os.as_str(), self.architecture.as_str()]
            .into_iter()
            .chain(variant)
            .collect();
        parts.join("/")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().unwrap_or_default(),
            architecture: parts.next().unwrap_or_default(),
            variant: parts.next(),
        }
    }

    /// Documents in memory, by digest.
    #[derive(Default)]
    struct Memory(BTreeMap<Digest, Vec<u8>>);

    impl Documents for Memory {
        fn manifest(&self, named: &Descriptor) -> Result<Received> {
            Ok(Received {
                text: self.0.get(&named.digest).context("not there")?.clone(),
                media_type: named.media_type.clone(),
                digest: named.digest,
            })
        }

        fn config(&self, named: &Descriptor) -> Result<ImageConfig> {
            Ok(parse(&self.manifest(named)?.text)?)
        }
    }

    impl Memory {
        fn add(&mut self, document: &Value) -> Value {
            let text = document.to_string().into_bytes();
            let digest = Digest::of(&text);
            let size = text.len();
            self.0.insert(digest, text);
            json!({"digest": digest.to_string(), "size": size})
        }

        /// An image; its layer's digest is made of its name.
        fn image(&mut self, platform: &str, name: &str) -> Value {
            let mut parts = platform.split('/');
            let config = json!({"os": parts.next(), "architecture": parts.next(), "name": name});
            let config = self.add(&config);
            let layer = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": Digest::of(name.as_bytes()).to_string(), "size": 1});
            self.add(&json!({"schemaVersion": 2, "config": config, "layers": [layer]}))
        }

        fn index(&mut self, manifests: &[Value]) -> Value {
            self.add(&json!({"schemaVersion": 2, "manifests": manifests}))
        }

        fn choose(&self, start: &Value, wanted: &str) -> Result<Chosen> {
            let start: Descriptor = serde_json::from_value(start.clone())?;
            choose(self.manifest(&start)?, self, &platform(wanted))
        }

        /// The name of the image that is chosen.
        #[track_caller]
        fn finds(&self, start: &Value, wanted: &str, name: &str) {
            let chosen = self.choose(start, wanted).unwrap();
            let layer = chosen.manifest.layers.first().map(|l| l.digest);
            assert_eq!(layer, Some(Digest::of(name.as_bytes())), "{wanted}: {name}");
        }

        fn error(&self, start: &Value, wanted: &str) -> String {
            self.choose(start, wanted).unwrap_err().to_string()
        }
    }

    fn on(mut descriptor: Value, platform: &str) -> Value {
        let mut parts = platform.split('/');
        descriptor["platform"] =
            json!({"os": parts.next(), "architecture": parts.next(), "variant": parts.next()});
        descriptor
    }

    fn chosen(there: &[&str], wanted: &str) -> Result<String> {
        let mut memory = Memory::default();
        let all: Vec<Value> = there
            .iter()
            .map(|name| on(memory.image(name, name), name))
            .collect();
        let index = memory.index(&all);
        let found = memory.choose(&index, wanted)?.manifest.layers[0].digest;
        let named = there.iter().find(|n| Digest::of(n.as_bytes()) == found);
        Ok((*named.unwrap()).to_owned())
    }

    #[test]
    fn best_variant_is_chosen() {
        let there = [
            "unknown/unknown",
            "linux/amd64",
            "linux/arm/v5",
            "linux/arm/v6",
            "linux/arm/v7",
            "linux/arm64/v8",
            "windows/amd64",
        ];
        for (wanted, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/v6", "linux/arm/v6"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/arm/v9", "linux/arm/v7"),
            ("linux/arm/9", "linux/arm/v7"),
            ("linux/arm/v10", "linux/arm/v7"),
            ("linux/arm64", "linux/arm64/v8"),
            ("linux/arm64/v8", "linux/arm64/v8"),
            ("linux/arm64/v9.2", "linux/arm64/v8"),
        ] {
            assert_eq!(chosen(&there, wanted).unwrap(), expected, "{wanted}");
        }
        for (there, wanted, expected) in [
            (
                &["linux/arm/v5", "linux/arm/v6"][..],
                "linux/arm/v7",
                Some("linux/arm/v6"),
            ),
            (
                &["linux/arm/v6", "linux/arm/v7"],
                "linux/arm/9",
                Some("linux/arm/v7"),
            ),
            (
                &["linux/arm/v9", "linux/arm/v10"],
                "linux/arm/v11",
                Some("linux/arm/v10"),
            ),
            (&["linux/amd64/v3"], "linux/amd64/v2", None),
            (
                &["linux/amd64/v3", "linux/amd64/v2"],
                "linux/amd64",
                Some("linux/amd64/v2"),
            ),
            (
                &["linux/amd64/v3", "linux/amd64"],
                "linux/amd64",
                Some("linux/amd64"),
            ),
            (
                &["linux/amd64", "linux/amd64/v2"],
                "linux/amd64/v3",
                Some("linux/amd64/v2"),
            ),
            (
                &["linux/arm64/v8.2", "linux/arm64"],
                "linux/arm64",
                Some("linux/arm64"),
            ),
            (
                &["linux/arm64/v8.2", "linux/arm64"],
                "linux/arm64/v9",
                Some("linux/arm64/v8.2"),
            ),
            (&["linux/arm/v7"], "linux/arm/nonsense", None),
            (
                &["linux/ppc64le/power9"],
                "linux/ppc64le",
                Some("linux/ppc64le/power9"),
            ),
        ] {
            let found = chosen(there, wanted).ok();
            assert_eq!(found.as_deref(), expected, "{there:?} {wanted}");
        }
    }

    #[test]
    fn error_names_what_is_there() {
        let error = chosen(&["linux/arm64/v8", "unknown/unknown"], "linux/ppc64le");
        let text = error.unwrap_err().to_string();
        assert_eq!(
            text,
            "there is no image for linux/ppc64le, but for linux/arm64/v8"
        );
    }

    #[test]
    fn indexes_are_nested_in_any_way() {
        let mut memory = Memory::default();
        let (arm, amd) = (
            memory.image("linux/arm64", "arm"),
            memory.image("linux/amd64", "amd"),
        );
        let attestation = on(
            memory.image("unknown/unknown", "attestation"),
            "unknown/unknown",
        );
        let mut untold = memory.image("linux/amd64", "annotated attestation");
        untold["annotations"] = json!({ATTESTATION: "attestation-manifest"});
        // Each machine has an index of its own, as docker buildx writes it with attestations.
        let pair = |memory: &mut Memory, image: &Value, name: &str| {
            let index = memory.index(&[on(image.clone(), name), attestation.clone()]);
            on(index, name)
        };
        let both = [
            pair(&mut memory, &arm, "linux/arm64"),
            pair(&mut memory, &amd, "linux/amd64"),
        ];
        let two = memory.index(&both);
        let amds = memory.index(&[on(amd.clone(), "linux/amd64")]);
        let bare = memory.index(&[untold.clone(), amd.clone()]);
        let mixed = [
            memory.index(&[on(arm.clone(), "linux/arm64"), amds.clone()]),
            memory.index(&[amds, on(arm.clone(), "linux/arm64")]),
            memory.index(&[arm.clone(), amd.clone()]),
            memory.index(&[on(arm.clone(), "/"), on(amd.clone(), "linux/")]),
            memory.index(&[untold, bare.clone(), arm]),
            two,
        ];
        for start in &mixed {
            memory.finds(start, "linux/amd64", "amd");
            memory.finds(start, "linux/arm64", "arm");
            let text = memory.error(start, "linux/s390x");
            assert!(
                text.contains("linux/amd64") && text.contains("linux/arm64"),
                "{text}"
            );
        }
        // The outer index is wrong about the inner one: another one is looked for.
        let wrong = memory.index(&[on(bare.clone(), "linux/arm64"), mixed[0].clone()]);
        memory.finds(&wrong, "linux/amd64", "amd");
        let mut deep = amd.clone();
        for _ in 0..8 {
            deep = memory.index(&[deep]);
        }
        memory.finds(&deep, "linux/amd64", "amd");
        deep = memory.index(&[deep]);
        assert!(
            memory
                .error(&deep, "linux/amd64")
                .contains("within indexes")
        );
        let many = vec![bare; 100];
        let many = memory.index(&many);
        assert!(memory.error(&many, "linux/s390x").contains("more than 64"));
    }

    #[test]
    fn only_image_is_told_apart_from_one_that_an_index_has_chosen() {
        let mut memory = Memory::default();
        let image = memory.image("linux/amd64", "amd");
        assert!(!memory.choose(&image, "linux/arm64").unwrap().is_told);
        let index = memory.index(std::slice::from_ref(&image));
        assert!(!memory.choose(&index, "linux/arm64").unwrap().is_told);
        let index = memory.index(&[on(image, "linux/arm64")]);
        assert!(memory.choose(&index, "linux/arm64").unwrap().is_told);
        for (found, wanted, fits) in [
            ("amd64", "amd64", true),
            ("x86_64", "amd64", true),
            ("", "amd64", true),
            ("amd64", "arm64", false),
            ("arm64", "aarch64", true),
        ] {
            let wanted = platform(&format!("linux/{wanted}"));
            assert_eq!(check_architecture(found, &wanted).is_ok(), fits, "{found}");
        }
    }
}
