//! Volumes on disk that are mounted into a container and can be saved with it.
//!
//! Format: `proc_pid_mountinfo(5)`. The container's mount table determines what is mounted where, and the path to a
//! volume is compared with it step by step ([`crate::node::overlay::volume`]). A volume is read with the rights of the
//! container's first process ([`crate::node::overlay::identity`]), and in the service only if the node's administrator
//! lists it ([`super::Pattern`]).

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::error::Error;
use super::pattern::Pattern;
use super::process::{self, Process};
use super::roots::Roots;
use super::{Container, Running, bundle};
use crate::node::overlay::identity::Identity;
use crate::node::overlay::volume::{self as overlay, OpenError, ResolvedVolume, VolumeLookup};
use crate::node::procfs::MountInfo;

/// File systems on local disks, whose timestamps are from this kernel and whose operations always complete.
const LOCAL_FS_TYPES: [&str; 9] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "xfs", "zfs",
];
/// Further file systems whose operations always complete: in memory or read-only.
const OTHER_SAFE_FS_TYPES: [&str; 7] = [
    "erofs", "iso9660", "ramfs", "squashfs", "tmpfs", "udf", "vfat",
];

/// Which volumes may be saved, and with whose rights they are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VolumeRules {
    /// Whether this program's own rights are used instead of those of the container's first process.
    pub(crate) own_rights: bool,
    /// Patterns of permitted volumes; `None` permits any.
    pub(crate) allowed: Option<Vec<Pattern>>,
}

/// A volume that is saved with its container.
#[derive(Clone, Debug)]
pub(crate) struct Volume {
    /// Mount point in the container.
    pub(crate) destination: PathBuf,
    /// File system type.
    pub(crate) kind: String,
    /// Whether its timestamps are from this kernel's clock; a server has its own.
    pub(crate) local: bool,
    /// Device number of the file system, as in lists of mappings.
    pub(crate) device: (u32, u32),
    /// The opened directory.
    pub(crate) opened: overlay::Volume,
    mount: u64,
}

/// Opens the volume that is mounted at `path` in the container.
///
/// Fails with [`Error::NotAVolume`], which lists the possible volumes, if it is not a directory on a disk or server
/// file system. Fails with [`Error::VolumeNotAllowed`] if `rules` do not permit it, or the container may not read it.
pub(crate) fn volume(
    roots: &Roots,
    container: &Container,
    path: &Path,
    rules: &VolumeRules,
) -> Result<Volume, Error> {
    if container.ended().is_some() {
        return Err(Error::VolumeNotAllowed {
            path: path.to_path_buf(),
            why: "the container has ended, and its volumes are not mounted".to_owned(),
        });
    }
    let (process, running) = running_process(roots, container)?;
    let refuse = |why: String| Error::NotAVolume {
        path: path.to_path_buf(),
        why,
        mounts: list_volumes(&process.mounts),
    };
    let (destination, mount) = mount_of_volume(path, &process.mounts).map_err(refuse)?;
    let fail = |refusal| open_error(container, &destination, refusal, &refuse);
    let lookup = VolumePath::new(roots, running, &destination, mount.id);
    let reached = lookup.resolve().map_err(fail)?;
    // The earlier entry of the table may have been of another mount with the same ID.
    let line = reached.line.clone();
    if let Some(why) = unsupported_reason(&line.fs_type) {
        return Err(refuse(format!("{} is mounted there, {why}", line.fs_type)));
    }
    if let Some(allowed) = &rules.allowed {
        let node = process::mounts_of(roots, 1)
            .ok()
            .flatten()
            .unwrap_or_default();
        if !allowed.iter().any(|pattern| pattern.covers(&line, &node)) {
            return Err(Error::VolumeNotAllowed {
                path: destination.clone(),
                why: "the node's administrator does not list it (--allow-volume)".to_owned(),
            });
        }
    }
    let who = if rules.own_rights {
        None
    } else {
        Some(Arc::new(process::identity(roots, &process)?))
    };
    let local = LOCAL_FS_TYPES.contains(&line.fs_type.as_str());
    let opened = lookup.open(reached, who, local).map_err(fail)?;
    Ok(Volume {
        local,
        kind: line.fs_type,
        device: line.device,
        mount: line.id,
        opened,
        destination,
    })
}

