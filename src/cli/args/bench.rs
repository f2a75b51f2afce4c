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
  upperdeck bench --registry registry.example.org/bench/tries jupyter/lab-0
      On the changes of a container, which keeps running; nothing is saved,
      and no blob is left in the registry.
  upperdeck bench --size 2G --rounds 9 --codec zstd:1 --codec zstd:3 \\
      --compression zstd --format json | jq .advice

JSON: one object; figures are medians of the rounds, MB are 1,000,000 bytes
  version      1; incremented when a field changes its meaning or is removed
  node         {cores, jobs}
  subject      {kind, name, entries, tar_bytes, sample_bytes}; kind is container, directory or generated
  rounds       number of measurements
  stages       [{stage, threads, seconds, cpu_seconds, bytes, mb_per_second, entries_per_second}]: scan, plan,
               read_first (with the page cache as it was), read (by threads), sha256 (one core, on the sample),
               make (read, checksum, compress), write_file and upload (the compressed bytes alone)
  codecs       [{compression, level, ratio, by_threads}] on the sample; by_threads is
               [{threads, mb_per_second, cpu_seconds_per_gb}]
  saves        [{to, compression, level, jobs, layers, seconds, cpu_seconds, sent_bytes, mb_per_second, costs, limit,
               limit_percent}]: whole saves to nothing, file and registry
  costs        seconds of each stage of such a save: scan, plan, read, checksum, compress, hash_tar, hash_compressed,
               hand_on, registry (cores used by a registry on this machine), hand_on_wall (delivery alone)
  limit        {seconds, bound_by, before, cores, jobs, sha256, destination}: the shortest possible time, and that
               of each resource; bound_by is cores, jobs, sha256 or destination
  advice       [{flags, limit_seconds, sent_bytes, why}], the best first; sizes are estimated from the sample
  notes        notes on the figures";

#[derive(Debug, Args)]
pub(in crate::cli) struct Bench {
    /// ID or unique prefix of one, name, NAMESPACE/POD[/CONTAINER], or pid:N (trusts the process's mount table: for administrators) [default: a generated tree]
    pub(in crate::cli) container: Option<String>,
    /// Measure on the files of a directory
    #[arg(long, value_name = "DIR", conflicts_with = "container", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) directory: Option<PathBuf>,
    /// Size of the generated tree
    #[arg(long, value_name = "SIZE", value_parser = tree_size, default_value = "256M", conflicts_with_all = ["container", "directory"])]
    pub(in crate::cli) size: u64,
    /// Directory for the generated tree and the saved file, while they exist [default: $TMPDIR or /tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) scratch: Option<PathBuf>,
    /// Measure uploads to this repository; each is cancelled at its end
    #[arg(long = "registry", value_name = "HOST[:PORT]/REPOSITORY", help_heading = REGISTRY)]
    pub(in crate::cli) to: Option<String>,
    /// Number of measurements
    #[arg(long, value_name = "N", default_value = "5")]
    pub(in crate::cli) rounds: NonZeroUsize,
    /// Measure this codec and level instead of the default ones, e.g. zstd:3; may be repeated
    #[arg(long, value_name = "CODEC:LEVEL", value_parser = codec_level)]
    pub(in crate::cli) codec: Vec<Setting>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) content: Content,
    /// Split the layer, at a directory, after this size of tar, e.g. 2G, to make, upload and pull parts in parallel; 0:
    /// never; auto: into as many parts as this machine's cores keep busy [default: 4G where there are more than 8G]
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
