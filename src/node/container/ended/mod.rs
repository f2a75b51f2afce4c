//! Containers that have ended, or were never started, and are still on disk.
//!
//! There is no process to compare the runtime's records with, and no mount: the directories are those of the records,
//! opened without following symbolic links. Nothing writes to them any more, so nothing is frozen. That it stays so is
//! checked ([`recheck`]): a runtime records a removal before it removes files, so files that were read while the record
//! was complete were all there.

mod containerd;
mod docker;
mod mounts;
mod storage;

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::bundle::IdMaps;
use super::error::Error;
use super::mount_tables::Tables;
use super::process;
use super::recorded::{RecordedContainer, RecordedRoot, label};
use super::roots::Roots;
use super::{Container, Life, MountPoint, Pod, Runtime, Spec};
use crate::node::overlay::mount::OverlayMount;
use crate::node::overlay::xattr::Namespace;

/// How and when a container ended, as far as its runtime has recorded it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Exit code of its first process, 128 and the number of a signal if one ended it.
    pub exit_code: Option<i64>,
    /// Whether the kernel ended a process of it because its memory was used up.
    pub out_of_memory: bool,
    /// When it ended.
    pub at: Option<jiff::Timestamp>,
    /// When its first process was started last. Together with the ID it names one run of the container.
    pub started: Option<jiff::Timestamp>,
    /// Whether it was created and never started.
    pub never_started: bool,
    /// The process that its runtime still records as running, although it is gone.
    pub(crate) unnoticed: Option<u32>,
}

impl End {
    /// Returns whether its runtime has recorded that it ended, and is not yet to find out.
    pub fn is_recorded(&self) -> bool {
        self.at.is_some() && self.unnoticed.is_none()
    }

    /// Returns what is known of it in brackets, after a space; empty if nothing is known.
    pub(crate) fn in_brackets(&self) -> String {
        match self.to_string() {
            end if end.is_empty() => end,
            end => format!(" ({end})"),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.never_started {
            return f.write_str("never started");
        }
        let mut parts = Vec::new();
        parts.extend(
            self.unnoticed
                .map(|pid| format!("its process {pid} is no longer there")),
        );
        parts.extend(self.exit_code.map(|code| format!("exit code {code}")));
        if self.out_of_memory {
            parts.push("out of memory".to_owned());
        }
        parts.extend(
            self.at
                .map(|at| format!("at {}", at.strftime("%Y-%m-%dT%H:%M:%SZ"))),
        );
        f.write_str(&parts.join(", "))
    }
}

/// A container without processes.
#[derive(Clone, Debug)]
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// Device and inode numbers of its upper directory and its lower directories.
    directories: Vec<(u64, u64)>,
}

impl Ended {
    /// Returns the life of a container that ended so, for tests that read no files of it.
    #[cfg(test)]
    pub(crate) fn of(end: End) -> Self {
        Self {
            end,
            directories: Vec::new(),
        }
    }
}

/// A container without processes according to a runtime's files. Paths are those of the node, without the host root.
#[derive(Clone, Debug)]
pub(super) struct EndedRecord {
    pub(super) runtime: Runtime,
    pub(super) id: String,
    pub(super) names: Vec<String>,
    /// containerd's namespace.
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<Pod>,
    /// How often the container of the pod was created before.
    pub(super) attempt: u32,
    /// Whether it is the pause container of a pod.
    pub(super) sandbox: bool,
    pub(super) end: End,
    /// The number of its first process according to its runtime, which may have ended.
    pub(super) pid: Option<u32>,
    /// Whether its runtime is removing it.
    pub(super) removing: bool,
    /// The file that describes it.
    pub(super) state: PathBuf,
    image_name: Option<String>,
    runtime_root_mode: Option<u32>,
    /// The directories of its root.
    root: Result<RecordedRoot, String>,
    /// Those of the lower directories that are mounted ID-mapped for it.
    id_mapped: Vec<PathBuf>,
    ids: Result<IdMaps, String>,
    mounts: Vec<MountPoint>,
    spec: Spec,
}

