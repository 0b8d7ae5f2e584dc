//! The options that `exec`, `run`, `shell` and `test` share, as the peers name them.
//!
//! Every option can also come from the environment: `APPTAINER_<NAME>`, then `SINGULARITY_<NAME>`; see
//! [`super::environment`].

use std::ffi::OsString;
use std::path::PathBuf;

use super::Explain;

/// Options of the action commands, exactly as typed.
// The hidden options are refused or without effect (`refusal`); they have no help to write.
#[allow(missing_docs)]
#[derive(clap::Args, Debug, Clone, Default)]
pub struct ActionArgs {
    /// Bind a host path: src[:dst[:opt[,opt]]], opts ro, rw, image-src=PATH, id=N
    #[arg(short = 'B', long, value_name = "SPEC", help_heading = "Mounts")]
    pub bind: Vec<OsString>,
    /// Mount in the form type=bind,source=SRC,destination=DST[,ro][,image-src=PATH][,id=N]
    #[arg(long, value_name = "SPEC", help_heading = "Mounts")]
    pub mount: Vec<OsString>,
    /// Home directory: SRC or SRC:DST
    #[arg(short = 'H', long, value_name = "SPEC", help_heading = "Mounts")]
    pub home: Option<OsString>,
    /// Do not mount the home directory
    #[arg(long, help_heading = "Mounts")]
    pub no_home: bool,
    /// Leave out mounts: proc,sys,dev,devpts,home,tmp,hostfs,cwd,bind-paths or a destination
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        help_heading = "Mounts"
    )]
    pub no_mount: Vec<String>,
    /// Directory that backs /tmp, /var/tmp and home with --contain, and scratch directories
    #[arg(short = 'W', long, value_name = "DIR", help_heading = "Mounts")]
    pub workdir: Option<PathBuf>,
    /// A private directory at this path of the container
    #[arg(
        short = 'S',
        long,
        value_name = "PATH",
        value_delimiter = ',',
        help_heading = "Mounts"
    )]
    pub scratch: Vec<PathBuf>,
    /// Lay a directory or an image over the root: PATH[:ro]
    #[arg(
        short = 'o',
        long,
        value_name = "PATH",
        value_delimiter = ',',
        help_heading = "Mounts"
    )]
    pub overlay: Vec<OsString>,
    /// Write to the image itself: a directory
    #[arg(short = 'w', long, help_heading = "Mounts")]
    pub writable: bool,
    /// Lay a throw-away writable layer in memory over the root
    #[arg(long, help_heading = "Mounts")]
    pub writable_tmpfs: bool,
    /// Largest size of the throw-away layer, with K, M or G [default: half of the memory]
    #[arg(long, value_name = "SIZE", help_heading = "Mounts")]
    pub writable_tmpfs_size: Option<String>,
    /// Accepted for compatibility: mount points are always made without an overlay
    #[arg(long, help_heading = "Mounts")]
    pub underlay: bool,

    /// Private /dev, /tmp, /var/tmp and home
    #[arg(short = 'c', long, help_heading = "Isolation")]
    pub contain: bool,
    /// --contain, and private processes, IPC and environment
    #[arg(short = 'C', long, help_heading = "Isolation")]
    pub containall: bool,
    /// As docker would: --containall --no-init --no-umask --no-eval --writable-tmpfs
    #[arg(long, help_heading = "Isolation")]
    pub compat: bool,
    /// Be root inside, with subordinate ids where the machine has them
    #[arg(short = 'f', long, help_heading = "Isolation")]
    pub fakeroot: bool,
    /// Accepted for compatibility: there is always a user namespace
    #[arg(short = 'u', long, help_heading = "Isolation")]
    pub userns: bool,
    /// New process namespace
    #[arg(short = 'p', long, help_heading = "Isolation")]
    pub pid: bool,
    /// No process namespace, even where another option brings one
    #[arg(long, help_heading = "Isolation")]
    pub no_pid: bool,
    /// In a process namespace, let the program be process 1 itself
    #[arg(long, help_heading = "Isolation")]
    pub no_init: bool,
    /// New IPC namespace
    #[arg(short = 'i', long, help_heading = "Isolation")]
    pub ipc: bool,
    /// New network namespace, connected by pasta or slirp4netns
    #[arg(short = 'n', long, help_heading = "Isolation")]
    pub net: bool,
    /// none: nothing but the loopback interface in the new network namespace (brings --net)
    #[arg(long, value_name = "NAME", help_heading = "Isolation")]
    pub network: Option<String>,
    /// Lead a port of the host to one of the container: [ADDRESS:]HOST:CONTAINER[/udp] (brings --net)
    #[arg(long, value_name = "SPEC", help_heading = "Isolation")]
    pub publish: Vec<String>,
    #[arg(long, hide = true, help_heading = "Isolation")]
    pub network_args: Vec<String>,
    #[arg(long, hide = true, help_heading = "Isolation")]
    pub netns_path: Option<PathBuf>,
    /// New UTS namespace
    #[arg(long, help_heading = "Isolation")]
    pub uts: bool,
    /// Host name inside (brings --uts)
    #[arg(long, value_name = "NAME", help_heading = "Isolation")]
    pub hostname: Option<String>,
    /// Name servers for resolv.conf, by commas
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        help_heading = "Isolation"
    )]
    pub dns: Vec<String>,

    /// Start with a clean environment
    #[arg(short = 'e', long, help_heading = "Environment")]
    pub cleanenv: bool,
    /// Set a variable: NAME=VALUE[,NAME=VALUE]
    #[arg(long, value_name = "LIST", help_heading = "Environment")]
    pub env: Vec<OsString>,
    /// Set variables from a file in shell syntax
    #[arg(
        long,
        value_name = "FILE",
        value_delimiter = ',',
        help_heading = "Environment"
    )]
    pub env_file: Vec<PathBuf>,
    /// Variables of the host to leave out
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        help_heading = "Environment"
    )]
    pub no_env: Vec<String>,
    /// Take values and arguments literally: no shell evaluation
    #[arg(long, help_heading = "Environment")]
    pub no_eval: bool,
    /// Umask 0022 instead of the caller's
    #[arg(long, help_heading = "Environment")]
    pub no_umask: bool,
    /// Working directory inside
    #[arg(long, alias = "pwd", value_name = "PATH", help_heading = "Environment")]
    pub cwd: Option<PathBuf>,
    /// Run an application of the image (SCIF)
    #[arg(long, value_name = "NAME", help_heading = "Environment")]
    pub app: Option<String>,

    /// Bind the NVIDIA driver's libraries and devices
    #[arg(long, help_heading = "GPUs")]
    pub nv: bool,
    /// Bind the ROCm libraries and devices
    #[arg(long, help_heading = "GPUs")]
    pub rocm: bool,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub no_nv: bool,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub no_rocm: bool,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub nvccli: bool,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub intel_hpu: bool,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub device: Vec<String>,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub cdi_dirs: Vec<String>,
    #[arg(long, hide = true, help_heading = "GPUs")]
    pub containlibs: Vec<String>,

    /// Limits from a TOML file, as in the OCI runtime specification
    #[arg(long, value_name = "FILE", help_heading = "Limits")]
    pub apply_cgroups: Option<PathBuf>,
    /// Share of the disks, 10 to 1000
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub blkio_weight: Option<String>,
    #[arg(long, hide = true, help_heading = "Limits")]
    pub blkio_weight_device: Vec<String>,
    /// Share of the processors, 2 to 262144 (1024 is usual)
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub cpu_shares: Option<String>,
    /// Processors, as 1.5
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub cpus: Option<String>,
    /// Processors that may be used, as 0-3,8
    #[arg(long, value_name = "LIST", help_heading = "Limits")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes that may be used
    #[arg(long, value_name = "LIST", help_heading = "Limits")]
    pub cpuset_mems: Option<String>,
    /// Memory, with K, M or G
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub memory: Option<String>,
    /// Memory that is kept when others need some
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub memory_reservation: Option<String>,
    /// Memory and swap together; -1 for unlimited swap
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub memory_swap: Option<String>,
    #[arg(long, hide = true, help_heading = "Limits")]
    pub oom_kill_disable: bool,
    /// Processes and threads
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub pids_limit: Option<String>,

    /// Capabilities in the container for a program that is not root there: CAP_NET_RAW,… or all
    #[arg(long, value_name = "LIST", help_heading = "Rights")]
    pub add_caps: Option<String>,
    /// Capabilities in the container that root there has not: CAP_CHOWN,… or all
    #[arg(long, value_name = "LIST", help_heading = "Rights")]
    pub drop_caps: Option<String>,
    /// No capabilities at all, for root in the container too
    #[arg(long, help_heading = "Rights")]
    pub no_privs: bool,
    #[arg(long, hide = true, help_heading = "Rights")]
    pub keep_privs: bool,
    #[arg(long, hide = true, help_heading = "Rights")]
    pub allow_setuid: bool,
    #[arg(long, hide = true, help_heading = "Rights")]
    pub security: Vec<String>,
    #[arg(long, hide = true, help_heading = "Rights")]
    pub no_setgroups: bool,
    #[arg(long, hide = true, help_heading = "Rights")]
    pub compat32: bool,

    #[arg(long, hide = true, help_heading = "Mounts")]
    pub fusemount: Vec<String>,
    #[arg(long, hide = true, help_heading = "Mounts")]
    pub data: Vec<String>,
    /// Unpack a file image to a temporary directory, for machines without /dev/fuse
    #[arg(long, alias = "tmp-sandbox", help_heading = "Image")]
    pub unsquash: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub no_tmp_sandbox: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub sif_fuse: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub passphrase: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub pem_path: Option<PathBuf>,
    #[arg(long, hide = true, help_heading = "Image")]
    pub oci: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub no_oci: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub no_compat: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub keep_layers: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub proot: Option<PathBuf>,
    #[arg(long, hide = true, help_heading = "Isolation")]
    pub sharens: bool,
    /// End a run after this time, as in 90s or 1h30m, with status 255
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub runscript_timeout: Option<String>,

    #[arg(long, hide = true, help_heading = "Image")]
    pub disable_cache: bool,
    #[arg(long, hide = true, alias = "nohttps", help_heading = "Image")]
    pub no_https: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub authfile: Option<PathBuf>,
    #[arg(long, hide = true, help_heading = "Image")]
    pub docker_login: bool,
    #[arg(long, hide = true, help_heading = "Image")]
    pub docker_username: Option<String>,
    #[arg(long, hide = true, help_heading = "Image")]
    pub docker_password: Option<String>,
    #[arg(long, hide = true, help_heading = "Image")]
    pub docker_host: Option<String>,
    #[arg(long, hide = true, help_heading = "Image")]
    pub tmpdir: Option<PathBuf>,
    #[arg(long, hide = true, help_heading = "Isolation")]
    pub ignore_subuid: bool,
    #[arg(long, hide = true, help_heading = "Isolation")]
    pub ignore_fakeroot_command: bool,
    #[arg(long, hide = true, help_heading = "Isolation")]
    pub ignore_userns: bool,
    #[arg(
        long,
        hide = true,
        value_name = "FORM",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "text"
    )]
    pub explain: Option<Explain>,

    /// Shell to start
    #[arg(short = 's', long, value_name = "PATH", help_heading = "Environment")]
    pub shell: Option<String>,

    /// The image: a SIF or squashfs file, or a directory
    #[arg(skip)]
    pub image: OsString,
    /// The command, or the arguments for the image's script
    #[arg(skip)]
    pub rest: Vec<OsString>,
    /// The options that were given
    #[arg(skip)]
    pub given: Vec<Given>,
}

