//! `remote`: endpoints of libraries, in `remote.yaml`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::{Persona, parse_with_environment, prompt, transfer};
use crate::host::Host;
use crate::net::Client;
use crate::net::library;
use crate::net::remotes::{DEFAULT_NAME, Endpoint, Files, Remotes};
use crate::net::url::split_authority;
use crate::{exit, given, say};

/// The commands below `remote`.
pub const COMMANDS: &[(&str, &str)] = &[
    ("list", "List the endpoints"),
    ("use", "Choose the endpoint that library:// means"),
    ("add", "Add an endpoint"),
    ("remove", "Remove an endpoint"),
    ("login", "Store a token for an endpoint"),
    ("logout", "Forget the token of an endpoint"),
    (
        "status",
        "Ask the services of an endpoint whether they work",
    ),
    (
        "get-login-password",
        "Not supported: registry login takes a library's own password",
    ),
];

/// Options of `remote list`.
#[derive(clap::Args, Debug)]
pub struct ListArgs {
    /// As JSON
    #[arg(short = 'j', long)]
    json: bool,
}

/// The endpoint that a command is about.
#[derive(clap::Args, Debug)]
pub struct NameArgs {
    /// The administrator's list: not supported
    #[arg(short = 'g', long)]
    global: bool,
    /// No other may be used: not supported
    #[arg(short = 'e', long, hide = true)]
    exclusive: bool,
    /// The endpoint's name
    #[arg(value_name = "NAME")]
    name: String,
}

