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
    let mut found = Vec::new();
    if nv && Path::new("/dev/nvidiactl").exists() {
        found.extend(devices(|name| name.starts_with("nvidia")));
        found.extend(libraries(&NVIDIA));
        found.extend(tools(&NVIDIA_TOOLS));
        let socket = PathBuf::from("/run/nvidia-persistenced/socket");
        found.extend(socket.exists().then(|| (socket.clone(), socket)));
    }
    if rocm && Path::new("/dev/kfd").exists() {
        found.extend(devices(|name| name == "kfd" || name == "dri"));
        found.extend(libraries(&ROCM));
        found.extend(tools(&ROCM_TOOLS));
    }
    found
}

fn devices(wanted: impl Fn(&str) -> bool) -> Vec<(PathBuf, PathBuf)> {
    let Ok(entries) = std::fs::read_dir("/dev") else {
        return Vec::new();
    };
    let wanted = |e: &std::fs::DirEntry| e.file_name().to_str().is_some_and(&wanted);
    entries
        .flatten()
        .filter(wanted)
        .map(|e| (e.path(), e.path()))
        .collect()
}

fn libraries(names: &[&str]) -> Vec<(PathBuf, PathBuf)> {
    let Some(program) = ["/sbin/ldconfig", "/usr/sbin/ldconfig"]
        .into_iter()
        .find(|p| Path::new(p).exists())
    else {
        return Vec::new();
    };
    let Ok(out) = Command::new(program)
        .arg("-p")
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    parse_cache(&String::from_utf8_lossy(&out.stdout), names)
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

fn tools(names: &[&str]) -> Vec<(PathBuf, PathBuf)> {
    let paths = |name: &&str| {
        ["/usr/bin", "/opt/rocm/bin"]
            .iter()
            .map(|d| Path::new(d).join(name))
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
}
