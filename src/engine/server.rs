//! The image server: a detached process that owns a user namespace in which an image is mounted through FUSE.
//!
//! One server per image (device, inode, size, time, offset), id map, user and cgroup scope. Every container of that
//! scope joins its user namespace, brings its own mounts, and gets from it a detached copy of the image's mount. So all
//! ranks of a job share one page cache, and may use cross-memory attach between each other.
//!
//! Two processes: a *keeper* holds `/dev/fuse` and waits, a *worker* serves. A worker that is killed is replaced, and
//! asks the kernel to send pending requests again (node ids carry no state): containers notice nothing.
//!
//! Life: users are counted by pidfd. A few seconds after the last one the worker stops listening and detaches its own
//! mount; the kernel ends the FUSE connection when the last mount of it is gone, wherever it is, and only then the
//! server ends. It never unmounts under a live process, whatever that process is a child of. Nothing of it stays: the
//! socket is removed, its directory is in memory, its mounts are in a namespace of its own, which holds none of the
//! host's.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use capsid_fuse::{Archive, Options, Owner, Server, ViewEntry, ViewKind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
    socketpair,
};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::runtime::Directory;
use super::sys::{self, Fork};
use super::wire::{self, Point};
use super::{runtime, userns};
use crate::image::Root;
use crate::plan::IdMap;
use crate::proc::Held;
use crate::say;

/// How long a server without users goes on listening: long enough for the next command of a script.
const IDLE: Duration = Duration::from_secs(3);

/// Sockets that are younger are not asked whether their server lives,
const SWEEP_AGE: Duration = Duration::from_secs(10);
/// and not more than so many by each new server.
const SWEEP_MOST: usize = 4;

/// How long a client waits for an answer before it does without the shared server.
const ANSWER_S: i64 = 10;

/// A worker that dies this often within [`RESTART_WINDOW`] is not replaced any more.
const RESTARTS: usize = 3;
const RESTART_WINDOW: Duration = Duration::from_secs(10);

/// Where the image is mounted in the server's own, otherwise empty file tree.
const MOUNT_POINT: &str = "/m";
/// The mount points asked for so far, for a worker that takes over.
const VIEWS: &str = "/views";
/// There when the server has left its name, which is not to be listened to any more.
const LEFT: &str = "/left";
/// There when the worker has ended by itself.
const ENDED: &str = "/ended";

/// Distinct requests, and bytes of them, that a server takes: it then leaves its name to a successor, and serves on
/// what it serves.
const VIEWS_MAX: usize = 1024;
const VIEWS_BYTES_MAX: usize = 1 << 20;

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
    /// A detached mount of the image with all mount points.
    pub tree: OwnedFd,
    /// For each mount point asked for: it was not in the image.
    pub made: Vec<bool>,
    /// Hangs up when no process of the server is left.
    pub life: OwnedFd,
}

/// Who asks for a root.
pub struct Client<'a> {
    /// `$XDG_RUNTIME_DIR`.
    pub xdg: Option<&'a std::ffi::OsStr>,
    /// The process that uses the image: the server stays as long as it lives.
    pub user: Option<Held>,
}

