//! What must not be seen: the values of variables that hold secrets are in no message, no plan and no log.
//!
//! Whoever shows the value of a variable shows it through [`Shown`].

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;

/// Parts of names of variables that hold secrets, in capital letters.
const PARTS: [&[u8]; 6] = [b"PASS", b"PEM", b"TOKEN", b"SECRET", b"CREDENTIAL", b"_KEY"];

/// Whether a variable of this name holds a secret, as far as its name tells. Small letters count as capital ones.
pub fn is_secret(name: &OsStr) -> bool {
    let name = name.as_bytes().to_ascii_uppercase();
    PARTS
        .iter()
        .any(|part| name.windows(part.len()).any(|w| w == *part))
}

/// The value of a variable for a person to read: a secret one is hidden, and so is its length.
#[derive(Clone, Copy)]
pub struct Shown<'a> {
    name: &'a OsStr,
    value: &'a OsStr,
}

impl<'a> Shown<'a> {
    /// What the variable `name` holds.
    pub fn new(name: &'a (impl AsRef<OsStr> + ?Sized), value: &'a OsStr) -> Shown<'a> {
        Shown {
            name: name.as_ref(),
            value,
        }
    }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if is_secret(self.name) {
            f.write_str("(hidden)")
        } else {
            self.value.display().fmt(f)
        }
    }
}

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_told_by_their_names() {
        for name in [
            "APPTAINER_ENCRYPTION_PASSPHRASE",
            "SINGULARITY_ENCRYPTION_PEM_DATA",
            "docker_password",
            "GITHUB_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "Api_Key",
        ] {
            let shown = Shown::new(name, OsStr::new("s3cret"));
            assert_eq!(format!("{shown} {shown:?}"), "(hidden) (hidden)", "{name}");
        }
        for name in ["PATH", "HOME", "KEYBOARD", "DEBUG", "MANPATH"] {
            assert_eq!(Shown::new(name, OsStr::new("x")).to_string(), "x", "{name}");
        }
    }
}
