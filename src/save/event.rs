//! The events that a save reports while it runs: one type for the progress bar, for `--progress json` and for the
//! service.

use serde::{Deserialize, Serialize};

use super::changes::Changes;
use crate::common::digest::Digest;
pub use crate::common::waits::WaitReason;

/// Version of the event lines. It is incremented when a field changes its meaning or is removed, not when one is added.
pub const EVENT_VERSION: u32 = 1;

/// What a save is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the runtime's state, proving the base.
    Locating,
    /// Walking the upper directory.
    Scanning,
    /// Reading, compressing, hashing and delivering the layer.
    Streaming,
    /// Delivering base layers that the destination does not have.
    Base,
    /// Delivering config, manifest and tag.
    Finishing,
}

/// One line of `--progress json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A save submitted through a manager is waiting. `commit` never reports it.
    Queued {
        /// Number of saves before it.
        place: u64,
    },
    /// A phase began.
    Phase {
        /// The phase.
        phase: Phase,
    },
    /// Progress of the save. Totals are known before the first byte is read.
    Progress {
        /// Tar bytes produced so far, over all layers of this save.
        bytes_done: u64,
        /// Total of tar bytes.
        bytes_total: u64,
        /// Compressed bytes passed to the destination so far.
        bytes_sent: u64,
        /// Total of entries in the layers.
        entries_total: u64,
        /// Bytes of layers of the base and of earlier saves that were brought to the destination so far.
        #[serde(default)]
        base_done: u64,
        /// Total bytes of such layers that the destination lacked; it is known soon after the beginning.
        #[serde(default)]
        base_total: u64,
    },
    /// Progress of the transfer of a base layer to the destination.
    BaseProgress {
        /// Index of the layer, bottom first.
        layer: usize,
        /// Number of base layers.
        layers: usize,
        /// Compressed bytes delivered so far.
        bytes_done: u64,
        /// Compressed size; 0 if it is not known in advance.
        bytes_total: u64,
    },
    /// A problem that the user should know of and that did not stop the save.
    Warning {
        /// Stable code in snake case, e.g. `unstable_file`.
        code: String,
        /// The message, a sentence.
        message: String,
    },
    /// The container was frozen and is thawed.
    Paused {
        /// Time from the write of the freeze to the read-back of the thaw, in milliseconds.
        pause_ms: f64,
    },
    /// The save waits for something beside its own work, or not any more. Short waits are not reported.
    Waiting {
        /// What it waits for; `null`: for nothing any more.
        reason: Option<WaitReason>,
        /// Seconds until the end of the wait, if that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds: Option<f64>,
    },
    /// Everything but the tag is delivered. With `--gate-fd` the save waits for the answer.
    Ready {
        /// Digest of the image that the tag names now and would lose it. The tag is taken from no other image.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replaces: Option<Digest>,
    },
    /// The image is at the destination under its tag: the save has succeeded. Only warnings follow, about what was not
    /// done besides, or `failed` if a file with the result cannot be written.
    Saved {
        /// `HOST/REPO@sha256:…`, or the layout's path with the digest.
        reference: String,
        /// Digest of the manifest.
        digest: Digest,
        /// What was added, changed and removed; absent if that is not known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        changes: Option<Changes>,
    },
    /// The last line of a save that failed.
    Failed {
        /// The exit code.
        exit: u8,
        /// Stable code in snake case, e.g. `base_unproven`.
        code: String,
        /// The message, a sentence.
        message: String,
        /// Whether a retry may help.
        retryable: bool,
    },
}

/// Receives the events of a save. Called from several threads; must not block for long.
pub trait Observer: Send + Sync {
    /// Handles one event.
    fn event(&self, event: Event);
}

/// An observer that ignores all events.
impl Observer for () {
    fn event(&self, _: Event) {}
}