impl<'a> Client<'a> {
    /// This process, which becomes the program.
    pub fn own(xdg: Option<&'a std::ffi::OsStr>) -> Client<'a> {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        Client {
            xdg,
            // Before Linux 5.3 there are no pidfds: the server then does not count us, and still never unmounts
            // under us.
            user: Held::child(own),
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
    let request = wire::encode_points(points)?;
    let image = Image::open(root, ids, namespace)?;
    let uid = rustix::process::getuid().as_raw();
    let Some(directory) = runtime::open(uid, client.xdg) else {
        say::verbose(format_args!(
            "no runtime directory: this container gets an image server of its own"
        ));
        return start(&image, None, &request, client);
    };
    let name = image.socket_name()?;
    // A server may end between our connect and its answer; then the next round starts one.
    for _ in 0..10 {
        if let Some(server) = connect_to(&directory, &name) {
            match ask(&server, &request, client) {
                Ok(answer) => return answer,
                Err(Silence::Gone) => continue,
                Err(Silence::Stuck) => {
                    say::warn(format_args!(
                        "the image server of {} does not answer: using another one",
                        image.path.display()
                    ));
                    return start(&image, None, &request, client);
                }
            }
        }
        let claimed = match claim(&directory, &name) {
            Ok(claimed) => claimed,
            Err(error) => {
                say::verbose(format_args!(
                    "{error:#}: this container gets an image server of its own"
                ));
                return start(&image, None, &request, client);
            }
        };
        if let Some(listener) = claimed {
            let place = Place {
                directory: directory.reopen(),
                name: name.clone(),
                listener,
            };
            return start(&image, Some(place), &request, client);
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
}

impl<'a> Image<'a> {
    fn open(root: &'a Root, ids: IdMap, namespace: Namespace) -> Result<Image<'a>> {
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
        })
    }

    /// Equal for the callers that share a server, and different for all others.
    fn socket_name(&self) -> Result<String> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let stat = rustix::fs::fstat(&self.file).context("cannot read the image's attributes")?;
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

fn connect_to(directory: &Directory, name: &str) -> Option<OwnedFd> {
    let fd = packet_socket().ok()?;
    let address = UnixAddr::new(&directory.entry(name)).ok()?;
    connect(fd.as_raw_fd(), &address).ok()?;
    // Only a socket of our own user is listened to, whoever made the file.
    wire::is_own_peer(&fd).then_some(fd)
}

fn packet_socket() -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// Binds the server's socket, unless somebody else has by now. From here on others connect and wait for us.
fn claim(directory: &Directory, name: &str) -> Result<Option<OwnedFd>> {
    let _lock = directory.lock();
    if connect_to(directory, name).is_some() {
        return Ok(None);
    }
    directory.remove(name);
    sweep(directory);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
        .context("cannot create a socket")?;
    let address = UnixAddr::new(&directory.entry(name)).context("the socket's address")?;
    let what = || format!("cannot create a socket in {}", directory.path.display());
    bind(fd.as_raw_fd(), &address).with_context(what)?;
    let listening = listen(&fd, Backlog::new(4095).unwrap_or(Backlog::MAXCONN));
    if listening.is_err() {
        directory.remove(name);
    }
    listening.with_context(what)?;
    Ok(Some(fd))
}

/// Removes what servers left that were killed. Under the lock, so that none is between `bind` and `listen`.
fn sweep(directory: &Directory) {
    let Ok(entries) = std::fs::read_dir(directory.entry(".")) else {
        return;
    };
    // A live server is woken by the question: young ones are not asked, and of the others only a few each time.
    let old = |entry: &std::fs::DirEntry| {
        let made = entry.metadata().and_then(|m| m.modified());
        made.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > SWEEP_AGE))
    };
    let names = entries
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().starts_with(b"image-") && old(entry));
    for name in names.take(SWEEP_MOST).map(|e| e.file_name()) {
        let Some(name) = name.to_str() else { continue };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        if let Ok(fd) = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            && let Ok(address) = UnixAddr::new(&directory.entry(name))
            && connect(fd.as_raw_fd(), &address) == Err(nix::Error::ECONNREFUSED)
        {
            directory.remove(name);
        }
    }
}

enum Silence {
    /// The server ended.
    Gone,
    /// It is there, and says nothing.
    Stuck,
}

/// Asks for a root. The inner error is the server's own, for the person.
fn ask(server: &OwnedFd, request: &[u8], client: &Client) -> Result<Result<Stage>, Silence> {
    let timeout = nix::sys::time::TimeVal::new(ANSWER_S, 0);
    let _ =
        nix::sys::socket::setsockopt(server, nix::sys::socket::sockopt::ReceiveTimeout, &timeout);
    let own: Vec<RawFd> = client
        .user
        .iter()
        .map(|user| user.as_fd().as_raw_fd())
        .collect();
    if wire::send(server.as_fd(), &with_header(request), &own).is_err() {
        return Err(Silence::Gone);
    }
    match wire::receive(server.as_fd()) {
        Ok((bytes, fds)) => match (bytes.split_first(), <[OwnedFd; 3]>::try_from(fds)) {
            (Some((0, made)), Ok([userns, tree, life])) => Ok(Ok(Stage {
                userns,
                tree,
                life,
                made: made.iter().map(|b| *b != 0).collect(),
            })),
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

/// Where a server can be found by others.
struct Place {
    directory: Option<Directory>,
    name: String,
    listener: OwnedFd,
}

/// Starts a server and is its first client.
fn start(image: &Image, place: Option<Place>, request: &[u8], client: &Client) -> Result<Stage> {
    let ours = match launch(image, place.as_ref()) {
        Ok(ours) => ours,
        Err(error) => {
            leave(place.as_ref());
            return Err(error).context("cannot start an image server");
        }
    };
    drop(place);
    match ask(&ours, request, client) {
        Ok(answer) => answer,
        Err(_) => bail!(
            "the image server of {} ended before it began to serve",
            image.path.display()
        ),
    }
}

/// Starts a server; gives the end of its first client.
fn launch(image: &Image, place: Option<&Place>) -> Result<OwnedFd> {
    let (ours, first) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context("cannot create a socket")?;
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

/// The keeper: makes namespaces and mount, starts workers. Does not return.
fn keep(image: &Image, place: Option<&Place>, first: OwnedFd) {
    let _ = rustix::process::setsid();
    let ready = prepare(image, place, &first);
    let prepared = match ready {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&first, place, &error),
    };
    let keeper = Keeper {
        image,
        prepared: &prepared,
        place,
        users: Vec::new(),
        deaths: Vec::new(),
    };
    keeper.run(Some(first));
}

/// Holds what a worker that takes over needs.
struct Keeper<'a> {
    image: &'a Image<'a>,
    prepared: &'a Prepared,
    place: Option<&'a Place>,
    /// The worker's users, which it tells over a socket.
    users: Vec<OwnedFd>,
    deaths: Vec<Instant>,
}

impl Keeper<'_> {
    /// Starts workers until one ends by itself. `first` is the client that waits for the first one.
    fn run(mut self, mut first: Option<OwnedFd>) {
        loop {
            match self.start(&mut first) {
                Ok((worker, told)) => {
                    first = None;
                    if self.watch(&worker, &told) == Ended::ByItself || !self.may_go_on() {
                        return;
                    }
                }
                Err(error) => {
                    return match &first {
                        Some(first) => refuse(first, self.place, &error),
                        None => leave_once(self.place),
                    };
                }
            }
        }
    }

    /// Goes on for a keeper that was killed, beside its worker.
    fn take_over(mut self, worker: &OwnedFd, told: &OwnedFd) {
        if self.watch(worker, told) == Ended::Killed && self.may_go_on() {
            self.run(None);
        }
    }

    fn may_go_on(&mut self) -> bool {
        self.deaths.push(Instant::now());
        self.deaths.retain(|at| at.elapsed() < RESTART_WINDOW);
        let may = self.deaths.len() <= RESTARTS;
        if !may {
            leave_once(self.place);
        }
        may
    }

    /// Starts a worker; gives a descriptor of it, and the socket over which it tells of its users.
    fn start(&mut self, first: &mut Option<OwnedFd>) -> Result<(OwnedFd, OwnedFd)> {
        let (told, tell) = user_line()?;
        let keeper = own_process()?;
        match sys::fork()? {
            Fork::Child => {
                drop(told);
                let bond = Bond {
                    keeper: Some(keeper),
                    tell,
                };
                let users = std::mem::take(&mut self.users);
                let (image, prepared, place) = (self.image, self.prepared, self.place);
                let fresh = self.deaths.is_empty();
                work(image, prepared, place, first.take(), users, bond, fresh);
                end_worker()
            }
            Fork::Parent(worker) => {
                let opened = rustix::process::Pid::from_raw(worker.as_raw())
                    .context("a process id")
                    .and_then(open_process);
                let Ok(opened) = opened else {
                    // It serves its clients, and has no successor.
                    *first = None;
                    while waitpid(worker, None) == Err(nix::Error::EINTR) {}
                    sys::exit_now(0)
                };
                Ok((opened, told))
            }
        }
    }

    /// Waits for the end of a worker, and meanwhile notes its users.
    fn watch(&mut self, worker: &OwnedFd, told: &OwnedFd) -> Ended {
        let mut telling = true;
        loop {
            let mut set = vec![PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
            set.extend(
                self.users
                    .iter()
                    .map(|u| PollFd::new(u.as_fd(), PollFlags::POLLIN)),
            );
            set.extend(telling.then(|| PollFd::new(told.as_fd(), PollFlags::POLLIN)));
            if !matches!(poll(&mut set, PollTimeout::NONE), Ok(n) if n > 0) {
                continue;
            }
            let ready: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            let mut gone = ready.iter().skip(1);
            self.users.retain(|_| gone.next() != Some(&true));
            if gone.next() == Some(&true) {
                match wire::receive(told.as_fd()) {
                    Ok((bytes, users)) if !bytes.is_empty() => self.users.extend(users),
                    _ => telling = false,
                }
            }
            if ready.first() == Some(&true) {
                // What it told last.
                while let Ok((bytes, users)) = wire::receive(told.as_fd())
                    && !bytes.is_empty()
                {
                    self.users.extend(users);
                }
                while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(s) if s != WaitStatus::StillAlive)
                {
                }
                return if Path::new(ENDED).exists() {
                    Ended::ByItself
                } else {
                    Ended::Killed
                };
            }
        }
    }
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    ByItself,
    Killed,
}

/// What a worker has of its keeper.
struct Bond {
    /// The process, for the worker to see its end. `None` when there is no other any more.
    keeper: Option<OwnedFd>,
    /// Where users are told.
    tell: OwnedFd,
}

/// A socket pair: the worker sends each user to its keeper, and never waits for it.
fn user_line() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .context("cannot create a socket")
}

fn own_process() -> Result<OwnedFd> {
    open_process(rustix::process::getpid())
}

fn open_process(pid: rustix::process::Pid) -> Result<OwnedFd> {
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .context("cannot open a process")
}

/// Ends a worker in a way that its keeper takes for no accident.
fn end_worker() -> ! {
    let _ = File::create(ENDED);
    sys::exit_now(0)
}

/// Tells the first client why there is no server. Others that wait by now find the socket closed and try themselves.
fn refuse(first: &OwnedFd, place: Option<&Place>, error: &anyhow::Error) {
    leave(place);
    let mut answer = vec![1];
    answer.extend(format!("{error:#}").bytes().take(8000));
    let _ = wire::receive(first.as_fd());
    let _ = wire::send(first.as_fd(), &answer, &[]);
}

/// Takes the server's name away. Only while the listener is alive: as long as it answers, nobody else can have bound
/// the name.
fn leave(place: Option<&Place>) {
    if let Some(place) = place
        && let Some(directory) = &place.directory
    {
        let _lock = directory.lock();
        directory.remove(&place.name);
        // Also ends the waiting of clients that found the name just before.
        let _ = nix::sys::socket::shutdown(
            place.listener.as_raw_fd(),
            nix::sys::socket::Shutdown::Both,
        );
    }
}

/// The same where the server's own file tree is in place: once, as the name may be somebody else's afterwards.
fn leave_once(place: Option<&Place>) {
    if !Path::new(LEFT).exists() {
        let _ = File::create(LEFT);
        leave(place);
    }
}

struct Prepared {
    /// One descriptor of the FUSE connection for each thread that may serve.
    devices: Vec<OwnedFd>,
    userns: OwnedFd,
    /// Both ends of a pipe that only keeper and worker write to: what clients get of it hangs up with the last of them.
    life: (OwnedFd, OwnedFd),
    /// Where the profile of the image is kept, if it lies on slow storage.
    profiles: Option<OwnedFd>,
}

/// Namespaces, an empty file tree, and the image mounted in it.
fn prepare(image: &Image, place: Option<&Place>, first: &OwnedFd) -> Result<Prepared> {
    sys::ignore_signals(&[
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGPIPE,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]);
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
    // One descriptor for each user.
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    sys::detach_standard_descriptors();
    let mut keep = vec![image.file.as_raw_fd(), first.as_raw_fd()];
    if let Some(place) = place {
        keep.push(place.listener.as_raw_fd());
        keep.extend(place.directory.as_ref().map(|d| d.fd().as_raw_fd()));
    }
    keep.sort_unstable();
    sys::close_all_but(&keep);
    // While the environment is still there, which the title overwrites.
    let profiles = match image.root {
        Root::Squashfs { .. } => super::profiles::for_image(&image.file),
        _ => None,
    };
    sys::set_title(&format!("capsid-image {}", image.path.display()));
    // The image is looked at before anything is mounted, so that a bad one costs nothing.
    open_tree(image)?;
    match image.namespace {
        Namespace::New => userns::create(&image.ids, CloneFlags::CLONE_NEWNS)?,
        Namespace::Current => nix::sched::unshare(CloneFlags::CLONE_NEWNS)
            .map_err(|error| userns::no_mounts(error.into()))?,
    }
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::DOWNSTREAM
            | rustix::mount::MountPropagationFlags::REC,
    )
    .context("cannot make the mounts private")?;
    let userns = userns::current()?;
    let (uid, gid) = match &image.ids {
        IdMap::Own { uid, gid } => (*uid, *gid),
        _ => (0, 0),
    };
    let others = image.ids.has_others();
    let mount = capsid_fuse::mount::fuse(&capsid_fuse::mount::MountOptions {
        uid,
        gid,
        allow_other: others,
        default_permissions: others,
        source: image.path.to_string_lossy().into_owned(),
    })?;
    // While /dev/fuse can still be seen.
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8);
    let mut devices = vec![mount.device];
    while devices.len() < threads {
        match capsid_fuse::clone_device(devices[0].as_fd()) {
            Ok(device) => devices.push(device),
            Err(_) => break, // before Linux 4.2; one descriptor serves all the same
        }
    }
    enter_empty_tree(&mount.tree)?;
    sys::keep_only_mounting();
    sys::confine_server();
    let life = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context("cannot create a pipe")?;
    Ok(Prepared {
        devices,
        userns,
        life,
        profiles,
    })
}

