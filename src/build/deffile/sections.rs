//! The sections of a stage.

use anyhow::{Result, anyhow, bail};

use super::template::Filler;
use super::{At, Files, Script, Stage};

/// Names of sections; those of applications are followed by the application's name.
const SECTIONS: [&str; 11] = [
    "arguments",
    "pre",
    "setup",
    "files",
    "post",
    "test",
    "environment",
    "startscript",
    "runscript",
    "labels",
    "help",
];
const APP_SECTIONS: [&str; 8] = [
    "appinstall",
    "appfiles",
    "appenv",
    "apprun",
    "appstart",
    "apptest",
    "apphelp",
    "applabels",
];

/// Largest number of applications: each costs files and lines of the environment.
const MAX_APPS: usize = 10_000;

/// Name (lower case, without `%`) and the rest of the line, when a line begins a section.
pub fn begins(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start_matches([' ', '\t']).strip_prefix('%')?;
    let end = line.find([' ', '\t']).unwrap_or(line.len());
    Some((line[..end].to_ascii_lowercase(), line[end..].trim()))
}

/// A line with its arguments filled in.
pub struct Line {
    /// In the file, from 1. A value with several lines makes several with one number.
    pub number: usize,
    /// Without its end.
    pub text: String,
    /// As it is written in the file it begins a section.
    pub begins: bool,
}

/// Fills the arguments into the lines of sections.
///
/// # Errors
/// Those of the arguments.
pub fn fill(file: &str, lines: &[(usize, &str)], filler: &mut Filler) -> Result<Vec<Line>> {
    let mut filled = Vec::with_capacity(lines.len());
    let mut in_arguments = false;
    for &(number, raw) in lines {
        let begun = begins(raw);
        if let Some((name, _)) = &begun {
            in_arguments = name == "arguments";
        }
        let line = |text: &str, begins| Line {
            number,
            text: text.to_owned(),
            begins,
        };
        // A default may name what nobody uses.
        if in_arguments || raw.trim_start().starts_with('#') {
            filled.push(line(raw, begun.is_some()));
            continue;
        }
        let text = filler.fill(At { file, line: number }, raw)?;
        if begun.is_some() {
            // What a section is called and given is one line.
            filled.push(line(&text.replace('\n', " "), true));
        } else {
            filled.extend(text.split('\n').map(|text| line(text, false)));
        }
    }
    Ok(filled)
}

/// Reads the sections from these lines, the first of which begins one.
pub fn read(
    file: &str,
    lines: &[Line],
    stage: &mut Stage,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let mut rest = lines;
    while let Some((line, tail)) = rest.split_first() {
        let len = tail.iter().position(|line| line.begins);
        let (body, after) = tail.split_at(len.unwrap_or(tail.len()));
        rest = after;
        let at = At {
            file,
            line: line.number,
        };
        let (name, args) =
            begins(&line.text).ok_or_else(|| anyhow!("{at}: a section begins with %name"))?;
        let section = Section { at, args, body };
        if APP_SECTIONS.contains(&name.as_str()) {
            section.app(&name, stage, warnings)?;
        } else if SECTIONS.contains(&name.as_str()) {
            section.plain(&name, stage, warnings)?;
        } else {
            bail!(
                "{at}: invalid section(s) specified: {name}: known ones are {} and %app… of an application; \
                 a line of a script must not begin with %",
                SECTIONS.map(|s| format!("%{s}")).join(" ")
            );
        }
    }
    Ok(())
}

struct Section<'a> {
    at: At<'a>,
    args: &'a str,
    body: &'a [Line],
}

