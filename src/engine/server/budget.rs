//! How much a server may cache: a small share of what its cgroup may use, since what it holds is taken from the job
//! (cgroups(7); `memory.max` of version 2, `hierarchical_memory_limit` of version 1).

use std::path::Path;

use rustix::fs::Access;

/// Where cgroups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// This part of the limit, with these bounds: the driver's default, and what a few blocks of 1 MiB take.
const SHARE: u64 = 64;
const MOST_BYTES: u64 = 32 << 20;
const LEAST_BYTES: u64 = 4 << 20;

/// Bytes of decompressed data that this process may keep.
pub(super) fn cache_bytes() -> usize {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    share(limit(&own, Path::new(CGROUPS)))
}

fn share(limit: Option<u64>) -> usize {
    let bytes = limit.map_or(MOST_BYTES, |limit| limit / SHARE);
    bytes.clamp(LEAST_BYTES, MOST_BYTES) as usize
}

/// The lowest limit on memory of the cgroups in `own`, the text of /proc/self/cgroup.
fn limit(own: &str, mounted: &Path) -> Option<u64> {
    own.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
            match controllers.split(',').any(|name| name == "memory") {
                true => version_1(&mounted.join("memory"), path),
                false if controllers.is_empty() => version_2(mounted, path),
                false => None,
            }
        })
        .min()
}

/// One file tells the lowest limit on the way up.
fn version_1(mounted: &Path, path: &str) -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(mounted.join(path).join("memory.stat")).ok();
    // In a namespace of cgroups the path is seen from its root.
    let text = read(path).or_else(|| read(""))?;
    let line = |line: &str| {
        line.strip_prefix("hierarchical_memory_limit ")?
            .parse()
            .ok()
    };
    text.lines().find_map(line)
}

fn version_2(mounted: &Path, path: &str) -> Option<u64> {
    // Not so where version 1 is mounted beside it.
    let file = mounted.join("cgroup.controllers");
    rustix::fs::access(file, Access::EXISTS).ok()?;
    let at = mounted.join(path);
    at.ancestors()
        .take_while(|at| at.starts_with(mounted))
        .filter_map(|at| {
            let text = std::fs::read_to_string(at.join("memory.max")).ok()?;
            text.trim().parse().ok() // "max" is none
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
        std::fs::write(path, text).expect("write");
    }

    #[test]
    fn the_lowest_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().expect("a scratch directory");
        write(root.path(), "cgroup.controllers", "memory");
        write(root.path(), "job/memory.max", "536870912\n");
        write(root.path(), "job/step/memory.max", "max\n");
        let found = limit("0::/job/step\n", root.path());
        assert_eq!(found, Some(512 << 20));
        assert_eq!(share(found), 8 << 20);
    }

    #[test]
    fn version_1_tells_its_own() {
        let root = tempfile::tempdir().expect("a scratch directory");
        let stat = "cache 0\nhierarchical_memory_limit 1073741824\n";
        write(root.path(), "memory/job/memory.stat", stat);
        let found = limit("4:memory:/job\n0::/\n", root.path());
        assert_eq!(found, Some(1 << 30));
        assert_eq!(share(found), 16 << 20);
    }

    #[test]
    fn without_a_limit_the_default_holds_and_a_tiny_one_leaves_a_few_blocks() {
        let root = tempfile::tempdir().expect("a scratch directory");
        assert_eq!(limit("0::/\n", root.path()), None);
        assert_eq!(share(None), 32 << 20);
        assert_eq!(share(Some(9_223_372_036_854_771_712)), 32 << 20);
        assert_eq!(share(Some(1 << 20)), 4 << 20);
    }
}
