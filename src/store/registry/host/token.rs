//! Authentication at a registry host: selects credentials and fetches tokens for the scopes of requests.

use std::sync::PoisonError;
use std::time::Instant;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Url;
use zeroize::{Zeroize, Zeroizing};

use super::Host;
use super::request::{Call, reply_of};
use super::scopes::Scopes;
use crate::store::registry::auth::{Challenge, Origin, Token, TokenAge};
use crate::store::registry::credentials::{
    CredentialLookup, Credentials, basic_header, bearer_header,
};
use crate::store::registry::error::{Error, Request, Step};

/// Maximum size of a token document, in bytes.
const MAX_DOCUMENT: u64 = 1 << 20;

/// Characters that are escaped in a query value. Registries and token services accept `:` and `/` escaped or not.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// A function that looks up the credentials of a host for a repository.
pub(in crate::store::registry) type CredentialSource =
    Box<dyn Fn(&str) -> Result<CredentialLookup, Error> + Send + Sync>;

impl Host {
    pub(in crate::store::registry) fn credentials(
        &self,
        repository: &str,
    ) -> Result<CredentialLookup, Error> {
        let mut cache = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = cache.get(repository) {
            return Ok(found.clone());
        }
        let found = (self.settings.credentials)(repository)?;
        cache.insert(repository.to_owned(), found.clone());
        Ok(found)
    }

    /// Returns the `Authorization` header for a request and the age of the token in it.
    pub(in crate::store::registry) async fn authorization(
        &self,
        scopes: &Scopes,
    ) -> Result<(Option<HeaderValue>, Option<TokenAge>), Error> {
        let challenge = self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let origin = self.origin().await?;
        match challenge {
            None => Ok((None, None)),
            Some(Challenge::Basic) => match self.credentials(&scopes.repository)? {
                CredentialLookup::Credentials {
                    credentials: Credentials::Basic { user, password },
                    ..
                } => Ok((basic_header(&user, &password), None)),
                found => Err(Error::NoCredentials {
                    request: Request::new(&Method::GET, &origin.url),
                    why: match found {
                        CredentialLookup::Credentials { source, .. } => {
                            format!("user and password, and {source} has an identity token")
                        }
                        found => found.describe(self.name()),
                    },
                }),
            },
            Some(Challenge::Bearer { realm, service }) => {
                // The lock is held while a token is fetched, so that concurrent requests share one.
                let mut tokens = self.tokens.lock().await;
                let key = scopes.key();
                let now = Instant::now();
                if let Some(token) = tokens.get(&key).filter(|t| !t.needs_renewal(now)) {
                    return Ok((bearer_header(&token.value), Some(token.age())));
                }
                let token = self
                    .fetch_token(origin, &realm, service.as_deref(), scopes)
                    .await?;
                let (header, age) = (bearer_header(&token.value), token.age());
                tokens.insert(key, token);
                Ok((header, Some(age)))
            }
        }
    }

    /// Returns realm and service of the token service, or `None` if no answer has named them yet.
    pub(in crate::store::registry) fn token_service(&self) -> Option<(String, Option<String>)> {
        let known = self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(Challenge::Bearer { realm, service }) => Some((realm.clone(), service.clone())),
            _ => None,
        }
    }

    /// Returns the `Authorization` header for the host's own API: user and password if there are any, never a token.
    pub(super) fn api_authorization(&self, scopes: &Scopes) -> Result<Option<HeaderValue>, Error> {
        match self.credentials(&scopes.repository)? {
            CredentialLookup::Credentials {
                credentials: Credentials::Basic { user, password },
                ..
            } => Ok(basic_header(&user, &password)),
            _ => Ok(None),
        }
    }

    /// Drops a token that the registry rejected.
    pub(in crate::store::registry) async fn forget_token(&self, scopes: &Scopes) {
        self.tokens.lock().await.remove(&scopes.key());
    }

    async fn fetch_token(
        &self,
        origin: &Origin,
        realm: &str,
        service: Option<&str>,
        scopes: &Scopes,
    ) -> Result<Token, Error> {
        let away = |why| Error::ForbiddenUrl {
            request: Request::new(&Method::GET, &origin.url),
            to: crate::common::escape::limited(realm.split('?').next().unwrap_or_default(), 200),
            why,
        };
        let mut url: Url = realm.parse().map_err(|_| away("it is no address"))?;
        origin.check_url(&url).map_err(away)?;
        let found = self.credentials(&scopes.repository)?;
        if matches!(found, CredentialLookup::Credentials { .. }) {
            origin.check_credentials_url(&url).map_err(away)?;
        }
        let escape = |text: &str| utf8_percent_encode(text, QUERY).to_string();
        let mut authorization = None;
        let mut call = Call {
            step: Step::Token,
            method: Method::GET,
            url: url.clone(),
            scopes: scopes.clone(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            wait: self.settings.stall_timeout,
            max_attempts: 1,
            max_attempts_at_500: 1,
            accept: &[],
            tag: None,
        };
        match &found {
            CredentialLookup::Credentials {
                credentials: Credentials::IdentityToken(token),
                ..
            } => {
                let form = Zeroizing::new(format!(
                    "grant_type=refresh_token&client_id=upperdeck&service={}&scope={}&refresh_token={}",
                    escape(service.unwrap_or_default()),
                    escape(&scopes.key()),
                    *Zeroizing::new(escape(token.expose())),
                ));
                call.method = Method::POST;
                call.body = Bytes::from_owner(form);
                call.headers.insert(
                    CONTENT_TYPE,
                    HeaderValue::from_static("application/x-www-form-urlencoded"),
                );
            }
            found => {
                let mut query: Vec<String> = url.query().map(str::to_owned).into_iter().collect();
                query.extend(service.map(|s| format!("service={}", escape(s))));
                query.extend(scopes.scopes.iter().map(|s| format!("scope={}", escape(s))));
                url.set_query(Some(&query.join("&")));
                call.url = url;
                if let CredentialLookup::Credentials {
                    credentials: Credentials::Basic { user, password },
                    ..
                } = found
                {
                    authorization = basic_header(user, password);
                }
            }
        }
        let client = if origin.is_same(&call.url) {
            &self.registry_client
        } else {
            &self.external_client
        };
        let asked = Instant::now();
        let request = Request::new(&call.method, &call.url);
        // This request is not repeated here, because the request that needs the token is repeated.
        let response = self
            .send_once(client, &call, &call.url, authorization)
            .await?;
        let response = self.check_status(&call, response).await?;
        if response.status().is_redirection() {
            // Following a redirect would forward the credentials.
            return Err(Error::Reply(Box::new(reply_of(&call, response).await)));
        }
        let body = self
            .read_body(&request, "the token", response, MAX_DOCUMENT)
            .await?;
        let token = Token::read(&body, asked);
        if let Ok(mut body) = body.try_into_mut() {
            body.as_mut().zeroize();
        }
        token.map_err(|reason| Error::InvalidDocument {
            request,
            reason: reason.to_owned(),
        })
    }
}
