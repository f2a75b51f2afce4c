//! The timeline of a session.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ImageFate;
use crate::service::job::{Changes, JobId};
use crate::service::record::MadeBy;

/// `GET /api/v1/sessions/{id}/timeline`: the succeeded saves of a session, and of earlier sessions of the same user with the
/// same name, the latest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timeline {
    /// The saves of this page.
    pub entries: Vec<TimelineEntry>,
    /// Value of `cursor` for the next page; absent on the last page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A save in a timeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TimelineEntry {
    /// The job that saved it.
    pub save: JobId,
    /// When the save ended.
    #[schema(format = DateTime)]
    pub at: String,
    /// Who or what asked for it.
    pub made_by: MadeBy,
    /// ID of the session that was saved.
    pub session: String,
    /// Name of that session.
    pub session_name: String,
    /// Owner of the image.
    pub user: String,
    /// Name of the image, without registry, project and user.
    pub name: String,
    /// Tag that it was saved under.
    pub tag: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Complete reference with that tag, as used to pull the image.
    pub reference: String,
    /// What became of the image.
    pub fate: ImageFate,
    /// Whether it is pinned: it is neither deleted nor replaced.
    pub pinned: bool,
    /// Compressed size in bytes of the layers that this save created.
    pub layer_bytes: u64,
    /// Compressed size in bytes of the whole image.
    pub image_bytes: u64,
    /// Description by the user.
    pub message: Option<String>,
    /// What the save added, changed and removed; absent if its agent did not report it.
    pub changes: Option<Changes>,
    /// How its packages differ from those of the entry before it in time; absent if there is none, if one of the two has
    /// no list of packages, or if their bases differ.
    pub packages: Option<PackageSummary>,
}

/// How packages differ, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PackageSummary {
    /// Number of packages that are new.
    pub added: u64,
    /// Number of packages that are gone.
    pub removed: u64,
    /// Number of packages that are there in another version.
    pub changed: u64,
    /// The first of them, at most five, such as `+numpy 2.1`, `-rich 13.9` and `torch 2.8 → 2.9`.
    pub some: Vec<String>,
}
