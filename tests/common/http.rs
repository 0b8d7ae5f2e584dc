//! A small HTTP server on a port that the kernel chooses, answering by a function, and remembering what it was asked.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What was asked.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `GET` and the like.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in small letters.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Asked {
    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The first byte of a `Range`.
    pub fn range(&self) -> Option<usize> {
        let range = self.header("range")?.strip_prefix("bytes=")?;
        range.split('-').next()?.parse().ok()
    }
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body, whose whole length was announced.
    pub cut: Option<usize>,
}

impl Answer {
    /// With a body.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Answer {
        Answer {
            status,
            body: body.into(),
            ..Answer::default()
        }
    }

    /// With a header.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Answer {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Content, or the part of it that was asked for.
    pub fn content(asked: &Asked, content: &[u8]) -> Answer {
        match asked.range() {
            Some(start) => {
                let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
                Answer::new(206, &content[start..]).header("Content-Range", range)
            }
            None => Answer::new(200, content),
        }
    }
}

/// A running server; it ends with the test's process.
#[derive(Clone)]
pub struct Server {
    /// `127.0.0.1:PORT`.
    pub address: String,
    log: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    /// Starts one.
    pub fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = Server {
            address: listener.local_addr().expect("an address").to_string(),
            log: Arc::default(),
        };
        let (log, answer) = (server.log.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &log, answer.as_ref()));
            }
        });
        server
    }

    /// What was asked until now.
    pub fn asked(&self) -> Vec<Asked> {
        self.log.lock().expect("no thread has died").clone()
    }

    /// How often something was asked whose line begins like this.
    pub fn count(&self, beginning: &str) -> usize {
        let line = |a: &Asked| format!("{} {}", a.method, a.target);
        let all = self.asked();
        all.iter()
            .filter(|a| line(a).starts_with(beginning))
            .count()
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Asked>>, answer: &dyn Fn(&Asked) -> Answer) {
    let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
    while let Some(asked) = read(&mut reader) {
        log.lock().expect("no thread has died").push(asked.clone());
        if asked.method == "CONNECT" {
            // Being a proxy to itself.
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            continue;
        }
        let answer = answer(&asked);
        let mut head = format!(
            "HTTP/1.1 {} Status\r\nConnection: close\r\nContent-Length: {}\r\n",
            answer.status,
            answer.body.len()
        );
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let body = &answer.body[..answer
            .cut
            .unwrap_or(answer.body.len())
            .min(answer.body.len())];
        let body = if asked.method == "HEAD" {
            &[][..]
        } else {
            body
        };
        // A client may have heard enough.
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body));
        return;
    }
}

fn read(reader: &mut impl BufRead) -> Option<Asked> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_lowercase(), value.trim().to_owned())),
            None => break,
        }
    }
    let asked = Asked {
        method,
        target,
        headers,
        body: Vec::new(),
    };
    let len = asked.header("content-length").and_then(|l| l.parse().ok());
    let mut body = vec![0; len.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some(Asked { body, ..asked })
}
