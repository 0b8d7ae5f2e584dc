//! What commands ask the supervisor for, and the processes that it starts for them.
//!
//! A process that starts an instance becomes `capsid instance start`: the supervisor looks into no image.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::SigSet;
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::Pid;

use super::{Child, MAX_PEERS, Peer, Purpose, Supervisor, stop_all};
use crate::engine::sys::{self, Fork};
use crate::engine::wire;
use crate::job::message::{self, Answer, Caller, Request, What};
use crate::proc::Held;
use crate::{exit, say};

impl Supervisor<'_> {
    pub(super) fn accept(&mut self, listener: &OwnedFd) {
        while let Ok(fd) = accept4(
            listener.as_raw_fd(),
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        ) {
            let socket = sys::own(fd);
            if wire::is_own_peer(&socket) && self.peers.len() < MAX_PEERS {
                self.peers.insert(
                    self.next_peer,
                    Peer {
                        socket,
                        waiting: None,
                    },
                );
                self.next_peer += 1;
            }
        }
    }

    pub(super) fn hear(&mut self, id: u64) {
        let Some(peer) = self.peers.get(&id) else {
            return;
        };
        let heard = wire::receive(peer.socket.as_fd());
        match heard {
            Ok((bytes, fds)) if !bytes.is_empty() => match serde_json::from_slice::<Request>(&bytes) {
                Ok(request) if request.version == message::VERSION => {
                    // Who wants the list waits until it is read.
                    if request.what == What::List && self.list.pending {
                        if let Some(peer) = self.peers.get_mut(&id) {
                            peer.waiting = Some((request.what, fds));
                        }
                    } else {
                        self.serve_request(id, request.what, fds);
                    }
                }
                _ => self.answer(
                    id,
                    &Answer::Failed(format!(
                        "the supervisor of job {} is of another version of capsid: use the one that the administrator installed",
                        self.job
                    )),
                ),
            },
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
            _ => {
                self.peers.remove(&id);
                // Nobody waits for it any more.
                for child in self.children.iter().filter(|c| matches!(c.purpose, Purpose::Answer(of) if of == id)) {
                    let _ = nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGTERM);
                }
            }
        }
    }

    pub(super) fn answer(&mut self, id: u64, answer: &Answer) {
        if let Some(peer) = self.peers.remove(&id) {
            let text = serde_json::to_vec(answer).unwrap_or_default();
            let _ = wire::send(peer.socket.as_fd(), &text, &[]);
        }
    }

    pub(super) fn serve_request(&mut self, id: u64, what: What, fds: Vec<OwnedFd>) {
        let done = match what {
            What::List => {
                self.answer(id, &Answer::List(Box::new(self.list.clone())));
                Ok(())
            }
            What::Start(caller) => self.start(id, &caller, fds),
            What::Services(caller) => self.read_for(id, caller, fds),
            What::Stop(ms) => self.stop(id, Duration::from_millis(ms)),
        };
        if let Err(error) = done {
            self.answer(id, &Answer::Failed(format!("{error:#}")));
        }
    }

    pub(super) fn start(&mut self, id: u64, caller: &Caller, fds: Vec<OwnedFd>) -> Result<()> {
        let [words, cwd, out, err] = <[OwnedFd; 4]>::try_from(fds)
            .ok()
            .context("descriptors are missing")?;
        let (words, env) = message::unpack(words)?;
        let pid = self.spawn(
            &words,
            &env,
            caller,
            &|| Ok(nix::unistd::fchdir(&cwd)?),
            out,
            err,
        )?;
        self.children.push(Child {
            pid,
            purpose: Purpose::Answer(id),
        });
        Ok(())
    }

    pub(super) fn stop(&mut self, id: u64, patience: Duration) -> Result<()> {
        match sys::fork()? {
            Fork::Parent(pid) => self.children.push(Child {
                pid,
                purpose: Purpose::Answer(id),
            }),
            Fork::Child => {
                stop_all(self.registry, patience);
                sys::exit_now(0)
            }
        }
        Ok(())
    }

    /// A process that becomes `capsid instance WORDS…`, and whose instance ends with us.
    pub(super) fn spawn(
        &self,
        words: &[OsString],
        env: &[(OsString, OsString)],
        caller: &Caller,
        enter: &dyn Fn() -> Result<()>,
        out: OwnedFd,
        err: OwnedFd,
    ) -> Result<Pid> {
        let own = Held::child(rustix::process::getpid().as_raw_nonzero().get());
        match sys::fork()? {
            Fork::Parent(pid) => Ok(pid),
            Fork::Child => {
                sys::die_with(own.as_ref());
                // What is said here is for the one who asked.
                let _ = rustix::stdio::dup2_stderr(&err);
                say::set_level(caller.level);
                if !caller.places.is_empty() && caller.places != message::places() {
                    say::warn(format_args!(
                        "this step sees other files than the supervisor of job {} (a container, or a /tmp of its own): the instance \
                         sees those of the supervisor",
                        self.job
                    ));
                }
                let begin = || -> Result<std::convert::Infallible> {
                    enter().context("cannot enter the working directory")?;
                    caller.assume();
                    sys::inherit(&self.life.0)?;
                    SigSet::empty()
                        .thread_set_mask()
                        .context("cannot unblock signals")?;
                    let error = Command::new("/proc/self/exe")
                        .arg0("capsid")
                        .args([
                            "job",
                            "spawn",
                            &self.life.0.as_raw_fd().to_string(),
                            &caller.level.to_string(),
                        ])
                        .args(words)
                        .env_clear()
                        .envs(env.iter().map(|(k, v)| (k, v)))
                        .stdin(Stdio::null())
                        .stdout(out)
                        .stderr(err)
                        .exec();
                    Err(error).context("cannot execute ourselves")
                };
                let Err(error) = begin();
                say::fatal(format_args!("{error:#}"));
                sys::exit_now(exit::FATAL)
            }
        }
    }
}
