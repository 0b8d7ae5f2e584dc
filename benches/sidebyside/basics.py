"""Programs, times, tables: what all comparisons share."""
import ctypes, os, statistics, subprocess, time

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(HERE, "target"))
CAPSID = os.path.join(TARGET, "release", "capsid")
DRIVER = os.path.join(TARGET, "release", "capsid-fuse")
NULL = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
QUIET = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]


def spawn(argv):
    """Starts a program without the milliseconds that `subprocess` takes for it."""
    return os.posix_spawnp(argv[0], argv, os.environ, file_actions=QUIET)


def ended(pid, argv):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise subprocess.CalledProcessError(status, argv)


def timed(argv, count=1):
    """Milliseconds until a program has ended; or `count` of them that run at once."""
    begin = time.perf_counter()
    for pid in [spawn(argv(n) if callable(argv) else argv) for n in range(count)]:
        ended(pid, argv)
    return (time.perf_counter() - begin) * 1000


def rotation(cases, rounds):
    """Runs the cases, {name: function that gives milliseconds}, in turn, so that noise falls on all of them alike."""
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            times[name].append(run())
    return times


def table(times, base):
    width = max(map(len, times))
    print(f"{'':{width}}  median     min   x {base}")
    for name, values in times.items():
        middle = statistics.median(values)
        ratio = f"   {middle / statistics.median(times[base]):5.2f}" if base in times else ""
        print(f"{name:{width}}  {middle:7.2f} {min(values):7.2f}{ratio}", flush=True)


def missing(what, why, out=None):
    print(f"missing: {what} ({why})", file=out, flush=True)


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def machine():
    with open("/proc/cpuinfo") as f:
        model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "?")
    with open("/proc/meminfo") as f:
        memory = int(f.readline().split()[1]) >> 20
    return f"{model}, {os.cpu_count()} processors, {memory} GiB, Linux {os.uname().release}"


def own_mounts():
    """From here on this process has mounts of its own; one that is not root, in a user namespace in which it may mount."""
    libc, (uid, gid) = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    flags = 0x20000 if uid == 0 else 0x20000 | 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace")
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    return uid == 0
