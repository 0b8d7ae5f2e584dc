"""The driver against squashfuse_ll and the kernel's own squashfs: the same work in fresh mounts of the same image."""
import os, random, shutil, statistics, subprocess, sys, time
from .basics import DRIVER, NULL, missing, timed
from .trees import small_path, tiny_path

# Each target of the project: (row, peer, limit): capsid's time over the kernel's, or squashfuse_ll's over capsid's.
TARGETS = [
    ("names, cold", "kernel", 2.0), ("names, cold", "ll", None), ("names, warm", "kernel", 0.6), ("names, warm", "ll", None),
    ("names + stat, cold", "kernel", 0.5), ("names + stat, cold", "ll", 4), ("names + stat, warm", "kernel", 0.8),
    ("stat of 5 000 paths, cold", "kernel", None), ("stat of 5 000 paths, cold", "ll", None),
    ("read all, cold", "kernel", {"gzip": 0.55, "zstd": 0.75, "lz4": 0.75}), ("read all, cold", "ll", 2),
    ("read all, cold, 2 readers", "kernel", None), ("read all, cold, 2 readers", "ll", None),
    ("read all, cold, 4 readers", "kernel", 0.5), ("read all, cold, 4 readers", "ll", 2),
    ("read all, cold, 8 readers", "kernel", None), ("read all, cold, 8 readers", "ll", None),
    ("read all, warm", "kernel", 1.1), ("read all, warm", "ll", 3),
    ("sparse: names + stat, cold", "kernel", 1.2), ("sparse: names + stat, cold", "ll", None),
    ("sparse: names + stat, warm", "kernel", None), ("sparse: names + stat, warm", "ll", None),
    ("sparse: read all, cold", "kernel", 1.0), ("sparse: read all, cold", "ll", None),
    ("sparse: read all, warm", "kernel", 1.1), ("sparse: read all, warm", "ll", None),
    ("sequential, cold", "kernel", {"gzip": 0.3, "zstd": 0.55, "lz4": 0.9}), ("sequential, cold", "ll", None),
    ("random 4 KiB, cold", "kernel", 1.0), ("random 4 KiB, cold", "ll", None),
]


class Mounts:
    """What mounts images, {name: program}, in this process's own mount namespace."""

    def __init__(self, point, with_kernel, out=None):
        self.point = point
        os.makedirs(point, exist_ok=True)
        self.server_cpu = 0
        self.programs = {}
        modern, old = os.environ.get("SQUASHFUSE_LL", "/opt/apptainer/bin/squashfuse_ll"), shutil.which("squashfuse_ll") or ""
        for name, path in (("capsid", DRIVER), ("kernel", None), ("ll", modern), ("ll 0.1", old)):
            if name == "kernel" and not with_kernel:
                missing("kernel", "loop mounts need root", out)
            elif path is not None and not os.access(path, os.X_OK):
                missing(name, f"{path or 'squashfuse_ll'} is not there", out)
            else:
                self.programs[name] = path
        if "ll" not in self.programs and "ll 0.1" in self.programs:
            self.programs["ll"] = self.programs.pop("ll 0.1")
            print("ll is the squashfuse_ll of the PATH, which may be single-threaded; SQUASHFUSE_LL names another", file=out)

    def mount(self, how, image, *options):
        if how == "kernel":
            subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", image, self.point], check=True)
            return None
        before = os.stat(self.point).st_dev
        child = subprocess.Popen([self.programs[how], "-f", *options, image, self.point], stderr=subprocess.DEVNULL, **NULL)
        while os.stat(self.point).st_dev == before:
            time.sleep(0.0002)
            assert child.poll() is None, f"{how} ended"
        return child

    def unmount(self, child):
        subprocess.run(["umount", self.point], check=True)
        if child:
            usage = os.wait4(child.pid, 0)[2]
            self.server_cpu, child.returncode = usage.ru_utime + usage.ru_stime, 0

    def run(self, how, image, work, warm=False):
        """Seconds of wall time, and of processor time of the reader and the server, of `work` in a fresh mount."""
        child = self.mount(how, image)
        try:
            if warm:
                work(self.point)
            busy, reader, begin = proc_cpu(child.pid) if child else 0, children_cpu(), time.perf_counter()
            work(self.point)
            wall, spent = time.perf_counter() - begin, children_cpu() - reader
            return wall, spent + (proc_cpu(child.pid) - busy if child else 0)
        finally:
            self.unmount(child)

    def least(self, image, probes, rounds):
        """{row: {how: (wall, cpu)}}, the least of all rounds, each of which goes round all drivers."""
        best = {}
        for _ in range(rounds):
            for row, (work, warm) in probes.items():
                for how in self.programs:
                    taken = self.run(how, image, work, warm)
                    found = best.setdefault(row, {})
                    found[how] = tuple(map(min, taken, found.get(how, taken)))
        return best


