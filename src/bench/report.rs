//! What `upperdeck bench` found. The JSON is an interface, documented in the verb's help: fields are only ever added.

use serde::Serialize;

use super::limit::{Costs, Limit};
use crate::layer::Compression;

/// Version of the report; it grows when a field changes its meaning or goes away, not when one is added.
pub const REPORT_VERSION: u32 = 1;

/// All of it. Every figure is the median of the rounds; MB are 1,000,000 bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub version: u32,
    /// The machine.
    pub node: Node,
    /// What was saved.
    pub subject: Subject,
    /// How often everything was measured.
    pub rounds: usize,
    /// Each stage alone, in the order of a save.
    pub stages: Vec<Stage>,
    /// Each codec at each level, on a sample of the tar that is in memory.
    pub codecs: Vec<Codec>,
    /// Whole saves.
    pub saves: Vec<Save>,
    /// Which flags, the best first.
    pub advice: Vec<Advice>,
    /// What has to be known to read the figures, in sentences.
    pub notes: Vec<String>,
}

/// The machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Node {
    /// Cores that this process may use.
    pub cores: usize,
    /// Workers of the whole saves.
    pub jobs: usize,
}

/// What was saved.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// `container`, `directory` or `generated`.
    pub kind: &'static str,
    /// ID, path, or `tree`.
    pub name: String,
    /// Entries of the layer.
    pub entries: u64,
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Bytes of the tar that were in memory for the codecs.
    pub sample_bytes: u64,
}

/// A stage alone.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// `scan`, `plan`, `read_first`, `read`, `sha256`, `make`, `write_file`, `upload`.
    pub stage: &'static str,
    /// Threads that worked.
    pub threads: usize,
    /// On the wall.
    pub seconds: f64,
    /// Processor time of this process.
    pub cpu_seconds: f64,
    /// What the stage is about: tar bytes, or compressed bytes for the last two.
    pub bytes: u64,
    /// MB a second.
    pub mb_per_second: f64,
    /// For `scan` and `plan`.
    pub entries_per_second: Option<f64>,
}

/// A codec at a level by threads.
#[derive(Clone, Debug, Serialize)]
pub struct Codec {
    /// Which.
    pub compression: Compression,
    /// At which level.
    pub level: u32,
    /// Compressed size by size.
    pub ratio: f64,
    /// MB of tar a second, by threads.
    pub by_threads: Vec<ByThreads>,
}

/// A codec's speed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ByThreads {
    /// Side by side.
    pub threads: usize,
    /// MB of tar a second, together.
    pub mb_per_second: f64,
    /// Processor seconds a GB of tar.
    pub cpu_seconds_per_gb: f64,
}

/// A whole save, and the limit that the stages set it.
#[derive(Clone, Debug, Serialize)]
pub struct Save {
    /// `nothing`, `file` or `registry`.
    pub to: &'static str,
    /// Codec.
    pub compression: Compression,
    /// Level.
    pub level: u32,
    /// Workers.
    pub jobs: usize,
    /// Layers.
    pub layers: usize,
    /// On the wall.
    pub seconds: f64,
    /// Processor time of this process.
    pub cpu_seconds: f64,
    /// Compressed bytes.
    pub sent_bytes: u64,
    /// MB of tar a second.
    pub mb_per_second: f64,
    /// Seconds that each stage costs of such a save.
    pub costs: Costs,
    /// The fastest possible.
    pub limit: Limit,
    /// How near the save comes: limit by save, per cent.
    pub limit_percent: f64,
}

/// Flags that are worth trying here.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// For `upperdeck commit`; empty: the defaults.
    pub flags: Vec<String>,
    /// The limit of a save with them, in seconds.
    pub limit_seconds: f64,
    /// Compressed bytes, estimated.
    pub sent_bytes: u64,
    /// A sentence.
    pub why: String,
}
