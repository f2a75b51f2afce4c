//! SAVE and CHK: saves are asked for, looked at, ended and, by administrators, tried again.

use axum::Json;
use axum::extract::State as Extracted;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::App;
use super::accept::accept;
use super::api::{Audit, AuditLine, Save as Shown, SaveRequest, Saves};
use super::auth::Caller;
use super::cancel::cancel_save;
use super::extract::{Body, Path, QueryParams, parse_job_id};
use super::paging::{LIMIT, Listed, MAX_LIMIT, PageQuery, cut, invalid_cursor, limit};
use super::refusal::Refusal;
use super::replace::check_again;
use super::time::rfc3339;
use super::views::{show, show_all};
use crate::service::job::{JobId, State};
use crate::service::record::{Filter, Save};

/// Returns a save that this caller may see. A save of another user is reported as not found.
pub(super) async fn get(app: &App, caller: &Caller, id: &str) -> Result<Save, Refusal> {
    if !caller.administrator {
        caller.require_user()?;
    }
    let found = app.record.save(parse_job_id(id)?).await?;
    found
        .filter(|save| caller.may_access(&save.user) || caller.asked_for(save))
        .ok_or_else(|| Refusal::not_found("there is no such save"))
}

/// Returns the response for a request that is carried out later: 202 with the save, and where to ask for its state.
pub(super) async fn accepted(app: &App, save: &Save) -> Response {
    let at = app.options.at(&format!("api/v1/saves/{}", save.id));
    let headers = [(header::LOCATION, at)];
    (StatusCode::ACCEPTED, headers, Json(show(app, save).await)).into_response()
}

/// SAVE: accepts a save, which starts when its node has a free slot.
#[utoipa::path(
    post, path = "/api/v1/saves", tag = "saves",
    params((
        "Idempotency-Key" = Option<String>, Header,
        description = "The same key with the same body is the same request, however often it is sent: 1 to 200 printable \
                       ASCII characters, remembered for a week"
    )),
    request_body = SaveRequest,
    responses((status = 202, body = Shown, description = "It is written down"), Refusal)
)]
pub(super) async fn submit(
    Extracted(app): Extracted<App>,
    caller: Caller,
    headers: HeaderMap,
    Body(body): Body<SaveRequest>,
) -> Result<Response, Refusal> {
    if !caller.administrator {
        caller.require_user()?;
    }
    let save = accept(&app, &caller, None, &headers, body).await?;
    Ok(accepted(&app, &save).await)
}

/// CHK: returns the current state of a save.
#[utoipa::path(
    get, path = "/api/v1/saves/{id}", tag = "saves",
    params(("id" = JobId, Path)),
    responses((status = 200, body = Shown, description = "The save as it is now"), Refusal)
)]
pub(super) async fn check(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Shown>, Refusal> {
    let save = get(&app, &caller, &id).await?;
    let mut views = show_all(&app, std::slice::from_ref(&save)).await?;
    Ok(Json(match views.pop() {
        Some(view) => view,
        None => show(&app, &save).await,
    }))
}

/// Selects a part of the history.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct History {
    /// For administrators: only saves of this user.
    user: Option<String>,
    /// Only saves in this state; `open`: queued, assigned or running.
    #[param(inline)]
    state: Option<StateOrAny>,
    /// Only saves of this session, given by its full ID.
    session: Option<String>,
    /// The value of `next` in the previous page.
    cursor: Option<String>,
    /// 1 to 500; the default is 50.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<u32>,
}

/// A state, or the empty value of a form's field.
#[derive(Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum StateOrAny {
    Queued,
    Assigned,
    Running,
    Succeeded,
    Failed,
    Cancelled,
    /// Queued, assigned or running.
    Open,
    #[serde(rename = "")]
    Any,
}

impl StateOrAny {
    fn state(self) -> Option<State> {
        match self {
            Self::Queued => Some(State::Queued),
            Self::Assigned => Some(State::Assigned),
            Self::Running => Some(State::Running),
            Self::Succeeded => Some(State::Succeeded),
            Self::Failed => Some(State::Failed),
            Self::Cancelled => Some(State::Cancelled),
            Self::Open | Self::Any => None,
        }
    }
}

async fn page(app: &App, filter: Filter, asked: Option<u32>) -> Result<Listed<Saves>, Refusal> {
    let limit = limit(asked, LIMIT)?;
    let mut saves = app.record.history(&filter, limit + 1).await?;
    let more = saves.len() > limit as usize;
    saves.truncate(limit as usize);
    let next = saves
        .last()
        .filter(|_| more)
        .map(|save| save.id.to_string());
    let saves = show_all(app, &saves).await?;
    let page = Saves {
        saves,
        next: next.clone(),
    };
    Ok(Listed(page, next))
}

