//! Layers as streams of their archives' bytes: read, checked and decompressed on a thread of its own, while the caller
//! compresses. The thread is at most a few chunks ahead, and goes on to the next layer without waiting.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use anyhow::{Context, Result, bail};

use crate::oci::blob::Verified;
use crate::oci::tar::Source;
use crate::oci::{Descriptor, Image, Manifest, decompress};
use crate::progress::Progress;
use crate::threads;

/// Bytes that are handed over at once.
const CHUNK: usize = 256 << 10;
/// Chunks that wait, at most: 4 MiB.
const AHEAD: usize = 16;

enum Message {
    Bytes(Vec<u8>),
    End,
    Failed(anyhow::Error),
}

/// The bytes of layers, one layer after the other.
pub struct Stream {
    chunks: Receiver<Message>,
    empty: Sender<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    is_at_end: bool,
}

/// How a layer is called in messages.
pub fn name(image: &Image, layer: usize) -> String {
    let count = image.manifest.layers.len();
    let digest = image
        .manifest
        .layers
        .get(layer)
        .map(|l| l.digest.to_string());
    format!(
        "layer {} of {count} ({})",
        layer + 1,
        digest.unwrap_or_default()
    )
}

/// Whether all layers are of a kind that can be read.
///
/// # Errors
/// Naming the layer and what is wrong with it.
pub fn check(image: &Image) -> Result<()> {
    let (layers, diff_ids) = (&image.manifest.layers, &image.config.rootfs.diff_ids);
    for (index, layer) in layers.iter().enumerate() {
        supported(layer).with_context(|| name(image, index))?;
    }
    if layers.len() != diff_ids.len() {
        bail!(
            "the image has {} layers, and its configuration has digests of {}",
            layers.len(),
            diff_ids.len()
        );
    }
    Ok(())
}

/// Media types of configurations of images; others are met too (Docker wrote `application/octet-stream` once).
const CONFIGS: [&str; 4] = [
    "",
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",
];

/// Whether a manifest is that of an image that can run: its layers' types decide, where it has layers.
///
/// # Errors
/// When it is that of an artifact.
pub fn check_types(manifest: &Manifest) -> Result<()> {
    let kind = manifest.config.media_type.as_str();
    let is_config = CONFIGS.contains(&kind);
    let are_layers = manifest.layers.iter().all(|l| is_layer(&l.media_type));
    // What is encrypted is an image, with a message of its own.
    if is_config
        && manifest
            .layers
            .iter()
            .any(|l| l.media_type.ends_with("+encrypted"))
    {
        return Ok(());
    }
    if are_layers && (is_config || !manifest.layers.is_empty()) {
        return Ok(());
    }
    let shown = match (
        is_config,
        manifest.layers.iter().find(|l| !is_layer(&l.media_type)),
    ) {
        (true, Some(layer)) => &layer.media_type,
        _ => kind,
    };
    bail!("unsupported image-specific operation on artifact with type {shown:?}")
}

/// Layers as OCI and Docker call them, old names and those that need not be distributed among them. What lies in them,
/// their bytes say.
fn is_layer(kind: &str) -> bool {
    const BEGINNINGS: [&str; 6] = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.container.image.rootfs.diff",
        "application/vnd.oci.image.rootfs.tar",
    ];
    kind.is_empty()
        || BEGINNINGS.iter().any(|b| kind.starts_with(b)) && !kind.ends_with("+encrypted")
}

/// Whether a registry need not have a layer.
pub fn is_foreign(layer: &Descriptor) -> bool {
    let kind = layer.media_type.as_str();
    kind.contains(".nondistributable.") || kind.contains(".foreign.")
}

fn supported(layer: &Descriptor) -> Result<()> {
    let kind = layer.media_type.as_str();
    if kind.ends_with("+encrypted") {
        bail!("it is encrypted ({kind}): decrypt the image first (skopeo copy --decryption-key)");
    }
    if !is_layer(kind) {
        bail!("{kind:?} is no file system layer: this is an artifact, not a container image");
    }
    Ok(())
}

