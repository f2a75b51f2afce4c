//! Who is told about a save, and of which events.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::service::job::State;

/// An event of a save that receivers are told about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SaveEvent {
    /// It was accepted, or is tried again.
    #[serde(rename = "save.queued")]
    Queued,
    /// An agent has started it.
    #[serde(rename = "save.started")]
    Started,
    /// The image is saved.
    #[serde(rename = "save.succeeded")]
    Succeeded,
    /// It failed for good.
    #[serde(rename = "save.failed")]
    Failed,
    /// It was cancelled.
    #[serde(rename = "save.cancelled")]
    Cancelled,
}

impl SaveEvent {
    /// All events.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Started,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];
    /// The events that end a save.
    pub const ENDS: [Self; 3] = [Self::Succeeded, Self::Failed, Self::Cancelled];

    /// Returns the name in the record and in messages, e.g. `save.queued`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "save.queued",
            Self::Started => "save.started",
            Self::Succeeded => "save.succeeded",
            Self::Failed => "save.failed",
            Self::Cancelled => "save.cancelled",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.name() == name)
    }

    /// Returns the event of a transition, if receivers are told about it.
    pub(super) fn of(from: Option<State>, to: State) -> Option<Self> {
        if from == Some(to) {
            return None;
        }
        match to {
            State::Queued => Some(Self::Queued),
            State::Assigned => None,
            State::Running => Some(Self::Started),
            State::Succeeded => Some(Self::Succeeded),
            State::Failed => Some(Self::Failed),
            State::Cancelled => Some(Self::Cancelled),
        }
    }
}

/// How a receiver is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiverKind {
    /// A signed HTTP request to the URL that is the address.
    Webhook,
}

impl ReceiverKind {
    const ALL: [Self; 1] = [Self::Webhook];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Who is told about a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receiver {
    /// How it is reached.
    pub kind: ReceiverKind,
    /// Where, in the form of its kind.
    pub address: String,
    /// The events that it is told about.
    pub events: Vec<SaveEvent>,
}
