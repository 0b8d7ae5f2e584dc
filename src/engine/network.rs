//! A network namespace's connection to the outside, by a program of the site: `pasta` or `slirp4netns`.
//!
//! The program runs beside the instance's monitor as an ordinary process of the user, and ends with it. Both give the
//! container the address 10.0.2.100, a gateway, and a name server at 10.0.2.3; published ports reach it from outside.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::sys;
use crate::proc::Held;

/// The container's address in its own network.
pub const ADDRESS: &str = "10.0.2.100";
/// Its name server, which asks the host's.
pub const NAME_SERVER: &str = "10.0.2.3";
const GATEWAY: &str = "10.0.2.2";
const DIRECTORIES: [&str; 4] = ["/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin"];
/// How long the program may take until the network is there.
const PATIENCE: Duration = Duration::from_secs(8);

/// A port of the host that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens; everywhere when `None`.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The container's.
    pub container: u16,
    /// UDP, else TCP.
    pub udp: bool,
}

/// What connects a network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Published ports.
    pub publish: Vec<Publish>,
    /// Programs to try, in this order: absolute paths.
    programs: Vec<PathBuf>,
    /// A private directory for the program's socket.
    scratch: PathBuf,
}

/// The connecting program. It ends with this value.
pub struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The programs that this machine has.
pub fn programs() -> Vec<PathBuf> {
    ["pasta", "slirp4netns"]
        .iter()
        .filter_map(|name| {
            let mut paths = DIRECTORIES.iter().map(|d| Path::new(d).join(name));
            paths.find(|p| p.is_file())
        })
        .collect()
}

impl Network {
    /// Looks for the programs.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(publish: Vec<Publish>, scratch: &Path) -> Result<Network> {
        let programs = programs();
        if programs.is_empty() {
            bail!(
                "a network with a connection to the outside (--net, --publish) needs pasta (package passt) or slirp4netns, and this \
                 machine has neither; --network none gives one without a connection"
            );
        }
        Ok(Network {
            publish,
            programs,
            scratch: scratch.to_owned(),
        })
    }
}

/// A process in the host's namespaces that connects the network of a program which is about to start, and stays until that
/// has ended: the program itself has no parent of ours that could.
pub struct Connector(UnixStream);

impl Connector {
    /// Starts it, while this process is still in the host's namespaces.
    ///
    /// # Errors
    /// When no process can be made.
    pub fn start(network: &Network) -> Result<Connector> {
        let (ours, theirs) = UnixStream::pair().context("cannot create a socket")?;
        let program = Held::child(rustix::process::getpid().as_raw_nonzero().get())
            .context("cannot hold this process (pidfd_open)")?;
        match sys::fork()? {
            sys::Fork::Parent(child) => {
                // It only forks again, so that the program has no child that it does not know.
                while nix::sys::wait::waitpid(child, None) == Err(nix::Error::EINTR) {}
                Ok(Connector(ours))
            }
            sys::Fork::Child => {
                drop(ours);
                if matches!(sys::fork(), Ok(sys::Fork::Child)) {
                    stay(network, theirs, &program);
                }
                sys::exit_now(0)
            }
        }
    }

    /// Has the network namespace of this process connected.
    ///
    /// # Errors
    /// When no program can.
    pub fn connect(mut self, pid: i32) -> Result<()> {
        sys::allow_tracing();
        let mut answer = String::new();
        let heard = self
            .0
            .write_all(&pid.to_le_bytes())
            .and_then(|()| self.0.read_to_string(&mut answer));
        sys::forbid_tracing();
        heard.context("cannot hear from the process that connects the network")?;
        match answer.as_str() {
            "ok" => Ok(()),
            "" => bail!("the process that connects the network was killed"),
            error => bail!("{error}"),
        }
    }
}

fn stay(network: &Network, mut socket: UnixStream, program: &Held) {
    let _ = rustix::process::setsid();
    sys::detach_standard_descriptors();
    let mut keep = [socket.as_raw_fd(), program.as_fd().as_raw_fd()];
    keep.sort_unstable();
    sys::close_all_but(&keep);
    sys::set_title("capsid-network");
    let mut pid = [0; 4];
    if socket.read_exact(&mut pid).is_err() {
        return; // the container could not be made
    }
    match connect(network, i32::from_le_bytes(pid)) {
        Ok(_helper) => {
            if socket.write_all(b"ok").is_ok() {
                drop(socket);
                while !program.wait(Duration::from_secs(3600)) {}
            }
        }
        // Nobody is left to tell when the program is gone.
        Err(error) => drop(socket.write_all(format!("{error:#}").as_bytes())),
    }
}

