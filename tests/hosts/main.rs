//! The table of hosts: every operation on every kind of machine that people have, one line a cell.
//!
//! A host is a set of private mount, pid, IPC and UTS namespaces that root makes and that a normal user then works in:
//! `profiles.rs` has an entry for each, `operations.rs` what is tried. A cell says what the user has a right to, or the one
//! line that refuses. So this test starts as root (`tests/as-user` does not drop it here); everything that is tested runs
//! as a user that exists in these namespaces alone.
//!
//! `tests/run --test hosts` runs the table; words behind `--` choose: `-- rhel` a host, `-- rhel/home` a cell.
#![allow(clippy::unwrap_used)] // an error ends the test

#[path = "../common/mod.rs"]
mod common;
mod operations;
mod profiles;

use std::io::{Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::http::{Answer, Server};
use common::{Env, Output, output};
use operations::{OPERATIONS, Operation};
use profiles::{PROFILES, Profile, Right};

/// The user of the hosts: no account of this machine.
pub const UID: u32 = 704_711;
/// Seconds after which an operation counts as hanging, on two busy processors.
const LIMIT_S: u32 = 30;

fn main() -> ExitCode {
    if !rustix::process::getuid().is_root() {
        eprintln!("hosts: only root can make hosts: start tests/run as root");
        return ExitCode::FAILURE;
    }
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|w| !w.starts_with('-'))
        .collect();
    let share = Share::new();
    let next = AtomicUsize::new(0);
    let counts = Mutex::new((0, 0));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism()
            .map_or(2, usize::from)
            .min(8)
        {
            scope.spawn(|| {
                while let Some(profile) = PROFILES.get(next.fetch_add(1, SeqCst)) {
                    let (passed, failed) = test(profile, &words, &share);
                    let mut counts = counts.lock().unwrap();
                    counts.0 += passed;
                    counts.1 += failed;
                }
            });
        }
    });
    let (passed, failed) = *counts.lock().unwrap();
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in {:.2}s",
        if failed == 0 { "ok" } else { "FAILED" },
        started.elapsed().as_secs_f64()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// All chosen cells of one host.
fn test(profile: &Profile, words: &[String], share: &Share) -> (usize, usize) {
    let chosen = |operation: &&Operation| {
        let cell = format!("{}/{}", profile.name, operation.name);
        words.is_empty()
            || words
                .iter()
                .any(|w| w == profile.name || w == operation.name || *w == cell)
    };
    let operations: Vec<&Operation> = OPERATIONS.iter().filter(chosen).collect();
    if operations.is_empty() {
        return (0, 0);
    }
    let host = match Host::start(profile, share) {
        Ok(host) => host,
        Err(error) => {
            println!("{:18} the host cannot be made: {error}", profile.name);
            return (0, operations.len());
        }
    };
    let mut counts = (0, 0);
    for operation in operations {
        let out = host.perform(operation);
        match verdict(profile.right(operation.name), &out) {
            Ok(said) => {
                counts.0 += 1;
                println!("{:18} {:22} {said}", profile.name, operation.name);
            }
            Err(why) => {
                counts.1 += 1;
                println!(
                    "{:18} {:22} FAILED: {why}\n{out}",
                    profile.name, operation.name
                );
            }
        }
    }
    counts
}

/// Whether the outcome is what the user has a right to; what the table says of it.
fn verdict(right: Right, out: &Output) -> Result<String, String> {
    if out.status == 124 || out.status == 137 {
        return Err("hangs".into());
    }
    match right {
        Right::Works if out.status == 0 => Ok("ok".into()),
        Right::Works => Err("should work".into()),
        Right::Refused(words) => {
            let fatal: Vec<&str> = out
                .stderr
                .lines()
                .filter(|l| l.starts_with("FATAL:"))
                .collect();
            match fatal[..] {
                _ if out.status != 255 => Err("should be refused".into()),
                [line] if words.iter().all(|w| line.contains(w)) => {
                    Ok(format!("refused: {}", line[6..].trim()))
                }
                [_] => Err(format!("the line should name {words:?}")),
                _ => Err("one line should refuse".into()),
            }
        }
    }
}

/// What all hosts see, read-only, below `/mnt/share`: the program under its names, images, helpers.
struct Share {
    env: Env,
    web: Server,
}

