//! Determines how a registry host is reached (HTTPS before HTTP) and where its `Location` headers lead.

use std::sync::PoisonError;

use bytes::Bytes;
use http::header::{LOCATION, WWW_AUTHENTICATE};
use http::{HeaderMap, Method};
use reqwest::Url;

use super::Host;
use super::request::{Call, reply_of};
use super::scopes::Scopes;
use crate::common::reference::authority;
use crate::store::registry::auth::{Challenge, Origin, read_challenge};
use crate::store::registry::error::{Error, Request, Step};

impl Host {
    /// Returns the URL of `path` (including its query) on this host. The first call determines how the host is reached.
    pub(in crate::store::registry) async fn url(&self, path: &str) -> Result<Url, Error> {
        let origin = self.origin().await?;
        let nonsense = |_| Error::ProtocolViolation {
            request: Request::new(&Method::GET, &origin.url),
            reason: format!("{path:?} is no path"),
        };
        origin.url.join(path).map_err(nonsense)
    }

    /// Resolves `Location` on this host: path and query are used, the host is ignored. Harbor builds the header from
    /// its configured external address, and an upload with credentials never goes to a host that an answer names.
    pub(in crate::store::registry) async fn resolve_location(
        &self,
        call: &Request,
        asked: &Url,
        headers: &HeaderMap,
    ) -> Result<Url, Error> {
        let nonsense = |reason: &str| Error::ProtocolViolation {
            request: call.clone(),
            reason: reason.to_owned(),
        };
        let location = headers
            .get(LOCATION)
            .ok_or_else(|| nonsense("the answer has no Location"))?;
        let location = location
            .to_str()
            .map_err(|_| nonsense("its Location is not text"))?;
        let target = asked
            .join(location)
            .map_err(|_| nonsense("its Location is no address"))?;
        if target.cannot_be_a_base() {
            return Err(nonsense("its Location is no address on a host"));
        }
        let mut url = self.origin().await?.url.clone();
        url.set_path(target.path());
        url.set_query(target.query());
        Ok(url)
    }

    pub(super) async fn origin(&self) -> Result<&Origin, Error> {
        self.origin.get_or_try_init(|| self.find_origin()).await
    }

    /// Tries HTTPS, then plain HTTP only if the user allowed it or the registry is on the loopback host.
    async fn find_origin(&self) -> Result<Origin, Error> {
        let mut failed = 0;
        loop {
            match self.try_schemes().await {
                Ok(origin) => return Ok(origin),
                Err(e) => {
                    failed += 1;
                    let pause = self.pause(failed, &e).ok_or(e)?;
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn try_schemes(&self) -> Result<Origin, Error> {
        let plain = self.loopback || !self.settings.tls_verify;
        let over_tls = match self.ping("https").await {
            Ok(url) => {
                return Ok(Origin {
                    url,
                    verified: self.settings.tls_verify,
                    loopback: self.loopback,
                });
            }
            Err(e) => e,
        };
        // Plain HTTP is tried only if no TLS connection was made. An untrusted certificate is no reason to continue
        // without TLS.
        let no_tls = matches!(over_tls, Error::Unreachable { .. } | Error::NoTls { .. });
        if !plain || !no_tls {
            return Err(over_tls);
        }
        let url = self.ping("http").await?;
        Ok(Origin {
            url,
            verified: false,
            loopback: self.loopback,
        })
    }

    /// Sends `GET /v2/` to check that the host is a registry and to learn its challenge. Returns the base URL.
    async fn ping(&self, scheme: &str) -> Result<Url, Error> {
        let name = authority(&self.settings.name);
        let setup = |_| Error::Setup {
            host: name.to_owned(),
            reason: "not the host of an address".to_owned(),
        };
        let url: Url = format!("{scheme}://{name}/v2/").parse().map_err(setup)?;
        let call = Call {
            step: Step::Ping,
            method: Method::GET,
            url,
            scopes: Scopes {
                repository: String::new(),
                scopes: Vec::new(),
            },
            headers: HeaderMap::new(),
            body: Bytes::new(),
            wait: self.settings.stall_timeout,
            max_attempts: 1,
            max_attempts_at_500: 1,
            accept: &[401],
            tag: None,
        };
        let response = self
            .send_once(&self.registry_client, &call, &call.url, None)
            .await?;
        self.record_challenge(response.headers());
        let response = self.check_status(&call, response).await?;
        if response.status().is_redirection() {
            return Err(Error::Reply(Box::new(reply_of(&call, response).await)));
        }
        let mut url = call.url;
        url.set_path("/");
        Ok(url)
    }

    /// Records the challenge of an answer. Returns true if it differs from the known one.
    pub(super) fn record_challenge(&self, headers: &HeaderMap) -> bool {
        let values = headers
            .get_all(WWW_AUTHENTICATE)
            .into_iter()
            .filter_map(|v| v.to_str().ok());
        let Some(asked) = read_challenge(values) else {
            return false;
        };
        let mut known = self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Harbor offers Basic when a token lacks permission. This is a refusal and not a change of the authentication
        // scheme.
        if known.as_ref() == Some(&asked) || (known.is_some() && asked == Challenge::Basic) {
            return false;
        }
        *known = Some(asked);
        true
    }
}