/// Options of `instance start` and `instance run`.
#[allow(missing_docs)]
#[derive(clap::Args, Debug, Clone, Default)]
pub struct StartArgs {
    /// Write the number of process 1 to this file, and remove it at the end
    #[arg(long, value_name = "FILE", help_heading = "Service")]
    pub pid_file: Option<PathBuf>,
    /// Return when the service is ready; after SEC seconds it is given up [default: 60]
    #[arg(
        long,
        value_name = "SEC",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "60",
        help_heading = "Service"
    )]
    pub wait: Option<String>,
    /// Ready when this port takes connections: [HOST:]PORT
    #[arg(long, value_name = "PORT", help_heading = "Service")]
    pub ready_port: Option<String>,
    /// Ready when this file of the container appears or changes
    #[arg(long, value_name = "FILE", help_heading = "Service")]
    pub ready_file: Option<PathBuf>,
    /// Ready when a line of the output matches this regular expression
    #[arg(long, value_name = "REGEX", help_heading = "Service")]
    pub ready_log: Option<String>,
    /// Ready when this shell command succeeds in the container
    #[arg(long, value_name = "CMD", help_heading = "Service")]
    pub ready_cmd: Option<String>,
    /// Ready when the service says so (sd_notify)
    #[arg(long, help_heading = "Service")]
    pub ready_notify: bool,
    /// Start the script again after its end: no, on-failure, on-failure:N, always
    #[arg(long, value_name = "WHEN", help_heading = "Service")]
    pub restart: Option<String>,
    /// Size at which a log is turned over, with K, M or G; 0 for never [default: 10M]
    #[arg(long, value_name = "SIZE", help_heading = "Service")]
    pub log_size: Option<String>,
    /// Stay in the foreground, show the output, and end with the script and its status
    #[arg(long, help_heading = "Service")]
    pub foreground: bool,
    #[arg(long, hide = true)]
    pub boot: bool,
    #[arg(long, hide = true)]
    pub dmtcp_launch: Option<String>,
    #[arg(long, hide = true)]
    pub dmtcp_restart: Option<String>,
    #[command(flatten)]
    pub action: ActionArgs,
}

