//! Root's part of a Slurm job, `capsid job begin|end|sweep` and the scripts of `slurm/`, without Slurm: in a user namespace
//! whose root is the test's user, with a `/run` of its own. Users 1, 2 and 3 there are jobs' users.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Env, Output, output, write};

/// What every script begins with. Nothing may take long here: what hangs ends with status 124.
const BEGIN: &str = r#"set -u
mount -t tmpfs -o mode=755 tmpfs /run || exit 1
export SLURM_CONF=/run/slurm.conf LC_ALL=C
echo 'ProctrackType=proctrack/linuxproc' >$SLURM_CONF
root() { timeout -k 1 30 "$CAPSID" job "$@"; local s=$?; [ $s = 0 ] || echo "job $*: status $s"; }
begin() { root begin --job $1 --uid ${2:-1} --gid ${2:-1}; }
end() { root end --job $1; }
as() { local u=$1; shift; timeout -k 1 30 setpriv --reuid $u --regid $u --clear-groups env -i PATH="$PATH" LC_ALL=C "$@"; }
hang() { python3 /proc/self/fd/9 "$@" 9<"$HANG"; }
old() { sed -i 's/"since_boot_s":[0-9]*/"since_boot_s":0/; s/"since_s":[0-9]*/"since_s":0/' /run/capsid/job-$1.root; }
gone() { for i in $(seq 300); do ls -A /run/capsid | grep -q "^job-$1\\(\\.root\\|\\.new\\|\$\)" || return; sleep 0.1; done; echo "job $1 stays"; }
left() { ls -A /run/capsid | grep -v '^sweep.lock$'; grep /run/capsid/ /proc/self/mountinfo; cat /run/capsid/trouble 2>/dev/null; true; }
"#;

/// Mounts file systems that never answer: their server holds them and reads nothing. `own:` in front: for user 1 alone.
const HANG: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for word in sys.argv[1:]:
    path = os.fsencode(word)
    fd = os.open('/dev/fuse', os.O_RDWR)
    options = b'user_id=0,group_id=0,allow_other'
    if path.startswith(b'own:'):
        path, options = path[4:], b'user_id=1,group_id=1'
    if libc.mount(b'hang', path, b'fuse', 6, b'fd=%d,rootmode=40000,' % fd + options):
        sys.exit('cannot mount: ' + os.strerror(ctypes.get_errno()))
if os.fork() == 0:
    for n in range(3): os.dup2(os.open('/dev/null', os.O_RDWR), n)
    for n in map(int, os.listdir('/proc/self/fd')):
        try: os.set_inheritable(n, True)
        except OSError: pass
    os.execvp('sleep', ['sleep', '1000'])
"#;

/// Runs a script as root of such a namespace.
fn node(env: &Env, text: &str) -> Output {
    let (script, hang) = (env.path("script"), env.path("hang.py"));
    write(&script, &format!("{BEGIN}{text}\n"));
    write(&hang, HANG);
    let mut unshare = env.command_as(Path::new("unshare"), ["--user", "--map-root-user"]);
    unshare
        .args(["--map-auto", "--mount", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "bash"])
        .arg(script)
        .env("CAPSID", env!("CARGO_BIN_EXE_capsid"))
        .env("SLURM_DIR", concat!(env!("CARGO_MANIFEST_DIR"), "/slurm"))
        .env("HANG", hang);
    output(&mut unshare)
}

/// What a script says, which has nothing to complain about.
#[track_caller]
fn says(env: &Env, text: &str, expected: &str) {
    let out = node(env, text);
    assert!(
        out.status == 0 && out.stdout.trim_end() == expected && out.stderr.is_empty(),
        "of {text:?} {expected:?} is expected: {out}"
    );
}

#[test]
fn mounts_of_a_user_delay_nobody() {
    let env = Env::new();
    // Where user 1 mounts what never answers. `d` is the directory of job 7.
    for mounts in [
        "hang $d",
        "hang $d $d $d",
        "hang own:$d",
        "hang $d/capsid",
        "hang $d/capsid/$'\\xff' $d/$'m\\xc3'",
        "hang $d/'a b' $d/'a b'; mount -t tmpfs x $d/' '; mkdir $d/' '/below; hang $d/' '/below; hang $d/capsid",
        "hang $d/$'a\\nb' $d/'\\040'",
        "hang $d/deep/a/b/c own:$d/deep/a",
        "hang $d/deep/a/b/c $d/deep/a; hang $d",
        "ln -s /outside $d/link; hang $d/deep/a",
        "hang /outside/$'\\xff' /outside/m",
        "hang $d/capsid; hang $d/$'m\\xc3'; mount --bind /outside $d/'a b'; mount --rbind / $d/deep",
    ] {
        let text = format!(
            "mkdir -p /run/outside; ln -s /run/outside /run/link; mount --bind /run/link/ /mnt; outside=/mnt
mkdir /mnt/m /mnt/$'\\xff'; touch /mnt/alive
begin 7; d=/run/capsid/job-7
as 1 mkdir -p $d/capsid/$'\\xff' $d/$'m\\xc3' $d/'a b' $d/' ' $d/$'a\\nb' $d/'\\040' $d/deep/a/b/c
{}
as 2 \"$CAPSID\" instance list; echo list $?
begin 8 2; as 2 ls /run/capsid/job-8; end 8
root sweep; end 7
ls /mnt | head -1; left",
            mounts.replace("/outside", "/mnt")
        );
        let list = "INSTANCE NAME    PID    IP    IMAGE\nlist 0\ncapsid\nalive";
        says(&env, &text, list);
    }
}

