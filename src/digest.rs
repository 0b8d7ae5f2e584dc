//! Digests of content, as registries and OCI images name it: `sha256:` and 64 hexadecimal digits (OCI image
//! specification, `descriptor.md`). The only user of the hashing library.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The 64 digits alone, as file names hold them.
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl FromStr for Digest {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Digest> {
        let Some((algorithm, digits)) = text.split_once(':') else {
            bail!("{text:?} is not a digest: sha256: and 64 digits");
        };
        if algorithm != "sha256" {
            bail!("digest {text:?}: only sha256 is supported");
        }
        let mut bytes = [0; 32];
        if digits.len() != 64
            || !digits
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            bail!("{text:?} is not a digest: sha256: and 64 lower-case hexadecimal digits");
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(&String::from_utf8_lossy(pair), 16)?;
        }
        Ok(Digest(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Digest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// Passes bytes through, and knows the digest of those that have passed.
pub struct Hashing<T> {
    inner: T,
    state: Sha256,
    len_bytes: u64,
}

impl<T> Hashing<T> {
    /// Around a reader or a writer.
    pub fn new(inner: T) -> Hashing<T> {
        Hashing {
            inner,
            state: Sha256::new(),
            len_bytes: 0,
        }
    }

    /// Digest and number of the bytes that have passed, and what was wrapped.
    pub fn finish(self) -> (Digest, u64, T) {
        (
            Digest(self.state.finalize().into()),
            self.len_bytes,
            self.inner,
        )
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.state.update(&buffer[..len]);
        self.len_bytes += len as u64;
        Ok(len)
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.state.update(&bytes[..len]);
        self.len_bytes += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsing_and_printing_are_inverse() {
        let digest = Digest::of(b"abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse::<Digest>().unwrap(), digest);
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            "sha256:",
            "sha256:AB",
            "md5:00",
            "../../etc/passwd",
            "sha512:00",
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        let upper = format!("sha256:{}", "A".repeat(64));
        assert!(upper.parse::<Digest>().is_err());
    }

    #[test]
    fn what_passes_is_counted_and_hashed() {
        let mut reader = Hashing::new(&b"abc"[..]);
        io::copy(&mut reader, &mut io::sink()).unwrap();
        let (digest, len, _) = reader.finish();
        assert_eq!((digest, len), (Digest::of(b"abc"), 3));
    }
}
