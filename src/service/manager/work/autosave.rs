//! Saves sessions that run, at the interval that their user, their pod or the administrator wants, if something changed
//! since the last save.
//!
//! Such a save is accepted like one that the session's owner asks for, except that limits on the number of saves do not
//! apply to it, and it never replaces an image. Several managers do this at the same time: the key of the request is made
//! of the session and the end of its last save, and the record knows the key.
//!
//! Times are by the managers' clocks: those of nodes may be wrong, and change when an agent is started again.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use axum::http::HeaderMap;

use super::TaskError;
use super::retry::Retry;
use super::turns::ask_for_saves;
use crate::service::job::{SaveOptions, Session, State, now_ms};
use crate::service::manager::App;
use crate::service::manager::accept::{Asked, accept_of};
use crate::service::manager::api::{ImageName, Notify, Replace, SaveRequest, Which};
use crate::service::manager::auth::Caller;
use crate::service::manager::autosave::{Policy, policy, settings_of};
use crate::service::manager::names::{other_tag, suggested_tag};
use crate::service::manager::refusal::Refusal;
use crate::service::manager::target::AUTOSAVE_TAG;
use crate::service::record::{AUTOSAVE, LastSave, Request};

/// Interval at which it is checked which sessions are due.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Interval at which it is checked whether the last image of a session that has not changed still has its tag.
const CHECK_EVERY: Duration = Duration::from_secs(60);
/// Time by which the clocks of managers may differ, in milliseconds.
const LEEWAY_MS: i64 = 60_000;
/// Time by which a look may have begun earlier than it seems by the manager's clock, in milliseconds.
const SLACK_MS: i64 = 1000;

/// What is known of a session with autosaves.
#[derive(Default)]
struct Watched {
    /// End of the last save, as the record had it when it was read last, or the start of the session.
    base_ms: i64,
    /// When this manager heard of it first.
    first_ms: i64,
    /// When it is tried again, if it was refused.
    again: Option<Retry>,
    /// When it was last checked whether the image of the last save still has its tag.
    checked: Option<Instant>,
}

impl Watched {
    /// Returns a session that is heard of for the first time.
    fn new(session: &Session, now_ms: i64) -> Self {
        Self {
            base_ms: start(session, now_ms),
            first_ms: now_ms,
            ..Self::default()
        }
    }

    fn is_to_be_checked(&mut self) -> bool {
        let due = self
            .checked
            .is_none_or(|checked| checked.elapsed() >= CHECK_EVERY);
        if due {
            self.checked = Some(Instant::now());
        }
        due
    }

    fn is_refused(&self) -> bool {
        self.again.is_some_and(|retry| !retry.is_due())
    }
}

/// A save that is to be asked for.
struct Due<'a> {
    session: &'a Session,
    policy: Policy,
    /// When it was due, in milliseconds.
    at_ms: i64,
    last: Option<LastSave>,
}

