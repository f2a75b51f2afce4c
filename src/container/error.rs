//! What can go wrong between a container's name and its proven base, with what a caller needs to choose an exit code.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use super::bolt;
use crate::overlay::mount::MountError;

/// Candidates named in one message; the rest is counted.
const SHOWN: usize = 10;

/// Something of a runtime's state that could not be read, while the rest could.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// The file or directory.
    pub path: PathBuf,
    /// What was expected, what was found.
    pub reason: String,
    /// The kernel refused: more privilege may help.
    pub permission: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

/// Why a container cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is none that could ever fit.
    #[error("{wanted:?} cannot name a container: {expected}")]
    BadName {
        /// As given.
        wanted: String,
        /// What a name looks like.
        expected: &'static str,
    },
    /// Nothing on this node has that name.
    #[error(
        "no running container {wanted:?} on this node{}{}",
        offered("; there are", candidates),
        unread(problems)
    )]
    NotFound {
        /// As given.
        wanted: String,
        /// What there is, most similar first.
        candidates: Vec<String>,
        /// Where it could also have been, if that could have been read.
        problems: Vec<Problem>,
    },
    /// Several have that name.
    #[error("{wanted:?} can mean several containers{}", offered(":", candidates))]
    Ambiguous {
        /// As given.
        wanted: String,
        /// All that it can mean, in a form that is not ambiguous.
        candidates: Vec<String>,
    },
    /// It has ended, or its pid belongs to another process by now.
    #[error("container {container} has ended: {detail}")]
    Gone {
        /// Its ID.
        container: String,
        /// How that shows.
        detail: String,
    },
    /// No image on this node gives the chain that is mounted.
    #[error(
        "the image that container {container} stands on cannot be proven; name it with --base to save nevertheless; compared were:{}",
        lines(compared)
    )]
    BaseUnproven {
        /// The container's ID.
        container: String,
        /// What was compared with what, one line each.
        compared: Vec<String>,
    },
    /// What `--include-volume` names is none.
    #[error(
        "{} is no volume that can be saved: {why}; {}",
        path.display(),
        volumes(mounts)
    )]
    NotAVolume {
        /// As given.
        path: PathBuf,
        /// What it is.
        why: String,
        /// What could be named.
        mounts: Vec<String>,
    },
    /// A volume that is none of those that may be saved.
    #[error("the volume at {} is not saved: {why}", path.display())]
    VolumeNotAllowed {
        /// Where it is mounted in the container.
        path: PathBuf,
        /// By whose word.
        why: String,
    },
    /// The kernel refused.
    #[error("{}: permission denied; run as root, with CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE", path.display())]
    NotPermitted {
        /// The path.
        path: PathBuf,
    },
    /// Its root cannot be saved from an upper directory.
    #[error("container {container} cannot be saved: {detail}")]
    NotOverlay {
        /// Its ID.
        container: String,
        /// What its root is.
        detail: String,
    },
    /// Its root is not the one that the runtime made: somebody else's directories may stand behind it.
    #[error("container {container}: its root is not the one that its runtime mounted: {detail}")]
    ForeignRoot {
        /// Its ID.
        container: String,
        /// What was expected and what was found.
        detail: String,
    },
    /// Its mount table is larger than is taken.
    #[error(
        "process {pid} has more mounts than are read ({mounts}, or {bytes} bytes of them): what is mounted is no part of an image, \
         and without the whole table it cannot be told; unmount what is not needed"
    )]
    ManyMounts {
        /// The process.
        pid: u32,
        /// Mounts that are taken.
        mounts: usize,
        /// Bytes of `mountinfo` that are taken.
        bytes: usize,
    },
    /// A directory of its root is not the one that was mounted: what this program would read is something else.
    #[error("container {container}: its {role} directory {} is not the one that is mounted: {detail}", path.display())]
    LayerUnproven {
        /// Its ID.
        container: String,
        /// `lower`, `upper`, `data-only lower`.
        role: &'static str,
        /// The directory.
        path: PathBuf,
        /// What is mounted there, and what is missing.
        detail: String,
    },
    /// The ids on disk are not those of its user namespace.
    #[error("container {container} cannot be saved with the right owners: {detail}")]
    OwnersUnknown {
        /// Its ID.
        container: String,
        /// Which ids.
        detail: String,
    },
    /// A directory of its root could not be found.
    #[error("container {container}: {source}")]
    Mount {
        /// Its ID.
        container: String,
        /// Which and why.
        source: MountError,
    },
    /// A file of the runtime is not what that runtime writes.
    #[error("{} is damaged: {detail}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
    /// A database changed faster than it could be read.
    #[error("{} keeps changing; try again", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// A file of the runtime cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Error {
    /// The exit code of the design: 1 failed for good, 2 usage, 66 no such container, 69 root or base unproven, 75 worth
    /// retrying, 77 not permitted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::BadName { .. } | Self::Ambiguous { .. } | Self::NotAVolume { .. } => 2,
            Self::NotFound { .. } | Self::Gone { .. } => 66,
            Self::BaseUnproven { .. } | Self::ForeignRoot { .. } | Self::LayerUnproven { .. } => 69,
            Self::Busy { .. } => 75,
            Self::NotPermitted { .. } | Self::ManyMounts { .. } | Self::VolumeNotAllowed { .. } => {
                77
            }
            Self::NotOverlay { .. }
            | Self::OwnersUnknown { .. }
            | Self::Mount { .. }
            | Self::Damaged { .. }
            | Self::Io { .. } => 1,
        }
    }

    /// A stable word for the event line of a failed save.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadName { .. } => "bad_name",
            Self::NotFound { .. } => "container_not_found",
            Self::Ambiguous { .. } => "container_ambiguous",
            Self::Gone { .. } => "container_gone",
            Self::BaseUnproven { .. } | Self::LayerUnproven { .. } => "base_unproven",
            Self::NotAVolume { .. } => "not_a_volume",
            Self::NotPermitted { .. } => "not_permitted",
            Self::VolumeNotAllowed { .. } => "volume_not_allowed",
            Self::NotOverlay { .. } => "not_overlay",
            Self::ManyMounts { .. } => "policy",
            Self::ForeignRoot { .. } => "foreign_root",
            Self::OwnersUnknown { .. } => "owners_unknown",
            Self::Mount { .. } => "overlay_mount",
            Self::Damaged { .. } => "state_damaged",
            Self::Busy { .. } => "state_busy",
            Self::Io { .. } => "state_io",
        }
    }

    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }

    /// An answer of the kernel about `path`.
    pub(super) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted { path },
            _ => Self::Io { path, source },
        }
    }

    pub(super) fn damaged(path: impl Into<PathBuf>, detail: impl fmt::Display) -> Self {
        Self::Damaged {
            path: path.into(),
            detail: detail.to_string(),
        }
    }

    /// Whether `path` is simply not there (any more): a container that ends takes its files with it.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// As an entry of a listing that goes on.
    pub(super) fn into_problem(self, at: &Path) -> Problem {
        let permission = matches!(self, Self::NotPermitted { .. });
        match self {
            Self::Damaged { path, detail } => Problem {
                path,
                reason: detail,
                permission,
            },
            Self::Io { path, source } => Problem {
                path,
                reason: source.to_string(),
                permission,
            },
            Self::NotPermitted { path } => Problem {
                path,
                reason: "permission denied".to_owned(),
                permission,
            },
            other => Problem {
                path: at.to_path_buf(),
                reason: other.to_string(),
                permission,
            },
        }
    }
}

