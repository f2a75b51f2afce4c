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
    /// An e-mail.
    Email,
}

impl ReceiverKind {
    const ALL: [Self; 2] = [Self::Webhook, Self::Email];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Email => "email",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Language of an e-mail; the page has the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    /// English.
    #[default]
    En,
    /// Korean.
    Ko,
}

impl Language {
    /// Returns the code of the language, as in HTML.
    pub fn code(self) -> &'static str {
        match self {
            Self::En => "en",
            Self::Ko => "ko",
        }
    }

    /// Returns the language with that code.
    pub fn from_code(code: &str) -> Option<Self> {
        [Self::En, Self::Ko]
            .into_iter()
            .find(|language| language.code().eq_ignore_ascii_case(code))
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
    /// Language of what it is sent, if people read it.
    #[serde(default)]
    pub language: Language,
    /// Seconds from the request to the end below which it is not told about the end.
    #[serde(default)]
    pub over_s: u32,
}

impl Receiver {
    /// Returns a receiver of webhooks.
    pub fn webhook(address: impl Into<String>, events: &[SaveEvent]) -> Self {
        Self {
            kind: ReceiverKind::Webhook,
            address: address.into(),
            events: events.to_vec(),
            language: Language::default(),
            over_s: 0,
        }
    }

    /// Returns a receiver of an e-mail at the end of a save that takes at least `over_s` seconds.
    pub fn email(address: impl Into<String>, language: Language, over_s: u32) -> Self {
        Self {
            kind: ReceiverKind::Email,
            address: address.into(),
            events: SaveEvent::ENDS.into(),
            language,
            over_s,
        }
    }

    /// Returns whether it is told about `event` of a save that ended `took_ms` milliseconds after it was requested;
    /// `None` if it has not ended.
    pub(super) fn wants(&self, event: SaveEvent, took_ms: Option<i64>) -> bool {
        let took = took_ms.unwrap_or(i64::MAX);
        let brief = SaveEvent::ENDS.contains(&event) && took / 1000 < i64::from(self.over_s);
        self.events.contains(&event) && !brief
    }
}
