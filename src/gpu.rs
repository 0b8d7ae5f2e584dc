//! The GPU driver's files on this host, for `--nv` and `--rocm`.
//!
//! Libraries are found in the loader's cache (`ldconfig -p`) and appear in `/.singularity.d/libs`, which the image's
//! scripts put on `LD_LIBRARY_PATH`, behind the image's own. A host without a driver gives nothing, silently, as the peers do;
//! one with a driver and without a GPU, where people link their programs, gives the libraries. What belongs to a driver the
//! site's `nvliblist.conf` and `rocmliblist.conf` say, where there are any.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Beginnings of names of libraries that belong to the NVIDIA driver and to nobody else.
const NVIDIA: [&str; 17] = [
    "libcuda.so",
    "libcudadebugger.so",
    "libnvidia-",
    "libnvcuvid.so",
    "libnvoptix.so",
    "libGLX_nvidia",
    "libEGL_nvidia",
    "libGLESv1_CM_nvidia",
    "libGLESv2_nvidia",
    "libvdpau_nvidia",
    "libnvrm",
    "libnvsandboxutils.so",
    "libnvtegra",
    "libnvcu",
    "libnvos",
    "libnvsci",
    "libnvsoc",
];
/// Libraries that come with every driver: they find the one of the vendor.
const NEUTRAL: [&str; 10] = [
    "libOpenCL.so",
    "libGL.so",
    "libEGL.so",
    "libGLX.so",
    "libGLdispatch.so",
    "libOpenGL.so",
    "libGLESv1_CM.so",
    "libGLESv2.so",
    "libEGL_installertest.so",
    "libGLX_installertest.so",
];
/// By which those find the NVIDIA driver.
const NVIDIA_FILES: [&str; 9] = [
    "/usr/share/glvnd/egl_vendor.d/10_nvidia.json",
    "/usr/share/vulkan/icd.d/nvidia_icd.json",
    "/usr/share/vulkan/icd.d/nvidia_layers.json",
    "/usr/share/vulkan/implicit_layer.d/nvidia_layers.json",
    "/usr/share/egl/egl_external_platform.d/15_nvidia_gbm.json",
    "/usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json",
    "/usr/share/nvidia/nvoptix.bin",
    "/etc/vulkan/icd.d/nvidia_icd.json",
    "/etc/OpenCL/vendors/nvidia.icd",
];
/// Where a site's lists are, the first counts.
const SITE: [&str; 4] = [
    "etc/apptainer",
    "usr/local/etc/apptainer",
    "etc/singularity",
    "usr/local/etc/singularity",
];
/// The same for AMD's ROCm.
const ROCM: [&str; 12] = [
    "libamd",
    "libhip",
    "libhsa-runtime64",
    "libhsakmt",
    "libroc",
    "libRocm",
    "libdrm.so",
    "libdrm_amdgpu",
    "libMIOpen",
    "libnuma.so",
    "libOpenCL.so",
    "libelf.so",
];
const NVIDIA_TOOLS: [&str; 5] = [
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
];
const ROCM_TOOLS: [&str; 2] = ["rocm-smi", "rocminfo"];

/// What belongs to a driver.
struct List {
    /// Beginnings of names of libraries.
    libraries: Vec<String>,
    /// Names of programs.
    programs: Vec<String>,
    /// Absolute paths.
    files: Vec<PathBuf>,
}

impl List {
    /// The site's list of this name, else ours.
    fn read(top: &Path, name: &str, libraries: &[&str], programs: &[&str], files: &[&str]) -> List {
        let owned = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
        let texts = SITE.iter().map(|dir| top.join(dir).join(name));
        let mut texts = texts.filter(|file| file.is_file());
        match texts.find_map(|file| std::fs::read_to_string(file).ok()) {
            Some(text) => List::parse(&text),
            None => List {
                libraries: owned(libraries),
                programs: owned(programs),
                files: files.iter().map(PathBuf::from).collect(),
            },
        }
    }

