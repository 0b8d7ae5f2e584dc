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
    self, EnvironmentRequest, Init, Missing, Mount, Namespaces, Ownership, Request, Source, Verb,
    Why,
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
    let places = make_places(tree, settings)?;
    let status = contained(tree.path(), words, Write::Root, room, settings, owners);
    for place in places.iter().rev() {
        remove_place(tree, place);
    }
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
    let places = make_places(tree, settings)?;
    let status = contained(
        tree.path(),
        words,
        settings.test_root,
        room,
        settings,
        owners,
    );
    for place in places.iter().rev() {
        remove_place(tree, place);
    }
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

/// Runs words in a container whose root is the directory; gives their status.
fn contained(
    root: &Path,
    words: Vec<OsString>,
    write: Write,
    room: &Path,
    settings: &Settings,
    owners: &mut Owners,
) -> Result<u8> {
    let work = room.join("work");
    for name in ["tmp", "var_tmp"] {
        let path = work.join(name);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        super::set_mode(&path, 0o1777)?;
    }
    let request = request(words, write, &work, settings);
    let more = ["/etc/resolv.conf", "/etc/hosts"].map(stand_in);
    run(root, &request, settings, owners, &more)
}

/// Runs a request in a directory as its root, with further mounts; gives the status.
fn run(
    root: &Path,
    request: &Request,
    settings: &Settings,
    owners: &mut Owners,
    more: &[Mount],
) -> Result<u8> {
    let facts = Facts {
        arch: None,
        path: root.to_owned(),
        name: "rootfs".into(),
        overlays: Vec::new(),
    };
    let groups = [("root".to_owned(), 0)];
    let mut planned = plan::plan(
        request,
        &root_of(&settings.host),
        &facts,
        Root::Directory(root.to_owned()),
        &groups,
    )?;
    for warning in planned.warnings.iter().chain(&planned.infos) {
        say::verbose(format_args!("{warning}"));
    }
    planned.plan.mounts.extend(more.iter().cloned());
    let plan = planned.plan;
    if plan.ownership != Ownership::Kernel {
        return engine::run_emulated(&plan, &Places::default(), None, owners);
    }
    keeper::in_child(|| engine::run(&plan, &Places::default(), None))
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

/// Makes the mount points that a writable root lacks; gives those that were made.
fn make_places(tree: &Tree, settings: &Settings) -> Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    let binds = settings.binds.iter().map(|b| {
        let source = settings.host.cwd.join(&b.source);
        (
            source,
            b.target.clone(),
            b.image.as_ref().map(|part| part.directory),
        )
    });
    let gpu = settings
        .gpu
        .iter()
        .map(|(source, target)| (source.clone(), target.clone(), None));
    for (source, target, directory) in binds.chain(gpu) {
        if target.starts_with("/dev") || tree.stat(&target).is_some() {
            continue;
        }
        let directory = directory.unwrap_or_else(|| !source.is_file());
        // Those above it are made too, and go too.
        let mut above: Vec<PathBuf> = target.ancestors().skip(1).map(Path::to_owned).collect();
        above.retain(|path| tree.stat(path).is_none());
        above.reverse();
        made.extend(above);
        if directory {
            tree.directory(&target)?;
        } else {
            tree.write(&target, b"", 0o644)?;
        }
        made.push(target);
    }
    Ok(made)
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
