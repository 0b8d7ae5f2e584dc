//! The host's environment to the container's, as far as it can be decided before the image's scripts are seen.
//!
//! The scripts do not see the host's variables, so that a default of the image (`X=${X:-y}`) is not taken from whatever the
//! caller happens to have set; afterwards the host's variables come back where the scripts set nothing of that name.
//! [`crate::engine::environment`] finishes the work inside.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use serde::{Serialize, Serializer};

use crate::secret::Shown;
use crate::shell;

/// The search path before the image's scripts, and what they get appended to theirs.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where GPU libraries appear.
pub const LIBS: &str = "/.singularity.d/libs";
/// What the peers append to the caller's `PATH` in `USER_PATH`.
const USER_PATH_END: &str = "/bin:/usr/bin:/sbin:/usr/sbin:/usr/local/bin:/usr/local/sbin";
/// Of the host even with `--cleanenv`.
const ALWAYS: [&str; 6] = [
    "TERM",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "ftp_proxy",
];
/// What a script in an environment file sets for itself.
const NOT_FROM_FILES: [&str; 7] = ["EUID", "GID", "HOME", "IFS", "OPTIND", "PWD", "UID"];

/// A variable.
pub type Variable = (OsString, OsString);

/// What is asked for, and what is known.
pub struct Request<'a> {
    /// The caller's environment.
    pub host: &'a [Variable],
    /// `--cleanenv`.
    pub cleanenv: bool,
    /// `--no-env`.
    pub no_env: &'a [String],
    /// `--env`.
    pub env: &'a [(String, OsString)],
    /// `--env-file`, with the contents.
    pub env_files: &'a [(PathBuf, Vec<u8>)],
    /// `--no-eval`.
    pub no_eval: bool,
    /// `--app`.
    pub app: Option<&'a str>,
    /// `--shell`.
    pub shell: Option<&'a str>,
    /// The home directory inside.
    pub home: &'a Path,
    /// The command's name.
    pub command: &'a str,
    /// The image's absolute path.
    pub image: &'a Path,
    /// The image's name.
    pub name: &'a str,
    /// The instance's name.
    pub instance: Option<&'a str>,
    /// Targets of the caller's binds, for containers within the container.
    pub binds: &'a [String],
    /// Arguments for the payload.
    pub args: &'a [OsString],
}

/// The environment before the image's scripts have their say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Environment {
    /// What the scripts see.
    #[serde(serialize_with = "lossy")]
    pub vars: Vec<Variable>,
    /// The host's, for names that the scripts leave alone.
    #[serde(serialize_with = "lossy")]
    pub host: Vec<Variable>,
    /// Over the image's.
    #[serde(serialize_with = "lossy")]
    pub overrides: Vec<Variable>,
    /// `PATH` in the end, whatever the image says.
    #[serde(serialize_with = "lossy_one")]
    pub path: Option<OsString>,
    /// Put before it.
    #[serde(serialize_with = "lossy_one")]
    pub prepend_path: Option<OsString>,
    /// Put behind it.
    #[serde(serialize_with = "lossy_one")]
    pub append_path: Option<OsString>,
    /// Put before `LD_LIBRARY_PATH`.
    #[serde(serialize_with = "lossy_one")]
    pub prepend_libs: Option<OsString>,
    /// Put behind it.
    #[serde(serialize_with = "lossy_one")]
    pub append_libs: Option<OsString>,
    /// Overrides are taken literally; otherwise a shell evaluates them.
    pub no_eval: bool,
}

