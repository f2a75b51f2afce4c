//! Runs this process in the background, so that other programs on the node are not slowed down: it gets the share of
//! the cores that is left over, and of the disks where cgroups control them, except while a container is frozen for it.
//!
//! Weights of processes apply only within their cgroup, and pods have cgroups of their own. The process therefore moves
//! into a cgroup at the top of the hierarchy that is idle as a whole (`cpu.idle`, Linux 5.15) or has the lowest weight.
//! In addition its threads are niced, which takes effect where no such cgroup is available, and puts their disk I/O
//! last within the best-effort class (`ioprio_set(2)`). If other processes leave nothing for a long time, the group
//! gets a minimum share.
//!
//! Sources: kernel `Documentation/admin-guide/cgroup-v2.rst` (`cpu.idle`, `cpu.weight`, `io.weight`, `io.prio.class`),
//! `cgroups(7)`, `sched(7)` (autogroup and group scheduling).

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::Pid;

use crate::node::cgroups::Cgroups;
use crate::node::procfs::{MountInfo, memberships};

mod floor;
mod memory;
#[cfg_attr(
    not(feature = "service"),
    allow(dead_code, reason = "only the service reports the limit")
)]
mod quota;

pub(crate) use memory::MemoryLimit;
#[cfg(feature = "service")]
pub(crate) use quota::{CpuLimit, cpu_limit};

/// Cgroup of background processes. It is never removed; an empty one costs nothing.
const IDLE_CGROUP: &str = "upperdeck-idle";
/// Cgroup of processes at the usual priority whose memory is limited.
const NORMAL_CGROUP: &str = "upperdeck-saves";
/// Child of the idle group in the unified hierarchy, for processes without a memory limit: a cgroup whose children
/// distribute memory cannot contain processes itself.
const UNLIMITED_CGROUP: &str = "unbounded";
/// The highest nice value, which is the lowest priority.
const MAX_NICE: i32 = 19;
/// Minimum share of all background processes together while other processes want every core, in per cent of the node's
/// cores.
pub(crate) const DEFAULT_FLOOR_PERCENT: f64 = 2.0;

/// This process running in the background.
#[derive(Clone, Debug)]
pub(crate) struct Background(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The groups of each hierarchy.
    groups: Vec<Groups>,
    /// The nice value before.
    initial_nice: i32,
    /// Memory limit, which is kept outside the background, too, and where the node's file systems are.
    memory: Option<(MemoryLimit, Option<PathBuf>)>,
    /// Whether the process has left the background for good. Locked while the process moves.
    left: Mutex<bool>,
}

/// `cgroup.procs` files of one hierarchy.
#[derive(Debug)]
struct Groups {
    /// Of an idle group.
    idle: PathBuf,
    /// Of the group that the process came from.
    own: PathBuf,
    /// Of the group for work that another program waits for: the process's own, or if that has a limit on processor
    /// time, one without.
    urgent: PathBuf,
}

/// What a process's background priority is based on, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mechanism {
    /// A cgroup that runs only when no other wants to.
    Idle,
    /// A cgroup with the lowest weight.
    Weight,
    /// Niceness alone, which applies within its cgroup and not against pods.
    Nice,
}

/// The usual priority, until this is dropped.
#[derive(Debug)]
#[must_use = "the process is back in the background as soon as this is dropped"]
pub(crate) struct NormalPriority(Background);