impl Section<'_> {
    fn text(&self) -> String {
        self.body
            .iter()
            .flat_map(|line| [line.text.as_str(), "\n"])
            .collect()
    }

    fn append(&self, script: &mut Script) {
        if !self.args.is_empty() {
            script.args = self.args.to_owned();
        }
        script.text.push_str(&self.text());
    }

    fn plain(&self, name: &str, stage: &mut Stage, warnings: &mut Vec<String>) -> Result<()> {
        match name {
            "pre" => self.append(&mut stage.pre),
            "setup" => self.append(&mut stage.setup),
            "post" => self.append(&mut stage.post),
            "test" => self.append(&mut stage.test),
            "environment" => self.append(&mut stage.environment),
            "runscript" => self.append(&mut stage.runscript),
            "startscript" => self.append(&mut stage.startscript),
            "help" => self.append(&mut stage.help),
            "labels" => stage.labels.extend(labels(self.body)),
            "files" => {
                let from = self.from()?;
                let pairs = pairs(self.at.file, self.body, warnings)?;
                stage.files.push(Files { from, pairs });
            }
            _ => {} // the arguments are filled in already
        }
        Ok(())
    }

    /// The stage in `%files from NAME`.
    fn from(&self) -> Result<Option<String>> {
        let args = self.args.split('#').next().unwrap_or_default();
        let words: Vec<&str> = args.split_ascii_whitespace().collect();
        match words.as_slice() {
            [] => Ok(None),
            ["from", name] => Ok(Some((*name).to_owned())),
            _ => bail!(
                "{}: %files {}: write %files, or %files from STAGE",
                self.at,
                self.args
            ),
        }
    }

    fn app(&self, name: &str, stage: &mut Stage, warnings: &mut Vec<String>) -> Result<()> {
        let mut words = self.args.splitn(2, [' ', '\t']);
        let app = words.next().filter(|n| !n.is_empty());
        let Some(app) = app else {
            bail!(
                "{}: %{name} has no application's name: write %{name} NAME",
                self.at
            );
        };
        check_app_name(self.at, app)?;
        let args = words.next().unwrap_or_default().trim();
        if stage.apps.len() >= MAX_APPS && !stage.apps.iter().any(|a| a.name == app) {
            bail!("{}: more than {MAX_APPS} applications", self.at);
        }
        let app = stage.app(app);
        let own = |script: &mut Option<Script>| {
            let script = script.get_or_insert_default();
            if !args.is_empty() {
                script.args = args.to_owned();
            }
            script.text.push_str(&self.text());
        };
        let text = |text: &mut Option<String>| text.get_or_insert_default().push_str(&self.text());
        match name {
            "appinstall" => app.install.push_str(&self.text()),
            "appenv" => text(&mut app.environment),
            "apphelp" => text(&mut app.help),
            "apprun" => own(&mut app.run),
            "appstart" => own(&mut app.start),
            "apptest" => own(&mut app.test),
            "applabels" => app.labels.get_or_insert_default().extend(labels(self.body)),
            _ => app.files.extend(pairs(self.at.file, self.body, warnings)?),
        }
        Ok(())
    }
}

/// The name becomes a directory below `/scif/apps` and part of shell variables.
pub fn check_app_name(at: impl std::fmt::Display, name: &str) -> Result<()> {
    let sound = |c: char| c.is_alphanumeric() || "._-+".contains(c);
    if name.starts_with('.') || name.len() > 200 || !name.chars().all(sound) {
        bail!(
            "{at}: {name:?} cannot be an application's name: use letters, digits, and . _ - + inside"
        );
    }
    Ok(())
}

/// `name value` lines.
fn labels(body: &[Line]) -> Vec<(String, String)> {
    let lines = body.iter().map(|line| line.text.trim());
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let mut parts = line.splitn(2, [' ', '\t']);
            let name = parts.next().unwrap_or_default();
            (
                name.to_owned(),
                parts.next().unwrap_or_default().trim().to_owned(),
            )
        })
        .collect()
}

type Pair = (String, Option<String>);

/// `source [destination]` lines.
fn pairs(file: &str, body: &[Line], warnings: &mut Vec<String>) -> Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for Line { number, text, .. } in body {
        let at = At {
            file,
            line: *number,
        };
        if text.trim_start().starts_with('#') {
            continue;
        }
        let words = words(text).map_err(|error| anyhow!("{at}: {error}"))?;
        let mut words = words.into_iter();
        let Some(source) = words.next() else { continue };
        let destination = words.next().filter(|w| !w.starts_with('#'));
        if destination.is_some()
            && let Some(more) = words.next()
            && !more.starts_with('#')
        {
            warnings.push(format!(
                "{at}: {more:?} is ignored: a line of %files is a source and a destination, in quotes when a name has blanks"
            ));
        }
        pairs.push((source, destination));
    }
    Ok(pairs)
}

/// The words of a line: separated by blanks, kept together by quotes or a backslash before a blank.
///
/// # Errors
/// When a quote is not closed, or a name is empty.
pub fn words(line: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(words);
        }
        let mut word = String::new();
        while let Some(c) = chars.next_if(|c| !c.is_whitespace()) {
            match c {
                '"' | '\'' => loop {
                    match chars.next() {
                        Some(end) if end == c => break,
                        Some(other) => word.push(other),
                        None => bail!("the quote {c} is not closed"),
                    }
                },
                '\\' => match chars.next_if(|c| matches!(c, ' ' | '\t' | '"' | '\'' | '\\')) {
                    Some(escaped) => word.push(escaped),
                    None => word.push('\\'),
                },
                other => word.push(other),
            }
        }
        if word.is_empty() {
            bail!("an empty name in quotes");
        }
        words.push(word);
    }
}
