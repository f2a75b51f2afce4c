//! The flags as typed, and their help texts. Their meaning is resolved in `options`.
//!
//! There is one module for each family of verbs. Flags that several verbs take are in `shared`, parsers of values in
//! `value`.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

mod bench;
mod commit;
mod containers;
mod image;
mod layer;
#[cfg(feature = "service")]
pub(super) mod service;
mod shared;
mod value;

use std::path::PathBuf;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

pub(super) use bench::Bench;
pub(super) use commit::{Commit, VolumeIdentity};
pub(super) use containers::{Diff, Inspect, Ps};
pub(super) use image::{
    Image, ImageCp, ImageDiff, ImageLs, ImagePrune, ImageRm, ImageSquash, ImageTag,
};
pub(super) use layer::{Layer, Validate};
#[cfg(feature = "service")]
pub(super) use shared::Server;
pub(super) use shared::{Choice, Content, Format, Memory, Registry};

use bench::BENCH_HELP;
use commit::commit_help;
use containers::{DIFF_HELP, INSPECT_HELP, PS_HELP};
use image::IMAGE_HELP;
use layer::{LAYER_HELP, VALIDATE_HELP};

use super::exit::Exit;
use crate::node::confine::{self, Role};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const ABOUT: &str = "\
Saves a container as an OCI image, without a container daemon.

upperdeck reads the container's changes (the upper directory of its overlay) and its base image from disk, makes a layer \
of the changes, and writes a new image on top of the base to a registry, an OCI layout directory or an OCI archive. It \
works for containers of containerd (Kubernetes, nerdctl, ctr), CRI-O, Podman and Docker, and for any \
process whose root is an overlay.";

/// Returns the exit codes, one per line, for the help.
fn exit_codes() -> String {
    Exit::TABLE
        .map(|(exit, meaning)| format!("  {:<4} {meaning}\n", exit.code()))
        .concat()
}

/// Returns the capabilities that are kept and their purpose, one per line.
fn rights() -> String {
    let needs = confine::required_capabilities(Role::Commit).iter();
    needs
        .map(|need| {
            let less = if need.required { "" } else { " (optional)" };
            format!("  CAP_{:<16} {}{less}\n", need.name, need.purpose)
        })
        .collect()
}

fn after_help() -> String {
    format!(
        "\
Examples:
  upperdeck ps
      List the containers of this node.
  upperdeck commit jupyter/notebook-0 registry.example.org/alice/notebook:monday
      Save a pod's only container to a registry.
  upperdeck commit 3f2a oci:/srv/images/notebook:monday
      Save the container whose ID begins with 3f2a to an OCI layout directory.

CONTAINER:
  An ID or a unique beginning of one; a name (Docker, Podman, nerdctl); NAMESPACE/POD[/CONTAINER]; pid:N.
  pid:N is any process on an overlay. There is no runtime's record of it: the directories in its mount table are trusted and
  read with this program's rights. Use it only for trusted processes.

Exit codes:
{}
Environment:
  UPPERDECK_HOST_ROOT, UPPERDECK_CONTAINERD_ROOT, UPPERDECK_CONTAINERD_STATE, UPPERDECK_DOCKER_ROOT,
  UPPERDECK_STORAGE_ROOT, UPPERDECK_STORAGE_RUNROOT, UPPERDECK_LOG, UPPERDECK_LOG_FORMAT
      As the flags of the same name. Every flag of manager, agent, up and doctor has such a variable.
  SOURCE_DATE_EPOCH
      As --timestamp of commit and layer.
  REGISTRY_AUTH_FILE, DOCKER_CONFIG, XDG_RUNTIME_DIR
      Locations of registry credentials.
  NO_COLOR
      Disables colours in the help and the progress bar.

Rights:
  Before it reads a container's data, every process drops all capabilities but the following and sets no_new_privs; seccomp
  denies system calls for mounts, namespaces, other processes' memory, kernel code and starting programs; core dumps are
  disabled; inherited descriptors that no flag names are closed. A manager keeps a capability only for a port below 1024.
  'upperdeck doctor' reports what is missing.
{}",
        exit_codes(),
        rights()
    )
}

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "upperdeck",
    version,
    about = "Saves a container as an OCI image, without a container daemon",
    long_about = ABOUT,
    after_long_help = after_help(),
    after_help = "'upperdeck --help' has examples, exit codes and environment variables; 'upperdeck COMMAND --help' describes a command.",
    styles = STYLES,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Args)]
