//! Sends requests to a registry host with retries, redirects and limits on what is read.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Client, Response, Url};

use super::Host;
use super::scopes::Scopes;
use crate::common::waits::{WaitReason, Waiting};
use crate::store::registry::error::{Error, Reply, Request, Step, read_error_body};
use crate::store::registry::retry::read_retry_after;

const MAX_ERROR_BODY: u64 = 64 << 10;
const MAX_REDIRECTS: usize = 5;
/// Time without an answer, or without taking data, after which a registry counts as silent.
pub(in crate::store::registry) const SILENCE: Duration = Duration::from_secs(10);

/// A request whose body is in memory, so that it can be repeated.
#[derive(Clone, Debug)]
pub(in crate::store::registry) struct Call {
    pub(in crate::store::registry) step: Step,
    pub(in crate::store::registry) method: Method,
    /// URL on this host; only path and query are used.
    pub(in crate::store::registry) url: Url,
    pub(in crate::store::registry) scopes: Scopes,
    pub(in crate::store::registry) headers: HeaderMap,
    pub(in crate::store::registry) body: Bytes,
    /// Timeout for the head of the answer.
    pub(in crate::store::registry) wait: Duration,
    pub(in crate::store::registry) max_attempts: u32,
    /// Maximum number of attempts if the status is 500, which some registries return for a manifest that they never
    /// accept.
    pub(in crate::store::registry) max_attempts_at_500: u32,
    /// Statuses besides 2xx that are not errors.
    pub(in crate::store::registry) accept: &'static [u16],
    /// The tag that is written, for errors.
    pub(in crate::store::registry) tag: Option<String>,
}

impl Host {
    /// Returns the pause before the next attempt after `failed` attempts. Returns `None` if the error is not transient,
    /// or if the attempts or the retry budget of the save are used up.
    pub(in crate::store::registry) fn pause(&self, failed: u32, error: &Error) -> Option<Duration> {
        let pause = self.settings.retry.pause(failed, error)?;
        self.settings.budget.take(pause).then_some(pause)
    }

    /// Like [`Host::pause`], for a blob whose upload session the registry has lost: the request is final, the blob is
    /// not.
    pub(in crate::store::registry) fn pause_after_loss(
        &self,
        failed: u32,
        error: &Error,
    ) -> Option<Duration> {
        if error.is_transient() || failed >= self.settings.retry.max_attempts {
            return None;
        }
        let pause = self.settings.retry.first_pause;
        self.settings.budget.take(pause).then_some(pause)
    }

    /// Returns the time left until the deadline of the save.
    pub(in crate::store::registry) fn remaining(&self) -> Duration {
        self.settings.budget.remaining()
    }

    /// Returns the error for a timeout: [`Error::Deadline`] if the save has used up its time, else [`Error::Stalled`].
    pub(in crate::store::registry) fn timeout_error(
        &self,
        request: Request,
        after: Duration,
    ) -> Error {
        if self.remaining().is_zero() {
            let after = self.settings.budget.total();
            Error::Deadline { request, after }
        } else {
            Error::Stalled { request, after }
        }
    }

    /// Sends a request, repeating it after transient errors.
    pub(in crate::store::registry) async fn call(&self, call: &Call) -> Result<Response, Error> {
        self.call_after(call, &mut 0).await
    }

    /// Like [`Host::call`], for a request that is part of an operation with `failed` failures so far; the counter is
    /// updated.
    pub(in crate::store::registry) async fn call_after(
        &self,
        call: &Call,
        failed: &mut u32,
    ) -> Result<Response, Error> {
        loop {
            let error = match self.attempt(call).await {
                Ok(response) => return Ok(response),
                Err(e) => e,
            };
            *failed += 1;
            let is_500 = matches!(&error, Error::Reply(reply) if reply.status == 500 && reply.step == call.step);
            let tries = if is_500 {
                call.max_attempts_at_500
            } else {
                call.max_attempts
            };
            let pause = (*failed < tries)
                .then(|| self.pause(*failed, &error))
                .flatten();
            let Some(pause) = pause else {
                return Err(error);
            };
            tracing::debug!(registry.error = %error, registry.pause_ms = pause.as_millis() as u64, "trying again");
            tokio::time::sleep(pause).await;
        }
    }

