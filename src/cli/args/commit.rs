//! Flags of `commit`, which saves a running container.

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
};
use super::value::{duration, key_value, layer_size, size};
use crate::common::private_files::FileMode;
use crate::node::container::Pattern;
use crate::save::{LayerSize, Pause};

/// Whose rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum VolumeIdentity {
    /// Those of the container's first process: user, groups and capabilities
    Container,
    /// Those of this program, which reads everything as root
    #[value(name = "self")]
    Own,
}

pub(super) fn commit_help() -> String {
    format!(
        "\
DESTINATION:
  [docker://]HOST[:PORT]/REPOSITORY[:TAG]   a registry; nothing is spooled to disk
  oci:DIRECTORY[:TAG]                       an OCI layout; made if it is not there, other tags in it stay
  oci-archive:FILE[:TAG]                    an OCI layout as one tar file
  Without a TAG: latest. The tag appears last of all: a save that fails leaves nothing visible.

Examples:
  upperdeck commit jupyter/notebook-0 registry.example.org/alice/notebook:monday
  upperdeck commit -m 'with pandas' -c 'ENV MPLBACKEND=Agg' -c 'CMD [\"jupyter\",\"lab\"]' 3f2a oci:/srv/images:a
  upperdeck commit --creds-file /run/secrets/robot --metadata-file save.json web harbor.example.org/web/app:1
  upperdeck commit --base oci:/srv/bases:debian pid:4242 oci-archive:/tmp/it.tar
  SOURCE_DATE_EPOCH=0 upperdeck commit --pause none --progress json web localhost:5000/web:1

--change takes what 'docker commit' takes: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL,
  USER, VOLUME and WORKDIR, in shell and JSON form, with $VARIABLES of the image's ENV. ENTRYPOINT without a CMD beside
  it clears the base's CMD, as in a Dockerfile. Nothing of the running container's environment gets into the image.

Left out, with a report: everything mounted into the container, what the runtime put there, and by default credentials
  (.ssh, .netrc, .aws, .docker/config.json, histories, ...) and caches (.cache/pip, /tmp, ...).
--include-volume PATH takes a mounted directory in, in layers of its own on top, of the same instant. PATH is where it is
  mounted ('upperdeck inspect' lists that); memory, the kernel's own, single files and FUSE are refused. The limits below
  are for each tree by itself. What others than the container write to a shared volume is not held still. Volumes are
  read with the user, groups and capabilities of the container's first process: what it may not read is left out, with
  a warning. --volume-identity self reads them with this program's rights, for an administrator who saves for itself.
--allow-volume /PATH covers what lies there on the node, and below; TYPE:SOURCE what is mounted from there, e.g.
  nfs4:nas.example.org:/home. The kernel's word on the mount is compared, never a path in the container.

stdout carries the result: HOST/REPOSITORY@sha256:... (or the layout with the digest). With --progress json it carries
  JSON lines instead, each {{\"version\":1,\"time\":RFC 3339,\"event\":NAME,...}}:
  phase          phase: locating, scanning, streaming, base, finishing
  progress       bytes_done, bytes_total (of the tar; known before the first byte is read), bytes_sent, entries_total
  base_progress  layer (0 is the bottom), layers, bytes_done, bytes_total (0: not known)
  warning        code, message
  paused         pause_ms
  ready          with --gate-fd: all is delivered but the tag
  saved          reference, digest                           always the last line of a save that succeeded
  failed         exit, code, message, retryable              always the last line of one that did not
  New events and fields may come; 'version' grows when one changes its meaning or goes away.

Exit codes:
{}",
        exit_codes()
    )
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Commit {
    /// ID, unique beginning of one, name, NAMESPACE/POD[/CONTAINER] or pid:N (a process whose mount is believed: administrators only)
    pub(in crate::cli) container: String,
    /// HOST/REPOSITORY[:TAG], oci:DIRECTORY[:TAG] or oci-archive:FILE[:TAG]
    pub(in crate::cli) destination: String,

    /// Who made it: in the history entry and the config
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) author: Option<String>,
    /// Comment of the history entry
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) message: Option<String>,
    /// Apply a Dockerfile directive to the image's settings; may be repeated
    #[arg(short, long, value_name = "DIRECTIVE", allow_hyphen_values = true, help_heading = METADATA)]
    pub(in crate::cli) change: Vec<String>,
    /// Set a label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(in crate::cli) label: Vec<(String, String)>,
    /// Set an annotation of the manifest; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(in crate::cli) annotation: Vec<(String, String)>,
    /// The image that the container stands on, for pid:N: oci:DIR[:TAG], oci-archive:FILE[:TAG] or HOST/REPOSITORY[:TAG]
    #[arg(long, value_name = "IMAGE", help_heading = METADATA)]
    pub(in crate::cli) base: Option<String>,

    /// What becomes of the container while its files are read
    #[arg(short, long, value_enum, default_value_t = Pause::Live, value_name = "HOW")]
    pub(in crate::cli) pause: Pause,
    /// The longest that the container may stand still, e.g. 300ms; 0 for no bound [default: 1s with --pause live]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(in crate::cli) max_pause: Option<Duration>,
    /// How much of what changes during the save may be kept in memory; where it is more, another round comes first
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "32M")]
    pub(in crate::cli) live_limit: u64,

    #[command(flatten)]
    pub(in crate::cli) background: InBackground,
    #[command(flatten)]
    pub(in crate::cli) memory: Memory,
    /// Ask before the tag is put on: 'ready' is told, then a byte read from this open descriptor. 'y' goes on, anything
    /// else cancels, and so does its end at any time
    #[arg(long, value_name = "N")]
    pub(in crate::cli) gate_fd: Option<u32>,
    /// A file that is there while the container may stand still by this save's doing
    #[arg(long, value_name = "FILE", hide = true)]
    pub(in crate::cli) freeze_mark: Option<PathBuf>,

    #[command(flatten)]
    pub(in crate::cli) state: State,

    #[command(flatten)]
    pub(in crate::cli) content: Content,
    /// Save what is in the volume that is mounted at PATH in the container, too, in a layer of its own; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = CONTENT)]
    pub(in crate::cli) include_volume: Vec<PathBuf>,
    /// Refuse volumes that no PATTERN covers: /PATH on the node, or TYPE:SOURCE of a file system; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(in crate::cli) allow_volume: Vec<Pattern>,
    /// With whose rights volumes are read
    #[arg(long, value_enum, default_value_t = VolumeIdentity::Container, value_name = "WHOSE", help_heading = CONTENT)]
    pub(in crate::cli) volume_identity: VolumeIdentity,
    /// Begin another layer after so many bytes of tar, e.g. 2G, at a directory: layers are made, uploaded and pulled side
    /// by side; 0 for never; auto: as many, up to four, as this machine's cores keep busy, and so not the same image on
    /// every machine [default: 4G where there are more than 8G]
    #[arg(long, value_name = "SIZE", value_parser = layer_size, help_heading = CONTENT)]
    pub(in crate::cli) layer_size: Option<LayerSize>,
    #[command(flatten)]
    pub(in crate::cli) registry: Registry,
    /// Make the project in Harbor, if it is not there
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) create_project: bool,
    /// The quota of a project that is made, e.g. 20GiB; Harbor lets only its administrators set it
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "create_project", help_heading = REGISTRY)]
    pub(in crate::cli) project_quota: Option<u64>,
    /// In Harbor, delete the image that the tag moves away from, if it has no other tag and nothing needs it
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) delete_replaced: bool,

    /// Write all figures of the save to FILE, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REPORT)]
    pub(in crate::cli) metadata_file: Option<PathBuf>,
    /// Write the digest of the manifest to FILE
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REPORT)]
    pub(in crate::cli) digestfile: Option<PathBuf>,
    /// The mode of the files that are made, e.g. 0644; directories get x where it has r [default: 0600; in a layout that is
    /// there, as its files are]
    #[arg(long, value_name = "MODE", help_heading = REPORT)]
    pub(in crate::cli) output_mode: Option<FileMode>,
    /// Print the result and nothing else
    #[arg(short, long, conflicts_with = "progress", help_heading = REPORT)]
    pub(in crate::cli) quiet: bool,
    /// How to show what happens
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(in crate::cli) progress: Mode,
}
