//! Flags of the verbs that need no container: `layer`, `validate`.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::shared::{Content, Format};
use crate::common::private_files::FileMode;

pub(super) const LAYER_HELP: &str = "\
Examples:
  upperdeck layer --upper /srv/o/upper \\
      --lower /srv/o/lower2 --lower /srv/o/lower1 -o layer.tar.gz
  upperdeck layer --upper upper --compression none -o layer.tar | jq -r .diffID

Prints one JSON object: the descriptor (mediaType, digest, size) and diffID.
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
  upperdeck validate layer.tar.gz --against fixtures/whiteouts/expected
  upperdeck validate oci:/srv/images:mon --against fixtures/whiteouts/expected

The language of specifications is described in docs/validate.md. Prints the first differences. The exit code is 1 if there
are any.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Validate {
    /// A layer (tar, gzip, zstd) or an image (oci:DIRECTORY[:TAG], oci-archive:FILE[:TAG])
    #[arg(value_name = "IMAGE|LAYER")]
    pub(in crate::cli) subject: String,
    /// The expected content
    #[arg(long, value_name = "SPEC", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) against: PathBuf,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}
