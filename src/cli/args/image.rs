//! Flags of `image`, which lists and deletes saved images.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::time::Duration;

use clap::{Args, Subcommand};

#[cfg(feature = "service")]
use super::shared::Server;
use super::shared::{Format, Registry};
use super::value::duration;
use crate::store::images::{MAX_PAGE_SIZE, PAGE_SIZE, Sort};

pub(super) const IMAGE_HELP: &str = "\
Examples:
  upperdeck image ls
      The caller's images, from a manager.
  upperdeck image ls harbor.example.org/alice
  upperdeck image ls --format json oci:/srv/images
  upperdeck image rm harbor.example.org/alice/notebook:monday
  upperdeck image prune oci:/srv/images";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Image {
    /// List repositories, or the images of one
    #[command(after_long_help = IMAGE_LS_HELP)]
    Ls(ImageLs),
    /// Delete images, or single tags of images with several
    #[command(after_long_help = IMAGE_RM_HELP)]
    Rm(ImageRm),
    /// Delete what no image of an OCI layout needs
    #[command(after_long_help = IMAGE_PRUNE_HELP)]
    Prune(ImagePrune),
    /// Give an image another tag
    #[command(after_long_help = IMAGE_TAG_HELP)]
    Tag(ImageTag),
}

const IMAGE_TAG_HELP: &str = "\
Examples:
  upperdeck image tag harbor.example.org/alice/notebook:monday paper
  upperdeck image tag oci:/srv/images/notebook:monday paper --replace

Both tags name the image afterwards; 'upperdeck image rm' removes one. A tag that names another image is refused without
--replace.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageTag {
    /// HOST/REPOSITORY:TAG or oci:DIRECTORY:TAG
    #[arg(value_name = "IMAGE")]
    pub(in crate::cli) image: String,
    /// The new tag
    #[arg(value_name = "TAG")]
    pub(in crate::cli) tag: String,
    /// Take the tag from another image that has it
    #[arg(long)]
    pub(in crate::cli) replace: bool,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
}

const IMAGE_LS_HELP: &str = "\
WHERE:
  (nothing)                the caller's images, from a manager (--server)
  HOST[:PORT]              all repositories visible with the credentials
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
Unknown values are null. Sizes are in compressed bytes, times RFC 3339. With a manager, the object is that of GET
/api/v1/images.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageLs {
    /// HOST[:PORT][/PATH] or oci:DIRECTORY [default: the images of a manager]
    #[arg(value_name = "WHERE")]
    pub(in crate::cli) place: Option<String>,
    /// Only images with TEXT in the name or in a tag
    #[arg(long, value_name = "TEXT")]
    pub(in crate::cli) search: Option<String>,
    /// Sort order
    #[arg(long, value_enum, default_value_t = Sort::Updated, value_name = "BY")]
    pub(in crate::cli) sort: Sort,
    /// Page number
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::cli) page: u32,
    /// Entries per page
    #[arg(long, value_name = "N", default_value_t = PAGE_SIZE, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PAGE_SIZE)))]
    pub(in crate::cli) page_size: u32,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    /// Do not truncate digests
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
  upperdeck image rm --all-tags harbor.example.org/alice/lab@sha256:88b852e0...
  upperdeck image rm oci:/srv/images:monday oci:/srv/images:tuesday
  upperdeck image rm notebook:monday
      An image of a manager (--server): NAME:TAG, without a host.

Deletes the tag, and the image if that was its last tag. --all-tags deletes an image with other tags. Registries before
distribution 3 cannot delete one tag of several; this is an error and nothing is deleted. In a layout, what the image
shares with no other is freed at once; a registry frees it in its garbage collection.

JSON: an array of {image, tags, digest, image_deleted, kept, accessories, freed (bytes, or null if the registry frees
them later), space}.";

const IMAGE_PRUNE_HELP: &str = "\
Examples:
  upperdeck image prune --dry-run
  upperdeck image prune oci:/srv/images
  upperdeck image prune --older-than 0 --format json oci:/srv/images/alice/x

Deletes blobs that no entry of index.json needs, directly or through indexes and manifests. This is seldom necessary:
'image rm', a tag that moves, and a save that fails free what they can at once, and the next command what a killed save
left. If anything that images need cannot be read, nothing is deleted, and the exit code is 1.

Running saves of upperdeck are known, and their blobs stay. Other tools (skopeo, umoci) do not say what they are about to
name: their blobs are told by age (--older-than; the last change or link of the file counts). --older-than 0 is for
layouts that no other tool writes to. Symbolic links and files that are no blobs are reported and left alone.

For a directory with several layouts, all of them are pruned, and equal blobs of several become hard links of one file,
after its content was verified. Registries collect blobs themselves.

JSON: {dry_run, freed, cancelled, layouts: [{layout, deleted: [{digest, size}], freed, temporary, needed, in_use, young:
{blobs, bytes}, left, left_count}], failed: [{layout, error}], merged: {links, freed} or null}. Sizes are in bytes.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImagePrune {
    /// oci:DIRECTORY, a layout or a directory with layouts [default: that of this machine's 'upperdeck up',
    /// /var/lib/upperdeck/images]
    #[arg(value_name = "WHERE")]
    pub(in crate::cli) place: Option<String>,
    /// Show what would be deleted, and delete nothing
    #[arg(long)]
    pub(in crate::cli) dry_run: bool,
    /// Minimum age of blobs, e.g. 2h or 7d; 0: any
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "1d")]
    pub(in crate::cli) older_than: Duration,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageRm {
    /// HOST/REPOSITORY:TAG, HOST/REPOSITORY@sha256:..., oci:DIRECTORY:TAG or oci:DIRECTORY@sha256:...; NAME:TAG of a manager
    #[arg(value_name = "IMAGE", required = true)]
    pub(in crate::cli) images: Vec<String>,
    /// Delete the image with all its tags
    #[arg(long)]
    pub(in crate::cli) all_tags: bool,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
    #[cfg(feature = "service")]
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}
