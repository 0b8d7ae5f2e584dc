//! Compressed streams: gzip (RFC 1952), zstd (RFC 8878) and xz, recognised by their first bytes as every reader of layers and
//! of `docker save` archives does; what is none of them passes as it is. Memory is bounded: 128 MiB for a zstd window at the
//! worst (8 MiB for what is met), as much for xz.

use std::io::{self, BufReader, Read};

/// Compressed bytes that are read at once.
const BUFFER: usize = 128 << 10;

/// Memory that xz may take.
const XZ_MEMORY: u64 = 128 << 20;

/// Formats by their first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// RFC 1952; several members are one stream.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The .xz format.
    Xz,
    /// Recognised, not supported.
    Bzip2,
    /// None of these.
    Plain,
}

impl Format {
    /// By the first bytes.
    pub fn of(start: &[u8]) -> Format {
        match start {
            [0x1f, 0x8b, 8, ..] => Format::Gzip,
            // A skippable frame may come first (RFC 8878, 3.1.2).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Format::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Format::Xz,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Format::Bzip2,
            _ => Format::Plain,
        }
    }
}

/// The content of a stream of any of the formats.
///
/// # Errors
/// When the first bytes cannot be read, or are those of a format that is not supported.
pub fn open(mut stream: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let mut start = Vec::with_capacity(6);
    stream.by_ref().take(6).read_to_end(&mut start)?;
    let format = Format::of(&start);
    let whole = io::Cursor::new(start).chain(stream);
    let buffered = BufReader::with_capacity(BUFFER, whole);
    Ok(match format {
        Format::Plain => Box::new(buffered),
        Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Format::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(buffered)?),
        Format::Xz => {
            let flags = liblzma::stream::CONCATENATED;
            let decoder = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, flags)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(buffered, decoder))
        }
        Format::Bzip2 => {
            return Err(io::Error::other(
                "bzip2 compression is not supported: unpack it with bunzip2 first",
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn content(bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        open(io::Cursor::new(bytes))?.read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn each_format_is_recognised() {
        let text = b"some text".repeat(1000);
        let zstd = zstd::stream::encode_all(&text[..], 1).unwrap();
        let mut xz = Vec::new();
        liblzma::read::XzEncoder::new(&text[..], 1)
            .read_to_end(&mut xz)
            .unwrap();
        for bytes in [text.clone(), gzip(&text), zstd, xz] {
            assert!(content(bytes).unwrap() == text);
        }
        assert_eq!(content(Vec::new()).unwrap(), b"");
        assert!(content(b"BZh91AY&SY".to_vec()).is_err());
    }

    #[test]
    fn several_gzip_members_are_one_stream() {
        let both = [gzip(b"one "), gzip(b"two")].concat();
        assert_eq!(content(both).unwrap(), b"one two");
    }

    #[test]
    fn streams_that_end_early_are_errors() {
        let text = b"some text".repeat(1000);
        for mut bytes in [gzip(&text), zstd::stream::encode_all(&text[..], 1).unwrap()] {
            bytes.truncate(bytes.len() - 10);
            assert!(content(bytes).is_err());
        }
    }
}
