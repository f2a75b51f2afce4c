//! The packages of sessions and of saved images, by which they differ from their bases.

use axum::Json;
use axum::extract::State as Extracted;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::api::{ImageView, Which};
use super::auth::Caller;
use super::extract::{Path, QueryParams};
use super::refusal::Refusal;
use super::{App, inventory, saves};
use crate::image::packages::Packages;
use crate::service::job::JobId;

/// Maximum length of a package's name and version in a search, in characters.
const MAX_NAME: usize = 256;

/// The packages by which an image or a session differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PackageList {
    /// Name of the base that it differs from, if it is known and no other save was named.
    pub base: Option<String>,
    /// The save that it differs from, if one was named.
    pub since: Option<JobId>,
    /// The list.
    #[serde(flatten)]
    pub list: Packages,
}

/// Selects what an image is compared with.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Since {
    /// ID of an earlier save with the same base; otherwise the image is compared with its base.
    since: Option<String>,
}

/// Returns the packages that a save added to its base, removed from it or has in another version; or, with `since`, those
/// that differ between two saves.
#[utoipa::path(
    get, path = "/api/v1/saves/{id}/packages", tag = "saves",
    params(("id" = JobId, Path, description = "The save"), Since),
    responses((status = 200, body = PackageList, description = "The packages that differ"), Refusal)
)]
pub(super) async fn of_save(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
    QueryParams(asked): QueryParams<Since>,
) -> Result<Json<PackageList>, Refusal> {
    let save = saves::get(&app, &caller, &id).await?;
    let none = || Refusal::not_found("there is no list of packages of this save");
    let list = app.record.packages(save.id).await?.ok_or_else(none)?;
    let base = |save: &crate::service::record::Save| {
        let result = save.result.as_ref();
        result.map(|saved| (saved.base_digest.clone(), saved.base_name.clone()))
    };
    let Some(since) = asked.since else {
        return Ok(Json(PackageList {
            base: base(&save).and_then(|(_, name)| name),
            since: None,
            list,
        }));
    };
    let earlier = saves::get(&app, &caller, &since).await?;
    let before = app.record.packages(earlier.id).await?.ok_or_else(none)?;
    let mut list = list.since(&before);
    if base(&save) != base(&earlier) {
        list.note("the two saves have different bases, whose own packages are not compared");
    }
    Ok(Json(PackageList {
        base: None,
        since: Some(earlier.id),
        list,
    }))
}

/// Returns the packages that a running session has more, less or in other versions than its base, as its node saw them
/// last. The list is shortened to a few hundred.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}/packages", tag = "sessions",
    params(("id" = String, Path, description = "The session's ID")),
    responses((status = 200, body = PackageList, description = "The packages that differ"), Refusal)
)]
pub(super) async fn of_session(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<PackageList>, Refusal> {
    if !caller.administrator {
        caller.require_user()?;
    }
    let all = app.inventory.sessions(&app.queue).await?;
    let session = inventory::find(&app, &all, &caller, &Which::Id(id)).await?;
    let none = || Refusal::not_found("the node has not looked into this session yet");
    Ok(Json(PackageList {
        base: session.image.clone(),
        since: None,
        list: session.packages.clone().ok_or_else(none)?,
    }))
}

/// Keeps the images of those saves that have the package `text`: `NAME` or `NAME==VERSION`. An empty text keeps all.
pub(super) async fn retain_with(
    app: &App,
    user: Option<&str>,
    text: &str,
    views: &mut Vec<ImageView>,
) -> Result<(), Refusal> {
    if text.trim().is_empty() {
        return Ok(());
    }
    let (name, version) = parse_search(text)?;
    let found = app.record.saves_with_package(user, name, version).await?;
    views.retain(|view| view.save.is_some_and(|save| found.contains(&save)));
    Ok(())
}

fn parse_search(text: &str) -> Result<(&str, Option<&str>), Refusal> {
    let (name, version) = match text.trim().split_once("==") {
        Some((name, version)) => (name.trim(), Some(version.trim())),
        None => (text.trim(), None),
    };
    let plain = |text: &str| {
        (1..=MAX_NAME).contains(&text.chars().count()) && !text.chars().any(char::is_control)
    };
    if !plain(name) || version.is_some_and(|version| !plain(version)) {
        return Err(Refusal::invalid(
            "package",
            "expected NAME or NAME==VERSION",
        ));
    }
    Ok((name, version))
}
