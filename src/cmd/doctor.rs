//! `capsid doctor`: what this machine offers, found out by trying, and for each lack the line that an administrator types.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::CloneFlags;
use serde::Serialize;

use crate::engine::sys::{self, Fork};
use crate::engine::{cgroup, emulate, network, overlay, runtime, userns};
use crate::host::Host;
use crate::plan::IdMap;
use crate::plan::identity::{WANTED_IDS, free_range, sub_range};
use crate::{exit, say};

/// Options of `doctor`.
#[derive(clap::Args, Debug)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(short, long)]
    json: bool,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Something that some commands need is missing.
    Warn,
    /// Containers cannot run.
    Fail,
    /// Neither good nor bad.
    Info,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    state: State,
    detail: String,
    /// What an administrator has to type.
    remedy: Option<String>,
}

impl Check {
    fn new(
        check: &'static str,
        state: State,
        detail: impl Into<String>,
        remedy: Option<&str>,
    ) -> Check {
        Check {
            check,
            state,
            detail: detail.into(),
            remedy: remedy.map(str::to_owned),
        }
    }

    /// What was tried worked, or not, with this remedy.
    fn tried(check: &'static str, result: Result<()>, bad: State, remedy: &str) -> Check {
        match result {
            Ok(()) => Check::new(check, State::Ok, "usable", None),
            Err(error) => Check::new(check, bad, format!("{error:#}"), Some(remedy)),
        }
    }
}

/// Runs the checks. Status 0 when `exec` of an image can work here, else 1.
///
/// # Errors
/// When the checks themselves cannot be made.
pub fn run(args: &DoctorArgs) -> Result<u8> {
    let host = Host::read()?;
    // Forks first: the library that reads the machine's figures may start threads.
    let mut checks = vec![namespaces(&host)];
    if checks[0].state == State::Ok {
        checks.extend([fuse(&host), overlay(&host), subordinate_ids(&host)]);
    } else {
        // They would fail for the same reason, and their own remedies would mislead.
        let skipped = |check| Check::new(check, State::Warn, "needs user namespaces", None);
        checks.extend(["FUSE", "overlayfs", "subordinate ids"].map(skipped));
    }
    checks.push(building(&host, &checks));
    checks.extend([
        runtime_directory(&host),
        cgroups(),
        networks(),
        slurm(&host),
        gpus(),
    ]);
    checks.insert(0, machine());
    if args.json {
        say::out(format_args!("{}\n", serde_json::to_string_pretty(&checks)?))?;
    } else {
        print(&checks)?;
    }
    let usable = checks.iter().all(|c| c.state != State::Fail);
    Ok(if usable { exit::OK } else { exit::USAGE })
}

fn print(checks: &[Check]) -> Result<()> {
    for check in checks {
        let state = match check.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "FAIL",
            State::Info => "info",
        };
        say::out(format_args!(
            "{state:<5} {:<18} {}\n",
            check.check, check.detail
        ))?;
        if let Some(remedy) = &check.remedy {
            say::out(format_args!("{:24} as root: {remedy}\n", ""))?;
        }
    }
    Ok(())
}

fn machine() -> Check {
    let memory = sysinfo::System::new().map_or(0, |mut system| {
        system.refresh_memory();
        system.total_memory()
    });
    let kernel = sysinfo::System::kernel_version().unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let detail = format!(
        "Linux {kernel}, {cpus} CPUs, {} MiB of memory",
        memory >> 20
    );
    let mut numbers = kernel
        .split(['.', '-'])
        .map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    // mount_setattr(2) came with 5.12.
    if version >= (5, 12) {
        return Check::new("machine", State::Ok, detail, None);
    }
    Check::new(
        "machine",
        State::Fail,
        format!("{detail}; Linux 5.12 or later is needed"),
        Some("install a newer kernel"),
    )
}

