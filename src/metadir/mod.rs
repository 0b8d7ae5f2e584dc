//! `/.singularity.d`: what an image says about itself, as definition files of Singularity and Apptainer lay it out.
//!
//! Runtimes of any age must find their way in an image: new ones read `env/*.sh` and the scripts by name, old ones start the
//! scripts in `actions`, and links at the root lead to what the first versions looked for.

pub mod labels;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The directory, from the image's root.
pub const DIRECTORY: &str = ".singularity.d";

/// What differs between images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The definition's text.
    pub definition: String,
    /// Shell text for the environment, without a `#!` line.
    pub environment: String,
    /// The environment of an OCI image, whole: `10-docker2singularity.sh`.
    pub oci_environment: Option<String>,
    /// Runs for `run`, with its `#!` line.
    pub runscript: Option<String>,
    /// Runs for `instance start`, with its `#!` line.
    pub startscript: Option<String>,
    /// Runs for `test`, with its `#!` line.
    pub test: Option<String>,
    /// Shown by `run-help`.
    pub help: Option<String>,
    /// Names and values.
    pub labels: Vec<(String, String)>,
}

const ENVIRONMENT: [(&str, &str); 4] = [
    ("01-base.sh", include_str!("base.sh")),
    ("95-apps.sh", include_str!("apps.sh")),
    ("99-base.sh", include_str!("libs.sh")),
    ("99-runtimevars.sh", include_str!("runtimevars.sh")),
];

/// The scripts that old runtimes start, with what they do after the environment is set.
const ACTIONS: [(&str, &str); 5] = [
    ("exec", "exec \"$@\""),
    ("run", "exec /.singularity.d/runscript \"$@\""),
    ("shell", "exec \"${SINGULARITY_SHELL:-/bin/sh}\" \"$@\""),
    ("start", "exec /.singularity.d/startscript \"$@\""),
    ("test", "exec /.singularity.d/test \"$@\""),
];

const LINKS: [(&str, &str); 6] = [
    ("singularity", ".singularity.d/runscript"),
    ("environment", ".singularity.d/env/90-environment.sh"),
    (".exec", ".singularity.d/actions/exec"),
    (".run", ".singularity.d/actions/run"),
    (".shell", ".singularity.d/actions/shell"),
    (".test", ".singularity.d/actions/test"),
];

/// Directories that an image must have.
const ROOT: [&str; 9] = [
    "dev",
    "etc",
    "home",
    "proc",
    "root",
    "sys",
    "tmp",
    "var/tmp",
    ".singularity.d/libs",
];

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// A directory.
    Directory,
    /// A file with these bytes.
    File(Vec<u8>),
    /// A symbolic link to this path.
    Link(&'static str),
}

/// What becomes of a file that the image has at the same path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays, whatever it is.
    Keep,
    /// It goes, unless it is a directory.
    Replace,
}

/// One file of those that an image gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// From the image's root, without a slash in front. Its parent comes before it, or is made with mode 0755.
    pub path: String,
    /// Permissions; links have none.
    pub mode: u16,
    /// What it is.
    pub body: Body,
    /// What becomes of what is there.
    pub existing: Existing,
}

impl Item {
    fn directory(path: &str) -> Item {
        Item {
            path: path.into(),
            mode: if path.ends_with("tmp") { 0o1777 } else { 0o755 },
            body: Body::Directory,
            existing: Existing::Keep,
        }
    }

    /// A file that takes the place of another.
    pub fn file(path: String, bytes: impl Into<Vec<u8>>, mode: u16) -> Item {
        Item {
            path,
            mode,
            body: Body::File(bytes.into()),
            existing: Existing::Replace,
        }
    }
}

/// The directory, the links and the mount points of a new image, parents first: for a directory ([`write`]) as well as for
/// an image that is made without one.
///
/// # Errors
/// When the labels cannot be written as JSON.
pub fn items(contents: &Contents) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = ROOT.iter().map(|d| Item::directory(d)).collect();
    for file in ["etc/hosts", "etc/resolv.conf"] {
        items.push(Item {
            existing: Existing::Keep,
            ..Item::file(file.into(), "", 0o644)
        });
    }
    let inside = |name: &str| format!("{DIRECTORY}/{name}");
    for (name, text) in ENVIRONMENT {
        items.push(Item::file(inside(&format!("env/{name}")), text, 0o755));
    }
    let environment = environment(contents);
    items.push(Item::file(
        inside("env/90-environment.sh"),
        environment,
        0o755,
    ));
    for (name, action) in ACTIONS {
        let text = include_str!("action.sh").replace("\n@ACTION@", &format!("\n{action}"));
        items.push(Item::file(inside(&format!("actions/{name}")), text, 0o755));
    }
    items.push(Item::file(
        inside("Singularity"),
        contents.definition.as_str(),
        0o644,
    ));
    items.push(Item::file(inside("labels.json"), labels(contents)?, 0o644));
    for (name, text, mode) in [
        (
            "env/10-docker2singularity.sh",
            &contents.oci_environment,
            0o755,
        ),
        ("runscript", &contents.runscript, 0o755),
        ("startscript", &contents.startscript, 0o755),
        ("test", &contents.test, 0o755),
        ("runscript.help", &contents.help, 0o644),
    ] {
        if let Some(text) = text {
            items.push(Item::file(inside(name), text.as_str(), mode));
        }
    }
    items.extend(LINKS.map(|(name, target)| Item {
        path: name.into(),
        mode: 0o777,
        body: Body::Link(target),
        existing: Existing::Keep,
    }));
    Ok(items)
}

/// The text of `90-environment.sh`.
fn environment(contents: &Contents) -> String {
    format!(
        "{}\n{}\n",
        include_str!("environment.sh"),
        contents.environment
    )
}

