//! Making images.

pub mod convert;
pub mod pack;
