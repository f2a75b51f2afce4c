//! Flags of `image`, which lists and deletes saved images.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

#[cfg(feature = "service")]
use super::shared::Server;
use super::shared::{Format, Registry};
use super::value::duration;
use crate::save::Compression;
use crate::store::images::{MAX_PAGE_SIZE, PAGE_SIZE, Sort};

pub(super) const IMAGE_HELP: &str = "\
Examples:
  upperdeck image ls
      The caller's images, from a manager.
  upperdeck image ls harbor.example.org/alice
  upperdeck image ls --format json oci:/srv/images
  upperdeck image cp harbor.example.org/alice/lab:monday:/home/alice/model.py .
  upperdeck image diff oci:/srv/images:monday oci:/srv/images:tuesday
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
    /// Copy a file or a directory out of an image
    #[command(after_long_help = IMAGE_CP_HELP)]
    Cp(ImageCp),
    /// List what differs between two images: A added, C changed, D deleted
    #[command(after_long_help = IMAGE_DIFF_HELP)]
    Diff(ImageDiff),
    /// Rewrite the layers above an image's base into one
    #[command(after_long_help = IMAGE_SQUASH_HELP)]
    Squash(ImageSquash),
}

const IMAGE_CP_HELP: &str = "\
Examples:
  upperdeck image cp harbor.example.org/alice/lab:monday:/home/alice/model.py .
  upperdeck image cp oci:/srv/images/notebook:monday:/home/alice/. restored
      What is in the directory, not the directory itself.
  upperdeck image cp oci-archive:notebook.tar:/etc/hosts - | tar -xO

IMAGE:PATH:
  HOST/REPOSITORY[:TAG][@DIGEST]:/PATH, oci:DIRECTORY[:TAG]:/PATH or oci-archive:FILE[:TAG]:/PATH.
  Symbolic links in PATH are followed within the image; one at its end is copied as a link, unless a slash follows.

DESTINATION:
  A directory that exists gets what is copied under its own name; else it is the new name. Files there are replaced. Below
  the destination no symbolic link is followed. - writes a tar stream.

Layers are read from the top, and none below the one that decides; of a directory, all that may have a part of it. Of a
layer that upperdeck made with an index (gzip or zstd, from 4 MiB on), only the index and the blocks with PATH are read;
any other is read to its end. What is read is verified before anything is written. Modes, times, hard links and extended
attributes are kept, owners as far as permitted. Device nodes are not created, only written to a tar stream.

JSON: {image, digest, path, destination, paths, bytes, devices_left_out, devices_left_out_count, owners_not_set,
xattrs_not_set, layers, layers_read (each as often as it was read), image_bytes, bytes_read}. Sizes are in bytes;
image_bytes and bytes_read are of the stored layers.
The exit code is 66 if the image does not have the path.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageCp {
    /// Image and absolute path in it, e.g. oci:/srv/images:monday:/etc/hosts
    #[arg(value_name = "IMAGE:PATH")]
    pub(in crate::cli) source: String,
    /// File or directory to write; - for a tar stream on stdout
    #[arg(value_name = "DESTINATION", value_hint = ValueHint::AnyPath)]
    pub(in crate::cli) destination: PathBuf,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
}

const IMAGE_DIFF_HELP: &str = "\
Examples:
  upperdeck image diff oci:/srv/images:monday oci:/srv/images:tuesday
  upperdeck image diff --packages r.example.org/lab:1 r.example.org/lab:2
  upperdeck image diff --full --format json oci:x:1 oci:x:2 |
      jq -r '.changes[].path'

Only the layers that the two images do not share are read. Whether a path that only the layers of one image name is new or
was changed is then not known: W. --full reads all layers and says A or C, with the size before.
A directory of which only the time differs is not listed. Without --full, what an opaque directory of one image hides is not
listed, but the directory is, with a note. A hard link that leads to another path of both images differs.

JSON: {a, b (digests), common_layers, full, changes, packages, bytes_read}, where changes is
  [{change, path, before, after}], with link: true where a hard link leads elsewhere, and opaque: true where only one image
  hides what is below in common layers; change is A, C, D or W; before and after are {type, mode, uid, gid, size}, or null
  if the path is not there, or not known; packages is that of 'inspect --packages', or null. Paths are text: a byte that is not
  UTF-8 is \\xNN, a control character \\u{N}, a backslash \\\\.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageDiff {
    /// The image before: HOST/REPOSITORY[:TAG], oci:DIRECTORY[:TAG] or oci-archive:FILE[:TAG]
    #[arg(value_name = "A")]
    pub(in crate::cli) before: String,
    /// The image after
    #[arg(value_name = "B")]
    pub(in crate::cli) after: String,
    /// Read the common layers, too
    #[arg(long)]
    pub(in crate::cli) full: bool,
    /// List the packages that differ, too (reads all layers of both images)
    #[arg(long)]
    pub(in crate::cli) packages: bool,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
}

const IMAGE_SQUASH_HELP: &str = "\
Examples:
  upperdeck image squash harbor.example.org/alice/notebook:monday
      The tag names the squashed image then.
  upperdeck image squash oci:/srv/images:monday oci:/srv/images:kept
  upperdeck image squash --base oci:base:1 oci:/srv/images:x oci:/srv/images:y

The layers of saves, which the image's history names, become one; those below stay as they are, and so do settings, labels
and annotations. --base names another image below; the layers above that become one. All layers are read, and the new
image is published only if its tree equals that of the old one in every path, mode, owner, time, attribute and content. The
same image gives the same result.

JSON: {image (with its digest), digest, base_layers, squashed_layers, layer: {digest, diff_id, size, paths}, before_bytes
(of the layers that were replaced)}.";

#[derive(Debug, Args)]
pub(in crate::cli) struct ImageSquash {
    /// The image: HOST/REPOSITORY[:TAG], oci:DIRECTORY[:TAG] or oci-archive:FILE[:TAG]
    #[arg(value_name = "IMAGE")]
    pub(in crate::cli) image: String,
    /// Where the squashed image goes [default: it replaces IMAGE]
    #[arg(value_name = "NEW")]
    pub(in crate::cli) new: Option<String>,
    /// The image whose layers stay [default: what is below the layers of saves]
    #[arg(long, value_name = "IMAGE")]
    pub(in crate::cli) base: Option<String>,
    /// Take the tag of NEW from another image that has it
    #[arg(long, requires = "new")]
    pub(in crate::cli) replace: bool,
    /// Compression of the new layer
    #[arg(long, value_enum, default_value_t = Compression::Gzip, value_name = "CODEC")]
    pub(in crate::cli) compression: Compression,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
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
