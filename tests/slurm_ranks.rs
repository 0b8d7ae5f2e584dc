//! Many ranks of a step in containers, with real Slurm: one image server, PMI2 and PMIx, shared memory between ranks, and
//! Slurm's own `--container`. See tests/slurm.rs.
#![allow(clippy::unwrap_used)]

#[path = "common/slurm.rs"]
mod cluster;
mod common;

use std::path::PathBuf;
use std::process::Command;

use cluster::Slurm;
use common::{output, write};

/// Compiles a C program into the image.
fn with_program(slurm: &mut Slurm, name: &str, text: &str, flags: &[&str]) {
    let (source, program) = (
        slurm.env.path(&format!("{name}.c")),
        slurm.env.path(name).display().to_string(),
    );
    write(&source, text);
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-o", &program]).arg(source).args(flags);
    output(&mut gcc).ok();
    let tree = slurm.env.tree("ranks");
    common::add_programs(&tree, &[&program]);
    std::fs::copy(&program, tree.join("bin").join(name)).unwrap();
    slurm.image = slurm.env.sif(&tree, "ranks.sif").display().to_string();
}

#[test]
fn ranks_of_a_step_share_one_image_server() {
    let slurm = Slurm::new("cgroup");
    let count = "ps -u $(id -u) -o args | grep -c \"^capsid-image $IMAGE\"";
    let job = slurm.submit(
        &["-w", "n2", "-n1"],
        &format!(
            "srun -n32 -O $CAPSID exec $IMAGE sh -c 'touch at.$SLURM_JOB_ID.$SLURM_PROCID; while [ ! -e go.$SLURM_JOB_ID ]; do sleep 0.1; done' &
for i in $(seq 600); do [ $(ls | grep -c ^at.$SLURM_JOB_ID) = 32 ] && break; sleep 0.1; done
ls | grep -c ^at.$SLURM_JOB_ID; {count}; touch go.$SLURM_JOB_ID; wait; echo over"
        ),
    );
    let said = slurm.ended(&job);
    // A server is two processes: the keeper and its worker.
    assert_eq!(said, "32\n2\nover\n");
}

#[test]
fn ranks_meet_by_pmi2() {
    let mut slurm = Slurm::new("cgroup");
    with_program(
        &mut slurm,
        "pmi2",
        r#"#include <slurm/pmi2.h>
#include <stdio.h>
int main(void) {
    int spawned, size, rank, app, len; char key[32], value[64];
    if (PMI2_Init(&spawned, &size, &rank, &app)) return 1;
    snprintf(key, sizeof key, "k%d", rank); snprintf(value, sizeof value, "from %d", rank);
    if (PMI2_KVS_Put(key, value) || PMI2_KVS_Fence()) return 2;
    snprintf(key, sizeof key, "k%d", (rank + 1) % size);
    if (PMI2_KVS_Get(NULL, PMI2_ID_NULL, key, value, sizeof value, &len)) return 3;
    printf("rank %d of %d hears %s\n", rank, size, value);
    return PMI2_Finalize();
}
"#,
        &["-lpmi2"],
    );
    let job = slurm.submit(
        &["-N2", "-n4"],
        "CUDA_VISIBLE_DEVICES=3 srun -n4 --mpi=pmi2 $CAPSID exec $IMAGE sh -c 'echo gpu $CUDA_VISIBLE_DEVICES; exec pmi2'; echo status $?",
    );
    let said = slurm.ended(&job);
    for rank in 0..4 {
        let words = format!("rank {rank} of 4 hears from {}\n", (rank + 1) % 4);
        assert!(said.contains(&words), "{words:?}: {said}");
    }
    assert!(
        said.matches("gpu 3\n").count() == 4 && said.ends_with("status 0\n"),
        "{said}"
    );
}

