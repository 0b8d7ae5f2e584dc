//! `build`: an image from a definition file, another image, or an address.

mod args;
mod definition;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

pub use args::BuildArgs;
use definition::{Origin, definition};

use super::transfer::{self, Machine};
use crate::build::deffile::{self, Def};
use crate::build::ids::{Ids, Subordinate};
use crate::build::room::Room;
use crate::build::steps::Steps;
use crate::build::{self, Form, Net, Part, Settings, Write};
use crate::cache::Cache;
use crate::host::{Host, normalise};
use crate::oci::Platform;
use crate::plan::bind;
use crate::squash::{Compression, Options};
use crate::{exit, given, gpu, say};

/// Builds an image. `words` are the target and the source.
///
/// # Errors
/// Whatever is wrong with the options, the source or the machine; in the peers' words where clients read them.
pub fn run(args: &BuildArgs, words: &[OsString], host: Host) -> Result<u8> {
    if let Some((option, why)) = args.refusal() {
        bail!("{option} is not supported: {why}");
    }
    let [target, source] = words else {
        return Err(super::Usage {
            command: "build".into(),
            text: format!("accepts 2 arg(s), received {}", words.len()),
        }
        .into());
    };
    let target = target_path(target, &host)?;
    let form = form(args);
    check_target(&target, &words[0].to_string_lossy(), form, args.force)
        .context("While checking build target")?;
    let source_text = source.to_string_lossy().into_owned();
    let (def, from_text) = definition(args, source, &source_text, &host)?;
    for warning in &def.warnings {
        say::warn(format_args!("{warning}"));
    }
    let mut settings = settings(args, host, target, form, &def, from_text)?;
    let temporary = args.tmpdir.clone().unwrap_or_else(std::env::temp_dir);
    let temporary = settings.host.cwd.join(temporary);
    say::info(format_args!("Starting build..."));
    if from_text == Origin::Definition {
        settings.ids.tell(&settings.host);
    }
    let room = Room::create(&temporary, &settings.target).context("Unable to create build")?;
    settings.net = match net(args, &def, &settings, &room) {
        Ok(net) => net,
        Err(error) => {
            room.remove();
            return Err(error);
        }
    };
    let mut left = vec![room.beside.clone()];
    if !args.no_cleanup {
        left.push(room.temporary.clone());
    }
    left.extend(settings.steps.iter().map(|steps| steps.draft().to_owned()));
    let status = build::build(&def, &settings, &room, &left);
    if args.no_cleanup {
        say::info(format_args!(
            "Temporary files are left in {} (--no-cleanup)",
            room.temporary.display()
        ));
    }
    let status = status?;
    if status == exit::OK {
        say::info(format_args!("Build complete: {}", words[0].display()));
    }
    Ok(status)
}

fn target_path(target: &OsString, host: &Host) -> Result<PathBuf> {
    if target.is_empty() {
        bail!("the name of the image to be made is empty");
    }
    if let Some((scheme, _)) = target.to_str().and_then(|t| t.split_once("://")) {
        bail!(
            "build target {target:?}: an image is built into a file, and pushed afterwards ({scheme}:// is no file)"
        );
    }
    Ok(normalise(&host.cwd.join(target)))
}

fn form(args: &BuildArgs) -> Form {
    match (args.update, args.sandbox) {
        (true, _) => Form::Update,
        (false, true) => Form::Sandbox,
        (false, false) => Form::Sif,
    }
}

fn check_target(target: &Path, shown: &str, form: Form, force: bool) -> Result<()> {
    let meta = match std::fs::symlink_metadata(target) {
        Ok(meta) => meta,
        Err(_) if form == Form::Update => bail!("--update: there is no sandbox {shown}"),
        Err(_) => return Ok(()),
    };
    let sandbox = target.join(".singularity.d").is_dir();
    if force && form != Form::Update && !meta.is_dir() {
        check_replaced(target)
            .with_context(|| format!("build target '{shown}' is not overwritten"))?;
    }
    match form {
        Form::Update if sandbox => Ok(()),
        Form::Update => bail!("--update: {shown} is no sandbox (it has no .singularity.d)"),
        _ if !force => {
            bail!("build target '{shown}' already exists. Use --force if you want to overwrite it")
        }
        Form::Sif if meta.is_dir() => {
            bail!(
                "build target '{shown}' is a directory: remove it, or use --sandbox to make a directory"
            )
        }
        Form::Sandbox if meta.is_dir() && !sandbox && !is_empty(target) => {
            bail!("build target '{shown}' is a directory that is no sandbox: it is not overwritten")
        }
        Form::Sandbox | Form::Sif => Ok(()),
    }
}

