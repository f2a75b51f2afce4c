//! The flags as typed, and the help that teaches them. What they mean is decided in `options`.
#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

pub(super) mod service;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

use super::exit::Exit;
use super::progress::Mode;
use crate::bench::stages::Setting;
use crate::commit::{Compression, Pause};
use crate::images::{MAX_PAGE_SIZE, PAGE_SIZE, Sort};
use crate::job;
pub(super) use service::{Agent, Manager, Up};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const ABOUT: &str = "\
Saves a running container as an OCI image, without a container daemon.

upperdeck reads what the container changed (the upper directory of its overlay) and the image that it stands on from \
disk, makes one layer of the changes and puts a new image on top of the base: in a registry, an OCI layout directory or \
an OCI archive. It works for containers of containerd (Kubernetes, nerdctl, ctr), CRI-O, Podman and Docker, and for any \
process whose root is an overlay.";

/// The exit codes as text, one a line.
fn exit_codes() -> String {
    Exit::TABLE
        .map(|(exit, meaning)| format!("  {:<4} {meaning}\n", exit.code()))
        .concat()
}

fn after_help() -> String {
    format!(
        "\
Examples:
  upperdeck ps
      What can be saved on this node.
  upperdeck commit jupyter/notebook-0 registry.example.org/alice/notebook:monday
      Save a pod's only container to a registry.
  upperdeck commit 3f2a oci:/srv/images/notebook:monday
      Save the container whose ID begins with 3f2a to an OCI layout directory.

CONTAINER:
  An ID or a unique beginning of one; a name (Docker, Podman, nerdctl); NAMESPACE/POD[/CONTAINER]; pid:N.

Exit codes:
{}
Environment:
  UPPERDECK_HOST_ROOT, UPPERDECK_CONTAINERD_ROOT, UPPERDECK_CONTAINERD_STATE, UPPERDECK_DOCKER_ROOT,
  UPPERDECK_STORAGE_ROOT, UPPERDECK_STORAGE_RUNROOT, UPPERDECK_LOG, UPPERDECK_LOG_FORMAT
      As the flags of the same name. Every flag of manager, agent and up has such a variable.
  SOURCE_DATE_EPOCH
      As --timestamp of commit and layer.
  REGISTRY_AUTH_FILE, DOCKER_CONFIG, XDG_RUNTIME_DIR
      Where credentials for registries are looked for.
  NO_COLOR
      No colours in the help and the bar.",
        exit_codes()
    )
}

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "upperdeck",
    version,
    about = "Saves a running container as an OCI image, without a container daemon",
    long_about = ABOUT,
    after_long_help = after_help(),
    after_help = "'upperdeck --help' has examples, exit codes and the environment; 'upperdeck VERB --help' teaches a verb.",
    styles = STYLES,
    propagate_version = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Args)]
pub(super) struct Global {
    /// Find everything of the node below DIR (an agent in a pod sees its node's files there)
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_HOST_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) host_root: Option<PathBuf>,
    /// containerd's "root" [usually /var/lib/containerd, and k3s' and RKE2's]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_CONTAINERD_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) containerd_root: Option<PathBuf>,
    /// containerd's "state" [usually /run/containerd, and k3s' and RKE2's]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_CONTAINERD_STATE", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) containerd_state: Option<PathBuf>,
    /// Docker's "data-root" [usually /var/lib/docker]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_DOCKER_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) docker_root: Option<PathBuf>,
    /// "graphroot" of Podman and CRI-O [usually /var/lib/containers/storage]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_STORAGE_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) storage_root: Option<PathBuf>,
    /// "runroot" of Podman and CRI-O [usually /run/containers/storage]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_STORAGE_RUNROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) storage_runroot: Option<PathBuf>,
    /// What to log on stderr: error, warn, info, debug, trace, or a filter such as upperdeck::registry=debug
    #[arg(long, global = true, value_name = "FILTER", env = "UPPERDECK_LOG", hide_env_values = true, help_heading = LOGGING)]
    pub(super) log: Option<String>,
    /// How log lines are written
    #[arg(long, global = true, value_enum, value_name = "HOW", default_value_t = LogFormat::Text, env = "UPPERDECK_LOG_FORMAT", hide_env_values = true, help_heading = LOGGING)]
    pub(super) log_format: LogFormat,
    /// Log more, whatever --log says; twice for much more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = LOGGING)]
    pub(super) verbose: u8,
}

