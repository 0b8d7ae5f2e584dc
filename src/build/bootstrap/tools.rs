//! `Bootstrap: debootstrap`, `yum`/`dnf`, `zypper`, `arch`: by the distribution's own tool, where the machine has it.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Base, Kind};
use crate::build::deffile::Stage;
use crate::build::{Settings, ids::Ids};
use crate::engine::userns;
use crate::say;

/// A tool with its words. `{root}` and `{room}` in them are the places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    name: &'static str,
    program: String,
    words: Vec<String>,
    /// A file to be written first: name in the room, text.
    config: Option<(&'static str, String)>,
}

fn find(names: &[&'static str], agent: &str, package: &str) -> Result<(&'static str, String)> {
    let found = names
        .iter()
        .find_map(|name| Some((*name, userns::helper(name)?)));
    match found {
        Some(found) => Ok(found),
        None => bail!(
            "Bootstrap: {agent} needs {} on this machine: install {package}, or start from Bootstrap: docker",
            names.join(" or ")
        ),
    }
}

fn needed<'a>(stage: &'a Stage, agent: &str, key: &str) -> Result<&'a str> {
    match stage.key(key) {
        Some(value) => Ok(value),
        None => bail!("Bootstrap: {agent} needs a line {key}: in the header"),
    }
}

/// The packages of `Include`.
fn include(stage: &Stage) -> Vec<String> {
    let text = stage.key("include").unwrap_or_default();
    text.split([' ', '\t', ',', '\n'])
        .filter(|w| !w.is_empty())
        .map(str::to_owned)
        .collect()
}

fn owned<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// Finds the tool.
///
/// # Errors
/// When it is not there, or a header line is missing.
pub fn prepare(agent: &str, stage: &Stage, settings: &Settings) -> Result<Base> {
    let tool = match agent {
        "debootstrap" => debootstrap(stage, settings)?,
        "zypper" => zypper(stage)?,
        "arch" => arch(stage)?,
        _ => yum(agent, stage)?,
    };
    if !matches!(settings.ids, Ids::All | Ids::Mapped(_)) {
        bail!(
            "Bootstrap: {agent} needs subordinate ids, and {} has none: a line in /etc/subuid and /etc/subgid, and newuidmap \
             (see capsid doctor)",
            settings.host.user.name
        );
    }
    // What a mirror has changes: a base is as good as new for a day.
    let day = settings.now_s.div_euclid(86400);
    Ok(Base {
        key: Some(format!("{tool:?} {day}")),
        kind: Kind::Tool(tool),
    })
}

fn debootstrap(stage: &Stage, settings: &Settings) -> Result<Tool> {
    let suite = needed(stage, "debootstrap", "osversion")?.to_owned();
    let mirror = needed(stage, "debootstrap", "mirrorurl")?.replace("%{OSVERSION}", &suite);
    let (name, program) = find(&["mmdebstrap", "debootstrap"], "debootstrap", "mmdebstrap")?;
    let include = include(stage).join(",");
    let mut words = owned(["--variant=minbase"]);
    if name == "mmdebstrap" {
        words.extend(owned(["--mode=root", "--format=directory"]));
        words.push(format!("--architectures={}", debian_arch(settings.arch)));
    } else {
        words.push("--exclude=openssl,udev,debconf-i18n,e2fsprogs".into());
        words.push(format!("--arch={}", debian_arch(settings.arch)));
    }
    if !include.is_empty() {
        words.push(format!("--include={include}"));
    }
    words.extend([suite, "{root}".into(), mirror]);
    Ok(Tool {
        name,
        program,
        words,
        config: None,
    })
}

fn debian_arch(go: &str) -> &str {
    match go {
        "386" => "i386",
        "arm" => "armhf",
        "ppc64le" => "ppc64el",
        other => other,
    }
}