/// The endpoint that a command is about, the active one by default.
#[derive(clap::Args, Debug)]
pub struct ActiveArgs {
    /// The endpoint's name
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

/// Options of `remote add`.
#[derive(clap::Args, Debug)]
pub struct AddArgs {
    /// Do not ask for a token
    #[arg(long)]
    no_login: bool,
    /// A file that holds the token
    #[arg(long, value_name = "FILE")]
    tokenfile: Option<PathBuf>,
    /// The administrator's list: not supported
    #[arg(short = 'g', long)]
    global: bool,
    /// Reached without TLS
    #[arg(id = "add_insecure", short = 'i', long = "insecure")]
    insecure: bool,
    /// Do not make it the active one
    #[arg(short = 'n', long)]
    no_default: bool,
    /// The endpoint's name
    #[arg(value_name = "NAME")]
    name: String,
    /// HOST[:PORT], with https:// or http:// in front or not
    #[arg(value_name = "URI")]
    uri: String,
}

/// Options of `remote login`.
#[derive(clap::Args, Debug)]
pub struct LoginArgs {
    /// A file that holds the token
    #[arg(long, value_name = "FILE")]
    tokenfile: Option<PathBuf>,
    /// Read the token from standard input
    #[arg(long)]
    password_stdin: bool,
    /// The endpoint's name
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

/// Runs `remote WORDS…`.
///
/// # Errors
/// [`super::Usage`] for a wrong command line; anything else is fatal.
pub fn run(words: &[OsString], persona: Persona) -> Result<u8> {
    let verb = words.first().and_then(|w| w.to_str()).unwrap_or_default();
    let rest = words.get(1..).unwrap_or_default();
    let host = Host::read()?;
    let files = transfer::choice(&host, None).files;
    let command = format!("remote {verb}");
    match verb {
        "list" => list(&parse_with_environment(&command, rest, &host)?, &files),
        "use" => choose(&parse_with_environment(&command, rest, &host)?, &files),
        "add" => add(
            &parse_with_environment(&command, rest, &host)?,
            &files,
            &host,
        ),
        "remove" => remove(&parse_with_environment(&command, rest, &host)?, &files),
        "login" => login(
            &parse_with_environment(&command, rest, &host)?,
            &files,
            &host,
        ),
        "logout" => logout(&parse_with_environment(&command, rest, &host)?, &files),
        "status" => status(
            &parse_with_environment(&command, rest, &host)?,
            &files,
            &host,
        ),
        "get-login-password" | "add-keyserver" | "remove-keyserver" => {
            bail!("remote {verb} is not supported by this version of capsid")
        }
        other => super::print_group(
            "remote",
            "Manage endpoints of libraries",
            COMMANDS,
            other,
            persona,
        ),
    }
}

fn read(files: &Files) -> Result<Remotes> {
    Remotes::read(&files.own, &files.site)
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    uri: &'a str,
    default: bool,
    global: bool,
    exclusive: bool,
    secure: bool,
    login: bool,
}

fn list(args: &ListArgs, files: &Files) -> Result<u8> {
    let remotes = read(files)?;
    let rows: Vec<Row> = remotes
        .remotes
        .iter()
        .map(|(name, endpoint)| Row {
            name,
            uri: &endpoint.uri,
            default: *name == remotes.active,
            global: endpoint.system,
            exclusive: endpoint.exclusive,
            secure: !endpoint.insecure,
            login: !endpoint.token.is_empty(),
        })
        .collect();
    if args.json {
        super::print_json(&rows)?;
        return Ok(exit::OK);
    }
    let width = |field: &dyn Fn(&Row) -> usize, least: usize| {
        rows.iter().map(field).max().unwrap_or(0).max(least)
    };
    let (names, uris) = (width(&|r| r.name.len(), 4), width(&|r| r.uri.len(), 3));
    say::out(format_args!(
        "\n{:<names$}  {:<uris$}  DEFAULT?  GLOBAL?  EXCLUSIVE?  SECURE?\n",
        "NAME", "URI"
    ))?;
    let mark = |yes: bool| if yes { "✓" } else { "" };
    for row in &rows {
        let line = format!(
            "{:<names$}  {:<uris$}  {:<8}  {:<7}  {:<10}  {}",
            say::printable(row.name),
            say::printable(row.uri),
            mark(row.default),
            mark(row.global),
            mark(row.exclusive),
            mark(row.secure)
        );
        say::out(format_args!("{}\n", line.trim_end()))?;
    }
    Ok(exit::OK)
}

fn refuse_global(global: bool) -> Result<()> {
    if global {
        bail!(
            "--global and --exclusive are not supported: an administrator edits /etc/apptainer/remote.yaml"
        );
    }
    Ok(())
}

fn choose(args: &NameArgs, files: &Files) -> Result<u8> {
    refuse_global(args.global || args.exclusive)?;
    let mut remotes = read(files)?;
    let (name, _) = remotes.get(Some(&args.name))?;
    let exclusive = remotes
        .remotes
        .iter()
        .find(|(_, e)| e.system && e.exclusive);
    if let Some((only, _)) = exclusive.filter(|(only, _)| *only != name) {
        bail!("the administrator allows the remote {only} only");
    }
    remotes.active = name.to_owned();
    remotes.write(&files.own)?;
    say::info(format_args!("Remote {:?} now in use.", args.name));
    Ok(exit::OK)
}

fn add(args: &AddArgs, files: &Files, host: &Host) -> Result<u8> {
    refuse_global(args.global)?;
    let plain = args.uri.strip_prefix("http://");
    if plain.is_some() && !args.insecure {
        bail!("http URI requires --insecure or APPTAINER_ADD_INSECURE=true");
    }
    if args.insecure && args.uri.starts_with("https://") {
        say::info(format_args!("--insecure ignored for https remote"));
    }
    let uri = plain
        .or_else(|| args.uri.strip_prefix("https://"))
        .unwrap_or(&args.uri)
        .trim_end_matches('/');
    split_authority(uri)?;
    let mut remotes = read(files)?;
    if remotes.remotes.contains_key(&args.name) {
        bail!("{} is already a remote", args.name);
    }
    if args.name.is_empty() {
        bail!("the name of a remote must not be empty");
    }
    let insecure = args.insecure && !args.uri.starts_with("https://");
    let mut endpoint = Endpoint::new(uri, insecure);
    if !args.no_login {
        endpoint.token = token(
            args.tokenfile.as_ref(),
            false,
            "--no-login adds the remote without a login, --tokenfile reads the token from a file",
        )?;
        let client = Client::new(transfer::settings(host));
        library::check_token(&client, &endpoint, &endpoint.token)
            .with_context(|| format!("cannot log in to {uri} (--no-login adds it without)"))?;
    }
    remotes.remotes.insert(args.name.clone(), endpoint);
    if !args.no_default {
        remotes.active = args.name.clone();
    }
    remotes.write(&files.own)?;
    say::info(format_args!("Remote {:?} added.", args.name));
    Ok(exit::OK)
}

fn remove(args: &NameArgs, files: &Files) -> Result<u8> {
    refuse_global(args.global)?;
    let mut remotes = read(files)?;
    let (name, endpoint) = remotes.get(Some(&args.name))?;
    if endpoint.system {
        bail!("{name} is the administrator's remote: it cannot be removed");
    }
    remotes.remotes.remove(&args.name);
    if remotes.active == args.name {
        remotes.active = DEFAULT_NAME.into();
    }
    remotes.write(&files.own)?;
    say::info(format_args!("Remote {:?} removed.", args.name));
    Ok(exit::OK)
}

fn token(file: Option<&PathBuf>, stdin: bool, hint: &str) -> Result<String> {
    let text = match file {
        Some(path) => given::string(path, 1 << 20)
            .with_context(|| format!("cannot read {}", path.display()))?,
        None if stdin => prompt::from_stdin()?,
        None => prompt::secret("Access Token: ", hint)?,
    };
    let token = text.trim().to_owned();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        bail!("a token is one line of printable characters");
    }
    Ok(token)
}

fn login(args: &LoginArgs, files: &Files, host: &Host) -> Result<u8> {
    let mut remotes = read(files)?;
    let (name, endpoint) = remotes.get(args.name.as_deref())?;
    let name = name.to_owned();
    let hint = "--password-stdin reads the token from a file or pipe";
    let token = token(args.tokenfile.as_ref(), args.password_stdin, hint)?;
    let client = Client::new(transfer::settings(host));
    library::check_token(&client, endpoint, &token)
        .with_context(|| format!("cannot log in to remote {name}"))?;
    let mut own = endpoint.clone();
    own.token = token;
    own.system = false;
    remotes.remotes.insert(name.clone(), own);
    remotes.write(&files.own)?;
    say::info(format_args!(
        "Access Token Verified! Token stored in {}",
        files.own.display()
    ));
    Ok(exit::OK)
}

fn logout(args: &ActiveArgs, files: &Files) -> Result<u8> {
    let mut remotes = read(files)?;
    let known = remotes.get(args.name.as_deref()).map(|(name, endpoint)| {
        let has_token = !endpoint.token.is_empty();
        (name.to_owned(), has_token)
    });
    // What is asked for is so already.
    let name = match known {
        Ok((name, true)) => name,
        Ok((name, false)) => {
            say::warn(format_args!("no login is known for remote {name}"));
            return Ok(exit::OK);
        }
        Err(error) => {
            say::warn(format_args!("{error:#}: there is nothing to forget"));
            return Ok(exit::OK);
        }
    };
    if let Some(endpoint) = remotes.remotes.get_mut(&name) {
        endpoint.token.clear();
    }
    remotes.write(&files.own)?;
    say::info(format_args!("Logout succeeded"));
    Ok(exit::OK)
}

fn status(args: &ActiveArgs, files: &Files, host: &Host) -> Result<u8> {
    let remotes = read(files)?;
    let (name, endpoint) = remotes.get(args.name.as_deref())?;
    say::info(format_args!("Checking status of remote {name}."));
    let client = Client::new(transfer::settings(host));
    let services = library::services(&client, endpoint).context("while retrieving services")?;
    say::out(format_args!(
        "{:<12}{:<10}{:<16}URI\n",
        "SERVICE", "STATUS", "VERSION"
    ))?;
    for (service, uri) in services {
        let (state, version) = match library::service_version(&client, &uri) {
            Ok(version) => ("OK", version),
            Err(error) => {
                say::verbose(format_args!("{service}: {error:#}"));
                ("N/A", String::new())
            }
        };
        say::out(format_args!(
            "{:<12}{state:<10}{:<16}{}\n",
            say::printable(&service),
            say::printable(&version),
            say::printable(&uri)
        ))?;
    }
    if endpoint.token.is_empty() {
        say::out(format_args!(
            "\nNo authentication token set (logged out).\n"
        ))?;
        return Ok(exit::OK);
    }
    library::check_token(&client, endpoint, &endpoint.token)?;
    say::out(format_args!(
        "\nValid authentication token set (logged in).\n"
    ))?;
    Ok(exit::OK)
}
