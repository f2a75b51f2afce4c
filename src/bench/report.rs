//! The report of `upperdeck bench`. Its JSON form is a stable interface, documented in the verb's help; fields are only
//! added.

use serde::Serialize;

use super::limit::{Costs, Limit};
use crate::layer::Compression;

/// Version of the report. It increases when a field is removed or changes its meaning, not when one is added.
pub const REPORT_VERSION: u32 = 1;

/// The report. Every figure is the median of the rounds; MB are 1,000,000 bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub version: u32,
    /// The machine.
    pub node: Node,
    /// What was saved.
    pub subject: Subject,
    /// Number of rounds.
    pub rounds: usize,
    /// Each stage alone, in the order of a save.
    pub stages: Vec<Stage>,
    /// Each codec at each level, measured on a sample of the tar in memory.
    pub codecs: Vec<Codec>,
    /// Whole saves.
    pub saves: Vec<Save>,
    /// Recommended flags, the best first.
    pub advice: Vec<Advice>,
    /// Notes for the interpretation, as sentences.
    pub notes: Vec<String>,
}

/// The machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Node {
    /// Number of cores that this process may use.
    pub cores: usize,
    /// Number of workers of the whole saves.
    pub jobs: usize,
}

/// The tree that was saved.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// `container`, `directory` or `generated`.
    pub kind: &'static str,
    /// ID, path, or `tree`.
    pub name: String,
    /// Number of entries of the layer.
    pub entries: u64,
    /// Size of the tar in bytes.
    pub tar_bytes: u64,
    /// Size in bytes of the part of the tar that was in memory for the codecs.
    pub sample_bytes: u64,
}

/// Measurements of a stage alone.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// `scan`, `plan`, `read_first`, `read`, `sha256`, `make`, `write_file`, `upload`.
    pub stage: &'static str,
    /// Number of threads.
    pub threads: usize,
    /// Wall time in seconds.
    pub seconds: f64,
    /// CPU time of this process in seconds.
    pub cpu_seconds: f64,
    /// Number of bytes processed: of the tar, or compressed ones for the last two stages.
    pub bytes: u64,
    /// Rate in MB/s.
    pub mb_per_second: f64,
    /// Rate of entries, for `scan` and `plan`.
    pub entries_per_second: Option<f64>,
}

/// Measurements of a codec at a level.
#[derive(Clone, Debug, Serialize)]
pub struct Codec {
    /// Codec.
    pub compression: Compression,
    /// Level.
    pub level: u32,
    /// Compressed size divided by uncompressed size.
    pub ratio: f64,
    /// Speed by number of threads.
    pub by_threads: Vec<ByThreads>,
}

/// Speed of a codec with a given number of threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ByThreads {
    /// Number of concurrent threads.
    pub threads: usize,
    /// Total rate in MB of tar per second.
    pub mb_per_second: f64,
    /// CPU seconds per GB of tar.
    pub cpu_seconds_per_gb: f64,
}

/// Measurements of a whole save, and the limit computed from the stages.
#[derive(Clone, Debug, Serialize)]
pub struct Save {
    /// `nothing`, `file` or `registry`.
    pub to: &'static str,
    /// Codec.
    pub compression: Compression,
    /// Level.
    pub level: u32,
    /// Number of workers.
    pub jobs: usize,
    /// Number of layers.
    pub layers: usize,
    /// Wall time in seconds.
    pub seconds: f64,
    /// CPU time of this process in seconds.
    pub cpu_seconds: f64,
    /// Number of compressed bytes.
    pub sent_bytes: u64,
    /// Rate in MB of tar per second.
    pub mb_per_second: f64,
    /// Cost of each stage of the save, in seconds.
    pub costs: Costs,
    /// The shortest possible duration.
    pub limit: Limit,
    /// Limit divided by actual duration, in per cent.
    pub limit_percent: f64,
}

/// Recommended flags.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// Flags for `upperdeck commit`; empty for the defaults.
    pub flags: Vec<String>,
    /// Limit of a save with these flags, in seconds.
    pub limit_seconds: f64,
    /// Estimated number of compressed bytes.
    pub sent_bytes: u64,
    /// The reason, as a sentence.
    pub why: String,
}
