//! Server-sent events with the progress of a save. They are derived from the record, so any manager can serve them,
//! even one that was not running all the time.
//!
//! One task per manager checks the watched saves for all watchers, and at once those that this manager changes. A
//! watcher receives each version of its save once and in order. Versions that it missed or was too slow for are read
//! from the record.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State as Extracted;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{Notify, broadcast};

use super::App;
use super::auth::Caller;
use super::extract::{Path, StreamCaller};
use super::refusal::Refusal;
use super::saves::get;
use super::standing::{Standing, standings};
use super::views::shown;
use crate::service::connections::CountGuard;
use crate::service::job::{JobId, State};
use crate::service::record::{self, Progress, Record, Save, SaveVersion};

/// Number of events a watcher may fall behind before it has to read the record.
const CHANNEL_CAPACITY: usize = 32;
/// The same for a page, which receives the events of several saves.
const FEED_CAPACITY: usize = 256;
/// Maximum interval between two events of a stream, even without changes, because proxies close idle connections.
pub(super) const REPEAT_INTERVAL: Duration = Duration::from_secs(8);
/// Interval between comments, for proxies that are less patient while the record is slow.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Number of rounds between two queries for what holds saves back.
const STANDING_ROUNDS: u64 = 2;

/// An event for the watchers of a save, serialized once for all of them.
#[derive(Debug)]
pub(super) enum StreamEvent {
    Version {
        version: u64,
        last: bool,
        text: String,
    },
    Progress(String),
}

struct WatchedSave {
    sender: broadcast::Sender<Arc<StreamEvent>>,
    /// The save as it was last sent.
    save: Save,
    heard: (i64, i64),
    standing: Standing,
}

impl WatchedSave {
    fn new(save: &Save) -> Self {
        Self {
            sender: broadcast::channel(CHANNEL_CAPACITY).0,
            save: save.clone(),
            heard: (0, -1),
            standing: Standing::default(),
        }
    }
}

type Feeds = HashMap<Option<String>, broadcast::Sender<Arc<StreamEvent>>>;

/// The watched saves.
#[derive(Default)]
pub(super) struct Hub {
    watched: Mutex<HashMap<JobId, WatchedSave>>,
    /// Receivers of the events of all open saves of a user, or (`None`) of all users.
    feeds: Mutex<Feeds>,
    touched: Mutex<BTreeSet<JobId>>,
    wake: Notify,
}

pub(super) fn text_of(save: &Save, standing: &Standing) -> String {
    // A save consists of strings and numbers, so serialization cannot fail.
    serde_json::to_string(&shown(save, standing)).unwrap_or_default()
}

impl Hub {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, WatchedSave>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports that this manager has changed saves, so that their watchers are notified at once.
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

    fn subscribe(&self, save: &Save) -> broadcast::Receiver<Arc<StreamEvent>> {
        let mut watched = self.lock();
        let entry = watched
            .entry(save.id)
            .or_insert_with(|| WatchedSave::new(save));
        entry.sender.subscribe()
    }

    fn feeds(&self) -> std::sync::MutexGuard<'_, Feeds> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a receiver of the events of all open saves of `user`, or of all users.
    pub(super) fn subscribe_to_user(
        &self,
        user: Option<&str>,
    ) -> broadcast::Receiver<Arc<StreamEvent>> {
        let mut feeds = self.feeds();
        let feed = feeds
            .entry(user.map(str::to_owned))
            .or_insert_with(|| broadcast::channel(FEED_CAPACITY).0);
        feed.subscribe()
    }

    /// Returns whether a page follows the saves of this user.
    fn is_followed(&self, user: &str) -> bool {
        let feeds = self.feeds();
        feeds.contains_key(&None) || feeds.contains_key(&Some(user.to_owned()))
    }

    /// Sends an event to the watchers of a save and to the pages that follow its user. Sending fails if there are none;
    /// the next round removes them.
    fn send(&self, watched: &WatchedSave, event: StreamEvent) {
        let event = Arc::new(event);
        let feeds = self.feeds();
        for key in [None, Some(watched.save.user.clone())] {
            if let Some(feed) = feeds.get(&key) {
                let _ = feed.send(event.clone());
            }
        }
        drop(feeds);
        let _ = watched.sender.send(event);
    }

    /// Watches saves for the pages that follow their user.
    pub(super) fn watch(&self, saves: &[Save]) {
        let mut all = self.lock();
        for save in saves {
            all.entry(save.id).or_insert_with(|| WatchedSave::new(save));
        }
    }

