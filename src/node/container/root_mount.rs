//! Determines the directories of a container's root by comparing the runtime's record with the mount table of a
//! trusted mount table.

use std::path::{Path, PathBuf};

use super::IdMapping;
use super::error::Error;
use super::mount_tables::Tables;
use super::process::{self, Process};
use super::recorded::{RecordedContainer, RecordedRoot};
use super::roots::Roots;
use super::table::{RootMount, Table};
use crate::node::overlay::mount::{MountError, OverlayMount, OverlayOptions};
use crate::node::procfs::MountInfo;

/// Returns the device number of a process's root. Fails if the root is not that of an overlay.
pub(super) fn device_of(container: &str, process: &Process) -> Result<(u32, u32), Error> {
    let no_overlay = |detail: String| Error::NotOverlay {
        container: container.to_owned(),
        detail,
    };
    let root = process
        .root()
        .ok_or_else(|| no_overlay("its root is not the root of a mount".to_owned()))?;
    if root.fs_type != "overlay" {
        return Err(no_overlay(format!(
            "its root is {}, not an overlay",
            root.fs_type
        )));
    }
    if root.root != Path::new("/") {
        return Err(no_overlay(format!(
            "its root is the directory {} within an overlay",
            root.root.display()
        )));
    }
    Ok(root.device)
}

/// Parses the options of an overlay with an upper directory.
pub(super) fn options_of(container: &str, line: &MountInfo) -> Result<OverlayOptions, Error> {
    OverlayOptions::parse(&line.super_options).map_err(|error| match error {
        MountError::NoUpper => Error::NotOverlay {
            container: container.to_owned(),
            detail: error.to_string(),
        },
        source => Error::Mount {
            container: container.to_owned(),
            source,
        },
    })
}

/// Returns the root of a container. Fails with [`Error::ForeignRoot`] if it is not the mount that the runtime made, or
/// has directories that are not in the runtime's record.
pub(super) fn root_of(
    roots: &Roots,
    tables: &Tables,
    draft: &RecordedContainer,
    process: &Process,
) -> Result<(OverlayMount, RootMount), Error> {
    let device = device_of(&draft.id, process)?;
    let found = tables.find(roots, process, device, |table, line| {
        let looked_at = RecordCheck {
            roots,
            draft,
            table,
            line,
            mapped: !process.uid_map.is_empty() || !process.gid_map.is_empty(),
        };
        let root = RootMount {
            device,
            options: line.super_options.clone(),
            source: table.source,
        };
        let overlay = looked_at.overlay()?;
        tables.prove_layers(roots, &draft.id, process, table, &overlay)?;
        Ok((overlay, root))
    })?;
    found.unwrap_or_else(|| {
        Err(Error::ForeignRoot {
            container: draft.id.clone(),
            detail: format!(
                "the root of process {} is the file system {}:{}, which is in no mount table but the container's own; \
                 what it is made of is not to be believed (the runtime's files say {})",
                process.pid,
                device.0,
                device.1,
                recorded(draft)
            ),
        })
    })
}

/// Fails with [`Error::OwnersUnknown`] if the files of a container have other IDs than its user namespace: a Docker
/// container with `--userns=host` in a store of `userns-remap`.
pub(super) fn check_id_maps(draft: &RecordedContainer, process: &Process) -> Result<(), Error> {
    let Some((uid, gid)) = draft.store_ids else {
        return Ok(());
    };
    let root_of = |map: &[IdMapping]| {
        if map.is_empty() {
            return Some(0);
        }
        map.iter().find(|m| m.inside == 0).map(|m| m.outside)
    };
    if (root_of(&process.uid_map), root_of(&process.gid_map)) == (Some(uid), Some(gid)) {
        return Ok(());
    }
    Err(Error::OwnersUnknown {
        container: draft.id.clone(),
        detail: format!(
            "the store of its runtime keeps root's files as {uid}:{gid} (userns-remap), and the container has other ids \
             (--userns=host): files of the base and its own would come out with owners of two kinds"
        ),
    })
}

/// Returns whether a process is not of the container on whose record its number is, which has ended: neither its cgroup
/// nor its root is the container's. A container can choose its root, but not its cgroup.
pub(super) fn is_of_another(roots: &Roots, draft: &RecordedContainer, process: &Process) -> bool {
    let Some(record) = &draft.record else {
        return false;
    };
    match process::cgroups_of(roots, process.pid) {
        Ok(Some(cgroups)) if !is_named_after(&cgroups, &draft.id) => {}
        _ => return false,
    }
    let Some(root) = process.root().filter(|root| root.fs_type == "overlay") else {
        return true;
    };
    let locate = |path: &Path| roots.locate(path);
    let mounted = options_of(&draft.id, root)
        .ok()
        .and_then(|options| options.locate_upper(&draft.bases, &locate).ok());
    let recorded = roots.locate_below(&record.store, &record.upper).ok();
    mounted.is_none() || recorded.is_none() || mounted != recorded
}

