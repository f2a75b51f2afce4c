//! Calls with which users set when their sessions are saved without being asked for.

use axum::Json;
use axum::extract::State as Extracted;

use super::App;
use super::api::{self, AutosaveInForce, AutosaveSettings, Which};
use super::auth::Caller;
use super::autosave::{MAX_KEEP, default_policy, in_minutes, views};
use super::extract::{Body, Path};
use super::inventory::find;
use super::names::suggested_name;
use super::options::MOST_AUTOSAVE;
use super::refusal::Refusal;
use crate::service::record::AutosaveSetting;

/// Returns a setting as the record keeps it.
fn checked(asked: &api::AutosaveSetting) -> Result<AutosaveSetting, Refusal> {
    let refuse = |field, message: String| Err(Refusal::invalid(field, message));
    let most = in_minutes(MOST_AUTOSAVE);
    if asked
        .keep
        .is_some_and(|keep| !(1..=MAX_KEEP).contains(&keep))
    {
        return refuse("keep", format!("it is 1 to {MAX_KEEP}"));
    }
    match (asked.every_minutes, asked.off) {
        (Some(minutes), false) if (1..=most).contains(&minutes) => {}
        (Some(_), false) => {
            return refuse("every_minutes", format!("it is 1 to {most}"));
        }
        (None, true) if asked.keep.is_none() => {}
        (_, true) => return refuse("off", "with off, nothing else is set".to_owned()),
        (None, false) => {
            return refuse("every_minutes", "expected every_minutes or off".to_owned());
        }
    }
    Ok(AutosaveSetting {
        every_minutes: asked.every_minutes,
        keep: asked.keep,
    })
}

async fn of_caller(app: &App, user: &str) -> Result<Json<AutosaveSettings>, Refusal> {
    let settings = app.record.autosave_settings(&[user]).await?;
    let own = settings.get(&(user.to_owned(), String::new()));
    let at_end = app.record.end_settings(&[user]).await?;
    let at_end = at_end.get(user).map(|set| set.wanted);
    let is_set = own.is_some() || at_end.is_some();
    let defaults = &app.options.autosave;
    Ok(Json(AutosaveSettings {
        default: default_policy(defaults),
        own: is_set.then(|| api::AutosaveSetting {
            every_minutes: own.and_then(|set| set.every_minutes),
            keep: own.and_then(|set| set.keep),
            off: own.is_some_and(|set| set.every_minutes.is_none()),
            save_on_end: at_end,
        }),
        min_minutes: in_minutes(defaults.least),
    }))
}

/// Returns what applies to the caller's sessions of which nothing else is said.
#[utoipa::path(
    get, path = "/api/v1/autosave", tag = "sessions",
    responses((status = 200, body = AutosaveSettings, description = "The settings"), Refusal)
)]
pub(super) async fn autosave(
    Extracted(app): Extracted<App>,
    caller: Caller,
) -> Result<Json<AutosaveSettings>, Refusal> {
    of_caller(&app, caller.require_user()?).await
}

/// Sets when the caller's sessions are saved without being asked for, in place of what was set before.
///
/// What is set for one session, and the annotation or label `upperdeck.io/autosave` of its pod, go before it; it goes before
/// what the administrator set.
#[utoipa::path(
    put, path = "/api/v1/autosave", tag = "sessions",
    request_body = api::AutosaveSetting,
    responses((status = 200, body = AutosaveSettings, description = "The settings as they are now"), Refusal)
)]
pub(super) async fn set_autosave(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Body(asked): Body<api::AutosaveSetting>,
) -> Result<Json<AutosaveSettings>, Refusal> {
    let user = caller.require_user()?;
    let only_at_end = asked
        == api::AutosaveSetting {
            save_on_end: asked.save_on_end,
            ..api::AutosaveSetting::default()
        };
    let setting = match asked.save_on_end {
        Some(_) if only_at_end => None,
        _ => Some(checked(&asked)?),
    };
    let at_end = asked.save_on_end;
    app.record.set_own(user, setting.as_ref(), at_end).await?;
    of_caller(&app, user).await
}

/// Removes what the caller set for all own sessions.
#[utoipa::path(
    delete, path = "/api/v1/autosave", tag = "sessions",
    responses((status = 200, body = AutosaveSettings, description = "The settings as they are now"), Refusal)
)]
pub(super) async fn unset_autosave(
    Extracted(app): Extracted<App>,
    caller: Caller,
) -> Result<Json<AutosaveSettings>, Refusal> {
    let user = caller.require_user()?;
    app.record.set_own(user, None, None).await?;
    of_caller(&app, user).await
}

async fn change_session(
    app: &App,
    caller: &Caller,
    id: String,
    setting: Option<&AutosaveSetting>,
) -> Result<Json<AutosaveInForce>, Refusal> {
    if !caller.administrator {
        caller.require_user()?;
    }
    let all = app.inventory.sessions(&app.queue).await?;
    let session = find(app, &all, caller, &Which::Id(id)).await?;
    let Some(owner) = &session.owner else {
        return Err(Refusal::invalid(
            "session",
            "this session has no owner: there are no autosaves of it",
        ));
    };
    // Permissions in a cluster are on sessions, not on what their owners want.
    if !caller.may_access(owner) {
        return Err(Refusal::forbidden(
            "the session belongs to another user, who decides about its autosaves",
        ));
    }
    let name = suggested_name(session);
    app.record.set_autosave(owner, &name, setting).await?;
    let in_force = views(app, &[session]).await?.remove(&session.id);
    Ok(Json(in_force.unwrap_or_default()))
}

/// Sets when a session is saved without being asked for.
///
/// It holds for every later session of the same user with the same `suggested_name`, too, because the ID of a container does
/// not live until tomorrow. It goes before what the pod says.
#[utoipa::path(
    put, path = "/api/v1/sessions/{id}/autosave", tag = "sessions",
    params(("id" = String, Path, description = "The session's ID")),
    request_body = api::AutosaveSetting,
    responses((status = 200, body = AutosaveInForce, description = "What applies to the session now"), Refusal)
)]
pub(super) async fn set_session_autosave(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
    Body(asked): Body<api::AutosaveSetting>,
) -> Result<Json<AutosaveInForce>, Refusal> {
    if asked.save_on_end.is_some() {
        return Err(Refusal::invalid(
            "save_on_end",
            "it is set for all sessions, not for one",
        ));
    }
    let setting = checked(&asked)?;
    change_session(&app, &caller, id, Some(&setting)).await
}

/// Removes what was set for a session.
#[utoipa::path(
    delete, path = "/api/v1/sessions/{id}/autosave", tag = "sessions",
    params(("id" = String, Path, description = "The session's ID")),
    responses((status = 200, body = AutosaveInForce, description = "What applies to the session now"), Refusal)
)]
pub(super) async fn unset_session_autosave(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<AutosaveInForce>, Refusal> {
    change_session(&app, &caller, id, None).await
}
