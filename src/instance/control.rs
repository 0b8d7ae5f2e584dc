//! Stopping instances, and waiting for them.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use rustix::process::Signal as Raw;

use super::{Record, Registry};
use crate::engine::{init, sys};
use crate::proc::Held;
use crate::say;

/// How an instance is stopped.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    /// The signal for its service; `SIGINT`, or `SIGTERM` for processes that ignore that, when `None`.
    pub signal: Option<Signal>,
    /// How long the service may take before it is killed.
    pub patience: Duration,
    /// Kill it at once.
    pub force: bool,
}

/// What is needed to see an instance end.
pub struct Ending {
    name: String,
    record: Record,
    init: Option<Held>,
    monitor: Option<Held>,
}

/// Asks an instance to stop.
pub fn begin(record: Record, stop: &Stop) -> Ending {
    let (monitor, init) = (record.hold_monitor(), record.hold());
    if let Some(init) = &init {
        if stop.force {
            init.signal(Raw::KILL);
        } else {
            // It may have ended by now: then there is nothing to do.
            let _ = sys::queue_signal(init, sys::STOP_SIGNAL, init::stop_value(stop.signal));
            // Somebody may have stopped it.
            init.signal(Raw::CONT);
        }
    }
    if let Some(monitor) = &monitor {
        monitor.signal(Raw::CONT);
    }
    Ending {
        name: record.name.clone(),
        record,
        init,
        monitor,
    }
}

/// Waits until an instance has ended, its monitor has tidied up and its name is free; kills what does not end in time.
///
/// # Errors
/// When it does not end even then (a process that hangs in the kernel).
pub fn finish(registry: &Registry, ending: Ending, patience: Duration) -> Result<()> {
    if let Some(init) = &ending.init
        && !init.wait(patience)
    {
        say::info(format_args!("Killing instance {} (Timeout)", ending.name));
        init.signal(Raw::KILL);
        if !init.wait(Duration::from_secs(4)) {
            bail!(
                "instance {} does not end: process {} hangs in the kernel (a file system that does not answer?)",
                ending.name,
                ending.record.init.map_or(0, |id| id.pid)
            );
        }
    }
    if let Some(monitor) = &ending.monitor
        && !monitor.wait(Duration::from_secs(3))
    {
        monitor.signal(Raw::KILL);
        monitor.wait(Duration::from_secs(1));
    }
    registry.remove(&ending.record);
    Ok(())
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The service is ready.
    Ready,
    /// Its script has ended, and will not be started again.
    Exit,
    /// The instance has ended.
    Stop,
}

/// Waits. Gives the record as it is then; `None` at the deadline.
///
/// # Errors
/// When what is waited for can never be.
pub fn wait(
    registry: &Registry,
    name: &str,
    until: Until,
    deadline: Option<Instant>,
) -> Result<Option<Record>> {
    let mut pause = Duration::from_millis(2);
    let Some(mut last) = registry.find_any(name) else {
        bail!("no instance found with name {name}");
    };
    loop {
        match registry
            .find_any(name)
            .filter(|r| r.monitor == last.monitor)
        {
            Some(record) => last = record,
            None => {
                // The monitor has written down how it ended, unless it was killed.
                let directory = last.log_err.parent().unwrap_or(std::path::Path::new("/"));
                let end = super::logs::last_end(directory, name);
                last = end.filter(|r| r.monitor == last.monitor).unwrap_or(last);
                if until == Until::Ready && !last.script.ready {
                    bail!("instance {name} ended before it was ready: see its logs");
                }
                return Ok(Some(last));
            }
        }
        let over = matches!(last.script.state, super::State::Exited | super::State::None);
        let failed = over && last.exit_status() != 0;
        match until {
            Until::Ready if last.script.ready => return Ok(Some(last)),
            Until::Ready if failed => bail!(
                "the script of instance {name} ended with status {} before the service was ready: see its logs",
                last.exit_status()
            ),
            Until::Exit if over => return Ok(Some(last)),
            _ => {}
        }
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(None);
        }
        // The record is looked at in growing steps; the end itself is noticed when it happens.
        let step = left.map_or(pause, |left| left.min(pause));
        match last.hold_monitor() {
            Some(monitor) => drop(monitor.wait(step)),
            None => std::thread::sleep(step),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
