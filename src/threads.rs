//! Threads, as many as there may be: at the limit of processes (`RLIMIT_NPROC`, `pids.max`) work goes on with fewer.

use std::io;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

use anyhow::{Error, Result, anyhow};

/// Starts up to `most` threads that all do `body`: fewer at the limit of processes, or none.
pub fn crew<'scope, 'env, F, T>(
    scope: &'scope Scope<'scope, 'env>,
    name: &str,
    most: usize,
    body: F,
) -> Vec<ScopedJoinHandle<'scope, T>>
where
    F: FnOnce() -> T + Send + Copy + 'scope,
    T: Send + 'scope,
{
    (0..most)
        .map_while(|_| {
            Builder::new()
                .name(name.into())
                .spawn_scoped(scope, body)
                .ok()
        })
        .collect()
}

/// Does `body` in up to `most` threads, in this one when there can be no other, and gives what came of each.
pub fn all<T: Send>(
    name: &str,
    most: usize,
    body: impl Fn() -> T + Sync,
) -> Vec<std::thread::Result<T>> {
    std::thread::scope(|scope| {
        let crew = crew(scope, name, most, &body);
        match crew.is_empty() && most > 0 {
            true => vec![Ok(body())],
            false => crew.into_iter().map(ScopedJoinHandle::join).collect(),
        }
    })
}

/// Starts one thread.
///
/// # Errors
/// Naming the limit that is reached.
pub fn start<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let started = Builder::new().name(name.into()).spawn(body);
    started.map_err(|error| refused("cannot start a thread", &error))
}

/// The error of a thread or process that could not be made: with the limit, when that is why.
pub fn refused(what: &str, error: &io::Error) -> Error {
    if error.kind() != io::ErrorKind::WouldBlock {
        return anyhow!("{what}: {error}");
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nproc).current;
    let limit = limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    anyhow!(
        "{what}: the limit of processes and threads is reached (ulimit -u: {limit}; or pids.max of the cgroup): raise it, or \
         end some processes"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_do_it_and_a_panic_is_theirs() {
        let done = AtomicUsize::new(0);
        let results = all("test", 3, || done.fetch_add(1, Ordering::SeqCst));
        assert_eq!(results.len(), 3);
        assert_eq!(done.into_inner(), 3);
        assert!(all("test", 1, || panic!("broken"))[0].is_err());
        assert!(all("test", 0, || ()).is_empty());
    }

    #[test]
    fn limit_is_named() {
        let text = refused("cannot fork", &io::ErrorKind::WouldBlock.into()).to_string();
        assert!(
            text.starts_with("cannot fork: the limit of processes"),
            "{text}"
        );
        let other = refused("cannot fork", &io::ErrorKind::OutOfMemory.into()).to_string();
        assert_eq!(other, "cannot fork: out of memory");
    }
}
