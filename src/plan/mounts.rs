//! Which mounts a container gets, and in which order.
//!
//! Three rules. What the user names is there: no default is mounted on it, or on a part of it. Of two that are named for one
//! place the first one counts, with a warning. And what lies above is mounted before what lies below, whichever was named
//! first, so that nothing is hidden.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::identity::Account;
use super::{IdMap, Layer, Missing, Mount, Request, Source, Why, is_below};
use crate::host::Host;
use crate::image::{Facts, Root};

/// What the decisions are made from.
pub struct Context<'a> {
    /// The request.
    pub request: &'a Request,
    /// The host.
    pub host: &'a Host,
    /// The id map.
    pub ids: &'a IdMap,
    /// Home.
    pub home: &'a Home,
    /// The caller's groups.
    pub groups: &'a [(String, u32)],
    /// `--writable`: mount points cannot be made.
    pub writable_root: bool,
}

/// The home directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// On the host; `None` for an empty one in memory.
    pub source: Option<PathBuf>,
    /// Inside.
    pub target: PathBuf,
}

/// Where home comes from and where it goes.
pub fn home(request: &Request, host: &Host, ids: &IdMap) -> Home {
    if let Some((source, target)) = &request.home {
        return Home {
            source: Some(source.clone()),
            target: target.clone(),
        };
    }
    let target = if ids.is_root() {
        PathBuf::from("/root")
    } else {
        host.user.home.clone()
    };
    let source = match (request.contain, &request.workdir) {
        (true, Some(workdir)) => Some(workdir.join("home")),
        (true, None) => None,
        (false, _) => Some(host.user.home.clone()),
    };
    Home { source, target }
}

/// The layers over the root, and whether the root itself is written.
///
/// # Errors
/// When writable layers contradict each other, or a SIF without a writable part is to be written.
pub fn layers(request: &Request, facts: &Facts, root: &Root) -> Result<(Vec<Layer>, bool)> {
    let asked = request.layers.iter().filter(|l| l.is_writable()).count();
    if request.writable {
        if asked > 0 {
            bail!(
                "--writable cannot be combined with a writable --overlay or --writable-tmpfs: use one of them"
            );
        }
        return match root {
            Root::Directory(_) => Ok((Vec::new(), true)),
            _ if !facts.overlays.is_empty() => bail!(
                "the overlay partition in {} cannot be written: writing ext3 needs fuse2fs, which is not supported by this version; \
                 use --overlay DIRECTORY",
                facts.path.display()
            ),
            _ => bail!(
                "no SIF writable overlay partition found in {}: use --writable-tmpfs or --overlay DIRECTORY",
                facts.path.display()
            ),
        };
    }
    if asked > 1 {
        bail!(
            "only one writable layer is possible: add :ro to the other --overlay, or leave out --writable-tmpfs"
        );
    }
    let mut layers: Vec<Layer> = facts.overlays.iter().cloned().map(Layer::Image).collect();
    let (writable, read_only): (Vec<_>, Vec<_>) =
        request.layers.iter().cloned().partition(Layer::is_writable);
    layers.extend(read_only);
    layers.extend(writable);
    Ok((layers, false))
}

/// All mounts, in the order in which they are applied.
pub fn all(context: &Context, warnings: &mut Vec<String>) -> Vec<Mount> {
    let named = named(context, warnings);
    let mut mounts = system(context);
    mounts.extend(host_files(context));
    mounts.extend(home_mount(context).filter(|m| !m.is_named()));
    mounts.extend(temporary(context));
    mounts.extend(generated_files(context));
    mounts.extend(gpu(context));
    mounts.retain(|mount| !named.iter().any(|by| displaces(by, mount)));
    // Nothing is made in what the user named for a file that is not there.
    let within = |mount: &Mount| named.iter().any(|by| is_below(&mount.target, &by.target));
    for mount in mounts.iter_mut().filter(|mount| within(mount)) {
        mount.missing = Missing::Warn;
    }
    mounts.extend(named);
    mounts.extend(working_directory(context, &mounts));
    if context.writable_root {
        for mount in mounts.iter_mut().filter(|mount| !mount.is_named()) {
            mount.missing = match (mount.why, mount.missing) {
                (Why::Default | Why::Home, Missing::Fail) => Missing::Warn,
                (Why::Gpu, _) => Missing::Skip,
                (_, missing) => missing,
            };
        }
    }
    // Stable: mounts of one depth stay in the order above.
    mounts.sort_by_key(|mount| mount.target.components().count());
    mounts
}

