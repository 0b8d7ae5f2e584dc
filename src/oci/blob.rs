//! Content checked against its descriptor while it is read.

use std::io::{self, Read};

use crate::digest::{Digest, Hashing};

/// A reader that fails at the end of content that is not what was promised, and one byte after its promised length.
pub struct Verified<R> {
    inner: Option<Hashing<R>>,
    digest: Digest,
    left_bytes: Option<u64>,
}

impl<R: Read> Verified<R> {
    /// Expects this digest, and this length where it is known.
    pub fn new(inner: R, digest: Digest, len_bytes: Option<u64>) -> Verified<R> {
        Verified {
            inner: Some(Hashing::new(inner)),
            digest,
            left_bytes: len_bytes,
        }
    }

    fn finish(&mut self) -> io::Result<usize> {
        let Some(inner) = self.inner.take() else {
            return Ok(0);
        };
        let (found, len, _) = inner.finish();
        match self.left_bytes {
            Some(left) if left > 0 => Err(io::Error::other(format!(
                "{} ends after {len} bytes: {left} are missing",
                self.digest
            ))),
            _ if found != self.digest => Err(io::Error::other(format!(
                "content has the digest {found}, not {}: it is damaged",
                self.digest
            ))),
            _ => Ok(0),
        }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let Some(inner) = &mut self.inner else {
            return Ok(0);
        };
        let len = inner.read(buffer)?;
        if len == 0 {
            return self.finish();
        }
        if let Some(left) = &mut self.left_bytes {
            *left = left.checked_sub(len as u64).ok_or_else(|| {
                io::Error::other(format!("{} is longer than it should be", self.digest))
            })?;
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8], digest: Digest, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        Verified::new(content, digest, Some(len)).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn content_must_be_what_was_promised() {
        let digest = Digest::of(b"content");
        assert_eq!(read(b"content", digest, 7).unwrap(), b"content");
        let error = |content, len| read(content, digest, len).unwrap_err().to_string();
        assert!(error(b"contens", 7).contains("damaged"));
        assert!(error(b"conten", 7).contains("1 are missing"));
        assert!(error(b"content and more", 7).contains("longer"));
    }
}