def children_cpu():
    now = os.times()
    return now.children_user + now.children_system


def proc_cpu(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_kib(pid, field):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":"))


def shell(script):
    def work(top):
        subprocess.run(["sh", "-c", script], cwd=top, check=True, env=dict(os.environ, LC_ALL="C"), stderr=subprocess.DEVNULL, **NULL)
    return work


def forked(function):
    """Runs it in a child: what it opened is closed, and its processor time is counted, when it is over."""
    def work(top):
        pid = os.fork()
        if pid == 0:
            os.chdir(top)
            function()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    return work


def cat_all(readers):
    return shell(f"find . -type f -print0 | xargs -0 -n 500 -P {readers} cat >/dev/null")


def random_reads():
    rng, fd = random.Random(4), os.open("large", os.O_RDONLY)
    size = os.fstat(fd).st_size
    for _ in range(1500):
        os.pread(fd, 4096, rng.randrange(0, size - 4096) & ~4095)


def random_stats(count):
    def stats():
        rng = random.Random(5)
        for _ in range(5000):
            os.stat(small_path(".", rng.randrange(count)))
    return stats


def probes(count):
    """What is done in which tree, {tree: {row: (work, in a mount in which it has been done before)}}."""
    names, stat = shell("find . >/dev/null"), shell("find . -printf '%s %T@\\n' >/dev/null")
    return {
        "small": {
            "names, cold": (names, False), "names, warm": (names, True),
            "names + stat, cold": (stat, False), "names + stat, warm": (stat, True),
            "stat of 5 000 paths, cold": (forked(random_stats(count)), False),
            "read all, cold": (cat_all(1), False),
            **{f"read all, cold, {n} readers": (cat_all(n), False) for n in (2, 4, 8)},
            "read all, warm": (cat_all(1), True),
        },
        # One file in each directory: the kernel sends two requests for a directory, the second one to hear that it ends.
        "sparse": {
            "sparse: names + stat, cold": (stat, False), "sparse: names + stat, warm": (stat, True),
            "sparse: read all, cold": (cat_all(1), False), "sparse: read all, warm": (cat_all(1), True),
        },
        "large": {
            "sequential, cold": (shell("dd if=large of=/dev/null bs=1M"), False),
            "random 4 KiB, cold": (forked(random_reads), False),
        },
    }


def measure(trees, mounts, options):
    """{(row, kind): {how: (wall, cpu)}}"""
    best = {}
    for kind in options.kinds:
        for tree, rows in probes(options.files).items():
            rows = {row: probe for row, probe in rows.items() if options.only in row}
            if rows:
                path = trees.named(tree, options.files, options.mib)
                found = mounts.least(trees.image(path, kind), rows, options.rounds)
                best.update({(row, kind): values for row, values in found.items()})
    return best


def print_seconds(best, hows, title):
    width = 30
    print(f"{title:{width}}" + "".join(f"{how:>16}" for how in hows))
    for row, values in best.items():
        print(f"{row:{width}}" + "".join(f"{values[h][0]:8.3f} ({values[h][1]:5.2f})" for h in hows))
    print(flush=True)


def ratio(values, peer, limit):
    """A cell of the table of ratios: `!` is a target that is missed."""
    value = values["capsid"][0] / values["kernel"][0] if peer == "kernel" else values[peer][0] / values["capsid"][0]
    if limit is None:
        return f"{value:6.2f}" + " " * 9
    missed = value > limit if peer == "kernel" else value < limit
    return f"{value:6.2f} {'<=' if peer == 'kernel' else '>='}{limit:<4}" + (" !" if missed else "  ")


def print_ratios(best, hows, kinds, targets):
    print(f"{'ratios':52}" + "".join(f"{kind:>12}   " for kind in kinds))
    for row, peer, limit in targets:
        if peer in hows and any((row, kind) in best for kind in kinds):
            limits = [limit.get(kind.split("/")[0]) if isinstance(limit, dict) else limit for kind in kinds]
            cells = (ratio(best[row, kind], peer, wanted) for kind, wanted in zip(kinds, limits))
            print(f"{row:30}{'time / kernel' if peer == 'kernel' else 'squashfuse_ll / time':22}" + "".join(cells))
    sys.stdout.flush()