const STATE: &str = "Where runtimes keep their state";
const LOGGING: &str = "Logging";
const CONTENT: &str = "What goes into the layer";
const METADATA: &str = "What the image says";
const REGISTRY: &str = "Registry";
const REPORT: &str = "Report";
const SERVER: &str = "Manager";
const LIMITS: &str = "Limits against hostile trees";

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List the containers on this node that can be saved
    #[command(after_long_help = PS_HELP)]
    Ps(Ps),
    /// Show base, layers, size of the changes and what will not be saved
    #[command(after_long_help = INSPECT_HELP)]
    Inspect(Inspect),
    /// List what the container changed: A added, C changed, D deleted
    #[command(after_long_help = DIFF_HELP)]
    Diff(Diff),
    /// Save a running container as an image
    #[command(after_long_help = commit_help())]
    Commit(Box<Commit>),
    /// Make only the layer, from directories
    #[command(after_long_help = LAYER_HELP)]
    Layer(Layer),
    /// List and delete saved images: in Harbor, a plain registry or an OCI layout directory
    #[command(subcommand, after_long_help = IMAGE_HELP)]
    Image(Image),
    /// Check a layer or an image against a specification
    #[command(after_long_help = VALIDATE_HELP)]
    Validate(Validate),
    /// Measure what this node can do, stage by stage, and how near a save comes to it
    #[command(after_long_help = BENCH_HELP)]
    Bench(Box<Bench>),
    /// Save by way of a manager, and follow what becomes of it
    #[command(subcommand, after_long_help = JOB_HELP)]
    Job(Job),
    /// Everything on one machine, in one process: API, portal, agent
    #[command(after_long_help = service::UP_HELP)]
    Up(Box<Up>),
    /// Run the image manager: API and portal, record, queue
    #[command(after_long_help = service::MANAGER_HELP)]
    Manager(Box<Manager>),
    /// Run a node's agent: saves what the managers ask for
    #[command(after_long_help = service::AGENT_HELP)]
    Agent(Box<Agent>),
    /// Make a container, work in it, save it, unpack it, compare; then once more
    #[command(after_long_help = DEMO_HELP)]
    Demo,
    /// Print shell completions
    #[command(after_long_help = COMPLETIONS_HELP)]
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// Print the man page, or write the pages of all verbs to a directory
    #[command(
        after_long_help = "Examples:\n  upperdeck man | man -l -\n  upperdeck man /usr/local/share/man/man1"
    )]
    Man {
        /// Where to write upperdeck.1, upperdeck-commit.1, ...; must exist
        #[arg(value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// A line for people
    Text,
    /// One JSON object a line
    Json,
}

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Table,
    /// For programs; fields are only ever added
    Json,
}

const PS_HELP: &str = "\
Examples:
  upperdeck ps
  upperdeck ps --format json | jq -r '.[] | select(.pod.namespace == \"jupyter\") | .id'

JSON: an array of objects with
  runtime      containerd, docker, podman, crio or process
  id           full ID
  names        names, best first (Docker, Podman, nerdctl)
  namespace    containerd's namespace, or null
  pod          {namespace, name, container, uid}, or null
  image        name of the image as the runtime recorded it, or null
  pid          first process
  upper_bytes  allocated bytes of the upper directory, or null where it cannot be read";

#[derive(Debug, Args)]
pub(super) struct Ps {
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    /// Print IDs in full
    #[arg(long)]
    pub(super) no_trunc: bool,
}

const INSPECT_HELP: &str = "\
Examples:
  upperdeck inspect jupyter/notebook-0
  upperdeck inspect --format json 3f2a | jq .base.layers

JSON: one object with the fields of 'ps' and
  base         {name, manifest_digest, config_digest, proof, layers}, or null when it could not be proven;
               a layer: {diff_id, chain_id, digest, size, media_type, lower, local}
  base_error   why it could not be proven, or null
  upper        {path, bytes, entries}
  uid_map, gid_map
               [{inside, outside, count}]; empty without a user namespace
  not_saved    mounts whose content would not be in the image: [{destination, kind, source, volume}]
  next_save    what 'upperdeck commit' with the same flags would make now, or null where the base is not proven:
               {kind, reason, entries, bytes, layers}
               kind     delta (what changed since the last save) or full
               reason   why it is not the other one
               entries, bytes
                        of the layers to come, before they are compressed
               layers   above the base, in the image to come
               A destination that has lost the layers of the last save makes it full all the same.
  next_save_error
               why such a save would fail, or null