/// An option that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// The name of the option's field.
    pub id: String,
    /// Without dashes.
    pub long: String,
    /// The heading of its group in the help.
    pub heading: String,
    /// On the command line, not in the environment.
    pub typed: bool,
}

/// What an option can still do when the container is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Late {
    /// All: it is about the program, or about nothing at all.
    Works,
    /// Nothing, and nobody is harmed: what the container holds was settled when it was made.
    Idle,
    /// Nothing, and whoever relies on it is harmed: isolation, limits.
    Harmful,
}

impl Given {
    /// What it can do for a program that joins a running container. Options stand in groups of the help; one that is in
    /// no group counts as harmful, so that none is forgotten.
    pub fn late(&self) -> Late {
        match (self.heading.as_str(), self.id.as_str()) {
            (_, "explain" | "userns" | "pid" | "underlay" | "sharens" | "ignore_userns") => {
                Late::Works
            }
            (_, "contain" | "containall" | "compat" | "no_init" | "dns") => Late::Idle,
            (_, "no_pid" | "ignore_subuid" | "ignore_fakeroot_command") => Late::Idle,
            ("Environment" | "Rights" | "Image", _) => Late::Works,
            ("Mounts" | "GPUs", _) => Late::Idle,
            _ => Late::Harmful,
        }
    }
}

