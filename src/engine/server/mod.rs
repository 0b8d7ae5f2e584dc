//! The image server: a detached process that owns a user namespace in which an image is mounted through FUSE.
//!
//! One server per image (device, inode, size, time, offset), id map, user and cgroup scope. Every container of that
//! scope joins its user namespace, brings its own mounts, and gets from it a detached copy of the image's mount. So all
//! ranks of a job share one page cache, and may use cross-memory attach between each other.
//!
//! Two processes: a *keeper* makes the namespaces, which takes a process of one thread, holds `/dev/fuse` and waits; a
//! *worker* serves. The first one mounts the image, while its threads decompress the program already. A worker that is
//! killed is replaced, and asks the kernel to send pending requests again (node ids carry no state): containers notice
//! nothing.
//!
//! Life: users are counted by pidfd. A few seconds after the last one the worker stops listening and detaches its own
//! mount; the kernel ends the FUSE connection when the last mount of it is gone, wherever it is, and only then the
//! server ends. It never unmounts under a live process, whatever that process is a child of. Nothing of it stays: the
//! socket is removed, its directory is in memory, its mounts are in a namespace of its own, which holds none of the
//! host's.

mod budget;
mod desk;
mod empty;
mod keeper;
mod mount;
mod place;
mod worker;

use std::ffi::OsString;
use std::fmt::Display;
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitStatus, waitpid};
use rustix::fs::{Mode, OFlags};

use super::runtime;
use super::sys::{self, Fork};
use super::wire::{self, Point};
use crate::image::{Root, Top};
use crate::plan::IdMap;
use crate::proc::Held;
use crate::say;
use keeper::keep;
use place::{Place, claim, connect_to, leave};

/// How long a client waits for an answer before it does without the shared server.
const ANSWER_S: i64 = 10;

/// Whose user namespace a server lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// One of its own, which its containers join.
    New,
    /// The caller's: for the layers over a root, whose namespace the caller has joined already.
    Current,
}

/// What a container gets of a server.
pub struct Stage {
    /// The user namespace to join.
    pub userns: OwnedFd,
    /// The image with all mount points.
    pub view: View,
    /// For each mount point asked for: it was not in the image.
    pub made: Vec<bool>,
    /// Hangs up when no process of the server is left.
    pub life: OwnedFd,
    /// The server, which waits: nobody has looked into this view yet.
    first: Option<OwnedFd>,
}

impl Stage {
    /// Looks up what will be mounted on, and more that all containers of the view look up, if this is the first one; the
    /// server keeps the others waiting until then. Call it as soon as the namespace is joined.
    ///
    /// From Linux 6.16 on FUSE throws names out again when several processes wait for the first lookup of one: they wake
    /// before the entry bears the connection's epoch, take it for an old one (`fuse_dentry_revalidate`) and invalidate it.
    /// That takes away what is mounted on it or below it, in all containers, and who has it open can mount nothing there.
    /// Of 32 ranks that started together 1 in 40 lacked a mount.
    pub fn look<'p>(&mut self, paths: impl IntoIterator<Item = &'p Path>) {
        let Some(server) = self.first.take() else {
            return;
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if let Ok(root) =
            rustix::fs::openat(&self.view.stage, &self.view.name, flags, Mode::empty())
        {
            for path in paths {
                // What is wrong with it is told by who needs it.
                let _ = sys::open_in_root(root.as_fd(), path, OFlags::PATH);
            }
        }
        let _ = wire::send(server.as_fd(), &[0], &[]);
    }
}

/// An image with mount points, in a detached mount of all that its server shows. The server itself does not take the one
/// from the other: it would wait for its own answer, and if it was killed then, could not end.
pub struct View {
    /// The mount, a directory of views.
    pub stage: OwnedFd,
    /// The name in it.
    pub name: String,
}

