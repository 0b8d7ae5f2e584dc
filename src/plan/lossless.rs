//! Paths in JSON: text where they are UTF-8, which JSON asks for, else the list of their bytes.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

#[derive(Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<Form> for PathBuf {
    fn from(form: Form) -> PathBuf {
        match form {
            Form::Text(text) => text.into(),
            Form::Bytes(bytes) => OsString::from_vec(bytes).into(),
        }
    }
}

/// For `#[serde(with)]`.
///
/// # Errors
/// As the serializer.
pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    match path.to_str() {
        Some(text) => to.serialize_str(text),
        None => path.as_os_str().as_bytes().serialize(to),
    }
}

/// For `#[serde(with)]`.
///
/// # Errors
/// When it is neither text nor bytes.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    Form::deserialize(from).map(PathBuf::from)
}

/// The same for paths that there may be.
pub mod option {
    use super::{Deserialize as _, Deserializer, Form, Path, PathBuf, Serializer};

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    /// As the serializer.
    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
        match path.as_deref() {
            Some(path) => super::serialize(Path::new(path), to),
            None => to.serialize_none(),
        }
    }

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    /// When it is neither text nor bytes.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<Form>::deserialize(from)?.map(PathBuf::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Both {
        #[serde(with = "super")]
        path: PathBuf,
        #[serde(default, with = "super::option")]
        more: Option<PathBuf>,
    }

    #[test]
    fn paths_come_back_byte_by_byte() {
        for bytes in [&b"/home/ada"[..], b"/home/\xff\xfe", b"", "/é".as_bytes()] {
            let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            for more in [None, Some(path.clone())] {
                let both = Both {
                    path: path.clone(),
                    more,
                };
                let text = serde_json::to_string(&both).unwrap();
                assert_eq!(serde_json::from_str::<Both>(&text).unwrap(), both, "{text}");
            }
        }
        assert_eq!(
            serde_json::from_str::<Both>(r#"{"path": "/x"}"#)
                .unwrap()
                .more,
            None
        );
    }
}