    /// A name or an absolute path on each line; a name with `.so` is a library's.
    fn parse(text: &str) -> List {
        let (mut libraries, mut programs, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for line in text.lines() {
            match line.split('#').next().unwrap_or_default().trim() {
                "" => {}
                path if path.starts_with('/') => files.push(path.into()),
                name if name.contains(".so") => libraries.push(name.to_owned()),
                name => programs.push(name.to_owned()),
            }
        }
        List {
            libraries,
            programs,
            files,
        }
    }
}

/// What to bind: path of the host, place inside.
pub fn find(nv: bool, rocm: bool) -> Vec<(PathBuf, PathBuf)> {
    if !nv && !rocm {
        return Vec::new();
    }
    find_below(Path::new("/"), nv, rocm, &loader_cache)
}

/// The same on a machine whose files lie below `top`.
fn find_below(
    top: &Path,
    nv: bool,
    rocm: bool,
    loader_cache: &dyn Fn() -> String,
) -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    if nv {
        let all: Vec<&str> = NVIDIA.iter().chain(&NEUTRAL).copied().collect();
        let list = List::read(top, "nvliblist.conf", &all, &NVIDIA_TOOLS, &NVIDIA_FILES);
        found.extend(devices(top, |name| name.starts_with("nvidia")));
        let libraries = parse_cache(&loader_cache(), &list.libraries);
        let is_drivers = |(_, place): &(PathBuf, PathBuf)| {
            let name = place.file_name().unwrap_or_default().to_string_lossy();
            NVIDIA.iter().any(|n| name.starts_with(n))
        };
        // The others alone are those of the host's own desktop.
        if libraries.iter().any(is_drivers) {
            found.extend(libraries);
            found.extend(tools(top, &list.programs));
            found.extend(files(top, &list.files));
        }
        let socket = Path::new("run/nvidia-persistenced/socket");
        let place = Path::new("/").join(socket);
        found.extend(top.join(socket).exists().then(|| (top.join(socket), place)));
    }
    if rocm && top.join("dev/kfd").exists() {
        found.extend(devices(top, |name| name == "kfd" || name == "dri"));
        let list = List::read(top, "rocmliblist.conf", &ROCM, &ROCM_TOOLS, &[]);
        found.extend(parse_cache(&loader_cache(), &list.libraries));
        found.extend(tools(top, &list.programs));
        found.extend(files(top, &list.files));
    }
    found
}

fn devices(top: &Path, wanted: impl Fn(&str) -> bool) -> Vec<(PathBuf, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(top.join("dev")) else {
        return Vec::new();
    };
    let wanted = |e: &std::fs::DirEntry| e.file_name().to_str().is_some_and(&wanted);
    let mut found: Vec<_> = entries
        .flatten()
        .filter(wanted)
        .map(|e| (e.path(), Path::new("/dev").join(e.file_name())))
        .collect();
    found.sort();
    found
}

/// What `ldconfig -p` prints; empty where there is none.
fn loader_cache() -> String {
    let Some(program) = ["/sbin/ldconfig", "/usr/sbin/ldconfig"]
        .into_iter()
        .find(|p| Path::new(p).exists())
    else {
        return String::new();
    };
    let out = Command::new(program)
        .arg("-p")
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned())
        .unwrap_or_default()
}

/// Lines like `libcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1`; the first of a name is the one the loader takes.
fn parse_cache(cache: &str, names: &[String]) -> Vec<(PathBuf, PathBuf)> {
    let native = if cfg!(target_arch = "x86_64") {
        "x86-64"
    } else {
        ""
    };
    let mut found: Vec<(PathBuf, PathBuf)> = Vec::new();
    for line in cache.lines() {
        let Some((head, path)) = line.split_once(" => ") else {
            continue;
        };
        let Some((name, kind)) = head.trim().split_once(' ') else {
            continue;
        };
        let target = Path::new("/.singularity.d/libs").join(name);
        let wanted = names.iter().any(|n| name.starts_with(n.as_str())) && kind.contains(native);
        if wanted && !found.iter().any(|(_, t)| *t == target) {
            found.push((path.trim().into(), target));
        }
    }
    found
}

/// Files that keep their places.
fn files(top: &Path, paths: &[PathBuf]) -> Vec<(PathBuf, PathBuf)> {
    let below = |path: &PathBuf| top.join(path.strip_prefix("/").unwrap_or(path));
    let found = paths.iter().map(|path| (below(path), path.clone()));
    found.filter(|(path, _)| path.exists()).collect()
}

