//! Questions that are answered in a process of their own.
//!
//! Namespaces are made and joined by a process of one thread, and a thread that has ended is still counted for a while. So
//! what may start threads before that is asked here.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, bail};

use super::sys::{self, Fork};

/// Answers a question in a child of this process, which has one thread before and after.
///
/// # Errors
/// As the question, and when there is no process for it.
pub fn aside(question: impl FnOnce() -> Result<bool>) -> Result<bool> {
    let (mut answer, mut reply) = std::io::pipe().context("cannot create a pipe")?;
    let child = match sys::fork()? {
        Fork::Parent(child) => child,
        Fork::Child => {
            drop(answer);
            let said = match question() {
                Ok(said) => vec![u8::from(said)],
                Err(error) => format!("E{error:#}").into_bytes(),
            };
            let _ = reply.write_all(&said);
            sys::exit_now(0)
        }
    };
    drop(reply);
    let mut said = Vec::new();
    let heard = answer.read_to_end(&mut said);
    let _ = nix::sys::wait::waitpid(child, None);
    heard.context("cannot hear from a process of ours")?;
    match said.split_first() {
        Some((0, _)) => Ok(false),
        Some((1, _)) => Ok(true),
        Some((_, text)) => bail!("{}", String::from_utf8_lossy(text)),
        None => bail!("a process of ours ended before it could answer"),
    }
}
