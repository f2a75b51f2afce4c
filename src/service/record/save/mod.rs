//! A save as the record has it; `draft` is where it changes.

mod draft;

use serde::{Deserialize, Serialize};

pub(super) use draft::Step;
pub use draft::{Draft, Errand, Policy};

use crate::service::job::{Category, Code, JobId, Kind, Phase, SaveOptions, Saved, State};

/// A save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Save {
    /// The job.
    pub id: JobId,
    /// Full ID of the container.
    pub session: String,
    /// The session, for people.
    pub session_name: String,
    /// The node that it runs on.
    pub node: String,
    /// Whose image it becomes.
    pub user: String,
    /// Who owns the session; agents prove it.
    pub owner: String,
    /// The image's name.
    pub name: String,
    /// The image's tag.
    pub tag: String,
    /// The whole place, as `commit` takes it.
    pub destination: String,
    /// The user's words.
    pub message: Option<String>,
    /// How.
    pub options: SaveOptions,
    /// What the session is for.
    pub kind: Kind,
    /// What it computes on.
    pub category: Category,
    /// The image that the session was started from.
    pub base: Option<String>,
    /// Where the job is.
    pub state: State,
    /// What it is doing.
    pub phase: Option<Phase>,
    /// The number of the order that is out, from 1. What comes back of an earlier one is late.
    pub attempt: u32,
    /// Attempts that failed and may be repeated.
    pub failures: u32,
    /// The highest fence heard of.
    pub fence: u64,
    /// The highest number heard within that fence.
    pub seq: u64,
    /// Grows with every change.
    pub version: u64,
    /// How far it is; kept beside, and no change.
    #[serde(skip)]
    pub progress: Option<Progress>,
    /// How long the container stood still, in milliseconds.
    pub pause_ms: Option<f64>,
    /// Remarks.
    pub warnings: Vec<Remark>,
    /// What was saved.
    pub result: Option<Saved>,
    /// What went wrong.
    pub error: Option<Failure>,
    /// Whether somebody asked for its end.
    pub cancelling: bool,
    /// Who asked for it.
    pub caller: String,
    /// When it was asked for: milliseconds since the epoch, UTC, as all of these.
    pub created_ms: i64,
    /// When it last began to wait.
    pub queued_ms: i64,
    /// No agent begins before.
    pub not_before_ms: i64,
    /// When an agent began with this attempt.
    pub started_ms: Option<i64>,
    /// When it ended.
    pub finished_ms: Option<i64>,
}

/// How far a save is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes read and packed.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// Compressed bytes sent.
    pub bytes_sent: u64,
    /// Entries in all.
    #[serde(default)]
    pub entries_total: u64,
    /// Bytes packed a second.
    pub rate: Option<f64>,
    /// When the agent said so.
    pub at_ms: i64,
}

/// Something that the user should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    /// Stable.
    pub code: String,
    /// A sentence.
    pub message: String,
}

/// Why a save failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable.
    pub code: Code,
    /// A sentence.
    pub message: String,
    /// Whether asking again may help.
    pub retryable: bool,
}
