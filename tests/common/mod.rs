//! What the integration tests share: an environment of their own, small images, and the program itself.
//!
//! Images are made with the reference tools (`mksquashfs`, `mkfs.ext3`) from the machine's static busybox. What a test
//! needs and the machine lacks makes it fail, never skip.
#![allow(dead_code)] // each test binary uses its own part

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub mod build;
pub mod http;
pub mod registry;

/// A scratch directory and a runtime directory for one test.
pub struct Env {
    dir: TempDir,
}

/// How the program ended.
pub struct Output {
    /// Exit status; 128 + N when a signal ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "status {}\n--- stdout\n{}\n--- stderr\n{}",
            self.status, self.stdout, self.stderr
        )
    }
}

impl Output {
    /// Standard output of a run that must have gone well.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.status, 0, "{self}");
        self.stdout.trim_end()
    }

    /// Standard error of a run that must have ended with one `FATAL:` line and status 255, which holds `words`.
    #[track_caller]
    pub fn fatal(&self, words: &[&str]) {
        assert_eq!(self.status, 255, "{self}");
        let lines: Vec<&str> = self
            .stderr
            .lines()
            .filter(|l| !l.starts_with("WARNING:") && !l.starts_with("INFO:"))
            .collect();
        assert_eq!(lines.len(), 1, "one line of error: {self}");
        assert!(lines[0].starts_with("FATAL:   "), "{self}");
        for word in words {
            assert!(lines[0].contains(word), "{word:?} is missing: {self}");
        }
    }
}

impl Env {
    /// Fails loudly on a machine that cannot run the tests.
    pub fn new() -> Env {
        assert!(
            !nix::unistd::getuid().is_root(),
            "the tests run as a normal user: start them with tests/run"
        );
        Env::made()
    }

    /// One that root makes, for all to see: what the hosts of `tests/hosts` share.
    pub fn of_root() -> Env {
        let env = Env::made();
        fs::set_permissions(env.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        env
    }

    fn made() -> Env {
        let dir = tempfile::Builder::new()
            .prefix("capsid-test.")
            .tempdir()
            .expect("a scratch directory");
        for (name, mode) in [("run", 0o700), ("work", 0o755)] {
            fs::create_dir(dir.path().join(name)).expect("mkdir");
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(mode))
                .expect("chmod");
        }
        Env { dir }
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The working directory of the runs.
    pub fn work(&self) -> PathBuf {
        self.path("work")
    }

    /// Where image servers put their sockets.
    pub fn runtime(&self) -> PathBuf {
        self.path("run/capsid")
    }

    /// The program with an environment of its own.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        self.command_as(Path::new(env!("CARGO_BIN_EXE_capsid")), args)
    }

    /// The same through another name of the program, or another program.
    pub fn command_as<S: AsRef<OsStr>>(
        &self,
        program: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("HOME", home())
            .env("USER", user_name())
            .env("LANG", "C.UTF-8")
            .env("TERM", "xterm")
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .current_dir(self.work())
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        output(&mut self.command(args))
    }