/// What `--force` replaces is a file, and no definition: with target and source swapped it would be somebody's work.
fn check_replaced(target: &Path) -> Result<()> {
    let file = match given::open(target) {
        Ok(file) => file,
        // A link that leads to nothing.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if definition::is_definition(target, &file)? {
        bail!(
            "it is a definition: the image comes first, what it is made from behind it (build IMAGE SOURCE)"
        );
    }
    Ok(())
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

fn settings(
    args: &BuildArgs,
    host: Host,
    target: PathBuf,
    form: Form,
    def: &Def,
    origin: Origin,
) -> Result<Settings> {
    let arch = match &args.build_arch {
        Some(name) => known_arch(name)?,
        None => host.arch,
    };
    let now_s = crate::instance::now_s();
    let epoch = transfer::epoch(&host)?;
    let time_s = epoch.unwrap_or(if args.reproducible { 0 } else { now_s });
    let reproducible = args.reproducible || epoch.is_some();
    let subordinate = if args.ignore_subuid {
        Subordinate::Ignore
    } else {
        Subordinate::Use
    };
    // Without a definition a directory belongs to who makes it, as the peers have it, and can be removed by them.
    let own = origin == Origin::Image && form == Form::Sandbox && !args.fakeroot && host.uid != 0;
    let ids = if own {
        Ids::Single
    } else {
        Ids::choose(&host, subordinate)
    };
    let steps = if args.disable_cache
        || def
            .stages
            .iter()
            .all(|s| s.post.is_empty() && s.apps.is_empty() && !is_tool(s))
    {
        None
    } else {
        Steps::open(&host.cache_root())
    };
    let mut binds = Vec::new();
    for text in &args.bind {
        binds.extend(bind::parse_binds(text).context("While setting bind mount configuration")?);
    }
    for text in &args.mount {
        binds.push(bind::parse_mount(text).context("While setting bind mount configuration")?);
    }
    if let Some(bind) = binds
        .iter()
        .find(|b| b.image_src.is_some() || b.id.is_some())
    {
        bail!(
            "--bind {}: images cannot be bound while building: unpack it, or use Bootstrap: localimage and %files from",
            bind.source.display()
        );
    }
    Ok(Settings {
        arch,
        platform: Platform {
            architecture: arch.into(),
            os: "linux".into(),
            variant: args.build_arch_variant.clone(),
        },
        target,
        form,
        force: args.force,
        parts: parts(args)?,
        run_test: !args.notest,
        fix_perms: args.fix_perms,
        binds,
        gpu: gpu::find(args.nv, args.rocm),
        test_root: if args.writable_tmpfs {
            Write::Tmpfs
        } else {
            Write::Nothing
        },
        ids,
        time_s,
        now_s,
        reproducible,
        options: options(args, reproducible.then_some(time_s))?,
        steps,
        net: None,
        describe: super::inspect::describe,
        host,
    })
}

fn is_tool(stage: &deffile::Stage) -> bool {
    let agent = stage
        .key("bootstrap")
        .unwrap_or_default()
        .to_ascii_lowercase();
    ["debootstrap", "yum", "dnf", "zypper", "arch"].contains(&agent.as_str())
}

fn known_arch(name: &str) -> Result<&'static str> {
    const KNOWN: [&str; 13] = [
        "386", "amd64", "arm", "arm64", "ppc64", "ppc64le", "mips", "mipsle", "mips64", "mips64le",
        "s390x", "riscv64", "loong64",
    ];
    match KNOWN.iter().find(|known| **known == name) {
        Some(known) => Ok(known),
        None => bail!("--arch {name:?}: known ones are {}", KNOWN.join(", ")),
    }
}

