//! The cgroup freezer: a guard that thaws when dropped, and a watchdog process that thaws when this one is killed.
//!
//! Order is everything here. The watchdog is up and has said so before the freeze is written, so there is no instant
//! at which the death of this process leaves the container frozen. The guard thread watches the watchdog in turn. And
//! a container that somebody else had frozen is left as it was.
//!
//! What cannot be seen from here: somebody who pauses the same container *while* it is frozen writes the very same
//! setting, and the thaw undoes it.
#![allow(
    clippy::unnecessary_debug_formatting,
    reason = "control characters in paths are escaped that way"
)]

mod cgroup;
mod direct;
mod mapped;
mod mark;
mod members;
mod watchdog;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cgroup::{Group, State, Version};
pub use direct::{Ways, ways_to_write};
pub use mapped::{SharedMapping, shared_mappings};
pub use mark::{Left, thaw_left};
pub use members::Stranger;
use members::{Processes, Stat};
use watchdog::Watchdog;
pub use watchdog::{
    ARGUMENT as WATCHDOG_ARGUMENT, StandBy, entry as watchdog_entry, stand_by, watchdog_main,
};

/// Strangers in a container's cgroup are looked at again before they are a reason to refuse: `exec` into a container
/// enters the cgroup first and the container's root milliseconds later.
const STRANGER_LOOKS: u32 = 10;
const STRANGER_PAUSE: Duration = Duration::from_millis(30);

/// Why a container was not frozen, or did not stay so.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cgroup's files may not be written.
    #[error(
        "not permitted to freeze: {path:?}: {source}; run as root with the cgroup file system writable, or use --pause none"
    )]
    NotPermitted {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no freezer for this process on this machine.
    #[error("this container cannot be frozen: {why}; use --pause none")]
    Unsupported {
        /// In words, for people.
        why: String,
    },
    /// The container's cgroup holds processes that are not the container's.
    #[error("cgroup {cgroup:?} holds processes that are not the container's: {}; they would be frozen too, use --pause none", list(.strangers))]
    Shared {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// Whose they are.
        strangers: Vec<Stranger>,
    },
    /// This program is in the cgroup that it was to freeze.
    #[error(
        "this program runs in the container's own cgroup {cgroup:?} and would freeze itself; run it from elsewhere, or use --pause none"
    )]
    WouldFreezeSelf {
        /// The cgroup's directory.
        cgroup: PathBuf,
    },
    /// The processes did not stop (or did not start again) in time. They run.
    #[error("{cgroup:?} did not {wanted} within {waited:?}; the container runs")]
    Timeout {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// How long it was waited for.
        waited: Duration,
        /// `freeze` or `thaw`.
        wanted: &'static str,
    },
    /// The container ran before it was thawed: what was read meanwhile may be torn.
    #[error("the container did not stay frozen: {why}")]
    NotHeld {
        /// In words, for people.
        why: String,
    },
    /// The process or its cgroup is no more.
    #[error("{what} ended")]
    Gone {
        /// What it was, e.g. `process 42`.
        what: String,
    },
    /// Without a watchdog nothing is frozen.
    #[error("the process that guards the freeze did not start: {why}")]
    Watchdog {
        /// In words, for people.
        why: String,
    },
    /// Anything else that the kernel refused.
    #[error("{path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    fn io(path: PathBuf, source: io::Error) -> Self {
        use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        if source.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) {
            // How cgroupfs answers on a descriptor of a cgroup that was removed.
            return Self::Gone {
                what: format!("the container of {:?}", path.parent().unwrap_or(&path)),
            };
        }
        match source.kind() {
            PermissionDenied | ReadOnlyFilesystem => Self::NotPermitted { path, source },
            _ => Self::Io { path, source },
        }
    }

    /// The program's exit code for it, as the design lists them.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Gone { .. } => 66,
            Self::Timeout { .. } | Self::NotHeld { .. } => 75,
            Self::NotPermitted { .. } => 77,
            Self::Unsupported { .. }
            | Self::Shared { .. }
            | Self::WouldFreezeSelf { .. }
            | Self::Watchdog { .. }
            | Self::Io { .. } => 1,
        }
    }

    /// Whether the same save may succeed at another time.
    pub fn retryable(&self) -> bool {
        self.exit_code() == 75
    }
}

