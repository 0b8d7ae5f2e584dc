//! What this machine and this caller are: read once, at the start of a command.
//!
//! After [`Host::read`] nobody asks for ids, environment or working directory again, so two parts of
//! the program cannot disagree, and a planning test is a struct literal.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where root's Prolog makes a directory for each job.
pub const JOBS: &str = "/run/capsid";

/// The caller and the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Real user id.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
    /// The caller's line of the user database.
    pub user: User,
    /// The working directory, as the kernel names it or as `$PWD` does when that is the same place; `/` when it is gone.
    pub cwd: PathBuf,
    /// The working directory is still there.
    pub has_cwd: bool,
    /// Where the working directory and home are without links, when `cwd` goes through one.
    pub real: Option<(PathBuf, PathBuf)>,
    /// The environment, in order.
    pub env: Vec<(OsString, OsString)>,
    /// Permission bits that new files lack (`umask(2)`).
    pub umask: u32,
    /// Go name of the processor architecture, as SIF writes it (`amd64`, `arm64`).
    pub arch: &'static str,
}

/// One line of `passwd(5)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// Real name and the like.
    pub gecos: String,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: String,
}

impl Host {
    /// Reads it all.
    ///
    /// # Errors
    /// When the working directory cannot be told.
    pub fn read() -> Result<Host> {
        let uid = rustix::process::getuid().as_raw();
        let gid = rustix::process::getgid().as_raw();
        let env: Vec<_> = std::env::vars_os().collect();
        let cwd = working_directory(&env)?;
        let user = user(uid, &env);
        let real = cwd.as_ref().and_then(|cwd| {
            let real = std::env::current_dir().ok().filter(|real| real != cwd)?;
            Some((real, std::fs::canonicalize(&user.home).ok()?))
        });
        let umask = rustix::process::umask(rustix::fs::Mode::empty());
        rustix::process::umask(umask);
        Ok(Host {
            uid,
            gid,
            user,
            real,
            has_cwd: cwd.is_some(),
            // That of one that is gone leads nowhere, and says why: `/tmp/x (deleted)`.
            cwd: cwd
                .or_else(|| std::fs::read_link("/proc/self/cwd").ok())
                .unwrap_or_else(|| "/(working directory deleted)".into()),
            umask: umask.bits(),
            env,
            arch: go_arch(std::env::consts::ARCH),
        })
    }

