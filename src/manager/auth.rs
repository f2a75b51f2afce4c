//! Who asks: API tokens, JSON Web Tokens, a proxy's header, a browser's cookie; and what each may do.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, header};
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::target;

/// The header in which a portal (or an administrator) names the user for whom it acts.
pub const ACTS_FOR: HeaderName = HeaderName::from_static("upperdeck-user");
/// A header that no form of another site can send: with it a request by cookie is the page's own.
pub const OWN_REQUEST: HeaderName = HeaderName::from_static("upperdeck-request");
/// The cookie of the page. It holds the token of `/?token=…`, for the browser and for no script.
pub const COOKIE: &str = "upperdeck_token";

/// Longest token that is looked at, in bytes: those of identity providers grow with the groups of a user.
const MAX_TOKEN: usize = 16 << 10;
/// A key set is asked for again after so long, and at once (but not more often than [`JWKS_AT_MOST`]) for a key that it
/// does not have.
const JWKS_FOR: Duration = Duration::from_secs(3600);
const JWKS_AT_MOST: Duration = Duration::from_secs(10);
const JWKS_TIMEOUT: Duration = Duration::from_secs(10);
/// Clocks may differ by so many seconds.
const LEEWAY_S: u64 = 30;
/// Signatures whose key can be public.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// What a token's bearer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Acts for whichever user it names, and as no administrator.
    Portal,
    /// A user.
    User,
    /// Sees and does everything.
    Administrator,
}

/// A token as the file has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenEntry {
    name: String,
    role: Role,
    user: Option<String>,
    sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenFile {
    #[serde(default)]
    token: Vec<TokenEntry>,
}

#[derive(Clone, Debug)]
struct Token {
    name: String,
    role: Role,
    user: Option<String>,
    sha256: [u8; 32],
}

/// API tokens, by their digests: the tokens themselves are nowhere.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Vec<Token>);

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

impl Tokens {
    /// From TOML: `[[token]]` with `name`, `role` (`portal`, `user`, `administrator`), `user` (for a user's token and, if
    /// it shall save sessions that nobody owns, an administrator's) and `sha256`, the token's SHA-256 in hexadecimal
    /// (`printf %s TOKEN | sha256sum`).
    pub fn parse(text: &str) -> Result<Self, AuthError> {
        let file: TokenFile =
            toml::from_str(text).map_err(|error| AuthError::Tokens(error.message().to_owned()))?;
        let mut tokens = Self::default();
        for (at, entry) in file.token.into_iter().enumerate() {
            let wrong = |reason: &str| {
                AuthError::Tokens(format!("token {} ({:?}): {reason}", at + 1, entry.name))
            };
            let digest = hex::decode(&entry.sha256).ok();
            let sha256 = digest
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(|| wrong("sha256 is not 64 hexadecimal digits"))?;
            tokens
                .add(entry.name.clone(), entry.role, entry.user.clone(), sha256)
                .map_err(|reason| wrong(&reason))?;
        }
        Ok(tokens)
    }

    /// One more, e.g. the one that `upperdeck up` makes.
    pub fn with(
        mut self,
        name: &str,
        role: Role,
        user: Option<&str>,
        token: &str,
    ) -> Result<Self, AuthError> {
        let sha256 = Sha256::digest(token).into();
        self.add(name.to_owned(), role, user.map(str::to_owned), sha256)
            .map_err(AuthError::Tokens)?;
        Ok(self)
    }

    fn add(
        &mut self,
        name: String,
        role: Role,
        user: Option<String>,
        sha256: [u8; 32],
    ) -> Result<(), String> {
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err("name is empty, too long or not printable".to_owned());
        }
        if self.0.iter().any(|token| token.name == name) {
            return Err("there is another one of this name".to_owned());
        }
        match (role, &user) {
            (Role::User, None) => return Err("role user needs a user".to_owned()),
            (Role::Portal, Some(_)) => {
                return Err("a portal names its users itself: no user here".to_owned());
            }
            _ => {}
        }
        if let Some(user) = &user {
            target::component(user).map_err(|_| format!("user {user:?} is no name of a user"))?;
        }
        self.0.push(Token {
            name,
            role,
            user,
            sha256,
        });
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Compares with all of them, in a time that says nothing of which and how far.
    fn find(&self, token: &str) -> Option<&Token> {
        let given: [u8; 32] = Sha256::digest(token).into();
        let mut found = None;
        for token in &self.0 {
            if bool::from(token.sha256.ct_eq(&given)) {
                found = Some(token);
            }
        }
        found
    }
}

