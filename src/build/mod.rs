//! Making images: a definition becomes a root file system, stage by stage, and that a SIF or a directory.
//!
//! ```text
//!  %pre (host) → bootstrap → applications → %files from stages → %setup (host) → %files → %post → metadata → %test → pack
//! ```
//!
//! All of it runs as root of a user namespace, in the processes that [`keeper`] draws.

mod apps;
pub mod bootstrap;
mod braces;
pub mod convert;
mod copy;
pub mod deffile;
mod files;
mod glob;
pub mod ids;
pub mod keeper;
mod metadata;
mod owners;
pub mod pack;
pub mod room;
mod sections;
pub mod steps;
mod tree;
mod unpack;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::digest::Digest;
use crate::engine::emulate::Owners;
use crate::host::Host;
use crate::net;
use crate::oci::config::Origin;
use crate::oci::{Image, Platform};
use crate::plan::Bind;
use crate::sif::{Content, DataType, Stamp};
use crate::squash::{self, Options, Scan};
use crate::{exit, say};
use deffile::{Def, Stage};
use ids::Ids;
use room::Room;
pub use sections::Write;
use steps::Steps;
use tree::Tree;

/// Permission bits that files of an image lack, whatever the caller's mask is: others shall be able to run it.
const UMASK: u32 = 0o022;

/// A part of a definition that `--section` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `%pre` and `%setup`.
    Setup,
    /// `%files`.
    Files,
    /// `%post`.
    Post,
    /// `%environment`.
    Environment,
    /// `%labels`.
    Labels,
    /// `%test`.
    Test,
}

/// What is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A SIF.
    Sif,
    /// A directory.
    Sandbox,
    /// A directory that is there, which is built upon (`--update`).
    Update,
}

/// How a definition is built.
pub struct Settings {
    /// The caller and the machine.
    pub host: Host,
    /// Go's name of the architecture of the image.
    pub arch: &'static str,
    /// The same for OCI images.
    pub platform: Platform,
    /// Absolute path of what is made.
    pub target: PathBuf,
    /// What is made.
    pub form: Form,
    /// Labels may replace those of the base.
    pub force: bool,
    /// Parts to be run; metadata that has no name here is always written.
    pub parts: Vec<Part>,
    /// `%test` is run, and not only kept in the image.
    pub run_test: bool,
    /// Files and directories get read and write permission for their owner.
    pub fix_perms: bool,
    /// `--bind` and `--mount` for `%post` and `%test`.
    pub binds: Vec<Bind>,
    /// Host paths for `--nv` and `--rocm`.
    pub gpu: Vec<(PathBuf, PathBuf)>,
    /// What `%test` may write to.
    pub test_root: Write,
    /// How owners come into the image.
    pub ids: Ids,
    /// The time of the build that the image tells, seconds since 1970.
    pub time_s: i64,
    /// The clock.
    pub now_s: i64,
    /// Two builds shall give the same bytes.
    pub reproducible: bool,
    /// How the file system is written.
    pub options: Options,
    /// Steps that are kept.
    pub steps: Option<Steps>,
    /// Registries and the like, when a stage needs them.
    pub net: Option<Net>,
    /// Gives what `inspect --all --json` says of an image.
    pub describe: fn(&Path) -> Result<Vec<u8>>,
}

/// How images are fetched.
pub struct Net {
    /// The way.
    pub options: net::Options,
    /// What was fetched.
    pub cache: Cache,
    /// Where a cache for this build only goes, when the disk of the other is full.
    pub spare: PathBuf,
}

impl Net {
    /// Fetches something into the cache.
    ///
    /// # Errors
    /// When it cannot be had.
    fn fetch<T>(&self, work: impl Fn(&net::Options, &Cache) -> Result<T>) -> Result<T> {
        // It is made when it is needed first, maybe by another process of this build.
        if self.cache.root() == self.spare || !self.spare.is_dir() {
            match work(&self.options, &self.cache) {
                Err(error) if crate::cache::is_full(&error) && self.cache.root() != self.spare => {
                    say::warn(format_args!("Cache disabled: {error:#}"));
                }
                done => return done,
            }
        }
        work(&self.options, &Cache::open(&self.spare)?)
    }
}

