//! The requests of an upload session beside those that carry data: POST opens it, GET returns how far it is, PUT closes
//! it, DELETE cancels it.
//!
//! Format: distribution-spec "Pushing a blob in chunks".

use std::time::Duration;

use http::header::{CONTENT_TYPE, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Url;

use super::error::{Error, Request, Step};
use super::host::Call;
use super::{Repository, check_digest_header};
use crate::common::digest::Digest;

/// A registry reads a blob again when the upload is closed (S3 storage copies it). The timeout grows by one second for
/// this many bytes.
const FINISH_BYTES_PER_SECOND: u64 = 16 << 20;
/// Maximum time spent on cancelling an upload.
pub(super) const CANCEL_WAIT: Duration = Duration::from_secs(5);

/// An upload session that the registry has opened.
#[derive(Clone, Debug)]
pub(super) struct Session {
    /// URL of the next request, including its whole query (`_state`).
    pub(super) url: Url,
}

/// Checks the permission to push by opening an upload and cancelling it.
pub(super) async fn probe(repository: &Repository) -> Result<(), Error> {
    let session = open(repository, &mut 0).await?;
    cancel(repository, &session).await;
    Ok(())
}

/// Opens a session, and takes note of the shortest chunk that the registry accepts.
pub(super) async fn open(repository: &Repository, failed: &mut u32) -> Result<Session, Error> {
    let url = repository.url("blobs/uploads/").await?;
    let call = repository.call(Step::BeginUpload, Method::POST, url);
    let response = repository.host.call_after(&call, failed).await?;
    let request = Request::new(&call.method, &call.url);
    let least = response.headers().get("oci-chunk-min-length");
    if let Some(least) = least.and_then(|v| v.to_str().ok()?.parse().ok()) {
        repository.host.set_min_chunk_size(least);
    }
    let url = repository
        .host
        .resolve_location(&request, &call.url, response.headers())
        .await?;
    Ok(Session { url })
}

/// Returns the session after an answer, which may name a new URL for it.
pub(super) async fn next(
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
        .resolve_location(&request, &call.url, headers)
        .await?;
    Ok(Session { url })
}

/// Cancels an upload session. Otherwise the registry removes it by itself after about a week.
pub(super) async fn cancel_at(repository: &Repository, url: Url) {
    let mut call = repository.call(Step::BeginUpload, Method::DELETE, url);
    call.wait = CANCEL_WAIT;
    if let Err(e) = repository.host.attempt(&call).await {
        tracing::debug!(registry.error = %e, "an upload could not be cancelled");
    }
}

pub(super) async fn cancel(repository: &Repository, session: &Session) {
    cancel_at(repository, session.url.clone()).await;
}

/// Returns how many bytes of an upload the registry has, and the session to resume it. Returns `None` if it has none,
/// does not report them, or reports an impossible range; the blob then starts over.
///
/// Format: distribution-spec "Pushing a blob in chunks", `GET` on the session: 204 with `Range: 0-LAST`.
pub(super) async fn status(
    repository: &Repository,
    session: &Session,
    sent_up_to: u64,
) -> Option<(Session, u64)> {
    let mut call = repository.call(Step::SendBlob, Method::GET, session.url.clone());
    call.accept = &[404];
    let response = repository.host.attempt(&call).await.ok()?;
    if response.status() != StatusCode::NO_CONTENT {
        return None;
    }
    let range = response.headers().get(RANGE)?.to_str().ok()?;
    let last: u64 = range
        .strip_prefix("bytes=")
        .unwrap_or(range)
        .strip_prefix("0-")?
        .parse()
        .ok()?;
    // Registries send 0-0 both for one byte and for none.
    if last == 0 || last >= sent_up_to {
        return None;
    }
    let session = next(repository, &call, session, response.headers())
        .await
        .ok()?;
    Some((session, last + 1))
}

/// Sends the empty PUT. If its answer is lost, the blob itself is looked up.
pub(super) async fn close(
    repository: &Repository,
    session: &Session,
    digest: &Digest,
    size: u64,
    failed: &mut u32,
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
    let mut asked = 0;
    loop {
        let error = match repository.host.attempt(&call).await {
            Ok(response) => {
                let Err(e) = check_digest_header(&call, response.headers(), digest) else {
                    return Ok(());
                };
                // If the answer has another digest, the registry is queried for the blob.
                return match repository.head_blob(digest).await {
                    Ok(Some(found)) if found == size => Ok(()),
                    _ => Err(e),
                };
            }
            Err(e) => e,
        };
        (*failed, asked) = (*failed + 1, asked + 1);
        let lost = error.not_found() && asked > 1;
        if !error.is_transient() && !lost {
            return Err(error);
        }
        // An earlier answer may have been lost, so the blob may exist and its session may be gone for that reason.
        if let Ok(Some(found)) = repository.head_blob(digest).await
            && found == size
        {
            return Ok(());
        }
        let pause = repository.host.pause(*failed, &error).ok_or(error)?;
        tokio::time::sleep(pause).await;
    }
}
