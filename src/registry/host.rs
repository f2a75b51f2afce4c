//! One registry host: how it is reached, who we are there, and requests that survive what is passing.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Client, Response, Url};
use zeroize::{Zeroize, Zeroizing};

use super::auth::{Age, Challenge, Origin, Token, is_local_address, read_challenge};
use super::credentials::{Credentials, Found, basic_header, bearer_header, environment};
use super::error::{Error, Reply, Request, Step, causes, read_error_body};
use super::reference::{authority, is_loopback};
use super::retry::{Budget, Retry, read_retry_after};
use super::tls;

/// For a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer, or the next bytes of one, may take.
pub(super) const SILENCE: Duration = Duration::from_secs(60);
/// Token documents, and pages that say no, are read up to here.
const MAX_DOCUMENT: u64 = 1 << 20;
const MAX_ERROR_BODY: u64 = 64 << 10;
const MAX_REDIRECTS: usize = 5;
/// What need not be escaped in a query's value; registries and token services read `:` and `/` either way.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// What is asked of the token service, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scopes {
    /// The repository whose credentials are used.
    pub(super) repository: String,
    /// `repository:NAME:ACTIONS`, one or more, asked for in one request.
    pub(super) scopes: Vec<String>,
}

impl Scopes {
    /// One repository.
    pub(super) fn new(repository: &str, actions: &str) -> Self {
        Self {
            repository: repository.to_owned(),
            scopes: vec![format!("repository:{repository}:{actions}")],
        }
    }

    /// And another, to read a blob from it.
    pub(super) fn and_pull(mut self, repository: &str) -> Self {
        self.scopes.push(format!("repository:{repository}:pull"));
        self
    }

    fn key(&self) -> String {
        self.scopes.join(" ")
    }
}

/// A request whose body is at hand, so that it can be repeated.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) step: Step,
    pub(super) method: Method,
    /// An address on this host; path and query count.
    pub(super) url: Url,
    pub(super) scopes: Scopes,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// How long the answer's head may take.
    pub(super) wait: Duration,
    pub(super) tries: u32,
    /// Tries when the answer is 500: some registries say so of a manifest that they will never take.
    pub(super) tries_at_500: u32,
    /// Statuses besides 2xx that are an answer and no error.
    pub(super) accept: &'static [u16],
    /// For errors: the tag that is written.
    pub(super) tag: Option<String>,
}

/// Whom a host's credentials come from.
pub(super) type CredentialSource = Box<dyn Fn(&str) -> Result<Found, Error> + Send + Sync>;

/// Settings of a [`Host`].
pub(super) struct Settings {
    /// As in references.
    pub(super) name: String,
    pub(super) tls_verify: bool,
    pub(super) cert_dir: Option<PathBuf>,
    pub(super) retry: Retry,
    pub(super) silence: Duration,
    pub(super) budget: Arc<Budget>,
    /// Credentials by repository.
    pub(super) credentials: CredentialSource,
}

/// A registry host. Shared by all repositories on it, so that its tokens and connections are.
pub(super) struct Host {
    settings: Settings,
    loopback: bool,
    /// For the registry itself.
    own: Client,
    /// For where it sends us: no client certificate, no way to this machine.
    other: Client,
    origin: tokio::sync::OnceCell<Origin>,
    challenge: Mutex<Option<Challenge>>,
    tokens: tokio::sync::Mutex<HashMap<String, Token>>,
    found: Mutex<HashMap<String, Found>>,
    /// It takes no body whose length is not told beforehand.
    wants_lengths: AtomicBool,
    /// The smallest piece of a blob that it takes, but for the last.
    least_chunk: AtomicU64,
}

