"""Whole processes from typing to `true` having run, beside the peers; instances; many at once; memory."""
import glob, itertools, json, os, shutil, subprocess, time
from .basics import CAPSID, NULL, command_line, ended, missing, rotation, spawn, table, timed

EXEC = [CAPSID, "-q", "exec"]
INSTANCE = [CAPSID, "-s", "instance"]
AT_ONCE = (2, 8, 32, 64)
NUMBERS = itertools.count()


def oci_bundle(work, root):
    """What crun wants to run `true` in the tree."""
    bundle = os.path.join(work, "bundle")
    os.makedirs(bundle)
    ids = {name: [{"containerID": 0, "hostID": value, "size": 1}] for name, value in (("uidMappings", os.getuid()), ("gidMappings", os.getgid()))}
    config = {
        "ociVersion": "1.0.0", "root": {"path": root},
        "process": {"args": ["/bin/true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]}],
        "linux": {"namespaces": [{"type": name} for name in ("user", "mount", "pid")], **ids},
    }
    with open(os.path.join(bundle, "config.json"), "w") as f:
        json.dump(config, f)
    return bundle


def peers(work, root, image, out=None):
    """{name: command that runs `true`, or a function of a number that gives one}: those that are there and work."""
    os.environ.setdefault("USER", "nobody")  # ch-run asks for it
    crun = ["crun", "--cgroup-manager=disabled", f"--root={work}/crun", "run", f"--bundle={oci_bundle(work, root)}"]
    podman = ["podman", "--log-level=error", "run", "--rm", "--cgroups=disabled", "--network=none", "--rootfs", root, "/bin/true"]
    found = {}
    for name, argv in {
        "bwrap directory": ["bwrap", "--unshare-user", "--bind", root, "/", "--proc", "/proc", "--dev-bind", "/dev", "/dev", "/bin/true"],
        "crun directory": lambda n: [*crun, f"capsid-bench-{os.getpid()}-{next(NUMBERS)}"],
        "ch-run directory": ["ch-run", root, "--", "/bin/true"],
        "podman directory": podman,
        "apptainer image": ["apptainer", "-s", "exec", image, "/bin/true"],
    }.items():
        words = argv(0) if callable(argv) else argv
        if not shutil.which(words[0]):
            missing(name, f"{words[0]} is not installed", out)
            continue
        tried = subprocess.run(words, capture_output=True, text=True)
        if tried.returncode:
            missing(name, f"it ends with {tried.returncode}: {' '.join(tried.stderr.split()[-30:])}", out)
        else:
            found[name] = argv
    return found


class Starts:
    """The cases, {name: function that gives milliseconds}, for a script or for criterion."""

    def __init__(self, trees, work, out=None):
        self.work, self.root = work, trees.busybox()
        self.image = trees.image(self.root, "gzip/128K")
        self.peers = peers(work, self.root, self.image, out)
        self.joined = f"compare{os.getpid()}"
        timed([*INSTANCE, "start", self.image, self.joined])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        timed([*INSTANCE, "stop", self.joined])

    def cold(self):
        copy = os.path.join(self.work, f"copy{next(NUMBERS)}.squashfs")
        shutil.copy(self.image, copy)  # another image: it has no server yet
        return timed([*EXEC, copy, "/bin/true"])

    def instance(self, wanted):
        """Milliseconds that an instance takes to start or to stop."""
        name = f"compare{os.getpid()}-{next(NUMBERS)}"
        taken = {"start": timed([*INSTANCE, "start", self.image, name]), "stop": timed([*INSTANCE, "stop", name])}
        return taken[wanted]

    def alone(self):
        def command(argv):
            return lambda: timed(argv(0) if callable(argv) else argv)
        return {name: command(argv) for name, argv in self.peers.items()} | {
            "capsid directory": command([*EXEC, self.root, "/bin/true"]),
            "capsid image, warm": command([*EXEC, self.image, "/bin/true"]),
            "capsid image, cold": self.cold,
            "capsid --fakeroot, warm": command([*EXEC, "--fakeroot", self.image, "/bin/true"]),
            "exec instance://": command([*EXEC, f"instance://{self.joined}", "/bin/true"]),
            "instance start": lambda: self.instance("start"),
            "instance stop": lambda: self.instance("stop"),
            "capsid --version": command([CAPSID, "--version"]),
        }

    def at_once(self, count):
        commands = {"bwrap directory": self.peers.get("bwrap directory"), "capsid image": [*EXEC, self.image, "/bin/true"]}
        return {f"{name}, {count} at once": (lambda argv=argv: timed(argv, count)) for name, argv in commands.items() if argv}

    def servers(self):
        return [pid for pid in map(os.path.basename, glob.glob("/proc/[0-9]*")) if command_line(pid).startswith("capsid-image " + self.image)]


def pss(pids):
    """kB of memory, what is shared counted in parts."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as f:
                total += sum(int(line.split()[1]) for line in f if line.startswith("Pss:"))
        except OSError:
            pass
    return total


def start(trees, work, rounds):
    with Starts(trees, work) as starts:
        print(f"milliseconds to `true`, of {rounds} rounds")
        table(rotation(starts.alone(), rounds), "bwrap directory")
        for count in AT_ONCE:
            print()
            table(rotation(starts.at_once(count), 10), f"bwrap directory, {count} at once")
    memory(starts)


def memory(starts):
    print("\nkB of PSS")
    children = [spawn([*EXEC, starts.image, "sleep", "600"]) for _ in range(64)]
    time.sleep(3)
    servers = starts.servers()
    print(f"64 running containers: ours ({len(servers)} processes: keeper and worker of one server)  {pss(servers)}, payload  {pss(children)}")
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    names = [f"compare{os.getpid()}-idle{i}" for i in range(50)]
    for name in names:
        ended(spawn([*INSTANCE, "start", starts.image, name]), "instance start")
    lines = {pid: command_line(pid) for pid in map(os.path.basename, glob.glob("/proc/[0-9]*"))}
    ours = [pid for pid, line in lines.items() if line == "appinit" or line.startswith("capsid-instance")]
    print(f"50 idle instances: ours ({len(ours)} processes)  {pss(ours)}")
    subprocess.run([*INSTANCE, "stop", f"compare{os.getpid()}-idle*"], check=True, **NULL)