/// Runs until the manager ends.
pub(super) async fn save_due(app: &App) {
    let mut watched = HashMap::new();
    loop {
        if let Err(error) = Box::pin(round(app, &mut watched)).await {
            tracing::warn!(%error, "which sessions are due for an autosave is not known");
            app.metrics.error("autosave");
        }
        tokio::select! {
            () = app.cancel.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

async fn round(app: &App, watched: &mut HashMap<String, Watched>) -> Result<(), TaskError> {
    let sessions = app.inventory.sessions(&app.queue).await?;
    let settings = settings_of(app, sessions.iter()).await?;
    let wanted: HashMap<&str, (&Session, Policy)> = sessions
        .iter()
        .filter_map(|session| {
            let policy = policy(&app.options.autosave, &settings, session)?;
            Some((session.id.as_str(), (session, policy)))
        })
        .collect();
    watched.retain(|id, _| wanted.contains_key(id.as_str()));
    app.autosaves.retain(|id| wanted.contains_key(id));
    // The record is asked only about those that have changed and, as far as is known, are due.
    let now = now_ms();
    let due: Vec<(&Session, Policy)> = wanted
        .into_values()
        .filter(|(session, policy)| {
            let known = watched
                .entry(session.id.clone())
                .or_insert_with(|| Watched::new(session, now));
            due_ms(known.base_ms, policy) <= now
                && !known.is_refused()
                && (is_changed(session) || known.is_to_be_checked())
        })
        .collect();
    let mut waiting = to_be_asked_for(app, watched, due, now).await?;
    // Those that have waited longest come first.
    waiting.sort_by_key(|due| due.at_ms);
    let (asked, left) = ask_for_saves(app, waiting, |due| save(app, due)).await;
    for (session, refused) in asked {
        if let Some(known) = watched.get_mut(session) {
            known.again = refused.then(|| Retry::after(known.again));
        }
    }
    for due in left {
        let why = "saves of other sessions are asked for first, and the registry is slow";
        app.autosaves
            .set_wait(&due.session.id, Some(why.to_owned()));
    }
    Ok(())
}

/// Returns the saves that are to be asked for, of sessions that are due as far as is known.
async fn to_be_asked_for<'a>(
    app: &App,
    watched: &mut HashMap<String, Watched>,
    due: Vec<(&'a Session, Policy)>,
    now: i64,
) -> Result<Vec<Due<'a>>, TaskError> {
    if due.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<&str> = due.iter().map(|(session, _)| session.id.as_str()).collect();
    let mut last = app.record.last_saves(&ids, now + LEEWAY_MS).await?;
    let open = app.record.open_saves().await?;
    let open: HashSet<&str> = open.iter().map(|save| save.session.as_str()).collect();
    let ahead = app.inventory.clocks(&app.queue).await?;
    let mut found = Vec::new();
    for (session, policy) in due {
        let id = &session.id;
        if open.contains(id.as_str()) {
            continue;
        }
        let known = watched.entry(id.clone()).or_default();
        let last = last.remove(id);
        let first = start(session, known.first_ms);
        known.base_ms = last.as_ref().map_or(first, |last| last.at_ms);
        let at_ms = due_ms(known.base_ms, &policy);
        if at_ms > now {
            let why = failure(app, last.as_ref()).await?;
            app.autosaves.set_wait(id, why);
        } else if session.next.is_none() && session.look.is_some() {
            let why = "its node cannot find out whether something changed";
            app.autosaves.set_wait(id, Some(why.to_owned()));
        } else if is_wanted(session, last.as_ref(), ahead.get(&session.node).copied()) {
            found.push(Due {
                session,
                policy,
                at_ms,
                last,
            });
        }
    }
    Ok(found)
}

/// Returns when a session was started: milliseconds since the epoch. By the clock of its node, which may be ahead: not after
/// it was heard of first.
fn start(session: &Session, first_ms: i64) -> i64 {
    session.started_ms.min(first_ms)
}

/// Returns when a save is due after one that ended at `base_ms`.
fn due_ms(base_ms: i64, policy: &Policy) -> i64 {
    let every = i64::try_from(policy.every.as_millis()).unwrap_or(i64::MAX);
    base_ms.saturating_add(every)
}

/// Returns whether a session differs from its last save, according to its node's look.
fn is_changed(session: &Session) -> bool {
    let next = session.next.as_ref();
    next.is_some_and(|next| !next.times_only && next.entries.is_some_and(|entries| entries > 0))
}

/// Returns whether the present state of a session is in no image: it changed since its last save, or that has lost its tag.
/// `behind_ms` is by how much its node's clock is behind, if that is known.
fn is_wanted(session: &Session, last: Option<&LastSave>, behind_ms: Option<i64>) -> bool {
    let lost = last.is_some_and(|last| last.state == State::Succeeded && last.lost);
    lost || (is_changed(session) && is_fresh(session, last, behind_ms))
}

/// Returns whether the node looked at the session after the end of its last save. One that failed changed nothing.
fn is_fresh(session: &Session, last: Option<&LastSave>, behind_ms: Option<i64>) -> bool {
    let Some(look) = &session.look else {
        return false;
    };
    last.is_none_or(|last| {
        // By the identity of the save; an agent that was started again does not know it.
        let later = |behind: i64| look.at_ms.saturating_add(behind) > last.at_ms + SLACK_MS;
        last.state != State::Succeeded
            || look.after == Some(last.id)
            || behind_ms.is_some_and(later)
    })
}

/// Returns why the last autosave failed, if it did.
async fn failure(app: &App, last: Option<&LastSave>) -> Result<Option<String>, TaskError> {
    let Some(last) = last.filter(|last| last.state == State::Failed) else {
        return Ok(None);
    };
    let save = app.record.save(last.id).await?;
    let error = save.and_then(|save| save.error);
    Ok(error.map(|error| format!("the last one failed: {}", error.message)))
}

/// Asks for a save. Returns the session, and whether the save was refused.
async fn save<'a>(app: &App, due: Due<'a>) -> (&'a str, bool) {
    let session = due.session;
    let refused = match Box::pin(submit(app, &due)).await {
        Ok(()) => None,
        // Another save of the session has just been accepted.
        Err(refusal) if refusal.problem().code == "conflict" => return (&session.id, false),
        Err(refusal) => Some(refusal),
    };
    let why = refused.as_ref().map(|refusal| refusal.message().to_owned());
    if let Some(why) = &why {
        tracing::warn!(
            session.id = session.id,
            node = session.node,
            owner = session.owner,
            why,
            "an autosave is not accepted yet"
        );
    }
    let is_refused = why.is_some();
    app.autosaves.set_wait(&session.id, why);
    (&session.id, is_refused)
}

async fn submit(app: &App, due: &Due<'_>) -> Result<(), Refusal> {
    let session = due.session;
    let id = session.id.as_str();
    let before = |last: Option<&LastSave>| last.map(|last| last.id);
    // It may have waited for its turn.
    let now = app.record.last_saves(&[id], now_ms() + LEEWAY_MS).await?;
    if before(now.get(id)) != before(due.last.as_ref()) {
        return Ok(());
    }
    let last = due.last.as_ref();
    let base_ms = last.map_or(session.started_ms, |last| last.at_ms);
    let request = Request {
        caller: AUTOSAVE.to_owned(),
        key: format!("{id}:{base_ms}"),
        hash: String::new(),
    };
    if app.record.repeated(&request).await?.is_some() {
        return Ok(());
    }
    let caller = Caller::of_service(AUTOSAVE, session.owner.clone());
    let ask = async |tag: String| {
        let asked = Asked {
            request: Some(request.clone()),
            body: body(session, format!("{AUTOSAVE_TAG}{tag}")),
            keep: Some(due.policy.keep),
        };
        accept_of(app, &caller, session, &HeaderMap::new(), asked).await
    };
    let now = now_ms();
    match ask(suggested_tag(session, now)).await {
        // There was another one within the same minute.
        Err(refusal) if refusal.problem().code == "tag_exists" => ask(other_tag(now)).await?,
        accepted => accepted?,
    };
    Ok(())
}

fn body(session: &Session, tag: String) -> SaveRequest {
    SaveRequest {
        session: Which::Id(session.id.clone()),
        image: ImageName {
            name: None,
            tag: Some(tag),
        },
        message: Some("autosave".to_owned()),
        options: SaveOptions::default(),
        replace: Replace::Never,
        notify: Some(Notify {
            email: Some(false),
            ..Notify::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::{JobId, Look, NextSave};

    fn looked(at_ms: i64, after: Option<JobId>, entries: Option<u64>) -> Session {
        Session {
            next: Some(NextSave {
                delta: true,
                bytes: Some(0),
                entries,
                times_only: false,
                last_seconds: None,
            }),
            look: Some(Look { at_ms, after }),
            ..Session::default()
        }
    }

    #[test]
    fn only_a_change_counts() {
        assert!(!is_changed(&Session::default()));
        assert!(!is_changed(&looked(1, None, None)));
        assert!(!is_changed(&looked(1, None, Some(0))));
        // What was only removed has no bytes.
        let mut session = looked(1, None, Some(1));
        assert!(is_changed(&session));
        if let Some(next) = &mut session.next {
            next.times_only = true;
        }
        assert!(!is_changed(&session));
    }

    #[test]
    fn only_a_look_after_the_last_save_counts() {
        let last = |state| LastSave {
            id: JobId::new(),
            state,
            at_ms: 100,
            lost: false,
        };
        let done = last(State::Succeeded);
        let right = Some(0);
        assert!(!is_fresh(&Session::default(), None, right));
        assert!(is_fresh(&looked(1, None, Some(1)), None, None));
        assert!(!is_fresh(&looked(99, None, Some(1)), Some(&done), right));
        let later = looked(101 + SLACK_MS, None, Some(1));
        assert!(is_fresh(&later, Some(&done), right));
        let other = Some(JobId::new());
        assert!(!is_fresh(&looked(99, other, Some(1)), Some(&done), right));
        // The agent knows the save, whatever its clock says.
        let after = looked(1, Some(done.id), Some(1));
        assert!(is_fresh(&after, Some(&done), None));
        // It was started again, and its clock is slow, or fast.
        assert!(
            !is_fresh(&later, Some(&done), None),
            "its clock is not known"
        );
        assert!(!is_fresh(&later, Some(&done), Some(-3600)));
        let slow = looked(101 + SLACK_MS - 3600, None, Some(1));
        assert!(!is_fresh(&slow, Some(&done), right));
        assert!(is_fresh(&slow, Some(&done), Some(3600)));
        let lost = LastSave {
            lost: true,
            ..done.clone()
        };
        let unchanged = looked(99, None, Some(0));
        assert!(is_wanted(&unchanged, Some(&lost), None));
        assert!(!is_wanted(&unchanged, Some(&done), right) && !is_wanted(&unchanged, None, right));
        let failed = last(State::Failed);
        assert!(is_fresh(&looked(99, None, Some(1)), Some(&failed), right));
    }

    #[test]
    fn a_node_whose_clock_is_ahead_does_not_delay_the_first_save() {
        let started = |started_ms| Session {
            started_ms,
            ..Session::default()
        };
        assert_eq!(Watched::new(&started(5000), 1000).base_ms, 1000);
        assert_eq!(Watched::new(&started(500), 1000).base_ms, 500);
    }
}
