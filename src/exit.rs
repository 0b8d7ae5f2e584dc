//! Every exit status that the program can end with.
//!
//! A payload's own status passes through unchanged; a signal N that ended it behind a pid namespace
//! becomes 128 + N, as shells write it.

/// All went well.
pub const OK: u8 = 0;
/// The command line was wrong; what cobra programs (Apptainer) use too.
pub const USAGE: u8 = 1;
/// We could not do what was asked. Apptainer's `FATAL` status, which clients test for.
pub const FATAL: u8 = 255;

/// The status of a process that signal `number` ended, as a shell reports it.
pub fn signalled(number: i32) -> u8 {
    u8::try_from(128 + number).unwrap_or(FATAL)
}