impl Settings {
    /// The way to registries and the like.
    fn net(&self) -> Result<&Net> {
        self.net
            .as_ref()
            .context("no way to registries was prepared")
    }

    fn wants(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// What tells the SIF from others.
    fn stamp(&self) -> Stamp {
        let identity = match self.reproducible {
            true => [0; 16],
            false => uuid::Uuid::new_v4().into_bytes(),
        };
        Stamp {
            time_s: self.time_s,
            identity,
        }
    }
}

/// A stage that is done.
struct Made {
    name: Option<String>,
    root: PathBuf,
    /// What tells its content; `None` when nothing does.
    key: Option<String>,
}

/// Builds a definition in `room`. What `left` names of it is gone afterwards.
///
/// # Errors
/// Naming the section that failed, or what cannot be read or written; then a target that was there stays as it was.
pub fn build(def: &Def, settings: &Settings, room: &Room, left: &[PathBuf]) -> Result<u8> {
    let before = || {
        for stage in &def.stages {
            bootstrap::fetch(stage, settings).context("While performing build")?;
        }
        Ok(exit::OK)
    };
    keeper::run(&settings.ids.map(&settings.host), left, before, || {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(UMASK));
        pipeline(def, settings, room)?;
        Ok(exit::OK)
    })
}

fn pipeline(def: &Def, settings: &Settings, room: &Room) -> Result<()> {
    let what = "While performing build";
    if let [stage] = def.stages.as_slice()
        && settings.form == Form::Sif
        && stage.is_bare()
        && !settings.fix_perms
        && bootstrap::has_layers(stage)
    {
        let base = bootstrap::prepare(stage, &room.temporary, settings).context(what)?;
        if let bootstrap::Kind::Layers(image, origin) = base.kind {
            return convert_layers(&image, &origin, settings, room).context(what);
        }
    }
    let mut made: Vec<Made> = Vec::new();
    // One for all stages: a file is told by its number in the file system.
    let mut record = Owners::default();
    let whole: String = def.stages.iter().map(|s| s.text.as_str()).collect();
    for (number, stage) in def.stages.iter().enumerate() {
        let last = number + 1 == def.stages.len();
        let root = match settings.form {
            Form::Update if last => settings.target.clone(),
            Form::Sandbox if last => room.beside.join("rootfs"),
            _ => room.temporary.join(format!("rootfs{number}")),
        };
        let mut work = Work {
            stage,
            settings,
            room: &room.temporary,
            root: &root,
            made: &made,
            record: &mut record,
        };
        let key = work.run(&whole).context(what)?;
        if last {
            finish(&root, &whole, settings, room, &record).context(what)?;
        }
        made.push(Made {
            name: stage.name().map(str::to_owned),
            root,
            key,
        });
    }
    Ok(())
}

/// Layers without anything more: they are streamed into the SIF, and no file is unpacked.
fn convert_layers(image: &Image, origin: &Origin, settings: &Settings, room: &Room) -> Result<()> {
    say::info(format_args!("Extracting OCI image..."));
    say::info(format_args!("Inserting Apptainer configuration..."));
    say::info(format_args!("Creating SIF file..."));
    let (stamp, options) = (settings.stamp(), settings.options);
    put(settings, room, |draft| {
        convert::to_sif(image, draft, origin, stamp, options).map(drop)
    })
}

/// Lets `make` write the SIF, and puts it in its place when all went well.
fn put(settings: &Settings, room: &Room, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let draft = room.beside.join("image.sif");
    // Packing starts threads.
    let made = keeper::in_child(|| {
        // The build's own mask is for what lies in the image; this file is the caller's.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(settings.host.umask));
        make(&draft)
    });
    made.with_context(|| format!("cannot write {}", settings.target.display()))?;
    room::publish(&draft, &settings.target)
}

/// A stage under construction.
struct Work<'a> {
    stage: &'a Stage,
    settings: &'a Settings,
    room: &'a Path,
    root: &'a Path,
    made: &'a [Made],
    record: &'a mut Owners,
}

