//! Images and the quota.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Replace;
use crate::service::job::{Category, JobId, Kind};

/// State of the image of a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageState {
    /// It has the tag that it was saved under, as far as the record knows.
    Tagged,
    /// A later save took the tag.
    Replaced,
    /// It, or its tag, was deleted.
    Deleted,
    /// It has another tag instead.
    Renamed,
}

/// What became of the image of a save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageFate {
    /// Its state.
    pub state: ImageState,
    /// When the tag was taken or deleted.
    #[schema(format = DateTime)]
    pub at: Option<String>,
    /// For `replaced`: the save that took the tag.
    pub save: Option<JobId>,
    /// For `replaced`: the session of that save.
    pub session_name: Option<String>,
    /// For `deleted` and `renamed`: the caller that did it. What is done outside of the service is not known here: such an
    /// image stays `tagged`.
    pub caller: Option<String>,
    /// For `renamed`: the tag that the image has instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renamed_to: Option<String>,
}

/// `DELETE /api/v1/images/{name}/tags/{tag}`: DEL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Deleted {
    /// Tags that were deleted.
    pub(crate) tags: Vec<String>,
    /// Digest of the image that had the tag.
    pub(crate) digest: String,
    /// Whether the image was deleted, too, because it was its last tag.
    pub(crate) image_deleted: bool,
    /// Tags that the image still has.
    pub(crate) kept: Vec<String>,
    /// Kinds of the accessories (signatures, SBOMs) that were deleted with the image.
    #[serde(default)]
    pub accessories: Vec<String>,
    /// Bytes that were freed at once; absent if the registry frees them later.
    #[serde(default)]
    pub(crate) freed: Option<u64>,
    /// What happens to the space, as a sentence.
    pub(crate) space: String,
}

/// `GET /api/v1/images`: LIST.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Images {
    /// The images of this page.
    pub images: Vec<ImageView>,
    /// Number of images on all pages.
    pub total: u64,
    /// Value of `cursor` for the next page; absent on the last page.
    #[serde(default)]
    pub next: Option<String>,
}

/// An image: one digest with its tags.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// Owner of the image.
    pub user: String,
    /// Name, without registry, project and user.
    pub name: String,
    /// Tags of the image.
    pub tags: Vec<ImageTag>,
    /// Complete reference without a tag.
    pub repository: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Compressed size in bytes.
    pub size: Option<u64>,
    /// Accelerator category of the session; absent if the image is not in the record.
    pub category: Option<Category>,
    /// Kind of application of the session; absent if the image is not in the record.
    pub kind: Option<Kind>,
    /// Name of the base image.
    pub base: Option<String>,
    /// Number of pulls, if the registry counts them.
    pub pulls: Option<u64>,
    /// When it was last pushed or saved.
    #[schema(format = DateTime)]
    pub changed: Option<String>,
    /// Description by the user.
    pub message: Option<String>,
    /// Name of the session that it was saved from.
    pub session_name: Option<String>,
    /// The job that saved it.
    pub save: Option<JobId>,
    /// Whether it is pinned: it is neither deleted nor replaced.
    #[serde(default)]
    pub pinned: bool,
    /// Users with whom its owner shares it.
    #[serde(default)]
    pub shared: Vec<String>,
    /// Groups with whose members its owner shares it.
    #[serde(default)]
    pub shared_groups: Vec<String>,
}

impl ImageView {
    /// Returns a text that no other image has.
    pub(in crate::service::manager) fn id(&self) -> String {
        format!("{}/{}@{}", self.user, self.name, self.digest)
    }
}

/// `PATCH /api/v1/images/{name}/digests/{digest}`: what the owner says about an image. Absent fields stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImageChange {
    /// Description, in place of the message of its save; at most 1,000 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Whether it is pinned: it is neither deleted nor replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned: Option<bool>,
    /// Users with whom it is shared, at most 50: they see it in their list, and cannot change it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<Vec<String>>,
    /// Groups with whose members it is shared, at most 50.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_groups: Option<Vec<String>>,
}

/// `POST /api/v1/images/{name}/tags/{tag}`: another tag for an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageRename {
    /// The new tag.
    pub tag: String,
    /// Whether the image keeps the old tag as well.
    #[serde(default)]
    pub keep: bool,
    /// Whether the new tag may be taken from the image that has it: `never`, `any`, or the digest of that image.
    #[serde(default)]
    #[schema(value_type = String, example = "never")]
    pub replace: Replace,
}

/// An image that has another tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageRenamed {
    /// Complete reference with the new tag.
    pub reference: String,
    /// The new tag.
    pub tag: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Why the image has the old tag as well; absent if it has not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
}

/// A tag of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageTag {
    /// The tag.
    pub name: String,
    /// Complete reference, as used to pull the image.
    pub reference: String,
    /// Whether the registry forbids changing or deleting it.
    pub immutable: bool,
}

/// `GET /api/v1/quota`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// Bytes used; absent if the store does not report it.
    pub used: Option<u64>,
    /// Maximum number of bytes; absent if there is no limit.
    pub hard: Option<u64>,
    /// What the quota applies to, e.g. a Harbor project.
    pub scope: String,
}