impl Background {
    /// Moves this process to the background, and limits its memory if `bound` is given. Cgroup file systems mounted
    /// below `host_root` are the node's. `floor` is the minimum share in per cent of all cores that it gets after a
    /// while, whatever other processes want; 0 means none.
    ///
    /// Whatever is not available is left out.
    pub(crate) fn enter(host_root: Option<&Path>, bound: Option<&MemoryLimit>, floor: f64) -> Self {
        let bounded = bound.and_then(|bound| bound.apply(host_root, true));
        let (mounts, own) = own_cgroups();
        let mut groups = Vec::new();
        let mut mechanism = Mechanism::Nice;
        let mut shared = None;
        for place in idle_cgroups(&mounts, &own, host_root) {
            if let Some(held) = prepare(&place) {
                // The memory and blkio hierarchies of v1 alone do not make a group idle.
                if place.cpu {
                    mechanism = held;
                    shared = Some(place.idle.clone());
                }
                let procs = |dir: &Path| dir.join("cgroup.procs");
                let urgent = place.without_limit().unwrap_or_else(|| place.own.clone());
                let idle = if place.unified {
                    bounded.clone().unwrap_or_else(|| unbounded(&place.idle))
                } else {
                    place.idle
                };
                groups.push(Groups {
                    idle: procs(&idle),
                    own: procs(&place.own),
                    urgent: procs(&urgent),
                });
            }
        }
        let initial_nice = rustix::process::getpriority_process(None).unwrap_or(0);
        let background = Self(Arc::new(Inner {
            groups,
            initial_nice,
            memory: bound.map(|bound| (bound.clone(), host_root.map(Path::to_owned))),
            left: Mutex::new(false),
        }));
        background.lower_priority();
        if let Some(dir) = shared.filter(|_| floor > 0.0) {
            background.start_floor_thread(dir, floor);
        }
        tracing::debug!(
            ?mechanism,
            groups = background.0.groups.len(),
            "in the background"
        );
        background
    }

    /// Limits the memory of this process, which keeps its usual priority.
    pub(crate) fn limit_memory(host_root: Option<&Path>, bound: &MemoryLimit) {
        bound.apply(host_root, false);
    }

    /// Returns to the usual share of everything, for work that another program waits for. A limit on processor time, as
    /// of a pod, does not apply to it where the process can leave the limited cgroup.
    pub(crate) fn normal_priority(&self) -> NormalPriority {
        let left = self.left();
        if !*left {
            self.raise_priority(|groups| &groups.urgent);
        }
        drop(left);
        NormalPriority(self.clone())
    }

    /// Leaves the background for good, with the same memory limit.
    pub(crate) fn leave(&self) {
        let mut left = self.left();
        if std::mem::replace(&mut *left, true) {
            return;
        }
        self.raise_priority(|groups| &groups.own);
        if let Some((bound, host_root)) = &self.0.memory {
            bound.apply(host_root.as_deref(), false);
        }
        tracing::debug!("out of the background, as asked for");
    }

    fn left(&self) -> MutexGuard<'_, bool> {
        self.0.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise_priority(&self, group: impl Fn(&Groups) -> &PathBuf) {
        for groups in &self.0.groups {
            join(group(groups));
        }
        set_nice(self.0.initial_nice);
    }

    /// Starts a thread that maintains the floor. It ends with this value.
    fn start_floor_thread(&self, dir: PathBuf, percent: f64) {
        let of = Arc::downgrade(&self.0);
        let group = floor::Group::new(dir);
        let keep = move || floor::maintain(group, percent, &of);
        let started = std::thread::Builder::new()
            .name("floor".to_owned())
            .spawn(keep);
        if let Err(error) = started {
            tracing::debug!(%error, "in the background without a floor");
        }
    }

    fn lower_priority(&self) {
        for groups in &self.0.groups {
            join(&groups.idle);
        }
        set_nice(MAX_NICE);
    }
}

impl Drop for NormalPriority {
    fn drop(&mut self) {
        let left = self.0.left();
        if !*left {
            self.0.lower_priority();
        }
    }
}

/// Moves all threads of this process.
fn join(procs: &Path) {
    if let Err(error) = fs::write(procs, "0") {
        tracing::debug!(path = %procs.display(), %error, "cannot move to this cgroup");
    }
}

/// Sets the nice value of all threads. Niceness is an attribute of a thread; new threads inherit that of their creator.
fn set_nice(nice: i32) {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return;
    };
    let tasks = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    for task in tasks.filter_map(Pid::from_raw) {
        // Fails for a thread that has ended, and without the capability when the priority is raised.
        let _ = rustix::process::setpriority_process(Some(task), nice);
    }
}

