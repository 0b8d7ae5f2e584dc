//! Definitions as JSON (`build --json`), in the form of Apptainer's own `Definition` type.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::sections::{self, Line};
use super::{Def, Files, Script, Stage, check_stages, is_key};

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Json {
    header: BTreeMap<String, String>,
    image_data: ImageData,
    build_data: BuildData,
    custom_data: BTreeMap<String, String>,
    app_order: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ImageData {
    labels: BTreeMap<String, String>,
    image_scripts: ImageScripts,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ImageScripts {
    help: JsonScript,
    environment: JsonScript,
    run_script: JsonScript,
    test: JsonScript,
    start_script: JsonScript,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct BuildData {
    files: Vec<JsonFiles>,
    build_scripts: BuildScripts,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct BuildScripts {
    pre: JsonScript,
    setup: JsonScript,
    post: JsonScript,
    test: JsonScript,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonScript {
    args: String,
    script: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct JsonFiles {
    args: String,
    files: Vec<Transport>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Transport {
    #[serde(alias = "Src")]
    source: String,
    #[serde(alias = "Dst")]
    destination: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    More(Vec<Json>),
    One(Box<Json>),
}

/// Parses a definition, or an array of them as stages.
///
/// # Errors
/// When it is not JSON, or not of that form.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Def> {
    let parsed: OneOrMore = serde_json::from_slice(bytes)
        .with_context(|| format!("{file}: not a definition in JSON"))?;
    let parsed = match parsed {
        OneOrMore::More(more) => more,
        OneOrMore::One(one) => vec![*one],
    };
    let stages = parsed
        .into_iter()
        .map(|json| stage(file, json))
        .collect::<Result<Vec<_>>>()?;
    let def = Def {
        stages,
        warnings: Vec::new(),
    };
    if def.stages.is_empty() {
        bail!("{file}: no bootstrap specification found");
    }
    check_stages(file, &def)?;
    Ok(def)
}

fn stage(file: &str, json: Json) -> Result<Stage> {
    let script = |script: JsonScript| Script {
        args: script.args,
        text: script.script,
    };
    let mut header = BTreeMap::new();
    for (key, value) in json.header {
        let key = key.to_ascii_lowercase();
        if !is_key(&key) {
            bail!("{file}: invalid header keyword found: {key}");
        }
        if !value.trim().is_empty() {
            header.insert(key, value);
        }
    }
    if !header.contains_key("bootstrap") {
        bail!("{file}: no bootstrap specification found: the header needs the key \"bootstrap\"");
    }
    let (image, build) = (json.image_data.image_scripts, json.build_data.build_scripts);
    let mut test = script(image.test);
    if test.is_empty() {
        test = script(build.test);
    }
    let mut stage = Stage {
        header,
        pre: script(build.pre),
        setup: script(build.setup),
        post: script(build.post),
        test,
        environment: script(image.environment),
        runscript: script(image.run_script),
        startscript: script(image.start_script),
        help: script(image.help),
        labels: json.image_data.labels.into_iter().collect(),
        ..Stage::default()
    };
    for files in json.build_data.files {
        let words: Vec<&str> = files.args.split_ascii_whitespace().collect();
        let from = match words.as_slice() {
            [] => None,
            ["from", name] => Some((*name).to_owned()),
            _ => bail!("{file}: files {:?}: use \"\" or \"from STAGE\"", files.args),
        };
        let pair = |t: Transport| (t.source, Some(t.destination).filter(|d| !d.is_empty()));
        let pairs = files.files.into_iter().map(pair).collect();
        stage.files.push(Files { from, pairs });
    }
    apps(file, &mut stage, &json.custom_data, &json.app_order)?;
    stage.text = as_text(&stage.header);
    Ok(stage)
}

/// Keys are `appinstall NAME` and the like.
fn apps(
    file: &str,
    stage: &mut Stage,
    data: &BTreeMap<String, String>,
    order: &[String],
) -> Result<()> {
    let rank = |key: &str| {
        let name = key.split_whitespace().nth(1).unwrap_or_default();
        order.iter().position(|o| o == name).unwrap_or(usize::MAX)
    };
    let mut entries: Vec<(&String, &String)> = data.iter().collect();
    entries.sort_by_key(|(key, _)| rank(key));
    for (key, text) in entries {
        let line = |text: &str, begins| Line {
            number: 1,
            text: text.to_owned(),
            begins,
        };
        let lines: Vec<Line> = std::iter::once(line(&format!("%{key}"), true))
            .chain(text.lines().map(|text| line(text, false)))
            .collect();
        sections::read(file, &lines, stage, &mut Vec::new())?;
    }
    Ok(())
}

fn as_text(header: &BTreeMap<String, String>) -> String {
    header
        .iter()
        .map(|(key, value)| format!("{key}: {value}\n"))
        .collect()
}
