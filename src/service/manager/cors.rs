//! Cross-origin requests (CORS): which pages of other origins may call the API with a token. Cookies are never allowed from
//! other origins, so that no page can act for who is signed in at the service's own.

use std::fmt;
use std::str::FromStr;

use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use reqwest::Url;

/// Only the API and its description, not the page.
const PATHS: [&str; 3] = ["/api/", "/openapi.json", "/version"];
const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE";
const HEADERS: &str = "authorization, content-type, idempotency-key, if-match, if-none-match, last-event-id, \
    upperdeck-request, upperdeck-user, x-request-id";
const EXPOSED: &str = "etag, link, location, retry-after, x-request-id";
/// Seconds for which a browser remembers the answer to a preflight request.
const MAX_AGE: &str = "600";

/// An origin: scheme, host and port, as browsers send it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebOrigin(String);

impl FromStr for WebOrigin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.origin().ascii_serialization() == text
                && !text.contains('*')
        });
        url.map(|_| Self(text.to_owned())).ok_or_else(|| {
            "expected an origin as browsers send it, e.g. https://portal.example.org, without a path and without wildcards"
                .to_owned()
        })
    }
}

impl fmt::Display for WebOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a request of another origin gets.
pub(super) struct Cors {
    /// Whether responses differ between origins.
    enabled: bool,
    /// The origin, if it is allowed.
    origin: Option<HeaderValue>,
    preflight: bool,
}

impl Cors {
    /// Looks at a request.
    pub(super) fn of(allowed: &[WebOrigin], request: &Parts) -> Self {
        let path = request.uri.path();
        let enabled = !allowed.is_empty() && PATHS.iter().any(|part| path.starts_with(part));
        let sent = request.headers.get(header::ORIGIN);
        let origin = sent.filter(|sent| enabled && allowed.iter().any(|one| *one.0 == **sent));
        Self {
            enabled,
            preflight: request.method == Method::OPTIONS
                && request
                    .headers
                    .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD),
            origin: origin.cloned(),
        }
    }

    /// Returns the response to a preflight request of an allowed origin.
    pub(super) fn preflight(&self) -> Option<Response> {
        let _ = self.origin.as_ref().filter(|_| self.preflight)?;
        let mut response = StatusCode::NO_CONTENT.into_response();
        let headers = response.headers_mut();
        for (name, value) in [
            (header::ACCESS_CONTROL_ALLOW_METHODS, METHODS),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        Some(response)
    }

    /// Adds the headers that let a page of an allowed origin read the response.
    pub(super) fn mark(self, headers: &mut HeaderMap) {
        if self.enabled {
            headers.append(header::VARY, HeaderValue::from_static("origin"));
        }
        if let Some(origin) = self.origin {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            let exposed = HeaderValue::from_static(EXPOSED);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_origins_can_be_named() {
        for text in [
            "https://a.example",
            "http://a.example:8080",
            "http://[::1]:1",
        ] {
            assert_eq!(
                text.parse::<WebOrigin>().map(|o| o.to_string()),
                Ok(text.into())
            );
        }
        for text in [
            "*",
            "null",
            "https://*.example",
            "https://a.example/",
            "https://a.example:443",
            "https://A.example",
            "a.example",
            "file:///x",
            "",
        ] {
            assert!(text.parse::<WebOrigin>().is_err(), "{text}");
        }
    }
}