/// Returns the save that a page comes after.
pub(super) fn after(cursor: Option<&str>) -> Result<Option<JobId>, Refusal> {
    match cursor.filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => parse_job_id(text).map(Some).map_err(|_| invalid_cursor()),
    }
}

/// Returns the history, the latest save first.
#[utoipa::path(
    get, path = "/api/v1/saves", tag = "saves", params(History),
    responses((status = 200, body = Saves, description = "The saves of this page"), Refusal)
)]
pub(super) async fn history(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<History>,
) -> Result<Listed<Saves>, Refusal> {
    let filter = Filter {
        user: caller.listed_user(asked.user.as_deref())?,
        caller: caller.subject.as_ref().map(|_| caller.name.clone()),
        state: asked.state.and_then(StateOrAny::state),
        open: matches!(asked.state, Some(StateOrAny::Open)),
        session: asked.session.filter(|session| !session.is_empty()),
        after: after(asked.cursor.as_deref())?,
    };
    // The database driver would cut the text at a zero byte. No session ID contains one.
    if filter.session.as_ref().is_some_and(|id| id.contains('\0')) {
        return Err(Refusal::invalid("session", "it is no ID of a session"));
    }
    if filter.user.as_ref().is_some_and(|user| user.contains('\0')) {
        return Err(Refusal::invalid("user", "it is no name of a user"));
    }
    page(&app, filter, asked.limit).await
}

/// Cancels a queued or running save. Nothing remains in the registry under its tag.
#[utoipa::path(
    delete, path = "/api/v1/saves/{id}", tag = "saves",
    params(("id" = JobId, Path)),
    responses(
        (status = 200, body = Shown, description = "It is cancelled"),
        (status = 202, body = Shown, description = "Its agent is told, and will end it"),
        Refusal
    )
)]
pub(super) async fn cancel(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let save = get(&app, &caller, &id).await?;
    let save = cancel_save(&app, &caller.name, save).await?;
    if save.state.is_final() {
        return Ok(Json(show(&app, &save).await).into_response());
    }
    Ok(accepted(&app, &save).await)
}

/// Returns the saves that failed for good, the latest first. For administrators, who can requeue them.
#[utoipa::path(
    get, path = "/api/v1/dead", tag = "operations", params(PageQuery),
    responses((status = 200, body = Saves, description = "The saves of this page"), Refusal)
)]
pub(super) async fn dead(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<PageQuery>,
) -> Result<Listed<Saves>, Refusal> {
    caller.require_administrator()?;
    let filter = Filter {
        state: Some(State::Failed),
        after: after(asked.cursor.as_deref())?,
        ..Filter::default()
    };
    page(&app, filter, asked.limit).await
}

/// Queues a failed save again. For administrators.
#[utoipa::path(
    post, path = "/api/v1/saves/{id}/requeue", tag = "operations",
    params(("id" = JobId, Path)),
    responses((status = 202, body = Shown, description = "It is queued again"), Refusal)
)]
pub(super) async fn requeue(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    caller.require_administrator()?;
    let save = get(&app, &caller, &id).await?;
    if save.state == State::Failed {
        check_again(&app, &save).await?;
    }
    let changed = app
        .record
        .change(save.id, &caller.name, |draft| draft.requeue(&caller.name))
        .await?;
    let (save, begun) = changed.ok_or_else(|| Refusal::not_found("there is no such save"))?;
    if !begun {
        return Err(Refusal::conflict(
            format!("it has not failed, it is {}", save.state.name()),
            None,
        ));
    }
    app.hub.touch(&[save.id]);
    app.outbox_wake.notify_one();
    Ok(accepted(&app, &save).await)
}

/// Returns every transition of a save. For administrators.
#[utoipa::path(
    get, path = "/api/v1/saves/{id}/audit", tag = "operations",
    params(("id" = JobId, Path), PageQuery),
    responses((status = 200, body = Audit, description = "The transitions of this page"), Refusal)
)]
pub(super) async fn audit(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
    QueryParams(asked): QueryParams<PageQuery>,
) -> Result<Listed<Audit>, Refusal> {
    caller.require_administrator()?;
    let lines = app.record.audit(parse_job_id(&id)?).await?;
    if lines.is_empty() {
        return Err(Refusal::not_found("there is no such save"));
    }
    let limit = limit(asked.limit, MAX_LIMIT)?;
    let numbered = lines.into_iter().enumerate().collect();
    let (lines, next) = cut(numbered, asked.cursor.as_deref(), limit, |(at, _)| {
        at.to_string()
    })?;
    let transitions = lines
        .into_iter()
        .map(|(_, line)| line)
        .map(|line| AuditLine {
            version: line.version,
            at: rfc3339(line.at_ms),
            from: line.from,
            to: line.to,
            attempt: line.attempt,
            fence: line.fence,
            actor: line.actor,
            detail: line.detail,
        })
        .collect();
    let page = Audit {
        transitions,
        next: next.clone(),
    };
    Ok(Listed(page, next))
}
