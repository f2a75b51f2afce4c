//! Conditional requests (RFC 9110, 13): the ETag of what a GET returns, 304 if the caller has it already, and changes only
//! if nothing has changed meanwhile.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::refusal::Refusal;

/// Maximum size of a body that gets an ETag; no list is as long.
const MAX_BODY: usize = 64 << 20;
/// Media types of bodies that get one: not those of streams.
const KINDS: [&[u8]; 3] = [
    b"application/json",
    b"text/html; charset=utf-8",
    b"text/css; charset=utf-8",
];

fn etag(body: &[u8]) -> String {
    format!("\"{}\"", &hex::encode(Sha256::digest(body))[..32])
}

/// Returns whether one of the tags in a header is `tag`, or is `*`. A weak tag, which a proxy that compresses makes of a
/// strong one, counts only if `weak`.
fn names(headers: &HeaderMap, name: HeaderName, tag: &str, weak: bool) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|one| one == "*" || one == tag || (weak && one.strip_prefix("W/") == Some(tag)))
}

/// Adds the ETag to a successful response. Returns 304 instead if `asked` names it in `If-None-Match`.
pub(super) async fn with_etag(asked: &HeaderMap, response: Response) -> Response {
    let headers = response.headers();
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let whole = kind.is_some_and(|kind| KINDS.contains(&kind));
    if response.status() != StatusCode::OK || !whole || headers.contains_key(header::ETAG) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let body = match axum::body::to_bytes(body, MAX_BODY).await {
        Ok(body) => body,
        Err(error) => return Refusal::internal(&error).into_response(),
    };
    let tag = etag(&body);
    let value = HeaderValue::from_str(&tag).unwrap_or(HeaderValue::from_static("\"\""));
    if names(asked, header::IF_NONE_MATCH, &tag, true) {
        let mut response = StatusCode::NOT_MODIFIED.into_response();
        let headers = response.headers_mut();
        headers.insert(header::ETAG, value);
        if let Some(link) = parts.headers.remove(header::LINK) {
            headers.insert(header::LINK, link);
        }
        return response;
    }
    parts.headers.insert(header::ETAG, value);
    Response::from_parts(parts, Body::from(body))
}

/// Refuses a change of `current` whose `If-Match` does not name its ETag.
pub(super) fn check_unchanged(asked: &HeaderMap, current: &impl Serialize) -> Result<(), Refusal> {
    if !asked.contains_key(header::IF_MATCH) {
        return Ok(());
    }
    let body = serde_json::to_vec(current).unwrap_or_default();
    if names(asked, header::IF_MATCH, &etag(&body), false) {
        return Ok(());
    }
    Err(has_changed())
}

/// Returns the refusal of a change of what has changed since the caller got it.
pub(super) fn has_changed() -> Refusal {
    Refusal::new(
        StatusCode::PRECONDITION_FAILED,
        "precondition_failed",
        "it has changed since this ETag; get it again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_found_in_lists() {
        let has = |text: &'static str, weak| {
            let mut headers = HeaderMap::new();
            headers.append(header::IF_NONE_MATCH, HeaderValue::from_static("\"x\""));
            headers.append(header::IF_NONE_MATCH, HeaderValue::from_static(text));
            names(&headers, header::IF_NONE_MATCH, "\"a\"", weak)
        };
        for text in ["\"a\"", "\"b\", \"a\"", "*", "W/\"b\",\"a\""] {
            assert!(has(text, false), "{text}");
        }
        assert!(has("W/\"a\"", true) && !has("W/\"a\"", false));
        for text in ["", "a", "\"b\"", "\"a", "W/"] {
            assert!(!has(text, true), "{text}");
        }
    }
}
