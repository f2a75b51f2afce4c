//! Which sessions are saved when they end, as their pod or else the administrator says.

use super::options::Options;
use crate::node::container::Container;
use crate::service::job::{EndWish, SaveEnded};

/// Label or annotation of a pod with a [`SaveEnded`] for its sessions.
pub(super) const SAVE_ON_END: &str = "upperdeck.io/save-on-end";

/// Returns what the pod of a container says, in an annotation or else a label, or else the administrator. A value that is
/// not known counts as none.
pub(super) fn wish(options: &Options, container: &Container) -> EndWish {
    let pod = container.pod.as_ref();
    let said: Option<SaveEnded> = pod
        .and_then(|pod| pod.said(SAVE_ON_END))
        .and_then(|said| said.parse().ok());
    EndWish {
        wanted: said.unwrap_or(options.save_ended),
        by_pod: said.is_some(),
    }
}