impl Host {
    pub(super) fn new(settings: Settings) -> Result<Self, Error> {
        tls::install_provider();
        let loopback = is_loopback(&settings.name);
        let usual = match settings.cert_dir {
            Some(_) => Vec::new(),
            None => tls::usual_directories(&settings.name, environment),
        };
        let certificates = tls::read(settings.cert_dir.as_deref(), &usual)?;
        let builder = || {
            let roots = tls::machine_roots()
                .iter()
                .chain(&certificates.authorities)
                .cloned();
            let builder = Client::builder()
                .user_agent(concat!("upperdeck/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .connect_timeout(CONNECT_TIMEOUT)
                // Uploads run beside each other: each has its own connection and its own flow control.
                .http1_only()
                .tls_backend_rustls()
                .tls_certs_only(roots)
                .tls_danger_accept_invalid_certs(!settings.tls_verify);
            // A proxy cannot know what this machine calls itself.
            if loopback {
                builder.no_proxy()
            } else {
                builder
            }
        };
        let setup = |e: reqwest::Error| Error::Setup {
            host: settings.name.clone(),
            reason: causes(&e).0,
        };
        let own = match certificates.identity.clone() {
            Some(identity) => builder().identity(identity),
            None => builder(),
        };
        let own = own.build().map_err(setup)?;
        let mut other = builder();
        if !loopback {
            let exempt = proxy_hosts()
                .chain([host_of(&settings.name).to_owned()])
                .collect();
            other = other.dns_resolver(Arc::new(GuardedResolver {
                exempt: Arc::new(exempt),
            }));
        }
        let other = other.build().map_err(setup)?;
        Ok(Self {
            settings,
            loopback,
            own,
            other,
            origin: tokio::sync::OnceCell::new(),
            challenge: Mutex::new(None),
            tokens: tokio::sync::Mutex::new(HashMap::new()),
            found: Mutex::new(HashMap::new()),
            wants_lengths: AtomicBool::new(false),
            least_chunk: AtomicU64::new(0),
        })
    }

    /// The host's name as in references.
    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(super) fn retry(&self) -> Retry {
        self.settings.retry
    }

    pub(super) fn silence(&self) -> Duration {
        self.settings.silence
    }

    /// The pause before the next try after `failed` tries; none: give up, this is no passing trouble, or the save has
    /// repeated enough.
    pub(super) fn pause(&self, failed: u32, error: &Error) -> Option<Duration> {
        let pause = self.settings.retry.pause(failed, error)?;
        self.settings.budget.take(pause).then_some(pause)
    }

    /// The same for a blob whose upload the registry has lost: its request is final, the blob is not.
    pub(super) fn pause_after_loss(&self, failed: u32, error: &Error) -> Option<Duration> {
        if error.passing() || failed >= self.settings.retry.tries {
            return None;
        }
        let pause = self.settings.retry.first_pause;
        self.settings.budget.take(pause).then_some(pause)
    }

    /// How long the whole save may still go on.
    pub(super) fn remaining(&self) -> Duration {
        self.settings.budget.remaining()
    }

    /// The error of a wait that brought nothing.
    pub(super) fn waited(&self, request: Request, after: Duration) -> Error {
        if self.remaining().is_zero() {
            let after = self.settings.budget.whole();
            Error::Deadline { request, after }
        } else {
            Error::Silent { request, after }
        }
    }

    /// Whether the registry has refused a stream of unknown length (411).
    pub(super) fn wants_lengths(&self) -> bool {
        self.wants_lengths.load(Ordering::Relaxed)
    }

    pub(super) fn note_wants_lengths(&self) {
        self.wants_lengths.store(true, Ordering::Relaxed);
    }

    /// `OCI-Chunk-Min-Length`, in bytes; 0 where it was not said.
    pub(super) fn least_chunk(&self) -> u64 {
        self.least_chunk.load(Ordering::Relaxed)
    }

    pub(super) fn note_least_chunk(&self, bytes: u64) {
        self.least_chunk.store(bytes, Ordering::Relaxed);
    }

    /// The client for requests to the registry itself that the other methods cannot make: streamed ones.
    pub(super) fn client(&self) -> &Client {
        &self.own
    }

    /// `path` (with query) on this host. The first call finds out how the host is reached.
    pub(super) async fn url(&self, path: &str) -> Result<Url, Error> {
        let origin = self.origin().await?;
        let nonsense = |_| Error::Nonsense {
            request: Request::new(&Method::GET, &origin.url),
            reason: format!("{path:?} is no path"),
        };
        origin.url.join(path).map_err(nonsense)
    }

    /// Where `Location` leads, on this host: its path and query count, its host does not. Harbor makes it from its
    /// configured external address, and an upload with credentials never goes to a host that an answer names.
    pub(super) async fn own_location(
        &self,
        call: &Request,
        asked: &Url,
        headers: &HeaderMap,
    ) -> Result<Url, Error> {
        let nonsense = |reason: &str| Error::Nonsense {
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

    async fn origin(&self) -> Result<&Origin, Error> {
        self.origin.get_or_try_init(|| self.find_origin()).await
    }

    /// HTTPS; plain HTTP after it only where the user allowed it, or the registry is this machine.
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
        // Only where TLS itself did not come about. An unknown certificate is no reason to go on without any.
        if !plain || !matches!(over_tls, Error::Unreachable { .. }) {
            return Err(over_tls);
        }
        let url = self.ping("http").await?;
        Ok(Origin {
            url,
            verified: false,
            loopback: self.loopback,
        })
    }

    /// `GET /v2/`: is it a registry, and what does it ask for? Returns the address of the host.
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
            wait: self.settings.silence,
            tries: 1,
            tries_at_500: 1,
            accept: &[401],
            tag: None,
        };
        let response = self.fire(&self.own, &call, &call.url, None).await?;
        self.learn(response.headers());
        let response = self.judge(&call, response).await?;
        if response.status().is_redirection() {
            return Err(Error::Reply(Box::new(reply_of(&call, response).await)));
        }
        let mut url = call.url;
        url.set_path("/");
        Ok(url)
    }

    /// Takes note of what an answer asks for; true if that is news.
    fn learn(&self, headers: &HeaderMap) -> bool {
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
        // Harbor names Basic when a token does not suffice: that is an answer, not a way in.
        if known.as_ref() == Some(&asked) || (known.is_some() && asked == Challenge::Basic) {
            return false;
        }
        *known = Some(asked);
        true
    }

    fn credentials(&self, repository: &str) -> Result<Found, Error> {
        let mut cache = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = cache.get(repository) {
            return Ok(found.clone());
        }
        let found = (self.settings.credentials)(repository)?;
        cache.insert(repository.to_owned(), found.clone());
        Ok(found)
    }

    /// The `Authorization` for a request, and the age of the token in it.
    pub(super) async fn authorization(
        &self,
        scopes: &Scopes,
    ) -> Result<(Option<HeaderValue>, Option<Age>), Error> {
        let challenge = self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let origin = self.origin().await?;
        match challenge {
            None => Ok((None, None)),
            Some(Challenge::Basic) => match self.credentials(&scopes.repository)? {
                Found::Credentials {
                    credentials: Credentials::Basic { user, password },
                    ..
                } => Ok((basic_header(&user, &password), None)),
                found => Err(Error::NoCredentials {
                    request: Request::new(&Method::GET, &origin.url),
                    why: match found {
                        Found::Credentials { source, .. } => {
                            format!("user and password, and {source} has an identity token")
                        }
                        found => found.describe(self.name()),
                    },
                }),
            },
            Some(Challenge::Bearer { realm, service }) => {
                // Held while a token is fetched: requests that start together share one.
                let mut tokens = self.tokens.lock().await;
                let key = scopes.key();
                let now = Instant::now();
                if let Some(token) = tokens.get(&key).filter(|t| !t.stale(now)) {
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

    /// Realm and service of the token service, once an answer has named them.
    pub(super) fn token_service(&self) -> Option<(String, Option<String>)> {
        let known = self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(Challenge::Bearer { realm, service }) => Some((realm.clone(), service.clone())),
            _ => None,
        }
    }

    /// For the host's own API: user and password where there are some, and never a token.
    fn api_authorization(&self, scopes: &Scopes) -> Result<Option<HeaderValue>, Error> {
        match self.credentials(&scopes.repository)? {
            Found::Credentials {
                credentials: Credentials::Basic { user, password },
                ..
            } => Ok(basic_header(&user, &password)),
            _ => Ok(None),
        }
    }

    /// Forgets a token that a registry did not take.
    pub(super) async fn forget_token(&self, scopes: &Scopes) {
        self.tokens.lock().await.remove(&scopes.key());
    }

    async fn fetch_token(
        &self,
        origin: &Origin,
        realm: &str,
        service: Option<&str>,
        scopes: &Scopes,
    ) -> Result<Token, Error> {
        let away = |why| Error::LeadsAway {
            request: Request::new(&Method::GET, &origin.url),
            to: crate::escape::limited(realm.split('?').next().unwrap_or_default(), 200),
            why,
        };
        let mut url: Url = realm.parse().map_err(|_| away("it is no address"))?;
        origin.may_visit(&url).map_err(away)?;
        let found = self.credentials(&scopes.repository)?;
        if matches!(found, Found::Credentials { .. }) {
            origin.may_confide(&url).map_err(away)?;
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
            wait: self.settings.silence,
            tries: 1,
            tries_at_500: 1,
            accept: &[],
            tag: None,
        };
        match &found {
            Found::Credentials {
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
                if let Found::Credentials {
                    credentials: Credentials::Basic { user, password },
                    ..
                } = found
                {
                    authorization = basic_header(user, password);
                }
            }
        }
        let client = if origin.is_same(&call.url) {
            &self.own
        } else {
            &self.other
        };
        let asked = Instant::now();
        let request = Request::new(&call.method, &call.url);
        // Whoever needs the token repeats this with his own request.
        let response = self.fire(client, &call, &call.url, authorization).await?;
        let response = self.judge(&call, response).await?;
        if response.status().is_redirection() {
            // It would carry the credentials on.
            return Err(Error::Reply(Box::new(reply_of(&call, response).await)));
        }
        let body = self
            .read_body(&request, "the token", response, MAX_DOCUMENT)
            .await?;
        let token = Token::read(&body, asked);
        if let Ok(mut body) = body.try_into_mut() {
            body.as_mut().zeroize();
        }
        token.map_err(|reason| Error::Garbled {
            request,
            reason: reason.to_owned(),
        })
    }

    /// Sends a request until it is answered by more than a passing trouble.
    pub(super) async fn call(&self, call: &Call) -> Result<Response, Error> {
        self.call_after(call, &mut 0).await
    }

    /// The same for a request that is a part of something that has `failed` so often before, and counts on.
    pub(super) async fn call_after(
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
    pub(super) async fn attempt(&self, call: &Call) -> Result<Response, Error> {
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
    async fn fire(
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
    pub(super) async fn judge(&self, call: &Call, response: Response) -> Result<Response, Error> {
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
    pub(super) async fn read_body(
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
async fn reply_of(call: &Call, mut response: Response) -> Reply {
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

fn host_of(name: &str) -> &str {
    let name = authority(name);
    match name.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => name,
    }
}

/// Host names of the proxies that the environment names: they may be on this machine, whoever we go to.
fn proxy_hosts() -> impl Iterator<Item = String> {
    [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ]
    .into_iter()
    .filter_map(|name| {
        let value = environment(name)?.into_string().ok()?;
        let url = Url::parse(&value)
            .ok()
            .filter(Url::has_host)
            .or_else(|| Url::parse(&format!("http://{value}")).ok())?;
        url.host_str().map(str::to_owned)
    })
}

/// Resolves names, and keeps back addresses of this machine and its link: a name that a registry chose must not lead
/// here by way of DNS. Addresses written as such do not come by here, see [`Origin::may_visit`].
struct GuardedResolver {
    exempt: Arc<HashSet<String>>,
}

impl reqwest::dns::Resolve for GuardedResolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let exempt = Arc::clone(&self.exempt);
        Box::pin(async move {
            let name = name.as_str();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name, 0)).await?.collect();
            let allowed: Vec<SocketAddr> = found
                .into_iter()
                .filter(|a| exempt.contains(name) || !is_local_address(a.ip()))
                .collect();
            if allowed.is_empty() {
                return Err(format!(
                    "{name} has no address but of this machine or its link: refused"
                )
                .into());
            }
            Ok(Box::new(allowed.into_iter()) as reqwest::dns::Addrs)
        })
    }
}