fn list(strangers: &[Stranger]) -> String {
    const SHOWN: usize = 5;
    let mut text: Vec<String> = strangers
        .iter()
        .take(SHOWN)
        .map(|s| format!("{} ({})", s.pid, s.name))
        .collect();
    if strangers.len() > SHOWN {
        text.push(format!("{} more", strangers.len() - SHOWN));
    }
    text.join(", ")
}

/// How to freeze.
#[derive(Clone, Debug)]
pub struct Options {
    /// Prefix of the node's `/proc`, and of the cgroup mounts to prefer (`--host-root`); none: `/`.
    pub host_root: Option<PathBuf>,
    /// How long the processes may take to stop.
    pub wait: Duration,
    /// The longest the container may stand still, the wait included; none: no bound.
    pub hold: Option<Duration>,
    /// The program that is started as the watchdog with [`WATCHDOG_ARGUMENT`]: it has to call [`watchdog_entry`].
    pub program: PathBuf,
    /// A file that is there while the container may stand still by this process' doing. Whoever finds it when this
    /// process is dead calls [`thaw_left`].
    pub mark: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host_root: None,
            wait: Duration::from_secs(10),
            hold: None,
            program: PathBuf::from("/proc/self/exe"),
            mark: None,
        }
    }
}

/// A container that stands still until this is dropped.
#[derive(Debug)]
#[must_use = "the container runs again as soon as this is dropped"]
pub struct Frozen {
    group: Arc<Group>,
    target: Target,
    /// None when somebody else froze: then nothing is thawed here.
    watchdog: Option<Watchdog>,
    since: Instant,
    hold: Option<Duration>,
    outside: Vec<u32>,
    mark: Option<PathBuf>,
}

/// Freezes the container of process `pid`, whose start time (field 22 of `/proc/PID/stat`) is `start` where known.
///
/// On return every process of it stands still. On error none was stopped, or all run again.
pub fn freeze(pid: u32, start: Option<u64>, options: &Options) -> Result<Frozen, Error> {
    let proc = options
        .host_root
        .as_deref()
        .unwrap_or(Path::new("/"))
        .join("proc");
    let target = Target { proc, pid, start };
    target.alive()?;
    // The end of a container makes many calls fail; it alone is what is to be said then.
    find_and_stop(&target, options).map_err(|error| target.alive().err().unwrap_or(error))
}

