//! `build`: an image from a definition file, another image, or an address.

use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::transfer::{self, Access, Machine};
use crate::build::deffile::{self, Def, Unused};
use crate::build::ids::{Ids, Subordinate};
use crate::build::room::Room;
use crate::build::steps::Steps;
use crate::build::{self, Form, Net, Part, Settings, Write};
use crate::cache::Cache;
use crate::host::{Host, normalise};
use crate::oci::Platform;
use crate::plan::bind;
use crate::squash::{Compression, Options};
use crate::{exit, gpu, image, say};

/// Options of `build`, exactly as typed.
// The hidden options are refused or without effect; they have no help to write.
#[allow(missing_docs)]
#[derive(clap::Args, Debug, Default)]
pub struct BuildArgs {
    /// Make a directory instead of a SIF
    #[arg(short = 's', long, help_heading = "Result")]
    pub sandbox: bool,
    /// Build upon the directory that is there: no bootstrap
    #[arg(short = 'u', long, help_heading = "Result")]
    pub update: bool,
    /// Replace an existing image, and labels of the base
    #[arg(short = 'F', long, help_heading = "Result")]
    pub force: bool,
    /// Compressor of the SIF: gzip, zstd, xz or lz4, with a level as in zstd:19 [default: gzip:9]
    #[arg(long, value_name = "NAME[:LEVEL]", help_heading = "Result")]
    pub compression: Option<String>,
    /// Bytes of a block: 4K to 1M [default: 128K]
    #[arg(long, value_name = "SIZE", help_heading = "Result")]
    pub block_size: Option<String>,
    /// Options of mksquashfs: -comp, -Xcompression-level, -b, -processors
    #[arg(long, value_name = "ARGS", help_heading = "Result")]
    pub mksquashfs_args: Option<String>,
    /// Equal input gives equal bytes: no time in the image is later than SOURCE_DATE_EPOCH, else 1970
    #[arg(long, help_heading = "Result")]
    pub reproducible: bool,
    /// Give the owner read and write permission on everything
    #[arg(long, help_heading = "Result")]
    pub fix_perms: bool,

    /// Run only these sections: setup, post, files, environment, test, labels, none
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        help_heading = "Definition"
    )]
    pub section: Vec<String>,
    /// Do not run %test
    #[arg(short = 'T', long, help_heading = "Definition")]
    pub notest: bool,
    /// The definition is JSON
    #[arg(long, help_heading = "Definition")]
    pub json: bool,
    /// Value of {{ NAME }} in the definition: NAME=VALUE
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Definition")]
    pub build_arg: Vec<String>,
    /// File with NAME=VALUE lines
    #[arg(long, value_name = "FILE", help_heading = "Definition")]
    pub build_arg_file: Vec<PathBuf>,
    /// An unused --build-arg is no error
    #[arg(long, help_heading = "Definition")]
    pub warn_unused_build_args: bool,

    /// Bind a host path for %post and %test: src[:dst[:opt[,opt]]]
    #[arg(short = 'B', long, value_name = "SPEC", help_heading = "Sections")]
    pub bind: Vec<String>,
    /// Mount in the form type=bind,source=SRC,destination=DST[,ro]
    #[arg(long, value_name = "SPEC", help_heading = "Sections")]
    pub mount: Vec<String>,
    /// NVIDIA's libraries and devices for %post and %test
    #[arg(long, help_heading = "Sections")]
    pub nv: bool,
    /// AMD's libraries and devices for %post and %test
    #[arg(long, help_heading = "Sections")]
    pub rocm: bool,
    /// %test may write to memory
    #[arg(long, help_heading = "Sections")]
    pub writable_tmpfs: bool,
    /// Keep the owners of an image that is unpacked to a directory (definitions always build as root)
    #[arg(short = 'f', long, help_heading = "Sections")]
    pub fakeroot: bool,
    /// Emulate ownership although there are subordinate ids
    #[arg(long, help_heading = "Sections")]
    pub ignore_subuid: bool,

    /// Architecture of the image, as in amd64 or arm64
    #[arg(long = "arch", value_name = "ARCH", help_heading = "Sources")]
    pub build_arch: Option<String>,
    /// Variant of the architecture, as in v7
    #[arg(
        long = "arch-variant",
        value_name = "VARIANT",
        help_heading = "Sources"
    )]
    pub build_arch_variant: Option<String>,
    #[command(flatten)]
    pub access: Access,
    /// Library to fetch from: an address
    #[arg(long, value_name = "URL", help_heading = "Sources")]
    pub library: Option<String>,
    /// Keep no steps, and use none
    #[arg(long, visible_alias = "no-cache", help_heading = "Sources")]
    pub disable_cache: bool,
    /// Directory for temporary files [default: $TMPDIR, else /tmp]
    #[arg(long, value_name = "DIR", help_heading = "Sources")]
    pub tmpdir: Option<PathBuf>,
    /// Leave the temporary files of a failed build
    #[arg(long, help_heading = "Sources")]
    pub no_cleanup: bool,

    #[arg(long, hide = true)]
    pub userns: bool,
    #[arg(long, hide = true)]
    pub ignore_fakeroot_command: bool,
    #[arg(long, hide = true)]
    pub ignore_userns: bool,
    #[arg(long, hide = true)]
    pub ignore_proot: bool,
    #[arg(short = 'e', long, hide = true)]
    pub encrypt: bool,
    #[arg(long, hide = true)]
    pub passphrase: bool,
    #[arg(long, hide = true)]
    pub pem_path: Option<PathBuf>,
    #[arg(long, hide = true)]
    pub nvccli: bool,
    #[arg(long, hide = true)]
    pub data: bool,
    #[arg(long, hide = true)]
    pub compat32: bool,
    #[arg(long, hide = true)]
    pub buildkit_host: Option<String>,
    #[arg(short = 'r', long, hide = true)]
    pub remote: bool,
    #[arg(short = 'd', long, hide = true)]
    pub detached: bool,
    #[arg(long, hide = true)]
    pub builder: Option<String>,
    #[arg(long, hide = true)]
    pub oci: bool,
    #[arg(long, hide = true)]
    pub no_oci: bool,
    #[arg(long, hide = true)]
    pub keep_layers: bool,
    #[arg(long, hide = true)]
    pub no_setgroups: bool,
}

