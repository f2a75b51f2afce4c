//! The configuration of a node's agent.

use std::fmt;
use std::net::TcpListener;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::node::background::DEFAULT_FLOOR_PERCENT;
use crate::node::container::{Pattern, Roots};
use crate::service::job::SaveEnded;
use crate::service::queue::HEARTBEAT_EVERY;

use super::owner::OwnerRule;

/// Default memory limit of a child in bytes: twice what the names and attributes of a tree may take (`--max-memory`),
/// with a reserve for all threads.
const MEMORY: u64 = 3 << 30;

/// Configuration of an agent. [`Options::new`] sets the defaults of everything but the owner rule.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the node, unique among the agents of a queue. Defaults to the host name.
    pub node: String,
    /// Directories in which the runtimes keep their state.
    pub roots: Roots,
    /// Rule that determines the owner of a session.
    pub owner: OwnerRule,
    /// Program that is started for each job, with `commit` as its first argument. Defaults to this program.
    pub program: PathBuf,
    /// How the children access registries.
    pub registry: Registry,
    /// Permitted destinations. A destination that none of them covers is refused, so an empty list refuses everything.
    pub allowed: Vec<Allowed>,
    /// Which sessions are saved when they end, unless their pod says otherwise.
    pub save_ended: SaveEnded,
    /// Volumes that may be saved, as patterns with a placeholder for the owner. A volume that none of them covers is
    /// refused.
    pub volumes: Vec<Pattern>,
    /// Directory in which the children keep the state for delta saves (`--state-dir`); `None` disables them.
    pub state_dir: Option<PathBuf>,
    /// Directory in which the agent records running jobs and their outcomes, so that nothing is lost if it dies.
    pub spool_dir: PathBuf,
    /// Maximum number of concurrent jobs; pressure on the node may lower it. At least 1.
    pub slots: u32,
    /// Minimum and maximum number of threads per job. Without a maximum, the number of the node's cores.
    pub threads: (u32, Option<u32>),
    /// Compression if the order has none: `gzip` or `zstd`.
    pub compression: Option<String>,
    /// Maximum time that a container may be frozen; `None` uses the default of `commit`.
    pub max_pause: Option<Duration>,
    /// Time limit of a save, regardless of its order.
    pub max_time: Duration,
    /// How long a save waits for a manager's confirmation that it is wanted, before it starts and before it sets the
    /// tag. The container is not frozen meanwhile.
    pub manager_wait: Duration,
    /// How long running saves may continue when the agent has to end.
    pub drain: Duration,
    /// Interval between two heartbeats.
    pub heartbeat_every: Duration,
    /// Interval between two listings of the node's containers.
    pub inventory_every: Duration,
    /// Interval between two inspections of the size of a session's changes.
    pub sizes_every: Duration,
    /// Whether children run at the lowest CPU and I/O priority, and then their floor in per cent of the cores.
    pub background: Option<f64>,
    /// Whether the owner of a save may have it run at normal priority.
    pub allow_hurry: bool,
    /// The most memory that a child may take, in bytes; none: no bound.
    pub memory: Option<u64>,
    /// The socket on which health and metrics are served, already bound; `None` for none.
    pub health: Option<Arc<TcpListener>>,
    /// Further flags of `commit` for every job, chosen by the administrator: caps, `--pause`, `--include-caches`.
    pub flags: Vec<String>,
}

/// How the children access registries.
#[derive(Clone, Debug)]
pub struct Registry {
    /// File with `USER:PASSWORD`. It is read for each job, so it can be replaced at any time.
    pub creds_file: Option<PathBuf>,
    /// Credentials file as written by `podman login` and `docker login`.
    pub authfile: Option<PathBuf>,
    /// Directory with additional certificate authorities and a client certificate.
    pub cert_dir: Option<PathBuf>,
    /// Whether certificates are verified; `false` also permits plain HTTP.
    pub tls_verify: bool,
    /// Whether a missing Harbor project is created.
    pub create_project: bool,
    /// Quota in bytes of a project that is created.
    pub project_quota: Option<u64>,
    /// Whether images that their last tag moved away from are kept.
    pub keep_replaced: bool,
    /// Who distributes the images: the annotation `org.opencontainers.image.vendor`.
    pub vendor: Option<String>,
}

