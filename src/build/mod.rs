//! Making images.

pub mod pack;
