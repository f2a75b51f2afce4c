//! Client of the manager's REST API: single requests, and the event stream of a save.

use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use reqwest::{Method, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::renewed::Renewed;
use crate::cli::args::Server;
use crate::cli::exit::{Exit, Usage};
use crate::cli::{secret, text};
use crate::service::job::Code;
use crate::service::manager::api::{Problem, Save};

/// File in the state directory of `upperdeck up` with its URL and token. Only its owner can read it.
pub(super) const UP_FILE: &str = "up.url";

/// Maximum size of a reply in bytes. A page of a list is far smaller.
const MAX_REPLY: usize = 16 << 20;
/// Timeout without any data. The event stream has keep-alives more often.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long reconnections to an unreachable manager (which may be restarting) are tried while a save is watched.
const MAX_OUTAGE: Duration = Duration::from_secs(120);
/// Pause between two such attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// An error of the manager's API.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The manager cannot be reached, or the connection broke.
    #[error("the manager at {server} cannot be reached: {reason}")]
    Unreachable { server: String, reason: String },
    /// The manager refused the request.
    #[error("{message} ({code})")]
    Refused {
        code: String,
        message: String,
        retryable: bool,
        status: u16,
    },
    /// The reply is not that of a manager.
    #[error("{server} does not respond like a manager: {reason}")]
    InvalidResponse { server: String, reason: String },
    /// The save that was waited for failed.
    #[error("{message} ({})", code.name())]
    Save {
        code: Code,
        message: String,
        retryable: bool,
    },
}

impl Error {
    /// Returns the exit code.
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Unreachable { .. } => Exit::Retry,
            Self::Refused {
                status, retryable, ..
            } => match status {
                401 | 403 => Exit::NotPermitted,
                400 | 405 | 413..=415 | 422 | 431 => Exit::Usage,
                _ if *retryable => Exit::Retry,
                _ => Exit::Failed,
            },
            Self::InvalidResponse { .. } => Exit::Failed,
            Self::Save {
                code, retryable, ..
            } => match code {
                Code::ContainerGone => Exit::NoContainer,
                Code::BaseUnproven => Exit::Base,
                code if code.not_permitted() => Exit::NotPermitted,
                _ if *retryable => Exit::Retry,
                _ => Exit::Failed,
            },
        }
    }
}

/// How requests get to the manager.
enum Route {
    /// To its own address.
    Direct(reqwest::Client),
    /// Through the proxy of a Kubernetes API server, which removes the header `Authorization`.
    Cluster(kube::Client),
}

/// The token of the requests.
pub(super) enum Credential {
    /// Always the same.
    Fixed(Zeroizing<String>),
    /// One that is renewed before it expires.
    Renewed(Box<Renewed>),
}

/// A connection to a manager with the caller's credentials.
pub(super) struct Client {
    route: Route,
    server: Url,
    token: Option<Credential>,
    user: Option<String>,
}

