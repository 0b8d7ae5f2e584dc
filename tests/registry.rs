//! What registries, mirrors, logins and caches are met with: manifests as many programs write them, answers that clients
//! tell causes by, and caches that are damaged, full or not there.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use capsid::digest::Digest;
use common::http::{Answer, Asked, Server};
use common::registry::{Image, command, image, registry, run};
use common::{Env, Output, output};
use serde_json::{Value, json};

const CAPSID: &str = env!("CARGO_BIN_EXE_capsid");

/// The address of the image of a server; without an option, since a server on this machine may speak plain HTTP.
fn address(server: &Server) -> String {
    format!("docker://{}/test/image:v1", server.address)
}

fn pull(t: &Env, server: &Server) -> Output {
    run(t, &["pull", "-F", "x.sif", &address(server)])
}

/// Pulls an image and runs it.
#[track_caller]
fn assert_runs(t: &Env, image: &Image) {
    pull(t, &registry(image, |_| None)).ok();
    assert_eq!(run(t, &["run", "x.sif"]).ok(), "hello");
}

fn own_platform() -> Value {
    json!({"os": "linux", "architecture": capsid::host::go_arch(std::env::consts::ARCH)})
}

/// Documents that a registry gives by their digests.
#[derive(Default)]
struct Documents(Vec<(String, Vec<u8>)>);

impl Documents {
    fn add(&mut self, kind: &str, text: Vec<u8>) -> Value {
        let digest = Digest::of(&text).to_string();
        let descriptor = json!({"mediaType": kind, "digest": digest, "size": text.len()});
        self.0.push((digest, text));
        descriptor
    }

    fn index(&mut self, manifests: &[Value]) -> Value {
        let kind = "application/vnd.oci.image.index.v1+json";
        let text = json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests});
        self.add(kind, text.to_string().into_bytes())
    }

    /// A registry whose tag is one of the documents.
    fn serve(self, image: &Image, tag: &Value) -> Server {
        let tag = tag["digest"].as_str().unwrap().to_owned();
        registry(image, move |asked| {
            let name = asked.target.strip_prefix("/v2/test/image/manifests/")?;
            let name = if name == "v1" { &tag } else { name };
            let found = self.0.iter().find(|(digest, _)| digest == name)?;
            Some(Answer::new(200, found.1.clone()))
        })
    }
}