Paths are text: a byte that is not UTF-8 is \\xNN, a control character \\u{N}, a backslash \\\\.";

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// ID, unique beginning of one, name, NAMESPACE/POD[/CONTAINER] or pid:N
    pub(super) container: String,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    /// The image that a pid:N stands on
    #[arg(long, value_name = "IMAGE")]
    pub(super) base: Option<String>,
    #[command(flatten)]
    pub(super) state: State,
    #[command(flatten)]
    pub(super) choice: Choice,
    /// As for 'commit': a volume that would be saved, too; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = CONTENT)]
    pub(super) include_volume: Vec<PathBuf>,
    /// Take only what nobody else on the node wants of its cores
    #[arg(long)]
    pub(super) background: bool,
}

const DIFF_HELP: &str = "\
Examples:
  upperdeck diff jupyter/notebook-0
  upperdeck diff --format json 3f2a | jq -r '.[] | select(.change == \"D\") | .path'

JSON: an array of {change, path}; change is A, C or D. Paths are text: a byte that is not UTF-8 is \\xNN, a control
character \\u{N}, a backslash \\\\.
What 'commit' leaves out (mounts, credentials, caches) is not listed.";

#[derive(Debug, Args)]
pub(super) struct Diff {
    /// ID, unique beginning of one, name, NAMESPACE/POD[/CONTAINER] or pid:N
    pub(super) container: String,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
}

fn commit_help() -> String {
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
  are for each tree by itself. What others than the container write to a shared volume is not held still.

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
pub(super) struct Commit {
    /// ID, unique beginning of one, name, NAMESPACE/POD[/CONTAINER] or pid:N
    pub(super) container: String,
    /// HOST/REPOSITORY[:TAG], oci:DIRECTORY[:TAG] or oci-archive:FILE[:TAG]
    pub(super) destination: String,

    /// Who made it: in the history entry and the config
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(super) author: Option<String>,
    /// Comment of the history entry
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(super) message: Option<String>,
    /// Apply a Dockerfile directive to the image's settings; may be repeated
    #[arg(short, long, value_name = "DIRECTIVE", allow_hyphen_values = true, help_heading = METADATA)]
    pub(super) change: Vec<String>,
    /// Set a label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(super) label: Vec<(String, String)>,
    /// Set an annotation of the manifest; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(super) annotation: Vec<(String, String)>,
    /// The image that the container stands on, for pid:N: oci:DIR[:TAG], oci-archive:FILE[:TAG] or HOST/REPOSITORY[:TAG]
    #[arg(long, value_name = "IMAGE", help_heading = METADATA)]
    pub(super) base: Option<String>,

    /// What becomes of the container while its files are read
    #[arg(short, long, value_enum, default_value_t = Pause::Live, value_name = "HOW")]
    pub(super) pause: Pause,
    /// The longest that the container may stand still, e.g. 300ms; 0 for no bound [default: 1s with --pause live]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(super) max_pause: Option<Duration>,
    /// How much of what changes during the save may be kept in memory; where it is more, another round comes first
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "32M")]
    pub(super) live_limit: u64,

    /// Take only what nobody else on the node wants of its cores, in a cgroup of its own where that can be had
    #[arg(long)]
    pub(super) background: bool,
    /// Ask before the tag is put on: 'ready' is told, then a byte read from this open descriptor. 'y' goes on, anything
    /// else cancels, and so does its end at any time
    #[arg(long, value_name = "N")]
    pub(super) gate_fd: Option<u32>,
    /// A file that is there while the container may stand still by this save's doing
    #[arg(long, value_name = "FILE", hide = true)]
    pub(super) freeze_mark: Option<PathBuf>,

    #[command(flatten)]
    pub(super) state: State,

    #[command(flatten)]
    pub(super) content: Content,
    /// Save what is in the volume that is mounted at PATH in the container, too, in a layer of its own; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, help_heading = CONTENT)]
    pub(super) include_volume: Vec<PathBuf>,
    /// Begin another layer after so many bytes of tar, e.g. 2G, at a directory: layers are made, uploaded and pulled side
    /// by side; 0 for never [default: 4G where there are more than 8G]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = CONTENT)]
    pub(super) layer_size: Option<u64>,
    #[command(flatten)]
    pub(super) registry: Registry,
    /// Make the project in Harbor, if it is not there
    #[arg(long, help_heading = REGISTRY)]
    pub(super) create_project: bool,

    /// Write all figures of the save to FILE, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REPORT)]
    pub(super) metadata_file: Option<PathBuf>,
    /// Write the digest of the manifest to FILE
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REPORT)]
    pub(super) digestfile: Option<PathBuf>,
    /// Print the result and nothing else
    #[arg(short, long, conflicts_with = "progress", help_heading = REPORT)]
    pub(super) quiet: bool,
    /// How to show what happens
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(super) progress: Mode,
}

