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
    /// For people
    Table,
    /// For programs; fields are only ever added
    Json,
}

/// What is kept of a save for the next one of the same container.
#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct State {
    /// Where this node keeps what it needs to save only what changed since the last save; empty for nowhere
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", env = "UPPERDECK_STATE_DIR", hide_env_values = true, value_parser = any_path(), value_hint = ValueHint::DirPath, help_heading = CONTENT)]
    #[allow(clippy::struct_field_names, reason = "named as its flag")]
    pub(in crate::cli) state_dir: Option<PathBuf>,
    /// Layers above the base from which on everything is saved anew; the parts of --layer-size count as one
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=100), help_heading = CONTENT)]
    pub(in crate::cli) max_layers: u8,
    /// Save everything anew, not only what changed since the last save
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) full: bool,
}

/// What decides what the layers show.
#[derive(Debug, Args)]
pub(in crate::cli) struct Choice {
    /// Leave out what matches, e.g. 'home/*/scratch' or '**/*.pyc'; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(in crate::cli) exclude: Vec<String>,
    /// Keep credentials and histories (.ssh, .netrc, .aws, ...)
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) include_credentials: bool,
    /// Keep caches (.cache/pip, var/cache/apt/archives, /tmp, ...)
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) include_caches: bool,
    /// No time in the result is later than this, in seconds since 1970; it is the image's time of creation, too
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", hide_env_values = true, allow_negative_numbers = true, help_heading = CONTENT)]
    pub(in crate::cli) timestamp: Option<i64>,
    /// Most entries that a tree may have
    #[arg(long, value_name = "N", help_heading = LIMITS)]
    pub(in crate::cli) max_entries: Option<u64>,
    /// Most levels of directories
    #[arg(long, value_name = "N", help_heading = LIMITS)]
    pub(in crate::cli) max_depth: Option<u32>,
    /// Largest sum of file sizes, e.g. 500G
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(in crate::cli) max_size: Option<u64>,
    /// Most bytes in the holes of sparse files, e.g. 64G
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(in crate::cli) max_holes: Option<u64>,
    /// Most memory for names, attributes and listings of a tree, e.g. 2G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = LIMITS)]
    pub(in crate::cli) max_memory: Option<u64>,
}

/// Whether others on the node go first.
#[derive(Debug, Args)]
pub(in crate::cli) struct InBackground {
    /// Use only CPU time that is otherwise idle, in a cgroup of its own where one can be made
    #[arg(long)]
    background: bool,
    /// What all that is in the background gets together where others want every core for more than ten seconds: per cent
    /// of the cores; 0 for nothing
    #[arg(long, value_name = "PERCENT", value_parser = floor, default_value_t = DEFAULT_FLOOR_PERCENT, requires = "background")]
    background_floor: f64,
}

impl InBackground {
    /// The floor; none: not in the background.
    pub(in crate::cli) fn floor(&self) -> Option<f64> {
        self.background.then_some(self.background_floor)
    }
}

/// What an agent gives its children on the way.
#[derive(Debug, Args)]
pub(in crate::cli) struct Memory {
    /// The most memory that this process may take
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "memory_group", hide = true)]
    memory_limit: Option<u64>,
    /// Name of the cgroup that it is bounded by
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

/// What `commit` and `layer` share: what goes into the layer, and how it is made.
#[derive(Debug, Args)]
pub(in crate::cli) struct Content {
    /// How the layer is compressed
    #[arg(long, value_enum, default_value_t = Compression::Gzip, value_name = "CODEC", help_heading = CONTENT)]
    pub(in crate::cli) compression: Compression,
    /// Level of the codec: gzip 1 (fastest) to 9 (smallest), zstd 1 to 19 [default: 2, about the size that buildah makes]
    #[arg(long, value_name = "N", help_heading = CONTENT)]
    pub(in crate::cli) compression_level: Option<u32>,
    /// Threads; the result is the same for any number [default: all cores]
    #[arg(short, long, value_name = "N", help_heading = CONTENT)]
    pub(in crate::cli) jobs: Option<NonZeroUsize>,
    #[command(flatten)]
    pub(in crate::cli) choice: Choice,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Registry {
    /// Credentials file, as 'podman login' and 'docker login' write it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) authfile: Option<PathBuf>,
    /// Credentials for the destination. Other users of this machine can see them: prefer --creds-file
    #[arg(long, value_name = "USER:PASSWORD", help_heading = REGISTRY)]
    pub(in crate::cli) creds: Option<String>,
    /// File with USER:PASSWORD for the destination
    #[arg(long, value_name = "FILE", conflicts_with = "creds", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) creds_file: Option<PathBuf>,
    /// Open descriptor to read USER:PASSWORD for the destination from
    #[arg(long, value_name = "N", conflicts_with_all = ["creds", "creds_file"], help_heading = REGISTRY)]
    pub(in crate::cli) creds_fd: Option<u32>,
    /// Whether the destination's certificate is checked; false also allows plain HTTP
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, help_heading = REGISTRY)]
    pub(in crate::cli) tls_verify: bool,
    /// Directory with *.crt of further authorities, and *.cert with *.key of this client
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(in crate::cli) cert_dir: Option<PathBuf>,
    /// The longest that everything with registries may take together, e.g. 2h [default: 12h]
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = REGISTRY)]
    pub(in crate::cli) deadline: Option<Duration>,
}

/// The manager that is asked.
#[cfg(feature = "service")]
#[derive(Clone, Debug, Args)]
pub(in crate::cli) struct Server {
    /// The manager's address, perhaps with ?token=... as 'upperdeck up' prints it [default: the 'upperdeck up' of this machine]
    #[arg(long, value_name = "URL", env = "UPPERDECK_SERVER", hide_env_values = true, value_hint = ValueHint::Url, help_heading = SERVER)]
    #[allow(clippy::struct_field_names, reason = "named as its flag")]
    pub(in crate::cli) server: Option<String>,
    /// File whose first line is the token (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", env = "UPPERDECK_TOKEN_FILE", hide_env_values = true, value_hint = ValueHint::FilePath, help_heading = SERVER)]
    pub(in crate::cli) token_file: Option<PathBuf>,
    /// The token itself. Other users of this machine can see it: prefer --token-file
    #[arg(long, value_name = "TOKEN", env = "UPPERDECK_TOKEN", hide_env_values = true, conflicts_with = "token_file", help_heading = SERVER)]
    pub(in crate::cli) token: Option<String>,
    /// For whom, where the token is a portal's
    #[arg(long = "as-user", value_name = "USER", env = "UPPERDECK_AS_USER", hide_env_values = true, help_heading = SERVER)]
    pub(in crate::cli) user: Option<String>,
    /// Where an 'upperdeck up' of this machine says how it is reached
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", env = "UPPERDECK_UP_DIR", hide_env_values = true, hide = true, help_heading = SERVER)]
    pub(in crate::cli) up_dir: PathBuf,
}
