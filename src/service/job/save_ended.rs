//! Which sessions are saved when they end.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Which sessions are saved when they end, without being asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SaveEnded {
    /// None.
    #[default]
    Never,
    /// Those that end with an exit code other than 0, with one that is not known, or because their memory is used up.
    Failure,
    /// All.
    Always,
}

impl FromStr for SaveEnded {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Never, Self::Failure, Self::Always];
        all.into_iter()
            .find(|one| one.name() == text)
            .ok_or_else(|| "expected never, failure or always".to_owned())
    }
}

impl SaveEnded {
    /// Returns the word that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Failure => "failure",
            Self::Always => "always",
        }
    }

    /// Returns whether a session is saved that ended with this exit code.
    pub(crate) fn wants(self, exit_code: Option<i64>, out_of_memory: bool) -> bool {
        match self {
            Self::Never => false,
            Self::Failure => out_of_memory || exit_code != Some(0),
            Self::Always => true,
        }
    }
}
