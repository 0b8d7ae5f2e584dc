//! `job begin|end|sweep` for the scripts of Slurm, `job status|start|stop|env|services` for people.

mod oci;
mod stop;

use std::ffi::OsString;
use std::io::{BufRead as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

pub use self::oci::OciRunArgs;
pub use self::stop::StopArgs;
use super::Persona;
use crate::engine::sys;
use crate::host::Host;
use crate::instance::Registry;
use crate::job::client::{self, Supervisor};
use crate::job::root::{self, Declaration, Job};
use crate::job::{State, supervisor};
use crate::plan::services::wants_report;
use crate::{exit, job, say};

/// The commands below `job`, with the line that their list shows.
pub const COMMANDS: &[(&str, &str)] = &[
    (
        "status",
        "Show the services of this job, and its instances on this node",
    ),
    ("start", "Start the services of a file in this job"),
    ("stop", "Stop all instances of this job on this node"),
    (
        "env",
        "Print where the services of this job are, for a shell",
    ),
    (
        "services",
        "Without the administrator's scripts: start a supervisor on every node",
    ),
    (
        "begin",
        "For Slurm's Prolog (root): make a job's directory, start its supervisor",
    ),
    (
        "end",
        "For Slurm's Epilog (root): end what is left of a job",
    ),
    (
        "oci-run",
        "For RunTimeRun of Slurm's oci.conf: run the program of a bundle",
    ),
    ("sweep", "For root: end what is left of jobs that are over"),
];

/// The job that root's commands are about.
#[derive(clap::Args, Debug)]
pub struct BeginArgs {
    /// The job's number
    #[arg(long)]
    pub job: u32,
    /// The number of its user
    #[arg(long)]
    pub uid: u32,
    /// The number of the user's group
    #[arg(long)]
    pub gid: u32,
}

/// The job that is over.
#[derive(clap::Args, Debug)]
pub struct EndArgs {
    /// The job's number
    #[arg(long)]
    pub job: u32,
}

/// No options.
#[derive(clap::Args, Debug)]
pub struct NoArgs {}

/// Options of `job env`.
#[derive(clap::Args, Debug)]
pub struct EnvArgs {
    /// For Slurm's TaskProlog of the batch script: tell what is wrong, too
    #[arg(long, hide = true)]
    pub task_prolog: bool,
}

/// Options of `job supervise`.
#[derive(clap::Args, Debug)]
pub struct SuperviseArgs {
    /// The descriptor of the socket where requests come
    #[arg(long)]
    pub socket: Option<i32>,
    /// Say a word to standard output when we listen
    #[arg(long)]
    pub announce: bool,
}

/// Options of `job start`.
#[derive(clap::Args, Debug)]
pub struct StartArgs {
    /// The file that names the services
    #[arg(short = 'f', long, value_name = "FILE")]
    pub file: PathBuf,
    /// Only those of this node
    #[arg(long)]
    pub here: bool,
}

/// Options of `job status`.
#[derive(clap::Args, Debug)]
pub struct StatusArgs {
    /// As JSON
    #[arg(short = 'j', long)]
    pub json: bool,
}

/// Runs `job WORDS…`.
///
/// # Errors
/// [`Usage`] for a wrong command line; anything else is fatal.
pub fn run(words: &[OsString], persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let rest = words.get(1..).unwrap_or_default();
    match verb {
        "begin" => begin(&super::parse("job begin", rest)?),
        "end" => end(&super::parse("job end", rest)?),
        "sweep" => {
            super::parse::<NoArgs>("job sweep", rest)?;
            need_root("sweep")?;
            root::sweep().map(|()| exit::OK)
        }
        "supervise" => supervise(&super::parse("job supervise", rest)?),
        "spawn" => spawn(rest),
        "status" => status(&super::parse("job status", rest)?),
        "start" => start(&super::parse("job start", rest)?),
        "stop" => stop::run(&super::parse("job stop", rest)?),
        "oci-run" => oci::run(&super::parse("job oci-run", rest)?),
        "env" => env(&super::parse("job env", rest)?),
        "services" => {
            super::parse::<NoArgs>("job services", rest)?;
            services()
        }
        other => super::print_group("job", "Services of Slurm jobs", COMMANDS, other, persona),
    }
}

fn need_root(command: &str) -> Result<()> {
    if !rustix::process::getuid().is_root() {
        bail!("capsid job {command} is for root: Slurm's Prolog and Epilog call it");
    }
    Ok(())
}

fn begin(args: &BeginArgs) -> Result<u8> {
    need_root("begin")?;
    // Data for the supervisor; of these only the last is used here, and that is Slurm's own.
    const FOR_THE_SUPERVISOR: [&str; 7] = [
        "SLURM_JOB_NODELIST",
        "SLURMD_NODENAME",
        "SLURM_JOB_NUM_NODES",
        "CAPSID_JOB_COMMENT",
        "CAPSID_JOB_SERVICES",
        "CAPSID_JOB_DIRECTORY",
        "SLURM_CONF",
    ];
    let env = FOR_THE_SUPERVISOR
        .iter()
        .filter_map(|name| Some(((*name).into(), std::env::var_os(name)?)));
    let declaration = Declaration {
        env: env.collect(),
        slurm_conf: std::env::var_os("SLURM_CONF").map(PathBuf::from),
    };
    let job = Job {
        id: args.job,
        uid: args.uid,
        gid: args.gid,
    };
    report(args.job, root::begin(job, &declaration))
}

fn end(args: &EndArgs) -> Result<u8> {
    need_root("end")?;
    report(args.job, root::end(args.job))
}

/// Nobody reads what a Prolog prints: what goes wrong is written down, too.
fn report(job: u32, done: Result<()>) -> Result<u8> {
    if let Err(error) = &done {
        root::trouble(&format!("job {job}: {error:#}"));
    }
    done.map(|()| exit::OK)
}

fn supervise(args: &SuperviseArgs) -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    let socket = args.socket.filter(|fd| *fd > 2).map(sys::own);
    if let Some(fd) = &socket {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)
            .context("the descriptor of the socket")?;
    }
    let var = |name: &str| host.var(name).map(OsString::from);
    let (node, nodes) = supervisor::nodes(&var);
    let file = supervisor::declared_by(
        host.var("CAPSID_JOB_COMMENT"),
        host.var("CAPSID_JOB_DIRECTORY"),
    );
    let comment = host.var("CAPSID_JOB_COMMENT").and_then(|c| c.to_str());
    let option = host.var("CAPSID_JOB_SERVICES").and_then(|v| v.to_str());
    let setup = supervisor::Setup {
        report: comment.is_some_and(wants_report),
        misunderstood: comment.and_then(crate::plan::services::misunderstood),
        option: option.filter(|o| !o.is_empty()).map(str::to_owned),
        directory: host
            .var("CAPSID_JOB_DIRECTORY")
            .map_or_else(|| host.cwd.clone(), PathBuf::from),
        socket,
        // Through a copy of standard output; the byte is the word.
        announce: args
            .announce
            .then(|| rustix::io::dup(rustix::stdio::stdout()))
            .transpose()
            .context("cannot duplicate a descriptor")?,
        node,
        nodes,
        file,
    };
    supervisor::run(&registry, &host, setup)
}

