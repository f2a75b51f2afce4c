//! What a user needs for receiving webhooks about saves.

use axum::Json;
use axum::extract::State as Extracted;

use super::App;
use super::api::{NotifySettings, SaveEvent};
use super::auth::Caller;
use super::refusal::Refusal;

/// Returns where the user may have webhooks sent, and the secret that verifies them.
#[utoipa::path(
    get, path = "/api/v1/notify", tag = "saves",
    responses((status = 200, body = NotifySettings, description = "Origins, secret and events"), Refusal)
)]
pub(super) async fn notify(
    Extracted(app): Extracted<App>,
    caller: Caller,
) -> Result<Json<NotifySettings>, Refusal> {
    let user = caller.require_user()?;
    let settings = &app.options.webhooks;
    let secret = settings
        .secrets
        .user_text(user)
        .filter(|_| !settings.user_origins.is_empty())
        .ok_or_else(|| Refusal::not_found("users cannot name receivers here"))?;
    Ok(Json(NotifySettings {
        origins: settings
            .user_origins
            .iter()
            .map(ToString::to_string)
            .collect(),
        secret: secret.to_string(),
        events: SaveEvent::ALL.into(),
    }))
}
