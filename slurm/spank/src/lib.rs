//! A SPANK plugin: `--service IMAGE:NAME` for `sbatch`, `salloc` and `srun`.
//!
//! It only carries the words into the Prolog's environment (`SPANK_CAPSID_SERVICES`), and into the job's own
//! (`CAPSID_JOB_SERVICES`) for jobs without a Prolog; what they mean is the business of the job's supervisor, which reads them
//! as the user. Source: `slurm/spank.h`.
#![allow(non_upper_case_globals)] // the names are Slurm's

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Mutex;

/// Slurm looks for these by name.
#[unsafe(no_mangle)]
pub static plugin_name: [u8; 7] = *b"capsid\0";
/// The kind of plugin.
#[unsafe(no_mangle)]
pub static plugin_type: [u8; 6] = *b"spank\0";
/// The release of Slurm.
#[unsafe(no_mangle)]
pub static plugin_version: u32 = number(env!("SLURM_VERSION"));
/// Our own version.
#[unsafe(no_mangle)]
pub static spank_plugin_version: u32 = 1;

const fn number(text: &str) -> u32 {
    match u32::from_str_radix(text, 10) {
        Ok(number) => number,
        Err(_) => panic!("the build script gives a number"),
    }
}

/// `spank_t`.
type Spank = *mut c_void;

/// `struct spank_option`.
#[repr(C)]
struct SpankOption {
    name: *const c_char,
    arginfo: *const c_char,
    usage: *const c_char,
    has_arg: c_int,
    val: c_int,
    cb: extern "C" fn(c_int, *const c_char, c_int) -> c_int,
}

/// `S_CTX_LOCAL`, `S_CTX_REMOTE`, `S_CTX_ALLOCATOR`.
const LOCAL: c_int = 1;
const REMOTE: c_int = 2;
const ALLOCATOR: c_int = 3;

unsafe extern "C" {
    fn spank_context() -> c_int;
    fn spank_option_register(spank: Spank, option: *const SpankOption) -> c_int;
    fn setenv(name: *const c_char, value: *const c_char, overwrite: c_int) -> c_int;
    fn unsetenv(name: *const c_char) -> c_int;
    fn spank_job_control_setenv(spank: Spank, name: *const c_char, value: *const c_char, overwrite: c_int) -> c_int;
}

/// The variable of the job's environment.
const OWN: &CStr = c"CAPSID_JOB_SERVICES";

/// What was given, joined by commas.
static SERVICES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Slurm gives the option's value.
extern "C" fn service(_: c_int, value: *const c_char, remote: c_int) -> c_int {
    if value.is_null() || remote != 0 {
        return 0;
    }
    // SAFETY: Slurm passes a C string that lives through the call.
    let value = unsafe { CStr::from_ptr(value) }.to_bytes();
    let good = value.split(|b| *b == b',').all(|one| {
        let at = one.iter().rposition(|b| *b == b':');
        at.is_some_and(|at| at > 0 && at + 1 < one.len())
    });
    if !good || value.iter().any(u8::is_ascii_control) {
        eprintln!("capsid: --service {:?}: use IMAGE:NAME", String::from_utf8_lossy(value));
        return -1;
    }
    let Ok(mut all) = SERVICES.lock() else { return -1 };
    if !all.is_empty() {
        all.push(b',');
    }
    all.extend_from_slice(value);
    0
}

/// Registers the option.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init(spank: Spank, _: c_int, _: *const *const c_char) -> c_int {
    // SAFETY: no arguments.
    if ![LOCAL, REMOTE, ALLOCATOR].contains(&unsafe { spank_context() }) {
        return 0;
    }
    let option = SpankOption {
        name: c"service".as_ptr(),
        arginfo: c"IMAGE:NAME".as_ptr(),
        usage: c"start a service from this image on the job's first node; every step finds it as instance://NAME (Capsid)".as_ptr(),
        has_arg: 1,
        val: 0,
        cb: service,
    };
    // SAFETY: Slurm copies the structure; the strings are static.
    unsafe { spank_option_register(spank, &raw const option) }
}

/// Hands the words to the Prolog.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init_post_opt(spank: Spank, _: c_int, _: *const *const c_char) -> c_int {
    // SAFETY: no arguments.
    let context = unsafe { spank_context() };
    if ![LOCAL, ALLOCATOR].contains(&context) {
        return 0;
    }
    let value = SERVICES.lock().map(|v| v.clone()).unwrap_or_default();
    match CString::new(value) {
        // SAFETY: C strings that live through the calls; `sbatch`, `salloc` and `srun` have one thread then.
        Ok(value) if !value.is_empty() => unsafe {
            setenv(OWN.as_ptr(), value.as_ptr(), 1);
            spank_job_control_setenv(spank, c"CAPSID_SERVICES".as_ptr(), value.as_ptr(), 1)
        },
        // A job that another job submits has its own services only. A step's job is the one that it is in.
        // SAFETY: as above.
        _ if context == ALLOCATOR => unsafe {
            unsetenv(OWN.as_ptr());
            0
        },
        _ => 0,
    }
}
