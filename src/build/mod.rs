//! Making images.

pub mod deffile;
pub mod pack;
