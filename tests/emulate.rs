//! Owners in a container in which only root exists: `--fakeroot` without subordinate ids. The test user has such ids;
//! `--ignore-subuid` makes the program go on as if there were none.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use capsid::engine::emulate::{Device, Owner, Owners};
use capsid::engine::{self, sys};
use capsid::image::Root;
use capsid::plan::env::Environment;
use capsid::plan::{
    IdMap, Init, Missing, Mount, Namespaces, Ownership, Plan, Process, Source, Verb, Why,
};
use common::{Env, Output, output, wait_until, write};

/// A tree that may be written, with accounts and the probe.
fn tree(t: &Env) -> PathBuf {
    let root = t.tree("tree");
    write(
        &root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:d:/:/bin/sh\nada:x:1000:1001:Ada:/home/ada:/bin/sh\n",
    );
    write(
        &root.join("etc/group"),
        "root:x:0:\ndaemon:x:1:\nmail:x:8:ada\nada:x:1001:\n",
    );
    let source = t.path("probe.c");
    write(&source, include_str!("probe.c"));
    output(
        Command::new("gcc")
            .args(["-O1", "-Wall", "-static", "-pthread", "-o"])
            .arg(root.join("bin/probe"))
            .arg(&source),
    )
    .ok();
    root
}

fn exec(t: &Env, root: &Path, script: &str) -> Output {
    t.run(arguments(root, script))
}

fn arguments(root: &Path, script: &str) -> Vec<String> {
    let words = [
        "-q",
        "exec",
        "--fakeroot",
        "--ignore-subuid",
        "--writable",
        "--contain",
        "--no-home",
        "--cwd",
        "/root",
    ];
    let mut words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
    words.push(root.display().to_string());
    words.extend(["sh".into(), "-ec".into(), script.into()]);
    words
}

#[test]
fn owner_is_reported_by_every_name_of_the_file() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "echo > a; chown daemon:mail a; ln a b; mv a c; echo > old; mv c old; ln -s old link
         stat -c '%n %U:%G' b old; stat -c %u link; stat -L -c %u link; stat -c %u /proc/self/cwd/old
         probe owner old; (stat -c '%u' old)",
    );
    assert_eq!(
        out.ok(),
        "b daemon:mail\nold daemon:mail\n0\n1\n1\nstat 1:8 lstat 1:8 fstat 1:8 empty 1:8 path 1:8 statx 1:8\n1"
    );
}

#[test]
fn new_file_of_a_freed_number_is_roots() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "probe reuse /root/x; chown ada /root; mkdir d; chown ada d; rmdir d; mkdir d; stat -c '%n %u' d /root",
    );
    assert_eq!(out.ok(), "500 of 500 new files are root's\nd 0\n/root 1000");
}

#[test]
fn links_directories_and_nodes_have_owners() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "mkdir d; ln -s d l; mkfifo f; chown ada d; chown -h daemon l; chown 8:9 f
         stat -c '%n %u %g %F' d l f
         mknod null c 1 3; mknod -m 600 disk b 8 300; chown :mail disk; stat -c '%n %F %t %T %a %g' null disk
         probe owner disk; rm null disk; ls",
    );
    assert_eq!(
        out.ok(),
        "d 1000 0 directory\nl 1 0 symbolic link\nf 8 9 fifo\n\
         null character special file 1 3 644 0\ndisk block special file 8 12c 600 8\n\
         stat 0:8 lstat 0:8 fstat 0:8 empty 0:8 path 0:8 statx 0:8\nd\nf\nl"
    );
}

#[test]
fn change_of_owner_takes_special_bits_and_chmod_gives_them() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "echo > a; chmod 6755 a; chown ada a; stat -c %a a; chmod 6755 a; stat -c '%a %u' a",
    );
    assert_eq!(out.ok(), "755\n6755 1000");
    let mode = fs::metadata(root.join("root/a")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o6755, "also outside");
}

#[test]
fn thousand_files_come_out_of_an_archive_with_their_owners() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "mkdir d; i=0; while [ $i -lt 1000 ]; do echo $i > d/$i; i=$((i+1)); done
         probe number d; tar -cf t.tar d; mkdir out; cd out; tar -xpf ../t.tar
         ls -ln d | awk 'NR > 1 && ($3 != $9 + 1 || $4 != $9 + 2) { bad++ } END { print NR - 1, bad + 0 }'",
    );
    assert_eq!(out.ok(), "1000 0");
}

