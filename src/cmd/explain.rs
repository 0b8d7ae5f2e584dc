//! `--explain`: the plan as text or JSON; nothing is run.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Explain;
use crate::image::Root;
use crate::plan::limits::Limits;
use crate::plan::{Capabilities, IdMap, Join, Layer, Ownership, Plan, Process, Source};
use crate::say;
use crate::secret::Shown;

/// All that a run does: the plan of the container, and what is settled around it.
#[derive(Serialize)]
pub struct Whole<'a> {
    /// The container.
    #[serde(flatten)]
    pub plan: &'a Plan,
    /// What it may use of the machine.
    pub limits: Limits,
    /// Published ports of a network that is connected to the outside.
    pub connection: Option<Vec<String>>,
    /// Where the root is unpacked, for this run only.
    pub unpacked_in: Option<PathBuf>,
    /// Seconds until it is ended.
    pub time_limit_s: Option<f64>,
}

/// Prints the plan.
///
/// # Errors
/// When a path in it cannot be written as JSON.
pub fn print(whole: &Whole, form: Explain) -> Result<()> {
    print_as(&whole.lines(), whole, form)
}

/// Prints what stepping into an instance does.
///
/// # Errors
/// As [`print`].
pub fn print_join(join: &Join, form: Explain) -> Result<()> {
    print_as(&join_lines(join), join, form)
}

fn print_as(lines: &[String], value: &impl Serialize, form: Explain) -> Result<()> {
    match form {
        Explain::Text => say::out(format_args!("{}\n", lines.join("\n"))),
        Explain::Json => say::out(format_args!(
            "{}\n",
            serde_json::to_string_pretty(value).context("the plan holds text that is not UTF-8")?
        )),
    }
}

impl Whole<'_> {
    /// A line each.
    pub fn lines(&self) -> Vec<String> {
        let mut all = lines(self.plan);
        let unpacked = self.unpacked_in.iter().map(|dir| dir.display());
        all.extend(unpacked.map(|dir| format!("{:<9}the root, in {dir}, for this run", "unpack")));
        let connected = self.connection.iter();
        all.extend(connected.map(|ports| {
            let ports = match ports.as_slice() {
                [] => String::new(),
                ports => format!("; ports of the host: {}", ports.join(", ")),
            };
            format!("{:<9}connected by pasta or slirp4netns{ports}", "network")
        }));
        all.extend(
            self.limits
                .words()
                .map(|words| format!("{:<9}{words}", "limit")),
        );
        all.extend(
            self.time_limit_s
                .map(|s| format!("{:<9}{s} seconds of time", "limit")),
        );
        let rights = self.plan.process.rights;
        for (set, word) in [(rights.add, "also"), (rights.drop, "without")] {
            if set != Capabilities::default() {
                all.push(format!("{:<9}{word} {}", "rights", set.names()));
            }
        }
        all
    }
}

/// What stepping into an instance does, a line each.
pub fn join_lines(join: &Join) -> Vec<String> {
    vec![
        format!("{:<9}the namespaces of process {}", "join", join.target.pid),
        format!("{:<9}{}", "cwd", join.process.cwd.display()),
        process(&join.process),
    ]
}

/// The plan, a line each.
pub fn lines(plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    let names = plan.namespaces;
    let new: Vec<&str> = [
        ("pid", names.pid),
        ("ipc", names.ipc),
        ("net", names.net),
        ("uts", names.uts),
    ]
    .into_iter()
    .filter_map(|(name, new)| new.then_some(name))
    .collect();
    lines.push(format!(
        "{:<9}user, mount{}{}; {}",
        "enter",
        if new.is_empty() { "" } else { ", " },
        new.join(", "),
        match plan.ownership {
            Ownership::Kernel | Ownership::Devices => ids(&plan.ids),
            Ownership::Emulated => format!("{}, others emulated", ids(&plan.ids)),
        }
    ));
    if let Some(name) = &plan.hostname {
        lines.push(format!("{:<9}{name}", "hostname"));
    }
    lines.push(format!(
        "{:<9}{}{}",
        "root",
        root(&plan.root),
        if plan.writable_root {
            " (writable)"
        } else {
            ""
        }
    ));
    for layer in &plan.layers {
        let text = match layer {
            Layer::Tmpfs(Some(bytes)) => format!("memory, {bytes} bytes, writable"),
            Layer::Tmpfs(None) => "memory, writable".into(),
            Layer::Directory(dir) => format!("{}, writable", dir.display()),
            Layer::ReadOnlyDirectory(dir) => dir.display().to_string(),
            Layer::Image(image) => root(image),
        };
        lines.push(format!("{:<9}{text}", "layer"));
    }
    for mount in &plan.mounts {
        let mode = if mount.writable { "rw" } else { "ro" };
        lines.push(format!(
            "{:<9}{} -> {}  {mode}  ({})",
            "mount",
            source(&mount.source),
            mount.target.display(),
            mount.why
        ));
    }
    for (name, value) in &plan.environment.vars {
        lines.push(format!(
            "{:<9}{}={}",
            "env",
            name.display(),
            Shown::new(name, value)
        ));
    }
    for (name, value) in &plan.environment.host {
        lines.push(format!(
            "{:<9}{}={}  (unless the image sets it)",
            "env",
            name.display(),
            Shown::new(name, value)
        ));
    }
    for (name, value) in &plan.environment.overrides {
        lines.push(format!(
            "{:<9}{}={}  (over the image's)",
            "env",
            name.display(),
            Shown::new(name, value)
        ));
    }
    lines.push(process(&plan.process));
    lines
}

fn process(process: &Process) -> String {
    let args: Vec<String> = process.args.iter().map(|a| format!("{a:?}")).collect();
    format!(
        "{:<9}{} {} in {}",
        "process",
        process.verb.name(),
        args.join(" "),
        process.cwd.display()
    )
}

fn ids(ids: &IdMap) -> String {
    match ids {
        IdMap::Own { uid, gid } => format!("ids {uid}:{gid} as outside"),
        IdMap::All => "all ids as outside".into(),
        IdMap::Root { uid, gid } => format!("root is {uid}:{gid}"),
        IdMap::Ranges { uid, gid, sub } => {
            format!(
                "root is {uid}:{gid}, users from 1 are {} + {}, groups {} + {}",
                sub.uids.0, sub.uids.1, sub.gids.0, sub.gids.1
            )
        }
    }
}

fn root(root: &Root) -> String {
    match root {
        Root::Directory(path) => format!("directory {}", path.display()),
        Root::Squashfs {
            file,
            offset_bytes,
            len_bytes,
        } => format!(
            "squashfs {} at {offset_bytes}, {len_bytes} bytes",
            file.display()
        ),
        Root::Ext {
            file,
            offset_bytes,
            len_bytes,
            ..
        } => format!(
            "ext3 {} at {offset_bytes}, {len_bytes} bytes",
            file.display()
        ),
    }
}

fn source(source: &Source) -> String {
    match source {
        Source::Bind(path) => format!("bind {}", path.display()),
        Source::Directory(path, mode) => {
            format!("bind {} (made with mode {mode:o})", path.display())
        }
        Source::Private(mode) => format!("memory, mode {mode:o}"),
        Source::Proc => "proc".into(),
        Source::Dev { .. } => "private devices".into(),
        Source::Text(text) => format!("text of {} bytes", text.len()),
        Source::Passwd(account) => format!("the image's passwd with {}", account.name),
        Source::Group(account) => format!(
            "the image's group with {} of {}'s",
            account.groups.len(),
            account.name
        ),
        Source::Image(part) => format!("{} of {}", part.path.display(), root(&part.root)),
    }
}
