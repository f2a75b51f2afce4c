//! Sending a blob whose digest is known only at its end: one POST, one streaming PATCH, one empty PUT.
//!
//! Format: distribution-spec "Pushing a blob in chunks". Why in one PATCH, and why nothing goes with the PUT: Harbor takes
//! the PUT's length for the blob's, and many PATCHes are slow everywhere.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Url;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::error::{Error, Request, Step};
use super::host::Call;
use super::{Repository, check_digest_header};
use crate::digest::Digest;

/// Pieces that wait between the thread that makes them and the connection: enough that neither waits for the other's
/// jitter, few enough that memory is bounded by the caller's piece size.
const PIECES_IN_FLIGHT: usize = 8;
/// A registry reads a blob again at its end (S3 storage copies it): it gets one second more for so many bytes.
const FINISH_BYTES_PER_SECOND: u64 = 16 << 20;
/// Tidying up is worth no more than this.
const CANCEL_WAIT: Duration = Duration::from_secs(5);

enum Piece {
    Bytes(Bytes),
    /// Nothing is missing. A channel that closes without it is an upload that was given up.
    End,
}

/// A blob on its way into a registry. Dropped before [`Writer::finish`], the upload is cancelled.
pub struct Writer {
    repository: Repository,
    handle: Handle,
    pieces: Option<mpsc::Sender<Piece>>,
    task: Option<JoinHandle<Result<Session, Error>>>,
    sent: u64,
}

/// An upload that the registry has opened.
#[derive(Debug)]
struct Session {
    /// Where the next request goes, with all of its query (`_state`).
    url: Url,
}

impl Writer {
    pub(super) fn begin(repository: Repository, handle: Handle) -> Self {
        let (pieces, taken) = mpsc::channel(PIECES_IN_FLIGHT);
        let task = handle.spawn(stream(repository.clone(), taken));
        Self {
            repository,
            handle,
            pieces: Some(pieces),
            task: Some(task),
            sent: 0,
        }
    }

    /// Hands bytes over, waiting while the connection is behind. For plain threads: within a runtime it panics, as all
    /// of tokio's blocking calls do.
    ///
    /// An error is the upload's own. Where it is retryable, the blob has to be made and sent again from its start.
    pub fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let length = bytes.len() as u64;
        let pieces = self.pieces.as_ref().ok_or(Error::Abandoned)?;
        if pieces.blocking_send(Piece::Bytes(bytes)).is_ok() {
            self.sent += length;
            return Ok(());
        }
        // The other side has ended: why, it says itself.
        self.pieces = None;
        let task = self.task.take().ok_or(Error::Abandoned)?;
        match self.handle.block_on(task) {
            Ok(Err(e)) => Err(e),
            Ok(Ok(_)) | Err(_) => Err(Error::Abandoned),
        }
    }

    /// Ends the blob: it is there under `digest` when this returns. `size` is checked against what was written.
    pub async fn finish(mut self, digest: &Digest, size: u64) -> Result<(), Error> {
        if self.sent != size {
            return Err(Error::Size {
                what: "the blob that was written".to_owned(),
                expected: size,
                found: self.sent,
            });
        }
        let (pieces, task) = self
            .pieces
            .take()
            .zip(self.task.take())
            .ok_or(Error::Abandoned)?;
        // Refused only when the task has ended, and then the task says why.
        let _ = pieces.send(Piece::End).await;
        drop(pieces);
        let session = task.await.map_err(|_| Error::Abandoned)??;
        close(&self.repository, &session, digest, size)
            .await
            .map_err(Error::in_mid_upload)
    }

    /// Waits until the registry has confirmed every byte, then gives the blob up: what an upload costs can be measured
    /// without leaving one behind. Returns when the registry had confirmed.
    pub async fn rehearse(mut self) -> Result<Instant, Error> {
        let (pieces, task) = self
            .pieces
            .take()
            .zip(self.task.take())
            .ok_or(Error::Abandoned)?;
        // Refused only when the task has ended, and then the task says why.
        let _ = pieces.send(Piece::End).await;
        drop(pieces);
        let session = task.await.map_err(|_| Error::Abandoned)??;
        let confirmed = Instant::now();
        cancel(&self.repository, &session).await;
        Ok(confirmed)
    }

    /// Gives the blob up and waits until the registry was told.
    pub async fn abort(mut self) {
        self.pieces = None;
        if let Some(task) = self.task.take() {
            let _ = tokio::time::timeout(2 * CANCEL_WAIT, task).await;
        }
    }
}