#[test]
fn file_in_a_directory_with_group_belongs_to_the_group() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "mkdir g; chown root:mail g; chmod 2775 g; echo > g/f; mkdir g/d; ln -s x g/l; echo > g/d/f
         stat -c '%n %u:%g %a' g/f g/d g/l g/d/f",
    );
    assert_eq!(
        out.ok(),
        "g/f 0:8 644\ng/d 0:8 2755\ng/l 0:8 777\ng/d/f 0:8 644"
    );
}

#[test]
fn su_becomes_the_user_and_makes_files_of_the_user() {
    let t = Env::new();
    let root = tree(&t);
    fs::create_dir(root.join("home/ada")).unwrap();
    let out = exec(
        &t,
        &root,
        "chown ada:ada /home/ada
         su - ada -c 'id; umask 027; echo > f; mkdir d; ln -s f l; mkfifo p; sh -c \"echo >> f; id -u\"
           stat -c \"%n %u:%g %a\" f d p; stat -c %u l; chown root f || echo refused; chown :mail f && stat -c %g f'
         id -u",
    );
    assert_eq!(
        out.ok(),
        "uid=1000(ada) gid=1001(ada) groups=8(mail),1001(ada)\n1000\n\
         f 1000:1001 640\nd 1000:1001 750\np 1000:1001 640\n1000\nrefused\n8\n0"
    );
}

#[test]
fn credentials_belong_to_threads_and_are_inherited() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(&t, &root, "probe credentials");
    assert_eq!(
        out.ok(),
        "thread 33 main 0\ndaemon's grandchild 33:44 groups 5,6\nexec 33 33 33\nback 0\nno way back -1\nkept 44\n\
         slack is not lost 33"
    );
}

#[test]
fn capability_of_a_file_is_the_kernels() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "echo > a; probe capability a; chown ada a; probe capability a",
    );
    assert_eq!(out.ok(), "set, read 20\nset, read 20");
}

/// As setfacl makes them, for a user whom the kernel does not know here.
#[test]
fn access_lists_name_users_that_do_not_exist() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "mkdir d; echo > f; probe acl d 1000; stat -c '%a %u' d; probe acl f 1000; chmod 604 f; probe acl? f; mv f g
         probe acl? g; ln -s g l; probe acl? l; echo > f; probe acl? f; probe acl g 0; probe acl? g
         su daemon -s /bin/sh -c 'probe acl d 8'",
    );
    assert_eq!(
        out.ok(),
        "set: Success\n775 0\nset: Success\nuser 1000 of 6: 7 group 0 of 6: 5 mask 0\nuser 1000 of 6: 7 group 0 of 6: 5 mask 0\n\
         user 1000 of 6: 7 group 0 of 6: 5 mask 0\nnone\nset: Success\nuser 0 of 6: 7 group 0 of 6: 5 mask 7\n\
         set: Operation not permitted"
    );
}

#[test]
fn signals_restart_a_call() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(&t, &root, "probe signals /root/f");
    assert_eq!(out.ok(), "no call was broken");
}

#[test]
fn killed_program_leaves_the_others_alone() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "echo > a; for i in 1 2 3 4 5 6 7 8; do probe loop a & done; sleep 0.3; kill -9 $(jobs -p); wait || true
         chown ada a; stat -c %u a",
    );
    assert_eq!(out.ok(), "1000");
}

#[test]
fn nothing_outlives_the_supervisor() {
    let t = Env::new();
    let root = tree(&t);
    let sleep = format!("sleep 98765.{}", std::process::id());
    let script = format!("chown ada /root; {sleep} & setsid {sleep} & echo > /ready; {sleep}");
    let mut child = t.command(arguments(&root, &script)).spawn().unwrap();
    wait_until("the payload to run", || root.join("ready").exists());
    let sleepers = || {
        let ours = format!("{}", nix::unistd::getuid());
        let found = Command::new("pgrep")
            .args(["-u", &ours, "-f", &format!("^{sleep}")])
            .output();
        String::from_utf8(found.unwrap().stdout)
            .unwrap()
            .lines()
            .count()
    };
    wait_until("three sleepers", || sleepers() == 3);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("nobody to be left", || sleepers() == 0);
}

