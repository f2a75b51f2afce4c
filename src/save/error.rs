//! The errors of a save, classified as the exit codes require.

use crate::common::digest::DiffId;
use crate::common::failure::FailureKind;
use crate::image::manifest;
use crate::image::prove::ProveError;
use crate::layer;
use crate::layer::scan;
use crate::node::container;
use crate::node::freeze;
use crate::store::destination::{self, TargetError};

/// Every way a save can fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container or its base could not be read.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// DESTINATION or `--base` is not a valid image name.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The destination failed, or a registry that was read from.
    #[error(transparent)]
    Destination(#[from] destination::Error),
    /// The freezer failed.
    #[error(transparent)]
    Freeze(#[from] freeze::Error),
    /// The upper directory could not be scanned.
    #[error(transparent)]
    Scan(#[from] scan::Error),
    /// A pattern of `--exclude` is invalid.
    #[error(transparent)]
    Pattern(#[from] scan::PatternError),
    /// A layer could not be made or delivered.
    #[error(transparent)]
    Layer(#[from] layer::Error),
    /// The manifest or config could not be made.
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// The base named with `--base` is not the one that is mounted.
    #[error(transparent)]
    Prove(#[from] ProveError),
    /// The container was given as `pid:N`, for which no image is recorded.
    #[error("there is no record of the base image of {container}: name it with --base IMAGE")]
    BaseNotNamed {
        /// The container as given.
        container: String,
    },
    /// The named base cannot be used.
    #[error("--base {name}: {reason}")]
    BaseUnusable {
        /// The name as given.
        name: String,
        /// The reason.
        reason: String,
    },
    /// An image cannot be read.
    #[error("cannot read the image {name}: {reason}")]
    ImageUnreadable {
        /// Its reference or digest.
        name: String,
        /// The reason.
        reason: String,
    },
    /// The blob of a base layer was found nowhere, and its directory is not mounted either.
    #[error(
        "the base layer {diff_id} is neither in a local store or known registry nor unpacked on disk"
    )]
    BaseLayerNotFound {
        /// Diff ID of the layer.
        diff_id: DiffId,
    },
    /// The container would have to be frozen for longer than permitted.
    #[error(
        "reading the container takes longer than it may be frozen (--max-pause, {limit_ms:.0} ms); \
         nothing was saved: raise the bound, or save with --pause none"
    )]
    PausedTooLong {
        /// The limit in milliseconds.
        limit_ms: f64,
    },
    /// Files of a container that has ended were modified.
    #[error(
        "files of container {container}, which has ended, were changed while they were read, e.g. {path}; nothing was saved"
    )]
    ChangedWhileRead {
        /// ID of the container.
        container: String,
        /// Path in the container, escaped.
        path: String,
    },
    /// Several containers could not be saved at one instant. Another save of the group has the cause.
    #[error("not saved together with the other containers: {why}; nothing of it was saved")]
    NotTogether {
        /// The reason.
        why: &'static str,
    },
    /// The kernel did not return data about the container's processes in time, because one of the processes blocks it.
    #[error(
        "{what} cannot be read within {seconds} s: a process of the container is blocked in the kernel, probably by a file system that does not respond; nothing was saved"
    )]
    Unanswered {
        /// The data that was requested.
        what: &'static str,
        /// The time waited, in seconds.
        seconds: u64,
    },
    /// `--metadata-file` or `--digestfile` cannot be written. The image is saved all the same.
    #[error("the image {reference} is saved, but {path} cannot be written: {source}")]
    Report {
        /// Reference of the image that was saved.
        reference: String,
        /// Path of the file.
        path: String,
        /// The error of the system.
        source: std::io::Error,
    },
    /// A thread of this program panicked.
    #[error("a thread died; this is a defect of upperdeck")]
    Worker,
    /// The save was cancelled.
    #[error("cancelled; nothing was saved")]
    Cancelled,
    /// The save was cancelled while its tag was written, and the destination has not answered.
    #[error(
        "cancelled while the tag was written, and whether it was is not known: look at what the tag names now"
    )]
    CancelledAtTag,
}

impl Error {
    /// Returns the kind of the error.
    pub(crate) fn kind(&self) -> FailureKind {
        match self {
            Self::Container(error) => error.kind(),
            Self::Target(_) | Self::Pattern(_) => FailureKind::Usage,
            Self::Destination(error) => destination_kind(error),
            Self::Freeze(error) => error.kind(),
            Self::Scan(scan::Error::Cancelled)
            | Self::Layer(layer::Error::Cancelled)
            | Self::Cancelled
            | Self::CancelledAtTag => FailureKind::Cancelled,
            Self::Scan(scan::Error::MarksUnreadable | scan::Error::Cap { .. }) => {
                FailureKind::NotPermitted
            }
            Self::Manifest(error) if error.is_usage() => FailureKind::Usage,
            Self::Manifest(error) if error.is_base() => FailureKind::BaseUnproven,
            Self::Prove(_)
            | Self::BaseNotNamed { .. }
            | Self::BaseUnusable { .. }
            | Self::BaseLayerNotFound { .. } => FailureKind::BaseUnproven,
            Self::ChangedWhileRead { .. } => FailureKind::Retryable,
            Self::Scan(_)
            | Self::Layer(_)
            | Self::Manifest(_)
            | Self::Report { .. }
            | Self::PausedTooLong { .. }
            | Self::NotTogether { .. }
            | Self::Unanswered { .. }
            | Self::ImageUnreadable { .. }
            | Self::Worker => FailureKind::Final,
        }
    }

    /// Returns whether the destination failed, not the source, and the save may succeed when it is repeated.
    pub(super) fn is_transient_at_destination(&self) -> bool {
        matches!(self, Self::Destination(_)) && self.kind() == FailureKind::Retryable
    }

    /// Returns whether the container had ended and has a process by now, so that it can be saved as one that runs.
    pub(super) fn was_started_again(&self) -> bool {
        matches!(self, Self::Container(container::Error::StartedAgain { .. }))
    }

    /// Returns a stable name in snake case, for `--progress json` and the service.
    pub(crate) fn code(&self) -> &'static str {
        let own = match self {
            Self::Destination(error) => error.code(),
            Self::Scan(scan::Error::Cap { .. }) => Some("policy"),
            _ => None,
        };
        if let Some(code) = own {
            return code;
        }
        match self.kind() {
            FailureKind::Final => "internal",
            FailureKind::Usage => "usage",
            FailureKind::ContainerGone => "container_gone",
            FailureKind::BaseUnproven => "base_unproven",
            FailureKind::Retryable => "registry_unavailable",
            FailureKind::NotPermitted => "not_permitted",
            FailureKind::Cancelled => "cancelled",
        }
    }
}

fn destination_kind(error: &destination::Error) -> FailureKind {
    if error.not_permitted() {
        FailureKind::NotPermitted
    } else if error.retryable() {
        FailureKind::Retryable
    } else {
        FailureKind::Final
    }
}