/// Directories of the caller, as its environment names them.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// `$XDG_RUNTIME_DIR`, or what a job has instead: for the sockets of servers.
    pub runtime: Option<OsString>,
    /// Where access profiles of images are kept.
    pub profiles: Option<PathBuf>,
    /// A directory that is needed until the image is mounted, and removed then.
    pub unneeded: Option<PathBuf>,
}

/// Who asks for a root.
pub struct Client<'a> {
    /// Where servers are found.
    pub places: &'a Places,
    /// The process that uses the image: the server stays as long as it lives.
    pub user: Option<Held>,
    /// What it will start there, by path or name, if that is known: a server that begins makes it ready meanwhile.
    pub program: Option<&'a Path>,
}

impl<'a> Client<'a> {
    /// This process, which becomes the program.
    pub fn own(places: &'a Places, program: Option<&'a Path>) -> Client<'a> {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        Client {
            places,
            // Before Linux 5.3 there are no pidfds: the server then does not count us, and still never unmounts
            // under us.
            user: Held::child(own),
            program,
        }
    }
}

/// Finds the server of an image, or starts it, and gets a root with these mount points.
///
/// # Errors
/// When the image cannot be mounted: no user namespaces, no /dev/fuse, a damaged image.
pub fn enter(
    root: &Root,
    ids: IdMap,
    namespace: Namespace,
    points: &[Point],
    client: &Client,
) -> Result<Stage> {
    let image = Image::open(root, ids, namespace, client)?;
    find_or_start(&image, points, client)
}

/// The user namespace that containers of a directory share: that of a server which shows nothing.
///
/// # Errors
/// As [`enter`].
pub fn shared_users(directory: &Path, ids: IdMap, client: &Client) -> Result<OwnedFd> {
    let root = Root::Directory(directory.to_owned());
    let image = Image {
        file: empty::image()?,
        path: directory,
        root: &root,
        offset: 0,
        len: empty::LEN as u64,
        ids,
        namespace: Namespace::New,
        profiles: None,
        program: None,
    };
    let mut stage = find_or_start(&image, &[], client)?;
    // Nobody looks into it; the next client need not wait.
    stage.look([]);
    Ok(stage.userns)
}

fn find_or_start(image: &Image, points: &[Point], client: &Client) -> Result<Stage> {
    let request = wire::encode_points(points)?;
    let uid = rustix::process::getuid().as_raw();
    let directory = runtime::open(uid, client.places.runtime.as_deref());
    let alone = |why: &dyn Display| {
        say::verbose(format_args!(
            "{why}: this container gets an image server of its own"
        ));
    };
    if directory.is_none() {
        alone(&"no runtime directory");
    }
    let mut shared = directory.as_ref();
    let name = image.socket_name()?;
    let mut crowd = wire::Crowd::default();
    let mut rounds = 0;
    // A server may end before it answers, or be killed; then the next round starts one.
    while rounds < 10 {
        rounds += 1;
        let answer = match shared {
            None => start(image, None, &request, client)?,
            Some(directory) => match connect_to(directory, &name) {
                Some(server) => ask(&server, &request, client).and_then(|()| hear(&server)),
                None => match claim(directory, &name) {
                    Ok(None) => continue,
                    Ok(place) => start(image, place, &request, client)?,
                    Err(error) => {
                        alone(&format_args!("{error:#}"));
                        shared = None;
                        continue;
                    }
                },
            },
        };
        match answer {
            Ok(answer) => return answer,
            Err(Silence::Gone) => {}
            // Those who start at the same time wait for each other, and none at the server's desk.
            Err(Silence::Crowded) if crowd.pause() => rounds = 0,
            Err(Silence::Crowded) => bail!(
                "too many open files are on their way between processes of this user: raise the limit (ulimit -n)"
            ),
            Err(Silence::Stuck) if shared.is_some() => {
                say::warn(format_args!(
                    "the image server of {} does not answer: using another one",
                    image.path.display()
                ));
                shared = None;
            }
            Err(Silence::Stuck) => bail!(
                "the image server of {} does not answer",
                image.path.display()
            ),
        }
    }
    bail!(
        "image servers of {} keep ending: see whether something kills them",
        image.path.display()
    )
}