/// Returns whether a directory on the path of one of the cgroups has the name of the container: `ID`, `docker-ID.scope`,
/// `cri-containerd:ID`.
fn is_named_after(cgroups: &[u8], id: &str) -> bool {
    let mut names = cgroups.split(|byte| matches!(byte, b'/' | b'\n' | b':'));
    names.any(|name| {
        let name = name.strip_suffix(b".scope").unwrap_or(name);
        let front = name.strip_suffix(id.as_bytes());
        front.is_some_and(|front| front.is_empty() || front.ends_with(b"-"))
    })
}

/// Describes what the runtime has recorded.
fn recorded(draft: &RecordedContainer) -> String {
    let upper = draft
        .record
        .as_ref()
        .map(|record| record.store.join(&record.upper));
    match (upper, &draft.mounted_at) {
        (Some(upper), _) => format!("that it writes to {}", upper.display()),
        (None, Some(at)) => format!("that it is mounted at {}", at.display()),
        (None, None) => "nothing".to_owned(),
    }
}

/// The result of looking up a directory by the name in the mount options.
enum Lookup {
    /// The recorded directory.
    Same,
    /// The recorded directory in an ID-mapped mount that the runtime has not removed.
    Mapped,
    /// The directory does not exist any more.
    Gone,
    /// Another directory.
    Other(PathBuf),
}

/// An entry of a trusted mount table that is compared with the record.
struct RecordCheck<'a> {
    roots: &'a Roots,
    draft: &'a RecordedContainer,
    table: &'a Table,
    line: &'a MountInfo,
    /// Whether the container has a user namespace.
    mapped: bool,
}

