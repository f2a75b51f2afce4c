//! Who is told about saves: webhooks and e-mails.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Save;
pub use crate::service::record::{Language, SaveEvent};

/// Who is told about one save; `url`, `email` or both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Notify {
    /// Where signed requests are sent; its origin is one that the service permits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = "uri", max_length = 2000)]
    pub url: Option<String>,
    /// The events that the URL is told about; if absent, those that end a save.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 5)]
    pub events: Option<Vec<SaveEvent>>,
    /// Whether the caller gets an e-mail when the save ends, at the address that the service knows (`email` in
    /// `GET /api/v1/me`). If absent, what the user has set for all saves applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<bool>,
    /// Language of the e-mail; if absent, that of `Accept-Language`, or English.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<Language>,
}

/// `GET /api/v1/notify`: what a user needs for receiving webhooks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct NotifySettings {
    /// Origins that `notify.url` of a save may have.
    pub(crate) origins: Vec<String>,
    /// The user's own secret, with which signatures are verified according to Standard Webhooks.
    pub(crate) secret: String,
    /// All events.
    pub(crate) events: Vec<SaveEvent>,
}

/// E-mails to the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Email {
    /// Address of the caller, as the administrator, the identity provider or the proxy states it.
    pub address: String,
    /// For all saves: seconds that a save has to take for an e-mail when it ends, from its request; 0: each. If absent,
    /// none is sent unless a save's request says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_seconds: Option<u32>,
}

/// `PUT /api/v1/notify/email`: which of all saves the caller gets an e-mail about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmailSetting {
    /// Seconds that a save has to take, from its request; 0: each. `null` or absent: none.
    #[serde(default)]
    #[schema(maximum = 604_800)]
    pub over_seconds: Option<u32>,
    /// Language of the e-mails; if absent, that of `Accept-Language`, or English.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<Language>,
}

/// The body of a webhook.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SaveNotice {
    /// What happened.
    #[serde(rename = "type")]
    pub event: SaveEvent,
    /// When it happened.
    #[schema(format = DateTime)]
    pub timestamp: String,
    /// The save after that, without its place in the queue.
    pub data: Save,
}