/// Whether [`freeze`] would find something to freeze. Nothing is.
pub fn can_be_frozen(pid: u32, start: Option<u64>, options: &Options) -> Result<(), Error> {
    let proc = options
        .host_root
        .as_deref()
        .unwrap_or(Path::new("/"))
        .join("proc");
    let target = Target { proc, pid, start };
    target.alive()?;
    let look = || {
        let mut processes = Processes::new(&target.proc, pid)?;
        let groups = groups(&target.proc, pid, options.host_root.as_deref())?;
        for group in &groups {
            if group.state()? != State::Running {
                return Ok(());
            }
        }
        let in_root = processes.in_root()?;
        let mut refusals = Vec::new();
        for group in groups {
            match container_group(&group, &target.proc, &mut processes, &in_root) {
                Ok(_) => return Ok(()),
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(best_refusal(refusals))
    };
    look().map_err(|error| target.alive().err().unwrap_or(error))
}

fn find_and_stop(target: &Target, options: &Options) -> Result<Frozen, Error> {
    let (proc, pid) = (&*target.proc, target.pid);
    let mut processes = Processes::new(proc, pid)?;
    let groups = groups(proc, pid, options.host_root.as_deref())?;
    // A container may be frozen in another hierarchy than the one that would be chosen here.
    for group in &groups {
        if group.state()? != State::Running {
            return already_frozen(group, target, options);
        }
    }
    let in_root = processes.in_root()?;
    let mut refusals = Vec::new();
    for group in groups {
        match container_group(&group, proc, &mut processes, &in_root) {
            Ok((group, outside)) => return stop(group, outside, target, options),
            Err(refusal) => refusals.push(refusal),
        }
    }
    Err(best_refusal(refusals))
}

/// The container's first process.
#[derive(Clone, Debug)]
struct Target {
    proc: PathBuf,
    pid: u32,
    start: Option<u64>,
}

impl Target {
    /// Another process in its place would be a stranger's.
    fn alive(&self) -> Result<(), Error> {
        let gone = || Error::Gone {
            what: format!("process {}", self.pid),
        };
        let path = self.proc.join(self.pid.to_string()).join("stat");
        let text = fs::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => gone(),
            _ if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => gone(),
            _ => Error::io(path.clone(), e),
        })?;
        let stat = Stat::parse(&text).ok_or_else(|| Error::Unsupported {
            why: format!("{path:?} is not as proc_pid_stat(5) says"),
        })?;
        let same = self.start.is_none_or(|start| start == stat.start);
        if same && !matches!(stat.state, b'Z' | b'X') {
            Ok(())
        } else {
            Err(gone())
        }
    }
}

/// The cgroups of `pid` that have a freezer and can be opened, the preferred one first.
fn groups(proc: &Path, pid: u32, prefer: Option<&Path>) -> Result<Vec<Arc<Group>>, Error> {
    let read = |path: PathBuf| fs::read(&path).map_err(|e| Error::io(path, e));
    // Our own mount namespace is what paths are opened in, whatever node `proc` shows.
    let mut mounts = cgroup::mounts(&read(PathBuf::from("/proc/self/mountinfo"))?);
    if let Some(prefix) = prefer {
        mounts.sort_by_key(|mount| !mount.point.starts_with(prefix));
        mounts.sort_by_key(|mount| mount.version == Version::V1);
    }
    let text = read(proc.join(pid.to_string()).join("cgroup"))?;
    let mut groups: Vec<Arc<Group>> = Vec::new();
    let mut refusals = Vec::new();
    for mount in &mounts {
        if groups.iter().any(|group| group.version() == mount.version) {
            continue;
        }
        let Some(cgroup) = cgroup::membership(&text, mount.version) else {
            continue;
        };
        let opened = if cgroup == b"/" {
            Err(Error::Unsupported {
                why: format!("process {pid} is in the root cgroup of {:?}", mount.point),
            })
        } else if let Some(dir) = mount.directory(cgroup) {
            Group::open(mount.version, dir)
        } else {
            let cgroup = cgroup.escape_ascii();
            Err(Error::Unsupported {
                why: format!("the cgroup {cgroup} is not to be seen at {:?}", mount.point),
            })
        };
        match opened {
            // Two mounts of one name may show different trees: only the one that lists the process is meant.
            Ok(group) if members::pids_below(group.dir())?.contains(&pid) => {
                groups.push(Arc::new(group));
            }
            Ok(group) => refusals.push(Error::Unsupported {
                why: format!(
                    "process {pid} is not in {:?} as /proc says (other cgroup or PID namespace)",
                    group.dir()
                ),
            }),
            Err(refusal) => refusals.push(refusal),
        }
    }
    if groups.is_empty() {
        Err(best_refusal(refusals))
    } else {
        Ok(groups)
    }
}

/// The one a person can do most about.
fn best_refusal(refusals: Vec<Error>) -> Error {
    let none = || Error::Unsupported {
        why: "no cgroup hierarchy with a freezer is mounted".to_owned(),
    };
    let rank = |error: &Error| match error {
        Error::WouldFreezeSelf { .. } => 0,
        Error::Shared { .. } => 1,
        Error::NotPermitted { .. } => 2,
        Error::Unsupported { .. } => 4,
        _ => 3,
    };
    refusals.into_iter().min_by_key(rank).unwrap_or_else(none)
}

