//! `sif new|add|del|setprim`: what changes a SIF. Wrong words, and what the file refuses, are usage errors, as with the
//! peers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Usage;
use super::overlay::now;
use crate::digest::Hashing;
use crate::engine::sys::LimitsFail;
use crate::sif::{
    self, Addition, DataType, Editor, Error, Extra, FsType, Link, PartType, Partition, Stamp,
};
use crate::{exit, given, say};

/// The commands, with what their help says.
pub(super) const COMMANDS: [(&str, &str, usize); 4] = [
    ("new", "<sif>: an empty SIF", 1),
    (
        "add",
        "--datatype <n> [options] <sif> <file>: a further object\n      \
         --datatype 1 definition, 2 environment, 3 labels, 4 partition, 5 signature, 6 JSON, 7 any,\n                 \
         8 cryptographic message, 9 bill of materials, 10 OCI index, 11 OCI blob\n      \
         --parttype 1 system, 2 primary system, 3 data, 4 overlay   --partfs 1 squashfs, 2 ext3, 3 archive, 4 raw\n      \
         --partarch 1 386, 2 amd64, 3 arm, 4 arm64, 5 ppc64, 6 ppc64le, 7 mips … 11 s390x, 12 riscv64, 13 loong64\n      \
         --signhash 1 SHA-256 … 5 BLAKE2b   --signentity <fingerprint>   --sbomformat <name>\n      \
         --groupid <n>   --link <n>   --alignment <n>   --filename <name>",
        2,
    ),
    ("del", "<id> <sif>: without an object", 2),
    ("setprim", "<id> <sif>: another partition as the root", 2),
];

const SBOM_FORMATS: [&str; 8] = [
    "cyclonedx-json",
    "cyclonedx-xml",
    "github-json",
    "spdx-json",
    "spdx-rdf",
    "spdx-tag-value",
    "spdx-yaml",
    "syft-json",
];

/// Options of `sif add`, as typed.
#[derive(Default)]
struct Options {
    datatype: Option<u32>,
    parttype: Option<u32>,
    partfs: Option<u32>,
    partarch: Option<u32>,
    signhash: Option<u32>,
    signentity: Option<String>,
    sbomformat: Option<String>,
    groupid: Option<u32>,
    link: Option<u32>,
    alignment: Option<u64>,
    filename: Option<String>,
}

/// Runs `sif VERB WORDS…`.
///
/// # Errors
/// [`Usage`] for wrong words and for what the SIF refuses; a failed write is fatal.
pub(super) fn run(verb: &str, words: &[OsString]) -> Result<u8> {
    let _limits = LimitsFail::begin();
    let (options, rest) = match verb {
        "add" => parse(words)?,
        _ => (Options::default(), plain(verb, words)?),
    };
    let needed = COMMANDS
        .iter()
        .find(|(name, ..)| *name == verb)
        .map_or(1, |(_, _, needed)| *needed);
    if rest.len() != needed {
        let text = format!("accepts {needed} arg(s), received {}", rest.len());
        return Err(usage(verb, text));
    }
    match verb {
        "new" => new(Path::new(&rest[0]))?,
        "add" => add(&options, Path::new(&rest[0]), Path::new(&rest[1]))?,
        _ => {
            let path = Path::new(&rest[1]);
            let id = rest[0].to_str().and_then(|id| id.parse().ok());
            let id = id.ok_or_else(|| usage(verb, "the id is a number from 1"))?;
            let editor = open(verb, path)?;
            let done = match verb {
                "del" => editor.delete(id, now()),
                _ => editor.set_primary(id, now()),
            };
            done.map_err(|error| refused(verb, path, error))?;
        }
    }
    Ok(exit::OK)
}

fn usage(command: &str, text: impl Into<String>) -> anyhow::Error {
    Usage {
        command: command.into(),
        text: text.into(),
    }
    .into()
}

/// A failed system call ends the program; what the SIF cannot be is a wrong command.
fn refused(verb: &str, path: &Path, error: Error) -> anyhow::Error {
    match error {
        Error::Io(error) => {
            anyhow::Error::from(error).context(format!("cannot change {}", path.display()))
        }
        other => usage(verb, other.to_string()),
    }
}

fn open(verb: &str, path: &Path) -> Result<Editor> {
    Editor::open(path).map_err(|error| {
        let text = format!("{}: {:#}", path.display(), anyhow::Error::from(error));
        usage(verb, say::plain(&text))
    })
}

fn new(path: &Path) -> Result<()> {
    let stamp = Stamp {
        time_s: now(),
        identity: uuid::Uuid::new_v4().into_bytes(),
    };
    sif::create(path, stamp).with_context(|| format!("cannot create {}", path.display()))
}

/// Words without options.
fn plain(verb: &str, words: &[OsString]) -> Result<Vec<OsString>> {
    match words.iter().find(|w| w.to_string_lossy().starts_with("--")) {
        Some(word) => Err(usage(
            verb,
            format!("unknown flag: {}", word.to_string_lossy()),
        )),
        None => Ok(words.to_vec()),
    }
}

