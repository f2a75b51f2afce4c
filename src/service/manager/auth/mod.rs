//! Authentication and permissions of callers.
//!
//! Every request passes the `Authenticator`. The module `tokens` verifies the API's own tokens, `jwt` those of an identity
//! provider, `kubernetes` those of a cluster's users and service accounts, `proxy` the header of a trusted proxy, and
//! `cookie` the sign-ins of browsers. `oidc` signs in with an identity provider. `claims` reads what they say of a user.

mod claims;
mod cookie;
mod email;
mod http;
mod jwt;
mod kubernetes;
mod oidc;
mod proxy;
mod sealed;
mod tokens;

use std::net::IpAddr;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, header};
use serde_json::Value;
use subtle::ConstantTimeEq as _;

pub use crate::service::connections::Range;
pub use claims::{Claims, Groups};
pub use email::Addresses;
pub use jwt::{Jwt, Keys};
pub use kubernetes::{Kubernetes, Permission};
pub use oidc::Oidc;
pub use proxy::Proxies;
pub use tokens::{Role, Tokens};

use claims::Identity;
use jwt::KeySet;

use super::target;
use crate::service::job::now_ms;
use crate::service::record::{self, Record, SignIn};

pub(super) use claims::{as_text, is_group};
pub(super) use cookie::{Cookie, digest, secret};
pub(crate) use kubernetes::Subject;
pub(super) use kubernetes::{Cluster, Grant};
pub(super) use oidc::{Answer, Complete, FLOW_S, Failed, Provider};
pub(super) use sealed::{open, seal};

/// Header in which a portal (or an administrator) names the user it acts for.
pub(crate) const USER_HEADER: HeaderName = HeaderName::from_static("upperdeck-user");
/// Header that forms on other sites cannot send. It proves that a request with a cookie comes from the page.
pub(crate) const REQUEST_HEADER: HeaderName = HeaderName::from_static("upperdeck-request");
/// Header with the key that the page received at sign-in. The cookie is not accepted without it.
pub(crate) const PAGE_HEADER: HeaderName = HeaderName::from_static("upperdeck-page");
/// Header for the token of a request that comes through the service proxy of a Kubernetes API server, which removes
/// `Authorization`.
pub(crate) const TOKEN_HEADER: HeaderName = HeaderName::from_static("upperdeck-authorization");
/// Maximum length of a token in bytes; tokens of identity providers grow with the number of a user's groups.
const MAX_TOKEN: usize = 16 << 10;

/// Why the settings for authentication are invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The token file is invalid.
    #[error("tokens: {0}")]
    Tokens(String),
    /// The key set cannot be read.
    #[error("the keys of the identity provider at {at} cannot be read: {reason}")]
    Keys {
        /// Path or URL of the key set.
        at: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file of groups is invalid.
    #[error("groups: {0}")]
    Groups(String),
    /// The e-mail addresses of users are invalid.
    #[error("addresses: {0}")]
    Addresses(String),
    /// The Kubernetes cluster cannot be asked about its users.
    #[error("users of the Kubernetes cluster: {0}")]
    Kubernetes(String),
    /// The settings of the identity provider for signing in are invalid.
    #[error("sign-in with an identity provider: {0}")]
    Oidc(String),
    /// The text is not an address range.
    #[error(transparent)]
    Range(#[from] crate::service::connections::RangeError),
    /// The text is not the name of a header.
    #[error("{0:?} is not the name of a header")]
    Header(String),
}

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Name for the audit log and idempotency keys: `token:NAME`, `jwt:USER`, `oidc:USER`, `proxy:USER` or
    /// `kubernetes:USER` (the user's name in the cluster), with the suffix ` for USER` if it acts for a user.
    pub(crate) name: String,
    /// User that the caller acts as; `None` for a portal that names no user, or an administrator without a user name.
    pub(crate) user: Option<String>,
    /// Whether the caller may see and do everything.
    pub(crate) administrator: bool,
    /// How the caller was authenticated.
    pub(crate) via: Via,
    /// Groups that the user is a member of, sorted.
    pub(crate) groups: Vec<String>,
    /// E-mail address of the user, as the administrator, the identity provider or the proxy states it.
    pub(crate) email: Option<String>,
    /// The user of a Kubernetes cluster; its permissions there decide which sessions the caller may save.
    pub(crate) subject: Option<Arc<Subject>>,
}