#[test]
fn whatever_a_user_leaves_in_the_directory_goes() {
    let env = Env::new();
    for content in [
        "mkdir $'\\xff' $'\\xff'/$'\\xfe' 'a b'; touch $'\\xff'/$'\\n'; mkfifo f; ln -s / root; ln -s /etc/passwd passwd",
        "mkdir -p $(printf 'd/%.0s' $(seq 40)); touch $(printf 'd/%.0s' $(seq 30))x",
        "for i in $(seq 200); do mkdir -p $(printf 'deep/%.0s' $(seq 20)) && cd $(printf 'deep/%.0s' $(seq 20)); done",
        "seq -f file-%.0f 30000 | xargs touch",
        "mkdir -p a/b/c; touch a/b/c/x; chmod 000 a/b/c a/b; chmod 555 a; chmod 000 .",
        "rm -r capsid; touch capsid",
        "rm -r capsid; ln -s /run capsid",
        "mv capsid/supervisor-7 x; rm -f capsid/services-7; mkdir -p capsid/supervisor-7 capsid/x",
        "mkdir -p \"$(printf '%0255d' 1)/$(printf '%0255d' 2)\"",
    ] {
        let text = format!(
            "begin 7; cp \"$CAPSID\" /run/c; d=/run/capsid/job-7
cat >/run/content <<'EOF'\ncd /run/capsid/job-7; {content}\nEOF
as 1 bash /run/content; end 7; left; ls /run"
        );
        says(&env, &text, "c\ncapsid\ncontent\nslurm.conf");
    }
}

#[test]
fn jobs_that_are_over_are_swept_behind_others() {
    let env = Env::new();
    for (what, text) in [
        (
            "an Epilog did not run",
            "begin 7; old 7; begin 8 2; gone 7; end 8",
        ),
        (
            "one hangs",
            "begin 7; old 7; hang /run/capsid/job-7; begin 8 2; gone 7; end 8",
        ),
        (
            "many",
            "for n in $(seq 20 40); do begin $n; old $n; done; begin 8 2; for n in $(seq 20 40); do gone $n; done; end 8",
        ),
        (
            "a draft",
            "begin 8 2; echo '{' >/run/capsid/job-7.new; end 8; gone 7",
        ),
        ("by hand", "begin 7; old 7; root sweep"),
        (
            "no record",
            "mkdir -p -m 755 /run/capsid/job-7; touch /run/capsid/job-7/x; root sweep",
        ),
        (
            "of another boot",
            "begin 7; p=$(cat /run/capsid/job-7.root); sed -i 's/\"boot\":\"[0-9a-f]*/\"boot\":\"0/' /run/capsid/job-7.root; root sweep",
        ),
    ] {
        let out = node(&env, &format!("{text}; left"));
        assert!(
            out.ok().is_empty() && out.stderr.is_empty(),
            "{what}: {out}"
        );
    }
    // A young one stays, whatever the wall clock said when it began.
    for since in ["0", "99999999999"] {
        let text = format!(
            "begin 7; sed -i 's/\"since_s\":[0-9]*/\"since_s\":{since}/' /run/capsid/job-7.root
begin 8 2; root sweep; ls -d /run/capsid/job-?; end 7; end 8; left"
        );
        says(&env, &text, "/run/capsid/job-7\n/run/capsid/job-8");
    }
}

#[test]
fn users_find_their_own_jobs_by_roots_word() {
    let env = Env::new();
    // No directory of another user's job is looked at: not even by a name.
    let text = "begin 7; begin 8 2; begin 9 1
mkdir -m 777 /run/t; as 1 strace -f -o /run/t/t \"$CAPSID\" instance list --all >/dev/null; echo $?
grep -c job-7/ /run/t/t; grep -c job-9/ /run/t/t; grep -c 'job-8\\(/\\|\"\\)' /run/t/t
end 7; end 8; end 9; left";
    let out = node(&env, text);
    let lines: Vec<&str> = out.ok().lines().collect();
    assert!(
        lines[0] == "0" && lines[1] != "0" && lines[2] != "0" && lines[3..] == ["0"],
        "{out}"
    );
}

#[test]
fn job_that_begins_again_finds_nothing_of_its_former_run() {
    let env = Env::new();
    let text = "begin 7; as 1 touch /run/capsid/job-7/x; hang /run/capsid/job-7; begin 7; ls -A /run/capsid/job-7; end 7; end 7; left";
    says(&env, text, "capsid");
}

