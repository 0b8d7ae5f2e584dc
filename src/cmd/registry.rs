//! `registry login|logout|list`: logins for registries, in a file as docker writes it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::transfer::{self, Access, Machine};
use super::{Persona, Usage, parse_with_environment, prompt};
use crate::host::Host;
use crate::net::Login;
use crate::net::registry::{self, Remote};
use crate::net::remotes::Remotes;
use crate::net::url::split_authority;
use crate::{exit, say};

/// The commands below `registry`.
pub const COMMANDS: &[(&str, &str)] = &[
    (
        "login",
        "Log in to a registry: docker://HOST or oras://HOST",
    ),
    ("logout", "Forget a login"),
    ("list", "List the registries that a login is known for"),
];

/// Options of `registry login`.
#[derive(clap::Args, Debug)]
pub struct LoginArgs {
    /// Who
    #[arg(
        id = "login_username",
        short = 'u',
        long = "username",
        value_name = "NAME"
    )]
    username: Option<String>,
    /// The password; other users of the machine can see it: better --password-stdin
    #[arg(
        id = "login_password",
        short = 'p',
        long = "password",
        value_name = "PASSWORD"
    )]
    password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    password_stdin: bool,
    /// Plain HTTP instead of HTTPS
    #[arg(long, alias = "nohttps")]
    no_https: bool,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// docker://HOST[:PORT] or oras://HOST[:PORT]
    #[arg(value_name = "URI")]
    uri: String,
}

/// Options of `registry logout`.
#[derive(clap::Args, Debug)]
pub struct LogoutArgs {
    /// The file to write
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// docker://HOST[:PORT] or oras://HOST[:PORT]
    #[arg(value_name = "URI")]
    uri: String,
}

/// Options of `registry list`.
#[derive(clap::Args, Debug)]
pub struct ListArgs {
    /// The file to read
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// As JSON
    #[arg(short = 'j', long)]
    json: bool,
}

/// Runs `registry WORDS…`.
///
/// # Errors
/// [`Usage`] for a wrong command line; anything else is fatal.
pub fn run(words: &[OsString], persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let rest = words.get(1..).unwrap_or_default();
    let host = Host::read()?;
    match verb {
        "login" => login(
            &parse_with_environment("registry login", rest, &host)?,
            &host,
        ),
        "logout" => logout(
            &parse_with_environment("registry logout", rest, &host)?,
            &host,
        ),
        "list" => list(
            &parse_with_environment("registry list", rest, &host)?,
            &host,
        ),
        other => super::print_group(
            "registry",
            "Manage logins for registries",
            COMMANDS,
            other,
            persona,
        ),
    }
}

/// The host of `docker://HOST` or `oras://HOST`.
fn registry_of(uri: &str) -> Result<String> {
    let name = uri
        .strip_prefix("docker://")
        .or_else(|| uri.strip_prefix("oras://"));
    let Some(name) = name else {
        bail!("{uri:?} names no registry: write docker://HOST or oras://HOST");
    };
    let name = name.trim_end_matches('/');
    // What follows the host does not count, as with the peers.
    let name = name.split('/').next().unwrap_or_default();
    split_authority(name)?;
    Ok(match name {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".into(),
        other => other.to_owned(),
    })
}

