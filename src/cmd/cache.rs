//! `cache list|clean`: what was downloaded and converted. `cache warm`: reads into memory what the start of an image
//! needs, from a prolog or by hand.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use capsid_fuse::Archive;
use serde::Serialize;

use super::{Persona, parse_with_environment, prompt};
use crate::cache::usage::Entry;
use crate::cache::{Cache, Kind};
use crate::engine::profiles;
use crate::host::Host;
use crate::image::{self, Root};
use crate::{exit, say};

/// The commands below `cache`.
pub const COMMANDS: &[(&str, &str)] = &[
    ("list", "Show what the cache holds"),
    ("clean", "Remove what the cache holds"),
    ("warm", "Read into memory what the start of an image needs"),
];

/// Options of `cache list`.
#[derive(clap::Args, Debug)]
pub struct ListArgs {
    /// Of these kinds only: library, oci-tmp, oras, net, blob, build, profile, all
    #[arg(short = 'T', long = "type", value_name = "KIND", value_delimiter = ',')]
    kinds: Vec<String>,
    /// Each entry
    #[arg(short = 'v', long)]
    verbose: bool,
    /// As JSON
    #[arg(short = 'j', long)]
    json: bool,
}

/// Options of `cache clean`.
#[derive(clap::Args, Debug)]
pub struct CleanArgs {
    /// Of these kinds only: library, oci-tmp, oras, net, blob, build, profile, all
    #[arg(short = 'T', long = "type", value_name = "KIND", value_delimiter = ',')]
    kinds: Vec<String>,
    /// What was made before so many days only
    #[arg(short = 'D', long, value_name = "DAYS")]
    days: Option<u32>,
    /// Do not ask
    #[arg(short = 'f', long)]
    force: bool,
    /// Show what would be removed, and remove nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// As JSON: what was removed
    #[arg(short = 'j', long)]
    json: bool,
}

/// Options of `cache warm`.
#[derive(clap::Args, Debug)]
pub struct WarmArgs {
    /// Images
    #[arg(required = true)]
    images: Vec<PathBuf>,
}

/// Runs `cache WORDS…`.
///
/// # Errors
/// [`super::Usage`] for a wrong command line; anything else is fatal.
pub fn run(words: &[OsString], persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let rest = words.get(1..).unwrap_or_default();
    let host = Host::read()?;
    let command = format!("cache {verb}");
    match verb {
        "list" => list(&parse_with_environment(&command, rest, &host)?, &host),
        "clean" => clean(&parse_with_environment(&command, rest, &host)?, &host),
        "warm" => warm(&parse_with_environment(&command, rest, &host)?, &host),
        other => super::print_group(
            "cache",
            "Manage what was downloaded and converted",
            COMMANDS,
            other,
            persona,
        ),
    }
}

/// The kinds that are named; the peers' other names for them are understood.
fn kinds(names: &[String]) -> Result<Vec<Kind>> {
    let mut found = Vec::new();
    for name in names {
        match name.as_str() {
            "all" => found.extend(Kind::ALL),
            "oci" => found.push(Kind::OciTmp),
            "blobs" => found.push(Kind::Blob),
            // Kinds of the peers that cannot be here.
            "shub" | "ipfs" => {}
            name => match Kind::ALL.into_iter().find(|k| k.name() == name) {
                Some(kind) => found.push(kind),
                None => bail!(
                    "not a valid type {name:?}: library, oci-tmp, oras, net, blob, build, profile, all"
                ),
            },
        }
    }
    if names.is_empty() {
        found.extend(Kind::ALL);
    }
    found.sort();
    found.dedup();
    Ok(found)
}

#[derive(Serialize)]
struct Row {
    #[serde(rename = "type")]
    kind: &'static str,
    name: String,
    path: String,
    size: u64,
    /// Seconds since 1970.
    created: u64,
    used: u64,
}

impl Row {
    fn of(entry: &Entry) -> Row {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Row {
            kind: entry.kind.name(),
            name: entry.name.clone(),
            path: entry.path.display().to_string(),
            size: entry.size_bytes,
            created: seconds(entry.made),
            used: seconds(entry.used),
        }
    }
}

