//! Tokens of a service account, made for one audience (TokenRequest) and renewed before they expire.

use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

/// Lifetime of a token that is asked for. The API server may make it shorter.
const LIFETIME: Duration = Duration::from_secs(3600);
/// Part of its life after which a token is renewed.
const RENEW_AFTER: f64 = 0.5;

/// A token that is always valid.
pub(super) struct Renewed {
    accounts: Api<ServiceAccount>,
    name: String,
    audience: String,
    held: Mutex<Option<(Zeroizing<String>, Instant)>>,
}

impl Renewed {
    pub(super) fn new(accounts: Api<ServiceAccount>, name: &str, audience: &str) -> Self {
        Self {
            accounts,
            name: name.to_owned(),
            audience: audience.to_owned(),
            held: Mutex::new(None),
        }
    }

    /// Returns a token. Fails if the API server does not make one.
    pub(super) async fn get(&self) -> Result<Zeroizing<String>, kube::Error> {
        let mut held = self.held.lock().await;
        if let Some((token, until)) = &*held
            && Instant::now() < *until
        {
            return Ok(token.clone());
        }
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec![self.audience.clone()]),
                expiration_seconds: Some(LIFETIME.as_secs() as i64),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let asked = Instant::now();
        let params = PostParams::default();
        let made = self
            .accounts
            .create_token_request(&self.name, &params, &request)
            .await?;
        let status = made.status.unwrap_or_default();
        let (Some(token), Some(ends)) = (status.token, status.expiration_timestamp) else {
            return Err(kube::Error::Service("the API server made no token".into()));
        };
        let token = Zeroizing::new(token);
        let lives = ends.0.duration_since(k8s_openapi::jiff::Timestamp::now());
        let lives = lives.as_secs_f64().max(0.0);
        let lives = Duration::from_secs_f64(lives.min(LIFETIME.as_secs_f64()) * RENEW_AFTER);
        *held = Some((token.clone(), asked + lives));
        Ok(token)
    }
}