impl BuildArgs {
    /// An option that cannot be honoured, with the reason.
    fn refusal(&self) -> Option<(&'static str, &'static str)> {
        let encryption = "images cannot be encrypted by this version";
        let remote = "there is no remote build service: leave it out to build here";
        let oci = "OCI-SIF images cannot be made: leave it out for a SIF";
        let cases = [
            (self.encrypt, "--encrypt", encryption),
            (self.passphrase, "--passphrase", encryption),
            (self.pem_path.is_some(), "--pem-path", encryption),
            (self.nvccli, "--nvccli", "use --nv"),
            (
                self.data,
                "--data",
                "build a SIF, and bind it with image-src",
            ),
            (
                self.compat32,
                "--compat32",
                "32-bit identity is not needed here: leave it out",
            ),
            (
                self.buildkit_host.is_some(),
                "--buildkit-host",
                "build with podman or buildah, and use an oci-archive",
            ),
            (self.remote, "--remote", remote),
            (self.detached, "--detached", remote),
            (self.builder.is_some(), "--builder", remote),
            (self.oci, "--oci", oci),
            (self.keep_layers, "--keep-layers", oci),
        ];
        cases
            .into_iter()
            .find(|(given, ..)| *given)
            .map(|(_, option, why)| (option, why))
    }
}

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
    let left = room.leftovers();
    let left: &[PathBuf] = if args.no_cleanup { &left[1..] } else { &left };
    let status = build::build(&def, &settings, &room, left);
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

/// Where a definition comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A file with its sections.
    Definition,
    /// An image or an address: a definition of two lines.
    Image,
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

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

/// Reads the source: an image and an address become a definition of two lines.
fn definition(args: &BuildArgs, source: &OsStr, text: &str, host: &Host) -> Result<(Def, Origin)> {
    let what = || format!("Unable to build from {text}");
    let path = host.cwd.join(source);
    let there = std::fs::metadata(&path);
    if there.is_err()
        && let Some((agent, from)) = address(text)
    {
        return Ok((two_lines(&agent, &from)?, Origin::Image));
    }
    let meta = there
        .map_err(|error| {
            anyhow!(
                "unable to open file {text}: open {text}: {}",
                say::word(&error)
            )
        })
        .with_context(what)?;
    if meta.is_dir() || looks_like_image(&path).with_context(what)? {
        image::open(&path).with_context(what)?;
        return Ok((two_lines("localimage", text)?, Origin::Image));
    }
    let bytes = read(&path).with_context(what)?;
    let parsed = if args.json {
        deffile::parse_json(text, &bytes)
    } else {
        let unused = if args.warn_unused_build_args {
            Unused::Warn
        } else {
            Unused::Refuse
        };
        deffile::parse(text, &bytes, &build_args(args, host)?, unused)
    };
    let def = parsed
        .context("while parsing definition")
        .with_context(what)?;
    Ok((def, Origin::Definition))
}

