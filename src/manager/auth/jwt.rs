//! JSON Web Tokens of an identity provider, and its keys, fetched when they are needed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;

use super::{AuthError, Rejected};

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

/// An identity provider's keys, fetched when they are needed.
pub(super) struct KeySet {
    from: Keys,
    held: tokio::sync::Mutex<Option<Held>>,
}

struct Held {
    keys: Arc<JwkSet>,
    at: Instant,
    tried: Instant,
}

impl KeySet {
    pub(super) fn new(from: Keys) -> Self {
        Self {
            from,
            held: tokio::sync::Mutex::new(None),
        }
    }

    pub(super) async fn read(&self) -> Result<JwkSet, AuthError> {
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
    pub(super) async fn claims(
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
