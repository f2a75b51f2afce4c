//! Signing in with an identity provider: its beginning and its end. What is between is the provider's.
//!
//! The page requests both, and goes to the provider and comes back by itself. So the manager redirects nowhere, no link
//! and no form on another page can sign a user in, and the key of the page is in no address.

use axum::Json;
use axum::extract::{ConnectInfo, FromRequest as _, Request, State as Extracted};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};

use super::App;
use super::api::{SignInAnswer, SignInBegun, SignedIn};
use super::auth::{Answer, Authenticator, FLOW_S, Failed, Provider, digest};
use super::extract::Body;
use super::refusal::Refusal;
use super::signin::{Terms, establish, set_cookie};
use crate::service::connections::Peer;
use crate::service::job::now_ms;

fn provider(app: &App) -> Result<&Provider, Refusal> {
    let provider = app.provider.as_ref();
    provider.ok_or_else(|| Refusal::not_found("no identity provider signs users in here"))
}

/// Limits how often an address may do what no credential is needed for. Those behind a proxy share its address, so it is
/// exempt.
fn check_rate(app: &App, peer: Peer) -> Result<(), Refusal> {
    let proxies = &app.options.connections.proxies;
    match peer.0 {
        Some(address) if !proxies.iter().any(|range| range.holds(peer.0)) => {
            app.rates.take(&format!("sign-in of {address}"))
        }
        _ => Ok(()),
    }
}

/// Begins a sign-in with the identity provider.
///
/// Sets a cookie that ends after ten minutes, and returns the address to which the page goes.
#[utoipa::path(
    post, path = "/api/v1/signin/oidc", tag = "sessions", security(()),
    responses((status = 200, body = SignInBegun, description = "With a Set-Cookie header"), Refusal)
)]
pub(super) async fn begin(
    Extracted(app): Extracted<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    app.authenticator.check_same_origin(&headers)?;
    check_rate(&app, peer)?;
    let begun = provider(&app)?.begin(now_ms() / 1000).await?;
    let body = SignInBegun {
        url: begun.url,
        key: begun.key.to_string(),
    };
    let mut response = Json(body).into_response();
    let cookie = app.authenticator.cookie.of_sign_in();
    set_cookie(&cookie, &mut response, &begun.cookie, FLOW_S);
    Ok(response)
}

/// Completes a sign-in with the identity provider.
///
/// Takes what the provider has added to the address of the page. Sets a cookie, and returns the key that the page has
/// to send with it. Another user who is signed in in this browser is replaced.
#[utoipa::path(
    post, path = "/api/v1/signin/oidc/answer", tag = "sessions", security(()),
    request_body = SignInAnswer,
    responses(
        (status = 200, body = SignedIn, description = "With a Set-Cookie header. The key goes into the Upperdeck-Page header"),
        Refusal
    )
)]
pub(super) async fn complete(
    Extracted(app): Extracted<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Result<Response, Refusal> {
    let headers = request.headers().clone();
    app.authenticator.check_same_origin(&headers)?;
    check_rate(&app, peer)?;
    let provider = provider(&app)?;
    let Body(asked) = Body::<SignInAnswer>::from_request(request, &app).await?;
    let answer = Answer {
        state: asked.state,
        code: asked.code,
        iss: asked.iss,
        error: asked.error,
        error_description: asked.error_description,
    };
    let of_sign_in = app.authenticator.cookie.of_sign_in();
    let now = now_ms();
    let cookies = of_sign_in.all_of(&headers);
    let flow = provider.flow(&cookies, &asked.key, &answer, now / 1000)?;
    // Before the code is redeemed: a provider revokes the tokens of a code that comes twice.
    let until = now.saturating_add(2 * FLOW_S * 1000);
    let state = digest(&answer.state);
    if !app.record.use_flow(&state, now, until).await? {
        return Err(Failed::Stale.into());
    }
    let complete = provider.complete(&flow, &answer).await?;
    let settings = provider.settings();
    let lifetime = i64::try_from(settings.lifetime.as_millis()).unwrap_or(i64::MAX);
    let terms = Terms {
        replace: true,
        hint: complete.hint.clone(),
    };
    let bearer = Authenticator::by_provider(settings, complete, now.saturating_add(lifetime));
    let mut response = establish(&app, &headers, peer.0, bearer, &terms).await?;
    set_cookie(&of_sign_in, &mut response, "", 0);
    Ok(response)
}

impl From<Failed> for Refusal {
    fn from(failed: Failed) -> Self {
        let refused = |message: String| Self::new(StatusCode::FORBIDDEN, "signin_refused", message);
        match failed {
            Failed::Unavailable => {
                Self::unavailable("the identity provider does not answer; try again in a moment")
            }
            Failed::Stale => Self::new(
                StatusCode::FORBIDDEN,
                "signin_expired",
                "this sign-in was not begun in this browser, or too long ago, or it is complete; begin it again",
            ),
            Failed::Refused(said) => {
                refused(format!("the identity provider refuses the sign-in: {said}"))
            }
            Failed::Invalid(reason) => refused(format!(
                "the identity provider's answer is not accepted: {reason}"
            )),
        }
    }
}
