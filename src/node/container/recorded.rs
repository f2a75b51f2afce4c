//! What a runtime's files say about a container, before it is compared with the kernel's view.

use std::path::{Path, PathBuf};

use super::bundle::Bundle;
use super::error::Error;
use super::roots::Roots;
use super::{Pod, Runtime};

/// The directories that a runtime recorded for a container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecordedRoot {
    /// The runtime's layer store, as a path on the node; the other directories are relative to it.
    pub(super) store: PathBuf,
    /// The upper directory.
    pub(super) upper: PathBuf,
    /// The lower directories, topmost first; `None` if the record of them is incomplete.
    pub(super) lowers: Option<Vec<PathBuf>>,
    /// Whether the runtime mounts the lower directories ID-mapped for this container. It decides only where the names
    /// of the mount options do not.
    pub(super) id_mapped: bool,
}

impl RecordedRoot {
    /// Locates a directory of the record of `container`. Symbolic links are not followed, because a runtime creates none
    /// in its store.
    ///
    /// Fails with [`Error::ForeignRoot`] if there is one.
    pub(super) fn locate(
        &self,
        roots: &Roots,
        container: &str,
        inside: &Path,
    ) -> Result<PathBuf, Error> {
        roots.locate_below(&self.store, inside).map_err(|source| {
            let path = self.store.join(inside);
            if source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
                return Error::ForeignRoot {
                    container: container.to_owned(),
                    detail: format!(
                        "{} leads through a symbolic link, and is not the directory that the runtime made",
                        path.display()
                    ),
                };
            }
            Error::io(path, source)
        })
    }
}

/// A container according to a runtime's files. Paths are those of the node, without the host root.
#[derive(Clone, Debug)]
pub(super) struct RecordedContainer {
    pub(super) runtime: Runtime,
    pub(super) id: String,
    pub(super) names: Vec<String>,
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<Pod>,
    pub(super) image_name: Option<String>,
    pub(super) runtime_root_mode: Option<u32>,
    /// Whether it is the pause container of a pod.
    pub(super) sandbox: bool,
    pub(super) pid: u32,
    pub(super) bundle: Option<Bundle>,
    /// The directory or file that describes it, for messages.
    pub(super) state: PathBuf,
    /// The IDs on the node that its user and group IDs start at, from the name of the store.
    pub(super) store_ids: Option<(u32, u32)>,
    /// The directories that the runtime created for it.
    pub(super) record: Option<RecordedRoot>,
    /// Directories that the runtime's mount options may be relative to, where it shortens paths.
    pub(super) bases: Vec<PathBuf>,
    /// Where the runtime mounted the root on the node.
    pub(super) mounted_at: Option<PathBuf>,
}

impl RecordedContainer {
    /// Returns an unambiguous name for messages.
    pub(super) fn label(&self) -> String {
        label(
            &self.id,
            &self.names,
            self.namespace.as_deref(),
            self.pod.as_ref(),
        )
    }
}

/// Returns an unambiguous name of a container for messages: what users call it, and the start of its ID.
pub(super) fn label(
    id: &str,
    names: &[String],
    namespace: Option<&str>,
    pod: Option<&Pod>,
) -> String {
    let short = &id[..id.char_indices().nth(12).map_or(id.len(), |(at, _)| at)];
    match (pod, names.first(), namespace) {
        (Some(pod), ..) => format!("{}/{}/{} ({short})", pod.namespace, pod.name, pod.container),
        (None, Some(name), _) => format!("{name} ({short})"),
        (None, None, Some(namespace)) => format!("{short} (namespace {namespace})"),
        (None, None, None) => short.to_owned(),
    }
}