/// Sorted by name and indented by tabs, as the peers write it.
fn labels(contents: &Contents) -> Result<Vec<u8>> {
    let labels: serde_json::Map<_, _> = contents
        .labels
        .iter()
        .map(|(k, v)| (k.clone(), v.clone().into()))
        .collect();
    let mut text = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut writer = serde_json::Serializer::with_formatter(&mut text, format);
    serde::Serialize::serialize(&labels, &mut writer).context("cannot write the labels")?;
    Ok(text)
}

/// The object `inspect-metadata.json` of a SIF: what `inspect --all --json` says, readable without reading the file tree.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn summary(contents: &Contents) -> Result<Vec<u8>> {
    let mut scripts = serde_json::Map::new();
    let mut script = |name: &str, text: &str| {
        let path = format!("/{DIRECTORY}/env/{name}");
        scripts.insert(path, text.trim_end().into());
    };
    if let Some(text) = &contents.oci_environment {
        script("10-docker2singularity.sh", text);
    }
    script("90-environment.sh", &environment(contents));
    let mut attributes = serde_json::Map::new();
    attributes.insert("environment".into(), scripts.into());
    let labels: serde_json::Map<_, _> = contents
        .labels
        .iter()
        .map(|(k, v)| (k.clone(), v.clone().into()))
        .collect();
    attributes.insert("labels".into(), labels.into());
    attributes.insert("deffile".into(), contents.definition.trim_end().into());
    for (name, text) in [
        ("runscript", &contents.runscript),
        ("startscript", &contents.startscript),
        ("test", &contents.test),
        ("helpfile", &contents.help),
    ] {
        if let Some(text) = text {
            attributes.insert(name.into(), text.trim_end().into());
        }
    }
    let whole = serde_json::json!({"data": {"attributes": attributes}, "type": "container"});
    serde_json::to_vec(&whole).context("cannot write what the image says about itself")
}

/// Writes the [`items`] into the tree of a new image. No link of that tree leads outside: parents are looked up as though
/// the tree were `/`, and a last component is never followed.
///
/// # Errors
/// Naming the file that cannot be written.
pub fn write(root: &Path, contents: &Contents) -> Result<()> {
    std::fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let at = rustix::fs::open(root, flags, Mode::empty())
        .with_context(|| format!("cannot open {}", root.display()))?;
    for item in items(contents)? {
        put(at.as_fd(), &item)
            .with_context(|| format!("cannot write {}", root.join(&item.path).display()))?;
    }
    Ok(())
}

fn put(root: BorrowedFd, item: &Item) -> Result<(), Errno> {
    let path = Path::new(&item.path);
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let parent = directory(root, path.parent().unwrap_or(Path::new("")))?;
    let there = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    if there && item.existing == Existing::Keep {
        return Ok(());
    }
    if there {
        rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
    }
    let mode = Mode::from_raw_mode(item.mode.into());
    match &item.body {
        Body::Directory => make(&parent, name, mode),
        Body::Link(target) => rustix::fs::symlinkat(*target, &parent, name),
        Body::File(bytes) => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = File::from(rustix::fs::openat(&parent, name, flags, mode)?);
            file.write_all(bytes)
                .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
            rustix::fs::fchmod(&file, mode)
        }
    }
}

/// A directory with exactly this mode: the umask of whoever builds is no part of the image.
fn make(parent: &OwnedFd, name: &OsStr, mode: Mode) -> Result<(), Errno> {
    rustix::fs::mkdirat(parent, name, mode)?;
    rustix::fs::chmodat(parent, name, mode, AtFlags::empty())
}

/// A directory below the root, made where it is missing.
fn directory(root: BorrowedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = || {
        let path = if path.as_os_str().is_empty() {
            OsStr::from_bytes(b".")
        } else {
            path.as_os_str()
        };
        loop {
            match rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                // Something was renamed meanwhile.
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
    };
    match (open(), path.file_name()) {
        (Err(Errno::NOENT), Some(name)) => {
            let parent = directory(root, path.parent().unwrap_or(Path::new("")))?;
            make(&parent, name, Mode::from_raw_mode(0o755))?;
            open()
        }
        (result, _) => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_the_tree_lead_nowhere_outside() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir_all(root.join("real/etc")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        let link = |target: &Path, name: &str| {
            std::os::unix::fs::symlink(target, root.join(name)).unwrap();
        };
        link(Path::new("/real/etc"), "etc");
        link(Path::new("../../../../real"), ".singularity.d");
        link(&outside, "tmp");
        std::os::unix::fs::symlink(outside.join("labels"), root.join("real/labels.json")).unwrap();
        write(&root, &Contents::default()).unwrap();
        assert!(root.join("real/etc/hosts").is_file());
        assert!(root.join("real/env/90-environment.sh").is_file());
        let labels = std::fs::symlink_metadata(root.join("real/labels.json")).unwrap();
        assert!(labels.is_file(), "the link gave way to the file");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn what_the_image_has_stays_where_it_is_no_part_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/hosts"), "mine").unwrap();
        std::fs::write(dir.path().join("environment"), "mine").unwrap();
        write(dir.path(), &Contents::default()).unwrap();
        for file in ["etc/hosts", "environment"] {
            let text = std::fs::read_to_string(dir.path().join(file)).unwrap();
            assert_eq!(text, "mine", "{file}");
        }
    }

    #[test]
    fn labels_are_indented_by_tabs() {
        let contents = Contents {
            labels: vec![("b".into(), "2".into()), ("a".into(), "1\n".into())],
            ..Contents::default()
        };
        let text = String::from_utf8(labels(&contents).unwrap()).unwrap();
        assert_eq!(text, "{\n\t\"a\": \"1\\n\",\n\t\"b\": \"2\"\n}");
    }
}
