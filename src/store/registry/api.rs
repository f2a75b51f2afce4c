//! Client for a registry's own API beside the distribution API: JSON with basic authentication, on the same host.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use serde::de::DeserializeOwned;

use super::credentials::{CredentialLookup, Credentials};
use super::error::{Error, Request, Step};
use super::host::{Call, Host, Scopes};
use super::{Reference, Registries, Repository};

/// Maximum size of an answer, in bytes. A page of a hundred images with all their labels is far smaller.
const MAX_RESPONSE: u64 = 32 << 20;

/// A host's own API. Requests carry the credentials for one repository and go to no other host.
#[derive(Clone)]
pub struct Api {
    host: Arc<Host>,
    repository: String,
}

/// An answer of the API.
#[derive(Debug)]
pub struct ApiResponse {
    request: Request,
    /// HTTP status: 2xx, or one of those that the caller listed in `accept`.
    pub status: u16,
    /// Value of `X-Total-Count`.
    pub total: Option<u64>,
    /// Number of failed requests before this answer. If it is not 0, an error status may be the effect of an earlier
    /// attempt that succeeded although its answer was lost.
    pub failed: u32,
    /// The body as received.
    pub body: Bytes,
}

impl ApiResponse {
    /// Parses the body as JSON. Fails with [`Error::InvalidDocument`] if it is not the expected document.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.body).map_err(|e| Error::InvalidDocument {
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
    /// Returns the API of `host`, with the credentials for `repository` there.
    pub fn api(&self, host: &str, repository: &str) -> Result<Api, Error> {
        // The host is looked up by a reference, in which any repository name will do.
        let reference: Reference = format!("{host}/x").parse()?;
        Ok(Api {
            host: self.host(&reference.host)?,
            repository: repository.to_owned(),
        })
    }
}

impl Repository {
    /// Returns the API of the host that this repository is on, with the credentials for the repository.
    pub(crate) fn api(&self) -> Api {
        Api {
            host: Arc::clone(&self.host),
            repository: self.name.clone(),
        }
    }
}

impl Api {
    /// Returns `HOST[:PORT]`.
    pub(crate) fn host(&self) -> &str {
        self.host.name()
    }

    /// Returns the user that requests are made as. Returns `None` if they are anonymous or use an identity token.
    pub fn user(&self) -> Option<String> {
        match self.host.credentials(&self.repository) {
            Ok(CredentialLookup::Credentials {
                credentials: Credentials::Basic { user, .. },
                ..
            }) => Some(user),
            _ => None,
        }
    }

    /// Returns whether the registry names a token service like that of Harbor. Harbor's API is used only if it does.
    pub(crate) async fn has_harbor_token_service(&self) -> Result<bool, Error> {
        self.host.url("/").await?;
        Ok(self.host.token_service().is_some_and(|(realm, service)| {
            realm.ends_with("/service/token") && service.as_deref() == Some("harbor-registry")
        }))
    }

    /// Sends a GET request. `path` includes its query, escaped. `accept` lists statuses besides 2xx that are not
    /// errors.
    pub async fn get(&self, path: &str, accept: &'static [u16]) -> Result<ApiResponse, Error> {
        // A body that is valid HTTP but not valid JSON was probably truncated, so the request is repeated once.
        let answer = self.send(Method::GET, path, None, accept).await?;
        if answer.status < 300 && answer.read::<serde::de::IgnoredAny>().is_err() {
            return self.send(Method::GET, path, None, accept).await;
        }
        Ok(answer)
    }

    /// Sends a HEAD request; otherwise like [`Api::get`].
    pub(crate) async fn head(
        &self,
        path: &str,
        accept: &'static [u16],
    ) -> Result<ApiResponse, Error> {
        self.send(Method::HEAD, path, None, accept).await
    }

    /// Sends a JSON document by POST.
    pub async fn post(
        &self,
        path: &str,
        document: &serde_json::Value,
        accept: &'static [u16],
    ) -> Result<ApiResponse, Error> {
        let body = Bytes::from(document.to_string());
        self.send(Method::POST, path, Some(body), accept).await
    }

    /// Sends a JSON document by PUT.
    pub async fn put(
        &self,
        path: &str,
        document: &serde_json::Value,
        accept: &'static [u16],
    ) -> Result<ApiResponse, Error> {
        let body = Bytes::from(document.to_string());
        self.send(Method::PUT, path, Some(body), accept).await
    }

    /// Sends a DELETE request.
    pub async fn delete(&self, path: &str, accept: &'static [u16]) -> Result<ApiResponse, Error> {
        self.send(Method::DELETE, path, None, accept).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        accept: &'static [u16],
    ) -> Result<ApiResponse, Error> {
        let retry = self.host.retry();
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        // Otherwise Harbor takes the name of a project that consists of digits for an ID.
        headers.insert("x-is-resource-name", HeaderValue::from_static("true"));
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
            wait: self.host.stall_timeout(),
            max_attempts: retry.max_attempts,
            max_attempts_at_500: 2,
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
        let status = response.status().as_u16();
        let body = if call.method == Method::HEAD {
            Bytes::new()
        } else {
            self.host
                .read_body(&request, "the answer", response, MAX_RESPONSE)
                .await?
        };
        Ok(ApiResponse {
            request,
            status,
            total,
            failed,
            body,
        })
    }
}
