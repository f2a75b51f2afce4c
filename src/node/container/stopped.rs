//! Containers that a runtime keeps on disk and that have no process, so that asking for one of them says why it cannot
//! be saved.

use std::path::PathBuf;

use super::Pod;
use super::recorded::{RecordedContainer, label};

/// A container that a runtime's files describe and that does not run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StoppedContainer {
    pub(super) id: String,
    pub(super) names: Vec<String>,
    /// containerd's namespace.
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<Pod>,
    /// Whether it is the pause container of a pod.
    pub(super) sandbox: bool,
    /// How it ended, if the runtime wrote that down.
    pub(super) end: Option<String>,
    /// The file that describes it.
    pub(super) state: PathBuf,
}

impl StoppedContainer {
    /// Describes a container whose runtime still records a process that is gone.
    pub(super) fn of(draft: &RecordedContainer) -> Self {
        Self {
            id: draft.id.clone(),
            names: draft.names.clone(),
            namespace: draft.namespace.clone(),
            pod: draft.pod.clone(),
            sandbox: draft.sandbox,
            end: Some(format!("its process {} is no longer there", draft.pid)),
            state: draft.state.clone(),
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

    /// Returns the reason why it cannot be saved.
    pub(super) fn detail(&self) -> String {
        let end = self.end.as_ref().map(|end| format!(" ({end})"));
        format!(
            "{} is stopped{} according to {}; only a running container can be saved: start it first",
            self.label(),
            end.unwrap_or_default(),
            self.state.display()
        )
    }
}
