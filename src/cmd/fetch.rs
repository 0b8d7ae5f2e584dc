//! Running an image by its address: it is brought into the cache by a process of its own.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::transfer::{self, Access, Machine, Source, Store};
use super::{Told, environment};
use crate::cache::Cache;
use crate::host::Host;
use crate::{exit, say};

/// The hidden command that does it.
pub const FETCH: &str = "__fetch";

/// What a run says of how to get its image.
#[derive(Default)]
pub struct RunAccess<'a> {
    /// `--no-https`
    pub no_https: bool,
    /// `--docker-login`
    pub docker_login: bool,
    /// `--docker-username`
    pub docker_username: Option<&'a str>,
    /// `--docker-password`
    pub docker_password: Option<&'a str>,
    /// `--authfile`
    pub authfile: Option<&'a Path>,
    /// `--disable-cache`
    pub disable_cache: bool,
}

/// An image's file. One that is for this command only goes with the value, or when it is mounted.
#[derive(Debug)]
pub struct ImageFile {
    /// Where it is.
    pub path: PathBuf,
    /// The directory that it is in, where that is for this command only.
    pub temporary: Option<PathBuf>,
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if let Some(directory) = &self.temporary {
            // It has gone already where the image was mounted.
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// Brings an image into the cache for a run, in a process of its own: what becomes the payload has loaded no TLS, has no
/// threads, and never had a secret in its memory.
///
/// # Errors
/// When it cannot be had; the process has said why.
pub fn fetch_for_run(reference: &OsStr, access: &RunAccess) -> Result<ImageFile> {
    let mut words: Vec<OsString> = vec![FETCH.into()];
    if access.no_https {
        words.push("--no-https".into());
    }
    if access.docker_login {
        words.push("--docker-login".into());
    }
    if access.disable_cache {
        words.push("--disable-cache".into());
    }
    if let Some(file) = access.authfile {
        words.extend(["--authfile".into(), file.as_os_str().to_owned()]);
    }
    words.push("--".into());
    words.push(reference.to_owned());
    let program = std::env::args_os()
        .next()
        .unwrap_or_else(|| "capsid".into());
    let child = Command::new("/proc/self/exe")
        .arg0(program)
        .args(words)
        .env("APPTAINER_MESSAGELEVEL", say::level().to_string())
        // Not on a command line, which everybody can see.
        .envs(
            access
                .docker_username
                .map(|n| ("APPTAINER_DOCKER_USERNAME", n)),
        )
        .envs(
            access
                .docker_password
                .map(|p| ("APPTAINER_DOCKER_PASSWORD", p)),
        )
        .stdin(match access.docker_login {
            true => Stdio::inherit(),
            false => Stdio::null(),
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start the download")?;
    if !child.status.success() {
        let by_signal = child.status.signal().map(exit::signalled);
        return Err(Told(by_signal.unwrap_or(exit::FATAL)).into());
    }
    let mut lines = child.stdout.split(|b| *b == b'\n');
    let mut line = || {
        let line = lines.next().filter(|l| !l.is_empty())?;
        Some(PathBuf::from(OsString::from_vec(line.to_vec())))
    };
    Ok(ImageFile {
        path: line().context("the download has not said where the image is")?,
        temporary: line(),
    })
}

/// Options of the hidden command.
#[derive(clap::Args, Debug)]
pub struct FetchArgs {
    #[command(flatten)]
    access: Access,
    /// Neither use nor fill the cache
    #[arg(long)]
    disable_cache: bool,
    /// What to fetch
    reference: String,
}

/// Runs the hidden command: prints where the image is, and in a second line the directory that goes after the run.
///
/// # Errors
/// When it cannot be had.
pub fn run_fetch(args: &FetchArgs) -> Result<u8> {
    let host = Host::read()?;
    transfer::guard_drafts()?;
    let what = || format!("Unable to handle {} uri", args.reference);
    let source: Source = args.reference.parse().with_context(what)?;
    let library = environment::lookup(&host.env, "LIBRARY").map(OsStr::to_string_lossy);
    let options = transfer::options(&host, &args.access, &Machine::default(), library.as_deref())?;
    let work = |cache: &Cache| transfer::fetch(&source, &options, cache, &host);
    let (path, store) = Store::with(&host, args.disable_cache, &work).with_context(what)?;
    // A path is bytes; the one who reads it takes them as they are.
    for text in [path.as_path()].into_iter().chain(store.directory()) {
        let good = std::str::from_utf8(text.as_os_str().as_bytes()).ok();
        match good.filter(|text| !text.contains('\n')) {
            Some(text) => say::out(format_args!("{text}\n"))?,
            None => bail!(
                "the cache's path {} is not UTF-8, or has a line end",
                text.display()
            ),
        }
    }
    store.leave();
    Ok(exit::OK)
}