/// Somebody else's freeze: waited for when it is still under way, never undone.
fn already_frozen(group: &Arc<Group>, target: &Target, options: &Options) -> Result<Frozen, Error> {
    if !group.wait_frozen(Instant::now() + options.wait, false)? {
        let cgroup = group.dir().to_owned();
        return Err(Error::Timeout {
            cgroup,
            waited: options.wait,
            wanted: "freeze",
        });
    }
    Ok(Frozen {
        group: Arc::clone(group),
        target: target.clone(),
        watchdog: None,
        since: Instant::now(),
        hold: None,
        outside: Vec::new(),
        mark: None,
    })
}

/// The cgroup to freeze, starting from that of the container's first process, and the container's processes that are
/// in none of it.
///
/// A service manager inside the container moves itself into a child cgroup: then an ancestor holds the whole
/// container, and is taken if it holds nothing else.
fn container_group(
    start: &Arc<Group>,
    proc: &Path,
    processes: &mut Processes,
    in_root: &HashSet<u32>,
) -> Result<(Arc<Group>, Vec<u32>), Error> {
    let mut best = (
        Arc::clone(start),
        check(start.dir(), proc, start.version(), processes)?,
    );
    let count = |members: &HashSet<u32>| members.intersection(in_root).count();
    let mut dir = start.dir().to_owned();
    while count(&best.1) < in_root.len() && dir.pop() {
        let Ok(group) = Group::open(start.version(), dir.clone()) else {
            break;
        };
        let Ok(members) = check(&dir, proc, start.version(), processes) else {
            break;
        };
        if count(&members) > count(&best.1) {
            best = (Arc::new(group), members);
        }
    }
    let mut outside: Vec<u32> = in_root.difference(&best.1).copied().collect();
    outside.sort_unstable();
    Ok((best.0, outside))
}

/// The processes in `dir` and below, if they are all the container's and none is ours.
fn check(
    dir: &Path,
    proc: &Path,
    version: Version,
    processes: &mut Processes,
) -> Result<HashSet<u32>, Error> {
    let ours = fs::read_link(proc.join("self")).map_err(|e| Error::io(proc.join("self"), e))?;
    let ours: Option<u32> = ours.to_str().and_then(|pid| pid.parse().ok());
    let mut looks = 1;
    loop {
        let pids = members::pids_below(dir)?;
        if ours.is_none_or(|pid| pids.contains(&pid)) {
            return Err(Error::WouldFreezeSelf {
                cgroup: dir.to_owned(),
            });
        }
        let strangers = processes.strangers(&pids);
        if strangers.is_empty() {
            return Ok(pids);
        }
        if looks == STRANGER_LOOKS {
            tracing::debug!(cgroup = ?dir, version = version.name(), "strangers in the container's cgroup");
            return Err(Error::Shared {
                cgroup: dir.to_owned(),
                strangers,
            });
        }
        looks += 1;
        std::thread::sleep(STRANGER_PAUSE);
    }
}

fn stop(
    group: Arc<Group>,
    outside: Vec<u32>,
    target: &Target,
    options: &Options,
) -> Result<Frozen, Error> {
    let watchdog = Watchdog::start(
        &options.program,
        &group,
        options.hold,
        options.mark.as_deref(),
    )?;
    let since = Instant::now();
    // From here on the guard's drop thaws, whatever goes wrong.
    let target = target.clone();
    let frozen = Frozen {
        group,
        target,
        watchdog: Some(watchdog),
        since,
        hold: options.hold,
        outside,
        mark: options.mark.clone(),
    };
    if let Some(mark) = &frozen.mark {
        mark::write(mark, &frozen.group)?;
    }
    let wait = options
        .hold
        .map_or(options.wait, |hold| options.wait.min(hold));
    frozen.group.request(true)?;
    if !frozen.group.wait_frozen(since + wait, true)? {
        let cgroup = frozen.group.dir().to_owned();
        return Err(Error::Timeout {
            cgroup,
            waited: wait,
            wanted: "freeze",
        });
    }
    frozen.target.alive()?;
    Ok(frozen)
}