impl Share {
    fn new() -> Share {
        let env = Env::of_root();
        let tree = env.tree("box");
        let image = env.sif(&tree, "image.sif");
        let bin = env.path("bin");
        std::fs::create_dir(&bin).unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_capsid"), bin.join("capsid")).unwrap();
        for name in ["apptainer", "singularity"] {
            std::os::unix::fs::symlink("capsid", bin.join(name)).unwrap();
        }
        for (name, libraries) in [("odd_fs", &["-lfuse3"][..]), ("deny", &[])] {
            let source =
                Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/hosts/{name}.c"));
            let mut compile = Command::new("gcc");
            compile
                .args(["-O1", "-Wall", "-Werror", "-o"])
                .arg(bin.join(name))
                .arg(source)
                .args(libraries);
            output(&mut compile).ok();
        }
        // A directory image that shows the machine's own programs, for what runs inside a container.
        let host = env.path("host");
        for name in [
            "usr", "etc", "var", "run", "mnt", "srv", "opt", "dev", "proc", "sys", "tmp", "home",
        ] {
            std::fs::create_dir_all(host.join(name)).unwrap();
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), host.join(name)).unwrap();
        }
        let image = std::fs::read(image).unwrap();
        let web = Server::start(move |asked| Answer::content(asked, &image));
        Share { env, web }
    }
}

/// A host that runs: processes in it end with this value.
struct Host<'a> {
    profile: &'a Profile,
    holder: Child,
    /// The first process of its pid namespace.
    init: u32,
    url: String,
}

impl<'a> Host<'a> {
    fn start(profile: &'a Profile, share: &Share) -> Result<Host<'a>, String> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/base.sh");
        let script = format!(
            ". {}\n{}\necho made\nexec sleep infinity",
            base.display(),
            profile.setup
        );
        let mut holder = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--propagation",
                "private",
            ])
            .args(["bash", "-euc", &script])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("SHARE", share.env.path(""))
            .env("HOST_UID", UID.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let mut said = [0; 5];
        if holder
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut said)
            .is_err()
        {
            let out = holder.wait_with_output().map_err(|e| e.to_string())?;
            return Err(String::from_utf8_lossy(&out.stderr).into_owned());
        }
        // Whoever writes there later finds nobody: what a host says belongs to its cells.
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let children = std::fs::read_to_string(children).map_err(|e| e.to_string())?;
        let init = children
            .trim()
            .parse()
            .map_err(|_| format!("children: {children:?}"))?;
        Ok(Host {
            profile,
            holder,
            init,
            url: format!("http://{}/image.sif", share.web.address),
        })
    }

    /// The steps of an operation, those of the user and those of root; the first that fails is the outcome.
    fn perform(&self, operation: &Operation) -> Output {
        let mut out = Output {
            status: 0,
            stdout: String::new(),
            stderr: String::new(),
        };
        for step in operation.steps {
            out = match step {
                operations::Step::User(script) => self.user(script),
                operations::Step::Root(script) => self.root(script),
            };
            if out.status != 0 {
                break;
            }
        }
        out
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("timeout");
        command
            .args([
                "--kill-after=1",
                &LIMIT_S.to_string(),
                "nsenter",
                "-t",
                &self.init.to_string(),
            ])
            .args(["--mount", "--pid", "--ipc", "--uts", "--wd=/", "--"])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null());
        command
    }

    fn root(&self, script: &str) -> Output {
        let uid = format!("HOST_UID={UID}");
        finished(self.enter().args(["env", &uid, "bash", "-euc", script]))
    }

    fn user(&self, script: &str) -> Output {
        let uid = UID.to_string();
        let mut command = self.enter();
        command.args(self.profile.through);
        command.args([
            "setpriv",
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--groups",
            self.profile.groups,
        ]);
        command.args(["env", "-i"]).args([
            "PATH=/mnt/share/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG=C.UTF-8",
            "IMG=/mnt/share/image.sif",
            &format!("URL={}", self.url),
            &format!("HOST={}", self.profile.name), // its instances are seen by all that share the network
        ]);
        let settled = self.profile.environment.iter().map(|(name, _)| *name);
        let settled: Vec<&str> = settled.collect();
        for (name, value) in profiles::USUAL
            .iter()
            .filter(|(name, _)| !settled.contains(name))
        {
            command.arg(format!("{name}={value}"));
        }
        for (name, value) in self.profile.environment {
            if let Some(value) = value {
                command.arg(format!("{name}={value}"));
            }
        }
        let script = format!("{}\n{}\n{script}", operations::PRELUDE, self.profile.login);
        finished(
            command
                .args(self.profile.inside)
                .args(["bash", "-euc", &script]),
        )
    }
}

/// Runs a command to its end, or to that of its time: by files, since what hangs in the kernel keeps a pipe open.
fn finished(command: &mut Command) -> Output {
    let [stdout, stderr] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    command.stdout(stdout.try_clone().unwrap());
    command.stderr(stderr.try_clone().unwrap());
    let status = command.status().unwrap();
    let text = |mut file: std::fs::File| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Output {
        status: status.code().unwrap_or(137),
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let _gone = self.holder.kill();
        let _gone = self.holder.wait();
        // `--kill-child`: the pid namespace goes with its first process.
        while PathBuf::from(format!("/proc/{}/ns/pid", self.init)).exists()
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
