//! Flags that several verbs take with the same meaning.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::value::{any_path, duration, floor, size};
use crate::node::background::{DEFAULT_FLOOR_PERCENT, MemoryLimit};
use crate::node::container::Attempt;
use crate::save::Compression;

pub(super) const CONTENT: &str = "What goes into the layer";
pub(super) const METADATA: &str = "What the image says";
pub(super) const REGISTRY: &str = "Registry";
pub(super) const REPORT: &str = "Report";
#[cfg(feature = "service")]
const SERVER: &str = "Manager";
pub(super) const LIMITS: &str = "Limits against hostile trees";

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Format {
    /// Human-readable text
    Table,
    /// For programs; fields are only added, never removed
    Json,
}

/// The state that a save keeps for the next one of the same container.
#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct State {
    /// Directory for the state that later saves of a container need to save only changes; empty: keep none [default:
    /// /var/lib/upperdeck; without root ~/.local/state/upperdeck]
    #[arg(long, value_name = "DIR", env = "UPPERDECK_STATE_DIR", hide_env_values = true, value_parser = any_path(), value_hint = ValueHint::DirPath, help_heading = CONTENT)]
    #[allow(clippy::struct_field_names, reason = "named as its flag")]
    pub(in crate::cli) state_dir: Option<PathBuf>,
    /// Maximum number of layers above the base, where the parts of a split layer count as one; with more, everything is
    /// saved again
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=100), help_heading = CONTENT)]
    pub(in crate::cli) max_layers: u8,
    /// Save all changes to the base, not only those since the last save
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) full: bool,
}

/// Which run of a container is meant.
#[derive(Clone, Copy, Debug, Args)]
pub(in crate::cli) struct WhichAttempt {
    /// The container of the pod before the current one, which has ended (as 'kubectl logs --previous')
    #[arg(long)]
    previous: bool,
}

impl From<WhichAttempt> for Attempt {
    fn from(which: WhichAttempt) -> Self {
        if which.previous {
            Self::Previous
        } else {
            Self::Current
        }
    }
}

/// What determines the content of layers.
#[derive(Debug, Args)]
pub(in crate::cli) struct Choice {
    /// Exclude matching paths, e.g. 'home/*/scratch' or '**/*.pyc'; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(in crate::cli) exclude: Vec<String>,
    /// Include credentials and histories (.ssh, .netrc, .aws, ...)
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) include_credentials: bool,
    /// Include caches (.cache/pip, var/cache/apt/archives, /tmp, ...)
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) include_caches: bool,
    /// Creation time of the image, in seconds since 1970; later modification times are set to it
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", hide_env_values = true, allow_negative_numbers = true, help_heading = CONTENT)]
    pub(in crate::cli) timestamp: Option<i64>,
    /// Maximum number of entries of the tree
    #[arg(long, value_name = "N", help_heading = LIMITS)]
    pub(in crate::cli) max_entries: Option<u64>,
    /// Maximum depth of directories
    #[arg(long, value_name = "N", help_heading = LIMITS)]
    pub(in crate::cli) max_depth: Option<u32>,
    /// Maximum sum of file sizes, e.g. 500G
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(in crate::cli) max_size: Option<u64>,
    /// Maximum size of the holes of sparse files, e.g. 64G
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(in crate::cli) max_holes: Option<u64>,
    /// Maximum memory for names, attributes and listings of the tree, e.g. 2G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(in crate::cli) max_memory: Option<u64>,
}

/// Background priority.
#[derive(Debug, Args)]
pub(in crate::cli) struct InBackground {
    /// Run at the lowest CPU and I/O priority, in a separate cgroup where possible
    #[arg(long)]
    background: bool,
    /// Minimum share of the cores for all background work together, in per cent, once other work has kept all cores busy
    /// for ten seconds; 0: none
    #[arg(long, value_name = "PERCENT", value_parser = floor, default_value_t = DEFAULT_FLOOR_PERCENT, requires = "background")]
    background_floor: f64,
}

impl InBackground {
    /// The floor, or `None` for normal priority.
    pub(in crate::cli) fn floor(&self) -> Option<f64> {
        self.background.then_some(self.background_floor)
    }
}

/// Limits that an agent sets for its children.
#[derive(Debug, Args)]
pub(in crate::cli) struct Memory {
    /// Memory limit of this process
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "memory_group", hide = true)]
    memory_limit: Option<u64>,
    /// Name of the cgroup with that limit
    #[arg(long, value_name = "NAME", value_parser = group_name, requires = "memory_limit", hide = true)]
    memory_group: Option<String>,
}