impl Caller {
    /// Returns the service itself as a caller that acts for the owner of a session.
    pub(crate) fn of_service(name: &str, user: Option<String>) -> Self {
        Self {
            name: name.to_owned(),
            user,
            administrator: false,
            via: Via::Token,
            groups: Vec::new(),
            email: None,
            subject: None,
        }
    }
}

/// How a caller was authenticated.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// By a token in the request.
    Token,
    /// By a proxy.
    Proxy,
    /// By the cookie of a browser that has signed in.
    SignIn,
}

/// A caller with a valid token, and the credential that a sign-in with it would be based on.
pub(super) struct Bearer {
    pub(super) role: Role,
    pub(super) caller: Caller,
    /// `token:FINGERPRINT`, `jwt:ISSUER`, or `oidc:ISSUER`.
    pub(super) basis: String,
    /// Expiry of the token in milliseconds since the epoch; `None` if it does not expire.
    pub(super) expires_ms: Option<i64>,
}

/// Why a caller is rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rejected {
    /// The request has no credentials, or they are not valid.
    Unknown(&'static str),
    /// The caller is known but not permitted to make the request.
    Forbidden(&'static str),
    /// The identity provider's keys are temporarily unavailable.
    Unavailable(String),
    /// The Kubernetes API server gives no answer.
    Cluster,
    /// Too many unknown tokens came from the address of the request.
    Busy,
    /// The record cannot be read.
    Record(String),
}

impl From<record::Error> for Rejected {
    fn from(error: record::Error) -> Self {
        Self::Record(error.to_string())
    }
}

/// Authenticates requests according to the settings.
pub(super) struct Authenticator {
    tokens: Tokens,
    jwt: Option<(Jwt, Arc<KeySet>)>,
    proxies: Option<Proxies>,
    oidc: Option<Oidc>,
    cluster: Option<Cluster>,
    groups: Groups,
    addresses: Addresses,
    origin: Option<String>,
    pub(super) cookie: Cookie,
    record: Record,
}

/// The ways to authenticate that are set up.
#[derive(Default)]
pub(super) struct Ways {
    /// API tokens.
    pub(super) tokens: Tokens,
    /// Authentication by JSON Web Tokens of an identity provider; `None` disables it.
    pub(super) jwt: Option<Jwt>,
    /// Sign-in with an identity provider; `None` disables it.
    pub(super) oidc: Option<Oidc>,
    /// Authentication by a Kubernetes cluster; `None` disables it.
    pub(super) cluster: Option<Cluster>,
    /// Authentication by a header that a trusted proxy sets after it has authenticated the user; `None`: the header is
    /// ignored.
    pub(super) proxies: Option<Proxies>,
    /// Groups of users, in addition to those that the identity provider or the proxy states.
    pub(super) groups: Groups,
    /// E-mail addresses of users, in addition to those that the identity provider or the proxy states.
    pub(super) addresses: Addresses,
}

impl Authenticator {
    pub(super) fn new(
        ways: Ways,
        public_url: Option<&str>,
        port: Option<u16>,
        record: Record,
    ) -> Self {
        let jwt = ways.jwt.map(|jwt| {
            let keys = KeySet::new(jwt.keys.clone());
            (jwt, keys)
        });
        Self {
            tokens: ways.tokens,
            jwt,
            proxies: ways.proxies,
            oidc: ways.oidc,
            cluster: ways.cluster,
            groups: ways.groups,
            addresses: ways.addresses,
            origin: public_url.and_then(origin_of),
            cookie: Cookie::new(public_url, port),
            record,
        }
    }

    /// Returns whether there are tokens that users can sign in with.
    pub(super) fn takes_tokens(&self) -> bool {
        !self.tokens.is_empty() || self.jwt.is_some()
    }

    /// Returns the Kubernetes cluster whose users are authenticated.
    pub(super) fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// Fetches the key set and asks the cluster once, so that wrong settings are detected at startup.
    pub(super) async fn check(&self) -> Result<(), AuthError> {
        if let Some(cluster) = &self.cluster {
            cluster.check().await?;
        }
        match &self.jwt {
            Some((_, keys)) => keys.read().await,
            None => Ok(()),
        }
    }

    /// Authenticates a request. `peer` is `None` on a socket file. `changes` tells whether the request may change data,
    /// `events` whether it is for an event stream, for which browsers cannot send the page's header.
    pub(super) async fn caller(
        &self,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        changes: bool,
        events: bool,
    ) -> Result<Caller, Rejected> {
        let (found, ambient) =
            if headers.contains_key(header::AUTHORIZATION) || headers.contains_key(TOKEN_HEADER) {
                let bearer = self.bearer(headers, peer).await?;
                ((bearer.role, bearer.caller), false)
            } else if let Some(found) = self.by_proxy(headers, peer)? {
                (found, true)
            } else if let Some(found) = self.by_cookie(headers, events).await? {
                (found, true)
            } else {
                return Err(Rejected::Unknown(
                    "say who you are: Authorization: Bearer TOKEN",
                ));
            };
        // Credentials that a browser adds by itself do not tell which page made the request.
        if ambient && changes {
            self.check_same_origin(headers)?;
        }
        let mut caller = apply_user_header(found, headers)?;
        if let Some(user) = &caller.user {
            self.groups.add(user, &mut caller.groups);
            caller.email = self.addresses.of(user, caller.email.take());
        }
        Ok(caller)
    }

    /// Returns the sign-in of the request's cookie, whatever page the request comes from. Of several cookies, the one
    /// that matches the page's key is preferred, otherwise the first one.
    pub(super) async fn signed_in(
        &self,
        headers: &HeaderMap,
    ) -> Result<Option<(SignIn, Role, Caller)>, Rejected> {
        let mut first = None;
        for value in self.cookie.all_of(headers) {
            let Some(found) = self.record.signed_in(&digest(value), now_ms()).await? else {
                continue;
            };
            let Some((role, mut caller)) = self.current_caller(&found) else {
                continue;
            };
            caller.via = Via::SignIn;
            let own = has_page_key(headers, &found);
            let one = (found, role, caller);
            if own {
                return Ok(Some(one));
            }
            first.get_or_insert(one);
        }
        Ok(first)
    }

    /// Authenticates by cookie. Returns `None` if the request has no cookie of the page.
    async fn by_cookie(
        &self,
        headers: &HeaderMap,
        events: bool,
    ) -> Result<Option<(Role, Caller)>, Rejected> {
        if self.cookie.all_of(headers).is_empty() {
            return Ok(None);
        }
        let Some((found, role, caller)) = self.signed_in(headers).await? else {
            return Err(Rejected::Unknown("you are not signed in any more"));
        };
        // The URL of an event stream contains the ID of a save, which a party that has only the cookie cannot find out.
        let own = has_page_key(headers, &found) || (events && !headers.contains_key(PAGE_HEADER));
        if !own {
            return Err(Rejected::Unknown(
                "the cookie alone is not enough: sign in on this page",
            ));
        }
        Ok(Some((role, caller)))
    }

    /// Returns the role and caller of a sign-in according to the current settings; `None` if its credential no longer
    /// exists.
    fn current_caller(&self, found: &SignIn) -> Option<(Role, Caller)> {
        match found.basis.split_once(':')? {
            ("token", print) => Some(caller_of_token(self.tokens.by_fingerprint(print)?)),
            ("jwt", issuer) => {
                let (jwt, _) = self.jwt.as_ref().filter(|(jwt, _)| jwt.issuer == issuer)?;
                Some(caller_signed_in("jwt", &jwt.claims, found))
            }
            ("oidc", issuer) => {
                let oidc = self.oidc.as_ref().filter(|oidc| oidc.issuer == issuer)?;
                Some(caller_signed_in("oidc", &oidc.claims, found))
            }
            _ => None,
        }
    }

    /// Authenticates by the token of the request, which comes from `peer`.
    pub(super) async fn bearer(
        &self,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Bearer, Rejected> {
        const WRONG: Rejected = Rejected::Unknown("the token is not valid, or not any more");
        let token = token_of(headers)?;
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(WRONG);
        }
        if let Some(token) = self.tokens.find(token) {
            let (role, caller) = caller_of_token(token);
            return Ok(Bearer {
                role,
                caller,
                basis: format!("token:{}", token.fingerprint()),
                expires_ms: None,
            });
        }
        let jwt = self.jwt.as_ref().filter(|(jwt, _)| {
            token.bytes().filter(|&b| b == b'.').count() == 2
                // The tokens of two issuers differ in nothing else, and none is shown to the other.
                && (self.cluster.is_none() || jwt::issuer(token).as_ref() == Some(&jwt.issuer))
        });
        if let Some((jwt, keys)) = jwt {
            let claims = keys.claims(jwt, token).await?.ok_or(WRONG)?;
            let identity = jwt.claims.identity(&claims)?;
            let (role, caller) = caller_named(Via::Token, "jwt", identity);
            let ends = claims.get("exp").and_then(Value::as_f64);
            return Ok(Bearer {
                role,
                caller,
                basis: format!("jwt:{}", jwt.issuer),
                expires_ms: Some(ends.map_or(0, |seconds| (seconds * 1000.0) as i64)),
            });
        }
        let cluster = self.cluster.as_ref().ok_or(WRONG)?;
        let found = cluster.review(token, peer).await?.ok_or(WRONG)?;
        let (role, mut caller) = caller_named(Via::Token, "kubernetes", found.identity);
        caller.name = format!("kubernetes:{}", found.subject.name());
        caller.subject = Some(found.subject);
        Ok(Bearer {
            role,
            caller,
            basis: "kubernetes".to_owned(),
            expires_ms: None,
        })
    }

    /// Authenticates by the header of a proxy. Returns `None` if there is no such header.
    pub(super) fn by_proxy(
        &self,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Option<(Role, Caller)>, Rejected> {
        let Some(proxies) = &self.proxies else {
            return Ok(None);
        };
        let mut said = headers.get_all(&proxies.header).iter();
        let Some(user) = said.next() else {
            return Ok(None);
        };
        if !proxies.from.iter().any(|range| range.holds(peer)) {
            return Err(Rejected::Unknown(
                "the header with a user's name is believed from the centre's proxies only",
            ));
        }
        let user = user
            .to_str()
            .ok()
            .filter(|user| said.next().is_none() && target::component(user).is_ok())
            .ok_or(Rejected::Unknown(
                "the proxy names no user that can be one here",
            ))?;
        let identity = Identity {
            user: user.to_owned(),
            administrator: proxies.administrators.iter().any(|name| name == user),
            groups: proxies.groups_of(headers),
            email: proxies.email_of(headers),
        };
        Ok(Some(caller_named(Via::Proxy, "proxy", identity)))
    }

    /// Returns a caller whom the identity provider has signed in, and what the sign-in is based on.
    pub(super) fn by_provider(oidc: &Oidc, complete: Complete, expires_ms: i64) -> Bearer {
        let (role, caller) = caller_named(Via::SignIn, "oidc", complete.identity);
        Bearer {
            role,
            caller,
            basis: format!("oidc:{}", oidc.issuer),
            expires_ms: Some(expires_ms),
        }
    }

    /// Checks that a request comes from the manager's own page: it has the page's origin, and a header or content type
    /// that forms on other pages cannot produce.
    pub(super) fn check_same_origin(&self, headers: &HeaderMap) -> Result<(), Rejected> {
        const FOREIGN: Rejected = Rejected::Forbidden(
            "the request comes from another page; with a cookie or by a proxy, send the Upperdeck-Request header",
        );
        let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let site = text(HeaderName::from_static("sec-fetch-site"));
        if site.is_some_and(|site| site != "same-origin" && site != "none") {
            return Err(FOREIGN);
        }
        if headers.contains_key(header::ORIGIN) {
            let ours = match &self.origin {
                Some(origin) => text(header::ORIGIN) == Some(origin),
                None => {
                    let host = text(header::HOST).unwrap_or_default();
                    text(header::ORIGIN)
                        .and_then(|origin| origin.split_once("://"))
                        .is_some_and(|(_, from)| !host.is_empty() && from == host)
                }
            };
            if !ours {
                return Err(FOREIGN);
            }
        }
        let json =
            text(header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json"));
        if headers.contains_key(REQUEST_HEADER) || json {
            Ok(())
        } else {
            Err(FOREIGN)
        }
    }
}

/// Returns the bearer token of a request.
fn token_of(headers: &HeaderMap) -> Result<&str, Rejected> {
    let own = headers.get_all(header::AUTHORIZATION).iter();
    let mut said = own.chain(headers.get_all(TOKEN_HEADER).iter());
    said.next()
        .filter(|_| said.next().is_none())
        .and_then(|text| text.to_str().ok())
        .and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        })
        .ok_or(Rejected::Unknown("Authorization has no Bearer token"))
}

/// Returns whether a request contains the page key of this sign-in.
fn has_page_key(headers: &HeaderMap, found: &SignIn) -> bool {
    let mut keys = headers.get_all(PAGE_HEADER).iter();
    let Some(key) = keys.next() else {
        return false;
    };
    let given = digest(key.to_str().unwrap_or_default());
    bool::from(given.as_bytes().ct_eq(found.page.as_bytes())) && keys.next().is_none()
}

fn caller_of_token(token: &tokens::Token) -> (Role, Caller) {
    let caller = Caller {
        name: format!("token:{}", token.name),
        user: token.user.clone(),
        administrator: token.role == Role::Administrator,
        via: Via::Token,
        groups: Vec::new(),
        email: None,
        subject: None,
    };
    (token.role, caller)
}

fn caller_named(via: Via, by: &str, identity: Identity) -> (Role, Caller) {
    let role = if identity.administrator {
        Role::Administrator
    } else {
        Role::User
    };
    let caller = Caller {
        name: format!("{by}:{}", identity.user),
        user: Some(identity.user),
        administrator: identity.administrator,
        via,
        groups: identity.groups,
        email: identity.email,
        subject: None,
    };
    (role, caller)
}

/// Returns the caller of a sign-in that is based on the claims of an identity provider.
fn caller_signed_in(by: &str, claims: &Claims, found: &SignIn) -> (Role, Caller) {
    let identity = Identity {
        user: found.user.clone(),
        administrator: found.administrator || claims.administrators.contains(&found.user),
        groups: found.groups.lines().map(str::to_owned).collect(),
        // Earlier versions kept whatever the provider said.
        email: found.email.clone().filter(|email| email::is_address(email)),
    };
    caller_named(Via::SignIn, by, identity)
}

/// Applies the header in which a portal names the user it acts for.
fn apply_user_header(
    (role, mut caller): (Role, Caller),
    headers: &HeaderMap,
) -> Result<Caller, Rejected> {
    let mut said = headers.get_all(USER_HEADER).iter();
    let Some(named) = said.next() else {
        return Ok(caller);
    };
    let user = named
        .to_str()
        .ok()
        .filter(|user| said.next().is_none() && target::component(user).is_ok())
        .ok_or(Rejected::Forbidden(
            "Upperdeck-User has to be the name of one user",
        ))?;
    match role {
        Role::User if caller.user.as_deref() != Some(user) => {
            return Err(Rejected::Forbidden("a user may not act for another user"));
        }
        Role::User => {}
        Role::Portal | Role::Administrator => {
            caller.name = format!("{} for {user}", caller.name);
            caller.user = Some(user.to_owned());
            // What the credential says is about the caller, not about the user.
            caller.groups.clear();
            caller.email = None;
            caller.subject = None;
            // A caller that acts for a user has only that user's permissions.
            caller.administrator = false;
        }
    }
    Ok(caller)
}

/// Returns the origin of a URL: `https://save.example.org/x` -> `https://save.example.org`.
fn origin_of(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next()?;
    let default = match scheme {
        "https" => ":443",
        _ => ":80",
    };
    let host = host.strip_suffix(default).unwrap_or(host);
    Some(format!("{scheme}://{host}").to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_of_urls() {
        for (url, origin) in [
            ("https://save.example.org/x?y", "https://save.example.org"),
            ("https://Save.example.org:443/", "https://save.example.org"),
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ] {
            assert_eq!(origin_of(url).as_deref(), Some(origin));
        }
    }
}
