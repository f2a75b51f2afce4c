//! The cgroup freezer: freezes a container and returns a guard that thaws it when dropped. A watchdog process thaws it
//! if this process is killed.
//!
//! The order of the steps matters. The watchdog is running and has confirmed so before the freeze is written, so there
//! is no moment at which the death of this process leaves the container frozen. A guard thread in turn watches the
//! watchdog. A container that another program had frozen already is left as it was.
//!
//! One case cannot be detected: a program that pauses the same container *while* it is frozen writes the same setting,
//! and the thaw undoes it.
#![allow(
    clippy::unnecessary_debug_formatting,
    reason = "control characters in paths are escaped that way"
)]

mod cgroup;
mod claim;
mod direct;
mod mapped;
mod mark;
mod members;
mod watchdog;

use crate::common::failure::FailureKind;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cgroup::{Group, State, Version};
pub use claim::{Claim, Claimed, claim};
pub use direct::{WriteModes, write_modes};
pub use mapped::{SharedMapping, shared_mappings};
pub use mark::{ThawOutcome, thaw_leftover};
pub(crate) use members::ForeignProcess;
use members::{Processes, members};
use watchdog::Watchdog;
pub use watchdog::entry as watchdog_entry;
pub(crate) use watchdog::start_standby;

use crate::node::cgroups::Cgroups;
use crate::node::procfs::Stat;

/// Number of times that foreign processes in a container's cgroup are checked before the freeze is refused: `exec` into
/// a container enters the cgroup first and the container's root milliseconds later.
const FOREIGN_CHECKS: u32 = 10;
const FOREIGN_CHECK_INTERVAL: Duration = Duration::from_millis(30);

/// The reason why a container was not frozen, or did not stay frozen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cgroup's files are not writable for this program.
    #[error(
        "not permitted to freeze: {path:?}: {source}; run as root with the cgroup file system writable, or use --pause none"
    )]
    NotPermitted {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// There is no freezer for this process on this machine.
    #[error("this container cannot be frozen: {why}; use --pause none")]
    Unsupported {
        /// The reason, as text for the user.
        why: String,
    },
    /// The cgroup contains processes that do not belong to the container.
    #[error("cgroup {cgroup:?} holds processes that are not the container's: {}; they would be frozen too, use --pause none", list(.foreign_processes))]
    Shared {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// The processes that do not belong to it.
        foreign_processes: Vec<ForeignProcess>,
    },
    /// This program is in the cgroup that it was asked to freeze.
    #[error(
        "this program runs in the container's own cgroup {cgroup:?} and would freeze itself; run it from elsewhere, or use --pause none"
    )]
    WouldFreezeSelf {
        /// The cgroup's directory.
        cgroup: PathBuf,
    },
    /// The processes did not stop, or did not resume, in time. They are running.
    #[error("{cgroup:?} did not {wanted} within {waited:?}; the container is running")]
    Timeout {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// The time waited.
        waited: Duration,
        /// `freeze` or `thaw`.
        wanted: &'static str,
    },
    /// The container ran before it was thawed: what was read meanwhile may be torn.
    #[error("the container did not stay frozen: {why}")]
    ThawedEarly {
        /// The reason, as text for the user.
        why: String,
    },
    /// The process or its cgroup no longer exists.
    #[error("{what} ended")]
    Gone {
        /// What ended, e.g. `process 42`.
        what: String,
    },
    /// The watchdog could not be started. Nothing is frozen without one.
    #[error("the freeze watchdog did not start: {why}")]
    Watchdog {
        /// The reason, as text for the user.
        why: String,
    },
    /// Any other error of the kernel.
    #[error("{path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
}