    /// A variable of the caller's environment.
    pub fn var(&self, name: &str) -> Option<&OsStr> {
        self.env
            .iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.as_os_str())
    }

    /// The Slurm job that this process is in: by its cgroup, else by the variable. Only digits are believed.
    pub fn job(&self) -> Option<String> {
        job_in_cgroup().or_else(|| digits(self.var("SLURM_JOB_ID")?.to_str()?))
    }

    /// Whether this process is in a cgroup of a Slurm job.
    pub fn is_job_in_cgroup(&self) -> bool {
        job_in_cgroup().is_some()
    }

    /// Whether this process seems to be in a Slurm job; cheaper than [`Host::job`].
    pub fn in_job(&self) -> bool {
        self.var("SLURM_JOB_ID").is_some() || self.job().is_some()
    }

    /// Whether this process ends with a Slurm step that is not the batch script's: Slurm ends steps by their cgroup.
    pub fn in_numbered_step(&self) -> bool {
        let cgroups = own_cgroups();
        let numbered = |line: &str| digits(line.split_once("/step_")?.1);
        let mut ours = cgroups
            .lines()
            .filter(|line| line.contains("slurm") && line.contains("/job_"))
            .peekable();
        match ours.peek() {
            Some(_) => ours.any(|line| numbered(line).is_some()),
            None => self
                .var("SLURM_STEP_ID")
                .and_then(OsStr::to_str)
                .is_some_and(|id| id.parse::<u32>().is_ok_and(|id| id < 0xffff_fff0)),
        }
    }

    /// A path of the caller's that later steps can use, wherever they are: absolute, unless that is longer than the kernel
    /// takes a path (`PATH_MAX`, with its NUL). Then it only leads there from where the caller is.
    pub fn reach(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        let absolute = self.cwd.join(path);
        if absolute.as_os_str().len() < libc::PATH_MAX as usize {
            absolute
        } else {
            path.to_owned()
        }
    }

    /// Where the sockets and records of this user on this node belong: inside a job the directory that the
    /// administrator's Prolog has made for it, else `$XDG_RUNTIME_DIR`.
    pub fn runtime_home(&self) -> Option<OsString> {
        // Where there is no Prolog of ours, the cgroup need not be looked at.
        if rustix::fs::access(JOBS, rustix::fs::Access::EXISTS).is_ok()
            && let Some(job) = self.job()
        {
            let path = format!("{JOBS}/job-{job}");
            if rustix::fs::lstat(&path).is_ok_and(|s| {
                s.st_uid == self.uid && rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir()
            }) {
                return Some(path.into());
            }
        }
        self.var("XDG_RUNTIME_DIR").map(OsStr::to_owned)
    }

    /// The directory below which programs keep their files: `$HOME`, else that of the user database.
    pub fn home(&self) -> PathBuf {
        let named = self.var("HOME").map(PathBuf::from);
        named
            .filter(|home| home.is_absolute())
            .unwrap_or_else(|| self.user.home.clone())
    }

    /// A setting `APPTAINER_<KEY>`, else `SINGULARITY_<KEY>`; an empty one is none.
    fn setting(&self, key: &str) -> Option<&OsStr> {
        let value = |prefix: &str| {
            self.var(&format!("{prefix}{key}"))
                .filter(|value| !value.is_empty())
        };
        value("APPTAINER_").or_else(|| value("SINGULARITY_"))
    }

    /// The directory of logins, endpoints and the cache: `.apptainer` in the home directory of the user database, as the
    /// peers have it, whatever `$HOME` is.
    pub fn config_dir(&self) -> PathBuf {
        match self.setting("CONFIGDIR") {
            Some(path) => self.cwd.join(path),
            None => self.user.home.join(".apptainer"),
        }
    }

    /// Where the cache is, all of it, profiles and steps of builds too: `cache` in `$CAPSID_CACHEDIR`, in
    /// `$APPTAINER_CACHEDIR`, or in the directory of the configuration.
    pub fn cache_root(&self) -> PathBuf {
        let own = self.var("CAPSID_CACHEDIR").filter(|v| !v.is_empty());
        match own.or_else(|| self.setting("CACHEDIR")) {
            Some(path) => self.cwd.join(path).join("cache"),
            None => self.config_dir().join("cache"),
        }
    }

    /// Where access profiles of images are kept: in the cache, so that sites clean one place.
    pub fn profiles(&self) -> Option<PathBuf> {
        let root = self.cache_root();
        root.is_absolute().then(|| root.join("profile"))
    }

    /// Names of the caller's groups with their ids, for the container's `/etc/group`. Only read when
    /// asked for: a site's group database may be remote.
    pub fn groups(&self) -> Vec<(String, u32)> {
        let mut ids: Vec<u32> = rustix::process::getgroups()
            .unwrap_or_default()
            .iter()
            .map(|g| g.as_raw())
            .collect();
        ids.retain(|g| *g != self.gid);
        ids.insert(0, self.gid);
        let file = std::fs::read("/etc/group").unwrap_or_default();
        ids.into_iter()
            .filter_map(|id| group_name(&file, id).map(|name| (name, id)))
            .collect()
    }
}

fn job_in_cgroup() -> Option<String> {
    let cgroups = own_cgroups();
    let mut ours = cgroups.lines().filter(|line| line.contains("slurm"));
    ours.find_map(|line| digits(line.split_once("/job_")?.1))
}

/// Our line of each hierarchy of cgroups. Names below a step are its user's, and bytes.
fn own_cgroups() -> String {
    let text = std::fs::read("/proc/self/cgroup").unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

/// The number that a text begins with, if it can be a job's.
fn digits(text: &str) -> Option<String> {
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    (!digits.is_empty() && digits.len() <= 20).then_some(digits)
}

/// `$PWD` when it leads to the working directory (it keeps the symbolic links that the person typed),
/// else what the kernel says; `None` when it was removed.
fn working_directory(env: &[(OsString, OsString)]) -> Result<Option<PathBuf>> {
    let pwd = env
        .iter()
        .find(|(k, _)| k == "PWD")
        .map(|(_, v)| PathBuf::from(v))
        .filter(|p| p.is_absolute());
    if let Some(pwd) = pwd
        && let (Ok(a), Ok(b)) = (rustix::fs::stat(&pwd), rustix::fs::stat("."))
        && (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
        && !pwd
            .components()
            .any(|c| matches!(c, std::path::Component::ParentDir))
    {
        return Ok(Some(pwd));
    }
    match std::env::current_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).context("cannot tell the working directory"),
    }
}

