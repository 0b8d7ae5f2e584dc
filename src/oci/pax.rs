//! Records of pax extension headers (POSIX.1-2001 `pax`, "Extended Header"): `LENGTH KEY=VALUE\n`, values of any bytes.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// Bytes of a file's extended attributes, at most.
const MAX_XATTRS: usize = 1 << 20;

/// Most pieces of data in a sparse file: their map takes 16 MiB.
pub(super) const MAX_PIECES: usize = 1 << 20;

/// What records say about a member; a later record replaces an earlier one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime_s: Option<i64>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Name of a sparse file; `path` is an invented one then.
    pub(super) sparse_name: Option<Vec<u8>>,
    /// Length of a sparse file with its holes.
    pub(super) sparse_len: Option<u64>,
    pub(super) sparse_pieces: Vec<(u64, u64)>,
    /// Format 1.0: the map lies in front of the content.
    pub(super) sparse_map_is_content: bool,
    xattr_bytes: usize,
    piece_offset: u64,
}

impl Records {
    /// Adds the records of a header.
    ///
    /// # Errors
    /// For records that are damaged, and attributes that are too large.
    pub fn add(&mut self, mut bytes: &[u8]) -> Result<()> {
        // Some writers pad with NULs.
        while bytes.first().is_some_and(|b| *b != 0) {
            let (record, rest) = split(bytes).context("a pax header is damaged")?;
            let equals = record.iter().position(|b| *b == b'=');
            let equals = equals.context("a pax header is damaged")?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            self.record(key, value)
                .with_context(|| format!("pax header {}", super::shown(key)))?;
            bytes = rest;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match key {
            // An empty value takes an earlier record back.
            b"path" => self.path = Some(name(value)?).filter(|v| !v.is_empty()),
            b"linkpath" => self.link = Some(name(value)?).filter(|v| !v.is_empty()),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(number(value)?),
            b"gid" => self.gid = Some(number(value)?),
            b"mtime" => self.mtime_s = Some(seconds(value)?),
            b"GNU.sparse.name" => self.sparse_name = Some(name(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse_len = Some(number(value)?),
            b"GNU.sparse.major" => self.sparse_map_is_content = number(value)? > 0,
            b"GNU.sparse.offset" => self.piece_offset = number(value)?,
            b"GNU.sparse.numbytes" => {
                let piece = (self.piece_offset, number(value)?);
                // A member may have any number of headers.
                if self.sparse_pieces.len() == MAX_PIECES {
                    bail!("the map of a sparse file has more than {MAX_PIECES} pieces");
                }
                self.sparse_pieces.push(piece);
            }
            b"GNU.sparse.map" => self.sparse_pieces = pieces(value)?,
            _ => {
                if let Some(xattr) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr_bytes += xattr.len() + value.len();
                    if xattr.is_empty() || xattr.len() > 255 || xattr.contains(&0) {
                        bail!("not the name of an extended attribute");
                    }
                    if value.len() > 64 << 10 || self.xattr_bytes > MAX_XATTRS {
                        bail!("extended attributes are too large");
                    }
                    self.xattrs.insert(xattr.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

/// The first record without its length and line end, and what follows it.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let blank = bytes.iter().take(20).position(|b| *b == b' ')?;
    let len = usize::try_from(number(&bytes[..blank]).ok()?).ok()?;
    let record = bytes.get(blank + 1..len)?.strip_suffix(b"\n")?;
    Some((record, &bytes[len..]))
}

fn name(value: &[u8]) -> Result<Vec<u8>> {
    if value.contains(&0) {
        bail!("a NUL byte in a path");
    }
    Ok(value.to_vec())
}

fn number(value: &[u8]) -> Result<u64> {
    let digits = std::str::from_utf8(value)?;
    digits
        .parse()
        .with_context(|| format!("{digits:?} is no number"))
}

/// Whole seconds of a time that may have a fraction and a sign.
fn seconds(value: &[u8]) -> Result<i64> {
    let text = std::str::from_utf8(value)?;
    let whole = text.split('.').next().unwrap_or(text);
    let whole = if matches!(whole, "" | "-") {
        "0"
    } else {
        whole
    };
    whole
        .parse()
        .with_context(|| format!("{text:?} is no time"))
}

fn pieces(value: &[u8]) -> Result<Vec<(u64, u64)>> {
    let numbers: Vec<u64> = value
        .split(|b| *b == b',')
        .filter(|n| !n.is_empty())
        .map(number)
        .collect::<Result<_>>()?;
    Ok(numbers
        .chunks_exact(2)
        .map(|pair| (pair[0], pair[1]))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut len = body.len() + 1;
        while len.to_string().len() + body.len() != len {
            len += 1;
        }
        [len.to_string().into_bytes(), body].concat()
    }

    #[test]
    fn values_may_hold_any_byte() {
        let mut records = Records::default();
        let capability = [1, 0, 0, 2, 0x0a, b'=', 0, 0];
        let header = [
            record("SCHILY.xattr.security.capability", &capability),
            record("path", "päth".as_bytes()),
            record("mtime", b"-1.5"),
            record("comment", b"?"),
        ];
        records.add(&header.concat()).unwrap();
        assert_eq!(records.xattrs[&b"security.capability"[..]], capability);
        assert_eq!(records.path.as_deref(), Some("päth".as_bytes()));
        assert_eq!(records.mtime_s, Some(-1));
    }

    #[test]
    fn map_of_a_sparse_file_is_bounded_over_all_headers() {
        let mut records = Records::default();
        let pair = [
            record("GNU.sparse.offset", b"0"),
            record("GNU.sparse.numbytes", b"0"),
        ];
        let header = pair.concat().repeat(20_000);
        let result = (0..60).try_for_each(|_| records.add(&header));
        assert!(format!("{:#}", result.unwrap_err()).contains("more than 1048576 pieces"));
        assert!(records.sparse_pieces.len() <= MAX_PIECES);
        let map = record("GNU.sparse.map", b"0,1,5,2");
        records.add(&map).unwrap();
        assert_eq!(records.sparse_pieces, [(0, 1), (5, 2)]);
    }

    #[test]
    fn damaged_records_are_errors() {
        for bytes in [
            &b"99 path=x\n"[..],
            b"5 path=x\n",
            b"path=x\n",
            b"0 path=x\n",
            b"18446744073709551617 path=x\n",
            b"7 path\n",
            b"11 size=-1\n",
        ] {
            let result = Records::default().add(bytes);
            assert!(result.is_err(), "{}", String::from_utf8_lossy(bytes));
        }
        let nul = record("path", b"a\0b");
        assert!(Records::default().add(&nul).is_err());
        let large = record("SCHILY.xattr.user.x", &vec![b'x'; 70_000]);
        assert!(Records::default().add(&large).is_err());
    }
}
