//! A cluster of real Slurm, as `tests/slurm-cluster` starts it before (`tests/run` does), and a directory with an image.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::common::{self, Env, Output, output, script};

/// Answers by HTTP on `$PORT`, and says when it is asked to stop.
const SERVICE: &str = "#!/bin/sh
trap 'echo stopping; sleep 0.2; echo stopped; exit 0' TERM INT
echo started \"$@\"
if [ -n \"$PORT\" ]; then httpd -f -p $PORT -h /opt & fi
while :; do sleep 0.05; done
";

/// How late the Epilog of Slurm 24.11 may begin (see [`Slurm::are_epilogs_over`]).
const LATE_EPILOG: Duration = Duration::from_secs(75);

/// The log of a service that was given the time to stop.
pub const ORDERLY: &str = "stopping\nstopped\n";

/// A cluster, and a directory with an image for jobs in it.
pub struct Slurm {
    pub cluster: &'static str,
    pub top: PathBuf,
    pub env: Env,
    pub image: String,
    _turn: Turn,
}

/// Tests run beside each other, but none in a cluster of which another lets a node fail.
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// The lock of a cluster.
fn turns(cluster: &'static str) -> &'static RwLock<()> {
    static TURNS: Mutex<BTreeMap<&str, &RwLock<()>>> = Mutex::new(BTreeMap::new());
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    turns
        .entry(cluster)
        .or_insert_with(|| Box::leak(Box::default()))
}

impl Slurm {
    pub fn new(cluster: &'static str) -> Slurm {
        let turn = turns(cluster)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        Slurm::up(cluster, Turn::Shared(turn))
    }

    /// For a test that lets a node fail.
    pub fn alone(cluster: &'static str) -> Slurm {
        let turn = turns(cluster)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        Slurm::up(cluster, Turn::Alone(turn))
    }

    fn up(cluster: &'static str, turn: Turn) -> Slurm {
        let top = std::env::var_os("CAPSID_SLURM")
            .expect("CAPSID_SLURM is not set: run tests/run as root, or tests/slurm-cluster");
        let env = Env::new();
        let tree = env.tree("tree");
        script(&tree.join(".singularity.d/startscript"), SERVICE);
        let image = env.sif(&tree, "service.sif").display().to_string();
        let slurm = Slurm {
            cluster,
            top: top.into(),
            env,
            image,
            _turn: turn,
        };
        let up = slurm.run(&["sinfo", "-h", "-N", "-o", "%t"]);
        assert_eq!(
            up.ok().lines().count(),
            2,
            "the cluster {cluster} is not up: {up}"
        );
        slurm
    }

    /// A command of Slurm, as the user.
    pub fn command(&self, words: &[&str]) -> Command {
        let directory = self.top.join(self.cluster);
        // Clients of a release that is not this machine's are there.
        let path = format!(
            "{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            directory.join("bin").display()
        );
        let mut command = self.env.command_as(Path::new("env"), words);
        command
            .env("PATH", path)
            .env("SLURM_CONF", directory.join("slurm.conf"))
            .env("APPTAINER_CONFIGDIR", self.env.path("config"))
            .env("CAPSID", env!("CARGO_BIN_EXE_capsid"))
            .env("IMAGE", &self.image);
        if self.cluster == "bare" {
            // Each node has its own /run/user, as different machines do.
            command.env_remove("XDG_RUNTIME_DIR");
        }
        command
    }

    pub fn run(&self, words: &[&str]) -> Output {
        let mut all = vec!["timeout", "100"];
        all.extend_from_slice(words);
        output(&mut self.command(&all))
    }

    /// Submits a batch script; gives the number of the job.
    pub fn submit(&self, options: &[&str], text: &str) -> String {
        let file = self.env.work().join(format!("{}.sh", uuid::Uuid::new_v4()));
        script(&file, &format!("#!/bin/bash\n{text}\n"));
        let out = self.env.work().join("out.%j").display().to_string();
        let mut words = vec!["sbatch", "--parsable", "--open-mode=append", "-o", &out];
        words.extend_from_slice(options);
        let file = file.display().to_string();
        words.push(&file);
        self.run(&words).ok().to_owned()
    }

    /// What a job has said so far.
    pub fn said(&self, job: &str) -> String {
        fs::read_to_string(self.env.work().join(format!("out.{job}"))).unwrap_or_default()
    }

    pub fn state(&self, job: &str) -> String {
        let out = self.run(&["scontrol", "show", "job", "-o", job]);
        let word = out
            .stdout
            .split_whitespace()
            .find_map(|w| w.strip_prefix("JobState="));
        word.unwrap_or_default().to_owned()
    }

    /// Kills slurmd on a node; it is gone afterwards.
    #[track_caller]
    pub fn kill_node(&self, node: &str) {
        let pid = self.slurmd(node).expect("slurmd runs");
        self.ask("kill", node);
        let stat = format!("/proc/{pid}/stat");
        common::wait_until("the end of slurmd", || {
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
    }

    /// Starts slurmd on a node where it was killed.
    #[track_caller]
    pub fn start_node(&self, node: &str) {
        self.ask("start", node);
        common::wait_until("the start of slurmd", || self.slurmd(node).is_some());
    }

    fn ask(&self, verb: &str, node: &str) {
        let line = format!("{verb} {} {node}\n", self.cluster);
        fs::write(self.top.join("control"), line).unwrap();
    }

    /// The process of a node's slurmd, as `tests/slurm-cluster` keeps it.
    fn slurmd(&self, node: &str) -> Option<i32> {
        let file = self
            .top
            .join("pid")
            .join(format!("{}.{node}", self.cluster));
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    #[track_caller]
    pub fn until(&self, job: &str, what: &str, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(
                begin.elapsed() < Duration::from_secs(240),
                "waited for {what} in vain; job {job} is {}, and said: {}",
                self.state(job),
                self.said(job)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a job is over, its Epilog included, and nothing of it is left. Gives what it said.
    #[track_caller]
    pub fn ended(&self, job: &str) -> String {
        const OVER: [&str; 6] = [
            "COMPLETED",
            "CANCELLED",
            "FAILED",
            "TIMEOUT",
            "NODE_FAIL",
            "DEADLINE",
        ];
        self.until(job, "the end of the job", || {
            OVER.contains(&self.state(job).as_str())
        });
        let begin = Instant::now();
        while !self.are_epilogs_over(job) && begin.elapsed() < LATE_EPILOG {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(
            self.are_epilogs_over(job),
            "job {job} has ended without an Epilog"
        );
        let begin = Instant::now();
        while let Some(left) = self.left(job) {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "job {job} left {left}; it said: {}",
                self.said(job)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        self.said(job)
    }

    /// Submits five jobs at once, whose last word is `fine`, and sees that nothing is left of them.
    #[track_caller]
    pub fn runs_five_at_once(&self, text: &str) {
        let jobs: Vec<String> = (0..5)
            .map(|_| self.submit(&["-w", "n1", "-n1"], text))
            .collect();
        for job in jobs {
            let said = self.ended(&job);
            assert!(said.ends_with("fine\n"), "{said}");
        }
        self.assert_nodes_are_well();
    }

    /// Whether each node's Epilog of the job has ended. Slurm 24.11 calls a job over before it begins some of them, up to a
    /// minute later with RunInJob; of 22.05, which ends them first, nothing is asked.
    fn are_epilogs_over(&self, job: &str) -> bool {
        if !matches!(self.cluster, "contain" | "injob") {
            return true;
        }
        let times = self.top.join(self.cluster).join("times");
        let times = fs::read_to_string(times).unwrap_or_default();
        let count = |script: &str| times.matches(&format!("{script} {job} ")).count();
        count("epilog") >= count("prolog")
    }

    /// Something of a job that is still there.
    pub fn left(&self, job: &str) -> Option<String> {
        for node in ["n1", "n2"] {
            let private = self.top.join(self.cluster).join("private").join(node);
            for entry in fs::read_dir(private.join("run/capsid")).unwrap().flatten() {
                let name = entry.file_name().into_string().unwrap();
                if name.starts_with(&format!("job-{job}"))
                    && name.trim_start_matches("job-").split('.').next() == Some(job)
                {
                    return Some(format!("{name} on {node}"));
                }
            }
        }
        let conf = format!(
            "SLURM_CONF={}\0",
            self.top.join(self.cluster).join("slurm.conf").display()
        );
        let id = format!("SLURM_JOB_ID={job}\0");
        for (pid, line) in common::processes() {
            let env = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let env = String::from_utf8_lossy(&env);
            let name = format!("[{job}]");
            if env.contains(&conf) && env.contains(&id)
                || line.starts_with("capsid-job") && line.contains(&name) && env.contains(&conf)
            {
                return Some(format!("process {pid}: {line}"));
            }
        }
        let mut cgroups = ["n1", "n2"].map(|node| self.cgroup(node, job)).into_iter();
        cgroups
            .find(|path| path.exists())
            .map(|p| p.display().to_string())
    }

    /// The cgroup of a job on a node.
    fn cgroup(&self, node: &str, job: &str) -> PathBuf {
        if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            let slice = "/sys/fs/cgroup/system.slice";
            return format!("{slice}/{node}_slurmstepd.scope/job_{job}").into();
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own
            .lines()
            .find_map(|l| l.split_once(":freezer:"))
            .map_or("/", |(_, p)| p);
        let top = self.top.file_name().unwrap().display();
        format!(
            "/sys/fs/cgroup/freezer{}/{top}/{}-{node}/slurm_{node}/uid_{}/job_{job}",
            own.trim_end_matches('/'),
            self.cluster,
            nix::unistd::getuid()
        )
        .into()
    }

    /// An instance of step 0 answers in steps 1, 2 and 3, in the step of Slurm's that is named, and stops in order.
    #[track_caller]
    pub fn keeps_instances_for_later_steps(&self, step: Option<&str>) {
        let job = self.submit(
            &["-N1"],
            "srun -n1 $CAPSID instance start $IMAGE db a 'b c' || exit 1
for i in 1 2 3; do srun -n1 $CAPSID exec instance://db sh -c 'echo step $SLURM_STEP_ID; cat /proc/1/cgroup'; done
$CAPSID instance list --all-nodes
srun -n1 grep freezer /proc/self/cgroup
$CAPSID instance stop db && srun -n1 $CAPSID instance start $IMAGE db && $CAPSID exec instance://db echo again",
        );
        let said = self.ended(&job);
        for words in ["step 1\n", "step 2\n", "step 3\n", "service.sif", "again"] {
            let state = self.state(&job);
            assert!(said.contains(words), "{words:?}: {state}: {said}");
        }
        if let Some(step) = step {
            assert_eq!(
                said.matches(&format!("/{step}")).count(),
                3,
                "the instance is the job's: {said}"
            );
        }
        assert!(!said.contains("WARNING"), "{said}");
        let log = self.log(&job, "db");
        assert!(
            log.contains("started a b c") && log.ends_with(ORDERLY),
            "an orderly end: {log}"
        );
        self.assert_nodes_are_well();
    }

    /// No node has been drained, and no trouble has been noted.
    #[track_caller]
    pub fn assert_nodes_are_well(&self) {
        let nodes = self.run(&["sinfo", "-h", "-N", "-o", "%t %E"]);
        assert!(
            !nodes.ok().contains("drain") && !nodes.ok().contains("Prolog"),
            "{nodes}"
        );
    }

    /// What Prolog or Epilog of a job took, milliseconds.
    pub fn took(&self, script: &str, job: &str) -> Option<f64> {
        let times = fs::read_to_string(self.top.join(self.cluster).join("times")).unwrap();
        let line = times.lines().find_map(|l| {
            l.strip_prefix(&format!("{script} {job} "))?
                .split(' ')
                .next()?
                .parse::<f64>()
                .ok()
        });
        line.map(|us| us / 1000.0)
    }

    /// What a job's instance wrote, on every node.
    pub fn log(&self, job: &str, name: &str) -> String {
        self.log_on("n*", job, name)
    }

    /// The same on one node.
    pub fn log_on(&self, node: &str, job: &str, name: &str) -> String {
        // Services of a job's comment do not know the environment of the one who submitted it.
        let homes = [
            self.env.path("config"),
            common::home().join(".apptainer/instances"),
        ];
        let pattern = format!("*/{node}/*/job-{job}/{name}.out");
        let read = |home: &PathBuf| -> String {
            let mut find = Command::new("find");
            let out = output(find.arg(home).args(["-path", &pattern]));
            let paths = out.stdout.lines();
            paths
                .map(|path| fs::read_to_string(path).unwrap())
                .collect()
        };
        // In the home directory there may be older ones, of a job with the same number.
        let logs = homes.iter().map(read);
        logs.into_iter().find(|l| !l.is_empty()).unwrap_or_default()
    }
}
