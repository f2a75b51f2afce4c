//! The report of `upperdeck bench`. Its JSON form is a stable interface, documented in the verb's help; fields are only
//! added.

use serde::Serialize;

use super::limit::{Costs, Limit};
use crate::layer::Compression;

/// Version of the report. It increases when a field is removed or changes its meaning, not when one is added.
pub(crate) const REPORT_VERSION: u32 = 1;

/// The report. Every figure is the median of the rounds; MB are 1,000,000 bytes.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// [`REPORT_VERSION`].
    pub(crate) version: u32,
    /// The machine.
    pub(crate) node: Node,
    /// What was saved.
    pub(crate) subject: Subject,
    /// Number of rounds.
    pub(crate) rounds: usize,
    /// Each stage alone, in the order of a save.
    pub(crate) stages: Vec<Stage>,
    /// Each codec at each level, measured on a sample of the tar in memory.
    pub(crate) codecs: Vec<Codec>,
    /// Whole saves.
    pub(crate) saves: Vec<Save>,
    /// Recommended flags, the best first.
    pub(crate) advice: Vec<Advice>,
    /// Notes for the interpretation, as sentences.
    pub(crate) notes: Vec<String>,
}

/// The machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Node {
    /// Number of cores that this process may use.
    pub(crate) cores: usize,
    /// Number of workers of the whole saves.
    pub(crate) jobs: usize,
}

/// The tree that was saved.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Subject {
    /// `container`, `directory` or `generated`.
    pub(crate) kind: &'static str,
    /// ID, path, or `tree`.
    pub(crate) name: String,
    /// Number of entries of the layer.
    pub(crate) entries: u64,
    /// Size of the tar in bytes.
    pub(crate) tar_bytes: u64,
    /// Size in bytes of the part of the tar that was in memory for the codecs.
    pub(crate) sample_bytes: u64,
}

/// Measurements of a stage alone.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Stage {
    /// `scan`, `plan`, `read_first`, `read`, `sha256`, `make`, `write_file`, `upload`.
    pub(crate) stage: &'static str,
    /// Number of threads.
    pub(crate) threads: usize,
    /// Wall time in seconds.
    pub(crate) seconds: f64,
    /// CPU time of this process in seconds.
    pub(crate) cpu_seconds: f64,
    /// Number of bytes processed: of the tar, or compressed ones for the last two stages.
    pub(crate) bytes: u64,
    /// Rate in MB/s.
    pub(crate) mb_per_second: f64,
    /// Rate of entries, for `scan` and `plan`.
    pub(crate) entries_per_second: Option<f64>,
}

/// Measurements of a codec at a level.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Codec {
    /// Codec.
    pub(crate) compression: Compression,
    /// Level.
    pub(crate) level: u32,
    /// Compressed size divided by uncompressed size.
    pub(crate) ratio: f64,
    /// Speed by number of threads.
    pub(crate) by_threads: Vec<ByThreads>,
}

/// Speed of a codec with a given number of threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ByThreads {
    /// Number of concurrent threads.
    pub(crate) threads: usize,
    /// Total rate in MB of tar per second.
    pub(crate) mb_per_second: f64,
    /// CPU seconds per GB of tar.
    pub(crate) cpu_seconds_per_gb: f64,
}

/// Measurements of a whole save, and the limit computed from the stages.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Save {
    /// `nothing`, `file` or `registry`.
    pub(crate) to: &'static str,
    /// Codec.
    pub(crate) compression: Compression,
    /// Level.
    pub(crate) level: u32,
    /// Number of workers.
    pub(crate) jobs: usize,
    /// Number of layers.
    pub(crate) layers: usize,
    /// Wall time in seconds.
    pub(crate) seconds: f64,
    /// CPU time of this process in seconds.
    pub(crate) cpu_seconds: f64,
    /// Number of compressed bytes.
    pub(crate) sent_bytes: u64,
    /// Rate in MB of tar per second.
    pub(crate) mb_per_second: f64,
    /// Cost of each stage of the save, in seconds.
    pub(crate) costs: Costs,
    /// The shortest possible duration.
    pub(crate) limit: Limit,
    /// Limit divided by actual duration, in per cent.
    pub(crate) limit_percent: f64,
}

/// Recommended flags.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Advice {
    /// Flags for `upperdeck commit`; empty for the defaults.
    pub(crate) flags: Vec<String>,
    /// Limit of a save with these flags, in seconds.
    pub(crate) limit_seconds: f64,
    /// Estimated number of compressed bytes.
    pub(crate) sent_bytes: u64,
    /// The reason, as a sentence.
    pub(crate) why: String,
}
