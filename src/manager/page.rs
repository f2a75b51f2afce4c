//! What is asked for beside the API: the portal with its cookie, health, metrics, the API's description.

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State as Extracted};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::App;
use super::auth::{COOKIE, Caller};
use super::refusal::Refusal;
use super::shape::{Health, Me};

/// Exchanges the token of `/?token=…` for a cookie that no script can read and no other site can make a browser send, and
/// sends the browser on to the bare page, so that the token stays in no history and no `Referer`.
pub(super) async fn token_for_cookie(
    Extracted(app): Extracted<App>,
    request: Request,
    next: Next,
) -> Response {
    let token = (request.uri().path() == "/")
        .then(|| request.uri().query())
        .flatten()
        .and_then(|query| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix("token="))
        });
    let Some(token) = token else {
        return next.run(request).await;
    };
    let token = percent_encoding::percent_decode_str(token)
        .decode_utf8_lossy()
        .into_owned();
    // What a cookie cannot hold is no token of ours.
    let plain = token
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-+/=~".contains(&b));
    let valid = match (plain, app.gate.bearer(&token).await) {
        (true, Ok(_)) => true,
        (_, Err(rejected @ super::auth::Rejected::Unavailable(_))) => {
            return Refusal::from(rejected).into_response();
        }
        _ => false,
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SEE_OTHER;
    let headers = response.headers_mut();
    // Relative: a gate may put the page under a prefix. Without a valid token the page asks for one.
    headers.insert(header::LOCATION, HeaderValue::from_static("./"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    );
    if valid {
        let secure = if app.gate.secure() { "; Secure" } else { "" };
        let cookie =
            format!("{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/; Max-Age=604800{secure}");
        if let Ok(cookie) = HeaderValue::from_str(&cookie) {
            headers.insert(header::SET_COOKIE, cookie);
        }
    }
    response
}

/// Who the caller is.
#[utoipa::path(
    get, path = "/api/v1/me", tag = "sessions",
    responses((status = 200, body = Me), Refusal)
)]
pub(super) async fn me(caller: Caller) -> Result<Json<Me>, Refusal> {
    let user = match (&caller.user, caller.administrator) {
        (Some(user), _) => user.clone(),
        (None, true) => String::new(),
        (None, false) => caller.somebody()?.to_owned(),
    };
    Ok(Json(Me {
        user,
        administrator: caller.administrator,
    }))
}

/// Whether the process answers.
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(()),
    responses((status = 200, body = Health))
)]
pub(super) async fn healthz() -> Json<Health> {
    Json(Health {
        ready: true,
        missing: Vec::new(),
    })
}

/// Whether it can serve, and what is missing.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses(
        (status = 200, body = Health),
        (status = 503, body = Health, description = "Something is missing, or the manager is about to end")
    )
)]
pub(super) async fn readyz(Extracted(app): Extracted<App>) -> (StatusCode, Json<Health>) {
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
    let mut missing = Vec::new();
    let (record, queue) = tokio::join!(
        tokio::time::timeout(PATIENCE, app.record.ping()),
        tokio::time::timeout(PATIENCE, app.queue.ping()),
    );
    // The reasons are for the log: anybody may ask this.
    match record {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %error, "not ready");
            missing.push("record: it refuses, see the log".to_owned());
        }
        Err(_) => missing.push("record: no answer".to_owned()),
    }
    match queue {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(error = %error, "not ready");
            missing.push("queue: it cannot be reached, see the log".to_owned());
        }
        Err(_) => missing.push("queue: no answer".to_owned()),
    }
    if app.cancel.is_cancelled() {
        missing.push("manager: it is about to end".to_owned());
    }
    let ready = missing.is_empty();
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(Health { ready, missing }))
}

/// Figures for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "operations", security(()),
    responses((
        status = 200, body = String, description = "OpenMetrics 1.0",
        content_type = "application/openmetrics-text"
    ))
)]
pub(super) async fn metrics(Extracted(app): Extracted<App>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.text()).into_response()
}