pub(super) struct Global {
    /// Root directory of the node's files, for an agent in a pod
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_HOST_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) host_root: Option<PathBuf>,
    /// containerd's "root" [default: /var/lib/containerd, and those of k3s and RKE2]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_CONTAINERD_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) containerd_root: Option<PathBuf>,
    /// containerd's "state" [default: /run/containerd, and those of k3s and RKE2]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_CONTAINERD_STATE", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) containerd_state: Option<PathBuf>,
    /// Docker's "data-root" [default: /var/lib/docker]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_DOCKER_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) docker_root: Option<PathBuf>,
    /// "graphroot" of Podman and CRI-O [default: /var/lib/containers/storage]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_STORAGE_ROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) storage_root: Option<PathBuf>,
    /// "runroot" of Podman and CRI-O [default: /run/containers/storage]
    #[arg(long, global = true, value_name = "DIR", env = "UPPERDECK_STORAGE_RUNROOT", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = STATE)]
    pub(super) storage_runroot: Option<PathBuf>,
    /// What to log on stderr: error, warn, info, debug, trace, or a filter such as upperdeck::registry=debug
    #[arg(long, global = true, value_name = "FILTER", env = "UPPERDECK_LOG", hide_env_values = true, help_heading = LOGGING)]
    pub(super) log: Option<String>,
    /// Format of log lines
    #[arg(long, global = true, value_enum, value_name = "HOW", default_value_t = LogFormat::Text, env = "UPPERDECK_LOG_FORMAT", hide_env_values = true, help_heading = LOGGING)]
    pub(super) log_format: LogFormat,
    /// Log more than --log says; repeat for even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = LOGGING)]
    pub(super) verbose: u8,
}

const STATE: &str = "Where runtimes keep their state";
const LOGGING: &str = "Logging";

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List the containers on this node that can be saved
    #[command(after_long_help = PS_HELP)]
    Ps(Ps),
    /// Show the base, layers, size of the changes and what will not be saved
    #[command(after_long_help = INSPECT_HELP)]
    Inspect(Box<Inspect>),
    /// List the changes of a container: A added, C changed, D deleted
    #[command(after_long_help = DIFF_HELP)]
    Diff(Diff),
    /// Save a container as an image
    #[command(after_long_help = commit_help())]
    Commit(Box<Commit>),
    /// Create only a layer, from directories
    #[command(after_long_help = LAYER_HELP)]
    Layer(Layer),
    /// List, tag, compare, squash, delete and prune saved images, and copy files out of them
    #[command(subcommand, after_long_help = IMAGE_HELP)]
    Image(Image),
    /// Compare a layer, an image or a container with a specification, or write one
    #[command(after_long_help = VALIDATE_HELP)]
    Validate(Box<Validate>),
    /// Measure the stages of a save on this node
    #[command(after_long_help = BENCH_HELP)]
    Bench(Box<Bench>),
    #[cfg(feature = "service")]
    #[command(flatten)]
    Service(service::Verb),
    /// Create a container, save it, unpack the image and compare, twice
    #[command(after_long_help = DEMO_HELP)]
    Demo,
    /// Print shell completions
    #[command(after_long_help = COMPLETIONS_HELP)]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the man page, or write the pages of all commands to a directory
    #[command(
        after_long_help = "Examples:\n  upperdeck man | man -l -\n  upperdeck man /usr/local/share/man/man1"
    )]
    Man {
        /// Directory to write upperdeck.1, upperdeck-commit.1, ... to; it is created if it is missing
        #[arg(value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// Text
    Text,
    /// One JSON object per line
    Json,
}

const DEMO_HELP: &str = "\
Needs only Linux, and root or permission to create a user namespace. All files are in a temporary directory that is
removed at the end. No registry, daemon or network is used.";

const COMPLETIONS_HELP: &str = "\
Examples:
  upperdeck completions bash > /etc/bash_completion.d/upperdeck
  upperdeck completions zsh > \"${fpath[1]}/_upperdeck\"
  upperdeck completions fish > ~/.config/fish/completions/upperdeck.fish";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn clap_finds_no_contradiction() {
        Cli::command().debug_assert();
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
