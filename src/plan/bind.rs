//! The grammar of `--bind` and `--mount`.
//!
//! `--bind src[:dst[:opt[,opt]]]`, several separated by commas; `\,` and `\:` are literal. A comma part is
//! an option only when it is one of the known words and stands after a destination.
//! `--mount` is one CSV record of `key=value` fields (RFC 4180 quoting).

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

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

/// Parses a `--bind` value; the empty text is no bind.
///
/// # Errors
/// An unknown option, a destination that is not absolute.
pub fn parse_binds(text: &str) -> Result<Vec<Bind>> {
    let mut binds: Vec<Bind> = Vec::new();
    let mut open_for_options = false;
    for part in split_unescaped(text, ',') {
        if open_for_options
            && is_option(&part)
            && let Some(bind) = binds.last_mut()
        {
            apply_option(bind, &part)?;
            continue;
        }
        let fields = split_unescaped(&part, ':');
        let mut fields = fields.iter().map(|f| unescape(f));
        let source = fields.next().unwrap_or_default();
        let target = fields.next();
        let options = fields.next();
        if fields.next().is_some() {
            bail!(
                "while parsing bind path: {part:?} has too many colons (write \\: for a colon in a path)"
            );
        }
        if source.is_empty() {
            continue;
        }
        let target = target
            .filter(|t| !t.is_empty())
            .unwrap_or_else(|| source.clone());
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
pub fn parse_mount(text: &str) -> Result<Bind> {
    let (mut kind, mut source, mut target) = (None, None, None);
    let mut rest: Vec<(String, Option<String>)> = Vec::new();
    for field in csv_fields(text)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (field, None),
        };
        match key.as_str() {
            "type" => kind = value,
            "source" | "src" => source = value,
            "destination" | "dst" | "target" => target = value,
            "ro" | "readonly" | "rw" | "image-src" | "id" | "nonested" => rest.push((key, value)),
            _ => bail!("while parsing --mount {text:?}: invalid key {key:?}"),
        }
    }
    match kind.as_deref() {
        Some("bind") => {}
        Some(other) => bail!("unsupported mount type {other:?}, only 'bind' is supported"),
        None => bail!("while parsing --mount {text:?}: mounts must specify a type (type=bind)"),
    }
    let (Some(source), Some(target)) = (source, target) else {
        bail!("while parsing --mount {text:?}: mounts must specify a source and a destination");
    };
    let mut bind = bind(&source, &target)?;
    for (key, value) in rest {
        match (key.as_str(), value) {
            ("ro" | "readonly", value) => bind.read_only = value.is_none_or(|v| v != "false"),
            ("rw", _) => bind.read_only = false,
            ("nonested", _) => bind.nested = false,
            (key, Some(value)) => apply_option(&mut bind, &format!("{key}={value}"))?,
            (key, None) => bail!("while parsing --mount {text:?}: {key} needs a value"),
        }
    }
    Ok(bind)
}

fn bind(source: &str, target: &str) -> Result<Bind> {
    if !target.starts_with('/') {
        bail!("while parsing bind path: destination {target:?} must be an absolute path");
    }
    let target = crate::host::normalise(Path::new(target));
    if target == Path::new("/") {
        bail!("while parsing bind path: nothing can be bound on /: the image is there");
    }
    Ok(Bind {
        source: source.into(),
        target,
        read_only: false,
        image_src: None,
        id: None,
        image: None,
        nested: true,
    })
}

fn is_option(part: &str) -> bool {
    matches!(part, "ro" | "rw") || part.starts_with("image-src=") || part.starts_with("id=")
}

fn apply_option(bind: &mut Bind, option: &str) -> Result<()> {
    match option.split_once('=') {
        None if option == "ro" => bind.read_only = true,
        None if option == "rw" => bind.read_only = false,
        Some(("image-src", path)) if !path.is_empty() => {
            bind.image_src = Some(crate::host::normalise(&Path::new("/").join(path)))
        }
        Some(("id", id)) => match id.parse() {
            Ok(id) => bind.id = Some(id),
            Err(_) => bail!("while parsing bind path: {id:?} is not the number of a SIF object"),
        },
        _ => bail!(
            "while parsing bind path: {option} is not a valid bind option (ro, rw, image-src=PATH, id=N)"
        ),
    }
    Ok(())
}

/// Splits at `separator` where no backslash stands before it; escapes stay in the parts.
fn split_unescaped(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == separator && !escaped {
            parts.push(String::new());
            continue;
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
        escaped = c == '\\' && !escaped;
    }
    parts
}

fn unescape(text: &str) -> String {
    text.replace("\\,", ",").replace("\\:", ":")
}

/// The fields of one CSV record.
///
/// # Errors
/// When a quotation mark is not closed.
pub fn csv_fields(text: &str) -> Result<Vec<String>> {
    let mut fields = vec![String::new()];
    let mut chars = text.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        let Some(field) = fields.last_mut() else {
            break;
        };
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => field.push(c),
        }
    }
    if quoted {
        bail!("while parsing {text:?}: a quotation mark is not closed");
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Bind {
        let mut binds = parse_binds(text).expect("parses");
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
        assert!(parse_binds("").expect("nothing").is_empty());
        assert!(parse_binds(":").expect("nothing").is_empty());
    }

    #[test]
    fn comma_separates_binds_unless_an_option_follows_options() {
        let binds = parse_binds("/a:/b:ro,/c,ro:/d").expect("parses");
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
        ] {
            let error = parse_binds(text).expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn mount_forms() {
        let mount = parse_mount(r#"type=bind,"source=/a,b",dst=/c,ro"#).expect("parses");
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
            (
                "type=bind,src=/a",
                "must specify a source and a destination",
            ),
            (
                "type=bind,src=/a,dst=/b,bind-propagation=shared",
                "invalid key",
            ),
        ] {
            let error = parse_mount(text).expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
