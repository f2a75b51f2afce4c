//! Who asks, and what each may do.
//!
//! Here is the gate that every request comes through: `tokens` knows the API's own tokens, `jwt` those of an identity provider,
//! `proxy` from where a header is believed.

mod jwt;
mod proxy;
mod tokens;

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, header};
use serde_json::Value;

pub use jwt::{Jwt, Keys};
pub use proxy::{Proxies, Range};
pub use tokens::{Role, Tokens};

use jwt::KeySet;

use super::target;

/// The header in which a portal (or an administrator) names the user for whom it acts.
pub const ACTS_FOR: HeaderName = HeaderName::from_static("upperdeck-user");
/// A header that no form of another site can send: with it a request by cookie is the page's own.
pub const OWN_REQUEST: HeaderName = HeaderName::from_static("upperdeck-request");
/// The cookie of the page. It holds the token of `/?token=…`, for the browser and for no script.
pub const COOKIE: &str = "upperdeck_token";
/// Longest token that is looked at, in bytes: those of identity providers grow with the groups of a user.
const MAX_TOKEN: usize = 16 << 10;

/// Why settings about callers cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The file of tokens.
    #[error("tokens: {0}")]
    Tokens(String),
    /// The key set.
    #[error("the keys of the identity provider at {at} cannot be read: {reason}")]
    Keys {
        /// Path or URL.
        at: String,
        /// Why.
        reason: String,
    },
    /// An address range.
    #[error(
        "{0:?} is no range of addresses: write ADDRESS or ADDRESS/BITS, or unix for those on a socket file"
    )]
    Range(String),
    /// A header's name.
    #[error("{0:?} is no name of a header")]
    Header(String),
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// For the audit and for idempotency keys: `token:NAME`, `jwt:USER`, `proxy:USER`; with ` for USER` behind a portal's.
    pub name: String,
    /// For whom it asks; none: a portal that names nobody, or an administrator without a user's name.
    pub user: Option<String>,
    /// Whether it may see and do everything.
    pub administrator: bool,
}

