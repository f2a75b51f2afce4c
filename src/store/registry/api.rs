//! The door beside the distribution API that some registries have: JSON over user and password, on the same host.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, LINK};
use http::{HeaderMap, HeaderValue, Method};
use serde::de::DeserializeOwned;

use super::error::{Error, Request, Step};
use super::host::{Call, Host, Scopes};
use super::{Reference, Registries, Repository};

/// A page of a hundred images with all their labels is far smaller.
const MAX_ANSWER: u64 = 32 << 20;

/// A host's own API. Requests carry the credentials of one repository, and go to no other host.
#[derive(Clone)]
pub struct Api {
    host: Arc<Host>,
    repository: String,
}

/// What the API said.
#[derive(Debug)]
pub struct Answer {
    request: Request,
    /// HTTP status: 2xx, or one that the caller said it would take.
    pub status: u16,
    /// `X-Total-Count`.
    pub total: Option<u64>,
    /// Whether `Link` names a next page.
    pub more: bool,
    /// Requests that had failed before this answer came: what it denies may be what they had done.
    pub failed: u32,
    /// As it came.
    pub body: Bytes,
}

impl Answer {
    /// The body as a document.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.body).map_err(|e| Error::Garbled {
            request: self.request.clone(),
            reason: format!(
                "not the document that was expected (line {}, column {})",
                e.line(),
                e.column()
            ),
        })
    }
}

impl Registries {
    /// The API of `host`, with the credentials that are meant for `repository` there.
    pub fn api(&self, host: &str, repository: &str) -> Result<Api, Error> {
        // Any name serves to find the host.
        let reference: Reference = format!("{host}/x").parse()?;
        Ok(Api {
            host: self.host(&reference.host)?,
            repository: repository.to_owned(),
        })
    }
}

impl Repository {
    /// The API of the host that this repository is on, with its credentials.
    pub fn api(&self) -> Api {
        Api {
            host: Arc::clone(&self.host),
            repository: self.name.clone(),
        }
    }
}

impl Api {
    /// `HOST[:PORT]`.
    pub fn host(&self) -> &str {
        self.host.name()
    }

    /// Whether the registry asks for tokens as Harbor does: then, and only then, the rest is worth asking for.
    pub async fn asks_like_harbor(&self) -> Result<bool, Error> {
        self.host.url("/").await?;
        Ok(self.host.token_service().is_some_and(|(realm, service)| {
            realm.ends_with("/service/token") && service.as_deref() == Some("harbor-registry")
        }))
    }

    /// `path` carries its query, escaped. `accept`: statuses besides 2xx that are an answer.
    pub async fn get(&self, path: &str, accept: &'static [u16]) -> Result<Answer, Error> {
        // A page that is cut off and yet complete as HTTP is asked for once more.
        let answer = self.ask(Method::GET, path, None, accept).await?;
        if answer.status < 300 && answer.read::<serde::de::IgnoredAny>().is_err() {
            return self.ask(Method::GET, path, None, accept).await;
        }
        Ok(answer)
    }

    /// Likewise, for the status alone.
    pub async fn head(&self, path: &str, accept: &'static [u16]) -> Result<Answer, Error> {
        self.ask(Method::HEAD, path, None, accept).await
    }

    /// Sends a document.
    pub async fn post(
        &self,
        path: &str,
        document: &serde_json::Value,
        accept: &'static [u16],
    ) -> Result<Answer, Error> {
        let body = Bytes::from(document.to_string());
        self.ask(Method::POST, path, Some(body), accept).await
    }

    /// Deletes.
    pub async fn delete(&self, path: &str, accept: &'static [u16]) -> Result<Answer, Error> {
        self.ask(Method::DELETE, path, None, accept).await
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        accept: &'static [u16],
    ) -> Result<Answer, Error> {
        let retry = self.host.retry();
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        if body.is_some() {
            let json = HeaderValue::from_static("application/json");
            headers.insert(CONTENT_TYPE, json);
        }
        let call = Call {
            step: Step::Api,
            method,
            url: self.host.url(path).await?,
            scopes: Scopes {
                repository: self.repository.clone(),
                scopes: Vec::new(),
            },
            headers,
            body: body.unwrap_or_default(),
            wait: self.host.silence(),
            tries: retry.tries,
            tries_at_500: 2,
            accept,
            tag: None,
        };
        let mut failed = 0;
        let response = self.host.call_after(&call, &mut failed).await?;
        let request = Request::new(&call.method, &call.url);
        let text =
            |name: &http::HeaderName| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
        let total =
            text(&http::HeaderName::from_static("x-total-count")).and_then(|n| n.parse().ok());
        let more = text(&LINK).is_some_and(|link| link.contains("rel=\"next\""));
        let status = response.status().as_u16();
        let body = if call.method == Method::HEAD {
            Bytes::new()
        } else {
            self.host
                .read_body(&request, "the answer", response, MAX_ANSWER)
                .await?
        };
        Ok(Answer {
            request,
            status,
            total,
            more,
            failed,
            body,
        })
    }
}
