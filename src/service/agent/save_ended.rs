//! Which sessions are saved when they end, as their pod says.

use crate::node::container::Container;
use crate::service::job::SaveEnded;

/// Label or annotation of a pod with a [`SaveEnded`] for its sessions.
pub(super) const SAVE_ON_END: &str = "upperdeck.io/save-on-end";

/// Returns what the pod of a container says, in an annotation or else a label. A value that is not known counts as none.
pub(super) fn wish(container: &Container) -> Option<SaveEnded> {
    let said = container.pod.as_ref()?.said(SAVE_ON_END)?;
    said.parse().ok()
}