/// Options stand anywhere among the words.
fn parse(words: &[OsString]) -> Result<(Options, Vec<OsString>)> {
    let mut options = Options::default();
    let mut rest = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        let Some(flag) = text.strip_prefix("--") else {
            rest.push(word.clone());
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (flag.to_owned(), None),
        };
        let value = match value {
            Some(value) => value,
            None => words
                .next()
                .map(|value| value.to_string_lossy().into_owned())
                .ok_or_else(|| usage("add", format!("flag needs an argument: --{name}")))?,
        };
        let wrong = || usage("add", format!("invalid argument {value:?} for --{name}"));
        let number = || value.parse::<u32>().map_err(|_| wrong());
        match name.as_str() {
            "datatype" => options.datatype = Some(number()?),
            "parttype" => options.parttype = Some(number()?),
            "partfs" => options.partfs = Some(number()?),
            "partarch" => options.partarch = Some(number()?),
            "signhash" => options.signhash = Some(number()?),
            "groupid" => options.groupid = Some(number()?),
            "link" => options.link = Some(number()?),
            "alignment" => {
                // Page sizes and the like; more is a mistake, and would be a hole in the file.
                let bytes = number().ok().filter(|bytes| *bytes <= 1 << 30);
                options.alignment = Some(u64::from(bytes.ok_or_else(wrong)?)).filter(|b| *b > 0);
            }
            "signentity" => options.signentity = Some(value.clone()),
            "sbomformat" => options.sbomformat = Some(value.clone()),
            "filename" => options.filename = Some(value.clone()),
            _ => return Err(usage("add", format!("unknown flag: --{name}"))),
        }
    }
    Ok((options, rest))
}

fn add(options: &Options, image: &Path, path: &Path) -> Result<()> {
    let number = options
        .datatype
        .filter(|n| (1..=11).contains(n))
        .ok_or_else(|| usage("add", "-datatype flag is required with a valid range"))?;
    let content = given::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let extra = extra(number, options, path)?;
    let name = options.filename.clone().unwrap_or_else(|| {
        PathBuf::from(path.file_name().unwrap_or_default())
            .display()
            .to_string()
    });
    let addition = Addition {
        data_type: DataType::from_code(0x4000 + number.cast_signed()),
        name,
        group: options.groupid.filter(|group| *group > 0),
        link: match options.link {
            None | Some(0) => Link::None,
            Some(link) => Link::Object(link),
        },
        alignment: options.alignment,
        extra,
        content,
    };
    let editor = open("add", image)?;
    editor
        .add(addition, now())
        .map_err(|error| refused("add", image, error))?;
    Ok(())
}

/// The fields of the type, from the options that it needs.
fn extra(number: u32, options: &Options, path: &Path) -> Result<Extra> {
    match number {
        4 => {
            let wrong = || {
                usage(
                    "add",
                    "with partition datatype, --partfs, --parttype and --partarch must be passed",
                )
            };
            let within = |value: Option<u32>, most: u32| {
                value.filter(|n| (1..=most).contains(n)).ok_or_else(wrong)
            };
            let fs = within(options.partfs, 5)?.cast_signed();
            let part = within(options.parttype, 4)?.cast_signed();
            let arch = within(options.partarch, 13)?;
            Ok(Extra::Partition(Partition {
                fs: FsType::from_code(fs),
                part: PartType::from_code(part),
                arch: sif::architecture(arch).ok_or_else(wrong)?,
            }))
        }
        5 => {
            let wrong = || {
                usage(
                    "add",
                    "with signature datatype, --signhash (1 to 5) and --signentity (40 hexadecimal digits) must be passed",
                )
            };
            let hash = options
                .signhash
                .filter(|n| (1..=5).contains(n))
                .ok_or_else(wrong)?;
            let entity = options.signentity.as_deref().and_then(fingerprint);
            Ok(Extra::Signature(
                hash.cast_signed(),
                entity.ok_or_else(wrong)?,
            ))
        }
        9 => {
            let name = options.sbomformat.as_deref().unwrap_or_default();
            let index = SBOM_FORMATS.iter().position(|format| *format == name);
            let index = index.ok_or_else(|| {
                let all = SBOM_FORMATS.join(", ");
                usage(
                    "add",
                    format!("with SBOM datatype, --sbomformat is one of {all}"),
                )
            })?;
            Ok(Extra::Sbom(index as i32 + 1))
        }
        11 => {
            let mut file = Hashing::new(given::open(path)?);
            std::io::copy(&mut file, &mut std::io::sink())
                .with_context(|| format!("cannot read {}", path.display()))?;
            Ok(Extra::OciBlob(file.finish().0.to_string()))
        }
        _ => Ok(Extra::None),
    }
}

fn fingerprint(text: &str) -> Option<[u8; 20]> {
    if text.len() != 40 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 20];
    for (byte, at) in bytes.iter_mut().zip((0..40).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}