/// Sends a blob that is in memory: what fails is sent again as a whole.
pub(super) async fn send_bytes(
    repository: &Repository,
    bytes: Bytes,
    digest: &Digest,
) -> Result<(), Error> {
    let mut failed = 0;
    loop {
        let error = match try_send_bytes(repository, bytes.clone(), digest).await {
            Ok(()) => return Ok(()),
            Err(e) => e,
        };
        failed += 1;
        let retry = repository.host.retry();
        let lost_session =
            matches!(&error, Error::Reply(reply) if reply.mid_upload) && error.retryable();
        let pause = match retry.pause(failed, &error) {
            None if lost_session && failed < retry.tries => Some(retry.first_pause),
            other => other,
        };
        let Some(pause) = pause else {
            return Err(error);
        };
        tokio::time::sleep(pause).await;
    }
}

async fn try_send_bytes(
    repository: &Repository,
    bytes: Bytes,
    digest: &Digest,
) -> Result<(), Error> {
    let session = open(repository).await?;
    let size = bytes.len() as u64;
    let mut call = repository.call(Step::SendBlob, Method::PATCH, session.url.clone());
    call.headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    call.body = bytes;
    let sent = async {
        let response = repository.host.attempt(&call).await?;
        let session = next(repository, &call, &session, response.headers()).await?;
        close(repository, &session, digest, size).await
    };
    let result = sent.await.map_err(Error::in_mid_upload);
    if result.is_err() {
        cancel(repository, &session).await;
    }
    result
}

/// Opens an upload and cancels it: one may push here.
pub(super) async fn probe(repository: &Repository) -> Result<(), Error> {
    let session = open(repository).await?;
    cancel(repository, &session).await;
    Ok(())
}

async fn open(repository: &Repository) -> Result<Session, Error> {
    let url = repository.url("blobs/uploads/").await?;
    let call = repository.call(Step::BeginUpload, Method::POST, url);
    let response = repository.host.call(&call).await?;
    let request = Request::new(&call.method, &call.url);
    let url = repository
        .host
        .own_location(&request, &call.url, response.headers())
        .await?;
    Ok(Session { url })
}

/// The upload after an answer that may name a new address for it.
async fn next(
    repository: &Repository,
    call: &Call,
    session: &Session,
    headers: &HeaderMap,
) -> Result<Session, Error> {
    if !headers.contains_key(http::header::LOCATION) {
        return Ok(Session {
            url: session.url.clone(),
        });
    }
    let request = Request::new(&call.method, &call.url);
    let url = repository
        .host
        .own_location(&request, &call.url, headers)
        .await?;
    Ok(Session { url })
}

/// Tells the registry that an upload will not go on. It would find out by itself, in a week.
pub(super) async fn cancel_at(repository: &Repository, url: Url) {
    let mut call = repository.call(Step::BeginUpload, Method::DELETE, url);
    call.wait = CANCEL_WAIT;
    if let Err(e) = repository.host.attempt(&call).await {
        tracing::debug!(registry.error = %e, "an upload could not be cancelled");
    }
}

async fn cancel(repository: &Repository, session: &Session) {
    cancel_at(repository, session.url.clone()).await;
}

/// What the stream last did, for telling a connection that does not move from a caller who makes no bytes.
struct Movement {
    started: Instant,
    /// Milliseconds after `started` at which the connection last took something; [`Movement::IDLE`] while it would take
    /// more and there is none.
    taken: AtomicU64,
}