impl Work<'_> {
    /// Gives the key of what was made.
    fn run(&mut self, whole_text: &str) -> Result<Option<String>> {
        let (stage, settings) = (self.stage, self.settings);
        if settings.wants(Part::Setup) {
            sections::on_host(
                "pre",
                &stage.pre,
                self.root,
                self.room,
                settings,
                self.record,
            )?;
        }
        let key = if settings.form == Form::Update && self.root == settings.target {
            let tree = Tree::open(self.root)?;
            self.fill(&tree)?;
            None
        } else {
            self.create()?
        };
        let tree = Tree::open(self.root)?;
        metadata::write(&tree, stage, whole_text, settings)?;
        if settings.fix_perms {
            fix_permissions(self.root)?;
        }
        let has_test = tree.stat(Path::new("/.singularity.d/test")).is_some();
        let tests = settings.run_test && settings.wants(Part::Test);
        if tests && has_test && !stage.test.is_empty() {
            sections::test(&tree, self.room, settings, self.record)?;
        }
        Ok(key)
    }

    /// Makes the root file system, from kept steps as far as there are.
    fn create(&mut self) -> Result<Option<String>> {
        std::fs::create_dir(self.root)
            .with_context(|| format!("cannot create {}", self.root.display()))?;
        set_mode(self.root, 0o755)?;
        let base = bootstrap::prepare(self.stage, self.room, self.settings)?;
        let base_key = base.key.clone();
        let key = self.key(base_key.as_deref())?;
        let steps = self.settings.steps.as_ref();
        if let (Some(steps), Some(key)) = (steps, &key)
            && let Some(file) = steps.find(key)
        {
            say::info(format_args!(
                "Using the kept result of %post (--disable-cache runs it again)"
            ));
            match self.restore(&file) {
                Ok(()) => return Ok(Some(key.clone())),
                Err(error) => {
                    say::warn(format_args!(
                        "a kept step is damaged, and is made again: {error:#}"
                    ));
                    let _ = std::fs::remove_file(&file);
                    std::fs::remove_dir_all(self.root)?;
                    std::fs::create_dir(self.root)?;
                    set_mode(self.root, 0o755)?;
                }
            }
        }
        self.unpack(base, base_key.as_deref())?;
        let tree = Tree::open(self.root)?;
        self.fill(&tree)?;
        if let (Some(steps), Some(key)) = (steps, &key)
            && self.is_work()
        {
            steps.keep(key, self.root, self.record);
        }
        Ok(key)
    }

    /// Whether there is a section whose result is worth to be kept.
    fn is_work(&self) -> bool {
        let installs = self
            .stage
            .apps
            .iter()
            .any(|app| !app.install.trim().is_empty());
        self.settings.wants(Part::Post) && (!self.stage.post.is_empty() || installs)
    }

    fn restore(&mut self, file: &Path) -> Result<()> {
        let len = std::fs::metadata(file)?.len();
        unpack::squashfs(
            file,
            0,
            len,
            self.root,
            &mut bootstrap::owners(self.settings.ids, self.record),
        )
    }

    /// The base, from a kept step where making it is costly.
    fn unpack(&mut self, base: bootstrap::Base, key: Option<&str>) -> Result<()> {
        let steps = self
            .settings
            .steps
            .as_ref()
            .filter(|_| base.kind.is_costly());
        let key = key.map(|key| format!("capsid base 1 {key}"));
        if let (Some(steps), Some(key)) = (steps, &key)
            && let Some(file) = steps.find(key)
        {
            say::info(format_args!(
                "Using the kept base of today (--disable-cache makes it again)"
            ));
            return self.restore(&file);
        }
        bootstrap::unpack(base, self.root, self.room, self.settings, self.record)?;
        if let (Some(steps), Some(key)) = (steps, &key) {
            steps.keep(key, self.root, self.record);
        }
        Ok(())
    }

    /// Everything between the base and the metadata.
    fn fill(&mut self, tree: &Tree) -> Result<()> {
        let (stage, settings) = (self.stage, self.settings);
        metadata::skeleton(tree)?;
        apps::skeleton(tree, stage, settings)?;
        if settings.wants(Part::Files) {
            let root_of = |name: &str| {
                let stage = self.made.iter().find(|m| m.name.as_deref() == Some(name));
                stage.map(|m| m.root.clone())
            };
            files::copy(tree, stage, Some(&root_of), settings, self.record)?;
        }
        if settings.wants(Part::Setup) {
            sections::on_host(
                "setup",
                &stage.setup,
                self.root,
                self.room,
                settings,
                self.record,
            )?;
        }
        if settings.wants(Part::Files) {
            files::copy(tree, stage, None, settings, self.record)?;
        }
        if settings.wants(Part::Post) {
            sections::post(tree, stage, self.room, settings, self.record)?;
        }
        Ok(())
    }

    /// Everything that the result of `%post` is made from; `None` when something of it cannot be told: host scripts,
    /// binds, a directory as the base.
    fn key(&self, base: Option<&str>) -> Result<Option<String>> {
        let (stage, settings) = (self.stage, self.settings);
        let unknown =
            !stage.setup.is_empty() || !settings.binds.is_empty() || !settings.gpu.is_empty();
        let (Some(base), false, Some(_)) = (base, unknown, &settings.steps) else {
            return Ok(None);
        };
        let mut sources = Vec::new();
        for section in &stage.files {
            if let Some(name) = &section.from {
                let from = self.made.iter().find(|m| m.name.as_ref() == Some(name));
                let Some(key) = from.and_then(|m| m.key.as_deref()) else {
                    return Ok(None);
                };
                sources.push(format!("{key} {:?}", section.pairs));
            }
        }
        let files = files::digest(stage, settings)?;
        let seen = sections::seen_by_post(stage, settings)?;
        let ids = match settings.ids {
            Ids::All => "all",
            Ids::Mapped(_) => "mapped",
            Ids::Emulated => "emulated",
            Ids::Single => "single",
        };
        let text = format!(
            "capsid post 2 {}\n{}\n{base}\n{ids}\n{:?}\n{:?}\n{:?}\n{files}\n{sources:?}\n{seen}\n",
            env!("CARGO_PKG_VERSION"),
            settings.arch,
            settings.parts,
            stage.post,
            stage.apps
        );
        Ok(Some(Digest::of(text.as_bytes()).to_string()))
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot change {}", path.display()))
}

