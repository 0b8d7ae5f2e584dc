//! The GPU driver's files on this host, for `--nv` and `--rocm`.
//!
//! Libraries are found in the loader's cache (`ldconfig -p`) and appear in `/.singularity.d/libs`, which the image's
//! scripts put on `LD_LIBRARY_PATH`. A host without GPUs gives nothing, silently, as the peers do.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Beginnings of library names that belong to the NVIDIA driver.
const NVIDIA: [&str; 14] = [
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
    "libOpenCL.so",
    "libnvsandboxutils.so",
    "libnvtegra",
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
    if nv && top.join("dev/nvidiactl").exists() {
        found.extend(devices(top, |name| name.starts_with("nvidia")));
        found.extend(parse_cache(&loader_cache(), &NVIDIA));
        found.extend(tools(top, &NVIDIA_TOOLS));
        let socket = Path::new("run/nvidia-persistenced/socket");
        let place = Path::new("/").join(socket);
        found.extend(top.join(socket).exists().then(|| (top.join(socket), place)));
    }
    if rocm && top.join("dev/kfd").exists() {
        found.extend(devices(top, |name| name == "kfd" || name == "dri"));
        found.extend(parse_cache(&loader_cache(), &ROCM));
        found.extend(tools(top, &ROCM_TOOLS));
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
fn parse_cache(cache: &str, names: &[&str]) -> Vec<(PathBuf, PathBuf)> {
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
        let wanted = names.iter().any(|n| name.starts_with(n)) && kind.contains(native);
        if wanted && !found.iter().any(|(_, t)| *t == target) {
            found.push((path.trim().into(), target));
        }
    }
    found
}

fn tools(top: &Path, names: &[&str]) -> Vec<(PathBuf, PathBuf)> {
    let paths = |name: &&str| {
        ["usr/bin", "opt/rocm/bin"]
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
        let found = parse_cache(cache, &NVIDIA);
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
            "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1\n\tlibamdhip64.so (libc6,x86-64) => /opt/libamdhip64.so\n"
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
                    "/usr/bin/nvidia-smi",
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
        assert!(find_below(Path::new("/no/such"), true, true, &cache).is_empty());
    }
}
