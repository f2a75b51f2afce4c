//! Lists the processes of a cgroup and decides whether all of them belong to the container.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::Error;
use super::cgroup::{Group, Version, membership};
use crate::node::procfs::Stat;

/// Maximum number of cgroups below one container. A container that may create cgroups must not make this walk endless.
const MAX_CGROUPS: usize = 100_000;

/// A process in the container's cgroup that does not belong to the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignProcess {
    /// Process ID.
    pub pid: u32,
    /// Process name (`/proc/PID/comm`), with control characters escaped.
    pub name: String,
}

/// Facts about processes, each read once.
pub(super) struct Processes {
    proc: PathBuf,
    target: u32,
    mount_namespace: PathBuf,
    /// Set only if the target has a PID namespace other than this program's: everything in it then belongs to the
    /// container.
    pid_namespace: Option<PathBuf>,
    known: HashMap<u32, bool>,
}

impl Processes {
    /// Creates a reader for the container of process `target`. `proc` is the mount point of procfs.
    pub(super) fn new(proc: &Path, target: u32) -> Result<Self, Error> {
        let link = |pid: &str, name: &str| {
            let path = proc.join(pid).join("ns").join(name);
            fs::read_link(&path).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => Error::Gone {
                    what: format!("process {target}"),
                },
                _ => Error::io(path, e),
            })
        };
        let mount_namespace = link(&target.to_string(), "mnt")?;
        let pid_namespace = link(&target.to_string(), "pid")?;
        let ours = link("self", "pid")?;
        Ok(Self {
            proc: proc.to_owned(),
            target,
            mount_namespace,
            pid_namespace: (pid_namespace != ours).then_some(pid_namespace),
            known: HashMap::new(),
        })
    }

    fn path(&self, pid: u32, name: &str) -> PathBuf {
        self.proc.join(pid.to_string()).join(name)
    }

    /// Returns whether a process has the container's root, or `None` if it is gone or a zombie, which does nothing.
    fn shares_root(&self, pid: u32) -> Option<bool> {
        match fs::read_link(self.path(pid, "ns/mnt")) {
            Ok(namespace) => Some(namespace == self.mount_namespace),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Some(false),
            Err(_) => None,
        }
    }

    /// Returns whether a process belongs to the container: it has the container's root, is in its PID namespace, or
    /// descends from a process that does (a container may run containers of its own). A process that is gone belongs.
    fn belongs(&mut self, pid: u32) -> bool {
        let mut chain = Vec::new();
        let mut at = pid;
        let answer = loop {
            if let Some(&known) = self.known.get(&at) {
                break known;
            }
            chain.push(at);
            match self.shares_root(at) {
                None => break at == pid,
                Some(true) => break true,
                Some(false) => {}
            }
            if let Some(wanted) = &self.pid_namespace
                && fs::read_link(self.path(at, "ns/pid"))
                    .is_ok_and(|namespace| namespace == *wanted)
            {
                break true;
            }
            let parent = fs::read(self.path(at, "stat"))
                .ok()
                .and_then(|stat| Stat::parse(&stat))
                .map(|s| s.parent);
            match parent {
                Some(parent) if parent > 1 && !chain.contains(&parent) => at = parent,
                _ => break false,
            }
        };
        self.known
            .extend(chain.into_iter().map(|pid| (pid, answer)));
        answer
    }

    /// Returns those of `pids` that do not belong to the container.
    pub(super) fn foreign_processes(&mut self, pids: &HashSet<u32>) -> Vec<ForeignProcess> {
        // Nothing is cached between calls: a process that is entering the container does not belong to it a moment
        // earlier.
        self.known.clear();
        let mut pids: Vec<u32> = pids
            .iter()
            .copied()
            .filter(|&pid| !self.belongs(pid))
            .collect();
        pids.sort_unstable();
        pids.into_iter()
            .map(|pid| {
                let name = fs::read(self.path(pid, "comm")).unwrap_or_default();
                ForeignProcess {
                    pid,
                    name: name.trim_ascii().escape_ascii().to_string(),
                }
            })
            .collect()
    }

    /// Returns every process on the node that has the container's root, in whatever cgroup.
    pub(super) fn in_root(&self) -> Result<HashSet<u32>, Error> {
        let mut found = HashSet::from([self.target]);
        for entry in fs::read_dir(&self.proc).map_err(|e| Error::io(self.proc.clone(), e))? {
            let entry = entry.map_err(|e| Error::io(self.proc.clone(), e))?;
            if let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
                && self.shares_root(pid) == Some(true)
            {
                found.insert(pid);
            }
        }
        Ok(found)
    }
}

/// Returns the processes of a cgroup and of all its descendants, as they are numbered in `proc`.
///
/// The kernel translates the numbers in a cgroup's files to the reader's PID namespace, in which processes of other
/// namespaces have none. If that is not the namespace of `proc` (a pod without `hostPID` with the node's `/proc`), the
/// members are those processes of `proc` that name the cgroup.
pub(super) fn members(proc: &Path, group: &Group) -> Result<HashSet<u32>, Error> {
    if is_own_namespace(proc) {
        pids_below(group.dir())
    } else {
        pids_naming(proc, group.version(), group.cgroup())
    }
}

