//! Extractors for handlers: the caller, the body and the query. A request that they cannot accept is refused with the
//! API's own error format.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::Json;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, MatchedPath, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::auth::{Caller, Rejected};
use super::options::Rate;
use super::refusal::Refusal;
use super::{App, Inner};
use crate::service::connections::{CountGuard, Peer};
use crate::service::job::JobId;

/// Maximum number of callers whose request rates are remembered. Beyond it, callers without recent requests are
/// forgotten.
const MAX_CALLERS: usize = 20_000;

/// The one path that browsers request without the page's own header.
const EVENTS: &str = "/api/v1/saves/{id}/events";

/// Counts a request against its caller's limit until it is answered. The middleware adds it, and the extractor fills it
/// in once the caller is known.
#[derive(Clone, Default)]
pub(super) struct RequestGuard(Arc<Mutex<Option<CountGuard>>>);

impl RequestGuard {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<CountGuard>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the caller is known.
    pub(super) fn known(&self) -> bool {
        self.lock().is_some()
    }
}

fn peer_of(parts: &Parts) -> Option<IpAddr> {
    let info = parts.extensions.get::<ConnectInfo<Peer>>();
    info.and_then(|info| info.0.0)
}

fn is_for_events(parts: &Parts) -> bool {
    let path = parts.extensions.get::<MatchedPath>();
    path.is_some_and(|path| path.as_str() == EVENTS)
}

impl FromRequestParts<App> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let changes = !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let (peer, events) = (peer_of(parts), is_for_events(parts));
        let caller = app
            .authenticator
            .caller(&parts.headers, peer, changes, events)
            .await?;
        tracing::Span::current().record("caller", caller.name.as_str());
        let most = app.options.connections.requests_per_user;
        let one = app.requests.acquire(&caller.name, most).ok_or_else(|| {
            Refusal::too_many(
                format!("as many requests as may be ({most}) are being answered already"),
                1,
            )
        })?;
        if let Some(guard) = parts.extensions.get::<RequestGuard>() {
            *guard.lock() = Some(one);
        }
        app.rates.take(&caller.name)?;
        Ok(caller)
    }
}

/// The caller of an event stream, with what is needed to authenticate again while the stream lasts.
pub(super) struct StreamCaller {
    pub(super) caller: Caller,
    app: App,
    headers: HeaderMap,
    peer: Option<IpAddr>,
    events: bool,
    checked: Instant,
}

impl FromRequestParts<App> for StreamCaller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        Ok(Self {
            caller: Caller::from_request_parts(parts, app).await?,
            app: app.clone(),
            headers: parts.headers.clone(),
            peer: peer_of(parts),
            events: is_for_events(parts),
            checked: Instant::now(),
        })
    }
}

impl StreamCaller {
    /// Returns whether the credentials of the request are still those of this caller. They are checked once in
    /// `recheck_every`, and count as valid while that is not possible.
    pub(super) async fn is_valid(&mut self) -> bool {
        if self.checked.elapsed() < self.app.options.recheck_every {
            return true;
        }
        self.checked = Instant::now();
        let authenticator = &self.app.authenticator;
        let found = authenticator.caller(&self.headers, self.peer, false, self.events);
        match found.await {
            Ok(caller) => {
                let of = |caller: &Caller| (caller.user.clone(), caller.administrator);
                of(&caller) == of(&self.caller)
            }
            Err(Rejected::Unknown(_) | Rejected::Forbidden(_)) => false,
            Err(_) => true,
        }
    }
}

impl Caller {
    /// Returns the user that the caller acts as. Fails if there is none.
    pub(super) fn require_user(&self) -> Result<&str, Refusal> {
        self.user.as_deref().ok_or_else(|| {
            Refusal::forbidden("this token acts for users: name one in the Upperdeck-User header")
        })
    }

    /// Returns the user that the caller acts as; `None` for an administrator without a user name. Fails for a portal that
    /// names no user.
    pub(super) fn own_user(&self) -> Result<Option<&str>, Refusal> {
        if self.administrator {
            return Ok(self.user.as_deref());
        }
        self.require_user().map(Some)
    }

    /// Returns whether the caller may see and change data of `user`.
    pub(super) fn may_access(&self, user: &str) -> bool {
        self.administrator || self.user.as_deref() == Some(user)
    }

    /// Returns the user whose data are listed; `None` means all users. Administrators may request any user or all,
    /// others only themselves.
    pub(super) fn listed_user(&self, asked: Option<&str>) -> Result<Option<String>, Refusal> {
        if self.administrator {
            return Ok(asked.filter(|user| !user.is_empty()).map(str::to_owned));
        }
        let own = self.require_user()?;
        match asked.filter(|user| !user.is_empty()) {
            Some(other) if other != own => Err(Refusal::forbidden(
                "only administrators see what is others'",
            )),
            _ => Ok(Some(own.to_owned())),
        }
    }

    /// Fails unless the caller is an administrator.
    pub(super) fn require_administrator(&self) -> Result<(), Refusal> {
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
        let Json(Object(body)) = Json::from_request(request, app).await?;
        Ok(Self(body))
    }
}

/// What is deserialized from a JSON object. Structures could otherwise be given as arrays of their fields, too.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OfMap<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfMap<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        from.deserialize_map(OfMap(PhantomData)).map(Self)
    }
}

/// The parameters in the path.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Path<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let axum::extract::Path(found) =
            axum::extract::Path::from_request_parts(parts, app).await?;
        Ok(Self(found))
    }
}

/// The query string.
pub(super) struct QueryParams<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<App> for QueryParams<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let Query(asked) = Query::from_request_parts(parts, app).await?;
        Ok(Self(asked))
    }
}

/// Parses an ID in a path. An invalid ID is reported as not found.
pub(super) fn parse_job_id(text: &str) -> Result<JobId, Refusal> {
    let id: Option<JobId> = text.parse().ok();
    // Only the canonical form is accepted, because IDs are compared as text.
    id.filter(|id| id.to_string() == text.to_ascii_lowercase())
        .ok_or_else(|| Refusal::not_found("there is no such save"))
}

/// Token buckets that limit the rate of each caller's requests.
pub(super) struct RateLimiter {
    rate: Option<Rate>,
    left: Mutex<HashMap<String, (f64, Instant)>>,
}

impl RateLimiter {
    pub(super) fn new(rate: Option<Rate>) -> Self {
        Self {
            rate,
            left: Mutex::default(),
        }
    }

    pub(super) fn take(&self, caller: &str) -> Result<(), Refusal> {
        let Some(rate) = self.rate else { return Ok(()) };
        let now = Instant::now();
        let mut all = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MAX_CALLERS && !all.contains_key(caller) {
            // A full bucket is the same as no bucket.
            let full = |left: f64, at: Instant| {
                left + now.duration_since(at).as_secs_f64() * rate.per_second >= rate.burst
            };
            all.retain(|_, (left, at)| !full(*left, *at));
            if all.len() >= MAX_CALLERS {
                return Err(Refusal::too_many("too many callers at once", 5));
            }
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
