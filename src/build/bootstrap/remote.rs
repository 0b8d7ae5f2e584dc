//! `Bootstrap: library`, `oras`, `http`, `https`: a SIF from elsewhere.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Base, localimage};
use crate::build::Settings;
use crate::build::deffile::Stage;
use crate::cache::Cache;
use crate::net;

/// The file, which is in the cache by now.
///
/// # Errors
/// When it cannot be fetched, or is no image.
pub fn prepare(agent: &str, from: &str, stage: &Stage, settings: &Settings) -> Result<Base> {
    localimage::file(&fetch(agent, from, stage, settings)?, settings)
}

/// Fetches the file into the cache.
///
/// # Errors
/// When it cannot be fetched.
pub fn fetch(agent: &str, from: &str, stage: &Stage, settings: &Settings) -> Result<PathBuf> {
    let from = from.trim_start_matches('/');
    let address = match from
        .strip_prefix(agent)
        .and_then(|rest| rest.strip_prefix("://"))
    {
        Some(_) => from.to_owned(),
        None => format!("{agent}://{from}"),
    };
    let what = || format!("cannot fetch {address}");
    let reference: net::Reference = address.parse().with_context(what)?;
    let get = |options: &net::Options, cache: &Cache| {
        let mut options = options.clone();
        if let Some(library) = stage.key("library") {
            options.library.url = Some(library.to_owned());
        }
        net::file(&reference, &options, cache)
    };
    settings.net()?.fetch(get).with_context(what)
}
