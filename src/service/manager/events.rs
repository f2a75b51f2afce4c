//! Progress as it happens: server-sent events of a save, from the record, so that it does not matter which manager tells
//! them and whether that was there all the time.
//!
//! One task looks how the watched saves stand, for all watchers of this manager; what this manager changes itself it looks
//! at once. A watcher gets each version of its save once and in order: what it missed, or was too slow for, it reads in the
//! record.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State as Extracted;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream;
use tokio::sync::{Notify, broadcast};

use super::App;
use super::auth::Caller;
use super::door::One;
use super::input::Path;
use super::refusal::Refusal;
use super::saves::{get, shown};
use crate::common::cancel::Cancel;
use crate::service::job::{JobId, State};
use crate::service::queue::{Place, Queue};
use crate::service::record::{self, Head, Progress, Record, Save};

/// A watcher that is so many events behind reads in the record what it missed.
const BEHIND: usize = 32;
/// A watcher hears something at least so often, though nothing happens: lines that say nothing are cut by gates.
const AT_LEAST: Duration = Duration::from_secs(8);
/// Comments, for gates that are less patient still while the record is slow.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Places in the queue are looked up every so many rounds.
const PLACES_EVERY: u64 = 2;

/// What the watchers of a save are told; made once for all of them.
#[derive(Debug)]
enum Told {
    Version {
        version: u64,
        last: bool,
        text: String,
    },
    Progress(String),
}

struct Watched {
    sender: broadcast::Sender<Arc<Told>>,
    /// As it was told last.
    save: Save,
    heard: (i64, i64),
    place: Option<u64>,
}

/// The saves that somebody watches.
#[derive(Default)]
pub(super) struct Hub {
    watched: Mutex<HashMap<JobId, Watched>>,
    touched: Mutex<BTreeSet<JobId>>,
    wake: Notify,
}

fn text_of(save: &Save, place: Option<u64>) -> String {
    // A save is strings and numbers: it can always be written.
    serde_json::to_string(&shown(save, place)).unwrap_or_default()
}

impl Hub {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This manager has changed these: their watchers hear of it at once.
    pub(super) fn touch(&self, ids: &[JobId]) {
        let watched = self.lock();
        let ids: Vec<_> = ids.iter().filter(|id| watched.contains_key(id)).collect();
        drop(watched);
        if ids.is_empty() {
            return;
        }
        let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
        touched.extend(ids);
        drop(touched);
        self.wake.notify_one();
    }

    fn subscribe(&self, save: &Save) -> broadcast::Receiver<Arc<Told>> {
        let mut watched = self.lock();
        let entry = watched.entry(save.id).or_insert_with(|| Watched {
            sender: broadcast::channel(BEHIND).0,
            save: save.clone(),
            heard: (0, -1),
            place: None,
        });
        entry.sender.subscribe()
    }

