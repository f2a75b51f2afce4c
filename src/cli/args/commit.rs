//! Flags of `commit`, which saves a container.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::super::progress::Mode;
use super::exit_codes;
use super::shared::{
    CONTENT, Content, InBackground, METADATA, Memory, REGISTRY, REPORT, Registry, State,
    WhichAttempt,
};
use super::value::{duration, key_value, layer_size, size};
use crate::common::digest::Digest;
use crate::common::private_files::FileMode;
use crate::node::container::Pattern;
use crate::save::{LayerSize, Pause};

/// With whose rights volumes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum VolumeIdentity {
    /// The container's first process: user, groups and capabilities
    Container,
    /// This program, which reads everything as root
    #[value(name = "self")]
    Own,
}

pub(super) fn commit_help() -> String {
    format!(
        "\
DESTINATION:
  [docker://]HOST[:PORT]/REPOSITORY[:TAG]   a registry; nothing is written to disk
  oci:DIRECTORY[:TAG]                       an OCI layout; created if missing, other tags are kept
  oci-archive:FILE[:TAG]                    an OCI layout as one tar file
  The default TAG is latest. It is written last, so that a failed save leaves nothing visible.

Examples:
  upperdeck commit jupyter/notebook-0 registry.example.org/alice/notebook:monday
  upperdeck commit -m 'with pandas' -c 'ENV MPLBACKEND=Agg' \\
      -c 'CMD [\"jupyter\",\"lab\"]' 3f2a oci:/srv/images:a
  upperdeck commit --creds-file /run/secrets/robot --metadata-file save.json \\
      web harbor.example.org/web/app:1
  upperdeck commit --previous jupyter/notebook-0 oci:/srv/images:crashed
  upperdeck commit --base oci:/srv/bases:debian pid:4242 oci-archive:/tmp/it.tar
  SOURCE_DATE_EPOCH=0 upperdeck commit --pause none --progress json \\
      web localhost:5000/web:1

--change accepts the directives of 'docker commit': CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD,
  STOPSIGNAL, USER, VOLUME and WORKDIR, in shell and JSON form, with $VARIABLES of the image's ENV. ENTRYPOINT without
  CMD clears the base's CMD, as in a Dockerfile. The running container's environment is not saved.

A container that has ended is saved as long as its runtime has not removed it. NAMESPACE/POD is the running container of
  the pod or, if there is none, the last one; --previous the one before. Its volumes are not mounted and cannot be saved.

Excluded and reported: everything mounted into the container, files of the runtime and, by default, credentials (.ssh,
  .netrc, .aws, .docker/config.json, histories, ...) and caches (.cache/pip, /tmp, ...).
--include-volume PATH also saves the directory that is mounted at PATH ('upperdeck inspect' lists mounts), in separate
  layers on top, from the same instant. tmpfs, kernel file systems, single files and FUSE are refused. The limits below
  apply to each tree separately. Writers outside the container are not frozen. Volumes are read with the user, groups and
  capabilities of the container's first process; files that it may not read are left out with a warning.
  --volume-identity self reads them with this program's rights, for administrators.
--allow-volume /PATH permits this directory of the node and those below it; TYPE:SOURCE permits mounts of it, e.g.
  nfs4:nas.example.org:/home. The kernel's mount table is compared, never a path in the container.

Prints the result to stdout: HOST/REPOSITORY@sha256:... (or the layout with the digest). With --progress json, it prints
  JSON lines instead, each {{\"version\":1,\"time\":RFC 3339,\"event\":NAME,...}}:
  phase          phase: locating, scanning, streaming, base, finishing
  progress       bytes_done, bytes_total (of the tar; known before the first byte is read), bytes_sent, entries_total;
                 base_done, base_total (of base layers that the destination lacked)
  base_progress  layer (0 is the bottom), layers, bytes_done, bytes_total (0: unknown)
  warning        code, message
  paused         pause_ms
  ready          with --gate-fd: everything but the tag is written
  saved          reference, digest                           always the last line of a save that succeeded
  failed         exit, code, message, retryable              always the last line of one that did not
  Events and fields may be added; 'version' is incremented when one changes its meaning or is removed.

Exit codes:
{}",
        exit_codes()
    )
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Commit {
    /// ID or unique prefix of one, name, NAMESPACE/POD[/CONTAINER], or pid:N (trusts the process's mount table: for administrators)
    pub(in crate::cli) container: String,
    /// HOST/REPOSITORY[:TAG], oci:DIRECTORY[:TAG] or oci-archive:FILE[:TAG]
    pub(in crate::cli) destination: String,
    #[command(flatten)]
    pub(in crate::cli) attempt: WhichAttempt,

    /// Save all running containers of the pod NAMESPACE/POD at one instant, an image each: the container's name is added
    /// to DESTINATION's repository or directory; all are frozen, or none, and no tag is written before all are complete
    #[arg(long, conflicts_with_all = ["gate_fd", "freeze_mark", "metadata_file", "digestfile", "replace_only", "base", "previous"])]
    pub(in crate::cli) all_containers: bool,

    /// Author, for the history entry and the config
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) author: Option<String>,
    /// Comment of the history entry
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) message: Option<String>,
    /// Apply a Dockerfile directive to the image config; may be repeated
    #[arg(short, long, value_name = "DIRECTIVE", allow_hyphen_values = true, help_heading = METADATA)]
    pub(in crate::cli) change: Vec<String>,
    /// Set a label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(in crate::cli) label: Vec<(String, String)>,
    /// Set an annotation of the manifest; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(in crate::cli) annotation: Vec<(String, String)>,
    /// Base image of the container, for pid:N: oci:DIR[:TAG], oci-archive:FILE[:TAG] or HOST/REPOSITORY[:TAG]
    #[arg(long, value_name = "IMAGE", help_heading = METADATA)]
    pub(in crate::cli) base: Option<String>,

    /// Whether and when the container is frozen
    #[arg(short, long, value_enum, default_value_t = Pause::Live, value_name = "HOW")]
    pub(in crate::cli) pause: Pause,
    /// Maximum time for which the container is frozen, e.g. 300ms; 0 for no limit [default: 1s with --pause live]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(in crate::cli) max_pause: Option<Duration>,
    /// Maximum amount of changed data to keep in memory during the freeze; with more, another pass is made first
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "32M")]
    pub(in crate::cli) live_limit: u64,

    #[command(flatten)]
    pub(in crate::cli) background: InBackground,
    #[command(flatten)]
    pub(in crate::cli) memory: Memory,
    /// Wait for a byte from this open descriptor before the tag is written: 'y' continues; any other byte, or the end of
    /// input at any time, cancels
    #[arg(long, value_name = "N")]
    pub(in crate::cli) gate_fd: Option<u32>,
    /// File that exists while this save may have the container frozen
    #[arg(long, value_name = "FILE", hide = true)]
    pub(in crate::cli) freeze_mark: Option<PathBuf>,

    #[command(flatten)]
    pub(in crate::cli) state: State,

    #[command(flatten)]
    pub(in crate::cli) content: Content,
    /// Also save the volume that is mounted at PATH in the container, as a separate layer; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = CONTENT)]
    pub(in crate::cli) include_volume: Vec<PathBuf>,
    /// Refuse volumes that match no PATTERN: /PATH on the node, or TYPE:SOURCE of a file system; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(in crate::cli) allow_volume: Vec<Pattern>,
    /// Whose rights are used to read volumes
    #[arg(long, value_enum, default_value_t = VolumeIdentity::Container, value_name = "WHOSE", help_heading = CONTENT)]
    pub(in crate::cli) volume_identity: VolumeIdentity,
    /// Split the layer, at a directory, after this size of tar, e.g. 2G, to make, upload and pull parts in parallel; 0:
    /// never; auto: into as many parts, up to four, as this machine's cores keep busy, so that the image depends on the
    /// machine [default: 4G where there are more than 8G]
    #[arg(long, value_name = "SIZE", value_parser = layer_size, help_heading = CONTENT)]
    pub(in crate::cli) layer_size: Option<LayerSize>,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
    /// Create the project in Harbor if it does not exist
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) create_project: bool,
    /// Quota of a created project, e.g. 20GiB; only Harbor's administrators can set it
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "create_project", help_heading = REGISTRY)]
    pub(in crate::cli) project_quota: Option<u64>,
    /// Fail if the tag exists [default: it moves to the new image, as with 'docker commit'], or the file of an archive;
    /// checked at the start and again before the tag is written
    #[arg(long, conflicts_with = "replace_only", help_heading = REGISTRY)]
    pub(in crate::cli) no_replace: bool,
    /// Fail if the tag exists and names another image than DIGEST; an archive that exists must hold that image alone
    #[arg(long, value_name = "DIGEST", help_heading = REGISTRY)]
    pub(in crate::cli) replace_only: Option<Digest>,
    /// In Harbor, delete the image that loses its tag to this one, if it has no other tag and no index, accessory or this
    /// container needs it
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) delete_replaced: bool,
    /// In Harbor, put this label of the project on the image, and create it if it does not exist; may be repeated
    #[arg(long, value_name = "NAME", help_heading = REGISTRY)]
    pub(in crate::cli) harbor_label: Vec<String>,

    /// Write the result of the save to FILE, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REPORT)]
    pub(in crate::cli) metadata_file: Option<PathBuf>,
    /// Write the manifest's digest to FILE
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REPORT)]
    pub(in crate::cli) digestfile: Option<PathBuf>,
    /// Mode of created files, e.g. 0644; directories get x where it has r [default: 0600, or that of an existing layout's
    /// files]
    #[arg(long, value_name = "MODE", help_heading = REPORT)]
    pub(in crate::cli) output_mode: Option<FileMode>,
    /// For oci: destinations, share blobs that layouts below DIR have by hard links, so that each is kept once
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = REPORT)]
    pub(in crate::cli) share_blobs: Option<PathBuf>,
    /// Print only the result
    #[arg(short, long, conflicts_with = "progress", help_heading = REPORT)]
    pub(in crate::cli) quiet: bool,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(in crate::cli) progress: Mode,
}
