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
  upperdeck layer --upper /srv/o/upper --lower /srv/o/lower2 --lower /srv/o/lower1 -o layer.tar.gz
  upperdeck layer --upper upper --compression none -o layer.tar | jq -r .diffID

stdout carries one JSON object: the descriptor (mediaType, digest, size) and diffID.
Without --lower, what is deleted in a lower directory that is not known is written as the upper says it.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Layer {
    /// The upper directory of an overlay
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) upper: PathBuf,
    /// A lower directory, topmost first; may be repeated
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) lower: Vec<PathBuf>,
    /// The overlay keeps its marks in user.overlay.* (mount option userxattr)
    #[arg(long)]
    pub(in crate::cli) userxattr: bool,
    /// Where the layer goes
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) output: PathBuf,
    /// The mode of that file, e.g. 0644
    #[arg(long, value_name = "MODE", default_value = "0600")]
    pub(in crate::cli) output_mode: FileMode,
    #[command(flatten)]
    pub(in crate::cli) content: Content,
}

pub(super) const VALIDATE_HELP: &str = "\
Examples:
  upperdeck validate layer.tar.gz --against fixtures/whiteouts/expected
  upperdeck validate oci:/srv/images:monday --against fixtures/whiteouts/expected

Names the first entries that differ and ends with 1 when any does.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Validate {
    /// A layer (tar, gzip, zstd) or an image (oci:DIRECTORY[:TAG], oci-archive:FILE[:TAG])
    #[arg(value_name = "IMAGE|LAYER")]
    pub(in crate::cli) subject: String,
    /// What it has to hold
    #[arg(long, value_name = "SPEC", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) against: PathBuf,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}
