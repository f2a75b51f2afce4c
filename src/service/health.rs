//! The answers of a manager and of an agent about their health, for probes and for Prometheus.

use axum::Json;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::exposition::classic;

/// Buckets for the duration of a save, in seconds.
pub(in crate::service) const SAVE_SECONDS: [f64; 8] =
    [1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 7200.0];
/// Buckets for the time for which a container is frozen, in seconds.
pub(in crate::service) const PAUSE_SECONDS: [f64; 9] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

/// Creates a registry of metrics that says which program it is of: `role` is the label with its `name`.
pub(in crate::service) fn registry(prefix: &str, role: &'static str, name: &str) -> Registry {
    let mut registry = Registry::with_prefix(prefix);
    let build = Info::new([
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        (role, name.to_owned()),
    ]);
    registry.register("build", "The program", build);
    registry
}

/// Returns the metrics of a registry in OpenMetrics 1.0.
pub(in crate::service) fn open_metrics(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, registry);
    text
}

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
