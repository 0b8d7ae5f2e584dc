//! `overlay create`: a writable ext3 overlay, as a file of its own or as a partition of a SIF. `mkfs.ext3 -d`
//! (`e2fsprogs`) fills it without mounting anything.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use rustix::fs::FallocateFlags;

use super::{Persona, Usage, program, transfer};
use crate::cache::{Draft, DraftDirectory};
use crate::engine::sys::{self, LimitsFail};
use crate::sif::{Addition, DataType, Editor, Extra, FsType, Link, PartType, Partition, Sif};
use crate::{durable, exit, given, say};

/// MiB that an image has at least.
const MIN_MIB: u64 = 64;
/// MiB that an image has at most: 16 TiB, the limit of ext3 with blocks of 4 KiB.
const MAX_MIB: u64 = 16 << 20;
/// Where `mkfs.ext3` is beside the search path: a normal user's often lacks these.
const TOOL_DIRECTORIES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Options of `overlay create`.
#[derive(clap::Args, Debug)]
pub struct CreateArgs {
    /// Size of the overlay in MiB, at least 64
    #[arg(short, long, default_value_t = MIN_MIB, value_name = "MIB")]
    size: u64,
    /// Take disk space when something is written, not now; only for a file of its own
    #[arg(short = 'S', long)]
    sparse: bool,
    /// Directory that the overlay shall have, with those above it; may be repeated
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    create_dir: Vec<PathBuf>,
    /// The directories belong to root, for actions with --fakeroot
    #[arg(short, long)]
    fakeroot: bool,
    #[arg(long, hide = true)]
    tmpdir: Option<PathBuf>,
    /// A new file, or a SIF that gets a partition
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
}

/// Runs `overlay WORDS…`.
///
/// # Errors
/// [`Usage`] for a wrong command line; anything else is fatal.
pub fn run(words: &[OsString], persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    match verb {
        "create" => {
            // `APPTAINER_SPARSE` and `APPTAINER_FAKEROOT` stand before what was typed, which wins.
            let environment: Vec<_> = std::env::vars_os().collect();
            let command = super::command::<CreateArgs>("overlay create");
            let mut all = super::environment::words(&command, &environment, &|_| false)?.before;
            all.extend_from_slice(words.get(1..).unwrap_or_default());
            create(&super::parse("overlay create", &all)?)
        }
        "" | "help" | "--help" | "-h" => {
            usage(persona)?;
            Ok(exit::OK)
        }
        "seal" | "sync" => bail!("overlay {verb} is not supported by this version"),
        other => {
            usage(persona)?;
            Err(Usage {
                command: "overlay".into(),
                text: format!("unknown command {other:?}"),
            }
            .into())
        }
    }
}

fn usage(persona: Persona) -> Result<()> {
    let program = program(persona);
    say::out(format_args!(
        "Usage:\n  {program} overlay create [options] <image>: a writable ext3 overlay\n"
    ))
}

fn create(args: &CreateArgs) -> Result<u8> {
    let _limits = LimitsFail::begin();
    if args.size < MIN_MIB {
        bail!("image size must be equal or greater than {MIN_MIB} MiB");
    }
    if args.size > MAX_MIB {
        bail!(
            "an overlay of {} MiB: ext3 holds at most {MAX_MIB} MiB",
            args.size
        );
    }
    let (image, sif) = target(args)?;
    let mkfs = tool("mkfs.ext3").context(
        "mkfs.ext3 is not installed, and it makes the overlay: install e2fsprogs, or use a directory as the overlay",
    )?;
    let directory = image
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    transfer::guard_drafts()?;
    let scratch = args.tmpdir.clone().unwrap_or_else(std::env::temp_dir);
    let layout = DraftDirectory::new(&scratch)?;
    let made = lay_out(layout.path(), &args.create_dir)?;
    // Beside the target, so that it can be renamed, and so that a full disk is the target's own.
    let draft =
        Draft::new(directory).with_context(|| format!("cannot create {}", image.display()))?;
    allocate(&draft.file, &image, args)?;
    format(&mkfs, draft.path(), layout.path())?;
    if args.fakeroot {
        belong_to_root(draft.path(), &made)?;
    }
    if sif {
        append(
            &image,
            draft
                .file
                .try_clone()
                .context("cannot duplicate a descriptor")?,
        )?;
    } else {
        // Never in the place of a file that has come meanwhile.
        let name = || {
            fs::hard_link(draft.path(), &image).or_else(|_| match image.symlink_metadata() {
                Ok(_) => Err(std::io::ErrorKind::AlreadyExists.into()),
                Err(_) => fs::rename(draft.path(), &image),
            })
        };
        durable::publish(&draft.file, &image, name)
            .with_context(|| format!("cannot create {}", image.display()))?;
    }
    Ok(exit::OK)
}

