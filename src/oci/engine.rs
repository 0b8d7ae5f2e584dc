//! The Docker engine of this machine, at its socket (Docker Engine API, "Export an image").

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// An engine that says nothing for so long has ended.
const PATIENCE: Duration = Duration::from_secs(300);
/// Of an answer's head and of an error's text, this much is read.
const MAX_TEXT: u64 = 64 << 10;

/// Writes an image's archive into an empty file; `false` when no engine answers.
///
/// # Errors
/// When the engine does not give the image.
pub fn save(name: &str, file: &File) -> Result<bool> {
    for path in sockets() {
        if let Ok(stream) = UnixStream::connect(&path) {
            return get(stream, name, file)
                .with_context(|| format!("asking the engine at {}", path.display()))
                .map(|()| true);
        }
    }
    Ok(false)
}

/// `$DOCKER_HOST` alone where it names a socket, else that of the system and that of a user's own engine.
fn sockets() -> Vec<PathBuf> {
    let named = std::env::var("DOCKER_HOST").ok().filter(|h| !h.is_empty());
    match named {
        Some(host) => host
            .strip_prefix("unix://")
            .map(PathBuf::from)
            .into_iter()
            .collect(),
        None => {
            let own =
                std::env::var_os("XDG_RUNTIME_DIR").map(|d| Path::new(&d).join("docker.sock"));
            let system = PathBuf::from("/var/run/docker.sock");
            [system].into_iter().chain(own).collect()
        }
    }
}

/// One request of HTTP 1.0: the answer is not in chunks, and ends with the connection.
fn get(mut stream: UnixStream, name: &str, mut file: &File) -> Result<()> {
    // In an address these would mean something else; no name has them.
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b);
    if name.is_empty() || !name.bytes().all(is_plain) {
        bail!("{name:?} is not the name of an image");
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET /images/{name}/get HTTP/1.0\r\nHost: docker\r\n\r\n"
    )?;
    let mut reader = BufReader::new(stream);
    let (status, len) = head(&mut reader)?;
    if status != 200 {
        let mut text = String::new();
        // Whatever comes is better than nothing.
        let _ = reader.take(MAX_TEXT).read_to_string(&mut text);
        let answer: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        let words = answer.as_ref().and_then(|a| a["message"].as_str());
        bail!(
            "it says {:?} (status {status})",
            words.unwrap_or(text.trim())
        );
    }
    let copied = io::copy(&mut reader, &mut file).context("the image does not come whole")?;
    match len {
        Some(len) if len != copied => {
            bail!("the image does not come whole: {copied} bytes of {len}")
        }
        _ => Ok(()),
    }
}

/// The status of an answer, and its length where it tells it.
fn head(reader: &mut impl io::BufRead) -> Result<(u16, Option<u64>)> {
    let mut lines = reader.by_ref().take(MAX_TEXT);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    let status = line.split_whitespace().nth(1).and_then(|s| s.parse().ok());
    let status = status.filter(|_| line.starts_with("HTTP/1."));
    let status = status.context("what answers there is no Docker engine")?;
    let mut len = None;
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            bail!("its answer ends early");
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                len = value.trim().parse().ok();
            }
            Some(_) => {}
            None => return Ok((status, len)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What one answer of an engine comes to.
    fn ask(answer: &'static [u8]) -> Result<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let engine = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let first = lines.next().unwrap().unwrap();
            lines.find(|line| line.as_ref().is_ok_and(String::is_empty));
            stream.write_all(answer).unwrap();
            first
        });
        let file = tempfile::tempfile().unwrap();
        let got = get(UnixStream::connect(&path).unwrap(), "a/b:1", &file);
        assert_eq!(engine.join().unwrap(), "GET /images/a/b:1/get HTTP/1.0");
        got?;
        let mut bytes = vec![0; 100];
        let len = file.read_at(&mut bytes, 0)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    #[test]
    fn engine_is_asked_for_an_archive() {
        let good = b"HTTP/1.0 200 OK\r\nContent-Type: application/x-tar\r\n\r\nthe archive";
        assert_eq!(ask(good).unwrap(), b"the archive");
        let good = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\ntar";
        assert_eq!(ask(good).unwrap(), b"tar");
        for (answer, words) in [
            (
                &b"HTTP/1.1 404 Not Found\r\n\r\n{\"message\":\"No such image: a/b:1\"}"[..],
                "No such image: a/b:1",
            ),
            (b"HTTP/1.1 500 x\r\n\r\n", "status 500"),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
                "5 bytes of 9",
            ),
            (b"HTTP/1.1 200 OK\r\n", "ends early"),
            (b"SSH-2.0-x\r\n\r\n", "no Docker engine"),
            (b"", "no Docker engine"),
        ] {
            let error = format!("{:#}", ask(answer).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        let (one, _other) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let error = get(one, "a b\r\nX: y", &file).unwrap_err();
        assert!(error.to_string().contains("not the name"));
    }
}
