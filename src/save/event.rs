//! What a save tells the outside while it runs: one event type for the bar, for `--progress json` and for the service.

use serde::{Deserialize, Serialize};

use crate::common::digest::Digest;

/// Version of the event lines; it grows when a field changes its meaning or goes away, not when one is added.
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
    /// A save that was asked for by way of a manager waits. Never said by `commit`.
    Queued {
        /// So many are before it.
        place: u64,
    },
    /// A phase began.
    Phase {
        /// Which one.
        phase: Phase,
    },
    /// How far the save is. Totals are known before the first byte is read.
    Progress {
        /// Tar bytes made so far, of all layers of this save.
        bytes_done: u64,
        /// Tar bytes in all.
        bytes_total: u64,
        /// Compressed bytes handed to the destination so far.
        bytes_sent: u64,
        /// Entries of the layer.
        entries_total: u64,
    },
    /// Bytes of a base layer on their way to the destination.
    BaseProgress {
        /// Index of the layer, bottom first.
        layer: usize,
        /// Number of base layers.
        layers: usize,
        /// Compressed bytes delivered so far.
        bytes_done: u64,
        /// Compressed size; 0 when it is not known beforehand.
        bytes_total: u64,
    },
    /// Something that the user should know, and that did not stop the save.
    Warning {
        /// Stable code in snake case, e.g. `unstable_file`.
        code: String,
        /// A sentence.
        message: String,
    },
    /// The container stood still between two instants.
    Paused {
        /// From freeze written to thaw read back, in milliseconds.
        pause_ms: f64,
    },
    /// All is delivered but the tag; with `--gate-fd` the save waits for the answer.
    Ready,
    /// The last line of a save that succeeded.
    Saved {
        /// `HOST/REPO@sha256:…`, or the layout's path with the digest.
        reference: String,
        /// Digest of the manifest.
        digest: Digest,
    },
    /// The last line of a save that failed.
    Failed {
        /// The exit code.
        exit: u8,
        /// Stable code in snake case, e.g. `base_unproven`.
        code: String,
        /// A sentence.
        message: String,
        /// Whether trying again may help.
        retryable: bool,
    },
}

/// Where a save reports to. Called from several threads; must not block for long.
pub trait Observer: Send + Sync {
    /// One event.
    fn event(&self, event: Event);
}

/// For callers who do not want to hear anything.
impl Observer for () {
    fn event(&self, _: Event) {}
}