/// Leaves the host's mounts: the server must not keep a file system busy that an administrator wants to unmount.
fn enter_empty_tree(image: &OwnedFd) -> Result<()> {
    let tree = sys::new_filesystem("tmpfs", &[("mode", Some(c"0700")), ("size", Some(c"4m"))])?;
    sys::attach_over_root(tree.as_fd())?;
    rustix::fs::mkdirat(&tree, &MOUNT_POINT[1..], rustix::fs::Mode::RWXU)
        .context("cannot create the mount point")?;
    let point = sys::open_in_root(
        tree.as_fd(),
        Path::new(MOUNT_POINT),
        rustix::fs::OFlags::PATH,
    )
    .context("cannot open the mount point")?;
    sys::attach(image.as_fd(), point.as_fd()).context("cannot mount the image")?;
    super::rootfs::pivot(&tree, 0)
}

fn options(ids: &IdMap) -> Options {
    let owner = match ids {
        IdMap::Own { uid, gid } => Owner::Fixed {
            uid: *uid,
            gid: *gid,
        },
        IdMap::Root { .. } => Owner::Fixed { uid: 0, gid: 0 },
        IdMap::All | IdMap::Ranges { .. } => Owner::Image,
    };
    Options {
        owner,
        stage: true,
        max_threads: 0,
        cache_bytes: 0,
    }
}

