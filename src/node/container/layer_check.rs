//! Verifies that the directories of an overlay, as this program opens them, are the ones that were mounted.
//!
//! A layer can be a mount of its own: an EROFS image, the FUSE mount of a lazy snapshotter, a disk. In a mount
//! namespace without that mount, its path is an empty directory, as if the base had no files there. Therefore each
//! directory is looked up in the table of the mount namespace in which the overlay was mounted, and has to be the same
//! directory of the same file system as the one that this program opens.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::error::Error;
use super::roots::Roots;
use super::table::{Table, within};
use crate::node::overlay::mount::OverlayMount;
use crate::node::procfs::{self, MountInfo};

/// File that the EROFS snapshotter keeps beside the directory that it is mounted on.
const IMAGE: &str = "layer.erofs";
/// Directory in containerd's state in which its mount manager mounts the images of layers, each on a directory that is
/// empty without the mount.
const MOUNT_MANAGER: &str = "io.containerd.mount-manager.v1.bolt";

const UPPER: &str = "upper";

/// The mounts that this program sees, by mount ID.
#[derive(Debug)]
pub(super) struct OwnMounts(HashMap<u64, MountInfo>);

impl OwnMounts {
    /// Reads the mount table of this thread, which opens the directories.
    pub(super) fn read() -> Result<Self, Error> {
        let table = Path::new("/proc/thread-self/mountinfo");
        let text = std::fs::read(table).map_err(|e| Error::io(table, e))?;
        let mounts = procfs::parse_mountinfo(&text).map_err(|e| Error::damaged(table, e))?;
        Ok(Self(mounts.into_iter().map(|m| (m.id, m)).collect()))
    }

    /// Returns the mount that contains the directory `path` for this program, or `None` if that mount is not reachable
    /// from this program's root.
    fn of(&self, path: &Path) -> Result<Option<&MountInfo>, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::io(path, e.into()))?;
        let id = procfs::mount_id(directory.as_fd()).map_err(|e| Error::io(path, e))?;
        Ok(self.0.get(&id))
    }
}

/// Returns whether `path` is a mount point for this program.
pub(super) fn is_mount(path: &Path) -> Result<bool, Error> {
    let own = OwnMounts::read()?;
    Ok(own.of(path)?.is_some_and(|mount| mount.mount_point == path))
}

/// Returns the numbers of the snapshots whose images are mounted on `lowers`, or `None` if a lower is something else.
/// The kernel reports the file of an EROFS image as the source of its mount.
pub(super) fn image_snapshots(lowers: &[PathBuf]) -> Result<Option<Vec<u64>>, Error> {
    let own = OwnMounts::read()?;
    let number = |lower: &PathBuf| -> Result<Option<u64>, Error> {
        let mount = own.of(lower)?;
        let mount = mount.filter(|mount| mount.mount_point == *lower && mount.fs_type == "erofs");
        Ok(mount.and_then(|mount| image_snapshot(Path::new(&mount.source))))
    };
    lowers.iter().map(number).collect()
}

/// Returns the number of a snapshot from the path of its image: `…/snapshots/N/layer.erofs`.
fn image_snapshot(image: &Path) -> Option<u64> {
    let directory = image.parent().filter(|_| image.ends_with(IMAGE))?;
    directory.parent()?.ends_with("snapshots").then_some(())?;
    directory.file_name()?.to_str()?.parse().ok()
}

/// Compares the directories of an overlay with the table of the mount namespace in which it was mounted.
pub(super) struct LayerCheck<'a> {
    pub(super) roots: &'a Roots,
    pub(super) container: &'a str,
    pub(super) table: &'a Table,
    pub(super) own: &'a OwnMounts,
}

impl LayerCheck<'_> {
    /// Fails with [`Error::LayerUnproven`] if a directory is not the one that was mounted.
    pub(super) fn prove(&self, overlay: &OverlayMount) -> Result<(), Error> {
        self.directory(UPPER, &overlay.upper)?;
        for (role, lowers) in [
            ("lower", &overlay.lowers),
            ("data-only lower", &overlay.data_only),
        ] {
            for lower in lowers {
                self.directory(role, lower)?;
            }
        }
        Ok(())
    }

    fn directory(&self, role: &'static str, path: &Path) -> Result<(), Error> {
        let unproven = |detail: String| Error::LayerUnproven {
            container: self.container.to_owned(),
            role,
            path: path.to_path_buf(),
            detail,
        };
        let source = self.table.source;
        let on_node = self.on_node(path)?;
        let theirs = self.table.covering(&on_node);
        let theirs = theirs.and_then(|mount| Some((mount, within(mount, &on_node)?)));
        let Some((theirs, their_path)) = theirs else {
            return Err(unproven(format!("{source} has no root")));
        };
        let ours = self.own.of(path)?;
        let ours = ours.and_then(|mount| Some((mount, within(mount, path)?)));
        let Some((ours, our_path)) = ours else {
            return Err(unproven(
                "it lies in no mount of this program's own table (is this program's root a chroot?)"
                    .to_owned(),
            ));
        };
        if (ours.device, &our_path) != (theirs.device, &their_path) {
            return Err(unproven(format!(
                "{source} has it in {}, this program's mount namespace in {}: what is read there is not what the \
                 container has (run in the node's mount namespace; in a pod, mount the runtime's directories with \
                 mountPropagation: HostToContainer)",
                shown(theirs),
                shown(ours),
            )));
        }
        let image = path.with_file_name(IMAGE);
        if ours.mount_point != path && image.is_file() {
            return Err(unproven(format!(
                "{} is to be mounted there, and nothing is",
                image.display()
            )));
        }
        let managed = path
            .components()
            .any(|part| part.as_os_str() == MOUNT_MANAGER);
        if managed && role != UPPER && ours.mount_point != path {
            return Err(unproven(
                "containerd's mount manager mounts an image there, and nothing is mounted"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Converts a located path to a path on the node.
    fn on_node(&self, path: &Path) -> Result<PathBuf, Error> {
        let Some(host_root) = &self.roots.host_root else {
            return Ok(path.to_path_buf());
        };
        let host_root = host_root
            .canonicalize()
            .map_err(|e| Error::io(host_root, e))?;
        let inside = path.strip_prefix(&host_root).unwrap_or(path);
        Ok(Path::new("/").join(inside))
    }
}

/// Describes a mount for a message.
fn shown(mount: &MountInfo) -> String {
    format!(
        "the mount {} ({} {}:{})",
        mount.mount_point.display(),
        mount.fs_type,
        mount.device.0,
        mount.device.1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_of_a_snapshot_is_told_by_its_path() {
        let root = "/c/io.containerd.snapshotter.v1.erofs/snapshots";
        for (path, expected) in [
            (format!("{root}/12/layer.erofs"), Some(12)),
            (format!("{root}/x/layer.erofs"), None),
            (format!("{root}/12/fsmeta.erofs"), None),
            ("/c/other/12/layer.erofs".to_owned(), None),
            ("/dev/loop0".to_owned(), None),
            ("layer.erofs".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(image_snapshot(Path::new(&path)), expected, "{path}");
        }
    }
}
