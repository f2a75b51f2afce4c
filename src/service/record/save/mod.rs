//! The data of a save in the record. [`draft`] changes them.

mod action;
mod draft;
mod policy;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use action::OutboxAction;
pub(super) use action::Step;
pub use draft::Draft;
pub use policy::Policy;

use super::receiver::Receiver;
use crate::service::job::{
    Category, Code, JobId, Kind, Phase, Replaces, SaveOptions, Saved, State, WaitReason,
};

/// A save.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Save {
    /// The job.
    pub id: JobId,
    /// Full ID of the container.
    pub session: String,
    /// Display name of the session.
    pub session_name: String,
    /// Node on which the session runs.
    pub node: String,
    /// Owner of the image.
    pub user: String,
    /// Owner of the session. Agents verify it.
    pub owner: String,
    /// Name of the image.
    pub name: String,
    /// Tag of the image.
    pub tag: String,
    /// Complete destination, in the syntax of `commit`.
    pub destination: String,
    /// Message of the user.
    pub message: Option<String>,
    /// Options of the save.
    pub options: SaveOptions,
    /// The image that the tag may be taken from.
    #[serde(default)]
    pub replaces: Replaces,
    /// Receivers that its user wants to be told about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notify: Vec<Receiver>,
    /// Kind of application.
    pub kind: Kind,
    /// Accelerator category.
    pub category: Category,
    /// Image that the session was started from.
    pub base: Option<String>,
    /// State of the job.
    pub state: State,
    /// Current phase while it runs.
    pub phase: Option<Phase>,
    /// When the current state or phase began: milliseconds since the epoch, UTC.
    #[serde(default)]
    pub since_ms: Option<i64>,
    /// What it waits for while it runs, as its process says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Held>,
    /// Number of the current order, starting at 1. Reports about an earlier one are late.
    pub attempt: u32,
    /// Number of failed attempts that may be repeated.
    pub failures: u32,
    /// Highest fence in the reports so far.
    pub fence: u64,
    /// Highest sequence number in the reports with that fence.
    pub seq: u64,
    /// Version; increases with every change.
    pub version: u64,
    /// Progress. It is stored separately and does not change the version.
    #[serde(skip)]
    pub progress: Option<Progress>,
    /// How long the container was frozen, in milliseconds.
    pub pause_ms: Option<f64>,
    /// Warnings.
    pub warnings: Vec<SaveWarning>,
    /// Description of the saved image.
    pub result: Option<Saved>,
    /// Reason for the failure.
    pub error: Option<Failure>,
    /// Whether cancellation was requested.
    pub cancelling: bool,
    /// Whether it was asked to run at normal priority.
    #[serde(default)]
    pub hurried: bool,
    /// The caller that requested the save.
    pub caller: String,
    /// Time of the request: milliseconds since the epoch, UTC, like all following instants.
    pub created_ms: i64,
    /// When it was last queued.
    pub queued_ms: i64,
    /// Earliest time at which an agent may start it.
    pub not_before_ms: i64,
    /// When an agent started this attempt.
    pub started_ms: Option<i64>,
    /// When it ended.
    pub finished_ms: Option<i64>,
}

/// The caller of autosaves in the record and the audit log.
pub(crate) const AUTOSAVE: &str = "upperdeck:auto";
/// The caller of saves that are made because their session ended.
pub(crate) const ENDED: &str = "upperdeck:ended";

/// Who or what asked for a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MadeBy {
    /// A user, or a program on behalf of one.
    #[default]
    User,
    /// The autosave policy of the session.
    Autosave,
    /// The end of the session.
    End,
}

impl Save {
    /// Returns who or what asked for it.
    pub fn made_by(&self) -> MadeBy {
        match self.caller.as_str() {
            AUTOSAVE => MadeBy::Autosave,
            ENDED => MadeBy::End,
            _ => MadeBy::User,
        }
    }
}

/// What a running save waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The reason.
    pub reason: WaitReason,
    /// When it will be over, if that is known: milliseconds since the epoch, UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<i64>,
}

/// Progress of a save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes read and compressed so far, with those of the base.
    pub bytes_done: u64,
    /// Total bytes to read, with those of the base.
    pub bytes_total: u64,
    /// Bytes of layers of the base and of earlier saves that were brought to the destination so far.
    #[serde(default)]
    pub base_done: u64,
    /// Total bytes of such layers that the destination lacked.
    #[serde(default)]
    pub base_total: u64,
    /// Compressed bytes sent so far.
    pub bytes_sent: u64,
    /// Total number of entries.
    #[serde(default)]
    pub entries_total: u64,
    /// Bytes per second.
    pub rate: Option<f64>,
    /// Time of the report by the agent's clock: milliseconds since the epoch, UTC.
    pub at_ms: i64,
}

/// A warning for the user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWarning {
    /// Stable code.
    pub code: String,
    /// Description as a sentence.
    pub message: String,
}

/// Why a save failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable code.
    pub code: Code,
    /// Description as a sentence.
    pub message: String,
    /// Whether another attempt may succeed.
    pub retryable: bool,
}
