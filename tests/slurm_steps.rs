//! What the instances of a job have in common with the steps that ask for them: limits, files, and services of other nodes.
//! See tests/slurm.rs.
#![allow(clippy::unwrap_used)]

#[path = "common/slurm.rs"]
mod cluster;
mod common;

use std::path::Path;

use cluster::Slurm;
use common::{free_port, script, write};

#[test]
fn instances_have_what_the_requester_has() {
    let slurm = Slurm::new("cgroup");
    let job = slurm.submit(
        &["-n1"],
        "srun -n1 bash -c 'ulimit -n 77; ulimit -S -s 4096; umask 027; cd /usr; X=y nice -n 3 $CAPSID instance start $IMAGE db'
$CAPSID exec instance://db sh -c 'cat /proc/2/limits /proc/2/status; echo nice $(cut -d \" \" -f 19 /proc/2/stat)
echo score $(cat /proc/2/oom_score_adj); readlink /proc/2/cwd; tr \"\\0\" \"\\n\" </proc/2/environ'
$CAPSID instance start --overlay /nowhere $IMAGE bad; echo status $?",
    );
    let said = slurm.ended(&job);
    let line = |start: &str| {
        let line = said.lines().find(|l| l.starts_with(start)).unwrap_or("");
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        line("Max open files"),
        "Max open files 77 77 files",
        "{said}"
    );
    assert!(
        line("Max stack size").starts_with("Max stack size 4194304 "),
        "{said}"
    );
    assert_eq!(line("Umask:"), "Umask: 0027", "{said}");
    assert_eq!(line("nice"), "nice 3", "{said}");
    assert_eq!(line("score"), "score 0", "{said}");
    for words in ["\n/usr\n", "\nX=y\n", "FATAL:", "status 255\n"] {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    slurm.assert_nodes_are_well();
}

#[test]
fn instances_see_the_private_directories_of_their_job() {
    // What the test itself needs must be visible to jobs whose /tmp is their own.
    tempfile::env::override_temp_dir(Path::new("/var/tmp")).ok();
    let slurm = Slurm::new("private");
    let declared = "[[service]]\nname = \"declared\"\nimage = \"service.sif\"\n";
    write(&slurm.env.path("services.toml"), declared);
    let job = slurm.submit(
        &["-n1", "--comment=capsid:services=../services.toml"],
        "echo private >/tmp/only-of-$SLURM_JOB_ID
srun -n1 $CAPSID instance start $IMAGE db || exit 1
for name in db declared; do srun -n1 $CAPSID exec instance://$name cat /tmp/only-of-$SLURM_JOB_ID; done
srun -n1 $CAPSID exec instance://db sh -c 'echo back >/tmp/back'; cat /tmp/back",
    );
    let said = slurm.ended(&job);
    assert_eq!(said.matches("private\n").count(), 2, "{said}");
    assert!(
        said.contains("back\n") && !said.contains("WARNING"),
        "{said}"
    );
    assert!(
        !Path::new(&format!("/tmp/only-of-{job}")).exists(),
        "the cluster gives jobs a private /tmp"
    );
    slurm.assert_nodes_are_well();
}

#[test]
fn services_wait_for_those_of_other_nodes() {
    let slurm = Slurm::new("cgroup");
    let tree = slurm.env.tree("asking");
    script(
        &tree.join(".singularity.d/startscript"),
        "#!/bin/sh
echo \"$@\"
trap 'exit 0' TERM INT
[ -z \"$ASK\" ] || wget -qO- http://127.0.0.1:$ASK/hello.txt
[ -z \"$PORT\" ] || { sleep 2; httpd -f -p $PORT -h /opt & }
while :; do sleep 0.05; done
",
    );
    slurm.env.sif(&tree, "asking.sif");
    let (port, closed) = (free_port(), free_port());
    let file = |words: &str| {
        write(
            &slurm.env.path("services.toml"),
            &format!(
                "[[service]]\nname = \"first\"\nimage = \"asking.sif\"\n{words}
[[service]]\nname = \"second\"\nimage = \"asking.sif\"\nnodes = 1\nafter = [\"first\"]\nargs = [\"second-{port}\"]\noptions = [\"--env\", \"ASK={port}\"]\nready = {{ log = \"hello\" }}\n"
            ),
        );
    };
    let options = ["-N2", "--comment=capsid:services=../services.toml"];
    let text = "srun -N1 -n1 -w n2 $CAPSID exec instance://second echo second is there";

    file(&format!(
        "options = [\"--env\", \"PORT={port}\"]\nready = {{ port = {port} }}"
    ));
    let job = slurm.submit(&options, text);
    let said = slurm.ended(&job);
    assert!(said.contains("second is there\n"), "{said}");
    // The log is in the home directory, and may go on one of a job with the same number.
    let log = slurm.log_on("n2", &job, "second");
    assert!(log.ends_with(&format!("second-{port}\nhello\n")), "{log}");

    file(&format!("ready = {{ port = {closed}, timeout = \"2s\" }}"));
    let job = slurm.submit(&options, text);
    let said = slurm.ended(&job);
    let why = format!(
        "service second of this job could not be started: it comes after first, which did not answer at n1:{closed} within 12 s: \
         Connection refused"
    );
    assert!(said.contains(&why), "{said}");

    file("ready = { log = \"hello\" }");
    let job = slurm.submit(&options, text);
    let said = slurm.ended(&job);
    let why = "services.toml: line 5: service \"second\" comes after \"first\" of another node, where only a port can tell";
    assert!(said.contains(why), "{said}");
    slurm.assert_nodes_are_well();
}