impl From<bolt::Error> for Error {
    fn from(error: bolt::Error) -> Self {
        match error {
            bolt::Error::Io { path, source } => Self::io(path, source),
            bolt::Error::Damaged { path, detail } => Self::Damaged { path, detail },
            bolt::Error::Busy { path, .. } => Self::Busy { path },
        }
    }
}

/// Mounts that a message names.
const SHOWN_MOUNTS: usize = 20;

fn volumes(mounts: &[String]) -> String {
    if mounts.is_empty() {
        "nothing in the container is".to_owned()
    } else {
        // As many as a container likes, of names as long as it likes.
        let shown = mounts.len().min(SHOWN_MOUNTS);
        let more = match mounts.len() - shown {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("mounted are {}{more}", mounts[..shown].join(", "))
    }
}

fn lines(lines: &[String]) -> String {
    lines
        .iter()
        .flat_map(|line| ["\n  ", line.as_str()])
        .collect()
}

fn offered(lead: &str, candidates: &[String]) -> String {
    if candidates.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "{lead} {}",
        candidates[..candidates.len().min(SHOWN)].join(", ")
    );
    if candidates.len() > SHOWN {
        let more = candidates.len() - SHOWN;
        let _ = write!(text, " and {more} more (upperdeck ps lists them)");
    }
    text
}

fn unread(problems: &[Problem]) -> String {
    if problems.is_empty() {
        return String::new();
    }
    let mut text = "; not everything could be read: ".to_owned();
    let shown: Vec<String> = problems
        .iter()
        .take(SHOWN)
        .map(ToString::to_string)
        .collect();
    text.push_str(&shown.join("; "));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_a_few_mounts_and_counts_the_others() {
        let of = |n: usize| volumes(&(0..n).map(|n| format!("/{n}")).collect::<Vec<_>>());
        assert_eq!(of(2), "mounted are /0, /1");
        assert!(of(20).ends_with("/18, /19"), "{}", of(20));
        assert!(of(8000).ends_with("/18, /19 and 7980 more"), "{}", of(8000));
    }
}
