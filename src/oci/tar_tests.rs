//! Archives made by GNU tar and by hand.

use std::io::Cursor;
use std::process::Command;

use ::tar;

use super::*;

impl Source for Cursor<Vec<u8>> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.take(bytes), &mut io::sink())?;
        if skipped < bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

fn members(bytes: Vec<u8>) -> Result<Vec<(Member, Vec<u8>)>> {
    let mut archive = Archive::new(Cursor::new(bytes));
    let mut found = Vec::new();
    while let Some(member) = archive.next()? {
        let mut content = Vec::new();
        archive.content().read_to_end(&mut content)?;
        found.push((member, content));
    }
    Ok(found)
}

fn gnu_tar(directory: &std::path::Path, options: &[&str]) -> Vec<u8> {
    let mut command = Command::new("tar");
    command
        .args(options)
        .arg("-C")
        .arg(directory)
        .args(["-cf", "-", "."]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn long_names_and_sparse_files_are_read_in_each_format() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(200), "n".repeat(250));
    std::fs::create_dir(dir.path().join("d".repeat(200))).unwrap();
    std::fs::write(dir.path().join(&long), "long").unwrap();
    let target = "t".repeat(300);
    std::os::unix::fs::symlink(&target, dir.path().join("link")).unwrap();
    let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
    use std::os::unix::fs::FileExt as _;
    let mut expected = vec![0; 3_000_001];
    // More pieces than a header holds, and one that begins the file.
    for at in (0..2_900_000).step_by(100_000) {
        sparse.write_all_at(b"data", at as u64).unwrap();
        expected[at..at + 4].copy_from_slice(b"data");
    }
    sparse.set_len(expected.len() as u64).unwrap();
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=posix"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=1.0"],
    ] {
        let bytes = gnu_tar(dir.path(), options);
        let is_sparse = options.contains(&"--sparse");
        assert_eq!(bytes.len() < 1_000_000, is_sparse, "{options:?}");
        let found = members(bytes).unwrap();
        let named = |name: &str| {
            let path = format!("./{name}").into_bytes();
            let found = found.iter().find(|(m, _)| m.path == path);
            found.unwrap_or_else(|| panic!("no {name}: {options:?}"))
        };
        assert_eq!(named(&long).1, b"long");
        let link = Type::Symlink(target.clone().into_bytes());
        assert_eq!(named("link").0.kind, link);
        let (member, content) = named("sparse");
        assert!(*content == expected, "{options:?}");
        assert_eq!(member.len_bytes, expected.len() as u64);
    }
}

/// An archive of one member, whose header was changed.
fn changed(change: impl FnOnce(&mut tar::Header)) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("name").unwrap();
    header.set_size(3);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(1);
    header.set_mtime(1);
    change(&mut header);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(b"abc");
    bytes.resize(2048, 0);
    bytes
}

fn error(bytes: Vec<u8>) -> String {
    format!("{:#}", members(bytes).unwrap_err())
}

#[test]
fn fields_out_of_range_are_errors() {
    assert!(error(changed(|h| h.set_size(u64::MAX >> 1))).contains("ends early"));
    assert!(error(changed(|h| h.set_size(u64::MAX))).contains("out of range"));
    let large = changed(|h| {
        h.set_entry_type(tar::EntryType::XHeader);
        h.set_size(1 << 40);
    });
    assert!(error(large).contains("more than"));
    assert!(error(changed(|h| h.as_old_mut().mode = *b"rwxrwxrw")).contains("no number"));
    assert!(error(changed(|h| h.as_old_mut().size = *b"zzzzzzzzzzzz")).contains("no number"));
    let mut bytes = changed(|_| {});
    bytes[0] ^= 1;
    assert!(error(bytes).contains("no tar header"));
    assert!(error(b"plain text".repeat(100)).contains("no tar header"));
    assert!(error(changed(|_| {})[..514].to_vec()).contains("ends early"));
}

#[test]
fn sparse_maps_that_do_not_fit_are_errors() {
    let sparse = |pieces: [(u64, u64); 2], real: u64| {
        changed(|header| {
            header.set_entry_type(tar::EntryType::GNUSparse);
            let gnu = header.as_gnu_mut().unwrap();
            for (slot, (offset, len)) in gnu.sparse.iter_mut().zip(pieces) {
                slot.set_offset(offset);
                slot.set_length(len);
            }
            gnu.set_real_size(real);
        })
    };
    let good = members(sparse([(1, 1), (5, 2)], 8)).unwrap();
    assert_eq!(good[0].1, b"\0a\0\0\0bc\0");
    for (pieces, real, expected) in [
        ([(5, 2), (1, 1)], 8, "map is damaged"),
        ([(1, 1), (u64::MAX, 2)], 8, "map is damaged"),
        ([(1, 1), (7, 2)], 8, "map is damaged"),
        ([(1, 1), (5, 1)], 8, "does not fit"),
        ([(1, 1), (5, 2)], MAX_SPARSE + 1, "more than"),
    ] {
        let text = error(sparse(pieces, real));
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn times_before_1970_and_empty_fields_are_no_errors() {
    let found = members(changed(|h| h.set_mtime(-5i64 as u64))).unwrap();
    assert_eq!(found[0].0.mtime_s, 0);
    let found = members(changed(|h| {
        h.as_old_mut().uid = [0; 8];
        h.as_old_mut().gid = *b"        ";
    }))
    .unwrap();
    assert_eq!((found[0].0.uid, found[0].0.gid), (0, 0));
    assert_eq!(found[0].1, b"abc");
}