/// Fails if the volume is no longer the one that is mounted there.
pub(crate) fn recheck_volume(
    roots: &Roots,
    container: &Container,
    volume: &Volume,
) -> Result<(), Error> {
    let gone = |detail: String| Error::Gone {
        container: container.id.clone(),
        detail,
    };
    let running = container.require_running()?;
    let lookup = VolumePath::new(roots, running, &volume.destination, volume.mount);
    let at = volume.destination.display();
    match lookup.resolve() {
        Ok(_) => Ok(()),
        Err(OpenError::Io(source)) => Err(gone(format!("{at}: {source}"))),
        Err(_) => Err(gone(format!("another mount is at {at} now"))),
    }
}

/// Returns the mount at `path` according to the container's mount table, and the path without trailing slashes.
fn mount_of_volume<'m>(
    path: &Path,
    mounts: &'m [MountInfo],
) -> Result<(PathBuf, &'m MountInfo), String> {
    let plain = path.is_absolute()
        && path
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    let destination: PathBuf = path.components().collect();
    if !plain {
        return Err("expected an absolute path in the container, without ..".to_owned());
    }
    if destination == Path::new("/") {
        return Err("that is the container's root, which is saved in any case".to_owned());
    }
    let Some(mount) = topmost(mounts, &destination) else {
        let below = mounts
            .iter()
            .filter(|m| m.mount_point != Path::new("/") && destination.starts_with(&m.mount_point))
            .max_by_key(|m| m.mount_point.as_os_str().len());
        return Err(match below {
            Some(mount) => format!(
                "it is a path in what is mounted at {}, not a mount",
                mount.mount_point.display()
            ),
            None => "nothing is mounted there".to_owned(),
        });
    };
    match unsupported_reason(&mount.fs_type) {
        Some(why) => Err(format!("{} is mounted there, {why}", mount.fs_type)),
        None => Ok((destination, mount)),
    }
}

fn open_error(
    container: &Container,
    destination: &Path,
    refusal: OpenError,
    refuse: &dyn Fn(String) -> Error,
) -> Error {
    match refusal {
        OpenError::NotADirectory => {
            refuse("a single file is mounted there, not a directory".to_owned())
        }
        OpenError::WrongMount => {
            refuse("the path leads elsewhere than the container's mount table says".to_owned())
        }
        OpenError::UntrustedMount { at, fs_type } => refuse(format!(
            "the way to it leads through {fs_type} at {}, which might never answer",
            at.display()
        )),
        OpenError::Denied => Error::VolumeNotAllowed {
            path: destination.to_path_buf(),
            why: "the container's first process may not read it itself".to_owned(),
        },
        OpenError::Io(source) if source.kind() == io::ErrorKind::NotADirectory => {
            refuse("a single file is mounted there, not a directory".to_owned())
        }
        OpenError::Io(source) => Error::io(
            Path::new(&container.id).join(destination.strip_prefix("/").unwrap_or(destination)),
            source,
        ),
    }
}

/// The mount point of a volume in a container, and the path to it.
struct VolumePath<'a> {
    roots: &'a Roots,
    pid: u32,
    container: PathBuf,
    device: (u32, u32),
    at: &'a [u8],
    mount: u64,
}

impl<'a> VolumePath<'a> {
    fn new(roots: &'a Roots, running: &Running, destination: &'a Path, mount: u64) -> Self {
        let at = destination.as_os_str().as_bytes();
        Self {
            roots,
            pid: running.pid,
            container: roots.proc(&format!("{}/root", running.pid)),
            device: running.root.device,
            at: at.strip_prefix(b"/").unwrap_or(at),
            mount,
        }
    }

    fn with<T>(&self, work: impl FnOnce(&VolumeLookup<'_>) -> T) -> T {
        let table = || {
            process::mounts(self.roots, self.pid)
                .map_err(|error| io::Error::other(error.to_string()))
        };
        work(&VolumeLookup {
            container: &self.container,
            device: self.device,
            at: self.at,
            mount: self.mount,
            table: &table,
            is_traversable: &is_traversable,
        })
    }

    #[allow(
        clippy::redundant_closure_for_method_calls,
        reason = "the method by its name would have one lifetime only"
    )]
    fn resolve(&self) -> Result<ResolvedVolume, OpenError> {
        self.with(|lookup| lookup.resolve())
    }

    fn open(
        &self,
        reached: ResolvedVolume,
        who: Option<Arc<Identity>>,
        local: bool,
    ) -> Result<overlay::Volume, OpenError> {
        self.with(|lookup| reached.open(lookup, who, local))
    }
}

