//! JSON Web Tokens of an identity provider, and its keys, which are fetched on demand.
//!
//! No lock is held while keys are fetched, so tokens with known keys can be verified meanwhile. There is one fetch at a
//! time and at most one per [`JWKS_MIN_INTERVAL`], whatever keys are requested; a limited number of requests waits for it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;
use tokio::sync::{Semaphore, watch};

use super::claims::Claimed;
use super::{AuthError, Claims, Rejected, http};

/// Age after which a key set is fetched again. For an unknown key it is fetched at once, but not more often than
/// [`JWKS_MIN_INTERVAL`].
const JWKS_TTL: Duration = Duration::from_secs(3600);
const JWKS_MIN_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum size of a file with a key set, in bytes.
const JWKS_BYTES: usize = 1 << 20;
/// Maximum number of keys that are used, because a token without a key ID is tried with each of them.
const JWKS_KEYS: usize = 64;
/// Maximum number of requests that wait for keys.
const WAITING: usize = 32;
/// Permitted difference between clocks, in seconds.
const LEEWAY_S: u64 = 30;

/// Algorithms with public verification keys.
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

/// Where the keys of an identity provider are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// A JSON Web Key Set (RFC 7517) in a file; read again every hour and for unknown keys.
    File(PathBuf),
    /// A JSON Web Key Set at an HTTPS URL. Plain HTTP is permitted for loopback addresses.
    Url(String),
}

/// Settings for JSON Web Tokens of an identity provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwt {
    /// Location of the keys.
    pub keys: Keys,
    /// Required value of `iss`.
    pub issuer: String,
    /// Value that `aud` must be or contain.
    pub audience: String,
    /// Which claims are used.
    pub claims: Claims,
}

/// The keys of an identity provider, fetched on demand.
pub(super) struct KeySet {
    from: Keys,
    cached: Mutex<CachedKeys>,
    waiting: Semaphore,
}

#[derive(Default)]
struct CachedKeys {
    keys: Arc<Vec<Jwk>>,
    /// Time of the last successful fetch.
    at: Option<Instant>,
    tried: Option<Instant>,
    /// The running fetch; the channel is closed when it ends.
    running: Option<watch::Receiver<()>>,
}

impl KeySet {
    pub(super) fn new(from: Keys) -> Arc<Self> {
        Arc::new(Self {
            from,
            cached: Mutex::default(),
            waiting: Semaphore::new(WAITING),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, CachedKeys> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches and stores the keys.
    pub(super) async fn read(&self) -> Result<(), AuthError> {
        let (at, text) = match &self.from {
            Keys::File(path) => (path.display().to_string(), read_file(path).await),
            Keys::Url(url) => (url.clone(), http::get(url).await.map_err(|error| error.0)),
        };
        let read = text.and_then(|text| {
            serde_json::from_str::<JwkSet>(&text).map_err(|error| error.to_string())
        });
        let mut cached = self.lock();
        cached.tried = Some(Instant::now());
        match read {
            Ok(mut set) => {
                set.keys.truncate(JWKS_KEYS);
                cached.keys = Arc::new(set.keys);
                cached.at = cached.tried;
                Ok(())
            }
            Err(reason) => Err(AuthError::Keys { at, reason }),
        }
    }

    /// Returns the running fetch, and starts one unless there was one recently.
    fn fetching(self: &Arc<Self>) -> Option<watch::Receiver<()>> {
        let mut cached = self.lock();
        if cached.running.is_some() {
            return cached.running.clone();
        }
        if cached
            .tried
            .is_some_and(|at| at.elapsed() < JWKS_MIN_INTERVAL)
        {
            return None;
        }
        let (done, running) = watch::channel(());
        cached.running = Some(running.clone());
        drop(cached);
        let keys = self.clone();
        tokio::spawn(async move {
            if let Err(error) = keys.read().await {
                tracing::warn!(auth.error = %error, "the old keys of the identity provider are used on");
            }
            keys.lock().running = None;
            drop(done);
        });
        Some(running)
    }

    /// Returns the keys that may have signed a token. If none is known, fetches the keys and waits for them.
    async fn for_token(self: &Arc<Self>, kid: Option<&str>) -> Result<Vec<Jwk>, Rejected> {
        let fitting = || -> Vec<Jwk> {
            let keys = self.lock().keys.clone();
            let fits = |key: &&Jwk| match (kid, &key.common.key_id) {
                (Some(asked), Some(id)) => asked == id,
                _ => true,
            };
            keys.iter().filter(fits).cloned().collect()
        };
        let old = self.lock().at.is_none_or(|at| at.elapsed() >= JWKS_TTL);
        let found = fitting();
        if !found.is_empty() {
            if old {
                self.fetching();
            }
            return Ok(found);
        }
        let Some(mut running) = self.fetching() else {
            return Ok(found);
        };
        let Ok(_place) = self.waiting.try_acquire() else {
            return Err(Rejected::Unavailable(
                "others wait for the identity provider's keys already".to_owned(),
            ));
        };
        // Returns when the fetch ends and drops its end of the channel.
        let _ = tokio::time::timeout(http::TIMEOUT * 2, running.changed()).await;
        Ok(fitting())
    }

    /// Returns the claims of a token if one of the keys verifies it, otherwise `None`.
    pub(super) async fn claims(
        self: &Arc<Self>,
        jwt: &Jwt,
        token: &str,
    ) -> Result<Option<Claimed>, Rejected> {
        let Ok(head) = jsonwebtoken::decode_header(token) else {
            return Ok(None);
        };
        if !ALGORITHMS.contains(&head.alg) || has_conditions(token) {
            return Ok(None);
        }
        let keys = self.for_token(head.kid.as_deref()).await?;
        let mut rules = Validation::new(head.alg);
        rules.leeway = LEEWAY_S;
        rules.validate_nbf = true;
        rules.set_issuer(&[&jwt.issuer]);
        rules.set_audience(&[&jwt.audience]);
        rules.set_required_spec_claims(&["exp", "iss", "aud"]);
        Ok(keys.iter().find_map(|key| {
            let key = DecodingKey::from_jwk(key).ok()?;
            let found = jsonwebtoken::decode::<Claimed>(token, &key, &rules).ok()?;
            Some(found.claims)
        }))
    }
}

/// Returns whether the header lists extensions that the recipient must support (`crit`, RFC 7515, 4.1.11), none of
/// which is supported. Also returns `true` if the header cannot be parsed.
fn has_conditions(token: &str) -> bool {
    let head = token.split('.').next().unwrap_or_default();
    let head = URL_SAFE_NO_PAD.decode(head).ok();
    let head = head.and_then(|head| serde_json::from_slice::<HashMap<String, Value>>(&head).ok());
    head.is_none_or(|head| head.contains_key("crit") || head.contains_key("b64"))
}

/// Returns the issuer that a token states, which is not verified.
pub(super) fn issuer(token: &str) -> Option<String> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: Value = serde_json::from_slice(&claims).ok()?;
    Some(claims.get("iss")?.as_str()?.to_owned())
}

async fn read_file(path: &std::path::Path) -> Result<String, String> {
    use tokio::io::AsyncReadExt as _;
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|error| error.to_string())?;
    let mut text = String::new();
    file.take(JWKS_BYTES as u64 + 1)
        .read_to_string(&mut text)
        .await
        .map_err(|error| error.to_string())?;
    if text.len() > JWKS_BYTES {
        return Err("it is too large".to_owned());
    }
    Ok(text)
}