/// The caller's line, from the files; from `getent` when the site keeps its users elsewhere (a static
/// program cannot load NSS modules); from the environment when nobody knows.
fn user(uid: u32, env: &[(OsString, OsString)]) -> User {
    if let Some(user) = known_user(uid) {
        return user;
    }
    let var = |name: &str| {
        env.iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.to_string_lossy().into_owned())
    };
    User {
        name: var("USER")
            .or_else(|| var("LOGNAME"))
            .unwrap_or_else(|| format!("user{uid}")),
        gecos: String::new(),
        home: var("HOME")
            .filter(|h| h.starts_with('/'))
            .map_or_else(|| PathBuf::from("/"), PathBuf::from),
        shell: var("SHELL").unwrap_or_else(|| "/bin/sh".into()),
    }
}

/// The user of a number, when the user database has one.
pub fn known_user(uid: u32) -> Option<User> {
    let file = std::fs::read("/etc/passwd").unwrap_or_default();
    passwd_line(&file, uid).or_else(|| passwd_line(&getent("passwd", uid)?, uid))
}

fn passwd_line(file: &[u8], uid: u32) -> Option<User> {
    let wanted = uid.to_string();
    let fields = file.split(|b| *b == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|b| *b == b':').collect();
        (fields.len() >= 7 && fields[2] == wanted.as_bytes()).then_some(fields)
    })?;
    let text = |i: usize| String::from_utf8_lossy(fields[i]).into_owned();
    let home = PathBuf::from(OsString::from_vec(fields[5].to_vec()));
    Some(User {
        name: text(0),
        gecos: text(4),
        home: if home.is_absolute() { home } else { "/".into() },
        shell: if fields[6].is_empty() {
            "/bin/sh".into()
        } else {
            text(6)
        },
    })
}

fn group_name(file: &[u8], gid: u32) -> Option<String> {
    let wanted = gid.to_string();
    let find = |file: &[u8]| {
        file.split(|b| *b == b'\n').find_map(|line| {
            let mut fields = line.split(|b| *b == b':');
            let name = fields.next()?;
            (fields.nth(1)? == wanted.as_bytes())
                .then(|| String::from_utf8_lossy(name).into_owned())
        })
    };
    find(file).or_else(|| getent("group", gid).and_then(|answer| find(&answer)))
}

fn getent(database: &str, id: u32) -> Option<Vec<u8>> {
    let program = ["/usr/bin/getent", "/bin/getent"]
        .into_iter()
        .find(|p| Path::new(p).exists())?;
    let out = std::process::Command::new(program)
        .args([database, &id.to_string()])
        .output()
        .ok()?;
    out.status.success().then_some(out.stdout)
}

/// Rust's name of an architecture as Go and SIF write it.
pub fn go_arch(rust: &str) -> &'static str {
    match rust {
        "x86" => "386",
        "x86_64" => "amd64",
        "arm" => "arm",
        "aarch64" => "arm64",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "s390x" => "s390x",
        "riscv64" => "riscv64",
        "loongarch64" => "loong64",
        _ => "unknown",
    }
}

/// `path` without `.`, `..` and doubled slashes, by its text alone; absolute stays absolute.
pub fn normalise(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            std::path::Component::CurDir => {}
            other => out.push(other),
        }
    }
    if out.as_os_str().as_bytes().is_empty() {
        PathBuf::from("/")
    } else {
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwd_line_is_found_by_id() {
        let file = b"root:x:0:0:root:/root:/bin/bash\nada:x:1000:1000:Ada L:/home/ada:\n";
        let user = passwd_line(file, 1000).expect("there");
        assert_eq!(
            (user.name.as_str(), user.home.as_path(), user.shell.as_str()),
            ("ada", Path::new("/home/ada"), "/bin/sh")
        );
        assert!(passwd_line(file, 7).is_none());
    }

    #[test]
    fn normalise_drops_dots() {
        assert_eq!(normalise(Path::new("/a/./b/../c//d/")), Path::new("/a/c/d"));
        assert_eq!(normalise(Path::new("/../..")), Path::new("/"));
    }
}
