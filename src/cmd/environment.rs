//! Options from the environment: `APPTAINER_<KEY>` first, then `SINGULARITY_<KEY>`.
//!
//! A command-line option beats the environment, but `--bind` and `--mount` of both are taken together.
//! Empty values are ignored; booleans are what Go's `strconv.ParseBool` reads.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use anyhow::{Result, bail};
use clap::ArgAction;

use crate::say;
use crate::secret::Shown;

/// Keys that differ from the option's own name in upper case, and further keys beside it.
const KEYS: &[(&str, &[&str])] = &[
    ("bind", &["BIND", "BINDPATH"]),
    ("cwd", &["CWD", "TARGET_CWD", "PWD", "TARGET_PWD"]),
    ("scratch", &["SCRATCH", "SCRATCHDIR"]),
    ("overlay", &["OVERLAY", "OVERLAYIMAGE"]),
    ("userns", &["USERNS", "UNSHARE_USERNS"]),
    ("pid", &["PID", "UNSHARE_PID"]),
    ("ipc", &["IPC", "UNSHARE_IPC"]),
    ("net", &["NET", "UNSHARE_NET"]),
    ("uts", &["UTS", "UNSHARE_UTS"]),
    ("no_init", &["NOSHIMINIT"]),
    ("no_env", &["NOENV"]),
    ("app", &["APP", "APPNAME"]),
    ("no_nv", &["NV_OFF", "NO_NV"]),
    ("no_rocm", &["ROCM_OFF", "NO_ROCM"]),
    ("no_https", &["NOHTTPS", "NO_HTTPS"]),
    ("authfile", &["AUTH_FILE", "AUTHFILE"]),
    // Apptainer's own code reads CPU_SHARES for --cpus; its documentation says CPUS.
    ("cpus", &["CPUS"]),
    // Keys of encrypted images: for an image that is not encrypted they mean nothing, and the others are refused.
    ("passphrase", &[]),
    ("pem_path", &[]),
    // Too plain: sites have variables of these names that mean something else.
    ("data", &[]),
    ("explain", &[]),
    ("proot", &[]),
    ("unsquash", &["UNSQUASH", "TMP_SANDBOX"]),
    ("build_arch", &["BUILD_ARCH"]),
    ("build_arch_variant", &["BUILD_ARCH_VARIANT"]),
    ("fix_perms", &["FIXPERMS"]),
    ("build_arg", &[]),
    ("build_arg_file", &[]),
    ("dir", &["PULLDIR", "PULLFOLDER"]),
    ("name", &["PULL_NAME"]),
    ("pull_arch", &["PULL_ARCH"]),
    ("pull_arch_variant", &["PULL_ARCH_VARIANT"]),
    ("login_username", &["LOGIN_USERNAME"]),
    ("login_password", &["LOGIN_PASSWORD"]),
    ("add_insecure", &["ADD_INSECURE"]),
    ("fusemount", &["FUSEMOUNT", "FUSESPEC"]),
    ("env", &[]),
    ("size", &[]),
    ("create_dir", &[]),
    ("device", &[]),
];

/// Options whose values of both sources are joined.
const JOINED: [&str; 2] = ["bind", "mount"];

/// Words of the environment's options, so that they are parsed like the typed ones.
#[derive(Debug, Default)]
pub struct Words {
    /// To put before the typed ones.
    pub before: Vec<OsString>,
    /// To put behind them: of joined values, the typed ones come first.
    pub behind: Vec<OsString>,
}

