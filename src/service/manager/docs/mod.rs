//! The documentation of the API as web pages: `/docs`, made of the OpenAPI document, and `/docs/errors`, to which the types
//! of problems lead. Plain HTML without scripts, made once; everything comes from the program itself.

mod page;

use axum::Router;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde_json::Value;

/// Content security policy of the pages: they may use their own style, nothing else.
const POLICY: &str = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";
const STYLE: &str = include_str!("style.css");

fn answer(kind: &'static str, text: String) -> Response {
    let headers = [
        (CONTENT_TYPE, kind),
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, POLICY),
    ];
    (headers, text).into_response()
}

/// Returns the routes of the pages about the API that `description` describes.
pub(super) fn router<S: Clone + Send + Sync + 'static>(description: &Value) -> Router<S> {
    let html = "text/html; charset=utf-8";
    let (api, errors) = (page::api(description), page::errors());
    Router::new()
        .route("/docs", get(async move || answer(html, api)))
        .route("/docs/errors", get(async move || answer(html, errors)))
        .route(
            "/docs/style.css",
            get(async || answer("text/css; charset=utf-8", STYLE.to_owned())),
        )
}
