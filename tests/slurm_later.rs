//! Services of jobs in Slurm 24.11, without and with `PrologFlags=RunInJob`. See tests/slurm.rs.
#![allow(clippy::unwrap_used)]

#[path = "common/slurm.rs"]
mod cluster;
mod common;

use std::time::Duration;

use cluster::{ORDERLY, Slurm};
use common::write;

/// Both clusters: Prolog and Epilog outside of the job, and in it. With cgroup version 2 there is one of them at a time.
fn both() -> Vec<Slurm> {
    let all = ["contain", "injob"].into_iter();
    let one = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let top = std::path::PathBuf::from(std::env::var_os("CAPSID_SLURM").unwrap());
    let clusters: Vec<Slurm> = all
        .filter(|cluster| !one || top.join(cluster).exists())
        .map(Slurm::new)
        .collect();
    assert!(!clusters.is_empty(), "neither contain nor injob is up");
    clusters
}

#[test]
fn prolog_in_the_job_leaves_services_where_the_epilog_finds_them() {
    let slurm = Slurm::new("injob");
    // No step of Slurm's is the instance's on a node without a batch script.
    let text = "srun -N2 -n2 $CAPSID instance start $IMAGE db
srun -N2 -n2 $CAPSID exec instance://db sh -c 'echo $(hostname): $(grep -o /job_.* /proc/1/cgroup | head -n 1)'";
    let job = slurm.submit(&["-N2"], text);
    let said = slurm.ended(&job);
    for place in ["n1: /job_JOB/step_batch", "n2: /job_JOB"] {
        assert!(said.contains(&place.replace("JOB", &job)), "{said}");
    }
    assert!(
        !said.contains(&format!("n2: /job_{job}/step_extern/user")),
        "{said}"
    );
}

/// The log of an instance on a node, which has stopped in order.
#[track_caller]
fn assert_orderly(slurm: &Slurm, node: &str, job: &str) {
    let log = slurm.log_on(node, job, "db");
    assert!(
        log.starts_with("started") && log.ends_with(ORDERLY),
        "{}, {node}: {log}",
        slurm.cluster
    );
}

#[test]
fn instance_of_a_step_lives_as_long_as_its_job() {
    Slurm::new("contain").keeps_instances_for_later_steps(Some("step_batch"));
}

#[test]
fn prolog_in_the_job_keeps_instances_for_later_steps() {
    Slurm::new("injob").keeps_instances_for_later_steps(Some("step_batch"));
}

#[test]
fn services_stop_in_order_on_all_nodes() {
    for slurm in both() {
        let text = "srun -N2 -n2 $CAPSID instance start $IMAGE db";
        let job = slurm.submit(&["-N2"], text);
        slurm.ended(&job);
        for node in ["n1", "n2"] {
            assert_orderly(&slurm, node, &job);
        }
        slurm.assert_nodes_are_well();
    }
}

#[test]
fn cancelled_jobs_leave_nothing_and_their_services_stop_in_order() {
    for slurm in both() {
        let job = slurm.submit(
            &["-N2"],
            "srun -N2 -n2 $CAPSID instance start $IMAGE db; echo up; sleep 1000",
        );
        slurm.until(&job, "the instance", || slurm.said(&job).contains("up"));
        slurm.run(&["scancel", &job]).ok();
        slurm.ended(&job);
        assert_orderly(&slurm, "n1", &job);
        if slurm.cluster == "injob" {
            assert_orderly(&slurm, "n2", &job);
        }
        slurm.assert_nodes_are_well();
    }
}

#[test]
fn jobs_at_their_time_limit_leave_nothing_and_their_services_stop_in_order() {
    let clusters = both();
    let text = "srun -N2 -n2 $CAPSID instance start $IMAGE db; echo up; sleep 1000";
    let jobs: Vec<String> = clusters
        .iter()
        .map(|slurm| slurm.submit(&["-N2", "-t", "1"], text))
        .collect();
    for (slurm, job) in clusters.iter().zip(&jobs) {
        let said = slurm.ended(job);
        assert!(
            said.contains("up") && slurm.state(job) == "TIMEOUT",
            "{said}"
        );
        assert_orderly(slurm, "n1", job);
        if slurm.cluster == "injob" {
            assert_orderly(slurm, "n2", job);
        }
    }
}

#[test]
fn requeued_job_begins_anew() {
    for slurm in both() {
        let declared = "[[service]]\nname = \"declared\"\nimage = \"service.sif\"\n";
        write(&slurm.env.path("services.toml"), declared);
        let job = slurm.submit(
            &["--requeue", "-w", "n1", "-n1", "--comment=capsid:services=../services.toml"],
            "srun -n1 $CAPSID instance start $IMAGE db || exit 1
srun -n1 $CAPSID exec instance://db echo run ${SLURM_RESTART_COUNT:-0}
srun -n1 $CAPSID exec instance://declared echo declared ${SLURM_RESTART_COUNT:-0}; [ \"${SLURM_RESTART_COUNT:-0}\" = 2 ] || sleep 1000",
        );
        for run in 0..3 {
            slurm.until(&job, "a run", || {
                if run > 0 {
                    // It waits two minutes by itself.
                    let id = format!("JobId={job}");
                    slurm.run(&["scontrol", "update", &id, "StartTime=now"]);
                }
                slurm.said(&job).contains(&format!("declared {run}"))
            });
            if run < 2 {
                slurm.run(&["scontrol", "requeue", &job]).ok();
                if slurm.cluster == "injob" {
                    // With RunInJob, 24.11.5 takes a minute to end a run that begins at once after another.
                    std::thread::sleep(Duration::from_secs(5));
                }
            }
        }
        let said = slurm.ended(&job);
        assert!(
            said.contains("run 1\n") && said.contains("run 2\n") && !said.contains("WARNING"),
            "{said}"
        );
        let log = slurm.log(&job, "db");
        let count = log.matches(ORDERLY).count();
        assert_eq!(count, 3, "{}: {log}", slurm.cluster);
        slurm.assert_nodes_are_well();
    }
}

#[test]
fn jobs_without_a_batch_script_have_services_too() {
    for slurm in both() {
        let text = "srun -N2 -n2 $CAPSID instance start $IMAGE db && srun -N2 -n2 $CAPSID exec instance://db echo here; echo job $SLURM_JOB_ID";
        let out = slurm.run(&["salloc", "-Q", "-N2", "sh", "-c", text]);
        assert_eq!(out.stdout.matches("here\n").count(), 2, "{out}");
        let job = out.stdout.rsplit(' ').next().unwrap().trim().to_owned();
        slurm.ended(&job);
        if slurm.cluster == "injob" {
            assert_orderly(&slurm, "n1", &job);
            assert_orderly(&slurm, "n2", &job);
        }
        slurm.assert_nodes_are_well();
    }
}

#[test]
fn many_jobs_leave_nothing() {
    let slurm = Slurm::new("injob");
    let text = "srun -n1 $CAPSID instance start $IMAGE db && srun -n1 $CAPSID exec instance://db echo fine";
    slurm.runs_five_at_once(text);
}