def first_byte(trees, mounts, counts):
    """From the start of the driver to the first byte of a file deep in the image, for images of many sizes."""
    print("\nmilliseconds from the start of the driver to a byte of a file deep in the image, least of 7 (and to the mount)\n")
    print(f"{'files':30}" + "".join(f"{how:>16}" for how in mounts.programs))
    for count in counts:
        image, best = trees.image(trees.tiny(count), "zstd/128K"), {}
        path = tiny_path(mounts.point, (count - 1) // 100 * 100)
        for _ in range(7):
            for how in mounts.programs:
                begin = time.perf_counter()
                child = mounts.mount(how, image)
                there = time.perf_counter()
                with open(path, "rb", buffering=0) as f:
                    assert f.read(1)
                spent = (time.perf_counter() - begin) * 1000, (there - begin) * 1000
                best[how] = min(best.get(how, spent), spent)
                mounts.unmount(child)
        print(f"{count:<30}" + "".join(f"{best[h][0]:8.2f} ({best[h][1]:5.2f})" for h in mounts.programs), flush=True)


def first_program(trees, mounts, kinds):
    """What a cold start waits for at least: the driver, and the pages of the program."""
    print("\nmilliseconds from the start of the driver to the end of `true`, a busybox in the image, median of 15 (and of them from the mount)\n")
    print(f"{'':30}" + "".join(f"{how:>16}" for how in mounts.programs))
    argv = [os.path.join(mounts.point, "bin/busybox"), "true"]
    for kind in kinds:
        image, spent = trees.image(trees.busybox(), kind), {}
        for _ in range(15):
            for how in mounts.programs:
                begin = time.perf_counter()
                child = mounts.mount(how, image)
                there = time.perf_counter()
                running = timed(argv)
                spent.setdefault(how, []).append(((there - begin) * 1000 + running, running))
                mounts.unmount(child)
        middle = {how: map(statistics.median, zip(*times)) for how, times in spent.items()}
        print(f"{kind:30}" + "".join("{:8.2f} ({:5.2f})".format(*middle[how]) for how in mounts.programs), flush=True)


COMPUTE = """
import argparse, ast, asyncio, collections, csv, decimal, email, hashlib, http.client, json, logging, sqlite3, unittest, xml.dom, zlib, glob, sys
words = collections.Counter()
for again in range(4):
    for path in glob.glob("data/*"):
        text = open(path, "rb").read()
        for line in text.split(b"\\n"):
            words.update(line.split())
"""


def compute(trees, mounts):
    """A program of one core whose library and input lie in the image: what the server takes of the processor."""
    library = os.path.dirname(os.__file__)
    def make(d, data):
        shutil.copytree(library, d + "/lib", ignore=shutil.ignore_patterns("__pycache__", "*.so", "test", "config*"), symlinks=True)
        os.mkdir(d + "/data")
        for i in range(200):
            with open(f"{d}/data/{i}", "wb") as f:
                f.write(data[i << 18:(i + 1) << 18])
    image = trees.image(trees.tree("compute", make), "zstd/128K")
    environment = dict(os.environ, PYTHONPATH="lib", PYTHONDONTWRITEBYTECODE="1")
    print("\nprocessor seconds of a compute job with its files in the image, and of the server (target: <= 3 %)\n")
    for how in mounts.programs:
        if how != "kernel":
            child, before = mounts.mount(how, image), children_cpu()
            subprocess.run([sys.executable, "-c", COMPUTE], cwd=mounts.point, check=True, env=environment, **NULL)
            job, server = children_cpu() - before, proc_cpu(child.pid)
            mounts.unmount(child)
            print(f"{how:30}{job:8.2f} {server:8.2f}   {server / job * 100:.1f} %")


def memory(trees, mounts, files):
    print("\nMiB of memory of the server: at most while all is read by 4, and 12 seconds later (targets: <= 64, <= 8)\n")
    for kind in ("zstd/128K", "zstd/1M"):
        image = trees.image(trees.small(files), kind)
        for how in mounts.programs:
            if how in ("capsid", "ll"):
                child = mounts.mount(how, image)
                cat_all(4)(mounts.point)
                most = status_kib(child.pid, "VmHWM") / 1024
                time.sleep(12)
                print(f"{how + ', ' + kind:30}{most:8.1f} {status_kib(child.pid, 'VmRSS') / 1024:8.1f}", flush=True)
                mounts.unmount(child)


def read(trees, mounts, options):
    hows, kinds = list(mounts.programs), options.kinds
    best = measure(trees, mounts, options)
    print("\nseconds (processor seconds of reader and server; of the kernel without its own threads), least of all rounds\n")
    for kind in kinds:
        print_seconds({row: values for (row, k), values in best.items() if k == kind}, hows, kind)
    print_ratios(best, hows, kinds, TARGETS)
    if not options.only:
        first_byte(trees, mounts, options.counts)
        first_program(trees, mounts, kinds)
        memory(trees, mounts, options.files)
        compute(trees, mounts)
