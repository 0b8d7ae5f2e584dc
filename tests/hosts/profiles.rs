//! The hosts. A new one is one entry: what root makes of the machine, how the user's processes live there, and in which
//! cells something else than success is right.

use Right::{Refused, Works};

/// What a user has a right to.
#[derive(Clone, Copy)]
pub enum Right {
    /// The operation.
    Works,
    /// One `FATAL:` line with these words, and status 255.
    Refused(&'static [&'static str]),
}

/// A kind of machine.
pub struct Profile {
    pub name: &'static str,
    /// Root's script, after `base.sh`.
    pub setup: &'static str,
    /// Variables that differ from `USUAL`; `None`: not set.
    pub environment: &'static [(&'static str, Option<&'static str>)],
    /// Supplementary groups, as setpriv(1) takes them.
    pub groups: &'static str,
    /// Words before `env`: what the user's processes live under, set by root.
    pub through: &'static [&'static str],
    /// Words before the shell: what they live in, by the user.
    pub inside: &'static [&'static str],
    /// Shell code before each of the user's scripts.
    pub login: &'static str,
    /// The cells that are not `Works`: the first that names the operation, or `*`.
    pub rights: &'static [(&'static str, Right)],
}

impl Profile {
    /// What the user has a right to.
    pub fn right(&self, operation: &str) -> Right {
        let named = self
            .rights
            .iter()
            .find(|(name, _)| *name == operation || *name == "*");
        named.map_or(Works, |(_, right)| *right)
    }
}

/// The environment of a login.
pub const USUAL: &[(&str, &str)] = &[
    ("HOME", "/home/anna"),
    ("USER", "anna"),
    ("LOGNAME", "anna"),
    ("XDG_RUNTIME_DIR", "/run/user/704711"),
];

const DEBIAN: Profile = Profile {
    name: "debian",
    setup: "",
    environment: &[],
    groups: "704711",
    through: &[],
    inside: &[],
    login: "",
    rights: &[],
};

const NO_FUSE: Right = Refused(&["/dev/fuse"]);
const NOEXEC: Right = Refused(&["noexec", "/tmp", "--tmpdir"]);
const READ_ONLY_TMP: Right = Refused(&["/tmp", "Read-only file system"]);
const MASKED_PROC: Right = Refused(&["mounted over parts of this machine's /proc", "unmask=ALL"]);
/// Each script lives in an outer container of its own, from which the namespaces of another cannot be joined.
const ELSEWHERE: Right = Refused(&["no instance found with name"]);