/// What the supervisor executes: `instance start|run` whose instance ends with the supervisor.
fn spawn(words: &[OsString]) -> Result<u8> {
    let number = |at: usize| words.get(at)?.to_str()?.parse::<i32>().ok();
    let (Some(life), Some(level), Some(verb)) =
        (number(0).filter(|fd| *fd > 2), number(1), words.get(2))
    else {
        bail!("capsid job spawn is what a supervisor executes");
    };
    say::set_level(i8::try_from(level).unwrap_or(say::INFO));
    let life = sys::own(life);
    rustix::io::fcntl_setfd(&life, rustix::io::FdFlags::CLOEXEC)
        .context("the descriptor of the supervisor")?;
    super::instance::start::spawned(&verb.to_string_lossy(), &words[3..], life)
}

/// The supervisor of this job; an error that says what to do when there is none.
fn supervisor(host: &Host, registry: &Registry) -> Result<Supervisor> {
    let Some(job) = &registry.job else {
        bail!(
            "this is not a Slurm job: there is no job in the cgroup's path, and SLURM_JOB_ID is not set"
        );
    };
    client::find(registry).with_context(|| {
        if let Some(nodes) = elsewhere(host) {
            return format!(
                "this machine is none of the nodes of job {job} ({nodes}): run this on one of them, by srun"
            );
        }
        format!(
            "job {job} has no supervisor on this node: start them by capsid job services in the batch script, or let the administrator \
             install Capsid's scripts (slurm/README.md)"
        )
    })
}

/// The nodes of our job, when this machine is none of them: the shell of `salloc` runs on a login host.
pub fn elsewhere(host: &Host) -> Option<String> {
    if host.var("SLURMD_NODENAME").is_some() || host.is_job_in_cgroup() {
        return None;
    }
    let list = host.var("SLURM_JOB_NODELIST")?.to_str()?;
    let nodes = crate::plan::hostlist::expand(list)?;
    let own = crate::instance::logs::node_name();
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let here = nodes.iter().any(|node| short(node) == short(&own));
    (!here).then(|| list.to_owned())
}

fn status(args: &StatusArgs) -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    if registry.job.is_none() {
        bail!(
            "this is not a Slurm job: there is no job in the cgroup's path, and SLURM_JOB_ID is not set"
        );
    }
    let supervised = client::find(&registry).is_some();
    let list = job::services(&registry).unwrap_or_default();
    let records = registry.list();
    if args.json {
        let names: Vec<&str> = records.iter().map(|r| r.name.as_str()).collect();
        let value = serde_json::json!({
            "job": registry.job, "supervisor": supervised, "services": list.services, "pending": list.pending,
            "failure": list.failure, "instances": names,
        });
        say::out(format_args!("{value:#}\n"))?;
        return Ok(exit::OK);
    }
    say::out(format_args!(
        "job {}: {}\n",
        registry.job.as_deref().unwrap_or_default(),
        if supervised {
            "a supervisor on this node"
        } else {
            "no supervisor on this node"
        }
    ))?;
    if let Some(failure) = &list.failure {
        say::out(format_args!(
            "services: {}\n",
            say::printable(&say::plain(failure))
        ))?;
    }
    for service in &list.services {
        let state = match &service.state {
            State::Waiting => "waits for others".into(),
            State::Starting => "is starting".into(),
            State::Ready => "ready".into(),
            State::Ended => format!(
                "has ended: see capsid instance logs {}",
                service.declared.name
            ),
            State::Elsewhere => format!("runs on node {}", service.node),
            State::Failed(why) => format!("failed: {}", say::printable(&say::plain(why))),
        };
        say::out(format_args!("service {}: {state}\n", service.declared.name))?;
    }
    for record in &records {
        say::out(format_args!(
            "instance {}: {}\n",
            record.name,
            record.image.display()
        ))?;
    }
    Ok(exit::OK)
}

