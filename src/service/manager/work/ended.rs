//! Saves sessions that have ended, without being asked for, where their node or their user says that this is wanted.
//!
//! Such a save is accepted like one that the session's owner asks for, so that every limit and right applies, and it never
//! replaces an image. It is accepted once for each run of a container: the key of the request is made of the container and
//! the start of its run, and the record knows the key, whichever agent or manager was started again meanwhile.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use axum::http::HeaderMap;

use super::TaskError;
use super::retry::Retry;
use super::turns::ask_for_saves;
use crate::service::job::{SaveOptions, Session, now_ms};
use crate::service::manager::App;
use crate::service::manager::accept::{Asked, accept_of};
use crate::service::manager::api::{ImageName, Replace, SaveRequest, Which};
use crate::service::manager::auth::Caller;
use crate::service::manager::end_wishes;
use crate::service::manager::names::suggested_tag;
use crate::service::manager::refusal::Refusal;
use crate::service::manager::target::ENDED_TAG;
use crate::service::record::{ENDED, Request};

/// Interval at which the nodes' heartbeats are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Maximum age of an end. The record keeps the keys of requests for a day longer.
const MAX_AGE: Duration = Duration::from_secs(6 * 24 * 3600);

/// What was done about the sessions that a node wants to be saved.
struct Handled {
    mark: u64,
    /// When it is tried again, if some were refused.
    again: Option<Retry>,
}

/// When the save of a run of a session is tried again; `None`: it is accepted.
type Tried = HashMap<(String, i64), Option<Retry>>;

/// Runs until the manager ends.
pub(super) async fn save_ended(app: &App) {
    let (mut handled, mut tried) = (HashMap::new(), Tried::new());
    loop {
        let marked = round(app, &mut handled).await;
        if let Err(error) = marked.and(of_users(app, &mut tried).await) {
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
        let refused = match handled.get(&heard.node.name) {
            Some(done) if done.mark == mark => match done.again {
                Some(retry) if retry.is_due() => Some(retry),
                _ => continue,
            },
            _ => None,
        };
        due.insert(heard.node.name.clone(), (mark, refused));
    }
    if due.is_empty() {
        return Ok(());
    }
    // After the heartbeats, so that what they speak of is among them.
    let sessions = app.inventory.sessions_now(&app.queue).await?;
    let wishes = end_wishes::of(
        app,
        sessions.iter().filter(|session| session.ended.is_some()),
    )
    .await?;
    let is_marked = |session: &&Session| {
        due.contains_key(&session.node) && session.ended.as_ref().is_some_and(|end| end.save)
    };
    let marked: Vec<&Session> = sessions.iter().filter(is_marked).collect();
    let there: HashSet<&str> = marked.iter().map(|one| one.node.as_str()).collect();
    let wanted = marked
        .iter()
        .filter(|session| is_recent(app, session) && end_wishes::is_wanted(&wishes, session));
    let (asked, left) = save_all(app, wanted.copied()).await;
    let refused: HashSet<&str> = asked
        .iter()
        .filter(|(_, accepted)| !accepted)
        .map(|(session, _)| session.node.as_str())
        .collect();
    let left: HashSet<&str> = left.iter().map(|session| session.node.as_str()).collect();
    for (node, (mark, before)) in due {
        // A queue that lost its data may have the heartbeat before the sessions.
        let is_refused = refused.contains(node.as_str()) || !there.contains(node.as_str());
        let again = is_refused.then(|| Retry::after(before));
        // In the next round, those that are accepted are known.
        if !left.contains(node.as_str()) {
            handled.insert(node, Handled { mark, again });
        }
    }
    Ok(())
}

/// Asks for the saves of sessions, several at a time. Returns for each whether it is accepted, now or before, and those that
/// were not asked for in time.
async fn save_all<'a>(
    app: &App,
    sessions: impl Iterator<Item = &'a Session>,
) -> (Vec<(&'a Session, bool)>, Vec<&'a Session>) {
    let ask = async |session| (session, save(app, session).await);
    ask_for_saves(app, sessions.collect(), ask).await
}

/// Saves the sessions whose users want it, though their nodes do not say so.
async fn of_users(app: &App, tried: &mut Tried) -> Result<(), TaskError> {
    let sessions = app.inventory.sessions(&app.queue).await?;
    let unmarked = |session: &&Session| {
        let end = session.ended.as_ref();
        end.is_some_and(|end| end.settled && !end.save && !end.by_pod) && is_recent(app, session)
    };
    let ended: Vec<&Session> = sessions.iter().filter(unmarked).collect();
    let key = |session: &Session| (session.id.clone(), session.started_ms);
    let there: HashSet<(String, i64)> = ended.iter().map(|session| key(session)).collect();
    tried.retain(|run, _| there.contains(run));
    let wishes = end_wishes::of(app, ended.iter().copied()).await?;
    let is_due = |session: &&Session| match tried.get(&key(session)) {
        Some(None) => false,
        Some(Some(retry)) => retry.is_due(),
        None => true,
    };
    let wanted = ended
        .into_iter()
        .filter(|session| is_due(session) && end_wishes::is_wanted(&wishes, session));
    let wanted: Vec<&Session> = wanted.collect();
    let (asked, _) = save_all(app, wanted.into_iter()).await;
    for (session, accepted) in asked {
        let before = tried.get(&key(session)).copied().flatten();
        let again = (!accepted).then(|| Retry::after(before));
        tried.insert(key(session), again);
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
    let caller = Caller::of_service(ENDED, session.owner.clone());
    let tag = tag(session);
    // An image may have this tag by chance, or from before the record was lost.
    let other = format!("{tag}-{:08x}", rand::random::<u32>());
    let ask = async |tag| {
        let asked = Asked {
            request: Some(request.clone()),
            body: body(session, tag),
            keep: None,
        };
        accept_of(app, &caller, session, &HeaderMap::new(), asked).await
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
    format!("{ENDED_TAG}{}", suggested_tag(session, at_ms.unwrap_or(0)))
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