fn open_tree(image: &Image) -> Result<Server> {
    let file = image
        .file
        .try_clone()
        .context("cannot duplicate a descriptor")?;
    let what = || format!("cannot read image {}", image.path.display());
    match image.root {
        Root::Ext { .. } => Server::ext(
            file,
            image.offset,
            Some(image.len),
            "upper",
            options(&image.ids),
        )
        .with_context(what),
        _ => Ok(Server::squashfs(
            Archive::open(file, image.offset, Some(image.len)).with_context(what)?,
            options(&image.ids),
        )),
    }
}

/// The worker: serves the image from threads, and clients from this one, until nobody is left.
fn work(
    image: &Image,
    prepared: &Prepared,
    place: Option<&Place>,
    first: Option<OwnedFd>,
    users: Vec<OwnedFd>,
    bond: Bond,
    fresh: bool,
) {
    let server = match open_tree(image) {
        Ok(server) => Arc::new(server),
        Err(error) => {
            if let Some(first) = &first {
                refuse(first, place, &error);
            }
            return;
        }
    };
    let devices: Vec<OwnedFd> = prepared
        .devices
        .iter()
        .filter_map(|d| d.try_clone().ok())
        .collect();
    let mut known = Known::default();
    let mut place = place;
    if let Some(profiles) = prepared.profiles.as_ref().and_then(|p| p.try_clone().ok()) {
        server.keep_profile(profiles);
    }
    if !fresh {
        known.restore(&server);
        place = place.filter(|_| !Path::new(LEFT).exists());
        Server::resume(prepared.devices[0].as_fd());
    }
    // Before there are threads, which then do not take it.
    let told_to_hurry = sys::signal_set([libc::SIGTERM]).thread_block();
    let bell = std::io::pipe().map_err(anyhow::Error::from);
    let serving = bell.and_then(|(rung, bell)| {
        let server = Arc::clone(&server);
        let thread = std::thread::Builder::new()
            .name("serve".into())
            .spawn(move || {
                let _bell = Bell(bell);
                if server.serve_on(devices).is_err() {
                    // The keeper replaces a worker that dies so.
                    let _ = nix::sys::signal::kill(nix::unistd::getpid(), Signal::SIGKILL);
                }
            })?;
        Ok((thread, rung))
    });
    let (serving, rung) = match serving {
        Ok(serving) => serving,
        Err(error) => {
            if let Some(first) = &first {
                refuse(first, place, &error.context("cannot start a thread"));
            }
            return;
        }
    };
    let hurry = told_to_hurry
        .and_then(|()| {
            SignalFd::with_flags(&sys::signal_set([libc::SIGTERM]), SfdFlags::SFD_CLOEXEC)
        })
        .ok();
    let mut desk = Desk {
        image,
        hurry: hurry.as_ref(),
        server,
        prepared,
        place,
        bond,
        users,
        last: Instant::now(),
        known,
        left: false,
    };
    if let Some(first) = first
        && desk.answer(&first) == Room::Full
    {
        // Nothing is known yet, so it is descriptors that there is no room for.
        if let Some(place) = place {
            desk.leave(place);
        }
        let _ = wire::send(
            first.as_fd(),
            b"\x01too many open files: raise the limit (ulimit -n)",
            &[],
        );
    }
    desk.run(place, &serving);
    // The mount goes when the last container's copy goes, and the serving thread ends with it.
    let _ = rustix::mount::unmount(MOUNT_POINT, rustix::mount::UnmountFlags::DETACH);
    desk.server.shrink();
    desk.wait_for(&rung);
    let _ = serving.join();
    desk.server.save_profile();
    end_worker()
}

