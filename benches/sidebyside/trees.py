"""Trees and the images that are made from them, in a directory that can be kept for the next run."""
import glob, os, random, shutil, subprocess
from .basics import NULL

# Fast to make; what a reader costs does not depend on it.
LEVELS = {"gzip": ["-Xcompression-level", "6"], "zstd": ["-Xcompression-level", "3"], "lz4": [], "xz": []}
BUSYBOX = ("true", "sleep", "sh", "cat")


class Trees:
    def __init__(self, keep):
        self.keep = keep
        os.makedirs(keep, exist_ok=True)
        self.data = None

    def path(self, name):
        return os.path.join(self.keep, name)

    def tree(self, name, make):
        """The tree of that name, which `make(directory, bytes)` fills if it is not there yet."""
        path = self.path(name)
        if not os.path.exists(path):
            self.data = self.data or pool()
            shutil.rmtree(path + ".new", ignore_errors=True)
            os.mkdir(path + ".new")
            make(path + ".new", self.data)
            os.rename(path + ".new", path)
        return path

    def image(self, tree, kind, *more):
        """An image of the tree; `kind` is a compressor and a block size, as in zstd/128K."""
        compressor, block = kind.split("/")
        path = f"{tree}.{compressor}.{block}"
        if not os.path.exists(path):
            argv = ["mksquashfs", tree, path + ".new", "-noappend", "-quiet", "-no-progress", "-no-xattrs", "-all-root", "-comp", compressor, "-b", block]
            subprocess.run(argv + LEVELS[compressor] + list(more), check=True, **NULL)
            os.rename(path + ".new", path)
        with open(path, "rb") as f:  # cold means: a fresh mount, with the bytes of the image in the page cache
            while f.read(1 << 22):
                pass
        return path

    def small(self, count):
        return self.tree(f"small-{count}", lambda d, data: small_files(d, count, data, count * 384 // 50000 or 1))

    def sparse(self, count):
        return self.tree(f"sparse-{count}", lambda d, data: sparse_files(d, count, data))

    def large(self, mib):
        return self.tree(f"large-{mib}", lambda d, data: large_file(d + "/large", data, mib))

    def named(self, name, files, mib):
        """The tree of that name in the tables, for so many files or MiB."""
        return {"small": lambda: self.small(files), "sparse": lambda: self.sparse(files // 4), "large": lambda: self.large(mib)}[name]()

    def tiny(self, count):
        return self.tree(f"tiny-{count}", lambda d, _: tiny_files(d, count))

    def busybox(self):
        return self.tree("busybox", lambda d, _: busybox_tree(d))

    def debian(self):
        """A Debian root with Python, scipy and a C compiler (see `fetch_debian`), and a C project in /src."""
        def make(d, _):
            subprocess.run(["tar", "-xf", self.path("debian.tar"), "-C", d, "--no-same-owner", "--exclude=./dev/*"], check=True)
            c_project(d + "/src")
        return self.tree("debian", make)

    def fetch_debian(self):
        """Needs the network or a mirror, and minutes; to be called before the process has mounts of its own."""
        path = self.path("debian.tar")
        if os.path.exists(path):
            return True
        mode = "root" if os.getuid() == 0 else "unshare"
        lean = [f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "locale", "man")]
        # Its sources are those of this machine.
        sources = [p for p in ["/etc/apt/sources.list", *glob.glob("/etc/apt/sources.list.d/debian*")] if os.path.exists(p)]
        argv = ["mmdebstrap", "--quiet", f"--mode={mode}", "--variant=minbase", "--include=python3-scipy,gcc,libc6-dev,make", *lean, "bookworm", path + ".new.tar", *sources]
        try:
            subprocess.run(argv, check=True, env=dict(os.environ, TMPDIR="/var/tmp"), **NULL)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"missing: a Debian root ({error})")
            return False
        os.rename(path + ".new.tar", path)
        return True


def pool():
    """Bytes of this machine's own programs, libraries and texts, in an order that does not change."""
    names, parts, have = [], [], 0
    for top in ("/usr/lib/x86_64-linux-gnu", "/usr/bin", "/usr/lib/python3", "/usr/share/perl", "/usr/share/doc"):
        for d, dirs, files in os.walk(top):
            dirs.sort()
            names += [os.path.join(d, f) for f in sorted(files)]
    random.Random(1).shuffle(names)
    for name in names:
        if os.path.isfile(name) and not os.path.islink(name):
            with open(name, "rb") as f:
                parts.append(f.read(4 << 20))
            have += len(parts[-1])
            if have > 256 << 20:
                break
    return b"".join(parts)


def small_files(root, count, data, mib):
    """`count` files in a tree of directories of about twenty, small ones mostly, `mib` MiB in all."""
    rng = random.Random(2)
    sizes = [min(int(rng.lognormvariate(8, 1.4)), 4 << 20) for _ in range(count)]
    scale = (mib << 20) / sum(sizes)
    for i, size in enumerate(sizes):
        if i % 20 == 0:
            os.makedirs(os.path.dirname(small_path(root, i)))
        size = int(size * scale)
        start = rng.randrange(len(data) - size - 1)
        with open(small_path(root, i), "wb") as f:
            f.write(data[start:start + size])


def small_path(root, i):
    return f"{root}/{i // 4000:02}/{i // 400 % 10}/{i // 20 % 20:02}/file-{i:06}"


def sparse_files(root, count, data):
    """`count` directories with one small file each: what a tree costs by its directories."""
    for i in range(count):
        path = f"{root}/{i // 1000:02}/{i // 50 % 20:02}/{i}"
        os.makedirs(path)
        with open(path + "/file", "wb") as f:
            f.write(data[i * 512:i * 512 + 300 + i % 400])


def large_file(path, data, mib):
    rng = random.Random(3)
    left = mib << 20
    with open(path, "wb") as f:
        while left:
            step = min(left, rng.randrange(1 << 20, 8 << 20))
            start = rng.randrange(len(data) - step)
            left -= f.write(data[start:start + step])


def tiny_path(root, i):
    return f"{root}/{i // 10000:02}/{i // 100 % 100:02}/{i}"


def tiny_files(root, count):
    """Hundred in a directory, of which the first has content."""
    for i in range(count):
        path = tiny_path(root, i)
        if i % 100 == 0:
            os.makedirs(os.path.dirname(path))
            with open(path, "w") as f:
                f.write(str(i))
        else:
            os.mknod(path)


def busybox_tree(root):
    for name in ("bin", "dev", "etc", "home", "proc", "sys", "tmp", "usr", "var/tmp"):
        os.makedirs(os.path.join(root, name))
    shutil.copy("/bin/busybox", os.path.join(root, "bin/busybox"))
    for applet in BUSYBOX:
        os.symlink("busybox", os.path.join(root, "bin", applet))
    for name in ("passwd", "group"):
        open(os.path.join(root, "etc", name), "w").close()


HEADERS = "ctype errno fcntl float inttypes limits locale math netdb poll pthread regex semaphore signal stdint stdio stdlib string time unistd wchar"


def c_project(root, files=24):
    """A C project that is compiled into /tmp."""
    os.mkdir(root)
    includes = "".join(f"#include <{name}.h>\n" for name in HEADERS.split())
    for i in range(files):
        with open(f"{root}/{i}.c", "w") as f:
            f.write(f"{includes}double f{i}(double x) {{ char b[99]; snprintf(b, sizeof b, \"%g\", sin(x)); return atof(b) + {i}; }}\n")
    with open(f"{root}/Makefile", "w") as f:
        f.write("OBJECTS = $(patsubst %.c,/tmp/%.o,$(wildcard *.c))\n/tmp/all.so: $(OBJECTS)\n\tgcc -shared -o $@ $^ -lm\n/tmp/%.o: %.c\n\tgcc -O2 -fPIC -c -o $@ $<\n")
