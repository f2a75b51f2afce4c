//! What handlers take from a request: who asks, the body, the query; turned down with our errors.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use axum::Json;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Query, Request};
use axum::http::Method;
use axum::http::request::Parts;
use axum::serve::{IncomingStream, Listener};
use serde::de::DeserializeOwned;
use tokio::net::{TcpListener, TcpStream, UnixListener};

use super::auth::Caller;
use super::options::Rate;
use super::refusal::Refusal;
use super::{App, Inner};
use crate::job::JobId;

/// So many callers' rates are remembered; then the memory begins anew.
const MAX_CALLERS: usize = 20_000;

/// From where a connection comes; none: a socket file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) Option<IpAddr>);

/// TCP connections on which small things do not wait for more: events are small.
pub(super) struct Prompt(pub(super) TcpListener);

impl Listener for Prompt {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        // Without it, it merely takes longer.
        let _ = stream.set_nodelay(true);
        (stream, address)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

impl Connected<IncomingStream<'_, Prompt>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Prompt>) -> Self {
        Self(Some(stream.remote_addr().ip()))
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(_: IncomingStream<'_, UnixListener>) -> Self {
        Self(None)
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let peer = parts
            .extensions
            .get::<ConnectInfo<Peer>>()
            .and_then(|info| info.0.0);
        let changes = !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let caller = app.gate.caller(&parts.headers, peer, changes).await?;
        tracing::Span::current().record("caller", caller.name.as_str());
        app.rates.take(&caller.name)?;
        Ok(caller)
    }
}

impl Caller {
    /// For whom the caller asks, where that has to be somebody.
    pub(super) fn somebody(&self) -> Result<&str, Refusal> {
        self.user.as_deref().ok_or_else(|| {
            Refusal::forbidden("this token acts for users: name one in the Upperdeck-User header")
        })
    }

    /// Whether the caller may see and change what is `user`'s.
    pub(super) fn may(&self, user: &str) -> bool {
        self.administrator || self.user.as_deref() == Some(user)
    }

    /// Whose things are listed: the caller's own, or, for administrators, those of whom they ask for, or all (none).
    pub(super) fn sees(&self, asked: Option<&str>) -> Result<Option<String>, Refusal> {
        if self.administrator {
            return Ok(asked.filter(|user| !user.is_empty()).map(str::to_owned));
        }
        let own = self.somebody()?;
        match asked.filter(|user| !user.is_empty()) {
            Some(other) if other != own => Err(Refusal::forbidden(
                "only administrators see what is others'",
            )),
            _ => Ok(Some(own.to_owned())),
        }
    }

    /// For calls that are administrators' alone.
    pub(super) fn administrator(&self) -> Result<(), Refusal> {
        if self.administrator {
            return Ok(());
        }
        Err(Refusal::forbidden("this is for administrators"))
    }
}

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        let Json(body) = Json::from_request(request, app).await?;
        Ok(Self(body))
    }
}

/// The query.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<App> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let Query(asked) = Query::from_request_parts(parts, app).await?;
        Ok(Self(asked))
    }
}

/// An ID in a path. What is none is not there.
pub(super) fn job(text: &str) -> Result<JobId, Refusal> {
    let id: Option<JobId> = text.parse().ok();
    // One way to write it, so that what is compared as text is the same.
    id.filter(|id| id.to_string() == text.to_ascii_lowercase())
        .ok_or_else(|| Refusal::not_found("there is no such save"))
}

/// How many requests each caller has left.
pub(super) struct Rates {
    rate: Option<Rate>,
    left: Mutex<HashMap<String, (f64, Instant)>>,
}

impl Rates {
    pub(super) fn new(rate: Option<Rate>) -> Self {
        Self {
            rate,
            left: Mutex::default(),
        }
    }

    fn take(&self, caller: &str) -> Result<(), Refusal> {
        let Some(rate) = self.rate else { return Ok(()) };
        let now = Instant::now();
        let mut all = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() > MAX_CALLERS {
            all.clear();
        }
        let (left, at) = all.entry(caller.to_owned()).or_insert((rate.burst, now));
        *left = (*left + now.duration_since(*at).as_secs_f64() * rate.per_second).min(rate.burst);
        *at = now;
        if *left < 1.0 {
            let wait = ((1.0 - *left) / rate.per_second.max(0.001)).ceil();
            return Err(Refusal::too_many("too many requests at once", wait as u64));
        }
        *left -= 1.0;
        Ok(())
    }
}

impl std::ops::Deref for App {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}
