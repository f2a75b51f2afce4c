//! Signing in and out with a browser.
//!
//! The page presents a token once and receives a cookie and a page key for it. The record has only digests of these two
//! values, and they are valid nowhere else. Only the manager's own page can sign in, with the token in a header, so
//! that no link and no form on another page can sign a user in or out.

use std::net::IpAddr;

use axum::Json;
use axum::extract::{ConnectInfo, FromRequest as _, Request, State as Extracted};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use super::App;
use super::api::{SignIn as Asked, SignInWays, SignedIn, SignedOut};
use super::auth::{Bearer, Cookie, Role, as_text, digest, open, seal, secret};
use super::extract::Body;
use super::refusal::Refusal;
use super::time::rfc3339;
use crate::service::connections::Peer;
use crate::service::job::now_ms;
use crate::service::record::SignIn;

/// Maximum lifetime of a sign-in in milliseconds. It also ends with its token.
const HOLDS_MS: i64 = 7 * 24 * 3600 * 1000;
/// Maximum number of sign-ins per caller; the oldest is removed.
const MOST: u32 = 20;

/// Signs a browser in.
///
/// Takes the token from the `Authorization` header, sets a cookie, and returns the key that the page has to send with
/// it.
#[utoipa::path(
    post, path = "/api/v1/signin", tag = "sessions", security(("token" = [])),
    request_body = Asked,
    responses(
        (status = 200, body = SignedIn, description = "With a Set-Cookie header. The key goes into the Upperdeck-Page header"),
        (status = 409, description = "Another user is signed in, or a proxy says who the user is: `conflict`"),
        Refusal
    )
)]
pub(super) async fn sign_in(
    Extracted(app): Extracted<App>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    request: Request,
) -> Result<Response, Refusal> {
    let headers = request.headers().clone();
    app.authenticator.check_same_origin(&headers)?;
    let bearer = app.authenticator.bearer(&headers, peer).await?;
    app.rates.take(&bearer.caller.name)?;
    // The body is read only after authentication.
    let Body(asked) = Body::<Asked>::from_request(request, &app).await?;
    if bearer.role == Role::Portal {
        return Err(Refusal::forbidden(
            "this token acts for users: it is for programs, not to sign in with",
        ));
    }
    if bearer.caller.subject.is_some() {
        // A sign-in would outlive the token and the cluster's permissions.
        return Err(Refusal::forbidden(
            "a token of the Kubernetes cluster is for programs: it is asked about with each request, and cannot sign in",
        ));
    }
    establish(
        &app,
        &headers,
        peer,
        bearer,
        &Terms {
            replace: asked.replace,
            ..Terms::default()
        },
    )
    .await
}

/// The terms of a sign-in.
#[derive(Default)]
pub(super) struct Terms {
    /// Whether to replace another user who is signed in in this browser.
    pub(super) replace: bool,
    /// The ID token with which the identity provider recognises its own session at sign-out; may be empty.
    pub(super) hint: String,
}

/// Signs a browser in as a caller who has been authenticated.
///
/// Fails if a proxy states the user, and if another user is signed in whom `terms` do not replace.
pub(super) async fn establish(
    app: &App,
    headers: &HeaderMap,
    peer: Option<IpAddr>,
    bearer: Bearer,
    terms: &Terms,
) -> Result<Response, Refusal> {
    if let Ok(Some(_)) = app.authenticator.by_proxy(headers, peer) {
        return Err(Refusal::conflict(
            "the gate in front of this page says who you are; no token does",
            None,
        ));
    }
    let now = now_ms();
    if let Some((before, _, caller)) = app.authenticator.signed_in(headers).await? {
        if caller.name != bearer.caller.name && !terms.replace {
            return Err(Refusal::conflict(
                format!(
                    "{} is signed in here; say that you want to replace that",
                    caller.user.as_deref().unwrap_or("an administrator")
                ),
                None,
            ));
        }
        app.record.sign_out(&before.cookie).await?;
    }
    let (cookie, key) = (secret(), secret());
    let ends = now.saturating_add(HOLDS_MS);
    let ends = bearer.expires_ms.map_or(ends, |token| ends.min(token));
    let user = bearer.caller.user.clone().unwrap_or_default();
    let new = SignIn {
        cookie: digest(&cookie),
        page: digest(&key),
        caller: bearer.caller.name.clone(),
        basis: bearer.basis,
        user: user.clone(),
        administrator: bearer.caller.administrator,
        groups: as_text(&bearer.caller.groups),
        email: bearer.caller.email,
        hint: if terms.hint.is_empty() {
            String::new()
        } else {
            seal(&cookie, &terms.hint)
        },
        expires_ms: ends,
    };
    app.record.sign_in(&new, now, MOST).await?;
    tracing::info!(caller = bearer.caller.name, "signed in");
    let body = SignedIn {
        user,
        administrator: bearer.caller.administrator,
        key: key.to_string(),
        expires: rfc3339(ends),
    };
    let mut response = Json(body).into_response();
    let seconds = (ends - now).max(0) / 1000;
    set_cookie(&app.authenticator.cookie, &mut response, &cookie, seconds);
    Ok(response)
}

/// Returns the ways to sign in with a browser.
#[utoipa::path(
    get, path = "/api/v1/signin/ways", tag = "sessions", security(()),
    responses((status = 200, body = SignInWays, description = "The ways that are set up"))
)]
pub(super) async fn ways(Extracted(app): Extracted<App>) -> Json<SignInWays> {
    let provider = app.provider.as_ref();
    Json(SignInWays {
        token: app.authenticator.takes_tokens(),
        provider: provider.map(|provider| provider.settings().name.clone()),
    })
}

/// Signs the browser out: the cookie becomes invalid on all managers.
#[utoipa::path(
    delete, path = "/api/v1/signin", tag = "sessions", security(("cookie" = [])),
    responses(
        (status = 200, body = SignedOut, description = "The cookie is invalid from now on; the session at the identity provider ends at the address that is returned"),
        (status = 204, description = "The cookie is invalid from now on"),
        Refusal
    )
)]
pub(super) async fn sign_out(
    Extracted(app): Extracted<App>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    app.authenticator.check_same_origin(&headers)?;
    let cookie = &app.authenticator.cookie;
    let mut provider = None;
    if let Some((found, _, caller)) = app.authenticator.signed_in(&headers).await? {
        app.record.sign_out(&found.cookie).await?;
        tracing::info!(caller = caller.name, "signed out");
        if found.basis.starts_with("oidc:") {
            let values = cookie.all_of(&headers);
            let own = values.iter().find(|value| digest(value) == found.cookie);
            let hint = own.and_then(|value| open(value, &found.hint));
            let of = app.provider.as_ref();
            provider = of.and_then(|provider| provider.sign_out(hint.as_deref()));
        }
    }
    let mut response = match provider {
        Some(provider) => Json(SignedOut { provider }).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    };
    set_cookie(cookie, &mut response, "", 0);
    Ok(response)
}

/// Adds a `Set-Cookie` header.
pub(super) fn set_cookie(cookie: &Cookie, response: &mut Response, value: &str, seconds: i64) {
    if let Ok(cookie) = cookie.set(value, seconds).parse() {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
}
