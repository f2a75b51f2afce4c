//! Changes what owners say about their images: a description, whether they are pinned, and with whom they are shared.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State as Extracted;
use axum::http::{HeaderMap, StatusCode, header};

use super::App;
use super::accept::check_message;
use super::api::{ImageChange, ImageView, Images};
use super::auth::{Caller, is_group};
use super::conditional::{check_unchanged, has_changed};
use super::extract::{Body, Path, QueryParams};
use super::images::{UserQuery, list_views, owner, parse_digest};
use super::notes::annotate;
use super::paging::{Listed, MAX_LIMIT, PageQuery, cut, limit};
use super::refusal::Refusal;
use super::target::component;
use crate::service::record::{ImageKey, NoteChange};

/// Maximum number of users with whom an image is shared, and of groups.
const MAX_SHARED: usize = 50;

/// Returns the images of others that are shared with `user`.
async fn shared_with(app: &App, user: &str, groups: &[String]) -> Result<Vec<ImageView>, Refusal> {
    let mut shared = Vec::new();
    let mut owners = BTreeMap::<String, Vec<ImageKey>>::new();
    for key in app.record.shared_with(user, groups).await? {
        owners.entry(key.user.clone()).or_default().push(key);
    }
    for (owner, keys) in owners {
        let views = list_views(app, Some(&owner)).await?;
        let wanted = |view: &ImageView| {
            let same = |key: &ImageKey| key.name == view.name && key.digest == view.digest;
            keys.iter().any(same)
        };
        // With whom else it is shared is the owner's business.
        shared.extend(views.into_iter().filter(wanted).map(|view| ImageView {
            shared: Vec::new(),
            shared_groups: Vec::new(),
            ..view
        }));
    }
    Ok(shared)
}

/// Returns the images that others share with the caller, who may start sessions from them and cannot change them.
#[utoipa::path(
    get, path = "/api/v1/shared", tag = "images", params(PageQuery),
    responses((status = 200, body = Images, description = "The images of this page"), Refusal)
)]
pub(super) async fn shared(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<PageQuery>,
) -> Result<Listed<Images>, Refusal> {
    let limit = limit(asked.limit, MAX_LIMIT)?;
    let images = match caller.own_user()? {
        Some(user) => shared_with(&app, user, &caller.groups).await?,
        None => Vec::new(),
    };
    let total = images.len() as u64;
    let (images, next) = cut(images, asked.cursor.as_deref(), limit, ImageView::id)?;
    let page = Images {
        images,
        total,
        next: next.clone(),
    };
    Ok(Listed(page, next))
}

/// Ends the sharing of an image with the caller, who does not see it any more.
///
/// Its owner can share it with the caller by name again; with a group of the caller's, it stays out of the caller's list.
#[utoipa::path(
    delete, path = "/api/v1/shared/{user}/{name}/digests/{digest}", tag = "images",
    params(
        ("user" = String, Path, description = "The image's owner"),
        ("name" = String, Path, description = "The image's name"),
        ("digest" = String, Path, description = "Digest of the manifest, `sha256:` and 64 hexadecimal digits")
    ),
    responses((status = 204, description = "It is not shared with the caller any more"), Refusal)
)]
pub(super) async fn decline(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((user, name, digest)): Path<(String, String, String)>,
) -> Result<StatusCode, Refusal> {
    let own = caller.require_user()?;
    let digest = parse_digest(&digest)?.to_string();
    let key = ImageKey { user, name, digest };
    let shared = app.record.shared_with(own, &caller.groups).await?;
    if !shared.contains(&key) {
        return Err(Refusal::not_found("no such image is shared with you"));
    }
    app.record.decline(&key, own).await?;
    tracing::info!(
        caller = caller.name,
        owner = key.user,
        image.name = key.name,
        digest = key.digest,
        "a share is declined"
    );
    Ok(StatusCode::NO_CONTENT)
}

/// Returns the image of a user with this name and digest.
async fn find(app: &App, key: &ImageKey) -> Result<ImageView, Refusal> {
    let views = list_views(app, Some(&key.user)).await?;
    views
        .into_iter()
        .find(|view| view.name == key.name && view.digest == key.digest)
        .ok_or_else(|| Refusal::not_found("there is no such image"))
}

/// Returns an image.
#[utoipa::path(
    get, path = "/api/v1/images/{name}/digests/{digest}", tag = "images",
    params(
        ("name" = String, Path, description = "The image's name"),
        ("digest" = String, Path, description = "Digest of the manifest, `sha256:` and 64 hexadecimal digits"),
        UserQuery
    ),
    responses((status = 200, body = ImageView, description = "The image"), Refusal)
)]
pub(super) async fn image(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((name, digest)): Path<(String, String)>,
    QueryParams(asked): QueryParams<UserQuery>,
) -> Result<Json<ImageView>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let digest = parse_digest(&digest)?.to_string();
    Ok(Json(find(&app, &ImageKey { user, name, digest }).await?))
}

/// Changes what the owner says about an image.
#[utoipa::path(
    patch, path = "/api/v1/images/{name}/digests/{digest}", tag = "images",
    params(
        ("name" = String, Path, description = "The image's name"),
        ("digest" = String, Path, description = "Digest of the manifest, `sha256:` and 64 hexadecimal digits"),
        UserQuery,
        ("If-Match" = Option<String>, Header, description = "Change it only if this is its ETag; otherwise 412")
    ),
    request_body = ImageChange,
    responses((status = 200, body = ImageView, description = "The image with the changes"), Refusal)
)]
pub(super) async fn change(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((name, digest)): Path<(String, String)>,
    QueryParams(asked): QueryParams<UserQuery>,
    headers: HeaderMap,
    Body(body): Body<ImageChange>,
) -> Result<Json<ImageView>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let digest = parse_digest(&digest)?.to_string();
    let key = ImageKey { user, name, digest };
    check_message("description", body.description.as_deref())?;
    let shared = body.shared.as_deref().unwrap_or_default();
    if shared.len() > MAX_SHARED || shared.iter().any(|user| component(user).is_err()) {
        return Err(Refusal::invalid(
            "shared",
            format!("these are names of users, at most {MAX_SHARED}"),
        ));
    }
    let groups = body.shared_groups.as_deref().unwrap_or_default();
    if groups.len() > MAX_SHARED || groups.iter().any(|group| !is_group(group)) {
        return Err(Refusal::invalid(
            "shared_groups",
            format!("these are names of groups, at most {MAX_SHARED}"),
        ));
    }
    // Before the image, so that what changes in between does not have the ETag.
    let before = app.record.note(&key).await?;
    let mut found = find(&app, &key).await?;
    check_unchanged(&headers, &found)?;
    let expected = headers.contains_key(header::IF_MATCH).then_some(&before);
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names.dedup();
        names
    };
    let shared = body.shared.map(|mut shared| {
        shared.retain(|with| *with != key.user);
        sorted(shared)
    });
    let change = NoteChange {
        description: body.description,
        pinned: body.pinned,
        shared,
        groups: body.shared_groups.map(sorted),
    };
    let changed = app.record.change_note(&key, &change, expected).await?;
    let note = changed.ok_or_else(has_changed)?;
    tracing::info!(
        caller = caller.name,
        image.name = key.name,
        digest = key.digest,
        pinned = note.pinned,
        shared = note.shared.len() + note.groups.len(),
        "what is said about an image has changed"
    );
    annotate(std::slice::from_mut(&mut found), &[(key, note)].into());
    Ok(Json(found))
}