/// Rings, by a byte in a pipe, when it goes: a copy of its descriptor in a new keeper does not matter.
struct Bell(std::io::PipeWriter);

impl Drop for Bell {
    fn drop(&mut self) {
        let _ = self.0.write_all(&[0]);
    }
}

fn entries(points: &[Point]) -> Vec<ViewEntry> {
    points
        .iter()
        .map(|p| ViewEntry {
            path: p.path.as_os_str().as_bytes().to_vec(),
            kind: if p.directory {
                ViewKind::Directory
            } else {
                ViewKind::File
            },
        })
        .collect()
}

/// Where clients are received.
struct Desk<'a> {
    /// Where `SIGTERM` arrives: a service manager wants an end, so an idle server does not linger. `None` when it has
    /// arrived.
    hurry: Option<&'a SignalFd>,
    image: &'a Image<'a>,
    server: Arc<Server>,
    prepared: &'a Prepared,
    /// For a new keeper.
    place: Option<&'a Place>,
    bond: Bond,
    users: Vec<OwnedFd>,
    last: Instant,
    known: Known,
    /// The name is given up.
    left: bool,
}

impl Desk<'_> {
    /// Answers clients until there have been no users for a while, and then leaves the name.
    fn run(&mut self, mut place: Option<&Place>, serving: &std::thread::JoinHandle<()>) {
        loop {
            let patience = if place.is_some() && self.hurry.is_some() {
                IDLE
            } else {
                Duration::ZERO
            };
            let idle = if self.users.is_empty() {
                patience.saturating_sub(self.last.elapsed())
            } else {
                Duration::from_secs(3600)
            };
            if idle.is_zero() || serving.is_finished() || (self.left && place.is_some()) {
                let Some(place) = place.take() else { return };
                self.leave(place);
                // Who knocked before the name was gone is still let in.
                while self.receive(place) {}
                continue;
            }
            let mut set: Vec<PollFd> = self
                .users
                .iter()
                .map(|u| PollFd::new(u.as_fd(), PollFlags::POLLIN))
                .collect();
            set.extend(
                self.bond
                    .keeper
                    .iter()
                    .map(|k| PollFd::new(k.as_fd(), PollFlags::POLLIN)),
            );
            set.extend(place.map(|p| PollFd::new(p.listener.as_fd(), PollFlags::POLLIN)));
            set.extend(
                self.hurry
                    .map(|h| PollFd::new(h.as_fd(), PollFlags::POLLIN)),
            );
            let timeout =
                PollTimeout::try_from(idle.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
            if !matches!(poll(&mut set, timeout), Ok(n) if n > 0) {
                continue;
            }
            let mut ready: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            if self.hurry.is_some() && ready.pop() == Some(true) {
                self.hurry = None;
            }
            let knock = place.is_some() && ready.pop() == Some(true);
            let alone = self.bond.keeper.is_some() && ready.pop() == Some(true);
            let mut ready = ready.into_iter();
            self.users.retain(|_| !ready.next().unwrap_or(false));
            if self.users.is_empty() {
                self.last = Instant::now();
            }
            if alone {
                self.replace_keeper();
            }
            if knock && let Some(place) = place {
                self.receive(place);
            }
        }
    }

    /// Waits for the bell of the serving thread.
    fn wait_for(&mut self, rung: &std::io::PipeReader) {
        loop {
            let mut set = vec![PollFd::new(rung.as_fd(), PollFlags::POLLIN)];
            set.extend(
                self.bond
                    .keeper
                    .iter()
                    .map(|k| PollFd::new(k.as_fd(), PollFlags::POLLIN)),
            );
            let _ = poll(&mut set, PollTimeout::NONE);
            let ready: Vec<bool> = set.iter().map(|p| p.any().unwrap_or(false)).collect();
            if ready.first() == Some(&true) {
                return;
            }
            if ready.get(1) == Some(&true) {
                self.replace_keeper();
            }
        }
    }

    /// The keeper was killed: makes a child the new one. Without one the worker goes on unprotected.
    fn replace_keeper(&mut self) {
        self.bond.keeper = None;
        let (Ok((told, tell)), Ok(worker)) = (user_line(), own_process()) else {
            return;
        };
        match sys::fork_beside_threads() {
            Ok(Fork::Child) => {
                drop(tell);
                let keeper = Keeper {
                    image: self.image,
                    prepared: self.prepared,
                    place: self.place,
                    users: std::mem::take(&mut self.users),
                    deaths: Vec::new(),
                };
                keeper.take_over(&worker, &told);
                sys::exit_now(0)
            }
            Ok(Fork::Parent(keeper)) => {
                let keeper = rustix::process::Pid::from_raw(keeper.as_raw());
                self.bond = Bond {
                    keeper: keeper.and_then(|keeper| open_process(keeper).ok()),
                    tell,
                };
            }
            Err(_) => {}
        }
    }

    /// Lets one waiting client in; false when there is none.
    fn receive(&mut self, place: &Place) -> bool {
        let client = match accept4(place.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(client) => client,
            Err(nix::Error::EMFILE | nix::Error::ENFILE) => {
                self.leave(place); // the next one starts a server with room
                return false;
            }
            Err(_) => return false,
        };
        let client = sys::own(client);
        if wire::is_own_peer(&client) && self.answer(&client) == Room::Full {
            // Before the client hears that there is no answer, so that it finds the name free.
            self.leave(place);
        }
        true
    }

    /// Leaves the name, once: it may be somebody else's afterwards.
    fn leave(&mut self, place: &Place) {
        if !self.left {
            self.left = true;
            leave_once(Some(place));
        }
    }

    fn answer(&mut self, client: &OwnedFd) -> Room {
        // A client sends at once; one that does not must not keep the others waiting.
        let timeout = nix::sys::time::TimeVal::new(2, 0);
        let _ = nix::sys::socket::setsockopt(
            client,
            nix::sys::socket::sockopt::ReceiveTimeout,
            &timeout,
        );
        let (packet, fds) = match wire::receive(client.as_fd()) {
            Ok(received) => received,
            Err(nix::Error::EMFILE) => return Room::Full,
            Err(_) => return Room::Left,
        };
        let Some(points) = packet
            .split_first()
            .and_then(|(_, body)| wire::decode_points(body))
        else {
            return Room::Left;
        };
        if self.known.room(&packet[1..]) == Room::Full {
            return Room::Full;
        }
        let sent = match self.root_with(&points, &packet[1..]) {
            Ok((tree, made)) => {
                let mut answer = vec![0];
                answer.extend(made.into_iter().map(u8::from));
                wire::send(
                    client.as_fd(),
                    &answer,
                    &[
                        self.prepared.userns.as_raw_fd(),
                        tree.as_raw_fd(),
                        self.prepared.life.0.as_raw_fd(),
                    ],
                )
            }
            // Another server has room.
            Err(error) if error.downcast_ref() == Some(&rustix::io::Errno::MFILE) => {
                return Room::Full;
            }
            Err(error) => {
                let mut answer = vec![1];
                answer.extend(format!("{error:#}").bytes().take(8000));
                wire::send(client.as_fd(), &answer, &[])
            }
        };
        if sent.is_ok()
            && let Some(user) = fds.into_iter().next()
        {
            // A keeper that does not keep up knows fewer.
            let _ = wire::send(self.bond.tell.as_fd(), &[0], &[user.as_raw_fd()]);
            self.users.push(user);
        }
        self.last = Instant::now();
        Room::Left
    }

    /// A detached copy of the image's mount in which all mount points exist, and which of them are new.
    fn root_with(&mut self, points: &[Point], raw: &[u8]) -> Result<(OwnedFd, Vec<bool>)> {
        let missing = |p: &Point| {
            !self
                .server
                .exists(p.path.as_os_str().as_bytes())
                .unwrap_or(false)
        };
        let made: Vec<bool> = points.iter().map(missing).collect();
        let view = self
            .server
            .add_view(&entries(points))
            .context("cannot make the mount points")?;
        self.known.note(raw)?;
        let path = format!("{MOUNT_POINT}/{}", view.0);
        let tree = sys::clone_tree(rustix::fs::CWD, Path::new(&path))?;
        Ok((tree, made))
    }
}

