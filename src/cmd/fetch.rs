//! Running an image by its address: it is brought into the cache by a process of its own.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::transfer::{self, Access, Machine};
use super::{Told, environment};
use crate::cache::Cache;
use crate::host::Host;
use crate::net::Reference;
use crate::{exit, say};

/// The hidden command that does it.
pub const FETCH: &str = "__fetch";

/// What a run says of how to get its image.
#[derive(Debug, Default)]
pub struct RunAccess<'a> {
    /// `--no-https`
    pub no_https: bool,
    /// `--docker-login`
    pub docker_login: bool,
    /// `--authfile`
    pub authfile: Option<&'a Path>,
    /// `--disable-cache`
    pub disable_cache: bool,
}

/// Brings an image into the cache for a run, in a process of its own: what becomes the payload has loaded no TLS, has no
/// threads, and never had a secret in its memory.
///
/// # Errors
/// When it cannot be had; the process has said why.
pub fn fetch_for_run(reference: &OsStr, access: &RunAccess) -> Result<PathBuf> {
    if access.disable_cache {
        bail!(
            "--disable-cache is not supported here, where the image is run from the cache: capsid pull --disable-cache makes a file"
        );
    }
    let mut words: Vec<OsString> = vec![FETCH.into()];
    if access.no_https {
        words.push("--no-https".into());
    }
    if access.docker_login {
        words.push("--docker-login".into());
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
    let mut path = child.stdout;
    path.truncate(path.trim_ascii_end().len());
    Ok(PathBuf::from(OsString::from_vec(path)))
}

/// Options of the hidden command.
#[derive(clap::Args, Debug)]
pub struct FetchArgs {
    #[command(flatten)]
    access: Access,
    /// What to fetch
    reference: String,
}

/// Runs the hidden command: prints where in the cache the image is.
///
/// # Errors
/// When it cannot be had.
pub fn run_fetch(args: &FetchArgs) -> Result<u8> {
    let host = Host::read()?;
    transfer::guard_drafts()?;
    let what = || format!("Unable to handle {} uri", args.reference);
    let reference: Reference = args.reference.parse().with_context(what)?;
    let library = environment::lookup(&host.env, "LIBRARY").map(OsStr::to_string_lossy);
    let options = transfer::options(&host, &args.access, &Machine::default(), library.as_deref())?;
    let cache = Cache::open(&transfer::cache_root(&host)).with_context(what)?;
    let path = transfer::fetch(&reference, &options, &cache, &host).with_context(what)?;
    // A path is bytes; the one who reads it takes them as they are.
    let text = path.as_os_str().as_bytes();
    match std::str::from_utf8(text) {
        Ok(text) => say::out(format_args!("{text}\n"))?,
        Err(_) => bail!("the cache's path {} is not UTF-8", path.display()),
    }
    Ok(exit::OK)
}
