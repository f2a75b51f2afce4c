//! Reports of an agent about a job, which it sends to the managers.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Changes, Code, Event, JobId};
use crate::image::packages::Packages;

/// One report. A manager accepts it only if `fence` is the highest of the job so far, and accepts each `seq` once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The job.
    pub job: JobId,
    /// Name of the reporting node.
    pub node: String,
    /// Number of the attempt, starting at 1.
    pub attempt: u32,
    /// Fencing token of the claim; each later claim has a greater one.
    pub fence: u64,
    /// Sequence number within the claim, starting at 0.
    pub seq: u64,
    /// Time by the agent's clock: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// Content of the report.
    #[serde(rename = "said")]
    pub update: Update,
}

/// Content of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "snake_case")]
pub enum Update {
    /// The agent has claimed the job.
    Assigned,
    /// The child process has started.
    Started,
    /// An event of the child process. Progress events are limited to two per second.
    Event {
        /// The event as the child emitted it.
        #[serde(rename = "child")]
        event: Event,
    },
    /// The packages by which the image that is saved differs from its base. Sent before the end.
    Packages {
        /// The list, shortened.
        packages: Packages,
    },
    /// The agent returned the job unfinished, because it is draining or because no manager confirmed the job in time.
    GivenBack {
        /// Reason, as a sentence.
        reason: String,
    },
    /// Last report of this attempt.
    Ended {
        /// How the attempt ended.
        outcome: Outcome,
    },
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The image was saved.
    Succeeded {
        /// Description of the saved image.
        saved: Saved,
    },
    /// There is no image.
    Failed {
        /// Reason for programs.
        code: Code,
        /// Reason for people: what happened, where, and what to do.
        message: String,
        /// Whether another attempt may succeed.
        retryable: bool,
    },
    /// The attempt was cancelled on request.
    Cancelled,
}

/// Description of a saved image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Saved {
    /// `HOST/REPO@sha256:…`, or the path of the OCI layout with the digest.
    pub reference: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Compressed size in bytes of the layers that this save created.
    pub layer_bytes: u64,
    /// Compressed size in bytes of the whole image: all layers and the config.
    pub image_bytes: u64,
    /// Bytes sent to the destination.
    pub sent_bytes: u64,
    /// Number of entries in the layers that this save created.
    pub entries: u64,
    /// Whether the save was a delta on top of an earlier one.
    pub delta: bool,
    /// Name of the base image, if there is one.
    pub base_name: Option<String>,
    /// Digest of the base image's manifest, if known.
    pub base_digest: Option<String>,
    /// How long the container was frozen, in milliseconds.
    pub pause_ms: Option<f64>,
    /// Duration of the save, in seconds.
    pub seconds: f64,
    /// What was added, changed and removed; absent if that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
}