fn yum(agent: &str, stage: &Stage) -> Result<Tool> {
    let mirror = needed(stage, agent, "mirrorurl")?;
    let version = match stage.key("osversion") {
        Some(version) => version.to_owned(),
        None if mirror.contains("%{OSVERSION}") => {
            bail!("Bootstrap: {agent}: MirrorURL has %{{OSVERSION}}: add a line OSVersion:")
        }
        None => String::new(),
    };
    let (name, program) = find(&["dnf", "yum"], agent, "dnf")?;
    let repository = |name: &str, url: &str| {
        let url = url.replace("%{OSVERSION}", &version);
        format!("[{name}]\nname={name}\nbaseurl={url}\nenabled=1\ngpgcheck=0\n")
    };
    let mut config = String::from(
        "[main]\ncachedir={room}/yum\nkeepcache=0\ndebuglevel=2\nlogfile={room}/yum.log\nexactarch=1\nobsoletes=1\n\
         gpgcheck=0\nplugins=0\nreposdir=/nonexistent\n",
    );
    config.push_str(&repository("base", mirror));
    if let Some(updates) = stage.key("updateurl") {
        config.push_str(&repository("updates", updates));
    }
    let mut words = owned([
        "--noplugins",
        "-c",
        "{room}/yum.conf",
        "--installroot",
        "{root}",
        "-y",
    ]);
    if !version.is_empty() {
        words.push(format!("--releasever={version}"));
    }
    let options = stage
        .key("setopt")
        .unwrap_or_default()
        .split_ascii_whitespace();
    words.extend(options.map(|option| format!("--setopt={option}")));
    words.extend(owned(["install", "/etc/redhat-release", "coreutils"]));
    words.extend(include(stage));
    Ok(Tool {
        name,
        program,
        words,
        config: Some(("yum.conf", config)),
    })
}

fn zypper(stage: &Stage) -> Result<Tool> {
    for key in [
        "product",
        "user",
        "regcode",
        "productpgp",
        "registerurl",
        "modules",
    ] {
        if stage.key(key).is_some() {
            bail!(
                "Bootstrap: zypper: {key}: registered SUSE products are not supported: use a MirrorURL that needs no registration"
            );
        }
    }
    let version = stage.key("osversion").unwrap_or_default();
    let mirror = needed(stage, "zypper", "mirrorurl")?.replace("%{OSVERSION}", version);
    let (_, program) = find(&["zypper"], "zypper", "zypper")?;
    let quote = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let mut script = format!(
        "set -e\nz() {{ {program} --root \"$root\" --no-gpg-checks --non-interactive \"$@\"; }}\nroot={{root}}\nz addrepo {} base\n",
        quote(&mirror)
    );
    let others = stage
        .header
        .iter()
        .filter(|(key, _)| *key == "updateurl" || key.starts_with("otherurl"));
    for (key, url) in others {
        let url = quote(&url.replace("%{OSVERSION}", version));
        script.push_str(&format!("z addrepo {url} {key}\n"));
    }
    let packages: Vec<String> = include(stage).iter().map(|p| quote(p)).collect();
    script.push_str(&format!(
        "z refresh\nz install --auto-agree-with-licenses aaa_base {}\n",
        packages.join(" ")
    ));
    Ok(Tool {
        name: "zypper",
        program: "/bin/sh".into(),
        words: owned(["{room}/zypper.script"]),
        config: Some(("zypper.script", script)),
    })
}

fn arch(stage: &Stage) -> Result<Tool> {
    let (_, program) = find(&["pacstrap"], "arch", "arch-install-scripts")?;
    let mut words: Vec<String> = Vec::new();
    if let Some(conf) = stage.key("confurl") {
        if !conf.starts_with('/') {
            bail!(
                "Bootstrap: arch: ConfURL {conf}: give the path of a pacman.conf on this machine"
            );
        }
        words.extend(["-C".into(), conf.to_owned()]);
    }
    words.extend(owned(["-c", "-G", "-M", "{root}", "base"]));
    words.extend(include(stage));
    Ok(Tool {
        name: "pacstrap",
        program,
        words,
        config: None,
    })
}

/// Runs the tool.
///
/// # Errors
/// When it fails.
pub fn run(tool: &Tool, root: &Path, room: &Path, settings: &Settings) -> Result<()> {
    let (root, place) = (root.display().to_string(), room.display().to_string());
    let fill = |text: &str| text.replace("{root}", &root).replace("{room}", &place);
    if let Some((name, text)) = &tool.config {
        let path = room.join(name);
        std::fs::write(&path, fill(text))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let words: Vec<String> = tool.words.iter().map(|w| fill(w)).collect();
    say::info(format_args!("Running {} {}", tool.name, words.join(" ")));
    // What it says is no result.
    let stderr = std::io::stderr().as_fd().try_clone_to_owned();
    let mut command = Command::new(&tool.program);
    for (name, _) in settings.host.env.iter().filter(|(name, _)| {
        let name = name.as_encoded_bytes();
        name.starts_with(b"APPTAINER") || name.starts_with(b"SINGULARITY")
    }) {
        command.env_remove(name);
    }
    let status = command
        .args(&words)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        // A home that is there and can be read: dpkg and others look for their settings in it.
        .env("HOME", room)
        .env("TMPDIR", room)
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stderr.context("cannot copy a descriptor")?)
        .status()
        .with_context(|| format!("cannot run {}", tool.program))?;
    if !status.success() {
        bail!("{} failed ({status})", tool.name);
    }
    Ok(())
}
