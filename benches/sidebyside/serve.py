"""Measures for criterion: names its cases, then answers each line `CASE<tab>COUNT` with the seconds that so many take."""
import contextlib, os, sys
from .basics import own_mounts
from .driver import Mounts, probes
from .start import AT_ONCE, Starts

FILES, MIB, KIND = 3000, 32, "zstd/128K"


def start_cases(trees, work, out, stack):
    starts = stack.enter_context(Starts(trees, work, out))
    cases = starts.alone()
    for count in AT_ONCE:
        cases |= starts.at_once(count)
    return {name: (lambda run=run: run() / 1000) for name, run in cases.items()}


def read_cases(trees, work, out, _):
    mounts, cases = Mounts(os.path.join(work, "mnt"), own_mounts(), out), {}
    for tree, rows in probes(FILES).items():
        image = trees.image(trees.named(tree, FILES, MIB), KIND)
        for row, (work_of_row, warm) in rows.items():
            for how in mounts.programs:
                cases[f"{row}: {how}"] = lambda how=how, image=image, do=work_of_row, warm=warm: mounts.run(how, image, do, warm)[0]
    return cases


def serve(trees, work):
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = sys.stdin.readline().strip()
    with contextlib.ExitStack() as stack:
        cases = {"start": start_cases, "read": read_cases}[asked](trees, work, sys.stderr, stack)
        print(*cases, sep="\n", end="\n\n", file=out, flush=True)
        for line in sys.stdin:
            name, count = line.rstrip("\n").split("\t")
            print(sum(cases[name]() for _ in range(int(count))), file=out, flush=True)
