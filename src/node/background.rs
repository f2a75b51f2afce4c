//! Work that nobody else on the node is to feel: it takes the share of the cores that is left over, and that of the disks
//! where they are shared out by cgroup; but for the moments in which a container stands still for it.
//!
//! Weights of processes count within their cgroup only, and pods have cgroups of their own: so the process moves into
//! one at the top of the hierarchy that counts as idle as a whole (`cpu.idle`, Linux 5.15), or weighs the least. Its
//! threads are nice besides, which is what holds where no such cgroup can be had, and orders their disk I/O last within
//! the best-effort class (`ioprio_set(2)`). Where others leave nothing for long, the group gets a floor.
//!
//! Sources: kernel `Documentation/admin-guide/cgroup-v2.rst` (`cpu.idle`, `cpu.weight`, `io.weight`, `io.prio.class`),
//! `cgroups(7)`, `sched(7)` (autogroup and group scheduling).

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::process::Pid;

use crate::node::overlay::mount::{MountInfo, parse_mountinfo};

mod floor;
mod memory;

pub use memory::Bound;

/// The cgroup in which such processes are. It stays: empty it costs nothing.
const GROUP: &str = "upperdeck-idle";
/// The same for processes at the usual priority whose memory is bounded.
const NORMAL: &str = "upperdeck-saves";
/// In the idle group of the unified hierarchy, where processes are without a bound on their memory: a group with groups
/// that share out memory holds none itself.
const UNBOUNDED: &str = "unbounded";
/// The least there is.
const NICEST: i32 = 19;
/// Per cent of the node's cores that all processes in the background get together, where others want every core.
pub const FLOOR: f64 = 2.0;

/// This process, as one that nobody is to feel.
#[derive(Clone, Debug)]
pub struct Background(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `cgroup.procs` of the idle groups and of those that it came from, pair by pair.
    groups: Vec<(PathBuf, PathBuf)>,
    /// How nice it was.
    usual: i32,
    /// What it came to.
    holds: Holds,
}

/// What a process' place in the background rests on, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// A cgroup that runs when no other wants to.
    Idle,
    /// A cgroup that weighs the least.
    Weight,
    /// Niceness alone: it counts within its cgroup and not against pods.
    Nice,
}

/// The usual share, until it is dropped.
#[derive(Debug)]
#[must_use = "the process is back in the background as soon as this is dropped"]
pub struct Hurry(Background);

impl Background {
    /// Moves this process there, and bounds its memory where that is asked for. `host_root`: cgroup file systems that are
    /// mounted below it are the node's. `floor`: per cent of all cores that it gets in the end, whatever others want; 0:
    /// nothing.
    ///
    /// What cannot be had is done without: see [`Background::holds`].
    pub fn enter(host_root: Option<&Path>, bound: Option<&Bound>, floor: f64) -> Self {
        let bounded = bound.and_then(|bound| bound.hold(host_root, true));
        let read = |path: &str| fs::read(path).unwrap_or_default();
        let mounts = parse_mountinfo(&read("/proc/self/mountinfo")).unwrap_or_default();
        let own = read("/proc/self/cgroup");
        let mut groups = Vec::new();
        let mut holds = Holds::Nice;
        let mut shared = None;
        for place in places(&mounts, &own, host_root) {
            if let Some(held) = prepare(&place) {
                // The memory and blkio hierarchies of v1 make no idle group by themselves.
                if place.cpu {
                    holds = held;
                    shared = Some(place.idle.clone());
                }
                let procs = |dir: &Path| dir.join("cgroup.procs");
                let idle = if place.unified {
                    bounded.clone().unwrap_or_else(|| unbounded(&place.idle))
                } else {
                    place.idle
                };
                groups.push((procs(&idle), procs(&place.own)));
            }
        }
        let usual = rustix::process::getpriority_process(None).unwrap_or(0);
        let background = Self(Arc::new(Inner {
            groups,
            usual,
            holds,
        }));
        background.relax();
        if let Some(dir) = shared.filter(|_| floor > 0.0) {
            background.keep_floor(dir, floor);
        }
        tracing::debug!(
            ?holds,
            groups = background.0.groups.len(),
            "in the background"
        );
        background
    }

    /// Bounds the memory of this process, which stays at its usual priority.
    pub fn bound_only(host_root: Option<&Path>, bound: &Bound) {
        bound.hold(host_root, false);
    }

    /// What it rests on.
    pub fn holds(&self) -> Holds {
        self.0.holds
    }

    /// The usual share of everything, for work that somebody waits for.
    pub fn hurry(&self) -> Hurry {
        for (_, usual) in &self.0.groups {
            join(usual);
        }
        set_nice(self.0.usual);
        Hurry(self.clone())
    }

    /// By a thread of its own, which ends with this.
    fn keep_floor(&self, dir: PathBuf, percent: f64) {
        let of = Arc::downgrade(&self.0);
        let group = floor::Group::new(dir);
        let keep = move || floor::keep(group, percent, &of);
        let started = std::thread::Builder::new()
            .name("floor".to_owned())
            .spawn(keep);
        if let Err(error) = started {
            tracing::debug!(%error, "in the background without a floor");
        }
    }

