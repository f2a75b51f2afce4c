//! Flags of the verbs that need no container: `layer`, `validate`.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::shared::{Content, Format, Registry};
use super::value::size;
use crate::common::private_files::FileMode;

pub(super) const LAYER_HELP: &str = "\
Examples:
  upperdeck layer --upper /srv/o/upper \\
      --lower /srv/o/lower2 --lower /srv/o/lower1 -o layer.tar.gz
  upperdeck layer --upper upper --compression none -o layer.tar | jq -r .diffID

Prints one JSON object: the descriptor (mediaType, digest, size, and annotations if the layer has an index: 'image cp'
needs them in the manifest) and diffID.
Without --lower, whiteouts are written as they are in the upper directory.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Layer {
    /// The upper directory of an overlay
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) upper: PathBuf,
    /// A lower directory, topmost first; may be repeated
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) lower: Vec<PathBuf>,
    /// The overlay uses user.overlay.* attributes (mount option userxattr)
    #[arg(long)]
    pub(in crate::cli) userxattr: bool,
    /// File to write the layer to
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) output: PathBuf,
    /// Mode of that file, e.g. 0644
    #[arg(long, value_name = "MODE", default_value = "0600")]
    pub(in crate::cli) output_mode: FileMode,
    #[command(flatten)]
    pub(in crate::cli) content: Content,
}

pub(super) const VALIDATE_HELP: &str = "\
Examples:
  upperdeck validate layer.tar.gz --write layer.spec
      Write what is in a layer.
  upperdeck validate layer2.tar.gz --against layer.spec
      Compare another layer with it.
  upperdeck validate oci:/srv/images:mon --tree --write mon.spec
      Write the tree to which an image unpacks.
  upperdeck validate registry.example.org/alice/lab:tue --against mon.spec
  upperdeck validate container:jupyter/notebook-0 --write -
      Print what a save would add. Without a pause, it is of no one instant.
  upperdeck validate layer.tar --against fixtures/whiteout-file

The language of specifications is described in docs/validate.md. The first 20 differences are printed, those of texts of
up to 16 KiB as text; the exit code is 1 if there are any.

A specification that --write makes is valid for its source. It contains the text of small files, which may be secrets:
--texts 0 writes digests only. The file can be read by its owner alone.

JSON: {entries, differences: [{path, field, expected, found, diff (if both are texts)}], more}.";

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("task").required(true).args(["against", "write"]))]
pub(in crate::cli) struct Validate {
    /// A layer (a file: tar, gzip, zstd), an image (oci:DIRECTORY[:TAG], oci-archive:FILE[:TAG],
    /// HOST/REPOSITORY[:TAG]), or container:CONTAINER: what a save of it would add
    #[arg(value_name = "SUBJECT")]
    pub(in crate::cli) subject: String,
    /// Compare with this specification: a file, or a directory with a file 'expected'
    #[arg(long, value_name = "SPEC", value_hint = ValueHint::AnyPath)]
    pub(in crate::cli) against: Option<PathBuf>,
    /// Write a specification to this file; -: to standard output
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) write: Option<PathBuf>,
    /// Write the whole tree of an image, not the entries of its topmost layer
    #[arg(long, requires = "write")]
    pub(in crate::cli) tree: bool,
    /// Write the content of files up to this size as text, if it is UTF-8; of others, the digest
    #[arg(long, value_name = "SIZE", value_parser = texts, default_value = "4K", requires = "write")]
    pub(in crate::cli) texts: u64,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
}

/// Parses the maximum size of a text, which is held in memory.
fn texts(text: &str) -> Result<u64, String> {
    size(text).and_then(|size| {
        if size <= MAX_TEXT {
            Ok(size)
        } else {
            Err("expected at most 1M".to_owned())
        }
    })
}

/// Maximum of `--texts`, in bytes.
const MAX_TEXT: u64 = 1 << 20;
