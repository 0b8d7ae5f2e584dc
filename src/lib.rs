//! Capsid runs Singularity and Apptainer images as a normal user, without a setuid program and without helpers.
//!
//! The program has one spine, and data moves along it in one direction:
//!
//! ```text
//!  argv            facts             decisions           effects
//!  cmd::Args  ──►  host::Host   ──►  plan::Plan     ──►  engine::run  ──►  execve
//!                  image::Facts      (a pure value)      (one place)
//! ```
//!
//! [`cmd`] holds what was typed, [`host`] and [`image`] what was found out, [`plan`] what will happen, and [`engine`]
//! makes it happen. Everything else prepares an image for such a run.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod build;
pub mod cache;
pub mod cmd;
pub mod digest;
pub mod durable;
pub mod engine;
pub mod exit;
pub mod filesystem;
pub mod given;
pub mod gpu;
pub mod host;
pub mod image;
pub mod instance;
pub mod job;
pub mod metadir;
pub mod net;
pub mod oci;
pub mod plan;
pub mod proc;
pub mod progress;
pub mod say;
pub mod secret;
pub mod shell;
pub mod sif;
pub mod squash;
pub mod threads;