/// Gives `use_it` the streams of these layers in this order.
///
/// # Errors
/// Those of `use_it`, and when no thread can be started.
pub fn with<T>(
    image: &Image,
    order: &[usize],
    use_it: impl FnOnce(&mut Stream) -> Result<T>,
) -> Result<T> {
    let sizes = order.iter().filter_map(|at| image.manifest.layers.get(*at));
    let total = sizes.map(|layer| layer.size).fold(0, u64::saturating_add);
    let progress = Arc::new(Progress::new("extracting", total));
    let (send, chunks) = sync_channel(AHEAD);
    let (empty, recycled) = channel();
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("layers".into())
            .spawn_scoped(scope, move || {
                for layer in order {
                    let message = match read(image, *layer, &send, &recycled, &progress) {
                        Ok(()) => Message::End,
                        Err(error) => Message::Failed(error),
                    };
                    let has_failed = matches!(message, Message::Failed(_));
                    if send.send(message).is_err() || has_failed {
                        return;
                    }
                }
            })
            .map_err(|error| threads::refused("cannot start a thread", &error))?;
        // Dropped before the thread is waited for, which ends it.
        let mut stream = Stream {
            chunks,
            empty,
            chunk: Vec::new(),
            at: 0,
            is_at_end: false,
        };
        use_it(&mut stream)
    })
}

/// Tells how far the reading of a blob is.
struct Counted {
    bytes: Box<dyn Read + Send>,
    progress: Arc<Progress>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.bytes.read(buffer)?;
        self.progress.add(len as u64);
        Ok(len)
    }
}

/// Sends a layer's bytes. Comes back early when nobody wants more.
fn read(
    image: &Image,
    index: usize,
    send: &SyncSender<Message>,
    recycled: &Receiver<Vec<u8>>,
    progress: &Arc<Progress>,
) -> Result<()> {
    let (Some(layer), Some(diff_id)) = (
        image.manifest.layers.get(index),
        image.config.rootfs.diff_ids.get(index),
    ) else {
        bail!("there is no such layer");
    };
    let stored = image
        .blobs
        .open(layer)
        .with_context(|| match is_foreign(layer) {
            true => "it is not distributed with the image: pull the image from its registry",
            false => "cannot read it",
        })?;
    let stored = Counted {
        bytes: stored,
        progress: Arc::clone(progress),
    };
    let plain = decompress::open(stored)?;
    let mut plain: Box<dyn Read + Send> = if layer.digest == *diff_id {
        plain
    } else {
        Box::new(Verified::new(plain, *diff_id, None))
    };
    loop {
        let mut chunk = recycled.try_recv().unwrap_or_default();
        chunk.resize(CHUNK, 0);
        let mut len = 0;
        while len < CHUNK {
            match plain.read(&mut chunk[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let is_last = len < CHUNK;
        chunk.truncate(len);
        if len > 0 && send.send(Message::Bytes(chunk)).is_err() || is_last {
            return Ok(());
        }
    }
}

impl Stream {
    /// Reads a layer to its end, which checks its digests, and goes on to the next.
    ///
    /// # Errors
    /// When it cannot be read, or is not what its digests say.
    pub fn finish(&mut self) -> Result<()> {
        while self.fill()? {
            self.at = self.chunk.len();
        }
        self.is_at_end = false;
        Ok(())
    }

    /// Whether there is something in the chunk.
    fn fill(&mut self) -> io::Result<bool> {
        while self.at == self.chunk.len() {
            if self.is_at_end {
                return Ok(false);
            }
            let used = std::mem::take(&mut self.chunk);
            self.at = 0;
            if used.capacity() > 0 {
                // The thread may have read all that it has to.
                let _ = self.empty.send(used);
            }
            match self.chunks.recv() {
                Ok(Message::Bytes(chunk)) => self.chunk = chunk,
                Ok(Message::End) => self.is_at_end = true,
                Ok(Message::Failed(error)) => {
                    self.is_at_end = true;
                    return Err(io::Error::other(error));
                }
                Err(_) => return Err(io::Error::other("the thread that reads layers has ended")),
            }
        }
        Ok(true)
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.fill()? {
            return Ok(0);
        }
        let len = buffer.len().min(self.chunk.len() - self.at);
        buffer[..len].copy_from_slice(&self.chunk[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

impl Source for &mut Stream {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            if !self.fill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let here = (self.chunk.len() - self.at) as u64;
            let len = left.min(here);
            self.at += len as usize;
            left -= len;
        }
        Ok(())
    }
}
