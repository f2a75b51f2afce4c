//! What is mounted into a container and can be saved with it, beside its own root: volumes on disk.
//!
//! Format: `proc_pid_mountinfo(5)`. The container's mount table decides what is mounted where, and the path is resolved
//! in the container's root and held against that ([`crate::overlay::volume`]).

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::error::Error;
use super::process;
use super::roots::Roots;
use super::{Container, bundle};
use crate::overlay::mount::MountInfo;
use crate::overlay::volume as overlay;

/// File systems on this node's own disks, whose time stamps are this kernel's.
const LOCAL: [&str; 9] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "xfs", "zfs",
];

/// A volume that is saved with its container.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Where it is mounted in the container.
    pub destination: PathBuf,
    /// File system type.
    pub kind: String,
    /// Whether this kernel's clock stamps its files. A server's may be another one.
    pub local: bool,
    /// Device numbers of the file system, as lists of mappings show them.
    pub device: (u32, u32),
    /// The opened directory.
    pub opened: overlay::Volume,
    mount: u64,
}

/// The volume that is mounted at `path` in the container.
///
/// Fails with [`Error::NotAVolume`] for all that is no directory of a file system on a disk or a server: it names the
/// mounts that are.
pub fn volume(roots: &Roots, container: &Container, path: &Path) -> Result<Volume, Error> {
    let mounts = mounts(roots, container)?;
    let refuse = |why: String| Error::NotAVolume {
        path: path.to_path_buf(),
        why,
        mounts: listed(&mounts),
    };
    let plain = path.is_absolute()
        && path
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    // Without slashes at its end.
    let destination: PathBuf = path.components().collect();
    if !plain {
        return Err(refuse(
            "expected an absolute path in the container, without ..".to_owned(),
        ));
    }
    if destination == Path::new("/") {
        return Err(refuse(
            "that is the container's root, which is saved in any case".to_owned(),
        ));
    }
    let Some(mount) = topmost(&mounts, &destination) else {
        let below = mounts
            .iter()
            .filter(|m| m.mount_point != Path::new("/") && destination.starts_with(&m.mount_point))
            .max_by_key(|m| m.mount_point.as_os_str().len());
        return Err(refuse(match below {
            Some(mount) => format!(
                "it is a path in what is mounted at {}, not a mount",
                mount.mount_point.display()
            ),
            None => "nothing is mounted there".to_owned(),
        }));
    };
    if let Some(why) = unfit(&mount.fs_type) {
        return Err(refuse(format!("{} is mounted there, {why}", mount.fs_type)));
    }
    let opened = open(roots, container, &destination, mount.id).map_err(|error| match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotADirectory => {
            refuse("a single file is mounted there, not a directory".to_owned())
        }
        other => other,
    })?;
    let opened = opened.ok_or_else(|| {
        refuse("the path leads elsewhere than the container's mount table says".to_owned())
    })?;
    Ok(Volume {
        local: LOCAL.contains(&mount.fs_type.as_str()),
        kind: mount.fs_type.clone(),
        device: mount.device,
        mount: mount.id,
        opened,
        destination,
    })
}

/// Whether the volume is still what is mounted there.
pub fn recheck_volume(roots: &Roots, container: &Container, volume: &Volume) -> Result<(), Error> {
    match open(roots, container, &volume.destination, volume.mount) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(Error::Gone {
            container: container.id.clone(),
            detail: format!("another mount is at {} now", volume.destination.display()),
        }),
        Err(Error::Io { source, .. }) => Err(Error::Gone {
            container: container.id.clone(),
            detail: format!("{}: {source}", volume.destination.display()),
        }),
        Err(other) => Err(other),
    }
}

fn open(
    roots: &Roots,
    container: &Container,
    destination: &Path,
    mount: u64,
) -> Result<Option<overlay::Volume>, Error> {
    let root = roots.proc(&format!("{}/root", container.pid));
    let at = destination.as_os_str().as_bytes();
    let at = at.strip_prefix(b"/").unwrap_or(at);
    overlay::Volume::open(&root, at, mount).map_err(|source| {
        Error::io(
            root.join(destination.strip_prefix("/").unwrap_or(destination)),
            source,
        )
    })
}

fn mounts(roots: &Roots, container: &Container) -> Result<Vec<MountInfo>, Error> {
    let process = process::read(roots, container.pid)?
        .filter(|process| process.start == container.pid_start)
        .ok_or_else(|| Error::Gone {
            container: container.id.clone(),
            detail: format!("its process {} is no longer there", container.pid),
        })?;
    Ok(process.mounts)
}

/// The mount at a path that no other at the same path covers.
fn topmost<'m>(mounts: &'m [MountInfo], at: &Path) -> Option<&'m MountInfo> {
    let there = || mounts.iter().filter(|m| m.mount_point == at);
    there().find(|m| !there().any(|over| over.parent == m.id && over.id != m.id))
}

/// Why nothing that is mounted so can be saved, if so.
fn unfit(fs_type: &str) -> Option<&'static str> {
    if fs_type == "tmpfs" || fs_type == "ramfs" {
        Some("which is memory and no volume")
    } else if bundle::is_virtual(fs_type) || fs_type == "efivarfs" || fs_type == "rpc_pipefs" {
        Some("which holds no files but what the kernel says")
    } else if fs_type == "overlay" {
        Some("whose own parts lie elsewhere")
    } else if fs_type.starts_with("fuse") {
        // Its server may be one of the container's processes, which stands still.
        Some("which a process serves that might never answer")
    } else {
        None
    }
}

/// Those that could be named, each as `PATH (TYPE)`.
fn listed(mounts: &[MountInfo]) -> Vec<String> {
    let mut listed: Vec<String> = mounts
        .iter()
        .filter(|m| unfit(&m.fs_type).is_none() && m.mount_point != Path::new("/"))
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
    use crate::overlay::mount::parse_mountinfo;

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
            listed(&mounts),
            ["/home/w (ext4)", "/srv/with space (nfs4)"]
        );
    }

    #[test]
    fn memory_kernel_and_servers_of_strangers_are_no_volumes() {
        for kind in [
            "tmpfs", "proc", "sysfs", "cgroup2", "overlay", "fuse", "fuseblk", "fuse.x",
        ] {
            assert!(unfit(kind).is_some(), "{kind}");
        }
        for kind in ["ext4", "xfs", "btrfs", "nfs4", "lustre", "ceph", "squashfs"] {
            assert!(unfit(kind).is_none(), "{kind}");
        }
    }
}