#[test]
fn a_full_file_system_leaves_no_drafts() {
    let env = Env::new();
    let text = "mkdir -m 755 /run/capsid; mount -t tmpfs -o mode=755,size=4k tmpfs /run/capsid
head -c 4096 /dev/zero >/run/capsid/full; begin 7; rm /run/capsid/full; ls -A /run/capsid | grep -v -e trouble -e lock";
    let out = node(&env, text);
    assert!(
        out.stdout == "job begin --job 7 --uid 1 --gid 1: status 255\n",
        "{out}"
    );
    assert!(
        out.stderr.contains("cannot write /run/capsid/job-7.root"),
        "{out}"
    );
}

#[test]
fn prolog_says_why_there_are_no_services() {
    let env = Env::new();
    let prolog = |capsid: &str, uid: u32| {
        format!(
            "sed \"s|^CAPSID=.*|CAPSID={capsid}|\" $SLURM_DIR/prolog.sh >/run/prolog.sh
echo '#!/bin/sh\nexit 3' >/run/three; chmod 755 /run/three; touch /run/plain; mkdir -p /run/bin
SLURM_JOB_ID=7 SLURM_JOB_UID={uid} SLURM_JOB_GID={uid} sh /run/prolog.sh; echo status $?
cat /run/capsid/trouble 2>/dev/null | cut -d ' ' -f 2-"
        )
    };
    for (capsid, uid, expected) in [
        (
            "/run/none",
            1,
            "status 0\njob 7: the Prolog cannot execute /run/none: there are no services",
        ),
        (
            "/run/plain",
            1,
            "status 0\njob 7: the Prolog cannot execute /run/plain: there are no services",
        ),
        (
            "/run/three",
            1,
            "status 0\njob 7: the Prolog's capsid job begin failed: there are no services",
        ),
        ("/run/none", 0, "status 0"),
        ("$CAPSID", 1, "status 0"),
        ("$CAPSID", 0, "status 0"),
    ] {
        says(&env, &prolog(capsid, uid), expected);
    }
    // A job of root's begins without a word.
    says(&env, "begin 7 0; end 7; ls /run", "slurm.conf");
    // A setpriv that does not work.
    let text = "echo '#!/bin/sh\necho broken >&2; exit 1' >/run/setpriv; chmod 755 /run/setpriv; mount --bind /run/setpriv /usr/bin/setpriv
begin 7; for i in $(seq 300); do [ -e /run/capsid/trouble ] && break; sleep 0.1; done; cut -d ' ' -f 2- /run/capsid/trouble";
    let out = node(&env, text);
    assert!(
        out.ok().starts_with("job 7: it has no supervisor: setpriv")
            && out.stdout.contains(": broken"),
        "{out}"
    );
}

#[test]
fn only_a_requeued_job_starts_its_own_supervisors() {
    let env = Env::new();
    for (variables, user, expected) in [
        ("", 1, "job env --task-prolog"),
        ("SLURM_RESTART_COUNT=0", 1, "job env --task-prolog"),
        (
            "SLURM_RESTART_COUNT=1",
            1,
            "job services\njob env --task-prolog",
        ),
        ("SLURM_RESTART_COUNT=2 SLURM_STEP_ID=0", 1, ""),
        ("SLURM_RESTART_COUNT=1", 0, "job env --task-prolog"),
        (
            "SLURM_RESTART_COUNT=1 SLURM_JOB_ID=8",
            1,
            "job env --task-prolog",
        ),
    ] {
        let text = format!(
            "echo '#!/bin/sh\necho \"$@\" >>/run/calls/x' >/run/capsid-stub; chmod 755 /run/capsid-stub; mkdir -m 777 /run/calls
sed 's|^CAPSID=.*|CAPSID=/run/capsid-stub|' $SLURM_DIR/taskprolog.sh >/run/taskprolog.sh
mkdir -p -m 755 /run/capsid/job-8/capsid
as {user} SLURM_JOB_ID=7 {variables} sh /run/taskprolog.sh; cat /run/calls/x 2>/dev/null || true"
        );
        says(&env, &text, expected);
    }
}

#[test]
fn configuration_is_read_as_slurm_reads_it() {
    let env = Env::new();
    // With cgroups there is no supervisor without an extern step; whoever reads that they are not used has one.
    for (conf, supervisor) in [
        ("ProctrackType=proctrack/pgid", true),
        ("Include more.conf", true),
        ("# caf\\xe9\nX=x ProctrackType = proctrack/linuxproc", true),
        ("include /run/%%c.conf", true),
    ] {
        let text = format!(
            "printf 'ClusterName=more\\n{conf}\\n' >$SLURM_CONF; echo ProctrackType=proctrack/pgid >/run/more.conf
begin 7; for i in $(seq 300); do [ -e /run/capsid/job-7/capsid/services-7 ] && break; sleep 0.1; done
[ -e /run/capsid/job-7/capsid/services-7 ] && echo true || echo false; end 7; left"
        );
        says(&env, &text, &supervisor.to_string());
    }
}