fn start(args: &StartArgs) -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    let supervisor = supervisor(&host, &registry)?;
    let file = host.cwd.join(&args.file);
    let nodes = supervisor::nodes(&|name| host.var(name).map(OsString::from)).1;
    if args.here || nodes.len() < 2 {
        return supervisor.services(&host, file.into());
    }
    // On every node, by a step of the job that does not wait for others to end.
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut srun = srun(nodes.len());
    let status = srun
        .arg(program)
        .args(["job", "start", "--here", "-f"])
        .arg(file)
        .status();
    let status = status.context("cannot start srun, which reaches the other nodes of the job")?;
    Ok(u8::try_from(status.code().unwrap_or(255)).unwrap_or(exit::FATAL))
}

fn srun(nodes: usize) -> Command {
    let mut srun = Command::new("srun");
    let count = nodes.to_string();
    srun.args([
        "--overlap",
        "--quiet",
        "--ntasks-per-node=1",
        "-N",
        &count,
        "-n",
        &count,
        "--mem=0",
    ]);
    srun.stdin(Stdio::null());
    srun
}

/// Runs a command of this program on every node of the job, each line behind the node's number.
///
/// # Errors
/// Outside of jobs, and where there is no srun.
pub fn on_all_nodes(host: &Host, words: &[&str]) -> Result<u8> {
    if host.job().is_none() {
        bail!(
            "this is not a Slurm job: there is no job in the cgroup's path, and SLURM_JOB_ID is not set"
        );
    }
    let nodes = supervisor::nodes(&|name| host.var(name).map(OsString::from)).1;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut srun = srun(nodes.len());
    let status = srun.arg("--label").arg(program).args(words).status();
    let status = status.context("cannot start srun, which reaches the other nodes of the job")?;
    Ok(u8::try_from(status.code().unwrap_or(255)).unwrap_or(exit::FATAL))
}

fn env(args: &EnvArgs) -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    let Some(supervisor) = client::find(&registry) else {
        return Ok(exit::OK);
    };
    let list = supervisor.list()?;
    say::out(format_args!("{}", job::exports(&list)))?;
    if args.task_prolog {
        // What Slurm puts into the job's output.
        if let Some(failure) = &list.failure {
            let failure = job::one_line(failure);
            say::out(format_args!(
                "print CAPSID: the services of this job could not be read: {failure}\n"
            ))?;
        }
    }
    Ok(exit::OK)
}

/// A step in the background that holds a supervisor on every node.
fn services() -> Result<u8> {
    let host = Host::read()?;
    let registry = Registry::open(&host);
    let Some(job) = &registry.job else {
        bail!(
            "this is not a Slurm job: there is no job in the cgroup's path, and SLURM_JOB_ID is not set"
        );
    };
    if client::find(&registry).is_some() {
        say::info(format_args!("job {job} has a supervisor already"));
        return Ok(exit::OK);
    }
    if host.in_numbered_step() {
        bail!(
            "capsid job services belongs into the batch script: started by srun, it would end with this step"
        );
    }
    let nodes = supervisor::nodes(&|name| host.var(name).map(OsString::from)).1;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut srun = srun(nodes.len());
    srun.arg(program)
        .args(["job", "supervise", "--announce"])
        // What ends us, or a key at the terminal, is not for it.
        .process_group(0)
        .stdout(Stdio::piped());
    let mut child = srun
        .spawn()
        .context("cannot start srun, which reaches the nodes of the job")?;
    let mut out = std::io::BufReader::new(child.stdout.take().context("srun's output")?);
    let mut ready = 0;
    while ready < nodes.len() {
        let bytes = out.fill_buf().context("srun's output")?;
        if bytes.is_empty() {
            let status = child.wait().context("srun")?;
            bail!(
                "srun ended with {status} before all {} supervisors of job {job} were there",
                nodes.len()
            );
        }
        ready += bytes.iter().filter(|b| **b == b'1').count();
        let len = bytes.len();
        out.consume(len);
    }
    // srun stays, with a pipe that nobody reads: nothing more is said there.
    std::mem::forget(out);
    let _ = std::io::stdout().flush();
    say::info(format_args!(
        "job {job} has a supervisor on each of its {} nodes",
        nodes.len()
    ));
    Ok(exit::OK)
}
