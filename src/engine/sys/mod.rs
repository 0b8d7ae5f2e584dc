//! System calls that `nix` and `rustix` do not offer safely; the only part of the program with `unsafe`.
//!
//! Wrappers take borrowed descriptors and paths, return owned descriptors, and set close-on-exec. Each
//! failure names its arguments. They are called `sys::NAME`, whichever file they are in; filters
//! of system calls have a module of their own.
#![allow(unsafe_code)]

mod descriptors;
mod files;
mod mount;
mod namespaces;
mod notifications;
mod privileges;
mod process;
pub mod seccomp;
mod signals;

pub use descriptors::*;
pub use files::*;
pub use mount::*;
pub use namespaces::*;
pub use notifications::*;
pub use privileges::*;
pub use process::*;
pub use signals::*;
