"""A ping-pong of two MPI ranks, in two containers of one image and outside."""
import os, shutil, subprocess
from .basics import CAPSID, NULL, missing

SIZES = [8, 1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]
PROGRAM = r"""
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv) {
    int rank;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    for (int i = 1; i < argc; i++) {
        int size = atoi(argv[i]), rounds = size < 1 << 16 ? 20000 : size < 1 << 20 ? 4000 : 1000;
        char *bytes = malloc(size);
        memset(bytes, rank, size);
        double begin = 0;
        for (int n = -rounds / 10; n < rounds; n++) {
            if (n == 0) { MPI_Barrier(MPI_COMM_WORLD); begin = MPI_Wtime(); }
            for (int turn = 0; turn < 2; turn++)
                if (turn == rank) MPI_Send(bytes, size, MPI_CHAR, !rank, 0, MPI_COMM_WORLD);
                else MPI_Recv(bytes, size, MPI_CHAR, !rank, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        }
        if (rank == 0) printf("%d %.9f\n", size, (MPI_Wtime() - begin) / rounds / 2);
        free(bytes);
    }
    MPI_Finalize();
}
"""


def ranks(trees, work, rounds):
    if not (shutil.which("mpicc") and shutil.which("mpirun")):
        return missing("mpicc, mpirun", "Debian packages libopenmpi-dev, openmpi-bin")
    source, program = os.path.join(work, "pingpong.c"), os.path.join(work, "pingpong")
    with open(source, "w") as f:
        f.write(PROGRAM)
    subprocess.run(["mpicc", "-O2", "-o", program, source], check=True)

    def links(root, _):
        # An image without programs: those of this machine are bound, so that both sides run the same library.
        for name in ("dev", "etc", "home", "proc", "sys", "tmp", "usr", "var/tmp"):
            os.makedirs(os.path.join(root, name))
        for name in ("bin", "lib", "lib64", "sbin"):
            os.symlink(f"usr/{name}", os.path.join(root, name))
    image = trees.image(trees.tree("links", links), "gzip/128K")
    inside = [CAPSID, "-q", "exec", "--bind", f"/usr,/etc,{work}", image]
    # vader: shared memory, and one copy by process_vm_readv (CMA) for what is large.
    mpirun = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "core" if os.cpu_count() > 1 else "none", "--mca", "btl", "self,vader", "--mca", "btl_vader_single_copy_mechanism", "cma", "--mca", "pml", "ob1"]
    best = {}
    for _ in range(rounds):
        for case, prefix in (("outside", []), ("containers", inside)):
            run = subprocess.run([*mpirun, *prefix, program, *map(str, SIZES)], capture_output=True, text=True)
            assert run.returncode == 0, f"{case}: {run.stderr}"
            for size, seconds in (line.split() for line in run.stdout.splitlines()):
                best[case, int(size)] = min(float(seconds), best.get((case, int(size)), 1))
    print(f"ping-pong of two MPI ranks, best of {rounds} rounds in turn: us one way, MB/s, and the ratio of the bandwidths\n")
    print(f"{'bytes':>10}{'outside':>22}{'containers':>22}   ratio")
    for size in SIZES:
        out, ours = best["outside", size], best["containers", size]
        cells = "".join(f"{t * 1e6:10.2f} {size / t / 1e6:11.1f}" for t in (out, ours))
        print(f"{size:10}{cells}   {out / ours:.2f} >=0.95" + (" !" if out / ours < 0.95 else ""))