#[test]
fn ranks_meet_by_pmix() {
    let mut slurm = Slurm::new("cgroup");
    let pmix = "/usr/lib/x86_64-linux-gnu/pmix2";
    with_program(
        &mut slurm,
        "pmix",
        r#"#include <pmix.h>
#include <stdio.h>
#include <string.h>
int main(void) {
    pmix_proc_t me, job, next; pmix_value_t *value, mine; uint32_t size; char text[64];
    if (PMIx_Init(&me, NULL, 0)) return 1;
    PMIX_LOAD_PROCID(&job, me.nspace, PMIX_RANK_WILDCARD);
    if (PMIx_Get(&job, PMIX_JOB_SIZE, NULL, 0, &value)) return 2;
    size = value->data.uint32;
    snprintf(text, sizeof text, "from %u", me.rank);
    mine.type = PMIX_STRING; mine.data.string = text;
    bool all = true; pmix_info_t info;
    PMIX_INFO_CONSTRUCT(&info); PMIX_INFO_LOAD(&info, PMIX_COLLECT_DATA, &all, PMIX_BOOL);
    if (PMIx_Put(PMIX_GLOBAL, "key", &mine) || PMIx_Commit() || PMIx_Fence(&job, 1, &info, 1)) return 3;
    PMIX_LOAD_PROCID(&next, me.nspace, (me.rank + 1) % size);
    if (PMIx_Get(&next, "key", NULL, 0, &value)) return 4;
    printf("rank %u of %u hears %s\n", me.rank, size, value->data.string);
    return PMIx_Finalize(NULL, 0);
}
"#,
        &[&format!("-I{pmix}/include"), "-lpmix"],
    );
    // The library loads its plugins, and Slurm's directory of the step is one that containers do not see by themselves.
    let job = slurm.submit(
        &["-w", "n1", "-n2"],
        &format!(
            "srun -n2 --mpi=pmix $CAPSID exec --bind {pmix} --bind {} $IMAGE pmix; echo status $?",
            slurm.top.display()
        ),
    );
    let said = slurm.ended(&job);
    for words in ["rank 0 of 2 hears from 1\n", "rank 1 of 2 hears from 0\n"] {
        assert!(said.contains(words), "{words:?}: {said}");
    }
    assert!(said.ends_with("status 0\n"), "{said}");
}

#[test]
fn ranks_read_each_others_memory() {
    let mut slurm = Slurm::new("cgroup");
    with_program(
        &mut slurm,
        "cma",
        r#"#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>
static char words[64];
int main(void) {
    char file[64]; int rank = atoi(getenv("SLURM_PROCID"));
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    snprintf(file, sizeof file, "cma.%s", getenv("SLURM_JOB_ID"));
    if (rank == 0) {
        strcpy(words, "one copy is enough");
        char draft[80]; snprintf(draft, sizeof draft, "%s.new", file);
        FILE *f = fopen(draft, "w"); fprintf(f, "%d %p\n", getpid(), (void *)words); fclose(f); rename(draft, file);
        for (int i = 0; i < 300 && access(file, F_OK) == 0; i++) usleep(100000);
        return 0;
    }
    FILE *f = NULL; int pid; void *there;
    for (int i = 0; i < 300 && !(f = fopen(file, "r")); i++) usleep(100000);
    if (!f || fscanf(f, "%d %p", &pid, &there) != 2) return 1;
    struct iovec mine = {words, sizeof words}, theirs = {there, sizeof words};
    ssize_t got = process_vm_readv(pid, &mine, 1, &theirs, 1, 0);
    if (got < 0) perror("process_vm_readv"); else printf("%s\n", words);
    remove(file);
    return got != sizeof words;
}
"#,
        &[],
    );
    let job = slurm.submit(
        &["-w", "n1", "-n2"],
        "srun -n2 $CAPSID exec $IMAGE cma; echo status $?",
    );
    assert_eq!(slurm.ended(&job), "one copy is enough\nstatus 0\n");
}

#[test]
fn slurms_own_containers_run_here() {
    let slurm = Slurm::new("cgroup");
    let bundle: PathBuf = slurm.env.path("bundle");
    write(
        &bundle.join("config.json"),
        r#"{"ociVersion":"1.0.0","root":{"path":"rootfs"},"process":{"cwd":"/opt","args":["sh"],"env":["PATH=/bin","FOO=bar","LD_LIBRARY_PATH=/lib/x"]}}"#,
    );
    std::os::unix::fs::symlink(slurm.env.path("tree"), bundle.join("rootfs")).unwrap();
    let container = format!("--container={}", bundle.display());
    let words = "echo $FOO in $SLURM_JOB_ID; pwd; cat hello.txt; echo \"$0\"; exit 3";
    let out = slurm.run(&["srun", "-n1", &container, "sh", "-c", words, "it's $x"]);
    let lines: Vec<&str> = out.stdout.lines().collect();
    assert_eq!(out.status, 3, "{out}");
    assert!(lines[0].starts_with("bar in "), "{out}");
    assert_eq!(lines[1..], ["/opt", "hello", "it's $x"], "{out}");
    // The batch script is a file that Slurm binds into the container.
    let out = slurm.env.work().join("out.%j").display().to_string();
    let text = "echo \"$FOO $LD_LIBRARY_PATH\"; cat hello.txt";
    let words = ["sbatch", "--parsable", "-n1", "-o", &out, &container];
    let job = slurm.run(&[&words[..], &["--wrap", text]].concat());
    let said = slurm.ended(job.ok());
    assert!(
        said.starts_with("bar /lib/x") && said.contains("\nhello\n"),
        "{said}"
    );
}
