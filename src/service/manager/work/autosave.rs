//! Saves sessions that run, at the interval that their user, their pod or the administrator wants, if something changed
//! since the last save.
//!
//! Such a save is accepted like one that the session's owner asks for, except that limits on the number of saves do not
//! apply to it, and it never replaces an image. Several managers do this at the same time: the key of the request is made
//! of the session and the end of its last save, and the record knows the key.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use axum::http::HeaderMap;

use super::TaskError;
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
/// Delay before a refused save is asked for again, which doubles with each time, and its maximum.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// What is known of a session with autosaves.
#[derive(Default)]
struct Watched {
    /// End of the last save, as the record had it when it was read last, or the start of the session.
    base_ms: i64,
    /// When it is tried again, if it was refused, and how long after the last time that is.
    again: Option<(Instant, Duration)>,
    /// When it was last checked whether the image of the last save still has its tag.
    checked: Option<Instant>,
}

impl Watched {
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
        self.again.is_some_and(|(at, _)| at > Instant::now())
    }
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
                .or_insert_with(|| Watched {
                    base_ms: session.started_ms,
                    ..Watched::default()
                });
            is_due(known.base_ms, policy, now)
                && !known.is_refused()
                && (is_changed(session) || known.is_to_be_checked())
        })
        .collect();
    if due.is_empty() {
        return Ok(());
    }
    let ids: Vec<&str> = due.iter().map(|(session, _)| session.id.as_str()).collect();
    let last = app.record.last_saves(&ids, now + LEEWAY_MS).await?;
    let open = app.record.open_saves().await?;
    let open: HashSet<&str> = open.iter().map(|save| save.session.as_str()).collect();
    for (session, policy) in due {
        if open.contains(session.id.as_str()) {
            continue;
        }
        let known = watched.entry(session.id.clone()).or_default();
        let last = last.get(&session.id);
        known.base_ms = last.map_or(session.started_ms, |last| last.at_ms);
        if is_due(known.base_ms, &policy, now) {
            if session.next.is_none() && session.look.is_some() {
                let why = "its node cannot find out whether something changed";
                app.autosaves.set_wait(&session.id, Some(why.to_owned()));
            } else if is_wanted(session, last) {
                save(app, session, &policy, known).await;
            }
        } else {
            app.autosaves
                .set_wait(&session.id, failure(app, last).await?);
        }
    }
    Ok(())
}

/// Returns whether a session differs from its last save, according to its node's look.
fn is_changed(session: &Session) -> bool {
    let next = session.next.as_ref();
    next.is_some_and(|next| next.entries.is_some_and(|entries| entries > 0))
}

fn is_due(base_ms: i64, policy: &Policy, now_ms: i64) -> bool {
    let every = i64::try_from(policy.every.as_millis()).unwrap_or(i64::MAX);
    now_ms >= base_ms.saturating_add(every)
}

/// Returns whether the present state of a session is in no image: it changed since its last save, or that has lost its tag.
fn is_wanted(session: &Session, last: Option<&LastSave>) -> bool {
    let lost = last.is_some_and(|last| last.state == State::Succeeded && last.lost);
    lost || (is_changed(session) && is_fresh(session, last))
}

/// Returns whether the node looked at the session after the end of its last save. One that failed changed nothing.
fn is_fresh(session: &Session, last: Option<&LastSave>) -> bool {
    let Some(look) = &session.look else {
        return false;
    };
    last.is_none_or(|last| {
        // By the identity of the save, as the node's clock may be wrong; an agent that was started again does not know it.
        last.state != State::Succeeded || look.after == Some(last.id) || look.at_ms > last.at_ms
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

/// Asks for the save of a session that is due.
async fn save(app: &App, session: &Session, policy: &Policy, known: &mut Watched) {
    let refused = match submit(app, session, policy, known.base_ms).await {
        Ok(()) => None,
        // Another save of the session has just been accepted.
        Err(refusal) if refusal.problem().code == "conflict" => return,
        Err(refusal) => Some(refusal),
    };
    let why = refused.as_ref().map(|refusal| refusal.message().to_owned());
    app.autosaves.set_wait(&session.id, why);
    let Some(refusal) = refused else {
        known.again = None;
        return;
    };
    tracing::warn!(
        session.id = session.id,
        node = session.node,
        owner = session.owner,
        why = refusal.message(),
        "an autosave is not accepted yet"
    );
    let pause = known.again.map_or(Duration::ZERO, |(_, pause)| pause * 2);
    let pause = pause.clamp(RETRY.0, RETRY.1);
    known.again = Some((Instant::now() + pause, pause));
}

async fn submit(
    app: &App,
    session: &Session,
    policy: &Policy,
    base_ms: i64,
) -> Result<(), Refusal> {
    let request = Request {
        caller: AUTOSAVE.to_owned(),
        key: format!("{}:{base_ms}", session.id),
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
            keep: Some(policy.keep),
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
        assert!(is_changed(&looked(1, None, Some(1))));
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
        assert!(!is_fresh(&Session::default(), None));
        assert!(is_fresh(&looked(1, None, Some(1)), None));
        assert!(!is_fresh(&looked(99, None, Some(1)), Some(&done)));
        assert!(is_fresh(&looked(101, None, Some(1)), Some(&done)));
        let other = Some(JobId::new());
        assert!(!is_fresh(&looked(99, other, Some(1)), Some(&done)));
        // The node's clock is slow.
        assert!(is_fresh(&looked(1, Some(done.id), Some(1)), Some(&done)));
        let lost = LastSave {
            lost: true,
            ..done.clone()
        };
        let unchanged = looked(99, None, Some(0));
        assert!(is_wanted(&unchanged, Some(&lost)));
        assert!(!is_wanted(&unchanged, Some(&done)) && !is_wanted(&unchanged, None));
        let failed = last(State::Failed);
        assert!(is_fresh(&looked(99, None, Some(1)), Some(&failed)));
    }
}
