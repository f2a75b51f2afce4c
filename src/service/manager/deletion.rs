//! DEL: deletes images of users.

use axum::Json;
use axum::extract::State as Extracted;

use super::App;
use super::api::Deleted;
use super::auth::Caller;
use super::extract::{Path, QueryParams};
use super::images::{UserQuery, check_no_save, owner, parse_digest};
use super::notes::check_unpinned;
use super::refusal::Refusal;
use super::replace::seen;
use crate::service::record::ImageKey;
use crate::store::images::{self, ImageSelector};

/// DEL: deletes a tag, and the image if it has no other tag.
#[utoipa::path(
    delete, path = "/api/v1/images/{name}/tags/{tag}", tag = "images",
    params(
        ("name" = String, Path, description = "The image's name"),
        ("tag" = String, Path, description = "The tag"),
        UserQuery
    ),
    responses((status = 200, body = Deleted, description = "What was deleted, and what was kept"), Refusal)
)]
pub(super) async fn delete(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((name, tag)): Path<(String, String)>,
    QueryParams(asked): QueryParams<UserQuery>,
) -> Result<Json<Deleted>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let destination = app.options.target.fill(&user, &name, &tag)?;
    check_no_save(&app, &destination).await?;
    if let Some(digest) = seen(&app, &destination).await? {
        check_unpinned(&app, &ImageKey::new(&user, &name, digest.to_string())).await?;
    }
    let tag = Tag {
        user: &user,
        name: &name,
        tag: &tag,
        destination: &destination,
    };
    let removed = delete_tag(&app, &tag, &caller.name).await?;
    Ok(Json(deleted(removed)))
}

/// A tag of an image.
pub(super) struct Tag<'a> {
    pub(super) user: &'a str,
    pub(super) name: &'a str,
    pub(super) tag: &'a str,
    /// The complete reference.
    pub(super) destination: &'a str,
}

/// Deletes a tag, and the image if it has no other tag, and records that `by` did it.
pub(super) async fn delete_tag(
    app: &App,
    of: &Tag<'_>,
    by: &str,
) -> Result<images::Removed, Refusal> {
    let which = ImageSelector::Tag(of.tag.to_owned());
    let removed = app.store.remove(of.user, of.name, &which).await;
    app.store.forget(of.user).await;
    let removed = removed?;
    let digest = removed.digest.to_string();
    app.record
        .removed(of.user, of.destination, &digest, by)
        .await?;
    if removed.image_deleted {
        app.record
            .drop_note(&ImageKey::new(of.user, of.name, digest))
            .await?;
    }
    tracing::info!(
        caller = by, image = of.destination, digest = %removed.digest,
        image.deleted = removed.image_deleted, "a tag is deleted"
    );
    app.metrics.deleted();
    Ok(removed)
}

/// DEL of an image without a tag, by its digest: one that its tag has moved away from.
#[utoipa::path(
    delete, path = "/api/v1/images/{name}/digests/{digest}", tag = "images",
    params(
        ("name" = String, Path, description = "The image's name"),
        ("digest" = String, Path, description = "Digest of the manifest, `sha256:` and 64 hexadecimal digits"),
        UserQuery
    ),
    responses((status = 200, body = Deleted, description = "What was deleted, and what was kept"), Refusal)
)]
pub(super) async fn delete_untagged(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((name, digest)): Path<(String, String)>,
    QueryParams(asked): QueryParams<UserQuery>,
) -> Result<Json<Deleted>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let digest = parse_digest(&digest)?;
    // The name is checked like that of a save.
    app.options.target.fill(&user, &name, "latest")?;
    let key = ImageKey::new(&user, &name, digest.to_string());
    check_unpinned(&app, &key).await?;
    let which = ImageSelector::Digest(digest);
    let removed = app.store.remove(&user, &name, &which).await;
    app.store.forget(&user).await;
    let removed = removed?;
    app.record.drop_note(&key).await?;
    tracing::info!(
        caller = caller.name, image.name = name, digest = %removed.digest, "an image without a tag is deleted"
    );
    app.metrics.deleted();
    Ok(Json(deleted(removed)))
}

fn deleted(removed: images::Removed) -> Deleted {
    Deleted {
        tags: removed.tags,
        digest: removed.digest.to_string(),
        image_deleted: removed.image_deleted,
        kept: removed.kept,
        accessories: removed.accessories,
        freed: removed.freed,
        space: removed.space,
    }
}