/// The environment, with warnings and notices for the person.
///
/// # Errors
/// When an environment file cannot be evaluated.
pub fn plan(request: &Request) -> Result<(Environment, Vec<String>, Vec<String>)> {
    let mut environment = Environment {
        no_eval: request.no_eval,
        ..Environment::default()
    };
    let (mut warnings, mut infos) = (Vec::new(), Vec::new());
    environment.vars = own(request);
    environment.host = request
        .host
        .iter()
        .filter(|(name, value)| is_forwarded(request, name, value))
        .cloned()
        .collect();
    for (name, value) in overrides(request, &mut warnings, &mut infos)? {
        match name.to_str() {
            Some("PATH") => environment.path = Some(value),
            Some("PREPEND_PATH") => environment.prepend_path = Some(value),
            Some("APPEND_PATH") => environment.append_path = Some(value),
            Some("LD_LIBRARY_PATH") => {
                let mut value = value;
                if !value.is_empty() {
                    value.push(":");
                    value.push(LIBS);
                }
                environment.overrides.push((name, value));
            }
            Some("PREPEND_LD_LIBRARY_PATH") => environment.prepend_libs = Some(value),
            Some("APPEND_LD_LIBRARY_PATH") => environment.append_libs = Some(value),
            Some("HOME") => warnings.push(
                "Overriding HOME environment variable with APPTAINERENV_HOME is not permitted: use --home".into(),
            ),
            Some("UID" | "GID") => {}
            Some(text) if is_ours(text) => {
                warnings.push(format!("Overriding {text} environment variable is not permitted"));
            }
            _ => environment.overrides.push((name, value)),
        }
    }
    Ok((environment, warnings, infos))
}

/// Whether the container is told something by this variable that the caller must not change.
fn is_ours(name: &str) -> bool {
    let rest = name
        .strip_prefix("APPTAINER_")
        .or_else(|| name.strip_prefix("SINGULARITY_"));
    rest.is_some_and(|rest| ["APPNAME", "CONTAINER", "INSTANCE", "NAME", "SHELL"].contains(&rest))
}

/// The variables that we set.
fn own(request: &Request) -> Vec<Variable> {
    let mut vars: Vec<Variable> = Vec::new();
    let mut set = |name: &str, value: &OsStr| vars.push((name.into(), value.to_owned()));
    set("HOME", request.home.as_os_str());
    set("PATH", OsStr::new(DEFAULT_PATH));
    if request.cleanenv {
        set("LANG", OsStr::new("C"));
    }
    set("APPTAINER_COMMAND", OsStr::new(request.command));
    for prefix in ["APPTAINER", "SINGULARITY"] {
        let mut both = |name: &str, value: &OsStr| set(&format!("{prefix}_{name}"), value);
        both("CONTAINER", request.image.as_os_str());
        both("NAME", OsStr::new(request.name));
        both("BIND", OsStr::new(&request.binds.join(",")));
        both(
            "ENVIRONMENT",
            OsStr::new("/.singularity.d/env/91-environment.sh"),
        );
        if request.app.is_some() || prefix == "APPTAINER" {
            both("APPNAME", OsStr::new(request.app.unwrap_or_default()));
        }
        if let Some(instance) = request.instance {
            both("INSTANCE", OsStr::new(instance));
        }
        if let Some(shell) = request.shell {
            both("SHELL", OsStr::new(shell));
        }
        if request.no_eval {
            both("NO_EVAL", OsStr::new("1"));
        }
    }
    let path = request
        .host
        .iter()
        .find(|(k, _)| k == "PATH")
        .map_or(OsStr::new(""), |(_, v)| v);
    let mut user_path = path.to_owned();
    if !user_path.is_empty() {
        user_path.push(":");
    }
    user_path.push(USER_PATH_END);
    set("USER_PATH", &user_path);
    vars
}

/// A function that bash has exported; a name without one is nothing.
fn is_function(name: &[u8], value: &OsStr) -> bool {
    name.starts_with(b"BASH_FUNC_")
        && (name.ends_with(b"%%") || name.ends_with(b"()"))
        && value.as_bytes().starts_with(b"() {")
}

