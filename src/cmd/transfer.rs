//! What `pull`, `push` and running an image by its address share: options, the cache's place, the way from a reference
//! to a file of the cache.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sys::signal::raise;

use super::{environment, prompt};
use crate::build::convert;
use crate::cache::usage::parse_size;
use crate::cache::{self, Cache, DraftDirectory, Kind, Obtained};
use crate::engine::wait;
use crate::host::Host;
use crate::net::library::Choice;
use crate::net::mirrors::Mirrors;
use crate::net::remotes::Files;
use crate::net::url::Scheme;
use crate::net::{self, Client, Credentials, Login, Options, Reference, Settings};
use crate::oci::{Platform, config::Origin};
use crate::sif::Stamp;
use crate::{exit, say, squash};

/// The name of conversions by this version: another one makes them anew.
const CONVERTER: &str = "v1";

/// How to get somewhere; options of several commands.
#[derive(clap::Args, Debug, Default, Clone)]
pub struct Access {
    /// Plain HTTP instead of HTTPS, for docker://, oras:// and library://HOST
    #[arg(long, alias = "nohttps")]
    pub no_https: bool,
    /// Logins of registries: a file as docker writes it
    #[arg(long, value_name = "FILE")]
    pub authfile: Option<PathBuf>,
    /// Ask for the registry's user name and password
    #[arg(long)]
    pub docker_login: bool,
    /// Not supported: no Docker daemon is asked
    #[arg(long, hide = true)]
    pub docker_host: Option<String>,
}

/// The machine that an image is for.
#[derive(clap::Args, Debug, Default, Clone)]
pub struct Machine {
    /// Processor that the image is for: amd64, arm64, …
    #[arg(id = "pull_arch", long = "arch", value_name = "ARCH")]
    pub arch: Option<String>,
    /// Its variant: 7 or v7
    #[arg(
        id = "pull_arch_variant",
        long = "arch-variant",
        value_name = "VARIANT"
    )]
    pub variant: Option<String>,
    /// Both as OS/ARCH[/VARIANT]
    #[arg(long, value_name = "PLATFORM", conflicts_with_all = ["pull_arch", "pull_arch_variant"])]
    pub platform: Option<String>,
}

impl Machine {
    fn platform(&self, host: &Host) -> Result<Platform> {
        let variant = |text: &str| match text.starts_with(|c: char| c.is_ascii_digit()) {
            true => format!("v{text}"),
            false => text.to_owned(),
        };
        let mut platform = Platform {
            architecture: self.arch.as_deref().unwrap_or(host.arch).to_owned(),
            os: "linux".into(),
            variant: self.variant.as_deref().map(variant),
        };
        if let Some(text) = &self.platform {
            let parts: Vec<&str> = text.split('/').collect();
            let ([os, arch] | [os, arch, _]) = parts[..] else {
                bail!("--platform {text}: write it as linux/amd64 or linux/arm/v7");
            };
            if os != "linux" {
                bail!("--platform {text}: images for {os} cannot run here");
            }
            platform.architecture = arch.to_owned();
            platform.variant = parts.get(2).map(|v| variant(v));
        }
        if crate::sif::arch(&platform.architecture) == "unknown" {
            bail!(
                "{:?} is not a known architecture: amd64, arm64, arm, 386, ppc64le, riscv64, s390x, …",
                platform.architecture
            );
        }
        Ok(platform)
    }
}

/// The directory of logins, endpoints and the cache.
pub fn config_dir(host: &Host) -> PathBuf {
    match environment::lookup(&host.env, "CONFIGDIR") {
        Some(path) => host.cwd.join(path),
        None => host.user.home.join(".apptainer"),
    }
}

/// Where the cache is.
pub fn cache_root(host: &Host) -> PathBuf {
    let own = host.var("CAPSID_CACHEDIR").filter(|v| !v.is_empty());
    match own.or_else(|| environment::lookup(&host.env, "CACHEDIR")) {
        Some(path) => host.cwd.join(path).join("cache"),
        None => config_dir(host).join("cache"),
    }
}

/// `CAPSID_CACHE_SIZE`.
fn cache_limit(host: &Host) -> Result<Option<u64>> {
    let Some(text) = host.var("CAPSID_CACHE_SIZE").filter(|v| !v.is_empty()) else {
        return Ok(None);
    };
    parse_size(&text.to_string_lossy())
        .context("CAPSID_CACHE_SIZE")
        .map(Some)
}

