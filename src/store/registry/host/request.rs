//! Requests to a registry host that survive what is passing: tries, redirects, bounds on what is read.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Client, Response, Url};

use super::Host;
use super::scopes::Scopes;
use crate::store::registry::error::{Error, Reply, Request, Step, read_error_body};
use crate::store::registry::retry::read_retry_after;

const MAX_ERROR_BODY: u64 = 64 << 10;
const MAX_REDIRECTS: usize = 5;

/// A request whose body is at hand, so that it can be repeated.
#[derive(Clone, Debug)]
pub(in crate::store::registry) struct Call {
    pub(in crate::store::registry) step: Step,
    pub(in crate::store::registry) method: Method,
    /// An address on this host; path and query count.
    pub(in crate::store::registry) url: Url,
    pub(in crate::store::registry) scopes: Scopes,
    pub(in crate::store::registry) headers: HeaderMap,
    pub(in crate::store::registry) body: Bytes,
    /// How long the answer's head may take.
    pub(in crate::store::registry) wait: Duration,
    pub(in crate::store::registry) tries: u32,
    /// Tries when the answer is 500: some registries say so of a manifest that they will never take.
    pub(in crate::store::registry) tries_at_500: u32,
    /// Statuses besides 2xx that are an answer and no error.
    pub(in crate::store::registry) accept: &'static [u16],
    /// For errors: the tag that is written.
    pub(in crate::store::registry) tag: Option<String>,
}

impl Host {
    /// The pause before the next try after `failed` tries; none: give up, this is no passing trouble, or the save has
    /// repeated enough.
    pub(in crate::store::registry) fn pause(&self, failed: u32, error: &Error) -> Option<Duration> {
        let pause = self.settings.retry.pause(failed, error)?;
        self.settings.budget.take(pause).then_some(pause)
    }

    /// The same for a blob whose upload the registry has lost: its request is final, the blob is not.
    pub(in crate::store::registry) fn pause_after_loss(
        &self,
        failed: u32,
        error: &Error,
    ) -> Option<Duration> {
        if error.passing() || failed >= self.settings.retry.tries {
            return None;
        }
        let pause = self.settings.retry.first_pause;
        self.settings.budget.take(pause).then_some(pause)
    }

    /// How long the whole save may still go on.
    pub(in crate::store::registry) fn remaining(&self) -> Duration {
        self.settings.budget.remaining()
    }

    /// The error of a wait that brought nothing.
    pub(in crate::store::registry) fn waited(&self, request: Request, after: Duration) -> Error {
        if self.remaining().is_zero() {
            let after = self.settings.budget.whole();
            Error::Deadline { request, after }
        } else {
            Error::Silent { request, after }
        }
    }

    /// Sends a request until it is answered by more than a passing trouble.
    pub(in crate::store::registry) async fn call(&self, call: &Call) -> Result<Response, Error> {
        self.call_after(call, &mut 0).await
    }

    /// The same for a request that is a part of something that has `failed` so often before, and counts on.
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
                call.tries_at_500
            } else {
                call.tries
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

    /// One try, over redirects.
    pub(in crate::store::registry) async fn attempt(&self, call: &Call) -> Result<Response, Error> {
        let origin = self.origin().await?;
        let mut url = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = if origin.is_same(&url) {
                self.authorized(call, &url).await?
            } else {
                // Storage behind a registry: its address is signed, and our credentials are none of its business.
                self.fire(&self.other, call, &url, None).await?
            };
            let response = self.judge(call, response).await?;
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
                return Err(Error::Nonsense {
                    request,
                    reason: "a redirect to nowhere".to_owned(),
                });
            };
            let away = |why| Error::LeadsAway {
                request: request.clone(),
                to: Request::new(&call.method, &next).to_string(),
                why,
            };
            origin.may_visit(&next).map_err(away)?;
            let reading = call.method == Method::GET || call.method == Method::HEAD;
            let keeps_method = matches!(response.status().as_u16(), 307 | 308);
            let stays = keeps_method && origin.is_same(&next);
            if !reading && !stays {
                return Err(away("what is written goes to the registry itself"));
            }
            url = next;
        }
        let request = Request::new(&call.method, &call.url);
        Err(Error::Nonsense {
            request,
            reason: format!("more than {MAX_REDIRECTS} redirects"),
        })
    }

    /// To the registry itself, with one more try after a 401 that may be a matter of the token's age. A second more only
    /// where the new token has ended on its way, too: some live for seconds.
    async fn authorized(&self, call: &Call, url: &Url) -> Result<Response, Error> {
        let mut renewed = 0;
        loop {
            if call.step == Step::Api {
                let header = self.api_authorization(&call.scopes)?;
                return self.fire(&self.own, call, url, header).await;
            }
            let (header, age) = self.authorization(&call.scopes).await?;
            let response = self.fire(&self.own, call, url, header).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            let now = Instant::now();
            let news = self.learn(response.headers());
            let worth = match renewed {
                0 => news || age.is_some_and(|age| !age.is_fresh(now)),
                1 => age.is_some_and(|age| age.is_over(now)),
                _ => false,
            };
            if !worth {
                return Ok(response);
            }
            self.forget_token(&call.scopes).await;
            renewed += 1;
        }
    }

    /// One request, one answer.
    pub(super) async fn fire(
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
        // Servers that want a length want this one too, and HTTP libraries leave it out.
        if call.body.is_empty() && !matches!(call.method, Method::GET | Method::HEAD) {
            request = request.header(CONTENT_LENGTH, 0);
        }
        let shown = || Request::new(&call.method, url);
        let wait = call.wait.min(self.remaining());
        match tokio::time::timeout(wait, request.body(call.body.clone()).send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(Error::transport(shown(), &e)),
            Err(_) => Err(self.waited(shown(), call.wait)),
        }
    }

    /// An answer, or the error that it is. Redirects are answers.
    pub(in crate::store::registry) async fn judge(
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

    /// A whole body of at most `limit` bytes.
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
            let wait = self.settings.silence.min(self.remaining());
            let next = tokio::time::timeout(wait, response.chunk()).await;
            match next {
                Ok(Ok(Some(chunk))) if (body.len() + chunk.len()) as u64 > limit => {
                    return Err(too_large());
                }
                Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk),
                Ok(Ok(None)) => return Ok(body.freeze()),
                Ok(Err(e)) => return Err(Error::transport(request.clone(), &e)),
                Err(_) => return Err(self.waited(request.clone(), self.settings.silence)),
            }
        }
    }
}

/// Reads what a no says, as far as it is short.
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
    // What is missing of an explanation must not hide the status.
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