#[test]
fn no_path_leads_out_of_the_container() {
    let t = Env::new();
    let root = tree(&t);
    let outside = t.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o777)).unwrap();
    let script = format!(
        "ln -s {0} link; mkdir -p c/up/up; chown ada . c; probe escape link/x; probe escape ../../../../..{0}/x
         probe escape {0}/x; chroot c probe escape ../../../../..{0}/x 2>/dev/null || true
         probe race link/x /tmp/x",
        outside.display()
    );
    exec(&t, &root, &script).ok();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn chroot_is_followed() {
    let t = Env::new();
    let root = tree(&t);
    let out = exec(
        &t,
        &root,
        "mkdir -p c/bin c/etc; cp /bin/busybox /bin/probe c/bin; ln -s busybox c/bin/sh; ln -s busybox c/bin/chown
         ln -s /etc/f c/link; echo > c/etc/f; echo > /etc/f
         chroot c chown -h 7 /etc/f; chroot c probe owner link; stat -c '%n %u' c/etc/f /etc/f",
    );
    assert_eq!(
        out.ok(),
        "stat 7:0 lstat 0:0 fstat 7:0 empty 7:0 path 7:0 statx 7:0\nc/etc/f 7\n/etc/f 0"
    );
}

#[test]
fn overlay_in_memory_has_owners_too() {
    let t = Env::new();
    let image = t.image();
    let out = t.run([
        "-q", "exec", "--fakeroot", "--ignore-subuid", "--writable-tmpfs", "--contain", image.to_str().unwrap(), "sh", "-ec",
        "chown 33:34 /opt/hello.txt /etc; echo > /etc/new; chown 5 /etc/new; stat -c '%n %u:%g' /opt/hello.txt /etc /etc/new",
    ]);
    assert_eq!(out.ok(), "/opt/hello.txt 33:34\n/etc 33:34\n/etc/new 5:0");
}

/// Programs that manage accounts put a new file in the place of the old one, with subordinate ids and without.
#[test]
fn root_replaces_account_files_and_time_zone_wherever_it_may_write() {
    let (t, other) = (Env::new(), Env::new());
    let (image, root) = (t.image(), tree(&other));
    let (image, root) = (image.to_str().unwrap(), root.to_str().unwrap());
    for name in ["upper", "upper2"] {
        fs::create_dir(t.path(name)).unwrap();
    }
    let overlay = |name: &str| t.path(name).display().to_string();
    let script = "echo bob:x:1234:1234::/:/bin/sh >> /etc/passwd
         for f in passwd group localtime; do echo >> /etc/$f; cp /etc/$f /etc/$f.new; mv -f /etc/$f.new /etc/$f; done
         id -u bob";
    let end = ["sh", "-ec", script];
    for options in [
        &["--writable-tmpfs", image][..],
        &["--overlay", &overlay("upper"), image],
        &["--ignore-subuid", "--writable-tmpfs", image],
        &["--ignore-subuid", "--overlay", &overlay("upper2"), image],
        &[
            "--ignore-subuid",
            "--ignore-fakeroot-command",
            "--writable-tmpfs",
            image,
        ],
        &["--ignore-subuid", "--writable", root],
        &["--writable-tmpfs", "--containall", root],
    ] {
        let words = ["-q", "exec", "--fakeroot"];
        let words = words.iter().chain(options).chain(&end);
        let out = t.run(words);
        assert_eq!(out.ok(), "1234", "{options:?}");
    }
}

/// newuidmap has its rights neither under no_new_privs nor in a namespace that has no subordinate ids.
#[test]
fn helpers_that_can_have_no_rights_are_done_without() {
    let t = Env::new();
    let image = t.image();
    for (around, cause) in [
        (&["setpriv", "--no-new-privs"][..], "no_new_privs"),
        (&["unshare", "--user", "--map-current-user"], "do not exist"),
    ] {
        let words = "exec --fakeroot --writable-tmpfs --contain".split(' ');
        let mut command = t.command_as(Path::new(around[0]), &around[1..]);
        command
            .arg(env!("CARGO_BIN_EXE_capsid"))
            .args(words)
            .arg(&image);
        command.args(["sh", "-c", "chown 33:34 /opt && stat -c %u:%g /opt"]);
        let out = output(&mut command);
        assert_eq!(out.ok(), "33:34", "{around:?}");
        assert!(
            out.stderr.contains("cannot be used") && out.stderr.contains(cause),
            "{out}"
        );
        let mut doctor = t.command_as(Path::new(around[0]), &around[1..]);
        let out = output(doctor.arg(env!("CARGO_BIN_EXE_capsid")).arg("doctor"));
        assert!(out.ok().contains("emulated by capsid"), "{out}");
        assert!(
            out.stdout.contains(cause) && !out.stdout.contains("chmod u+s"),
            "{out}"
        );
    }
}

