//! Stopping instances, and waiting for them.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use rustix::process::Signal as Raw;

use super::{Instance, Record, Registry};
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
    instance: Instance,
    /// Why it could not even be killed.
    refusal: Option<std::io::Error>,
}

/// Asks an instance to stop.
pub fn begin(instance: Instance, stop: &Stop) -> Ending {
    let mut refusal = None;
    match (&instance.init, &instance.monitor) {
        (Some(init), _) if stop.force => refusal = init.try_signal(Raw::KILL).err(),
        (Some(init), _) => {
            // It may have ended by now: then there is nothing to do.
            let value = init::stop_value(stop.signal);
            refusal = sys::queue_signal(init, sys::STOP_SIGNAL, value).err();
            // Somebody may have stopped it.
            init.signal(Raw::CONT);
        }
        // Process 1 is out of sight, but its monitor tells it.
        (None, Some(monitor)) => refusal = monitor.try_signal(Raw::TERM).err(),
        (None, None) => {}
    }
    if let Some(monitor) = &instance.monitor {
        monitor.signal(Raw::CONT);
    }
    Ending { instance, refusal }
}

/// Waits until an instance has ended, its monitor has tidied up and its name is free; kills what does not end in time.
///
/// # Errors
/// When it does not end even then (a process that hangs in the kernel).
pub fn finish(ending: &Ending, patience: Duration) -> Result<()> {
    let Ending { instance, refusal } = ending;
    let name = &instance.name;
    if let Some(init) = &instance.init
        && !init.wait(if refusal.is_none() {
            patience
        } else {
            Duration::ZERO
        })
    {
        let pid = instance.record.init.map_or(0, |id| id.pid);
        let told = match refusal {
            None => {
                say::info(format_args!("Killing instance {name} (Timeout)"));
                init.try_signal(Raw::KILL)
            }
            Some(_) => init.try_signal(Raw::KILL),
        };
        if let Err(error) = told
            && init.is_alive()
        {
            bail!(
                "instance {name} does not end: process {pid} cannot be sent a signal: {} (kill -9 {pid} may do)",
                say::word(&error)
            );
        }
        if !init.wait(Duration::from_secs(4)) {
            bail!(
                "instance {name} does not end: process {pid} hangs in the kernel (a file system that does not answer?)"
            );
        }
    }
    if let Some(monitor) = &instance.monitor
        && !monitor.wait(match instance.init {
            Some(_) => Duration::from_secs(3),
            None => patience + Duration::from_secs(3),
        })
    {
        // Its container ends with it.
        monitor.signal(Raw::KILL);
        monitor.wait(Duration::from_secs(1));
    }
    Ok(())
}

/// Ends an instance whose monitor does not answer: what it waits for may never come.
///
/// # Errors
/// When it does not end even when it is killed.
pub fn end_silent(name: &str, monitor: &Held, stop: &Stop) -> Result<u8> {
    say::info(format_args!(
        "Stopping instance {name}, whose monitor does not answer"
    ));
    if !stop.force && monitor.signal(Raw::TERM) && monitor.wait(stop.patience) {
        return Ok(crate::exit::OK);
    }
    // Its container ends with it.
    if let Err(error) = monitor.try_signal(Raw::KILL)
        && monitor.is_alive()
    {
        bail!(
            "instance {name} does not end: its monitor cannot be killed: {}",
            say::word(&error)
        );
    }
    if !monitor.wait(Duration::from_secs(4)) {
        bail!(
            "instance {name} does not end: its monitor hangs in the kernel (a file system that does not answer?)"
        );
    }
    Ok(crate::exit::OK)
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
    let Some(mut instance) = registry.find_any(name) else {
        bail!("no instance found with name {name}");
    };
    let mut last: Record;
    loop {
        last = instance.record.clone();
        match registry
            .find_any(name)
            .filter(|i| i.record.monitor == last.monitor)
        {
            Some(now) => {
                last = now.record.clone();
                instance = now;
            }
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
        match &instance.monitor {
            Some(monitor) => drop(monitor.wait(step)),
            None => std::thread::sleep(step),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