#[test]
fn index_of_indexes_leads_to_the_image() {
    let t = Env::new();
    let image = image(&t);
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let on = |mut descriptor: Value, platform: &Value| {
        descriptor["platform"] = platform.clone();
        descriptor
    };
    let (own, other) = (
        own_platform(),
        json!({"os": "linux", "architecture": "s390x"}),
    );
    let none = json!({"os": "unknown", "architecture": "unknown"});
    for shape in 0..3 {
        let mut documents = Documents::default();
        let ours = documents.add(kind, image.manifest.clone());
        let theirs = documents.add(kind, br#"{"schemaVersion": 2}"#.to_vec());
        let attestation = on(documents.add(kind, b"{}".to_vec()), &none);
        let tag = match shape {
            0 => {
                let theirs = documents.index(&[on(theirs, &other), attestation.clone()]);
                let ours = documents.index(&[on(ours, &own), attestation]);
                documents.index(&[on(theirs, &other), on(ours, &own)])
            }
            1 => {
                let ours = documents.index(&[on(ours, &own)]);
                documents.index(&[on(theirs, &other), ours])
            }
            _ => {
                let ours = documents.index(&[ours]);
                documents.index(&[ours])
            }
        };
        pull(&t, &documents.serve(&image, &tag)).ok();
        assert_eq!(run(&t, &["run", "x.sif"]).ok(), "hello", "shape {shape}");
    }
}

#[test]
fn manifests_of_old_and_other_writers_are_read() {
    let t = Env::new();
    type Change = fn(&mut Value);
    let changes: [Change; 5] = [
        |m| {
            m["config"]["mediaType"] = json!("application/octet-stream");
            m["mediaType"] = json!("application/vnd.docker.distribution.manifest.v2+json");
            m["layers"][0]["mediaType"] =
                json!("application/vnd.docker.image.rootfs.diff.tar.gzip");
        },
        |m| {
            for field in ["annotations", "artifactType", "subject", "mediaType"] {
                m[field] = Value::Null;
            }
            for field in ["annotations", "urls", "platform", "data"] {
                m["config"][field] = Value::Null;
                m["layers"][0][field] = Value::Null;
            }
        },
        |m| m["config"]["mediaType"] = json!("text/html"),
        |m| m["layers"][0]["mediaType"] = json!(""),
        |m| {
            m["layers"][0]["mediaType"] =
                json!("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip");
        },
    ];
    let plain = image(&t);
    for change in changes {
        assert_runs(&t, &plain.changed(change));
    }
    let chart = plain.changed(|m| {
        m["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
        m["layers"][0]["mediaType"] = json!("application/vnd.cncf.helm.chart.content.v1.tar+gzip");
    });
    pull(&t, &registry(&chart, |_| None)).fatal(&["artifact with type"]);
}

#[test]
fn foreign_layers_come_from_the_registry_or_from_their_addresses() {
    let t = Env::new();
    let plain = image(&t);
    let content = plain.blobs[&plain.layer].clone();
    let elsewhere = Server::start(move |asked| match asked.target.as_str() {
        "/layer" => Answer::content(asked, &content),
        _ => Answer::new(404, ""),
    });
    let urls = ["/none", "/layer"].map(|path| format!("http://{}{path}", elsewhere.address));
    let foreign = plain.changed(|m| {
        m["layers"][0]["mediaType"] =
            json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
        m["layers"][0]["urls"] = json!(urls);
    });
    let layer = foreign.layer.clone();
    let lacks = move |asked: &Asked| asked.target.ends_with(&layer).then(|| Answer::new(404, ""));
    let mut pull = command(&t, &["pull", "x.sif"]);
    pull.arg(address(&registry(&foreign, lacks.clone())))
        .env("APPTAINER_DOCKER_USERNAME", "ada")
        .env("APPTAINER_DOCKER_PASSWORD", "pw");
    output(&mut pull).ok();
    assert_eq!(run(&t, &["run", "x.sif"]).ok(), "hello");
    assert_eq!(elsewhere.count("GET /layer"), 1);
    let is_open = |asked: &Asked| asked.header("authorization").is_none();
    assert!(elsewhere.asked().iter().all(is_open));
    // A layer of the usual kind has no other place.
    run(&t, &["cache", "clean", "--force"]).ok();
    let usual = plain.changed(|m| m["layers"][0]["urls"] = json!(urls));
    let server = registry(&usual, lacks);
    run(&t, &["pull", "-F", "x.sif", &address(&server)]).fatal(&["StatusCode: 404"]);
    assert_eq!(elsewhere.count("GET /layer"), 1);
}

#[test]
fn only_image_for_another_machine_is_refused_each_time() {
    let t = Env::new();
    let server = registry(&image(&t), |_| None);
    let uri = address(&server);
    for first in [true, false] {
        run(&t, &["pull", "--arch", "s390x", "y.sif", &uri]).fatal(&[
            "it is for",
            "not for s390x",
            "--arch",
        ]);
        assert!(!t.work().join("y.sif").exists());
        if first {
            // Now the cache has it.
            run(&t, &["pull", "x.sif", &uri]).ok();
        }
    }
}

/// `[[registry]]` with a mirror.
fn conf(prefix: &str, mirror: &str) -> String {
    format!(
        "[[registry]]\nprefix = '{prefix}'\nlocation = '{prefix}'\n[[registry.mirror]]\nlocation = '{mirror}'\ninsecure = true\n"
    )
}

#[test]
fn mirrors_are_read_below_the_home_of_the_environment() {
    let t = Env::new();
    let mirror = registry(&image(&t), |_| None);
    let home = t.path("home/.config/containers");
    common::write(
        &home.join("registries.conf"),
        &conf("one.test", &mirror.address),
    );
    common::write(
        &home.join("registries.conf.d/50-site.conf"),
        &conf("two.test", &mirror.address),
    );
    for host in ["one.test", "two.test"] {
        let uri = format!("docker://{host}/test/image:v1");
        run(&t, &["pull", "-F", "x.sif", &uri]).ok();
        assert_eq!(run(&t, &["run", "x.sif"]).ok(), "hello");
    }
    // A location takes the registry's place: nobody else is asked for the name.
    common::write(
        &home.join("registries.conf.d/60-moved.conf"),
        "[[registry]]\nprefix = 'three.test'\nlocation = '127.0.0.1:1/moved'\ninsecure = true\n",
    );
    let moved = run(&t, &["pull", "y.sif", "docker://three.test/test/image:v1"]);
    moved.fatal(&["127.0.0.1:1/v2/moved/test/image", "connection refused"]);
    assert!(!moved.stderr.contains("lookup three.test"), "{moved}");
    // A tag that no mirror has, at a registry that cannot be reached: both are told.
    run(&t, &["pull", "y.sif", "docker://two.test/test/image:none"]).fatal(&[
        "two.test",
        "dial tcp",
        "mirror",
        &mirror.address,
        "manifest unknown",
    ]);
}

/// The only file in a directory of the cache.
fn entry(t: &Env, kind: &str) -> PathBuf {
    let all = fs::read_dir(t.path("config/cache").join(kind)).unwrap();
    let mut files: Vec<_> = all.flatten().map(|e| e.path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

fn cut(path: &Path, len: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

type Damage = (&'static str, Box<dyn Fn(&Path)>);

/// Ways in which a file of the cache may not be what it was.
fn damages() -> Vec<Damage> {
    vec![
        ("emptied", Box::new(|path| cut(path, 0))),
        ("cut in the header", Box::new(|path| cut(path, 50))),
        (
            "cut",
            Box::new(|path| cut(path, fs::metadata(path).unwrap().len() / 2)),
        ),
        (
            "one byte short",
            Box::new(|path| cut(path, fs::metadata(path).unwrap().len() - 1)),
        ),
        (
            "flipped",
            Box::new(|path| {
                let mut bytes = fs::read(path).unwrap();
                bytes[33] ^= 1;
                fs::write(path, bytes).unwrap();
            }),
        ),
        (
            "unreadable",
            Box::new(|path| fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap()),
        ),
        (
            "a directory",
            Box::new(|path| {
                fs::remove_file(path).unwrap();
                fs::create_dir_all(path.join("some/thing")).unwrap();
            }),
        ),
        (
            "a link to nothing",
            Box::new(|path| {
                fs::remove_file(path).unwrap();
                symlink("nowhere", path).unwrap();
            }),
        ),
    ]
}

#[test]
fn what_the_cache_has_is_looked_at_before_it_is_used() {
    let t = Env::new();
    let image = image(&t);
    let server = registry(&image, |_| None);
    let uri = address(&server);
    pull(&t, &server).ok();
    let good = fs::read(t.work().join("x.sif")).unwrap();
    for (what, damage) in damages() {
        damage(&entry(&t, "oci-tmp"));
        pull(&t, &server).ok();
        assert!(
            fs::read(t.work().join("x.sif")).unwrap() == good,
            "{what}: pull"
        );
        damage(&entry(&t, "oci-tmp"));
        let out = run(&t, &["exec", &uri, "cat", "/opt/hello.txt"]);
        assert_eq!(out.ok(), "hello", "{what}: exec");
    }
    // Layers and configurations, too.
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
    for (what, damage) in damages() {
        for digest in image.blobs.keys() {
            fs::remove_file(entry(&t, "oci-tmp")).unwrap();
            damage(&t.path("config/cache/blob/blobs/sha256").join(hex(digest)));
            pull(&t, &server).ok();
            assert!(
                fs::read(t.work().join("x.sif")).unwrap() == good,
                "{what}: blob"
            );
        }
    }
}

#[test]
fn files_of_web_servers_in_the_cache_are_looked_at() {
    let t = Env::new();
    let good = fs::read(t.image()).unwrap();
    let served = good.clone();
    let server =
        Server::start(move |asked| Answer::content(asked, &served).header("ETag", "\"1\""));
    let uri = format!("http://{}/a.sif", server.address);
    run(&t, &["pull", "-F", "x.sif", &uri]).ok();
    for (what, damage) in damages() {
        damage(&entry(&t, "net"));
        run(&t, &["pull", "-F", "x.sif", &uri]).ok();
        assert!(fs::read(t.work().join("x.sif")).unwrap() == good, "{what}");
    }
}

#[test]
fn what_is_no_image_is_not_taken_for_one() {
    let t = Env::new();
    let server = Server::start(|asked| match asked.target.as_str() {
        "/html.sif" => Answer::new(200, "<!DOCTYPE html><html><body>Log in</body></html>"),
        "/empty.sif" => Answer::new(200, ""),
        "/text.sif" => Answer::new(200, "just text"),
        _ => Answer::new(200, vec![0; 100_000]),
    });
    for (name, words) in [
        ("html", "web page"),
        ("empty", "the file is empty"),
        ("text", "not recognized"),
        ("zeros", "not recognized"),
    ] {
        let uri = format!("http://{}/{name}.sif", server.address);
        for verb in [&["pull", "x.sif"][..], &["exec"], &["build", "x.sif"]] {
            let mut all = verb.to_vec();
            all.push(&uri);
            if verb == ["exec"] {
                all.push("true");
            }
            run(&t, &all).fatal(&["is no image", words]);
        }
        assert!(!t.work().join("x.sif").exists());
    }
    let left = fs::read_dir(t.path("config/cache/net")).unwrap().count();
    assert_eq!(left, 0);
}

/// A registry that takes what is pushed, and knows one user.
fn open_to_pushes() -> Server {
    Server::start(|asked| {
        if asked.header("authorization") != Some("Basic YWRhOnB3") {
            let challenge = "Negotiate, Basic realm=\"x\"";
            return Answer::new(401, "{}").header("WWW-Authenticate", challenge);
        }
        match (asked.method.as_str(), asked.target.as_str()) {
            ("HEAD", _) => Answer::new(404, ""),
            ("POST", _) => Answer::new(202, "").header("Location", "/upload?x=y"),
            ("PUT", _) => Answer::new(201, ""),
            _ => Answer::new(200, "{}"),
        }
    })
}

#[test]
fn logins_are_listed_by_address_and_forgetting_twice_is_no_error() {
    let t = Env::new();
    let server = open_to_pushes();
    let sif = t.image();
    let (oras, host) = (format!("oras://{}", server.address), &server.address);
    run(&t, &["registry", "login", "-u", "ada", "-p", "pw", &oras]).ok();
    assert!(run(&t, &["registry", "list"]).ok().contains(&oras));
    let json = run(&t, &["registry", "list", "--json"]);
    let rows: Value = serde_json::from_str(json.ok()).unwrap();
    assert_eq!(rows, json!([{"uri": oras, "secure": true}]));
    let target = format!("{oras}/a/b:1");
    run(
        &t,
        &["push", "-D", "what it is", sif.to_str().unwrap(), &target],
    )
    .ok();
    let asked = server.asked();
    let manifest = asked
        .iter()
        .find(|a| a.target == "/v2/a/b/manifests/1" && a.method == "PUT")
        .unwrap();
    let manifest: Value = serde_json::from_slice(&manifest.body).unwrap();
    assert_eq!(
        manifest["annotations"]["org.opencontainers.image.description"],
        "what it is"
    );
    for is_known in [true, false, false] {
        let out = run(&t, &["registry", "logout", &oras]);
        out.ok();
        assert_eq!(out.stderr.starts_with("WARNING: "), !is_known, "{out}");
        assert!(!run(&t, &["registry", "list"]).ok().contains(host.as_str()));
    }
}

#[test]
fn names_and_passwords_come_from_options_and_variables() {
    let t = Env::new();
    let image = image(&t);
    let server = registry(&image, |asked| {
        let known = asked.header("authorization") == Some("Basic YWRhOnB3");
        (!known).then(|| Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""))
    });
    let uri = address(&server);
    let pull = |options: &[&str], variables: &[(&str, &str)]| {
        let mut pull = command(&t, &["pull", "-F"]);
        pull.args(options).args(["x.sif", &uri]);
        output(pull.envs(variables.iter().copied()))
    };
    let options = ["--docker-username", "ada", "--docker-password", "pw"];
    let plain = [("DOCKER_USERNAME", "ada"), ("DOCKER_PASSWORD", "pw")];
    let wrong = [("DOCKER_USERNAME", "eve"), ("DOCKER_PASSWORD", "no")];
    let own = [
        ("APPTAINER_DOCKER_USERNAME", "ada"),
        ("APPTAINER_DOCKER_PASSWORD", "pw"),
    ];
    pull(&options, &[]).ok();
    pull(&[], &plain).ok();
    pull(&options, &wrong).ok();
    pull(&[], &[wrong, own].concat()).ok();
    for variables in [&[][..], &wrong, &plain[..1]] {
        pull(&[], variables).fatal(&["requested access to the resource is denied"]);
    }
    let mut exec = command(&t, &["exec"]);
    exec.args(options).args([&uri, "cat", "/opt/hello.txt"]);
    assert_eq!(output(&mut exec).ok(), "hello");
}

#[test]
fn token_is_asked_for_whatever_stands_before_it_in_the_header() {
    let t = Env::new();
    let tokens = Server::start(|_| Answer::new(200, r#"{"access_token":"t","token":null}"#));
    let realm = format!("http://{}/token", tokens.address);
    let server = registry(&image(&t), move |asked| {
        let known = asked.header("authorization") == Some("Bearer t");
        let challenge = format!("Negotiate, Basic realm=\"a, b\", Bearer realm=\"{realm}\"");
        (!known).then(|| Answer::new(401, "").header("WWW-Authenticate", challenge))
    });
    pull(&t, &server).ok();
    assert_eq!(tokens.count("GET /token"), 1);
}

#[test]
fn causes_are_told_in_the_words_that_clients_read() {
    let t = Env::new();
    let plain = image(&t);
    let answers: [(u16, &str, &[&str]); 6] = [
        (403, "", &["requested access to the resource is denied"]),
        (401, "", &["requested access to the resource is denied"]),
        (
            403,
            r#"{"errors":[{"code":"DENIED","message":"no","detail":null}]}"#,
            &["denied: no", "requested access to the resource is denied"],
        ),
        (404, "<html>Not here</html>", &["StatusCode: 404"]),
        (
            404,
            r#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#,
            &["StatusCode: 404, name unknown"],
        ),
        (
            404,
            r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
            &["manifest unknown"],
        ),
    ];
    for (status, body, words) in answers {
        let body = body.to_owned();
        let server = registry(&plain, move |asked| {
            asked
                .target
                .contains("/manifests/")
                .then(|| Answer::new(status, body.clone()))
        });
        let words_of_pull = ["pull", "--name", "x.img", &address(&server)];
        let out = run(&t, &words_of_pull);
        out.fatal(words);
        // Clients take a tag that is not there for another cause than an image that is not there.
        let both = out.stderr.contains("manifest unknown") && out.stderr.contains("StatusCode");
        assert!(!both, "{out}");
    }
    let single = "ORAS SIF image should have a single layer";
    let oras = |server: &Server| address(server).replace("docker://", "oras://");
    let two = plain.changed(|m| {
        let layer = m["layers"][0].clone();
        m["layers"].as_array_mut().unwrap().push(layer);
    });
    for image in [&plain, &two] {
        let server = registry(image, |_| None);
        run(&t, &["pull", "x.img", &oras(&server)]).fatal(&[single]);
    }
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let server = registry(&plain.changed(|m| m["mediaType"] = json!(docker)), |_| None);
    let out = run(&t, &["pull", "x.img", &oras(&server)]);
    out.fatal(&[&format!("received mediaType: {docker}")]);
    assert!(!out.stderr.contains(single), "{out}");
}

#[test]
fn sandbox_is_made_of_a_file_too() {
    let t = Env::new();
    let content = fs::read(t.image()).unwrap();
    let server = Server::start(move |asked| Answer::content(asked, &content));
    let uri = format!("http://{}/a.sif", server.address);
    for words in [
        &["pull", "--sandbox", "box", &uri][..],
        &["pull", "-F", "--disable-cache", "--sandbox", "box", &uri],
    ] {
        run(&t, words).ok();
        assert!(t.work().join("box/.singularity.d").is_dir());
        assert_eq!(run(&t, &["exec", "box", "echo", "ran"]).ok(), "ran");
    }
    fs::remove_dir_all(t.work().join("box")).unwrap();
    assert_eq!(fs::read_dir(t.work()).unwrap().count(), 0);
}

#[test]
fn image_runs_without_a_cache_and_leaves_nothing() {
    let t = Env::new();
    let server = registry(&image(&t), |_| None);
    let uri = address(&server);
    let tmp = t.path("tmp");
    fs::create_dir(&tmp).unwrap();
    fs::create_dir(t.path("sealed")).unwrap();
    fs::set_permissions(t.path("sealed"), fs::Permissions::from_mode(0o500)).unwrap();
    fs::write(t.path("file"), "").unwrap();
    let go = |words: &[&str], place: &str| {
        let mut command = command(&t, words);
        command
            .env("APPTAINER_CACHEDIR", t.path(place))
            .env("APPTAINER_TMPDIR", &tmp);
        let out = output(&mut command);
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0, "{words:?} {out}");
        out
    };
    let hello = ["cat", "/opt/hello.txt"];
    for verb in [
        &["exec", "--disable-cache"][..],
        &["exec", "--disable-cache", "--pid"],
        &["exec", "--disable-cache", "--writable-tmpfs"],
        &["exec", "--disable-cache", "--fakeroot"],
    ] {
        let out = go(&[verb, &[&uri], &hello[..]].concat(), "cache");
        assert_eq!(out.ok(), "hello");
        assert!(!out.stderr.contains("WARNING"), "{out}");
    }
    assert_eq!(go(&["run", "--disable-cache", &uri], "cache").ok(), "hello");
    go(&["shell", "--disable-cache", &uri], "cache").ok();
    go(&["pull", "--disable-cache", "y.sif", &uri], "cache").ok();
    assert!(!t.path("cache").exists(), "nothing is made there");
    // Failures leave nothing either.
    for (words, status) in [
        (&["/no/such/program"][..], 255),
        (&["false"], 1),
        (&["sh", "-c", "kill -9 $$"], 137),
    ] {
        let words = [&["exec", "--disable-cache", &uri], words].concat();
        assert_eq!(go(&words, "cache").status, status);
    }
    let words = ["exec", "--disable-cache", "--bind=/none", &uri, "true"];
    assert_eq!(go(&words, "cache").status, 255);
    // A cache that cannot be written is done without.
    for place in ["sealed", "sealed/deep/er", "file", "/proc/none"] {
        for words in [
            &["exec", &uri, "cat", "/opt/hello.txt"][..],
            &["pull", "-F", "x.sif", &uri],
            &["build", "-F", "b.sif", &uri],
        ] {
            let out = go(words, place);
            out.ok();
            assert_eq!(
                out.stderr.matches("Cache disabled").count(),
                1,
                "{place}: {out}"
            );
        }
    }
    fs::set_permissions(t.path("sealed"), fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn instance_starts_without_a_cache() {
    let t = Env::new();
    let server = registry(&image(&t), |_| None);
    let tmp = t.path("tmp");
    fs::create_dir(&tmp).unwrap();
    let go = |words: &[&str]| {
        let mut command = command(&t, words);
        output(command.env("APPTAINER_TMPDIR", &tmp))
    };
    let start = [
        "instance",
        "start",
        "--disable-cache",
        &address(&server),
        "one",
    ];
    go(&start).ok();
    assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
    let read = go(&["exec", "instance://one", "cat", "/opt/hello.txt"]);
    go(&["instance", "stop", "one"]).ok();
    assert_eq!(read.ok(), "hello");
}

#[test]
fn full_cache_is_done_without() {
    let t = Env::new();
    let server = registry(&image(&t), |_| None);
    let small = t.path("small");
    fs::create_dir(&small).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=600k none {0} && export APPTAINER_CACHEDIR={0} && {CAPSID} exec {1} cat /opt/hello.txt && {CAPSID} build y.sif {1} && exec {CAPSID} pull x.sif {1}",
        small.display(),
        address(&server)
    );
    let mut command = t.command_as(Path::new("unshare"), ["-Urm", "sh", "-c", &script]);
    let out = output(command.env("HOME", t.path("home")));
    assert_eq!(out.ok(), "hello");
    assert_eq!(out.stderr.matches("Cache disabled").count(), 3, "{out}");
    for file in ["x.sif", "y.sif"] {
        assert_eq!(run(&t, &["run", file]).ok(), "hello");
    }
}

/// A layout of an image, and archives of it, in the working directory.
fn local_images(t: &Env) {
    let image = image(t);
    let layout = t.work().join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let manifest = Digest::of(&image.manifest);
    fs::write(blobs.join(manifest.hex()), &image.manifest).unwrap();
    for (digest, bytes) in &image.blobs {
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).unwrap();
    }
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let index = json!({"schemaVersion": 2, "annotations": null, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest.to_string(), "size": image.manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "v1"}}]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let copy = |target: &str| {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "oci:layout:v1", target]);
        output(skopeo.current_dir(t.work())).ok();
    };
    copy("oci-archive:f.tar:v1");
    copy("docker-archive:d.tar:x:2");
}

#[test]
fn local_images_of_other_programs_are_run_pulled_and_converted_once() {
    let t = Env::new();
    local_images(&t);
    let here = t.work();
    let absolute = format!("oci-archive://{}/f.tar", here.display());
    let entries = || {
        fs::read_dir(t.path("config/cache/oci-tmp"))
            .unwrap()
            .count()
    };
    for (name, file, converted) in [
        ("oci-archive:f.tar", "f.tar_latest.sif", 1),
        ("oci-archive:f.tar:v1", "f.tar_v1.sif", 1),
        (absolute.as_str(), "f.tar_latest.sif", 1),
        ("docker-archive:d.tar", "d.tar_latest.sif", 2),
        ("docker-archive:d.tar:x:2", "d.tar_x.sif", 2),
        ("oci:layout", "layout_latest.sif", 3),
        ("oci:layout:v1", "layout_v1.sif", 3),
    ] {
        for verb in ["exec", "run", "shell", "test"] {
            let words = match verb {
                "exec" => vec![verb, name, "cat", "/opt/hello.txt"],
                _ => vec![verb, name],
            };
            let out = run(&t, &words);
            match verb {
                "exec" | "run" => assert_eq!(out.ok(), "hello", "{name}"),
                _ => assert!(out.status == 0, "{name} {out}"),
            }
        }
        assert_eq!(entries(), converted, "{name}");
        run(&t, &["pull", "--dir", ".", name]).ok();
        assert_eq!(run(&t, &["run", file]).ok(), "hello");
        fs::remove_file(here.join(file)).unwrap();
        run(&t, &["build", "-F", "b.sif", name]).ok();
        assert_eq!(run(&t, &["run", "b.sif"]).ok(), "hello");
    }
    assert_eq!(entries(), 3);
    run(&t, &["instance", "start", "oci-archive:f.tar", "one"]).ok();
    run(&t, &["instance", "stop", "one"]).ok();
    run(&t, &["pull", "--sandbox", "box", "docker-archive:d.tar"]).ok();
    assert_eq!(run(&t, &["run", "box"]).ok(), "hello");
    // A file with another image by the same name is another image.
    fs::rename(here.join("d.tar"), here.join("f.tar")).unwrap();
    run(&t, &["exec", "oci-archive:f.tar", "true"]).fatal(&["use docker-archive:"]);
    run(&t, &["exec", "oci-archive:none.tar", "true"]).fatal(&["none.tar"]);
    run(&t, &["exec", "oci:layout:v2", "true"]).fatal(&["no image \"v2\"", "v1"]);
    run(&t, &["exec", "docker-archive:f.tar:y:2", "true"]).fatal(&["no image \"y:2\""]);
}

#[test]
fn image_of_the_docker_engine_comes_from_its_socket() {
    use std::io::{BufRead as _, Write as _};
    let t = Env::new();
    local_images(&t);
    let archive = fs::read(t.work().join("d.tar")).unwrap();
    let socket = t.path("docker.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let reader = std::io::BufReader::new(stream.try_clone().unwrap());
            let lines = reader.lines().map_while(Result::ok);
            let head: Vec<String> = lines.take_while(|l| !l.is_empty()).collect();
            let answer = match head[0].as_str() {
                "GET /images/x:2/get HTTP/1.0" => {
                    [&b"HTTP/1.1 200 OK\r\n\r\n"[..], &archive].concat()
                }
                _ => b"HTTP/1.1 404 x\r\n\r\n{\"message\":\"No such image\"}".to_vec(),
            };
            // A client may have heard enough.
            let _ = stream.write_all(&answer);
        }
    });
    let go = |words: &[&str]| {
        let mut command = command(&t, words);
        output(command.env("DOCKER_HOST", format!("unix://{}", socket.display())))
    };
    assert_eq!(go(&["run", "docker-daemon:x:2"]).ok(), "hello");
    go(&["pull", "docker-daemon://x:2"]).ok();
    assert_eq!(run(&t, &["run", "x_2.sif"]).ok(), "hello");
    go(&["build", "b.sif", "docker-daemon:x:2"]).ok();
    go(&["run", "docker-daemon:y:2"]).fatal(&["No such image"]);
}

#[test]
fn cache_is_listed_whatever_the_home_is_like() {
    let t = Env::new();
    fs::create_dir(t.path("sealed")).unwrap();
    fs::write(t.path("file"), "").unwrap();
    let list = |place: &str| {
        let mut command = t.command(["cache", "list"]);
        command.env("APPTAINER_CONFIGDIR", t.path(place));
        output(&mut command)
    };
    for mode in [0o500, 0o400, 0o100, 0o000] {
        fs::set_permissions(t.path("sealed"), fs::Permissions::from_mode(mode)).unwrap();
        for place in ["sealed", "sealed/a", "none", "none/a", "file", "file/a"] {
            let out = list(place);
            assert!(
                out.ok().starts_with("There are 0 container"),
                "{place}: {out}"
            );
            for words in [["registry", "list"], ["remote", "list"], ["cache", "clean"]] {
                let mut command = t.command(words);
                output(command.env("APPTAINER_CONFIGDIR", t.path(place))).ok();
            }
        }
    }
    fs::set_permissions(t.path("sealed"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(fs::read_dir(t.path("sealed")).unwrap().count(), 0);
    assert!(!t.path("none").exists(), "nothing is made");
    // What is there is shown where it can only be read.
    pull(&t, &registry(&image(&t), |_| None)).ok();
    fs::set_permissions(t.path("config"), fs::Permissions::from_mode(0o500)).unwrap();
    let out = list("config");
    fs::set_permissions(t.path("config"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(out.ok().starts_with("There are 1 container"), "{out}");
}

#[test]
fn cache_and_profiles_have_one_place() {
    let t = Env::new();
    let sif = t.image();
    for (variable, place) in [
        ("APPTAINER_CACHEDIR", "one"),
        ("SINGULARITY_CACHEDIR", "two"),
        ("CAPSID_CACHEDIR", "three"),
    ] {
        let go = |words: &[&str]| output(t.command(words).env(variable, t.path(place)));
        go(&["cache", "warm", sif.to_str().unwrap()]).ok();
        common::write(&t.path(place).join("cache/profile/p"), "12345");
        let list = go(&["cache", "list", "-T", "profile", "--json"]);
        let rows: Value = serde_json::from_str(list.ok()).unwrap();
        assert_eq!(
            (&rows[0]["type"], &rows[0]["size"]),
            (&json!("profile"), &json!(5))
        );
        let list = go(&["cache", "list"]);
        assert!(list.ok().starts_with("There are 0 container"), "{list}");
        assert!(list.ok().ends_with("Total space used: 5 B"), "{list}");
        go(&["cache", "clean", "--force"]).ok();
        assert!(!t.path(place).join("cache/profile/p").exists());
        let below: Vec<_> = fs::read_dir(t.path(place)).unwrap().flatten().collect();
        assert_eq!(below.len(), 1, "one directory: {below:?}");
    }
}