/// The way to registries, where a stage needs one. Without a cache what is fetched goes with the room.
fn net(args: &BuildArgs, def: &Def, settings: &Settings, room: &Room) -> Result<Option<Net>> {
    const AGENTS: [&str; 6] = ["docker", "library", "oras", "http", "https", "busybox"];
    let needed = |stage: &deffile::Stage| {
        let agent = stage
            .key("bootstrap")
            .unwrap_or_default()
            .to_ascii_lowercase();
        AGENTS.contains(&agent.as_str())
    };
    if !def.stages.iter().any(needed) {
        return Ok(None);
    }
    let machine = Machine {
        arch: Some(settings.arch.to_owned()),
        variant: args.build_arch_variant.clone(),
        platform: None,
    };
    let host = &settings.host;
    let options = transfer::options(host, &args.access, &machine, args.library.as_deref())?;
    let own = room.temporary.join("cache");
    let root = host.cache_root();
    let opened = match args.disable_cache {
        true => None,
        false => Cache::open(&root)
            .inspect_err(|error| say::warn(format_args!("Cache disabled: {error:#}")))
            .ok(),
    };
    let cache = match opened {
        Some(cache) => cache,
        None => Cache::open(&own)?,
    };
    Ok(Some(Net {
        options,
        cache,
        spare: own,
    }))
}

fn parts(args: &BuildArgs) -> Result<Vec<Part>> {
    const ALL: [(&str, Part); 6] = [
        ("setup", Part::Setup),
        ("files", Part::Files),
        ("post", Part::Post),
        ("environment", Part::Environment),
        ("labels", Part::Labels),
        ("test", Part::Test),
    ];
    let names: Vec<&str> = args.section.iter().map(String::as_str).collect();
    let mut parts = Vec::new();
    if names.is_empty() || names.contains(&"all") {
        parts = ALL.map(|(_, part)| part).to_vec();
    } else if names.contains(&"none") {
        if names.len() > 1 {
            bail!("--section none excludes other sections");
        }
    } else {
        for name in names {
            match ALL.iter().find(|(known, _)| *known == name) {
                Some((_, part)) => parts.push(*part),
                None => bail!(
                    "--section {name:?}: known ones are all, none, {}",
                    ALL.map(|(n, _)| n).join(", ")
                ),
            }
        }
    }
    Ok(parts)
}

/// How the file system is written.
fn options(args: &BuildArgs, fixed: Option<i64>) -> Result<Options> {
    let mut options = Options::default();
    let time = fixed.and_then(|t| u32::try_from(t).ok());
    (options.time_s, options.clamp_s) = (time, time);
    if let Some(text) = &args.mksquashfs_args {
        mksquashfs(text, &mut options).with_context(|| format!("--mksquashfs-args {text:?}"))?;
    }
    if let Some(text) = &args.compression {
        options.compression = text.parse().context("--compression")?;
    }
    if let Some(text) = &args.block_size {
        options.block_bytes = block_size(text).context("--block-size")?;
    }
    Ok(options)
}

fn block_size(text: &str) -> Result<u32> {
    let bytes = crate::plan::limits::size(text)?;
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    if !bytes.is_power_of_two() || !(4 << 10..=1 << 20).contains(&bytes) {
        bail!("{text:?}: a power of two from 4K to 1M is wanted");
    }
    Ok(bytes)
}

/// What the options of `mksquashfs` mean here.
fn mksquashfs(text: &str, options: &mut Options) -> Result<()> {
    let words = deffile::words(text)?;
    let mut words = words.iter();
    let (mut name, mut level) = (None, None);
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "-comp" => name = Some(value()?.clone()),
            "-Xcompression-level" => level = Some(value()?.clone()),
            "-b" => options.block_bytes = block_size(value()?)?,
            "-processors" => options.threads = value()?.parse().context("-processors")?,
            "-no-fragments" => options.fragments = false,
            "-noappend" | "-no-progress" | "-quiet" | "-all-root" | "-no-recovery" => {}
            other => bail!(
                "{other} is not supported: images are written without mksquashfs; -comp, -Xcompression-level, -b, -no-fragments and -processors are understood"
            ),
        }
    }
    if name.is_none() && level.is_none() {
        return Ok(());
    }
    let name = name.unwrap_or_else(|| "gzip".into());
    let text = level.map_or_else(|| name.clone(), |level| format!("{name}:{level}"));
    options.compression = text.parse::<Compression>()?;
    Ok(())
}