fn running_process<'c>(
    roots: &Roots,
    container: &'c Container,
) -> Result<(Process, &'c Running), Error> {
    let running = container.require_running()?;
    let process = process::read(roots, running.pid)?
        .filter(|process| process.start == running.pid_start)
        .ok_or_else(|| Error::Gone {
            container: container.id.clone(),
            detail: format!("its process {} is no longer there", running.pid),
        })?;
    Ok((process, running))
}

/// Returns whether names may be looked up in the file system, because its operations always complete, whatever a tenant
/// does. Overlays and FUSE can be mounted by unprivileged users, and servers may be unreachable.
fn is_traversable(mount: &MountInfo) -> bool {
    let fs_type = mount.fs_type.as_str();
    LOCAL_FS_TYPES.contains(&fs_type) || OTHER_SAFE_FS_TYPES.contains(&fs_type)
}

/// Returns the mount at a path that is not covered by another at the same path.
fn topmost<'m>(mounts: &'m [MountInfo], at: &Path) -> Option<&'m MountInfo> {
    let there = || mounts.iter().filter(|m| m.mount_point == at);
    there().find(|m| !there().any(|over| over.parent == m.id && over.id != m.id))
}

/// Returns why a file system of this type cannot be saved, or `None` if it can.
fn unsupported_reason(fs_type: &str) -> Option<&'static str> {
    if fs_type == "tmpfs" || fs_type == "ramfs" {
        Some("which is memory and no volume")
    } else if bundle::is_virtual(fs_type) || fs_type == "efivarfs" || fs_type == "rpc_pipefs" {
        Some("which holds no files but what the kernel says")
    } else if fs_type == "overlay" {
        Some("whose own parts lie elsewhere")
    } else if fs_type.starts_with("fuse") {
        // The server may be one of the container's frozen processes.
        Some("which a process serves that might never answer")
    } else {
        None
    }
}

/// Returns the possible volumes as `PATH (TYPE)`.
fn list_volumes(mounts: &[MountInfo]) -> Vec<String> {
    let mut listed: Vec<String> = mounts
        .iter()
        .filter(|m| unsupported_reason(&m.fs_type).is_none() && m.mount_point != Path::new("/"))
        .filter(|m| !bundle::made_by_runtime(&m.mount_point))
        .map(|m| format!("{} ({})", m.mount_point.display(), m.fs_type))
        .collect();
    listed.sort();
    listed.dedup();
    listed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    const TABLE: &[u8] = b"\
20 1 0:50 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
21 20 0:51 / /proc rw - proc proc rw
22 20 0:52 / /dev rw - tmpfs tmpfs rw
23 20 254:0 /var/lib/v1 /home/w rw - ext4 /dev/vda rw
24 23 254:0 /var/lib/v2 /home/w rw - ext4 /dev/vda rw
25 20 254:0 /etc/hosts /etc/hosts rw - ext4 /dev/vda rw
26 20 0:60 / /srv/with\\040space rw - nfs4 nas:/s rw
27 20 0:61 / /mnt/s3 rw - fuse.s3fs s3fs rw
";

    #[test]
    fn of_mounts_at_one_path_the_last_is_seen() {
        let mounts = parse_mountinfo(TABLE).unwrap();
        let at = |path: &str| topmost(&mounts, Path::new(path)).map(|m| m.id);
        assert_eq!(at("/home/w"), Some(24));
        assert_eq!(at("/srv/with space"), Some(26));
        assert_eq!(at("/home"), None);
    }

    #[test]
    fn only_what_can_be_named_is_offered() {
        let mounts = parse_mountinfo(TABLE).unwrap();
        assert_eq!(
            list_volumes(&mounts),
            ["/home/w (ext4)", "/srv/with space (nfs4)"]
        );
    }

    #[test]
    fn memory_kernel_and_servers_of_strangers_are_no_volumes() {
        for kind in [
            "tmpfs", "proc", "sysfs", "cgroup2", "overlay", "fuse", "fuseblk", "fuse.x",
        ] {
            assert!(unsupported_reason(kind).is_some(), "{kind}");
        }
        for kind in ["ext4", "xfs", "btrfs", "nfs4", "lustre", "ceph", "squashfs"] {
            assert!(unsupported_reason(kind).is_none(), "{kind}");
        }
    }
}
