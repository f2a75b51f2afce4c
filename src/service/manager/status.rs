//! Handlers beside the core API: the caller's identity, health, and metrics.

use axum::Json;
use axum::extract::State as Extracted;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

use super::App;
use super::api::{Me, Version};
use super::auth::Caller;
use super::refusal::Refusal;
use crate::service::health::{self, Health};

/// Version of the API, as in its paths.
const API: &str = "v1";

/// Returns the identity of the caller.
#[utoipa::path(
    get, path = "/api/v1/me", tag = "sessions",
    responses((status = 200, body = Me, description = "The caller"), Refusal)
)]
pub(super) async fn me(
    Extracted(app): Extracted<App>,
    caller: Caller,
) -> Result<Json<Me>, Refusal> {
    let user = caller.own_user()?.unwrap_or_default();
    let email = super::notify::email(&app, &caller).await?;
    Ok(Json(Me {
        user: user.to_owned(),
        administrator: caller.administrator,
        via: caller.via,
        groups: caller.groups,
        start_url: app.options.start_url.clone(),
        email,
    }))
}

/// Returns the version of the manager.
#[utoipa::path(
    get, path = "/version", tag = "operations", security(()),
    responses((status = 200, body = Version, description = "The version"))
)]
pub(super) async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: option_env!("UPPERDECK_COMMIT").map(str::to_owned),
        api: API.to_owned(),
    })
}

/// Reports that the process responds.
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(()),
    responses((status = 200, body = Health, description = "The process answers"))
)]
pub(super) async fn healthz() -> Json<Health> {
    Json(Health {
        ready: true,
        missing: Vec::new(),
    })
}

/// Reports whether the manager can serve requests, and what is missing.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses(
        (status = 200, body = Health, description = "Record and queue answer"),
        (status = 503, body = Health, description = "Something is missing, or the manager is about to end")
    )
)]
pub(super) async fn readyz(Extracted(app): Extracted<App>) -> (StatusCode, Json<Health>) {
    let mut missing = app.ready.missing(&app).await;
    if app.cancel.is_cancelled() {
        missing.push("manager: it is about to end".to_owned());
    }
    Health::answer(missing)
}

/// The latest result of the readiness check. The endpoint needs no authentication, so the record and the queue are
/// queried at most once per second.
#[derive(Default)]
pub(super) struct Readiness(Mutex<Option<(Instant, Vec<String>)>>);

impl Readiness {
    async fn missing(&self, app: &App) -> Vec<String> {
        const FRESH: Duration = Duration::from_secs(1);
        let mut held = self.0.lock().await;
        if let Some((at, missing)) = &*held
            && at.elapsed() < FRESH
        {
            return missing.clone();
        }
        let missing = look(app).await;
        *held = Some((Instant::now(), missing.clone()));
        missing
    }
}

async fn look(app: &App) -> Vec<String> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut missing = Vec::new();
    let (record, queue) = tokio::join!(
        tokio::time::timeout(PATIENCE, async {
            if app.record.is_down() {
                // The watch of the record has logged why.
                return Err(());
            }
            app.record
                .ping()
                .await
                .map_err(|error| tracing::warn!(%error, "not ready"))
        }),
        tokio::time::timeout(PATIENCE, app.queue.ping()),
    );
    // The reasons go to the log only, because the endpoint needs no authentication.
    match record {
        Ok(Ok(())) => {}
        Ok(Err(())) => {
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
    missing
}

/// Metrics for Prometheus, in OpenMetrics 1.0 if `Accept` names that, else in the text format 0.0.4.
#[utoipa::path(
    get, path = "/metrics", tag = "operations", security(()),
    responses((
        status = 200, description = "The metrics of this manager",
        content((String = "text/plain"), (String = "application/openmetrics-text"))
    ))
)]
pub(super) async fn metrics(Extracted(app): Extracted<App>, headers: HeaderMap) -> Response {
    health::metrics(&headers, app.metrics.text())
}
