//! `%pre`, `%setup`, `%post` and `%test`: scripts on the host, and scripts in a container that is the image that is made.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::deffile::{Script, Stage};
use super::ids::Ids;
use super::tree::Tree;
use super::{Settings, UMASK, apps, keeper};
use crate::engine;
use crate::engine::emulate::Owners;
use crate::engine::server::Places;
use crate::host::{Host, User};
use crate::image::{Facts, Root};
use crate::plan::{
    self, EnvironmentRequest, Init, Missing, Mount, Namespaces, Ownership, Planned, Request,
    Source, Verb, Why,
};
use crate::{exit, say};

/// `export` lines that `%post` appends there become part of the image's environment.
const ENVIRONMENT: &str = "/.singularity.d/env/91-environment.sh";
/// `name value` lines that `%post` writes there become labels.
pub const LABELS: &str = "/.build.labels";
/// Where the script of `%post` lies while it runs.
const POST: &str = "/.post.script";

/// The words that run a section's script: `/bin/sh -ex`, the section's arguments, the script. What follows `-c` is one
/// command, the last word of which is the script.
///
/// # Errors
/// When `-c` has nothing behind it.
fn words(name: &str, args: &str, script: &Path) -> Result<Vec<OsString>> {
    let mut words: Vec<OsString> = vec!["/bin/sh".into(), "-ex".into()];
    let args = args.split('#').next().unwrap_or_default();
    let mut args = args.split_ascii_whitespace();
    while let Some(arg) = args.next() {
        words.push(arg.into());
        if arg == "-c" {
            let command: Vec<&str> = args.by_ref().collect();
            if command.is_empty() {
                bail!(
                    "bad %{name} section '-c' parameter: missing arguments: write %{name} -c /bin/bash"
                );
            }
            let mut command = OsString::from(command.join(" "));
            command.push(" ");
            command.push(script);
            words.push(command);
            return Ok(words);
        }
    }
    words.push(script.into());
    Ok(words)
}

/// Runs `%pre` or `%setup` on the host, as root of the build's user namespace. Where owners are emulated, with the host's
/// files as its root, so that what it gives away is in the record.
///
/// # Errors
/// When it fails.
pub fn on_host(
    name: &str,
    script: &Script,
    root: &Path,
    room: &Path,
    settings: &Settings,
    owners: &mut Owners,
) -> Result<()> {
    if script.is_empty() {
        return Ok(());
    }
    say::info(format_args!("Running {name} scriptlet"));
    let file = room.join(format!("{name}.script"));
    std::fs::write(&file, &script.text)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let words = words(name, &script.args, &file)?;
    let mut variables: Vec<(String, OsString)> = Vec::new();
    for prefix in ["APPTAINER", "SINGULARITY"] {
        variables.push((format!("{prefix}_ROOTFS"), root.into()));
        let environment = root.join(ENVIRONMENT.trim_start_matches('/'));
        variables.push((format!("{prefix}_ENVIRONMENT"), environment.into()));
    }
    let code = match settings.ids {
        Ids::Emulated => with_owners(words, variables, room, settings, owners)?.into(),
        _ => {
            directly(&words, variables, settings).with_context(|| format!("cannot run %{name}"))?
        }
    };
    let _ = std::fs::remove_file(&file);
    if code == 0 {
        return Ok(());
    }
    bail!("while running engine: while running %{name} section: exit status {code}")
}

/// Runs words as they are; gives their status.
fn directly(
    words: &[OsString],
    variables: Vec<(String, OsString)>,
    settings: &Settings,
) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt as _;
    let status = Command::new(&words[0])
        .args(&words[1..])
        .envs(variables)
        .current_dir(&settings.host.cwd)
        .status()?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// The same with emulated owners: those come only with a container, and this one has the host's root.
fn with_owners(
    words: Vec<OsString>,
    variables: Vec<(String, OsString)>,
    room: &Path,
    settings: &Settings,
    owners: &mut Owners,
) -> Result<u8> {
    let own = [
        "home",
        "cwd",
        "tmp",
        "dev",
        "devpts",
        "sys",
        "bind-paths",
        "/etc/resolv.conf",
    ];
    let mut env = variables;
    env.extend(
        settings
            .host
            .var("PATH")
            .map(|path| ("PATH".to_owned(), path.to_owned())),
    );
    let request = Request {
        no_mount: own.map(str::to_owned).to_vec(),
        binds: Vec::new(),
        gpu: Vec::new(),
        workdir: None,
        contain: false,
        cwd: Some(settings.host.cwd.clone()),
        environment: EnvironmentRequest {
            env,
            ..EnvironmentRequest::default()
        },
        ..request(words, Write::Root, room, settings)
    };
    run(Path::new("/"), &request, settings, owners, &[])
}

