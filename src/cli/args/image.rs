//! Flags of `image`, which lists and deletes saved images.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use clap::{Args, Subcommand};

#[cfg(feature = "service")]
use super::shared::Server;
use super::shared::{Format, Registry};
use crate::store::images::{MAX_PAGE_SIZE, PAGE_SIZE, Sort};

pub(super) const IMAGE_HELP: &str = "\
Examples:
  upperdeck image ls
      The caller's images, as a manager shows them.
  upperdeck image ls harbor.example.org/alice
  upperdeck image ls --format json oci:/srv/images
  upperdeck image rm harbor.example.org/alice/notebook:monday";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Image {
    /// List repositories, or the images of one
    #[command(after_long_help = IMAGE_LS_HELP)]
    Ls(ImageLs),
    /// Delete images, or tags of images that have others
    #[command(after_long_help = IMAGE_RM_HELP)]
    Rm(ImageRm),
}

const IMAGE_LS_HELP: &str = "\
WHERE:
  (nothing)                the caller's images, by way of a manager (--server)
  HOST[:PORT]              all repositories that the credentials see
  HOST[:PORT]/PROJECT      Harbor: the repositories of a project, and its quota
  HOST[:PORT]/PATH/        a plain registry: the repositories below PATH
  HOST[:PORT]/REPOSITORY   the images of a repository
  oci:DIRECTORY            the images of a layout

Examples:
  upperdeck image ls harbor.example.org/alice
  upperdeck image ls harbor.example.org/alice/notebook --sort size
  upperdeck image ls registry.example.org/alice/ --search note --page 2
  upperdeck image ls --format json oci:/srv/images | jq -r '.images[] | .tags[]'

JSON: one object with page, page_size, total (on all pages), quota ({limit, used} in bytes, or null), and either
  repositories   [{name, images, pulls, updated}]
  images         [{digest, tags, size, media_type, architecture, created, pushed, pulled, labels (of the config),
                 annotations (of the manifest), marks (Harbor's labels), accessories}]
What a place does not know is null. Sizes are compressed bytes, times RFC 3339.
By way of a manager: an object as GET /api/v1/images has it.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageLs {
    /// HOST[:PORT][/PATH] or oci:DIRECTORY [default: what a manager shows]
    #[arg(value_name = "WHERE")]
    pub(in crate::cli) place: Option<String>,
    /// Only what has TEXT in its name, or in one of its tags
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) search: Option<String>,
    /// In which order
    #[arg(long, value_enum, default_value_t = Sort::Updated, value_name = "BY")]
    pub(in crate::cli) sort: Sort,
    /// Which page
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::cli) page: u32,
    /// How much of the list is a page
    #[arg(long, value_name = "N", default_value_t = PAGE_SIZE, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PAGE_SIZE)))]
    pub(in crate::cli) page_size: u32,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    /// Print digests in full
    #[arg(long)]
    pub(in crate::cli) no_trunc: bool,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
    #[cfg(feature = "service")]
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

const IMAGE_RM_HELP: &str = "\
Examples:
  upperdeck image rm harbor.example.org/alice/notebook:monday
  upperdeck image rm --all-tags harbor.example.org/alice/notebook@sha256:88b852e0...
  upperdeck image rm oci:/srv/images:monday oci:/srv/images:tuesday
  upperdeck image rm notebook:monday
      By way of a manager (--server): NAME:TAG, without a host.

A tag is deleted, and its image with it when that was the last one. An image that has other tags goes only with
--all-tags. Registries before distribution 3 cannot delete one tag of several: that is said, and nothing deleted.
The space comes back later, by garbage collection: what that means for this place is said, too.

JSON: an array of {image, tags, digest, image_deleted, kept, space}.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageRm {
    /// HOST/REPOSITORY:TAG, HOST/REPOSITORY@sha256:..., oci:DIRECTORY:TAG or oci:DIRECTORY@sha256:...; NAME:TAG of a manager
    #[arg(value_name = "IMAGE", required = true)]
    pub(in crate::cli) images: Vec<String>,
    /// Delete the image, whatever other tags it has
    #[arg(long)]
    pub(in crate::cli) all_tags: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
    #[cfg(feature = "service")]
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}
