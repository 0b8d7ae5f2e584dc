//! What a process gives up: capabilities, being traced, system calls.

use anyhow::{Context as _, Result, bail};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, configure_capability_in_ambient_set,
    set_capabilities,
};

use super::seccomp;
use crate::plan::Capabilities;

/// Drops the whole capability bounding set (`capabilities(7)`): nothing executed later gains any.
pub fn drop_bounding_set() {
    for capability in 0..64 {
        // SAFETY: prctl with integers only. Beyond the last known capability it fails with EINVAL.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// Gives up every capability but these (`capabilities(7)`). `ambient`: they are handed on to programs; root's are anyway.
///
/// # Errors
/// When the kernel refuses or does not know one of those that are to be handed on.
pub fn limit_capabilities(left: Capabilities, ambient: bool) -> Result<()> {
    for capability in (0..64).filter(|n| left.0 & (1 << n) == 0) {
        // SAFETY: prctl with integers only. Beyond the last known capability it fails with EINVAL.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
    let had = capabilities(None).context("cannot read the capabilities")?;
    let known = CapabilitySet::from_bits_retain(left.0);
    let sets = CapabilitySets {
        effective: had.effective & known,
        permitted: had.permitted & known,
        inheritable: if ambient {
            had.permitted & known
        } else {
            CapabilitySet::empty()
        },
    };
    set_capabilities(None, sets).context("cannot give up capabilities")?;
    if !ambient {
        return Ok(());
    }
    let given = sets.inheritable.bits();
    for number in (0..64).filter(|n| given & (1 << n) != 0) {
        let one = CapabilitySet::from_bits_retain(1 << number);
        configure_capability_in_ambient_set(one, true).context("cannot hand on a capability")?;
    }
    let refused = Capabilities(left.0 & !sets.permitted.bits());
    if refused.0 != 0 && left != Capabilities::ALL {
        bail!("this kernel does not give {}", refused.names());
    }
    Ok(())
}

/// Gives up every capability (`capabilities(7)`).
pub fn drop_capabilities() {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    let _ = set_capabilities(None, sets);
}

/// Gives up every capability but the one that copying and detaching mounts takes (`capabilities(7)`), and that one has no
/// effect outside of [`mounting`]. Best effort: what it guards against is a bug.
pub fn keep_only_mounting() {
    drop_bounding_set();
    keep_mounting(CapabilitySet::empty());
}

/// Does what takes the right to mount, in a thread that has kept it.
pub fn mounting<T>(work: impl FnOnce() -> T) -> T {
    keep_mounting(CapabilitySet::SYS_ADMIN);
    let done = work();
    keep_mounting(CapabilitySet::empty());
    done
}

fn keep_mounting(effective: CapabilitySet) {
    let sets = CapabilitySets {
        effective,
        permitted: CapabilitySet::SYS_ADMIN,
        inheritable: CapabilitySet::empty(),
    };
    let _ = set_capabilities(None, sets);
}

/// Until the next `execve(2)` no other process of the user may trace this one or open its descriptors
/// (`PR_SET_DUMPABLE`): it holds capabilities in its user namespace, and files of the host.
pub fn forbid_tracing() {
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Other processes of the user may look at this one again: `setns(2)` into its namespaces asks for that.
pub fn allow_tracing() {
    let _ = set_dumpable_behavior(DumpableBehavior::Dumpable);
}

/// Marks the numbers of x32, the third table of calls of x86 (`__X32_SYSCALL_BIT`).
const X32: u32 = 0x4000_0000;

/// Forbids the two ioctls that type into the caller's terminal, `TIOCSTI` and `TIOCLINUX`: a program in a
/// container shares the terminal with the shell outside. The number is compared in 32 bits, as the kernel
/// takes it.
///
/// # Errors
/// When the kernel has seccomp and refuses the filter.
pub fn forbid_terminal_injection() -> Result<()> {
    const TIOCLINUX: u32 = 0x541C;
    // By every number that leads to it: that of the 32-bit table of x86 too, and those of x32 with and without the bit that
    // marks them (before Linux 5.4 both work, and those of 64 bits with it).
    let ioctl = libc::SYS_ioctl as u32;
    let numbers: &[u32] = match cfg!(target_arch = "x86_64") {
        true => &[ioctl, 54, X32 | 514, X32 | ioctl, 514],
        false => &[ioctl],
    };
    let mut filter = vec![seccomp::load_number()];
    for left in (1..=numbers.len()).rev() {
        let number = numbers[numbers.len() - left];
        filter.push(seccomp::if_equal(number, left as u8, 0));
    }
    filter.extend([
        seccomp::end(libc::SECCOMP_RET_ALLOW),
        seccomp::load_argument(1),
        seccomp::if_equal(libc::TIOCSTI as u32, 1, 0),
        seccomp::if_equal(TIOCLINUX, 0, 1),
        seccomp::refuse(libc::EPERM),
        seccomp::end(libc::SECCOMP_RET_ALLOW),
    ]);
    match seccomp::install(&filter, 0) {
        Ok(_) => Ok(()),
        // A kernel without seccomp offers nobody this protection.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) => Ok(()),
        Err(error) => {
            Err(error).context("cannot install the filter against terminal injection (seccomp)")
        }
    }
}

/// Takes from a process that parses strangers' bytes what it never needs: starting programs, opening connections,
/// touching other processes. Its file tree is empty already. Machines whose numbers are not known here go without.
pub fn confine_server() {
    const DENIED: [libc::c_long; 9] = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_bpf,
        libc::SYS_keyctl,
    ];
    let Some(architecture) = seccomp::ARCHITECTURE else {
        return;
    };
    let mut filter = vec![
        seccomp::load_architecture(),
        seccomp::if_equal(architecture, 1, 0),
        seccomp::end(libc::SECCOMP_RET_KILL_PROCESS),
        seccomp::load_number(),
    ];
    if cfg!(target_arch = "x86_64") {
        // The same calls have other numbers there.
        filter.extend([seccomp::if_set(X32), seccomp::refuse(libc::EPERM)]);
    }
    for call in DENIED {
        filter.push(seccomp::if_equal(call as u32, 0, 1));
        filter.push(seccomp::refuse(libc::EPERM));
    }
    filter.push(seccomp::end(libc::SECCOMP_RET_ALLOW));
    let _ = rustix::thread::set_no_new_privs(true);
    // Best effort, as above: what it guards against is a bug.
    let _ = seccomp::install(&filter, 0);
}
