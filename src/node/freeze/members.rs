//! Who would stand still: the processes of a cgroup, and whether they are all the container's.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Error;

/// Cgroups below one container; a container that may make its own cgroups must not keep us walking for ever.
const MAX_CGROUPS: usize = 100_000;

/// A process in the container's cgroup that is not the container's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// Its id.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`), control characters escaped.
    pub name: String,
}

/// Facts about processes, each read once.
pub(super) struct Processes {
    proc: PathBuf,
    target: u32,
    mount_namespace: PathBuf,
    /// Set only when the target has a PID namespace other than ours: then everything in it is the container's.
    pid_namespace: Option<PathBuf>,
    known: HashMap<u32, bool>,
}

impl Processes {
    /// `proc` is where procfs is mounted.
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

    /// Whether a process sees the container's root, or `None` if it is gone (or a zombie, which does nothing).
    fn shares_root(&self, pid: u32) -> Option<bool> {
        match fs::read_link(self.path(pid, "ns/mnt")) {
            Ok(namespace) => Some(namespace == self.mount_namespace),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Some(false),
            Err(_) => None,
        }
    }

    /// Whether a process is the container's: it sees the container's root, lives in its PID namespace, or descends
    /// from one that does (a container may run containers of its own). A process that is gone belongs.
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

    /// Those of `pids` that are not the container's.
    pub(super) fn strangers(&mut self, pids: &HashSet<u32>) -> Vec<Stranger> {
        // Asked anew each time: a process on its way into the container is none of its own a moment before.
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
                Stranger {
                    pid,
                    name: name.trim_ascii().escape_ascii().to_string(),
                }
            })
            .collect()
    }

    /// Every process on the node that sees the container's root, wherever its cgroup is.
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

/// The processes of a cgroup and of all below it. 0 stands for those of PID namespaces that are not visible from here.
pub(super) fn pids_below(dir: &Path) -> Result<HashSet<u32>, Error> {
    let mut pids = HashSet::new();
    let mut open = vec![dir.to_owned()];
    let mut seen = 0;
    while let Some(dir) = open.pop() {
        seen += 1;
        if seen > MAX_CGROUPS {
            return Err(Error::Unsupported {
                why: format!("more than {MAX_CGROUPS} cgroups below {dir:?}"),
            });
        }
        read_pids(&dir, &mut pids)?;
        let children = match fs::read_dir(&dir) {
            Ok(children) => children,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io(dir, e)),
        };
        for child in children {
            let child = child.map_err(|e| Error::io(dir.clone(), e))?;
            if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(child.path());
            }
        }
    }
    Ok(pids)
}

fn read_pids(dir: &Path, pids: &mut HashSet<u32>) -> Result<(), Error> {
    let path = dir.join("cgroup.procs");
    let text = match fs::read(&path) {
        // A threaded cgroup lists threads only; they serve as well to ask whose they are.
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
        // A cgroup that was removed meanwhile had no process left.
        Err(e) if is_removed(&e) => Ok(()),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn is_removed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// What is needed of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) state: u8,
    pub(super) parent: u32,
    /// Clock ticks since boot.
    pub(super) start: u64,
}

impl Stat {
    /// Fields 3, 4 and 22 of `proc_pid_stat(5)`. Field 2 is the name in parentheses and may hold anything, those too.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|&b| b == b')')?;
        let fields: Vec<&str> = std::str::from_utf8(&text[end + 1..])
            .ok()?
            .split_ascii_whitespace()
            .collect();
        Some(Self {
            state: *fields.first()?.as_bytes().first()?,
            parent: fields.get(1)?.parse().ok()?,
            start: fields.get(19)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_a_name_with_parentheses() {
        let text =
            b"42 (a) S 9 (x\n) R 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3\n";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                state: b'R',
                parent: 7,
                start: 987_654
            })
        );
        for bad in [
            &b""[..],
            b"1 (a",
            b"1 (a)",
            b"1 (a) S",
            b"1 (a) S x",
            b"1 (a) S 1 2 3",
            b"1 (a) \xff 1",
        ] {
            assert_eq!(Stat::parse(bad), None, "{}", bad.escape_ascii());
        }
    }
}