/// With subordinate ids and without: scripts of packages make devices, and images have none.
#[test]
fn script_of_a_build_makes_devices() {
    let t = Env::new();
    let image = t.image();
    let def = t.path("devices.def");
    write(
        &def,
        &format!(
            "Bootstrap: localimage\nFrom: {}\n%post\n mknod /opt/n c 1 3; test -c /opt/n; chown 1:5 /opt/n; mkdir /opt/d
             mknod -m 600 /opt/d/b b 8 0; cd /opt/d; mknod c c 5 1; mknod p p; mknod ../n c 1 3 && exit 1
             chroot / mknod /opt/m c 1 5; mknod /proc/n c 1 3 && exit 1; echo kept > /opt/kept\n",
            image.display()
        ),
    );
    for options in [&["build"][..], &["build", "--ignore-subuid"]] {
        let out = t.path("devices.sif");
        let mut command = t.command(options.iter().chain(&["--force"]));
        output(command.arg(&out).arg(&def)).ok();
        let mut command = t.command(["-q", "exec"]);
        let list = output(command.arg(&out).args(["ls", "/opt", "/opt/d"]));
        assert_eq!(
            list.ok(),
            "/opt:\nd\nhello.txt\nkept\n\n/opt/d:\np",
            "{options:?}"
        );
    }
}

/// A service has what a program in the foreground has, and nothing of its supervisor stays.
#[test]
fn instance_has_owners_too() {
    let t = Env::new();
    let root = tree(&t);
    common::script(
        &root.join(".singularity.d/startscript"),
        "#!/bin/sh\nchown 33:34 /opt/hello.txt\nsu ada -c 'echo > /opt/new; id -u'
         stat -c %u:%g /opt/hello.txt /opt/new\necho ready > /ready\nexec sleep 1000\n",
    );
    let options = "instance start --fakeroot --ignore-subuid --writable --contain";
    let mut start = t.command(options.split(' '));
    output(start.arg(&root).arg("owners")).ok();
    wait_until("the service", || root.join("ready").exists());
    let log = t.run(["instance", "logs", "owners"]);
    assert!(log.stdout.contains("1000\n33:34\n1000:1001"), "{log}");
    let ours = || {
        let mut list = Command::new("pgrep");
        let user = nix::unistd::getuid().to_string();
        list.args(["-u", &user, "-f", "^capsid-owners"])
            .output()
            .unwrap()
            .stdout
            .len()
    };
    assert!(ours() > 0);
    t.run(["instance", "stop", "owners"]).ok();
    wait_until("the supervisor to end", || ours() == 0);
    let list = t.run(["instance", "list"]);
    assert!(!list.stdout.contains("owners"), "{list}");
}

#[test]
fn read_only_file_keeps_its_owner() {
    let t = Env::new();
    let image = t.image();
    let out = t.run([
        "-q",
        "exec",
        "--fakeroot",
        "--ignore-subuid",
        image.to_str().unwrap(),
        "chown",
        "33",
        "/opt/hello.txt",
    ]);
    assert_eq!(out.status, 1, "{out}");
    assert!(out.stderr.contains("Read-only file system"), "{out}");
}

#[test]
fn emulation_can_be_turned_off() {
    let t = Env::new();
    let image = t.image();
    let out = t.run([
        "exec",
        "--fakeroot",
        "--ignore-subuid",
        "--ignore-fakeroot-command",
        "--writable-tmpfs",
        image.to_str().unwrap(),
        "chown",
        "33",
        "/opt/hello.txt",
    ]);
    assert_eq!(out.status, 1, "{out}");
    assert!(out.stderr.contains("only root exists inside"), "{out}");
}

#[test]
fn status_of_the_program_comes_out() {
    let t = Env::new();
    let root = tree(&t);
    assert_eq!(exec(&t, &root, "exit 7").status, 7);
    assert_eq!(exec(&t, &root, "kill -9 $$").status, 137);
}

/// The way of builders: a record goes in, and what the program made of it comes out, by path too.
#[test]
fn record_goes_in_and_comes_out() {
    let t = Env::new();
    let root = tree(&t);
    let open = |path: &str| {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(root.join(path), flags, Mode::empty()).unwrap()
    };
    use std::os::fd::AsFd as _;
    let owner = |uid, gid| Owner {
        uid,
        gid,
        device: None,
    };
    let mut owners = Owners::default();
    owners
        .set(open("opt/hello.txt").as_fd(), owner(12, 13))
        .unwrap();
    let script = "stat -c %u /opt/hello.txt > /seen; chown :50 /opt/hello.txt; mknod /null c 1 3; chown 7 /etc; exit 3";
    let status = run_emulated(&t, &root, script, &mut owners);
    assert_eq!(status, 3);
    assert_eq!(fs::read_to_string(root.join("seen")).unwrap(), "12\n");
    let get = |path: &str| owners.get(open(path).as_fd()).unwrap();
    assert_eq!(get("opt/hello.txt"), Some(owner(12, 50)));
    assert_eq!(get("etc"), Some(owner(7, 0)));
    assert_eq!(get("opt"), None);
    let null = Device {
        block: false,
        major: 1,
        minor: 3,
    };
    assert_eq!(get("null").unwrap().device, Some(null));
    let mut saved = Vec::new();
    owners.save(&root, &mut saved).unwrap();
    let loaded = Owners::load(&root, &mut saved.as_slice()).unwrap();
    assert_eq!(loaded.len(), 3);
}

