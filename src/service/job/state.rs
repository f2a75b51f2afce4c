//! The states of a job and the one table of which may follow which.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a job is. Its phase while it runs is [`super::Phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Accepted and written down; waits for its node.
    Queued,
    /// The node's agent has taken it.
    Assigned,
    /// The child process works.
    Running,
    /// The image is there under its tag.
    Succeeded,
    /// It ended without an image, for a reason with a [`Code`].
    Failed,
    /// Somebody did not want it any more.
    Cancelled,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Assigned,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// Whether a job in this state may go to `next`. Back to `Queued`: another attempt, because the lease was lost, the
    /// agent gave it back, what failed may pass, or an administrator asked for it.
    pub fn may_become(self, next: Self) -> bool {
        use State::{Assigned, Cancelled, Failed, Queued, Running, Succeeded};
        matches!(
            (self, next),
            (Queued, Assigned | Failed | Cancelled)
                | (Assigned, Running | Queued | Failed | Cancelled)
                | (Running, Queued | Succeeded | Failed | Cancelled)
                | (Failed, Queued)
        )
    }

    /// Whether nothing more happens by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// As in JSON and in the record.
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

    /// The state of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// Why a job failed, for programs. The sentence for people comes beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The container ended, or is another one now.
    ContainerGone,
    /// What it stands on could not be proven.
    BaseUnproven,
    /// The project has no room.
    QuotaExceeded,
    /// Credentials, ownership or a capability are missing.
    NotPermitted,
    /// Something that the rules of the centre refuse: caps, set-uid files, a destination that is not allowed.
    Policy,
    /// The registry cannot be reached or does not work.
    RegistryUnavailable,
    /// The node's agent has not been heard of for too long.
    NodeLost,
    /// It took longer than a save may.
    TimedOut,
    /// A defect, or something nobody thought of.
    Internal,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::ContainerGone,
        Self::BaseUnproven,
        Self::QuotaExceeded,
        Self::NotPermitted,
        Self::Policy,
        Self::RegistryUnavailable,
        Self::NodeLost,
        Self::TimedOut,
        Self::Internal,
    ];

    /// As in JSON and in the record.
    pub fn name(self) -> &'static str {
        match self {
            Self::ContainerGone => "container_gone",
            Self::BaseUnproven => "base_unproven",
            Self::QuotaExceeded => "quota_exceeded",
            Self::NotPermitted => "not_permitted",
            Self::Policy => "policy",
            Self::RegistryUnavailable => "registry_unavailable",
            Self::NodeLost => "node_lost",
            Self::TimedOut => "timed_out",
            Self::Internal => "internal",
        }
    }

    /// The code of that name.
    pub fn named(name: &str) -> Option<Self> {
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
            assert_eq!(State::named(state.name()), Some(state));
        }
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code)?, code.name());
            assert_eq!(Code::named(code.name()), Some(code));
        }
        Ok(())
    }

    #[test]
    fn what_is_done_stays_done_and_only_a_failure_is_tried_again() {
        for next in State::ALL {
            assert!(!State::Succeeded.may_become(next));
            assert!(!State::Cancelled.may_become(next));
            assert_eq!(State::Failed.may_become(next), next == State::Queued);
        }
        assert!(!State::Queued.may_become(State::Running));
        assert!(!State::Queued.may_become(State::Succeeded));
        assert!(!State::Assigned.may_become(State::Succeeded));
    }
}
