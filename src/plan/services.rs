//! `services.toml`: the services that a job declares.
//!
//! Pure: a text becomes a list of [`Declared`] in the order in which they can be started, or an error with the number of
//! the line. Who reads the file, and when, is the supervisor's business.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::service::{LONGEST_NAME, is_name, parse_restart};

/// How long a service may take to be ready when nothing else is said, seconds.
const TIMEOUT_S: u32 = 60;

/// A service that a job declares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Declared {
    /// The instance's name.
    pub name: String,
    /// The image, as written.
    pub image: String,
    /// Run the runscript, not the startscript.
    pub run: bool,
    /// Arguments of the script.
    pub args: Vec<String>,
    /// Options as on the command line.
    pub options: Vec<String>,
    /// Where it runs.
    pub nodes: Nodes,
    /// When it is ready, as an option of `instance start`.
    pub ready: Option<String>,
    /// The port by which it is ready.
    pub port: Option<u16>,
    /// How long it may take to be ready, seconds.
    pub timeout_s: u32,
    /// `--restart`.
    pub restart: String,
    /// Those that must be ready first.
    pub after: Vec<String>,
}

/// On which nodes of the job a service runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Nodes {
    /// On the one with this number, from 0.
    Index(usize),
    /// On each.
    All,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    service: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Spanned<String>,
    image: Spanned<String>,
    mode: Option<Spanned<String>>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    options: Vec<Spanned<String>>,
    nodes: Option<Spanned<toml::Value>>,
    ready: Option<Spanned<ReadyEntry>>,
    restart: Option<Spanned<String>>,
    #[serde(default)]
    after: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadyEntry {
    port: Option<u16>,
    file: Option<String>,
    log: Option<String>,
    cmd: Option<String>,
    notify: Option<bool>,
    timeout: Option<String>,
}

/// Reads the text, for a job of so many nodes.
///
/// # Errors
/// With the number of the line that is wrong.
pub fn parse(text: &str, nodes: usize) -> Result<Vec<Declared>> {
    let line = |at: usize| {
        text.as_bytes()[..at.min(text.len())]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
            + 1
    };
    let wrong = |at: usize, what: String| anyhow!("line {}: {what}", line(at));
    let file: File = toml::from_str(text).map_err(|e| {
        wrong(
            e.span().map_or(0, |s| s.start),
            e.message().replace('\n', " "),
        )
    })?;
    let mut services: Vec<(usize, Declared)> = Vec::new();
    for entry in file.service {
        let at = entry.span().start;
        let service = declared(entry.into_inner(), at, &wrong)?;
        if services.iter().any(|(_, other)| other.name == service.name) {
            return Err(wrong(
                at,
                format!("there is a service {:?} already", service.name),
            ));
        }
        let others = services.iter().map(|(_, other)| other);
        alike(others, &service).map_err(|error| wrong(at, format!("{error:#}")))?;
        services.push((at, service));
    }
    for (at, service) in &services {
        for name in &service.after {
            let Some((_, other)) = services.iter().find(|(_, other)| other.name == *name) else {
                return Err(wrong(
                    *at,
                    format!(
                        "service {:?} comes after {name:?}, which is not declared",
                        service.name
                    ),
                ));
            };
            let apart = |node| service.is_on(node) && !other.is_on(node);
            if other.port.is_none() && (0..nodes).any(apart) {
                return Err(wrong(
                    *at,
                    format!(
                        "service {:?} comes after {name:?} of another node, where only a port can tell that it is ready: \
                         give {name:?} a ready = {{ port = ... }}, or run both on one node",
                        service.name
                    ),
                ));
            }
        }
    }
    // Those without unmet conditions first, as written.
    let mut ordered: Vec<Declared> = Vec::new();
    while !services.is_empty() {
        let met = |s: &Declared| {
            s.after
                .iter()
                .all(|name| ordered.iter().any(|o| o.name == *name))
        };
        let Some(next) = services.iter().position(|(_, s)| met(s)) else {
            let names: Vec<&str> = services.iter().map(|(_, s)| s.name.as_str()).collect();
            return Err(wrong(
                services[0].0,
                format!(
                    "these services wait for each other (after): {}",
                    names.join(", ")
                ),
            ));
        };
        ordered.push(services.remove(next).1);
    }
    Ok(ordered)
}