/// As a builder does it, in a process of its own: the test's has threads.
fn run_emulated(t: &Env, root: &Path, script: &str, owners: &mut Owners) -> u8 {
    let after = t.path("after");
    if let sys::Fork::Parent(child) = sys::fork_beside_threads().unwrap() {
        nix::sys::wait::waitpid(child, None).unwrap();
        let text = fs::read(&after).unwrap();
        let (status, record) = text.split_first().unwrap();
        *owners = Owners::load(root, &mut &record[..]).unwrap();
        return *status;
    }
    let plan = plan_for(root, &["/bin/sh", "-ec", script]);
    let status = engine::run_emulated(
        &plan,
        &capsid::engine::server::Places::default(),
        None,
        owners,
    )
    .unwrap();
    let mut out = vec![status];
    owners.save(root, &mut out).unwrap();
    fs::write(after, out).unwrap();
    sys::exit_now(0)
}

fn plan_for(root: &Path, words: &[&str]) -> Plan {
    Plan {
        namespaces: Namespaces {
            pid: true,
            ..Namespaces::default()
        },
        ids: IdMap::Root {
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        },
        share_users: false,
        ownership: Ownership::Emulated,
        hostname: None,
        root: Root::Directory(root.to_owned()),
        layers: Vec::new(),
        writable_root: true,
        mounts: vec![Mount {
            source: Source::Proc,
            target: "/proc".into(),
            writable: true,
            missing: Missing::Fail,
            why: Why::Default,
        }],
        environment: Environment::default(),
        process: Process {
            verb: Verb::Exec,
            args: words.iter().map(Into::into).collect(),
            app: None,
            shell: None,
            cwd: "/".into(),
            cwd_required: true,
            home: "/".into(),
            umask: 0o022,
            init: Init::Appinit,
            close_descriptors: true,
            rights: capsid::plan::Rights::default(),
            time_limit: None,
        },
    }
}

/// Debian's own packages, with their users, in a tree that mmdebstrap made.
#[test]
fn debian_packages_install_with_their_users() {
    let t = Env::new();
    let root = t.path("debian");
    let archive = t.path("debian.tar");
    fs::create_dir(&root).unwrap();
    let made = output(
        Command::new("mmdebstrap")
            .env("TMPDIR", "/var/tmp") // its other ids must get there
            .args(["--quiet", "--mode=unshare", "--variant=apt"])
            .args(["bookworm"])
            .arg(&archive)
            .arg("deb http://deb.debian.org/debian bookworm main"),
    );
    made.ok();
    output(
        Command::new("tar")
            .args(["-xpf"])
            .arg(&archive)
            .arg("-C")
            .arg(&root)
            .arg("--exclude=./dev/*"),
    )
    .ok();
    let out = exec(
        &t,
        &root,
        "export DEBIAN_FRONTEND=noninteractive
         apt-get -qq -o Acquire::Retries=10 update; apt-get -qq -o Acquire::Retries=10 install -y --no-install-recommends redis-server openssh-client libcap2-bin >/log 2>&1
         stat -c '%n %U:%G %a' /var/lib/redis /etc/redis/redis.conf /var/log/redis /usr/bin/ssh-agent
         su redis -s /bin/sh -c 'id -un; touch /var/lib/redis/x; stat -c %U /var/lib/redis/x'
         setcap cap_net_raw+ep /usr/bin/ssh; getcap /usr/bin/ssh
         useradd -m eve; stat -c '%n %U:%G' /home/eve /home/eve/.profile; install -o daemon /bin/true /t; stat -c %U /t
         cp -a /var/lib/redis /copy; stat -c '%U %a' /copy /copy/x; dpkg --audit",
    );
    assert_eq!(
        out.ok(),
        "/var/lib/redis redis:redis 750\n/etc/redis/redis.conf redis:redis 640\n/var/log/redis redis:adm 2750\n\
         /usr/bin/ssh-agent root:_ssh 2755\nredis\nredis\n/usr/bin/ssh cap_net_raw=ep\n\
         /home/eve eve:eve\n/home/eve/.profile eve:eve\ndaemon\nredis 750\nredis 644"
    );
}
