//! The instances of a user on this node.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::door::{self, Door, Line, Name, Silent, Told};
use super::older::Older;
use super::{Record, State};
use crate::engine::join::Way;
use crate::engine::runtime::{self, Directory};
use crate::host::{Host, JOBS};
use crate::proc::Held;
use crate::say;

/// How long an instance that is named may take to answer: it may be being started.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same for all of those that are listed.
const GLANCE: Duration = Duration::from_secs(3);

/// An instance whose processes are held.
#[derive(Debug)]
pub struct Instance {
    /// What its monitor knows of it.
    pub record: Record,
    /// The process that looks after it.
    pub monitor: Option<Held>,
    /// Process 1 of its container; `None` until there is one.
    pub init: Option<Held>,
    /// What leads into the container, that of users first; none of an instance of an older version.
    pub namespaces: Vec<OwnedFd>,
}

impl Deref for Instance {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl Instance {
    /// Whether its container runs.
    pub fn is_running(&self) -> bool {
        match &self.init {
            Some(init) => init.is_alive(),
            // An older version's, whose process 1 /proc hides.
            None => self.script.state != State::Starting && self.monitor.is_some(),
        }
    }

    /// Of the record that an instance has left.
    pub fn ended(record: Record) -> Instance {
        Instance {
            record,
            monitor: None,
            init: None,
            namespaces: Vec::new(),
        }
    }

    /// What leads into its container; `None` when that is not there.
    pub fn way(self) -> Option<Way> {
        match self.namespaces.is_empty() {
            true => self.init.map(Way::Process),
            false => Some(Way::Namespaces(self.namespaces)),
        }
    }
}

/// Where the instances of a user are asked for.
pub struct Registry {
    directory: Option<Directory>,
    uid: u32,
    /// What shares its names outside of jobs.
    login: String,
    older: Older,
    /// The job whose instances are meant, when we are in one.
    pub job: Option<String>,
}

impl Registry {
    /// Opens it.
    pub fn open(host: &Host) -> Registry {
        Registry {
            directory: runtime::open(host.uid, host.runtime_home().as_deref()),
            uid: host.uid,
            login: door::scope_of_login(host),
            older: Older::of(host),
            job: host.job(),
        }
    }

    /// Of a job of a user's, for root, which has become that user.
    pub fn of_job(uid: u32, job: u32) -> Option<Registry> {
        let home = PathBuf::from(format!("{JOBS}/job-{job}"));
        Some(Registry {
            directory: Some(runtime::open(uid, Some(home.as_os_str()))?),
            uid,
            login: String::new(),
            older: Older::of_job(uid, home),
            job: Some(job.to_string()),
        })
    }

    /// A directory of the user on this node, where there is one. It may go at the end of a login: no instance depends on it.
    pub fn directory(&self) -> Option<&Directory> {
        self.directory.as_ref()
    }

    /// The same for what cannot do without.
    ///
    /// # Errors
    /// Naming the places that were tried.
    pub fn place(&self) -> Result<&Directory> {
        self.directory().with_context(|| {
            format!(
                "neither $XDG_RUNTIME_DIR nor /run/user/{0} nor capsid-{0} in /tmp, /dev/shm or /var/tmp is a local directory of \
                 yours with mode 0700",
                self.uid
            )
        })
    }

    fn scope(&self) -> String {
        match &self.job {
            Some(job) => door::scope_of_job(job),
            None => self.login.clone(),
        }
    }

    /// Takes a name.
    ///
    /// # Errors
    /// When an instance of the name runs or is being started.
    pub fn claim(&self, name: &str) -> Result<Door> {
        self.directory().into_iter().for_each(Directory::sweep);
        if self.older(name).is_some() {
            return Err(exists(name));
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let told = match Door::claim(self.uid, &self.scope(), name, PATIENCE)? {
                Name::Ours(door) => return Ok(door),
                Name::Taken(told) => told,
            };
            match told {
                // One that ends tidies up first; one that says nothing, again and again, is none of this version.
                Told::Ended | Told::Stranger if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Told::Ended | Told::Stranger => bail!(
                    "instance {name} already exists: its monitor hangs up, which one of another version of this program may do"
                ),
                // It has ended, and its monitor is tidying up.
                Told::Instance(other) if other.init.is_some() && !other.is_running() => {
                    let monitor = other.monitor.as_ref();
                    if !monitor.is_some_and(|m| m.wait(Duration::from_secs(5))) {
                        bail!(
                            "instance {name} already exists: its monitor (process {}) does not end",
                            other.record.monitor.pid
                        );
                    }
                }
                Told::Instance(_) => return Err(exists(name)),
                Told::Nothing(Silent { pid, .. }) => bail!(
                    "instance {name} already exists, and its monitor (process {pid}) does not answer: it is being started, or hangs (kill -9 {pid} ends it)"
                ),
            }
        }
    }

    /// The instance of a name, if its container runs.
    pub fn find(&self, name: &str) -> Option<Instance> {
        self.find_any(name).filter(Instance::is_running)
    }

    /// The instance of a name whose monitor lives, whatever its container does.
    pub fn find_any(&self, name: &str) -> Option<Instance> {
        for line in Line::to_instance(self.uid, &self.scope(), name) {
            line.ask();
            match line.hear(Instant::now() + PATIENCE) {
                Told::Instance(instance) if instance.name == name => return Some(*instance),
                Told::Nothing(silent) => tell(&silent),
                _ => {}
            }
        }
        self.older(name)
    }

    /// The monitor of a name that does not answer: the instance is being started, or hangs.
    pub fn find_silent(&self, name: &str) -> Option<Held> {
        let lines = Line::to_instance(self.uid, &self.scope(), name);
        lines.into_iter().find_map(|line| {
            line.ask();
            match line.hear(Instant::now() + Duration::from_secs(1)) {
                Told::Nothing(silent) => silent.monitor,
                _ => None,
            }
        })
    }

    fn older(&self, name: &str) -> Option<Instance> {
        let all = self.older.list();
        all.into_iter()
            .find(|i| i.name == name && i.job == self.job)
    }

    /// All running instances, by name: those of our job, or all of them outside of jobs.
    pub fn list(&self) -> Vec<Instance> {
        let own = self.scope();
        let lines = Line::to_all(self.uid, &|scope| {
            scope == own || self.job.is_none() && door::is_job_here(scope)
        });
        let lines = lines.unwrap_or_else(|error| {
            say::warn(format_args!(
                "{error:#}: instances can only be named, and not be listed"
            ));
            Vec::new()
        });
        lines.iter().for_each(Line::ask);
        let deadline = Instant::now() + GLANCE;
        let mut found = Vec::new();
        for line in lines {
            match line.hear(deadline) {
                Told::Instance(instance) => found.push(*instance),
                Told::Nothing(silent) => tell(&silent),
                Told::Ended | Told::Stranger => {}
            }
        }
        let job = &self.job;
        let older = self.older.list().into_iter();
        found.extend(older.filter(|i| job.is_none() || i.job == *job));
        found.retain(Instance::is_running);
        found.sort_by(|a, b| (&a.job, &a.name).cmp(&(&b.job, &b.name)));
        let mut seen = BTreeSet::new();
        found.retain(|i| seen.insert((i.job.clone(), i.name.clone())));
        found
    }
}

fn exists(name: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "instance {name} already exists: stop it first (instance stop {name}), or use another name"
    )
}

fn tell(Silent { pid, .. }: &Silent) {
    say::warn(format_args!(
        "the monitor of an instance (process {pid}) does not answer: the instance is being started, or hangs (kill -9 {pid} ends it)"
    ));
}