/// What is kept of a save for the next one of the same container.
#[derive(Clone, Debug, Args)]
pub(super) struct State {
    /// Where this node keeps what it needs to save only what changed since the last save; empty for nowhere
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", env = "UPPERDECK_STATE_DIR", hide_env_values = true, value_parser = any_path(), value_hint = ValueHint::DirPath, help_heading = CONTENT)]
    #[allow(clippy::struct_field_names, reason = "named as its flag")]
    pub(super) state_dir: Option<PathBuf>,
    /// Layers above the base from which on everything is saved anew
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=100), help_heading = CONTENT)]
    pub(super) max_layers: u8,
    /// Save everything anew, not only what changed since the last save
    #[arg(long, help_heading = CONTENT)]
    pub(super) full: bool,
}

/// What decides what the layers show.
#[derive(Debug, Args)]
pub(super) struct Choice {
    /// Leave out what matches, e.g. 'home/*/scratch' or '**/*.pyc'; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(super) exclude: Vec<String>,
    /// Keep credentials and histories (.ssh, .netrc, .aws, ...)
    #[arg(long, help_heading = CONTENT)]
    pub(super) include_credentials: bool,
    /// Keep caches (.cache/pip, var/cache/apt/archives, /tmp, ...)
    #[arg(long, help_heading = CONTENT)]
    pub(super) include_caches: bool,
    /// No time in the result is later than this, in seconds since 1970; it is the image's time of creation, too
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", hide_env_values = true, allow_negative_numbers = true, help_heading = CONTENT)]
    pub(super) timestamp: Option<i64>,
    /// Most entries that a tree may have
    #[arg(long, value_name = "N", help_heading = LIMITS)]
    pub(super) max_entries: Option<u64>,
    /// Most levels of directories
    #[arg(long, value_name = "N", help_heading = LIMITS)]
    pub(super) max_depth: Option<u32>,
    /// Largest sum of file sizes, e.g. 500G
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(super) max_size: Option<u64>,
    /// Most bytes in the holes of sparse files, e.g. 64G
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(super) max_holes: Option<u64>,
}

/// What `commit` and `layer` share: what goes into the layer, and how it is made.
#[derive(Debug, Args)]
pub(super) struct Content {
    /// How the layer is compressed
    #[arg(long, value_enum, default_value_t = Compression::Gzip, value_name = "CODEC", help_heading = CONTENT)]
    pub(super) compression: Compression,
    /// Level of the codec: gzip 1 to 9, zstd 1 to 19
    #[arg(long, value_name = "N", help_heading = CONTENT)]
    pub(super) compression_level: Option<u32>,
    /// Threads; the result is the same for any number [default: all cores]
    #[arg(short, long, value_name = "N", help_heading = CONTENT)]
    pub(super) jobs: Option<NonZeroUsize>,
    #[command(flatten)]
    pub(super) choice: Choice,
}

#[derive(Debug, Args)]
pub(super) struct Registry {
    /// Credentials file, as 'podman login' and 'docker login' write it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(super) authfile: Option<PathBuf>,
    /// Credentials for the destination. Other users of this machine can see them: prefer --creds-file
    #[arg(long, value_name = "USER:PASSWORD", help_heading = REGISTRY)]
    pub(super) creds: Option<String>,
    /// File with USER:PASSWORD for the destination
    #[arg(long, value_name = "FILE", conflicts_with = "creds", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(super) creds_file: Option<PathBuf>,
    /// Open descriptor to read USER:PASSWORD for the destination from
    #[arg(long, value_name = "N", conflicts_with_all = ["creds", "creds_file"], help_heading = REGISTRY)]
    pub(super) creds_fd: Option<u32>,
    /// Whether the destination's certificate is checked; false also allows plain HTTP
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, help_heading = REGISTRY)]
    pub(super) tls_verify: bool,
    /// Directory with *.crt of further authorities, and *.cert with *.key of this client
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(super) cert_dir: Option<PathBuf>,
    /// The longest that everything with registries may take together, e.g. 2h [default: 12h]
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = REGISTRY)]
    pub(super) deadline: Option<Duration>,
}

