//! `pull`, `push`, logins and the cache, against Debian's registry and small servers of the tests' own.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use capsid::digest::Digest;
use common::http::{Answer, Asked, Server};
use common::registry::{command, image, registry, run};
use common::{Env, Output, output};
use serde_json::json;

const CAPSID: &str = env!("CARGO_BIN_EXE_capsid");

fn pull(t: &Env, server: &Server) -> Output {
    let uri = format!("docker://{}/test/image:v1", server.address);
    run(t, &["pull", "--no-https", "x.sif", &uri])
}

/// Debian's registry, which ends with the value.
struct Registry {
    child: Child,
    address: String,
}

impl Registry {
    fn start(t: &Env, auth: &str) -> Registry {
        let root = t.path("registry");
        let config = t.path("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: '127.0.0.1:0'\n{auth}",
            root.display()
        );
        fs::write(&config, text).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("docker-registry is not installed");
        let mut lines = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let address = lines
            .find_map(|line| {
                let rest = line.split("listening on ").nth(1)?;
                Some(rest.split(['"', ' ', ',']).next()?.to_owned())
            })
            .expect("the registry says where it listens");
        std::thread::spawn(move || lines.for_each(drop));
        Registry { child, address }
    }

    fn fill(&self, t: &Env, credentials: &[&str]) {
        let image = image(t);
        let layout = t.path("layout");
        for (digest, bytes) in image
            .blobs
            .iter()
            .chain([(&Digest::of(&image.manifest).to_string(), &image.manifest)])
        {
            let name = digest.replace(':', "/");
            fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
            fs::write(layout.join("blobs").join(name), bytes).unwrap();
        }
        fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": Digest::of(&image.manifest).to_string(), "size": image.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": "v1"}}]});
        fs::write(layout.join("index.json"), index.to_string()).unwrap();
        let copied = output(
            Command::new("skopeo")
                .args(["--insecure-policy", "copy", "--dest-tls-verify=false"])
                .args(credentials)
                .arg(format!("oci:{}:v1", layout.display()))
                .arg(format!("docker://{}/test/image:v1", self.address)),
        );
        copied.ok();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// No draft and no claim is left.