    /// A directory tree with busybox and what Apptainer's builder puts into an image.
    pub fn tree(&self, name: &str) -> PathBuf {
        let root = self.path(name);
        for dir in [
            "bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "usr/bin", "var/tmp", "opt",
            "mnt",
        ] {
            fs::create_dir_all(root.join(dir)).expect("mkdir");
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .expect("busybox-static is not installed");
        let applets = output(Command::new("/bin/busybox").arg("--list"));
        for applet in applets.ok().lines().filter(|a| *a != "busybox") {
            symlink("busybox", root.join("bin").join(applet)).expect("symlink");
        }
        write(&root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n");
        write(&root.join("etc/group"), "root:x:0:\n");
        write(&root.join("opt/hello.txt"), "hello\n");
        singularity(&root);
        root
    }

    /// Packs a tree with `mksquashfs` into a SIF.
    pub fn sif(&self, root: &Path, name: &str) -> PathBuf {
        self.sif_with(root, name, &["-comp", "zstd", "-Xcompression-level", "1"])
    }

    /// The same with other options.
    pub fn sif_with(&self, root: &Path, name: &str, options: &[&str]) -> PathBuf {
        let squashfs = self.squashfs(root, &format!("{name}.squashfs"), options);
        let sif = self.path(name);
        wrap(&squashfs, &sif, &[]);
        sif
    }

    /// Packs a tree with `mksquashfs`.
    pub fn squashfs(&self, root: &Path, name: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        let made = output(
            Command::new("mksquashfs")
                .arg(root)
                .arg(&path)
                .args(["-quiet", "-no-progress", "-all-root", "-noappend"])
                .args(options),
        );
        made.ok();
        path
    }

    /// The usual image.
    pub fn image(&self) -> PathBuf {
        let tree = self.tree("tree");
        self.sif(&tree, "image.sif")
    }

    /// Processes of image servers of this environment (keeper and worker of each).
    pub fn servers(&self) -> Vec<i32> {
        let prefix = format!("capsid-image {}", self.dir.path().display());
        processes()
            .into_iter()
            .filter(|(_, line)| line.starts_with(&prefix))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Waits until nothing of the environment runs, and checks that no file is left in the runtime directory.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        wait_until("image servers to end", || self.servers().is_empty());
        let left: Vec<_> = fs::read_dir(self.runtime())
            .map(|d| d.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "left in the runtime directory: {left:?}");
    }
}

/// Waits for at most 20 seconds.
#[track_caller]
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "waited for {what} in vain"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A port of the loopback that nobody listens on, below those that the kernel gives to who asks for any.
pub fn free_port() -> u16 {
    loop {
        let number = uuid::Uuid::new_v4().as_u128() % 6000;
        let port = 20_000 + u16::try_from(number).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// All processes of the machine with their command lines.
pub fn processes() -> Vec<(i32, String)> {
    let entries = fs::read_dir("/proc").expect("/proc");
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((
            pid,
            String::from_utf8_lossy(&line)
                .trim_end_matches('\0')
                .replace('\0', " "),
        ))
    })
    .collect()
}

/// Runs a command to its end.
pub fn output(command: &mut Command) -> Output {
    use std::os::unix::process::ExitStatusExt as _;
    let out = command
        .output()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    Output {
        status: out
            .status
            .code()
            .unwrap_or_else(|| 128 + out.status.signal().unwrap_or(0)),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// The test user's home directory: the user database's, whatever `$HOME` says.
pub fn home() -> PathBuf {
    nix::unistd::User::from_uid(nix::unistd::getuid())
        .expect("passwd")
        .expect("the user is in passwd")
        .dir
}

/// A file in the home directory that goes with this value.
pub struct HomeFile(pub PathBuf);

impl HomeFile {
    /// An empty file with a name of its own.
    pub fn new() -> HomeFile {
        let path = home().join(format!("capsid-test-{}", uuid::Uuid::new_v4()));
        fs::write(&path, "").expect("the home directory can be written");
        HomeFile(path)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.0
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned()
    }
}

impl Drop for HomeFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The test user's name.
pub fn user_name() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid()).expect("passwd");
    user.expect("the user is in passwd").name
}

/// Writes a text file, with its directories.
pub fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
    fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Writes a script that can be executed.
pub fn script(path: &Path, text: &str) {
    write(path, text);
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("chmod");
}

/// What a builder writes for a definition file with all sections.
fn singularity(root: &Path) {
    let contents = capsid::metadir::Contents {
        environment: "export GREETING=\"hello from environment\"\nexport PATH=/opt/bin:$PATH\nexport KEPT=${KEPT:-default}".into(),
        runscript: Some("#!/bin/sh\necho \"runscript args: $*\"\necho \"count: $#\"\nexit 3\n".into()),
        test: Some("#!/bin/sh\ntest -d /opt && echo tested \"$@\"\n".into()),
        help: Some("This is the help.\n".into()),
        ..capsid::metadir::Contents::default()
    };
    capsid::metadir::write(root, &contents).expect("the image's own directory");
    let app = root.join("scif/apps/foo");
    script(
        &app.join("scif/runscript"),
        "#!/bin/sh\necho foo $SCIF_APPNAME \"$@\"\nfoo-tool\nexit 7\n",
    );
    script(
        &app.join("bin/foo-tool"),
        "#!/bin/sh\necho the tool of $FOO_VAR\n",
    );
    script(
        &app.join("scif/env/01-base.sh"),
        "#!/bin/sh\nSCIF_APPNAME=foo\nexport SCIF_APPNAME\n",
    );
    script(
        &app.join("scif/env/90-environment.sh"),
        "#!/bin/sh\nexport FOO_VAR=foo\n",
    );
    write(&app.join("scif/runscript.help"), "Help of foo.\n");
}

/// Puts a squashfs, and more partitions of the given kinds, into a SIF.
pub fn wrap(squashfs: &Path, sif: &Path, overlays: &[&Path]) {
    use capsid::sif::{Content, DataType, Draft, FsType, PartType, Partition, Stamp};
    let open = |path: &Path| Content::File(fs::File::open(path).expect("a partition"));
    let arch = capsid::host::go_arch(std::env::consts::ARCH);
    let mut draft = Draft::default();
    draft.add(
        DataType::Definition,
        "",
        Content::Bytes(b"bootstrap: scratch\n".to_vec()),
    );
    draft.add_partition(
        Partition {
            fs: FsType::Squashfs,
            part: PartType::Primary,
            arch,
        },
        open(squashfs),
    );
    for overlay in overlays {
        draft.add_partition(
            Partition {
                fs: FsType::Ext3,
                part: PartType::Overlay,
                arch,
            },
            open(overlay),
        );
    }
    let mut out = fs::File::create(sif).expect("a SIF");
    draft
        .write(
            &mut out,
            Stamp {
                time_s: 1_700_000_000,
                identity: [1; 16],
            },
        )
        .expect("a SIF");
    out.set_permissions(fs::Permissions::from_mode(0o755))
        .expect("chmod");
}

/// A tree with programs of this machine and the libraries that they need.
pub fn add_programs(tree: &Path, programs: &[&str]) {
    for program in programs {
        let listed = output(Command::new("ldd").arg(program));
        let libraries = listed
            .ok()
            .split_ascii_whitespace()
            .filter(|w| w.starts_with('/'));
        for file in libraries.chain([*program]) {
            let place = tree.join(file.trim_start_matches('/'));
            if !place.exists() {
                fs::create_dir_all(place.parent().expect("a parent")).expect("mkdir");
                fs::copy(file, &place).unwrap_or_else(|e| panic!("{file}: {e}"));
            }
        }
    }
}
