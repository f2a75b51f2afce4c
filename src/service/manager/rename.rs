//! Gives an image another tag, beside the one that it has or in its place.

use axum::Json;
use axum::extract::State as Extracted;
use axum::http::StatusCode;

use super::App;
use super::api::{ImageRename, ImageRenamed};
use super::auth::Caller;
use super::extract::{Body, Path, QueryParams};
use super::images::{ImageStore, UserQuery, check_no_save, owner};
use super::notes::check_unpinned;
use super::refusal::Refusal;
use super::replace::{Place, exists_now, replaceable};
use super::target::is_reserved;
use crate::common::digest::Digest;
use crate::service::record::ImageKey;
use crate::store::destination::{self, Destination, Replaceable, Target};
use crate::store::images::{self, ImageSelector};
use crate::store::registry::Registries;

impl ImageStore {
    /// Returns the digest of the image that the tag of a destination names now, if there is one.
    pub(super) async fn digest_of(
        &self,
        destination: &str,
    ) -> Result<Option<Digest>, destination::Error> {
        let registries = Registries::new(self.access.clone());
        let Ok(target) = Target::for_saving(destination) else {
            return Ok(None);
        };
        let place = Destination::open(&target, &registries)?;
        place.digest_of(target.tag()).await
    }

    /// Adds a tag to an image: that of `destination`, if `rule` allows to take it from the image that has it.
    pub(super) async fn add_tag(
        &self,
        destination: &str,
        digest: &Digest,
        rule: &Replaceable,
    ) -> Result<(), destination::Error> {
        let registries = Registries::new(self.access.clone());
        let Ok(target) = Target::for_saving(destination) else {
            return Err(destination::Error::RuntimeStopped);
        };
        let place = Destination::open(&target, &registries)?;
        place.add_tag(digest, target.tag(), rule).await
    }
}

/// Adds a tag to an image, and removes the old one unless it is to be kept.
///
/// A tag that exists is taken from its image only if `replace` says so. A registry that cannot delete one tag of
/// several keeps the old one; the response says why.
#[utoipa::path(
    post, path = "/api/v1/images/{name}/tags/{tag}", tag = "images",
    params(
        ("name" = String, Path, description = "The image's name"),
        ("tag" = String, Path, description = "The tag that it has"),
        UserQuery
    ),
    request_body = ImageRename,
    responses((status = 200, body = ImageRenamed, description = "The image has the new tag"), Refusal)
)]
pub(super) async fn rename(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path((name, tag)): Path<(String, String)>,
    QueryParams(asked): QueryParams<UserQuery>,
    Body(body): Body<ImageRename>,
) -> Result<Json<ImageRenamed>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let old = app.options.target.fill(&user, &name, &tag)?;
    let new = app.options.target.fill(&user, &name, &body.tag)?;
    if is_reserved(&body.tag, &app.options.reserved_tags, false) || old == new {
        let message = "this tag is reserved, or the one that the image has; take another one";
        return Err(Refusal::invalid("tag", message));
    }
    for destination in [&old, &new] {
        check_no_save(&app, destination).await?;
    }
    let digest = app
        .store
        .digest_of(&old)
        .await
        .map_err(images::Error::from)?;
    let digest = digest.ok_or_else(|| Refusal::not_found(format!("{name}:{tag} is not there")))?;
    let key = ImageKey::new(&user, &name, digest.to_string());
    if !body.keep {
        check_unpinned(&app, &key).await?;
    }
    let place = Place {
        user: &user,
        name: &name,
        session: None,
        tag: &body.tag,
        destination: &new,
    };
    let (before, rule) = replaceable(&app, &place, &body.replace).await?;
    match app.store.add_tag(&new, &digest, &rule).await {
        Ok(()) => {}
        Err(destination::Error::TagExists { digest, .. }) => {
            return Err(exists_now(&app, &place, digest).await?);
        }
        Err(error) => return Err(images::Error::from(error).into()),
    }
    // What was removed before and is there again is no longer removed.
    app.record.restored(&new, &digest.to_string()).await?;
    if let Some(before) = before.filter(|before| *before != digest) {
        let by = &caller.name;
        app.record
            .removed(&user, &new, &before.to_string(), by)
            .await?;
    }
    let mut kept = body.keep.then(|| "it was to be kept".to_owned());
    if !body.keep {
        let removed = app
            .store
            .remove(&user, &name, &ImageSelector::Tag(tag.clone()))
            .await;
        match removed {
            Ok(_) => {
                app.record
                    .renamed(&key, &old, &body.tag, &caller.name)
                    .await?;
            }
            Err(refusal) if refusal.status() == StatusCode::CONFLICT => {
                kept = Some(refusal.message().to_owned());
            }
            Err(refusal) => {
                app.store.forget(&user).await;
                return Err(refusal);
            }
        }
    }
    app.store.forget(&user).await;
    tracing::info!(
        caller = caller.name, image = old, renamed = new, %digest, kept = kept.is_some(), "an image has another tag"
    );
    Ok(Json(ImageRenamed {
        reference: new,
        tag: body.tag,
        digest: digest.to_string(),
        kept,
    }))
}
