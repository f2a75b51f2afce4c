//! Why a save ended without an image, told apart as the exit codes of the design want it.

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
    /// The container or its base.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// DESTINATION or `--base` is no name for an image.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The destination, or a registry that was read from.
    #[error(transparent)]
    Destination(#[from] destination::Error),
    /// The freezer.
    #[error(transparent)]
    Freeze(#[from] freeze::Error),
    /// The upper directory.
    #[error(transparent)]
    Scan(#[from] scan::Error),
    /// A pattern of `--exclude`.
    #[error(transparent)]
    Pattern(#[from] scan::PatternError),
    /// Making or delivering the layer.
    #[error(transparent)]
    Layer(#[from] layer::Error),
    /// Manifest or config.
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// The base named with `--base` is not what is mounted.
    #[error(transparent)]
    Prove(#[from] ProveError),
    /// `pid:N` says nothing about its image.
    #[error("nothing on disk says which image {container} stands on: name it with --base IMAGE")]
    BaseNotNamed {
        /// As given.
        container: String,
    },
    /// The named base cannot be used.
    #[error("--base {name}: {reason}")]
    BaseUnusable {
        /// As given.
        name: String,
        /// Why.
        reason: String,
    },
    /// A base layer whose blob is nowhere, and whose directory is not mounted either.
    #[error(
        "the base layer {diff_id} is in no store and no known registry, and no directory holds it unpacked"
    )]
    BaseLayerNowhere {
        /// Which one.
        diff_id: DiffId,
    },
    /// The container would have to stand still for longer than it may.
    #[error(
        "reading the container takes longer than it may stand still (--max-pause, {limit_ms:.0} ms); \
         nothing was saved: raise the bound, or save with --pause none"
    )]
    PausedTooLong {
        /// The bound, in milliseconds.
        limit_ms: f64,
    },
    /// Something about the container's processes cannot be had in time: one of them keeps the kernel waiting.
    #[error(
        "{what} cannot be read within {seconds} s: a process of the container waits in the kernel, most likely for a file \
         system that does not answer; nothing was saved"
    )]
    Unanswered {
        /// What was asked for.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// `--metadata-file` or `--digestfile` cannot be written: the image is saved all the same.
    #[error("the image {reference} is saved, but {path} cannot be written: {source}")]
    Report {
        /// What was saved.
        reference: String,
        /// Which file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A thread of this program panicked.
    #[error("a thread died; this is a defect of upperdeck")]
    Worker,
    /// Somebody asked to stop.
    #[error("cancelled; nothing was saved")]
    Cancelled,
}

/// The kinds that the exit codes tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 1
    Final,
    /// 2
    Usage,
    /// 66
    ContainerGone,
    /// 69
    BaseUnproven,
    /// 75
    Retryable,
    /// 77
    NotPermitted,
    /// 130
    Cancelled,
}

impl Kind {
    /// The kind that a module's own exit code means.
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
    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
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
            | Self::BaseLayerNowhere { .. } => Kind::BaseUnproven,
            Self::Scan(_)
            | Self::Layer(_)
            | Self::Manifest(_)
            | Self::Report { .. }
            | Self::PausedTooLong { .. }
            | Self::Unanswered { .. }
            | Self::Worker => Kind::Final,
        }
    }

    /// Whether it was the destination that failed, not what was read, and it may work when it is tried again.
    pub(super) fn may_pass_at_destination(&self) -> bool {
        matches!(self, Self::Destination(_)) && self.kind() == Kind::Retryable
    }

    /// A stable name in snake case, for `--progress json` and the service.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Destination(error) if error.is_quota() => return "quota_exceeded",
            Self::Scan(scan::Error::Cap { .. }) => return "policy",
            _ => {}
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
