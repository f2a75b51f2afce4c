//! The answers of a manager and of an agent about their health, for probes and for Prometheus.

use axum::Json;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::exposition::classic;

/// `/readyz` and `/healthz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Health {
    /// Whether requests are served.
    pub(crate) ready: bool,
    /// Missing parts, e.g. `record` or `queue`, each with a reason.
    pub(crate) missing: Vec<String>,
}

impl Health {
    /// Returns the answer to a probe: 200 if nothing is missing, else 503.
    pub(in crate::service) fn answer(missing: Vec<String>) -> (StatusCode, Json<Self>) {
        let ready = missing.is_empty();
        let status = if ready {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        (status, Json(Self { ready, missing }))
    }
}

/// Returns metrics in OpenMetrics 1.0 if `Accept` names that, else in the text format 0.0.4. `text` is in OpenMetrics.
pub(in crate::service) fn metrics(headers: &HeaderMap, text: String) -> Response {
    let accepted = headers.get_all(header::ACCEPT).iter();
    let open = accepted
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/openmetrics-text"));
    let (kind, text) = if open {
        (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            text,
        )
    } else {
        ("text/plain; version=0.0.4; charset=utf-8", classic(&text))
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
