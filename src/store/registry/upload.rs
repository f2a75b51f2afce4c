//! Uploads a blob whose digest is known only at its end: one POST, one streaming PATCH, one empty PUT.
//!
//! Format: distribution-spec "Pushing a blob in chunks". A single PATCH is used because many PATCHes are slow on all
//! registries. The PUT carries no data because Harbor takes the length of the PUT for that of the blob.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE};
use http::{HeaderValue, Method, StatusCode};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Repository;
use super::error::{Error, Request, Step};
use super::host::{Call, Host, SILENCE};
use super::session::{self, Session};
use crate::common::digest::Digest;

/// Number of pieces queued between the thread that produces them and the connection: enough to absorb jitter on either
/// side, and few enough that memory is bounded by the caller's piece size.
const PIECES_IN_FLIGHT: usize = 8;
/// Bytes per request to a registry that requires `Content-Length`. A chunk is held in memory.
const CHUNK_SIZE: usize = 16 << 20;
/// The slowest transfer rate for which the timeout of a chunk allows.
const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
enum Piece {
    Bytes(Bytes),
    /// The blob is complete. A channel that is closed without it means that the upload was abandoned.
    End,
}

/// An upload of a blob to a registry. It is cancelled if the writer is dropped before [`Writer::finish`].
///
/// After a transient failure, [`Writer::retry`] returns a writer that continues where the registry can, and starts over
/// where it cannot. In either case the caller writes the same bytes from their start.
pub struct Writer {
    repository: Repository,
    handle: Handle,
    pieces: Option<mpsc::Sender<Piece>>,
    task: Option<JoinHandle<StreamResult>>,
    /// Bytes written.
    written: u64,
    /// Bytes at the front that the registry has received from an earlier writer.
    skip: u64,
    /// Highest offset in the blob up to which this and earlier writers have handed over bytes.
    sent_up_to: u64,
    /// The upload session after a failure, if the registry may still know it.
    failed_session: Option<Session>,
    /// Number of failed requests for this blob.
    failed: u32,
}

/// The result of a stream.
struct StreamResult {
    /// The session to close, or to resume after an error.
    session: Option<Session>,
    failed: u32,
    error: Option<Error>,
}

impl Writer {
    pub(super) fn begin(repository: Repository, handle: Handle) -> Self {
        Self::start(repository, handle, None, 0)
    }

    fn start(
        repository: Repository,
        handle: Handle,
        resumed: Option<(Session, u64)>,
        failed: u32,
    ) -> Self {
        let (session, skip) = resumed.unzip();
        let (pieces, taken) = mpsc::channel(PIECES_IN_FLIGHT);
        let resumed = session.zip(skip);
        let task = handle.spawn(stream(repository.clone(), taken, resumed, failed));
        Self {
            repository,
            handle,
            pieces: Some(pieces),
            task: Some(task),
            written: 0,
            skip: skip.unwrap_or(0),
            sent_up_to: skip.unwrap_or(0),
            failed_session: None,
            failed,
        }
    }

    /// Returns the repository that the blob is uploaded to.
    pub(crate) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Returns the runtime that sends.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Hands bytes over, blocking while the connection is behind. Panics within an async runtime, as all blocking calls
    /// of tokio do.
    ///
    /// An error is that of the upload. If it is retryable, a new writer has to be obtained from [`Writer::retry`].
    pub fn write(&mut self, mut bytes: Bytes) -> Result<(), Error> {
        let known = self
            .skip
            .saturating_sub(self.written)
            .min(bytes.len() as u64);
        self.written += bytes.len() as u64;
        bytes.advance(known as usize);
        if bytes.is_empty() {
            return Ok(());
        }
        let pieces = self.pieces.as_ref().ok_or(Error::Abandoned)?;
        if pieces.blocking_send(Piece::Bytes(bytes)).is_ok() {
            self.sent_up_to = self.sent_up_to.max(self.written);
            return Ok(());
        }
        // The receiver is closed, so the task has ended and its result has the error.
        self.pieces = None;
        let task = self.task.take().ok_or(Error::Abandoned)?;
        let outcome = self.handle.block_on(task).map_err(|_| Error::Abandoned)?;
        Err(self
            .absorb_result(outcome)
            .err()
            .unwrap_or(Error::Abandoned))
    }

    /// Takes over the result of a stream.
    fn absorb_result(&mut self, outcome: StreamResult) -> Result<Session, Error> {
        self.failed = outcome.failed;
        match (outcome.error, outcome.session) {
            (None, Some(session)) => Ok(session),
            (Some(error), session) => {
                self.failed_session = session;
                Err(error)
            }
            (None, None) => Err(Error::Abandoned),
        }
    }

