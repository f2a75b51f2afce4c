//! Autosaves: what users set about them, and what applies to a session.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::service::job::SaveEnded;

/// Body of `PUT /api/v1/autosave` and `PUT /api/v1/sessions/{id}/autosave`: either `every_minutes`, or `off`; for all
/// sessions `save_on_end` beside or without them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AutosaveSetting {
    /// Minutes from the end of a save to the next one, if something changed. What is less than the service permits is raised
    /// to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 10080)]
    pub every_minutes: Option<u32>,
    /// Number of the latest autosaves of a session that are kept; if absent, as the administrator says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub keep: Option<u32>,
    /// There are none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub off: bool,
    /// For all sessions, not for one: which of them are saved when they end, from now on. The annotation or label
    /// `upperdeck.io/save-on-end` of a pod goes before it, and it before what the administrator set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_on_end: Option<SaveEnded>,
}

/// When autosaves are made, and how many are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AutosavePolicy {
    /// Minutes from the end of a save to the next one, if something changed.
    pub every_minutes: u32,
    /// Number of the latest autosaves of a session that are kept. Of earlier ones, the last of each hour is kept for a day
    /// and the last of each day for 30 days.
    pub keep: u32,
}

/// `GET /api/v1/autosave`: what applies to the caller's sessions of which nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AutosaveSettings {
    /// What the administrator set; absent if there are none by default.
    pub default: Option<AutosavePolicy>,
    /// What the caller set for all own sessions.
    pub own: Option<AutosaveSetting>,
    /// Minimum of the minutes.
    pub min_minutes: u32,
}

/// Who decided about the autosaves of a session, or about its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutosaveFrom {
    /// Its user, for this session; never about its end.
    Session,
    /// Its pod.
    Pod,
    /// Its user, for all sessions.
    User,
    /// The administrator.
    Administrator,
}

/// The autosaves of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionAutosave {
    /// When they are made, and how many are kept.
    #[serde(flatten)]
    pub policy: AutosavePolicy,
    /// Who decided so.
    pub from: AutosaveFrom,
    /// When the last one ended.
    #[schema(format = DateTime)]
    pub last: Option<String>,
    /// Why the next one is not made though it is due; absent otherwise.
    pub waits_for: Option<String>,
}

/// Whether a session is saved when it ends, without being asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionAtEnd {
    /// After which ends.
    pub when: SaveEnded,
    /// Who decided so.
    pub from: AutosaveFrom,
}

/// Response of `PUT` and `DELETE /api/v1/sessions/{id}/autosave`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AutosaveInForce {
    /// As in the session; absent if there are none.
    pub autosave: Option<SessionAutosave>,
    /// As `autosave_from` in the session: who decided, also if there are none.
    #[serde(default)]
    pub from: Option<AutosaveFrom>,
}