/// A request that is not sent yet, so that its token is as new as it can be.
struct Request {
    method: Method,
    url: Url,
    headers: Vec<(&'static str, String)>,
    body: Option<Vec<u8>>,
}

impl Request {
    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A response whose body is still to come.
struct Reply {
    status: StatusCode,
    body: BoxStream<'static, Result<Bytes, String>>,
}

impl Client {
    /// Creates a client from the flags. Without any, it connects to the `upperdeck up` of this machine.
    pub(super) fn new(server: &Server) -> anyhow::Result<Self> {
        let (text, found) = match &server.server {
            Some(text) => (Zeroizing::new(text.clone()), None),
            None => {
                let file = server.up_file();
                let text = secret::trimmed_line(&file).map_err(|error| {
                    Usage(format!(
                        "no manager is named (--server, UPPERDECK_SERVER), and no 'upperdeck up' runs here: {}: {error}",
                        text::path(&file)
                    ))
                })?;
                (text, Some(file))
            }
        };
        let unusable = |reason: &str| {
            let whence = found
                .as_ref()
                .map_or_else(|| "--server".to_owned(), |file| text::path(file));
            Usage(format!(
                "{whence}: {reason}; expected http://HOST:PORT or https://HOST"
            ))
        };
        let mut url = Url::parse(&text).map_err(|error| unusable(&error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(unusable("not a web address").into());
        }
        // The form in which `upperdeck up` prints its URL.
        let in_url = url
            .query_pairs()
            .find(|(key, _)| key == "token")
            .map(|(_, token)| Zeroizing::new(token.into_owned()));
        url.set_query(None);
        url.set_fragment(None);
        if !url.path().ends_with('/') {
            let path = format!("{}/", url.path());
            url.set_path(&path);
        }
        let token = match (&server.token_file, &server.token) {
            (Some(file), _) => Some(secret::trimmed_line(file).map_err(|error| {
                Usage(format!(
                    "cannot read a token from {}: {error}",
                    text::path(file)
                ))
            })?),
            (None, Some(token)) => Some(Zeroizing::new(token.clone())),
            (None, None) => in_url,
        };
        Ok(Self {
            route: Route::Direct(direct(&url)?),
            server: url,
            token: token.map(Credential::Fixed),
            user: server.user.clone(),
        })
    }

    /// Creates a client of a manager at `server`, for users of a Kubernetes cluster.
    pub(super) fn with_credential(server: Url, credential: Credential) -> anyhow::Result<Self> {
        Ok(Self {
            route: Route::Direct(direct(&server)?),
            server,
            token: Some(credential),
            user: None,
        })
    }

    /// Creates a client of a manager whose Service is at `path` of the API server at `server`.
    pub(super) fn through_cluster(
        cluster: kube::Client,
        server: Url,
        credential: Credential,
    ) -> Self {
        Self {
            route: Route::Cluster(cluster),
            server,
            token: Some(credential),
            user: None,
        }
    }

    fn unreachable(&self, error: &(dyn std::error::Error + 'static)) -> Error {
        self.lost(crate::common::message::of(error))
    }

    fn lost(&self, reason: String) -> Error {
        Error::Unreachable {
            server: self.server.to_string(),
            reason,
        }
    }

    fn request(&self, method: Method, path: &str, query: &[(&str, String)]) -> Request {
        let mut url = self.server.clone();
        // Untrusted parts of `path` are escaped by the callers.
        url.set_path(&format!("{}api/v1/{path}", self.server.path()));
        if !query.is_empty() {
            url.query_pairs_mut()
                .extend_pairs(query.iter().map(|(key, value)| (*key, value.as_str())));
        }
        let request = Request {
            method,
            url,
            headers: Vec::new(),
            body: None,
        };
        let request = request.header("Upperdeck-Request", "1");
        match &self.user {
            Some(user) => request.header("Upperdeck-User", user),
            None => request,
        }
    }

    /// Adds the token, and sends a request.
    async fn transmit(&self, mut request: Request) -> Result<Reply, Error> {
        let token = match &self.token {
            None => None,
            Some(Credential::Fixed(token)) => Some(token.clone()),
            Some(Credential::Renewed(token)) => {
                Some(token.get().await.map_err(|error| self.of_cluster(error))?)
            }
        };
        if let Some(token) = &token {
            let name = match &self.route {
                Route::Direct(_) => "Authorization",
                Route::Cluster(_) => "Upperdeck-Authorization",
            };
            request = request.header(name, format!("Bearer {}", token.as_str()));
        }
        if request.body.is_some() {
            request = request.header("Content-Type", "application/json");
        }
        match &self.route {
            Route::Direct(http) => {
                let mut to_send = http.request(request.method, request.url);
                for (name, value) in &request.headers {
                    to_send = to_send.header(*name, value);
                }
                if let Some(body) = request.body {
                    to_send = to_send.body(body);
                }
                let reply = to_send
                    .send()
                    .await
                    .map_err(|error| self.unreachable(&error))?;
                let status = reply.status();
                let said = |error: reqwest::Error| crate::common::message::of(&error);
                Ok(Reply {
                    status,
                    body: reply.bytes_stream().map_err(said).boxed(),
                })
            }
            Route::Cluster(cluster) => {
                let mut target = request.url.path().to_owned();
                if let Some(query) = request.url.query() {
                    target.push_str(&format!("?{query}"));
                }
                let mut to_send = http::Request::builder().method(request.method).uri(target);
                for (name, value) in &request.headers {
                    to_send = to_send.header(*name, value);
                }
                let body = request.body.unwrap_or_default();
                let to_send = to_send
                    .body(kube::client::Body::from(body))
                    .map_err(|error| self.lost(error.to_string()))?;
                let reply = cluster
                    .send(to_send)
                    .await
                    .map_err(|error| self.of_cluster(error))?;
                let status = reply.status();
                let body = axum::body::Body::new(reply.into_body()).into_data_stream();
                let said = |error: axum::Error| crate::common::message::of(&error);
                Ok(Reply {
                    status,
                    body: body.map_err(said).boxed(),
                })
            }
        }
    }

    /// Converts an error of the Kubernetes API.
    fn of_cluster(&self, error: kube::Error) -> Error {
        match error {
            kube::Error::Api(status) => refused_by_cluster(&self.server, &status),
            error => self.unreachable(&error),
        }
    }

    async fn send(&self, request: Request) -> Result<Reply, Error> {
        let reply = self.transmit(request).await?;
        let status = reply.status;
        if status.is_success() {
            return Ok(reply);
        }
        let body = self.body(reply).await.unwrap_or_default();
        Err(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Error::Refused {
                code: problem.code,
                message: problem.detail,
                retryable: problem.retryable,
                status: status.as_u16(),
            },
            Err(_) => match serde_json::from_slice::<kube::core::Status>(&body) {
                Ok(said) if matches!(self.route, Route::Cluster(_)) && said.is_failure() => {
                    refused_by_cluster(&self.server, &said)
                }
                _ if status == StatusCode::BAD_GATEWAY || status.is_server_error() => {
                    self.lost(status.to_string())
                }
                _ => self.invalid_response(status.to_string()),
            },
        })
    }

    fn invalid_response(&self, reason: String) -> Error {
        Error::InvalidResponse {
            server: self.server.to_string(),
            reason,
        }
    }

    async fn body(&self, mut reply: Reply) -> Result<Vec<u8>, Error> {
        let mut body = Vec::new();
        while let Some(chunk) = reply.body.next().await {
            body.extend_from_slice(&chunk.map_err(|reason| self.lost(reason))?);
            if body.len() > MAX_REPLY {
                return Err(
                    self.invalid_response(format!("a reply of more than {MAX_REPLY} bytes"))
                );
            }
        }
        Ok(body)
    }

    async fn json<T: DeserializeOwned>(&self, request: Request) -> Result<T, Error> {
        let reply = self.send(request).await?;
        let body = self.body(reply).await?;
        serde_json::from_slice(&body).map_err(|error| self.invalid_response(error.to_string()))
    }

    /// Sends a GET request.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T, Error> {
        self.json(self.request(Method::GET, path, query)).await
    }