/// An option that a peer has and that ends here with a clear error when used.
pub struct Refusal {
    /// As typed.
    pub option: &'static str,
    /// Why not, and what to do instead.
    pub why: &'static str,
}

impl ActionArgs {
    /// The first option in use that cannot be met, wherever it is given: an isolation request that cannot be met must be
    /// an error, never a warning.
    pub fn refusal(&self) -> Option<Refusal> {
        let cases = [
            self.refused_of_the_container(),
            self.refused_rights(),
            self.refused_of_the_image(),
        ];
        let mut cases = cases.into_iter().flatten();
        let (_, option, why) = cases.find(|(used, ..)| *used)?;
        Some(Refusal { option, why })
    }

    fn refused_of_the_container(&self) -> Vec<(bool, &'static str, &'static str)> {
        let network = "networks are connected by pasta or slirp4netns (--net, --publish), or not at all (--network none)";
        let cdi = "CDI devices are not supported; --nv and --rocm are";
        vec![
            (
                !self.blkio_weight_device.is_empty(),
                "--blkio-weight-device",
                "use --blkio-weight",
            ),
            (
                self.oom_kill_disable,
                "--oom-kill-disable",
                "the unified cgroup hierarchy has no such setting",
            ),
            (!self.network_args.is_empty(), "--network-args", network),
            (self.netns_path.is_some(), "--netns-path", network),
            (
                !self.fusemount.is_empty(),
                "--fusemount",
                "FUSE programs in containers are not supported",
            ),
            (
                self.nvccli,
                "--nvccli",
                "nvidia-container-cli is not used; --nv binds the libraries directly",
            ),
            (
                self.intel_hpu,
                "--intel-hpu",
                "Gaudi devices are not supported",
            ),
            (!self.device.is_empty(), "--device", cdi),
            (!self.cdi_dirs.is_empty(), "--cdi-dirs", cdi),
            (!self.containlibs.is_empty(), "--containlibs", "use --bind"),
            (
                !self.data.is_empty(),
                "--data",
                "data containers are OCI-SIF files; a SIF or squashfs file with data is mounted by --bind FILE:PATH:image-src=/",
            ),
        ]
    }