/// All of them.
pub const PROFILES: &[Profile] = &[
    DEBIAN,
    Profile {
        name: "ubuntu",
        setup: "mkdir -p /run/systemd/resolve
            echo 'nameserver 127.0.0.53' >/run/systemd/resolve/stub-resolv.conf
            ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
            ln -sf /usr/share/zoneinfo/Asia/Tokyo /etc/localtime",
        ..DEBIAN
    },
    Profile {
        name: "ubuntu-restricted",
        // What the program looks at: the setting, and the refusal.
        setup: "mkdir -p /mnt/kernel/random; cp /proc/sys/kernel/random/boot_id /mnt/kernel/random/
            for name in overflowuid overflowgid osrelease ostype hostname pid_max; do cat /proc/sys/kernel/$name >/mnt/kernel/$name; done
            echo 1 >/mnt/kernel/apparmor_restrict_unprivileged_userns
            mount --bind /mnt/kernel /proc/sys/kernel",
        through: &["/mnt/share/bin/deny", "landlock-proc"],
        rights: &[
            ("inspect", Works),
            ("cache-list", Works),
            ("*", Refused(&["AppArmor restricts user namespaces", "/etc/apparmor.d/capsid", "/etc/sysctl.d"])),
        ],
        ..DEBIAN
    },
    Profile {
        name: "rhel",
        setup: "ln -sf ../usr/share/zoneinfo/Asia/Tokyo /etc/localtime
            mkdir -p /mnt/export; mount --move /home /mnt/export
            mkdir /mnt/root; mount --bind / /mnt/root; mount -t tmpfs -o mode=755 host /home; mount --rbind /mnt/export/anna /mnt/export/anna
            ln -s ../mnt/export/anna /home/anna
            rm -f /etc/resolv.conf; echo 'nameserver 192.0.2.9' >/run/resolv; ln -s /run/resolv /etc/resolv.conf",
        login: "umask 0077",
        ..DEBIAN
    },
    Profile {
        name: "sles",
        setup: "mkdir -p /run/netconfig; echo 'nameserver 192.0.2.7' >/run/netconfig/resolv.conf
            ln -sf /run/netconfig/resolv.conf /etc/resolv.conf
            sed -i /^anna:/d /etc/subuid /etc/subgid",
        ..DEBIAN
    },
    Profile {
        name: "hidepid-1",
        setup: "mount -o remount,hidepid=1 /proc",
        ..DEBIAN
    },
    Profile {
        name: "hidepid-2",
        setup: "mount -o remount,hidepid=2 /proc",
        ..DEBIAN
    },
    Profile {
        name: "hidepid-4",
        setup: "mount -o remount,hidepid=4 /proc",
        ..DEBIAN
    },
    Profile {
        name: "tmp-noexec",
        setup: "mount -o remount,noexec,nosuid,nodev /tmp; mount -o remount,noexec,nosuid,nodev /var/tmp",
        rights: &[("sandbox", NOEXEC), ("build", NOEXEC)],
        ..DEBIAN
    },
    Profile {
        name: "tmp-small",
        setup: "mount -o remount,size=64k /tmp",
        rights: &[("build", Refused(&["No space left"])), ("pull", Refused(&["No space left"]))],
        ..DEBIAN
    },
    Profile {
        name: "tmp-read-only",
        setup: "mount -o remount,ro /tmp; mount -o remount,ro /var/tmp",
        rights: &[("sandbox", READ_ONLY_TMP), ("build", READ_ONLY_TMP), ("pull", READ_ONLY_TMP)],
        ..DEBIAN
    },
    Profile {
        name: "tmp-squatted",
        setup: "umount -l /run/user/$HOST_UID; rmdir /run/user/$HOST_UID
            for place in /tmp /var/tmp /dev/shm; do for name in capsid-$HOST_UID capsid-anna .capsid-$HOST_UID; do
                install -d -o 12345 -m 700 $place/$name; done; done",
        environment: &[("XDG_RUNTIME_DIR", None)],
        ..DEBIAN
    },
    Profile {
        name: "no-runtime-dir",
        setup: "umount -l /run/user/$HOST_UID; rmdir /run/user/$HOST_UID",
        environment: &[("XDG_RUNTIME_DIR", None)],
        ..DEBIAN
    },
    Profile {
        name: "batch-bare",
        setup: "umount -l /run/user/$HOST_UID; rmdir /run/user/$HOST_UID",
        environment: &[("HOME", None), ("USER", None), ("LOGNAME", None), ("XDG_RUNTIME_DIR", None)],
        ..DEBIAN
    },
    Profile {
        name: "home-read-only",
        setup: "mount -o remount,ro /home",
        rights: &[("home-mount", Works)],
        ..DEBIAN
    },
    Profile {
        name: "home-missing",
        setup: "rmdir /home/anna",
        ..DEBIAN
    },
    Profile {
        name: "home-root-squash",
        setup: "install -d -o 54321 -g 54321 -m 700 /home/anna",
        ..DEBIAN
    },
    Profile {
        name: "home-hangs",
        setup: "mkdir /mnt/under; odd_fs=/mnt/share/bin/odd_fs
            $odd_fs /mnt/under /home/anna allow_other hang=1000",
        environment: &[("HOME", Some("/srv/work")), ("APPTAINER_NO_HOME", Some("1")), ("APPTAINER_CONFIGDIR", Some("/srv/work/conf")), ("APPTAINER_CACHEDIR", Some("/srv/work/cache"))],
        ..DEBIAN
    },
    Profile {
        name: "no-passwd-entry",
        setup: "sed -i /^anna:/d /etc/passwd /etc/group",
        environment: &[("USER", None), ("LOGNAME", None)],
        ..DEBIAN
    },
    Profile {
        name: "300-groups",
        groups: GROUPS_300,
        ..DEBIAN
    },
    Profile {
        name: "deleted-cwd",
        login: "mkdir /srv/work/gone; cd /srv/work/gone; rmdir /srv/work/gone",
        rights: &[],
        ..DEBIAN
    },
    Profile {
        name: "closed-descriptors",
        login: "exec 0<&-",
        ..DEBIAN
    },
    Profile {
        name: "umask-000",
        login: "umask 000",
        ..DEBIAN
    },
    Profile {
        name: "few-descriptors",
        login: "ulimit -n 64",
        ..DEBIAN
    },
    Profile {
        name: "few-processes",
        login: "ulimit -u 64",
        ..DEBIAN
    },
    Profile {
        name: "little-memory",
        login: "ulimit -v 2000000",
        ..DEBIAN
    },
    Profile {
        name: "docker",
        setup: MASKED,
        through: &["/mnt/share/bin/deny", "namespaces"],
        rights: &[("inspect", Works), ("cache-list", Works), ("*", Refused(&["user namespace"]))],
        ..DEBIAN
    },
    Profile {
        name: "podman-no-fuse",
        setup: "mount --bind /dev/null /dev/fuse; mount -t tmpfs -o mode=755,nosuid,ro none /sys/firmware",
                rights: &[("inspect", Works), ("cache-list", Works), ("sandbox", Works), ("*", NO_FUSE)],
        ..DEBIAN
    },
    Profile {
        name: "kubernetes",
        setup: MASKED,
                rights: &[("fakeroot-one-id", MASKED_PROC),
            ("build", MASKED_PROC),
            ("pid", MASKED_PROC), ("containall", MASKED_PROC), ("instance", MASKED_PROC), ("instance-dead", MASKED_PROC), ("instance-cron", MASKED_PROC), ("instance-logout", MASKED_PROC), ("instance-cleaned", MASKED_PROC)],
        ..DEBIAN
    },
    Profile {
        name: "odd-storage",
        setup: "own /mnt/odd.under; mkdir /mnt/odd; cp -a /mnt/share/image.sif /mnt/odd.under/
            /mnt/share/bin/odd_fs /mnt/odd.under /mnt/odd allow_other delay=2000 noxattr nolock nommap inodes
            cp -a /srv/data/. /mnt/odd/; rm -rf /srv/data; ln -s /mnt/odd /srv/data
            umount -l /home; own /mnt/odd/anna 700; mkdir -p /home/anna; mount --bind /mnt/odd/anna /home/anna",
        environment: &[("IMG", Some("/mnt/odd/image.sif"))],
        ..DEBIAN
    },
    Profile {
        name: "strict-filter",
        through: &["/mnt/share/bin/deny", "extras"],
        ..DEBIAN
    },
    Profile {
        name: "small-stack",
        login: "ulimit -s 256",
        ..DEBIAN
    },
    Profile {
        name: "inside-bwrap",
        inside: &["bwrap", "--dev-bind", "/", "/", "--unshare-user"],
        rights: &[("instance-cron", ELSEWHERE), ("instance-logout", ELSEWHERE), ("instance-cleaned", ELSEWHERE)],
        ..DEBIAN
    },
    Profile {
        name: "inside-capsid-root",
        inside: &["/mnt/share/bin/capsid", "-q", "exec", "--fakeroot", "-B", "/mnt,/srv,/opt,/usr,/etc,/run,/var", "/mnt/share/host"],
        // The outer container tells the inner one its binds, as the peers do.
        login: "unset APPTAINER_BIND SINGULARITY_BIND",
        rights: &[("instance-cron", ELSEWHERE), ("instance-logout", ELSEWHERE), ("instance-cleaned", ELSEWHERE)],
        ..DEBIAN
    },
    Profile {
        name: "inside-capsid",
        inside: &["/mnt/share/bin/capsid", "-q", "exec", "-B", "/mnt,/srv,/opt,/usr,/etc,/run,/var", "/mnt/share/host"],
        // The outer container tells the inner one its binds, as the peers do.
        login: "unset APPTAINER_BIND SINGULARITY_BIND",
        rights: &[("instance-cron", ELSEWHERE), ("instance-logout", ELSEWHERE), ("instance-cleaned", ELSEWHERE)],
        ..DEBIAN
    },
];

