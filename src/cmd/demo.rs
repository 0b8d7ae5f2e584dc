//! `capsid demo`: shows on a fresh machine, without network, registry or image, that containers work here.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::build::pack;
use crate::cache::DraftDirectory;
use crate::engine::sys;
use crate::engine::wait::Deferred;
use crate::host::go_arch;
use crate::sif::Stamp;
use crate::{exit, metadir, say};

/// No options.
#[derive(clap::Args, Debug)]
pub struct DemoArgs {}

/// What the image gets of the machine, beside the shell: what is there of it.
const PROGRAMS: [&str; 7] = ["cat", "id", "ls", "ps", "sleep", "true", "uname"];

const STARTSCRIPT: &str = "#!/bin/sh\necho \"the service is up\"\nwhile :; do sleep 3600; done\n";
const RUNSCRIPT: &str = "#!/bin/sh\necho \"This is the image's runscript; it got: $*\"\n";

/// Makes an image of the machine's own shell, runs it, and removes it.
///
/// # Errors
/// When something of it does not work: then `capsid doctor` says more.
pub fn run(_args: &DemoArgs) -> Result<u8> {
    let mut signals = Deferred::new()?;
    let scratch = DraftDirectory::new(&std::env::temp_dir())?;
    let image = scratch.path().join("demo.sif");
    let start = Instant::now();
    let size = make_image(scratch.path(), &image)?;
    say::out(format_args!(
        "made demo.sif of this machine's shell, {} KiB, in {} ms\n",
        size >> 10,
        start.elapsed().as_millis()
    ))?;
    let name = format!("demo-{}", std::process::id());
    let joined = format!("instance://{name}");
    let shown: [&[&str]; 9] = [
        &[
            "exec",
            "demo.sif",
            "sh",
            "-c",
            "echo hello from the container",
        ],
        &["exec", "demo.sif", "id"],
        &["run", "demo.sif", "an argument"],
        &[
            "exec",
            "--bind",
            "/etc:/from/the/host:ro",
            "demo.sif",
            "ls",
            "/from/the/host/hostname",
        ],
        &[
            "exec",
            "--fakeroot",
            "--writable-tmpfs",
            "demo.sif",
            "sh",
            "-c",
            "echo written > /new; cat /new; id -u",
        ],
        &[
            "instance",
            "start",
            "--ready-log",
            "is up",
            "--wait",
            "demo.sif",
            &name,
        ],
        &["exec", &joined, "sh", "-c", "echo inside, $$ is my number"],
        &["instance", "logs", &name],
        &["instance", "stop", &name],
    ];
    let service = Service(&name);
    for words in shown {
        if let Some(signal) = signals.came() {
            bail!("ended by {signal}");
        }
        step(scratch.path(), words)?;
    }
    drop(service);
    say::out(format_args!(
        "\nEverything works. The image is removed again; its server ends by itself in a few seconds.\n"
    ))?;
    Ok(exit::OK)
}

/// Runs ourselves, as the person would, and says how long it took.
fn step(directory: &Path, words: &[&str]) -> Result<()> {
    let quoted = |w: &&str| {
        if w.contains([' ', ';', '>', '$']) {
            format!("'{w}'")
        } else {
            (*w).to_owned()
        }
    };
    say::out(format_args!(
        "\n$ capsid {}\n",
        words.iter().map(quoted).collect::<Vec<_>>().join(" ")
    ))?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let start = Instant::now();
    let mut command = Command::new(&program);
    command.args(words).current_dir(directory);
    sys::end_with_us(&mut command);
    let status = command.status().context("cannot start capsid")?;
    if !status.success() {
        bail!("this step failed ({status}): see capsid doctor for what this machine lacks");
    }
    say::out(format_args!(
        "({:.1} ms)\n",
        start.elapsed().as_secs_f64() * 1000.0
    ))?;
    Ok(())
}

/// The demo's instance, which ends with this value if it has not before.
struct Service<'a>(&'a str);