fn is_forwarded(request: &Request, name: &OsStr, value: &OsStr) -> bool {
    let bytes = name.as_bytes();
    let ours = [
        "APPTAINER_",
        "SINGULARITY_",
        "APPTAINERENV_",
        "SINGULARITYENV_",
    ];
    if ["HOME", "PATH", "LD_LIBRARY_PATH", "PWD"]
        .iter()
        .any(|n| name == *n)
        || ours
            .iter()
            .any(|prefix| bytes.starts_with(prefix.as_bytes()))
        || request.no_env.iter().any(|n| name == n.as_str())
        || !(shell::is_name(bytes) || is_function(bytes, value))
    {
        return false;
    }
    !request.cleanenv
        || ALWAYS
            .iter()
            .any(|n| bytes.eq_ignore_ascii_case(n.as_bytes()) && (*n != "TERM" || name == *n))
}

/// From the weakest to the strongest source; a later one replaces an earlier one.
fn overrides(
    request: &Request,
    warnings: &mut Vec<String>,
    infos: &mut Vec<String>,
) -> Result<Vec<Variable>> {
    let mut all: Vec<Variable> = prefixed(request.host, "APPTAINERENV_").collect();
    for (name, value) in prefixed(request.host, "SINGULARITYENV_") {
        let shown = name.display();
        match all.iter().find(|(n, _)| *n == name) {
            None => {
                infos.push(format!("Environment variable SINGULARITYENV_{shown} is set, but APPTAINERENV_{shown} is preferred"));
                all.push((name, value));
            }
            Some((_, preferred)) if *preferred != value => warnings.push(format!(
                "Skipping environment variable [SINGULARITYENV_{shown}={}], {shown} is already overridden with different value [{}]",
                Shown::new(&name, &value),
                Shown::new(&name, preferred)
            )),
            Some(_) => {}
        }
    }
    for (path, text) in request.env_files {
        for (name, value) in from_file(request, path, text)? {
            if request.env.iter().any(|(n, _)| name == n.as_str()) {
                warnings.push(format!(
                    "Ignored environment file variable {}: override from --env",
                    name.display()
                ));
            } else {
                replace(&mut all, name, value);
            }
        }
    }
    for (name, value) in request.env {
        replace(&mut all, name.into(), value.clone());
    }
    all.retain(|(name, _)| shell::is_name(name.as_bytes()));
    Ok(all)
}

fn prefixed<'a>(host: &'a [Variable], prefix: &'a str) -> impl Iterator<Item = Variable> + 'a {
    host.iter().filter_map(move |(name, value)| {
        let name = name.as_bytes().strip_prefix(prefix.as_bytes())?;
        Some((OsStr::from_bytes(name).to_owned(), value.clone()))
    })
}

fn replace(all: &mut Vec<Variable>, name: OsString, value: OsString) {
    all.retain(|(n, _)| *n != name);
    all.push((name, value));
}

/// What a file in shell syntax sets. It sees the host's variables and runs no program.
fn from_file(request: &Request, path: &Path, text: &[u8]) -> Result<Vec<Variable>> {
    let params = request.args.iter().map(|a| a.as_bytes().to_vec()).collect();
    let mut state = shell::State {
        params,
        ..shell::State::default()
    };
    for (name, value) in request
        .host
        .iter()
        .filter(|(n, _)| shell::is_name(n.as_bytes()))
    {
        state.export(name.as_bytes(), value.as_bytes());
    }
    state.export(b"APPTAINER_IMAGE", request.image.as_os_str().as_bytes());
    shell::run(text, &mut state, &shell::NoFiles).map_err(|error| {
        anyhow!("cannot evaluate the environment file {} (--env-file): {error}; use assignments, one a line", path.display())
    })?;
    let set = state.vars.into_iter().filter(|(name, var)| {
        var.assigned && var.more.is_none() && !NOT_FROM_FILES.iter().any(|n| n.as_bytes() == name)
    });
    Ok(set
        .filter_map(|(name, var)| Some((OsString::from_vec(name), OsString::from_vec(var.value?))))
        .collect())
}

