//! Saves sessions that have ended, without being asked for, where their node says that this is wanted.
//!
//! Such a save is accepted like one that the session's owner asks for, so that every limit and right applies, and it never
//! replaces an image. It is accepted once for each run of a container: the key of the request is made of the container and
//! the start of its run, and the record knows the key, whichever agent or manager was started again meanwhile.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::http::HeaderMap;

use super::TaskError;
use crate::service::job::{SaveOptions, Session, now_ms};
use crate::service::manager::App;
use crate::service::manager::api::{ImageName, Replace, SaveRequest, Which};
use crate::service::manager::auth::{Caller, Via};
use crate::service::manager::inventory::suggested_tag;
use crate::service::manager::refusal::Refusal;
use crate::service::manager::saves::accept_of;
use crate::service::record::{ENDED, Request};

/// Interval at which the nodes' heartbeats are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Delay before a refused save is asked for again, which doubles with each time, and its maximum.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// Maximum age of an end. The record keeps the keys of requests for a day longer.
const MAX_AGE: Duration = Duration::from_secs(6 * 24 * 3600);

/// What was done about the sessions that a node wants to be saved.
struct Handled {
    mark: u64,
    /// When it is tried again, if some were refused, and how long after the last time that is.
    again: Option<(Instant, Duration)>,
}

/// Runs until the manager ends.
pub(super) async fn save_ended(app: &App) {
    let mut handled = HashMap::new();
    loop {
        if let Err(error) = round(app, &mut handled).await {
            tracing::warn!(%error, "which sessions are to be saved because they ended is not known");
            app.metrics.error("ended");
        }
        tokio::select! {
            () = app.cancel.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

async fn round(app: &App, handled: &mut HashMap<String, Handled>) -> Result<(), TaskError> {
    let nodes = app.inventory.nodes(&app.queue).await?;
    let mut due = HashMap::new();
    for heard in nodes.iter().filter(|heard| heard.is_alive()) {
        let Some(mark) = heard.node.to_save else {
            handled.remove(&heard.node.name);
            continue;
        };
        let pause = match handled.get(&heard.node.name) {
            Some(done) if done.mark == mark => match done.again {
                Some((at, pause)) if at <= Instant::now() => pause,
                _ => continue,
            },
            _ => Duration::ZERO,
        };
        due.insert(heard.node.name.clone(), (mark, pause));
    }
    if due.is_empty() {
        return Ok(());
    }
    // After the heartbeats, so that what they speak of is among them.
    let sessions = app.inventory.sessions_now(&app.queue).await?;
    for (node, (mark, pause)) in due {
        let wanted = |session: &&Session| {
            session.node == node && session.ended.as_ref().is_some_and(|end| end.save)
        };
        let mut wanted = sessions.iter().filter(wanted).peekable();
        // A queue that lost its data may have the heartbeat before the sessions.
        let mut refused = wanted.peek().is_none();
        for session in wanted {
            if is_recent(app, session) {
                refused |= !save(app, session).await;
            }
        }
        let pause = (pause * 2).clamp(RETRY.0, RETRY.1);
        let again = refused.then(|| (Instant::now() + pause, pause));
        handled.insert(node, Handled { mark, again });
    }
    Ok(())
}

/// Returns whether a session ended within the time for which an order may wait.
fn is_recent(app: &App, session: &Session) -> bool {
    let Some(at_ms) = session.ended.as_ref().and_then(|end| end.at_ms) else {
        return false;
    };
    let age = now_ms().saturating_sub(at_ms);
    let most = app.options.order_expiry.min(MAX_AGE);
    u128::try_from(age).unwrap_or(0) < most.as_millis()
}

/// Asks for the save of a session. Returns whether it is accepted, now or before.
async fn save(app: &App, session: &Session) -> bool {
    match Box::pin(submit(app, session)).await {
        Ok(()) => true,
        Err(refusal) => {
            tracing::warn!(
                session.id = session.id,
                node = session.node,
                owner = session.owner,
                why = refusal.message(),
                "a session that ended is not saved yet"
            );
            false
        }
    }
}

async fn submit(app: &App, session: &Session) -> Result<(), Refusal> {
    let request = Request {
        caller: ENDED.to_owned(),
        key: format!("{}:{}", session.id, session.started_ms),
        hash: String::new(),
    };
    if app.record.repeated(&request).await?.is_some() {
        return Ok(());
    }
    let caller = Caller {
        name: ENDED.to_owned(),
        user: session.owner.clone(),
        administrator: false,
        via: Via::Token,
        groups: Vec::new(),
        email: None,
        subject: None,
    };
    let tag = tag(session);
    // An image may have this tag by chance, or from before the record was lost.
    let other = format!("{tag}-{:08x}", rand::random::<u32>());
    let ask = async |tag| {
        let body = body(session, tag);
        let request = Some(request.clone());
        accept_of(app, &caller, session, request, &HeaderMap::new(), body).await
    };
    match ask(tag).await {
        Err(refusal) if refusal.problem().code == "tag_exists" => ask(other).await?,
        accepted => accepted?,
    };
    Ok(())
}

/// Returns the tag of a save that is made because the session ended.
fn tag(session: &Session) -> String {
    let at_ms = session.ended.as_ref().and_then(|end| end.at_ms);
    format!("ended-{}", suggested_tag(session, at_ms.unwrap_or(0)))
}

fn body(session: &Session, tag: String) -> SaveRequest {
    let end = session.ended.clone().unwrap_or_default();
    let how = match end.exit_code {
        _ if end.out_of_memory => ": out of memory".to_owned(),
        Some(code) => format!(": exit code {code}"),
        None => String::new(),
    };
    SaveRequest {
        session: Which::Id(session.id.clone()),
        image: ImageName {
            name: None,
            tag: Some(tag),
        },
        message: Some(format!("saved because the session ended{how}")),
        options: SaveOptions::default(),
        replace: Replace::Never,
        notify: None,
    }
}
