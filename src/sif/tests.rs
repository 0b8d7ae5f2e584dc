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

/// The sample with a descriptor's field (by its byte) changed to this number.
fn changed(slot: u64, at: u64, number: u64) -> Result<Sif, Error> {
    let file = sample();
    let place = 4096 + slot * DESCRIPTOR_LEN as u64 + at;
    file.write_all_at(&number.to_le_bytes(), place).unwrap();
    Sif::read(&file)
}

#[test]
fn what_readers_would_understand_differently_is_refused() {
    const OFFSET: u64 = 17;
    const LEN: u64 = 25;
    let error = |result: Result<Sif, Error>| result.unwrap_err().to_string();
    for (slot, at, number, words) in [
        (1, OFFSET, 32_176, "object 1 and object 2 overlap"),
        (0, OFFSET, 0, "the header and object 1 overlap"),
        (0, OFFSET, 120, "the header and object 1 overlap"),
        (0, OFFSET, 4090, "overlap"),
        (0, OFFSET, 32_160, "overlap"),
        (
            0,
            OFFSET,
            20_000,
            "the table of descriptors and object 1 overlap",
        ),
        (2, OFFSET, 32_180, "overlap"),
        (1, LEN, 1000, "object 2 and object 3 overlap"),
        // The overlay partition becomes a primary one.
        (3, EXTRA as u64 + 4, 2, "2 primary partitions"),
    ] {
        // A number of four bytes: the four behind it are the architecture.
        let result = match at == EXTRA as u64 + 4 {
            true => changed(
                slot,
                at,
                number | u64::from(u32::from_le_bytes(*b"02\0\0")) << 32,
            ),
            false => changed(slot, at, number),
        };
        assert!(error(result).contains(words), "{slot} {at} {number}");
    }
    // Nothing overlaps with nothing, wherever it lies.
    assert!(changed(0, LEN, 0).is_ok());
    let file = sample();
    file.write_all_at(&1_u32.to_le_bytes(), 4096 + DESCRIPTOR_LEN as u64 + 5)
        .unwrap();
    assert!(error(Sif::read(&file)).contains("two objects have the number 1"));
    for len in [0, 28_079, 28_081, 28_080 * 2, u64::MAX] {
        let file = sample();
        file.write_all_at(&len.to_le_bytes(), 104).unwrap();
        assert!(error(Sif::read(&file)).contains("48 descriptors"), "{len}");
    }
}

#[test]
fn names_are_kept_in_full_or_refused() {
    for len in [0, 1, 127, 128, 129, 200] {
        let name = "n".repeat(len);
        let mut draft = Draft::default();
        draft.add(DataType::GenericJson, &name, Content::Bytes(Vec::new()));
        let mut file = tempfile::tempfile().unwrap();
        match draft.write(&mut file, STAMP) {
            Ok(()) => assert_eq!(Sif::read(&file).unwrap().objects[0].name, name),
            Err(Error::LongName(found)) => assert!(found == len && len > 128),
            Err(error) => panic!("{error}"),
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sif");
        create(&path, STAMP).unwrap();
        let before = std::fs::read(&path).unwrap();
        let addition = Addition {
            data_type: DataType::GenericJson,
            name: name.clone(),
            group: None,
            link: Link::None,
            alignment: None,
            extra: Extra::None,
            content: tempfile::tempfile().unwrap(),
        };
        match Editor::open(&path).unwrap().add(addition, 0) {
            Ok(_) => {
                let sif = Sif::read(&File::open(&path).unwrap()).unwrap();
                assert_eq!(sif.objects[0].name, name);
            }
            Err(error) => {
                assert!(len > 128, "{error}");
                assert!(std::fs::read(&path).unwrap() == before, "it is as it was");
            }
        }
    }
}