    fn relax(&self) {
        for (idle, _) in &self.0.groups {
            join(idle);
        }
        set_nice(NICEST);
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.relax();
    }
}

/// All threads of this process.
fn join(procs: &Path) {
    if let Err(error) = fs::write(procs, "0") {
        tracing::debug!(path = %procs.display(), %error, "cannot move to this cgroup");
    }
}

/// Niceness is a thread's; new threads have that of the one that makes them.
fn set_nice(nice: i32) {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return;
    };
    let tasks = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    for task in tasks.filter_map(Pid::from_raw) {
        // Fails for a thread that has ended, and upwards without the capability.
        let _ = rustix::process::setpriority_process(Some(task), nice);
    }
}

/// An idle group in one hierarchy, and the group that this process is in there.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    idle: PathBuf,
    own: PathBuf,
    cpu: bool,
    unified: bool,
}

/// A hierarchy that this process is in.
struct Hierarchy<'a> {
    /// The mount that shows the most of it.
    mount: &'a MountInfo,
    /// This process' group there.
    path: PathBuf,
    /// The first of the wanted controllers that it has.
    controller: &'a str,
    unified: bool,
}

/// The hierarchies that have one of `wanted`, and the unified one, from `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn hierarchies<'a>(
    mounts: &'a [MountInfo],
    own: &[u8],
    host_root: Option<&'a Path>,
    wanted: &'a [&'a str],
) -> impl Iterator<Item = Hierarchy<'a>> {
    let own = String::from_utf8_lossy(own).into_owned();
    let lines: Vec<String> = own.lines().map(str::to_owned).collect();
    lines.into_iter().flat_map(move |line| {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            return Vec::new();
        };
        let unified = id == "0" && controllers.is_empty();
        let has = |name: &&&str| {
            controllers
                .split(',')
                .any(|controller| controller == **name)
        };
        let Some(controller) = wanted
            .iter()
            .find(has)
            .or_else(|| wanted.first().filter(|_| unified))
        else {
            return Vec::new();
        };
        let fits = |mount: &&MountInfo| {
            if unified {
                return mount.fs_type == "cgroup2";
            }
            let mut options = mount.super_options.split(|&b| b == b',');
            mount.fs_type == "cgroup" && options.any(|option| option == controller.as_bytes())
        };
        let mut fitting: Vec<&MountInfo> = mounts.iter().filter(fits).collect();
        // The node's own mount shows the whole tree.
        fitting.sort_by_key(|mount| {
            let host = host_root.is_some_and(|root| mount.mount_point.starts_with(root));
            (mount.root != Path::new("/"), !host)
        });
        let hierarchy = |mount| Hierarchy {
            mount,
            path: PathBuf::from(path),
            controller,
            unified,
        };
        fitting.into_iter().map(hierarchy).collect()
    })
}

/// An idle group in each of the hierarchies that share out cores and disks.
fn places(mounts: &[MountInfo], own: &[u8], host_root: Option<&Path>) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    if own.ends_with(b" (deleted)") {
        return places;
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
        let place = Place {
            idle: hierarchy.mount.mount_point.join(GROUP),
            own: hierarchy.mount.mount_point.join(below),
            cpu: hierarchy.unified || hierarchy.controller == "cpu",
            unified: hierarchy.unified,
        };
        // It is there already.
        let inside = below.components().any(|part| part.as_os_str() == GROUP);
        places.extend((!inside).then_some(place));
    }
    places
}

/// Where in an idle group of the unified hierarchy a process is whose memory is not bounded.
fn unbounded(idle: &Path) -> PathBuf {
    let dir = idle.join(UNBOUNDED);
    let _ = fs::create_dir(&dir);
    if dir.is_dir() { dir } else { idle.to_owned() }
}

/// Makes the group and sets what it has. None where it can share out nothing.
fn prepare(place: &Place) -> Option<Holds> {
    let dir = &place.idle;
    let made = fs::create_dir(dir).is_ok();
    if !made && !dir.is_dir() {
        return None;
    }
    let set = |file: &str, value: &str| {
        let path = dir.join(file);
        // Never made: in cgroupfs a file that is not there is a controller that is not.
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
        (true, ..) => Some(Holds::Idle),
        (false, true, _) => Some(Holds::Weight),
        (false, false, true) if !place.cpu => Some(Holds::Nice),
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
        places(&mounts, own.as_bytes(), host_root.map(Path::new))
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
        // A pod that has the node's file system mounted, and a namespace's own view beside it.
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
        // Nothing leads out of what is mounted.
        assert!(places_of(V1, "0::/../other\n", None).is_empty());
        // It is there already.
        assert!(places_of(V1, "0::/upperdeck-idle\n", None).is_empty());
        assert!(places_of("", "0::/\n", None).is_empty());
    }
}