/// Why a caller is sent away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Nothing says who asks, or what says so is not valid.
    Unknown(&'static str),
    /// We know who it is, and the request is not theirs to make.
    Forbidden(&'static str),
    /// The identity provider's keys cannot be had: it may pass.
    Unavailable(String),
}

/// The settings about callers, ready to be asked.
pub(super) struct Gate {
    tokens: Tokens,
    jwt: Option<(Jwt, KeySet)>,
    proxies: Option<Proxies>,
    origin: Option<String>,
}

impl Gate {
    pub(super) fn new(
        tokens: Tokens,
        jwt: Option<Jwt>,
        proxies: Option<Proxies>,
        public_url: Option<&str>,
    ) -> Self {
        let jwt = jwt.map(|jwt| {
            let keys = KeySet::new(jwt.keys.clone());
            (jwt, keys)
        });
        Self {
            tokens,
            jwt,
            proxies,
            origin: public_url.and_then(origin_of),
        }
    }

    /// Whether the cookie is for TLS only.
    pub(super) fn secure(&self) -> bool {
        self.origin
            .as_ref()
            .is_some_and(|origin| origin.starts_with("https://"))
    }

    /// Reads the key set once, so that a wrong setting shows at the start.
    pub(super) async fn check(&self) -> Result<(), AuthError> {
        match &self.jwt {
            Some((_, keys)) => keys.read().await.map(|_| ()),
            None => Ok(()),
        }
    }

    /// Who asks. `peer`: none on a socket file. `changes`: whether the request may change something.
    pub(super) async fn caller(
        &self,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        changes: bool,
    ) -> Result<Caller, Rejected> {
        let (found, ambient) = if let Some(said) = headers.get(header::AUTHORIZATION) {
            let token = said
                .to_str()
                .ok()
                .and_then(|text| {
                    let (scheme, token) = text.split_once(' ')?;
                    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
                })
                .ok_or(Rejected::Unknown("Authorization has no Bearer token"))?;
            (self.bearer(token).await?, false)
        } else if let Some(token) = cookie(headers) {
            (self.bearer(token).await?, true)
        } else if let Some(found) = self.by_proxy(headers, peer)? {
            (found, true)
        } else {
            return Err(Rejected::Unknown(
                "say who you are: Authorization: Bearer TOKEN",
            ));
        };
        // What the browser adds by itself says nothing about who made the request.
        if ambient && changes {
            self.own_request(headers)?;
        }
        acting_for(found, headers)
    }

    /// Who has this token; for `/?token=…` as well.
    pub(super) async fn bearer(&self, token: &str) -> Result<(Role, Caller), Rejected> {
        const WRONG: Rejected = Rejected::Unknown("the token is not valid, or not any more");
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(WRONG);
        }
        if let Some(token) = self.tokens.find(token) {
            let caller = Caller {
                name: format!("token:{}", token.name),
                user: token.user.clone(),
                administrator: token.role == Role::Administrator,
            };
            return Ok((token.role, caller));
        }
        match &self.jwt {
            Some((jwt, keys)) if token.bytes().filter(|&b| b == b'.').count() == 2 => {
                let claims = keys.claims(jwt, token).await?.ok_or(WRONG)?;
                let user = claims
                    .get(&jwt.user_claim)
                    .and_then(Value::as_str)
                    .filter(|user| target::component(user).is_ok())
                    .ok_or(Rejected::Unknown(
                        "the token names no user that can be one here",
                    ))?;
                let listed = jwt.administrators.iter().any(|name| name == user);
                let claimed = jwt
                    .administrator_claim
                    .as_ref()
                    .is_some_and(|(path, value)| {
                        let mut at = claims.get(path);
                        if at.is_none() {
                            let mut parts = path.split('.');
                            at = parts.next().and_then(|first| claims.get(first));
                            for part in parts {
                                at = at.and_then(|claim| claim.get(part));
                            }
                        }
                        match at {
                            Some(Value::String(text)) => text == value,
                            Some(Value::Array(all)) => {
                                all.iter().any(|one| one.as_str() == Some(value))
                            }
                            Some(Value::Bool(yes)) => *yes && value == "true",
                            _ => false,
                        }
                    });
                Ok(person("jwt", user, listed || claimed))
            }
            _ => Err(WRONG),
        }
    }

    fn by_proxy(
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
        let administrator = proxies.administrators.iter().any(|name| name == user);
        Ok(Some(person("proxy", user, administrator)))
    }

    /// A request of our own page: its origin is ours, and it has what no form of another page can have.
    fn own_request(&self, headers: &HeaderMap) -> Result<(), Rejected> {
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
        if headers.contains_key(OWN_REQUEST) || json {
            Ok(())
        } else {
            Err(FOREIGN)
        }
    }
}

fn person(by: &str, user: &str, administrator: bool) -> (Role, Caller) {
    let role = if administrator {
        Role::Administrator
    } else {
        Role::User
    };
    let caller = Caller {
        name: format!("{by}:{user}"),
        user: Some(user.to_owned()),
        administrator,
    };
    (role, caller)
}

/// Takes in the header with which a portal says whose request this is.
fn acting_for((role, mut caller): (Role, Caller), headers: &HeaderMap) -> Result<Caller, Rejected> {
    let mut said = headers.get_all(ACTS_FOR).iter();
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
            return Err(Rejected::Forbidden("a user acts for nobody else"));
        }
        Role::User => {}
        Role::Portal | Role::Administrator => {
            caller.name = format!("{} for {user}", caller.name);
            caller.user = Some(user.to_owned());
            // For the user, and with no more than the user's rights.
            caller.administrator = false;
        }
    }
    Ok(caller)
}

/// `https://save.example.org/x` -> `https://save.example.org`
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

/// The token in the page's cookie.
fn cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .find_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='))
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
