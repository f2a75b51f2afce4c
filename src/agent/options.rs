//! What an administrator decides about a node's agent.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::background::FLOOR;
use crate::container::{Pattern, Roots};
use crate::queue::HEARTBEAT_EVERY;

use super::owner::OwnerRule;

/// What a child takes of memory, at most: twice what the names and attributes of a tree may take (`--max-memory`), with
/// room for all threads.
const MEMORY: u64 = 3 << 30;

/// Everything about an agent. `Options::new` has the usual values of all but the rule.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its node's name, unique among the agents of a queue. Usually the host's.
    pub node: String,
    /// Where the runtimes keep their state.
    pub roots: Roots,
    /// Whose a session is.
    pub owner: OwnerRule,
    /// The program that is started for each job, with `commit` as its first argument. Usually this one.
    pub program: PathBuf,
    /// How the children reach registries.
    pub registry: Registry,
    /// Where images may go. What begins with none of these is refused, so an empty list refuses everything.
    pub allowed: Vec<Allowed>,
    /// Volumes that may be saved, with the owner's name still to be put in. What none covers is refused.
    pub volumes: Vec<Pattern>,
    /// Where the children keep what they need to save only what changed (`--state-dir`); none: nowhere.
    pub state_dir: Option<PathBuf>,
    /// Where the agent notes what runs and how it ended, so that its own death costs nothing.
    pub spool_dir: PathBuf,
    /// Jobs at once, at most; the pressure on the node may make it fewer. At least 1.
    pub slots: u32,
    /// Threads of one job, at least and at most. None at most: the node's cores.
    pub threads: (u32, Option<u32>),
    /// Codec where the order names none: `gzip` or `zstd`.
    pub compression: Option<String>,
    /// The longest that a container may stand still; none: as `commit` has it.
    pub max_pause: Option<Duration>,
    /// The longest that a save may run, whatever its order says.
    pub max_time: Duration,
    /// How long a save waits for a manager to say that it is wanted: before it begins, and before the tag. The container
    /// runs meanwhile.
    pub manager_wait: Duration,
    /// How long running saves may go on when the agent is asked to end.
    pub drain: Duration,
    /// Between two heartbeats.
    pub heartbeat_every: Duration,
    /// Between two looks at what runs on the node.
    pub inventory_every: Duration,
    /// Between two looks at how much a session changed.
    pub sizes_every: Duration,
    /// Whether children run at the lowest CPU and I/O priority, and then their floor in per cent of the cores.
    pub background: Option<f64>,
    /// The most memory that a child may take, in bytes; none: no bound.
    pub memory: Option<u64>,
    /// Further flags of `commit` for every job, as the administrator wants them: caps, `--pause`, `--include-caches`.
    pub flags: Vec<String>,
}

/// How the children reach registries.
#[derive(Clone, Debug)]
pub struct Registry {
    /// File with `USER:PASSWORD`, read for each job: it may be replaced at any time.
    pub creds_file: Option<PathBuf>,
    /// Credentials as `podman login` and `docker login` write them.
    pub authfile: Option<PathBuf>,
    /// Directory with further authorities and this client's certificate.
    pub cert_dir: Option<PathBuf>,
    /// Whether certificates are checked; false also allows plain HTTP.
    pub tls_verify: bool,
    /// Whether a missing project is made in Harbor.
    pub create_project: bool,
}

impl Options {
    /// The usual values; nothing is allowed as a destination yet.
    pub fn new(owner: OwnerRule) -> Self {
        let state = PathBuf::from("/var/lib/upperdeck");
        Self {
            node: hostname(),
            roots: Roots::default(),
            owner,
            program: PathBuf::from("/proc/self/exe"),
            registry: Registry {
                creds_file: None,
                authfile: None,
                cert_dir: None,
                tls_verify: true,
                create_project: false,
            },
            allowed: Vec::new(),
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
            background: Some(FLOOR),
            memory: Some(MEMORY),
            flags: Vec::new(),
        }
    }
}

/// The host's name, as a node is called where nobody says otherwise.
fn hostname() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

/// A prefix that a destination must have: `HOST[:PORT]`, `HOST[:PORT]/PROJECT[/...]` or `oci:DIRECTORY`.
///
/// It holds at a boundary only: `registry.example.org/users` lets `registry.example.org/users/alice` pass, and
/// `registry.example.org/users-2` not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// `oci:` or empty.
    scheme: &'static str,
    /// Without a slash at its end.
    prefix: String,
}

/// A prefix that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} allows nothing: expected HOST[:PORT][/PROJECT] or oci:/DIRECTORY")]
pub struct AllowedError(String);

/// The scheme of a destination, and what comes after it.
fn split(destination: &str) -> Option<(&'static str, &str)> {
    if let Some(directory) = destination.strip_prefix("oci:") {
        return Some(("oci:", directory));
    }
    // One file of which the children would be the only writers is no place for many jobs.
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

/// Nothing that could lead elsewhere than it reads.
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
    /// Whether `destination` lies below it.
    pub fn covers(&self, destination: &str) -> bool {
        let Some((scheme, place)) = split(destination) else {
            return false;
        };
        if scheme != self.scheme || !plain(place) {
            return false;
        }
        match place.strip_prefix(&self.prefix) {
            // Of a bare host what follows may not be its port: that would be another one.
            Some(rest) if scheme.is_empty() && !self.prefix.contains('/') => rest.starts_with('/'),
            Some(rest) => rest.is_empty() || rest.starts_with('/') || rest.starts_with(':'),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Allowed, AllowedError};

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
