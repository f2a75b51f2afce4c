//! Accepts saves: a request is checked, and written down as a save.

use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use sha2::{Digest as _, Sha256};

use super::App;
use super::access::Reach;
use super::api::{Replace, SaveRequest};
use super::auth::Caller;
use super::cancel::cancel_because;
use super::inventory::{find, find_within, sessions_to_save};
use super::names::{session_name, suggested_name};
use super::notify::receivers;
use super::refusal::Refusal;
use super::replace::{Image, choose_tag};
use crate::service::job::{JobId, SaveOptions, Session, State, now_ms};
use crate::service::record::{AUTOSAVE, MadeBy, Request, Save, Submitted, UserLimits};

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
/// How long a save waits to be accepted for the end of an autosave of the same session. An agent that renews its lease
/// hears of the cancellation within 10 s.
const AUTOSAVE_END: Duration = Duration::from_secs(15);
/// Interval at which it is checked whether that autosave has ended.
const END_POLL: Duration = Duration::from_millis(100);

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
    let asked = Asked {
        request,
        body,
        keep: None,
    };
    match accept_of(app, caller, session, headers, asked).await? {
        Accepted::New(save) => Ok(*save),
        Accepted::Repeated(save) => repeated(caller, reach, *save),
    }
}

/// What a save is made of.
pub(super) struct Asked {
    /// The idempotency key, if there is one.
    pub(super) request: Option<Request>,
    /// The request. Its message and options have been checked.
    pub(super) body: SaveRequest,
    /// Of an autosave, the number of the latest ones that are kept.
    pub(super) keep: Option<u32>,
}

/// A save that was accepted.
pub(super) enum Accepted {
    /// Now.
    New(Box<Save>),
    /// Before, by a request with the same key.
    Repeated(Box<Save>),
}

/// Accepts a save of a session that `caller` may save. An autosave of the session is ended for it.
pub(super) async fn accept_of(
    app: &App,
    caller: &Caller,
    session: &Session,
    headers: &HeaderMap,
    asked: Asked,
) -> Result<Accepted, Refusal> {
    let request = asked.request.clone();
    let save = compose(app, caller, session, headers, asked).await?;
    let most = if caller.administrator || caller.name == AUTOSAVE {
        UserLimits::default()
    } else {
        UserLimits {
            open: app.options.open_per_user,
            day: app.options.saves_per_day,
        }
    };
    let mut submitted = app.record.submit(&save, request.as_ref(), most).await?;
    if let Submitted::Busy(other) = submitted
        && end_autosave(app, caller, other).await?
    {
        submitted = app.record.submit(&save, request.as_ref(), most).await?;
    }
    answer(app, submitted)
}

/// Composes the save that a request asks for.
async fn compose(
    app: &App,
    caller: &Caller,
    session: &Session,
    headers: &HeaderMap,
    asked: Asked,
) -> Result<Save, Refusal> {
    let (now, body) = (now_ms(), asked.body);
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
    let autosave = caller.name == AUTOSAVE;
    let of = Image {
        session,
        user: &user,
        name: &name,
        autosave,
    };
    let (tag, destination, replaces) =
        choose_tag(app, &of, body.image.tag, &body.replace, now).await?;
    app.store.check_quota(&user, autosave).await?;
    Ok(Save {
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
        attempt: 1,
        version: 1,
        caller: caller.name.clone(),
        keep: asked.keep,
        created_ms: now,
        queued_ms: now,
        since_ms: Some(now),
        not_before_ms: now,
        ..Save::default()
    })
}

/// Ends the save of a session that `caller` wants to be saved, if that is an autosave. Returns whether it is over.
async fn end_autosave(app: &App, caller: &Caller, id: JobId) -> Result<bool, Refusal> {
    let by_hand = caller.name != AUTOSAVE;
    let open = app.record.save(id).await?;
    let Some(open) = open.filter(|save| by_hand && save.made_by() == MadeBy::Autosave) else {
        return Ok(false);
    };
    let why = format!("it makes way for a save that {} asked for", caller.name);
    match cancel_because(app, AUTOSAVE, &why, open).await {
        // One that is about to succeed is waited for.
        Err(refusal) if refusal.problem().code != "too_late" => return Err(refusal),
        _ => {}
    }
    let until = Instant::now() + AUTOSAVE_END;
    loop {
        let now = app.record.save(id).await?;
        if now.is_none_or(|save| save.state.is_final()) {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        tokio::time::sleep(END_POLL).await;
    }
}

/// Returns the save that was accepted, or the response that says why none was.
fn answer(app: &App, submitted: Submitted) -> Result<Accepted, Refusal> {
    match submitted {
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
