//! What the REST API takes and gives, as JSON. Times are RFC 3339, UTC; sizes bytes; IDs UUIDs of version 7.
//! The portal, the `job` verbs and the OpenAPI document are made of these and nothing else.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::Via;
use crate::service::job::{
    Category, Code, JobId, Kind, Load, NextSave, Phase, SaveOptions, Saved, State, Unsaved,
};

/// `GET /api/v1/sessions`: the sessions that the caller may save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sessions {
    /// Sorted by when they were started, the latest first.
    pub sessions: Vec<SessionView>,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionView {
    /// Full ID of the container; what `POST /api/v1/saves` takes as `session`.
    pub id: String,
    /// The node it runs on.
    pub node: String,
    /// Who owns it; none: nobody that the centre's rule knows (administrators see it).
    pub owner: Option<String>,
    /// Pod's namespace.
    pub namespace: Option<String>,
    /// Pod's name.
    pub pod: Option<String>,
    /// The container's name.
    pub container: Option<String>,
    /// What it is for.
    pub kind: Kind,
    /// What it computes on.
    pub category: Category,
    /// The image that it was started from.
    pub image: Option<String>,
    /// When it was started.
    pub started: String,
    /// Allocated bytes of what it changed.
    pub upper_bytes: Option<u64>,
    /// Entries of what it changed.
    pub upper_entries: Option<u64>,
    /// What the next save would be.
    pub next: Option<NextSave>,
    /// What is mounted and will not be saved.
    pub unsaved: Vec<Unsaved>,
    /// Mounts that are not listed there, for there are too many; at least so many.
    pub unsaved_more: u64,
    /// What is wrong with it: the reason why not all of it is told, or why it cannot be saved.
    pub problem: Option<String>,
    /// The name that a save gets when none is said.
    pub suggested_name: String,
    /// The tag that a save gets when none is said.
    pub suggested_tag: String,
    /// A save of it that is not done.
    pub save: Option<JobId>,
}

/// Which session to save: its ID, or its pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Which {
    /// The full ID, or a unique beginning of at least 12 characters.
    Id(String),
    /// Namespace, pod and, where the pod has several, container.
    Pod {
        /// Pod's namespace.
        namespace: String,
        /// Pod's name.
        pod: String,
        /// Container's name.
        container: Option<String>,
    },
}

/// What the image shall be called. The server puts registry, project and user in front.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImageName {
    /// One component of a repository's name: lower-case letters, digits, and `.`, `_`, `-` between them, at most 128.
    /// None: the session's suggestion.
    pub name: Option<String>,
    /// A tag: letters, digits, `_`, `.`, `-`, at most 128. None: the session's suggestion.
    pub tag: Option<String>,
}

/// `POST /api/v1/saves`: SAVE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// What to save.
    pub session: Which,
    /// What to call it.
    #[serde(default)]
    pub image: ImageName,
    /// What it is, in the user's words; at most 1,000 characters.
    #[serde(default)]
    pub message: Option<String>,
    /// How.
    #[serde(default)]
    pub options: SaveOptions,
}

/// A save: CHK.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Save {
    /// The job.
    pub id: JobId,
    /// The session's ID.
    pub session: String,
    /// Namespace, pod and container of the session, joined by `/`, or its name.
    pub session_name: String,
    /// The node.
    pub node: String,
    /// Whose it is.
    pub user: String,
    /// The image's name, without registry, project and user.
    pub name: String,
    /// The image's tag.
    pub tag: String,
    /// The whole reference, as one would pull it.
    pub target: String,
    /// The user's words.
    pub message: Option<String>,
    /// Where the job is.
    pub state: State,
    /// What it is doing while it runs.
    pub phase: Option<Phase>,
    /// How many saves are before it, while it is queued.
    pub place: Option<u64>,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// How far it is.
    pub progress: Option<Progress>,
    /// How long the container stood still, in milliseconds, once that is known.
    pub pause_ms: Option<f64>,
    /// What the user should know and that did not stop it.
    pub warnings: Vec<Warning>,
    /// What was saved, when it succeeded.
    pub result: Option<Saved>,
    /// What went wrong, when it failed.
    pub error: Option<SaveError>,
    /// Whether somebody asked for its end.
    pub cancelling: bool,
    /// When it was asked for.
    pub created: String,
    /// When an agent began with this attempt.
    pub started: Option<String>,
    /// When it ended.
    pub finished: Option<String>,
    /// Grows with every change of the above but `place` and `progress`; the ID of the last event.
    pub version: u64,
}

/// `GET /api/v1/saves/{id}/audit`, for administrators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Audit {
    /// The first one first.
    pub transitions: Vec<AuditLine>,
}

/// A transition of a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditLine {
    /// The version of the save that it led to.
    pub version: u64,
    /// When.
    pub at: String,
    /// None: it was asked for.
    pub from: Option<State>,
    /// Equal to `from` where only a wish was written down.
    pub to: State,
    /// The number of the order.
    pub attempt: u32,
    /// The highest fencing token heard of then.
    pub fence: u64,
    /// `token:NAME`, `jwt:USER`, `proxy:USER`, `node:NAME`, `manager:NAME`.
    pub actor: String,
    /// Why; may be empty.
    pub detail: String,
}

