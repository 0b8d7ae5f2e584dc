//! The images with every kind of entry that the real Apptainer built, against the list that belongs to them, where they lie
//! beside the checkout (`../shared/fixtures`); elsewhere this says that it did nothing.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

const COMPARE: &str = r#"
import hashlib, json, os, stat, sys
root, manifest = sys.argv[1:]
wrong = []
for line in open(manifest):
    entry = json.loads(line)
    if "many_files" in entry:
        digest, count = hashlib.sha256(), 0
        top = os.path.join(root, "data/many")
        for directory, names, files in os.walk(top):
            names.sort()
            for name in sorted(files):
                path = os.path.join(directory, name)
                digest.update(os.path.relpath(path, root).encode() + b"\0" + open(path, "rb").read() + b"\0")
                count += 1
        if count != entry["many_files"] or digest.hexdigest() != entry["sha256_of_relpath_NUL_content_NUL_in_walk_order"]:
            wrong.append(("many", count, digest.hexdigest()))
        continue
    name = entry["path"].encode("ascii").decode("unicode_escape").encode("utf-8", "surrogateescape")
    path = os.path.join(root.encode(), name)
    st = os.lstat(path)
    seen = {"mode": "%06o" % st.st_mode}
    if stat.S_ISREG(st.st_mode):
        seen["sha256"] = hashlib.sha256(open(path, "rb").read()).hexdigest()
        seen["size"] = st.st_size
        seen["nlink"] = st.st_nlink
    if stat.S_ISLNK(st.st_mode):
        target = os.readlink(path).decode("utf-8", "surrogateescape")
        seen["target"] = target
    if "xattr_hex" in entry:
        seen["xattr_hex"] = {n: os.getxattr(path, n, follow_symlinks=False).hex() for n in os.listxattr(path, follow_symlinks=False)}
    seen["mtime"] = int(st.st_mtime)
    for key, value in seen.items():
        if key in entry and entry[key] != value:
            wrong.append((entry["path"], key, value, entry[key]))
sys.exit("\n".join(map(repr, wrong)) or 0)
"#;

#[test]
fn every_entry_is_as_the_list_says() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures");
    if !fixtures.is_dir() {
        eprintln!(
            "SKIPPED: there are no images of the real Apptainer in {}",
            fixtures.display()
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("mnt")).unwrap();
    std::fs::write(dir.path().join("compare.py"), COMPARE).unwrap();
    for image in ["many-frag.sif", "many-nofrag.sif", "many-zstd1m.sif"] {
        let script = "\"$0\" -o offset=36864 \"$1\" mnt && python3 compare.py mnt \"$2\"; status=$?; umount mnt; exit $status";
        let out = Command::new("unshare")
            .args([
                "-Urm",
                "sh",
                "-c",
                script,
                env!("CARGO_BIN_EXE_capsid-fuse"),
            ])
            .args([fixtures.join(image), fixtures.join("many.manifest.jsonl")])
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{image}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
}
