//! What a manager asks an agent to do. It is data: an agent never takes a command, a flag or a host name of its own
//! choosing from it without checking it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// A job's name: a UUID of version 7, so that they sort by when they were made.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct JobId(pub Uuid);

impl JobId {
    /// A new one.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// Before every one that was made from `ms` (milliseconds since 1970) on.
    pub fn earliest(ms: i64) -> Self {
        let ms = u64::try_from(ms).unwrap_or(0);
        Self(uuid::Builder::from_unix_timestamp_millis(ms, &[0; 10]).into_uuid())
    }
}

impl Default for JobId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for JobId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// What a user may choose about a save. Everything has a default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SaveOptions {
    /// Save everything anew, even where a delta would do.
    pub full: bool,
    /// `gzip` or `zstd`; none: as the agent is configured.
    pub compression: Option<String>,
    /// Patterns of paths to leave out, as `commit --exclude`.
    pub exclude: Vec<String>,
    /// Mounted volumes to save in layers of their own, as `commit --include-volume`.
    pub include_volumes: Vec<String>,
    /// Labels of the image.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// One save, as it is put into the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Which job.
    pub job: JobId,
    /// The only node whose agent may take it.
    pub node: String,
    /// Full ID of the container.
    pub session: String,
    /// Who owns the session; the agent proves it again before it runs.
    pub owner: String,
    /// Where the image goes, made by the manager from its template: a destination as `commit` takes it.
    pub destination: String,
    /// History comment.
    pub message: Option<String>,
    /// What the user chose.
    pub options: SaveOptions,
    /// Which attempt at the job this is, from 1.
    pub attempt: u32,
    /// Every fence that is given out for this order is greater: the record's highest so far. It survives a queue that
    /// lost everything.
    pub fence_after: u64,
    /// When it was signed (milliseconds since the epoch, UTC): how long its kind lives follows, and how long its node has
    /// to remember that it has ended.
    pub issued_ms: i64,
    /// Not before this instant (milliseconds since the epoch, UTC): a retry's pause.
    pub not_before_ms: i64,
    /// An agent that reads it after this instant (milliseconds since the epoch, UTC) does not act on it.
    pub expires_ms: i64,
    /// The longest that the save may run, in seconds.
    pub timeout_s: u64,
}