impl Frozen {
    /// Whether somebody else had frozen the container already: then it stays frozen.
    pub fn was_frozen(&self) -> bool {
        self.watchdog.is_none()
    }

    /// The cgroup that stands still.
    pub fn cgroup(&self) -> &Path {
        self.group.dir()
    }

    /// Processes that see the container's root but are not in its cgroup (an administrator's `nsenter`): they go on.
    pub fn outside(&self) -> &[u32] {
        &self.outside
    }

    /// Thaws: the time from the freeze written to the thaw read back; zero when somebody else had frozen.
    ///
    /// [`Error::Gone`] when it was ended while it stood still, [`Error::NotHeld`] when the container ran before, by somebody else's doing or because the longest time to stand
    /// still was over. It runs after every error too, as far as that is in anybody's power.
    pub fn thaw(mut self) -> Result<Duration, Error> {
        let held = self.held();
        if self.watchdog.is_none() {
            return held.map(|()| Duration::ZERO);
        }
        let thawed = self.group.thaw();
        let pause = self.since.elapsed();
        self.release(thawed.is_ok());
        match thawed {
            Ok(()) => held.map(|()| pause),
            Err(error) => Err(self.target.alive().err().unwrap_or(error)),
        }
    }

    /// Whether the container stands still, and has since the freeze as far as can be told.
    pub fn held(&mut self) -> Result<(), Error> {
        let not_held = |why: &str| {
            Err(Error::NotHeld {
                why: why.to_owned(),
            })
        };
        if self.hold.is_some_and(|hold| self.since.elapsed() >= hold) {
            return not_held("it had stood still for as long as it may");
        }
        if self
            .watchdog
            .as_mut()
            .is_some_and(|watchdog| !watchdog.alive())
        {
            return not_held("the process that guards the freeze ended, so it was thawed");
        }
        self.target.alive()?;
        if self.group.state()? != State::Frozen {
            return not_held("somebody else thawed it");
        }
        Ok(())
    }

    fn release(&mut self, thawed: bool) {
        if let Some(mut watchdog) = self.watchdog.take() {
            watchdog.dismiss(thawed);
        }
        if thawed && let Some(mark) = &self.mark {
            mark::remove(mark);
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.watchdog.is_some() {
            let thawed = self.group.thaw();
            self.release(thawed.is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do_and_how_to_exit() {
        let gone = Error::io(
            PathBuf::from("/cg/x/freezer.state"),
            rustix::io::Errno::NODEV.into(),
        );
        assert_eq!(
            (gone.exit_code(), gone.to_string().as_str()),
            (66, "the container of \"/cg/x\" ended")
        );
        let denied = Error::io(PathBuf::from("/cg/x"), rustix::io::Errno::ROFS.into());
        assert_eq!(denied.exit_code(), 77);
        let strangers = (1..=7)
            .map(|pid| Stranger {
                pid,
                name: "sh".to_owned(),
            })
            .collect();
        let shared = Error::Shared {
            cgroup: PathBuf::from("/cg"),
            strangers,
        }
        .to_string();
        assert!(
            shared.contains("5 (sh), 2 more") && shared.contains("--pause none"),
            "{shared}"
        );
    }

    #[test]
    fn the_refusal_shown_is_the_one_to_act_on() {
        let unsupported = || Error::Unsupported { why: String::new() };
        let own = || Error::WouldFreezeSelf {
            cgroup: PathBuf::new(),
        };
        assert!(matches!(
            best_refusal(vec![unsupported(), own()]),
            Error::WouldFreezeSelf { .. }
        ));
        assert!(
            matches!(best_refusal(vec![]), Error::Unsupported { why } if why.contains("mounted"))
        );
    }
}
