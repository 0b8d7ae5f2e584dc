//! Files that a person names. They are opened so that nothing waits (a FIFO without a writer would for ever), and looked at
//! before they are read (`open(2)`, `O_NONBLOCK`; `fifo(7)`).

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// The file system of pipes that have no name (`statfs(2)`).
const PIPEFS: i64 = 0x5049_5045;
/// Device number of `/dev/null` (`null(4)`).
const NULL: (u32, u32) = (1, 3);

/// Opens a regular file for reading.
///
/// # Errors
/// As `open(2)`; or saying what it is instead.
pub fn open(path: &Path) -> io::Result<File> {
    regular(look(path, OFlags::RDONLY)?)
}

/// The same for reading and writing.
///
/// # Errors
/// As [`open`].
pub fn open_to_change(path: &Path) -> io::Result<File> {
    regular(look(path, OFlags::RDWR)?)
}

/// The bytes of a text that a person has written: of a regular file, of a pipe without a name (`<(program)` of a shell,
/// standard input), or none of `/dev/null`.
///
/// # Errors
/// As [`open`], or when it is longer than `max_bytes`.
pub fn text(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let file = look(path, OFlags::RDONLY)?;
    let file = if is_unnamed_pipe(&file)? || is_null(&file)? {
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
        file
    } else {
        regular(file)?
    };
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        let text = format!("longer than {} KiB", max_bytes >> 10);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// As [`text`], of UTF-8.
///
/// # Errors
/// As [`text`], or when it is something else.
pub fn string(path: &Path, max_bytes: u64) -> io::Result<String> {
    let not_text = |_| io::Error::new(io::ErrorKind::InvalidData, "not UTF-8");
    String::from_utf8(text(path, max_bytes)?).map_err(not_text)
}

fn look(path: &Path, access: OFlags) -> io::Result<File> {
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    match rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty()) {
        Ok(file) => Ok(file.into()),
        // What a socket, or a FIFO that is opened for writing, says.
        Err(Errno::NXIO) => Err(not_regular("a socket, or a device that is not there")),
        // Somebody holds a lease on a regular file, and is being asked to give it back (fcntl(2)).
        Err(Errno::WOULDBLOCK) if std::fs::metadata(path)?.is_file() => {
            Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
        }
        Err(error) => Err(error.into()),
    }
}

fn regular(file: File) -> io::Result<File> {
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    Err(not_regular(if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }))
}

fn not_regular(what: &str) -> io::Error {
    let text = format!("not a regular file: it is {what}");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn is_unnamed_pipe(file: &File) -> io::Result<bool> {
    if !file.metadata()?.file_type().is_fifo() {
        return Ok(false);
    }
    Ok(rustix::fs::fstatfs(file)?.f_type as i64 == PIPEFS)
}

fn is_null(file: &File) -> io::Result<bool> {
    let stat = rustix::fs::fstat(file)?;
    let device = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    let is_device = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device();
    Ok(is_device && device == NULL)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn what_would_wait_or_never_end_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            Mode::RWXU,
            0,
        )
        .unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("fifo", &link).unwrap();
        let table = [
            (fifo.as_path(), "a FIFO"),
            (&link, "a FIFO"),
            (&socket, "a socket"),
            (dir.path(), "a directory"),
            (Path::new("/dev/zero"), "a device"),
        ];
        for (path, what) in table {
            let wanted = format!("not a regular file: it is {what}");
            for error in [open(path).unwrap_err(), text(path, 9).unwrap_err()] {
                assert!(error.to_string().starts_with(&wanted), "{path:?}: {error}");
            }
            assert!(open_to_change(path).is_err(), "{path:?}");
        }
        assert!(open(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn text_comes_from_files_and_from_pipes_without_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(text(&path, 3).unwrap(), b"abc");
        let long = text(&path, 2).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(text(Path::new("/dev/null"), 1).unwrap(), b"");
        let (read, mut write) = io::pipe().unwrap();
        let writing = std::thread::spawn(move || write.write_all(b"from a program").unwrap());
        let name = format!("/proc/self/fd/{}", read.as_raw_fd());
        assert_eq!(string(Path::new(&name), 100).unwrap(), "from a program");
        writing.join().unwrap();
        std::fs::write(&path, b"\xff").unwrap();
        assert_eq!(
            string(&path, 3).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }
}
