//! Sign-in with an identity provider: OpenID Connect, authorization code with PKCE.
//!
//! A sign-in needs three secrets at its end: the cookie of the browser that began it, the key that the page stores, and
//! the provider's code. State, nonce and PKCE verifier are derived from the first two, so nothing is stored meanwhile,
//! any manager can complete it, and requests without credentials write nothing. The provider signs the nonce, so the
//! time of the beginning, which is part of the cookie, cannot be changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use openidconnect::core::{
    CoreAuthDisplay, CoreAuthenticationFlow, CoreClaimName, CoreClaimType, CoreClient,
    CoreClientAuthMethod, CoreErrorResponseType, CoreGenderClaim, CoreGrantType, CoreIdToken,
    CoreJsonWebKey, CoreJsonWebKeySet, CoreJweContentEncryptionAlgorithm,
    CoreJweKeyManagementAlgorithm, CoreJwsSigningAlgorithm, CoreResponseMode, CoreResponseType,
    CoreSubjectIdentifierType, CoreTokenResponse,
};
use openidconnect::{
    AdditionalClaims, AdditionalProviderMetadata, AuthType, AuthorizationCode,
    ClaimsVerificationError, ClientId, ClientSecret, CsrfToken, EndSessionUrl, EndpointMaybeSet,
    EndpointNotSet, EndpointSet, IssuerUrl, LogoutRequest, Nonce, OAuth2TokenResponse as _,
    PkceCodeChallenge, PkceCodeVerifier, PostLogoutRedirectUrl, ProviderMetadata, RedirectUrl,
    RequestTokenError, Scope, SubjectIdentifier, TokenResponse as _, UserInfoClaims,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::claims::{Claimed, Identity};
use super::{AuthError, Claims, MAX_TOKEN, Rejected, http, secret};
use crate::common::escape;
use crate::service::job::now_ms;

/// Time in seconds within which a sign-in has to be completed.
pub(in super::super) const FLOW_S: i64 = 600;
/// Permitted difference between clocks, in seconds.
const LEEWAY_S: i64 = 30;
/// Age after which the provider's description and keys are fetched again. For an unknown key they are fetched at once,
/// but not more often than [`MIN_INTERVAL`].
const REFRESH: Duration = Duration::from_secs(3600);
const MIN_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum delay between attempts to reach a provider that does not answer.
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// Maximum number of codes that are exchanged at the same time, because the requests that bring them are not
/// authenticated.
const EXCHANGES: usize = 16;
/// Maximum length of each parameter that the provider passes through the browser, in bytes.
const MAX_PARAMETER: usize = 4096;
/// Maximum length of an ID token in the address of the provider's sign-out.
const MAX_HINT: usize = 4096;

/// Signing algorithms with public verification keys.
const ALGORITHMS: [CoreJwsSigningAlgorithm; 9] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha384,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha512,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha384,
    CoreJwsSigningAlgorithm::RsaSsaPssSha512,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
    CoreJwsSigningAlgorithm::EcdsaP384Sha384,
    CoreJwsSigningAlgorithm::EdDsa,
];

/// Settings for signing in with an identity provider.
#[derive(Clone, Debug)]
pub struct Oidc {
    /// The provider's issuer URL. Its description is at `/.well-known/openid-configuration` below it.
    pub issuer: String,
    /// Name of the provider for the page, e.g. `Example University`.
    pub name: String,
    /// Client ID of the manager at the provider.
    pub client_id: String,
    /// Client secret; `None` for a public client.
    pub client_secret: Option<Zeroizing<String>>,
    /// Scopes in addition to `openid`.
    pub scopes: Vec<String>,
    /// Which claims are used.
    pub claims: Claims,
    /// URL of the page. The provider redirects to it after sign-in and sign-out.
    pub redirect: String,
    /// Maximum lifetime of a sign-in.
    pub lifetime: Duration,
}

/// A sign-in that has been begun.
pub(in super::super) struct Begun {
    /// Address of the provider.
    pub(in super::super) url: String,
    /// Value of the cookie.
    pub(in super::super) cookie: Zeroizing<String>,
    /// Key that the page stores.
    pub(in super::super) key: Zeroizing<String>,
}

/// What the provider has passed through the browser.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Answer {
    pub(in super::super) state: String,
    pub(in super::super) code: Option<String>,
    /// The provider's issuer (RFC 9207).
    pub(in super::super) iss: Option<String>,
    pub(in super::super) error: Option<String>,
    pub(in super::super) error_description: Option<String>,
}