/// Names may differ where variables cannot.
///
/// # Errors
/// When tasks would find two services in the same variables.
pub fn alike<'a>(mut others: impl Iterator<Item = &'a Declared>, service: &Declared) -> Result<()> {
    let variable = service.variable();
    match others.find(|other| other.variable() == variable) {
        Some(other) => bail!(
            "services {:?} and {:?} would share the variables CAPSID_SERVICE_{variable}_...: give one another name",
            other.name,
            service.name
        ),
        None => Ok(()),
    }
}

fn declared(
    entry: Entry,
    at: usize,
    wrong: &dyn Fn(usize, String) -> anyhow::Error,
) -> Result<Declared> {
    let name = entry.name.get_ref();
    if !is_name(name) {
        let text = format!(
            "name {name:?}: use 1 to {LONGEST_NAME} of A-Z a-z 0-9 _ . - (not . or .., and no dash in front)"
        );
        return Err(wrong(entry.name.span().start, text));
    }
    if entry.image.get_ref().is_empty() {
        return Err(wrong(entry.image.span().start, "image is empty".into()));
    }
    let run = match entry.mode.as_ref().map(|m| m.get_ref().as_str()) {
        None | Some("start") => false,
        Some("run") => true,
        Some(other) => {
            let at = entry.mode.as_ref().map_or(at, |m| m.span().start);
            return Err(wrong(
                at,
                format!("mode {other:?}: use \"start\" or \"run\""),
            ));
        }
    };
    let nodes = match &entry.nodes {
        None => Nodes::Index(0),
        Some(value) => match value.get_ref() {
            toml::Value::String(text) if text == "first" => Nodes::Index(0),
            toml::Value::String(text) if text == "all" => Nodes::All,
            toml::Value::Integer(n) if usize::try_from(*n).is_ok() => {
                Nodes::Index(usize::try_from(*n).unwrap_or(0))
            }
            _ => {
                let text =
                    "nodes: use \"first\", \"all\", or the number of a node of the job, from 0"
                        .into();
                return Err(wrong(value.span().start, text));
            }
        },
    };
    let restart = match &entry.restart {
        None => "no".to_owned(),
        Some(text) => {
            parse_restart(text.get_ref()).map_err(|_| {
                wrong(
                    text.span().start,
                    format!(
                        "restart {:?}: use no, on-failure, on-failure:N or always",
                        text.get_ref()
                    ),
                )
            })?;
            text.get_ref().clone()
        }
    };
    for option in &entry.options {
        let word = option.get_ref().split('=').next().unwrap_or_default();
        if word == "--foreground"
            || word == "--wait"
            || word.starts_with("--ready")
            || word == "--restart"
        {
            let text = format!(
                "option {word:?} cannot be given here: there are the keys ready and restart"
            );
            return Err(wrong(option.span().start, text));
        }
    }
    let (ready, port, timeout_s) = match entry.ready {
        None => (None, None, TIMEOUT_S),
        Some(ready) => {
            let at = ready.span().start;
            condition(ready.into_inner()).map_err(|e| wrong(at, format!("{e:#}")))?
        }
    };
    Ok(Declared {
        name: entry.name.into_inner(),
        image: entry.image.into_inner(),
        run,
        args: entry.args,
        options: entry.options.into_iter().map(Spanned::into_inner).collect(),
        nodes,
        ready,
        port,
        timeout_s,
        restart,
        after: entry.after.into_iter().map(Spanned::into_inner).collect(),
    })
}

fn condition(ready: ReadyEntry) -> Result<(Option<String>, Option<u16>, u32)> {
    let timeout_s = ready
        .timeout
        .as_deref()
        .map(seconds)
        .transpose()?
        .unwrap_or(TIMEOUT_S);
    let mut options = Vec::new();
    if let Some(port) = ready.port {
        if port == 0 {
            bail!("port = 0: use 1 to 65535");
        }
        options.push(format!("--ready-port={port}"));
    }
    options.extend(ready.file.map(|path| format!("--ready-file={path}")));
    options.extend(ready.log.map(|pattern| format!("--ready-log={pattern}")));
    options.extend(ready.cmd.map(|command| format!("--ready-cmd={command}")));
    if ready.notify == Some(true) {
        options.push("--ready-notify".into());
    }
    if options.len() > 1 {
        bail!("ready: give only one of port, file, log, cmd and notify");
    }
    Ok((options.pop(), ready.port, timeout_s))
}

