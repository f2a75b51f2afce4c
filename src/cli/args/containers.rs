//! Flags of the read-only verbs `ps`, `inspect` and `diff`.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::shared::{CONTENT, Choice, Format, InBackground, Memory, Registry, State, WhichAttempt};

pub(super) const PS_HELP: &str = "\
Examples:
  upperdeck ps
  upperdeck ps --all
  upperdeck ps --format json | \\
      jq -r '.[] | select(.pod.namespace == \"jupyter\") | .id'

JSON: an array of objects with
  runtime      containerd, docker, podman, crio or process
  id           full ID
  names        names, best first (Docker, Podman, nerdctl)
  namespace    containerd's namespace, or null
  pod          {namespace, name, container, uid}, or null
  image        name of the image as the runtime recorded it, or null
  pid          first process, or null if it has ended
  ended        null, or of a container that has ended, as far as its runtime has recorded it: {exit_code,
               out_of_memory, at, never_started}
  upper_bytes  allocated bytes of the upper directory, or null if it cannot be read";

#[derive(Debug, Args)]
pub(in crate::cli) struct Ps {
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    /// List containers that have ended, too
    #[arg(short, long)]
    pub(in crate::cli) all: bool,
    /// Do not truncate IDs
    #[arg(long)]
    pub(in crate::cli) no_trunc: bool,
}

pub(super) const INSPECT_HELP: &str = "\
Examples:
  upperdeck inspect jupyter/notebook-0
  upperdeck inspect --format json 3f2a | jq .base.layers
  upperdeck inspect --packages jupyter/notebook-0
      What pip, conda, apt, R and npm added to the base.
  upperdeck inspect --packages registry.example.org/alice/lab:monday
  upperdeck inspect --packages oci:/srv/images:tue \\
      --since oci:/srv/images:mon

--packages reads the files in which package managers record packages; nothing is run. An image's packages are compared
with those of its layers that no save made (--since: with another image's); all layers are read for it.

JSON: one object with the fields of 'ps' and
  base         {name, manifest_digest, config_digest, proof, layers}, or null if it cannot be proven;
               a layer: {diff_id, chain_id, digest, size, media_type, lower, local}
  base_error   the reason why it cannot be proven, or null
  upper        {path, bytes, entries}
  uid_map, gid_map
               [{inside, outside, count}]; empty without a user namespace
  not_saved    mounts whose content would not be in the image: [{destination, kind, source, volume}];
               not_saved_more how many are not listed
  next_save    what 'upperdeck commit' with the same flags would save now, or null if the base is not proven:
               {kind, reason, entries, bytes, layers, times_only}
               kind     delta (changes since the last save) or full
               reason   why it is that kind
               entries, bytes
                        of the new layers, uncompressed
               layers   of the new image above the base
               times_only
                        whether only times of directories have changed since the last save
               The save is full anyway if the destination no longer has the layers of the last one.
  next_save_error
               why such a save would fail, or null
  packages     with --packages: {packages, more, unread, unread_more, notes}, else null
               packages [{manager, name, change, version, previous, location}], where change is added, removed
                        or changed, and manager conda, pip, r, npm, dpkg or apk
               more     how many are not listed
               unread   files that could not be read: [{path, reason}]; unread_more how many are not listed
               notes    what else limits the list
               Of an image: one object with image, digest, since and packages.
Paths are text: a byte that is not UTF-8 is \\xNN, a control character \\u{N}, a backslash \\\\.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Inspect {
    /// ID or unique prefix of one, name, NAMESPACE/POD[/CONTAINER], or pid:N (trusts the process's mount table: for administrators). With --packages also an image: HOST/REPOSITORY[:TAG], oci:DIRECTORY[:TAG] or oci-archive:FILE[:TAG]
    pub(in crate::cli) container: String,
    #[command(flatten)]
    pub(in crate::cli) attempt: WhichAttempt,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    /// List the packages that differ from those of the base
    #[arg(long)]
    pub(in crate::cli) packages: bool,
    /// List the packages of an image that differ from those of IMAGE
    #[arg(long, value_name = "IMAGE", requires = "packages")]
    pub(in crate::cli) since: Option<String>,
    /// Base image of a pid:N
    #[arg(long, value_name = "IMAGE")]
    pub(in crate::cli) base: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) state: State,
    #[command(flatten)]
    pub(in crate::cli) choice: Choice,
    /// Volume that would also be saved, as for 'commit'; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = CONTENT)]
    pub(in crate::cli) include_volume: Vec<PathBuf>,
    #[command(flatten)]
    pub(in crate::cli) background: InBackground,
    #[command(flatten)]
    pub(in crate::cli) memory: Memory,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
}

pub(super) const DIFF_HELP: &str = "\
Examples:
  upperdeck diff jupyter/notebook-0
  upperdeck diff --format json 3f2a | \\
      jq -r '.[] | select(.change == \"D\") | .path'

JSON: an array of {change, path}; change is A, C or D. Paths are text: a byte that is not UTF-8 is \\xNN, a control
character \\u{N}, a backslash \\\\.
Paths that 'commit' excludes (mounts, credentials, caches) are not listed.";

#[derive(Debug, Args)]
pub(in crate::cli) struct Diff {
    /// ID or unique prefix of one, name, NAMESPACE/POD[/CONTAINER], or pid:N (trusts the process's mount table: for administrators)
    pub(in crate::cli) container: String,
    #[command(flatten)]
    pub(in crate::cli) attempt: WhichAttempt,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}