impl Memory {
    /// Returns the memory limit, if both of its flags are given.
    pub(in crate::cli) fn bound(&self) -> Option<MemoryLimit> {
        let (bytes, group) = (self.memory_limit?, self.memory_group.clone()?);
        Some(MemoryLimit { bytes, group })
    }
}

/// Parses a name that is a single path component of letters, digits and `-`.
fn group_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if text.is_empty() || text.len() > 100 || !text.chars().all(plain) {
        return Err("expected letters, digits and -".to_owned());
    }
    Ok(text.to_owned())
}

/// Flags of `commit` and `layer`: the layer's content and encoding.
#[derive(Debug, Args)]
pub(in crate::cli) struct Content {
    /// Compression of the layer
    #[arg(long, value_enum, default_value_t = Compression::Gzip, value_name = "CODEC", help_heading = CONTENT)]
    pub(in crate::cli) compression: Compression,
    /// Compression level: gzip 1 (fastest) to 9 (smallest), zstd 1 to 19 [default: 2 for gzip, 1 for zstd]
    #[arg(long, value_name = "N", help_heading = CONTENT)]
    pub(in crate::cli) compression_level: Option<u32>,
    /// Number of threads; the result does not depend on it [default: all cores]
    #[arg(short, long, value_name = "N", help_heading = CONTENT)]
    pub(in crate::cli) jobs: Option<NonZeroUsize>,
    #[command(flatten)]
    pub(in crate::cli) choice: Choice,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Registry {
    /// Credentials file, as written by 'podman login' and 'docker login'
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) authfile: Option<PathBuf>,
    /// Credentials for the destination, visible to other users of this machine: prefer --creds-file
    #[arg(long, value_name = "USER:PASSWORD", help_heading = REGISTRY)]
    pub(in crate::cli) creds: Option<String>,
    /// File with USER:PASSWORD for the destination
    #[arg(long, value_name = "FILE", conflicts_with = "creds", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) creds_file: Option<PathBuf>,
    /// Open file descriptor to read USER:PASSWORD for the destination from
    #[arg(long, value_name = "N", conflicts_with_all = ["creds", "creds_file"], help_heading = REGISTRY)]
    pub(in crate::cli) creds_fd: Option<u32>,
    /// Require HTTPS and verify the destination's certificate
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, help_heading = REGISTRY)]
    pub(in crate::cli) tls_verify: bool,
    /// Directory with additional CA certificates (*.crt) and client certificates (*.cert with *.key)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(in crate::cli) cert_dir: Option<PathBuf>,
    /// Maximum time for all transfers together, e.g. 2h [default: 12h]
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = REGISTRY)]
    pub(in crate::cli) deadline: Option<Duration>,
}

/// The manager to send requests to.
#[cfg(feature = "service")]
#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct Server {
    /// URL of the manager, with ?token=... as printed by 'upperdeck up' if needed [default: this machine's 'upperdeck up']
    #[arg(long, value_name = "URL", env = "UPPERDECK_SERVER", hide_env_values = true, value_hint = ValueHint::Url, help_heading = SERVER)]
    #[allow(clippy::struct_field_names, reason = "named as its flag")]
    pub(in crate::cli) server: Option<String>,
    /// File with the token in its first line (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", env = "UPPERDECK_TOKEN_FILE", hide_env_values = true, value_hint = ValueHint::FilePath, help_heading = SERVER)]
    pub(in crate::cli) token_file: Option<PathBuf>,
    /// The token, visible to other users of this machine: prefer --token-file
    #[arg(long, value_name = "TOKEN", env = "UPPERDECK_TOKEN", hide_env_values = true, conflicts_with = "token_file", help_heading = SERVER)]
    pub(in crate::cli) token: Option<String>,
    /// The user to act for, with a portal's token
    #[arg(long = "as-user", value_name = "USER", env = "UPPERDECK_AS_USER", hide_env_values = true, help_heading = SERVER)]
    pub(in crate::cli) user: Option<String>,
    /// File in which this machine's 'upperdeck up' states its address
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", env = "UPPERDECK_UP_DIR", hide_env_values = true, hide = true, help_heading = SERVER)]
    pub(in crate::cli) up_dir: PathBuf,
}