/// Where an identity provider's keys are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// A JSON Web Key Set (RFC 7517) in a file; read again every hour and for a key that it does not have.
    File(PathBuf),
    /// The same over HTTPS; plain HTTP is for loopback addresses.
    Url(String),
}

/// JSON Web Tokens of an identity provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwt {
    /// Its keys.
    pub keys: Keys,
    /// What `iss` must be.
    pub issuer: String,
    /// What `aud` must be or contain.
    pub audience: String,
    /// The claim that is the user's name, e.g. `preferred_username`.
    pub user_claim: String,
    /// The claim (with dots for claims in claims, e.g. `realm_access.roles`) and the value that it is or contains for
    /// administrators.
    pub administrator_claim: Option<(String, String)>,
    /// Users who are administrators.
    pub administrators: Vec<String>,
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Those that come through a socket file.
    Unix,
    /// An address and how many of its bits count.
    Net(IpAddr, u8),
}

impl std::str::FromStr for Range {
    type Err = AuthError;

    fn from_str(text: &str) -> Result<Self, AuthError> {
        let wrong = || AuthError::Range(text.chars().take(100).collect());
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => bits.parse().map_err(|_| wrong())?,
            None => all,
        };
        if bits > all {
            return Err(wrong());
        }
        Ok(Self::Net(address, bits))
    }
}

impl Range {
    /// `None` is a peer on a socket file.
    fn holds(self, peer: Option<IpAddr>) -> bool {
        match (self, peer) {
            (Self::Unix, None) => true,
            (Self::Net(net, bits), Some(peer)) => match (net, peer.to_canonical()) {
                (IpAddr::V4(net), IpAddr::V4(peer)) => {
                    let shift = 32 - u32::from(bits);
                    let cut = |ip: u32| ip.checked_shr(shift).unwrap_or(0);
                    cut(net.to_bits()) == cut(peer.to_bits())
                }
                (IpAddr::V6(net), IpAddr::V6(peer)) => {
                    let shift = 128 - u32::from(bits);
                    let cut = |ip: u128| ip.checked_shr(shift).unwrap_or(0);
                    cut(net.to_bits()) == cut(peer.to_bits())
                }
                _ => false,
            },
            _ => false,
        }
    }
}

/// Proxies that ask people who they are, and say so in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxies {
    /// The header with the user's name, e.g. `X-Forwarded-User`. The proxy must take it out of what it gets from outside.
    pub header: HeaderName,
    /// From where it is believed.
    pub from: Vec<Range>,
    /// Users who are administrators.
    pub administrators: Vec<String>,
}

impl Proxies {
    /// From text, as flags and files have it.
    pub fn new(
        header: &str,
        from: &[String],
        administrators: Vec<String>,
    ) -> Result<Self, AuthError> {
        let name = header
            .parse()
            .map_err(|_| AuthError::Header(header.to_owned()))?;
        let from = from
            .iter()
            .map(|range| range.parse())
            .collect::<Result<_, _>>()?;
        Ok(Self {
            header: name,
            from,
            administrators,
        })
    }
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

/// An identity provider's keys, fetched when they are needed.
struct KeySet {
    from: Keys,
    held: tokio::sync::Mutex<Option<Held>>,
}

struct Held {
    keys: Arc<JwkSet>,
    at: Instant,
    tried: Instant,
}

impl KeySet {
    fn new(from: Keys) -> Self {
        Self {
            from,
            held: tokio::sync::Mutex::new(None),
        }
    }

    async fn read(&self) -> Result<JwkSet, AuthError> {
        let (at, text) = match &self.from {
            Keys::File(path) => {
                let at = path.display().to_string();
                let text = tokio::fs::read_to_string(path)
                    .await
                    .map_err(|error| error.to_string());
                (at, text)
            }
            Keys::Url(url) => (url.clone(), fetch(url).await),
        };
        let keys = text.and_then(|text| serde_json::from_str(&text).map_err(|e| e.to_string()));
        keys.map_err(|reason| AuthError::Keys { at, reason })
    }

