//! `instance unit`: a systemd unit that keeps an instance.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::action;
use crate::cmd::fetch::RunAccess;
use crate::cmd::flags::StartArgs;
use crate::host::Host;
use crate::plan::service::is_name;
use crate::{exit, say};

/// Options of `instance unit`; all of `instance start` follow it into the unit.
#[derive(clap::Args, Debug)]
pub struct UnitArgs {
    /// A unit for the system's manager, which runs the instance as the present user
    #[arg(long, help_heading = "Unit")]
    pub system: bool,
    /// Run the image's runscript instead of its startscript
    #[arg(long, help_heading = "Unit")]
    pub run: bool,
    #[command(flatten)]
    /// What `instance start` takes
    pub start: StartArgs,
}

/// Prints the unit.
///
/// # Errors
/// For a name that none can have.
pub fn run(words: &[OsString]) -> Result<u8> {
    let host = Host::read()?;
    let parsed = crate::cmd::parse_with_image::<UnitArgs>("instance unit", words, &host, 2)?;
    let (args, rest) = (parsed.args, parsed.words);
    let name = rest[1].to_string_lossy().into_owned();
    if !is_name(&name) {
        bail!("{name:?} is not a valid instance name");
    }
    if args.start.action.explain.is_some() {
        bail!("--explain shows the plan of instance start, and instance unit starts nothing");
    }
    let options = &words[..words.len() - rest.len()];
    let own = ["--system", "--run", "--foreground", "--"];
    let options = options.iter().filter(|w| !own.iter().any(|o| *w == *o));
    let program = called(&host)?;
    // An image elsewhere is fetched when the unit starts.
    let image = match action::is_elsewhere(&rest[0], &host) {
        true => rest[0].clone().into(),
        false => action::image_path(&rest[0], &host, &RunAccess::default())?
            .path
            .clone(),
    };
    let verb = if args.run { "run" } else { "start" };
    let mut start: Vec<String> = [
        program.as_os_str(),
        "instance".as_ref(),
        verb.as_ref(),
        "--foreground".as_ref(),
    ]
    .into_iter()
    .map(quoted)
    .collect();
    start.extend(options.map(|w| quoted(w)));
    start.push(quoted(image.as_os_str()));
    start.push(quoted(name.as_ref()));
    start.extend(rest[2..].iter().map(|w| quoted(w)));
    let stop = [
        program.as_os_str(),
        "instance".as_ref(),
        "stop".as_ref(),
        name.as_ref(),
    ];
    let stop: Vec<String> = stop.into_iter().map(quoted).collect();
    let place = if args.system {
        format!("/etc/systemd/system/{name}.service, then: systemctl enable --now {name}")
    } else {
        format!(
            "~/.config/systemd/user/{name}.service, then: systemctl --user enable --now {name} (and loginctl enable-linger, to run without a login)"
        )
    };
    say::out(format_args!("# {place}\n"))?;
    say::out(format_args!(
        "[Unit]\nDescription=Instance {name} of {}\n",
        image.display()
    ))?;
    if args.system {
        // Sockets of image servers lie in the user's runtime directory.
        let runtime = format!("user-runtime-dir@{}.service", host.uid);
        say::out(format_args!(
            "Wants=network-online.target {runtime}\nAfter=network-online.target {runtime}\n"
        ))?;
    }
    say::out(format_args!(
        "\n[Service]\nType=notify\nNotifyAccess=main\n"
    ))?;
    if args.system {
        say::out(format_args!("User={}\n", host.user.name))?;
        say::out(format_args!(
            "Environment=XDG_RUNTIME_DIR=/run/user/{}\n",
            host.uid
        ))?;
    }
    say::out(format_args!(
        "WorkingDirectory={}\n",
        quoted(host.cwd.as_os_str())
    ))?;
    say::out(format_args!("ExecStart={}\n", start.join(" ")))?;
    say::out(format_args!("ExecStop={}\n", stop.join(" ")))?;
    // What a service ends with that was asked to.
    say::out(format_args!("SuccessExitStatus=130 143\n"))?;
    say::out(format_args!(
        "Restart=on-failure\nTimeoutStopSec=30\nDelegate=yes\n"
    ))?;
    say::out(format_args!(
        "\n[Install]\nWantedBy={}\n",
        if args.system {
            "multi-user.target"
        } else {
            "default.target"
        }
    ))?;
    Ok(exit::OK)
}

/// The path by which this program was called: a link to it stays when an update takes what it leads to.
fn called(host: &Host) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let name = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&name);
    let candidates: Vec<PathBuf> = match name.components().count() {
        1 if !name.as_os_str().as_encoded_bytes().contains(&b'/') => {
            let path = host.var("PATH").unwrap_or_default();
            let directories = std::env::split_paths(path);
            directories.map(|d| host.cwd.join(d).join(name)).collect()
        }
        _ => vec![host.cwd.join(name)],
    };
    let is_own = |path: &&PathBuf| match (rustix::fs::stat(*path), rustix::fs::stat(&own)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    };
    let found = candidates
        .iter()
        .find(is_own)
        .map(|path| without_dots(path));
    Ok(found.unwrap_or(own))
}

/// Without `.` in it, which leads nowhere else; `..` may lead through a link.
fn without_dots(path: &Path) -> PathBuf {
    path.components().collect()
}

/// A word of a command line in a unit (`systemd.service(5)`): quoted where needed, specifiers and variables escaped.
fn quoted(word: &std::ffi::OsStr) -> String {
    let text = word.to_string_lossy();
    let escaped = text
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('%', "%%")
        .replace('$', "$$")
        .replace('\n', "\\n");
    if escaped.is_empty() || escaped.contains([' ', '\t', '\'', ';', '"', '\\']) {
        format!("\"{escaped}\"")
    } else {
        escaped
    }
}