fn tools(top: &Path, names: &[String]) -> Vec<(PathBuf, PathBuf)> {
    let paths = |name: &String| {
        ["usr/bin", "usr/local/bin", "usr/sbin", "opt/rocm/bin"]
            .iter()
            .map(|d| top.join(d).join(name))
            .find(|p| p.exists())
            .map(|p| (p, Path::new("/usr/bin").join(name)))
    };
    names.iter().filter_map(paths).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_cache_gives_the_first_native_library_of_a_name() {
        let cache = "3 libs found\n\tlibcuda.so.1 (libc6) => /usr/lib32/libcuda.so.1\n\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1\n\
                     \tlibcuda.so.1 (libc6,x86-64) => /opt/libcuda.so.1\n\tlibc.so.6 (libc6,x86-64) => /lib/libc.so.6\n";
        let found = parse_cache(cache, &NVIDIA.map(str::to_owned));
        if cfg!(target_arch = "x86_64") {
            assert_eq!(
                found,
                [(
                    PathBuf::from("/usr/lib/libcuda.so.1"),
                    PathBuf::from("/.singularity.d/libs/libcuda.so.1")
                )]
            );
        }
    }

    #[test]
    fn devices_libraries_and_tools_of_a_node_are_bound() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        for file in [
            "usr/share/glvnd/egl_vendor.d/10_nvidia.json",
            "usr/share/glvnd/egl_vendor.d/50_mesa.json",
            "dev/nvidiactl",
            "dev/nvidia0",
            "dev/null",
            "dev/kfd",
            "usr/bin/nvidia-smi",
            "opt/rocm/bin/rocminfo",
            "run/nvidia-persistenced/socket",
        ] {
            let path = top.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let cache = || {
            "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1\n\tlibGL.so.1 (libc6,x86-64) => /usr/lib/libGL.so.1\n\tlibGLU.so.1 (libc6,x86-64) => /usr/lib/libGLU.so.1\n\tlibamdhip64.so (libc6,x86-64) => /opt/libamdhip64.so\n"
                .to_owned()
        };
        let places = |nv, rocm| -> Vec<String> {
            let found = find_below(top, nv, rocm, &cache);
            let places = found
                .into_iter()
                .map(|(_, place)| place.display().to_string());
            places.collect()
        };
        if cfg!(target_arch = "x86_64") {
            assert_eq!(
                places(true, false),
                [
                    "/dev/nvidia0",
                    "/dev/nvidiactl",
                    "/.singularity.d/libs/libcuda.so.1",
                    "/.singularity.d/libs/libGL.so.1",
                    "/usr/bin/nvidia-smi",
                    "/usr/share/glvnd/egl_vendor.d/10_nvidia.json",
                    "/run/nvidia-persistenced/socket",
                ]
            );
            assert_eq!(
                places(false, true),
                [
                    "/dev/kfd",
                    "/.singularity.d/libs/libamdhip64.so",
                    "/usr/bin/rocminfo"
                ]
            );
        }
        // A node without a GPU that has the driver: people link their programs there.
        std::fs::remove_file(top.join("dev/nvidiactl")).unwrap();
        std::fs::remove_file(top.join("dev/nvidia0")).unwrap();
        if cfg!(target_arch = "x86_64") {
            let found = places(true, false);
            assert_eq!(found[0], "/.singularity.d/libs/libcuda.so.1", "{found:?}");
        }
        // The site's own list is the whole list.
        let list = "# ours\nlibcuda.so # driver\n\nrocminfo\n/usr/share/glvnd/egl_vendor.d/50_mesa.json\n/no/such\n";
        std::fs::create_dir_all(top.join("etc/apptainer")).unwrap();
        std::fs::write(top.join("etc/apptainer/nvliblist.conf"), list).unwrap();
        if cfg!(target_arch = "x86_64") {
            assert_eq!(
                places(true, false),
                [
                    "/.singularity.d/libs/libcuda.so.1",
                    "/usr/bin/rocminfo",
                    "/usr/share/glvnd/egl_vendor.d/50_mesa.json",
                    "/run/nvidia-persistenced/socket",
                ]
            );
        }
        let desktop = || "\tlibGL.so.1 (libc6,x86-64) => /usr/lib/libGL.so.1\n".to_owned();
        assert!(find_below(Path::new("/no/such"), true, true, &desktop).is_empty());
    }
}