    /// Completes the blob. When this returns, the registry has it under `digest`. Fails if `size` differs from the
    /// number of bytes written.
    pub async fn finish(mut self, digest: &Digest, size: u64) -> Result<(), Error> {
        self.try_finish(digest, size).await
    }

    /// Like [`Writer::finish`], but keeps the writer, so that a failure can be followed by [`Writer::retry`].
    pub(crate) async fn try_finish(&mut self, digest: &Digest, size: u64) -> Result<(), Error> {
        if self.written != size {
            return Err(Error::Size {
                what: "the blob that was written".to_owned(),
                expected: size,
                found: self.written,
            });
        }
        let session = self.flush().await?;
        let closed =
            session::close(&self.repository, &session, digest, size, &mut self.failed).await;
        closed.map_err(|error| {
            let error = corrupt_upload(error).in_mid_upload();
            // Nothing can be resumed if the registry received wrong bytes.
            self.failed_session =
                (!matches!(error, Error::CorruptUpload { .. })).then_some(session);
            error
        })
    }

    /// Marks the end of the data and waits until the registry has received all of it.
    async fn flush(&mut self) -> Result<Session, Error> {
        let (pieces, task) = self
            .pieces
            .take()
            .zip(self.task.take())
            .ok_or(Error::Abandoned)?;
        // Sending fails only if the task has ended, and then its result has the error.
        let _ = pieces.send(Piece::End).await;
        drop(pieces);
        let outcome = task.await.map_err(|_| Error::Abandoned)?;
        self.absorb_result(outcome)
    }

    /// Returns a writer for another attempt after `error`, once the required pause is over. The same bytes have to be
    /// written to it from their start; those that the registry has kept (it is queried) are not sent again.
    ///
    /// Returns the error if another attempt is not worthwhile, or the retries of the blob or of the save are used up.
    pub(crate) async fn retry(mut self, error: Error) -> Result<Self, Error> {
        if self.pieces.take().is_some()
            && let Some(task) = self.task.take()
        {
            // The connection did not break; the caller has another reason to start again.
            let _ = task.await;
        }
        let host = &self.repository.host;
        let again = error.can_resend() && self.failed < host.retry().max_attempts;
        let pause = if again && self.needs_content_length(&error) {
            Some(Duration::ZERO)
        } else if again {
            host.pause(self.failed.max(1), &error)
                .or_else(|| host.pause_after_loss(self.failed.max(1), &error))
        } else {
            None
        };
        let Some(pause) = pause else {
            return Err(error);
        };
        tracing::debug!(registry.error = %error, registry.pause_ms = pause.as_millis() as u64, "the blob again");
        tokio::time::sleep(pause).await;
        let mut resumed = None;
        if let Some(session) = self.failed_session.take() {
            match session::status(&self.repository, &session, self.sent_up_to).await {
                Some(found) => resumed = Some(found),
                None => session::cancel(&self.repository, &session).await,
            }
        }
        let (repository, handle) = (self.repository.clone(), self.handle.clone());
        Ok(Self::start(repository, handle, resumed, self.failed))
    }

    /// Returns whether the registry has only requested a `Content-Length`, which requires no pause.
    fn needs_content_length(&self, error: &Error) -> bool {
        matches!(error, Error::Reply(reply) if reply.status == 411)
            && self.repository.host.requires_content_length()
    }

    /// Waits until the registry has confirmed every byte, then cancels the upload, so that its cost can be measured
    /// without leaving a blob behind. Returns the time of the confirmation.
    pub(crate) async fn finish_without_blob(mut self) -> Result<Instant, Error> {
        let session = self.flush().await?;
        let confirmed = Instant::now();
        session::cancel(&self.repository, &session).await;
        Ok(confirmed)
    }