impl Movement {
    const IDLE: u64 = u64::MAX;

    fn note(&self, idle: bool) {
        let now = if idle {
            Self::IDLE
        } else {
            self.started.elapsed().as_millis() as u64
        };
        self.taken.store(now, Ordering::Relaxed);
    }

    /// Returns when the connection has not moved for `silence` though it could.
    async fn stalled(&self, silence: Duration) {
        loop {
            tokio::time::sleep((silence / 10).max(Duration::from_millis(10))).await;
            let taken = self.taken.load(Ordering::Relaxed);
            if taken != Self::IDLE
                && self.started.elapsed() > Duration::from_millis(taken) + silence
            {
                return;
            }
        }
    }
}

/// POST and the one PATCH.
async fn stream(
    repository: Repository,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<Session, Error> {
    let session = open(&repository).await?;
    let movement = Arc::new(Movement {
        started: Instant::now(),
        taken: AtomicU64::new(0),
    });
    let watched = Arc::clone(&movement);
    let mut ended = false;
    let body = futures_util::stream::poll_fn(move |context| {
        if ended {
            return Poll::Ready(None);
        }
        let polled = pieces.poll_recv(context);
        watched.note(polled.is_pending());
        match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Piece::Bytes(bytes))) => Poll::Ready(Some(Ok(bytes))),
            Poll::Ready(Some(Piece::End)) => {
                ended = true;
                Poll::Ready(None)
            }
            Poll::Ready(None) => {
                ended = true;
                Poll::Ready(Some(Err(io::Error::other("the blob was given up"))))
            }
        }
    });
    let result = patch(
        &repository,
        &session,
        reqwest::Body::wrap_stream(body),
        &movement,
    )
    .await;
    if result.is_err() {
        cancel(&repository, &session).await;
    }
    result.map_err(Error::in_mid_upload)
}

async fn patch(
    repository: &Repository,
    session: &Session,
    body: reqwest::Body,
    movement: &Movement,
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
        () = movement.stalled(host.silence()) => {
            return Err(Error::Silent { request, after: host.silence() });
        }
    };
    if response.status() == StatusCode::UNAUTHORIZED {
        // The POST went through a moment ago, so it is the token's age. The next try gets a new one.
        host.forget_token(&call.scopes).await;
    }
    let response = host.judge(&call, response).await?;
    if response.status().is_redirection() {
        return Err(Error::LeadsAway {
            request,
            to: "another address".to_owned(),
            why: "a stream cannot be sent twice",
        });
    }
    next(repository, &call, session, response.headers()).await
}

/// The empty PUT. Where its answer is lost, the blob itself is asked for.
async fn close(
    repository: &Repository,
    session: &Session,
    digest: &Digest,
    size: u64,
) -> Result<(), Error> {
    let mut url = session.url.clone();
    let query = match url.query() {
        Some(query) if !query.is_empty() => format!("{query}&digest={digest}"),
        _ => format!("digest={digest}"),
    };
    url.set_query(Some(&query));
    let mut call = repository.call(Step::FinishBlob, Method::PUT, url);
    call.headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    call.wait += Duration::from_secs(size / FINISH_BYTES_PER_SECOND);
    let retry = repository.host.retry();
    let mut failed = 0;
    loop {
        let error = match repository.host.attempt(&call).await {
            Ok(response) => return check_digest_header(&call, response.headers(), digest),
            Err(e) => e,
        };
        failed += 1;
        let lost = error.not_found() && failed > 1;
        let pause = retry.pause(failed, &error);
        if pause.is_none() && !lost {
            return Err(error);
        }
        // An answer was lost before: the blob may be there, and the upload gone for that reason.
        if let Ok(Some(found)) = repository.head_blob(digest).await
            && found == size
        {
            return Ok(());
        }
        let Some(pause) = pause else {
            return Err(error);
        };
        tokio::time::sleep(pause).await;
    }
}