impl Options {
    /// Returns whether a save may leave the background when its owner asks.
    pub(super) fn may_hurry(&self) -> bool {
        self.allow_hurry && self.background.is_some()
    }

    /// Returns the defaults, with no permitted destination.
    pub fn new(owner: OwnerRule) -> Self {
        let state = PathBuf::from("/var/lib/upperdeck");
        Self {
            node: host_name(),
            roots: Roots::default(),
            owner,
            program: PathBuf::from("/proc/self/exe"),
            registry: Registry {
                creds_file: None,
                authfile: None,
                cert_dir: None,
                tls_verify: true,
                create_project: false,
                project_quota: None,
                keep_replaced: false,
                vendor: None,
            },
            allowed: Vec::new(),
            save_ended: SaveEnded::default(),
            volumes: Vec::new(),
            spool_dir: state.join("agent"),
            state_dir: Some(state),
            slots: 4,
            threads: (1, None),
            compression: None,
            max_pause: None,
            max_time: Duration::from_secs(12 * 60 * 60),
            manager_wait: Duration::from_secs(5 * 60),
            drain: Duration::from_secs(5 * 60),
            heartbeat_every: HEARTBEAT_EVERY,
            inventory_every: Duration::from_secs(10),
            sizes_every: Duration::from_secs(5 * 60),
            background: Some(DEFAULT_FLOOR_PERCENT),
            allow_hurry: false,
            memory: Some(MEMORY),
            health: None,
            flags: Vec::new(),
        }
    }
}

/// Returns the host name, which is the default name of a node.
pub(crate) fn host_name() -> String {
    match rustix::system::uname().nodename().to_str() {
        Ok(name) if !name.is_empty() => name.to_owned(),
        _ => "localhost".to_owned(),
    }
}

/// A prefix that destinations must have: `HOST[:PORT]`, `HOST[:PORT]/PROJECT[/...]` or `oci:DIRECTORY`.
///
/// It matches at component boundaries only: `registry.example.org/users` covers `registry.example.org/users/alice`, but
/// not `registry.example.org/users-2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// `oci:` or empty.
    scheme: &'static str,
    /// Without a trailing slash.
    prefix: String,
}

/// The text is not a valid destination prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} allows nothing: expected HOST[:PORT][/PROJECT] or oci:/DIRECTORY")]
pub struct AllowedError(String);

/// Splits a destination into its scheme and the rest. Returns `None` for unsupported schemes.
fn split(destination: &str) -> Option<(&'static str, &str)> {
    if let Some(directory) = destination.strip_prefix("oci:") {
        return Some(("oci:", directory));
    }
    // An archive is one file, which does not suit many jobs that write at the same time.
    if destination.starts_with("oci-archive:") {
        return None;
    }
    let reference = destination.strip_prefix("docker://");
    Some(("", reference.unwrap_or(destination)))
}

impl FromStr for Allowed {
    type Err = AllowedError;

    fn from_str(text: &str) -> Result<Self, AllowedError> {
        let wrong = || AllowedError(text.to_owned());
        let (scheme, prefix) = split(text).ok_or_else(wrong)?;
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let whole = if scheme.is_empty() {
            !prefix.is_empty() && plain(prefix)
        } else {
            prefix.starts_with('/') && plain(prefix)
        };
        let prefix = prefix.to_owned();
        whole.then_some(Self { scheme, prefix }).ok_or_else(wrong)
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.scheme, self.prefix)
    }
}

/// Returns whether the path contains nothing that would make it resolve to another place than it reads.
fn plain(path: &str) -> bool {
    let inside = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
    inside
        && !path.contains("//")
        && !path.contains("/./")
        && !path
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || c == '@')
}