/// Where scratch files go.
pub fn scratch(host: &Host) -> PathBuf {
    match environment::lookup(&host.env, "TMPDIR") {
        Some(path) => host.cwd.join(path),
        None => std::env::temp_dir(),
    }
}

/// The files of logins, by option and environment.
pub fn credentials(host: &Host, authfile: Option<&Path>) -> Result<Credentials> {
    let named = authfile.map(|f| host.cwd.join(f));
    let own = config_dir(host).join("docker-config.json");
    let home = &host.user.home;
    let docker = host
        .var("DOCKER_CONFIG")
        .map_or_else(|| home.join(".docker"), PathBuf::from)
        .join("config.json");
    let runtime = host
        .var("XDG_RUNTIME_DIR")
        .map(|d| Path::new(d).join("containers/auth.json"));
    let files = match &named {
        Some(named) => vec![named.clone()],
        None => [own.clone(), docker]
            .into_iter()
            .chain(host.var("REGISTRY_AUTH_FILE").map(PathBuf::from))
            .chain(runtime)
            .chain([home.join(".config/containers/auth.json")])
            .collect(),
    };
    Ok(Credentials {
        given: None,
        files,
        store: named.unwrap_or(own),
    })
}

/// All that is needed to get to a reference.
///
/// # Errors
/// When a value is wrong or a file cannot be read.
pub fn options(
    host: &Host,
    access: &Access,
    machine: &Machine,
    library: Option<&str>,
) -> Result<Options> {
    if access.docker_host.is_some() {
        bail!("--docker-host is not supported: no Docker daemon is asked; name a registry");
    }
    let mut credentials = credentials(host, access.authfile.as_deref())?;
    if let Some(file) = &access.authfile
        && !file.exists()
    {
        bail!("--authfile {}: no such file", file.display());
    }
    let given =
        |key: &str| environment::lookup(&host.env, key).map(|v| v.to_string_lossy().into_owned());
    credentials.given = match access.docker_login {
        true => Some(Login::Password {
            username: prompt::line("Enter Docker Username: ")?,
            password: prompt::secret("Enter Docker Password: ")?,
        }),
        false => match (given("DOCKER_USERNAME"), given("DOCKER_PASSWORD")) {
            (Some(username), Some(password)) => Some(Login::Password { username, password }),
            _ => None,
        },
    };
    let scheme = match access.no_https {
        true => Scheme::Http,
        false => Scheme::Https,
    };
    let home = &host.user.home;
    let configured = host.var("CONTAINERS_REGISTRIES_CONF").map(PathBuf::from);
    let mirrors = Mirrors::read(&match configured {
        Some(file) => vec![file],
        None => vec![
            home.join(".config/containers/registries.conf"),
            "/etc/containers/registries.conf".into(),
        ],
    })?;
    Ok(Options {
        scheme,
        platform: machine.platform(host)?,
        credentials,
        mirrors,
        library: choice(host, library),
        client: Arc::new(Client::new(settings(host))),
    })
}

/// How a library is found.
pub fn choice(host: &Host, library: Option<&str>) -> Choice {
    Choice {
        url: library.map(str::to_owned),
        files: Files {
            own: config_dir(host).join("remote.yaml"),
            site: "/etc/apptainer/remote.yaml".into(),
        },
    }
}