    /// Sends a POST request. The idempotency key permits it to be repeated.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        key: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let mut request = self
            .request(Method::POST, path, &[])
            .header("Idempotency-Key", key);
        let body = serde_json::to_vec(body);
        request.body = Some(body.map_err(|error| self.lost(error.to_string()))?);
        self.json(request).await
    }

    /// Requests the cancellation of a save and returns its state.
    pub(super) async fn cancel(&self, id: &str) -> Result<Save, Error> {
        self.json(self.request(Method::DELETE, &format!("saves/{id}"), &[]))
            .await
    }

    /// Has a save run at normal priority, and returns its state.
    pub(super) async fn hurry(&self, id: &str) -> Result<Save, Error> {
        let path = format!("saves/{id}/hurry");
        self.json(self.request(Method::POST, &path, &[])).await
    }

    /// Sends a PUT request.
    pub(super) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Error> {
        let mut request = self.request(Method::PUT, path, &[]);
        let body = serde_json::to_vec(body);
        request.body = Some(body.map_err(|error| self.lost(error.to_string()))?);
        self.json(request).await
    }

    /// Sends a DELETE request.
    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.json(self.request(Method::DELETE, path, &[])).await
    }

    /// Calls `seen` with each new state of a save until it has ended. Waits through broken connections and restarts of
    /// the manager.
    pub(super) async fn watch(&self, id: &str, mut seen: impl FnMut(&Save)) -> Result<Save, Error> {
        let mut last: Option<String> = None;
        let mut away = tokio::time::Instant::now();
        loop {
            let broke = match self.follow(id, &mut last, &mut seen, &mut away).await {
                Ok(Some(save)) => return Ok(save),
                Ok(None) => None,
                Err(error @ Error::Unreachable { .. }) => Some(error),
                Err(error) => return Err(error),
            };
            if let Some(error) = broke.filter(|_| away.elapsed() > MAX_OUTAGE) {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Reads the events of one connection. Returns `None` if it ends before the save does.
    async fn follow(
        &self,
        id: &str,
        last: &mut Option<String>,
        seen: &mut impl FnMut(&Save),
        away: &mut tokio::time::Instant,
    ) -> Result<Option<Save>, Error> {
        let mut request = self
            .request(Method::GET, &format!("saves/{id}/events"), &[])
            .header("Accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last.as_str());
        }
        let mut reply = self.send(request).await?;
        let mut events = Events::default();
        while let Some(chunk) = reply.body.next().await {
            events.add(&chunk.map_err(|reason| self.lost(reason))?);
            if events.rest.len() > MAX_REPLY {
                return Err(self.invalid_response("an event without an end".to_owned()));
            }
            *away = tokio::time::Instant::now();
            while let Some(event) = events.next() {
                if !event.id.is_empty() {
                    *last = Some(event.id);
                }
                let save: Save = serde_json::from_str(&event.data)
                    .map_err(|error| self.invalid_response(format!("an event: {error}")))?;
                seen(&save);
                if save.state.is_final() {
                    return Ok(Some(save));
                }
            }
        }
        // The save may have ended between two connections.
        let save: Save = self.get(&format!("saves/{id}"), &[]).await?;
        seen(&save);
        Ok(save.state.is_final().then_some(save))
    }
}

/// Creates the client for requests to a manager's own address.
fn direct(server: &Url) -> Result<reqwest::Client, Usage> {
    let host = server.host_str().unwrap_or_default();
    crate::store::registry::http_client(host)
        .read_timeout(STALL_TIMEOUT)
        .build()
        .map_err(|error| Usage(format!("cannot speak HTTP: {error}")))
}

/// Converts the refusal of a Kubernetes API server. A Service without a manager that is ready is one that cannot be
/// reached.
fn refused_by_cluster(server: &Url, said: &kube::core::Status) -> Error {
    let message = format!("the API server: {}", said.message);
    match said.code {
        429 | 500.. => Error::Unreachable {
            server: server.to_string(),
            reason: message,
        },
        status => Error::Refused {
            code: "kubernetes".to_owned(),
            message,
            retryable: false,
            status,
        },
    }
}

/// A server-sent event (HTML standard). Its name is ignored, because each event carries a whole save.
#[derive(Debug, Default, PartialEq, Eq)]
struct SseEvent {
    id: String,
    data: String,
}

/// Splits a byte stream into events.
#[derive(Default)]
struct Events {
    rest: BytesMut,
}

impl Events {
    fn add(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
    }

    /// Returns the next complete event that has data.
    fn next(&mut self) -> Option<SseEvent> {
        loop {
            let end = self.rest.windows(2).position(|two| two == b"\n\n")?;
            let block = self.rest.split_to(end + 2);
            let text = String::from_utf8_lossy(&block);
            let mut event = SseEvent::default();
            for line in text.lines() {
                let (field, value) = line.split_once(':').unwrap_or((line, ""));
                let value = value.strip_prefix(' ').unwrap_or(value);
                match field {
                    "id" => value.clone_into(&mut event.id),
                    "data" => {
                        if !event.data.is_empty() {
                            event.data.push('\n');
                        }
                        event.data.push_str(value);
                    }
                    _ => {}
                }
            }
            if !event.data.is_empty() {
                return Some(event);
            }
        }
    }
}

/// Returns the path of the file with the URL of `upperdeck up`.
impl Server {
    fn up_file(&self) -> PathBuf {
        self.up_dir.join(UP_FILE)
    }
}

#[cfg(test)]
mod tests {
    use super::{Events, SseEvent};

    #[test]
    fn events_are_whole_however_they_come() {
        let text = b": hello\n\nid: 7\nevent: save\ndata: {\"a\":1,\ndata: \"b\":2}\n\nretry: 5\n\ndata:x\n\nid: 8\n";
        let expected = [
            SseEvent {
                id: "7".to_owned(),
                data: "{\"a\":1,\n\"b\":2}".to_owned(),
            },
            SseEvent {
                id: String::new(),
                data: "x".to_owned(),
            },
        ];
        for size in 1..text.len() {
            let mut events = Events::default();
            let mut found = Vec::new();
            for chunk in text.chunks(size) {
                events.add(chunk);
                while let Some(event) = events.next() {
                    found.push(event);
                }
            }
            assert_eq!(found, expected, "in pieces of {size}");
        }
    }
}
