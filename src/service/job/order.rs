//! The order with which a manager requests a save from an agent. An order is only data: an agent does not use a
//! command, a flag or a host name from it without checking it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::common::digest::Digest;

/// Identifier of a job: a UUID of version 7, so that identifiers sort by creation time.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct JobId(pub Uuid);

impl JobId {
    /// Creates a new identifier.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// Returns when it was created: milliseconds since the epoch, UTC; 0 if it does not say.
    pub(crate) fn created_ms(self) -> i64 {
        let at = self.0.get_timestamp().map(|at| at.to_unix());
        at.map_or(0, |(seconds, nanos)| {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX / 1000);
            seconds * 1000 + i64::from(nanos / 1_000_000)
        })
    }

    /// Returns an identifier that sorts before every one that was created at or after `ms` (milliseconds since the
    /// epoch).
    pub(crate) fn earliest(ms: i64) -> Self {
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

/// Options of a save that a user can choose. Every option has a default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SaveOptions {
    /// Save everything again, even if a delta would be possible.
    pub full: bool,
    /// `gzip` or `zstd`; if absent, the agent's configuration decides.
    pub compression: Option<String>,
    /// Patterns of paths to leave out, as in `commit --exclude`.
    pub exclude: Vec<String>,
    /// Mounted volumes to save in separate layers, as in `commit --include-volume`.
    pub include_volumes: Vec<String>,
    /// Labels of the image.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// The image that a save may take its tag from. A tag that names no image may always be written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replaces {
    /// Any image, as with `docker commit`.
    #[default]
    Any,
    /// None: the tag must not exist.
    Nothing,
    /// Only the image with this digest.
    Image(Digest),
}

/// One save, as it is put into the queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The job.
    pub job: JobId,
    /// The only node whose agent may take the order.
    pub node: String,
    /// Full ID of the container.
    pub session: String,
    /// Owner of the session. The agent verifies it again before the save starts.
    pub owner: String,
    /// Destination of the image, in the syntax of `commit`. The manager fills it in from its template.
    pub destination: String,
    /// Comment for the image's history.
    pub message: Option<String>,
    /// Options chosen by the user.
    pub options: SaveOptions,
    /// The image that the tag may be taken from.
    #[serde(default)]
    pub replaces: Replaces,
    /// Whether it is an autosave, which the queue admits behind every other save. Left out otherwise, as older agents do not
    /// know the field.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub autosave: bool,
    /// Number of the attempt, starting at 1.
    pub attempt: u32,
    /// The highest fence in the record so far. Every fence that is issued for this order is greater, even if the queue
    /// has lost all its data in between.
    pub fence_after: u64,
    /// Time of signing (milliseconds since the epoch, UTC). Together with `expires_ms` it gives the lifetime of orders,
    /// which determines how long the node has to remember that the job has ended.
    pub issued_ms: i64,
    /// Earliest start (milliseconds since the epoch, UTC): the delay before a retry.
    pub not_before_ms: i64,
    /// Expiry (milliseconds since the epoch, UTC). An agent that reads the order later does not act on it.
    pub expires_ms: i64,
    /// Time limit of the save, in seconds.
    pub timeout_s: u64,
}
