//! The cgroup hierarchies of the node, as a process in a cgroup namespace of its own sees them, too.
//!
//! In such a namespace (`cgroup_namespaces(7)`; containers have one on nodes with cgroup v2 alone) all paths in
//! `/proc/PID/cgroup` and all roots in `/proc/self/mountinfo` are relative to the namespace's root: a cgroup of another pod
//! is `/../../podX/Y`. How many `..` there are depends on what both paths have in common, so that two of them cannot be
//! compared. Where the node's own mount is visible, the root of the namespace is found in it, and paths are made those of
//! the node.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use super::procfs::{MountInfo, memberships, own_mounts};

/// Maximum number of cgroups that are looked at for the root of the namespace.
const MAX_CGROUPS: usize = 100_000;

/// The mounts of this process, and the root of its cgroup namespace.
#[derive(Debug)]
pub(crate) struct Cgroups {
    /// All mounts. The roots of cgroup file systems are the node's paths, where these are known.
    pub(crate) mounts: Vec<MountInfo>,
    /// Device numbers of hierarchies, and the node's path of this namespace's root in them. Without those in which it is
    /// the node's root, or not known.
    roots: Vec<((u32, u32), PathBuf)>,
}

impl Cgroups {
    /// Reads the mounts of this process.
    pub(crate) fn own() -> io::Result<Self> {
        Ok(Self::new(own_mounts()?, |mount, top, depth| {
            let at = fs::metadata(&mount.mount_point).ok()?;
            let device = (rustix::fs::major(at.dev()), rustix::fs::minor(at.dev()));
            // Something else may be mounted over it.
            let same = device == mount.device;
            same.then(|| find(&top.mount_point, depth, at.ino()))?
        }))
    }

    /// `search` returns the path below the mount that is its second argument, as deep as its third one says, of the cgroup
    /// that the first one shows.
    fn new(
        mut mounts: Vec<MountInfo>,
        search: impl Fn(&MountInfo, &MountInfo, usize) -> Option<PathBuf>,
    ) -> Self {
        let mut roots: Vec<((u32, u32), PathBuf)> = Vec::new();
        for top in mounts.iter().filter(|mount| is_cgroup(mount)) {
            let Some(depth) = depth_above(&top.root) else {
                continue;
            };
            if roots.iter().any(|(device, _)| *device == top.device) {
                continue;
            }
            let shows_namespace = |mount: &&MountInfo| {
                mount.device == top.device && is_cgroup(mount) && mount.root == Path::new("/")
            };
            let mut candidates = mounts.iter().filter(shows_namespace);
            if let Some(root) = candidates.find_map(|mount| search(mount, top, depth)) {
                roots.push((top.device, Path::new("/").join(root)));
            }
        }
        for mount in mounts.iter_mut().filter(|mount| is_cgroup(mount)) {
            let known = roots.iter().find(|(device, _)| *device == mount.device);
            if let Some(path) = known.and_then(|(_, root)| of_node(&mount.root, root)) {
                mount.root = path;
            }
        }
        Self { mounts, roots }
    }

    /// Returns the text of a `/proc/PID/cgroup` with the node's paths, where they are known.
    pub(crate) fn memberships(&self, text: &[u8]) -> Vec<u8> {
        if self.roots.is_empty() {
            return text.to_vec();
        }
        let mut out = Vec::with_capacity(text.len());
        for member in memberships(text) {
            let is_it = |mount: &&MountInfo| {
                is_cgroup(mount) && member.unified == (mount.fs_type == "cgroup2") && {
                    member.unified || member.is_in(&mount.super_options)
                }
            };
            let device = self.mounts.iter().find(is_it).map(|mount| mount.device);
            let known = self.roots.iter().find(|(of, _)| Some(*of) == device);
            let path = known
                .and_then(|(_, root)| of_node(Path::new(OsStr::from_bytes(member.path)), root));
            let path = path
                .as_ref()
                .map_or(member.path, |path| path.as_os_str().as_bytes());
            out.extend_from_slice(member.before_path);
            out.extend_from_slice(path);
            out.push(b'\n');
        }
        out
    }
}

fn is_cgroup(mount: &MountInfo) -> bool {
    matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2")
}

/// Returns the number of `..` if the path has nothing else, and one at least.
fn depth_above(root: &Path) -> Option<usize> {
    let mut parts = root.components().skip(1);
    let depth = root.components().count().saturating_sub(1);
    (depth > 0 && parts.all(|part| part == Component::ParentDir)).then_some(depth)
}

