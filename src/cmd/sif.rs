//! `sif list|header|info|dump`: what a SIF holds; what changes one is in `sif_edit`. What cannot be read is a wrong command line, as with the peers.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Persona, Usage, program, sif_edit, utc};
use crate::sif::{DataType, Descriptor, FsType, Link, PartType, Sif};
use crate::{exit, given, say};

const COMMANDS: [(&str, &str, usize); 4] = [
    ("list", "[--json] <sif>: the objects", 1),
    ("header", "<sif>: the header", 1),
    ("info", "<id> <sif>: all that is known of an object", 2),
    ("dump", "<id> <sif>: the bytes of an object", 2),
];

/// Runs `sif WORDS…`.
///
/// # Errors
/// [`Usage`] when the file is no SIF or has no such object.
pub fn run(words: &[OsString], persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let mut all = COMMANDS.iter().chain(&sif_edit::COMMANDS);
    let known = all.find(|(name, ..)| *name == verb);
    let wants_help = |word: &OsString| *word == "--help" || *word == "-h";
    if let Some((name, about, _)) = known
        && words.iter().any(wants_help)
    {
        let program = program(persona);
        say::out(format_args!("Usage:\n  {program} sif {name} {about}\n"))?;
        return Ok(exit::OK);
    }
    if sif_edit::COMMANDS.iter().any(|(name, ..)| *name == verb) {
        return sif_edit::run(verb, &words[1..]);
    }
    let mut rest: Vec<&OsString> = words.iter().skip(1).collect();
    let given = rest.len();
    rest.retain(|w| *w != "--json" && *w != "-j");
    let json = rest.len() < given;
    let Some((name, _, needed)) = COMMANDS.iter().find(|(name, ..)| *name == verb) else {
        let program = program(persona);
        say::out(format_args!("Usage:\n"))?;
        for (name, about, _) in COMMANDS.iter().chain(&sif_edit::COMMANDS) {
            say::out(format_args!("  {program} sif {name} {about}\n"))?;
        }
        return match verb {
            "help" | "--help" | "-h" => Ok(exit::OK),
            "" => Ok(exit::USAGE),
            _ => {
                let names = COMMANDS.iter().chain(&sif_edit::COMMANDS);
                let meant = super::similar(verb, names.map(|(name, ..)| *name));
                let text = format!("unknown command {verb:?}") + &super::did_you_mean(meant);
                Err(usage("sif", text))
            }
        };
    };
    if json && verb != "list" {
        return Err(usage(name, "unknown flag: --json"));
    }
    if rest.len() != *needed {
        let text = format!("accepts {needed} arg(s), received {}", rest.len());
        return Err(usage(name, text));
    }
    let path = Path::new(rest[needed - 1]);
    let open = || -> Result<(File, Sif)> {
        let file = given::open(path)?;
        let sif = Sif::read(&file)?;
        Ok((file, sif))
    };
    let (file, sif) = open()
        .map_err(|error| usage(name, say::plain(&format!("{}: {error:#}", path.display()))))?;
    let object = || {
        let id = rest[0].to_str().and_then(|id| id.parse().ok());
        sif.objects
            .iter()
            .find(|o| Some(o.id) == id)
            .ok_or_else(|| usage(name, "object not found"))
    };
    match verb {
        "list" if json => {
            super::print_json(&sif.objects.iter().map(Entry::of).collect::<Vec<_>>())?
        }
        "list" => list(&sif)?,
        "header" => header(&sif)?,
        "info" => info(object()?)?,
        _ => dump(&file, object()?)?,
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

/// An object, for programs.
#[derive(serde::Serialize)]
struct Entry<'a> {
    id: u32,
    group: Option<u32>,
    link: String,
    offset: u64,
    size: u64,
    kind: String,
    name: &'a str,
}

impl Entry<'_> {
    fn of(object: &Descriptor) -> Entry<'_> {
        Entry {
            id: object.id,
            group: object.group,
            link: link(object),
            offset: object.offset_bytes,
            size: object.len_bytes,
            kind: kind(object),
            name: &object.name,
        }
    }
}

fn list(sif: &Sif) -> Result<()> {
    let line = "-".repeat(78);
    say::out(format_args!(
        "{line}\n{:<5}|{:<8}|{:<8}|{:<26}|TYPE\n{line}\n",
        "ID", "GROUP", "LINK", "SIF POSITION (start-end)"
    ))?;
    for object in &sif.objects {
        let end = object.offset_bytes + object.len_bytes;
        say::out(format_args!(
            "{:<5}|{:<8}|{:<8}|{:<26}|{}\n",
            object.id,
            group(object),
            match object.link {
                Link::Group(group) => format!("{group:<4}(G)"),
                _ => link(object),
            },
            format!("{}-{end}", object.offset_bytes),
            kind(object)
        ))?;
    }
    Ok(())
}

fn group(object: &Descriptor) -> String {
    object
        .group
        .map_or("NONE".into(), |group| group.to_string())
}

fn link(object: &Descriptor) -> String {
    match object.link {
        Link::None => "NONE".into(),
        Link::Object(id) => id.to_string(),
        Link::Group(group) => format!("{group} (G)"),
    }
}