impl RecordCheck<'_> {
    fn foreign(&self, detail: String) -> Error {
        Error::ForeignRoot {
            container: self.draft.id.clone(),
            detail,
        }
    }

    fn mount_error(&self, source: MountError) -> Error {
        Error::Mount {
            container: self.draft.id.clone(),
            source,
        }
    }

    fn overlay(&self) -> Result<OverlayMount, Error> {
        let options = options_of(&self.draft.id, self.line)?;
        match &self.draft.record {
            Some(record) => self.overlay_of_record(&options, record),
            None => self.overlay_of_mount(&options),
        }
    }

    /// Returns whether the runtime itself made the mount, so that its options can be trusted.
    ///
    /// A mount in a volume that is shared with its container (`rshared`) is in the node's table as well. A container
    /// with `CAP_SYS_ADMIN` can make such mounts with arbitrary options, but not in the runtime's own directory.
    fn is_mounted_by_runtime(&self) -> bool {
        let at = self.draft.mounted_at.as_ref();
        self.table.privileged
            && at.is_some_and(|at| self.table.has_at(self.roots, self.line.device, at))
    }

    /// Proxy snapshotters have records of their own. For them, the node's mount is trusted if it is where the runtime
    /// mounts the root of this container.
    fn overlay_of_mount(&self, options: &OverlayOptions) -> Result<OverlayMount, Error> {
        if !self.is_mounted_by_runtime() {
            return Err(self.foreign(format!(
                "the runtime has no record of its directories, and {} does not have it where the runtime mounts it",
                self.table.source
            )));
        }
        options
            .resolve(&self.draft.bases, process::index_default(), &|path| {
                self.roots.locate(path)
            })
            .map_err(|source| self.mount_error(source))
    }

    /// Returns the directories of the record if the mount refers to the same ones.
    fn overlay_of_record(
        &self,
        options: &OverlayOptions,
        record: &RecordedRoot,
    ) -> Result<OverlayMount, Error> {
        let locate = |path: &Path| self.roots.locate(path);
        let upper = record.locate(self.roots, &self.draft.id, &record.upper)?;
        let mounted = options
            .locate_upper(&self.draft.bases, &locate)
            .map_err(|source| self.mount_error(source))?;
        if mounted != upper {
            return Err(self.foreign(format!(
                "it writes to {}, its runtime's files say {}",
                mounted.display(),
                upper.display()
            )));
        }
        // Unless the runtime made the mount, only the record is trusted.
        let beside_record = record.lowers.is_none() || !options.data_only.is_empty();
        if beside_record && !self.is_mounted_by_runtime() {
            let whose = if self.table.privileged {
                "it is not mounted where the runtime mounts it, and has"
            } else {
                "it was mounted in a user namespace, with"
            };
            return Err(self.foreign(format!(
                "{whose} lower directories that its runtime's files do not name"
            )));
        }
        let index = process::index_default();
        let Some(recorded) = &record.lowers else {
            return options
                .resolve(&self.draft.bases, index, &locate)
                .map_err(|source| self.mount_error(source));
        };
        let (lowers, id_mapped) = self.lowers(options, record, recorded)?;
        let data_only = self.data_only(options)?;
        Ok(OverlayMount {
            id_mapped,
            ..options.mount(upper, lowers, data_only, index)
        })
    }

    /// Returns the recorded lower directories, each compared with the one in the mount options, and which of them are
    /// ID-mapped.
    fn lowers(
        &self,
        options: &OverlayOptions,
        record: &RecordedRoot,
        recorded: &[PathBuf],
    ) -> Result<(Vec<PathBuf>, Vec<PathBuf>), Error> {
        if recorded.len() != options.lowers.len() {
            return Err(self.foreign(format!(
                "it has {} lower directories, its runtime's files say {}",
                options.lowers.len(),
                recorded.len()
            )));
        }
        let mut lowers = Vec::with_capacity(recorded.len());
        let mut id_mapped = Vec::new();
        for (named, recorded) in options.lowers.iter().zip(recorded) {
            let lower = record.locate(self.roots, &self.draft.id, recorded)?;
            // With ID mapping, runtimes mount the lower directories elsewhere with the IDs of the container, and only
            // while the overlay is being mounted. A relative name tells nothing: where it was looked up is not known.
            let is_mapped = match self.look_up(named, &lower)? {
                Lookup::Same | Lookup::Gone if named.is_relative() => record.id_mapped,
                Lookup::Same => false,
                Lookup::Gone | Lookup::Mapped => true,
                Lookup::Other(other) => {
                    return Err(self.foreign(format!(
                        "its lower directory {} is {}, its runtime's files say {}",
                        named.display(),
                        other.display(),
                        lower.display()
                    )));
                }
            };
            if is_mapped && self.mapped {
                id_mapped.push(lower.clone());
            }
            lowers.push(lower);
        }
        Ok((lowers, id_mapped))
    }

    /// Compares the directory named `named` in the mount options with `expected`.
    fn look_up(&self, named: &Path, expected: &Path) -> Result<Lookup, Error> {
        let candidates: Vec<PathBuf> = if named.is_absolute() {
            vec![named.to_path_buf()]
        } else {
            self.draft.bases.iter().map(|b| b.join(named)).collect()
        };
        let mut other = Lookup::Gone;
        for candidate in candidates {
            match self.roots.locate(&candidate) {
                Ok(found) if found == expected => return Ok(Lookup::Same),
                Ok(found) if self.is_id_mapped_alias(&candidate, &found, expected)? => {
                    other = Lookup::Mapped;
                }
                Ok(found) => other = Lookup::Other(found),
                Err(e) => match e.kind() {
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {}
                    _ => return Err(Error::io(candidate, e)),
                },
            }
        }
        Ok(other)
    }

    /// Returns whether `found`, which is `named` on the node, is the directory `expected` in an ID-mapped mount.
    fn is_id_mapped_alias(
        &self,
        named: &Path,
        found: &Path,
        expected: &Path,
    ) -> Result<bool, Error> {
        let mount = self.table.covering(named);
        if !self.mapped || !mount.is_some_and(|mount| mount.id_mapped) {
            return Ok(false);
        }
        let identity = |path: &Path| {
            let stat = rustix::fs::stat(path).map_err(|e| Error::io(path, e.into()))?;
            Ok::<_, Error>((stat.st_dev, stat.st_ino))
        };
        Ok(identity(found)? == identity(expected)?)
    }

    /// Locates the data-only lower directories. They are taken from the node's own mount, because no supported runtime
    /// records them.
    fn data_only(&self, options: &OverlayOptions) -> Result<Vec<PathBuf>, Error> {
        let located = options.data_only.iter().map(|path| {
            self.roots
                .locate(path)
                .map_err(|source| Error::io(path.clone(), source))
        });
        located.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_known_by_the_name_of_its_container() {
        for (cgroups, expected) in [
            ("0::/system.slice/docker-ab12.scope\n", true),
            ("4:memory:/k8s.io/ab12\n1:name=systemd:/\n", true),
            (
                "0::/kubepods.slice/kubepods-x.slice:cri-containerd:ab12\n",
                true,
            ),
            ("0::/libpod_parent/libpod-ab12/container\n", true),
            ("0::/user.slice/xab12\n", false),
            ("0::/ab123\n", false),
            ("", false),
        ] {
            assert_eq!(
                is_named_after(cgroups.as_bytes(), "ab12"),
                expected,
                "{cgroups}"
            );
        }
    }
}