/// `DELETE /api/v1/images/{name}/tags/{tag}`: DEL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// Tags that are gone.
    pub tags: Vec<String>,
    /// Digest of the image that had the tag.
    pub digest: String,
    /// Whether the image is gone, too: it was its last tag.
    pub image_deleted: bool,
    /// Tags that the image keeps.
    pub kept: Vec<String>,
    /// What becomes of the space, as a sentence.
    pub space: String,
}

/// `/readyz`, and `/healthz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Whether it serves.
    pub ready: bool,
    /// What is missing: `record`, `queue`, each with a reason.
    pub missing: Vec<String>,
}

/// How far a save is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Bytes read and packed.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// Compressed bytes sent.
    pub bytes_sent: u64,
    /// Entries of the layer.
    pub entries_total: u64,
    /// Bytes packed a second, over the last seconds.
    pub rate: Option<f64>,
    /// Seconds that it will still take at that rate.
    pub seconds_left: Option<f64>,
}

/// A remark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Warning {
    /// Stable, snake case.
    pub code: String,
    /// A sentence.
    pub message: String,
}

/// Why a save failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SaveError {
    /// Stable.
    pub code: Code,
    /// A sentence.
    pub message: String,
    /// Whether asking again may help.
    pub retryable: bool,
}

/// `GET /api/v1/saves`: the history, the latest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Saves {
    /// A page of them.
    pub saves: Vec<Save>,
    /// What to say as `after` for the next page; none: that was all.
    pub next: Option<String>,
}

/// `GET /api/v1/images`: LIST.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Images {
    /// A page of them.
    pub images: Vec<ImageView>,
    /// How many there are in all.
    pub total: u64,
    /// Which page this is, from 1.
    pub page: u32,
    /// Images a page.
    pub page_size: u32,
}

/// An image: one digest with its tags.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// Whose it is.
    pub user: String,
    /// Its name, without registry, project and user.
    pub name: String,
    /// Its tags.
    pub tags: Vec<ImageTag>,
    /// The whole reference without a tag, as one would pull it.
    pub repository: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Compressed bytes.
    pub size: Option<u64>,
    /// What the session computed on; none: not saved by us.
    pub category: Option<Category>,
    /// What the session was for; none: not saved by us.
    pub kind: Option<Kind>,
    /// Name of the base image.
    pub base: Option<String>,
    /// How often it was pulled, where the registry counts.
    pub pulls: Option<u64>,
    /// When it was last pushed or saved.
    pub changed: Option<String>,
    /// The user's words.
    pub message: Option<String>,
    /// The session that it came from.
    pub session_name: Option<String>,
    /// The job that made it.
    pub save: Option<JobId>,
}

/// A tag of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageTag {
    /// The tag.
    pub name: String,
    /// The whole reference, as one would pull it.
    pub reference: String,
    /// Whether the registry forbids to change or delete it.
    pub immutable: bool,
}

/// `GET /api/v1/quota`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// Bytes used; none: the store does not say.
    pub used: Option<u64>,
    /// Bytes at most; none: no bound.
    pub hard: Option<u64>,
    /// What it is the quota of, e.g. a Harbor project.
    pub scope: String,
}

/// `GET /api/v1/nodes`, for administrators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Nodes {
    /// By name.
    pub nodes: Vec<NodeView>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Version of its agent.
    pub version: String,
    /// When the agent was started.
    pub started: String,
    /// The last heartbeat.
    pub heard: String,
    /// Whether that is recent.
    pub alive: bool,
    /// Whether it takes no more jobs.
    pub draining: bool,
    /// Sessions on it.
    pub sessions: u64,
    /// Jobs that it runs.
    pub running: Vec<JobId>,
    /// Jobs that wait for it.
    pub waiting: u64,
    /// How busy it is.
    pub load: Load,
    /// What the agent cannot read.
    pub problems: Vec<String>,
}

/// `GET /api/v1/me`: who the caller is, for the portal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    /// The user for whom the caller acts.
    pub user: String,
    /// Whether nodes, all users' saves and the dead letters are shown.
    pub administrator: bool,
    /// What says who the caller is.
    pub via: Via,
}

/// `POST /api/v1/signin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SignIn {
    /// Take the place of another user who is signed in in this browser.
    pub replace: bool,
}

/// Someone who has signed in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SignedIn {
    /// The user; empty: an administrator without a user's name.
    pub user: String,
    /// Whether this is an administrator.
    pub administrator: bool,
    /// What the page sends in the Upperdeck-Page header, and keeps where no other origin reads it.
    pub key: String,
    /// When the sign-in ends.
    pub expires: String,
}

/// Every error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: ErrorDetail,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable, snake case: `unauthenticated`, `not_permitted`, `not_found`, `invalid`, `conflict`, `too_many`,
    /// `too_late`, `quota_exceeded`, `unavailable`, `internal`.
    pub code: String,
    /// A sentence: what happened and what to do.
    pub message: String,
    /// Whether the same request may work later.
    pub retryable: bool,
    /// With `invalid`: which field, as a path such as `image.tag`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// With `conflict`: the job that is in the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save: Option<JobId>,
}