/// What the user names, one for each place.
fn named(context: &Context, warnings: &mut Vec<String>) -> Vec<Mount> {
    let mut named: Vec<Mount> = Vec::new();
    let home = home_mount(context).filter(Mount::is_named);
    for mount in home
        .into_iter()
        .chain(binds(context))
        .chain(scratch(context))
    {
        if named.iter().any(|m| m.target == mount.target) {
            warnings.push(format!(
                "destination {} is already in the mount point list: the first one counts",
                mount.target.display()
            ));
        } else {
            named.push(mount);
        }
    }
    named
}

/// Whether a default is left out for what the user named: at the same place, or as a part of it. An empty directory has no
/// parts.
fn displaces(named: &Mount, default: &Mount) -> bool {
    named.target == default.target
        || is_below(&default.target, &named.target)
            && !matches!(named.source, Source::Private(_))
            // These were asked for too.
            && !matches!(default.source, Source::Text(_))
}

impl Context<'_> {
    /// Whether what is changed in the root stays, if only to the end.
    fn is_written(&self) -> bool {
        self.writable_root || self.request.layers.iter().any(Layer::is_writable)
    }

    fn has(&self, name: &str) -> bool {
        !self.request.no_mount.iter().any(|n| n == name)
    }
}

fn mount(source: Source, target: impl Into<PathBuf>, missing: Missing, why: Why) -> Mount {
    Mount {
        source,
        target: target.into(),
        writable: true,
        missing,
        why,
    }
}

fn system(context: &Context) -> Vec<Mount> {
    let mut mounts = Vec::new();
    if context.has("proc") {
        let source = if context.request.namespaces.pid {
            Source::Proc
        } else {
            Source::Bind("/proc".into())
        };
        mounts.push(mount(source, "/proc", Missing::Fail, Why::Default));
    }
    if context.has("sys") {
        mounts.push(Mount {
            writable: false,
            ..mount(
                Source::Bind("/sys".into()),
                "/sys",
                Missing::Fail,
                Why::Default,
            )
        });
    }
    if context.has("dev") {
        let whole = context
            .request
            .binds
            .iter()
            .any(|b| b.target == Path::new("/dev"));
        let source = if context.request.contain && !whole {
            Source::Dev {
                mqueue: context.request.namespaces.ipc,
                pts: context.has("devpts"),
            }
        } else {
            Source::Bind("/dev".into())
        };
        mounts.push(mount(source, "/dev", Missing::Fail, Why::Default));
    }
    if context.request.close_descriptors {
        mounts.extend(masks(context));
    }
    mounts
}

/// What of the machine `--containall` hides: knobs and lists that only root could use, and what the machine's own firmware
/// and key rings tell. Only there: under such masks the kernel mounts no further procfs for containers inside.
fn masks(context: &Context) -> Vec<Mount> {
    const FILES: [&str; 4] = ["kcore", "keys", "timer_list", "sched_debug"];
    const DIRECTORIES: [&str; 2] = ["scsi", "acpi"];
    let file = |name| (Source::Bind("/dev/null".into()), format!("/proc/{name}"));
    let directory = |path| (Source::Private(0o555), path);
    let proc = FILES.into_iter().map(file).chain(
        DIRECTORIES
            .into_iter()
            .map(|name| directory(format!("/proc/{name}"))),
    );
    let sys = [directory("/sys/firmware".into())];
    let proc = proc.filter(|_| context.has("proc"));
    proc.chain(sys.into_iter().filter(|_| context.has("sys")))
        .map(|(source, target)| Mount {
            writable: false,
            ..mount(source, target, Missing::Skip, Why::Default)
        })
        .collect()
}

