//! The grammar of `--bind` and `--mount`.
//!
//! `--bind src[:dst[:opt[,opt]]]`, several separated by commas; `\,` and `\:` are literal. A comma part is
//! an option only when it is one of the known words and stands after a destination.
//! `--mount` is one CSV record of `key=value` fields (RFC 4180 quoting).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::image::Part;

/// One bind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host, as typed.
    pub source: PathBuf,
    /// Inside, absolute.
    pub target: PathBuf,
    /// Not writable through this mount.
    pub read_only: bool,
    /// `image-src`: `source` is an image file, and this a path in it.
    pub image_src: Option<PathBuf>,
    /// `id`: object of the SIF that holds the file system.
    pub id: Option<u32>,
    /// What is taken of the image file, found by the command, which may read files.
    pub image: Option<Part>,
    /// Listed in `*_BIND`, so that a container started inside has it too.
    pub nested: bool,
}

/// Parses a `--bind` value; the empty text is no bind. Blanks around a path are dropped, as the peers do.
///
/// # Errors
/// An unknown option, a destination that is not absolute, one without a source.
pub fn parse_binds(text: &OsStr) -> Result<Vec<Bind>> {
    let mut binds: Vec<Bind> = Vec::new();
    let mut open_for_options = false;
    for part in split_unescaped(text.as_bytes(), b',') {
        if open_for_options
            && is_option(part.trim_ascii())
            && let Some(bind) = binds.last_mut()
        {
            apply_option(bind, part.trim_ascii())?;
            continue;
        }
        let fields = split_unescaped(&part, b':');
        let mut fields = fields.iter().map(|f| unescape(f.trim_ascii()));
        let source = fields.next().unwrap_or_default();
        let target = fields.next().filter(|target| !target.is_empty());
        let options = fields.next();
        if fields.next().is_some() {
            bail!(
                "while parsing bind path: {:?} has too many colons (write \\: for a colon in a path)",
                OsStr::from_bytes(&part)
            );
        }
        if source.is_empty() {
            match target {
                None => continue,
                Some(_) => bail!(
                    "while parsing bind path: {:?} names no source before the colon: is a variable in it unset?",
                    OsStr::from_bytes(&part)
                ),
            }
        }
        let target = target.unwrap_or_else(|| source.clone());
        let mut bind = bind(&source, &target)?;
        open_for_options = options.is_some();
        if let Some(option) = options.filter(|o| !o.is_empty()) {
            apply_option(&mut bind, &option)?;
        }
        binds.push(bind);
    }
    Ok(binds)
}

/// Parses a `--mount` value.
///
/// # Errors
/// Another type than bind, an unknown key, a missing source or destination.
pub fn parse_mount(text: &OsStr) -> Result<Bind> {
    let (mut source, mut target) = (None, None);
    let mut rest: Vec<(Vec<u8>, Option<Vec<u8>>)> = Vec::new();
    for field in csv_fields(text.as_bytes())? {
        let mut parts = field.splitn(2, |b| *b == b'=');
        let key = parts.next().unwrap_or_default();
        let value = parts.next().map(<[u8]>::to_vec);
        match key {
            b"type" if value.as_deref().is_none_or(|kind| kind == b"bind") => {}
            b"type" => bail!(
                "unsupported mount type {:?}, only 'bind' is supported",
                OsStr::from_bytes(&value.unwrap_or_default())
            ),
            b"source" | b"src" => source = value,
            b"destination" | b"dst" | b"target" => target = value,
            b"ro" | b"readonly" | b"rw" | b"image-src" | b"id" | b"nonested" => {
                rest.push((key.to_vec(), value));
            }
            _ => bail!(
                "while parsing --mount {text:?}: invalid key {:?}",
                OsStr::from_bytes(key)
            ),
        }
    }
    let filled = |value: Option<Vec<u8>>| value.filter(|value| !value.is_empty());
    let (Some(source), Some(target)) = (filled(source), filled(target)) else {
        bail!("while parsing --mount {text:?}: mounts must specify a source and a destination");
    };
    let mut bind = bind(&source, &target)?;
    for (key, value) in rest {
        match (key.as_slice(), value) {
            (b"ro" | b"readonly", value) => bind.read_only = value.is_none_or(|v| v != b"false"),
            (b"rw", _) => bind.read_only = false,
            (b"nonested", _) => bind.nested = false,
            (key, Some(value)) => apply_option(&mut bind, &[key, b"=", &value].concat())?,
            (key, None) => bail!(
                "while parsing --mount {text:?}: {} needs a value",
                OsStr::from_bytes(key).display()
            ),
        }
    }
    Ok(bind)
}

fn bind(source: &[u8], target: &[u8]) -> Result<Bind> {
    let target = OsStr::from_bytes(target);
    if !target.as_bytes().starts_with(b"/") {
        bail!("while parsing bind path: destination {target:?} must be an absolute path");
    }
    let target = crate::host::normalise(Path::new(target));
    if target == Path::new("/") {
        bail!("while parsing bind path: nothing can be bound on /: the image is there");
    }
    Ok(Bind {
        source: OsStr::from_bytes(source).into(),
        target,
        read_only: false,
        image_src: None,
        id: None,
        image: None,
        nested: true,
    })
}

fn is_option(part: &[u8]) -> bool {
    matches!(part, b"ro" | b"rw") || part.starts_with(b"image-src=") || part.starts_with(b"id=")
}