/// Reads `[ADDRESS:]HOST:CONTAINER[/udp]`, or one port for both.
///
/// # Errors
/// Naming what is wrong.
pub fn parse_publish(text: &str) -> Result<Publish> {
    let wrong = || format!("--publish {text:?}: use [ADDRESS:]HOST:CONTAINER[/udp], as in 8080:80");
    let (ports, udp) = match text.rsplit_once('/') {
        Some((ports, "udp")) => (ports, true),
        Some((ports, "tcp")) => (ports, false),
        Some(_) => bail!(wrong()),
        None => (text, false),
    };
    let port = |t: &str| t.parse::<u16>().ok().filter(|p| *p > 0).with_context(wrong);
    let (rest, container) = ports.rsplit_once(':').unwrap_or(("", ports));
    let (address, host) = rest.rsplit_once(':').unwrap_or(("", rest));
    let address = match address.trim_matches(['[', ']']) {
        "" => None,
        "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
        text => Some(text.parse().with_context(wrong)?),
    };
    let container = port(container)?;
    Ok(Publish {
        address,
        host: if host.is_empty() {
            container
        } else {
            port(host)?
        },
        container,
        udp,
    })
}

/// Connects the network namespace of process `pid`.
///
/// # Errors
/// When no program can, with what each of them said.
pub fn connect(network: &Network, pid: i32) -> Result<Helper> {
    let mut said = Vec::new();
    for program in &network.programs {
        let done = if program.ends_with("pasta") {
            pasta(program, network, pid)
        } else {
            slirp4netns(program, network, pid)
        };
        match done {
            Ok(helper) => return Ok(helper),
            Err(error) => said.push(format!("{}: {error:#}", program.display())),
        }
    }
    bail!(
        "cannot connect the container's network: {}",
        said.join("; ")
    )
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// `pasta(1)`: ports on its command line.
fn pasta(program: &Path, network: &Network, pid: i32) -> Result<Helper> {
    let mut command = command(program);
    command.args(["--config-net", "-f", "-q", "-e", "--no-map-gw"]);
    command.args(["-a", ADDRESS, "-n", "255.255.255.0", "-g", GATEWAY]);
    command.args(["--dns-forward", NAME_SERVER, "-T", "none", "-U", "none"]);
    for (option, udp) in [("-t", false), ("-u", true)] {
        let ports: Vec<String> = network
            .publish
            .iter()
            .filter(|p| p.udp == udp)
            .map(|p| {
                let address = p.address.map_or_else(String::new, |a| format!("{a}/"));
                format!("{address}{}:{}", p.host, p.container)
            })
            .collect();
        match ports.is_empty() {
            true => drop(command.args([option, "none"])),
            false => ports.iter().for_each(|port| {
                command.args([option, port]);
            }),
        }
    }
    command.args(["--userns", &format!("/proc/{pid}/ns/user")]);
    command.args(["--netns", &format!("/proc/{pid}/ns/net")]);
    let mut helper = spawn(command)?;
    let connected =
        || has_default_route(pid) && network.publish.iter().all(|p| is_open(p.host, p.udp));
    until(&mut helper, connected)?;
    Ok(helper)
}

/// Whether a process's network leads outside: the last thing that `pasta` sets up, for IPv4 and then for IPv6, if the host
/// has them (`/proc/PID/net/route`, `/proc/PID/net/ipv6_route`; `proc(5)`).
fn has_default_route(pid: i32) -> bool {
    let read = |name| fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    let is_default = |line: &str| line.split_ascii_whitespace().nth(1) == Some("00000000");
    let any = "00000000000000000000000000000000 00 ";
    read("route").lines().skip(1).any(is_default)
        || read("ipv6_route")
            .lines()
            .any(|line| line.starts_with(any) && !line.ends_with(" lo"))
}

/// Whether somebody listens on a port of this machine (`proc(5)`, `/proc/net/tcp`).
fn is_open(port: u16, udp: bool) -> bool {
    let (files, state) = if udp {
        (["/proc/net/udp", "/proc/net/udp6"], "07")
    } else {
        (["/proc/net/tcp", "/proc/net/tcp6"], "0A")
    };
    let wanted = format!(":{port:04X}");
    files.iter().any(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let local = fields.next().is_some_and(|l| l.ends_with(&wanted));
            local && fields.nth(1) == Some(state)
        })
    })
}

