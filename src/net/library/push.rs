//! Uploading to a library: its places are made where they are missing, the file goes to signed addresses.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::http::{Body, Method, Request};
use super::super::reference::LibraryName;
use super::super::{Options, is_sif};
use super::{ImageInfo, Library, refusal};
use crate::digest::{Digest, Hashing};
use crate::progress::Progress;
use crate::{given, say};

/// A file that is longer goes in parts.
const MULTIPART: u64 = 64 << 20;
/// More parts than this are nonsense.
const MAX_PARTS: u64 = 10_000;

/// What has an id.
#[derive(Deserialize)]
struct Known {
    id: String,
}

/// Uploads a SIF, and gives its hash.
///
/// # Errors
/// When the library refuses, or the file cannot be read.
pub fn push(
    path: &Path,
    name: &LibraryName,
    arch: &str,
    description: &str,
    options: &Options,
) -> Result<String> {
    let what = || format!("cannot read {}", path.display());
    let file = given::open(path).with_context(what)?;
    if !is_sif(&file) {
        bail!("{} is no SIF: only SIFs can be pushed", path.display());
    }
    if !name.is_complete() {
        bail!("library://{name}: a push needs library://ENTITY/COLLECTION/CONTAINER[:TAG]");
    }
    let mut hash = Hashing::new(io::sink());
    io::copy(&mut &file, &mut hash).with_context(what)?;
    let (digest, size, _) = hash.finish();
    let hash = format!("sha256.{}", digest.hex());
    let library = Library::of(name, options)?;
    let version = library.version();
    let [entity, collection, container] = name.path();
    let entity_id = library.find_or_create(
        "entities",
        entity,
        &json!({"name": entity, "description": "No description"}),
    )?;
    let collection_id = library.find_or_create(
        "collections",
        &format!("{entity}/{collection}"),
        &json!({"name": collection, "description": "No description", "entity": entity_id}),
    )?;
    let place = format!("{entity}/{collection}/{container}");
    let container_id = library.find_or_create(
        "containers",
        &place,
        &json!({"name": container, "description": "No description", "collection": collection_id}),
    )?;
    let url = library
        .url(&format!("v1/images/{place}:{hash}"))
        .with_query("arch", arch);
    let image: ImageInfo = match library.call_url(Method::Get, url, None)? {
        Some(image) => image,
        None => {
            let body = json!({"hash": hash, "description": description, "container": container_id});
            let made = library.call(Method::Post, "v1/images", Some(&body))?;
            made.ok_or_else(|| anyhow!("the library has no place for images"))?
        }
    };
    check_id(&image.id)?;
    match image.uploaded {
        true => say::info(format_args!(
            "Image is already present in the library - not uploading."
        )),
        false => library.upload(&file, size, digest, &image.id, &version)?,
    }
    library.set_tags(name, arch, &container_id, &image.id, &version)?;
    Ok(hash)
}

/// Ids become parts of addresses.
fn check_id(id: &str) -> Result<()> {
    let good = (1..=128).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    match good {
        true => Ok(()),
        false => bail!("the library gives the id {id:?}, which is none"),
    }
}

/// A part that has arrived.
#[derive(Serialize)]
struct Done {
    #[serde(rename = "partNumber")]
    number: u64,
    token: String,
}

