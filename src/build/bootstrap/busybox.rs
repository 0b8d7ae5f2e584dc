//! `Bootstrap: busybox`: one static program under all its names, from `MirrorURL`.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Base, Kind};
use crate::build::Settings;
use crate::build::deffile::Stage;
use crate::build::tree::Tree;
use crate::digest::Digest;
use crate::net;

/// Fetches the program.
///
/// # Errors
/// When it cannot be fetched.
pub fn prepare(stage: &Stage, settings: &Settings) -> Result<Base> {
    let Some(url) = stage.key("mirrorurl") else {
        bail!(
            "Bootstrap: busybox needs a line MirrorURL: in the header, the directory that holds busybox-ARCH"
        );
    };
    let arch = match settings.arch {
        "amd64" => "x86_64",
        "386" => "i686",
        "arm64" => "armv8l",
        "arm" => "armv7l",
        other => other,
    };
    let address = format!("{}/busybox-{arch}", url.trim_end_matches('/'));
    let what = || format!("cannot fetch {address}");
    let reference: net::Reference = address.parse().with_context(what)?;
    let path = settings
        .net()?
        .fetch(|options, cache| net::plain_file(&reference, options, cache))
        .with_context(what)?;
    let bytes = std::fs::read(&path).with_context(what)?;
    if !bytes.starts_with(b"\x7fELF") {
        bail!("{address} is no program");
    }
    Ok(Base {
        key: Some(Digest::of(&bytes).to_string()),
        kind: Kind::Busybox(path),
    })
}

/// Makes a root file system of it.
///
/// # Errors
/// When it does not run, or a file cannot be written.
pub fn unpack(program: &Path, root: &Path) -> Result<()> {
    let tree = Tree::open(root)?;
    let bytes =
        std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    tree.write(Path::new("/bin/busybox"), &bytes, 0o755)?;
    let listed = std::process::Command::new(root.join("bin/busybox"))
        .arg("--list")
        .output()
        .context("the busybox that was fetched does not run on this machine")?;
    if !listed.status.success() {
        bail!("the busybox that was fetched cannot list its programs");
    }
    for name in String::from_utf8_lossy(&listed.stdout).lines() {
        let sound =
            !name.is_empty() && !name.contains('/') && name != "busybox" && !name.starts_with('.');
        if sound {
            let link = root.join("bin").join(name);
            std::os::unix::fs::symlink("busybox", &link)
                .with_context(|| format!("cannot create {}", link.display()))?;
        }
    }
    tree.write(
        Path::new("/etc/passwd"),
        b"root:!:0:0:root:/root:/bin/sh\n",
        0o644,
    )?;
    tree.write(Path::new("/etc/group"), b"root:x:0:\n", 0o644)?;
    tree.write(Path::new("/etc/hosts"), b"127.0.0.1 localhost\n", 0o644)
}