/// Runs `%post`, and what `%appinstall` sections add to it, inside.
///
/// # Errors
/// When it fails.
pub fn post(
    tree: &Tree,
    stage: &Stage,
    room: &Path,
    settings: &Settings,
    owners: &mut Owners,
) -> Result<()> {
    let script = format!("{}{}", stage.post.text, apps::installs(stage));
    if script.trim().is_empty() {
        return Ok(());
    }
    if tree.stat(Path::new("/bin/sh")).is_none() {
        bail!(
            "while running engine: while running %post section: the image has no /bin/sh to run it with"
        );
    }
    say::info(format_args!("Running post scriptlet"));
    tree.write(Path::new(POST), script.as_bytes(), 0o755)?;
    let words = words("post", &stage.post.args, Path::new(POST))?;
    let status = contained(tree, words, Write::Root, room, settings, owners);
    tree.remove(Path::new(POST));
    match status? {
        exit::OK => Ok(()),
        status => bail!("while running engine: while running %post section: exit status {status}"),
    }
}

/// Runs the image's test script inside.
///
/// # Errors
/// When it fails.
pub fn test(tree: &Tree, room: &Path, settings: &Settings, owners: &mut Owners) -> Result<()> {
    say::info(format_args!("Running testscript"));
    let words = vec!["/.singularity.d/test".into()];
    let status = contained(tree, words, settings.test_root, room, settings, owners);
    match status? {
        exit::OK => Ok(()),
        status => bail!("failed to execute %test script: exit status {status}"),
    }
}

/// What a script may write to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// The image itself.
    Root,
    /// Memory that is thrown away.
    Tmpfs,
    /// Nothing.
    Nothing,
}

/// Everything that `%post` has of the caller: its environment, words, identity and mounts, for the key of a kept step. The
/// files by which it reaches the network are not among them: their content is no input of a build.
///
/// # Errors
/// As [`post`].
pub fn seen_by_post(stage: &Stage, settings: &Settings) -> Result<String> {
    let words = words("post", &stage.post.args, Path::new(POST))?;
    // The places of this one build are nothing that the result may depend on.
    let root = Path::new("/");
    let request = request(words, Write::Root, root, settings);
    Ok(format!("{:?}", decide(root, &request, settings)?.plan))
}

/// Runs words in a container whose root is the tree; gives their status. Mount points that the tree lacks are there
/// meanwhile.
fn contained(
    tree: &Tree,
    words: Vec<OsString>,
    write: Write,
    room: &Path,
    settings: &Settings,
    owners: &mut Owners,
) -> Result<u8> {
    engine::sys::own_processes().context("a section of the definition needs a procfs")?;
    let work = room.join("work");
    for name in ["tmp", "var_tmp"] {
        let path = work.join(name);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        super::set_mode(&path, 0o1777)?;
    }
    let request = request(words, write, &work, settings);
    let more = ["/etc/resolv.conf", "/etc/hosts"].map(stand_in);
    let mut made = Vec::new();
    let status = make_places(tree, settings, &more, &mut made)
        .and_then(|()| run(tree.path(), &request, settings, owners, &more));
    for place in made.iter().rev() {
        remove_place(tree, place);
    }
    status
}

/// Runs a request in a directory as its root, with further mounts; gives the status.
fn run(
    root: &Path,
    request: &Request,
    settings: &Settings,
    owners: &mut Owners,
    more: &[Mount],
) -> Result<u8> {
    let mut planned = decide(root, request, settings)?;
    for warning in planned.warnings.iter().chain(&planned.infos) {
        say::verbose(format_args!("{warning}"));
    }
    planned.plan.mounts.extend(more.iter().cloned());
    let plan = planned.plan;
    if plan.ownership != Ownership::Kernel {
        return engine::run_emulated(&plan, &Places::default(), None, owners);
    }
    keeper::status_of(|| engine::run(&plan, &Places::default(), None))
}

/// The plan of a request in a directory as its root.
fn decide(root: &Path, request: &Request, settings: &Settings) -> Result<Planned> {
    let facts = Facts {
        arch: None,
        path: root.to_owned(),
        name: "rootfs".into(),
        overlays: Vec::new(),
    };
    let groups = [("root".to_owned(), 0)];
    let host = root_of(&settings.host);
    let root = Root::Directory(root.to_owned());
    plan::plan(request, &host, &facts, root, &groups)
}

/// A copy of a file of the host: what the script does to it stays there.
fn stand_in(path: &str) -> Mount {
    let text = std::fs::read(path).unwrap_or_default();
    Mount {
        source: Source::Text(
            String::from_utf8_lossy(&text[..text.len().min(1 << 20)]).into_owned(),
        ),
        target: path.into(),
        writable: true,
        missing: Missing::Skip,
        why: Why::Default,
    }
}

/// The caller as the build's namespace knows it.
fn root_of(host: &Host) -> Host {
    Host {
        uid: 0,
        gid: 0,
        user: User {
            name: "root".into(),
            gecos: "root".into(),
            home: "/root".into(),
            shell: "/bin/sh".into(),
        },
        umask: UMASK,
        ..host.clone()
    }
}