fn list(args: &ListArgs, host: &Host) -> Result<u8> {
    let kinds = kinds(&args.kinds)?;
    let cache = Cache::at(&host.cache_root());
    let entries = cache.list(&kinds)?;
    if args.json {
        let rows: Vec<Row> = entries.iter().map(Row::of).collect();
        super::print_json(&rows)?;
        return Ok(exit::OK);
    }
    if args.verbose {
        say::out(format_args!(
            "{:<24} {:<22} {:<16} TYPE\n",
            "NAME", "DATE CREATED", "SIZE"
        ))?;
        for entry in &entries {
            let made = Row::of(entry).created;
            let name: String = entry.name.chars().take(22).collect();
            say::out(format_args!(
                "{:<24} {:<22} {:<16} {}\n",
                say::printable(&name),
                super::utc(i64::try_from(made).unwrap_or(0)),
                size(entry.size_bytes),
                entry.kind.name()
            ))?;
        }
        say::out(format_args!("\n"))?;
    }
    say::out(format_args!("{}", sums(&entries, &kinds)))?;
    Ok(exit::OK)
}

/// Of the kinds that were asked for, in the peers' words. Profiles are no containers.
fn sums(entries: &[Entry], kinds: &[Kind]) -> String {
    let sum = |of: &dyn Fn(Kind) -> bool| {
        let chosen = entries.iter().filter(|e| of(e.kind));
        chosen.fold((0, 0), |(n, bytes), e| (n + 1, bytes + e.size_bytes))
    };
    let is_file = |kind: Kind| !matches!(kind, Kind::Blob | Kind::Profile);
    let mut parts = Vec::new();
    if kinds.iter().any(|kind| *kind != Kind::Blob) {
        let (files, bytes) = sum(&is_file);
        parts.push(format!("{files} container file(s) using {}", size(bytes)));
    }
    if kinds.contains(&Kind::Blob) {
        let (blobs, bytes) = sum(&|kind| kind == Kind::Blob);
        parts.push(format!("{blobs} oci blob file(s) using {}", size(bytes)));
    }
    let total = sum(&|_| true).1;
    format!(
        "There are {} of space\nTotal space used: {}\n",
        parts.join(" and "),
        size(total)
    )
}

/// As the peers write sizes.
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.2} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes:.2} B"),
    }
}

fn clean(args: &CleanArgs, host: &Host) -> Result<u8> {
    let kinds = kinds(&args.kinds)?;
    let cache = Cache::at(&host.cache_root());
    if !args.force && !args.dry_run && !confirmed(&cache)? {
        say::info(format_args!("Handle cleanup canceled"));
        return Ok(exit::OK);
    }
    let before = args.days.and_then(|days| {
        SystemTime::now().checked_sub(Duration::from_secs(u64::from(days) * 86400))
    });
    let mut gone = Vec::new();
    for kind in kinds {
        let mut entries = cache.list(&[kind])?;
        entries.retain(|e| before.is_none_or(|limit| e.made < limit));
        if entries.is_empty() {
            say::info(format_args!(
                "No cached files to remove at {}",
                cache.root().join(kind.name()).display()
            ));
        }
        for entry in entries {
            say::info(format_args!(
                "Removing {} cache entry: {}",
                kind.name(),
                entry.name
            ));
            if !args.dry_run {
                cache.remove(&entry)?;
            }
            gone.push(Row::of(&entry));
        }
    }
    if args.json {
        super::print_json(&gone)?;
    }
    Ok(exit::OK)
}

fn confirmed(cache: &Cache) -> Result<bool> {
    eprintln!(
        "This will delete everything in your cache (containers from all sources and OCI blobs).\nHint: You can see exactly what would be deleted by canceling and using the --dry-run option. ({})",
        say::printable(&cache.root().display().to_string())
    );
    prompt::confirm("Do you want to continue?")
}

fn warm(args: &WarmArgs, host: &Host) -> Result<u8> {
    let place = host.profiles();
    for path in &args.images {
        let Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        } = image::open(path)?.root()
        else {
            bail!("{} has no squashfs to warm", path.display());
        };
        let what = || format!("cannot read image {}", path.display());
        let open = File::open(&file).with_context(what)?;
        let archive = Archive::open(open, offset_bytes, Some(len_bytes)).with_context(what)?;
        let (bytes, by_profile) = archive
            .warm(place.as_deref().and_then(profiles::directory))
            .with_context(what)?;
        let how = match by_profile {
            true => "that earlier starts have read",
            false => "of names and attributes; no start of it is known yet",
        };
        say::info(format_args!(
            "{}: {} KiB {how}",
            path.display(),
            bytes >> 10
        ));
    }
    Ok(exit::OK)
}