    /// Reports a save that this manager has accepted, so that the pages of its user have it at once.
    pub(super) fn begun(&self, save: &Save) {
        if !self.is_followed(&save.user) {
            return;
        }
        let mut all = self.lock();
        let watched = all.entry(save.id).or_insert_with(|| WatchedSave::new(save));
        let told = StreamEvent::Version {
            version: save.version,
            last: false,
            text: text_of(save, &Standing::default()),
        };
        self.send(watched, told);
    }

    /// Finds open saves of followed users that are not watched yet: other managers accepted them, or an administrator
    /// queued them again.
    async fn discover(&self, record: &Record) -> Result<(), record::Error> {
        {
            let mut feeds = self.feeds();
            feeds.retain(|_, feed| feed.receiver_count() > 0);
            if feeds.is_empty() {
                return Ok(());
            }
        }
        for (id, user) in record.open_saves_of_users().await? {
            let known = self.lock().contains_key(&id);
            if known || !self.is_followed(&user) {
                continue;
            }
            if let Some(save) = record.save(id).await? {
                self.begun(&save);
            }
        }
        Ok(())
    }

    /// Checks the watched saves at regular intervals until `cancel` is set.
    pub(super) async fn run(&self, app: &App) {
        let (record, every, cancel) = (&app.record, app.options.watch_every, &app.cancel);
        let mut round = 0_u64;
        let mut clock = tokio::time::interval(every);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let all = tokio::select! {
                () = cancel.cancelled() => return,
                _ = clock.tick() => true,
                () = self.wake.notified() => false,
            };
            if all && let Err(error) = self.discover(record).await {
                tracing::warn!(error = %error, "pages have to wait for the record");
            }
            let touched = {
                let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *touched)
            };
            let ids: Vec<JobId> = {
                let mut watched = self.lock();
                if all {
                    watched.retain(|_, watched| {
                        watched.sender.receiver_count() > 0
                            || (!watched.save.state.is_final()
                                && self.is_followed(&watched.save.user))
                    });
                    watched.keys().copied().collect()
                } else {
                    touched.into_iter().collect()
                }
            };
            if ids.is_empty() {
                continue;
            }
            if let Err(error) = self.poll(record, &ids).await {
                tracing::warn!(error = %error, "watchers have to wait for the record");
            }
            if all {
                round += 1;
                if round.is_multiple_of(STANDING_ROUNDS) {
                    self.poll_standings(app).await;
                }
            }
        }
    }

    async fn poll(&self, record: &Record, ids: &[JobId]) -> Result<(), record::Error> {
        for head in record.versions(ids).await? {
            let known = {
                let watched = self.lock();
                let Some(known) = watched.get(&head.id) else {
                    continue;
                };
                (known.save.version, known.heard)
            };
            let news = if head.version > known.0 {
                versions_after(record, head.id, known.0).await?
            } else {
                Vec::new()
            };
            self.publish(&head, news, known);
        }
        Ok(())
    }

    fn publish(&self, head: &SaveVersion, news: Vec<Save>, (version, heard): (u64, (i64, i64))) {
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
            if save.state != watched.save.state {
                watched.standing = Standing::default();
            }
            save.progress = progress_of(&save, head.progress);
            let told = StreamEvent::Version {
                version: save.version,
                last: save.state.is_final(),
                text: text_of(&save, &watched.standing),
            };
            self.send(watched, told);
            watched.save = save;
        }
        if !changed && head.heard != heard {
            watched.save.progress = progress_of(&watched.save, head.progress);
            let text = text_of(&watched.save, &watched.standing);
            self.send(watched, StreamEvent::Progress(text));
        }
    }

    async fn poll_standings(&self, app: &App) {
        let open: Vec<Save> = self
            .lock()
            .values()
            .map(|watched| &watched.save)
            .filter(|save| !save.state.is_final())
            .cloned()
            .collect();
        let standings = standings(app, &open).await;
        let mut all = self.lock();
        for (id, standing) in standings {
            if let Some(watched) = all.get_mut(&id)
                && watched.standing != standing
                && !watched.save.state.is_final()
            {
                watched.standing = standing;
                let text = text_of(&watched.save, &watched.standing);
                self.send(watched, StreamEvent::Progress(text));
            }
        }
    }
}

/// Returns the progress unless the save is queued; the record may then still have the progress of an earlier attempt.
fn progress_of(save: &Save, progress: Option<Progress>) -> Option<Progress> {
    progress.filter(|_| save.state != State::Queued)
}

/// Returns every version after `version`, or only the newest if the others are no longer kept.
async fn versions_after(
    record: &Record,
    id: JobId,
    version: u64,
) -> Result<Vec<Save>, record::Error> {
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
    receiver: broadcast::Receiver<Arc<StreamEvent>>,
    /// The version that was sent last.
    sent: u64,
    /// Versions to send before waiting for new events.
    backlog: std::collections::VecDeque<Save>,
    done: bool,
    /// The save as it was last sent, to repeat it when nothing changes.
    text: String,
    _counted: WatcherCount,
}