fn request(words: Vec<OsString>, write: Write, work: &Path, settings: &Settings) -> Request {
    let labels = |prefix: &str| (format!("{prefix}_LABELS"), OsString::from(LABELS));
    Request {
        verb: Verb::Exec,
        args: words,
        instance: None,
        app: None,
        shell: None,
        binds: settings.binds.clone(),
        home: None,
        no_home: true,
        no_mount: ["home", "cwd", "devpts", "bind-paths", "/etc/resolv.conf"]
            .map(str::to_owned)
            .to_vec(),
        workdir: Some(work.to_owned()),
        scratch: Vec::new(),
        layers: if write == Write::Tmpfs {
            vec![plan::Layer::Tmpfs(None)]
        } else {
            Vec::new()
        },
        writable: write == Write::Root,
        contain: true,
        close_descriptors: false,
        rights: plan::Rights::default(),
        time_limit: None,
        namespaces: Namespaces {
            pid: true,
            ..Namespaces::default()
        },
        fakeroot: None,
        ownership: match settings.ids {
            Ids::Emulated => Ownership::Emulated,
            Ids::Mapped(_) | Ids::All if engine::emulate::check().is_ok() => Ownership::Devices,
            _ => Ownership::Kernel,
        },
        share_users: false,
        init: Init::Appinit,
        hostname: None,
        dns: Vec::new(),
        cwd: Some("/".into()),
        no_umask: true,
        environment: EnvironmentRequest {
            clean: true,
            env: vec![labels("APPTAINER"), labels("SINGULARITY")],
            ..EnvironmentRequest::default()
        },
        gpu: settings.gpu.clone(),
    }
}

/// Makes the mount points that the tree lacks, and notes those that were made.
fn make_places(
    tree: &Tree,
    settings: &Settings,
    more: &[Mount],
    made: &mut Vec<PathBuf>,
) -> Result<()> {
    let kind = |source: &Path| match settings.host.cwd.join(source).is_file() {
        true => Place::File,
        false => Place::Directory,
    };
    let binds = settings.binds.iter().map(|b| {
        let part = b.image.as_ref().map(|part| match part.directory {
            true => Place::Directory,
            false => Place::File,
        });
        (b.target.as_path(), part.unwrap_or_else(|| kind(&b.source)))
    });
    let gpu = settings.gpu.iter();
    let gpu = gpu.map(|(source, target)| (target.as_path(), kind(source)));
    let more = more.iter().map(|m| (m.target.as_path(), Place::File));
    for (target, place) in binds.chain(gpu).chain(more) {
        if !target.starts_with("/dev") {
            make_place(tree, target, place, made)?;
        }
    }
    Ok(())
}

/// What a mount point is.
#[derive(Clone, Copy)]
enum Place {
    File,
    Directory,
}

/// Makes what a path leads to, through links of the tree that lead to nothing, and the directories above that.
fn make_place(tree: &Tree, path: &Path, place: Place, made: &mut Vec<PathBuf>) -> Result<()> {
    if tree.stat(path).is_some() {
        return Ok(());
    }
    let path = tree.resolved(path)?;
    if path.as_os_str().len() > libc::PATH_MAX as usize {
        bail!("{}: the path is too long", path.display());
    }
    if let Some(parent) = path.parent() {
        make_place(tree, parent, Place::Directory, made)?;
    }
    // `a/..` is there as soon as `a` is.
    if tree.stat(&path).is_some() {
        return Ok(());
    }
    match place {
        Place::Directory => drop(tree.directory(&path)?),
        Place::File => tree.write(&path, b"", 0o644)?,
    }
    made.push(path);
    Ok(())
}

/// Removes a mount point, unless something has come to lie there.
fn remove_place(tree: &Tree, path: &Path) {
    use rustix::fs::{AtFlags, OFlags};
    let parent = path.parent().unwrap_or(Path::new("/"));
    let (Ok(parent), Some(name)) = (
        tree.open_at(parent, OFlags::PATH | OFlags::DIRECTORY),
        path.file_name(),
    ) else {
        return;
    };
    let empty = tree.stat(path).is_some_and(|s| s.st_size == 0);
    if rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).is_err()
        && empty
        && name.as_bytes() != b".."
    {
        let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_a_section_go_to_the_shell() {
        let of = |args: &str| {
            let words = words("post", args, Path::new("/s")).unwrap();
            words
                .iter()
                .map(|w| w.to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
                .join("|")
        };
        assert_eq!(of(""), "/bin/sh|-ex|/s");
        assert_eq!(of("-u # comment"), "/bin/sh|-ex|-u|/s");
        assert_eq!(of("-c /bin/bash"), "/bin/sh|-ex|-c|/bin/bash /s");
        assert_eq!(
            of("-c /usr/bin/env python3 -u"),
            "/bin/sh|-ex|-c|/usr/bin/env python3 -u /s"
        );
        assert!(words("post", "-c", Path::new("/s")).is_err());
    }
}