/// An open image file and what identifies it.
struct Image<'a> {
    file: File,
    path: &'a Path,
    root: &'a Root,
    offset: u64,
    len: u64,
    ids: IdMap,
    namespace: Namespace,
    profiles: Option<&'a Path>,
    program: Option<&'a Path>,
}

impl<'a> Image<'a> {
    fn open(
        root: &'a Root,
        ids: IdMap,
        namespace: Namespace,
        client: &Client<'a>,
    ) -> Result<Image<'a>> {
        let (path, offset, len) = match root {
            Root::Squashfs {
                file,
                offset_bytes,
                len_bytes,
            }
            | Root::Ext {
                file,
                offset_bytes,
                len_bytes,
                ..
            } => (file, *offset_bytes, *len_bytes),
            Root::Directory(path) => bail!(
                "{} is a directory and needs no image server",
                path.display()
            ),
        };
        let file =
            File::open(path).with_context(|| format!("cannot open image {}", path.display()))?;
        Ok(Image {
            file,
            path,
            root,
            offset,
            len,
            ids,
            namespace,
            profiles: client.places.profiles.as_deref(),
            program: client.program,
        })
    }

    /// Equal for the callers that share a server, and different for all others.
    fn socket_name(&self) -> Result<String> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut stat = match self.root {
            Root::Directory(path) => rustix::fs::stat(path),
            _ => rustix::fs::fstat(&self.file),
        }
        .context("cannot read the image's attributes")?;
        if matches!(self.root, Root::Directory(_)) {
            // What changes with what it holds.
            (stat.st_size, stat.st_mtime, stat.st_mtime_nsec) = (0, 0, 0);
        }
        let userns = rustix::fs::stat("/proc/self/ns/user")
            .map(|s| s.st_ino)
            .unwrap_or_default();
        let gid = rustix::process::getgid().as_raw();
        let mut hash = DefaultHasher::new();
        (
            wire::VERSION,
            stat.st_dev,
            stat.st_ino,
            stat.st_size,
            stat.st_mtime,
            stat.st_mtime_nsec,
        )
            .hash(&mut hash);
        (
            self.offset,
            self.len,
            gid,
            userns,
            format!("{:?}", self.ids),
            cgroup_scope(),
            matches!(
                self.root,
                Root::Ext {
                    top: Top::Upper,
                    ..
                }
            ),
        )
            .hash(&mut hash);
        Ok(format!("image-{:016x}", hash.finish()))
    }
}

/// The cgroups that this process is in, cut at a Slurm step: a batch system kills by cgroup, and a server must not be
/// killed under a container that lives elsewhere; but the tasks of one step share a server.
fn cgroup_scope() -> String {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    text.lines()
        .map(|line| step_scope(line.splitn(3, ':').nth(2).unwrap_or_default()))
        .collect::<Vec<_>>()
        .join("\n")
}

fn step_scope(path: &str) -> &str {
    let Some(step) = path.find("/step_") else {
        return path;
    };
    path[step + 1..]
        .find('/')
        .map_or(path, |end| &path[..step + 1 + end])
}

enum Silence {
    /// The server ended.
    Gone,
    /// It is there, and says nothing.
    Stuck,
    /// It could not be asked: too many descriptors of this user are on their way between processes (`ETOOMANYREFS`,
    /// unix(7)).
    Crowded,
}

/// What a server answers: the inner error is its own, for the person.
type Answer = Result<Result<Stage>, Silence>;

/// Asks for a root.
fn ask(server: &OwnedFd, request: &[u8], client: &Client) -> Result<(), Silence> {
    let own: Vec<RawFd> = client
        .user
        .iter()
        .map(|user| user.as_fd().as_raw_fd())
        .collect();
    match wire::send_now(server.as_fd(), &with_header(request), &own) {
        Ok(()) => Ok(()),
        Err(nix::Error::ETOOMANYREFS) => Err(Silence::Crowded),
        Err(_) => Err(Silence::Gone),
    }
}