/// Gives the owner the right to read and write everything, and to enter directories.
fn fix_permissions(path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::symlink_metadata(path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if meta.is_symlink() {
        return Ok(());
    }
    let wanted = meta.mode() & 0o7777 | if meta.is_dir() { 0o700 } else { 0o600 };
    if wanted != meta.mode() & 0o7777 {
        set_mode(path, wanted)?;
    }
    if meta.is_dir() {
        for entry in
            std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?
        {
            fix_permissions(&entry?.path())?;
        }
    }
    Ok(())
}

/// Packs the last stage, or puts it in its place.
fn finish(
    root: &Path,
    whole_text: &str,
    settings: &Settings,
    room: &Room,
    record: &Owners,
) -> Result<()> {
    match settings.form {
        Form::Update => return Ok(()),
        Form::Sandbox => {
            say::info(format_args!("Creating sandbox directory..."));
            return room::publish(root, &settings.target);
        }
        Form::Sif => {}
    }
    say::info(format_args!("Creating SIF file..."));
    let stamp = settings.stamp();
    let summary = (settings.describe)(root)?;
    put(settings, room, |draft| {
        let mut parts = pack::Parts::new(whole_text, settings.arch, stamp);
        parts.objects.push((
            DataType::GenericJson,
            "inspect-metadata.json".into(),
            Content::Bytes(summary),
        ));
        parts.options = settings.options;
        pack::image(draft, parts, |writer| {
            const NOBODY: u32 = 65534;
            let known = |id| {
                if id == NOBODY && !settings.host_has_nobody() {
                    0
                } else {
                    id
                }
            };
            let scan = Scan {
                owner: &|uid, gid| (known(uid), known(gid)),
                ..Scan::default()
            };
            let mut tree = squash::scan(root, writer, &scan)?;
            owners::amend(&mut tree, root, record)?;
            Ok(tree)
        })
        .map(drop)
    })
}

impl Settings {
    /// Whether the id 65534 can be somebody's of the image: then it is not what unknown ids are shown as.
    fn host_has_nobody(&self) -> bool {
        match self.ids {
            Ids::All => true,
            Ids::Mapped(sub) => sub.uids.1 > 65534,
            Ids::Emulated | Ids::Single => false,
        }
    }
}
