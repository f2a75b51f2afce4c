//! The exit codes, which are a stable interface for scripts.

use std::process::ExitCode;

use crate::common::failure::FailureKind;

/// Exit code of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Success. For `commit`, the image is at the destination under its tag.
    Saved = 0,
    /// Permanent failure: a retry will not help unless something changes.
    Failed = 1,
    /// The command line is invalid.
    Usage = 2,
    /// The container does not exist, ended during the save, or was removed; or an image does not have the path.
    NoContainer = 66,
    /// The base image could not be proven or is not available.
    Base = 69,
    /// Transient failure that is worth a retry: registry unreachable, 5xx, 429.
    Retry = 75,
    /// Not permitted: credentials, quota, policy or a missing capability.
    NotPermitted = 77,
    /// Cancelled by SIGINT or SIGTERM. The container is running.
    Cancelled = 130,
}

impl Exit {
    /// All exit codes with their meaning, for the help and the man page.
    pub(crate) const TABLE: [(Self, &'static str); 8] = [
        (Self::Saved, "saved (or done)"),
        (Self::Failed, "failed for good"),
        (Self::Usage, "usage: the command line is wrong"),
        (
            Self::NoContainer,
            "no such container, it ended during the save, or it was removed while it was read; no such path in the image",
        ),
        (Self::Base, "base image or root unproven, or unavailable"),
        (
            Self::Retry,
            "failed, worth retrying (registry unreachable, 5xx, 429)",
        ),
        (
            Self::NotPermitted,
            "not permitted (credentials, quota, policy, missing capability)",
        ),
        (Self::Cancelled, "cancelled"),
    ];

    /// Returns the number.
    pub(crate) fn code(self) -> u8 {
        self as u8
    }
}

impl From<FailureKind> for Exit {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::Final => Self::Failed,
            FailureKind::Usage => Self::Usage,
            FailureKind::ContainerGone => Self::NoContainer,
            FailureKind::BaseUnproven => Self::Base,
            FailureKind::Retryable => Self::Retry,
            FailureKind::NotPermitted => Self::NotPermitted,
            FailureKind::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An invalid command line that clap cannot detect by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);
