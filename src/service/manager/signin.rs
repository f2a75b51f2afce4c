//! Signing in and out with a browser.
//!
//! The page presents a token once and receives a cookie and a page key for it. The record has only digests of these two
//! values, and they are valid nowhere else. Only the manager's own page can sign in, with the token in a header, so
//! that no link and no form on another page can sign a user in or out.

use axum::Json;
use axum::extract::{ConnectInfo, FromRequest as _, Request, State as Extracted};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use super::App;
use super::api::{SignIn as Asked, SignedIn};
use super::auth::{Role, digest, secret};
use super::connections::Peer;
use super::extract::Body;
use super::refusal::Refusal;
use super::time::rfc3339;
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
    let bearer = app.authenticator.bearer(&headers).await?;
    app.rates.take(&bearer.caller.name)?;
    // The body is read only after authentication.
    let Body(asked) = Body::<Asked>::from_request(request, &app).await?;
    if bearer.role == Role::Portal {
        return Err(Refusal::forbidden(
            "this token acts for users: it is for programs, not to sign in with",
        ));
    }
    if let Ok(Some(_)) = app.authenticator.by_proxy(&headers, peer) {
        return Err(Refusal::conflict(
            "the gate in front of this page says who you are; no token does",
            None,
        ));
    }
    let now = now_ms();
    if let Some((before, _, caller)) = app.authenticator.signed_in(&headers).await? {
        if caller.name != bearer.caller.name && !asked.replace {
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
    set_cookie(&app, &mut response, &cookie, (ends - now).max(0) / 1000);
    Ok(response)
}

/// Signs the browser out: the cookie becomes invalid on all managers.
#[utoipa::path(
    delete, path = "/api/v1/signin", tag = "sessions", security(("cookie" = [])),
    responses((status = 204, description = "The cookie is invalid from now on"), Refusal)
)]
pub(super) async fn sign_out(
    Extracted(app): Extracted<App>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    app.authenticator.check_same_origin(&headers)?;
    if let Some((found, _, caller)) = app.authenticator.signed_in(&headers).await? {
        app.record.sign_out(&found.cookie).await?;
        tracing::info!(caller = caller.name, "signed out");
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    set_cookie(&app, &mut response, "", 0);
    Ok(response)
}

fn set_cookie(app: &App, response: &mut Response, value: &str, seconds: i64) {
    if let Ok(cookie) = HeaderValue::from_str(&app.authenticator.cookie.set(value, seconds)) {
        response.headers_mut().insert(header::SET_COOKIE, cookie);
    }
}
