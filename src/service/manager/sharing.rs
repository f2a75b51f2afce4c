//! Changes what owners say about their images: a description, whether they are pinned, and with whom they are shared.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State as Extracted;

use super::App;
use super::api::{ImageChange, ImageView, Images};
use super::auth::Caller;
use super::extract::{Body, Path, QueryParams};
use super::images::{UserQuery, list_views, owner};
use super::notes::annotate;
use super::refusal::Refusal;
use super::saves::check_message;
use super::target::component;
use crate::common::digest::Digest;
use crate::service::record::ImageKey;

/// Maximum number of users with whom an image is shared.
const MAX_SHARED: usize = 50;

/// Returns the images of others that are shared with `user`.
async fn shared_with(app: &App, user: &str) -> Result<Vec<ImageView>, Refusal> {
    let mut shared = Vec::new();
    let mut owners = BTreeMap::<String, Vec<ImageKey>>::new();
    for key in app.record.shared_with(user).await? {
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
            ..view
        }));
    }
    Ok(shared)
}

/// Returns the images that others share with the caller, who may start sessions from them and cannot change them.
#[utoipa::path(
    get, path = "/api/v1/shared", tag = "images",
    responses((status = 200, body = Images, description = "All of them, on one page"), Refusal)
)]
pub(super) async fn shared(
    Extracted(app): Extracted<App>,
    caller: Caller,
) -> Result<Json<Images>, Refusal> {
    let images = match &caller.user {
        Some(user) => shared_with(&app, user).await?,
        None if caller.administrator => Vec::new(),
        None => {
            caller.require_user()?;
            Vec::new()
        }
    };
    Ok(Json(Images {
        total: images.len() as u64,
        page: 1,
        page_size: images.len().max(1) as u32,
        images,
    }))
}

/// Changes what the owner says about an image.
#[utoipa::path(
    patch, path = "/api/v1/images/{name}/digests/{digest}", tag = "images",
    params(
        ("name" = String, Path, description = "The image's name"),
        ("digest" = String, Path, description = "Digest of the manifest, `sha256:` and 64 hexadecimal digits"),
        UserQuery
    ),
    request_body = ImageChange,
    responses((status = 200, body = ImageView, description = "The image with the changes"), Refusal)
)]
pub(super) async fn change(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((name, digest)): Path<(String, String)>,
    QueryParams(asked): QueryParams<UserQuery>,
    Body(body): Body<ImageChange>,
) -> Result<Json<ImageView>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let digest = digest
        .parse::<Digest>()
        .map_err(|error| Refusal::invalid("digest", error.to_string()))?
        .to_string();
    check_message("description", body.description.as_deref())?;
    let shared = body.shared.as_deref().unwrap_or_default();
    if shared.len() > MAX_SHARED || shared.iter().any(|user| component(user).is_err()) {
        return Err(Refusal::invalid(
            "shared",
            format!("these are names of users, at most {MAX_SHARED}"),
        ));
    }
    let views = list_views(&app, Some(&user)).await?;
    let mut found = views
        .into_iter()
        .find(|view| view.name == name && view.digest == digest)
        .ok_or_else(|| Refusal::not_found("there is no such image"))?;
    let key = ImageKey { user, name, digest };
    let mut note = app.record.note(&key).await?;
    if let Some(description) = body.description {
        note.description = Some(description).filter(|text| !text.is_empty());
    }
    note.pinned = body.pinned.unwrap_or(note.pinned);
    if let Some(shared) = body.shared {
        note.shared = shared
            .into_iter()
            .filter(|with| *with != key.user)
            .collect();
        note.shared.sort();
        note.shared.dedup();
    }
    app.record.set_note(&key, &note).await?;
    tracing::info!(
        caller = caller.name,
        image.name = key.name,
        digest = key.digest,
        pinned = note.pinned,
        shared = note.shared.len(),
        "what is said about an image has changed"
    );
    annotate(std::slice::from_mut(&mut found), &[(key, note)].into());
    Ok(Json(found))
}
