//! Documents with every optional field absent or null, and names with colons.

use std::fmt::Debug;

use serde_json::json;

use super::*;

/// All places in a document, as JSON pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut below = |name: &str, member: &Value| {
        let here = format!("{at}/{}", name.replace('/', "~1"));
        found.push(here.clone());
        places(member, &here, found);
    };
    match value {
        Value::Object(members) => members.iter().for_each(|(name, m)| below(name, m)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(index, item)| below(&index.to_string(), item)),
        _ => {}
    }
}

fn without(whole: &Value, place: &str) -> Option<Value> {
    let mut value = whole.clone();
    let (parent, name) = place.rsplit_once('/').unwrap();
    let name = name.replace("~1", "/");
    value.pointer_mut(parent)?.as_object_mut()?.remove(&name)?;
    Some(value)
}

/// Each field of a document is set to null: the document is then what it is without the field, and an error only where
/// one of the `required` is meant.
fn check<T: for<'de> Deserialize<'de> + PartialEq + Debug>(whole: &Value, required: &[&str]) {
    let read = |value: &Value| parse::<T>(value.to_string().as_bytes());
    read(whole).unwrap();
    let mut all = Vec::new();
    places(whole, "", &mut all);
    assert!(all.len() > 10);
    for place in &all {
        let Some(absent) = without(whole, place) else {
            continue;
        };
        let mut null = whole.clone();
        *null.pointer_mut(place).unwrap() = Value::Null;
        let is_required = required.iter().any(|r| place.ends_with(r));
        match (read(&null), read(&absent)) {
            (Ok(null), Ok(absent)) => assert_eq!(null, absent, "{place}"),
            (Err(_), Err(_)) if is_required => {}
            (null, absent) => panic!("{place}: {null:?}, {absent:?}"),
        }
    }
}

fn descriptor() -> Value {
    json!({"mediaType": "m", "digest": Digest::of(b"x").to_string(), "size": 1, "data": "e30=",
        "platform": {"architecture": "arm", "os": "linux", "variant": "v7", "os.version": "1", "features": ["x"]},
        "annotations": {"a/b": "c"}, "urls": ["https://a/b"], "artifactType": "t"})
}

#[test]
fn null_is_absent_in_every_field() {
    let one = descriptor();
    check::<Manifest>(
        &json!({"schemaVersion": 2, "mediaType": "m", "artifactType": "t", "config": one, "layers": [one, one],
            "subject": one, "annotations": {"a": "b"}}),
        &["/digest", "/size", "/config"],
    );
    check::<Index>(
        &json!({"schemaVersion": 2, "mediaType": "m", "artifactType": "t", "manifests": [one, one], "subject": one,
            "annotations": {"a": "b"}}),
        &["/digest", "/size"],
    );
    check::<ImageConfig>(
        &json!({"created": "2026-01-01T00:00:00Z", "author": "a", "architecture": "arm", "os": "linux",
            "variant": "v7", "os.version": "1", "history": [{"created_by": "x", "empty_layer": true}],
            "config": {"Env": ["A=b"], "Entrypoint": ["e"], "Cmd": ["c"], "WorkingDir": "/", "User": "u",
                "Labels": {"l": "m"}, "ExposedPorts": {"1/tcp": {}}, "Volumes": {"/v": {}}, "Healthcheck": {"Test": ["t"]}},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"x").to_string()]}}),
        &[],
    );
}

#[test]
fn names_and_paths_with_colons_are_told_apart() {
    let files = ["dm.tar", "a:b/dm.tar", "c:d", "/x/y.tar"];
    let is_there = |path: &str| files.contains(&path);
    for (text, path, name) in [
        ("dm.tar", "dm.tar", None),
        ("dm.tar:", "dm.tar", None),
        ("dm.tar:x", "dm.tar", Some("x")),
        ("dm.tar:x:2", "dm.tar", Some("x:2")),
        ("dm.tar:reg.io:5000/x:2", "dm.tar", Some("reg.io:5000/x:2")),
        ("dm.tar:@0", "dm.tar", Some("@0")),
        ("a:b/dm.tar:x:2", "a:b/dm.tar", Some("x:2")),
        ("c:d", "c:d", None),
        ("c:d:e", "c:d", Some("e")),
        ("/x/y.tar:z/w:1", "/x/y.tar", Some("z/w:1")),
        ("none:x:2", "none", Some("x:2")),
        ("none", "none", None),
    ] {
        assert_eq!(split(text, &is_there), (path, name), "{text}");
    }
}