    /// Makes one attempt, following redirects.
    pub(in crate::store::registry) async fn attempt(&self, call: &Call) -> Result<Response, Error> {
        let origin = self.origin().await?;
        let mut url = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = if origin.is_same(&url) {
                self.authorized(call, &url).await?
            } else {
                // Redirects to storage behind a registry are signed URLs and must not get the credentials.
                self.send_once(&self.external_client, call, &url, None)
                    .await?
            };
            let response = self.check_status(call, response).await?;
            if !response.status().is_redirection()
                || call.accept.contains(&response.status().as_u16())
            {
                return Ok(response);
            }
            let request = Request::new(&call.method, &url);
            let to = response
                .headers()
                .get(LOCATION)
                .and_then(|v| v.to_str().ok());
            let Some(next) = to.and_then(|to| url.join(to).ok()) else {
                return Err(Error::ProtocolViolation {
                    request,
                    reason: "a redirect to nowhere".to_owned(),
                });
            };
            let away = |why| Error::ForbiddenUrl {
                request: request.clone(),
                to: Request::new(&call.method, &next).to_string(),
                why,
            };
            origin.check_url(&next).map_err(away)?;
            let reading = call.method == Method::GET || call.method == Method::HEAD;
            let keeps_method = matches!(response.status().as_u16(), 307 | 308);
            let stays = keeps_method && origin.is_same(&next);
            if !reading && !stays {
                return Err(away("what is written goes to the registry itself"));
            }
            url = next;
        }
        let request = Request::new(&call.method, &call.url);
        Err(Error::ProtocolViolation {
            request,
            reason: format!("more than {MAX_REDIRECTS} redirects"),
        })
    }

    /// Sends a request to the registry itself and repeats it once after a 401 that an expired token or a changed
    /// challenge may explain. It is repeated a second time only if the new token has expired in transit, too: some live
    /// only for seconds.
    async fn authorized(&self, call: &Call, url: &Url) -> Result<Response, Error> {
        let mut renewed = 0;
        loop {
            if call.step == Step::Api {
                let header = self.api_authorization(&call.scopes)?;
                return self
                    .send_once(&self.registry_client, call, url, header)
                    .await;
            }
            let (header, age) = self.authorization(&call.scopes).await?;
            let response = self
                .send_once(&self.registry_client, call, url, header)
                .await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            let now = Instant::now();
            let news = self.record_challenge(response.headers());
            let worth = match renewed {
                0 => news || age.is_some_and(|age| !age.is_fresh(now)),
                1 => age.is_some_and(|age| age.is_expired(now)),
                _ => false,
            };
            if !worth {
                return Ok(response);
            }
            self.forget_token(&call.scopes).await;
            renewed += 1;
        }
    }

    /// Waits for an answer, and shows that the save waits for the registry once that has taken [`SILENCE`].
    pub(in crate::store::registry) async fn watched<T>(
        &self,
        answer: impl Future<Output = T>,
    ) -> T {
        let mut answer = std::pin::pin!(answer);
        if let Ok(answered) = tokio::time::timeout(SILENCE, &mut answer).await {
            return answered;
        }
        let _waiting = self.waiting();
        answer.await
    }

    /// Shows that the save waits for the registry, until the value is dropped.
    pub(in crate::store::registry) fn waiting(&self) -> Waiting {
        self.settings.budget.waits().begin(WaitReason::Registry)
    }

    /// Sends a single request.
    pub(super) async fn send_once(
        &self,
        client: &Client,
        call: &Call,
        url: &Url,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Error> {
        let mut request = client
            .request(call.method.clone(), url.clone())
            .headers(call.headers.clone());
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value);
        }
        // Servers that require a length require it for an empty body too, and HTTP libraries leave it out.
        if call.body.is_empty() && !matches!(call.method, Method::GET | Method::HEAD) {
            request = request.header(CONTENT_LENGTH, 0);
        }
        let shown = || Request::new(&call.method, url);
        let wait = call.wait.min(self.remaining());
        let answer = tokio::time::timeout(wait, request.body(call.body.clone()).send());
        match self.watched(answer).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(Error::transport(shown(), &e)),
            Err(_) => Err(self.timeout_error(shown(), call.wait)),
        }
    }

    /// Returns the response, or the error that its status stands for. Redirects are returned as responses.
    pub(in crate::store::registry) async fn check_status(
        &self,
        call: &Call,
        response: Response,
    ) -> Result<Response, Error> {
        let status = response.status();
        if status.is_success() || status.is_redirection() || call.accept.contains(&status.as_u16())
        {
            return Ok(response);
        }
        let mut reply = reply_of(call, response).await;
        if matches!(reply.status, 401 | 403 | 405) {
            reply.credentials = Some(match self.credentials(&call.scopes.repository) {
                Ok(found) => format!("credentials: {}", found.describe(self.name())),
                Err(e) => e.to_string(),
            });
        }
        Err(Error::Reply(Box::new(reply)))
    }

    /// Reads a whole body of at most `limit` bytes.
    pub(in crate::store::registry) async fn read_body(
        &self,
        request: &Request,
        what: &str,
        mut response: Response,
        limit: u64,
    ) -> Result<Bytes, Error> {
        let too_large = || Error::TooLarge {
            what: what.to_owned(),
            limit,
        };
        if response.content_length().is_some_and(|n| n > limit) {
            return Err(too_large());
        }
        let mut body = BytesMut::new();
        loop {
            let wait = self.settings.stall_timeout.min(self.remaining());
            let next = tokio::time::timeout(wait, response.chunk());
            match self.watched(next).await {
                Ok(Ok(Some(chunk))) if (body.len() + chunk.len()) as u64 > limit => {
                    return Err(too_large());
                }
                Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk),
                Ok(Ok(None)) => return Ok(body.freeze()),
                Ok(Err(e)) => return Err(Error::transport(request.clone(), &e)),
                Err(_) => {
                    return Err(self.timeout_error(request.clone(), self.settings.stall_timeout));
                }
            }
        }
    }
}

/// Reads the error answer `response`, up to a limit.
pub(super) async fn reply_of(call: &Call, mut response: Response) -> Reply {
    let status = response.status().as_u16();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| read_retry_after(v, jiff::Timestamp::now()));
    let request = Request::new(&call.method, response.url());
    let mut body = BytesMut::new();
    let reading = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() as u64 > MAX_ERROR_BODY {
                break;
            }
        }
    };
    // An incomplete body must not hide the status.
    let _ = tokio::time::timeout(Duration::from_secs(5), reading).await;
    let (code, message) = read_error_body(&body[..body.len().min(MAX_ERROR_BODY as usize)]);
    Reply {
        request,
        step: call.step,
        status,
        code,
        message,
        retry_after,
        tag: call.tag.clone(),
        credentials: None,
        mid_upload: false,
    }
}