fn apply_option(bind: &mut Bind, option: &[u8]) -> Result<()> {
    if option == b"ro" {
        bind.read_only = true;
    } else if option == b"rw" {
        bind.read_only = false;
    } else if let Some(path) = option.strip_prefix(b"image-src=").filter(|p| !p.is_empty()) {
        let path = Path::new("/").join(OsStr::from_bytes(path));
        bind.image_src = Some(crate::host::normalise(&path));
    } else if let Some(id) = option.strip_prefix(b"id=") {
        let number = std::str::from_utf8(id).ok().and_then(|id| id.parse().ok());
        bind.id = Some(number.with_context(|| {
            let id = OsStr::from_bytes(id);
            format!("while parsing bind path: {id:?} is not the number of a SIF object")
        })?);
    } else {
        bail!(
            "while parsing bind path: {} is not a valid bind option (ro, rw, image-src=PATH, id=N)",
            OsStr::from_bytes(option).display()
        );
    }
    Ok(())
}

/// Splits at `separator` where no backslash stands before it; escapes stay in the parts.
fn split_unescaped(text: &[u8], separator: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut escaped = false;
    for byte in text {
        if *byte == separator && !escaped {
            parts.push(Vec::new());
            continue;
        }
        if let Some(part) = parts.last_mut() {
            part.push(*byte);
        }
        escaped = *byte == b'\\' && !escaped;
    }
    parts
}

/// Takes the backslash from `\,` and `\:`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match bytes.peek() {
            Some(next @ (b',' | b':')) if byte == b'\\' => {
                out.push(*next);
                bytes.next();
            }
            _ => out.push(byte),
        }
    }
    out
}

/// The fields of one CSV record.
///
/// # Errors
/// When a quotation mark is not closed.
pub fn csv_fields(text: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut fields = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    let mut quoted = false;
    while let Some(byte) = bytes.next() {
        let Some(field) = fields.last_mut() else {
            break;
        };
        match byte {
            b'"' if quoted && bytes.peek() == Some(&b'"') => {
                bytes.next();
                field.push(b'"');
            }
            b'"' => quoted = !quoted,
            b',' if !quoted => fields.push(Vec::new()),
            byte => field.push(byte),
        }
    }
    if quoted {
        bail!(
            "while parsing {:?}: a quotation mark is not closed",
            OsStr::from_bytes(text)
        );
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Bind {
        let mut binds = parse_binds(text.as_ref()).expect("parses");
        assert_eq!(binds.len(), 1, "{binds:?}");
        binds.remove(0)
    }

    #[test]
    fn bind_forms() {
        assert_eq!(one("/a").target, Path::new("/a"));
        assert_eq!(one("a:/b").target, Path::new("/b"));
        assert!(one("a:/b:ro").read_only);
        assert!(!one("a:/b:rw").read_only);
        assert_eq!(one("x.sif:/b:image-src=/d,id=3").id, Some(3));
        assert_eq!(one(r"/a\:b\,c:/d").source, Path::new("/a:b,c"));
        assert!(parse_binds("".as_ref()).expect("nothing").is_empty());
        assert!(parse_binds(":".as_ref()).expect("nothing").is_empty());
    }

    #[test]
    fn comma_separates_binds_unless_an_option_follows_options() {
        let binds = parse_binds("/a:/b:ro,/c,ro:/d".as_ref()).expect("parses");
        assert_eq!(binds.len(), 3);
        assert_eq!(
            (
                binds[0].read_only,
                binds[1].target.as_path(),
                binds[2].target.as_path()
            ),
            (true, Path::new("/c"), Path::new("/d"))
        );
    }

    #[test]
    fn bad_binds_say_why() {
        for (text, part) in [
            ("a:b", "absolute"),
            ("/a:/b:bogus", "bogus is not a valid bind option"),
            ("a:/b:ro:x", "too many"),
            ("rel", "absolute"),
            (":/data", "names no source"),
            ("/a, :/data:ro", "names no source"),
        ] {
            let error = parse_binds(text.as_ref()).expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn blanks_around_paths_are_dropped_and_those_in_them_stay() {
        let binds = parse_binds(" /opt, a b/m1 : /q ,/r : /s : ro , /t".as_ref()).expect("parses");
        let all: Vec<_> = binds
            .iter()
            .map(|b| (b.source.to_str(), b.target.to_str(), b.read_only))
            .collect();
        assert_eq!(
            all,
            [
                (Some("/opt"), Some("/opt"), false),
                (Some("a b/m1"), Some("/q"), false),
                (Some("/r"), Some("/s"), true),
                (Some("/t"), Some("/t"), false),
            ]
        );
    }

    #[test]
    fn paths_are_bytes() {
        let text = OsStr::from_bytes(b"/a\xff\\:\xfe:/b\xfd:ro");
        let bind = parse_binds(text).expect("parses").remove(0);
        assert_eq!(bind.source.as_os_str().as_bytes(), b"/a\xff:\xfe");
        assert_eq!(bind.target.as_os_str().as_bytes(), b"/b\xfd");
        let text = OsStr::from_bytes(b"source=/a\xff,destination=/b\xfd");
        let bind = parse_mount(text).expect("type=bind is the default");
        assert_eq!(bind.source.as_os_str().as_bytes(), b"/a\xff");
    }

    #[test]
    fn mount_forms() {
        let mount = parse_mount(r#"type=bind,"source=/a,b",dst=/c,ro"#.as_ref()).expect("parses");
        assert_eq!(
            (
                mount.source.as_path(),
                mount.target.as_path(),
                mount.read_only
            ),
            (Path::new("/a,b"), Path::new("/c"), true)
        );
        for (text, part) in [
            ("type=tmpfs,dst=/a", "unsupported mount type \"tmpfs\""),
            ("type=bind,src=,dst=/a", "must specify a source"),
            (
                "type=bind,src=/a",
                "must specify a source and a destination",
            ),
            (
                "type=bind,src=/a,dst=/b,bind-propagation=shared",
                "invalid key",
            ),
        ] {
            let error = parse_mount(text.as_ref()).expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