/// `60s`, `2m`, `1h`, or seconds alone.
fn seconds(text: &str) -> Result<u32> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) => (number, text.chars().last()),
        None => (text, None),
    };
    let factor = match unit {
        Some('m') => 60,
        Some('h') => 3600,
        _ => 1,
    };
    match number
        .parse::<u32>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
    {
        Some(seconds) if seconds > 0 => Ok(seconds),
        _ => bail!("timeout {text:?}: use a number with s, m or h, such as \"60s\""),
    }
}

impl Declared {
    /// Whether it runs on the node with this number.
    pub fn is_on(&self, node: usize) -> bool {
        match self.nodes {
            Nodes::All => true,
            Nodes::Index(index) => index == node,
        }
    }

    /// Whether its image has to be fetched first.
    pub fn is_fetched(&self) -> bool {
        self.image.contains("://")
    }

    /// The words of its start, behind `instance start` or `instance run`; `image` is absolute, or to be fetched.
    pub fn words(&self, image: &str) -> Vec<String> {
        let mut words = vec![format!("--restart={}", self.restart)];
        if let Some(ready) = &self.ready {
            words.extend([ready.clone(), format!("--wait={}", self.timeout_s)]);
        }
        words.extend(self.options.iter().cloned());
        words.extend(["--".into(), image.into(), self.name.clone()]);
        words.extend(self.args.iter().cloned());
        words
    }

    /// The name as part of a variable's.
    pub fn variable(&self) -> String {
        let upper = |c: char| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_uppercase()
            } else {
                '_'
            }
        };
        self.name.chars().map(upper).collect()
    }
}

/// How long each service may take to be ready, with all those that it comes after, seconds; for services in the order in which
/// they can be started.
pub fn limits_s<'a>(services: impl Iterator<Item = &'a Declared>) -> BTreeMap<&'a str, u32> {
    let mut limits = BTreeMap::new();
    for service in services {
        let before = service
            .after
            .iter()
            .filter_map(|name| limits.get(name.as_str()));
        let before: u32 = before.copied().max().unwrap_or(0);
        limits.insert(
            service.name.as_str(),
            before.saturating_add(service.timeout_s),
        );
    }
    limits
}

/// The services of the option `--service IMAGE:NAME,IMAGE:NAME`, which are started by their startscript on the first node.
///
/// # Errors
/// Naming what is wrong.
pub fn from_option(text: &str) -> Result<Vec<Declared>> {
    let mut services: Vec<Declared> = Vec::new();
    for word in text.split(',') {
        let (image, name) = word.rsplit_once(':').unwrap_or(("", ""));
        if image.is_empty() || !is_name(name) || services.iter().any(|s| s.name == name) {
            bail!(
                "--service {word:?}: use IMAGE:NAME, with a name of its own of A-Z a-z 0-9 _ . -"
            );
        }
        let service = Declared {
            name: name.into(),
            image: image.into(),
            run: false,
            args: Vec::new(),
            options: Vec::new(),
            nodes: Nodes::Index(0),
            ready: None,
            port: None,
            timeout_s: TIMEOUT_S,
            restart: "no".into(),
            after: Vec::new(),
        };
        alike(services.iter(), &service).context("--service")?;
        services.push(service);
    }
    Ok(services)
}

/// What ends a word of a job's comment.
const BETWEEN: [char; 5] = [' ', ',', ';', '\n', '\t'];
const FILE: &str = "capsid:services=";
const REPORT: &str = "capsid:report";

/// Whether a job's comment asks for a line about each instance at the end of the job's output: the word `capsid:report`.
pub fn wants_report(comment: &str) -> bool {
    comment.split(BETWEEN).any(|word| word == REPORT)
}

