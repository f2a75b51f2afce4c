//! The states of a job, the table of permitted transitions between them, and the reasons for a failure.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// State of a job. While it runs, its phase says how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Accepted and recorded; waits for its node.
    #[default]
    Queued,
    /// Claimed by the node's agent.
    Assigned,
    /// The child process is working.
    Running,
    /// The image exists under its tag.
    Succeeded,
    /// Ended without an image; a [`Code`] says why.
    Failed,
    /// Cancelled on request.
    Cancelled,
}

impl State {
    /// All states.
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Assigned,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Returns whether a job in this state may change to `next`. A change back to `Queued` is another attempt: the
    /// lease was lost, the agent returned the job, the failure may be temporary, or an administrator requested it.
    pub fn can_become(self, next: Self) -> bool {
        use State::{Assigned, Cancelled, Failed, Queued, Running, Succeeded};
        matches!(
            (self, next),
            (Queued, Assigned | Failed | Cancelled)
                | (Assigned, Running | Queued | Failed | Cancelled)
                | (Running, Queued | Succeeded | Failed | Cancelled)
                | (Failed, Queued)
        )
    }

    /// Returns whether the state only changes on request.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Returns the name used in JSON and in the record.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Assigned => "assigned",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Returns the state with that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// Why a job failed, for programs. It is accompanied by a sentence for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The container has ended or was restarted.
    ContainerGone,
    /// The base image could not be verified.
    BaseUnproven,
    /// The project's quota does not allow the image.
    QuotaExceeded,
    /// The registry is in read-only mode.
    RegistryReadOnly,
    /// A rule of the registry forbids moving the tag.
    TagImmutable,
    /// The tag names an image that the save was not to replace.
    TagExists,
    /// The tag names an image that its owner has pinned.
    ImagePinned,
    /// The project of the base image hands out only signed images, and the base is not signed.
    ImageNotSigned,
    /// The registry does not accept the service's user or password.
    CredentialsRefused,
    /// The registry does not accept the service's robot account: it is disabled, expired or deleted, or its secret is
    /// wrong.
    RobotRefused,
    /// Credentials, ownership or a capability are missing.
    NotPermitted,
    /// Refused by the site's policy: size caps, set-uid files, or a destination that is not allowed.
    Policy,
    /// The registry cannot be reached or does not work.
    RegistryUnavailable,
    /// The node's agent has sent nothing for too long.
    NodeLost,
    /// The save exceeded its time limit.
    TimedOut,
    /// A defect, or an unexpected condition.
    Internal,
}

impl Code {
    /// All codes.
    pub const ALL: [Self; 16] = [
        Self::ContainerGone,
        Self::BaseUnproven,
        Self::QuotaExceeded,
        Self::RegistryReadOnly,
        Self::TagImmutable,
        Self::TagExists,
        Self::ImagePinned,
        Self::ImageNotSigned,
        Self::CredentialsRefused,
        Self::RobotRefused,
        Self::NotPermitted,
        Self::Policy,
        Self::RegistryUnavailable,
        Self::NodeLost,
        Self::TimedOut,
        Self::Internal,
    ];

    /// Returns the name used in JSON and in the record.
    pub fn name(self) -> &'static str {
        match self {
            Self::ContainerGone => "container_gone",
            Self::BaseUnproven => "base_unproven",
            Self::QuotaExceeded => "quota_exceeded",
            Self::RegistryReadOnly => "registry_read_only",
            Self::TagImmutable => "tag_immutable",
            Self::TagExists => "tag_exists",
            Self::ImagePinned => "image_pinned",
            Self::ImageNotSigned => "image_not_signed",
            Self::CredentialsRefused => "credentials_refused",
            Self::RobotRefused => "robot_refused",
            Self::NotPermitted => "not_permitted",
            Self::Policy => "policy",
            Self::RegistryUnavailable => "registry_unavailable",
            Self::NodeLost => "node_lost",
            Self::TimedOut => "timed_out",
            Self::Internal => "internal",
        }
    }

    /// Returns whether a failure with this code is a lack of permission: credentials, quota or policy (exit code 77).
    pub fn not_permitted(self) -> bool {
        matches!(
            self,
            Self::QuotaExceeded
                | Self::RegistryReadOnly
                | Self::TagImmutable
                | Self::TagExists
                | Self::ImagePinned
                | Self::ImageNotSigned
                | Self::CredentialsRefused
                | Self::RobotRefused
                | Self::NotPermitted
                | Self::Policy
        )
    }

    /// Returns the code with that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::{Code, State};

    #[test]
    fn names_are_those_of_json() -> Result<(), serde_json::Error> {
        for state in State::ALL {
            assert_eq!(serde_json::to_value(state)?, state.name());
            assert_eq!(State::from_name(state.name()), Some(state));
        }
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code)?, code.name());
            assert_eq!(Code::from_name(code.name()), Some(code));
        }
        Ok(())
    }

    #[test]
    fn what_is_done_stays_done_and_only_a_failure_is_tried_again() {
        for next in State::ALL {
            assert!(!State::Succeeded.can_become(next));
            assert!(!State::Cancelled.can_become(next));
            assert_eq!(State::Failed.can_become(next), next == State::Queued);
        }
        assert!(!State::Queued.can_become(State::Running));
        assert!(!State::Queued.can_become(State::Succeeded));
        assert!(!State::Assigned.can_become(State::Succeeded));
    }
}