const IMAGE_HELP: &str = "\
Examples:
  upperdeck image ls
      The caller's images, as a manager shows them.
  upperdeck image ls harbor.example.org/alice
  upperdeck image ls --format json oci:/srv/images
  upperdeck image rm harbor.example.org/alice/notebook:monday";

#[derive(Debug, Subcommand)]
pub(super) enum Image {
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
pub(super) struct ImageLs {
    /// HOST[:PORT][/PATH] or oci:DIRECTORY [default: what a manager shows]
    #[arg(value_name = "WHERE")]
    pub(super) place: Option<String>,
    /// Only what has TEXT in its name, or in one of its tags
    #[arg(long, value_name = "TEXT")]
    pub(super) search: Option<String>,
    /// In which order
    #[arg(long, value_enum, default_value_t = Sort::Updated, value_name = "BY")]
    pub(super) sort: Sort,
    /// Which page
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) page: u32,
    /// How much of the list is a page
    #[arg(long, value_name = "N", default_value_t = PAGE_SIZE, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PAGE_SIZE)))]
    pub(super) page_size: u32,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    /// Print digests in full
    #[arg(long)]
    pub(super) no_trunc: bool,
    #[command(flatten)]
    pub(super) registry: Registry,
    #[command(flatten)]
    pub(super) server: Server,
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
pub(super) struct ImageRm {
    /// HOST/REPOSITORY:TAG, HOST/REPOSITORY@sha256:..., oci:DIRECTORY:TAG or oci:DIRECTORY@sha256:...; NAME:TAG of a manager
    #[arg(value_name = "IMAGE", required = true)]
    pub(super) images: Vec<String>,
    /// Delete the image, whatever other tags it has
    #[arg(long)]
    pub(super) all_tags: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) registry: Registry,
    #[command(flatten)]
    pub(super) server: Server,
}

/// The manager that is asked.
#[derive(Clone, Debug, Args)]
pub(super) struct Server {
    /// The manager's address, perhaps with ?token=... as 'upperdeck up' prints it [default: the 'upperdeck up' of this machine]
    #[arg(long, value_name = "URL", env = "UPPERDECK_SERVER", hide_env_values = true, value_hint = ValueHint::Url, help_heading = SERVER)]
    #[allow(clippy::struct_field_names, reason = "named as its flag")]
    pub(super) server: Option<String>,
    /// File whose first line is the token (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", env = "UPPERDECK_TOKEN_FILE", hide_env_values = true, value_hint = ValueHint::FilePath, help_heading = SERVER)]
    pub(super) token_file: Option<PathBuf>,
    /// The token itself. Other users of this machine can see it: prefer --token-file
    #[arg(long, value_name = "TOKEN", env = "UPPERDECK_TOKEN", hide_env_values = true, conflicts_with = "token_file", help_heading = SERVER)]
    pub(super) token: Option<String>,
    /// For whom, where the token is a portal's
    #[arg(long = "as-user", value_name = "USER", env = "UPPERDECK_AS_USER", hide_env_values = true, help_heading = SERVER)]
    pub(super) user: Option<String>,
    /// Where an 'upperdeck up' of this machine says how it is reached
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", env = "UPPERDECK_UP_DIR", hide_env_values = true, hide = true, help_heading = SERVER)]
    pub(super) up_dir: PathBuf,
}

const JOB_HELP: &str = "\
Examples:
  upperdeck job sessions
  upperdeck job submit --watch jupyter/notebook-0 notebook:monday
  upperdeck job ls --state running
  upperdeck job watch 0198f0c4-0000-7000-8000-000000000000
  upperdeck job submit --server https://save.example.org --token-file ~/.upperdeck-token --message 'with pandas' 3f2a9c51d0b7

The manager is named by --server or UPPERDECK_SERVER; without either it is the 'upperdeck up' of this machine.";