impl Error {
    fn io(path: PathBuf, source: io::Error) -> Self {
        use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        if source.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) {
            // cgroupfs returns ENODEV on a descriptor of a cgroup that was removed.
            return Self::Gone {
                what: format!("the container of {:?}", path.parent().unwrap_or(&path)),
            };
        }
        match source.kind() {
            PermissionDenied | ReadOnlyFilesystem => Self::NotPermitted { path, source },
            _ => Self::Io { path, source },
        }
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Gone { .. } => FailureKind::ContainerGone,
            Self::Timeout { .. } | Self::ThawedEarly { .. } => FailureKind::Retryable,
            Self::NotPermitted { .. } => FailureKind::NotPermitted,
            Self::Unsupported { .. }
            | Self::Shared { .. }
            | Self::WouldFreezeSelf { .. }
            | Self::Watchdog { .. }
            | Self::Io { .. } => FailureKind::Final,
        }
    }
}

fn list(foreign_processes: &[ForeignProcess]) -> String {
    const SHOWN: usize = 5;
    let mut text: Vec<String> = foreign_processes
        .iter()
        .take(SHOWN)
        .map(|s| format!("{} ({})", s.pid, s.name))
        .collect();
    if foreign_processes.len() > SHOWN {
        text.push(format!("{} more", foreign_processes.len() - SHOWN));
    }
    text.join(", ")
}

/// The options of a freeze.
#[derive(Clone, Debug)]
pub struct Options {
    /// Prefix of the node's `/proc`, and of the cgroup mounts to prefer (`--host-root`). `None` stands for `/`.
    pub host_root: Option<PathBuf>,
    /// Timeout for the processes to stop.
    pub wait: Duration,
    /// The longest time for which the container may be frozen, including the wait. `None` means no limit.
    pub max_duration: Option<Duration>,
    /// The program that is started as the watchdog with `watchdog::ARGUMENT`. It must call [`watchdog_entry`].
    pub program: PathBuf,
    /// A file that exists while the container may be frozen by this process. If this process is dead and the file still
    /// exists, call [`thaw_leftover`].
    pub mark: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host_root: None,
            wait: Duration::from_secs(10),
            max_duration: None,
            program: PathBuf::from("/proc/self/exe"),
            mark: None,
        }
    }
}

/// A container that stays frozen until this is dropped.
#[derive(Debug)]
#[must_use = "the container runs again as soon as this is dropped"]
pub struct Frozen {
    group: Arc<Group>,
    target: Target,
    /// `None` if another program froze the container: nothing is thawed then.
    watchdog: Option<Watchdog>,
    since: Instant,
    max_duration: Option<Duration>,
    outside: Vec<u32>,
    mark: Option<PathBuf>,
}

/// Freezes the container of process `pid`, whose start time (field 22 of `/proc/PID/stat`) is `start` if known.
///
/// On return all its processes have stopped. On error none was stopped, or all are running again.
pub fn freeze(pid: u32, start: Option<u64>, options: &Options) -> Result<Frozen, Error> {
    let proc = options
        .host_root
        .as_deref()
        .unwrap_or(Path::new("/"))
        .join("proc");
    let target = Target { proc, pid, start };
    target.alive()?;
    // The end of a container makes many calls fail. Only the end is reported then.
    find_and_freeze(&target, options).map_err(|error| target.alive().err().unwrap_or(error))
}