impl EndedRecord {
    /// Describes a container whose process is gone and whose records are incomplete.
    pub(super) fn of(draft: &RecordedContainer) -> Self {
        Self {
            runtime: draft.runtime,
            id: draft.id.clone(),
            names: draft.names.clone(),
            namespace: draft.namespace.clone(),
            pod: draft.pod.clone(),
            attempt: 0,
            sandbox: draft.sandbox,
            end: End {
                unnoticed: Some(draft.pid),
                ..End::default()
            },
            pid: Some(draft.pid),
            removing: false,
            state: draft.state.clone(),
            image_name: None,
            runtime_root_mode: None,
            root: Err("its runtime has no other record of it".to_owned()),
            id_mapped: Vec::new(),
            ids: Ok(IdMaps::default()),
            mounts: Vec::new(),
            spec: Spec::default(),
        }
    }

    /// Returns an unambiguous name for messages.
    pub(super) fn label(&self) -> String {
        label(
            &self.id,
            &self.names,
            self.namespace.as_deref(),
            self.pod.as_ref(),
        )
    }

    /// Returns the error of a save that needs a running container, or cannot be made for the reason `why`.
    pub(super) fn stopped(&self, why: &str) -> Error {
        Error::Stopped {
            detail: format!(
                "{} is stopped{} according to {}; {why}",
                self.label(),
                self.end.in_brackets(),
                self.state.display()
            ),
        }
    }

    fn is(&self, container: &Container) -> bool {
        self.runtime == container.runtime
            && self.id == container.id
            && self.namespace == container.namespace
    }
}

/// Lists the containers that the runtimes keep on disk, whether or not they run. State that cannot be read is left out:
/// `recorded_containers` of each runtime reports it.
pub(super) fn records(roots: &Roots) -> Vec<EndedRecord> {
    let roots = &roots.believed(&mut Vec::new());
    let mut all = docker::records(roots);
    all.extend(storage::records(roots));
    // A container of Docker is in containerd's metadata, too, while it runs, and after a crash.
    let of_containerd = containerd::records(roots);
    let known: HashSet<String> = all.iter().map(|record| record.id.clone()).collect();
    all.extend(
        of_containerd
            .into_iter()
            .filter(|record| !known.contains(&record.id)),
    );
    all
}

/// Returns the container of a record, with the directories that the record names.
///
/// Fails with [`Error::Stopped`] if the records do not suffice for a save, and with [`Error::StartedAgain`] if a process
/// has its root.
pub(super) fn assemble(
    roots: &Roots,
    tables: &Tables,
    record: &EndedRecord,
) -> Result<Container, Error> {
    if record.removing {
        return Err(record.stopped("and its runtime is removing it"));
    }
    let unknown = |why: &String| record.stopped(&format!("it cannot be saved: {why}"));
    let root = record.root.as_ref().map_err(unknown)?;
    let ids = record.ids.as_ref().map_err(|why| Error::OwnersUnknown {
        container: record.id.clone(),
        detail: why.clone(),
    })?;
    let overlay = overlay_of(roots, record, root)?;
    let directories = directories(&overlay)?;
    tables.prove_layers_on_node(roots, &record.id, &overlay)?;
    if let Some(pid) = tables.user_of(roots, &overlay.upper)? {
        return Err(Error::StartedAgain {
            container: record.id.clone(),
            detail: format!(
                "{} says that it has ended, and process {pid} has its root",
                record.state.display()
            ),
        });
    }
    let mut mounts = record.mounts.clone();
    mounts.extend(docker::init_stub(record, &overlay)?);
    let mounts = mounts::resolve(&overlay, mounts)?;
    Ok(Container {
        runtime: record.runtime,
        id: record.id.clone(),
        names: record.names.clone(),
        namespace: record.namespace.clone(),
        pod: record.pod.clone(),
        life: Life::Ended(Ended {
            end: record.end.clone(),
            directories,
        }),
        overlay,
        uid_map: ids.uids.clone(),
        gid_map: ids.gids.clone(),
        mounts,
        mounts_cut: false,
        image_name: record.image_name.clone(),
        runtime_root_mode: record.runtime_root_mode,
        spec: record.spec.clone(),
    })
}

