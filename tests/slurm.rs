//! Services of Slurm jobs, with real Slurm: `tests/slurm-cluster` starts it, as root, before (`tests/run` does).
//!
//! Four clusters of two nodes: `cgroup`, `linuxproc` and `pgid` (how Slurm follows processes) with the scripts of `slurm/`, and
//! `bare` without. A cluster that is not there makes the tests fail.
#![allow(clippy::unwrap_used)]

#[path = "common/slurm.rs"]
mod cluster;
mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cluster::{ORDERLY, Slurm};
use common::{Env, free_port, output, script, write};

#[test]
fn instance_of_a_step_lives_as_long_as_its_job() {
    Slurm::new("cgroup").keeps_instances_for_later_steps(Some("step_batch"));
}

#[test]
fn instance_of_a_step_lives_as_long_as_its_job_without_cgroups() {
    Slurm::new("linuxproc").keeps_instances_for_later_steps(None);
}

#[test]
fn instance_of_a_step_lives_as_long_as_its_job_with_process_groups() {
    Slurm::new("pgid").keeps_instances_for_later_steps(None);
}

#[test]
fn cancelled_jobs_leave_nothing_and_their_services_stop_in_order() {
    for cluster in ["cgroup", "linuxproc", "pgid"] {
        let slurm = Slurm::new(cluster);
        let job = slurm.submit(
            &["-N2"],
            "srun -N2 -n2 $CAPSID instance start $IMAGE db; echo up; sleep 1000",
        );
        slurm.until(&job, "the instance", || slurm.said(&job).contains("up"));
        slurm.run(&["scancel", &job]).ok();
        slurm.ended(&job);
        let (first, second) = (
            slurm.log_on("n1", &job, "db"),
            slurm.log_on("n2", &job, "db"),
        );
        assert!(
            first.starts_with("started") && first.ends_with(ORDERLY),
            "{cluster}: {first}"
        );
        // Slurm kills the extern step, where they are on other nodes, at once; without cgroups the Epilog finds them.
        assert!(
            second.starts_with("started") && (cluster == "cgroup" || second.ends_with(ORDERLY)),
            "{cluster}: {second}"
        );
        slurm.assert_nodes_are_well();
    }
}

#[test]
fn jobs_at_their_time_limit_leave_nothing_and_their_services_stop_in_order() {
    let clusters = ["cgroup", "linuxproc", "pgid"].map(Slurm::new);
    let jobs = clusters.each_ref().map(|slurm| {
        slurm.submit(
            &["-t", "1"],
            "srun -n1 $CAPSID instance start $IMAGE db; echo up; sleep 1000",
        )
    });
    for (slurm, job) in clusters.iter().zip(&jobs) {
        let said = slurm.ended(job);
        assert!(
            said.contains("up") && slurm.state(job) == "TIMEOUT",
            "{}: said {said:?}: {}",
            slurm.cluster,
            slurm.run(&["scontrol", "show", "job", job])
        );
        let log = slurm.log(job, "db");
        assert!(log.ends_with(ORDERLY), "{}: {log}", slurm.cluster);
    }
}

#[test]
fn services_of_all_nodes_stop_in_order_and_are_accounted_for() {
    let slurm = Slurm::new("cgroup");
    let text = "srun -N2 -n2 $CAPSID instance start $IMAGE db; $CAPSID instance start $IMAGE early
$CAPSID instance stats --no-stream --json early | grep limit_of; $CAPSID instance stop early; true";
    let job = slurm.submit(&["-N2", "--comment=capsid:report"], text);
    let quiet = slurm.submit(&["-N1"], text.replace("2", "1").as_str());
    slurm.ended(&job);
    for node in ["n1", "n2"] {
        let log = slurm.log_on(node, &job, "db");
        assert!(log.ends_with(ORDERLY), "{node}: {log}");
    }
    let said = slurm.said(&job);
    let lines = said
        .lines()
        .filter(|l| l.starts_with("CAPSID: db on n") && l.contains(": exit 0, 00:00:"));
    assert_eq!(lines.count(), 2, "one for each node: {said}");
    assert!(
        said.contains("CAPSID: early on n1: exit 0, 00:00:"),
        "{said}"
    );
    let peaks = said.matches(", peak ").count();
    assert!(peaks == 3 && said.contains(" MiB\n"), "{said}");
    // Nobody asked for it there.
    let said = slurm.ended(&quiet);
    assert!(!said.contains("CAPSID: "), "{said}");
}

