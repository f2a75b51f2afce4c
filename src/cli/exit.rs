//! The exit codes, which scripts rely on.

use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Done; for `commit`: the image is at the destination under its tag.
    Saved = 0,
    /// Failed for good: trying again without changing something will not help.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// There is no such container, or it ended.
    NoContainer = 66,
    /// The base image could not be proven, or is nowhere to be had.
    Base = 69,
    /// Worth retrying: registry unreachable, 5xx, 429.
    Retry = 75,
    /// Not permitted: credentials, quota, policy, a missing capability.
    NotPermitted = 77,
    /// Cancelled by SIGINT or SIGTERM; the container runs.
    Cancelled = 130,
}

impl Exit {
    /// All of them with their meaning, for the help and the man page.
    pub const TABLE: [(Self, &'static str); 8] = [
        (Self::Saved, "saved (or done)"),
        (Self::Failed, "failed for good"),
        (Self::Usage, "usage: the command line is wrong"),
        (Self::NoContainer, "no such container, or it ended"),
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

    /// The number.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// From the number that a module's error names; one that is in no table is a plain failure.
    pub fn from_code(code: u8) -> Self {
        Self::TABLE
            .iter()
            .map(|(exit, _)| *exit)
            .find(|exit| exit.code() == code)
            .unwrap_or(Self::Failed)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// A request that cannot be meant: what clap cannot see by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);
