//! What a runtime's files say of a container, before it is held against what the kernel says.

use std::path::PathBuf;

use super::bundle::Bundle;
use super::{Pod, Runtime};

/// The directories that a runtime recorded for a container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecordedRoot {
    /// The runtime's directory of layers, as the node has it; the others are below it.
    pub(super) store: PathBuf,
    /// The upper directory.
    pub(super) upper: PathBuf,
    /// The lowers, topmost first; none where the record of them is incomplete.
    pub(super) lowers: Option<Vec<PathBuf>>,
}

/// What a runtime's files say about one container. Paths are the node's, without a host root in front of them.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) runtime: Runtime,
    pub(super) id: String,
    pub(super) names: Vec<String>,
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<Pod>,
    pub(super) image_name: Option<String>,
    pub(super) runtime_root_mode: Option<u32>,
    /// A pod's pause container.
    pub(super) sandbox: bool,
    pub(super) pid: u32,
    pub(super) bundle: Option<Bundle>,
    /// The directory or file that speaks of it, for messages.
    pub(super) state: PathBuf,
    /// The node's ids that its files begin at, by the name of the store: user, group.
    pub(super) store_ids: Option<(u32, u32)>,
    /// The directories that the runtime made for it.
    pub(super) record: Option<RecordedRoot>,
    /// Directories from which the runtime mounts when it shortens paths.
    pub(super) bases: Vec<PathBuf>,
    /// Where on the node it mounted the root.
    pub(super) mounted_at: Option<PathBuf>,
}

impl Draft {
    /// Unambiguous, and a valid argument.
    pub(super) fn label(&self) -> String {
        let short = &self.id[..self
            .id
            .char_indices()
            .nth(12)
            .map_or(self.id.len(), |(at, _)| at)];
        match (&self.pod, self.names.first()) {
            (Some(pod), _) => format!("{}/{}/{} ({short})", pod.namespace, pod.name, pod.container),
            (None, Some(name)) => format!("{name} ({short})"),
            (None, None) => match &self.namespace {
                Some(namespace) => format!("{short} (namespace {namespace})"),
                None => short.to_owned(),
            },
        }
    }
}
