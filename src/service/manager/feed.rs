//! One event stream for a page: all open saves of a user. However many saves there are, a page needs one connection and
//! no further requests.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::extract::State as Extracted;
use axum::response::Response;
use axum::response::sse::Event;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::events::{REPEAT_INTERVAL, StreamEvent, WatcherCount, response_of, text_of};
use super::extract::{QueryParams, StreamCaller};
use super::refusal::Refusal;
use super::standing::standings;
use crate::service::job::JobId;
use crate::service::record::{self, Filter};

/// Maximum number of open saves that a stream begins with.
const MAX_OPEN: u32 = 1000;

/// The event `open`: the open saves. A save that a page knows as open and that is not in the list has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct OpenSaves {
    /// Their IDs.
    pub(super) saves: Vec<JobId>,
}

/// Selects the saves of a stream.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Followed {
    /// For administrators: only saves of this user.
    user: Option<String>,
}

/// A page that follows saves.
struct Follower {
    app: App,
    user: Option<String>,
    receiver: broadcast::Receiver<Arc<StreamEvent>>,
    backlog: VecDeque<Event>,
    _counted: WatcherCount,
}

impl Follower {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.backlog.pop_front() {
                return Some(event);
            }
            let told = tokio::select! {
                told = tokio::time::timeout(REPEAT_INTERVAL, self.receiver.recv()) => told,
                () = self.app.cancel.cancelled() => return None,
            };
            match told {
                Ok(Ok(told)) => match &*told {
                    StreamEvent::Version { text, .. } => {
                        return Some(Event::default().event("save").data(text));
                    }
                    StreamEvent::Progress(text) => {
                        return Some(Event::default().event("progress").data(text));
                    }
                },
                // Too slow: everything is told anew.
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => self.tell_all().await.ok()?,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    self.receiver = self.app.hub.subscribe_to_user(self.user.as_deref());
                    self.tell_all().await.ok()?;
                }
                Err(_) => self.tell_open().await.ok()?,
            }
        }
    }

    /// Adds all open saves to the backlog, and the list of them.
    async fn tell_all(&mut self) -> Result<(), record::Error> {
        let filter = Filter {
            user: self.user.clone(),
            open: true,
            ..Filter::default()
        };
        let saves = self.app.record.history(&filter, MAX_OPEN).await?;
        // From now on, so that the end of a quick one is heard, too.
        self.app.hub.watch(&saves);
        let mut standings = standings(&self.app, &saves).await;
        for save in &saves {
            let standing = standings.remove(&save.id).unwrap_or_default();
            let text = text_of(save, &standing);
            self.backlog
                .push_back(Event::default().event("save").data(text));
        }
        self.list(saves.iter().map(|save| save.id).collect());
        Ok(())
    }

    async fn tell_open(&mut self) -> Result<(), record::Error> {
        let all = self.app.record.open_saves_of_users().await?;
        let own = all
            .into_iter()
            .filter(|(_, user)| self.user.as_ref().is_none_or(|of| of == user));
        self.list(own.map(|(id, _)| id).take(MAX_OPEN as usize).collect());
        Ok(())
    }

    fn list(&mut self, saves: Vec<JobId>) {
        // A list of texts can always be serialized.
        let text = serde_json::to_string(&OpenSaves { saves }).unwrap_or_default();
        self.backlog
            .push_back(Event::default().event("open").data(text));
    }
}

/// Streams the changes of all open saves of the caller as server-sent events, until the client disconnects.
///
/// The stream begins with an event `save` (a save) for each open save. `save` follows for every change and for every
/// new save, `progress` (a save) in between, and every 8 s at the latest `open` (`{"saves": [IDs]}`), the list of the
/// open saves. Unlike the stream of one save, it needs the page's key where a cookie authenticates.
#[utoipa::path(
    get, path = "/api/v1/events", operation_id = "all_events", tag = "saves", params(Followed),
    responses(
        (status = 200, content_type = "text/event-stream", body = super::api::StreamedEvent, description = "Events without an end"),
        Refusal
    )
)]
pub(super) async fn events(
    Extracted(app): Extracted<App>,
    caller: StreamCaller,
    QueryParams(asked): QueryParams<Followed>,
) -> Result<Response, Refusal> {
    let user = caller.caller.listed_user(asked.user.as_deref())?;
    let counted = WatcherCount::new(&app, &caller.caller)?;
    // Subscribing before reading makes sure that no change in between is lost.
    let mut follower = Follower {
        receiver: app.hub.subscribe_to_user(user.as_deref()),
        backlog: VecDeque::new(),
        user,
        app,
        _counted: counted,
    };
    follower.tell_all().await?;
    let events = stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((event, follower))
    });
    Ok(response_of(caller, events))
}