/// Tries something in a process of its own, which may change its namespaces.
fn in_child(attempt: impl FnOnce() -> Result<()>) -> Result<()> {
    let (mut answer, mut reply) = std::io::pipe().context("cannot create a pipe")?;
    match sys::fork()? {
        Fork::Child => {
            let text = attempt()
                .err()
                .map(|e| format!("{e:#}"))
                .unwrap_or_default();
            let _ = reply.write_all(text.as_bytes());
            sys::exit_now(0)
        }
        Fork::Parent(child) => {
            drop(reply);
            let mut text = String::new();
            answer
                .read_to_string(&mut text)
                .context("cannot hear from the child")?;
            nix::sys::wait::waitpid(child, None).context("cannot wait for the child")?;
            if text.is_empty() {
                Ok(())
            } else {
                Err(anyhow::anyhow!("{text}"))
            }
        }
    }
}

fn own_ids(host: &Host) -> IdMap {
    if host.uid == 0 {
        IdMap::All
    } else {
        IdMap::Own {
            uid: host.uid,
            gid: host.gid,
        }
    }
}

fn namespaces(host: &Host) -> Check {
    const NAME: &str = "user namespaces";
    match in_child(|| userns::create(&own_ids(host), CloneFlags::CLONE_NEWNS)) {
        Ok(()) => Check::new(NAME, State::Ok, "usable", None),
        Err(error) => {
            let program = std::env::current_exe().unwrap_or_default();
            let remedy = namespaces_remedy(userns::text_of, &program);
            Check::new(NAME, State::Fail, format!("{error:#}"), remedy.as_deref())
        }
    }
}