#[track_caller]
fn assert_clean(t: &Env) {
    for name in [".tmp", ".claims"] {
        let directory = t.path("config/cache").join(name);
        let left: Vec<PathBuf> = fs::read_dir(&directory)
            .map(|d| d.flatten().map(|e| e.path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
    }
    let left: Vec<_> = fs::read_dir(t.work())
        .unwrap()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn images_of_a_registry_are_pulled_run_pushed_and_pulled_back() {
    let t = Env::new();
    let registry = Registry::start(&t, "");
    registry.fill(&t, &[]);
    let docker = format!("docker://{}/test/image:v1", registry.address);
    run(&t, &["pull", "--no-https", &docker]).ok();
    let file = t.work().join("image_v1.sif");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o755
    );
    assert_eq!(run(&t, &["run", "image_v1.sif"]).ok(), "hello");
    run(&t, &["pull", "--no-https", &docker])
        .fatal(&["Image file already exists: \"image_v1.sif\" - will not overwrite"]);
    run(&t, &["pull", "--no-https", "-F", &docker]).ok();
    assert_eq!(
        run(
            &t,
            &["exec", "--no-https", &docker, "cat", "/opt/hello.txt"]
        )
        .ok(),
        "hello"
    );
    let oras = format!("oras://{}/test/sif:1", registry.address);
    run(&t, &["push", "--no-https", "image_v1.sif", &oras]).ok();
    run(
        &t,
        &[
            "pull",
            "--no-https",
            "--dir",
            ".",
            "--name",
            "back.sif",
            &oras,
        ],
    )
    .ok();
    assert!(fs::read(&file).unwrap() == fs::read(t.work().join("back.sif")).unwrap());
    assert_eq!(run(&t, &["run", "--no-https", &oras]).ok(), "hello");
    run(
        &t,
        &[
            "pull",
            "--no-https",
            "no.sif",
            &docker.replace("docker", "oras"),
        ],
    )
    .fatal(&["received mediaType: application/vnd.oci.image.manifest.v1+json"]);
    run(
        &t,
        &[
            "pull",
            "--no-https",
            "no.sif",
            &format!("docker://{}/test/none", registry.address),
        ],
    )
    .fatal(&["manifest unknown"]);
    assert_clean(&t);
}

#[test]
fn logins_are_checked_kept_used_and_forgotten() {
    let t = Env::new();
    let hash = output(Command::new("htpasswd").args(["-Bbn", "ada", "s3cret-word"]));
    fs::write(t.path("htpasswd"), format!("{}\n", hash.ok())).unwrap();
    let auth = format!(
        "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
        t.path("htpasswd").display()
    );
    let registry = Registry::start(&t, &auth);
    registry.fill(&t, &["--dest-creds", "ada:s3cret-word"]);
    let uri = format!("docker://{}", registry.address);
    let docker = format!("{uri}/test/image:v1");
    run(&t, &["pull", "--no-https", "x.sif", &docker])
        .fatal(&["unauthorized: authentication required", "registry login"]);
    let login = |password: &str| {
        use std::io::Write as _;
        let words = [
            "--debug",
            "registry",
            "login",
            "--no-https",
            "-u",
            "ada",
            "--password-stdin",
            &uri,
        ];
        let mut child = command(&t, &words)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(password.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    };
    let file = t.path("config/docker-config.json");
    assert!(!login("wrong\n").status.success());
    assert!(!file.exists(), "a wrong password is not kept");
    let done = login("s3cret-word\n");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    assert!(
        !said.contains("s3cret-word") && !said.contains("YWRhOn"),
        "{said}"
    );
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    run(&t, &["pull", "--no-https", "x.sif", &docker]).ok();
    assert!(run(&t, &["registry", "list"]).ok().contains(&uri));
    run(&t, &["registry", "logout", &uri]).ok();
    run(&t, &["pull", "--no-https", "y.sif", &docker]).fatal(&["authentication required"]);
    let mut by_environment = command(&t, &["pull", "--no-https", "y.sif", &docker]);
    by_environment
        .env("APPTAINER_DOCKER_USERNAME", "ada")
        .env("APPTAINER_DOCKER_PASSWORD", "s3cret-word");
    output(&mut by_environment).ok();
}

/// A certificate authority, and a certificate of its for 127.0.0.1, in the scratch directory.
fn certificates(t: &Env) {
    fs::write(
        t.path("leaf.ext"),
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -subj /CN=test-ca -days 2 &&
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout leaf.key -out leaf.csr -subj /CN=test &&
        openssl x509 -req -in leaf.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out leaf.crt -days 2 -extfile leaf.ext";
    output(
        Command::new("sh")
            .args(["-c", script])
            .current_dir(t.path("")),
    )
    .ok();
}

#[test]
fn own_certificate_authorities_are_trusted_where_they_are_named() {
    let t = Env::new();
    certificates(&t);
    let tls = format!(
        "  tls: {{certificate: {}, key: {}}}\n",
        t.path("leaf.crt").display(),
        t.path("leaf.key").display()
    );
    let registry = Registry::start(&t, &tls);
    registry.fill(&t, &[]);
    let uri = format!("docker://{}/test/image:v1", registry.address);
    run(&t, &["pull", "x.sif", &uri]).fatal(&["signed by an unknown authority", "SSL_CERT_FILE"]);
    let mut by_variable = command(&t, &["pull", "x.sif", &uri]);
    by_variable.env("SSL_CERT_FILE", t.path("ca.crt"));
    output(&mut by_variable).ok();
    let directory = t
        .path("home/.config/containers/certs.d")
        .join(&registry.address);
    fs::create_dir_all(&directory).unwrap();
    fs::copy(t.path("ca.crt"), directory.join("ca.crt")).unwrap();
    run(&t, &["pull", "y.sif", &uri]).ok();
}

#[test]
fn credential_helpers_are_asked() {
    let t = Env::new();
    let image = image(&t);
    let server = registry(&image, |asked| {
        let known = asked.header("authorization") == Some("Basic YWRhOnB3");
        (!known).then(|| Answer::new(401, "{}").header("WWW-Authenticate", "Basic realm=\"x\""))
    });
    let helper = format!(
        "#!/bin/sh\nread host\n[ \"$1 $host\" = 'get {}' ] && echo '{{\"Username\":\"ada\",\"Secret\":\"pw\"}}'\n",
        server.address
    );
    common::script(&t.path("bin/docker-credential-test"), &helper);
    fs::create_dir_all(t.path("config")).unwrap();
    fs::write(
        t.path("config/docker-config.json"),
        r#"{"credsStore": "test"}"#,
    )
    .unwrap();
    let uri = format!("docker://{}/test/image:v1", server.address);
    let mut pull = command(&t, &["pull", "--no-https", "x.sif", &uri]);
    pull.env("PATH", format!("{}:/usr/bin:/bin", t.path("bin").display()));
    output(&mut pull).ok();
    run(&t, &["pull", "--no-https", "y.sif", &uri]).fatal(&["authentication required"]);
}

#[test]
fn image_of_another_machine_is_chosen_from_an_index() {
    let t = Env::new();
    let image = image(&t);
    let one = image.manifest.clone();
    let digest = Digest::of(&one).to_string();
    let named = format!("/v2/test/image/manifests/{digest}");
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": one.len(),
         "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}}]});
    let server = registry(&image, move |asked| {
        if asked.target == named {
            return Some(Answer::new(200, one.clone()));
        }
        asked
            .target
            .ends_with("/manifests/v1")
            .then(|| Answer::new(200, index.to_string()))
    });
    let uri = format!("docker://{}/test/image:v1", server.address);
    run(
        &t,
        &["pull", "--no-https", "--arch", "arm64", "x.sif", &uri],
    )
    .ok();
    run(
        &t,
        &[
            "pull",
            "--no-https",
            "--platform",
            "linux/arm64/v8",
            "y.sif",
            &uri,
        ],
    )
    .ok();
    run(
        &t,
        &["pull", "--no-https", "--arch", "s390x", "z.sif", &uri],
    )
    .fatal(&["there is no image for linux/s390x", "linux/arm64"]);
    run(
        &t,
        &["pull", "--no-https", "--arch", "nonsense", "z.sif", &uri],
    )
    .fatal(&["is not a known architecture"]);
}

#[test]
fn tokens_are_fetched_and_go_to_no_other_host() {
    let t = Env::new();
    let image = image(&t);
    let blobs = image.blobs.clone();
    let elsewhere = Server::start(move |asked| {
        let digest = asked.target.trim_start_matches('/');
        Answer::content(asked, &blobs[digest])
    });
    let tokens = Server::start(|asked| match asked.header("authorization") {
        Some("Basic YWRhOnB3") => Answer::new(200, r#"{"token":"the-token"}"#),
        _ => Answer::new(401, ""),
    });
    let (realm, other) = (tokens.address.clone(), elsewhere.address.clone());
    let server = registry(&image, move |asked| {
        if asked.header("authorization") != Some("Bearer the-token") {
            let challenge = format!(
                "Bearer realm=\"http://{realm}/token\",service=\"s\",scope=\"repository:test/image:pull\""
            );
            return Some(Answer::new(401, "{}").header("WWW-Authenticate", challenge));
        }
        let digest = asked.target.strip_prefix("/v2/test/image/blobs/")?;
        Some(Answer::new(307, "").header("Location", format!("http://{other}/{digest}")))
    });
    let mut command = command(&t, &["--debug", "pull", "--no-https", "x.sif"]);
    command
        .arg(format!("docker://{}/test/image:v1", server.address))
        .env("APPTAINER_DOCKER_USERNAME", "ada")
        .env("APPTAINER_DOCKER_PASSWORD", "pw");
    let done = output(&mut command);
    done.ok();
    for secret in ["the-token", "YWRhOnB3"] {
        assert!(!done.stderr.contains(secret), "{done}");
    }
    assert_eq!(
        tokens.count("GET /token?service=s&scope=repository%3Atest%2Fimage%3Apull"),
        1
    );
    assert!(!elsewhere.asked().is_empty());
    for asked in elsewhere.asked() {
        assert_eq!(asked.header("authorization"), None, "{asked:?}");
    }
}

#[test]
fn dropped_connections_are_gone_on_with() {
    let t = Env::new();
    let image = image(&t);
    let (layer, content) = (image.layer.clone(), image.blobs[&image.layer].clone());
    let server = registry(&image, move |asked| {
        asked.target.ends_with(&layer).then(|| {
            let mut answer = Answer::content(asked, &content);
            answer.cut = Some(answer.body.len() / 2 + 1);
            if answer.body.len() < 1000 {
                answer.cut = None;
            }
            answer
        })
    });
    pull(&t, &server).ok();
    let ranged = server
        .asked()
        .iter()
        .filter(|a| a.range().is_some())
        .count();
    assert!(ranged > 3, "{ranged} ranges");
    assert_eq!(run(&t, &["run", "x.sif"]).ok(), "hello");
}

#[test]
fn limits_of_the_registry_are_waited_for() {
    let t = Env::new();
    let image = image(&t);
    let refused = AtomicUsize::new(0);
    let server = registry(&image, move |asked| {
        let first =
            asked.target.contains("/manifests/") && refused.fetch_add(1, Ordering::Relaxed) < 2;
        first.then(|| Answer::new(429, "").header("Retry-After", "0"))
    });
    pull(&t, &server).ok();
    assert_eq!(server.count("GET /v2/test/image/manifests/v1"), 3);
    let server = registry(&image, |_| {
        Some(Answer::new(429, "").header("Retry-After", "100000"))
    });
    let uri = format!("docker://{}/test/image:v1", server.address);
    run(&t, &["pull", "--no-https", "y.sif", &uri]).fatal(&["toomanyrequests"]);
}

#[test]
fn what_is_not_as_promised_is_refused_and_leaves_nothing() {
    let t = Env::new();
    let image = image(&t);
    let layer = image.layer.clone();
    let target = move |asked: &Asked| asked.target.ends_with(&layer);
    let len = image.blobs[&image.layer].len();
    let damaged = {
        let mut content = image.blobs[&image.layer].clone();
        content[700] ^= 1;
        content
    };
    type Special = Box<dyn Fn(&Asked) -> Option<Answer> + Send + Sync>;
    let cases: [(&str, Special); 6] = [
        ("damaged", {
            let target = target.clone();
            Box::new(move |a| target(a).then(|| Answer::content(a, &damaged)))
        }),
        ("longer than", {
            let target = target.clone();
            Box::new(move |a| target(a).then(|| Answer::new(200, vec![0; len + 10])))
        }),
        ("cannot read", {
            let target = target.clone();
            Box::new(move |a| {
                target(a).then(|| Answer {
                    cut: Some(0),
                    ..Answer::new(200, vec![0; len])
                })
            })
        }),
        (
            "too large",
            Box::new(|a| {
                a.target
                    .contains("/manifests/")
                    .then(|| Answer::new(200, vec![b' '; 5 << 20]))
            }),
        ),
        (
            "not a JSON document",
            Box::new(|a| {
                a.target
                    .contains("/manifests/")
                    .then(|| Answer::new(200, "<html>"))
            }),
        ),
        (
            "circle",
            Box::new(|a| Some(Answer::new(302, "").header("Location", a.target.clone()))),
        ),
    ];
    for (words, special) in cases {
        let server = registry(&image, special);
        pull(&t, &server).fatal(&[words]);
        assert!(!t.work().join("x.sif").exists());
        assert_clean(&t);
    }
}

#[test]
fn concurrent_pulls_download_once() {
    let t = Env::new();
    let image = image(&t);
    let layer = image.layer.clone();
    let server = registry(&image, move |asked| {
        if asked.target.ends_with(&layer) {
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        None
    });
    let uri = format!("docker://{}/test/image:v1", server.address);
    let pulls: Vec<Child> = (0..8)
        .map(|n| {
            command(&t, &["pull", "--no-https", &format!("{n}.sif"), &uri])
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut pull in pulls {
        assert!(pull.wait().unwrap().success());
    }
    assert_eq!(
        server.count(&format!("GET /v2/test/image/blobs/{}", image.layer)),
        1
    );
    let first = fs::read(t.work().join("0.sif")).unwrap();
    assert!((1..8).all(|n| fs::read(t.work().join(format!("{n}.sif"))).unwrap() == first));
    assert_clean(&t);
}

#[test]
fn ctrl_c_removes_what_was_being_written() {
    let t = Env::new();
    let image = image(&t);
    let layer = image.layer.clone();
    let server = registry(&image, move |asked| {
        if asked.target.ends_with(&layer) {
            std::thread::sleep(std::time::Duration::from_secs(30));
        }
        None
    });
    let uri = format!("docker://{}/test/image:v1", server.address);
    let mut child = command(&t, &["pull", "--no-https", "x.sif", &uri])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    common::wait_until("the download to begin", || {
        server.count(&format!("GET /v2/test/image/blobs/{}", image.layer)) == 1
    });
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let status = child.wait().unwrap();
    use std::os::unix::process::ExitStatusExt as _;
    assert_eq!(status.signal(), Some(2));
    assert_clean(&t);
}

#[test]
fn files_of_web_servers_are_fetched_once_for_each_version() {
    let t = Env::new();
    let sif = t.image();
    let content = fs::read(&sif).unwrap();
    let tag = Arc::new(AtomicUsize::new(1));
    let served = tag.clone();
    let server = Server::start(move |asked| match asked.target.as_str() {
        "/dir/a.sif?key=secret" => Answer::content(asked, &content)
            .header("ETag", format!("\"{}\"", served.load(Ordering::Relaxed))),
        _ => Answer::new(404, ""),
    });
    let uri = format!("http://{}/dir/a.sif?key=secret", server.address);
    for _ in 0..2 {
        run(&t, &["pull", "-F", &uri]).ok();
    }
    assert_eq!(server.count("GET "), 1);
    assert!(fs::read(t.work().join("a.sif")).unwrap() == fs::read(&sif).unwrap());
    tag.store(2, Ordering::Relaxed);
    run(&t, &["pull", "-F", &uri]).ok();
    assert_eq!(server.count("GET "), 2);
    let gone = run(
        &t,
        &[
            "pull",
            "b.sif",
            &format!("http://{}/none?key=secret", server.address),
        ],
    );
    gone.fatal(&["StatusCode: 404"]);
    assert!(!gone.stderr.contains("secret"), "{gone}");
    assert_eq!(run(&t, &["exec", &uri, "echo", "ran"]).ok(), "ran");
    assert_clean(&t);
}

/// A library that keeps what it is given; its object store is another server.
fn library() -> (Server, Server) {
    let parts: Arc<Mutex<BTreeMap<String, Vec<u8>>>> = Arc::default();
    let kept = parts.clone();
    let store = Server::start(move |asked| {
        let mut kept = kept.lock().unwrap();
        match asked.method.as_str() {
            "PUT" => {
                kept.insert(asked.target.clone(), asked.body.clone());
                Answer::new(200, "").header("ETag", format!("etag{}", asked.target.len()))
            }
            _ => {
                let whole: Vec<u8> = kept.values().flatten().copied().collect();
                Answer::content(asked, &whole)
            }
        }
    });
    let address = store.address.clone();
    let hash: Arc<Mutex<Option<String>>> = Arc::default();
    let library = Server::start(move |asked| {
        let data = |value: serde_json::Value| Answer::new(200, json!({"data": value}).to_string());
        let body: serde_json::Value = serde_json::from_slice(&asked.body).unwrap_or_default();
        let path = asked.target.split('?').next().unwrap();
        let mut hash = hash.lock().unwrap();
        if asked.header("authorization") != Some("BEARER tok") && path != "/version" {
            return Answer::new(401, r#"{"error":{"message":"who are you"}}"#);
        }
        match (asked.method.as_str(), path) {
            ("GET", "/version") => data(json!({"version": "1", "apiVersion": "2.0.0-alpha.2"})),
            ("POST", "/v1/images") => {
                *hash = body["hash"].as_str().map(str::to_owned);
                data(json!({"id": "img1", "uploaded": false}))
            }
            ("POST", "/v1/entities" | "/v1/collections" | "/v1/containers") => {
                data(json!({"id": "id1"}))
            }
            ("POST", "/v2/imagefile/img1/_multipart") => {
                let size = body["filesize"].as_u64().unwrap();
                let part = 32 << 20;
                data(
                    json!({"uploadID": "u", "totalParts": size.div_ceil(part), "partSize": part, "options": {}}),
                )
            }
            ("PUT", "/v2/imagefile/img1/_multipart") => {
                let url = format!(
                    "http://{address}/part{:04}?signature=s",
                    body["partNumber"].as_u64().unwrap()
                );
                data(json!({"presignedURL": url}))
            }
            ("PUT", "/v2/imagefile/img1/_multipart_complete" | "/v2/imagefile/img1/_complete") => {
                data(json!({}))
            }
            ("POST", "/v2/imagefile/img1") => {
                data(json!({"uploadURL": format!("http://{address}/whole?signature=s")}))
            }
            ("POST", "/v2/tags/id1") => data(json!({})),
            ("GET", "/v1/images/me/all/app:1") => match hash.as_ref() {
                Some(hash) => data(json!({"id": "img1", "hash": hash, "uploaded": true})),
                None => Answer::new(404, "{}"),
            },
            ("GET", "/v1/imagefile/me/all/app:1") => Answer::new(303, "")
                .header("Location", format!("http://{address}/file?signature=s")),
            _ => Answer::new(404, "{}"),
        }
    });
    (library, store)
}

fn round_trip(t: &Env, sif: &Path) -> (Server, Server) {
    let (library, store) = library();
    fs::create_dir_all(t.path("config")).unwrap();
    fs::write(
        t.path("config/remote.yaml"),
        format!("Active: l\nRemotes:\n  l:\n    URI: {}\n    Token: tok\n    System: false\n    Exclusive: false\n    Insecure: true\n", library.address),
    )
    .unwrap();
    let uri = format!("library://{}/me/all/app:1", library.address);
    let sif = sif.to_str().unwrap();
    run(t, &["push", "--no-https", sif, &uri]).fatal(&["is not signed", "--allow-unsigned"]);
    run(t, &["push", "--no-https", "-U", sif, &uri]).ok();
    run(t, &["pull", "--no-https", "back.sif", &uri]).ok();
    assert!(fs::read(sif).unwrap() == fs::read(t.work().join("back.sif")).unwrap());
    for asked in store.asked() {
        assert_eq!(asked.header("authorization"), None, "{asked:?}");
    }
    (library, store)
}

#[test]
fn library_takes_and_gives_an_image() {
    let t = Env::new();
    let sif = t.image();
    let (library, store) = round_trip(&t, &sif);
    assert_eq!(store.count("PUT /whole"), 1);
    let tagged = library
        .asked()
        .into_iter()
        .find(|a| a.target == "/v2/tags/id1")
        .unwrap();
    assert!(String::from_utf8_lossy(&tagged.body).contains(r#""Tag":"1""#));
    let none = format!("library://{}/me/all/none:1", library.address);
    run(&t, &["pull", "--no-https", "no.sif", &none])
        .fatal(&["image does not exist in the library"]);
    assert_clean(&t);
}

#[test]
fn long_image_goes_to_a_library_in_parts() {
    let t = Env::new();
    let sif = t.image();
    fs::File::options()
        .write(true)
        .open(&sif)
        .unwrap()
        .set_len(70 << 20)
        .unwrap();
    let (library, store) = round_trip(&t, &sif);
    assert_eq!(store.count("PUT /part"), 3);
    let done = library
        .asked()
        .into_iter()
        .find(|a| a.target.ends_with("_multipart_complete"))
        .unwrap();
    let done: serde_json::Value = serde_json::from_slice(&done.body).unwrap();
    assert_eq!(done["completedParts"][2]["partNumber"], 3);
    // It came back in parts, too: the store answers ranges.
    assert!(store.asked().iter().any(|a| a.method == "GET"));
}

#[test]
fn cache_is_listed_and_cleaned() {
    let t = Env::new();
    let image = image(&t);
    let server = registry(&image, |_| None);
    pull(&t, &server).ok();
    let list = run(&t, &["cache", "list", "--json"]);
    let rows: serde_json::Value = serde_json::from_str(list.ok()).unwrap();
    let count = |kind: &str| {
        rows.as_array()
            .unwrap()
            .iter()
            .filter(|r| r["type"] == kind)
            .count()
    };
    assert_eq!((count("blob"), count("oci-tmp")), (3, 1));
    assert!(
        run(&t, &["cache", "list"])
            .ok()
            .starts_with("There are 1 container file(s) using ")
    );
    let dry = run(&t, &["cache", "clean", "-n", "-T", "blob"]);
    dry.ok();
    assert_eq!(
        dry.stderr.matches("Removing blob cache entry").count(),
        3,
        "{dry}"
    );
    run(&t, &["cache", "clean", "--force", "--days", "1"]).ok();
    run(&t, &["cache", "clean"]).ok();
    assert!(
        run(&t, &["cache", "list"])
            .ok()
            .contains("and 3 oci blob file(s)"),
        "nobody has said yes"
    );
    run(&t, &["cache", "clean", "--force"]).ok();
    assert!(
        run(&t, &["cache", "list"])
            .ok()
            .starts_with("There are 0 container file(s)")
    );
    run(&t, &["cache", "list", "-T", "nonsense"]).fatal(&["not a valid type"]);
    let list = run(&t, &["cache", "list", "--type", "blob"]);
    assert_eq!(
        list.ok(),
        "There are 0 oci blob file(s) using 0 B of space\nTotal space used: 0 B"
    );
    let list = run(&t, &["cache", "list", "--type", "oras"]);
    assert!(
        list.ok()
            .starts_with("There are 0 container file(s) using 0 B of space")
    );
}

#[test]
fn full_disk_is_one_line_and_leaves_the_target() {
    let t = Env::new();
    let image = image(&t);
    let server = registry(&image, |_| None);
    let small = t.path("small");
    fs::create_dir_all(&small).unwrap();
    fs::write(t.work().join("x.sif"), "the old one").unwrap();
    let script = format!(
        "mount -t tmpfs -o size=600k none {0} && APPTAINER_TMPDIR={0} APPTAINER_CONFIGDIR={0} exec {1} pull --no-https -F x.sif docker://{2}/test/image:v1",
        small.display(),
        env!("CARGO_BIN_EXE_capsid"),
        server.address
    );
    let mut command = t.command_as(Path::new("unshare"), ["-Urm", "sh", "-c", &script]);
    command.env("HOME", t.path("home"));
    let out = output(&mut command);
    assert_eq!(out.status, 255, "{out}");
    let fatal = out.stderr.lines().filter(|l| l.starts_with("FATAL: "));
    assert_eq!(fatal.count(), 1, "{out}");
    assert!(out.stderr.contains("No space left on device"), "{out}");
    assert_eq!(fs::read(t.work().join("x.sif")).unwrap(), b"the old one");
}

#[test]
fn proxies_are_used_where_the_environment_says_so() {
    let t = Env::new();
    let image = image(&t);
    let proxy = registry(&image, |_| None);
    let uri = "docker://registry.test:8080/test/image:v1";
    let mut pull = command(&t, &["pull", "--no-https", "x.sif", uri]);
    pull.env("http_proxy", format!("http://{}", proxy.address));
    output(&mut pull).ok();
    let mut direct = command(&t, &["pull", "--no-https", "-F", "x.sif", uri]);
    direct
        .env("http_proxy", format!("http://{}", proxy.address))
        .env("no_proxy", "registry.test");
    let out = output(&mut direct);
    // A name server may also say nothing at all.
    out.fatal(&["dial tcp", "registry.test"]);
    assert!(
        out.stderr.contains("no such host") || out.stderr.contains("i/o timeout"),
        "{out}"
    );
}

#[test]
fn mirrors_are_asked_first() {
    let t = Env::new();
    let image = image(&t);
    let mirror = registry(&image, |_| None);
    let conf = t.path("registries.conf");
    let text = format!(
        "[[registry]]\nprefix = 'registry.test'\nlocation = 'registry.test'\n[[registry.mirror]]\nlocation = '{}'\ninsecure = true\n",
        mirror.address
    );
    fs::write(&conf, text).unwrap();
    let mut pull = command(
        &t,
        &["pull", "x.sif", "docker://registry.test/test/image:v1"],
    );
    pull.env("CONTAINERS_REGISTRIES_CONF", &conf);
    output(&mut pull).ok();
    assert_eq!(run(&t, &["run", "x.sif"]).ok(), "hello");
}

#[test]
fn remotes_are_added_used_and_removed() {
    let t = Env::new();
    run(&t, &["remote", "add", "--no-login", "x", "http://a.test"])
        .fatal(&["http URI requires --insecure"]);
    run(&t, &["remote", "add", "--no-login", "x", "https://a.test"]).ok();
    let file = t.path("config/remote.yaml");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(
        run(&t, &["remote", "list"])
            .ok()
            .contains("x              a.test               ✓")
    );
    run(&t, &["remote", "use", "nosuch"]).fatal(&["nosuch is not a remote"]);
    run(&t, &["remote", "use", "DefaultRemote"]).ok();
    run(&t, &["pull", "library://a/b/c"]).fatal(&["remote DefaultRemote has no library client"]);
    run(&t, &["remote", "remove", "x"]).ok();
    run(&t, &["remote", "remove", "x"]).fatal(&["x is not a remote"]);
    for name in ["x", "DefaultRemote"] {
        let out = run(&t, &["remote", "logout", name]);
        out.ok();
        assert!(out.stderr.starts_with("WARNING: "), "{out}");
    }
    let words = ["-w", CAPSID, "remote", "add", "y", "y.test"];
    let mut apart = t.command_as(Path::new("setsid"), words);
    apart.env("APPTAINER_CONFIGDIR", t.path("config"));
    output(&mut apart).fatal(&["no terminal", "--no-login"]);
}