/// Waits for the answer.
fn hear(server: &OwnedFd) -> Answer {
    let timeout = nix::sys::time::TimeVal::new(ANSWER_S, 0);
    let _ =
        nix::sys::socket::setsockopt(server, nix::sys::socket::sockopt::ReceiveTimeout, &timeout);
    match wire::receive(server.as_fd()) {
        Ok((bytes, fds)) => match (bytes.split_first(), <[OwnedFd; 3]>::try_from(fds)) {
            (Some((0, body)), Ok([userns, stage, life])) => {
                let Some((&[first, ref number @ ..], made)) = body.split_first_chunk::<5>() else {
                    return Err(Silence::Gone);
                };
                let name = u32::from_le_bytes(*number).to_string();
                Ok(Ok(Stage {
                    userns,
                    view: View { stage, name },
                    life,
                    made: made.iter().map(|b| *b != 0).collect(),
                    first: (first != 0).then(|| server.try_clone().ok()).flatten(),
                }))
            }
            (Some((1, text)), _) => Ok(Err(anyhow!("{}", String::from_utf8_lossy(text)))),
            _ => Err(Silence::Gone),
        },
        Err(nix::Error::EMFILE) => Ok(Err(anyhow!(
            "too many open files: raise the limit (ulimit -n)"
        ))),
        Err(nix::Error::EAGAIN) => Err(Silence::Stuck),
        Err(_) => Err(Silence::Gone),
    }
}

/// A packet is never empty: no bytes mean the end of the conversation.
fn with_header(request: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(request.len() + 1);
    packet.push(0);
    packet.extend(request);
    packet
}

/// Starts a server and is its first client.
fn start(image: &Image, place: Option<Place>, request: &[u8], client: &Client) -> Result<Answer> {
    const WHAT: &str = "cannot start an image server";
    let pair = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    );
    let (ours, first) = pair
        .inspect_err(|_| leave(place.as_ref()))
        .context("cannot create a socket")
        .context(WHAT)?;
    // Before there is a server that would wait for it.
    if let Err(silence) = ask(&ours, request, client) {
        leave(place.as_ref());
        return Ok(Err(silence));
    }
    let ours = launch(image, place.as_ref(), ours, first)
        .inspect_err(|_| leave(place.as_ref()))
        .context(WHAT)?;
    drop(place);
    Ok(hear(&ours))
}

/// Starts a server for its first client, whose end is given back.
fn launch(image: &Image, place: Option<&Place>, ours: OwnedFd, first: OwnedFd) -> Result<OwnedFd> {
    match sys::fork()? {
        Fork::Parent(child) => {
            // The child only forks again, so that the server is nobody's child.
            let status = loop {
                match waitpid(child, None) {
                    Err(nix::Error::EINTR) => {}
                    other => break other,
                }
            };
            match status {
                Ok(WaitStatus::Exited(_, 0)) => Ok(ours),
                _ => bail!("cannot create a process (fork): is a limit (ulimit -u) reached?"),
            }
        }
        Fork::Child => {
            drop(ours);
            match sys::fork() {
                Ok(Fork::Child) => keep(image, place, first),
                Ok(Fork::Parent(_)) => {}
                Err(_) => sys::exit_now(1), // told by the parent, which waits for us
            }
            sys::exit_now(0)
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn tasks_of_a_slurm_step_share_a_scope() {
        assert_eq!(
            super::step_scope("/slurm/uid_1/job_7/step_0/task_3"),
            "/slurm/uid_1/job_7/step_0"
        );
        assert_eq!(
            super::step_scope("/slurm/uid_1/job_7/step_0"),
            "/slurm/uid_1/job_7/step_0"
        );
        assert_eq!(
            super::step_scope("/user.slice/session-2.scope"),
            "/user.slice/session-2.scope"
        );
    }
}