#[derive(Debug, Subcommand)]
pub(super) enum Job {
    /// List the sessions that may be saved
    #[command(
        after_long_help = "Examples:\n  upperdeck job sessions\n  upperdeck job sessions --format json | jq -r '.[].id'\n\nJSON: an array of objects as GET /api/v1/sessions has them."
    )]
    Sessions(JobSessions),
    /// Ask for a save; prints its ID
    #[command(after_long_help = JOB_SUBMIT_HELP)]
    Submit(Box<JobSubmit>),
    /// Show what a save is doing, or what became of it
    #[command(
        after_long_help = "Examples:\n  upperdeck job status 0198f0c4-0000-7000-8000-000000000000\n\nJSON: an object as GET /api/v1/saves/{id} has it."
    )]
    Status(JobOne),
    /// Follow a save to its end, with the bar of 'commit'; prints the reference
    #[command(
        after_long_help = "Examples:\n  upperdeck job watch 0198f0c4-0000-7000-8000-000000000000\n\nThe exit code is that of the save, as of 'commit'. A manager that is started again is waited for."
    )]
    Watch(JobWatch),
    /// End a save that waits or runs; nothing is left in the registry under its tag
    #[command(
        after_long_help = "Examples:\n  upperdeck job cancel 0198f0c4-0000-7000-8000-000000000000"
    )]
    Cancel(JobCancel),
    /// List saves, the latest first
    #[command(
        after_long_help = "Examples:\n  upperdeck job ls\n  upperdeck job ls --state failed --format json | jq -r '.saves[].error.code'\n\nJSON: an object as GET /api/v1/saves has it."
    )]
    Ls(JobLs),
}

const JOB_SUBMIT_HELP: &str = "\
Examples:
  upperdeck job submit jupyter/notebook-0
      Under the name and tag that the manager suggests.
  upperdeck job submit --watch --message 'with pandas' jupyter/notebook-0 notebook:monday
  id=$(upperdeck job submit 3f2a9c51d0b7 :tuesday)

The manager puts registry, project and user in front of NAME:TAG. JSON: an object as POST /api/v1/saves answers.";

#[derive(Debug, Args)]
pub(super) struct JobSessions {
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) server: Server,
}

#[derive(Debug, Args)]
pub(super) struct JobSubmit {
    /// A session's ID or a unique beginning of it, or NAMESPACE/POD[/CONTAINER]
    pub(super) session: String,
    /// NAME[:TAG] or :TAG [default: what the manager suggests]
    pub(super) image: Option<String>,
    /// What it is, in your words
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(super) message: Option<String>,
    /// Set a label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(super) label: Vec<(String, String)>,
    /// Save everything anew, not only what changed since the last save
    #[arg(long, help_heading = CONTENT)]
    pub(super) full: bool,
    /// How the layer is compressed [default: as the agent is configured]
    #[arg(long, value_enum, value_name = "CODEC", help_heading = CONTENT)]
    pub(super) compression: Option<Compression>,
    /// Leave out what matches, e.g. 'home/*/scratch'; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(super) exclude: Vec<String>,
    /// Save the data of the volume that is mounted at PATH, too; may be repeated
    #[arg(long, value_name = "PATH", help_heading = CONTENT)]
    pub(super) include_volume: Vec<String>,
    /// Follow it to its end
    #[arg(short, long, help_heading = REPORT)]
    pub(super) watch: bool,
    /// How to show what happens, with --watch
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(super) progress: Mode,
    /// How to print, without --watch
    #[arg(long, value_enum, default_value_t = Format::Table, conflicts_with = "watch", help_heading = REPORT)]
    pub(super) format: Format,
    /// Said again with the same KEY it is the same save [default: another one each time]
    #[arg(long, value_name = "KEY")]
    pub(super) idempotency_key: Option<String>,
    #[command(flatten)]
    pub(super) server: Server,
}

#[derive(Debug, Args)]
pub(super) struct JobOne {
    /// The save's ID
    pub(super) id: uuid::Uuid,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) server: Server,
}

#[derive(Debug, Args)]
pub(super) struct JobWatch {
    /// The save's ID
    pub(super) id: uuid::Uuid,
    /// How to show what happens
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW")]
    pub(super) progress: Mode,
    #[command(flatten)]
    pub(super) server: Server,
}

#[derive(Debug, Args)]
pub(super) struct JobCancel {
    /// The save's ID
    pub(super) id: uuid::Uuid,
    #[command(flatten)]
    pub(super) server: Server,
}

#[derive(Debug, Args)]
pub(super) struct JobLs {
    /// Only those in this state
    #[arg(long, value_name = "STATE", value_parser = state)]
    pub(super) state: Option<job::State>,
    /// Only this user's (administrators see all)
    #[arg(long = "user", value_name = "USER")]
    pub(super) of: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(super) limit: u32,
    /// Those after the ones already seen, as the list before said
    #[arg(long, value_name = "WHERE")]
    pub(super) after: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) server: Server,
}

