//! What the image server answers about single files is what the kernel would say of them.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Env, output, write};

/// Reads, writes and executes, as mode bits of the class that counts.
#[derive(Clone, Copy)]
struct Who {
    uid: u32,
    gid: u32,
    /// Root of the user namespace, to whom bits mean little.
    mighty: bool,
}

/// A file of the table: `fMODE` or `dMODE`, with `-UID-GID` when it is not root's.
struct Row {
    name: String,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Row {
    fn is_dir(&self) -> bool {
        self.name.starts_with('d')
    }

    /// What acl_permission_check and capable_wrt_inode_uidgid of the kernel say: `access` for each of r, w and x, open, and
    /// what follows from it. `read_only` is the errno of a file system that takes no writes.
    fn expected(&self, who: Who, read_only: bool) -> String {
        let class = match () {
            () if who.uid == self.uid => self.mode >> 6,
            () if who.gid == self.gid => self.mode >> 3,
            () => self.mode,
        };
        let may = |bit: u32| {
            let mighty = who.mighty && (self.is_dir() || bit != 1 || self.mode & 0o111 != 0);
            mighty || class & bit != 0
        };
        let code = |yes: bool| if yes { 0 } else { libc::EACCES };
        let write = match read_only {
            true => libc::EROFS,
            false => code(may(2)),
        };
        // A file in a directory of the table is for everybody.
        let last = code(may(1));
        let (r, x) = (code(may(4)), code(may(1)));
        format!("{} {r} {write} {x} {r} {last}", self.name)
    }
}

/// Every mode for root's files and directories, and a choice for those of others.
fn rows(others: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for kind in ["f", "d"] {
        for mode in 0..0o1000 {
            let name = format!("{kind}{mode:04o}");
            rows.push(Row {
                name,
                mode,
                uid: 0,
                gid: 0,
            });
        }
        let owners = if others {
            &[(33, 7), (7, 33), (7, 7), (33, 33)][..]
        } else {
            &[]
        };
        for (uid, gid) in owners {
            for mode in (0..0o1000).filter(|m| [0, 1, 4, 5].contains(&(m & 7)) && m & 0o222 == 0) {
                let name = format!("{kind}{mode:04o}-{uid}-{gid}");
                rows.push(Row {
                    name,
                    mode,
                    uid: *uid,
                    gid: *gid,
                });
            }
        }
    }
    rows
}

fn probe(env: &Env) -> PathBuf {
    let (source, program) = (env.path("access.c"), env.path("probe/access"));
    write(&source, include_str!("access.c"));
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    output(
        Command::new("gcc")
            .args(["-O1", "-static", "-o"])
            .arg(&program)
            .arg(&source),
    )
    .ok();
    program
}

/// A tree with the files of the table in `/p`. Owners and modes are the packer's business.
fn tree(env: &Env, rows: &[Row]) -> PathBuf {
    let tree = env.tree("tree");
    let program = probe(env);
    fs::copy(&program, tree.join("bin/access")).unwrap();
    // What executes is tiny, and ends well.
    let quick = env.path("probe/quick");
    let source = env.path("quick.c");
    write(
        &source,
        "void _start(void) { __asm__(\"syscall\" : : \"a\"(60), \"D\"(0)); }\n",
    );
    let mut gcc = Command::new("gcc");
    gcc.args(["-O1", "-nostdlib", "-static", "-o"])
        .arg(&quick)
        .arg(&source);
    output(&mut gcc).ok();
    for row in rows {
        let path = tree.join("p").join(&row.name);
        if row.is_dir() {
            write(&path.join("file"), "x");
        } else {
            fs::create_dir_all(tree.join("p")).unwrap();
            fs::copy(&quick, &path).unwrap();
        }
    }
    tree
}

fn sif(env: &Env, tree: &Path, rows: &[Row]) -> PathBuf {
    let mut pseudo = String::new();
    for row in rows {
        let (
            kind,
            Row {
                name,
                mode,
                uid,
                gid,
            },
        ) = ("m", row);
        writeln!(pseudo, "p/{name} {kind} {mode:o} {uid} {gid}").unwrap();
    }
    let list = env.path("pseudo");
    write(&list, &pseudo);
    // Owners come from the list, so `-all-root` may not be given: the tree is made root's by it, too.
    let squashfs = env.path("image.squashfs");
    let made = Command::new("mksquashfs")
        .arg(tree)
        .arg(&squashfs)
        .args(["-quiet", "-no-progress", "-noappend", "-pf"])
        .arg(&list)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let sif = env.path("image.sif");
    common::wrap(&squashfs, &sif, &[]);
    sif
}

/// Runs the probe and compares each line.
#[track_caller]
fn check(env: &Env, image: &Path, options: &[&str], become_other: &[&str], expected: &[String]) {
    let out = env.run(
        [
            &["exec"],
            options,
            &[image.to_str().unwrap(), "access", "/p"],
            become_other,
        ]
        .concat(),
    );
    let said: Vec<&str> = out.ok().lines().collect();
    let lines = |lines: &mut dyn Iterator<Item = String>| -> BTreeMap<String, String> {
        let pair = |line: String| {
            let (name, rest) = line.split_once(' ').unwrap();
            (name.to_owned(), rest.to_owned())
        };
        lines.map(pair).collect()
    };
    let said = lines(&mut said.iter().map(|l| (*l).to_owned()));
    let expected = lines(&mut expected.iter().cloned());
    assert_eq!(said.len(), expected.len());
    let wrong: Vec<_> = expected
        .iter()
        .filter(|(name, codes)| said.get(*name) != Some(codes))
        .map(|(name, codes)| format!("{name}: {:?} and not {codes:?}", said.get(name)))
        .collect();
    assert!(
        wrong.is_empty(),
        "{options:?}: {} lines, such as {:#?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
}

#[test]
fn what_may_be_done_with_a_file_is_what_its_mode_says() {
    let env = Env::new();
    let rows = rows(false);
    let tree = tree(&env, &rows);
    let image = sif(&env, &tree, &rows);
    // Without other ids all files are the caller's, and without privileges.
    let own = Who {
        uid: 0,
        gid: 0,
        mighty: false,
    };
    let root = Who {
        mighty: true,
        ..own
    };
    let expect = |who, read_only| -> Vec<String> {
        rows.iter()
            .map(|row| row.expected(who, read_only))
            .collect()
    };
    let layer = env.path("layer");
    fs::create_dir(&layer).unwrap();
    let layer = layer.to_str().unwrap();
    check(&env, &image, &[], &[], &expect(own, true));
    check(
        &env,
        &image,
        &["--writable-tmpfs"],
        &[],
        &expect(own, false),
    );
    check(
        &env,
        &image,
        &["--overlay", layer],
        &[],
        &expect(own, false),
    );
    check(
        &env,
        &image,
        &["--overlay", &format!("{layer}:ro")],
        &[],
        &expect(own, true),
    );
    check(&env, &image, &["--fakeroot"], &[], &expect(root, true));
    check(
        &env,
        &image,
        &["--fakeroot", "--ignore-subuid"],
        &[],
        &expect(root, true),
    );
    check(
        &env,
        &image,
        &["--fakeroot", "--writable-tmpfs"],
        &[],
        &expect(root, false),
    );
    // A directory of the caller's with the same modes.
    for row in &rows {
        let mode = fs::Permissions::from_mode(row.mode);
        fs::set_permissions(tree.join("p").join(&row.name), mode).unwrap();
    }
    check(&env, &tree, &[], &[], &expect(own, true));
    for row in &rows {
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(tree.join("p").join(&row.name), mode).unwrap();
    }
}

#[test]
fn with_subordinate_ids_owner_and_group_count() {
    let env = Env::new();
    let rows = rows(true);
    let image = sif(&env, &tree(&env, &rows), &rows);
    for (uid, gid) in [(33, 33), (33, 500), (500, 33), (500, 500), (0, 500)] {
        let who = Who {
            uid,
            gid,
            mighty: uid == 0,
        };
        let expected: Vec<String> = rows.iter().map(|row| row.expected(who, true)).collect();
        let ids = [uid.to_string(), gid.to_string()];
        check(
            &env,
            &image,
            &["--fakeroot"],
            &[&ids[0], &ids[1]],
            &expected,
        );
    }
}

#[test]
fn a_name_that_cannot_be_is_too_long() {
    let env = Env::new();
    let image = env.image();
    for (len, cause) in [
        (255, "No such file"),
        (256, "File name too long"),
        (300, "File name too long"),
    ] {
        let name = format!("/opt/{}", "n".repeat(len));
        let out = env.run(["exec", image.to_str().unwrap(), "ls", &name]);
        assert!(out.stderr.contains(cause), "{len}: {out}");
    }
}

/// The image's path, by every length that matters: mount tables take less than a path may have.
#[test]
fn an_image_is_run_from_any_path() {
    let env = Env::new();
    let image = env.image();
    let base = env.path("x").to_str().unwrap().len();
    for len in [base + 40, 254, 255, 256, 257, 300, 1000, 4000, 4090, 4095] {
        let deep = path_of(&env, len);
        fs::create_dir_all(deep.parent().unwrap()).unwrap();
        fs::hard_link(&image, &deep).unwrap();
        let out = env.run(["exec", deep.to_str().unwrap(), "cat", "/opt/hello.txt"]);
        assert_eq!(out.ok(), "hello", "{len}");
        fs::remove_file(&deep).unwrap();
    }
    let odd = env.path("odd");
    fs::create_dir(&odd).unwrap();
    let names: [&[u8]; 5] = [
        b"a,b=c",
        b"with blank",
        b"line\nfeed",
        b"\xff\xfe",
        b"back\\slash",
    ];
    for name in names {
        use std::os::unix::ffi::OsStrExt as _;
        let path = odd.join(std::ffi::OsStr::from_bytes(
            &[name, "w".repeat(240).as_bytes()].concat(),
        ));
        fs::hard_link(&image, &path).unwrap();
        let out = env.run([
            std::ffi::OsStr::new("exec"),
            path.as_os_str(),
            "true".as_ref(),
        ]);
        out.ok();
    }
    let link = env.path("link.sif");
    let deep = path_of(&env, 3000);
    fs::hard_link(&image, &deep).unwrap();
    symlink(&deep, &link).unwrap();
    env.run(["exec", link.to_str().unwrap(), "true"]).ok();
}

/// A path in the scratch directory of exactly this length.
fn path_of(env: &Env, len: usize) -> PathBuf {
    let mut path = env
        .path("")
        .to_str()
        .unwrap()
        .trim_end_matches('/')
        .to_owned();
    while len - path.len() > 220 {
        path.push('/');
        path.push_str(&"d".repeat(200));
    }
    let rest = len - path.len() - 1;
    assert!((1..=255).contains(&rest), "{rest}");
    PathBuf::from(format!("{path}/{}", "i".repeat(rest)))
}

#[test]
fn a_relative_path_may_lead_from_where_no_absolute_one_does() {
    let env = Env::new();
    let image = env.image();
    let script = "set -e
        n=$(printf '%0200d' 0); i=0
        while [ $i -lt 25 ]; do mkdir $n; cd -P $n; i=$((i+1)); done
        ln \"$IMAGE\" i.sif; \"$CAPSID\" exec i.sif cat /opt/hello.txt";
    let mut command = env.command_as(Path::new("/bin/bash"), ["-c", script]);
    command
        .env("IMAGE", &image)
        .env("CAPSID", env!("CARGO_BIN_EXE_capsid"));
    assert_eq!(output(&mut command).ok(), "hello");
}
