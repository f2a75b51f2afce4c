//! A mount table of the node: finds the mount of a device, and the mount that contains a path.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::roots::Roots;
use crate::node::procfs::{MountInfo, root_mount};

/// The process whose mount table is trusted for the directories of a root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableSource {
    /// The process itself: `pid:N`, which no runtime knows.
    #[default]
    Own,
    /// The node's first process.
    Node,
    /// The process that started the container.
    Monitor {
        /// Its PID.
        pid: u32,
        /// Its start time in clock ticks since boot.
        start: u64,
    },
}

impl std::fmt::Display for TableSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Own => write!(f, "the process' own mount table"),
            Self::Node => write!(f, "the node's mount table"),
            Self::Monitor { pid, .. } => write!(f, "the mount table of its monitor, process {pid}"),
        }
    }
}

/// The mounted file system that is a container's root, and the mount table that is trusted for its directories.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootMount {
    /// Device number, major and minor.
    pub device: (u32, u32),
    /// Options of the file system in the trusted mount table, escaped.
    pub options: Vec<u8>,
    /// The process whose mount table is trusted.
    pub source: TableSource,
}

/// A mount table of the node.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) source: TableSource,
    /// Whether the mounts required privileges on the node. In a user namespace (rootless Podman), its owner could have
    /// made them.
    pub(super) privileged: bool,
    pub(super) mounts: Vec<MountInfo>,
    tree: OnceCell<Tree>,
}

impl Table {
    pub(super) fn new(source: TableSource, privileged: bool, mounts: Vec<MountInfo>) -> Self {
        Self {
            source,
            privileged,
            mounts,
            tree: OnceCell::new(),
        }
    }

    /// Returns the mount that contains `path`.
    pub(super) fn covering(&self, path: &Path) -> Option<&MountInfo> {
        let tree = self.tree.get_or_init(|| Tree::new(&self.mounts));
        tree.covering(&self.mounts, path)
    }

    /// Returns a mount of the root of the overlay `device`.
    pub(super) fn overlay(&self, device: (u32, u32)) -> Option<&MountInfo> {
        self.overlays(device).next()
    }

    /// Returns all mounts of the root of the overlay `device`.
    fn overlays(&self, device: (u32, u32)) -> impl Iterator<Item = &MountInfo> {
        self.mounts.iter().filter(move |m| {
            m.device == device && m.fs_type == "overlay" && m.root == Path::new("/")
        })
    }

    /// Returns whether the overlay `device` is mounted at `path`, in which symbolic links of the node are resolved.
    /// Mount points in the table have no symbolic links and are not looked up, which would lead to what their owner has
    /// mounted over them.
    pub(super) fn has_at(&self, roots: &Roots, device: (u32, u32), path: &Path) -> bool {
        let root = roots.locate(Path::new("/"));
        let located = roots.locate(path);
        let located = located.as_ref().ok().zip(root.as_ref().ok());
        let inside = located.and_then(|(path, root)| path.strip_prefix(root).ok());
        self.overlays(device).any(|m| {
            m.mount_point == path
                || inside.is_some_and(|inside| m.mount_point == Path::new("/").join(inside))
        })
    }
}

/// The mounts of a table by parent mount and mount point, as the kernel looks them up along a path.
#[derive(Debug)]
struct Tree {
    root: Option<usize>,
    at: HashMap<(u64, PathBuf), usize>,
}

impl Tree {
    fn new(mounts: &[MountInfo]) -> Self {
        let root = root_mount(mounts).and_then(|root| mounts.iter().position(|m| m.id == root.id));
        let at = mounts.iter().enumerate();
        let at = at.filter(|(_, m)| m.id != m.parent);
        Self {
            root,
            at: at
                .map(|(index, m)| ((m.parent, m.mount_point.clone()), index))
                .collect(),
        }
    }

    /// Returns the mount that contains `path`. `mounts` has to be the table that the tree was built from.
    fn covering<'m>(&self, mounts: &'m [MountInfo], path: &Path) -> Option<&'m MountInfo> {
        let mut mount = &mounts[self.root?];
        let mut steps: Vec<&Path> = path.ancestors().collect();
        steps.reverse();
        for step in steps {
            // Mounts can be stacked; no stack is larger than the table.
            for _ in 0..mounts.len() {
                match self.at.get(&(mount.id, step.to_path_buf())) {
                    Some(&over) => mount = &mounts[over],
                    None => break,
                }
            }
        }
        Some(mount)
    }
}

/// Returns the path within the file system of `path`, which is in `mount`.
pub(super) fn within(mount: &MountInfo, path: &Path) -> Option<PathBuf> {
    let rest = path.strip_prefix(&mount.mount_point).ok()?;
    Some(mount.root.join(rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    #[test]
    fn a_path_lies_in_the_mount_that_the_kernel_reaches() {
        let mounts = parse_mountinfo(
            b"20 1 8:1 / / rw - ext4 /dev/sda rw\n\
              21 20 8:2 /sub /var rw - ext4 /dev/sdb rw\n\
              22 21 0:40 / /var/lib/1/fs rw - erofs none ro\n\
              23 22 0:41 / /var/lib/1/fs rw - tmpfs none rw\n\
              24 20 0:42 / /var/lib/2/fs rw - erofs hidden ro\n\
              25 25 0:43 / /loop rw - tmpfs none rw\n",
        )
        .unwrap();
        let tree = Tree::new(&mounts);
        for (path, id, inside) in [
            ("/", 20, "/"),
            ("/variable", 20, "/variable"),
            ("/var", 21, "/sub"),
            ("/var/lib/1", 21, "/sub/lib/1"),
            // Of two stacked mounts, the topmost counts.
            ("/var/lib/1/fs", 23, "/"),
            ("/var/lib/1/fs/etc", 23, "/etc"),
            // Hidden by a later mount on /var.
            ("/var/lib/2/fs", 21, "/sub/lib/2/fs"),
            ("/loop", 20, "/loop"),
        ] {
            let mount = tree.covering(&mounts, Path::new(path)).unwrap();
            assert_eq!(mount.id, id, "{path}");
            assert_eq!(within(mount, Path::new(path)).unwrap(), Path::new(inside));
        }
        assert!(Tree::new(&[]).covering(&[], Path::new("/")).is_none());
    }
}
