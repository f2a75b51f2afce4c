//! The middleware of all requests (request ID, log line, limits, response headers), and the routing table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State as Extracted};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::{StreamExt as _, stream};
use tracing::Instrument as _;
use utoipa::OpenApi;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::cors::Cors;
use super::extract::RequestGuard;
use super::refusal::{Refusal, addressed};
use super::{
    App, api, autosave_settings, conditional, deletion, describe, docs, events, feed, hurry,
    images, inventory, notify, oidc, packages, paging, rename, saves, sharing, signin, status,
    timeline,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Content security policy of responses other than the page: they may do nothing, even if a browser displays one.
const POLICY: &str = "default-src 'none'; frame-ancestors 'none'";
/// Maximum length in bytes of a request's address, and of its header fields together.
const MAX_URI: usize = 16 << 10;
const MAX_HEAD: usize = 32 << 10;
const NOTHING: &str = "there is nothing under this address";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "upperdeck",
        description = "Saves running containers as OCI images. Times are RFC 3339 in UTC, sizes bytes, IDs UUIDs of version 7.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(api::Problem, api::ExistingImage, api::SaveNotice)),
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
            "upperdeck",
            "Set by `POST /api/v1/signin`, with a name that also has the port or a prefix. Everything but event streams \
             also needs the Upperdeck-Page header with the page's key; what changes something, the Upperdeck-Request \
             header or a JSON body.",
        );
        components.add_security_scheme("cookie", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
    }
}

fn api() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(status::me))
        .routes(routes!(signin::sign_in, signin::sign_out))
        .routes(routes!(signin::ways))
        .routes(routes!(oidc::begin))
        .routes(routes!(oidc::complete))
        .routes(routes!(inventory::sessions))
        .routes(routes!(saves::submit, saves::history))
        .routes(routes!(saves::check, saves::cancel))
        .routes(routes!(events::events))
        .routes(routes!(feed::events))
        .routes(routes!(saves::requeue))
        .routes(routes!(hurry::hurry))
        .routes(routes!(saves::audit))
        .routes(routes!(packages::of_save))
        .routes(routes!(packages::of_session))
        .routes(routes!(
            autosave_settings::autosave,
            autosave_settings::set_autosave,
            autosave_settings::unset_autosave
        ))
        .routes(routes!(
            autosave_settings::set_session_autosave,
            autosave_settings::unset_session_autosave
        ))
        .routes(routes!(timeline::timeline))
        .routes(routes!(saves::dead))
        .routes(routes!(notify::notify))
        .routes(routes!(notify::set_email))
        .routes(routes!(images::images))
        .routes(routes!(deletion::delete, rename::rename))
        .routes(routes!(
            sharing::image,
            deletion::delete_untagged,
            sharing::change
        ))
        .routes(routes!(images::quota))
        .routes(routes!(sharing::shared))
        .routes(routes!(sharing::decline))
        .routes(routes!(inventory::nodes))
        .routes(routes!(status::version))
        .routes(routes!(status::healthz))
        .routes(routes!(status::readyz))
        .routes(routes!(status::metrics))
}

/// Returns the description of the API (OpenAPI 3.1), the content of `/openapi.json`.
pub fn description() -> utoipa::openapi::OpenApi {
    let (_, mut description) = api().split_for_parts();
    describe::complete(&mut description);
    description
}

pub(super) fn router(app: App) -> Router {
    let (calls, _) = api().split_for_parts();
    // The description consists of plain data types, so serialization cannot fail.
    let description = serde_json::to_value(description()).unwrap_or_default();
    let docs = docs::router(&description);
    let text = description.to_string();
    let description = get(move || {
        let text = text.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], text) }
    });
    calls
        .route("/openapi.json", description)
        .merge(docs)
        .merge(crate::service::portal::router())
        .fallback(async || Refusal::not_found(NOTHING))
        .layer(DefaultBodyLimit::max(app.options.body_bytes))
        .layer(from_fn_with_state(app.clone(), middleware))
        .with_state(app)
}

/// Returns the request's own ID if it is safe to log, otherwise a new one.
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

/// Returns a fixed name for a method. Requests can use arbitrary methods, which would be an unbounded number of metric
/// labels.
fn method_name(method: &Method) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    let known = KNOWN.into_iter().find(|known| method == *known);
    known.unwrap_or("other")
}

/// Limits the time in which the body has to arrive. Also returns a flag that is set if it did not.
fn with_timeout(body: Body, most: Duration) -> (Body, Arc<AtomicBool>) {
    let late = Arc::new(AtomicBool::new(false));
    if body.is_end_stream() {
        return (body, late);
    }
    let until = tokio::time::Instant::now() + most;
    let state = (body.into_data_stream(), late.clone());
    let timely = stream::unfold(state, move |(mut stream, late)| async move {
        match tokio::time::timeout_at(until, stream.next()).await {
            Ok(next) => next.map(|part| (part, (stream, late))),
            Err(_) => {
                late.store(true, Ordering::Relaxed);
                let error = axum::Error::new("the body did not come in time");
                Some((Err(error), (stream, late)))
            }
        }
    });
    (Body::from_stream(timely), late)
}