/// A completed sign-in.
pub(in super::super) struct Complete {
    pub(super) identity: Identity,
    /// The ID token, for signing out at the provider; empty if it is too large for that.
    pub(in super::super) hint: String,
}

/// Why a sign-in cannot be begun or completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Failed {
    /// The provider does not answer.
    Unavailable,
    /// It was not begun in this browser, or too long ago.
    Stale,
    /// The provider has refused it; the text is escaped.
    Refused(String),
    /// The provider's answer is wrong.
    Invalid(&'static str),
}

type Client = CoreClient<
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointMaybeSet,
    EndpointMaybeSet,
>;

/// What a provider's description says in addition to the members of OpenID Connect Discovery.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct MoreMetadata {
    /// Where a session at the provider is ended (OpenID Connect RP-Initiated Logout).
    #[serde(default)]
    end_session_endpoint: Option<EndSessionUrl>,
    /// Whether every answer names the issuer (RFC 9207).
    #[serde(default)]
    authorization_response_iss_parameter_supported: bool,
}

impl AdditionalProviderMetadata for MoreMetadata {}

type Metadata = ProviderMetadata<
    MoreMetadata,
    CoreAuthDisplay,
    CoreClientAuthMethod,
    CoreClaimName,
    CoreClaimType,
    CoreGrantType,
    CoreJweContentEncryptionAlgorithm,
    CoreJweKeyManagementAlgorithm,
    CoreJsonWebKey,
    CoreResponseMode,
    CoreResponseType,
    CoreSubjectIdentifierType,
>;

/// All claims of a user, whatever their names are.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct AllClaims {
    #[serde(flatten)]
    all: Claimed,
}

impl AdditionalClaims for AllClaims {}

/// An identity provider. Its description is fetched in the background and on demand.
pub(in super::super) struct Provider {
    settings: Oidc,
    redirect: RedirectUrl,
    issuer: IssuerUrl,
    known: std::sync::RwLock<Option<Arc<Known>>>,
    /// Held while the description is fetched; contains the time of the last attempt.
    fetching: Mutex<Option<Instant>>,
    exchanges: Semaphore,
}

/// What is known of a provider.
struct Known {
    client: Client,
    metadata: Metadata,
    keys: CoreJsonWebKeySet,
}

impl Provider {
    /// Fails with [`AuthError::Oidc`] if the settings are invalid. Does not reach for the provider.
    pub(in super::super) fn new(settings: Oidc) -> Result<Self, AuthError> {
        let wrong = |reason: String| AuthError::Oidc(reason);
        let issuer = http::url(&settings.issuer).map_err(|error| wrong(error.0))?;
        if issuer.query().is_some() || issuer.fragment().is_some() {
            return Err(wrong(format!(
                "{issuer}: an issuer has no query and no fragment"
            )));
        }
        let redirect = reqwest::Url::parse(&settings.redirect)
            .map_err(|error| wrong(format!("the URL of the page: {error}")))?;
        if redirect.query().is_some() || redirect.fragment().is_some() {
            return Err(wrong(
                "the URL of the page has no query and no fragment".to_owned(),
            ));
        }
        if settings.client_id.is_empty() {
            return Err(wrong("the client ID is empty".to_owned()));
        }
        Ok(Self {
            redirect: RedirectUrl::new(redirect.into())
                .map_err(|error| wrong(error.to_string()))?,
            issuer: IssuerUrl::new(settings.issuer.clone())
                .map_err(|error| wrong(error.to_string()))?,
            settings,
            known: std::sync::RwLock::default(),
            fetching: Mutex::default(),
            exchanges: Semaphore::new(EXCHANGES),
        })
    }

    /// Returns the settings.
    pub(in super::super) fn settings(&self) -> &Oidc {
        &self.settings
    }

