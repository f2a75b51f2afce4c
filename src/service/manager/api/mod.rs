//! The JSON types of the REST API. Times are RFC 3339 in UTC, sizes are in bytes, and IDs are UUIDs of version 7. The
//! portal, the `job` commands and the OpenAPI document use these types and no others.

mod autosave;
mod images;
mod notify;
mod signin;
mod timeline;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::autosave::*;
pub use self::images::*;
pub use self::notify::*;
pub use self::signin::*;
pub use self::timeline::*;
pub use super::problem::{ExistingImage, Problem};
use crate::common::digest::Digest;
use crate::service::job::{
    Category, Code, JobId, Kind, Load, NextSave, Phase, SaveOptions, Saved, State, Unsaved,
};
use crate::service::record::MadeBy;

/// `GET /api/v1/sessions`: the sessions that the caller may save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sessions {
    /// Those that run, sorted by start time, then those that have ended, sorted by the time of their end; each the latest
    /// first.
    pub sessions: Vec<SessionView>,
    /// Value of `cursor` for the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionView {
    /// Full ID of the container; the value of `session` in `POST /api/v1/saves`.
    pub id: String,
    /// Node on which it runs, or has run.
    pub node: String,
    /// Owner by the site's ownership rule. If absent, it has no owner and only administrators see it.
    pub owner: Option<String>,
    /// Namespace of the pod.
    pub namespace: Option<String>,
    /// Name of the pod.
    pub pod: Option<String>,
    /// Name of the container.
    pub container: Option<String>,
    /// Runtime: `containerd`, `crio`, `podman`, `docker`, `process`.
    pub runtime: String,
    /// Kind of application.
    pub kind: Kind,
    /// Accelerator category.
    pub category: Category,
    /// Image that it was started from.
    pub image: Option<String>,
    /// Start time; the epoch if it is not known, which occurs only after a session has ended.
    #[schema(format = DateTime)]
    pub started: String,
    /// How it ended; absent while it runs. A session that has ended can be saved as long as its node keeps its files.
    #[serde(default)]
    pub ended: Option<SessionEndView>,
    /// Allocated size of its changes in bytes.
    pub upper_bytes: Option<u64>,
    /// Number of entries in its changes.
    pub upper_entries: Option<u64>,
    /// Forecast of the next save.
    pub next: Option<NextSave>,
    /// Mounts that will not be saved.
    pub unsaved: Vec<Unsaved>,
    /// Number of mounts that are left out of `unsaved` because there are too many. A lower bound.
    pub unsaved_more: u64,
    /// Why the data are incomplete, or why the session cannot be saved.
    pub problem: Option<String>,
    /// Name of the image if a request specifies none.
    pub suggested_name: String,
    /// Tag of the image if a request specifies none.
    pub suggested_tag: String,
    /// The open save of this session, unless that is an autosave, which makes way for a save that is asked for.
    pub save: Option<JobId>,
    /// Its autosaves; absent if there are none.
    #[serde(default)]
    pub autosave: Option<SessionAutosave>,
    /// Who decided about its autosaves, also if there are none; absent if there cannot be any: it has no owner, has ended,
    /// or is not the container that its pod's name means.
    #[serde(default)]
    pub autosave_from: Option<AutosaveFrom>,
    /// Whether it is saved when it ends; absent in the same cases, and if its agent is of an earlier version.
    #[serde(default)]
    pub save_on_end: Option<SessionAtEnd>,
}

/// How a session ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionEndView {
    /// When it ended, if that is known.
    #[schema(format = DateTime)]
    pub at: Option<String>,
    /// Exit code of its first process, 128 and the number of a signal if one ended it; absent if its runtime has not
    /// recorded it.
    pub exit_code: Option<i64>,
    /// Whether it ended because its memory was used up, according to its runtime.
    pub out_of_memory: bool,
    /// Whether it is saved without being asked for.
    pub save: bool,
}

/// Selects a session by its ID, its name or its pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "session: its ID as a text, or an object with namespace, pod and container"
)]
pub enum Which {
    /// The full ID, a unique prefix of at least 12 characters, or the name of a container that is in no pod.
    Id(String),
    /// Namespace, pod and, if the pod has several, container.
    Pod {
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        pod: String,
        /// Name of the container.
        container: Option<String>,
    },
}

/// Name and tag of the image. The server adds registry, project and user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImageName {
    /// One component of a repository name: lower-case letters and digits, separated by `.`, `_` or `-`, at most 128
    /// characters. If absent, the session's suggestion is used.
    pub name: Option<String>,
    /// A tag: letters, digits, `_`, `.`, `-`, at most 128 characters. If absent, the session's suggestion is used.
    pub tag: Option<String>,
}

