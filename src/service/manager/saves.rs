//! SAVE and CHK: saves are asked for, looked at, ended and, by administrators, tried again.

use axum::Json;
use axum::extract::State as Extracted;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use utoipa::IntoParams;

use super::App;
use super::access::Reach;
use super::api::{Audit, AuditLine, Replace, Save as Shown, SaveRequest, Saves};
use super::auth::Caller;
use super::extract::{Body, Path, QueryParams, parse_job_id};
use super::inventory::{find, find_within, session_name, sessions_to_save, suggested_name};
use super::notify::receivers;
use super::paging::{LIMIT, Listed, MAX_LIMIT, PageQuery, cut, invalid_cursor, limit};
use super::refusal::Refusal;
use super::replace::{Image, check_again, choose_tag};
use super::time::rfc3339;
use super::views::{show, show_all};
use crate::service::job::{JobId, SaveOptions, Session, State, now_ms};
use crate::service::queue::Withdrawn;
use crate::service::record::{Draft, Filter, Request, Save, Submitted, UserLimits};

const MAX_MESSAGE: usize = 1000;
const MAX_PATTERNS: usize = 100;
const MAX_PATTERN: usize = 1024;
const MAX_LABELS: usize = 64;
const MAX_LABEL_KEY: usize = 128;
const MAX_LABEL: usize = 4096;
const MAX_KEY: usize = 200;
/// Seconds after which a user with too many open saves should try again.
const TOO_MANY_S: u64 = 30;

/// Seconds after which a user with too many saves in 24 hours should try again.
const TOO_MANY_TODAY_S: u64 = 900;

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

fn is_text(text: &str, most: usize) -> bool {
    text.len() <= most && !text.is_empty() && !text.chars().any(char::is_control)
}

/// Checks a text that describes an image.
pub(super) fn check_message(field: &str, message: Option<&str>) -> Result<(), Refusal> {
    let printable = |c: char| !c.is_control() || c == '\n' || c == '\t';
    match message {
        Some(text) if text.chars().count() > MAX_MESSAGE || !text.chars().all(printable) => {
            Err(Refusal::invalid(
                field,
                format!("it has at most {MAX_MESSAGE} characters, and no control characters"),
            ))
        }
        _ => Ok(()),
    }
}

fn check_options(options: &SaveOptions) -> Result<(), Refusal> {
    if let Some(compression) = &options.compression
        && !matches!(compression.as_str(), "gzip" | "zstd")
    {
        return Err(Refusal::invalid(
            "options.compression",
            "compression is gzip or zstd",
        ));
    }
    for (field, patterns, absolute) in [
        ("options.exclude", &options.exclude, false),
        ("options.include_volumes", &options.include_volumes, true),
    ] {
        if patterns.len() > MAX_PATTERNS {
            return Err(Refusal::invalid(
                field,
                format!("these are more than {MAX_PATTERNS}"),
            ));
        }
        let wrong = |text: &&String| {
            !is_text(text, MAX_PATTERN)
                || (absolute && !text.starts_with('/'))
                || text.starts_with('-')
        };
        if patterns.iter().any(|text| wrong(&text)) {
            return Err(Refusal::invalid(
                field,
                format!(
                    "each is a path{}, of 1 to {MAX_PATTERN} bytes without control characters, not beginning with -",
                    if absolute { " from /" } else { " or pattern" }
                ),
            ));
        }
    }
    let label = |(key, value): (&String, &String)| {
        let key_is_fine = is_text(key, MAX_LABEL_KEY)
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b))
            && key
                .bytes()
                .next()
                .is_some_and(|b| b.is_ascii_alphanumeric());
        key_is_fine && value.len() <= MAX_LABEL && !value.contains('\0')
    };
    if options.labels.len() > MAX_LABELS || !options.labels.iter().all(label) {
        return Err(Refusal::invalid(
            "options.labels",
            format!(
                "at most {MAX_LABELS} labels; keys of letters, digits and . _ - / ({MAX_LABEL_KEY} at most), values of \
                 {MAX_LABEL} bytes at most"
            ),
        ));
    }
    Ok(())
}