    /// Fetches the provider's description until `cancel` is set: at once and every hour, and again soon while the
    /// provider does not answer.
    pub(in super::super) async fn keep(&self, cancel: CancellationToken) {
        let mut backoff = Duration::from_secs(1);
        loop {
            let pause = if self.fetch(Duration::ZERO).await {
                backoff = Duration::from_secs(1);
                REFRESH
            } else {
                backoff = (backoff * 2).min(MAX_BACKOFF);
                backoff
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    fn known(&self) -> Option<Arc<Known>> {
        let known = self.known.read();
        known
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Fetches the description, unless another request has just tried that. Returns whether it is known.
    async fn fetch(&self, interval: Duration) -> bool {
        let asked = Instant::now();
        let mut tried = self.fetching.lock().await;
        let recent = tried.is_some_and(|at| at >= asked || at.elapsed() < interval);
        if !recent {
            match self.discover().await {
                Ok(found) => {
                    let known = self.known.write();
                    *known.unwrap_or_else(std::sync::PoisonError::into_inner) =
                        Some(Arc::new(found));
                }
                Err(reason) => tracing::warn!(
                    issuer = self.settings.issuer,
                    error = reason,
                    "the identity provider's description cannot be fetched; it is tried again"
                ),
            }
            *tried = Some(Instant::now());
        }
        drop(tried);
        self.known().is_some()
    }

    async fn discover(&self) -> Result<Known, String> {
        let metadata = Metadata::discover_async(self.issuer.clone(), &http::call)
            .await
            .map_err(|error| escape::limited(&crate::common::message::of(&error), 1000))?;
        let end = &metadata.additional_metadata().end_session_endpoint;
        let urls = [
            Some(metadata.authorization_endpoint().as_str()),
            metadata.token_endpoint().map(|url| url.as_str()),
            metadata.userinfo_endpoint().map(|url| url.as_str()),
            end.as_ref().map(|url| url.as_str()),
        ];
        for url in urls.into_iter().flatten() {
            http::url(url).map_err(|error| error.0)?;
        }
        if metadata.token_endpoint().is_none() {
            return Err("it names no token endpoint".to_owned());
        }
        let secret = self.settings.client_secret.as_ref();
        let secret = secret.map(|secret| ClientSecret::new(secret.to_string()));
        let id = ClientId::new(self.settings.client_id.clone());
        let mut client = CoreClient::from_provider_metadata(metadata.clone(), id, secret)
            .set_redirect_uri(self.redirect.clone());
        let methods = metadata.token_endpoint_auth_methods_supported();
        if methods.is_some_and(|all| !all.contains(&CoreClientAuthMethod::ClientSecretBasic)) {
            client = client.set_auth_type(AuthType::RequestBody);
        }
        Ok(Known {
            client,
            keys: metadata.jwks().clone(),
            metadata,
        })
    }

    async fn ready(&self) -> Result<Arc<Known>, Failed> {
        if let Some(known) = self.known() {
            return Ok(known);
        }
        self.fetch(Duration::from_secs(2)).await;
        self.known().ok_or(Failed::Unavailable)
    }

    /// Begins a sign-in at `now_s`, in seconds since the epoch.
    pub(in super::super) async fn begin(&self, now_s: i64) -> Result<Begun, Failed> {
        let known = self.ready().await?;
        let flow = Flow {
            cookie: Zeroizing::new(URL_SAFE_NO_PAD.encode({
                let mut bytes = rand::random::<[u8; 32]>();
                bytes[..8].copy_from_slice(&now_s.to_be_bytes());
                bytes
            })),
            key: secret(),
        };
        let (state, nonce) = (flow.derive("state"), flow.derive("nonce"));
        let challenge = PkceCodeChallenge::from_code_verifier_sha256(&flow.verifier());
        let mut request = known
            .client
            .authorize_url(
                CoreAuthenticationFlow::AuthorizationCode,
                || CsrfToken::new(state),
                || Nonce::new(nonce),
            )
            .set_pkce_challenge(challenge);
        for scope in &self.settings.scopes {
            request = request.add_scope(Scope::new(scope.clone()));
        }
        let (url, ..) = request.url();
        Ok(Begun {
            url: url.into(),
            cookie: flow.cookie,
            key: flow.key,
        })
    }

    /// Returns the sign-in that `answer` is for. `cookies` are those of the request that can be of a sign-in, `key` is the
    /// page's.
    pub(in super::super) fn flow(
        &self,
        cookies: &[&str],
        key: &str,
        answer: &Answer,
        now_s: i64,
    ) -> Result<Flow, Failed> {
        let flow = cookies
            .iter()
            .map(|cookie| Flow {
                cookie: Zeroizing::new((*cookie).to_owned()),
                key: Zeroizing::new(key.to_owned()),
            })
            .find(|flow| flow.is_current(now_s) && flow.fits(&answer.state))
            .ok_or(Failed::Stale)?;
        if (answer.iss.as_ref()).is_some_and(|iss| *iss != self.settings.issuer) {
            return Err(Failed::Invalid("it comes from another issuer"));
        }
        Ok(flow)
    }

    /// Completes a sign-in. The caller has made sure that this is the first answer of the flow.
    pub(in super::super) async fn complete(
        &self,
        flow: &Flow,
        answer: &Answer,
    ) -> Result<Complete, Failed> {
        let known = self.ready().await?;
        let names_itself = known
            .metadata
            .additional_metadata()
            .authorization_response_iss_parameter_supported;
        // An answer that another provider passed on has none, or another one.
        if names_itself && answer.iss.is_none() {
            return Err(Failed::Invalid("it does not name its issuer"));
        }
        if let Some(error) = &answer.error {
            return Err(Failed::Refused(told(
                error,
                answer.error_description.as_deref(),
            )));
        }
        let code = answer.code.as_deref().unwrap_or_default();
        if code.is_empty() || code.len() > MAX_PARAMETER {
            return Err(Failed::Invalid("it has no code"));
        }
        let Ok(_place) = self.exchanges.try_acquire() else {
            return Err(Failed::Unavailable);
        };
        let tokens = exchange(&known, code, flow).await?;
        let token = tokens
            .id_token()
            .ok_or(Failed::Invalid("it has no ID token"))?;
        let text = token.to_string();
        if text.len() > MAX_TOKEN {
            return Err(Failed::Invalid("its ID token is too large"));
        }
        let subject = self
            .verify(token, &Nonce::new(flow.derive("nonce")))
            .await?;
        let mut claims = payload(&text).ok_or(Failed::Invalid("its ID token cannot be read"))?;
        let not_before = claims.get("nbf").and_then(serde_json::Value::as_f64);
        if not_before.is_some_and(|at| at > (now_ms() / 1000 + LEEWAY_S) as f64) {
            return Err(Failed::Invalid("its ID token is not valid yet"));
        }
        if self.settings.claims.lack(&claims) && known.metadata.userinfo_endpoint().is_some() {
            let more = userinfo(&known, &tokens, subject).await?;
            for (name, value) in more {
                claims.entry(name).or_insert(value);
            }
        }
        let identity = self.settings.claims.identity(&claims).map_err(|rejected| {
            let Rejected::Unknown(reason) = rejected else {
                return Failed::Invalid("it names no user");
            };
            Failed::Invalid(reason)
        })?;
        Ok(Complete {
            identity,
            hint: if text.len() <= MAX_HINT {
                text
            } else {
                String::new()
            },
        })
    }

    /// Verifies an ID token and returns its subject. If its key is unknown, the keys are fetched again.
    async fn verify(
        &self,
        token: &CoreIdToken,
        nonce: &Nonce,
    ) -> Result<SubjectIdentifier, Failed> {
        let known = self.ready().await?;
        let mut verified = self.verify_with(&known, token, nonce);
        if matches!(
            verified,
            Err(ClaimsVerificationError::SignatureVerification(_))
        ) && self.fetch(MIN_INTERVAL).await
        {
            let known = self.ready().await?;
            verified = self.verify_with(&known, token, nonce);
        }
        verified.map_err(|error| {
            let error = escape::limited(&crate::common::message::of(&error), 500);
            tracing::warn!(
                issuer = self.settings.issuer,
                error,
                "an ID token is not accepted"
            );
            Failed::Invalid("its ID token is not valid")
        })
    }

    fn verify_with(
        &self,
        known: &Known,
        token: &CoreIdToken,
        nonce: &Nonce,
    ) -> Result<SubjectIdentifier, ClaimsVerificationError> {
        let supported = known.metadata.id_token_signing_alg_values_supported();
        let allowed = ALGORITHMS.into_iter().filter(|one| supported.contains(one));
        let verifier = openidconnect::core::CoreIdTokenVerifier::new_public_client(
            ClientId::new(self.settings.client_id.clone()),
            self.issuer.clone(),
            known.keys.clone(),
        )
        .set_allowed_algs(allowed);
        let claims = token.claims(&verifier, nonce)?;
        Ok(claims.subject().clone())
    }

    /// Returns the address at which the provider signs the user out, if it has one.
    pub(in super::super) fn sign_out(&self, hint: Option<&str>) -> Option<String> {
        let known = self.known()?;
        let end = known.metadata.additional_metadata();
        let end = end.end_session_endpoint.clone()?;
        let back = PostLogoutRedirectUrl::new(self.redirect.to_string()).ok()?;
        let mut request = LogoutRequest::from(end)
            .set_client_id(ClientId::new(self.settings.client_id.clone()))
            .set_post_logout_redirect_uri(back);
        if let Some(token) = hint.and_then(|hint| hint.parse::<CoreIdToken>().ok()) {
            request = request.set_id_token_hint(&token);
        }
        Some(request.http_get_url().into())
    }
}

async fn exchange(known: &Known, code: &str, flow: &Flow) -> Result<CoreTokenResponse, Failed> {
    let request = known
        .client
        .exchange_code(AuthorizationCode::new(code.to_owned()))
        .map_err(|_| Failed::Unavailable)?
        .set_pkce_verifier(flow.verifier());
    request
        .request_async(&http::call)
        .await
        .map_err(|error| match error {
            RequestTokenError::ServerResponse(said) => {
                let error = told(
                    said.error().as_ref(),
                    said.error_description().map(String::as_str),
                );
                tracing::warn!(error, "the identity provider refuses a code");
                match said.error() {
                    // A wrong secret or a client that is not registered is the administrator's business.
                    CoreErrorResponseType::InvalidGrant => Failed::Refused(error),
                    _ => Failed::Invalid("the provider does not accept this service"),
                }
            }
            RequestTokenError::Request(error) => {
                tracing::warn!(error = error.0, "the identity provider does not answer");
                Failed::Unavailable
            }
            error => {
                let error = escape::limited(&crate::common::message::of(&error), 500);
                tracing::warn!(error, "the identity provider's answer cannot be read");
                Failed::Invalid("it cannot be read")
            }
        })
}

async fn userinfo(
    known: &Known,
    tokens: &CoreTokenResponse,
    subject: SubjectIdentifier,
) -> Result<Claimed, Failed> {
    let unreadable = |error: String| {
        tracing::warn!(error, "the identity provider does not describe the user");
        Failed::Invalid("it does not describe the user")
    };
    let claims: UserInfoClaims<AllClaims, CoreGenderClaim> = known
        .client
        .user_info(tokens.access_token().clone(), Some(subject))
        .map_err(|error| unreadable(error.to_string()))?
        .request_async(&http::call)
        .await
        .map_err(|error| unreadable(escape::limited(&crate::common::message::of(&error), 500)))?;
    match serde_json::to_value(&claims) {
        Ok(Value::Object(all)) => Ok(all
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .collect()),
        _ => Err(unreadable("no object".to_owned())),
    }
}

/// Returns an error of the provider as text, escaped and shortened.
fn told(error: &str, description: Option<&str>) -> String {
    let description = description.filter(|text| !text.is_empty());
    match description {
        Some(description) => format!(
            "{} ({})",
            escape::limited(description, 300),
            escape::limited(error, 60)
        ),
        None => escape::limited(error, 60),
    }
}

/// Returns the claims of a verified token.
fn payload(token: &str) -> Option<Claimed> {
    let bytes = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The secrets of a sign-in in progress.
pub(in super::super) struct Flow {
    cookie: Zeroizing<String>,
    key: Zeroizing<String>,
}

impl Flow {
    fn derive(&self, what: &str) -> String {
        // HMAC accepts keys of any length.
        #[allow(
            clippy::expect_used,
            reason = "the error exists for fixed-length MACs only"
        )]
        let mut mac = Hmac::<Sha256>::new_from_slice(self.cookie.as_bytes()).expect("any length");
        for part in [what, &self.key] {
            mac.update(part.as_bytes());
            mac.update(&[0]);
        }
        URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
    }

    fn verifier(&self) -> PkceCodeVerifier {
        PkceCodeVerifier::new(self.derive("verifier"))
    }

    fn fits(&self, state: &str) -> bool {
        self.derive("state")
            .as_bytes()
            .ct_eq(state.as_bytes())
            .into()
    }

    fn is_current(&self, now_s: i64) -> bool {
        let bytes = URL_SAFE_NO_PAD.decode(self.cookie.as_bytes()).ok();
        let begun = bytes.and_then(|bytes| Some(i64::from_be_bytes(*bytes.first_chunk()?)));
        begun.is_some_and(|begun| {
            (begun.saturating_sub(LEEWAY_S)..begun.saturating_add(FLOW_S)).contains(&now_s)
        })
    }
}
