//! `Bootstrap: library`, `oras`, `http`, `https`: a SIF from elsewhere.

use anyhow::{Result, bail};

use super::Base;
use crate::build::Settings;
use crate::build::deffile::Stage;

/// Fetches the file.
///
/// # Errors
/// When it cannot be fetched, or is no image.
pub fn prepare(agent: &str, from: &str, _stage: &Stage, _settings: &Settings) -> Result<Base> {
    bail!("cannot fetch {agent}://{from}: it is not supported by this version")
}
