//! How a container ended, for `ps` and `inspect`.

use serde::Serialize;

use crate::node::container::End;

/// The end of a container, as far as its runtime has recorded it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct EndView {
    /// Exit code of the first process.
    pub(crate) exit_code: Option<i64>,
    /// Whether it ended because its memory was used up.
    pub(crate) out_of_memory: bool,
    /// Time (RFC 3339).
    pub(crate) at: Option<String>,
    /// Whether it was never started.
    pub(crate) never_started: bool,
    #[serde(skip)]
    text: String,
}

impl EndView {
    /// Creates the view.
    pub(crate) fn new(end: &End) -> Self {
        Self {
            exit_code: end.exit_code,
            out_of_memory: end.out_of_memory,
            at: end.at.map(|at| at.to_string()),
            never_started: end.never_started,
            text: end.to_string(),
        }
    }

    /// Returns it as a text.
    pub(super) fn status(&self) -> String {
        match self.text.as_str() {
            "" => "ended".to_owned(),
            text if self.never_started => text.to_owned(),
            text => format!("ended: {text}"),
        }
    }
}