/// `/proc` and `/sys` as a container engine masks them: no procfs can be mounted any more.
const MASKED: &str = "for file in /proc/kcore /proc/keys /proc/timer_list; do [ ! -e $file ] || mount --bind /dev/null $file; done
    for dir in /proc/bus /proc/fs /proc/irq /proc/sys; do mount --bind $dir $dir; mount -o remount,bind,ro $dir; done
    mount -t tmpfs -o ro none /sys/firmware; mount -o remount,bind,ro /sys";

/// The limit of NFS is 16, that of many sites is in the hundreds.
const GROUPS_300: &str = "800000,800001,800002,800003,800004,800005,800006,800007,800008,800009,800010,800011,800012,800013,800014,800015,800016,800017,800018,800019,800020,800021,800022,800023,800024,800025,800026,800027,800028,800029,800030,800031,800032,800033,800034,800035,800036,800037,800038,800039,800040,800041,800042,800043,800044,800045,800046,800047,800048,800049,800050,800051,800052,800053,800054,800055,800056,800057,800058,800059,800060,800061,800062,800063,800064,800065,800066,800067,800068,800069,800070,800071,800072,800073,800074,800075,800076,800077,800078,800079,800080,800081,800082,800083,800084,800085,800086,800087,800088,800089,800090,800091,800092,800093,800094,800095,800096,800097,800098,800099,800100,800101,800102,800103,800104,800105,800106,800107,800108,800109,800110,800111,800112,800113,800114,800115,800116,800117,800118,800119,800120,800121,800122,800123,800124,800125,800126,800127,800128,800129,800130,800131,800132,800133,800134,800135,800136,800137,800138,800139,800140,800141,800142,800143,800144,800145,800146,800147,800148,800149,800150,800151,800152,800153,800154,800155,800156,800157,800158,800159,800160,800161,800162,800163,800164,800165,800166,800167,800168,800169,800170,800171,800172,800173,800174,800175,800176,800177,800178,800179,800180,800181,800182,800183,800184,800185,800186,800187,800188,800189,800190,800191,800192,800193,800194,800195,800196,800197,800198,800199,800200,800201,800202,800203,800204,800205,800206,800207,800208,800209,800210,800211,800212,800213,800214,800215,800216,800217,800218,800219,800220,800221,800222,800223,800224,800225,800226,800227,800228,800229,800230,800231,800232,800233,800234,800235,800236,800237,800238,800239,800240,800241,800242,800243,800244,800245,800246,800247,800248,800249,800250,800251,800252,800253,800254,800255,800256,800257,800258,800259,800260,800261,800262,800263,800264,800265,800266,800267,800268,800269,800270,800271,800272,800273,800274,800275,800276,800277,800278,800279,800280,800281,800282,800283,800284,800285,800286,800287,800288,800289,800290,800291,800292,800293,800294,800295,800296,800297,800298,800299";
