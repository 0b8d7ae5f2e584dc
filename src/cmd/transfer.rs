//! What `pull`, `push` and running an image by its address share: options, the cache's place, the way from a reference
//! to a file of the cache.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sys::signal::raise;

use super::{environment, prompt};
use crate::build::convert;
use crate::cache::usage::parse_size;
use crate::cache::{self, Cache, Claim, DraftDirectory, Kind, Obtained};
use crate::digest::Digest;
use crate::engine::wait;
use crate::host::Host;
use crate::net::library::Choice;
use crate::net::mirrors::Mirrors;
use crate::net::reference::Repository;
use crate::net::remotes::Files;
use crate::net::url::Scheme;
use crate::net::{self, Client, Credentials, Login, Options, Reference, Settings};
use crate::oci::{self, Place, Platform, config::Origin};
use crate::sif::{Sif, Stamp};
use crate::{exit, say, squash, threads};

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
    /// The registry's user name, for scripts
    #[arg(long, hide = true, value_name = "NAME")]
    pub docker_username: Option<String>,
    /// The registry's password, for scripts; other users of the machine can see it
    #[arg(long, hide = true, value_name = "PASSWORD")]
    pub docker_password: Option<String>,
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
    let own = host.config_dir().join("docker-config.json");
    let home = host.home();
    let configured = host
        .var("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|d| d.is_absolute())
        .unwrap_or_else(|| home.join(".config"));
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
            .chain([configured.join("containers/auth.json")])
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
    // With docker's own names too, which CI systems set.
    let given = |typed: &Option<String>, key: &str| {
        let plain = || host.var(key).filter(|v| !v.is_empty());
        let set = environment::lookup(&host.env, key).or_else(plain);
        typed
            .clone()
            .or_else(|| set.map(|v| v.to_string_lossy().into_owned()))
    };
    let username = given(&access.docker_username, "DOCKER_USERNAME");
    let password = given(&access.docker_password, "DOCKER_PASSWORD");
    let hint = "APPTAINER_DOCKER_USERNAME and APPTAINER_DOCKER_PASSWORD say it without one";
    credentials.given = match access.docker_login {
        true => Some(Login::Password {
            username: prompt::line("Enter Docker Username: ", hint)?,
            password: prompt::secret("Enter Docker Password: ", hint)?,
        }),
        false => match (username, password) {
            (Some(username), Some(password)) => Some(Login::Password { username, password }),
            _ => None,
        },
    };
    let scheme = match access.no_https {
        true => Scheme::Http,
        false => Scheme::Https,
    };
    let mirrors = mirrors(host)?;
    Ok(Options {
        scheme,
        platform: machine.platform(host)?,
        credentials,
        mirrors,
        library: choice(host, library),
        client: Arc::new(Client::new(settings(host))),
    })
}

/// What containers' tools are told of registries.
fn mirrors(host: &Host) -> Result<Mirrors> {
    let places = [
        PathBuf::from("/usr/share/containers"),
        PathBuf::from("/etc/containers"),
        host.home().join(".config/containers"),
    ];
    let named = host.var("CONTAINERS_REGISTRIES_CONF");
    let files = match named.filter(|v| !v.is_empty()) {
        Some(file) => vec![host.cwd.join(file)],
        None => places
            .iter()
            .rev()
            .map(|place| place.join("registries.conf"))
            .collect(),
    };
    Mirrors::read(&files, &places.map(|place| place.join("registries.conf.d")))
}