    /// Looks again and again, until `cancel`.
    pub(super) async fn run(
        &self,
        record: &Record,
        queue: &Queue,
        every: Duration,
        cancel: &Cancel,
    ) {
        let mut round = 0_u64;
        let mut clock = tokio::time::interval(every);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let all = tokio::select! {
                _ = cancel.cancelled() => return,
                _ = clock.tick() => true,
                () = self.wake.notified() => false,
            };
            let touched = {
                let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *touched)
            };
            let ids: Vec<JobId> = {
                let mut watched = self.lock();
                if all {
                    watched.retain(|_, watched| watched.sender.receiver_count() > 0);
                    watched.keys().copied().collect()
                } else {
                    touched.into_iter().collect()
                }
            };
            if ids.is_empty() {
                continue;
            }
            if let Err(error) = self.look(record, &ids).await {
                tracing::warn!(error = %error, "watchers have to wait for the record");
            }
            if all {
                round += 1;
                if round.is_multiple_of(PLACES_EVERY) {
                    self.look_for_places(queue).await;
                }
            }
        }
    }

    async fn look(&self, record: &Record, ids: &[JobId]) -> Result<(), record::Error> {
        for head in record.heads(ids).await? {
            let known = {
                let watched = self.lock();
                let Some(known) = watched.get(&head.id) else {
                    continue;
                };
                (known.save.version, known.heard)
            };
            let news = if head.version > known.0 {
                missed(record, head.id, known.0).await?
            } else {
                Vec::new()
            };
            self.tell(&head, news, known);
        }
        Ok(())
    }

    fn tell(&self, head: &Head, news: Vec<Save>, (version, heard): (u64, (i64, i64))) {
        let mut all = self.lock();
        let Some(watched) = all.get_mut(&head.id) else {
            return;
        };
        if watched.save.version != version {
            return;
        }
        watched.heard = head.heard;
        let changed = !news.is_empty();
        for mut save in news {
            if save.state != State::Queued {
                watched.place = None;
            }
            save.progress = progress_of(&save, head.progress);
            let told = Told::Version {
                version: save.version,
                last: save.state.is_final(),
                text: text_of(&save, watched.place),
            };
            // Nobody listens: the next round forgets the entry.
            let _ = watched.sender.send(Arc::new(told));
            watched.save = save;
        }
        if !changed && head.heard != heard {
            watched.save.progress = progress_of(&watched.save, head.progress);
            let text = text_of(&watched.save, watched.place);
            let _ = watched.sender.send(Arc::new(Told::Progress(text)));
        }
    }

    async fn look_for_places(&self, queue: &Queue) {
        let waiting: Vec<JobId> = self
            .lock()
            .iter()
            .filter(|(_, watched)| watched.save.state == State::Queued)
            .map(|(id, _)| *id)
            .collect();
        if waiting.is_empty() {
            return;
        }
        let Ok(places) = queue.places(&waiting).await else {
            return;
        };
        let mut all = self.lock();
        for (id, place) in waiting.iter().zip(places) {
            let place = match place {
                Some(Place::Waiting(before)) => Some(before),
                _ => None,
            };
            if let Some(watched) = all.get_mut(id)
                && watched.place != place
                && watched.save.state == State::Queued
            {
                watched.place = place;
                let text = text_of(&watched.save, place);
                let _ = watched.sender.send(Arc::new(Told::Progress(text)));
            }
        }
    }
}

/// A queued save has none: what is in the record then is an earlier attempt's.
fn progress_of(save: &Save, progress: Option<Progress>) -> Option<Progress> {
    progress.filter(|_| save.state != State::Queued)
}

/// Every version after `version`; only the newest, where those between are not kept any more.
async fn missed(record: &Record, id: JobId, version: u64) -> Result<Vec<Save>, record::Error> {
    let kept = record.changes(id, version).await?;
    if !kept.is_empty() {
        return Ok(kept);
    }
    let now = record.save(id).await?;
    Ok(now
        .into_iter()
        .filter(|save| save.version > version)
        .collect())
}

/// One watcher.
struct Watcher {
    app: App,
    id: JobId,
    receiver: broadcast::Receiver<Arc<Told>>,
    /// The version that was sent last.
    sent: u64,
    /// What is to be sent before listening.
    backlog: std::collections::VecDeque<Save>,
    done: bool,
    /// What was sent last, for when nothing happens.
    text: String,
    _counted: Counted,
}

/// Counts a watcher while it is there, and among those of its user.
struct Counted {
    app: App,
    _one: One,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.app.metrics.watchers(-1);
    }
}

fn of_version(version: u64, text: &str) -> Event {
    Event::default()
        .event("save")
        .id(version.to_string())
        .data(text)
}