const LAYER_HELP: &str = "\
Examples:
  upperdeck layer --upper /srv/o/upper --lower /srv/o/lower2 --lower /srv/o/lower1 -o layer.tar.gz
  upperdeck layer --upper upper --compression none -o layer.tar | jq -r .diffID

stdout carries one JSON object: the descriptor (mediaType, digest, size) and diffID.
Without --lower, what is deleted in a lower directory that is not known is written as the upper says it.";

#[derive(Debug, Args)]
pub(super) struct Layer {
    /// The upper directory of an overlay
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) upper: PathBuf,
    /// A lower directory, topmost first; may be repeated
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) lower: Vec<PathBuf>,
    /// The overlay keeps its marks in user.overlay.* (mount option userxattr)
    #[arg(long)]
    pub(super) userxattr: bool,
    /// Where the layer goes
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) output: PathBuf,
    #[command(flatten)]
    pub(super) content: Content,
}

const VALIDATE_HELP: &str = "\
Examples:
  upperdeck validate layer.tar.gz --against fixtures/whiteouts/expected
  upperdeck validate oci:/srv/images:monday --against fixtures/whiteouts/expected

Names the first entries that differ and ends with 1 when any does.";

#[derive(Debug, Args)]
pub(super) struct Validate {
    /// A layer (tar, gzip, zstd) or an image (oci:DIRECTORY[:TAG], oci-archive:FILE[:TAG])
    #[arg(value_name = "IMAGE|LAYER")]
    pub(super) subject: String,
    /// What it has to hold
    #[arg(long, value_name = "SPEC", value_hint = ValueHint::FilePath)]
    pub(super) against: PathBuf,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
}

const BENCH_HELP: &str = "\
Examples:
  upperdeck bench
      On a generated tree like a Jupyter session's.
  upperdeck bench --registry registry.example.org/bench/tries jupyter/notebook-0
      On what a container changed; the container runs on, nothing is saved, no blob is left in the registry.
  upperdeck bench --size 2G --rounds 9 --codec zstd:1 --codec zstd:3 --compression zstd --format json | jq .advice

JSON: one object; figures are medians of the rounds, MB are 1,000,000 bytes
  version      1; it grows when a field changes its meaning or goes away
  node         {cores, jobs}
  subject      {kind, name, entries, tar_bytes, sample_bytes}; kind is container, directory or generated
  rounds       how often everything was measured
  stages       [{stage, threads, seconds, cpu_seconds, bytes, mb_per_second, entries_per_second}]: scan, plan,
               read_first (whatever was in the page cache), read (by threads), sha256 (one core, on the sample),
               make (read, checksum, compress), write_file and upload (the compressed bytes alone)
  codecs       [{compression, level, ratio, by_threads}] on the sample; by_threads is
               [{threads, mb_per_second, cpu_seconds_per_gb}]
  saves        [{to, compression, level, jobs, layers, seconds, cpu_seconds, sent_bytes, mb_per_second, costs, limit,
               limit_percent}]: whole saves to nothing, file and registry
  costs        seconds of each stage of such a save: scan, plan, read, checksum, compress, hash_tar, hash_compressed,
               hand_on, registry (what one on this machine takes of its cores), hand_on_wall (delivery alone)
  limit        {seconds, bound_by, before, cores, jobs, sha256, destination}: the fastest possible, and the seconds that
               each bound sets; bound_by is cores, jobs, sha256 or destination
  advice       [{flags, limit_seconds, sent_bytes, why}], the best first; sizes are estimated from the sample
  notes        what has to be known to read the figures";

#[derive(Debug, Args)]
pub(super) struct Bench {
    /// ID, unique beginning of one, name, NAMESPACE/POD[/CONTAINER] or pid:N [default: a generated tree]
    pub(super) container: Option<String>,
    /// Measure on a directory
    #[arg(long, value_name = "DIR", conflicts_with = "container", value_hint = ValueHint::DirPath)]
    pub(super) directory: Option<PathBuf>,
    /// Bytes of the generated tree
    #[arg(long, value_name = "SIZE", value_parser = tree_size, default_value = "256M", conflicts_with_all = ["container", "directory"])]
    pub(super) size: u64,
    /// Where the generated tree, and the file that a save is written to, are for a while [default: $TMPDIR or /tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) scratch: Option<PathBuf>,
    /// Try uploads there; they are cancelled at their end
    #[arg(long = "registry", value_name = "HOST[:PORT]/REPOSITORY", help_heading = REGISTRY)]
    pub(super) to: Option<String>,
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value = "5")]
    pub(super) rounds: NonZeroUsize,
    /// Measure this codec and level instead of the usual ones, e.g. zstd:3; may be repeated
    #[arg(long, value_name = "CODEC:LEVEL", value_parser = codec_level)]
    pub(super) codec: Vec<Setting>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) content: Content,
    /// Begin another layer after so many bytes of tar, e.g. 2G, at a directory: layers are made, uploaded and pulled side
    /// by side; 0 for never [default: 4G where there are more than 8G]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = CONTENT)]
    pub(super) layer_size: Option<u64>,
    #[command(flatten)]
    pub(super) registry: Registry,
}