/// Where the overlay goes, and whether that is a SIF.
fn target(args: &CreateArgs) -> Result<(PathBuf, bool)> {
    let image = &args.image;
    let shown = image.display();
    let meta = match fs::metadata(image) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((image.clone(), false));
        }
        Err(error) => return Err(error).with_context(|| format!("cannot examine {shown}")),
    };
    if meta.is_dir() {
        bail!("{shown} is a directory, which is an overlay already: --overlay {shown}");
    }
    let what = || format!("while opening image file {shown}");
    let file = given::open(image).with_context(what)?;
    let sif = match Sif::read(&file) {
        Ok(sif) => sif,
        Err(crate::sif::Error::NotSif) => bail!("{shown} already exists, and is no SIF"),
        Err(error) => return Err(error).with_context(what),
    };
    if args.sparse {
        bail!(
            "--sparse is for an overlay in a file of its own: a partition of a SIF takes its space"
        );
    }
    if sif
        .objects
        .iter()
        .any(|object| object.data_type == DataType::Signature)
    {
        bail!("SIF image {shown} is signed: could not add writable overlay");
    }
    let Some((_, primary)) = sif.primary() else {
        bail!("{shown} has no root file system to lay something over");
    };
    if primary.fs == FsType::Encrypted {
        bail!("encrypted SIF image {shown}: could not add writable overlay");
    }
    if let Some((object, _)) = sif
        .partitions(PartType::Overlay)
        .find(|(_, partition)| partition.fs == FsType::Ext3)
    {
        let id = object.id;
        bail!(
            "a writable overlay partition already exists in {shown} (ID: {id}), delete it first with \"sif del {id} {shown}\""
        );
    }
    let whole = fs::canonicalize(image).with_context(what)?;
    Ok((whole, true))
}

fn tool(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(TOOL_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
        .with_context(|| format!("{name} was not found"))
}

/// Makes `upper`, `work` and what shall be in `upper`. Returns all of these, relative.
fn lay_out(root: &Path, wanted: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut made = vec![PathBuf::from("upper"), PathBuf::from("work")];
    for directory in wanted {
        let mut path = PathBuf::from("upper");
        for part in directory.components() {
            match part {
                Component::Normal(name) => path.push(name),
                Component::RootDir | Component::CurDir => continue,
                _ => bail!(
                    "--create-dir {}: .. would lead out of the overlay",
                    directory.display()
                ),
            }
            if !made.contains(&path) {
                made.push(path.clone());
            }
        }
    }
    for path in &made {
        let path = root.join(path);
        DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        // Whatever the umask is.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, mode).context("cannot set permissions of the layout")?;
    }
    Ok(made)
}

/// The file for the file system, with its space unless it is sparse.
fn allocate(mut file: &File, image: &Path, args: &CreateArgs) -> Result<()> {
    let what = || format!("cannot write {}", image.display());
    let bytes = args.size << 20;
    file.set_len(bytes).with_context(what)?;
    if args.sparse {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let zeros = vec![0; 1 << 20];
            for _ in 0..args.size {
                file.write_all(&zeros).with_context(what)?;
            }
            file.seek(SeekFrom::Start(0)).with_context(what)?;
        }
        other => other.with_context(what)?,
    }
    Ok(())
}

/// Makes the file system, filled with what is in `layout`.
fn format(mkfs: &Path, draft: &Path, layout: &Path) -> Result<()> {
    let mut command = Command::new(mkfs);
    command.args(["-q", "-F", "-E", "nodiscard", "-d"]);
    command.arg(layout).arg(draft);
    tell(&mut command, "mkfs.ext3 cannot make the overlay")
}

/// Root owns what was made: the numbers are changed in the inodes, since only root may give files away.
fn belong_to_root(draft: &Path, made: &[PathBuf]) -> Result<()> {
    let debugfs = tool("debugfs").context(
        "debugfs is not installed, and --fakeroot needs it to change owners: install e2fsprogs",
    )?;
    let mut script = String::new();
    for path in made {
        let path = path.display().to_string();
        if path.contains(['"', '\n']) {
            bail!(
                "--create-dir {path}: a quotation mark or a line break does not go with --fakeroot"
            );
        }
        for field in ["uid", "gid"] {
            script += &format!("set_inode_field \"/{path}\" {field} 0\n");
        }
    }
    let mut commands = tempfile_with(&script)?;
    commands.seek(SeekFrom::Start(0))?;
    let mut command = Command::new(debugfs);
    command.args(["-w", "-f", "/dev/stdin"]).arg(draft);
    command.stdin(Stdio::from(commands));
    tell(&mut command, "debugfs cannot change owners in the overlay")
}

fn tempfile_with(text: &str) -> Result<File> {
    let fd = rustix::fs::memfd_create("commands", rustix::fs::MemfdFlags::CLOEXEC)
        .context("cannot make a file in memory")?;
    let mut file = File::from(fd);
    file.write_all(text.as_bytes())?;
    Ok(file)
}

/// Runs a tool; its first line of complaint is the cause.
fn tell(command: &mut Command, what: &'static str) -> Result<()> {
    sys::end_with_us(command);
    let out = command
        .stdout(Stdio::null())
        .output()
        .with_context(|| format!("{what}: cannot run {:?}", command.get_program()))?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    let line = text
        .lines()
        .map(str::trim)
        .rfind(|line| {
            !line.is_empty() && !line.starts_with("mke2fs ") && !line.starts_with("debugfs ")
        })
        .unwrap_or("no reason given");
    bail!("{what}: {line} ({})", out.status)
}

/// Adds the overlay to the SIF, in the group of its root.
fn append(image: &Path, mut overlay: File) -> Result<()> {
    let what = || format!("cannot add the overlay to {}", image.display());
    overlay.seek(SeekFrom::Start(0)).with_context(what)?;
    let editor = Editor::open(image).with_context(what)?;
    let primary = editor.sif().primary();
    let (group, arch) = primary.map_or((Some(1), "unknown"), |(object, partition)| {
        (object.group, partition.arch)
    });
    let addition = Addition {
        data_type: DataType::Partition,
        name: String::new(),
        group,
        link: Link::None,
        alignment: None,
        extra: Extra::Partition(Partition {
            fs: FsType::Ext3,
            part: PartType::Overlay,
            arch,
        }),
        content: overlay,
    };
    editor.add(addition, now()).with_context(what)?;
    Ok(())
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}