impl Drop for Service<'_> {
    fn drop(&mut self) {
        if let Ok(program) = std::env::current_exe() {
            let mut command = Command::new(program);
            command.args(["-s", "instance", "stop", "-F", self.0]);
            sys::end_with_us(&mut command);
            let null = std::process::Stdio::null;
            // It has usually ended, and there is nothing to stop.
            let _ = command.stdout(null()).stderr(null()).status();
        }
    }
}

/// Bytes of the image.
fn make_image(scratch: &Path, image: &Path) -> Result<u64> {
    let root = scratch.join("tree");
    let contents = metadir::Contents {
        definition: "bootstrap: scratch\n".into(),
        environment: "export GREETING=hello".into(),
        runscript: Some(RUNSCRIPT.into()),
        startscript: Some(STARTSCRIPT.into()),
        ..metadir::Contents::default()
    };
    metadir::write(&root, &contents)?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")
        .context("cannot write the image's passwd")?;
    fs::write(root.join("etc/group"), "root:x:0:\n").context("cannot write the image's group")?;
    install(Path::new("/bin/sh"), &root.join("bin/sh"), &root)?;
    for name in PROGRAMS {
        if let Some(program) = ["/bin", "/usr/bin"]
            .iter()
            .map(|d| Path::new(d).join(name))
            .find(|p| p.exists())
        {
            install(&program, &root.join("bin").join(name), &root)?;
        }
    }
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let stamp = Stamp {
        time_s: i64::try_from(seconds).unwrap_or(0),
        identity: uuid::Uuid::new_v4().into_bytes(),
    };
    let arch = go_arch(std::env::consts::ARCH);
    pack::sif(&root, &contents.definition, arch, image, stamp)?;
    Ok(fs::metadata(image).context("cannot read the image")?.len())
}

/// Copies a program and the libraries that it needs, these to the paths at which its loader looks for them.
fn install(program: &Path, target: &Path, root: &Path) -> Result<()> {
    copy(program, target)?;
    for library in libraries(program)? {
        let place = root.join(library.strip_prefix("/").unwrap_or(&library));
        if !place.exists() {
            copy(&library, &place)?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let what = || format!("cannot copy {} to {}", from.display(), to.display());
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(what)?;
    }
    fs::copy(from, to).with_context(what)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).with_context(what)
}

/// The files that the machine's loader maps for a program: asked of the loader itself (`LD_TRACE_LOADED_OBJECTS`, `ld.so(8)`).
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut head = Vec::new();
    let what = || format!("cannot read {}", program.display());
    std::io::Read::read_to_end(
        &mut std::io::Read::take(fs::File::open(program).with_context(what)?, 4096),
        &mut head,
    )
    .with_context(what)?;
    let Some(loader) = interpreter(&head) else {
        return Ok(Vec::new());
    };
    let listed = Command::new(&loader)
        .arg("--list")
        .arg(program)
        .output()
        .with_context(|| format!("cannot run {}", loader.display()))?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut found: Vec<PathBuf> = text
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect();
    found.push(loader);
    Ok(found)
}

/// The path of the loader, from the program headers in a 64-bit program's first page (`PT_INTERP`, `elf(5)`).
fn interpreter(head: &[u8]) -> Option<PathBuf> {
    const PT_INTERP: u64 = 3;
    const ELF64: &[u8] = b"\x7fELF\x02";
    let number = |at: usize, len: usize| {
        let bytes = head.get(at..at.checked_add(len)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte)),
        )
    };
    let index = |number: u64| usize::try_from(number).ok();
    if !head.starts_with(ELF64) {
        return None;
    }
    let (table, size, count) = (
        index(number(32, 8)?)?,
        index(number(54, 2)?)?,
        index(number(56, 2)?)?,
    );
    let mut headers = (0..count).filter_map(|i| table.checked_add(i * size));
    let header = headers.find(|at| number(*at, 4) == Some(PT_INTERP))?;
    let (start, len) = (
        index(number(header + 8, 8)?)?,
        index(number(header + 32, 8)?)?,
    );
    let path = head
        .get(start..start.checked_add(len)?)?
        .strip_suffix(b"\0")?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}