/// How a library is found.
pub fn choice(host: &Host, library: Option<&str>) -> Choice {
    Choice {
        url: library.map(str::to_owned),
        files: Files {
            own: host.config_dir().join("remote.yaml"),
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
    let home = host.home();
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

/// An image that is not a file yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Elsewhere.
    Remote(Reference),
    /// On this machine, in the form of another program: where, and which.
    Local(Place, String),
}

impl Source {
    /// Whether text that begins so names one.
    pub fn is_scheme(scheme: &str) -> bool {
        Reference::is_scheme(scheme) || Place::of(scheme).is_some()
    }

    /// The file that `pull` makes when no name is given.
    pub fn file_name(&self) -> String {
        let text = match self {
            Source::Remote(reference) => return reference.file_name(),
            Source::Local(_, text) => text,
        };
        // As the peers name it: the last part of the path, up to a colon, and the tag.
        let last = text.trim_end_matches('/').rsplit('/').next();
        let (name, tag) = match last.unwrap_or_default().split_once(':') {
            Some((name, tag)) => (name, tag),
            None => (last.unwrap_or_default(), "latest"),
        };
        match name {
            "" | "." | ".." => "image.sif".into(),
            name => format!("{name}_{}.sif", tag.split(':').next().unwrap_or(tag)),
        }
    }
}

impl std::str::FromStr for Source {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Source> {
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        match Place::of(scheme) {
            None => text.parse().map(Source::Remote),
            // As with a registry's address, two slashes may come first.
            Some(place) => match rest.strip_prefix("//").unwrap_or(rest) {
                "" => bail!("unable to parse image name {text}: it names no image"),
                name => Ok(Source::Local(place, name.to_owned())),
            },
        }
    }
}

/// Brings an image into the cache as one file. Downloaded and converted once, however many ask at the same time.
///
/// # Errors
/// When it cannot be had.
pub fn fetch(source: &Source, options: &Options, cache: &Cache, host: &Host) -> Result<PathBuf> {
    let path = match source {
        Source::Remote(Reference::Docker(repository)) => {
            from_registry(repository, options, cache, host)?
        }
        Source::Remote(other) => net::file(other, options, cache)?,
        Source::Local(place, text) => from_place(*place, text, options, cache, host)?,
    };
    if let Some(limit) = cache_limit(host)? {
        cache.shrink(limit)?;
    }
    Ok(path)
}

fn from_registry(
    repository: &Repository,
    options: &Options,
    cache: &Cache,
    host: &Host,
) -> Result<PathBuf> {
    let chosen = net::oci::resolve(repository, options)?;
    let key = key(&chosen.received.digest, "", host)?;
    let claim = match obtain(cache, &key)? {
        Obtained::Ready(path) => {
            if !chosen.is_told {
                let sif = Sif::read(&File::open(&path)?)?;
                oci::platform::check_architecture(sif.arch, &options.platform)
                    .with_context(|| repository.to_string())?;
            }
            return Ok(path);
        }
        Obtained::Claimed(claim) => claim,
    };
    say::info(format_args!("Converting OCI blobs to SIF format"));
    let image = net::oci::image_of(&chosen, repository, options, cache)?;
    let origin = Origin {
        bootstrap: "docker".into(),
        from: repository.to_string(),
    };
    convert(&image, &origin, claim, &key, cache, host)
}

/// Known by its content: an archive that is written anew with the same image is converted once.
fn from_place(
    place: Place,
    text: &str,
    options: &Options,
    cache: &Cache,
    host: &Host,
) -> Result<PathBuf> {
    let scratch = cache.draft_directory()?;
    let image = place.open(text, &host.cwd, &options.platform, scratch.path())?;
    let key = key(&image.digest, place.name(), host)?;
    let path = match obtain(cache, &key)? {
        Obtained::Ready(path) => path,
        Obtained::Claimed(claim) => {
            say::info(format_args!("Converting OCI blobs to SIF format"));
            let origin = Origin {
                bootstrap: place.name().into(),
                from: text.to_owned(),
            };
            convert(&image, &origin, claim, &key, cache, host)?
        }
    };
    drop(image);
    scratch.remove();
    Ok(path)
}

/// The name of a conversion.
fn key(digest: &Digest, place: &str, host: &Host) -> Result<String> {
    let mut key = format!("sha256.{}.{CONVERTER}", digest.hex());
    if !place.is_empty() {
        key.push_str(&format!(".{place}"));
    }
    if let Some(epoch) = epoch(host)? {
        key.push_str(&format!("-{epoch}"));
    }
    Ok(key)
}

fn obtain(cache: &Cache, key: &str) -> Result<Obtained> {
    let is_good = |path: &Path| crate::image::check(path).is_ok();
    let obtained = cache.obtain(Kind::OciTmp, key, &is_good)?;
    if matches!(obtained, Obtained::Ready(_)) {
        say::info(format_args!("Using cached SIF image"));
    }
    Ok(obtained)
}

fn convert(
    image: &oci::Image,
    origin: &Origin,
    claim: Claim,
    key: &str,
    cache: &Cache,
    host: &Host,
) -> Result<PathBuf> {
    let directory = cache.draft_directory()?;
    let draft = directory.path().join("image.sif");
    let stamp = stamp(image, epoch(host)?);
    say::info(format_args!("Creating SIF file..."));
    convert::to_sif(image, &draft, origin, stamp, squash::Options::default())?;
    let place = cache.place(Kind::OciTmp, key)?;
    cache::publish(&draft, &place)?;
    directory.remove();
    drop(claim);
    Ok(place)
}

/// `SOURCE_DATE_EPOCH` (reproducible-builds.org): seconds since 1970, as far as a squashfs can tell them; an empty one is
/// none.
///
/// # Errors
/// When it is something else.
pub fn epoch(host: &Host) -> Result<Option<i64>> {
    let Some(text) = host.var("SOURCE_DATE_EPOCH").filter(|v| !v.is_empty()) else {
        return Ok(None);
    };
    match text.to_str().and_then(|t| t.parse::<u32>().ok()) {
        Some(epoch) => Ok(Some(epoch.into())),
        None => bail!("SOURCE_DATE_EPOCH={text:?}: seconds since 1970 are wanted"),
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
    threads::start("signals", move || {
        let Ok(signal) = signals.wait() else { return };
        cache::remove_drafts();
        // The end that the signal would have brought.
        let _ = signals.thread_unblock();
        let _ = raise(signal);
        std::process::exit(exit::signalled(signal as i32).into());
    })?;
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

    /// The directory that goes with this value.
    pub fn directory(&self) -> Option<&Path> {
        self.temporary.as_ref().map(DraftDirectory::path)
    }

    /// It is removed by somebody else.
    pub fn leave(self) {
        if let Some(directory) = self.temporary {
            directory.leave();
        }
    }

    /// Opens the person's cache; where it is not wanted or cannot be written, one for this command only.
    ///
    /// # Errors
    /// When neither can be.
    pub fn open(host: &Host, disabled: bool) -> Result<Store> {
        if disabled {
            return Store::temporary(host);
        }
        match Cache::open(&host.cache_root()) {
            Ok(cache) => Ok(Store {
                cache,
                temporary: None,
            }),
            Err(error) => {
                say::warn(format_args!("Cache disabled: {error:#}"));
                Store::temporary(host)
            }
        }
    }

    /// Opens a cache and does something with it. Where its disk is full, it is done once more with a cache for this command
    /// only.
    ///
    /// # Errors
    /// Those of the work.
    pub fn with<T>(
        host: &Host,
        disabled: bool,
        work: &dyn Fn(&Cache) -> Result<T>,
    ) -> Result<(T, Store)> {
        let store = Store::open(host, disabled)?;
        match work(&store.cache) {
            Ok(done) => Ok((done, store)),
            Err(error) if store.temporary.is_none() && cache::is_full(&error) => {
                say::warn(format_args!("Cache disabled: {error:#}"));
                let store = Store::temporary(host)?;
                let done = work(&store.cache)?;
                Ok((done, store))
            }
            Err(error) => Err(error),
        }
    }

    /// One for this command only.
    fn temporary(host: &Host) -> Result<Store> {
        let directory = DraftDirectory::new(&scratch(host))
            .context("cannot do without a cache (APPTAINER_TMPDIR names another place)")?;
        Ok(Store {
            cache: Cache::open(directory.path())?,
            temporary: Some(directory),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_on_this_machine_are_named_as_those_elsewhere() {
        for (text, place, rest, file) in [
            (
                "oci-archive:f.tar",
                Place::OciArchive,
                "f.tar",
                "f.tar_latest.sif",
            ),
            (
                "oci-archive:///a/f.tar:v1",
                Place::OciArchive,
                "/a/f.tar:v1",
                "f.tar_v1.sif",
            ),
            (
                "docker-archive:a/x.tar:x:2",
                Place::DockerArchive,
                "a/x.tar:x:2",
                "x.tar_x.sif",
            ),
            ("oci:d/", Place::Layout, "d/", "d_latest.sif"),
            ("oci:.", Place::Layout, ".", "image.sif"),
            (
                "docker-daemon:a/b:1",
                Place::DockerDaemon,
                "a/b:1",
                "b_1.sif",
            ),
        ] {
            let source: Source = text.parse().unwrap();
            assert_eq!(source, Source::Local(place, rest.into()), "{text}");
            assert_eq!(source.file_name(), file);
        }
        assert!(matches!("docker://a".parse(), Ok(Source::Remote(_))));
        for text in ["oci:", "oci-archive://", "podman:x", "x"] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

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
