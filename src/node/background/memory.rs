//! Limits the memory of a process: with a cgroup of its own where one is available (v1 and v2), and in any case with a
//! limit on its data segment, which also holds while the process is temporarily outside that cgroup.
//!
//! Sources: kernel `Documentation/admin-guide/cgroup-v2.rst` (`memory.max`, `memory.events`, "No Internal Process
//! Constraint"), `cgroup-v1/memory.rst` (`memory.limit_in_bytes`, `memory.oom_control`), `setrlimit(2)`
//! (`RLIMIT_DATA`), `proc_pid_oom_score_adj(5)`.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit};

use super::{IDLE_CGROUP, NORMAL_CGROUP, hierarchies};
use crate::node::procfs::MountInfo;

/// Bytes allowed for RLIMIT_DATA beyond the memory in use: stacks and arenas that are reserved but never touched.
const HEADROOM: u64 = 512 << 20;
/// `oom_score_adj` of a save: on a node that is short of memory, a save, which can be repeated, is killed before other
/// processes (0 is the default, 1000 the maximum).
const OOM_SCORE: i32 = 500;

/// A limit on the memory of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemoryLimit {
    /// Bytes.
    pub(crate) bytes: u64,
    /// Name of its cgroup, unique on the node.
    pub(crate) group: String,
}

impl MemoryLimit {
    /// Limits this process and its children. `background` means that it runs in the idle group.
    ///
    /// Returns the path of the cgroup in the unified hierarchy, if there is one: the process must be in it then,
    /// because a cgroup that distributes memory cannot contain processes itself.
    pub(super) fn apply(&self, host_root: Option<&Path>, background: bool) -> Option<PathBuf> {
        let soft = self.bytes.saturating_add(HEADROOM);
        let limit = Rlimit {
            current: Some(soft),
            maximum: Some(soft),
        };
        if let Err(error) = rustix::process::setrlimit(Resource::Data, limit) {
            tracing::warn!(%error, "memory: no bound on this process' data");
        }
        raise_oom_score();
        let group = groups(host_root, background, &self.group).find(|group| group.make(self.bytes));
        match &group {
            Some(group) => super::join(&group.dir.join("cgroup.procs")),
            None => tracing::debug!("memory: no cgroup of its own, its data alone are bounded"),
        }
        group.filter(|group| group.unified).map(|group| group.dir)
    }

    /// Removes the cgroup of a process that has ended. Returns whether the kernel killed a process in it for lack of
    /// memory.
    #[cfg(feature = "service")]
    pub(crate) fn remove_cgroup(&self, host_root: Option<&Path>, background: bool) -> bool {
        let mut killed = false;
        for group in groups(host_root, background, &self.group) {
            killed |= group.oom_kills() > 0;
            // It does not exist, or a process in it is still exiting. The next group of that name has its limit set
            // anew.
            let _ = fs::remove_dir(&group.dir);
        }
        killed
    }
}

/// Makes the kernel prefer this process if memory is short on the whole node. The value is never lowered.
fn raise_oom_score() {
    let path = "/proc/self/oom_score_adj";
    let now = fs::read_to_string(path).ok();
    let now = now.and_then(|text| text.trim().parse::<i32>().ok());
    if now.is_none_or(|now| now < OOM_SCORE)
        && let Err(error) = fs::write(path, OOM_SCORE.to_string())
    {
        tracing::debug!(%error, "memory: no score for the kernel's choice");
    }
}

/// A cgroup for one process.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    /// The cgroup that contains those of all processes.
    parent: PathBuf,
    dir: PathBuf,
    unified: bool,
}

/// Returns the possible places, of which the first that works is used: at the top of each hierarchy that accounts for
/// memory.
fn groups(host_root: Option<&Path>, background: bool, name: &str) -> impl Iterator<Item = Group> {
    let (mounts, own) = super::own_cgroups();
    groups_of(&mounts, &own, host_root, background, name).into_iter()
}

fn groups_of(
    mounts: &[MountInfo],
    own: &[u8],
    host_root: Option<&Path>,
    background: bool,
    name: &str,
) -> Vec<Group> {
    let parent = if background {
        IDLE_CGROUP
    } else {
        NORMAL_CGROUP
    };
    let found = hierarchies(mounts, own, host_root, &["memory"]);
    let found = found.filter(|place| place.mount.root == Path::new("/"));
    let mut groups: Vec<Group> = found
        .map(|place| {
            let parent = place.mount.mount_point.join(parent);
            Group {
                dir: parent.join(name),
                parent,
                unified: place.unified,
            }
        })
        .collect();
    // If both versions are mounted, the memory controller is in v1.
    groups.sort_by_key(|group| group.unified);
    groups
}