    /// Cancels the upload and waits until the registry has been notified.
    pub(crate) async fn abort(mut self) {
        self.pieces = None;
        if let Some(task) = self.task.take() {
            let _ = tokio::time::timeout(2 * session::CANCEL_WAIT, task).await;
        }
        if let Some(session) = self.failed_session.take() {
            session::cancel(&self.repository, &session).await;
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(session) = self.failed_session.take() {
            let repository = self.repository.clone();
            self.handle
                .spawn(async move { session::cancel(&repository, &session).await });
        }
    }
}

/// Converts the registry's error for a blob that does not match its digest.
fn corrupt_upload(error: Error) -> Error {
    match error {
        Error::Reply(reply)
            if reply.status == 400 && reply.code.as_deref() == Some("DIGEST_INVALID") =>
        {
            Error::CorruptUpload {
                request: reply.request,
            }
        }
        other => other,
    }
}

/// Uploads a blob from memory. After a failure the whole blob is sent again.
pub(super) async fn send_bytes(
    repository: &Repository,
    bytes: Bytes,
    digest: &Digest,
) -> Result<(), Error> {
    let host = &repository.host;
    let mut failed = 0;
    loop {
        let error = match try_send_bytes(repository, bytes.clone(), digest, &mut failed).await {
            Ok(()) => return Ok(()),
            Err(e) => e,
        };
        failed = failed.max(1);
        let again = error.can_resend() && failed < host.retry().max_attempts;
        let pause = again.then(|| {
            host.pause(failed, &error)
                .or_else(|| host.pause_after_loss(failed, &error))
        });
        let Some(pause) = pause.flatten() else {
            return Err(error);
        };
        tokio::time::sleep(pause).await;
    }
}

async fn try_send_bytes(
    repository: &Repository,
    bytes: Bytes,
    digest: &Digest,
    failed: &mut u32,
) -> Result<(), Error> {
    let session = session::open(repository, failed).await?;
    let size = bytes.len() as u64;
    let call = chunk_request(repository, &session, bytes, 0);
    let sent = async {
        let response = repository
            .host
            .attempt(&call)
            .await
            .inspect_err(|_| *failed += 1)?;
        let session = session::next(repository, &call, &session, response.headers()).await?;
        session::close(repository, &session, digest, size, failed)
            .await
            .map_err(corrupt_upload)
    };
    let result = sent.await.map_err(Error::in_mid_upload);
    if result.is_err() {
        session::cancel(repository, &session).await;
    }
    result
}

/// The time of the last progress of a stream. It distinguishes a stalled connection from a caller that produces no
/// data.
struct StallDetector {
    started: Instant,
    /// Milliseconds from `started` until the connection last took data, or [`StallDetector::IDLE`] while it could take more
    /// and there is none.
    taken: AtomicU64,
}

impl StallDetector {
    const IDLE: u64 = u64::MAX;

    fn record(&self, idle: bool) {
        let now = if idle {
            Self::IDLE
        } else {
            self.started.elapsed().as_millis() as u64
        };
        self.taken.store(now, Ordering::Relaxed);
    }

    /// Returns once the connection has taken no data for the stall timeout although there was some, and shows before
    /// that that the registry is silent.
    async fn stalled(&self, host: &Host) {
        let stall_timeout = host.stall_timeout();
        let interval = (stall_timeout / 10).clamp(Duration::from_millis(10), SILENCE / 10);
        let mut waiting = None;
        loop {
            tokio::time::sleep(interval).await;
            let taken = self.taken.load(Ordering::Relaxed);
            let silent = match taken {
                Self::IDLE => Duration::ZERO,
                ms => self
                    .started
                    .elapsed()
                    .saturating_sub(Duration::from_millis(ms)),
            };
            if silent > stall_timeout {
                return;
            }
            waiting = (silent > SILENCE).then(|| waiting.take().unwrap_or_else(|| host.waiting()));
        }
    }
}

/// Sends POST, unless a session is resumed, and the single PATCH.
async fn stream(
    repository: Repository,
    mut pieces: mpsc::Receiver<Piece>,
    resumed: Option<(Session, u64)>,
    mut failed: u32,
) -> StreamResult {
    let (session, have) = match resumed {
        Some(resumed) => resumed,
        None => match session::open(&repository, &mut failed).await {
            Ok(session) => (session, 0),
            Err(error) => {
                let (session, error) = (None, Some(error));
                return StreamResult {
                    session,
                    failed,
                    error,
                };
            }
        },
    };
    if repository.host.requires_content_length() {
        let mut session = session;
        let sent = send_chunks(&repository, &mut session, &mut pieces, have, &mut failed).await;
        return stream_result(&repository, session, sent, failed).await;
    }
    let stall_detector = Arc::new(StallDetector {
        started: Instant::now(),
        taken: AtomicU64::new(0),
    });
    let given_up = Arc::new(AtomicBool::new(false));
    let (watched, nobody_waits) = (Arc::clone(&stall_detector), Arc::clone(&given_up));
    let mut ended = false;
    let body = futures_util::stream::poll_fn(move |context| {
        if ended {
            return Poll::Ready(None);
        }
        let polled = pieces.poll_recv(context);
        watched.record(polled.is_pending());
        match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Piece::Bytes(bytes))) => Poll::Ready(Some(Ok(bytes))),
            Poll::Ready(Some(Piece::End)) => {
                ended = true;
                Poll::Ready(None)
            }
            Poll::Ready(None) => {
                ended = true;
                nobody_waits.store(true, Ordering::Relaxed);
                Poll::Ready(Some(Err(io::Error::other("the blob was given up"))))
            }
        }
    });
    let body = reqwest::Body::wrap_stream(body);
    let sent = patch(&repository, &session, body, &stall_detector).await;
    let (session, sent) = match sent {
        Ok(next) => (next, Ok(())),
        Err(_) if given_up.load(Ordering::Relaxed) => (session, Err(Error::Abandoned)),
        Err(error) => {
            if matches!(&error, Error::Reply(reply) if reply.status == 411) {
                repository.host.set_requires_content_length();
            }
            failed += 1;
            (session, Err(error))
        }
    };
    stream_result(&repository, session, sent, failed).await
}