impl Allowed {
    /// Returns whether `destination` is below this prefix.
    pub(crate) fn covers(&self, destination: &str) -> bool {
        let Some((scheme, place)) = split(destination) else {
            return false;
        };
        if scheme != self.scheme || !plain(place) {
            return false;
        }
        match place.strip_prefix(&self.prefix) {
            // After a bare host a port must not follow, because that would be another registry.
            Some(rest) if scheme.is_empty() && !self.prefix.contains('/') => rest.starts_with('/'),
            Some(rest) => rest.is_empty() || rest.starts_with('/') || rest.starts_with(':'),
            None => false,
        }
    }
}

/// Returns the directory whose layouts share blobs with the layout that `destination` names: the allowed directory that
/// it is in.
pub(super) fn shared_directory<'a>(allowed: &'a [Allowed], destination: &str) -> Option<&'a str> {
    let covering = allowed.iter().filter(|prefix| prefix.covers(destination));
    let directories = covering.filter(|prefix| prefix.scheme == "oci:");
    directories
        .map(|prefix| prefix.prefix.as_str())
        .max_by_key(|prefix| prefix.len())
}

#[cfg(test)]
mod tests {
    use super::{Allowed, AllowedError, shared_directory};

    #[test]
    fn layouts_share_blobs_below_what_is_allowed() -> Result<(), AllowedError> {
        let allowed = ["r.example.org", "oci:/srv/images", "oci:/srv/images/lab/"];
        let allowed: Vec<Allowed> = allowed
            .into_iter()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        for (destination, shared) in [
            ("oci:/srv/images/alice/x:1", Some("/srv/images")),
            ("oci:/srv/images/lab/x:1", Some("/srv/images/lab")),
            ("oci:/srv/other/x:1", None),
            ("r.example.org/alice/x:1", None),
        ] {
            assert_eq!(
                shared_directory(&allowed, destination),
                shared,
                "{destination}"
            );
        }
        Ok(())
    }

    #[test]
    fn a_prefix_holds_at_a_boundary_only() -> Result<(), AllowedError> {
        for (prefix, destination, covered) in [
            ("r.example.org", "r.example.org/a/b:c", true),
            ("r.example.org", "docker://r.example.org/a/b:c", true),
            ("r.example.org", "r.example.org:5000/a", false),
            ("r.example.org", "r.example.org.evil.net/a", false),
            ("r.example.org", "evil.net/r.example.org/a", false),
            ("r.example.org", "r.example.org@evil.net/a", false),
            ("r.example.org:5000", "r.example.org:5000/a:1", true),
            ("r.example.org:5000", "r.example.org:50001/a", false),
            ("r.example.org/users", "r.example.org/users/alice/x:1", true),
            ("r.example.org/users/", "r.example.org/users/alice", true),
            ("r.example.org/users", "r.example.org/users-2/a", false),
            ("r.example.org/users", "r.example.org/users/../other", false),
            (
                "r.example.org/users/alice",
                "r.example.org/users/alice:1",
                true,
            ),
            ("oci:/srv/images", "oci:/srv/images/alice/x:1", true),
            ("oci:/srv/images", "oci:/srv/images:1", true),
            ("oci:/srv/images", "oci:/srv/images-2", false),
            ("oci:/srv/images", "oci:/srv/images/../../etc", false),
            ("oci:/srv/images", "oci:srv/images", false),
            ("oci:/srv/images", "oci-archive:/srv/images/x.tar", false),
            ("oci:/srv/images", "/srv/images/x", false),
            ("r.example.org", "r.example.org/a b", false),
        ] {
            let allowed: Allowed = prefix.parse()?;
            assert_eq!(
                allowed.covers(destination),
                covered,
                "{prefix} {destination}"
            );
        }
        Ok(())
    }

    #[test]
    fn what_would_allow_everything_or_nothing_is_refused() {
        for text in [
            "",
            "/",
            "docker://",
            "oci:",
            "oci:images",
            "oci:/a/../b",
            "a@b",
            "oci-archive:/x",
        ] {
            assert!(text.parse::<Allowed>().is_err(), "{text}");
        }
    }
}
