//! The `capsid` program: parse, run, print the error chain, end with the right status.
//!
//! `main` is C's, not Rust's: Rust's own would set `SIGPIPE` to ignored before we can see what the caller wanted, and
//! the payload would inherit that.
#![no_main]
#![allow(unsafe_code)] // for `no_mangle`: the name `main` is what the C library calls

use std::panic::{AssertUnwindSafe, catch_unwind};

use capsid::engine::sys;
use capsid::{cmd, exit, say};

/// Called by the C library.
#[unsafe(no_mangle)]
pub extern "C" fn main(argc: i32, argv: *const *const libc::c_char) -> i32 {
    sys::open_standard_descriptors();
    if let Some(kib) = small_stack() {
        return too_small(kib);
    }
    begin(argc, argv)
}

/// Least stack that every command fits into, bytes.
const STACK_BYTES: u64 = 128 << 10;

/// The limit of the stack, KiB, where it is too small to begin.
fn small_stack() -> Option<u64> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Stack).current;
    limit
        .filter(|bytes| *bytes < STACK_BYTES)
        .map(|bytes| bytes >> 10)
}

#[inline(never)] // as `begin`: the frame of `main` stays small
fn too_small(kib: u64) -> i32 {
    say::fatal(format_args!(
        "the limit of the stack is {kib} KiB, and capsid needs {} KiB: raise it with ulimit -s 8192",
        STACK_BYTES >> 10
    ));
    exit::FATAL.into()
}

#[inline(never)]
fn begin(argc: i32, argv: *const *const libc::c_char) -> i32 {
    sys::watch_children();
    sys::outlive_file_limit();
    let args = sys::arguments(argc, argv);
    // A bug of ours is one line too, like every other failure.
    std::panic::set_hook(Box::new(|info| {
        say::fatal(format_args!(
            "this is a bug in capsid: {}",
            info.to_string().replace('\n', " ")
        ))
    }));
    let status = catch_unwind(AssertUnwindSafe(|| {
        match sys::guard_directories().and_then(|()| cmd::main(&args)) {
            Ok(status) => status,
            Err(error) => report(&error),
        }
    }));
    status.unwrap_or(exit::FATAL).into()
}

fn report(error: &anyhow::Error) -> u8 {
    if let Some(usage) = error.downcast_ref::<cmd::Usage>() {
        let whose = if usage.command.is_empty() {
            "Error:".to_owned()
        } else {
            format!("Error for command {:?}:", usage.command)
        };
        eprintln!("{whose} {}", say::printable(&usage.text));
        return exit::USAGE;
    }
    if let Some(cmd::Told(status)) = error.downcast_ref() {
        return *status;
    }
    // The end that SIGPIPE brings where it is not ignored.
    if error.is::<say::Closed>() {
        return exit::signalled(libc::SIGPIPE);
    }
    // One line, whatever the cause holds.
    let text = format!("{error:#}").replace('\n', " ");
    let hint = if text.contains("File too large") {
        ": the limit of the size of files is reached (ulimit -f)"
    } else {
        ""
    };
    say::fatal(format_args!("{text}{hint}"));
    exit::FATAL
}