    fn refused_rights(&self) -> Vec<(bool, &'static str, &'static str)> {
        let security = |kinds: &[&str]| {
            let is = |text: &&String| kinds.iter().any(|k| text.split(':').next() == Some(*k));
            self.security.iter().any(|text| is(&text))
        };
        vec![
            (
                security(&["seccomp"]),
                "--security seccomp",
                "this version has no filters of system calls that a profile describes",
            ),
            (
                security(&["uid", "gid"]),
                "--security uid and gid",
                "the user inside is the caller, or root with --fakeroot; other ids are not mapped",
            ),
            (
                security(&["apparmor", "selinux"]),
                "--security apparmor and selinux",
                "labels are not set; those of the calling process stay in force",
            ),
            (
                !self.security.is_empty(),
                "--security",
                "it takes profiles and ids of peers, which this version has not",
            ),
            (
                self.keep_privs && (self.no_privs || self.drop_caps.is_some()),
                "--keep-privs with --no-privs or --drop-caps",
                "they contradict each other",
            ),
            (
                self.allow_setuid,
                "--allow-setuid",
                "programs in containers never gain rights (no_new_privs is always set), for root neither",
            ),
            (
                self.compat32,
                "--compat32",
                "32-bit programs run as they are, with no personality set",
            ),
        ]
    }

    fn refused_of_the_image(&self) -> Vec<(bool, &'static str, &'static str)> {
        let encrypted = "encrypted images are not supported; leave it out for others";
        vec![
            (self.passphrase, "--passphrase", encrypted),
            (self.pem_path.is_some(), "--pem-path", encrypted),
            (
                self.oci,
                "--oci",
                "there is no OCI mode; the native mode runs the same images",
            ),
            (
                self.keep_layers,
                "--keep-layers",
                "it is for OCI-SIF files, and a SIF has one layer",
            ),
            (
                self.proot.is_some(),
                "--proot",
                "proot is not used; --fakeroot needs no program",
            ),
            (
                self.unsquash && self.no_tmp_sandbox,
                "--unsquash with --no-tmp-sandbox",
                "they contradict each other",
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Args as _;

    #[test]
    fn every_option_is_in_a_group() {
        let command = ActionArgs::augment_args(clap::Command::new("exec"));
        for arg in command.get_arguments().filter(|a| a.get_id() != "explain") {
            let heading = arg.get_help_heading();
            assert!(heading.is_some(), "{} has no heading", arg.get_id());
        }
    }

    #[test]
    fn isolation_and_limits_come_too_late_for_a_running_container() {
        let late = |heading: &str, id: &str| {
            let given = Given {
                id: id.into(),
                long: id.into(),
                heading: heading.into(),
                typed: true,
            };
            given.late()
        };
        for id in ["ipc", "net", "uts", "hostname", "network", "publish"] {
            assert_eq!(late("Isolation", id), Late::Harmful, "{id}");
        }
        assert_eq!(late("Limits", "memory"), Late::Harmful);
        assert_eq!(late("", "of_the_future"), Late::Harmful);
        assert_eq!(late("Mounts", "bind"), Late::Idle);
        assert_eq!(late("Environment", "env"), Late::Works);
    }
}
