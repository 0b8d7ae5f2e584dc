"""Real programs in an image of Debian: Python with numpy and scipy, and a C compiler; and the former from slow storage."""
import os, subprocess, tempfile, time
from .basics import NULL, TARGET, missing
from .driver import print_ratios, print_seconds, shell

SLOW = os.path.join(TARGET, "release", "examples", "slow")
LATENCY_MS = 2
IMPORTS = "numpy, scipy.linalg, scipy.sparse, scipy.optimize, scipy.stats, asyncio, email.mime.text, http.server, json, logging.config, sqlite3, unittest.mock, xml.dom.minidom"
ROWS = ("imports, cold", "imports, warm", "compile, cold", "compile, warm")
STORMS = {
    "python3 -c 'import numpy'": "numpy",
    "python3 -c 'import numpy, scipy...'": IMPORTS,
}


def inside(command):
    """Work of a program of the image: the mount is its root, in a mount namespace that ends with it."""
    return shell(f"exec unshare -m sh -c 'mount --rbind /dev dev && mount -t tmpfs tmpfs tmp && exec chroot . {command}'")


def imports(modules):
    return inside(f'python3 -X importtime -c "import {modules}"')


def programs(trees, mounts, options):
    storm, job = imports(IMPORTS), inside("make -s -j2 -C /src")
    probes = dict(zip(ROWS, ((storm, False), (storm, True), (job, False), (job, True))))
    probes = {row: probe for row, probe in probes.items() if options.only in row}
    hows, best = list(mounts.programs), {}
    print(f"seconds (processor seconds of the program and the server), least of {options.rounds} rounds: import {IMPORTS}; make of 24 C files\n")
    for kind in options.kinds:
        found = mounts.least(trees.image(trees.debian(), kind), probes, options.rounds)
        print_seconds(found, hows, kind)
        best.update({(row, kind): values for row, values in found.items()})
    print_ratios(best, hows, options.kinds, [(row, peer, None) for row in ROWS for peer in ("kernel", "ll")])


def storage(trees, mounts, options):
    """Each read of the image takes 2 ms more: with the profile that an earlier start left, and without."""
    if not os.access(SLOW, os.X_OK):
        return missing("slow storage", f"{SLOW} is not there: cargo build --release --workspace --examples")
    print(f"seconds from the start of the driver to the end, with {LATENCY_MS} ms more for each read of the image; least of {options.rounds} rounds\n")
    peers = [how for how in mounts.programs if how != "capsid"]
    print(f"{'':48}{'without':>9}{'profile':>9}{'ratio':>8}{'':10}{'(0 ms more)':>12}" + "".join(f"{how:>9}" for how in peers))
    for kind in options.kinds:
        image = trees.image(trees.debian(), kind)
        for name, modules in STORMS.items():
            with tempfile.TemporaryDirectory(dir=trees.keep) as profiles:
                profile = ["-o", f"profile={profiles}"]
                cases = {"without": ("capsid", [], LATENCY_MS), "profile": ("capsid", profile, LATENCY_MS), "0 ms": ("capsid", [], 0)}
                cases |= {how: (how, [], LATENCY_MS) for how in peers}
                storm(mounts, image, modules, *cases["profile"])  # the first one only notes
                best = {case: min(storm(mounts, image, modules, *words) for _ in range(options.rounds)) for case, words in cases.items()}
            value = best["profile"] / best["without"]
            print(f"{kind + ' ' + name:48}{best['without']:9.2f}{best['profile']:9.2f}{value:8.2f} {'<=0.33 !' if value > 1 / 3 else '<=0.33':9}{best['0 ms']:12.2f}" + "".join(f"{best[how]:9.2f}" for how in peers), flush=True)


def storm(mounts, image, modules, how, words, latency_ms):
    """Seconds from the start of the driver to the end of the imports, with nothing in any cache."""
    slow = mounts.point + ".slow"
    os.makedirs(slow, exist_ok=True)
    before = os.stat(slow).st_dev
    server = subprocess.Popen([SLOW, image, slow, str(latency_ms)], **NULL)
    while os.stat(slow).st_dev == before:
        time.sleep(0.001)
        assert server.poll() is None, f"{SLOW} ended"
    begin = time.perf_counter()
    child = mounts.mount(how, slow + "/image", *words)
    imports(modules)(mounts.point)
    taken = time.perf_counter() - begin
    mounts.unmount(child)
    subprocess.run(["umount", slow], check=True)
    assert server.wait() == 0
    return taken
