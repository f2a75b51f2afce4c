//! The errors of a save, classified as the exit codes require.

use crate::common::digest::DiffId;
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
    #[error("nothing on disk says which image {container} stands on: name it with --base IMAGE")]
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
    /// The blob of a base layer was found nowhere, and its directory is not mounted either.
    #[error(
        "the base layer {diff_id} is in no store and no known registry, and no directory holds it unpacked"
    )]
    BaseLayerNotFound {
        /// Diff ID of the layer.
        diff_id: DiffId,
    },
    /// The container would have to be frozen for longer than permitted.
    #[error(
        "reading the container takes longer than it may stand still (--max-pause, {limit_ms:.0} ms); \
         nothing was saved: raise the bound, or save with --pause none"
    )]
    PausedTooLong {
        /// The limit in milliseconds.
        limit_ms: f64,
    },
    /// The kernel did not return data about the container's processes in time, because one of the processes blocks it.
    #[error(
        "{what} cannot be read within {seconds} s: a process of the container waits in the kernel, most likely for a file \
         system that does not answer; nothing was saved"
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
}

/// The kinds of errors that the exit codes distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Exit code 1.
    Final,
    /// Exit code 2.
    Usage,
    /// Exit code 66.
    ContainerGone,
    /// Exit code 69.
    BaseUnproven,
    /// Exit code 75.
    Retryable,
    /// Exit code 77.
    NotPermitted,
    /// Exit code 130.
    Cancelled,
}

impl Kind {
    /// Returns the kind for a module's own exit code.
    fn of_exit(code: u8) -> Self {
        match code {
            2 => Self::Usage,
            66 => Self::ContainerGone,
            69 => Self::BaseUnproven,
            75 => Self::Retryable,
            77 => Self::NotPermitted,
            130 => Self::Cancelled,
            _ => Self::Final,
        }
    }
}

impl Error {
    /// Returns the kind of the error.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Container(error) => Kind::of_exit(error.exit_code()),
            Self::Target(_) | Self::Pattern(_) => Kind::Usage,
            Self::Destination(error) => destination_kind(error),
            Self::Freeze(error) => Kind::of_exit(error.exit_code()),
            Self::Scan(scan::Error::Cancelled)
            | Self::Layer(layer::Error::Cancelled)
            | Self::Cancelled => Kind::Cancelled,
            Self::Scan(scan::Error::MarksUnreadable | scan::Error::Cap { .. }) => {
                Kind::NotPermitted
            }
            Self::Manifest(error) if error.is_usage() => Kind::Usage,
            Self::Manifest(error) if error.is_base() => Kind::BaseUnproven,
            Self::Prove(_)
            | Self::BaseNotNamed { .. }
            | Self::BaseUnusable { .. }
            | Self::BaseLayerNotFound { .. } => Kind::BaseUnproven,
            Self::Scan(_)
            | Self::Layer(_)
            | Self::Manifest(_)
            | Self::Report { .. }
            | Self::PausedTooLong { .. }
            | Self::Unanswered { .. }
            | Self::Worker => Kind::Final,
        }
    }

    /// Returns whether the destination failed, not the source, and the save may succeed when it is repeated.
    pub(super) fn is_transient_at_destination(&self) -> bool {
        matches!(self, Self::Destination(_)) && self.kind() == Kind::Retryable
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
            Kind::Final => "internal",
            Kind::Usage => "usage",
            Kind::ContainerGone => "container_gone",
            Kind::BaseUnproven => "base_unproven",
            Kind::Retryable => "registry_unavailable",
            Kind::NotPermitted => "not_permitted",
            Kind::Cancelled => "cancelled",
        }
    }
}

fn destination_kind(error: &destination::Error) -> Kind {
    if error.not_permitted() {
        Kind::NotPermitted
    } else if error.retryable() {
        Kind::Retryable
    } else {
        Kind::Final
    }
}