/// The name of an object's type, as `sif list` of the peers writes it.
fn kind(object: &Descriptor) -> String {
    if let Some(partition) = object.partition {
        let (fs, part) = (fs_name(partition.fs), part_name(partition.part));
        return format!("FS ({fs}/{part}/{})", partition.arch);
    }
    if let Some(signature) = &object.signature {
        return format!("Signature ({})", hash_name(signature.hash));
    }
    type_name(object.data_type).into()
}

fn type_name(data_type: DataType) -> &'static str {
    match data_type {
        DataType::Definition => "Def.FILE",
        DataType::Partition => "FS",
        DataType::Signature => "Signature",
        DataType::GenericJson => "JSON.Generic",
        DataType::OciRootIndex => "OCI.RootIndex",
        DataType::Other(0x4002) => "Env.Vars",
        DataType::Other(0x4003) => "JSON.Labels",
        DataType::Other(0x4007) => "Generic/Raw",
        DataType::Other(0x4008) => "Cryptographic Message",
        DataType::Other(0x4009) => "SBOM",
        DataType::Other(0x400b) => "OCI.Blob",
        DataType::Other(_) => "Unknown",
    }
}

fn fs_name(fs: FsType) -> &'static str {
    match fs {
        FsType::Squashfs => "Squashfs",
        FsType::Ext3 => "Ext3",
        FsType::Encrypted => "Encrypted squashfs",
        FsType::Other(3) => "Archive",
        FsType::Other(4) => "Raw",
        FsType::Other(_) => "Unknown",
    }
}

fn part_name(part: PartType) -> &'static str {
    match part {
        PartType::Primary => "*System",
        PartType::Data => "Data",
        PartType::Overlay => "Overlay",
        PartType::Other(1) => "System",
        PartType::Other(_) => "Unknown",
    }
}

fn hash_name(hash: i32) -> &'static str {
    match hash {
        1 => "SHA-256",
        2 => "SHA-384",
        3 => "SHA-512",
        4 => "BLAKE2s-256",
        5 => "BLAKE2b-256",
        _ => "unknown",
    }
}

fn header(sif: &Sif) -> Result<()> {
    let header = &sif.header;
    // Two lines are missing in a SIF without a root, and the columns are narrower.
    let rooted = sif.arch != "unknown";
    let width = if rooted || header.launches { 21 } else { 19 };
    let field = |name: &str, value: &str| field(name, width, value);
    if header.launches {
        field("Launch Script", "#!/usr/bin/env run-singularity")?;
    }
    field("Version", "01")?;
    if rooted {
        field("Primary Architecture", sif.arch)?;
    }
    field("ID", &uuid::Uuid::from_bytes(header.identity).to_string())?;
    field("Created At", &time(header.times_s.0))?;
    field("Modified At", &time(header.times_s.1))?;
    field("Descriptors Free", &header.slots.0.to_string())?;
    field("Descriptors Total", &header.slots.1.to_string())?;
    field("Descriptors Offset", &header.table.0.to_string())?;
    field("Descriptors Size", &size(header.table.1))?;
    field("Data Offset", &header.data.0.to_string())?;
    field("Data Size", &size(header.data.1))
}

fn field(name: &str, width: usize, value: &str) -> Result<()> {
    let name = format!("{name}:");
    let value = say::printable(value);
    say::out(format_args!("{name:<width$} {value}\n"))
}

fn time(seconds: i64) -> String {
    utc(seconds) + " +0000 UTC"
}

/// Bytes in the largest unit of 1024 that they fill.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    format!("{} {}", bytes >> (10 * unit), UNITS[unit as usize])
}

fn info(object: &Descriptor) -> Result<()> {
    // Two columns behind the longest name.
    let width = if object.partition.is_some() { 19 } else { 15 };
    let field = |name: &str, value: &str| field(&format!("  {name}"), width, value);
    field("Data Type", type_name(object.data_type))?;
    field("ID", &object.id.to_string())?;
    field("Group ID", &group(object))?;
    field("Linked ID", &link(object))?;
    field("Offset", &object.offset_bytes.to_string())?;
    field("Size", &object.len_bytes.to_string())?;
    field("Created At", &time(object.times_s.0))?;
    field("Modified At", &time(object.times_s.1))?;
    if !object.name.is_empty() {
        field("Name", &object.name)?;
    }
    if let Some(partition) = object.partition {
        field("Filesystem Type", fs_name(partition.fs))?;
        field("Partition Type", part_name(partition.part))?;
        field("Architecture", partition.arch)?;
    }
    if let Some(signature) = &object.signature {
        field("Hash Type", hash_name(signature.hash))?;
        let entity: String = signature
            .entity
            .iter()
            .map(|b| format!("{b:02X}"))
            .collect();
        field("Entity", &entity)?;
    }
    Ok(())
}

fn dump(file: &File, object: &Descriptor) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut part = vec![0; 1 << 20];
    let (mut at, end) = (object.offset_bytes, object.offset_bytes + object.len_bytes);
    while at < end {
        let want = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(part.len());
        let len = file
            .read_at(&mut part[..want], at)
            .with_context(|| format!("cannot read object {}", object.id))?;
        if len == 0 {
            bail!(
                "the file became shorter while object {} was read",
                object.id
            );
        }
        out.write_all(&part[..len])
            .context("cannot write to standard output")?;
        at += len as u64;
    }
    out.flush().context("cannot write to standard output")
}