/// What the environment says of the network.
pub fn settings(host: &Host) -> Settings {
    let proxy = |names: [&str; 4]| {
        let found = names
            .iter()
            .find_map(|n| host.var(n).filter(|v| !v.is_empty()));
        found.map(|v| v.to_string_lossy().into_owned())
    };
    let home = &host.user.home;
    Settings {
        http_proxy: proxy(["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]),
        https_proxy: proxy(["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]),
        no_proxy: proxy(["no_proxy", "NO_PROXY", "", ""]).unwrap_or_default(),
        certificates: vec![
            home.join(".config/containers/certs.d"),
            home.join(".docker/certs.d"),
            "/etc/containers/certs.d".into(),
            "/etc/docker/certs.d".into(),
        ],
    }
}

/// Brings an image into the cache as one file. Downloaded and converted once, however many ask at the same time.
///
/// # Errors
/// When it cannot be had.
pub fn fetch(
    reference: &Reference,
    options: &Options,
    cache: &Cache,
    host: &Host,
) -> Result<PathBuf> {
    let path = match reference {
        Reference::Docker(repository) => {
            let resolved = net::oci::resolve(repository, options)?;
            let epoch = epoch(host)?;
            let mut key = format!("sha256.{}.{CONVERTER}", resolved.received.digest.hex());
            if let Some(epoch) = epoch {
                key.push_str(&format!("-{epoch}"));
            }
            let claim = match cache.obtain(Kind::OciTmp, &key)? {
                Obtained::Ready(path) => {
                    say::info(format_args!("Using cached SIF image"));
                    return Ok(path);
                }
                Obtained::Claimed(claim) => claim,
            };
            say::info(format_args!("Converting OCI blobs to SIF format"));
            let image = net::oci::image_of(&resolved, repository, options, cache)?;
            let directory = cache.draft_directory()?;
            let draft = directory.path().join("image.sif");
            let origin = Origin {
                bootstrap: "docker".into(),
                from: repository.to_string(),
            };
            let stamp = stamp(&image, epoch);
            say::info(format_args!("Creating SIF file..."));
            convert::to_sif(&image, &draft, &origin, stamp, squash::Options::default())?;
            let place = cache.place(Kind::OciTmp, &key)?;
            cache::publish(&draft, &place)?;
            directory.remove();
            drop(claim);
            place
        }
        other => net::file(other, options, cache)?,
    };
    if let Some(limit) = cache_limit(host)? {
        cache.shrink(limit)?;
    }
    Ok(path)
}

/// `SOURCE_DATE_EPOCH`.
fn epoch(host: &Host) -> Result<Option<i64>> {
    let Some(text) = host.var("SOURCE_DATE_EPOCH") else {
        return Ok(None);
    };
    match text.to_str().and_then(|t| t.parse().ok()) {
        Some(epoch) => Ok(Some(epoch)),
        None => bail!("SOURCE_DATE_EPOCH is {text:?}, which is no number of seconds"),
    }
}

/// The same image gives the same file, everywhere and always: its time is the image's own.
pub fn stamp(image: &crate::oci::Image, epoch: Option<i64>) -> Stamp {
    let created = image.config.created.as_deref().and_then(seconds);
    let digest = crate::digest::Digest::of(image.digest.to_string().as_bytes()).hex();
    let mut identity = [0; 16];
    for (n, byte) in identity.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digest[2 * n..2 * n + 2], 16).unwrap_or(0);
    }
    Stamp {
        time_s: epoch.or(created).unwrap_or(0).max(0),
        identity,
    }
}

/// An RFC 3339 time in UTC as seconds since 1970.
fn seconds(text: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || year < 1970 {
        return None;
    }
    // Days of a year that begins in March, so that the leap day is the last one.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days - 719_468) * 86400 + hour * 3600 + minute * 60 + second)
}

/// Makes Ctrl-C and the like remove what is being written before they end the program.
///
/// # Errors
/// When there can be no more threads.
pub fn guard_drafts() -> Result<()> {
    let signals = wait::ending();
    signals.thread_block().context("cannot block signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let Ok(signal) = signals.wait() else { return };
            cache::remove_drafts();
            // The end that the signal would have brought.
            let _ = signals.thread_unblock();
            let _ = raise(signal);
            std::process::exit(exit::signalled(signal as i32).into());
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// A cache, or where it is not wanted or cannot be written, one that goes with the value.
pub struct Store {
    /// The cache.
    pub cache: Cache,
    temporary: Option<DraftDirectory>,
}

impl Store {
    /// All went well: nothing is kept of what was for this command only.
    pub fn close(self) {
        if let Some(directory) = self.temporary {
            directory.remove();
        }
    }

    /// Opens the person's cache; where it cannot be written, one for this command only.
    ///
    /// # Errors
    /// When neither can be.
    pub fn open(host: &Host) -> Result<Store> {
        match Cache::open(&cache_root(host)) {
            Ok(cache) => Ok(Store {
                cache,
                temporary: None,
            }),
            Err(error) => {
                say::warn(format_args!("the cache is not used: {error:#}"));
                Store::temporary(host)
            }
        }
    }

    /// One for this command only.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn temporary(host: &Host) -> Result<Store> {
        let directory = DraftDirectory::new(&scratch(host))?;
        Ok(Store {
            cache: Cache::open(directory.path())?,
            temporary: Some(directory),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn times_of_images_are_read() {
        assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(seconds("2000-02-29T12:34:56.789Z"), Some(951_827_696));
        assert_eq!(seconds("2026-11-30T00:53:20Z"), Some(1_796_000_000));
        for text in ["", "x", "0001-01-01T00:00:00Z", "2000-13-01T00:00:00Z"] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