fn login(args: &LoginArgs, host: &Host) -> Result<u8> {
    let registry = registry_of(&args.uri)?;
    if args.password.is_some() && args.password_stdin {
        return Err(Usage {
            command: "registry login".into(),
            text: "--password and --password-stdin exclude each other".into(),
        }
        .into());
    }
    if args.password.is_some() && std::env::var_os("APPTAINER_LOGIN_PASSWORD").is_none() {
        say::warn(format_args!(
            "other users can see a password on the command line: --password-stdin reads it from standard input"
        ));
    }
    let username = match &args.username {
        Some(name) => name.clone(),
        None if args.password_stdin => bail!("--password-stdin needs --username"),
        None => prompt::line("Username: ", "--username names the user")?,
    };
    if username.contains(':') {
        bail!("the user name {username:?} must not hold a colon");
    }
    let password = match (&args.password, args.password_stdin) {
        (Some(password), _) => password.clone(),
        (None, true) => prompt::from_stdin()?,
        (None, false) => prompt::secret("Password / Token: ", prompt::PASSWORD_STDIN)?,
    };
    let login = Login::Password { username, password };
    let access = Access {
        no_https: args.no_https,
        ..Access::default()
    };
    let mut options = transfer::options(host, &access, &Machine::default(), None)?;
    options.credentials.given = None;
    let remote = Remote::at(
        &options.client,
        options.scheme,
        &registry,
        "",
        Some(login.clone()),
        registry::Access::Pull,
    )?;
    remote
        .ping()
        .with_context(|| format!("Unable to log in to {}", args.uri))?;
    let credentials = transfer::credentials(host, args.authfile.as_deref())?;
    credentials.store(&registry, &login)?;
    note(host, |remotes| {
        remotes.note_registry(&canonical(&args.uri, &registry), args.no_https);
    });
    say::info(format_args!(
        "Token stored in {}",
        credentials.store.display()
    ));
    Ok(exit::OK)
}

fn logout(args: &LogoutArgs, host: &Host) -> Result<u8> {
    let registry = registry_of(&args.uri)?;
    let credentials = transfer::credentials(host, args.authfile.as_deref())?;
    let is_known = credentials.erase(&registry)?;
    note(host, |remotes| remotes.forget_registry(&registry));
    match is_known {
        true => say::info(format_args!("Logout succeeded")),
        false => say::warn(format_args!(
            "{} holds no login for {registry}: there is nothing to forget",
            credentials.store.display()
        )),
    }
    Ok(exit::OK)
}

/// The address that a login is listed by.
fn canonical(uri: &str, registry: &str) -> String {
    let scheme = uri.split("://").next().unwrap_or("docker");
    format!("{scheme}://{registry}")
}

/// Changes what the list of endpoints says of logins, as the peers keep it there. It is for showing only: that it cannot
/// be written is no error.
fn note(host: &Host, change: impl FnOnce(&mut Remotes)) {
    let own = transfer::choice(host, None).files.own;
    let noted = Remotes::read(&own, Path::new("/dev/null")).and_then(|before| {
        let mut after = before.clone();
        change(&mut after);
        match after.registries() == before.registries() {
            true => Ok(()),
            false => after.write(&own),
        }
    });
    if let Err(error) = noted {
        say::verbose(format_args!("{error:#}"));
    }
}

#[derive(Serialize)]
struct Row {
    uri: String,
    secure: bool,
}

fn list(args: &ListArgs, host: &Host) -> Result<u8> {
    let hosts = transfer::credentials(host, args.authfile.as_deref())?.list()?;
    let own = transfer::choice(host, None).files.own;
    let noted = Remotes::read(&own, Path::new("/dev/null")).map(|r| r.registries());
    let noted = noted.unwrap_or_default();
    let mut rows: Vec<Row> = Vec::new();
    for host in hosts {
        let ours = noted
            .iter()
            .filter(|(uri, _)| uri.split("://").nth(1) == Some(host.as_str()));
        let before = rows.len();
        rows.extend(ours.map(|(uri, insecure)| Row {
            uri: uri.clone(),
            secure: !insecure,
        }));
        if rows.len() == before {
            rows.push(Row {
                uri: format!("docker://{host}"),
                secure: true,
            });
        }
    }
    if args.json {
        super::print_json(&rows)?;
        return Ok(exit::OK);
    }
    let width = rows.iter().map(|r| r.uri.len()).max().unwrap_or(0).max(3);
    say::out(format_args!("\n{:<width$}  SECURE?\n", "URI"))?;
    for row in &rows {
        let mark = if row.secure { "✓" } else { "✗!" };
        say::out(format_args!(
            "{:<width$}  {mark}\n",
            say::printable(&row.uri)
        ))?;
    }
    Ok(exit::OK)
}
