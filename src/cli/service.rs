//! `manager`, `agent` and `up`: the service, from its settings.

/// In the state directory of an `upperdeck up`: how it is reached, with its token. Only its owner can read it.
pub(super) const UP_FILE: &str = "up.url";