/// `slirp4netns(1)`: ports through its socket.
fn slirp4netns(program: &Path, network: &Network, pid: i32) -> Result<Helper> {
    let socket = network
        .scratch
        .join(format!("net-{}", uuid::Uuid::new_v4().simple()));
    let (mut ready, ready_end) = std::io::pipe().context("cannot create a pipe")?;
    let ready_fd = ready_end.as_raw_fd();
    sys::inherit(&ready_end)?;
    let mut command = command(program);
    command.args(["-c", "--mtu=65520", "--disable-host-loopback"]);
    command.args(["--ready-fd", &ready_fd.to_string(), "--api-socket"]);
    command.arg(&socket);
    command.args([&pid.to_string(), "tap0"]);
    let helper = spawn(command);
    drop(ready_end);
    let mut helper = helper?;
    let mut byte = [0];
    if ready.read(&mut byte).ok() != Some(1) {
        until(&mut helper, || false)?;
    }
    let published = network
        .publish
        .iter()
        .try_for_each(|port| add_port(&socket, port));
    // Connected or not: nobody needs its name any more.
    let _ = fs::remove_file(&socket);
    published?;
    Ok(helper)
}

fn add_port(socket: &Path, port: &Publish) -> Result<()> {
    let request = serde_json::json!({"execute": "add_hostfwd", "arguments": {
        "proto": if port.udp { "udp" } else { "tcp" },
        "host_addr": port.address.map_or_else(|| "0.0.0.0".into(), |a| a.to_string()),
        "host_port": port.host,
        "guest_port": port.container,
    }});
    let mut stream = UnixStream::connect(socket).context("cannot connect to its socket")?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .context("its socket")?;
    stream
        .write_all(request.to_string().as_bytes())
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
        .context("cannot write to its socket")?;
    let mut answer = String::new();
    stream
        .take(4096)
        .read_to_string(&mut answer)
        .context("cannot hear from it")?;
    if answer.contains("\"error\"") {
        bail!(
            "port {} of the host cannot be published: in use by another program?",
            port.host
        );
    }
    Ok(())
}

fn spawn(mut command: Command) -> Result<Helper> {
    command.stderr(Stdio::piped());
    sys::end_with_us(&mut command);
    Ok(Helper(command.spawn().context("cannot be started")?))
}

/// Waits until something is true, unless the program ends first.
fn until(helper: &mut Helper, mut done: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(1);
    while !done() {
        if let Ok(Some(_)) = helper.0.try_wait() {
            let mut said = String::new();
            if let Some(stderr) = &mut helper.0.stderr {
                let _ = stderr.take(4096).read_to_string(&mut said);
            }
            let lines = said.lines().filter(|l| !l.contains("syslog"));
            bail!("{}", lines.collect::<Vec<_>>().join(", "));
        }
        if Instant::now() > end {
            bail!("the network was not there in {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    // Whatever it says later is not waited for.
    helper.0.stderr = None;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports() {
        let read = |t: &str| {
            parse_publish(t)
                .ok()
                .map(|p| (p.address, p.host, p.container, p.udp))
        };
        assert_eq!(read("8080:80"), Some((None, 8080, 80, false)));
        assert_eq!(read("53:53/udp"), Some((None, 53, 53, true)));
        assert_eq!(read("8080"), Some((None, 8080, 8080, false)));
        assert_eq!(
            read("127.0.0.1:8080:80/tcp"),
            Some((Some(IpAddr::from([127, 0, 0, 1])), 8080, 80, false))
        );
        for bad in ["", "0:80", "80:", "a:80", "x:8080:80", "8080:80/sctp"] {
            assert!(parse_publish(bad).is_err(), "{bad}");
        }
    }
}