fn lossy<S: Serializer>(vars: &[Variable], serializer: S) -> Result<S::Ok, S::Error> {
    let shown = |name, value| Shown::new(name, value).to_string();
    serializer.collect_map(vars.iter().map(|(n, v)| (n.to_string_lossy(), shown(n, v))))
}

fn lossy_one<S: Serializer>(value: &Option<OsString>, serializer: S) -> Result<S::Ok, S::Error> {
    value
        .as_ref()
        .map(|v| v.to_string_lossy())
        .serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn var(name: &str, value: &str) -> Variable {
        (name.into(), value.into())
    }

    fn planned<'a>(
        host: &'a [Variable],
        change: impl FnOnce(&mut Request<'a>),
    ) -> Result<(Environment, Vec<String>, Vec<String>)> {
        let mut request = Request {
            host,
            cleanenv: false,
            no_env: &[],
            env: &[],
            env_files: &[],
            no_eval: false,
            app: None,
            instance: None,
            shell: None,
            home: Path::new("/home/x"),
            command: "exec",
            image: Path::new("/images/a.sif"),
            name: "a.sif",
            binds: &[],
            args: &[],
        };
        change(&mut request);
        plan(&request)
    }

    #[test]
    fn host_variables_are_held_back_from_the_scripts() {
        let host = [
            var("A", "1"),
            var("PATH", "/x"),
            var("LD_LIBRARY_PATH", "/y"),
            var("APPTAINER_BIND", "/z"),
            var("BASH_FUNC_x%%", "() {  echo x\n}"),
            var("BASH_FUNC_y%%", "no function"),
            var("a.b", "() {"),
        ];
        let (environment, ..) = planned(&host, |_| {}).unwrap();
        let function = var("BASH_FUNC_x%%", "() {  echo x\n}");
        assert_eq!(environment.host, [var("A", "1"), function]);
        assert!(environment.vars.contains(&var("PATH", DEFAULT_PATH)));
        assert!(
            environment
                .vars
                .contains(&var("USER_PATH", &format!("/x:{USER_PATH_END}")))
        );
    }

    #[test]
    fn clean_environment_keeps_terminal_and_proxies() {
        let host = [
            var("A", "1"),
            var("TERM", "xterm"),
            var("HTTPS_PROXY", "p"),
            var("LANG", "de"),
        ];
        let (environment, ..) = planned(&host, |r| r.cleanenv = true).unwrap();
        assert_eq!(
            environment.host,
            [var("TERM", "xterm"), var("HTTPS_PROXY", "p")]
        );
        assert!(environment.vars.contains(&var("LANG", "C")));
    }

    #[test]
    fn options_beat_files_beat_prefixes() {
        let host = [
            var("SINGULARITYENV_A", "s"),
            var("APPTAINERENV_A", "a"),
            var("SINGULARITYENV_B", "s"),
            var("H", "host"),
        ];
        let files = [(
            PathBuf::from("f.env"),
            b"C=file\nD=\"$H\"\nexport E=$HOME\nA2=x".to_vec(),
        )];
        let env = [("C".to_owned(), OsString::from("option"))];
        let (environment, warnings, infos) = planned(&host, |r| {
            r.env_files = &files;
            r.env = &env;
        })
        .unwrap();
        let get = |name: &str| {
            environment
                .overrides
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, v)| v.to_str().unwrap())
        };
        assert_eq!(
            (get("A"), get("B"), get("C"), get("D")),
            (Some("a"), Some("s"), Some("option"), Some("host"))
        );
        assert_eq!(get("H"), None, "what the file only reads is not taken over");
        assert!(
            warnings[0].contains("[SINGULARITYENV_A=s], A is already overridden"),
            "{warnings:?}"
        );
        assert_eq!(
            warnings[1],
            "Ignored environment file variable C: override from --env"
        );
        assert_eq!(
            infos,
            ["Environment variable SINGULARITYENV_B is set, but APPTAINERENV_B is preferred"]
        );
    }

    #[test]
    fn paths_are_special_and_home_is_not_to_be_set() {
        let host = [
            var("APPTAINERENV_PREPEND_PATH", "/p"),
            var("APPTAINERENV_LD_LIBRARY_PATH", "/l"),
            var("APPTAINERENV_HOME", "/h"),
            var("APPTAINERENV_PREPEND_LD_LIBRARY_PATH", "/first"),
            var("APPTAINERENV_APPTAINER_SHELL", "/bin/zsh"),
            var("SINGULARITYENV_UID", "0"),
        ];
        let (environment, warnings, _) = planned(&host, |_| {}).unwrap();
        assert_eq!(environment.prepend_path.as_deref(), Some(OsStr::new("/p")));
        assert_eq!(
            environment.overrides,
            [var("LD_LIBRARY_PATH", "/l:/.singularity.d/libs")]
        );
        assert_eq!(
            environment.prepend_libs.as_deref(),
            Some(OsStr::new("/first"))
        );
        assert_eq!(
            warnings,
            [
                "Overriding HOME environment variable with APPTAINERENV_HOME is not permitted: use --home",
                "Overriding APPTAINER_SHELL environment variable is not permitted"
            ]
        );
    }

    #[test]
    fn container_is_told_what_was_asked_for() {
        let names = |environment: &Environment| -> Vec<String> {
            let names = environment.vars.iter().map(|(n, _)| n.to_str().unwrap());
            names.map(str::to_owned).collect()
        };
        let binds = ["/a".to_owned(), "/b".to_owned()];
        let (environment, ..) = planned(&[], |r| {
            r.binds = &binds;
            r.shell = Some("/bin/zsh");
            r.app = Some("foo");
            r.no_eval = true;
        })
        .unwrap();
        for variable in [
            var("APPTAINER_BIND", "/a,/b"),
            var("SINGULARITY_BIND", "/a,/b"),
            var("SINGULARITY_SHELL", "/bin/zsh"),
            var("SINGULARITY_APPNAME", "foo"),
            var("SINGULARITY_NO_EVAL", "1"),
            var("APPTAINER_NAME", "a.sif"),
            var("SINGULARITY_CONTAINER", "/images/a.sif"),
            var("APPTAINER_COMMAND", "exec"),
            var("HOME", "/home/x"),
        ] {
            assert!(environment.vars.contains(&variable), "{variable:?}");
        }
        let plain = names(&planned(&[], |_| {}).unwrap().0);
        assert!(plain.contains(&"APPTAINER_APPNAME".to_owned()));
        for name in [
            "SINGULARITY_APPNAME",
            "APPTAINER_SHELL",
            "SINGULARITY_NO_EVAL",
            "LANG",
        ] {
            assert!(!plain.contains(&name.to_owned()), "{name}");
        }
    }

    #[test]
    fn variables_not_to_be_taken_over_are_named() {
        let host = [var("A", "1"), var("B", "2")];
        let no_env = ["A".to_owned()];
        let (environment, ..) = planned(&host, |r| r.no_env = &no_env).unwrap();
        assert_eq!(environment.host, [var("B", "2")]);
    }

    #[test]
    fn what_shells_make_themselves_is_not_guessed() {
        let files = [(PathBuf::from("f.env"), b"CACHE=/tmp/$UID\n".to_vec())];
        let error = planned(&[], |r| r.env_files = &files)
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 1: UID"), "{error}");
    }

    #[test]
    fn file_with_a_command_is_refused_by_name_and_line() {
        let files = [(PathBuf::from("f.env"), b"A=1\nB=$(date)\n".to_vec())];
        let error = planned(&[], |r| r.env_files = &files)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("f.env") && error.contains("line 2"),
            "{error}"
        );
    }
}