/// Returns the node's path of what is `path` in the namespace with this root, or `None` if it leads above the node's root.
fn of_node(path: &Path, root: &Path) -> Option<PathBuf> {
    let mut found = root.to_owned();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                if !found.pop() {
                    return None;
                }
            }
            Component::Normal(name) => found.push(name),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(found)
}

/// Returns the path below `top` of the cgroup with this inode number, which is `depth` directories down.
fn find(top: &Path, depth: usize, inode: u64) -> Option<PathBuf> {
    let mut left = MAX_CGROUPS;
    let mut open = vec![(PathBuf::new(), 1)];
    while let Some((below, level)) = open.pop() {
        // A cgroup that was removed meanwhile is not the one that this process is in.
        let Ok(entries) = fs::read_dir(top.join(&below)) else {
            continue;
        };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            left = left.checked_sub(1)?;
            let path = below.join(entry.file_name());
            if level < depth {
                open.push((path, level + 1));
            } else if entry.ino() == inode {
                return Some(path);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    /// As an agent's pod sees them: the view of its namespace, and the node's mounts below `/host`.
    const POD: &str = "206 205 0:34 / /sys/fs/cgroup/freezer ro - cgroup cgroup rw,freezer\n\
        227 226 0:34 /../../../.. /host/sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
        228 226 0:35 /../../../.. /host/sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        236 226 0:38 /../../../.. /host/sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        237 226 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        238 226 0:38 /../../other /odd rw - cgroup2 cgroup2 rw\n\
        239 226 254:0 /../x /gone rw - ext4 /dev/vda rw\n";

    #[test]
    fn paths_of_a_namespace_are_made_those_of_the_node() -> Result<(), Box<dyn std::error::Error>> {
        let cgroups = Cgroups::new(parse_mountinfo(POD.as_bytes())?, |shows, top, depth| {
            assert_eq!((shows.device, depth), (top.device, 4));
            assert!(
                top.mount_point.starts_with("/host") && !shows.mount_point.starts_with("/host")
            );
            Some(PathBuf::from("kube/burstable/podA/agent"))
        });
        let roots: Vec<_> = cgroups
            .mounts
            .iter()
            .map(|it| it.root.display().to_string())
            .collect();
        let agent = "/kube/burstable/podA/agent";
        // Of 0:35 the namespace's root is not to be seen.
        assert_eq!(
            roots,
            [
                agent,
                "/",
                "/../../../..",
                "/",
                agent,
                "/kube/burstable/other",
                "/../x"
            ]
        );
        let seen = "6:freezer:/../../../besteffort/podB/c:1\n4:cpu,cpuacct:/../x\n1:name=systemd:/../y\n\
            0::/../../../../../../z\n0::/child (deleted)\n";
        assert_eq!(
            String::from_utf8(cgroups.memberships(seen.as_bytes()))?,
            "6:freezer:/kube/besteffort/podB/c:1\n4:cpu,cpuacct:/../x\n1:name=systemd:/../y\n\
            0::/../../../../../../z\n0::/kube/burstable/podA/agent/child (deleted)\n"
        );
        Ok(())
    }

    #[test]
    fn without_a_namespace_nothing_changes() -> Result<(), Box<dyn std::error::Error>> {
        let text = "206 205 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
            207 205 0:34 /kube/a /x rw - cgroup cgroup rw,freezer\n";
        let before = parse_mountinfo(text.as_bytes())?;
        let cgroups = Cgroups::new(before.clone(), |_, _, _| unreachable!());
        assert_eq!(cgroups.mounts, before);
        assert_eq!(
            cgroups.memberships(b"garbage\n6:freezer:/a\n"),
            b"garbage\n6:freezer:/a\n"
        );
        Ok(())
    }

    #[test]
    fn a_cgroup_is_found_at_its_depth_alone() -> io::Result<()> {
        let top = tempfile::tempdir()?;
        let at = top.path().join("kube/b/podA");
        fs::create_dir_all(&at)?;
        fs::create_dir_all(top.path().join("system/c/d/e"))?;
        let inode = fs::metadata(&at)?.ino();
        assert_eq!(
            find(top.path(), 3, inode),
            Some(PathBuf::from("kube/b/podA"))
        );
        assert_eq!(find(top.path(), 2, inode), None);
        assert_eq!(find(top.path(), 4, inode), None);
        Ok(())
    }
}
