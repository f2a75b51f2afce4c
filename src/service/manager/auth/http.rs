//! Requests to identity providers: over TLS or to a loopback address, without redirects, bounded in time and size.

use std::time::Duration;

/// Time limit of a request, including its response.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a response in bytes.
const MAX_BYTES: usize = 1 << 20;

/// Why there is no response.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Failure(pub(super) String);

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self(crate::common::message::of(&error))
    }
}

/// Parses a URL of an identity provider. Plain HTTP is permitted for loopback addresses.
///
/// Fails if it is not a URL, or would be requested without TLS.
pub(super) fn url(text: &str) -> Result<reqwest::Url, Failure> {
    let url = reqwest::Url::parse(text).map_err(|error| {
        Failure(format!(
            "{}: {error}",
            crate::common::escape::limited(text, 200)
        ))
    })?;
    let host = url.host_str().unwrap_or_default();
    let plain = url.scheme() == "http" && crate::common::reference::is_loopback(host);
    if url.scheme() == "https" || plain {
        return Ok(url);
    }
    Err(Failure(format!(
        "{}: only https is used, and http for loopback addresses",
        crate::common::escape::limited(text, 200)
    )))
}

/// Sends a request and reads the whole response.
pub(super) async fn call(
    request: http::Request<Vec<u8>>,
) -> Result<http::Response<Vec<u8>>, Failure> {
    let to = url(&request.uri().to_string())?;
    let client = crate::store::registry::http_client(to.host_str().unwrap_or_default())
        .timeout(TIMEOUT)
        .build()?;
    let mut answer = client.execute(request.try_into()?).await?;
    let mut response = http::Response::new(Vec::new());
    *response.status_mut() = answer.status();
    *response.headers_mut() = answer.headers().clone();
    while let Some(more) = answer.chunk().await? {
        if response.body().len() + more.len() > MAX_BYTES {
            return Err(Failure(format!("{to}: the response is too large")));
        }
        response.body_mut().extend_from_slice(&more);
    }
    Ok(response)
}

/// Fetches a text.
pub(super) async fn get(url: &str) -> Result<String, Failure> {
    let request = http::Request::get(url).body(Vec::new());
    let response = call(request.map_err(|error| Failure(error.to_string()))?).await?;
    if !response.status().is_success() {
        return Err(Failure(format!("{url}: HTTP status {}", response.status())));
    }
    String::from_utf8(response.into_body()).map_err(|_| Failure("it is not UTF-8".to_owned()))
}