/// Whether a save may replace the image that has its tag already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Replace {
    /// No.
    #[default]
    Never,
    /// If an earlier save of the same session made it.
    Own,
    /// Any image.
    Any,
    /// Only the image with this digest.
    Image(Digest),
}

impl FromStr for Replace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "never" => Ok(Self::Never),
            "own" => Ok(Self::Own),
            "any" => Ok(Self::Any),
            digest => digest
                .parse()
                .map(Self::Image)
                .map_err(|_| "replace is never, own, any or the digest of an image".to_owned()),
        }
    }
}

impl TryFrom<String> for Replace {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Replace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Own => f.write_str("own"),
            Self::Any => f.write_str("any"),
            Self::Image(digest) => digest.fmt(f),
        }
    }
}

impl From<Replace> for String {
    fn from(replace: Replace) -> Self {
        replace.to_string()
    }
}

/// `POST /api/v1/saves`: SAVE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// Session to save.
    pub session: Which,
    /// Name and tag of the image.
    #[serde(default)]
    pub image: ImageName,
    /// Description by the user; at most 1,000 characters.
    #[serde(default)]
    pub message: Option<String>,
    /// Options of the save.
    #[serde(default)]
    pub options: SaveOptions,
    /// Whether an image that has the tag already may be replaced: `never` (the default), `own` (if an earlier save of the
    /// same session made it), `any`, or the digest of the only image that may be. Otherwise the response is 409
    /// `tag_exists`, with that image.
    #[serde(default)]
    #[schema(value_type = String, pattern = "^(never|own|any|sha256:[0-9a-f]{64})$", default = "never")]
    pub replace: Replace,
    /// Who else is told about this save, if the service permits it: see `GET /api/v1/notify` and `GET /api/v1/me`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify: Option<Notify>,
}

/// One of the server-sent events of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct StreamedEvent {
    /// What it is about: `save`, `progress`, or `open`.
    pub(crate) event: String,
    /// JSON: for `save` and `progress` a save.
    pub(crate) data: String,
    /// In the stream of one save, its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
}

/// A save: CHK.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Save {
    /// The job.
    pub id: JobId,
    /// ID of the session.
    pub session: String,
    /// Namespace, pod and container of the session, joined by `/`, or its name.
    pub session_name: String,
    /// Node of the session.
    pub node: String,
    /// Owner of the image.
    pub user: String,
    /// Name of the image, without registry, project and user.
    pub name: String,
    /// Tag of the image.
    pub tag: String,
    /// Complete reference, as used to pull the image.
    pub target: String,
    /// Description by the user.
    pub message: Option<String>,
    /// Who or what asked for it.
    #[serde(default)]
    pub made_by: MadeBy,
    /// State of the job.
    pub state: State,
    /// Current phase while it runs.
    pub phase: Option<Phase>,
    /// When the current state, or the current phase, began.
    #[serde(default)]
    #[schema(format = DateTime)]
    pub since: Option<String>,
    /// Number of saves ahead of it while it is queued.
    pub place: Option<u64>,
    /// What holds it back, if anything does.
    #[serde(default)]
    pub waiting: Option<Waiting>,
    /// Number of the attempt, starting at 1.
    pub attempt: u32,
    /// Progress.
    pub progress: Option<Progress>,
    /// How long the container was frozen, in milliseconds, once known.
    pub pause_ms: Option<f64>,
    /// Warnings that did not stop the save.
    pub warnings: Vec<Warning>,
    /// Description of the saved image, if the save succeeded.
    pub result: Option<Saved>,
    /// Reason, if the save failed.
    pub error: Option<SaveError>,
    /// What became of the image, if the save succeeded; absent in events.
    #[serde(default)]
    pub image: Option<ImageFate>,
    /// Whether cancellation was requested.
    pub cancelling: bool,
    /// Whether it was asked to run at normal priority.
    #[serde(default)]
    pub hurried: bool,
    /// Whether it can be: its node's agent allows it, and runs it in the background.
    #[serde(default)]
    pub can_hurry: bool,
    /// Time of the request.
    #[schema(format = DateTime)]
    pub created: String,
    /// When an agent started this attempt.
    #[schema(format = DateTime)]
    pub started: Option<String>,
    /// When it ended.
    #[schema(format = DateTime)]
    pub finished: Option<String>,
    /// Increases with every change of the above except `place` and `progress`; the ID of the last event.
    pub version: u64,
}