/// The environment's options. `typed` says whether an option was given on the command line.
///
/// # Errors
/// A boolean that is none.
pub fn words(
    command: &clap::Command,
    env: &[(OsString, OsString)],
    typed: &dyn Fn(&str) -> bool,
) -> Result<Words> {
    let mut all = Words::default();
    if !env.iter().any(|(k, _)| has_prefix(k)) {
        return Ok(all);
    }
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let id = arg.get_id().as_str();
        if id == "help" || (typed(id) && !JOINED.contains(&id)) {
            continue;
        }
        let own = [long.to_uppercase().replace('-', "_")];
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        let keys = KEYS
            .iter()
            .find(|(name, _)| *name == id)
            .map_or(own.as_slice(), |(_, keys)| *keys);
        let words = match JOINED.contains(&id) {
            true => &mut all.behind,
            false => &mut all.before,
        };
        for key in keys {
            let Some(value) = lookup(env, key) else {
                continue;
            };
            match arg.get_action() {
                ArgAction::SetTrue => {
                    if parse_bool(long, value)? {
                        words.push(format!("--{long}").into());
                    }
                }
                // One record a line: a record is itself written with commas.
                _ if id == "mount" => {
                    for record in value
                        .as_bytes()
                        .split(|b| *b == b'\n')
                        .filter(|r| !r.is_empty())
                    {
                        words.push(option(long, OsStr::from_bytes(record)));
                    }
                }
                _ => words.push(option(long, value)),
            }
            if !JOINED.contains(&id) {
                break;
            }
        }
    }
    Ok(all)
}

/// The value of `APPTAINER_<key>`, else of `SINGULARITY_<key>`, saying what the peers say of the old name.
pub fn lookup<'a>(env: &'a [(OsString, OsString)], key: &str) -> Option<&'a OsStr> {
    let value = |prefix: &str| {
        let name = format!("{prefix}{key}");
        env.iter()
            .find(|(k, v)| k.as_os_str() == name.as_str() && !v.is_empty())
            .map(|(_, v)| v.as_os_str())
    };
    match (value("APPTAINER_"), value("SINGULARITY_")) {
        (Some(new), Some(old)) => {
            if new != old {
                say::warn(format_args!(
                    "SINGULARITY_{key} and APPTAINER_{key} have different values, using the latter"
                ));
            }
            Some(new)
        }
        (Some(new), None) => Some(new),
        (None, Some(old)) => {
            say::info(format_args!(
                "Environment variable SINGULARITY_{key} is set, but APPTAINER_{key} is preferred"
            ));
            Some(old)
        }
        (None, None) => None,
    }
}

fn has_prefix(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"APPTAINER_") || name.as_bytes().starts_with(b"SINGULARITY_")
}

fn option(long: &str, value: &OsStr) -> OsString {
    let mut word = OsString::from(format!("--{long}="));
    word.push(value);
    word
}

/// What Go's `strconv.ParseBool` takes.
///
/// # Errors
/// Anything else, in Apptainer's words.
pub fn parse_bool(flag: &str, value: &OsStr) -> Result<bool> {
    match value.as_bytes() {
        b"1" | b"t" | b"T" | b"true" | b"TRUE" | b"True" => Ok(true),
        b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False" => Ok(false),
        _ => bail!(
            "while parsing environment variables: unable to set flag {flag} to value {}: not a boolean (use true or false)",
            Shown::new(flag, value)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::flags::ActionArgs;
    use clap::Args as _;

    fn words_of(env: &[(&str, &str)]) -> Result<Vec<OsString>> {
        let command = ActionArgs::augment_args(clap::Command::new("exec"));
        let env: Vec<_> = env.iter().map(|(k, v)| (k.into(), v.into())).collect();
        let words = words(&command, &env, &|_| false)?;
        Ok([words.before, words.behind].concat())
    }

    #[test]
    fn keys_of_encrypted_images_are_no_options() {
        for prefix in ["APPTAINER_", "SINGULARITY_"] {
            for name in ["PASSPHRASE", "PEM_PATH", "PEM_DATA"] {
                for name in [
                    format!("{prefix}ENCRYPTION_{name}"),
                    format!("{prefix}{name}"),
                ] {
                    let words = words_of(&[(&name, "s3cret")]).unwrap();
                    assert!(words.is_empty(), "{name}: {words:?}");
                }
            }
        }
    }

    #[test]
    fn no_value_of_a_secret_is_in_a_message() {
        let wrong = |flag: &str| {
            let error = parse_bool(flag, OsStr::new("s3cret")).unwrap_err();
            error.to_string()
        };
        assert!(wrong("pid").contains("pid to value s3cret: not a boolean"));
        for flag in ["passphrase", "pem-path", "password-stdin", "token"] {
            let text = wrong(flag);
            assert!(!text.contains("s3cret") && text.contains(flag), "{text}");
        }
    }
}
