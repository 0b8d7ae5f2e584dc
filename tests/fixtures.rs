//! Images that the real Apptainer built, where they lie beside the checkout (`../shared/fixtures`); elsewhere this says that
//! it did nothing. Images of every kind made by the tests themselves are in the other files.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{Env, Output, output};

/// The program's own name, and those of the peers.
const NAMES: [&str; 3] = ["capsid", "apptainer", "singularity"];

fn each(check: impl Fn(&dyn Fn(&str, &[&str]) -> Output)) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    if !fixtures.is_dir() {
        eprintln!(
            "SKIPPED: there are no images of the real Apptainer in {}",
            fixtures.display()
        );
        return;
    }
    let env = Env::new();
    for name in NAMES {
        let link = env.path(name);
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_capsid"), &link).unwrap();
        check(&|image, words| {
            // The image takes the place of `IMAGE`.
            let image: PathBuf = fixtures.join(image);
            let words = words.iter().map(|w| {
                if *w == "IMAGE" {
                    image.to_str().unwrap()
                } else {
                    w
                }
            });
            output(&mut env.command_as(&link, words))
        });
    }
    common::wait_until("image servers to end", || {
        std::fs::read_dir(env.runtime()).map_or(true, |mut d| d.next().is_none())
    });
}

#[test]
fn busybox_images_of_each_compressor_run() {
    each(|run| {
        for image in [
            "busybox-gzip.sif",
            "busybox-zstd.sif",
            "busybox-lz4.sif",
            "busybox-xz.sif",
            "signed.sif",
            "overlay.sif",
        ] {
            let out = run(image, &["run", "IMAGE", "x", "y"]);
            assert_eq!(
                out.stdout, "runscript args: x y\ncount: 2\nGREETING=hello from environment\n",
                "{out}"
            );
            let env = run(image, &["exec", "IMAGE", "env"]);
            for line in [
                "GREETING=hello from environment",
                "PATH_EXTRA=/opt/extra",
                "LC_ALL=C",
                "FROM_POST=from post",
            ] {
                assert!(env.ok().lines().any(|l| l == line), "{line}: {env}");
            }
            let files = run(
                image,
                &[
                    "exec",
                    "IMAGE",
                    "sh",
                    "-c",
                    "cat /opt/hello.txt; find /opt/data -type f | sort; ls /srv/made-by-post",
                ],
            );
            assert_eq!(files.ok(), "hello file\n/opt/data/a\n/opt/data/sub/b\nnote");
        }
        run("busybox-lzo.sif", &["exec", "IMAGE", "true"]).fatal(&["lzo", "not supported"]);
        assert_eq!(
            run("bb-base.sif", &["exec", "IMAGE", "echo", "bare"]).ok(),
            "bare"
        );
    });
}

#[test]
fn scif_applications_run() {
    each(|run| {
        assert_eq!(
            run("scif.sif", &["run", "--app", "foo", "IMAGE", "a", "b"]).ok(),
            "RUNNING FOO args=a b\nfoo-tool one two"
        );
        assert_eq!(run("scif.sif", &["run", "--app", "bar", "IMAGE"]).status, 7);
        let out = run("scif.sif", &["run", "--app", "nosuch", "IMAGE"]);
        assert_eq!(
            (out.status, out.stdout.trim()),
            (1, "Could not locate the container application: nosuch")
        );
        let path = run(
            "scif.sif",
            &["exec", "--app", "foo", "IMAGE", "sh", "-c", "echo $PATH"],
        );
        assert!(
            path.ok().starts_with("/scif/apps/foo/bin:/scif/apps/foo:"),
            "{path}"
        );
    });
}

#[test]
fn oci_image_runs_entrypoint_and_command() {
    each(|run| {
        let out = run("oci.sif", &["run", "IMAGE"]);
        assert!(
            out.ok()
                .contains("arg: [fixed arg]\narg: [echo]\narg: [default"),
            "{out}"
        );
        let out = run("oci.sif", &["run", "IMAGE", "my", "words"]);
        assert!(
            out.ok()
                .ends_with("arg: [fixed arg]\narg: [my]\narg: [words]"),
            "{out}"
        );
        let env = run(
            "oci.sif",
            &[
                "exec",
                "IMAGE",
                "sh",
                "-c",
                "echo $OCI_ENV; id -u; test -e /bin/zcat || ls -d /mnt/layer2",
            ],
        );
        assert_eq!(
            env.ok(),
            format!("oci value\n{}\n/mnt/layer2", nix::unistd::getuid())
        );
    });
}

#[test]
fn image_without_a_shell_runs_its_programs() {
    each(|run| {
        for image in ["noshell.sif", "noshell2.sif"] {
            assert_eq!(run(image, &["exec", "IMAGE", "/true"]).status, 0);
            assert!(
                run(image, &["exec", "IMAGE", "/hello", "a", "b"])
                    .ok()
                    .contains('a')
            );
            assert_eq!(run(image, &["run", "IMAGE"]).status, 255);
        }
    });
}

#[test]
fn embedded_overlay_is_seen() {
    each(|run| {
        assert_eq!(
            run(
                "overlay.sif",
                &["exec", "IMAGE", "cat", "/opt/overlay-note"]
            )
            .ok(),
            "from embedded overlay"
        );
    });
}

#[test]
fn images_say_what_their_builder_wrote_down() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    each(|run| {
        for image in ["busybox-gzip.sif", "scif.sif", "oci.sif", "noshell2.sif"] {
            let out = run(image, &["inspect", "--all", "IMAGE"]);
            let ours: serde_json::Value = serde_json::from_str(out.ok()).unwrap();
            let file = std::fs::File::open(fixtures.join(image)).unwrap();
            let sif = capsid::sif::Sif::read(&file).unwrap();
            let noted = sif
                .objects
                .iter()
                .find(|o| o.data_type == capsid::sif::DataType::GenericJson)
                .unwrap();
            let mut text = vec![0; usize::try_from(noted.len_bytes).unwrap()];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut text, noted.offset_bytes)
                .unwrap();
            let theirs: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(ours, theirs, "{image}");
        }
    });
}
