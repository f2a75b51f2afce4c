//! The way of every request: its ID, its log line, its limits and the headers of its answer; and the table of calls.

use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State as Extracted};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tracing::Instrument as _;
use utoipa::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::refusal::Refusal;
use super::{App, auth, events, inventory, page, saves, shape, store};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// For answers that are no page: they may do nothing, even when a browser is led to show one.
const POLICY: &str = "default-src 'none'; frame-ancestors 'none'";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "upperdeck",
        description = "Saves running containers as OCI images. Times are RFC 3339 in UTC, sizes bytes, IDs UUIDs of version 7.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(shape::ErrorBody, shape::ErrorDetail)),
    modifiers(&Schemes),
    security(("token" = []), ("cookie" = []))
)]
struct Description;

struct Schemes;

impl utoipa::Modify for Schemes {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let bearer = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some(
                "An API token or a JSON Web Token. A portal's token names its user in the Upperdeck-User header.",
            ))
            .build();
        components.add_security_scheme("token", SecurityScheme::Http(bearer));
        let cookie = ApiKeyValue::with_description(
            auth::COOKIE,
            "Set by `/?token=…`. What changes something also needs the Upperdeck-Request header, or a JSON body.",
        );
        components.add_security_scheme("cookie", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
    }
}

fn api() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(page::me))
        .routes(routes!(inventory::sessions))
        .routes(routes!(saves::submit, saves::history))
        .routes(routes!(saves::check, saves::cancel))
        .routes(routes!(events::events))
        .routes(routes!(saves::requeue))
        .routes(routes!(saves::audit))
        .routes(routes!(saves::dead))
        .routes(routes!(store::images))
        .routes(routes!(store::delete))
        .routes(routes!(store::quota))
        .routes(routes!(inventory::nodes))
        .routes(routes!(page::healthz))
        .routes(routes!(page::readyz))
        .routes(routes!(page::metrics))
}

/// The API's description (OpenAPI 3.1), as `/openapi.json` has it.
pub fn description() -> utoipa::openapi::OpenApi {
    api().split_for_parts().1
}

pub(super) fn router(app: App) -> Router {
    let (calls, description) = api().split_for_parts();
    // Made of our own types: it can always be written.
    let text = serde_json::to_string(&description).unwrap_or_default();
    let description = get(move || {
        let text = text.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], text) }
    });
    calls
        .route("/openapi.json", description)
        .merge(crate::portal::router())
        .fallback(async || Refusal::not_found("there is nothing under this address"))
        .method_not_allowed_fallback(async || {
            Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid",
                "this address does not know this method",
            )
        })
        .layer(from_fn_with_state(app.clone(), page::token_for_cookie))
        .layer(DefaultBodyLimit::max(app.options.body_bytes))
        .layer(from_fn_with_state(app.clone(), front))
        .with_state(app)
}

/// An ID that came along, if it is one that a log can bear; or a new one.
fn request_id(request: &Request) -> String {
    request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(|id| {
            (1..=64).contains(&id.len())
                && id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        })
        .map_or_else(|| uuid::Uuid::now_v7().to_string(), str::to_owned)
}

async fn front(Extracted(app): Extracted<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let path = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "(none)".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!(
        "request", request.id = id, http.method = %method, http.path = path, caller = tracing::field::Empty
    );
    let mut response = async {
        let response = next.run(request).await;
        let status = response.status().as_u16();
        let took = started.elapsed();
        let quiet = matches!(path.as_str(), "/healthz" | "/readyz" | "/metrics");
        if status >= 500 {
            tracing::error!(
                http.status = status,
                http.ms = took.as_millis() as u64,
                "answered"
            );
        } else if quiet {
            tracing::trace!(
                http.status = status,
                http.ms = took.as_millis() as u64,
                "answered"
            );
        } else {
            tracing::info!(
                http.status = status,
                http.ms = took.as_millis() as u64,
                "answered"
            );
        }
        app.metrics.request(method.as_str(), &path, status, took);
        response
    }
    .instrument(span)
    .await;
    // An error of the framework's own is told like ours.
    if response.status() == StatusCode::METHOD_NOT_ALLOWED
        && !response.headers().contains_key(header::CONTENT_TYPE)
    {
        let allow = response.headers().get(header::ALLOW).cloned();
        let refusal = Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid",
            "this address does not know this method",
        );
        response = refusal.into_response();
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, id);
    }
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ] {
        // The page's own stand.
        headers
            .entry(name)
            .or_insert_with(|| HeaderValue::from_static(value));
    }
    response
}