/// What holds a save back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitingReason {
    /// Other saves are ahead of it.
    Queue,
    /// The node's sessions use its cores: it runs no more saves at once, or this one takes only what they leave.
    Cores,
    /// The node runs as many saves as it may at once.
    Slot,
    /// The last attempt failed; the next one begins at `until`.
    Retry,
    /// Programs are writing to files of the session that are to be saved.
    Writers,
    /// A registry did not answer as it should; the request is sent again at `until`.
    Registry,
    /// Another save of the session, by hand, is under way.
    OtherSave,
    /// The node is not heard of.
    Node,
    /// The node takes no more saves, because its agent ends.
    Draining,
    /// Managers cannot reach the queue. The save is in the record and is queued when the queue is back.
    QueueDown,
}

/// Why a save waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    /// The reason.
    pub reason: WaitingReason,
    /// The node that is waited for.
    pub node: String,
    /// When it will be over, if that is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(format = DateTime)]
    pub until: Option<String>,
}

/// `GET /api/v1/saves/{id}/audit`, for administrators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Audit {
    /// In chronological order.
    pub(crate) transitions: Vec<AuditLine>,
    /// Value of `cursor` for the next page; absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) next: Option<String>,
}

/// A transition of a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct AuditLine {
    /// Version of the save after the transition.
    pub(crate) version: u64,
    /// Time of the transition.
    #[schema(format = DateTime)]
    pub(crate) at: String,
    /// State before the transition; absent for the submission.
    pub(crate) from: Option<State>,
    /// State after the transition. Equal to `from` if only a request was recorded.
    pub(crate) to: State,
    /// Number of the order.
    pub(crate) attempt: u32,
    /// Highest fencing token known at that time.
    pub(crate) fence: u64,
    /// `token:NAME`, `jwt:USER`, `proxy:USER`, `node:NAME` or `manager:NAME`.
    pub(crate) actor: String,
    /// Reason; may be empty.
    pub(crate) detail: String,
}

/// `/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Version {
    /// Version of the program.
    pub(crate) version: String,
    /// The commit that it was built from; absent if the build did not say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) commit: Option<String>,
    /// Version of the API, as in its paths.
    pub(crate) api: String,
}

/// Progress of a save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Bytes read and compressed so far, and bytes of base layers sent or mounted.
    pub bytes_done: u64,
    /// Total bytes to read and compress, and of base layers to send or mount.
    pub bytes_total: u64,
    /// The part of `bytes_done` that are base layers, or layers of earlier saves, which the destination lacked.
    #[serde(default)]
    pub base_done: u64,
    /// The part of `bytes_total` that are such layers.
    #[serde(default)]
    pub base_total: u64,
    /// Compressed bytes sent so far.
    pub bytes_sent: u64,
    /// Number of entries in the layer.
    pub entries_total: u64,
    /// Bytes of `bytes_done` per second, averaged over the last seconds.
    pub rate: Option<f64>,
    /// Estimated remaining seconds at that rate.
    pub seconds_left: Option<f64>,
}

/// A warning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Warning {
    /// Stable code in snake case.
    pub code: String,
    /// Description as a sentence.
    pub message: String,
}

/// Why a save failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SaveError {
    /// Stable code.
    pub code: Code,
    /// Description as a sentence.
    pub message: String,
    /// Whether another request may succeed.
    pub retryable: bool,
}

/// `GET /api/v1/saves`: the history, the latest save first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Saves {
    /// The saves of this page.
    pub saves: Vec<Save>,
    /// Value of `cursor` for the next page; absent on the last page.
    pub next: Option<String>,
}

/// `GET /api/v1/nodes`, for administrators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Nodes {
    /// Sorted by name.
    pub nodes: Vec<NodeView>,
    /// Value of `cursor` for the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeView {
    /// Name of the node.
    pub name: String,
    /// Version of its agent.
    pub version: String,
    /// Start time of the agent.
    #[schema(format = DateTime)]
    pub started: String,
    /// Time of the last heartbeat.
    #[schema(format = DateTime)]
    pub heard: String,
    /// Whether the last heartbeat is recent.
    pub alive: bool,
    /// Whether the agent is draining, i.e. takes no more jobs.
    pub draining: bool,
    /// Number of sessions that run.
    pub sessions: u64,
    /// Running jobs.
    pub running: Vec<JobId>,
    /// Number of jobs that are queued for the node.
    pub waiting: u64,
    /// Load of the node.
    pub load: Load,
    /// Problems of the agent with reading the node's containers.
    pub problems: Vec<String>,
    /// Number of containers that have ended and are not listed, because others ended later.
    #[serde(default)]
    pub ended_more: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_replaced_is_said_in_one_word() {
        let digest = Digest::of("x").to_string();
        for text in ["never", "own", "any", digest.as_str()] {
            let read: Result<Replace, _> = text.parse();
            assert_eq!(read.map(String::from), Ok(text.to_owned()));
        }
        for text in ["", "yes", "Own", "sha256:0", "true"] {
            assert!(text.parse::<Replace>().is_err(), "{text}");
        }
    }
}
