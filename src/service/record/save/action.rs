//! What follows from a change of a save: transitions for the audit log, and requests to the queue.

use crate::service::job::State;

/// A transition for the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::service::record) struct Step {
    pub(in crate::service::record) from: Option<State>,
    pub(in crate::service::record) to: State,
    pub(in crate::service::record) attempt: u32,
    pub(in crate::service::record) fence: u64,
    pub(in crate::service::record) detail: String,
}

/// A request to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OutboxAction {
    /// Offer the order.
    Offer,
    /// Withdraw the order.
    Withdraw,
    /// Tell the agent to hurry.
    Hurry,
}

impl OutboxAction {
    /// Returns the name used in the record.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Offer => "offer",
            Self::Withdraw => "withdraw",
            Self::Hurry => "hurry",
        }
    }

    /// Returns the request with that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Offer, Self::Withdraw, Self::Hurry]
            .into_iter()
            .find(|action| action.name() == name)
    }
}