/// Whether a server can take one more distinct request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Left,
    Full,
}

/// The distinct requests so far: here, and in a file for a worker that takes over.
#[derive(Default)]
struct Known {
    requests: HashSet<Vec<u8>>,
    bytes: usize,
}

impl Known {
    fn room(&self, raw: &[u8]) -> Room {
        let more = self.requests.len() < VIEWS_MAX && self.bytes + raw.len() <= VIEWS_BYTES_MAX;
        // The first one always fits; what is wrong with it is told when it is tried.
        if more || self.requests.is_empty() || self.requests.contains(raw) {
            Room::Left
        } else {
            Room::Full
        }
    }

    fn note(&mut self, raw: &[u8]) -> Result<()> {
        if !self.requests.insert(raw.to_vec()) {
            return Ok(());
        }
        self.bytes += raw.len();
        let mut record = u32::try_from(raw.len())
            .context("a request")?
            .to_le_bytes()
            .to_vec();
        record.extend(raw);
        File::options()
            .create(true)
            .append(true)
            .open(VIEWS)
            .and_then(|mut file| file.write_all(&record))
            .context("cannot note the mount points")
    }

    /// Makes the views again that the worker before this one made, with the same numbers.
    fn restore(&mut self, server: &Server) {
        let text = std::fs::read(VIEWS).unwrap_or_default();
        let mut rest = text.as_slice();
        while let Some((len, tail)) = rest.split_first_chunk::<4>() {
            let Some((record, tail)) = tail.split_at_checked(u32::from_le_bytes(*len) as usize)
            else {
                return;
            };
            if let Some(points) = wire::decode_points(record) {
                let _ = server.add_view(&entries(&points));
            }
            self.bytes += record.len();
            self.requests.insert(record.to_vec());
            rest = tail;
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