/// The setting that forbids user namespaces, turned round; `None` when it is none of those known. AppArmor gets a
/// profile for this program, where there can be one: it leaves the others as they are.
fn namespaces_remedy(read: impl Fn(&str) -> String, program: &Path) -> Option<String> {
    const SETTINGS: [(&str, &str, &str); 3] = [
        ("user.max_user_namespaces", "0", "65536"),
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    let forbids =
        |setting: &str, bad: &str| read(&format!("/proc/sys/{}", setting.replace('.', "/"))) == bad;
    let (setting, _, good) = SETTINGS.into_iter().find(|s| forbids(s.0, s.1))?;
    if setting.contains("apparmor")
        && let Some(profile) = userns::apparmor_profile(program)
    {
        return Some(profile);
    }
    Some(userns::lasting(setting, good))
}

/// What root types so that a module is loaded now and after each boot (`modules-load.d(5)`).
fn load_module(name: &str) -> String {
    format!("echo {name} >/etc/modules-load.d/capsid-{name}.conf && modprobe {name}")
}

/// What root types so that everybody may open a device, now and after each boot (`udev(7)`).
fn open_device(name: &str, node: &str) -> String {
    format!(
        "echo 'KERNEL==\"{name}\", MODE=\"0666\", OPTIONS+=\"static_node={node}\"' >/etc/udev/rules.d/60-capsid-{name}.rules && \
         udevadm control --reload && chmod 0666 /dev/{node}"
    )
}

/// A device of the machine that everybody may open: what is missing for that, and which container is in between.
fn device_remedy(name: &str, node: &str) -> String {
    let there = Path::new("/dev").join(node).exists();
    match (in_a_container(), there) {
        (true, _) => format!("start the container around this one with --device /dev/{node}"),
        (false, true) => open_device(name, node),
        (false, false) => format!("{} && {}", load_module(name), open_device(name, node)),
    }
}

/// Whether Docker, Podman or systemd-nspawn is around us.
fn in_a_container() -> bool {
    [
        "/.dockerenv",
        "/run/.containerenv",
        "/run/systemd/container",
    ]
    .iter()
    .any(|path| Path::new(path).exists())
}

fn fuse(host: &Host) -> Check {
    let result = in_child(|| {
        userns::create(&own_ids(host), CloneFlags::CLONE_NEWNS)?;
        let options = capsid_fuse::mount::MountOptions {
            uid: host.uid,
            gid: host.gid,
            allow_other: false,
            source: "doctor".into(),
        };
        capsid_fuse::mount::fuse(&options)?;
        Ok(())
    });
    Check::tried("FUSE", result, State::Fail, &device_remedy("fuse", "fuse"))
}

fn overlay(host: &Host) -> Check {
    let result = in_child(|| {
        userns::create(&own_ids(host), CloneFlags::CLONE_NEWNS)?;
        overlay::try_out()
            .context("--overlay, --writable-tmpfs and directories as images do not work")
    });
    Check::tried("overlayfs", result, State::Warn, &load_module("overlay"))
}

fn subordinate_ids(host: &Host) -> Check {
    const NAME: &str = "subordinate ids";
    let warn = |detail: String, remedy: Option<&str>| Check::new(NAME, State::Warn, detail, remedy);
    if host.uid == 0 {
        return Check::new(NAME, State::Ok, "root needs none", None);
    }
    for helper in ["newuidmap", "newgidmap"] {
        if userns::helper(helper).is_none() {
            let remedy = "apt-get install uidmap (or dnf install shadow-utils)";
            return warn(format!("{helper} is missing"), Some(remedy));
        }
    }
    let user = &host.user.name;
    let files = Files::read();
    let Some(sub) = userns::subordinate_ids(user, host.uid) else {
        return warn(
            format!("none for {user}"),
            files.remedy(user, host.uid).as_deref(),
        );
    };
    let (uid, gid) = (host.uid, host.gid);
    let map = IdMap::Ranges { uid, gid, sub };
    let tried = userns::check_helpers(&sub)
        .and_then(|()| in_child(|| userns::create(&map, CloneFlags::empty())));
    if let Err(error) = tried {
        let missing = format!("{error:#}").contains("is not setuid root");
        let remedy = "chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap";
        return warn(format!("{error:#}"), missing.then_some(remedy));
    }
    let ranges = format!(
        "users {}+{}, groups {}+{}",
        sub.uids.0, sub.uids.1, sub.gids.0, sub.gids.1
    );
    let fewest = sub.uids.1.min(sub.gids.1);
    if fewest < WANTED_IDS - 1 {
        let detail = format!(
            "{ranges}: files of users and groups above {fewest} cannot be made; images use ids up to {}",
            WANTED_IDS - 1
        );
        return warn(detail, files.remedy(user, host.uid).as_deref());
    }
    Check::new(NAME, State::Ok, ranges, None)
}

/// What says who has which ids.
struct Files {
    subuid: String,
    subgid: String,
    passwd: String,
    group: String,
    nsswitch: String,
}

impl Files {
    fn read() -> Files {
        let read = |name: &str| {
            let bytes = fs::read(Path::new("/etc").join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Files {
            subuid: read("subuid"),
            subgid: read("subgid"),
            passwd: read("passwd"),
            group: read("group"),
            nsswitch: read("nsswitch.conf"),
        }
    }

    /// What gives a user enough ids that are nobody's: in the files that lack them, or where the site keeps them.
    fn remedy(&self, user: &str, uid: u32) -> Option<String> {
        let source = self
            .nsswitch
            .lines()
            .find_map(|line| line.trim().strip_prefix("subid:"));
        if let Some(source) = source.map(str::trim).filter(|s| *s != "files") {
            return Some(format!(
                "give {user} a range of {WANTED_IDS} ids for users and for groups in {source} (subid in /etc/nsswitch.conf)"
            ));
        }
        let start = free_range(
            &[&self.subuid, &self.subgid],
            &[&self.passwd, &self.group],
            FIRST_SUBORDINATE,
        )?;
        let lacks = |text: &str| {
            let range = sub_range(text, user, uid);
            range.is_none_or(|(_, count)| count < WANTED_IDS - 1)
        };
        let local = self
            .passwd
            .lines()
            .any(|line| line.split(':').next() == Some(user));
        let end = start + (WANTED_IDS - 1);
        let kinds = [("uid", &self.subuid), ("gid", &self.subgid)];
        let kinds = kinds
            .into_iter()
            .filter(|(_, text)| lacks(text))
            .map(|(kind, _)| kind);
        // usermod knows the users of /etc/passwd alone.
        Some(if local {
            let words: Vec<_> = kinds
                .map(|kind| format!("--add-sub{kind}s {start}-{end}"))
                .collect();
            format!("usermod {} {user}", words.join(" "))
        } else {
            let files: Vec<_> = kinds.map(|kind| format!("/etc/sub{kind}")).collect();
            format!(
                "echo {user}:{start}:{WANTED_IDS} | tee -a {}",
                files.join(" ")
            )
        })
    }
}

/// From here on `useradd` gives ranges away (`SUB_UID_MIN` in `login.defs(5)`).
const FIRST_SUBORDINATE: u32 = 100_000;

/// How `%post` of a build, and `--fakeroot`, come to files of users other than root.
fn building(host: &Host, checks: &[Check]) -> Check {
    const NAME: &str = "owners in builds";
    let good = |name: &str| {
        checks
            .iter()
            .any(|c| c.check == name && c.state == State::Ok)
    };
    if !good("user namespaces") {
        return Check::new(NAME, State::Warn, "needs user namespaces", None);
    }
    if host.uid == 0 {
        return Check::new(NAME, State::Ok, "kept by the kernel: this is root", None);
    }
    if good("subordinate ids") {
        let detail = "kept by the kernel, with subordinate ids";
        return Check::new(NAME, State::Ok, detail, None);
    }
    if let Some(sub) = userns::subordinate_ids(&host.user.name, host.uid)
        && userns::check_helpers(&sub).is_ok()
    {
        let detail =
            "kept by the kernel as far as the subordinate ids go; --ignore-subuid emulates all";
        return Check::new(NAME, State::Warn, detail, None);
    }
    match emulate::check() {
        Ok(()) => Check::new(
            NAME,
            State::Ok,
            "emulated by capsid (seccomp), as no subordinate ids can be used",
            None,
        ),
        Err(error) => Check::new(
            NAME,
            State::Warn,
            format!("none but root: no subordinate ids can be used, and {error:#}"),
            Some("give the user subordinate ids (see above)"),
        ),
    }
}

fn runtime_directory(host: &Host) -> Check {
    match runtime::open(host.uid, host.runtime_home().as_deref()) {
        Some(directory) => Check::new(
            "runtime directory",
            State::Ok,
            directory.path.display().to_string(),
            None,
        ),
        None => Check::new(
            "runtime directory",
            State::Warn,
            "none can be used: each container gets an image server of its own",
            Some("loginctl enable-linger USER, or a private XDG_RUNTIME_DIR"),
        ),
    }
}

fn cgroups() -> Check {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let top = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|p| Path::new(p).join("cgroup.controllers").exists());
    let kind = match (top, own.lines().count()) {
        (Some("/sys/fs/cgroup"), _) => "version 2",
        (Some(_), _) => "hybrid",
        (None, 0) => "none",
        (None, _) => "version 1",
    };
    let detail = match (kind, cgroup::way()) {
        ("version 2", Ok(way)) => format!("{kind}, limits for containers: {way}"),
        (_, Err(why)) => format!("{kind}, no limits for containers: {why:#}"),
        (_, Ok(_)) => kind.to_owned(),
    };
    Check::new("cgroups", State::Info, detail, None)
}

/// What connects the networks of instances.
fn networks() -> Check {
    let programs = network::programs();
    if programs.is_empty() {
        return Check::new(
            "network",
            State::Warn,
            "neither pasta nor slirp4netns: --net --publish does not work",
            Some("apt-get install passt (or slirp4netns)"),
        );
    }
    let tun = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let names: Vec<_> = programs.iter().map(|p| p.display().to_string()).collect();
    match tun {
        Ok(_) => Check::new("network", State::Ok, names.join(", "), None),
        Err(error) => Check::new(
            "network",
            State::Warn,
            format!(
                "{}, but /dev/net/tun cannot be opened: {}",
                names.join(", "),
                say::word(&error)
            ),
            Some(&device_remedy("tun", "net/tun")),
        ),
    }
}

fn slurm(host: &Host) -> Check {
    let path = host
        .var("PATH")
        .map(std::env::split_paths)
        .into_iter()
        .flatten()
        .find(|d| d.join("scontrol").exists());
    let job = host
        .var("SLURM_JOB_ID")
        .map(|id| format!("; this is job {}", id.display()))
        .unwrap_or_default();
    match path {
        Some(directory) => Check::new(
            "Slurm",
            State::Info,
            format!("{}{job}", directory.join("scontrol").display()),
            None,
        ),
        None => Check::new(
            "Slurm",
            State::Info,
            format!("no scontrol on PATH{job}"),
            None,
        ),
    }
}

fn gpus() -> Check {
    let devices = |prefix: &str| {
        let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
        entries
            .filter(|e| {
                e.file_name()
                    .to_str()
                    .and_then(|n| n.strip_prefix(prefix))
                    .is_some_and(|n| n.parse::<u32>().is_ok())
            })
            .count()
    };
    let mut found = Vec::new();
    match devices("nvidia") {
        0 => {}
        n => found.push(format!("{n} NVIDIA (--nv)")),
    }
    if Path::new("/dev/kfd").exists() {
        found.push("AMD (--rocm)".into());
    }
    Check::new(
        "GPUs",
        State::Info,
        if found.is_empty() {
            "none".into()
        } else {
            found.join(", ")
        },
        None,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedy_is_that_of_the_setting_that_forbids_and_lasts() {
        let remedy = |path: &str, value: &str, program: &str| {
            let read = |asked: &str| {
                if asked == path {
                    value.into()
                } else {
                    String::new()
                }
            };
            namespaces_remedy(read, Path::new(program))
        };
        for (setting, bad, good) in [
            ("user.max_user_namespaces", "0", "65536"),
            ("kernel.unprivileged_userns_clone", "0", "1"),
            ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ] {
            let path = format!("/proc/sys/{}", setting.replace('.', "/"));
            let line = remedy(&path, bad, "/home/a b/capsid").unwrap();
            let file = "/etc/sysctl.d/60-capsid.conf";
            assert_eq!(
                line,
                format!("echo {setting}={good} >{file} && sysctl --system")
            );
        }
        let setting = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";
        let profile = remedy(setting, "1", "/usr/bin/capsid").unwrap();
        assert!(profile.contains("/etc/apparmor.d/capsid"), "{profile}");
        assert_eq!(
            remedy("/proc/sys/user/max_user_namespaces", "95000", "/c"),
            None
        );
    }

    fn files(subuid: &str, subgid: &str) -> Files {
        Files {
            subuid: subuid.into(),
            subgid: subgid.into(),
            passwd: "root:x:0:0::/:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n".into(),
            group: String::new(),
            nsswitch: "passwd: files\n".into(),
        }
    }

    #[test]
    fn range_that_is_advised_is_nobodys() {
        let told = |files: Files, user: &str| files.remedy(user, 1000).unwrap();
        let eve = "eve:100000:65536\n";
        assert_eq!(
            told(files(eve, ""), "ada"),
            "usermod --add-subuids 165536-231071 --add-subgids 165536-231071 ada"
        );
        assert_eq!(
            told(files("", eve), "ldapuser"),
            "echo ldapuser:165536:65536 | tee -a /etc/subuid /etc/subgid"
        );
        // Only what is missing, or too small.
        let ada = "ada:100000:65536\n";
        assert_eq!(
            told(files(ada, ""), "ada"),
            "usermod --add-subgids 165536-231071 ada"
        );
        assert_eq!(
            told(files(ada, "ada:100000:1000\n"), "ada"),
            "usermod --add-subgids 165536-231071 ada"
        );
        let mut central = files("", "");
        central.nsswitch = "subid: sss\n".into();
        assert!(told(central, "ada").contains("in sss"));
    }
}