/// The agent and the rest of an address.
fn address(text: &str) -> Option<(String, String)> {
    let (scheme, rest) = text.split_once(':')?;
    match scheme {
        "docker" | "library" | "oras" | "shub" => {
            Some((scheme.into(), rest.strip_prefix("//")?.into()))
        }
        "http" | "https" => Some((scheme.into(), rest.strip_prefix("//")?.into())),
        "docker-daemon" | "docker-archive" | "oci" | "oci-archive" => Some((
            scheme.into(),
            rest.strip_prefix("//").unwrap_or(rest).into(),
        )),
        "instance" => Some(("localimage".into(), text.into())),
        _ => None,
    }
}

/// A definition that stands for "just this image".
fn two_lines(agent: &str, from: &str) -> Result<Def> {
    if from.contains(['\n', '\r']) {
        bail!("{from:?}: a name with a line end cannot be built from");
    }
    let mut stage = deffile::Stage {
        text: format!("bootstrap: {agent}\nfrom: {from}\n\n"),
        ..deffile::Stage::default()
    };
    stage.header.insert("bootstrap".into(), agent.into());
    stage.header.insert("from".into(), from.into());
    Ok(Def {
        stages: vec![stage],
        warnings: Vec::new(),
    })
}

/// Whether a file begins as no text does.
fn looks_like_image(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path)?
        .take(512)
        .read_to_end(&mut head)?;
    Ok(head.contains(&0)
        || head.starts_with(b"hsqs")
        || head.starts_with(b"#!/usr/bin/env run-singularity"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    file.take(deffile::MAX_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > deffile::MAX_LEN {
        bail!(
            "larger than {} MiB: this is no definition",
            deffile::MAX_LEN >> 20
        );
    }
    Ok(bytes)
}

/// Build arguments: those of files first, as those of the command line beat them.
fn build_args(args: &BuildArgs, host: &Host) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    for file in &args.build_arg_file {
        let path = host.cwd.join(file);
        let shown = file.display().to_string();
        let bytes =
            read(&path).with_context(|| format!("cannot read {shown} (--build-arg-file)"))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| anyhow!("{shown}: not UTF-8 (--build-arg-file)"))?;
        pairs.extend(deffile::template::pairs(&shown, &text)?);
    }
    for text in &args.build_arg {
        pairs.push(deffile::template::pair(text).context("--build-arg")?);
    }
    Ok(pairs)
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
    let epoch = epoch(&host)?;
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
        Steps::open(&transfer::cache_root(&host))
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

/// `SOURCE_DATE_EPOCH` (reproducible-builds.org).
fn epoch(host: &Host) -> Result<Option<i64>> {
    let Some(text) = host.var("SOURCE_DATE_EPOCH").filter(|v| !v.is_empty()) else {
        return Ok(None);
    };
    let number = text.to_str().and_then(|t| t.parse::<u32>().ok());
    match number {
        Some(number) => Ok(Some(number.into())),
        None => bail!("SOURCE_DATE_EPOCH={text:?}: seconds since 1970 are wanted"),
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
    let root = transfer::cache_root(host);
    let opened = match args.disable_cache {
        true => None,
        false => Cache::open(&root)
            .inspect_err(|error| say::warn(format_args!("the cache is not used: {error:#}")))
            .ok(),
    };
    let cache = match opened {
        Some(cache) => cache,
        None => Cache::open(&own)?,
    };
    Ok(Some(Net { options, cache }))
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
    if args.notest {
        parts.retain(|part| *part != Part::Test);
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
            "-noappend" | "-no-progress" | "-quiet" | "-all-root" | "-no-recovery" => {}
            other => bail!(
                "{other} is not supported: images are written without mksquashfs; -comp, -Xcompression-level, -b and -processors are understood"
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