fn host_files(context: &Context) -> Vec<Mount> {
    let mut mounts = Vec::new();
    if !context.has("bind-paths") {
        return mounts;
    }
    // Root's package manager replaces this one.
    if context.has("/etc/localtime") && !(context.ids.is_root() && context.is_written()) {
        mounts.push(mount(
            Source::Bind("/etc/localtime".into()),
            "/etc/localtime",
            Missing::Warn,
            Why::Default,
        ));
    }
    if context.has("/etc/hosts") {
        let source = if context.request.namespaces.net {
            Source::Text("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".into())
        } else {
            Source::Bind("/etc/hosts".into())
        };
        mounts.push(mount(source, "/etc/hosts", Missing::Warn, Why::Default));
    }
    mounts
}

fn home_mount(context: &Context) -> Option<Mount> {
    let home = context.home;
    if context.request.no_home || !context.has("home") || home.target == Path::new("/") {
        return None;
    }
    let why = match context.request.home {
        Some(_) => Why::HomeOption,
        None => Why::Home,
    };
    let (source, missing) = match &home.source {
        Some(path) if why == Why::HomeOption => (Source::Bind(path.clone()), Missing::Fail),
        Some(path) if context.request.contain => {
            (Source::Directory(path.clone(), 0o700), Missing::Fail)
        }
        Some(path) => (Source::Bind(path.clone()), Missing::Warn),
        None => (Source::Private(0o700), Missing::Fail),
    };
    Some(mount(source, &home.target, missing, why))
}

fn temporary(context: &Context) -> Vec<Mount> {
    let mut mounts = Vec::new();
    if !context.has("tmp") {
        return mounts;
    }
    for (target, name) in [("/tmp", "tmp"), ("/var/tmp", "var_tmp")] {
        let source = match (context.request.contain, &context.request.workdir) {
            (true, Some(workdir)) => Source::Directory(workdir.join(name), 0o1777),
            (true, None) => Source::Private(0o1777),
            (false, _) => Source::Bind(target.into()),
        };
        mounts.push(mount(source, target, Missing::Warn, Why::Default));
    }
    mounts
}

fn scratch(context: &Context) -> Vec<Mount> {
    context
        .request
        .scratch
        .iter()
        .map(|path| {
            let target = crate::host::normalise(&Path::new("/").join(path));
            let source = match &context.request.workdir {
                Some(workdir) => Source::Directory(
                    workdir
                        .join("scratch")
                        .join(target.strip_prefix("/").unwrap_or(&target)),
                    0o700,
                ),
                None => Source::Private(0o700),
            };
            mount(source, target, Missing::Fail, Why::Scratch)
        })
        .collect()
}

/// Places that the working directory is never mounted on: it would hide the image.
const NEVER_CWD: [&str; 10] = [
    "/", "/etc", "/bin", "/mnt", "/usr", "/var", "/opt", "/sbin", "/lib", "/lib64",
];

/// Directories that hold what an image runs with: those below them that an image has stay what they are.
const OF_THE_SYSTEM: [&str; 21] = [
    "/bin",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/sbin",
    "/sys",
    "/usr/bin",
    "/usr/include",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/sbin",
    "/usr/share",
    "/usr/local/bin",
    "/usr/local/lib",
    "/.singularity.d",
];

/// Whether a directory of the image, by its place with all links resolved, is one that the working directory must not hide.
pub fn is_of_the_system(place: &Path) -> bool {
    NEVER_CWD.iter().any(|never| place == Path::new(never))
        || OF_THE_SYSTEM
            .iter()
            .any(|top| is_below(place, Path::new(top)))
}

fn working_directory(context: &Context, before: &[Mount]) -> Option<Mount> {
    if context.request.contain || !context.has("cwd") || !context.host.has_cwd {
        return None;
    }
    let host = context.host;
    let cwd = match working_directory_at(&host.cwd, before) {
        Seen::No => &host.cwd,
        Seen::Never => return None,
        // A link on the way may lead out of what shows it: then it leads to this place.
        Seen::In(mount) => {
            let (cwd, home) = host.real.as_ref()?;
            let top = if mount.why == Why::Home {
                home
            } else {
                &mount.target
            };
            let is_elsewhere = !mount.is_named() && !is_below(cwd, top);
            let is_free = matches!(working_directory_at(cwd, before), Seen::No);
            (is_elsewhere && is_free).then_some(cwd)?
        }
    };
    Some(mount(
        Source::Bind(cwd.clone()),
        cwd,
        Missing::Keep,
        Why::Cwd,
    ))
}