fn log(app: &App, known: bool, path: &str, status: u16, took: Duration) {
    let ms = took.as_millis() as u64;
    if known {
        if status >= 500 {
            tracing::error!(http.status = status, http.ms = ms, "answered");
        } else {
            tracing::info!(http.status = status, http.ms = ms, "answered");
        }
        return;
    }
    if status < 500 && matches!(path, "/healthz" | "/readyz" | "/metrics") {
        tracing::trace!(http.status = status, http.ms = ms, "answered");
        return;
    }
    match app.log_limit.permit() {
        None => {}
        Some(0) => tracing::info!(http.status = status, http.ms = ms, "answered"),
        Some(more) => {
            tracing::info!(
                http.status = status,
                http.ms = ms,
                more,
                "answered, and more like it"
            );
        }
    }
}

/// Returns the response, or an error as soon as the record is known to be down: a request would otherwise wait for a
/// connection, which takes 20 s to fail. A change that was under way is made completely or not at all, as when a client
/// leaves.
async fn unless_down(app: &App, path: &str, response: impl Future<Output = Response>) -> Response {
    if !path.starts_with("/api/") {
        return response.await;
    }
    tokio::select! {
        biased;
        () = app.record.wait_until_down() => {
            Refusal::unavailable("the record does not answer; try again in a moment").into_response()
        }
        response = response => response,
    }
}

/// Gives errors that the framework generates the API's format.
fn as_problem(response: Response) -> Response {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error())
        || response.headers().contains_key(header::CONTENT_TYPE)
    {
        return response;
    }
    let refusal = match status {
        StatusCode::METHOD_NOT_ALLOWED => {
            Refusal::new(status, "invalid", "this address does not know this method")
        }
        StatusCode::NOT_FOUND => Refusal::not_found(NOTHING),
        _ if status.is_server_error() => Refusal::new(status, "internal", "something went wrong"),
        _ => Refusal::new(status, "invalid", "the request cannot be read"),
    };
    let allow = response.headers().get(header::ALLOW).cloned();
    let mut response = refusal.into_response();
    if let Some(allow) = allow {
        response.headers_mut().insert(header::ALLOW, allow);
    }
    response
}

/// Returns the response to a request whose address or head is too long. One with a head of more than 64 KiB or 100 fields
/// is refused before it gets here, by its status alone.
fn too_long(parts: &Parts) -> Option<Refusal> {
    let uri = parts.uri.path_and_query();
    let uri = uri.map_or(0, |both| both.as_str().len());
    let fields = parts.headers.iter();
    let head: usize = fields
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum();
    let refuse = |status, what: &str, most: usize| {
        Some(Refusal::new(
            status,
            "invalid",
            format!("{what} has more than {most} bytes"),
        ))
    };
    if uri > MAX_URI {
        refuse(StatusCode::URI_TOO_LONG, "the address", MAX_URI)
    } else if head > MAX_HEAD {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        refuse(status, "the head of the request", MAX_HEAD)
    } else {
        None
    }
}

async fn middleware(Extracted(app): Extracted<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    let method = method_name(request.method());
    let path = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "(none)".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!(
        "request",
        request.id = id,
        http.method = method,
        http.path = path,
        caller = tracing::field::Empty
    );
    let (mut parts, body) = request.into_parts();
    let cors = Cors::of(&app.options.cors_origins, &parts);
    let query = parts.uri.query().map(str::to_owned);
    let asked = (method == "GET").then(|| parts.headers.clone());
    let guard = RequestGuard::default();
    parts.extensions.insert(guard.clone());
    let (body, late) = with_timeout(body, app.options.connections.body);
    let too_long = too_long(&parts);
    let request = Request::from_parts(parts, body);
    let mut response = async {
        let refused = too_long.map(Refusal::into_response);
        let mut response = match refused.or_else(|| cors.preflight()) {
            Some(response) => response,
            None => unless_down(&app, &path, next.run(request)).await,
        };
        if late.load(Ordering::Relaxed) {
            let refusal = Refusal::new(
                StatusCode::REQUEST_TIMEOUT,
                "timed_out",
                "the body did not come in time",
            );
            response = refusal.into_response();
        }
        let (status, took) = (response.status().as_u16(), started.elapsed());
        log(&app, guard.known(), &path, status, took);
        app.metrics.request(method, &path, status, took);
        response
    }
    .instrument(span)
    .await;
    drop(guard);
    response = addressed(as_problem(response), |path| app.options.at(path));
    paging::add_link(query.as_deref(), &mut response);
    if let Some(asked) = asked {
        response = conditional::with_etag(&asked, response).await;
    }
    let headers = response.headers_mut();
    cors.mark(headers);
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
        // Headers that the page has set are kept.
        headers
            .entry(name)
            .or_insert_with(|| HeaderValue::from_static(value));
    }
    response
}