/// The file that a job's comment names: `capsid:services=FILE`, to the next blank, comma or semicolon.
pub fn named_by_comment(comment: &str) -> Option<&str> {
    let mut words = comment.split(BETWEEN);
    words.find_map(|word| word.strip_prefix(FILE).filter(|file| !file.is_empty()))
}

/// What of a job's comment seems to be meant for us, and is not understood.
pub fn misunderstood(comment: &str) -> Option<String> {
    let mut file = None;
    let mut before = "";
    for word in comment.split(BETWEEN) {
        let ours = word
            .get(.."capsid".len())
            .is_some_and(|start| start.eq_ignore_ascii_case("capsid"))
            && word["capsid".len()..].starts_with([':', '=']);
        let name = word.strip_prefix(FILE).filter(|name| !name.is_empty());
        if ours && word != REPORT && name.is_none() {
            return Some(format!(
                "the job's comment says {word:?}: use capsid:services=FILE, or capsid:report"
            ));
        }
        // `a.toml,b.toml` is the wish for both.
        let joined = [',', ';'].map(|mark| format!("{before}{mark}{word}"));
        let second = !ours
            && before.starts_with(FILE)
            && word.ends_with(".toml")
            && joined.iter().any(|both| comment.contains(both));
        if second || name.is_some() && file.is_some() {
            return Some(format!(
                "the job's comment names more than one file of services: put those of {word:?} into {:?}",
                file.unwrap_or_default()
            ));
        }
        file = file.or(name);
        before = word;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comment_asks_for_a_report() {
        assert!(wants_report("capsid:services=x.toml,capsid:report"));
        assert!(!wants_report("capsid:reports xcapsid:report"));
    }

    #[test]
    fn file_of_the_documentation() {
        let text = r#"
[[service]]
name = "web"
image = "web.sif"
mode = "run"
nodes = "all"
after = ["db"]
restart = "on-failure"

[[service]]
name = "db"
image = "postgres.sif"
args = ["-c", "x"]
options = ["--bind", "data:/var/lib/postgresql"]
ready = { port = 5432, timeout = "2m" }
"#;
        let all = parse(text, 1).unwrap();
        assert_eq!(
            all.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["db", "web"]
        );
        let words = [
            "--restart=no",
            "--ready-port=5432",
            "--wait=120",
            "--bind",
            "data:/var/lib/postgresql",
            "--",
            "/i/postgres.sif",
            "db",
            "-c",
            "x",
        ];
        assert_eq!(all[0].words("/i/postgres.sif"), words);
        assert!(all[0].is_on(0) && !all[0].is_on(1) && all[1].is_on(1) && all[1].run);
        assert_eq!(all[0].variable(), "DB");
        assert_eq!(parse("", 1).unwrap(), []);
        assert_eq!(
            limits_s(all.iter()),
            BTreeMap::from([("db", 120), ("web", 180)])
        );
    }

    #[test]
    fn services_of_other_nodes_are_known_by_their_ports() {
        let text = |db: &str, web: &str| {
            format!(
                "[[service]]\nname = \"db\"\nimage = \"x\"\n{db}\n[[service]]\nname = \"web\"\nimage = \"x\"\nafter = [\"db\"]\n{web}"
            )
        };
        let port = "ready = { port = 1 }";
        for (db, web, nodes, fits) in [
            ("", "", 2, true),
            ("", "nodes = 1", 2, false),
            ("", "nodes = \"all\"", 2, false),
            ("", "nodes = \"all\"", 1, true),
            ("nodes = \"all\"", "nodes = 1", 2, true),
            ("ready = { log = \"x\" }", "nodes = 1", 2, false),
            (port, "nodes = 1", 2, true),
            (port, "nodes = \"all\"", 2, true),
        ] {
            let parsed = parse(&text(db, web), nodes).map_err(|e| e.to_string());
            match parsed {
                Ok(_) => assert!(fits, "{db} {web} {nodes}"),
                Err(error) => assert!(
                    !fits
                        && error.starts_with(
                            "line 5: service \"web\" comes after \"db\" of another node"
                        ),
                    "{db} {web} {nodes}: {error}"
                ),
            }
        }
    }

    #[test]
    fn errors_name_the_line() {
        for (text, line, what) in [
            ("[[service]]\nname = \"a/b\"\nimage = \"x\"", 2, "name"),
            ("[[service]]\nname = \"a\"", 1, "image"),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nport = 1",
                4,
                "port",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nmode = \"fast\"",
                4,
                "mode",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nnodes = \"last\"",
                4,
                "nodes",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nnodes = -1",
                4,
                "nodes",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nready = { port = 1, file = \"/x\" }",
                4,
                "only one",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nready = { timeout = \"soon\" }",
                4,
                "timeout",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nrestart = \"maybe\"",
                4,
                "restart",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\noptions = [\"--foreground\"]",
                4,
                "--foreground",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nafter = [\"b\"]",
                1,
                "not declared",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\nafter = [\"a\"]",
                1,
                "wait for each other",
            ),
            (
                "[[service]]\nname = \"a\"\nimage = \"x\"\n\n[[service]]\nname = \"a\"\nimage = \"x\"",
                5,
                "already",
            ),
            ("\n\n[[service", 3, ""),
        ] {
            let error = format!("{:#}", parse(text, 2).unwrap_err());
            assert!(
                error.starts_with(&format!("line {line}: ")) && error.contains(what),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn services_of_the_option() {
        let all = from_option("a.sif:db,/x/y:z:web").unwrap();
        assert_eq!(
            (all[0].image.as_str(), all[1].image.as_str()),
            ("a.sif", "/x/y:z")
        );
        for bad in ["", "a", ":a", "a:", "a:b/c", "a:b,c:b", "a:$(id)"] {
            assert!(from_option(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn services_share_no_variables() {
        let file = |a: &str, b: &str| {
            format!(
                "[[service]]\nname = \"{a}\"\nimage = \"x\"\n[[service]]\nname = \"{b}\"\nimage = \"x\"\n"
            )
        };
        for (a, b) in [("x-1", "x.1"), ("x_1", "x-1"), ("db", "DB")] {
            let error = format!("{:#}", parse(&file(a, b), 1).unwrap_err());
            for words in ["line 4: ", a, b] {
                assert!(error.contains(words), "{words}: {error}");
            }
            let error = format!("{:#}", from_option(&format!("i:{a},i:{b}")).unwrap_err());
            assert!(error.contains(a) && error.contains(b), "{error}");
        }
        assert_eq!(parse(&file("x1", "x-1"), 1).unwrap().len(), 2);
    }

    #[test]
    fn words_meant_for_us_are_understood_or_named() {
        for good in [
            "",
            "capsid:services=a.toml",
            "capsid:report;capsid:services=a.toml",
            "my words, capsid:services=a.toml words.toml",
            "capsids:x xcapsid:service= see capsid",
            "\u{e9}\u{e9}\u{e9}\u{e9}",
        ] {
            assert_eq!(misunderstood(good), None, "{good:?}");
        }
        for (bad, words) in [
            ("capsid:service=a.toml", "capsid:service=a.toml"),
            ("x,Capsid:services=a.toml", "Capsid:services=a.toml"),
            ("capsid: services=a.toml", "\"capsid:\""),
            ("capsid:services=", "capsid:services="),
            ("capsid=a.toml", "capsid=a.toml"),
            ("capsid:reports", "capsid:reports"),
            ("capsid:services=a.toml,b.toml", "b.toml"),
            (
                "capsid:services=a.toml,capsid:services=c",
                "capsid:services=c",
            ),
        ] {
            let said = misunderstood(bad).unwrap_or_default();
            assert!(said.contains(words), "{bad:?}: {said}");
        }
    }

    #[test]
    fn comments() {
        assert_eq!(named_by_comment("capsid:services=a.toml"), Some("a.toml"));
        assert_eq!(
            named_by_comment("x;capsid:services=/d/a.toml,y"),
            Some("/d/a.toml")
        );
        for none in [
            "",
            "capsid:services=",
            "xcapsid:services=a",
            "services=a",
            "svc; $(id)",
        ] {
            assert_eq!(named_by_comment(none), None, "{none}");
        }
    }
}