/// An idle group in one hierarchy, and this process's own group there.
#[derive(Debug, PartialEq, Eq)]
struct IdleCgroup {
    idle: PathBuf,
    own: PathBuf,
    cpu: bool,
    unified: bool,
}

impl IdleCgroup {
    /// Returns a group that is not limited, if this process's own or one above it is.
    fn without_limit(&self) -> Option<PathBuf> {
        let top = self.idle.parent().filter(|_| self.cpu)?;
        quota::lowest(&self.own, top)?;
        quota::freezing_cgroup(top)
    }
}

/// Returns this process's mounts and the text of its `/proc/self/cgroup`, with the node's paths; nothing that cannot be
/// read.
fn own_cgroups() -> (Vec<MountInfo>, Vec<u8>) {
    let own = fs::read("/proc/self/cgroup").unwrap_or_default();
    match Cgroups::own() {
        Ok(cgroups) => {
            let own = cgroups.memberships(&own);
            (cgroups.mounts, own)
        }
        Err(_) => (Vec::new(), own),
    }
}

/// A hierarchy that this process belongs to.
struct Hierarchy<'a> {
    /// The mount that shows the largest part of it.
    mount: &'a MountInfo,
    /// This process's group in it.
    path: PathBuf,
    /// The first of the wanted controllers that it has.
    controller: &'a str,
    unified: bool,
}

/// Returns the hierarchies that have one of `wanted`, and the unified one, from `/proc/self/mountinfo` and
/// `/proc/self/cgroup`.
fn hierarchies<'a>(
    mounts: &'a [MountInfo],
    own: &[u8],
    host_root: Option<&'a Path>,
    wanted: &'a [&'a str],
) -> impl Iterator<Item = Hierarchy<'a>> {
    memberships(own).flat_map(move |member| {
        let has = |name: &&&str| member.has(name);
        let Some(controller) = wanted
            .iter()
            .find(has)
            .or_else(|| wanted.first().filter(|_| member.unified))
        else {
            return Vec::new();
        };
        let fits = |mount: &&MountInfo| {
            if member.unified {
                return mount.fs_type == "cgroup2";
            }
            mount.fs_type == "cgroup" && mount.has_super_option(controller.as_bytes())
        };
        let mut fitting: Vec<&MountInfo> = mounts.iter().filter(fits).collect();
        // The node's own mount shows the whole tree.
        fitting.sort_by_key(|mount| {
            let host = host_root.is_some_and(|root| mount.mount_point.starts_with(root));
            (mount.root != Path::new("/"), !host)
        });
        let hierarchy = |mount| Hierarchy {
            mount,
            path: PathBuf::from(OsStr::from_bytes(member.path)),
            controller,
            unified: member.unified,
        };
        fitting.into_iter().map(hierarchy).collect()
    })
}

/// Returns an idle group for each of the hierarchies that distribute cores and disks.
fn idle_cgroups(mounts: &[MountInfo], own: &[u8], host_root: Option<&Path>) -> Vec<IdleCgroup> {
    let mut idle_cgroups: Vec<IdleCgroup> = Vec::new();
    if own.ends_with(b" (deleted)") {
        return idle_cgroups;
    }
    let mut known = Vec::new();
    for hierarchy in hierarchies(mounts, own, host_root, &["cpu", "blkio"]) {
        let kind = (hierarchy.controller, hierarchy.unified);
        if known.contains(&kind) {
            continue;
        }
        let Ok(below) = hierarchy.path.strip_prefix(&hierarchy.mount.root) else {
            continue;
        };
        if !below
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            continue;
        }
        known.push(kind);
        let place = IdleCgroup {
            idle: hierarchy.mount.mount_point.join(IDLE_CGROUP),
            own: hierarchy.mount.mount_point.join(below),
            cpu: hierarchy.unified || hierarchy.controller == "cpu",
            unified: hierarchy.unified,
        };
        // The process is in an idle group already.
        let inside = below
            .components()
            .any(|part| part.as_os_str() == IDLE_CGROUP);
        idle_cgroups.extend((!inside).then_some(place));
    }
    idle_cgroups
}

