//! What was written is read back; what was damaged is refused, whatever the damage.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use super::*;

const STAMP: Stamp = Stamp {
    time_s: 1_700_000_000,
    identity: [7; 16],
};

fn sample() -> File {
    let mut draft = Draft::default();
    draft.add(
        DataType::Definition,
        "",
        Content::Bytes(b"bootstrap: scratch\n".to_vec()),
    );
    draft.add(
        DataType::GenericJson,
        "inspect-metadata.json",
        Content::Bytes(b"{}".to_vec()),
    );
    let mut squashfs = tempfile::tempfile().unwrap();
    squashfs.write_all(&[5; 10_000]).unwrap();
    draft.add_partition(
        Partition {
            fs: FsType::Squashfs,
            part: PartType::Primary,
            arch: "amd64",
        },
        Content::File(squashfs),
    );
    draft.add_partition(
        Partition {
            fs: FsType::Ext3,
            part: PartType::Overlay,
            arch: "amd64",
        },
        Content::Bytes(vec![1; 5000]),
    );
    let mut file = tempfile::tempfile().unwrap();
    draft.write(&mut file, STAMP).unwrap();
    file
}

#[test]
fn what_was_written_is_read_back() {
    let file = sample();
    let sif = Sif::read(&file).unwrap();
    assert_eq!(sif.arch, "amd64");
    let ids: Vec<_> = sif
        .objects
        .iter()
        .map(|o| (o.id, o.group, o.len_bytes))
        .collect();
    assert_eq!(
        ids,
        [
            (1, Some(1), 19),
            (2, Some(1), 2),
            (3, Some(1), 10_000),
            (4, Some(1), 5000)
        ]
    );
    assert_eq!(sif.objects[1].name, "inspect-metadata.json");
    let (primary, partition) = sif.primary().unwrap();
    assert_eq!(
        (primary.offset_bytes % 4096, partition.fs),
        (0, FsType::Squashfs)
    );
    let mut bytes = vec![0; 10_000];
    file.read_exact_at(&mut bytes, primary.offset_bytes)
        .unwrap();
    assert_eq!(bytes, [5; 10_000]);
    assert_eq!(sif.partitions(PartType::Overlay).count(), 1);
}

#[test]
fn places_are_those_of_the_format() {
    let file = sample();
    let mut head = [0; 128];
    file.read_exact_at(&mut head, 0).unwrap();
    assert_eq!(
        &head[..48],
        b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\x0001\x0002\0"
    );
    assert_eq!(head[112..120], 32176u64.to_le_bytes());
    assert_eq!(Sif::read(&file).unwrap().objects[0].offset_bytes, 32176);
    assert_eq!(Sif::read(&file).unwrap().objects[2].offset_bytes, 32768);
}

#[test]
fn every_cut_is_an_error() {
    let len = sample().metadata().unwrap().len();
    for keep in [
        0,
        1,
        31,
        127,
        128,
        4096,
        20_000,
        32_175,
        36_864,
        len - 5001,
        len - 1,
    ] {
        let file = sample();
        file.set_len(keep).unwrap();
        let error = Sif::read(&file).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{keep}: {error}");
        assert!(error.to_string().contains("more byte"), "{error}");
    }
}

#[test]
fn no_number_can_do_harm() {
    let file = sample();
    for at in (0..128).chain(4096..4096 + 4 * 585) {
        let mut old = [0];
        file.read_exact_at(&mut old, at).unwrap();
        for new in [0, 1, 0x7f, 0x80, 0xff] {
            file.write_all_at(&[new], at).unwrap();
            if let Ok(sif) = Sif::read(&file) {
                let len = file.metadata().unwrap().len();
                assert!(
                    sif.objects
                        .iter()
                        .all(|o| o.offset_bytes + o.len_bytes <= len),
                    "byte {at} = {new}"
                );
            }
        }
        file.write_all_at(&old, at).unwrap();
    }
}

#[test]
fn too_many_objects_are_refused() {
    let mut draft = Draft::default();
    for _ in 0..49 {
        draft.add(DataType::GenericJson, "", Content::Bytes(Vec::new()));
    }
    assert!(matches!(
        draft.write(&mut tempfile::tempfile().unwrap(), STAMP),
        Err(Error::Full)
    ));
}
