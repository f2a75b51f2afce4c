//! The state of one connection, and the wrappers of its streams that keep the state up to date.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::{Closed, ConnectionLimits, Group};

/// Time without progress after which a connection may be replaced.
const STALL: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// Waiting for the head of a request.
    ReadingHead,
    /// Idle after a response.
    Idle,
    /// A request is being served.
    Serving,
}

struct State {
    activity: Activity,
    since: Instant,
    /// Since when the peer has not read what is written.
    write_blocked_since: Option<Instant>,
    /// Since when the rest of the request's body has been awaited.
    body_pending_since: Option<Instant>,
    ended: Option<Closed>,
}

/// The slot of a connection.
pub(in super::super) struct Slot {
    pub(super) number: u64,
    pub(super) group: Group,
    state: Mutex<State>,
    close: Notify,
}

impl Slot {
    pub(super) fn new(number: u64, group: Group, now: Instant) -> Self {
        Self {
            number,
            group,
            state: Mutex::new(State {
                activity: Activity::ReadingHead,
                since: now,
                write_blocked_since: None,
                body_pending_since: None,
                ended: None,
            }),
            close: Notify::new(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns since when the connection has had no request or an incomplete one, or has not read its response; `None`
    /// while it is being served.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.lock();
        match state.activity {
            // A short delay does not count.
            Activity::Serving => state
                .write_blocked_since
                .into_iter()
                .chain(state.body_pending_since)
                .min()
                .filter(|since| since.elapsed() >= STALL),
            _ => Some(state.since),
        }
    }

    /// Returns why the connection has to be closed at `now`, if it exceeds a limit.
    pub(super) fn late(&self, limits: &ConnectionLimits, now: Instant) -> Option<Closed> {
        let state = self.lock();
        let past = |since: Instant, most| now.saturating_duration_since(since) >= most;
        if state
            .write_blocked_since
            .is_some_and(|since| past(since, limits.write))
        {
            return Some(Closed::Write);
        }
        match state.activity {
            Activity::ReadingHead if past(state.since, limits.head) => Some(Closed::Head),
            Activity::Idle if past(state.since, limits.idle) => Some(Closed::Idle),
            _ => None,
        }
    }

    /// Causes the connection to be closed.
    pub(super) fn end(&self, why: Closed) {
        self.lock().ended.get_or_insert(why);
        self.close.notify_one();
    }

    /// Returns why the connection has to be closed, if it does.
    pub(super) fn ended(&self) -> Option<Closed> {
        self.lock().ended
    }

    /// Waits until the connection has to be closed.
    pub(super) async fn closed(&self) {
        self.close.notified().await;
    }

    /// Records that bytes have arrived.
    pub(super) fn read(&self, bytes: usize, now: Instant) {
        let mut state = self.lock();
        if bytes > 0 && state.activity == Activity::Idle {
            state.activity = Activity::ReadingHead;
            state.since = now;
        }
    }

    /// Records whether the peer has read something.
    pub(super) fn wrote(&self, some: bool, now: Instant) {
        let mut state = self.lock();
        if some {
            state.write_blocked_since = None;
        } else {
            state.write_blocked_since.get_or_insert(now);
        }
    }

    /// Records whether the rest of a request is still awaited.
    fn body_pending(&self, more: bool, now: Instant) {
        let mut state = self.lock();
        if more {
            state.body_pending_since.get_or_insert(now);
        } else {
            state.body_pending_since = None;
        }
    }

    /// Records that a complete head has arrived. The request counts as being served until the returned guard is
    /// dropped.
    pub(super) fn work(self: &Arc<Self>) -> ServingGuard {
        self.lock().activity = Activity::Serving;
        ServingGuard(self.clone())
    }
}

/// Guard of a request that is being served.
pub(super) struct ServingGuard(Arc<Slot>);

impl Drop for ServingGuard {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.activity = Activity::Idle;
        state.since = Instant::now();
    }
}

/// A stream that reports its reads and writes to the slot.
pub(super) struct TrackedStream<S> {
    stream: S,
    slot: Arc<Slot>,
}

impl<S> TrackedStream<S> {
    pub(super) fn new(stream: S, slot: Arc<Slot>) -> Self {
        Self { stream, slot }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TrackedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if polled.is_ready() {
            let bytes = buffer.filled().len() - before;
            self.slot.read(bytes, Instant::now());
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> TrackedStream<S> {
    fn record_write<T>(&self, polled: Poll<T>) -> Poll<T> {
        self.slot.wrote(polled.is_ready(), Instant::now());
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TrackedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.record_write(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.record_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A request's body. Single pieces do not count as progress: the request is complete only when the body ends.
pub(super) struct RequestBody {
    body: Body,
    slot: Arc<Slot>,
}

impl RequestBody {
    pub(super) fn new(body: Body, slot: Arc<Slot>) -> Self {
        Self { body, slot }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.slot.body_pending(false, Instant::now());
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        let more = !matches!(polled, Poll::Ready(None | Some(Err(_))));
        self.slot
            .body_pending(more && !self.body.is_end_stream(), Instant::now());
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body. The request counts as being served until it ends.
pub(super) struct ResponseBody {
    body: Body,
    _working: ServingGuard,
}

impl ResponseBody {
    pub(super) fn new(body: Body, working: ServingGuard) -> Self {
        Self {
            body,
            _working: working,
        }
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