/// Returns the child of an idle group of the unified hierarchy for a process without a memory limit.
fn unbounded(idle: &Path) -> PathBuf {
    let dir = idle.join(UNLIMITED_CGROUP);
    let _ = fs::create_dir(&dir);
    if dir.is_dir() { dir } else { idle.to_owned() }
}

/// Creates the group and sets its attributes. Returns `None` if it can control nothing.
fn prepare(place: &IdleCgroup) -> Option<Mechanism> {
    let dir = &place.idle;
    let made = fs::create_dir(dir).is_ok();
    if !made && !dir.is_dir() {
        return None;
    }
    let set = |file: &str, value: &str| {
        let path = dir.join(file);
        // The file is never created: in cgroupfs, a missing file means a missing controller.
        path.exists() && fs::write(path, value).is_ok()
    };
    let disks = [
        set("io.weight", "default 1"),
        set("io.bfq.weight", "1"),
        set("blkio.bfq.weight", "1"),
        set("io.prio.class", "idle"),
        set("blkio.prio.class", "idle"),
    ];
    let weighed = set("cpu.weight", "1") || set("cpu.shares", "2");
    let idle = set("cpu.idle", "1");
    match (idle, weighed, disks.contains(&true)) {
        (true, ..) => Some(Mechanism::Idle),
        (false, true, _) => Some(Mechanism::Weight),
        (false, false, true) if !place.cpu => Some(Mechanism::Nice),
        _ => {
            if made {
                let _ = fs::remove_dir(dir);
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    const V1: &str = "30 1 0:30 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        31 1 0:31 / /cg/blkio rw - cgroup cgroup rw,blkio\n\
        32 1 0:32 / /cg/unified rw - cgroup2 cgroup2 rw\n";

    fn places_of(
        mountinfo: &str,
        own: &str,
        host_root: Option<&str>,
    ) -> Vec<(String, String, bool)> {
        let mounts = parse_mountinfo(mountinfo.as_bytes()).unwrap_or_default();
        let shown = |path: PathBuf| path.display().to_string();
        idle_cgroups(&mounts, own.as_bytes(), host_root.map(Path::new))
            .into_iter()
            .map(|place| (shown(place.idle), shown(place.own), place.cpu))
            .collect()
    }

    #[test]
    fn the_group_is_at_the_top_of_each_hierarchy_that_shares_out() {
        let place = |idle: &str, own: &str, cpu| (idle.to_owned(), own.to_owned(), cpu);
        let idle = "upperdeck-idle";
        assert_eq!(
            places_of(
                V1,
                "4:memory:/x\n3:cpu,cpuacct:/kube/a\n2:blkio:/\n0::/kube/a\n",
                None
            ),
            [
                place(&format!("/cg/cpu/{idle}"), "/cg/cpu/kube/a", true),
                place(&format!("/cg/blkio/{idle}"), "/cg/blkio/", false),
                place(&format!("/cg/unified/{idle}"), "/cg/unified/kube/a", true),
            ]
        );
        // A pod that has the node's file system mounted in addition to the view of its own namespace.
        let pod = "40 1 0:32 /kube/a /sys/fs/cgroup rw - cgroup2 cgroup rw\n\
            41 1 0:32 / /host/sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(
            places_of(pod, "0::/kube/a\n", Some("/host")),
            [place(
                &format!("/host/sys/fs/cgroup/{idle}"),
                "/host/sys/fs/cgroup/kube/a",
                true
            )]
        );
        // A path must not lead out of the mount.
        assert!(places_of(V1, "0::/../other\n", None).is_empty());
        // The process is in the idle group already.
        assert!(places_of(V1, "0::/upperdeck-idle\n", None).is_empty());
        assert!(places_of("", "0::/\n", None).is_empty());
    }
}