/// Returns whether a process, or what is asked of it, does not exist any more.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Returns whether `proc` shows this program's PID namespace, as it does unless the opposite can be seen.
///
/// This program's own status tells it without any right; the namespace of another process cannot always be asked for.
fn is_own_namespace(proc: &Path) -> bool {
    let status = fs::read(proc.join("self/status")).ok();
    if let Some(levels) = status.and_then(|status| levels(&status)) {
        return levels == 1;
    }
    // It is in no namespace that `proc` shows.
    let namespace = |process: &Path| fs::read_link(process.join("ns/pid")).ok();
    let shown = namespace(&proc.join("1"));
    shown.is_none() || shown == namespace(Path::new("/proc/self"))
}

/// Returns in how many PID namespaces a process has a number, from the one that its procfs shows down to its own, as its
/// `status` says.
fn levels(status: &[u8]) -> Option<usize> {
    let line = status
        .split(|&b| b == b'\n')
        .find_map(|line| line.strip_prefix(b"NSpid:"))?;
    let numbers = line.split(u8::is_ascii_whitespace);
    Some(numbers.filter(|number| !number.is_empty()).count())
}

fn pids_naming(proc: &Path, version: Version, cgroup: &Path) -> Result<HashSet<u32>, Error> {
    let mut pids = HashSet::new();
    for entry in fs::read_dir(proc).map_err(|e| Error::io(proc.to_owned(), e))? {
        let entry = entry.map_err(|e| Error::io(proc.to_owned(), e))?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let path = entry.path().join("cgroup");
        let text = match fs::read(&path) {
            Ok(text) => text,
            // The process ended meanwhile.
            Err(e) if is_gone(&e) => continue,
            Err(e) => return Err(Error::io(path, e)),
        };
        let path = membership(&text, version).map(|path| Path::new(OsStr::from_bytes(path)));
        if path.is_some_and(|path| path.starts_with(cgroup)) {
            pids.insert(pid);
        }
    }
    Ok(pids)
}

/// Returns the processes of a cgroup and of all its descendants. 0 stands for processes of PID namespaces that are not
/// visible from here.
pub(super) fn pids_below(dir: &Path) -> Result<HashSet<u32>, Error> {
    let mut pids = HashSet::new();
    let mut seen = 0;
    for entry in walkdir::WalkDir::new(dir) {
        let entry = match entry.map_err(io::Error::from) {
            Ok(entry) => entry,
            // The cgroup was removed meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io(dir.to_owned(), e)),
        };
        if !entry.file_type().is_dir() {
            continue;
        }
        seen += 1;
        if seen > MAX_CGROUPS {
            return Err(Error::Unsupported {
                why: format!("more than {MAX_CGROUPS} cgroups below {dir:?}"),
            });
        }
        read_pids(entry.path(), &mut pids)?;
    }
    Ok(pids)
}

fn read_pids(dir: &Path, pids: &mut HashSet<u32>) -> Result<(), Error> {
    let path = dir.join("cgroup.procs");
    let text = match fs::read(&path) {
        // A threaded cgroup lists only threads. They serve as well to find out to which container they belong.
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {
            fs::read(dir.join("cgroup.threads"))
        }
        other => other,
    };
    match text {
        Ok(text) => {
            pids.extend(
                String::from_utf8_lossy(&text)
                    .split_ascii_whitespace()
                    .filter_map(|p| p.parse::<u32>().ok()),
            );
            Ok(())
        }
        // A cgroup that was removed meanwhile had no processes left.
        Err(e) if is_removed(&e) => Ok(()),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn is_removed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_of_a_procfs_is_told_by_the_own_status() {
        let dir = tempfile::tempdir().unwrap();
        let says = |text: &str| {
            fs::create_dir_all(dir.path().join("self")).unwrap();
            fs::write(dir.path().join("self/status"), text).unwrap();
            is_own_namespace(dir.path())
        };
        assert!(is_own_namespace(dir.path()), "nothing can be seen");
        assert!(says("Name:\tupperdeck\nNSpid:\t4711\nNSpgid:\t4711\n"));
        // The node's, seen from a pod without hostPID.
        assert!(!says(
            "Name:\tupperdeck\nNSpid:\t25227\t8\nNSpgid:\t25227\t8\n"
        ));
        assert!(is_own_namespace(Path::new("/proc")));
    }

    #[test]
    fn members_are_those_that_name_the_cgroup_where_numbers_are_others() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("self/status", "NSpid:\t25227\t8\n");
        // PID 1 is not asked: its namespace cannot be read without more rights than it has.
        write("1/cgroup", "0::/\n");
        write("25300/cgroup", "0::/kubepods/pod1/c1\n");
        write("25301/cgroup", "0::/kubepods/pod1/c1/inner\n");
        write("25302/cgroup", "0::/kubepods/pod1/c10\n");
        write("group/cgroup.freeze", "0\n");
        write("group/cgroup.events", "populated 1\nfrozen 0\n");
        write("group/cgroup.procs", "0\n0\n");
        let group = Group::open_named(
            Version::V2,
            dir.path().join("group"),
            PathBuf::from("/kubepods/pod1/c1"),
        )
        .unwrap();
        let found = members(dir.path(), &group).unwrap();
        assert_eq!(found, HashSet::from([25300, 25301]));
    }
}
