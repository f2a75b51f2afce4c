//! What an agent tells the managers about a job.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Code, Event, JobId};

/// One line from an agent. A manager takes it only when `fence` is the job's highest so far, and once for each `seq`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Which job.
    pub job: JobId,
    /// Which node says so.
    pub node: String,
    /// Which attempt at the job, from 1.
    pub attempt: u32,
    /// The fencing token of the claim, greater for each later one.
    pub fence: u64,
    /// Counts within the claim, from 0.
    pub seq: u64,
    /// When, by the agent's clock: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// What.
    pub said: Said,
}

/// What there is to say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "snake_case")]
pub enum Said {
    /// The agent has it.
    Assigned,
    /// The child process runs.
    Started,
    /// The child said so; progress is thinned to two a second.
    Event {
        /// The child's own event.
        #[serde(rename = "child")]
        event: Event,
    },
    /// The agent gives it back without having begun (it drains), or the lease was lost.
    GivenBack {
        /// Why, as a sentence.
        reason: String,
    },
    /// The last word of this attempt.
    Ended {
        /// How it ended.
        outcome: Outcome,
    },
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The image is there.
    Succeeded {
        /// What was saved.
        saved: Saved,
    },
    /// There is none.
    Failed {
        /// For programs.
        code: Code,
        /// For people: what happened, where, what to do.
        message: String,
        /// Whether another attempt may help.
        retryable: bool,
    },
    /// As was asked for.
    Cancelled,
}

/// What a save made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Saved {
    /// `HOST/REPO@sha256:…`, or the layout's path with the digest.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Compressed bytes of the layers that this save made.
    pub layer_bytes: u64,
    /// Compressed bytes of the whole image: all layers and the config.
    pub image_bytes: u64,
    /// Bytes that were sent to the destination.
    pub sent_bytes: u64,
    /// Entries in the layers that this save made.
    pub entries: u64,
    /// Whether it went on top of an earlier save.
    pub delta: bool,
    /// Name of the base image, if it has one.
    pub base_name: Option<String>,
    /// Digest of the base's manifest, if it is known.
    pub base_digest: Option<String>,
    /// How long the container stood still, in milliseconds.
    pub pause_ms: Option<f64>,
    /// How long the save took, in seconds.
    pub seconds: f64,
}