    /// The keys, fetched again when they are old or (`missed`) when one was not among them.
    async fn get(&self, missed: bool) -> Result<Arc<JwkSet>, AuthError> {
        let mut held = self.held.lock().await;
        if let Some(held) = &*held {
            let fresh = held.at.elapsed() < JWKS_FOR && !missed;
            if fresh || held.tried.elapsed() < JWKS_AT_MOST {
                return Ok(held.keys.clone());
            }
        }
        match (self.read().await, &mut *held) {
            (Ok(keys), _) => {
                let (keys, at) = (Arc::new(keys), Instant::now());
                *held = Some(Held {
                    keys: keys.clone(),
                    at,
                    tried: at,
                });
                Ok(keys)
            }
            (Err(error), Some(old)) => {
                tracing::warn!(auth.error = %error, "the old keys of the identity provider are used on");
                old.tried = Instant::now();
                Ok(old.keys.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    /// The claims of a token that is valid by one of the keys; none: it is not.
    async fn claims(
        &self,
        jwt: &Jwt,
        token: &str,
    ) -> Result<Option<HashMap<String, Value>>, Rejected> {
        let Ok(head) = jsonwebtoken::decode_header(token) else {
            return Ok(None);
        };
        if !ALGORITHMS.contains(&head.alg) {
            return Ok(None);
        }
        let unavailable = |error: AuthError| Rejected::Unavailable(error.to_string());
        let of = |keys: &JwkSet| -> Vec<Jwk> {
            let fits = |key: &&Jwk| match (&head.kid, &key.common.key_id) {
                (Some(asked), Some(id)) => asked == id,
                _ => true,
            };
            keys.keys.iter().filter(fits).cloned().collect()
        };
        let mut keys = of(&*self.get(false).await.map_err(unavailable)?);
        if keys.is_empty() {
            keys = of(&*self.get(true).await.map_err(unavailable)?);
        }
        let mut rules = Validation::new(head.alg);
        rules.leeway = LEEWAY_S;
        rules.validate_nbf = true;
        rules.set_issuer(&[&jwt.issuer]);
        rules.set_audience(&[&jwt.audience]);
        rules.set_required_spec_claims(&["exp", "iss", "aud"]);
        Ok(keys.iter().find_map(|key| {
            let key = DecodingKey::from_jwk(key).ok()?;
            let found = jsonwebtoken::decode::<HashMap<String, Value>>(token, &key, &rules).ok()?;
            Some(found.claims)
        }))
    }
}

async fn fetch(url: &str) -> Result<String, String> {
    const MOST: usize = 1 << 20;
    let parsed = reqwest::Url::parse(url).map_err(|error| error.to_string())?;
    let host = parsed.host_str().unwrap_or_default().to_owned();
    let plain = parsed.scheme() == "http" && crate::registry::reference::is_loopback(&host);
    if parsed.scheme() != "https" && !plain {
        return Err("keys are fetched over https only".to_owned());
    }
    let client = crate::registry::http_client(&host)
        .timeout(JWKS_TIMEOUT)
        .build()
        .map_err(|error| error.to_string())?;
    let answer = client
        .get(parsed)
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|error| error.to_string())?;
    let bytes = answer.bytes().await.map_err(|error| error.to_string())?;
    if bytes.len() > MOST {
        return Err("it is too large".to_owned());
    }
    String::from_utf8(bytes.into()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_and_wrong_ones_named() {
        let digest = hex::encode(Sha256::digest("secret"));
        let text = format!("[[token]]\nname='p'\nrole='portal'\nsha256='{digest}'\n");
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.find("secret").map(|t| t.role), Some(Role::Portal));
        assert!(tokens.find("Secret").is_none());
        for (bad, says) in [
            ("[[token]]\nname='a'\nrole='king'\nsha256=''", "king"),
            ("[[token]]\nname='a'\nrole='portal'\nsha256='ab'", "sha256"),
            (
                &format!("[[token]]\nname='a'\nrole='user'\nsha256='{digest}'"),
                "needs a user",
            ),
            (&format!("{text}{text}"), "another one"),
            ("[[tokens]]\n", "tokens"),
        ] {
            let error = Tokens::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn ranges_hold_what_is_in_them() {
        let cases = [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.2", false),
            ("10.0.0.0/8", "10.255.1.2", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("0.0.0.0/0", "::1", false),
            ("10.0.0.0/8", "::ffff:10.1.1.1", true),
            ("fd00::/8", "fd12::1", true),
            ("fd00::/8", "fe80::1", false),
        ];
        for (range, peer, holds) in cases {
            let range: Range = range.parse().unwrap();
            assert_eq!(range.holds(Some(peer.parse().unwrap())), holds, "{peer}");
            assert!(!range.holds(None));
        }
        assert!(Range::Unix.holds(None));
        for bad in ["", "x", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }

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
