//! The table of mounts of this process (`proc_pid_mountinfo(5)`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is, as this process sees it.
    pub point: PathBuf,
    /// The kind of file system; what comes behind a dot (`fuse.sshfs`) is its user's word.
    pub kind: OsString,
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// When the table cannot be read.
pub fn table() -> std::io::Result<Vec<Mount>> {
    parse(&std::fs::read("/proc/self/mountinfo")?)
}

fn parse(text: &[u8]) -> std::io::Result<Vec<Mount>> {
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let mount = |line: &[u8]| {
        mount(line).ok_or_else(|| {
            let line = OsStr::from_bytes(line).display();
            std::io::Error::other(format!("a line of the table of mounts is odd: {line}"))
        })
    };
    lines.map(mount).collect()
}

/// `ID PARENT DEVICE ROOT POINT OPTIONS [FIELDS…] - KIND SOURCE OPTIONS`. Blanks within a field are written in octal.
fn mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let point = fields.nth(4)?;
    fields.next()?;
    fields.find(|field| *field == b"-")?;
    Some(Mount {
        point: PathBuf::from(OsString::from_vec(unescape(point))),
        kind: OsString::from_vec(unescape(fields.next()?)),
    })
}

/// A field as it was before the kernel wrote blanks, line ends and backslashes as `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, behind)) = rest.split_first() {
        let digits = behind
            .get(..3)
            .filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        if let (b'\\', Some(digits)) = (byte, digits) {
            let value = digits
                .iter()
                .fold(0_u16, |sum, d| sum * 8 + u16::from(d - b'0'));
            out.push(value.to_le_bytes()[0]);
            rest = &behind[3..];
        } else {
            out.push(*byte);
            rest = behind;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn own_table_has_a_root() {
        assert!(table().unwrap().iter().any(|m| m.point == Path::new("/")));
    }

    #[test]
    fn points_and_kinds_are_bytes() {
        for (written, point) in [
            (&b"/a"[..], &b"/a"[..]),
            (b"/a\\040b", b"/a b"),
            (b"/\\011\\012\\134\\043", b"/\t\n\\#"),
            (b"/m\xff", b"/m\xff"),
            (b"/m\xc3", b"/m\xc3"),
            // A backslash that begins no three digits stands for itself.
            (b"/a\\", b"/a\\"),
            (b"/a\\04", b"/a\\04"),
            (b"/a\\09x", b"/a\\09x"),
            // A name that looks like what comes behind it.
            (b"/a\\040-\\040cgroup\\040x", b"/a - cgroup x"),
        ] {
            for optional in ["", "shared:1 ", "master:1 propagate_from:2 "] {
                let line = [
                    b"36 35 0:5 / ",
                    written,
                    b" rw,noatime ",
                    optional.as_bytes(),
                    b"- fuse.x\\040y\xff s\xffource rw\n",
                ];
                let text = [b"1 1 0:1 / / rw - tmpfs none rw\n", &line.concat()[..]].concat();
                let found = parse(&text).unwrap();
                assert_eq!(found.len(), 2);
                assert_eq!(found[1].point.as_os_str().as_bytes(), point);
                assert_eq!(found[1].kind.as_bytes(), b"fuse.x y\xff");
            }
        }
        assert!(parse(b"36 35 0:5 / /a rw\n").is_err());
        assert_eq!(parse(b"").unwrap(), []);
    }
}