/// Checks whether [`freeze`] could freeze the container, without freezing it.
pub(crate) fn can_be_frozen(pid: u32, start: Option<u64>, options: &Options) -> Result<(), Error> {
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

fn find_and_freeze(target: &Target, options: &Options) -> Result<Frozen, Error> {
    let (proc, pid) = (&*target.proc, target.pid);
    let mut processes = Processes::new(proc, pid)?;
    let groups = groups(proc, pid, options.host_root.as_deref())?;
    // The container may be frozen in a hierarchy other than the one that would be chosen here.
    for group in &groups {
        if group.state()? != State::Running {
            return already_frozen(group, target, options);
        }
    }
    let in_root = processes.in_root()?;
    let mut refusals = Vec::new();
    for group in groups {
        match container_group(&group, proc, &mut processes, &in_root) {
            Ok((group, outside)) => return freeze_group(group, outside, target, options),
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
    /// Fails if the process is gone or its PID was reused by another process.
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
        if same && stat.is_alive() {
            Ok(())
        } else {
            Err(gone())
        }
    }
}

/// Returns the cgroups of `pid` that have a freezer and can be opened, the preferred one first.
fn groups(proc: &Path, pid: u32, prefer: Option<&Path>) -> Result<Vec<Arc<Group>>, Error> {
    // Paths are opened in this program's own mount namespace, whichever node `proc` belongs to.
    let own = Cgroups::own().map_err(|e| Error::io(PathBuf::from("/proc/self/mountinfo"), e))?;
    let path = proc.join(pid.to_string()).join("cgroup");
    let text = fs::read(&path).map_err(|e| Error::io(path, e))?;
    let of_node = own.memberships(&text);
    let mut mounts = cgroup::mounts(own.mounts);
    if let Some(prefix) = prefer {
        mounts.sort_by_key(|mount| !mount.point.starts_with(prefix));
        mounts.sort_by_key(|mount| mount.version == Version::V1);
    }
    let mut groups: Vec<Arc<Group>> = Vec::new();
    let mut refusals = Vec::new();
    for mount in &mounts {
        if groups.iter().any(|group| group.version() == mount.version) {
            continue;
        }
        let of_version = |text| cgroup::membership(text, mount.version);
        let (Some(name), Some(cgroup)) = (of_version(&text), of_version(&of_node)) else {
            continue;
        };
        let opened = if cgroup == b"/" {
            Err(Error::Unsupported {
                why: format!("process {pid} is in the root cgroup of {:?}", mount.point),
            })
        } else if let Some(dir) = mount.directory(cgroup) {
            let path = PathBuf::from(OsStr::from_bytes(name));
            Group::open_named(mount.version, dir, path)
        } else {
            let cgroup = cgroup.escape_ascii();
            Err(Error::Unsupported {
                why: format!("the cgroup {cgroup} is not to be seen at {:?}", mount.point),
            })
        };
        match opened {
            // Two mounts of the same name may show different trees: only the one that lists the process is the right
            // one.
            Ok(group) if members(proc, &group)?.contains(&pid) => {
                groups.push(Arc::new(group));
            }
            Ok(group) => refusals.push(Error::Unsupported {
                why: format!(
                    "process {pid} is not in {:?} as /proc says (other cgroup or PID namespace; in a pod, set hostPID: true)",
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

/// Returns the error that the user can most likely resolve.
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

/// Handles a freeze by another program: waits for it if it is still in progress, and never undoes it.
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
        max_duration: None,
        outside: Vec::new(),
        mark: None,
    })
}

/// Returns the cgroup to freeze, starting from that of the container's first process, and the container's processes
/// outside it.
///
/// A service manager inside the container moves itself into a child cgroup. An ancestor then holds the whole container,
/// and is chosen if it holds nothing else.
fn container_group(
    start: &Arc<Group>,
    proc: &Path,
    processes: &mut Processes,
    in_root: &HashSet<u32>,
) -> Result<(Arc<Group>, Vec<u32>), Error> {
    let mut best = (Arc::clone(start), check(start, proc, processes)?);
    let count = |members: &HashSet<u32>| members.intersection(in_root).count();
    let (mut dir, mut cgroup) = (start.dir().to_owned(), start.cgroup().to_owned());
    while count(&best.1) < in_root.len() && dir.pop() && cgroup.pop() {
        let Ok(group) = Group::open_named(start.version(), dir.clone(), cgroup.clone()) else {
            break;
        };
        let Ok(members) = check(&group, proc, processes) else {
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

/// Returns the processes in `group` and below if all belong to the container and none is this program.
fn check(group: &Group, proc: &Path, processes: &mut Processes) -> Result<HashSet<u32>, Error> {
    let (dir, version) = (group.dir(), group.version());
    let ours = fs::read_link(proc.join("self")).map_err(|e| Error::io(proc.join("self"), e))?;
    let ours: Option<u32> = ours.to_str().and_then(|pid| pid.parse().ok());
    let mut looks = 1;
    loop {
        let pids = members(proc, group)?;
        if ours.is_none_or(|pid| pids.contains(&pid)) {
            return Err(Error::WouldFreezeSelf {
                cgroup: dir.to_owned(),
            });
        }
        let foreign_processes = processes.foreign_processes(&pids);
        if foreign_processes.is_empty() {
            return Ok(pids);
        }
        if looks == FOREIGN_CHECKS {
            tracing::debug!(cgroup = ?dir, version = version.name(), "foreign processes in the container's cgroup");
            return Err(Error::Shared {
                cgroup: dir.to_owned(),
                foreign_processes,
            });
        }
        looks += 1;
        std::thread::sleep(FOREIGN_CHECK_INTERVAL);
    }
}

fn freeze_group(
    group: Arc<Group>,
    outside: Vec<u32>,
    target: &Target,
    options: &Options,
) -> Result<Frozen, Error> {
    let watchdog = Watchdog::start(
        &options.program,
        &group,
        options.max_duration,
        options.mark.as_deref(),
    )?;
    let since = Instant::now();
    // From here on, dropping the guard thaws the container on every error.
    let target = target.clone();
    let frozen = Frozen {
        group,
        target,
        watchdog: Some(watchdog),
        since,
        max_duration: options.max_duration,
        outside,
        mark: options.mark.clone(),
    };
    if let Some(mark) = &frozen.mark {
        mark::write(mark, &frozen.group)?;
    }
    let wait = options
        .max_duration
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
    /// Returns whether another program had already frozen the container. It then stays frozen.
    pub fn was_frozen(&self) -> bool {
        self.watchdog.is_none()
    }

    /// Returns the directory of the frozen cgroup.
    pub fn cgroup(&self) -> &Path {
        self.group.dir()
    }

    /// Returns the processes that have the container's root but are not in its cgroup (an administrator's `nsenter`).
    /// They keep running.
    pub fn processes_outside(&self) -> &[u32] {
        &self.outside
    }

    /// Thaws the container. Returns the time from the write of the freeze to the read-back of the thaw; zero if another
    /// program had frozen it.
    ///
    /// Fails with [`Error::Gone`] if the container was ended while it was frozen, and with [`Error::ThawedEarly`] if it ran
    /// before, because another program thawed it or the longest time to be frozen had passed. The container runs after
    /// an error too, unless the thaw itself cannot be carried out.
    pub fn thaw(mut self) -> Result<Duration, Error> {
        let held = self.check_frozen();
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

    /// Checks that the container is frozen and, as far as can be determined, has been since the freeze.
    pub fn check_frozen(&mut self) -> Result<(), Error> {
        let not_held = |why: &str| {
            Err(Error::ThawedEarly {
                why: why.to_owned(),
            })
        };
        if self
            .max_duration
            .is_some_and(|hold| self.since.elapsed() >= hold)
        {
            return not_held("it was frozen for the longest time allowed");
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
            return not_held("another program thawed it");
        }
        Ok(())
    }

    fn release(&mut self, thawed: bool) {
        if let Some(mut watchdog) = self.watchdog.take() {
            watchdog.stop(thawed);
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
            (gone.kind(), gone.to_string().as_str()),
            (
                FailureKind::ContainerGone,
                "the container of \"/cg/x\" ended"
            )
        );
        let denied = Error::io(PathBuf::from("/cg/x"), rustix::io::Errno::ROFS.into());
        assert_eq!(denied.kind(), FailureKind::NotPermitted);
        let foreign_processes = (1..=7)
            .map(|pid| ForeignProcess {
                pid,
                name: "sh".to_owned(),
            })
            .collect();
        let shared = Error::Shared {
            cgroup: PathBuf::from("/cg"),
            foreign_processes,
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
