//! The save itself: one function that reads as the data flow of the design.

use std::path::PathBuf;
use std::time::Duration;

pub use crate::layer::Compression;

/// What becomes of the container while its files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pause {
    /// Frozen while the layer is read.
    Full,
    /// Not frozen: files that change while they are read are reported.
    None,
}

/// Everything `upperdeck commit` was asked for, resolved from the flags.
#[derive(Clone, Debug)]
pub struct Options {
    /// CONTAINER as the user wrote it.
    pub container: String,
    /// DESTINATION as the user wrote it.
    pub destination: String,
    /// Author for the history entry and the config.
    pub author: Option<String>,
    /// Message: history comment.
    pub message: Option<String>,
    /// `--change` texts, in order.
    pub changes: Vec<String>,
    /// `--label` K=V.
    pub labels: Vec<(String, String)>,
    /// `--annotation` K=V, on the manifest.
    pub annotations: Vec<(String, String)>,
    /// Freeze or not.
    pub pause: Pause,
    /// The longest the container may stand still; none: no bound.
    pub max_pause: Option<Duration>,
    /// Codec.
    pub compression: Compression,
    /// Level of the codec; none: the default of this program.
    pub level: Option<u32>,
    /// Threads; none: all cores.
    pub jobs: Option<usize>,
    /// `--exclude` patterns.
    pub exclude: Vec<String>,
    /// Keep credentials (`.ssh`, `.netrc`, ...) in the image.
    pub include_credentials: bool,
    /// Keep caches (`.cache/pip`, `/tmp`, ...) in the image.
    pub include_caches: bool,
    /// `--base` IMAGE, for `pid:N`: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or a registry reference.
    pub base: Option<String>,
    /// Clamp times to at most this, in seconds since the epoch; also `created`.
    pub timestamp: Option<i64>,
    /// JSON with all figures.
    pub metadata_file: Option<PathBuf>,
    /// File that gets the manifest's digest.
    pub digestfile: Option<PathBuf>,
}
