//! Flags of `bench`.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::shared::{CONTENT, Content, Format, REGISTRY, Registry};
use super::value::{layer_size, size};
use crate::bench::stages::Setting;
use crate::save::{Compression, LayerSize};

pub(super) const BENCH_HELP: &str = "\
Examples:
  upperdeck bench
      On a generated tree like a Jupyter session's.
  upperdeck bench --registry registry.example.org/bench/tries jupyter/notebook-0
      On what a container changed; the container runs on, nothing is saved, no blob is left in the registry.
  upperdeck bench --size 2G --rounds 9 --codec zstd:1 --codec zstd:3 --compression zstd --format json | jq .advice

JSON: one object; figures are medians of the rounds, MB are 1,000,000 bytes
  version      1; it grows when a field changes its meaning or goes away
  node         {cores, jobs}
  subject      {kind, name, entries, tar_bytes, sample_bytes}; kind is container, directory or generated
  rounds       how often everything was measured
  stages       [{stage, threads, seconds, cpu_seconds, bytes, mb_per_second, entries_per_second}]: scan, plan,
               read_first (whatever was in the page cache), read (by threads), sha256 (one core, on the sample),
               make (read, checksum, compress), write_file and upload (the compressed bytes alone)
  codecs       [{compression, level, ratio, by_threads}] on the sample; by_threads is
               [{threads, mb_per_second, cpu_seconds_per_gb}]
  saves        [{to, compression, level, jobs, layers, seconds, cpu_seconds, sent_bytes, mb_per_second, costs, limit,
               limit_percent}]: whole saves to nothing, file and registry
  costs        seconds of each stage of such a save: scan, plan, read, checksum, compress, hash_tar, hash_compressed,
               hand_on, registry (what one on this machine takes of its cores), hand_on_wall (delivery alone)
  limit        {seconds, bound_by, before, cores, jobs, sha256, destination}: the fastest possible, and the seconds that
               each bound sets; bound_by is cores, jobs, sha256 or destination
  advice       [{flags, limit_seconds, sent_bytes, why}], the best first; sizes are estimated from the sample
  notes        what has to be known to read the figures";

#[derive(Debug, Args)]
pub(in crate::cli) struct Bench {
    /// ID, unique beginning of one, name, NAMESPACE/POD[/CONTAINER] or pid:N (a process whose mount is believed: administrators only) [default: a generated tree]
    pub(in crate::cli) container: Option<String>,
    /// Measure on a directory
    #[arg(long, value_name = "DIR", conflicts_with = "container", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) directory: Option<PathBuf>,
    /// Bytes of the generated tree
    #[arg(long, value_name = "SIZE", value_parser = tree_size, default_value = "256M", conflicts_with_all = ["container", "directory"])]
    pub(in crate::cli) size: u64,
    /// Where the generated tree, and the file that a save is written to, are for a while [default: $TMPDIR or /tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) scratch: Option<PathBuf>,
    /// Try uploads there; they are cancelled at their end
    #[arg(long = "registry", value_name = "HOST[:PORT]/REPOSITORY", help_heading = REGISTRY)]
    pub(in crate::cli) to: Option<String>,
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value = "5")]
    pub(in crate::cli) rounds: NonZeroUsize,
    /// Measure this codec and level instead of the usual ones, e.g. zstd:3; may be repeated
    #[arg(long, value_name = "CODEC:LEVEL", value_parser = codec_level)]
    pub(in crate::cli) codec: Vec<Setting>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) content: Content,
    /// Begin another layer after so many bytes of tar, e.g. 2G, at a directory: layers are made, uploaded and pulled side
    /// by side; 0 for never; auto: as many as this machine's cores keep busy [default: 4G where there are more than 8G]
    #[arg(long, value_name = "SIZE", value_parser = layer_size, help_heading = CONTENT)]
    pub(in crate::cli) layer_size: Option<LayerSize>,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
}

fn codec_level(text: &str) -> Result<Setting, String> {
    let parsed = text.split_once(':').and_then(|(codec, level)| {
        let codec = Compression::from_str(codec, false).ok()?;
        let level = level.parse().ok()?;
        codec
            .levels()
            .contains(&level)
            .then_some(Setting { codec, level })
    });
    parsed.ok_or_else(|| "expected gzip:1 to gzip:9, zstd:1 to zstd:19, or none:0".to_owned())
}

/// Parses the size of the generated tree, which must not be 0.
fn tree_size(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| match bytes {
        0 => Err("expected more than nothing".to_owned()),
        bytes => Ok(bytes),
    })
}
