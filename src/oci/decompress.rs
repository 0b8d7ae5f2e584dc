//! Compressed streams: gzip (RFC 1952), zstd (RFC 8878) and xz, recognised by their first bytes as every reader of layers and
//! of `docker save` archives does; what is none of them passes as it is. Several members one after the other are one
//! stream, and NULs between and behind them are padding (of tapes and block devices), as gzip(1) has it. Memory is bounded: 128 MiB for a zstd window at the
//! worst (8 MiB for what is met), as much for xz.

use std::io::{self, BufRead, BufReader, Read};

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
    match format {
        Format::Plain => Ok(Box::new(buffered)),
        Format::Bzip2 => Err(io::Error::other(
            "bzip2 compression is not supported: unpack it with bunzip2 first",
        )),
        format => Ok(Box::new(Members {
            format,
            member: Some(Member::begin(format, buffered)?),
        })),
    }
}

/// Compressed members of one format, one after the other.
struct Members<R: BufRead> {
    format: Format,
    /// The one that is read; `None` at the end.
    member: Option<Member<R>>,
}

enum Member<R: BufRead> {
    Gzip(flate2::bufread::GzDecoder<R>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
    Xz(liblzma::bufread::XzDecoder<R>),
}

impl<R: BufRead> Member<R> {
    fn begin(format: Format, stream: R) -> io::Result<Member<R>> {
        Ok(match format {
            Format::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
                Member::Zstd(decoder.single_frame())
            }
            Format::Xz => {
                let decoder = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0)?;
                Member::Xz(liblzma::bufread::XzDecoder::new_stream(stream, decoder))
            }
            _ => Member::Gzip(flate2::bufread::GzDecoder::new(stream)),
        })
    }

    /// What lies behind it, once it is read to its end.
    fn end(self) -> R {
        match self {
            Member::Gzip(decoder) => decoder.into_inner(),
            Member::Zstd(decoder) => decoder.finish(),
            Member::Xz(decoder) => decoder.into_inner(),
        }
    }
}

impl<R: BufRead> Read for Member<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Member::Gzip(decoder) => decoder.read(buffer),
            Member::Zstd(decoder) => decoder.read(buffer),
            Member::Xz(decoder) => decoder.read(buffer),
        }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.member {
            let len = member.read(buffer)?;
            if len > 0 {
                return Ok(len);
            }
            let Some(mut rest) = self.member.take().map(Member::end) else {
                break;
            };
            if pass_padding(&mut rest)? {
                self.member = Some(Member::begin(self.format, rest)?);
            }
        }
        Ok(0)
    }
}

/// Passes over NULs; whether anything follows.
fn pass_padding(stream: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let bytes = match stream.fill_buf() {
            Ok([]) => return Ok(false),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let zeros = bytes.iter().take_while(|b| **b == 0).count();
        let is_done = zeros < bytes.len();
        stream.consume(zeros);
        if is_done {
            return Ok(true);
        }
    }
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

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        liblzma::read::XzEncoder::new(bytes, 1)
            .read_to_end(&mut out)
            .unwrap();
        out
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    type Compressor = fn(&[u8]) -> Vec<u8>;
    const COMPRESSORS: [Compressor; 3] = [gzip, zstd, xz];

    #[test]
    fn several_members_and_padding_are_one_stream() {
        for pack in COMPRESSORS {
            for padding in [0, 1, 3, 512, 10_240, 200_000] {
                let zeros = vec![0; padding];
                let both = [pack(b"one "), zeros.clone(), pack(b"two"), zeros].concat();
                assert_eq!(content(both).unwrap(), b"one two", "{padding}");
            }
            let empty = [pack(b""), pack(b"x"), pack(b"")].concat();
            assert_eq!(content(empty).unwrap(), b"x");
        }
        // What zstd:chunked and eStargz put behind the content.
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        for bytes in [
            [zstd(b"x"), skippable.to_vec()].concat(),
            [skippable.to_vec(), zstd(b"x")].concat(),
            [zstd(b""), skippable.to_vec(), vec![0; 9], zstd(b"x")].concat(),
        ] {
            assert_eq!(content(bytes).unwrap(), b"x");
        }
    }

    #[test]
    fn what_is_neither_member_nor_padding_is_an_error() {
        for pack in COMPRESSORS {
            for garbage in [&b"garbage behind it"[..], b"\0\0\0x", b"\x1f\x8b"] {
                let bytes = [pack(b"content"), garbage.to_vec()].concat();
                assert!(content(bytes).is_err(), "{garbage:?}");
            }
        }
    }

    #[test]
    fn streams_that_end_early_are_errors() {
        let text = b"some text".repeat(1000);
        for pack in COMPRESSORS {
            let mut bytes = pack(&text);
            bytes.truncate(bytes.len() - 10);
            assert!(content(bytes.clone()).is_err());
            bytes.resize(bytes.len() + 512, 0);
            assert!(content(bytes).is_err());
        }
    }
}
