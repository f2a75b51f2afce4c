//! Which sessions are saved when they end, as their administrator and their pod say.

use std::str::FromStr;

use crate::node::container::{Container, End};

/// Label or annotation of a pod with a [`SaveEnded`] for its sessions.
pub(super) const SAVE_ON_END: &str = "upperdeck.io/save-on-end";

/// Which sessions are saved when they end, without being asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SaveEnded {
    /// None.
    #[default]
    Never,
    /// Those that end with an exit code other than 0, or because their memory is used up.
    Failure,
    /// All.
    Always,
}

impl FromStr for SaveEnded {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            "failure" => Ok(Self::Failure),
            "always" => Ok(Self::Always),
            _ => Err("expected never, failure or always".to_owned()),
        }
    }
}

impl SaveEnded {
    /// Returns what applies to a session: what its pod says, in an annotation or else a label, or else `self`. A value that
    /// is not known counts as none.
    pub(super) fn of(self, container: &Container) -> Self {
        let said = container.pod.as_ref().and_then(|pod| pod.said(SAVE_ON_END));
        said.and_then(|said| said.parse().ok()).unwrap_or(self)
    }

    pub(super) fn wants(self, end: &End) -> bool {
        match self {
            Self::Never => false,
            Self::Failure => end.out_of_memory || end.exit_code != Some(0),
            Self::Always => true,
        }
    }
}