impl Group {
    /// Creates the cgroup with its limit. Returns `false` if the limit cannot be set.
    fn make(&self, bytes: u64) -> bool {
        let _ = fs::create_dir(&self.parent);
        if self.unified {
            let above = self.parent.parent().unwrap_or(&self.parent);
            for dir in [above, &self.parent] {
                // Enabled already, or refused: the write of the limit shows which.
                let _ = fs::write(dir.join("cgroup.subtree_control"), "+memory");
            }
        }
        let made = fs::create_dir(&self.dir).is_ok();
        let set = |file: &str, value: &str| {
            let path = self.dir.join(file);
            // The file is never created: in cgroupfs, a missing file means a missing controller.
            path.exists() && fs::write(path, value).is_ok()
        };
        let bounded = if self.unified {
            set("memory.swap.max", "0");
            set("memory.max", &bytes.to_string())
        } else {
            let set_it = set("memory.limit_in_bytes", &bytes.to_string());
            // Memory and swap together. The file exists only where swap is accounted for.
            set("memory.memsw.limit_in_bytes", &bytes.to_string());
            set_it
        };
        if !bounded && made {
            let _ = fs::remove_dir(&self.dir);
        }
        bounded
    }

    /// Returns how often the kernel killed a process in it for lack of memory.
    #[cfg(feature = "service")]
    fn oom_kills(&self) -> u64 {
        let file = if self.unified {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        let text = fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.and_then(|count| count.trim().parse().ok())
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    fn dirs(mountinfo: &str, own: &str, host: Option<&str>, background: bool) -> Vec<String> {
        let mounts = parse_mountinfo(mountinfo.as_bytes()).unwrap_or_default();
        let groups = groups_of(
            &mounts,
            own.as_bytes(),
            host.map(Path::new),
            background,
            "save-1",
        );
        let shown = |group: &Group| group.dir.display().to_string();
        groups.iter().map(shown).collect()
    }

    #[test]
    fn the_group_is_at_the_top_of_what_accounts_for_memory() {
        let v1 = "30 1 0:30 / /cg/memory rw - cgroup cgroup rw,memory\n\
            31 1 0:31 / /cg/cpu rw - cgroup cgroup rw,cpu\n\
            32 1 0:32 / /cg/unified rw - cgroup2 cgroup2 rw\n";
        let own = "4:memory:/x\n3:cpu:/kube/a\n0::/kube/a\n";
        assert_eq!(
            dirs(v1, own, None, true),
            [
                "/cg/memory/upperdeck-idle/save-1",
                "/cg/unified/upperdeck-idle/save-1"
            ]
        );
        // A pod with the node's file system mounted beside the view of its own namespace, already in the idle group.
        let v2 = "40 1 0:32 /kube/a /sys/fs/cgroup rw - cgroup2 cgroup rw\n\
            41 1 0:32 / /host/sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        for own in ["0::/kube/a\n", "0::/upperdeck-idle/save-0\n"] {
            assert_eq!(
                dirs(v2, own, Some("/host"), true),
                ["/host/sys/fs/cgroup/upperdeck-idle/save-1"]
            );
        }
        assert_eq!(
            dirs(v2, "0::/kube/a\n", Some("/host"), false),
            ["/host/sys/fs/cgroup/upperdeck-saves/save-1"]
        );
        // A mount that shows only a part of the tree has no top.
        let part = "40 1 0:32 /kube/a /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert!(dirs(part, "0::/kube/a\n", None, true).is_empty());
        assert!(dirs("", "0::/\n", None, true).is_empty());
    }

    /// A directory in place of cgroupfs: which files are written, in v1 and v2.
    #[test]
    fn limits_are_written_where_the_controller_is() -> std::io::Result<()> {
        let top = tempfile::tempdir()?;
        for (unified, limit, events) in [
            (false, "memory.limit_in_bytes", "memory.oom_control"),
            (true, "memory.max", "memory.events"),
        ] {
            let parent = top.path().join(if unified { "v2" } else { "v1" });
            let group = Group {
                dir: parent.join("save-1"),
                parent,
                unified,
            };
            assert!(!group.make(1 << 30), "there is no controller");
            assert!(!group.dir.exists());
            // The kernel creates these files with the directory.
            fs::create_dir(&group.dir)?;
            fs::write(group.dir.join(limit), "max")?;
            assert!(group.make(1 << 30));
            assert_eq!(fs::read_to_string(group.dir.join(limit))?, "1073741824");
            assert_eq!(group.oom_kills(), 0);
            fs::write(group.dir.join(events), "oom_kill_disable 0\noom_kill 2\n")?;
            assert_eq!(group.oom_kills(), 2);
        }
        Ok(())
    }
}
