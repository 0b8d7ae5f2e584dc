//! The services of the peers' guides, from a registry to an answer: base images that a real registry on the loopback
//! interface serves, definition files with `apt-get` and `npm` in `%post`, instances, and their clients.
//!
//! The base image is made of Debian's packages, and the pages and programs in it are real ones.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use common::{Env, Output, free_port, output, wait_until, write};

/// Debian's docker-registry with a base image in it, under the names that the definition files use.
struct Registry {
    child: Child,
    port: u16,
}

impl Registry {
    fn with_base(env: &Env) -> Registry {
        let port = free_port();
        let config = env.path("registry.yml");
        write(
            &config,
            &format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n",
                env.path("registry").display()
            ),
        );
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(fs::File::create(env.path("registry.log")).unwrap())
            .stderr(fs::File::create(env.path("registry.err")).unwrap())
            .spawn()
            .unwrap();
        let registry = Registry { child, port };
        wait_until("the registry to answer", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        let layout = base(env);
        for name in ["debian:12", "nginx:latest"] {
            let copied = output(
                Command::new("skopeo")
                    .args([
                        "copy",
                        "--quiet",
                        "--insecure-policy",
                        "--dest-tls-verify=false",
                    ])
                    .arg(format!("oci:{}:base", layout.display()))
                    .arg(format!("docker://127.0.0.1:{port}/library/{name}"))
                    .env("HOME", env.work()),
            );
            copied.ok();
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A minimal Debian with nginx, as an OCI layout with the image `base`.
fn base(env: &Env) -> PathBuf {
    let tar = env.path("base.tar");
    let made = output(
        Command::new("mmdebstrap")
            .env("TMPDIR", "/var/tmp") // its other ids must get there
            .args(["--mode=unshare", "--variant=minbase", "--quiet"])
            .arg("--aptopt=Acquire::Retries \"10\"")
            .arg("--include=nginx-light,ca-certificates")
            .args([
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
            ])
            .arg("bookworm")
            .arg(&tar)
            .arg("http://deb.debian.org/debian"),
    );
    made.ok();
    let layout = env.path("layout");
    let image = format!("{}:base", layout.display());
    for words in [
        vec!["init", "--layout", layout.to_str().unwrap()],
        vec!["new", "--image", &image],
        vec!["raw", "add-layer", "--image", &image, tar.to_str().unwrap()],
        vec![
            "config",
            "--image",
            &image,
            "--config.env",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "--config.cmd",
            "bash",
        ],
    ] {
        output(Command::new("umoci").args(words)).ok();
    }
    fs::remove_file(tar).unwrap();
    layout
}

fn guide(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/guide")
        .join(name)
}

/// The definition file with its base image from the test's registry, as a site with a mirror writes it.
fn definition(env: &Env, name: &str, port: u16) -> PathBuf {
    let text = fs::read_to_string(guide(name)).unwrap();
    let place = env.work().join(name);
    write(
        &place,
        &text.replacen(
            "\nFrom: ",
            &format!("\nRegistry: 127.0.0.1:{port}\nNamespace: library\nFrom: "),
            1,
        ),
    );
    place
}

fn capsid(env: &Env, words: &[&str]) -> Output {
    let mut command = env.command(words);
    command
        .env("APPTAINER_CACHEDIR", env.path("cache"))
        .env("APPTAINER_CONFIGDIR", env.path("config"))
        .env("TMPDIR", env.path("work"));
    output(&mut command)
}

/// A server that gives one page to everybody.
fn page(text: &'static str) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // A browser opens connections that it may never use.
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
                    text.len()
                );
            });
        }
    });
    port
}

fn fetch(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn services_of_the_guides_build_and_run() {
    let env = Env::new();
    let registry = Registry::with_base(&env);
    nginx(&env, registry.port);
    pdf(&env, registry.port);
}

fn nginx(env: &Env, registry: u16) {
    let definition = definition(env, "nginx.def", registry);
    capsid(
        env,
        &[
            "build",
            "--no-https",
            "nginx.sif",
            definition.to_str().unwrap(),
        ],
    )
    .ok();
    let port = free_port();
    let publish = format!("{port}:80");
    capsid(
        env,
        &[
            "instance",
            "start",
            "--writable-tmpfs",
            "--net",
            "--publish",
            &publish,
            "nginx.sif",
            "web",
        ],
    )
    .ok();
    wait_until("nginx to answer", || {
        fetch(port).is_some_and(|a| a.contains("Welcome to nginx"))
    });
    capsid(env, &["instance", "stop", "web"]).ok();
}

fn pdf(env: &Env, registry: u16) {
    let definition = definition(env, "pdf.def", registry);
    output(
        Command::new("cp")
            .arg("-r")
            .arg(guide("pdf_server"))
            .arg(env.work()),
    )
    .ok();
    let ca = "/etc/ssl/certs/ca-certificates.crt";
    // npm of the machine may go through a certificate authority of the site's
    let words = [
        "build",
        "--force",
        "--no-https",
        "--bind",
        ca,
        "pdf.sif",
        definition.to_str().unwrap(),
    ];
    capsid(env, &words).ok();
    fs::create_dir(env.work().join("out")).unwrap();
    let port = free_port().to_string();
    let mut start = env.command([
        "instance",
        "start",
        "--env",
        &format!("PORT={port}"),
        "--bind",
        "out:/output",
        "--ready-port",
        &port,
        "--wait",
        "pdf.sif",
        "pdf",
    ]);
    output(start.env("APPTAINER_CONFIGDIR", env.path("config"))).ok();
    let url = format!("http://127.0.0.1:{}/", page("<h1>A page</h1>"));
    let client = capsid(
        env,
        &[
            "run",
            "--env",
            &format!("PORT={port}"),
            "--app",
            "pdf_client",
            "instance://pdf",
            &url,
            "page.pdf",
        ],
    );
    client.ok();
    let made = fs::read(env.work().join("out/page.pdf")).unwrap();
    assert!(
        made.starts_with(b"%PDF-") && made.len() > 1000,
        "{} bytes",
        made.len()
    );
    capsid(env, &["instance", "stop", "pdf"]).ok();
}
