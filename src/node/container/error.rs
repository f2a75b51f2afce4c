//! Errors in finding a container and proving its base, with the information for exit codes.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

use super::bolt;
use crate::common::failure::FailureKind;
use crate::node::overlay::mount::MountError;

/// Maximum number of candidates listed in a message; the rest is counted.
const SHOWN: usize = 10;

/// A part of a runtime's state that could not be read, while other parts could.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// The file or directory.
    pub path: PathBuf,
    /// What was expected and found.
    pub reason: String,
    /// Whether permission was denied, so that more privilege may help.
    pub permission: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

/// An error in finding a container or proving its base.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not a valid name of a container.
    #[error("{wanted:?} cannot name a container: {expected}")]
    BadName {
        /// The name as given.
        wanted: String,
        /// The expected form.
        expected: &'static str,
    },
    /// No container on this node has this name.
    #[error(
        "no container {wanted:?} on this node{}{}{}",
        offered("; there are", candidates),
        rootless(users),
        unread(problems)
    )]
    NotFound {
        /// The name as given.
        wanted: String,
        /// Existing containers, the most similar first.
        candidates: Vec<String>,
        /// Users with containers of rootless Podman, whose storage was not searched.
        users: Vec<u32>,
        /// State that could not be read and may describe the container.
        problems: Vec<Problem>,
    },
    /// Several containers match the name.
    #[error("{wanted:?} can mean several containers{}", offered(":", candidates))]
    Ambiguous {
        /// The name as given.
        wanted: String,
        /// All matches, in an unambiguous form.
        candidates: Vec<String>,
    },
    /// The container has ended, or its PID was reused for another process.
    #[error("container {container} has ended: {detail}")]
    Gone {
        /// ID of the container.
        container: String,
        /// How this was detected.
        detail: String,
    },
    /// A container that had ended was removed by its runtime.
    #[error("container {container} was removed while it was read; nothing was saved")]
    Removed {
        /// ID of the container.
        container: String,
    },
    /// A container that had ended has processes.
    #[error("container {container} does not stay as it ended: {detail}")]
    StartedAgain {
        /// ID of the container.
        container: String,
        /// How this was detected.
        detail: String,
    },
    /// The runtime knows the container, and it has no process.
    #[error("{detail}")]
    Stopped {
        /// The container, how it ended, and where this is written.
        detail: String,
    },
    /// No image on this node has the mounted chain ID.
    #[error(
        "the base image of container {container} cannot be proven; name it with --base; checked:{}",
        lines(compared)
    )]
    BaseUnproven {
        /// ID of the container.
        container: String,
        /// What was compared, one line each.
        compared: Vec<String>,
    },
    /// A path given with `--include-volume` is not a volume.
    #[error(
        "{} is not a volume that can be saved: {why}; {}",
        path.display(),
        volumes(mounts)
    )]
    NotAVolume {
        /// The path as given.
        path: PathBuf,
        /// What it is instead.
        why: String,
        /// Volumes that could be named.
        mounts: Vec<String>,
    },
    /// The volume may not be saved.
    #[error("the volume at {} is not saved: {why}", path.display())]
    VolumeNotAllowed {
        /// Mount point in the container.
        path: PathBuf,
        /// The rule that forbids it.
        why: String,
    },
    /// Permission was denied.
    #[error("{}: permission denied; run as root, with CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE", path.display())]
    NotPermitted {
        /// The path.
        path: PathBuf,
    },
    /// A list of containers is not known to be complete.
    #[error(
        "containers may be missing from this list: permission denied for {}; run as root, with CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE",
        shown(paths.iter().map(|path| path.display().to_string()))
    )]
    Unseen {
        /// State that could not be read.
        paths: Vec<PathBuf>,
    },
    /// The container's root is not an overlay with an upper directory.
    #[error("container {container} cannot be saved: {detail}")]
    NotOverlay {
        /// ID of the container.
        container: String,
        /// What its root is.
        detail: String,
    },
    /// The container's root is not the one that the runtime mounted, and may refer to directories of another owner.
    #[error("container {container}: its root is not the one that its runtime mounted: {detail}")]
    ForeignRoot {
        /// ID of the container.
        container: String,
        /// What was expected and found.
        detail: String,
    },
    /// The mount table exceeds the limit.
    #[error(
        "the mount table of process {pid} is longer than the limits (mounts: {mounts}, bytes: {bytes}); it is needed as a whole, to exclude mounts from the image: unmount what is not needed"
    )]
    TooManyMounts {
        /// PID of the process.
        pid: u32,
        /// Maximum number of mounts.
        mounts: usize,
        /// Maximum size of `mountinfo` in bytes.
        bytes: usize,
    },
    /// A directory of the root is not the one that was mounted, so its content as seen by this program is another one.
    #[error("container {container}: its {role} directory {} is not the one that is mounted: {detail}", path.display())]
    LayerUnproven {
        /// ID of the container.
        container: String,
        /// `lower`, `upper`, `data-only lower`.
        role: &'static str,
        /// The directory.
        path: PathBuf,
        /// What is mounted there, and what is missing.
        detail: String,
    },
    /// The IDs on disk do not match the user namespace.
    #[error("container {container} cannot be saved with the right owners: {detail}")]
    OwnersUnknown {
        /// ID of the container.
        container: String,
        /// The IDs.
        detail: String,
    },
    /// A directory of the root could not be found.
    #[error("container {container}: {source}")]
    Mount {
        /// ID of the container.
        container: String,
        /// The directory and the cause.
        source: MountError,
    },
    /// A file of the runtime has invalid content.
    #[error("{} is damaged: {detail}", path.display())]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// What was expected and found.
        detail: String,
    },
    /// A database changed faster than it could be read.
    #[error("{} keeps changing; try again", path.display())]
    Busy {
        /// Path of the file.
        path: PathBuf,
    },
    /// A file of the runtime cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    /// Returns the kind of the error.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::BadName { .. } | Self::Ambiguous { .. } | Self::NotAVolume { .. } => {
                FailureKind::Usage
            }
            Self::NotFound { .. }
            | Self::Gone { .. }
            | Self::Removed { .. }
            | Self::Stopped { .. } => FailureKind::ContainerGone,
            Self::BaseUnproven { .. } | Self::ForeignRoot { .. } | Self::LayerUnproven { .. } => {
                FailureKind::BaseUnproven
            }
            Self::Busy { .. } | Self::StartedAgain { .. } => FailureKind::Retryable,
            Self::NotPermitted { .. }
            | Self::Unseen { .. }
            | Self::TooManyMounts { .. }
            | Self::VolumeNotAllowed { .. } => FailureKind::NotPermitted,
            Self::NotOverlay { .. }
            | Self::OwnersUnknown { .. }
            | Self::Mount { .. }
            | Self::Damaged { .. }
            | Self::Io { .. } => FailureKind::Final,
        }
    }

    /// Returns a stable code for the event of a failed save.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadName { .. } => "bad_name",
            Self::NotFound { .. } => "container_not_found",
            Self::Ambiguous { .. } => "container_ambiguous",
            Self::Gone { .. } | Self::Removed { .. } => "container_gone",
            Self::StartedAgain { .. } => "container_started",
            Self::Stopped { .. } => "container_stopped",
            Self::BaseUnproven { .. } | Self::LayerUnproven { .. } => "base_unproven",
            Self::NotAVolume { .. } => "not_a_volume",
            Self::NotPermitted { .. } | Self::Unseen { .. } => "not_permitted",
            Self::VolumeNotAllowed { .. } => "volume_not_allowed",
            Self::NotOverlay { .. } => "not_overlay",
            Self::TooManyMounts { .. } => "policy",
            Self::ForeignRoot { .. } => "foreign_root",
            Self::OwnersUnknown { .. } => "owners_unknown",
            Self::Mount { .. } => "overlay_mount",
            Self::Damaged { .. } => "state_damaged",
            Self::Busy { .. } => "state_busy",
            Self::Io { .. } => "state_io",
        }
    }

    /// Returns whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::StartedAgain { .. })
    }

    /// Converts an I/O error for `path`.
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

    /// Returns whether the path does not exist (any more). When a container ends, its files are removed.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Converts the error to an entry of a listing, which continues.
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

/// Maximum number of mounts listed in a message.
const SHOWN_MOUNTS: usize = 20;

fn volumes(mounts: &[String]) -> String {
    if mounts.is_empty() {
        "nothing in the container is".to_owned()
    } else {
        // Bounded, because number and names of the mounts are chosen by the container.
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
    format!(
        "; not everything could be read: {}",
        shown(problems.iter().map(ToString::to_string))
    )
}

fn rootless(users: &[u32]) -> String {
    if users.is_empty() {
        return String::new();
    }
    format!(
        "; the storage of rootless Podman is not searched (user {}): run this as that user (podman \
         unshare upperdeck ...)",
        shown(users.iter().map(u32::to_string))
    )
}

/// Joins the first few texts.
fn shown(texts: impl Iterator<Item = String>) -> String {
    texts.take(SHOWN).collect::<Vec<_>>().join(", ")
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