fn idempotency(
    headers: &HeaderMap,
    caller: &Caller,
    body: &SaveRequest,
) -> Result<Option<Request>, Refusal> {
    let Some(key) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    let key = key
        .to_str()
        .ok()
        .filter(|key| is_text(key, MAX_KEY))
        .ok_or_else(|| {
            Refusal::invalid(
                "Idempotency-Key",
                format!("a key is 1 to {MAX_KEY} printable ASCII characters"),
            )
        })?;
    let text = serde_json::to_vec(body)
        .map_err(|_| Refusal::invalid("body", "the body cannot be read"))?;
    Ok(Some(Request {
        caller: caller.name.clone(),
        key: key.to_owned(),
        hash: hex::encode(Sha256::digest(text)),
    }))
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

/// Accepts a save that `caller` asks for, of a session within `reach` if that is known already. A request that was made
/// before, by the key in `headers`, returns the same save.
pub(super) async fn accept(
    app: &App,
    caller: &Caller,
    reach: Option<&Reach>,
    headers: &HeaderMap,
    body: SaveRequest,
) -> Result<Save, Refusal> {
    let request = idempotency(headers, caller, &body)?;
    check_message("message", body.message.as_deref())?;
    check_options(&body.options)?;
    if let Some(request) = &request
        && let Some(save) = app.record.repeated(request).await?
    {
        // The session may have ended since, but the request was accepted.
        return repeated(caller, reach, save);
    }
    let sessions = sessions_to_save(app).await?;
    let session = match reach {
        Some(reach) => find_within(&sessions, caller, reach, &body.session)?,
        None => find(app, &sessions, caller, &body.session).await?,
    };
    match accept_of(app, caller, session, request, headers, body).await? {
        Accepted::New(save) => Ok(*save),
        Accepted::Repeated(save) => repeated(caller, reach, *save),
    }
}

/// A save that was accepted.
pub(super) enum Accepted {
    /// Now.
    New(Box<Save>),
    /// Before, by a request with the same key.
    Repeated(Box<Save>),
}

/// Accepts a save of a session that `caller` may save. The message and the options in `body` have been checked.
pub(super) async fn accept_of(
    app: &App,
    caller: &Caller,
    session: &Session,
    request: Option<Request>,
    headers: &HeaderMap,
    body: SaveRequest,
) -> Result<Accepted, Refusal> {
    let now = now_ms();
    check_replace(caller, session, &body.replace)?;
    let user = match (&session.owner, &caller.user) {
        (Some(owner), _) => owner.clone(),
        (None, Some(own)) => own.clone(),
        (None, None) => {
            return Err(Refusal::forbidden(
                "this session has no owner: name the owner of the image in Upperdeck-User, or with the token",
            ));
        }
    };
    let notify = receivers(app, caller, &user, body.notify.as_ref(), headers).await?;
    let name = body
        .image
        .name
        .clone()
        .unwrap_or_else(|| suggested_name(session));
    let of = Image {
        session,
        user: &user,
        name: &name,
    };
    let (tag, destination, replaces) =
        choose_tag(app, &of, body.image.tag, &body.replace, now).await?;
    app.store.check_quota(&user).await?;
    let save = Save {
        id: JobId::new(),
        session: session.id.clone(),
        session_name: session_name(session),
        node: session.node.clone(),
        owner: session.owner.clone().unwrap_or_default(),
        user,
        name,
        tag,
        destination,
        message: body.message.filter(|message| !message.is_empty()),
        options: body.options,
        replaces,
        notify,
        kind: session.kind,
        category: session.category,
        base: session.image.clone(),
        state: State::Queued,
        phase: None,
        held: None,
        attempt: 1,
        failures: 0,
        fence: 0,
        seq: 0,
        version: 1,
        progress: None,
        pause_ms: None,
        warnings: Vec::new(),
        result: None,
        error: None,
        cancelling: false,
        hurried: false,
        caller: caller.name.clone(),
        created_ms: now,
        queued_ms: now,
        since_ms: Some(now),
        not_before_ms: now,
        started_ms: None,
        finished_ms: None,
    };
    let most = if caller.administrator {
        UserLimits::default()
    } else {
        UserLimits {
            open: app.options.open_per_user,
            day: app.options.saves_per_day,
        }
    };
    match app.record.submit(&save, request.as_ref(), most).await? {
        Submitted::New(save) => {
            tracing::info!(
                job = %save.id, user = save.user, node = save.node, target = save.destination, "a save is accepted"
            );
            app.metrics.accepted();
            app.hub.begun(&save);
            app.outbox_wake.notify_one();
            Ok(Accepted::New(save))
        }
        Submitted::Repeated(save) => Ok(Accepted::Repeated(save)),
        Submitted::OtherRequest => Err(Refusal::invalid(
            "Idempotency-Key",
            "this key was used for another request",
        )),
        Submitted::Busy(id) => Err(Refusal::conflict(
            format!("save {id} of this session is not done"),
            Some(id),
        )),
        Submitted::TagBusy(id) => Err(Refusal::conflict(
            format!("save {id} is writing to this name and tag"),
            Some(id),
        )),
        Submitted::TooMany(open) => Err(Refusal::too_many(
            format!(
                "not done yet are {} of this user; that is as many as may be",
                crate::common::message::count(open, "save", "saves")
            ),
            TOO_MANY_S,
        )),
        Submitted::TooManyToday(asked) => Err(Refusal::too_many(
            format!(
                "asked for in 24 hours were {} of this user; that is as many as may be",
                crate::common::message::count(asked, "save", "saves")
            ),
            TOO_MANY_TODAY_S,
        )),
    }
}

/// Checks what a user of a Kubernetes cluster who may save the sessions of others may replace: permissions there are on
/// sessions, not on the images of their owners.
fn check_replace(caller: &Caller, session: &Session, replace: &Replace) -> Result<(), Refusal> {
    let owner = session.owner.as_deref();
    let own = owner.is_none() || owner == caller.user.as_deref();
    if caller.subject.is_none() || own || matches!(replace, Replace::Never | Replace::Own) {
        return Ok(());
    }
    Err(Refusal::forbidden(
        "the session belongs to another user: of that user's images, only an earlier save of it can be replaced (own)",
    ))
}

/// Returns the save that a repeated request made.
fn repeated(caller: &Caller, reach: Option<&Reach>, save: Save) -> Result<Save, Refusal> {
    if reach.is_none() && !caller.may_access(&save.user) && !caller.asked_for(&save) {
        return Err(Refusal::invalid(
            "Idempotency-Key",
            "this key was used for another request",
        ));
    }
    Ok(save)
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

/// Cancels a save for `caller`, and returns it as it is then.
pub(super) async fn cancel_save(app: &App, caller: &str, save: Save) -> Result<Save, Refusal> {
    let gone = || Refusal::not_found("there is no such save");
    let wanted = app
        .record
        .change(save.id, caller, |draft| draft.request_cancel(caller))
        .await?
        .ok_or_else(gone)?;
    let (mut save, wanted) = wanted;
    if !wanted {
        if save.state == State::Cancelled {
            return Ok(save);
        }
        return Err(too_late("it has ended already"));
    }
    app.hub.touch(&[save.id]);
    // The request is in the record already. If the queue cannot be reached, the background work delivers it later.
    match app.queue.withdraw(save.id).await {
        Ok(Withdrawn::TooLate) => {
            app.record
                .change(save.id, caller, Draft::cancel_too_late)
                .await?;
            app.hub.touch(&[save.id]);
            return Err(too_late("its tag is being put on at this moment"));
        }
        Ok(Withdrawn::Removed) => {
            save = end(app, &save, caller).await?.unwrap_or(save);
        }
        Ok(Withdrawn::Unknown) if save.state == State::Queued => {
            save = end(app, &save, caller).await?.unwrap_or(save);
        }
        Ok(Withdrawn::CancelRequested | Withdrawn::Unknown) => {}
        Err(error) => {
            tracing::warn!(job = %save.id, error = %error, "the queue hears of a cancellation later");
        }
    }
    app.hub.touch(&[save.id]);
    Ok(save)
}

async fn end(app: &App, save: &Save, actor: &str) -> Result<Option<Save>, Refusal> {
    let ended = app
        .record
        .change(save.id, actor, |draft| {
            if draft.save().cancelling {
                draft.end("");
            }
        })
        .await?;
    let Some((ended, ())) = ended else {
        return Ok(None);
    };
    if ended.state.is_final() && !save.state.is_final() {
        app.metrics.ended(&ended);
    }
    Ok(Some(ended))
}

fn too_late(why: &str) -> Refusal {
    Refusal::new(
        StatusCode::CONFLICT,
        "too_late",
        format!("this save cannot be cancelled any more: {why}"),
    )
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