/// Counts a watcher, in total and against its user's limit, while it exists.
pub(super) struct WatcherCount {
    app: App,
    _one: CountGuard,
}

impl WatcherCount {
    /// Counts an event stream of this caller. Fails if the user has too many.
    pub(super) fn new(app: &App, caller: &Caller) -> Result<Self, Refusal> {
        let most = app.options.connections.streams_per_user;
        let user = caller.user.as_deref().unwrap_or(&caller.name);
        let one = app.streams.acquire(user, most).ok_or_else(|| {
            Refusal::too_many(
                format!("{most} event streams of this user are open; ask for the save itself"),
                REPEAT_INTERVAL.as_secs(),
            )
        })?;
        app.metrics.watchers(1);
        Ok(Self {
            app: app.clone(),
            _one: one,
        })
    }
}

impl Drop for WatcherCount {
    fn drop(&mut self) {
        self.app.metrics.watchers(-1);
    }
}

fn save_event(version: u64, text: &str) -> Event {
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
                self.text = text_of(&save, &Standing::default());
                return Some(save_event(self.sent, &self.text));
            }
            let told = tokio::select! {
                told = tokio::time::timeout(REPEAT_INTERVAL, self.receiver.recv()) => told,
                () = self.app.cancel.cancelled() => return None,
            };
            match told {
                Ok(Ok(told)) => match &*told {
                    StreamEvent::Version { version, .. } if *version <= self.sent => {}
                    StreamEvent::Version {
                        version,
                        last,
                        text,
                    } if *version == self.sent + 1 => {
                        self.sent = *version;
                        self.done = *last;
                        self.text.clone_from(text);
                        return Some(save_event(*version, text));
                    }
                    StreamEvent::Version { .. } => self.catch_up().await?,
                    StreamEvent::Progress(text) => {
                        self.text.clone_from(text);
                        return Some(Event::default().event("progress").data(text));
                    }
                },
                // Too slow, or removed by the hub: the record has the missed versions.
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

    /// Reads missed versions from the record. Returns `None` if the record does not respond; the client then
    /// reconnects.
    async fn catch_up(&mut self) -> Option<()> {
        let news = versions_after(&self.app.record, self.id, self.sent)
            .await
            .ok()?;
        self.backlog.extend(news);
        Some(())
    }
}

/// Streams the changes of a save as server-sent events until it has ended.
///
/// The event `save` (a save; the event's ID is its version) is sent for every change, and `progress` (a save) in
/// between.
#[utoipa::path(
    get, path = "/api/v1/saves/{id}/events", tag = "saves",
    params(
        ("id" = JobId, Path),
        ("Last-Event-ID" = Option<u64>, Header, description = "The version that was heard last: what came after it follows")
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = super::api::StreamedEvent, description = "Events until the save has ended"),
        (status = 204, description = "It has ended, and that was heard: do not come again"),
        Refusal
    )
)]
pub(super) async fn events(
    Extracted(app): Extracted<App>,
    asking: StreamCaller,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let caller = &asking.caller;
    let seen = get(&app, caller, &id).await?;
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
    let counted = WatcherCount::new(&app, caller)?;
    // Subscribing before reading makes sure that no change in between is lost. A version that arrives twice is sent
    // once.
    let receiver = app.hub.subscribe(&seen);
    let now = get(&app, caller, &id).await?;
    let backlog = match heard {
        None => vec![now],
        // The version is higher than any in this record, so the client got it from somewhere else.
        Some(heard) if heard > now.version => vec![now],
        Some(heard) => versions_after(&app.record, now.id, heard).await?,
    };
    let sent = match heard {
        Some(heard) if backlog.first().is_none_or(|save| save.version > heard) => heard,
        _ => 0,
    };
    let watcher = Watcher {
        id: seen.id,
        receiver,
        sent,
        backlog: backlog.into(),
        done: false,
        text: text_of(&seen, &Standing::default()),
        _counted: counted,
        app,
    };
    let events = stream::unfold(watcher, |mut watcher| async move {
        let event = watcher.next().await?;
        Some((event, watcher))
    });
    Ok(response_of(asking, events))
}

/// Returns the response with these events, which end when the caller's credentials are not valid any more.
pub(super) fn response_of(
    caller: StreamCaller,
    events: impl stream::Stream<Item = Event> + Send + 'static,
) -> Response {
    let events = stream::unfold(
        (Box::pin(events), caller),
        |(mut events, mut caller)| async move {
            let event = events.next().await?;
            let valid = caller.is_valid().await;
            valid.then_some((Ok::<_, Infallible>(event), (events, caller)))
        },
    );
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would otherwise hold events back until its buffer is full.
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}