/// Checks that a container which had ended is as it was: on record, not being removed, with the same directories, and
/// without processes. `running` is whether the runtimes' records have a process of it by now.
pub(super) fn recheck(
    roots: &Roots,
    container: &Container,
    ended: &Ended,
    running: bool,
) -> Result<(), Error> {
    let removed = || Error::Removed {
        container: container.id.clone(),
    };
    let started = |detail: &str| Error::StartedAgain {
        container: container.id.clone(),
        detail: detail.to_owned(),
    };
    if running {
        return Err(started("it has a process"));
    }
    let records = records(roots);
    let record = records.iter().find(|record| record.is(container));
    let record = record
        .filter(|record| !record.removing)
        .ok_or_else(removed)?;
    let now = match assemble(roots, &Tables::default(), record) {
        Ok(now) => now,
        Err(error) if error.is_not_found() => return Err(removed()),
        Err(error) => return Err(error),
    };
    let same = now
        .ended()
        .is_some_and(|now| now.directories == ended.directories);
    if !same || now.overlay != container.overlay {
        return Err(removed());
    }
    // The time and the reason change when it was started and has ended again.
    if now.ended().map(|now| &now.end) != Some(&ended.end) {
        return Err(started("it has ended once more"));
    }
    Ok(())
}

/// Locates the directories of a record.
fn overlay_of(
    roots: &Roots,
    record: &EndedRecord,
    root: &RecordedRoot,
) -> Result<OverlayMount, Error> {
    let locate = |inside: &PathBuf| root.locate(roots, &record.id, inside);
    let all = |paths: &[PathBuf]| paths.iter().map(locate).collect::<Result<Vec<_>, _>>();
    let lowers = root.lowers.as_deref().ok_or_else(|| {
        record.stopped("it cannot be saved: not all layers below it are on record in its store")
    })?;
    Ok(OverlayMount {
        upper: locate(&root.upper)?,
        lowers: all(lowers)?,
        data_only: Vec::new(),
        id_mapped: all(&record.id_mapped)?,
        // In a user namespace, runtimes mount with `userxattr`: the kernel allows nothing else there.
        namespace: if super::is_initial_user_namespace() {
            Namespace::Trusted
        } else {
            Namespace::User
        },
        index: process::index_default(),
    })
}

fn directories(overlay: &OverlayMount) -> Result<Vec<(u64, u64)>, Error> {
    let number = |path: &PathBuf| {
        let meta = fs::symlink_metadata(path).map_err(|source| Error::io(path, source))?;
        Ok((meta.dev(), meta.ino()))
    };
    std::iter::once(&overlay.upper)
        .chain(&overlay.lowers)
        .map(number)
        .collect()
}

/// Returns a time in the format of Go's JSON, or `None` for its zero value, the year 1.
fn go_time(text: &str) -> Option<jiff::Timestamp> {
    let at = text.parse::<jiff::Timestamp>().ok()?;
    (at >= jiff::Timestamp::UNIX_EPOCH).then_some(at)
}

/// Returns a mount that a runtime makes by itself.
fn runtime_mount(destination: impl AsRef<Path>, kind: &str) -> MountPoint {
    MountPoint {
        destination: destination.as_ref().to_owned(),
        kind: kind.to_owned(),
        source: kind.to_owned(),
        volume: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_says_what_is_known_of_it() {
        let at = go_time("2026-11-03T04:05:06.789+01:00");
        let end = |exit_code, out_of_memory, at| End {
            exit_code,
            out_of_memory,
            at,
            ..End::default()
        };
        assert_eq!(end(None, false, None).in_brackets(), "");
        assert_eq!(
            end(Some(1), false, at).in_brackets(),
            " (exit code 1, at 2026-11-03T03:05:06Z)"
        );
        assert_eq!(
            end(Some(137), true, at).to_string(),
            "exit code 137, out of memory, at 2026-11-03T03:05:06Z"
        );
        assert_eq!(go_time("0001-01-01T00:00:00Z"), None);
        assert_eq!(go_time("yesterday"), None);
    }
}