#[test]
fn requeued_job_begins_anew() {
    // Slurm 22.05 runs no Prolog in a second run that begins at once; later ones, and this one after a while, do.
    let slurm = Slurm::new("cgroup");
    let job = slurm.submit(
        &[
            "--requeue",
            "-n1",
            "--comment=capsid:services=../services.toml",
            "--service=../service.sif:option",
        ],
        "srun -n1 $CAPSID instance start $IMAGE db || exit 1
srun -n1 $CAPSID exec instance://db echo run ${SLURM_RESTART_COUNT:-0}
srun -n1 $CAPSID exec instance://option echo option ${SLURM_RESTART_COUNT:-0}
srun -n1 $CAPSID exec instance://declared echo declared ${SLURM_RESTART_COUNT:-0}; [ -n \"${SLURM_RESTART_COUNT:-}\" ] || sleep 1000",
    );
    write(
        &slurm.env.path("services.toml"),
        "[[service]]\nname = \"declared\"\nimage = \"service.sif\"\n",
    );
    let said = |words: &str| slurm.said(&job).contains(words);
    slurm.until(&job, "the first run", || said("declared 0"));
    slurm.run(&["scontrol", "requeue", &job]).ok();
    slurm.until(&job, "the second run", || {
        // It waits two minutes by itself.
        slurm.run(&[
            "scontrol",
            "update",
            &format!("JobId={job}"),
            "StartTime=now",
        ]);
        said("declared 1")
    });
    let said = slurm.ended(&job);
    assert!(
        said.contains("run 1\n") && said.contains("option 1\n") && !said.contains("WARNING"),
        "{said}"
    );
    assert!(slurm.log(&job, "db").contains("stopping\nstopped\nstarted"));
    slurm.assert_nodes_are_well();
}

#[test]
fn two_jobs_of_a_user_do_not_see_each_other() {
    let slurm = Slurm::new("cgroup");
    let text = "srun -n1 $CAPSID instance start --env WHO=$SLURM_JOB_ID $IMAGE db || exit 1
touch ready.$SLURM_JOB_ID; for i in $(seq 200); do [ $(ls ready.* | wc -l) = 2 ] && break; sleep 0.1; done
srun -n1 $CAPSID exec instance://db sh -c 'tr \"\\0\" \"\\n\" </proc/2/environ | grep ^WHO='
$CAPSID instance list | tail -n +2 | wc -l
[ $1 = first ] && $CAPSID instance stop --all
touch done.$SLURM_JOB_ID; for i in $(seq 200); do [ $(ls done.* | wc -l) = 2 ] && break; sleep 0.1; done
$CAPSID instance list | tail -n +2 | wc -l";
    let first = slurm.submit(&["-w", "n1", "-n1"], &text.replace("$1", "first"));
    let second = slurm.submit(&["-w", "n1", "-n1"], &text.replace("$1", "second"));
    let (first_said, second_said) = (slurm.ended(&first), slurm.ended(&second));
    assert!(
        first_said.contains(&format!("WHO={first}\n1\n")) && first_said.ends_with("\n0\n"),
        "{first_said}"
    );
    assert!(
        second_said.contains(&format!("WHO={second}\n1\n")) && second_said.ends_with("\n1\n"),
        "{second_said}"
    );
}

