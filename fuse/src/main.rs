//! Mounts a squashfs image, as `squashfuse` does: `capsid-fuse [-f] [-o offset=N,profile=DIR] IMAGE MOUNTPOINT`.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use capsid_fuse::{Archive, Options, Owner, Server, clone_device, mount};

const USAGE: &str = "usage: capsid-fuse [-f] [-o offset=N,profile=DIR] IMAGE MOUNTPOINT";
/// Tells the process that stays that somebody waits for its word on standard output.
const DETACHED: &str = "--detached";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct Arguments {
    foreground: bool,
    detached: bool,
    offset_bytes: u64,
    /// Where profiles of starts are kept, if anywhere.
    profile: Option<String>,
    image: String,
    mount_point: String,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("capsid-fuse: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    let (mut foreground, mut detached, mut offset_bytes) = (false, false, 0);
    let mut profile = None;
    let mut files = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-f" => foreground = true,
            DETACHED => detached = true,
            "-o" => {
                let options = words.next().ok_or(USAGE)?;
                for option in options.split(',') {
                    if let Some(directory) = option.strip_prefix("profile=") {
                        profile = Some(directory.to_string());
                        continue;
                    }
                    let number = option.strip_prefix("offset=");
                    let number = number.ok_or(format!("unknown option {option:?}"))?;
                    offset_bytes = number
                        .parse()
                        .map_err(|_| format!("bad offset {number:?}"))?;
                }
            }
            _ => files.push(word),
        }
    }
    let [image, mount_point] = <[String; 2]>::try_from(files).map_err(|_| USAGE)?;
    Ok(Arguments {
        foreground,
        detached,
        offset_bytes,
        profile,
        image,
        mount_point,
    })
}

fn run(arguments: &Arguments) -> Result<()> {
    if !arguments.foreground && !arguments.detached {
        return detach();
    }
    let name = &arguments.image;
    let file = File::open(name).map_err(|e| format!("cannot open {name}: {e}"))?;
    let archive = Archive::open(file, arguments.offset_bytes, None)
        .map_err(|e| format!("cannot read {name}: {e}"))?;
    let options = Options {
        owner: Owner::Image,
        stage: false,
        max_threads: 0,
        cache_bytes: 0,
    };
    let server = Arc::new(Server::squashfs(archive, options));
    let mount = mount::fuse(&mount::MountOptions {
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        allow_other: rustix::process::getuid().is_root(),
        source: name.clone(),
    })?;
    if let Some(directory) = &arguments.profile {
        let directory = File::open(directory)
            .map_err(|e| format!("cannot open the directory {directory}: {e}"))?;
        server.keep_profile(directory.into());
    }
    attach(&mount, &arguments.mount_point)?;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    let mut devices = vec![mount.device];
    for _ in 1..threads {
        devices.extend(clone_device(devices[0].as_fd()));
    }
    drop(mount.tree);
    if arguments.detached {
        println!();
        let null = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        rustix::process::setsid()?;
    }
    let served = server.serve_on(devices);
    server.save_profile();
    Ok(served?)
}

fn attach(mount: &mount::Mount, point: &str) -> Result<()> {
    use rustix::mount::{MoveMountFlags, move_mount};
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&mount.tree, "", rustix::fs::CWD, point, flags)
        .map_err(|e| format!("cannot mount on {point}: {}", std::io::Error::from(e)).into())
}

/// Runs this program again, and returns when that one has mounted.
fn detach() -> Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg(DETACHED)
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut word = [0];
    let mut output = child.stdout.take().ok_or("no pipe")?;
    match std::io::Read::read(&mut output, &mut word)? {
        1 => Ok(()),
        // It has said why.
        _ => std::process::exit(child.wait()?.code().unwrap_or(1)),
    }
}
