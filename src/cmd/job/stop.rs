//! `job stop`: stopping the instances of a job, by hand or at its end, and saying what became of them.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{srun, supervisor};
use crate::host::Host;
use crate::instance::{Registry, ending};
use crate::job::{self, State};
use crate::plan::services::Nodes;
use crate::{exit, say};

/// Options of `job stop`.
#[derive(clap::Args, Debug)]
pub struct StopArgs {
    /// Seconds after which instances are killed
    #[arg(short = 't', long, value_name = "SEC", default_value_t = 10)]
    pub timeout: u32,
    /// On all nodes of the job
    #[arg(long)]
    pub all_nodes: bool,
    /// For Slurm's TaskEpilog: on other nodes only if services seem to run there
    #[arg(long, hide = true)]
    pub at_end: bool,
    /// Tell of the services that could not be started, too
    #[arg(long, hide = true)]
    pub failed: bool,
}

/// Stops them.
///
/// # Errors
/// Where there is no supervisor, and when the other nodes cannot be reached.
pub fn run(args: &StopArgs) -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    let supervisor = supervisor(&host, &registry)?;
    let mut far = None;
    if args.all_nodes || args.at_end && seem_elsewhere(&registry) {
        far = begin_elsewhere(&host, args)?;
    }
    let report = args.at_end && wants_report(&host, &registry);
    let mut failed = String::new();
    if args.at_end || args.failed {
        failed = job::failures(&job::services(&registry).unwrap_or_default());
    }
    let mut status = supervisor.stop(Duration::from_secs(args.timeout.into()))?;
    let mut lines = on_node(&host, &(failed + &ending::take(&registry)));
    if let Some(mut far) = far {
        let mut out = far.stdout.take().context("srun's output")?;
        out.read_to_string(&mut lines).context("srun's output")?;
        let ended = far.wait().context("srun")?;
        // A job that Slurm ends can have no more steps: then other nodes' instances have ended already.
        if status == exit::OK && !args.at_end {
            status = u8::try_from(ended.code().unwrap_or(255)).unwrap_or(exit::FATAL);
        }
    }
    if !args.at_end {
        say::out(format_args!("{lines}"))?;
    } else {
        // That there is no service everybody wants to know.
        let told = |line: &&str| report || line.starts_with(job::FAILURE);
        let lines: String = lines.split_inclusive('\n').filter(told).collect();
        if !lines.is_empty() {
            append(&output_of_job(&host)?, &lines)?;
        }
    }
    Ok(status)
}

/// Lines with the node behind the name, where the job has several.
fn on_node(host: &Host, lines: &str) -> String {
    let (node, nodes) = job::supervisor::nodes(&|name| host.var(name).map(OsString::from));
    if nodes.len() < 2 {
        return lines.to_owned();
    }
    let with_node = |line: &str| {
        let behind = line.find(": ").map_or(0, |at| at + 2);
        let end = match line.strip_prefix(job::FAILURE) {
            Some(rest) => job::FAILURE.len() + rest.find(' ').unwrap_or(rest.len()),
            None => {
                let rest = &line[behind..];
                behind + rest.find(':').unwrap_or(rest.len())
            }
        };
        format!("{} on {node}{}", &line[..end], &line[end..])
    };
    lines.split_inclusive('\n').map(with_node).collect()
}

/// Whether other nodes of the job seem to have instances: ones that are declared, or such as there are here.
fn seem_elsewhere(registry: &Registry) -> bool {
    let declared = job::services(registry).unwrap_or_default().services;
    let far = |s: &job::Service| s.state == State::Elsewhere || s.declared.nodes == Nodes::All;
    !registry.list().is_empty() || declared.iter().any(far)
}

/// A step of the job that does the same on its other nodes, if it has any.
fn begin_elsewhere(host: &Host, args: &StopArgs) -> Result<Option<Child>> {
    let (node, nodes) = job::supervisor::nodes(&|name| host.var(name).map(OsString::from));
    let others: Vec<&str> = nodes
        .iter()
        .map(String::as_str)
        .filter(|n| *n != node)
        .collect();
    if others.is_empty() {
        return Ok(None);
    }
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut srun = srun(others.len());
    srun.arg(format!("--nodelist={}", others.join(",")))
        .arg(program)
        .args(["job", "stop", "--timeout", &args.timeout.to_string()])
        .stdout(Stdio::piped());
    if args.at_end {
        srun.arg("--failed").stderr(Stdio::null());
    }
    let child = srun.spawn();
    child
        .map(Some)
        .context("cannot start srun, which reaches the other nodes of the job")
}

/// Whether the user asked for lines in the job's output: in the comment, or by `CAPSID_JOB_REPORT`.
fn wants_report(host: &Host, registry: &Registry) -> bool {
    let variable = host
        .var("CAPSID_JOB_REPORT")
        .is_some_and(|v| !v.is_empty() && v != "0" && v != "no");
    variable || job::services(registry).is_some_and(|list| list.report)
}

/// The file that the job's output goes to, as Slurm says.
fn output_of_job(host: &Host) -> Result<PathBuf> {
    let job = host.job().context("there is no job here")?;
    let out = Command::new("scontrol")
        .args(["show", "job", &job])
        .stdin(Stdio::null())
        .output();
    let out = out.context("cannot start scontrol, which knows the job's output")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let path = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("StdOut="));
    match path {
        Some(path) if path.starts_with('/') => Ok(path.into()),
        _ => bail!("scontrol does not say where the output of job {job} goes"),
    }
}

fn append(path: &std::path::Path, lines: &str) -> Result<()> {
    let what = || format!("cannot write to the job's output {}", path.display());
    let mut file = std::fs::File::options()
        .append(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .with_context(what)?;
    if file.metadata().with_context(what)?.is_file() {
        file.write_all(lines.as_bytes()).with_context(what)?;
    }
    Ok(())
}