/// Determines the result of a stream: the session to close or to resume. If there is neither, the upload is cancelled.
async fn stream_result(
    repository: &Repository,
    session: Session,
    sent: Result<(), Error>,
    failed: u32,
) -> StreamResult {
    let error = sent.err().map(Error::in_mid_upload);
    let goes_on = error.as_ref().is_none_or(Error::can_resend);
    if !goes_on {
        session::cancel(repository, &session).await;
    }
    StreamResult {
        session: goes_on.then_some(session),
        failed,
        error,
    }
}

/// Sends the blob in chunks of known size, each with its `Content-Range`, to a registry that requires `Content-Length`.
/// A chunk that fails is still in memory and is sent again.
async fn send_chunks(
    repository: &Repository,
    session: &mut Session,
    pieces: &mut mpsc::Receiver<Piece>,
    mut at: u64,
    failed: &mut u32,
) -> Result<(), Error> {
    let host = &repository.host;
    let size = usize::try_from(host.min_chunk_size())
        .unwrap_or(CHUNK_SIZE)
        .clamp(CHUNK_SIZE, 8 * CHUNK_SIZE);
    let mut ended = false;
    while !ended {
        let mut chunk = BytesMut::new();
        while chunk.len() < size && !ended {
            match pieces.recv().await {
                Some(Piece::Bytes(bytes)) => chunk.extend_from_slice(&bytes),
                Some(Piece::End) => ended = true,
                None => return Err(Error::Abandoned),
            }
        }
        if chunk.is_empty() {
            break;
        }
        let end = at + chunk.len() as u64;
        let chunk = chunk.freeze();
        loop {
            let call = chunk_request(repository, session, chunk.clone(), at);
            let error = match host.attempt(&call).await {
                Ok(response) => {
                    *session =
                        session::next(repository, &call, session, response.headers()).await?;
                    break;
                }
                Err(error) => error,
            };
            *failed += 1;
            let pause = host.pause(*failed, &error).ok_or(error)?;
            tokio::time::sleep(pause).await;
            // Possibly only the answer was lost.
            if let Some((found, has)) = session::status(repository, session, end + 1).await {
                *session = found;
                if has == end {
                    break;
                }
            }
        }
        at = end;
    }
    Ok(())
}

/// Returns a PATCH request for the bytes at offset `at`.
fn chunk_request(repository: &Repository, session: &Session, bytes: Bytes, at: u64) -> Call {
    let mut call = repository.call(Step::SendBlob, Method::PATCH, session.url.clone());
    let octets = HeaderValue::from_static("application/octet-stream");
    call.headers.insert(CONTENT_TYPE, octets);
    let range = format!("{at}-{}", (at + bytes.len() as u64).saturating_sub(1));
    if let Ok(range) = HeaderValue::from_str(&range)
        && !bytes.is_empty()
    {
        call.headers.insert(CONTENT_RANGE, range);
    }
    call.wait += Duration::from_secs(bytes.len() as u64 / MIN_BYTES_PER_SECOND);
    call.body = bytes;
    call
}

async fn patch(
    repository: &Repository,
    session: &Session,
    body: reqwest::Body,
    stall_detector: &StallDetector,
) -> Result<Session, Error> {
    let host = &repository.host;
    let call = repository.call(Step::SendBlob, Method::PATCH, session.url.clone());
    let request = Request::new(&call.method, &call.url);
    let (authorization, _) = host.authorization(&call.scopes).await?;
    let mut sending = host
        .client()
        .patch(call.url.clone())
        .header(CONTENT_TYPE, "application/octet-stream");
    if let Some(value) = authorization {
        sending = sending.header(AUTHORIZATION, value);
    }
    let response = tokio::select! {
        response = sending.body(body).send() => response.map_err(|e| Error::transport(request.clone(), &e))?,
        () = stall_detector.stalled(host) => return Err(host.timeout_error(request, host.stall_timeout())),
        () = tokio::time::sleep(host.remaining()) => return Err(host.timeout_error(request, host.stall_timeout())),
    };
    if response.status() == StatusCode::UNAUTHORIZED {
        // The POST succeeded a moment ago, so the token must have expired. The next attempt fetches a new one.
        host.forget_token(&call.scopes).await;
    }
    let response = host.check_status(&call, response).await?;
    if response.status().is_redirection() {
        return Err(Error::ForbiddenUrl {
            request,
            to: "another address".to_owned(),
            why: "a stream cannot be sent twice",
        });
    }
    session::next(repository, &call, session, response.headers()).await
}