impl Library<'_> {
    fn find_or_create(&self, kind: &str, name: &str, body: &Value) -> Result<String> {
        let found: Option<Known> = self.call(Method::Get, &format!("v1/{kind}/{name}"), None)?;
        let known = match found {
            Some(known) => known,
            None => self
                .call::<Known>(Method::Post, &format!("v1/{kind}"), Some(body))?
                .ok_or_else(|| anyhow!("the library does not know of {kind}"))?,
        };
        check_id(&known.id)?;
        Ok(known.id)
    }

    fn upload(
        &self,
        file: &File,
        size: u64,
        digest: Digest,
        id: &str,
        version: &str,
    ) -> Result<()> {
        let progress = Progress::new("uploading", size);
        let sent = |bytes| progress.add(bytes);
        let whole = Body::File {
            file,
            offset_bytes: 0,
            len_bytes: size,
            sent: &sent,
        };
        if !version.starts_with('2') {
            // The API of old: the file itself to the library itself.
            let mut request = Request::new(Method::Post, self.url(&format!("v1/imagefile/{id}")));
            request.body = whole;
            let response = self.send(request)?;
            return match response.is_success() {
                true => Ok(()),
                false => Err(refusal(response, "the upload is refused")),
            };
        }
        if size > MULTIPART && self.upload_parts(file, size, id, &sent)? {
            return Ok(());
        }
        #[derive(Deserialize)]
        struct Signed {
            #[serde(rename = "uploadURL")]
            url: String,
        }
        let path = format!("v2/imagefile/{id}");
        let body = json!({"filesize": size, "sha256sum": digest.hex()});
        let signed: Signed = self
            .call(Method::Post, &path, Some(&body))?
            .ok_or_else(|| anyhow!("the library does not take uploads"))?;
        let with_hash = signed.url.contains("x-amz-content-sha256");
        self.put(&signed.url, whole, with_hash.then(|| digest.hex()))?;
        self.call::<Value>(Method::Put, &format!("{path}/_complete"), Some(&json!({})))?;
        Ok(())
    }

    /// Puts content to a signed address, without our authorization, and gives its `ETag`.
    fn put(&self, signed: &str, body: Body, hash: Option<String>) -> Result<String> {
        let url = self
            .root
            .join(signed)
            .context("the library gives no address")?;
        let mut request =
            Request::new(Method::Put, url).header("Content-Type", "application/octet-stream");
        if let Some(hash) = hash {
            request = request.header("x-amz-content-sha256", hash);
        }
        request.body = body;
        // Not by `send`: the address itself is the permission.
        let response = self.client.send(&request)?;
        match response.is_success() {
            true => Ok(response.header("ETag").unwrap_or_default().to_owned()),
            false => bail!("the object store refuses: StatusCode: {}", response.status),
        }
    }

    /// In parts; false when the library does not know of that.
    fn upload_parts(
        &self,
        file: &File,
        size: u64,
        id: &str,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<bool> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Begun {
            #[serde(rename = "uploadID")]
            upload: String,
            total_parts: u64,
            part_size: u64,
            #[serde(default)]
            options: Option<std::collections::BTreeMap<String, String>>,
        }
        let path = format!("v2/imagefile/{id}/_multipart");
        let Some(begun) =
            self.call::<Begun>(Method::Post, &path, Some(&json!({"filesize": size})))?
        else {
            return Ok(false);
        };
        let fits = begun.part_size > 0
            && begun.total_parts <= MAX_PARTS
            && begun
                .part_size
                .checked_mul(begun.total_parts)
                .is_some_and(|all| all >= size);
        if !fits {
            bail!(
                "the library wants the file in {} parts of {} bytes, which is not all of it",
                begun.total_parts,
                begun.part_size
            );
        }
        let compliant = begun
            .options
            .as_ref()
            .and_then(|o| o.get("s3compliant"))
            .is_none_or(|v| v.is_empty() || v == "true");
        let parts = || -> Result<Vec<Done>> {
            let mut done = Vec::new();
            for number in 1..=begun.total_parts {
                let offset_bytes = (number - 1) * begun.part_size;
                if offset_bytes >= size {
                    break;
                }
                let len_bytes = begun.part_size.min(size - offset_bytes);
                let hash = hash_of(file, offset_bytes, len_bytes)?;
                let ask = json!({"partSize": len_bytes, "uploadID": begun.upload, "partNumber": number,
                    "sha256sum": if compliant { hash.as_str() } else { "" }});
                #[derive(Deserialize)]
                struct Signed {
                    #[serde(rename = "presignedURL")]
                    url: String,
                }
                let signed: Signed = self
                    .call(Method::Put, &path, Some(&ask))?
                    .ok_or_else(|| anyhow!("the library has forgotten the upload"))?;
                let body = Body::File {
                    file,
                    offset_bytes,
                    len_bytes,
                    sent,
                };
                let token = self
                    .put(&signed.url, body, compliant.then_some(hash))
                    .with_context(|| format!("part {number}"))?;
                done.push(Done { number, token });
            }
            Ok(done)
        };
        match parts() {
            Ok(done) => {
                let body = json!({"uploadID": begun.upload, "completedParts": done});
                self.call::<Value>(Method::Put, &format!("{path}_complete"), Some(&body))?;
                Ok(true)
            }
            Err(error) => {
                // The error is what matters; the library forgets the parts by itself, later.
                let body = json!({"uploadID": begun.upload});
                let _ = self.call::<Value>(Method::Put, &format!("{path}_abort"), Some(&body));
                Err(error)
            }
        }
    }

    fn set_tags(
        &self,
        name: &LibraryName,
        arch: &str,
        container: &str,
        image: &str,
        version: &str,
    ) -> Result<()> {
        // The first release of the second API had tags without architectures.
        let by_arch = version.starts_with('2') && version != "2.0.0-alpha.1";
        for tag in name.tags() {
            let (path, body) = match by_arch {
                true => (
                    format!("v2/tags/{container}"),
                    json!({"Arch": arch, "Tag": tag, "ImageID": image}),
                ),
                false => (
                    format!("v1/tags/{container}"),
                    json!({"Tag": tag, "ImageID": image}),
                ),
            };
            self.call::<Value>(Method::Post, &path, Some(&body))?
                .ok_or_else(|| anyhow!("the library does not take the tag {tag}"))?;
        }
        Ok(())
    }
}

fn hash_of(file: &File, offset_bytes: u64, len_bytes: u64) -> Result<String> {
    use std::io::Seek as _;
    let mut file = file;
    file.seek(io::SeekFrom::Start(offset_bytes))?;
    let mut hash = Hashing::new(io::sink());
    io::copy(&mut file.take(len_bytes), &mut hash)?;
    Ok(hash.finish().0.hex())
}