impl Watcher {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.done {
                return None;
            }
            if let Some(save) = self.backlog.pop_front() {
                if save.version <= self.sent {
                    continue;
                }
                self.sent = save.version;
                self.done = save.state.is_final() && self.backlog.is_empty();
                self.text = text_of(&save, None);
                return Some(of_version(self.sent, &self.text));
            }
            let told = tokio::select! {
                told = tokio::time::timeout(AT_LEAST, self.receiver.recv()) => told,
                _ = self.app.cancel.cancelled() => return None,
            };
            match told {
                Ok(Ok(told)) => match &*told {
                    Told::Version { version, .. } if *version <= self.sent => {}
                    Told::Version {
                        version,
                        last,
                        text,
                    } if *version == self.sent + 1 => {
                        self.sent = *version;
                        self.done = *last;
                        self.text.clone_from(text);
                        return Some(of_version(*version, text));
                    }
                    Told::Version { .. } => self.catch_up().await?,
                    Told::Progress(text) => {
                        self.text.clone_from(text);
                        return Some(Event::default().event("progress").data(text));
                    }
                },
                // Too slow, or the hub forgot it: the record knows.
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => self.catch_up().await?,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    let save = self.app.record.save(self.id).await.ok()??;
                    self.receiver = self.app.hub.subscribe(&save);
                    self.catch_up().await?;
                }
                Err(_) if self.text.is_empty() => {}
                Err(_) => return Some(Event::default().event("progress").data(&self.text)),
            }
        }
    }

    /// None: the record does not answer; the watcher comes again.
    async fn catch_up(&mut self) -> Option<()> {
        let news = missed(&self.app.record, self.id, self.sent).await.ok()?;
        self.backlog.extend(news);
        Some(())
    }
}

/// The same as it happens, as server-sent events: `save` (a save; the event's ID is its version) for every change, and
/// `progress` (a save) between. Ends after the last change.
#[utoipa::path(
    get, path = "/api/v1/saves/{id}/events", tag = "saves",
    params(
        ("id" = JobId, Path),
        ("Last-Event-ID" = Option<u64>, Header, description = "The version that was heard last: what came after it follows")
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = String, description = "Events until the save has ended"),
        (status = 204, description = "It has ended, and that was heard: do not come again"),
        Refusal
    )
)]
pub(super) async fn events(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let seen = get(&app, &caller, &id).await?;
    let heard = match headers.get("last-event-id") {
        None => None,
        Some(text) => {
            let version: Option<u64> = text.to_str().ok().and_then(|text| text.trim().parse().ok());
            let version = version
                .filter(|version| i64::try_from(*version).is_ok())
                .ok_or_else(|| Refusal::invalid("Last-Event-ID", "it is the ID of no event"))?;
            Some(version)
        }
    };
    if seen.state.is_final() && heard.is_some_and(|heard| heard >= seen.version) {
        return Ok(axum::http::StatusCode::NO_CONTENT.into_response());
    }
    let most = app.options.doors.streams_per_user;
    let user = caller.user.as_deref().unwrap_or(&caller.name);
    let one = app.watching.one(user, most).ok_or_else(|| {
        Refusal::too_many(
            format!("{most} event streams of this user are open; ask for the save itself"),
            AT_LEAST.as_secs(),
        )
    })?;
    // Listening first, reading then: what happens between is heard twice and told once.
    let receiver = app.hub.subscribe(&seen);
    let now = get(&app, &caller, &id).await?;
    let backlog = match heard {
        None => vec![now],
        // A version of the future is none of this record's.
        Some(heard) if heard > now.version => vec![now],
        Some(heard) => missed(&app.record, now.id, heard).await?,
    };
    let sent = match heard {
        Some(heard) if backlog.first().is_none_or(|save| save.version > heard) => heard,
        _ => 0,
    };
    app.metrics.watchers(1);
    let watcher = Watcher {
        id: seen.id,
        receiver,
        sent,
        backlog: backlog.into(),
        done: false,
        text: text_of(&seen, None),
        _counted: Counted {
            app: app.clone(),
            _one: one,
        },
        app,
    };
    let events = stream::unfold(watcher, |mut watcher| async move {
        let event = watcher.next().await?;
        Some((Ok::<_, Infallible>(event), watcher))
    });
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would hold events back until its buffer is full.
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(response)
}