/// What a container shows of the working directory before it is mounted.
enum Seen<'m> {
    /// Nothing.
    No,
    /// It is not mounted in any case.
    Never,
    /// A mount of a directory above it at its own path, or what the user wants there.
    In(&'m Mount),
}

fn working_directory_at<'m>(cwd: &Path, before: &'m [Mount]) -> Seen<'m> {
    let system = ["/sys", "/proc", "/dev"]
        .iter()
        .any(|top| is_below(cwd, Path::new(top)));
    if system || NEVER_CWD.iter().any(|p| cwd == Path::new(p)) {
        return Seen::Never;
    }
    let settled = |m: &&Mount| {
        let at_its_path = matches!(&m.source, Source::Bind(from) if *from == m.target);
        *cwd == m.target || (at_its_path || m.is_named()) && is_below(cwd, &m.target)
    };
    before.iter().find(settled).map_or(Seen::No, Seen::In)
}

fn generated_files(context: &Context) -> Vec<Mount> {
    let (request, host) = (context.request, context.host);
    let mut mounts = Vec::new();
    let resolv = if request.dns.is_empty() {
        Source::Bind("/etc/resolv.conf".into())
    } else {
        Source::Text(
            request
                .dns
                .iter()
                .map(|server| format!("nameserver {}\n", server.trim()))
                .collect(),
        )
    };
    if context.has("/etc/resolv.conf") {
        let missing = if request.dns.is_empty() {
            Missing::Warn
        } else {
            Missing::Fail
        };
        mounts.push(mount(resolv, "/etc/resolv.conf", missing, Why::Default));
    }
    if let Some(name) = &request.hostname {
        mounts.push(mount(
            Source::Text(format!("{name}\n")),
            "/etc/hostname",
            Missing::Warn,
            Why::Default,
        ));
    }
    // Root has a line already, and edits the files itself: programs replace them, which a mount point forbids.
    if context.ids.is_root() {
        return mounts;
    }
    let account = Account {
        name: host.user.name.clone(),
        uid: host.uid,
        gid: host.gid,
        gecos: host.user.gecos.clone(),
        home: context.home.target.clone(),
        shell: host.user.shell.clone(),
        groups: context.groups.to_vec(),
    };
    mounts.push(mount(
        Source::Passwd(account.clone()),
        "/etc/passwd",
        Missing::Warn,
        Why::Default,
    ));
    mounts.push(mount(
        Source::Group(account),
        "/etc/group",
        Missing::Warn,
        Why::Default,
    ));
    mounts
}

fn gpu(context: &Context) -> Vec<Mount> {
    let bind = |(source, target): &(PathBuf, PathBuf)| {
        let writable = is_below(target, Path::new("/dev"));
        Mount {
            writable,
            ..mount(
                Source::Bind(source.clone()),
                target,
                Missing::Warn,
                Why::Gpu,
            )
        }
    };
    // With the host's whole /dev the devices are there already.
    let wanted = |(_, target): &&(PathBuf, PathBuf)| {
        context.request.contain || !is_below(target, Path::new("/dev"))
    };
    context
        .request
        .gpu
        .iter()
        .filter(wanted)
        .map(bind)
        .collect()
}

fn binds<'a>(context: &'a Context) -> impl Iterator<Item = Mount> + 'a {
    context.request.binds.iter().map(|bind| {
        let source = match &bind.image {
            None => Source::Bind(context.host.cwd.join(&bind.source)),
            Some(part) => Source::Image(part.clone()),
        };
        Mount {
            // Images are read, never written.
            writable: !bind.read_only && bind.image.is_none(),
            ..mount(source, &bind.target, Missing::Fail, Why::Bind)
        }
    })
}