const DEMO_HELP: &str = "\
Needs nothing but Linux: root, or a user namespace where the kernel lets. Everything is made in a temporary directory
and is gone afterwards; no registry, no daemon and no network are used.";

const COMPLETIONS_HELP: &str = "\
Examples:
  upperdeck completions bash > /etc/bash_completion.d/upperdeck
  upperdeck completions zsh > \"${fpath[1]}/_upperdeck\"
  upperdeck completions fish > ~/.config/fish/completions/upperdeck.fish";

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

fn state(text: &str) -> Result<job::State, String> {
    job::State::named(text).ok_or_else(|| {
        let names = job::State::ALL.map(job::State::name);
        format!("expected one of {}", names.join(", "))
    })
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

/// A tree of nothing cannot be measured.
fn tree_size(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| match bytes {
        0 => Err("expected more than nothing".to_owned()),
        bytes => Ok(bytes),
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    // A day of the calendar may have 23 hours; one that is waited has not.
    let days = text
        .strip_suffix('d')
        .and_then(|days| days.parse::<u32>().ok());
    if let Some(days) = days.filter(|days| *days > 0) {
        return Ok(Duration::from_secs(u64::from(days) * 86_400));
    }
    let parsed = text
        .parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok());
    parsed
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a duration such as 500ms, 30s or 2m".to_owned())
}

/// A path that may be empty: clap's own parser takes that for a value that is missing.
fn any_path() -> impl clap::builder::TypedValueParser<Value = PathBuf> {
    use clap::builder::{OsStringValueParser, TypedValueParser as _};
    OsStringValueParser::new().map(PathBuf::from)
}

/// Bytes: a number with K, M, G or T (powers of 1024; `KiB` and `kB` mean the same here).
fn size(text: &str) -> Result<u64, String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_uppercase();
    let unit = unit
        .strip_suffix("IB")
        .or(unit.strip_suffix('B'))
        .unwrap_or(&unit);
    let shift = ["", "K", "M", "G", "T", "P"]
        .iter()
        .position(|known| *known == unit);
    let value = number
        .parse::<u64>()
        .ok()
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << (10 * shift)));
    value.ok_or_else(|| "expected a size such as 4096, 500M, 64G or 4T".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn clap_finds_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_durations() {
        for (text, expected) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1k", Some(1024)),
            ("64GiB", Some(64 << 30)),
            ("4 TB", Some(4 << 40)),
            ("99999999P", None),
            ("x", None),
            ("1.5G", None),
            ("-1", None),
            ("1X", None),
            ("", None),
        ] {
            assert_eq!(size(text).ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("500ms", Some(500)),
            ("2m", Some(120_000)),
            ("1m30s", Some(90_000)),
            ("2d", Some(172_800_000)),
            ("0s", None),
            ("0d", None),
            ("-1s", None),
            ("5", None),
            ("", None),
        ] {
            assert_eq!(
                duration(text).ok(),
                expected.map(Duration::from_millis),
                "{text}"
            );
        }
    }

    #[test]
    fn an_empty_state_directory_is_none() {
        let words = ["upperdeck", "commit", "--state-dir=", "x", "oci:y"];
        let Ok(Cli {
            verb: Verb::Commit(commit),
            ..
        }) = Cli::try_parse_from(words)
        else {
            panic!("refused");
        };
        assert_eq!(commit.state.state_dir, Some(PathBuf::new()));
    }

    #[test]
    fn every_verb_teaches() {
        for verb in Cli::command().get_subcommands() {
            let help = verb.clone().render_long_help().to_string();
            let taught = help.contains("Examples:") || verb.get_name() == "demo";
            assert!(taught, "{} has no examples", verb.get_name());
        }
    }
}