#[test]
fn declared_services_are_there_for_every_step() {
    for cluster in ["cgroup", "linuxproc"] {
        let slurm = Slurm::new(cluster);
        let port = free_port();
        let image = Path::new(&slurm.image)
            .file_name()
            .unwrap()
            .to_str()
            .unwrap();
        write(
            &slurm.env.path("services.toml"),
            &format!(
                "[[service]]\nname = \"late\"\nimage = \"{image}\"\nnodes = \"all\"\nafter = [\"db\"]\n
[[service]]\nname = \"db\"\nimage = \"{image}\"\nargs = [\"x y\"]\noptions = [\"--env\", \"PORT={port}\"]
ready = {{ port = {port}, timeout = \"30s\" }}\n\n[[service]]\nname = \"other\"\nimage = \"{image}\"\nnodes = 1\n"
            ),
        );
        let comment = "--comment=some words,capsid:services=../services.toml";
        let job = slurm.submit(
            &["-N2", comment],
            "echo batch $CAPSID_SERVICE_DB_HOST:$CAPSID_SERVICE_DB_PORT
srun -N1 -n1 $CAPSID exec instance://db wget -qO- http://127.0.0.1:$CAPSID_SERVICE_DB_PORT/hello.txt
srun -N2 -n2 bash -c 'echo task $CAPSID_SERVICE_DB_HOST:$CAPSID_SERVICE_DB_PORT'
srun -N2 -n2 $CAPSID exec instance://late sh -c 'echo late $(hostname)'
srun -N1 -n1 -w n2 $CAPSID exec instance://other sh -c 'echo other $(hostname)'
srun -N1 -n1 -w n2 $CAPSID exec instance://db true
$CAPSID job status",
        );
        let said = slurm.ended(&job);
        for words in [
            &format!("batch n1:{port}\nhello\n"),
            "late n1\n",
            "late n2\n",
            "other n2\n",
            "FATAL:   service db of this job runs on node n1, not here: use srun -w n1, or reach it at $CAPSID_SERVICE_DB_HOST",
            "service db: ready\n",
            "service other: runs on node n2\n",
        ] {
            assert!(said.contains(words), "{words:?}: {said}");
        }
        assert_eq!(
            said.matches(&format!("task n1:{port}\n")).count(),
            2,
            "{said}"
        );
        let log = slurm.log(&job, "db");
        assert!(
            log.contains("started x y\n") && log.ends_with("stopping\nstopped\n"),
            "an orderly end: {log}"
        );
        slurm.assert_nodes_are_well();
    }
}

#[test]
fn services_are_started_by_the_batch_script_too() {
    let slurm = Slurm::new("cgroup");
    write(
        &slurm.env.path("services.toml"),
        &format!(
            "[[service]]\nname = \"db\"\nimage = \"service.sif\"\noptions = [\"--env\", \"PORT={0}\"]\nready = {{ port = {0} }}\n
[[service]]\nname = \"all\"\nimage = \"service.sif\"\nnodes = \"all\"\nafter = [\"db\"]\n",
            free_port()
        ),
    );
    write(&slurm.env.path("wrong.toml"), "[[service]]\n");
    let job = slurm.submit(
        &["-N2"],
        "$CAPSID job start -f ../wrong.toml; echo wrong $?
$CAPSID job start -f ../services.toml || exit 1
eval \"$($CAPSID job env)\"; echo db is on $CAPSID_SERVICE_DB_HOST
srun -N1 -n1 -w n1 $CAPSID exec instance://db echo db answers
srun -N2 -n2 $CAPSID exec instance://all echo all answers
$CAPSID job start --here -f ../services.toml",
    );
    let said = slurm.ended(&job);
    for words in [
        "wrong.toml: line 1: missing field",
        "wrong 255\n",
        "db is on n1\n",
        "db answers\n",
        "has a service db already",
    ] {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    assert_eq!(said.matches("all answers\n").count(), 2, "{said}");
}

/// PostgreSQL of Debian's packages, in a SIF, with its data below `/var/lib/postgresql`.
fn postgres(env: &Env) -> String {
    let tree = env.tree("postgres");
    let bin = ["postgres", "initdb", "psql", "pg_controldata"]
        .map(|p| format!("/usr/lib/postgresql/15/bin/{p}"));
    common::add_programs(&tree, &bin.each_ref().map(String::as_str));
    for directory in [
        "/usr/lib/postgresql/15/lib",
        "/usr/share/postgresql/15",
        "/usr/share/zoneinfo",
    ] {
        let place = tree.join(&directory[1..]);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        output(Command::new("cp").args(["-rLT", directory]).arg(&place)).ok();
    }
    let _ = fs::remove_dir_all(tree.join("usr/lib/postgresql/15/lib/bitcode"));
    fs::create_dir_all(tree.join("var/lib/postgresql")).unwrap();
    script(
        &tree.join(".singularity.d/startscript"),
        "#!/bin/sh
D=/var/lib/postgresql/data; B=/usr/lib/postgresql/15/bin
[ -e $D/PG_VERSION ] || $B/initdb -D $D -U postgres --no-locale -E UTF8 -A trust -N >/dev/null || exit 1
exec $B/postgres -D $D -h 0.0.0.0 -p $PORT -c fsync=off -c unix_socket_directories=''
",
    );
    env.sif(&tree, "postgres.sif").display().to_string()
}

#[test]
fn database_of_a_job_keeps_its_data_and_is_shut_down() {
    let slurm = Slurm::new("cgroup");
    postgres(&slurm.env);
    let data = slurm.env.path("data");
    fs::create_dir(&data).unwrap();
    let port = free_port();
    write(
        &slurm.env.path("services.toml"),
        &format!(
            "[[service]]\nname = \"db\"\nimage = \"postgres.sif\"\nready = {{ port = {port}, timeout = \"180s\" }}
options = [\"--bind\", \"{}:/var/lib/postgresql\", \"--env\", \"PORT={port}\"]\n",
            data.display()
        ),
    );
    let job = slurm.submit(
        &["-N2", "--comment=capsid:services=../services.toml"],
        "psql='/usr/lib/postgresql/15/bin/psql -U postgres -X -A -t -h'
srun -N1 -n1 $CAPSID exec instance://db $psql 127.0.0.1 -p $CAPSID_SERVICE_DB_PORT -c 'create table t(i int)'
srun -N1 -n1 $CAPSID exec instance://db $psql 127.0.0.1 -p $CAPSID_SERVICE_DB_PORT -c 'insert into t values (41), (1)'
srun -N2 -n2 $CAPSID exec ../postgres.sif $psql $CAPSID_SERVICE_DB_HOST -p $CAPSID_SERVICE_DB_PORT -c 'select sum(i) from t'",
    );
    let said = slurm.ended(&job);
    let is_shut_down = || {
        let tool = "/usr/lib/postgresql/15/bin/pg_controldata";
        let control = output(Command::new(tool).arg(data.join("data")));
        let mut lines = control.ok().lines();
        let state = lines.find(|l| l.starts_with("Database cluster state"));
        assert!(state.unwrap().ends_with(" shut down"), "{state:?}");
        assert!(!data.join("data/postmaster.pid").exists());
    };
    assert!(said.contains("CREATE TABLE\nINSERT 0 2\n"), "{said}");
    assert_eq!(
        said.matches("42\n").count(),
        2,
        "both nodes reach it: {said}"
    );
    is_shut_down();
    let job = slurm.submit(
        &["-N1", "--comment=capsid:services=../services.toml"],
        "srun -n1 $CAPSID exec instance://db true && echo up; sleep 1000",
    );
    slurm.until(&job, "the database", || slurm.said(&job).contains("up"));
    slurm.run(&["scancel", &job]).ok();
    slurm.ended(&job);
    is_shut_down();
}

#[test]
fn wrong_declarations_are_named_where_they_are_used() {
    let slurm = Slurm::new("cgroup");
    let work = slurm.env.work();
    write(
        &work.join("wrong.toml"),
        "[[service]]\nname = \"db\"\nimage = \"x.sif\"\nmode = \"fast\"\n",
    );
    write(
        &work.join("gone.toml"),
        "[[service]]\nname = \"db\"\nimage = \"gone.sif\"\n",
    );
    let text = "$CAPSID exec instance://db true; srun -n1 $CAPSID instance start $IMAGE mine && $CAPSID exec instance://mine echo fine";
    for (file, words) in [
        ("wrong.toml", "wrong.toml: line 4: mode \"fast\": use"),
        ("gone.toml", "service db of this job could not be started: "),
        ("none.toml", "cannot read the services in "),
    ] {
        let job = slurm.submit(&[&format!("--comment=capsid:services={file}")], text);
        let said = slurm.ended(&job);
        assert!(
            said.contains(words) && said.contains("FATAL:   ") && said.contains("fine\n"),
            "{file}: {said}"
        );
    }
    slurm.assert_nodes_are_well();
}

#[test]
fn hostile_words_are_only_words() {
    let slurm = Slurm::new("cgroup");
    let canary = slurm.env.path("canary");
    write(&canary, "alive");
    let evil = format!(
        "x'\"; touch {0}.evil; $(touch {0}.evil) `rm {0}` \n-rf --uid 0",
        canary.display()
    );
    let directory = slurm.env.work().join("$(touch evil); -rf");
    fs::create_dir(&directory).unwrap();
    let comment = format!("--comment=capsid:services=/../../..//dev/zero {evil}");
    let text = "srun -n1 $CAPSID instance start $IMAGE db && srun -n1 $CAPSID exec instance://db echo fine";
    let job = slurm.submit(
        &["-J", &evil, &comment, "-D", directory.to_str().unwrap()],
        text,
    );
    assert!(
        slurm.ended(&job).ends_with("fine\n"),
        "{}",
        slurm.said(&job)
    );
    // Links and strange names in the one directory that the user can write and root removes.
    let text = format!(
        "d=/run/capsid/job-$SLURM_JOB_ID; ln -s {0} $d/link; ln -s / $d/root; ln -s {1} $d/capsid/dir; mkdir -p $d/a/b/c/..d
touch \"$d/new
line\" \"$d/a/-rf\" $'$d/\\xff'; mkfifo $d/fifo; chmod 000 $d/a/b; mkdir -m 500 $d/locked; touch $d/a/x; chmod 555 $d/a
mv $d/capsid/supervisor-$SLURM_JOB_ID $d/moved; ln -s /etc/passwd $d/capsid/services-$SLURM_JOB_ID; echo fine",
        canary.display(),
        slurm.env.path("tree").display()
    );
    let job = slurm.submit(&["-n1"], &text);
    assert!(
        slurm.ended(&job).ends_with("fine\n"),
        "{}",
        slurm.said(&job)
    );
    // A file that never ends, and one that never begins, hold nobody up.
    let fifo = slurm.env.work().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let job = slurm.submit(
        &[&format!("--comment=capsid:services={}", fifo.display())],
        "echo fine",
    );
    slurm.until(&job, "the job", || {
        slurm.said(&job).contains("fine") || slurm.state(&job) == "RUNNING"
    });
    slurm.run(&["scancel", &job]).ok();
    slurm.ended(&job);
    assert!(
        slurm.took("prolog", &job).unwrap() < 2000.0
            && slurm.took("epilog", &job).unwrap() < 9000.0
    );
    assert_eq!(fs::read_to_string(&canary).unwrap(), "alive");
    assert!(!slurm.env.path("canary.evil").exists() && !directory.join("evil").exists());
    assert!(slurm.env.path("tree/bin/busybox").exists() && Path::new("/etc/passwd").exists());
    slurm.assert_nodes_are_well();
}

#[test]
fn job_that_ends_while_slurmd_is_down_leaves_nothing() {
    let slurm = Slurm::alone("linuxproc");
    let job = slurm.submit(
        &["-w", "n2", "-n1"],
        "srun -n1 $CAPSID instance start $IMAGE db; echo up; while [ ! -e go ]; do sleep 0.1; done",
    );
    slurm.until(&job, "the instance", || slurm.said(&job).contains("up"));
    slurm.kill_node("n2");
    write(&slurm.env.work().join("go"), "");
    std::thread::sleep(Duration::from_secs(1));
    assert!(
        slurm.left(&job).is_some(),
        "without slurmd there is no Epilog"
    );
    slurm.start_node("n2");
    slurm.ended(&job);
}

#[test]
fn hanging_file_systems_hold_nobody_up() {
    let slurm = Slurm::new("cgroup");
    let tree = slurm.env.path("hangs");
    fs::create_dir(&tree).unwrap();
    fs::copy(&slurm.image, tree.join("service.sif")).unwrap();
    let declared = "[[service]]\nname = \"db\"\nimage = \"service.sif\"\n";
    write(&tree.join("services.toml"), declared);
    let image = slurm.env.squashfs(&tree, "hangs.squashfs", &[]);
    let mount = slurm.env.path("mount");
    fs::create_dir(&mount).unwrap();
    // The mount is made on the node: as a home directory whose server does not answer any more.
    let holder = slurm.submit(
        &["-w", "n1"],
        &format!(
            "squashfuse_ll -f {} {1} & wait_for() {{ until [ -e $1 ]; do sleep 0.1; done; }}
wait_for {1}/services.toml; touch mounted; wait_for stop; kill -STOP %1; touch stopped; wait_for over; kill -CONT %1; fusermount3 -u {1}; wait",
            image.display(),
            mount.display()
        ),
    );
    let there = |name: &str| slurm.env.work().join(name).exists();
    slurm.until(&holder, "the mount", || there("mounted"));
    let comment = format!(
        "--comment=capsid:services={}/services.toml",
        mount.display()
    );
    let before = slurm.submit(
        &["-w", "n1", &comment],
        "srun -n1 $CAPSID exec instance://db echo here; sleep 1000",
    );
    slurm.until(&before, "the service", || {
        slurm.said(&before).contains("here")
    });
    write(&slurm.env.work().join("stop"), "");
    slurm.until(&holder, "the hanging", || there("stopped"));
    let after = slurm.submit(&["-w", "n1", &comment], "sleep 1000");
    slurm.until(&after, "the job", || slurm.took("prolog", &after).is_some());
    slurm.run(&["scancel", &before, &after]).ok();
    for job in [&before, &after] {
        slurm.ended(job);
        let (prolog, epilog) = (slurm.took("prolog", job), slurm.took("epilog", job));
        assert!(
            prolog.unwrap() < 4000.0 && epilog.unwrap() < 15_000.0,
            "{prolog:?} {epilog:?}"
        );
    }
    slurm.assert_nodes_are_well();
    write(&slurm.env.work().join("over"), "");
    slurm.ended(&holder);
}

#[test]
fn instances_outlive_a_killed_slurmd() {
    let slurm = Slurm::alone("cgroup");
    let job = slurm.submit(
        &["-w", "n2", "-n1"],
        "srun -n1 $CAPSID instance start $IMAGE db; echo up; while [ ! -e go ]; do sleep 0.1; done
srun -n1 $CAPSID exec instance://db echo still here",
    );
    slurm.until(&job, "the instance", || slurm.said(&job).contains("up"));
    slurm.kill_node("n2");
    slurm.start_node("n2");
    std::thread::sleep(Duration::from_secs(1));
    write(&slurm.env.work().join("go"), "");
    let said = slurm.ended(&job);
    assert!(said.ends_with("still here\n"), "{said}");
    assert!(slurm.log(&job, "db").ends_with(ORDERLY));
    slurm.assert_nodes_are_well();
}

#[test]
fn records_of_another_boot_are_nobodys() {
    let slurm = Slurm::new("cgroup");
    // The record as it is after a reboot, where the numbers of processes belong to others.
    let text = "f=/run/capsid/job-$SLURM_JOB_ID/capsid/instance-$SLURM_JOB_ID.db
srun -n1 $CAPSID instance start $IMAGE db; $CAPSID instance inspect --json db >saved; $CAPSID instance stop db
umask 077; sed 's/\"boot\": \"[0-9a-f]*/\"boot\": \"0/' saved >$f
$CAPSID instance list | tail -n +2 | wc -l; $CAPSID exec instance://db true; echo status $?
$CAPSID instance start $IMAGE db && srun -n1 $CAPSID exec instance://db echo anew";
    let job = slurm.submit(&["-n1"], text);
    let said = slurm.ended(&job);
    for words in [
        "\n0\n",
        "no instance found with name db",
        "status 255\n",
        "anew\n",
    ] {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    slurm.assert_nodes_are_well();
}

#[test]
fn many_jobs_leave_nothing() {
    let slurm = Slurm::new("cgroup");
    let text = "srun -n1 $CAPSID instance start $IMAGE db && srun -n1 $CAPSID exec instance://db echo fine";
    for round in 0..20 {
        let job = slurm.submit(&["-w", "n1", "-n1"], text);
        assert!(
            slurm.ended(&job).ends_with("fine\n"),
            "round {round}: {}",
            slurm.said(&job)
        );
    }
    slurm.runs_five_at_once(text);
}

#[test]
fn prolog_and_epilog_cost_little() {
    let slurm = Slurm::new("cgroup");
    let mut sums: Vec<f64> = (0..5)
        .map(|_| {
            let job = slurm.submit(&["-n1"], "true");
            slurm.ended(&job);
            let (prolog, epilog) = (
                slurm.took("prolog", &job).unwrap(),
                slurm.took("epilog", &job).unwrap(),
            );
            println!("job {job}: Prolog {prolog:.1} ms, Epilog {epilog:.1} ms");
            prolog + epilog
        })
        .collect();
    sums.sort_by(f64::total_cmp);
    // Neither waits for anything. What they cost is measured when the machine does nothing else.
    assert!(sums[0] < 1500.0, "Prolog and Epilog take {sums:?} ms");
}

#[test]
fn option_of_sbatch_names_a_service() {
    let slurm = Slurm::new("cgroup");
    let help = slurm.run(&["sbatch", "--help"]);
    assert!(help.ok().contains("--service=IMAGE:NAME"), "{help}");
    let text = "srun -n1 $CAPSID exec instance://db echo db is here; $CAPSID exec instance://web echo web is here
$CAPSID job status";
    let job = slurm.submit(
        &[
            "--service",
            &format!("{}:db", slurm.image),
            "--service=../service.sif:web",
        ],
        text,
    );
    let said = slurm.ended(&job);
    for words in ["db is here\n", "web is here\n", "service web: ready"] {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    let out = slurm.run(&["srun", "--service", "nothing", "true"]);
    assert!(
        out.status != 0 && out.stderr.contains("use IMAGE:NAME"),
        "{out}"
    );
}

#[test]
fn without_the_administrator_it_works_too() {
    let slurm = Slurm::new("bare");
    let job = slurm.submit(
        &["-N2"],
        "$CAPSID instance start $IMAGE own
srun -N1 -n1 $CAPSID exec instance://own echo own is here
srun -N1 -n1 $CAPSID instance start $IMAGE step
for i in $(seq 200); do [ $($CAPSID instance list step | tail -n +2 | wc -l) = 0 ] && break; sleep 0.1; done
$CAPSID instance list step | tail -n +2 | wc -l
$CAPSID job status
$CAPSID job services || exit 1
srun --overlap -N2 -n2 $CAPSID instance start $IMAGE both
srun --overlap -N2 -n2 $CAPSID exec instance://both sh -c 'echo both on $(hostname)'
$CAPSID job status",
    );
    let said = slurm.ended(&job);
    for words in [
        "own is here\n",
        "WARNING: instance step ends with this step: start it in the batch script itself, without srun, or run capsid job services",
        "no supervisor on this node",
        "both on n1\n",
        "both on n2\n",
        "a supervisor on this node",
    ] {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    assert!(
        said.contains("started successfully\n0\n"),
        "it has ended with its step: {said}"
    );
    assert_eq!(said.matches("WARNING").count(), 1, "{said}");
}
